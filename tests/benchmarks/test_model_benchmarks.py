"""Benchmarks of adapters, experts, exact and packed models time only checked results."""

import pytest

pytest.importorskip("peft", reason="the benchmark compares with peft")

from dataclasses import replace
from typing import Any

import alora
import exact
import experts
import packed_accuracy
import packed_linear
import torch
from experts import Case
from scripts import load_script
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext import ops


@pytest.mark.slow
def test_providers_agree_and_activated_adapters_read_only_their_tokens() -> None:
    rows = {row["provider"]: row["tokens"] for row in alora.measure(alora.tiny_model(), alora.TINY)}
    assert rows == {"peft": 70, "lora": 70, "alora": 6}


@pytest.mark.slow
def test_wrong_count_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(alora.TINY, adapters=1)
    monkeypatch.setattr(alora.Case, "shared", 0)
    with pytest.raises(SystemExit, match="alora: expected 70 computed tokens, found"):
        alora.measure(alora.tiny_model(), case)


@pytest.mark.slow
def test_adapters_of_the_example_answer_what_they_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load_script(monkeypatch, "examples", "alora")
    answers = example.main(steps=40)
    assert answers["yes"] == [5] * 4 and answers["no"] == [6] * 4
    assert answers["base"] not in (answers["yes"], answers["no"])


EXACT = exact.Sizes(12, 6, (9,))


def test_every_case_of_exact_models_agrees_with_the_plain_model() -> None:
    found = [*exact.measure(exact.tiny_model(), 2, EXACT, rounds=1, min_seconds=0)]
    assert [r.case.split(",")[0] for r in found] == [
        "attention alone", "prefill of 12", "decode step", "decode step", "training step",
    ]  # fmt: skip
    assert all(r.over > 0 for r in found)


def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.row_attention
    monkeypatch.setattr(ops, "row_attention", lambda *a, **k: right(*a, **k) * (1 + 1e-2))
    with pytest.raises(SystemExit, match="attention alone, causal, 9: the error"):
        next(exact.measure(exact.tiny_model(), 2, EXACT, rounds=1, min_seconds=0))


SIZES = {"rank": 4, "width": 32, "inner": 16, "experts": 4, "choices": 2}
SERVING, TRAINING = Case("decode", 4, 1, 2, **SIZES), Case("train", 4, 3, 2, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SERVING, TRAINING], ids=lambda case: case.kind)
def test_every_provider_is_checked_and_timed(case: Case) -> None:
    rows = list(experts.measure(case, "cpu", rounds=1))
    others = ["base"] if case is SERVING else []
    assert [row["provider"] for row in rows] == ["lora_ext", *others, "peft"]
    assert all(row["worst_error"] <= 1 and row["median"] > 0 for row in rows)


def test_rows_of_another_adapter_are_not_timed() -> None:
    problem = experts.Problem(SERVING, "cpu")
    problem.of_row = problem.of_row[::-1]
    with pytest.raises(SystemExit, match="decode: 4 rows x 1, 2 adapters: off by"):
        experts.check(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_line_has_every_provider(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(packed_linear, "SHAPES", ((64, 33),))
    monkeypatch.setattr(packed_linear, "COLD_BYTES", 1)
    rows = list(packed_linear.bench_ops(dtype, rounds=1))
    onednn = ["oneDNN"] * packed_linear.has_onednn(dtype)
    each = ["F.linear", "packed", *onednn, "8 bits", "4 bits"]
    assert [row.provider for row in rows] == each * len(packed_linear.ROWS)
    read = [row.provider for row in rows if row.over_reading != ""]
    assert read == ["packed", "8 bits", "4 bits"] * len(packed_linear.ROWS)


def test_groups_of_32_are_rounded_as_by_gguf() -> None:
    pytest.importorskip("gguf")
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    error = {name: (of.round(w) - w).norm() for name, (of, _) in packed_accuracy.formats().items()}
    pairs = {"8 bits": "Q8_0", "4 bits": "Q4_0", "4 bits, minimum": "Q4_1"}
    for ours, theirs in pairs.items():
        assert float(error[f"{ours}, group 32"] / error[f"GGUF {theirs}"]) == pytest.approx(1, 0.01)


def test_limits_of_products_are_checked() -> None:
    slow = packed_linear.Row(
        "ops", "8 rows", "4 bits", "float32", 64, 32, "us", 1.0, over_base=1.06, over_reading=1.3
    )
    assert [line.rpartition(": ")[2] for line in slow.missed()] == [
        "more than 1.05 of torch's linear", "more than 1.25 of reading"
    ]  # fmt: skip
    assert not list(slow._replace(over_base=1.0, case="16 rows").missed())
    assert not list(slow._replace(provider="oneDNN").missed())


def test_spaced_products_are_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "WIDTHS", (33,))
    monkeypatch.setattr(packed_linear, "WIDE_ROWS", (17,))
    (line,) = packed_linear.bench_widths(torch.bfloat16, rounds=1)
    assert line.startswith("   33 ->   132,  17 rows: torch ") and line.endswith(" of torch")


def test_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, product = torch.ones(2, 40), torch.ones(33, 40), ops.packed_linear

    def wrong(*args: Tensor) -> Tensor:
        return product(*args) * (1 + 1e-4)

    packed_linear.products(x, weight)
    monkeypatch.setattr(ops, "packed_linear", wrong)
    with pytest.raises(SystemExit, match=r"packed, 2 rows of 40 -> 33: off by .* times its bound"):
        packed_linear.products(x, weight)


@pytest.mark.slow
def test_text_with_8_and_4_bits_is_checked_before_steps_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(packed_linear, "load_smollm2", lambda: (model, None))
    models = packed_linear.bits_engines(torch.float32)
    rows, times = next(packed_linear.bench_bits(models, rounds=1))
    assert rows == 1 and list(times) == ["base", "8 bits", "4 bits"]
    models["4 bits"].lm_head.register_forward_hook(lambda module, args, y: -y)
    with pytest.raises(SystemExit, match="4 bits: text differs"):
        next(packed_linear.bench_bits(models, rounds=1))


@pytest.mark.slow
def test_step_with_packed_weights_is_checked_against_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=49152,  # the vocabulary from which the benchmark draws tokens
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(packed_linear, "load_smollm2", lambda: (model, None))
    models = packed_linear.engines(torch.float32)
    rows, times = next(packed_linear.bench_model(models, torch.float32, rounds=1))
    assert rows == 16 and list(times) == ["base", "base packed", "lora_ext", "packed"]
    models["packed"].lm_head.register_forward_hook(lambda module, args, y: y * (1 + 1e-3))
    with pytest.raises(SystemExit, match=r"16 rows, packed: off by .* times its bound"):
        next(packed_linear.bench_model(models, torch.float32, rounds=1))


def test_routed_layers_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    mixtures: Any = load_script(monkeypatch, "benchmarks", "mixtures")
    for name, size in {"IN": 256, "OUT": 512, "RANK": 2, "LENGTH": 3}.items():
        monkeypatch.setattr(mixtures, name, size)
    rows = [row for bench in mixtures.MATRICES.values() for row in bench(1, 0.0)]
    steps = [row for row in rows if row["matrix"] == "layers"]
    providers, passes = 4, len(mixtures.PASSES)
    assert len(steps) == providers * passes * len(mixtures.TARGETS) < len(rows)
    assert all(0 <= row["worst_error"] <= 1 and row["faults"] >= 0 for row in steps)
    with pytest.raises(SystemExit, match="its bound"):
        mixtures.checked("wrong", [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)])
