"""The benchmark of packed weights checks what it times."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="the whole-model benchmarks compare with peft")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import packed_linear
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_line_has_every_provider(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(packed_linear, "SHAPES", ((40, 33),))
    monkeypatch.setattr(packed_linear, "COLD_BYTES", 1)
    lines = list(packed_linear.bench_ops(dtype, rounds=1))
    assert len(lines) == len(packed_linear.ROWS)
    assert all(name in lines[0] for name in ("F.linear", "packed"))
    assert ("oneDNN" in lines[0]) == packed_linear.has_onednn(dtype)


def test_spaced_products_are_compared_with_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "WIDTHS", (33,))
    monkeypatch.setattr(packed_linear, "WIDE_ROWS", (17,))
    (line,) = packed_linear.bench_widths(torch.bfloat16, rounds=1)
    assert line.startswith("   33 ->   132,  17 rows: torch ") and line.endswith(" of torch")


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, product = torch.ones(2, 40), torch.ones(33, 40), ops.packed_linear

    def wrong(*args: Tensor) -> Tensor:
        return product(*args) * (1 + 1e-4)

    packed_linear.products(x, [weight])
    monkeypatch.setattr(ops, "packed_linear", wrong)
    with pytest.raises(SystemExit, match="packed, 2 rows of 40 -> 33: wrong"):
        packed_linear.products(x, [weight])


@pytest.mark.slow
def test_a_step_over_packed_weights_is_checked_against_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=49152,  # as many tokens as the benchmark draws from
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(packed_linear, "load_smollm2", lambda: (model, None))
    models = packed_linear.engines(torch.float32)
    rows, times = next(packed_linear.bench_model(models, torch.float32, rounds=1))
    assert rows == 16 and list(times) == ["base", "base packed", "lora_ext", "packed"]
    models["packed"].lm_head.register_forward_hook(lambda module, args, y: y * (1 + 1e-3))
    with pytest.raises(SystemExit, match=r"16 rows, packed: .* x its bound off"):
        next(packed_linear.bench_model(models, torch.float32, rounds=1))
