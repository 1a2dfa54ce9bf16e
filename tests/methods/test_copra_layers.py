"""Shapley values of layers, with coalitions evaluated one by one and in one forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_models import KINDS, adapted
from torch import Tensor, nn

from lora_ext.methods.copra import CopraConfig, CopraController, layer_shapley
from lora_ext.methods.copra.shapley import _coalitions_at_once
from lora_ext.nn import adapted_layers

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
BATCH = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}


def controller_of(model: nn.Module, **fields) -> CopraController:
    return CopraController(model, CopraConfig(**fields), 10)


def of_rows(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probability of each row's tokens."""
    found = output.logits[:, :-1].log_softmax(-1)
    return found.gather(2, batch["labels"][:, 1:, None]).sum((1, 2))


def of_model(model: nn.Module) -> float:
    return of_rows(model(**BATCH), BATCH).double().mean().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", ["seed", "touch", "tensor"])
@pytest.mark.parametrize("method", ["exact", "permutation", "owen"])
def test_batched_coalitions_equal_single_ones(kind: str, sync: str, method: str):
    model = adapted(kind)
    controller = controller_of(model, sync=sync)
    settings = {"method": method, "samples": 3}
    expected = layer_shapley(
        model, controller, of_model, generator=torch.Generator().manual_seed(0), **settings
    )
    for at_once in (1, 3, 100):
        found = layer_shapley(
            model,
            controller,
            of_rows,
            generator=torch.Generator().manual_seed(0),
            batch=BATCH,
            batched_coalitions=at_once,
            **settings,
        )
        assert found.evaluations == expected.evaluations
        torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_values_sum_to_the_full_utility_and_the_model_is_restored(kind: str):
    model = adapted(kind, lora_dropout=0.5).train()
    # Some modules are in evaluation mode, others in training mode.
    model.get_submodule("model.model" if kind != "ours" else "model").eval()
    controller = controller_of(model)
    controller.step(0)
    modes, mask = [m.training for m in model.modules()], controller.mask
    found = layer_shapley(model, controller, of_rows, batch=BATCH, batched_coalitions=8)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(controller.mask, mask) and torch.is_grad_enabled()
    with controller.coalition([True] * 3):
        model.eval()
        full = of_model(model)
    with controller.coalition([False] * 3):
        none = of_model(model)
    # The forward passes are in float32.
    assert found.values.sum().item() == pytest.approx(full - none, abs=1e-5)
    assert found.evaluations == 8


def test_failing_utility_leaves_model_and_masks_unchanged():
    model = adapted("fused").train()
    controller = controller_of(model)
    mask = controller.step(0)

    def fail(*_: object) -> float:
        raise KeyError

    for settings in ({}, {"batch": BATCH, "batched_coalitions": 4}):
        with pytest.raises(KeyError):
            layer_shapley(model, controller, fail, **settings)
        assert model.training and torch.equal(controller.mask, mask)
        assert not any(m._forward_pre_hooks for m in adapted_layers(model).values())


def test_other_entries_of_a_batch_are_passed_unchanged():
    seen = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = adapted("ours")

        def forward(self, x: Tensor, scale: Tensor, table: Tensor, name: str) -> Tensor:
            seen.append((tuple(x.shape), tuple(scale.shape), tuple(table.shape), name))
            return self.inner(input_ids=x).logits

    model = Model()
    batch = {"x": IDS, "scale": torch.tensor(2.0), "table": torch.zeros(5, 3), "name": "a"}
    layer_shapley(
        model, controller_of(model), lambda y, b: y.sum((1, 2)), batch=batch, batched_coalitions=8
    )
    assert seen == [((16, 4), (), (5, 3), "a")]


@pytest.mark.parametrize(
    ("inputs", "copies"),
    [
        (torch.zeros(1, 16, dtype=torch.int64), 16),
        (torch.zeros(8, 32, dtype=torch.int64), 4),
        (torch.zeros(8, 200, dtype=torch.int64), 1),
        (torch.zeros(100, 48), 10),
        (torch.zeros(2, 60, 48), 8),
        (torch.zeros(8, 200, dtype=torch.int64, device="meta"), 16),
    ],
)
def test_forward_on_the_cpu_has_at_most_a_thousand_tokens(inputs: Tensor, copies: int):
    assert _coalitions_at_once(inputs, 16) == copies


def test_large_batch_is_split_into_several_forwards():
    model, seen = adapted("fused"), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ids = IDS.repeat(30, 1)  # 240 tokens
    batch = {"input_ids": ids, "labels": ids}
    layer_shapley(model, controller_of(model), of_rows, batch=batch, batched_coalitions=8)
    assert seen == [240, 240]


def test_more_than_twelve_groups_are_sampled_by_default():
    model = nn.Sequential(*[adapted("ours") for _ in range(5)])
    controller = controller_of(model, group_by="module")
    found = layer_shapley(model, controller, lambda m: float(controller.mask.sum()), samples=2)
    assert len(controller.groups) == 30 and found.evaluations < 64
    torch.testing.assert_close(found.values, torch.ones(30, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_row_masks_are_named_and_evaluated_one_by_one(kind: str):
    model = adapted(kind, "default", "second")
    for layer in adapted_layers(model).values():
        layer.set_adapter(["default", "second"])
    controller = controller_of(model)
    expected = layer_shapley(model, controller, of_model)
    with pytest.warns(UserWarning, match=r"q_proj: expected 'default' as the only .* one by one"):
        found = layer_shapley(model, controller, of_rows, batch=BATCH, batched_coalitions=8)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)


def test_flattened_rows_are_evaluated_one_by_one():
    class Flat(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(0, 1)).view(*x.shape[:2], -1)

    torch.manual_seed(0)
    from lora_ext.nn import LoraLinear

    model = Flat(LoraLinear(nn.Linear(3, 4), r=2, init_lora_weights=False))
    batch = {"x": torch.randn(2, 5, 3)}
    controller = controller_of(model)
    with pytest.warns(UserWarning, match=r"inner: expected activations with 4 sequences in"):
        found = layer_shapley(
            model, controller, lambda y, _: y.sum((1, 2)), batch=batch, batched_coalitions=2
        )
    expected = layer_shapley(model, controller, lambda m: m(batch["x"]).sum((1, 2)).mean())
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batched_coalitions": 4}, r"batched_coalitions: expected 1, or more with a"),
        ({"batch": BATCH, "batched_coalitions": 0}, r"batched_coalitions: .* found 0"),
        ({"batch": {"name": "a"}}, r"batch: .* with a batch dimension, found \['name'\]"),
        ({"batch": BATCH, "samples": 0}, r"samples: expected an integer from 1, found 0"),
    ],
)
def test_invalid_arguments_are_refused(settings: dict, message: str):
    model = adapted("ours")
    with pytest.raises(ValueError, match=message):
        layer_shapley(model, controller_of(model), of_rows, **settings)


def test_model_of_another_controller_is_refused():
    with pytest.raises(ValueError, match=r"model: .* model of the controller, found a Llama"):
        layer_shapley(adapted("ours"), controller_of(adapted("ours")), of_model)


@pytest.mark.parametrize("result", [1.0, torch.zeros(3), torch.zeros(2, 4)])
def test_utility_of_another_shape_is_refused(result):
    model = adapted("ours")
    with pytest.raises(ValueError, match=r"eval_fn: expected the utilities of the rows, of shape"):
        layer_shapley(model, controller_of(model), lambda y, b: result, batch=BATCH)
