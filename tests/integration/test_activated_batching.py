"""Activated adapters in an attached model, compared with PEFT, also in continuous batching."""

import asyncio
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from activated import NAMES, activated_pair, prompts, words
from tiny import make_model

import lora_ext
from lora_ext.serving._continuous import adapter_requests
from lora_ext.serving._engine import Engine

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with torch.no_grad():
        yield activated_pair(tmp_path_factory.mktemp("activated"))


def test_forward_of_a_mixed_batch_equals_peft(pair: Any) -> None:
    model, reference, _ = pair
    ids = prompts()
    theirs = reference(input_ids=ids, adapter_names=NAMES).logits
    base = model(ids).logits
    assert torch.equal(model(ids, adapter_names=NAMES).logits[0, :12], base[0, :12])
    assert (theirs - base)[0, 12:].abs().max() > 0.1
    for how in ({}, {"input_ids": ids}, {"starts": [12, 15, None, None]}):
        with lora_ext.adapters(NAMES, **how):
            torch.testing.assert_close(model(ids).logits, theirs, atol=1e-5, rtol=1e-5)
            kept = model(ids, logits_to_keep=6).logits
            torch.testing.assert_close(kept, theirs[:, -6:], atol=1e-5, rtol=1e-5)


def test_starts_count_left_padding(pair: Any) -> None:
    model, reference, _ = pair
    ids, mask = prompts(), torch.ones(4, 20, dtype=torch.long)
    mask[0, :6] = mask[2, :9] = 0
    how = {"attention_mask": mask, "adapter_names": NAMES}
    theirs, ours = reference(input_ids=ids, **how).logits, model(ids, **how).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)
    assert torch.equal(
        model.generate(ids, **how, **GREEDY), reference.generate(input_ids=ids, **how, **GREEDY)
    )


MODES: dict[str, dict[str, Any]] = {
    "a cache": {},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_equals_peft_with_a_cache(pair: Any, mode: str) -> None:
    model, reference, _ = pair
    ids = prompts()
    theirs = reference.generate(input_ids=ids, adapter_names=NAMES, **GREEDY)
    base = model.generate(ids, **GREEDY)
    assert (theirs != base)[:3].any(1).all()
    ours = model.generate(ids, adapter_names=NAMES, **GREEDY, **MODES[mode])
    assert torch.equal(ours, theirs)
    with lora_ext.adapters(NAMES):  # The same block applies to successive prompts.
        other = model.generate(prompts(seed=1), **GREEDY, **MODES[mode])
        assert torch.equal(model.generate(ids, **GREEDY, **MODES[mode]), theirs)
    assert not torch.equal(other, theirs)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_generate_for_one_row_equals_peft(pair: Any, how: dict[str, Any]) -> None:
    model, reference, _ = pair
    ids = prompts()[:1]
    theirs = reference.generate(input_ids=ids, adapter_names=["act"], **GREEDY)
    if how.pop("assistant", False):
        how["assistant_model"] = make_model("llama")
    assert torch.equal(model.generate(ids, adapter_names=["act"], **GREEDY, **how), theirs)


def test_beams_inherit_the_start_of_their_prompt(pair: Any) -> None:
    model, _, _ = pair
    ids = prompts()[:2]
    how = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    out = model.generate(
        ids, adapter_names=["act", "other"], return_dict_in_generate=True, **how, **GREEDY
    )
    names, starts = ["act", "act", "other", "other"], [12, 12, 15, 15]
    with lora_ext.adapters(names, starts=starts):
        law = model(out.sequences).logits.log_softmax(-1)[:, 19:-1]
    scores = law.gather(2, out.sequences[:, 20:, None]).sum((1, 2)) / GREEDY["max_new_tokens"]
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-5, rtol=1e-5)


def test_forwards_with_a_cache_equal_the_whole_forward_of_peft(pair: Any) -> None:
    from transformers import DynamicCache

    model, reference, _ = pair
    ids = prompts()[:1]
    whole = reference(input_ids=ids, adapter_names=["act"]).logits[:, -1]
    close = {"atol": 1e-5, "rtol": 1e-5}

    def read_by_base(upto: int) -> dict[str, Any]:
        cache = DynamicCache()
        model(ids[:, :upto], cache=cache, adapter_names="__base__")
        return {"cache": cache}

    # The base model computed the cache of the tokens before the adapter starts.
    with lora_ext.adapters("act"):
        ours = model(ids[:, 10:], **read_by_base(10)).logits[:, -1]
        torch.testing.assert_close(ours, whole, **close)
        cache = DynamicCache()
        model(ids[:, :14], cache=cache)
        for t in range(14, 20):  # The block has stored where the adapter starts.
            ours = model(ids[:, t : t + 1], cache=cache).logits[:, -1]
        torch.testing.assert_close(ours, whole, **close)
    with lora_ext.adapters("act", starts=12):
        cache = read_by_base(12)
        model(ids[:, 12:19], **cache)
        torch.testing.assert_close(model(ids[:, 19:], **cache).logits[:, -1], whole, **close)
    with lora_ext.adapters("act"):
        with pytest.raises(ValueError, match=r"starts: .*'act'.*continues a cache of 19 tokens"):
            model(ids[:, 19:], **read_by_base(19))
        with pytest.raises(ValueError, match=r"starts: expected .*without input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
    begun = read_by_base(10)
    ours = model.generate(ids, adapter_names=["act"], **begun, **GREEDY)
    assert torch.equal(ours, reference.generate(input_ids=ids, adapter_names=["act"], **GREEDY))


def test_row_without_its_invocation_equals_the_base_model(pair: Any) -> None:
    model, reference, _ = pair
    ids = prompts()[2:3]  # This row contains no invocation tokens.
    base = model.generate(ids, **GREEDY)
    with pytest.warns(UserWarning, match=r"row 0 lacks the invocation of adapter 'act', \[7, 8\]"):
        assert torch.equal(model.generate(ids, adapter_names=["act"], **GREEDY), base)
    with pytest.warns(UserWarning, match="lacks the invocation") as told:
        with lora_ext.adapters("act", input_ids=ids):
            assert torch.equal(model(ids).logits, model(ids, adapter_names=[None]).logits)
            assert torch.equal(model.generate(ids, **GREEDY), base)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(prompts(), adapter_names=NAMES)
    theirs = reference.generate(input_ids=ids, adapter_names=["act"], **GREEDY)
    assert torch.equal(theirs, base)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"input_ids": prompts(), "starts": [1, 2, 3, 4]},
            "input_ids and starts: expected at",
        ),
        ({"input_ids": prompts()[:2]}, "input_ids: expected 4 rows, as the names require, found 2"),
        ({"input_ids": prompts().float()}, "input_ids: expected integers, found torch.float32"),
        ({"input_ids": prompts()[0]}, r"input_ids: expected \(B, T\), found \(20,\)"),
        ({"starts": [1, 2]}, "starts: expected a position or None for each of 4 names, found 2"),
        ({"starts": [1, 2, 3, -1]}, "starts: expected positions"),
        ({"starts": [1, 2, 3, 0.5]}, "starts: expected positions"),
    ],
)
def test_wrong_starts_raise_and_name_the_argument(
    pair: Any, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), lora_ext.adapters(NAMES, **how):
        pass


def test_token_ids_replace_starts_and_guidance_raises(pair: Any) -> None:
    model, _, _ = pair
    ids = prompts()[:1]
    with lora_ext.adapters("act"):
        expected = model(ids).logits
    token_ids = torch.where(torch.arange(20) >= 12, 0, -1)[None]
    with lora_ext.adapters(["act"], token_ids):
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(NotImplementedError, match="guidance_scale: expected None or 1 "):
        pair[0].generate(prompts()[:1], adapter_names=["act"], guidance_scale=1.5, **GREEDY)


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"alora_invocation_tokens": [97]}, ValueError, "ids below the vocabulary size 97, found 97"),
    ({"alora_invocation_tokens": [-1]}, ValueError, "non-negative integers"),
    ({"alora_invocation_tokens": "<a>"}, ValueError, "a list of token ids"),
    ({"use_dora": True}, NotImplementedError, "use_dora is not supported together with alora_inv"),
    ({"modules_to_save": ["lm_head"]}, NotImplementedError, "modules_to_save is not supported"),
    ({"target_parameters": ["x"]}, NotImplementedError, "target_parameters is not supported tog"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_adapters_that_would_change_the_prefix_raise_at_load(
    pair: Any, changes: dict[str, Any], error: type, message: str
) -> None:
    from peft import get_peft_model_state_dict

    _, reference, pool = pair
    config = reference.peft_config["act"].to_dict() | changes
    state = get_peft_model_state_dict(reference, adapter_name="act")
    with pytest.raises(error, match=message):
        pool.load("new", (config, state))
    assert "new" not in pool


def test_activated_adapter_on_an_embedding_raises_at_load(pair: Any) -> None:
    from peft import get_peft_model_state_dict

    model, reference, pool = pair
    state = get_peft_model_state_dict(reference, adapter_name="act")
    table = model.get_input_embeddings().weight
    stem = "base_model.model.model.embed_tokens.lora_embedding"
    more = {f"{stem}_A": torch.ones(4, len(table)), f"{stem}_B": torch.ones(table.shape[1], 4)}
    config = reference.peft_config["act"].to_dict()
    config["target_modules"] = [*config["target_modules"], "embed_tokens"]
    with pytest.raises(NotImplementedError, match=r"linear layers, found .* 'model.embed_tokens'"):
        pool.load("new", (config, {**state, **more}))
    assert "new" not in pool


NEW, PAGE = 6, 8
ENDS: dict[Any, list[int]] = {"act": [7, 8], "other": [5], "plain": [60], None: [61]}


def batching(**fields: Any) -> dict[str, Any]:
    return tiny.batching(NEW, **{"page_size": PAGE, "max_batch_tokens": 32, **fields})


def alone(reference: Any, prompt: list[int], name: str | None) -> list[int]:
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out = reference.generate(input_ids=ids, adapter_names=[name or "__base__"], **how)
    return out[0, len(prompt) :].tolist()


@contextmanager
def running(model: Any) -> Iterator[Any]:
    manager = model.init_continuous_batching(**batching())
    with torch.inference_mode():
        manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True)


def ask(manager: Any, prompt: list[int], name: str | None, **how: Any) -> tuple[list[int], int]:
    """Return the answer to a single request, and the number of tokens computed for it."""
    before = adapter_requests(manager).computed
    request = manager.add_request(prompt, adapter_name=name, **how)
    result = manager.get_result(request_id=request, timeout=120)
    assert result is not None and result.error is None
    return result.generated_tokens, adapter_requests(manager).computed - before


def tailed(shared: list[int], name: str | None, seed: int) -> list[int]:
    return [*shared, *ENDS[name], *words(5, seed)]


@pytest.mark.slow
@pytest.mark.parametrize("most", [8, 64])
def test_requests_that_share_a_prefix_equal_single_requests(pair: Any, most: int) -> None:
    model, reference, _ = pair
    shared = words(37, 9)
    names = [*ENDS, *ENDS]
    asked = [tailed(shared, name, i) for i, name in enumerate(names)]
    results = model.generate_batch(asked, adapter_names=names, **batching(max_batch_tokens=most))
    found = [result.generated_tokens for result in results.values()]
    assert found == [alone(reference, p, n) for p, n in zip(asked, names, strict=True)]


@pytest.mark.slow
def test_adapters_reuse_the_cache_pages_of_the_base_model(pair: Any) -> None:
    model, reference, _ = pair
    shared = words(40, 9)
    with running(model) as manager:
        # The answer ends at token 40, the last one of a page.
        said, _ = ask(manager, shared[:-6], None)
        assert len(shared) - 6 + len(said) == 40
        read = shared[:-6] + said
        for seed, name in enumerate(["act", "other", "act"]):
            asked = tailed(read, name, seed)
            answer, computed = ask(manager, asked, name)
            assert answer == alone(reference, asked, name)
            # The request reuses shared pages and computes all other tokens. The first request also
            # computes the page that ends with the last token of the base model, because no forward
            # pass had read this token.
            assert computed == len(asked) - (32 if seed == 0 else 40) + NEW - 1
        asked = tailed(read, "plain", 3)
        answer, computed = ask(manager, asked, "plain")
        assert answer == alone(reference, asked, "plain")
        assert computed == len(asked) + NEW - 1


@pytest.mark.slow
def test_page_of_the_last_step_is_shared_but_not_equal_tokens_with_two_starts(pair: Any) -> None:
    model, _, _ = pair
    shared = words(40, 9)
    with running(model) as manager:
        ask(manager, shared, None, max_new_tokens=1)  # The request ends in its first step.
        _, computed = ask(manager, tailed(shared, "act", 0), "act", max_new_tokens=1)
        assert computed == len(tailed(shared, "act", 0)) - 40
    model, reference, _ = pair
    head = words(31, 9)
    # The page of tokens 24 to 31 ends with 7, which starts a second invocation only if 8 follows.
    head[26:28] = [7, 8]
    first = [*head, 7, 9, *words(5, 8)]
    second = [*head, 7, 8, *words(5, 8)]
    assert first[:32] == second[:32]
    with running(model) as manager:
        for asked in (first, second, first):
            assert ask(manager, asked, "act")[0] == alone(reference, asked, "act")


@pytest.mark.slow
def test_prompt_without_its_invocation_raises_or_uses_the_base_model(pair: Any) -> None:
    model, reference, _ = pair
    plain = words(12, 9)
    asked, names = [[*plain, 7, 8], plain], ["act", "act"]
    message = r"inputs\[1\]: expected the invocation \[7, 8\] of adapter 'act'"
    with pytest.raises(ValueError, match=message):
        model.generate_batch(asked, adapter_names=names, **batching())
    with pytest.raises(ValueError, match=message), lora_ext.adapters(names):
        model.generate_batch(asked, **batching())
    results = model.generate_batch(asked, adapter_names=names, allow_base=True, **batching())
    found = [result.generated_tokens for result in results.values()]
    assert found == [alone(reference, asked[0], "act"), alone(reference, plain, None)]
    with running(model) as manager:
        with pytest.raises(ValueError, match=r"request 'mine': expected .* adapter 'act'"):
            manager.add_request(plain, "mine", adapter_name="act")
        assert ask(manager, plain, "act", allow_base=True)[0] == alone(reference, plain, None)


@pytest.mark.slow
def test_engine_sends_one_request_ahead_over_an_unread_text(tmp_path: Path) -> None:
    _, reference, _ = activated_pair(tmp_path)
    tokenizer = SimpleNamespace(eos_token_id=-1, chat_template=None)
    engine = Engine(make_model("llama"), tokenizer, tmp_path, context=64, page_size=PAGE)
    engine.encode = lambda messages: list(messages)  # pyright: ignore
    shared, names = words(40, 9), ["act", "other", None, "act"]
    asked = [tailed(shared, name, 0) for name in names]

    async def answer(prompt: Any, name: str | None) -> list[int]:
        stream = await engine.begin(prompt, name, NEW)
        async for _ in stream:
            pass
        return stream.tokens

    async def answers() -> list[list[int]]:
        return await asyncio.gather(*map(answer, asked, names))

    with torch.no_grad(), engine:
        found = asyncio.run(answers())
        computed = adapter_requests(engine.manager).computed
        with pytest.raises(ValueError, match=r"expected the invocation \[7, 8\] of adapter 'act'"):
            asyncio.run(answer(shared, "act"))
    assert found == [alone(reference, *pair) for pair in zip(asked, names, strict=True)]
    assert computed == sum(map(len, asked)) - 3 * 40 + 4 * (NEW - 1)
