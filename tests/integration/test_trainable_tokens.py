"""Adapters with rows of the embedding (PEFT's ``trainable_token_indices``), served from a pool."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import attach_saved, batching, make_model, make_peft, tokens

import lora_ext
from lora_ext.adapter import LoraAdapter
from lora_ext.rows._pool_layer import pool_of

BOUND = 1e-4
NAMES = ["red", None, "blue", "green", "red"]
#: ``trainable_token_indices`` of each adapter: red and blue have different rows, green has none.
ROWS: dict[str, Any] = {"red": [3, 5, 96], "blue": {"embed_tokens": [5, 7]}, "green": None}
STEM = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def make(tied: bool) -> Any:
    model: Any = make_model("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, Any, Path]]:
    model, folder = make(request.param), tmp_path_factory.mktemp("rows")
    configs = {
        name: {"r": 2 + i, "target_modules": ["q_proj"], "trainable_token_indices": rows}
        for i, (name, rows) in enumerate(ROWS.items())
    }
    # PEFT cannot save all three adapters from one model.
    plain = make_peft(model, {"green": configs.pop("green")})
    theirs = make_peft(model, configs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for each in (plain, theirs):
        each.eval().save_pretrained(folder)

    def alone(name: str) -> Any:
        each: Any = plain if name == "green" else theirs
        each.set_adapter(name)
        return each

    yield model, alone, folder


def serve(model: Any, folder: Path) -> tuple[Any, lora_ext.AdapterPool]:
    served = attach_saved(copy.deepcopy(model), folder, ROWS, slots=3, rank=8)
    return served, pool_of(served)


def test_rows_of_a_batch_use_the_tokens_of_their_adapter(trained: Any) -> None:
    plain, theirs, folder = trained
    model, pool = serve(plain, folder)
    ids = torch.cat([tokens(len(NAMES), 6) % 90 + 5, torch.tensor([[3, 5, 7, 96]] * len(NAMES))], 1)
    with torch.no_grad():
        base = plain(ids).logits
        mixed = model(ids, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            if name is None:
                assert torch.equal(mixed[row], base[row])
                continue
            expected = theirs(name)(input_ids=ids[row : row + 1]).logits[0]
            assert (mixed[row] - expected).abs().max() < BOUND, name
            assert (mixed[row] - base[row]).abs().max() > 100 * BOUND
        # The pool stores only the rows of red and blue, twice if the head is tied.
        tied = model.lm_head.base.weight is model.model.embed_tokens.base.weight
        assert pool.stats()["replaced_bytes"] == (3 + 2) * (32 * 4 + 8) * (1 + tied)
        for name in ("red", "blue"):
            pool.unload(name)
        assert pool.stats()["replaced_bytes"] == 0
        assert torch.equal(model(ids).logits, base)


@pytest.mark.slow
def test_generation_and_continuous_batching_use_the_token_rows(trained: Any) -> None:
    plain, theirs, folder = trained
    model, _ = serve(plain, folder)
    ids, names = tokens(4, 6), ["red", None, "blue", "green"]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    mixed = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=names, **how)
    for row, name in enumerate(names):
        one = {"attention_mask": torch.ones(1, 6, dtype=torch.int64), **how}
        one_s: Any = plain if name is None else theirs(name)
        expected = one_s.generate(input_ids=ids[row : row + 1], **one)
        assert torch.equal(mixed[row], expected[0]), name
    found = model.generate_batch(ids.tolist(), adapter_names=names, **batching(8))
    assert [r.generated_tokens for r in found.values()] == mixed[:, 6:].tolist()


def test_token_rows_are_loaded_and_evicted_with_their_adapters(trained: Any) -> None:
    plain, theirs, folder = trained
    model = copy.deepcopy(plain)
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    lora_ext.attach(model, pool)
    pool.load("live", theirs("red"), adapter_name="red")
    ids = torch.tensor([[3, 5, 7, 9]])
    for name in ("red", "blue", "green", "red", "blue"):
        if name not in pool:
            pool.load(name, folder / name)  # The previous adapter is evicted and restored.
        with torch.no_grad():
            found = model(ids, adapter_names=name).logits
            assert (found - theirs(name)(input_ids=ids).logits).abs().max() < BOUND
    with torch.no_grad():
        live = model(ids, adapter_names="live").logits
        assert torch.equal(live, model(ids, adapter_names="red").logits)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True], indirect=True, ids=["tied"])
def test_compiled_model_follows_the_token_rows(trained: Any) -> None:
    torch._dynamo.reset()
    plain, _, folder = trained
    model, _ = serve(plain, folder)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[3, 5, 7, 9]] * 3)
    with torch.no_grad():
        for names in (["red", None, "blue"], ["green", "blue", None]):
            with lora_ext.adapters(names):
                torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_captured_step_rejects_token_rows_and_serves_other_adapters(trained: Any) -> None:
    plain, _, folder = trained
    model, pool = serve(plain, folder)
    step, ids = lora_ext.capturable(pool, max_rows=2), torch.tensor([[5], [7]])
    with torch.no_grad():
        expected = model(ids, adapter_names=["green", None]).logits
        with step, lora_ext.adapters(["green", None]):
            assert torch.allclose(model(ids).logits, expected, atol=1e-6)
        with pytest.raises(NotImplementedError, match="without trainable_token_indices"):
            with step, lora_ext.adapters(["red", None]):
                model(ids)


def test_rows_that_do_not_fit_raise_and_the_pool_is_unchanged(tmp_path: Path) -> None:
    model = make(False)
    fields = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    make_peft(model, {"default": fields}).save_pretrained(tmp_path)
    raw = peft.LoraConfig.from_pretrained(tmp_path).to_dict()
    good = load_file(tmp_path / "adapter_model.safetensors")
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    rows = good[STEM]
    for changes, state, error, message in (
        ({}, {STEM: rows[:1]}, ValueError, r"delta: shape: expected \(2, 32\)"),
        ({}, {STEM: rows.int()}, ValueError, "delta: dtype: expected float16"),
        ({}, {STEM: rows * torch.nan}, ValueError, "trainable_token_indices: .*finite"),
        ({}, {STEM: None}, ValueError, "the rows of trainable_token_indices, found none"),
        ({"trainable_token_indices": None}, {}, ValueError, "trainable_tokens_delta"),
        ({"trainable_token_indices": [3, 97]}, {}, ValueError, "tokens up to 96, found 97"),
        ({"trainable_token_indices": [3, 3]}, {}, ValueError, "distinct tokens"),
        ({"trainable_token_indices": [3, -1]}, {}, ValueError, "an integer from 0, found -1"),
        ({"trainable_token_indices": "ab"}, {}, ValueError, "a list of tokens"),
        (
            {"trainable_token_indices": {"lm_head": [3, 5]}},
            {},
            NotImplementedError,
            "the input emb",
        ),
        ({"alora_invocation_tokens": [1]}, {}, NotImplementedError, "rows of the embedding apply"),
    ):
        tensors = {key: t for key, t in {**good, **state}.items() if t is not None}
        with pytest.raises(error, match=message):
            pool.load("bad", ({**raw, **changes}, tensors))
        assert pool.names == []
    whole = copy.deepcopy(model)
    # The adapter's rows would have no effect in this tied layer.
    whole.extra = torch.nn.Linear(32, 97, bias=False)
    whole.extra.weight = whole.get_input_embeddings().weight
    with pytest.raises(NotImplementedError, match="the input embedding, a plain"):
        lora_ext.AdapterPool(whole, max_slots=2, max_rank=8).load("bad", tmp_path)
    with pytest.raises(NotImplementedError, match="trainable_token_indices is not supported in a"):
        LoraAdapter.load(tmp_path)
    save_file(good, tmp_path / "adapter_model.safetensors")
    pool.load("good", tmp_path)
    narrow = lora_ext.AdapterPool(model, max_slots=2, max_rank=8, targets=["q_proj"])
    with pytest.raises(NotImplementedError, match="the input embedding, a plain"):
        narrow.load("bad", tmp_path)
