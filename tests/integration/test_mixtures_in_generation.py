"""Mixtures of adapters in transformers' generation, continuous batching, experts and servers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from mixtures import FAMILIES, make_mixture, make_peft
from mixtures import tokens as expert_tokens
from safetensors.torch import load_file
from tiny import attach_saved, make_model, tokens

import lora_ext
from lora_ext.adapter import LoraAdapter, merge_adapters
from lora_ext.pool import PoolFullError
from lora_ext.serving import Embedder, Engine

NEW, PAGE = 6, 4
EXPERTS = {"red": {"r": 3}, "green": {"r": 9}}
ENTRIES: list[Any] = [
    {"a0": 0.5, "a1": 2.0},
    "a0",
    ("a1", 0.25),
    None,
    {"a0": 2.0, "a1": 0.5},
    {"a2": 1.0, "a1": -1.0},
]


def adapter(pool: Any, seed: int, **fields: Any) -> Any:
    """Return random factors that change tokens; the rank depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    rank, state = 2 + seed % 5, {}
    for module, spec in pool.index.linear.items():
        stem = f"base_model.model.{module}"
        a = torch.randn(rank, spec.in_features, generator=generator)
        b = torch.randn(spec.out_features, rank, generator=generator)
        state |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b * 0.2}
    targets = sorted({module.rpartition(".")[2] for module in pool.index.linear})
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        **fields,
    }, state


def attached(slots: int = 16, count: int = 3, **how: Any) -> tuple[Any, Any]:
    model = make_model("llama")
    pool = lora_ext.AdapterPool(model, max_slots=slots, max_rank=24)
    for seed in range(count):
        pool.load(f"a{seed}", adapter(pool, seed))
    return lora_ext.attach(model, pool, **how), pool


def alone(model: Any, prompt: list[int], name: Any) -> list[int]:
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=name, **how)
    return out[0, len(prompt) :].tolist()


def batching(**fields: Any) -> dict[str, Any]:
    return tiny.batching(NEW, **{"num_blocks": 128, "max_batch_tokens": 32, **fields})


@pytest.mark.slow
def test_mixture_generates_as_the_merged_adapter() -> None:
    model, pool = attached()
    parts = [LoraAdapter.load(adapter(pool, i)) for i in (0, 1)]
    merged = merge_adapters(parts, [0.5, 2.0], mode="delta")
    pool.load("merged", merged)
    ids = tokens(3, 7, 1)
    with torch.no_grad():
        names = [{"a1": 2.0, "a0": 0.5}, "merged", None]
        mixed = model(ids, adapter_names=names).logits
        reference = model(ids, adapter_names=["merged", "merged", None]).logits
    torch.testing.assert_close(mixed, reference, rtol=1e-4, atol=1e-4)
    prompt = ids[0].tolist()
    assert alone(model, prompt, names[0]) == alone(model, prompt, "merged")
    assert alone(model, prompt, names[0]) != alone(model, prompt, "a0")


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_beams_and_returned_sequences(beams: int) -> None:
    model, _ = attached()
    ids = tokens(len(ENTRIES), 5, 2)
    how: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    how |= {"num_return_sequences": beams, "attention_mask": torch.ones_like(ids)}
    found = model.generate(ids, adapter_names=ENTRIES, **how)
    with lora_ext.adapters(ENTRIES):
        assert torch.equal(model.generate(ids, **how), found)
    how["attention_mask"] = how["attention_mask"][:1]
    for row, name in enumerate(ENTRIES):
        one = model.generate(ids[row : row + 1], adapter_names=name, **how)
        assert torch.equal(found[row * beams : (row + 1) * beams], one)


@pytest.mark.slow
def test_continuous_batching_takes_mixtures() -> None:
    model, pool = attached()
    given = [tokens(1, 3 + i, i)[0].tolist() for i in range(len(ENTRIES))]
    expected = [alone(model, *each) for each in zip(given, ENTRIES, strict=True)]
    assert len({str(each) for each in expected}) == len(ENTRIES)
    results = model.generate_batch(given, adapter_names=ENTRIES, **batching())
    assert [each.generated_tokens for each in results.values()] == expected
    with lora_ext.adapters(ENTRIES[0]):
        (result,) = model.generate_batch(given[:1], **batching()).values()
    assert result.generated_tokens == expected[0]
    assert pool.stats()["pins"] == 0
    for wrong, error in (
        ([{"a0": float("nan")}], ValueError),
        ([("a0", "x", 1)], ValueError),
        ([{"a0": "1"}], TypeError),
        ([{"a0": 1, "a9": 1}], KeyError),
        ({"a0": True}, TypeError),
    ):
        with pytest.raises(error, match="names"):
            model.generate_batch(given[:1], adapter_names=wrong, **batching())
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_shared_prefixes_depend_on_weights_and_members() -> None:
    model, pool = attached()
    prompt = tokens(1, 4 * PAGE + 2, 7)[0].tolist()
    names: list[Any] = [*ENTRIES, {"a0": 0.5, "a1": 2.5}, ("a0", 0.5)]
    expected = [alone(model, prompt, name) for name in names]
    matches: list[int] = []
    with model.continuous_batching_context_manager(**batching()) as manager:
        search = manager.batch_processor.cache.search_prefix_match
        manager.batch_processor.cache.search_prefix_match = lambda *a: (
            matches.append(search(*a)) or matches[-1]
        )
        for _ in range(2):
            for name, answer in zip(names, expected, strict=True):
                manager.add_request(prompt, adapter_name=name)
                assert manager.get_result(timeout=30).generated_tokens == answer
        assert matches == [0] * len(names) + [4 * PAGE] * len(names)
        manager.add_request(prompt, adapter_name={"a1": 2, "a0": 0.5, "a2": 0})
        assert manager.get_result(timeout=30).generated_tokens == expected[0]
        assert matches.pop() == 4 * PAGE
        pool.update("a1", adapter(pool, 9))
        manager.add_request(prompt, adapter_name=ENTRIES[0])
        assert manager.get_result(timeout=30).generated_tokens == alone(model, prompt, ENTRIES[0])
        assert matches.pop() == 0


def test_add_request_names_its_argument_for_an_invalid_mixture() -> None:
    model, pool = attached(slots=6, count=5)
    manager = model.init_continuous_batching(**batching())
    for wrong, error, text in (
        ({}, ValueError, "expected 1 to 64 adapters in a mixture .*, found {}"),
        (("a0", "x"), ValueError, "expected names .*, found"),
        ({"a0": "1"}, TypeError, "'a0': expected a real number as weight, found '1'"),
        ({f"a{i}": 1 for i in range(5)}, ValueError, "expected a mixture of at most 3 pages"),
    ):
        with pytest.raises(error, match=f"^add_request: adapter_name: {text}"):
            manager.add_request([5, 6], adapter_name=wrong)
    manager.destroy()
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_running_mixture_keeps_its_adapters() -> None:
    model, pool = attached(slots=3, count=2)
    prompt = tokens(1, 5, 3)[0].tolist()
    expected = alone(model, prompt, ENTRIES[0])
    with model.continuous_batching_context_manager(**batching()) as manager:
        manager.add_request(prompt, adapter_name=ENTRIES[0])
        pool.unload("a0")
        pool.unload("a1")
        with pytest.raises(PoolFullError):
            pool.load("a5", adapter(pool, 5))
        assert manager.get_result(timeout=30).generated_tokens == expected
    assert pool.stats()["slots_used"] == 0


def folder(root: Path, pool: Any, count: int) -> Path:
    for seed in range(count):
        LoraAdapter.load(adapter(pool, seed)).save(root / f"a{seed}")
    return root


@pytest.mark.slow
def test_engine_and_embedder_load_the_adapters_of_mixtures(tmp_path: Path) -> None:
    reference, pool = attached()
    folder(tmp_path, pool, 3)
    tokenizer = SimpleNamespace(eos_token_id=-1, chat_template=None)
    engine = Engine(make_model("llama"), tokenizer, tmp_path, context=64, page_size=PAGE)
    engine.encode = lambda messages: list(messages)  # pyright: ignore
    given = [tokens(1, 2 * PAGE + 1, 7)[0].tolist()] * len(ENTRIES)

    async def answer(prompt: Any, name: Any, **how: Any) -> list[int]:
        stream = await engine.begin(prompt, name, NEW, **how)
        async for _ in stream:
            pass
        return stream.tokens

    async def answers() -> list[list[int]]:
        return await asyncio.gather(*map(answer, given, ENTRIES))

    with torch.no_grad(), engine:
        found = asyncio.run(answers())
        wrong: list[tuple[Any, type[Exception], str]] = [
            ({"a0": float("inf")}, ValueError, "adapter_name: 'a0': .* found inf"),
            ({"a0": True}, TypeError, "adapter_name: 'a0': .* found True"),
            ({"a0": 1, "none": 1}, KeyError, "'none' is not loaded"),
            ({"a0": 1, "none": 0}, KeyError, "'none' is not loaded"),
            (("none", 0), KeyError, "'none' is not loaded"),
        ]
        for name, error, text in wrong:
            with pytest.raises(error, match=text):
                asyncio.run(answer(given[0], name))
        with pytest.raises(ValueError, match=r"adapter_generation: .* mixture, found 1"):
            asyncio.run(answer(given[0], ENTRIES[0], generation=1))
        assert engine.requests == 0 and engine.stats()["pool_pins"] == 0
    assert found == [alone(reference, *pair) for pair in zip(given, ENTRIES, strict=True)]


@pytest.mark.slow
def test_embedder_takes_mixtures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_model("llama").model.eval()
    pool = lora_ext.AdapterPool(model, max_slots=8, max_rank=24)
    folder(tmp_path, pool, 3)
    embedder = Embedder(model, None, tmp_path, pooling="mean", max_requests=8)
    ids = [tokens(1, 5 + i, i)[0].tolist() for i in range(len(ENTRIES))]

    async def vectors() -> list[Any]:
        return await asyncio.gather(
            *(embedder.embed([one], name) for one, name in zip(ids, ENTRIES, strict=True))
        )

    found = [vector for vector, _ in asyncio.run(vectors())]
    with embedder:
        for one, name, vector in zip(ids, ENTRIES, found, strict=True):
            with torch.no_grad(), lora_ext.adapters(name, pool=embedder.pool):
                states = model(input_ids=torch.tensor([one])).last_hidden_state
            expected = torch.nn.functional.normalize(states.mean(1), dim=-1)
            torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)
        for name in {"a0": 1, "none": 0}, ("none", 0):
            with pytest.raises(KeyError, match="'none' is not loaded"):
                asyncio.run(embedder.embed([ids[0]], name))
    assert not torch.allclose(found[0], found[4])


def merged_experts(root: Path, weights: dict[str, float], pool: Any) -> Any:
    """Return the weighted sum of adapters of experts, with the ranks of all adapters in a row."""
    configs = {n: json.loads((root / n / "adapter_config.json").read_text()) for n in weights}
    states = {n: load_file(root / n / "adapter_model.safetensors") for n in weights}
    merged, first = {}, next(iter(weights))
    experts = next(iter(pool.experts.values())).experts
    for key in states[first]:
        parts = []
        for name, weight in weights.items():
            value, rank = states[name][key], configs[name]["r"]
            if "lora_A" in key:  # (E * r, I)
                parts.append(value.view(experts, rank, -1))
            else:  # (O, r * E)
                scale = weight * configs[name]["lora_alpha"] / rank
                parts.append(scale * value.view(-1, rank, experts))
        joined = torch.cat(parts, 1)
        merged[key] = joined.flatten(0, 1) if "lora_A" in key else joined.flatten(1)
    rank = sum(config["r"] for config in configs.values())
    return {**configs[first], "r": rank, "lora_alpha": rank}, merged


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_use_mixtures(family: str, tmp_path: Path) -> None:
    model = make_mixture(family)
    make_peft(model, EXPERTS).save_pretrained(tmp_path)
    model = attach_saved(model, tmp_path, EXPERTS, rank=24)
    pool, weights = model.model.layers[0].mlp.experts.pool, {"red": 0.5, "green": -2.0}
    pool.load("merged", merged_experts(tmp_path, weights, pool))
    names: list[Any] = [weights, ("red", 3.0), None, "green", ("green", -2.0), "merged"]
    ids = expert_tokens(1, 6).expand(6, -1)
    mixed = model(ids, adapter_names=names).logits
    torch.testing.assert_close(mixed[0], mixed[5], rtol=1e-4, atol=1e-4)
    for row, name in enumerate(names):
        one = model(ids[:1], adapter_names=name).logits[0]
        torch.testing.assert_close(mixed[row], one, rtol=1e-4, atol=1e-4)
        assert row in (0, 5) or (mixed[row] - mixed[0]).abs().max() > 0.1
