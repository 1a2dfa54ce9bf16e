"""FIM scores: equal to one backward per sample, for all layers, batches and flags."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
from adapted_models import KINDS, adapted
from torch import Tensor, nn

import lora_ext
from lora_ext.federated import LayerNotFound, LayerPlan, LoraLayerManager
from lora_ext.methods.fed_hello import EmptyProxySet, fim_scores
from lora_ext.nn import LoraLinear, block_index, shift_labels

PATTERN = r"layers\.(\d+)\."


def layer_of(name: str) -> int | None:
    return block_index(name, PATTERN)


class Classifier(nn.Module):
    """Classifier with block inputs ``(n, 6)``, ``(n, T, 6)`` or, if ``flat``, ``(n * T, 6)``."""

    def __init__(self, flat: bool = False, **settings: Any):
        super().__init__()
        torch.manual_seed(0)
        settings = {"r": 3, "init_lora_weights": False, "lora_alpha": 2, **settings}
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": LoraLinear(nn.Linear(6, 6), **settings), "plain": nn.Linear(6, 6)})
            for _ in range(3)
        )
        self.head = LoraLinear(nn.Linear(6, 4), **settings)
        self.flat = flat
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for block in self.layers:
            h = x.flatten(0, -2) if self.flat else x
            x = x + torch.tanh(block["plain"](block["q"](h))).view(x.shape)  # pyright: ignore
        return self.head(x if x.dim() == 2 else x.mean(1))


def vectors(n: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, 6, generator=g), torch.randint(4, (n,), generator=g)


def tokens(n: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(11, (n, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def by_the_loop(
    model: nn.Module, batches: Iterable[Any], score: str = "log_prob", reduce: str = "fro"
) -> Tensor:
    """Return the scores by their definition, with one forward and one backward per sample."""
    named = {n: p for n, p in model.named_parameters() if "lora_" in n and layer_of(n) is not None}
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    samples = 0
    for batch in batches:
        whole = batch["labels"] if isinstance(batch, dict) else batch[1]
        for i in range(len(whole)):
            if isinstance(batch, dict):
                row = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
                logits, labels = model(**row).logits, shift_labels(whole[i : i + 1])
            else:
                logits, labels = model(batch[0][i : i + 1]), whole[i : i + 1]
            values = logits.log_softmax(-1) if score == "log_prob" else logits
            value = torch.zeros((), dtype=values.dtype)
            for place, label in zip(values.flatten(0, -2), labels.flatten().tolist(), strict=True):
                value = value + (place[label] if label != -100 else 0 * place.sum())
            for p in named.values():
                p.requires_grad_(True)
            gradients = torch.autograd.grad(value, [*named.values()], allow_unused=True)
            for n, g in zip(named, gradients, strict=True):
                if g is not None:
                    total[n] += g.double() ** 2
            samples += 1
    found = torch.zeros(1 + max(layer_of(n) or 0 for n in named), dtype=torch.float64)
    for n, value in total.items():
        diagonal = value / samples
        found[layer_of(n)] += diagonal.norm() if reduce == "fro" else diagonal.sum()
    return found


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("score", ["log_prob", "logit"])
@pytest.mark.parametrize("reduce", ["fro", "trace"])
@pytest.mark.parametrize("shape", [(), (5,), (1,)])
def test_scores_equal_one_backward_per_sample(score, reduce, shape):
    model, batch = Classifier(), vectors(11, *shape)
    found = fim_scores(model, [batch], layer_of, score=score, reduce=reduce)
    assert model.calls == 1
    close(found, by_the_loop(model, [batch], score, reduce))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_language_model_sum_over_its_tokens(kind):
    model, batches = adapted(kind), [tokens(4, 7), tokens(3, 5, seed=1)]
    close(fim_scores(model, batches, layer_of, chunk=3), by_the_loop(model, batches))


def test_batching_order_and_chunks_change_only_rounding():
    model, (x, y) = Classifier().double(), vectors(12, 4)
    x = x.double()
    whole = fim_scores(model, [(x, y)], layer_of)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    splits = {
        "parts": [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])],
        "an empty one": [(x[:0], y[:0]), (x, y)],
        "order": [(x[order], y[order])],
    }
    for batches in splits.values():
        torch.testing.assert_close(
            fim_scores(model, iter(batches), layer_of), whole, rtol=1e-12, atol=0
        )
    for chunk in (1, 5, 100):
        other = fim_scores(model, [(x, y)], layer_of, chunk=chunk)
        torch.testing.assert_close(other, whole, rtol=1e-12, atol=0)


def test_scores_of_one_layer_equal_those_computed_by_hand():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([LoraLinear(nn.Linear(2, 2), r=1, lora_alpha=3)])}
    )
    layer = model["layers"][0]  # pyright: ignore
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 1.0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[2.0], [0.0]]))
    model.forward = lambda x: layer(x)
    x, y = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1])
    # Class 0: dA = 3 * 2 * (1, 2), dB = 3 * (3, 0). Class 1: dA = 0, dB = 3 * (0, 3).
    a = math.hypot(36 / 2, 144 / 2)
    b = math.hypot(81 / 2, 81 / 2)
    found = fim_scores(model, [(x, y)], lambda name: 0, score="logit")
    assert found.tolist() == pytest.approx([a + b])
    found = fim_scores(model, [(x, y)], lambda name: 0, score="logit", reduce="trace")
    assert found.tolist() == pytest.approx([(36 + 144 + 81 + 81) / 2])


def test_layers_with_flattened_tokens_are_scored_per_sample():
    batch = vectors(6, 4)
    close(
        fim_scores(Classifier(flat=True), [batch], layer_of),
        fim_scores(Classifier(), [batch], layer_of),
    )


def test_layer_that_runs_twice_sums_both_gradients():
    model, batch = Classifier(), vectors(5, 3)
    model.layers[2] = model.layers[0]  # One module has two names; scores use the first name.
    close(fim_scores(model, [batch], layer_of), by_the_loop(model, [batch]))


@pytest.mark.parametrize("special", [{"use_dora": True}, {"lora_bias": True}])
def test_dora_and_biased_adapters_are_scored_sample_by_sample(special):
    model, batch = Classifier(**special), vectors(5, 3)
    close(fim_scores(model, [batch], layer_of), by_the_loop(model, [batch]))
    mixed = Classifier()
    mixed.layers[1] = model.layers[1]
    close(fim_scores(mixed, [batch], layer_of), by_the_loop(mixed, [batch]))


def test_peft_dora_layers_are_scored_sample_by_sample():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q"], use_dora=True, init_lora_weights=False)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 4)})])})
    model.forward = lambda x: model["layers"][0]["q"](x)  # pyright: ignore
    wrapped = peft.inject_adapter_in_model(config, model)
    batch = vectors(5)
    close(fim_scores(wrapped, [batch], layer_of), by_the_loop(wrapped, [batch]))


@pytest.mark.parametrize("kind", KINDS)
def test_flags_modes_and_gradients_are_restored_and_ignored(kind):
    model, batch = adapted(kind), tokens(3, 6)
    expected = fim_scores(model, [batch], layer_of)
    model.train()
    LoraLayerManager(model).apply(LayerPlan((1,)))
    model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("layers.2"))).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.ones_like(p)
    before = [(p, p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        assert torch.equal(fim_scores(model, [batch], layer_of), expected)
    assert [module.training for module in model.modules()] == modes
    for p, flag, grad, value in before:
        assert p.requires_grad == flag and p.grad is grad and torch.equal(p, value)
    assert not [m for m in model.modules() if m._forward_hooks]
    failing = {**batch, "labels": batch["labels"] + 50}
    with pytest.raises(ValueError, match="labels: expected class indices below 11"):
        fim_scores(model, [failing], layer_of)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad == flag for p, flag, _, _ in before)
    assert not [m for m in model.modules() if m._forward_hooks]


def test_dropout_is_off_during_scoring():
    batch = vectors(6, 3)
    wet, dry = Classifier(lora_dropout=0.5).train(), Classifier()
    assert torch.equal(fim_scores(wet, [batch], layer_of), fim_scores(dry, [batch], layer_of))


def test_inactive_layer_scores_zero_and_the_head_is_excluded():
    model, batch = Classifier(), vectors(6)
    model.layers[1]["q"].adapter_active["default"] = False  # pyright: ignore
    found = fim_scores(model, [batch], layer_of)
    assert found[1] == 0 and bool((found[[0, 2]] > 0).all()) and found.shape == (3,)


def test_bfloat16_gradients_are_summed_in_higher_precision():
    model, batch = adapted("ours"), tokens(6, 6)
    expected = fim_scores(model, [batch], layer_of)
    found = fim_scores(model.to(torch.bfloat16), [batch], layer_of)
    # bfloat16 rounds to 8 significant bits in each of three blocks.
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0)


def merged_model() -> nn.Module:
    model = adapted("ours")
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.merge()
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, b: fim_scores(m, [], layer_of), EmptyProxySet, "batches: expected at least one"),
        (
            lambda m, b: fim_scores(m, [(b[0][:0], b[1][:0])], layer_of),
            EmptyProxySet,
            "batches: expected at least one sample, found none",
        ),
        (
            lambda m, b: fim_scores(m, [b], lambda name: None),
            LayerNotFound,
            "layer_of: expected an index for a LoRA tensor of an active adapter of Classifier",
        ),
        (
            lambda m, b: fim_scores(m, [b], lambda n: {0: 0, 2: 2}.get(layer_of(n))),  # pyright: ignore
            LayerNotFound,
            "expected the indices 0 to 2 without a gap, found [0, 2]",
        ),
        (
            lambda m, b: fim_scores(m, [b], lambda n: True),
            TypeError,
            "layer_of: expected an intege",
        ),
        (
            lambda m, b: fim_scores(m, [b], lambda n: -1),
            ValueError,
            "layer_of: expected an integer",
        ),
        (
            lambda m, b: fim_scores(m, [b], layer_of, score="loss"),
            ValueError,
            "score: expected one of ('log_prob', 'logit'), found 'loss'",
        ),
        (
            lambda m, b: fim_scores(m, [b], layer_of, reduce="max"),
            ValueError,
            "reduce: expected one of ('fro', 'trace'), found 'max'",
        ),
        (
            lambda m, b: fim_scores(m, [b], layer_of, chunk=0),
            ValueError,
            "chunk: expected an integ",
        ),
        (
            lambda m, b: fim_scores(m, [b[0]], layer_of),
            ValueError,
            "batches: expected mappings or pairs (x, y), found Tensor",
        ),
        (
            lambda m, b: fim_scores(m, [(b[0], b[1] + 4)], layer_of),
            ValueError,
            "labels: expected class indices below 4, or -100, found [",
        ),
        (
            lambda m, b: fim_scores(merged_model(), [tokens(2, 4)], layer_of),
            ValueError,
            "q_proj: expected an adapter that is not merged, found 'default' merged",
        ),
    ],
)
def test_errors_name_the_argument_or_module(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(Classifier(), vectors(4))


def test_scores_are_the_same_before_and_after_from_peft():
    model, batch = adapted("peft"), tokens(4, 6)
    before = fim_scores(model, [batch], layer_of)
    close(fim_scores(lora_ext.from_peft(model), [batch], layer_of), before)


def test_empty_batches_are_skipped():
    model = Classifier(use_dora=True)
    with pytest.raises(EmptyProxySet, match="expected at least one sample"):
        fim_scores(model, [vectors(0)], layer_of)
    close(fim_scores(model, [vectors(0), vectors(3)], layer_of), by_the_loop(model, [vectors(3)]))


def test_scores_can_be_computed_under_no_grad_and_inference_mode():
    model, batch = Classifier(), vectors(5)
    expected = fim_scores(model, [batch], layer_of)
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            close(fim_scores(model, [batch], layer_of), expected)
