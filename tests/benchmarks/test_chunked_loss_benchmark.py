"""Memory of the chunked vocabulary losses, and the benchmark that compares it, at small sizes."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script
from torch.nn import functional as F

from lora_ext import nn, ops

ROWS, WIDE, CHUNK = 64, 16, 256


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = load_script(monkeypatch, "benchmarks", "chunked_loss")
    for name, size in {"WIDE": WIDE, "VOCAB": 4096, "CHUNK": CHUNK}.items():
        monkeypatch.setattr(module, name, size)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("loss", ["chunked_cross_entropy", "chunked_kl"])
def test_peak_memory_does_not_depend_on_the_vocabulary(
    bench: ModuleType, loss: str, trained: bool
) -> None:
    """Check that a step needs, besides gradients, two chunks of logits and a few sums per row."""
    k = 3 if loss == "chunked_kl" else 1
    peaks: list[int] = []
    for vocab in (4096, 16384):
        hiddens = [torch.randn(ROWS, WIDE, requires_grad=True) for _ in range(3)]
        weight = torch.randn(vocab, WIDE, requires_grad=trained)
        labels = torch.randint(vocab, (ROWS,))
        leaves = [*hiddens[:k], *[weight] * trained]

        def step(args: tuple[object, ...] = (hiddens, weight, labels), leaves=leaves) -> None:
            torch.autograd.grad(getattr(bench, loss)(*args), leaves)

        step()
        peaks.append(bench.peak_bytes(step) - sum(t.nbytes for t in leaves))
    assert max(peaks) < 2 * k * ROWS * CHUNK * 4 + 12 * k * ROWS * WIDE * 4 + 4096
    assert abs(peaks[0] - peaks[1]) < 4096
    assert max(peaks) < ROWS * 4096 * 4  # bytes of the full logits


@pytest.mark.slow
def test_benchmark_checks_and_compares(bench: ModuleType) -> None:
    rows = list(bench.measure("cpu", rounds=1, compiled=False, rows=ROWS))
    memory = [r for r in rows if r.provider == "lora_ext" and r.unit == "x"]
    assert len(memory) == 4 and all(r.median < 0.5 for r in memory)
    assert len([r for r in rows if r.unit == "ms"]) == 8
    good = (torch.ones(2), torch.ones(3, 4))
    with pytest.raises(SystemExit, match="off by"):
        bench.check((torch.ones(2), torch.full((3, 4), 1.1)), good, good, "case")


@pytest.mark.slow
def test_language_model_trains_without_its_logits(bench: ModuleType) -> None:
    """Check that the gradients of the model's loss need less memory than its logits alone."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=WIDE, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(8192, (4, 64), generator=torch.manual_seed(0))
    layer, parameters = model.get_output_embeddings(), list(model.parameters())

    def plain() -> tuple[torch.Tensor, ...]:
        logits = model(ids).logits.flatten(0, 1)
        return torch.autograd.grad(
            F.cross_entropy(logits, nn.shift_labels(ids).flatten()), parameters
        )

    def chunked() -> tuple[torch.Tensor, ...]:
        hidden = model.base_model(ids).last_hidden_state.flatten(0, 1)
        labels = nn.shift_labels(ids).flatten()
        loss = ops.chunked_cross_entropy(hidden, layer.weight, layer.bias, labels, CHUNK)
        return torch.autograd.grad(loss, parameters)

    for g, e in zip(chunked(), plain(), strict=True):
        assert torch.allclose(g, e, rtol=1e-3, atol=1e-6)
    logits = ids.numel() * 8192 * 4
    dense, ours = bench.peak_bytes(plain), bench.peak_bytes(chunked)
    assert dense > 2 * logits and ours < logits / 2, (dense, ours)
