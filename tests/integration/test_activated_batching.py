"""Activated adapters in continuous batching: pages before their start are the base model's."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from activated import activated_pair, words
from tiny import make_model

import lora_ext
from lora_ext.serving._continuous import computed_tokens
from lora_ext.serving._engine import Engine

NEW, PAGE = 6, 8
ENDS: dict[Any, list[int]] = {"act": [7, 8], "other": [5], "plain": [60], None: [61]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with torch.no_grad():
        yield activated_pair(tmp_path_factory.mktemp("activated"))


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
    """What a request alone is answered, and how many tokens were computed for it."""
    before = computed_tokens(manager)
    request = manager.add_request(prompt, adapter_name=name, **how)
    result = manager.get_result(request_id=request, timeout=120)
    assert result is not None and result.error is None
    return result.generated_tokens, computed_tokens(manager) - before


def tailed(shared: list[int], name: str | None, seed: int) -> list[int]:
    return [*shared, *ENDS[name], *words(5, seed)]


@pytest.mark.slow
@pytest.mark.parametrize("most", [8, 64])
def test_requests_that_share_a_prefix_are_as_alone(pair: Any, most: int) -> None:
    model, reference, _ = pair
    shared = words(37, 9)
    names = [*ENDS, *ENDS]
    asked = [tailed(shared, name, i) for i, name in enumerate(names)]
    results = model.generate_batch(asked, adapter_names=names, **batching(max_batch_tokens=most))
    found = [result.generated_tokens for result in results.values()]
    assert found == [alone(reference, p, n) for p, n in zip(asked, names, strict=True)]


@pytest.mark.slow
def test_adapters_read_the_pages_that_the_base_model_has_written(pair: Any) -> None:
    model, reference, _ = pair
    shared = words(40, 9)
    with running(model) as manager:
        said, _ = ask(manager, shared[:-6], None)  # ends at token 40, the last of a page
        assert len(shared) - 6 + len(said) == 40
        read = shared[:-6] + said
        for seed, name in enumerate(["act", "other", "act"]):
            asked = tailed(read, name, seed)
            answer, computed = ask(manager, asked, name)
            assert answer == alone(reference, asked, name)
            # All but the page of the base's last token, which nobody has read yet.
            assert computed == len(asked) - (32 if seed == 0 else 40) + NEW - 1
        asked = tailed(read, "plain", 3)
        answer, computed = ask(manager, asked, "plain")
        assert answer == alone(reference, asked, "plain")
        assert computed == len(asked) + NEW - 1


@pytest.mark.slow
def test_the_page_of_a_request_s_last_step_is_shared_too(pair: Any) -> None:
    model, _, _ = pair
    shared = words(40, 9)
    with running(model) as manager:
        ask(manager, shared, None, max_new_tokens=1)  # one step, in which it ends
        _, computed = ask(manager, tailed(shared, "act", 0), "act", max_new_tokens=1)
        assert computed == len(tailed(shared, "act", 0)) - 40


@pytest.mark.slow
def test_equal_tokens_of_a_page_with_two_starts_are_two_pages(pair: Any) -> None:
    model, reference, _ = pair
    head = words(31, 9)
    head[26:28] = [7, 8]  # page 24..31 ends in the head of a second invocation, or not
    first = [*head, 7, 9, *words(5, 8)]
    second = [*head, 7, 8, *words(5, 8)]
    assert first[:32] == second[:32]
    with running(model) as manager:
        for asked in (first, second, first):
            assert ask(manager, asked, "act")[0] == alone(reference, asked, "act")


@pytest.mark.slow
def test_a_prompt_without_its_invocation_is_refused_or_the_base_model_s(pair: Any) -> None:
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
def test_an_engine_sends_one_request_ahead_over_an_unread_text(tmp_path: Path) -> None:
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
        computed = computed_tokens(engine.manager)
        with pytest.raises(ValueError, match=r"expected the invocation \[7, 8\] of adapter 'act'"):
            asyncio.run(answer(shared, "act"))
    assert found == [alone(reference, *pair) for pair in zip(asked, names, strict=True)]
    assert computed == sum(map(len, asked)) - 3 * 40 + 4 * (NEW - 1)
