"""Several masks in one forward: each sequence uses the layers of its mask."""

from __future__ import annotations

import pytest
import torch
from adapted_models import KINDS, adapted
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_ext import ops
from lora_ext.methods.copra import coalitions as every_row_its_own
from lora_ext.nn import LayerGroups, LoraConv, LoraEmbedding, RowwiseError, adapted_layers

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
MASKS = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1]], dtype=torch.bool)


@torch.no_grad()
def one_by_one(model: nn.Module, groups: LayerGroups, masks: Tensor = MASKS) -> Tensor:
    found = []
    for mask in masks:
        with groups.masked(mask):
            found.append(model(input_ids=IDS).logits)
    return torch.cat(found)


@torch.no_grad()
def together(model: nn.Module, groups: LayerGroups, masks: Tensor = MASKS) -> Tensor:
    with every_row_its_own(groups, masks, len(IDS)):
        return model(input_ids=IDS.repeat(len(masks), 1)).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("group_by", ["block", "module"])
def test_rows_equal_one_forward_per_mask(kind: str, settings: dict, group_by: str):
    model = adapted(kind, **settings)
    groups = LayerGroups(model, group_by=group_by)
    if kind == "peft" and settings == {"use_dora": True}:
        with (
            pytest.raises(RowwiseError, match=r"q_proj: .* adapter can be .* with a DoRA"),
            every_row_its_own(groups, ~torch.eye(len(groups), dtype=torch.bool), 2),
        ):
            pytest.fail("the block was entered")
        return
    masks = torch.rand(7, len(groups), generator=torch.Generator().manual_seed(0)) < 0.5
    expected = one_by_one(model, groups, masks)
    assert (expected[:2] - expected[2:4]).abs().max() > 1e-3
    torch.testing.assert_close(together(model, groups, masks), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_and_flags_are_removed_also_after_an_exception(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    groups.set_mask([True, True, False])
    before, logits = [set(m.__dict__) for m in model.modules()], model(input_ids=IDS).logits
    with pytest.raises(KeyError), every_row_its_own(groups, MASKS, 2):
        raise KeyError
    assert groups.mask.tolist() == [True, True, False]
    assert not any(m._forward_pre_hooks for m in adapted_layers(model).values())
    assert [set(m.__dict__) for m in model.modules()] == before
    assert torch.equal(model(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("kind", ["ours", "fused"])
def test_layers_with_one_state_in_all_masks_run_the_base_or_plain_path(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    x = {n: torch.randn(10, 4, 16) for n in ("off", "on")}
    layers = {"off": groups.layers[0][0], "on": groups.layers[2][0]}

    def operations(layer: nn.Module, given: Tensor) -> list[str]:
        layer(given)  # The first forward of a shape fills caches.
        with profile(activities=[ProfilerActivity.CPU]) as found:
            layer(given)
        return [e.name for e in found.events()]

    plain = operations(layers["on"], x["on"])
    base = operations(layers["off"].base_layer, x["off"])
    masks = torch.tensor([[0, i % 2, 1] for i in range(5)], dtype=torch.bool)
    with every_row_its_own(groups, masks, 2):
        assert operations(layers["on"], x["on"]) == plain
        assert operations(layers["off"], x["off"]) == base


@pytest.mark.parametrize("kind", ["ours", "fused"])
def test_layers_of_a_group_share_one_plan(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = adapted(kind, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"))
    groups, plans = LayerGroups(model), []
    plan = ops.lora_plan
    monkeypatch.setattr(ops, "lora_plan", lambda *args: plans.append(0) or plan(*args))
    together(model, groups)
    assert len(plans) == 2  # one plan for each group on which masks differ


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_sum_of_one_backward_per_mask(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    gradients = []
    for batched in (False, True):
        model.zero_grad()
        if batched:
            with every_row_its_own(groups, MASKS, 2):
                model(input_ids=IDS.repeat(5, 1)).logits.square().sum().backward()
        else:
            for mask in MASKS:
                with groups.masked(mask):
                    model(input_ids=IDS).logits.square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close = 1e-4 * gradient.abs().max()  # ten float32 rows, added in two orders
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=float(close))


def test_row_masks_support_embeddings_and_convolutions():
    torch.manual_seed(0)
    embedding = LoraEmbedding(nn.Embedding(7, 6), r=2, init_lora_weights=False)
    conv = LoraConv(nn.Conv2d(3, 5, 2, stride=2), r=2, init_lora_weights=False)
    for layer, x in (
        (embedding, torch.randint(0, 7, (3, 4))),
        (embedding, torch.randint(0, 7, (3,))),
        (conv, torch.randn(3, 3, 4, 6)),
    ):
        groups = LayerGroups(layer)
        masks = torch.tensor([[True], [False], [True]])
        expected = torch.cat([x, x, x])
        plain = layer(x)
        with every_row_its_own(groups, masks, 3):
            found = layer(expected)
        torch.testing.assert_close(found[:3], plain)
        torch.testing.assert_close(found[3:6], layer.base_layer(x))
        torch.testing.assert_close(found[6:], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_error_for_two_active_adapters_names_the_layer(kind: str):
    model = adapted(kind, "first", "second")
    groups = LayerGroups(model, "first")
    for layer in adapted_layers(model).values():
        layer.set_adapter(["first", "second"])
    with (
        pytest.raises(RowwiseError, match=rf"{groups.names[0][0]}: expected 'first' as the only"),
        every_row_its_own(groups, MASKS, 2),
    ):
        pytest.fail("the block was entered")
    assert groups.mask.all()


@pytest.mark.parametrize("kind", KINDS)
def test_error_for_activations_of_other_shapes_names_the_layer(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    layer = groups.layers[0][0]
    with every_row_its_own(groups, MASKS, 2):
        for x in (torch.randn(40, 16), torch.randn(4, 10, 16), torch.randn(1, 10, 16)):
            with pytest.raises(RowwiseError, match=r"q_proj: .* activations with 10 sequences"):
                layer(x)
        key = "adapter_ids" if kind == "ours" else "adapter_names"
        with pytest.raises(RowwiseError, match=r"q_proj: expected a call with activations only"):
            layer(torch.randn(10, 4, 16), **{key: ["default"] * 10})


@pytest.mark.parametrize("kind", KINDS)
def test_inactive_or_disabled_adapter_is_not_used(kind: str):
    model = adapted(kind, "first", "second")
    for layer in adapted_layers(model).values():
        layer.set_adapter("second")
    groups = LayerGroups(model, "first")
    expected = one_by_one(model, groups)
    torch.testing.assert_close(together(model, groups), expected, rtol=1e-5, atol=1e-5)
    for layer in adapted_layers(model).values():
        layer.enable_adapters(False)
    groups = LayerGroups(model, "second")
    expected = one_by_one(model, groups)
    torch.testing.assert_close(together(model, groups), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:unmerge")
def test_invalid_masks_and_merged_layers_are_refused(kind: str):
    groups = LayerGroups(adapted(kind))
    for masks, sequences, message in (
        (MASKS[:, :2], 2, r"masks: expected bools of shape \(K, 3\), found .* \(5, 2\)"),
        (MASKS.long(), 2, r"masks: expected bools"),
        (MASKS[:0], 2, r"expected at least one mask and one sequence, found 0 masks and 2"),
        (MASKS, 0, r"found 5 masks and 0"),
    ):
        with pytest.raises(ValueError, match=message), every_row_its_own(groups, masks, sequences):
            pytest.fail("the block was entered")
    groups.layers[1][1].merge()
    with (
        pytest.raises(ValueError, match=rf"{groups.names[1][1]}: 'default': .*unmerge it first"),
        every_row_its_own(groups, MASKS, 2),
    ):
        pytest.fail("the block was entered")
