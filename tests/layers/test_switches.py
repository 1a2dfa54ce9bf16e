"""``set_active`` and related functions, which switch adapters of layers on and off."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from adapted_models import KINDS, adapted, operations
from torch import Tensor, nn

import lora_ext
from lora_ext.nn import LayerGroups, adapted_layers, is_active, set_active

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 1, 2]])


def logits(model: nn.Module, **inputs) -> Tensor:
    return model(input_ids=IDS, **inputs).logits


def base_logits(kind: str) -> Tensor:
    model = adapted(kind)
    for layer in adapted_layers(model).values():
        layer.enable_adapters(False)
    return logits(model)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def some_layer(model: nn.Module) -> nn.Module:
    return next(m for n, m in adapted_layers(model).items() if n.endswith("layers.1.mlp.down_proj"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_layer_that_is_off_runs_only_the_operators_of_its_base_layer(
    kind: str, settings: dict, training: bool
):
    layer = some_layer(adapted(kind, **settings)).train(training)
    x = torch.randn(6, 24, requires_grad=True)
    base = operations(lambda: layer.base_layer(x))
    assert operations(lambda: layer(x)) != base
    set_active(layer, "default", False)
    assert operations(lambda: layer(x)) == base
    assert torch.equal(layer(x), layer.base_layer(x))
    layer(x).sum().backward()
    assert all(p.grad is None for n, p in layer.named_parameters() if "lora" in n)
    set_active(layer, "default", True)
    assert operations(lambda: layer(x)) != base


@pytest.mark.parametrize("kind", KINDS)
def test_model_with_all_layers_off_equals_the_base_bit_for_bit(kind: str):
    model = adapted(kind)
    with_adapters = logits(model)
    for layer in adapted_layers(model).values():
        set_active(layer, "default", False)
    assert torch.equal(logits(model), base_logits(kind))
    for layer in adapted_layers(model).values():
        set_active(layer, "default", True)
    assert torch.equal(logits(model), with_adapters)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_that_is_off_removes_only_its_update(kind: str):
    model = adapted(kind)
    layer = some_layer(model)
    set_active(layer, "default", False)
    off = logits(model)
    set_active(layer, "default", True)
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    # With B = 0, the output is rounded once more.
    torch.testing.assert_close(off, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_switching_keeps_flags_state_and_active_adapters(kind: str):
    model = adapted(kind, "first", "second")
    layer = some_layer(model)
    chosen, grads = layer.active_adapters, flags(model)
    keys, attributes = list(model.state_dict()), set(layer.__dict__)
    set_active(layer, "first", False)
    assert layer.active_adapters == chosen
    assert flags(model) == grads and list(model.state_dict()) == keys
    set_active(layer, "first", True)
    assert layer.active_adapters == chosen and flags(model) == grads
    assert set(layer.__dict__) == attributes


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_of_a_layer_stay_active(kind: str):
    model = adapted(kind, "first", "second")
    layer = some_layer(model)
    x = torch.randn(6, 24)
    alone = {}
    for name in ("first", "second"):
        layer.set_adapter(name)
        alone[name] = layer(x)
    layer.set_adapter(["first", "second"])
    set_active(layer, "first", False)
    assert not is_active(layer, "first") and is_active(layer, "second")
    torch.testing.assert_close(layer(x), alone["second"], rtol=1e-5, atol=1e-5)
    set_active(layer, "second", False)
    assert torch.equal(layer(x), layer.base_layer(x))
    set_active(layer, "first", True)
    torch.testing.assert_close(layer(x), alone["first"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_adapter_that_is_off_use_the_base_model(kind: str):
    model = adapted(kind, "first", "second")
    layer = some_layer(model)
    x, names = torch.randn(3, 2, 24), ["first", "second", "__base__"]
    key = "adapter_ids" if kind == "ours" else "adapter_names"
    both = layer(x, **{key: names})
    set_active(layer, "first", False)
    one = layer(x, **{key: names})
    torch.testing.assert_close(one[1], both[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one[::2], layer.base_layer(x)[::2], rtol=1e-5, atol=1e-5)
    assert names == ["first", "second", "__base__"]
    set_active(layer, "second", False)
    assert torch.equal(layer(x, **{key: names}), layer.base_layer(x))


def test_models_accept_row_names_of_adapters_that_are_off():
    model = adapted("peft", "first", "second")
    names = ["first", "second", "__base__"]
    for layer in adapted_layers(model).values():
        set_active(layer, "first", False)
    theirs = logits(model, adapter_names=names)
    base = logits(model, adapter_names=["__base__"] * 3)
    second = logits(model, adapter_names=["second"] * 3)
    torch.testing.assert_close(theirs[::2], base[::2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs[1], second[1], rtol=1e-5, atol=1e-5)
    fused = logits(lora_ext.from_peft(model), adapter_names=names)
    torch.testing.assert_close(fused, theirs, rtol=1e-5, atol=1e-5)


def test_checkpoint_of_rows_with_names_recomputes_the_same_layers():
    gradients = []
    for checkpointing in (False, True):
        model = adapted("fused", "first", "second").train()
        model.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # This active adapter has no rows in the batch.
        set_active(some_layer(model), "first", False)
        logits(model, adapter_names=["second", "second", "__base__"]).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("second" in name for name in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["peft", "fused"])
def test_switches_and_changes_by_peft_do_not_undo_each_other(kind: str):
    model = adapted(kind)
    layer = some_layer(model)
    x, grads = torch.randn(6, 24), flags(model)
    set_active(layer, "default", False)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert flags(model) == grads
    model.set_adapter("default")
    assert not is_active(layer, "default") and torch.equal(layer(x), layer.base_layer(x))
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert not torch.equal(layer(x), layer.base_layer(x))
    set_active(layer, "default", True)
    assert layer.active_adapters == ["other"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_model_is_switched_separately(kind: str, copied):
    layer = some_layer(adapted(kind))
    set_active(layer, "default", False)
    twin, x = copied(layer), torch.randn(6, 24)
    assert not is_active(twin, "default")
    set_active(layer, "default", True)
    assert not is_active(twin, "default") and torch.equal(twin(x), twin.base_layer(x))
    set_active(twin, "default", True)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:unmerge")
def test_merged_adapter_cannot_be_switched_off(kind: str):
    layer = some_layer(adapted(kind))
    layer.merge()
    with pytest.raises(ValueError, match=r"set_active: 'default': expected an adapter that is"):
        set_active(layer, "default", False)
    layer.unmerge()
    set_active(layer, "default", False)
    layer.merge(adapter_names=["default"])
    with pytest.raises(ValueError, match=r"\['default'\].* merged into .*; unmerge them first"):
        layer(torch.randn(6, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_that_a_layer_lacks_raises(kind: str):
    layer = some_layer(adapted(kind))
    with pytest.raises(
        ValueError, match=r"set_active: adapter_name: expected one of the adapters \['default'\]"
    ):
        set_active(layer, "other", False)


def test_layer_with_a_replaced_forward_raises():
    layer = some_layer(adapted("peft"))
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match=r"set_active: layer: expected a Linear with the forward"):
        set_active(layer, "default", False)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layer_follows_its_switch_without_a_graph_break(kind: str):
    layer = some_layer(adapted(kind))
    x = torch.randn(6, 24)
    on = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), on, rtol=1e-5, atol=1e-5)
        set_active(layer, "default", False)
        assert torch.equal(compiled(x), layer.base_layer(x))
        set_active(layer, "default", True)


# -------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("group_by", "sizes"), [("block", [2, 2, 2]), ("module", [1] * 6), (4, [4, 2])]
)
def test_layers_are_grouped_in_model_order(kind: str, group_by, sizes: list[int]):
    model = adapted(kind)
    groups = LayerGroups(model, group_by=group_by)
    assert [len(group) for group in groups.names] == sizes
    assert [n for group in groups.names for n in group] == list(adapted_layers(model))
    assert len(groups) == len(sizes) and groups.mask.tolist() == [True] * len(sizes)
    assert [m for group in groups.layers for m in group] == list(adapted_layers(model).values())


def test_layers_outside_every_block_are_single_groups():
    model = adapted("ours", targets=("embed_out", "q_proj", "lm_head"))
    names = LayerGroups(model).names
    assert [len(group) for group in names] == [1, 1, 1, 1] and names[-1] == ("lm_head",)


@pytest.mark.parametrize("kind", KINDS)
def test_mask_switches_whole_groups_until_the_next_mask(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    full = logits(model)
    groups.set_mask([True, False, True])
    assert groups.mask.tolist() == [True, False, True]
    for group, on in zip(groups.layers, [True, False, True], strict=True):
        assert all(is_active(layer, "default") == on for layer in group)
    assert not torch.equal(logits(model), full)
    groups.set_mask(torch.tensor([True, True, True]))
    assert torch.equal(logits(model), full)


@pytest.mark.parametrize("kind", KINDS)
def test_with_block_restores_every_layer_even_after_an_exception(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    half = groups.layers[0][0]
    set_active(half, "default", False)
    before = logits(model)
    with pytest.raises(KeyError), groups.masked([True, False, False]):
        assert is_active(half, "default")
        with groups.masked([False, True, False]):
            assert groups.mask.tolist() == [False, True, False]
        assert groups.mask.tolist() == [True, False, False]
        raise KeyError
    assert not is_active(half, "default") and groups.mask.tolist() == [False, True, True]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_of_the_groups_is_switched(kind: str):
    model = adapted(kind, "first", "second")
    groups = LayerGroups(model, "second")
    groups.set_mask([False] * 3)
    layers = adapted_layers(model).values()
    assert all(is_active(m, "first") and not is_active(m, "second") for m in layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:unmerge")
def test_invalid_mask_switches_nothing(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    groups.layers[2][1].merge()
    with pytest.raises(ValueError, match=r"unmerge it first"):
        groups.set_mask([False, False, False])
    with pytest.raises(ValueError, match=r"unmerge it first"), groups.masked([False] * 3):
        pytest.fail("the block was entered")
    assert groups.mask.tolist() == [True, True, True]
    groups.set_mask([False, False, True])
    assert groups.mask.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], r"LayerGroups: mask: expected one value for each of the 3 groups, found 1"),
        (torch.ones(2, dtype=torch.bool), r"each of the 3 groups, found 2"),
        ([1, 0, 1], r"LayerGroups: mask: .* bools, found \[1, 0, 1\]"),
        (None, r"LayerGroups: mask: .* bools, found None"),
        (torch.ones(3), r"LayerGroups: mask: .* bools, found torch.float32"),
        (torch.ones(1, 3, dtype=torch.bool), r"LayerGroups: mask: .* bools, found torch.boo"),
        (torch.tensor(True), r"LayerGroups: mask: .* bools"),
    ],
)
def test_mask_of_another_length_raises(mask, message: str):
    with pytest.raises(ValueError, match=message):
        LayerGroups(adapted("ours")).set_mask(mask)


@pytest.mark.parametrize("group_by", ["layer", 0, -1, True, 1.5])
def test_invalid_grouping_raises(group_by):
    with pytest.raises(ValueError, match=r"LayerGroups: group_by: expected 'block', 'module' or"):
        LayerGroups(adapted("ours"), group_by=group_by)


# -------------------------------------------------------------------------------------------------
# Switches for training only


@pytest.mark.parametrize("kind", KINDS)
def test_training_only_switch_is_on_in_evaluation(kind: str):
    layer = some_layer(adapted(kind, "first", "second"))
    x = torch.randn(6, 24)
    on = layer(x)
    set_active(layer, "first", False, training_only=True)
    assert is_active(layer, "first") and torch.equal(layer(x), on)
    layer.train()
    assert not is_active(layer, "first") and torch.equal(layer(x), layer.base_layer(x))
    key = "adapter_ids" if kind == "ours" else "adapter_names"
    assert torch.equal(layer(x, **{key: ["first"] * 6}), layer.base_layer(x))
    set_active(layer, "second", False)
    assert not is_active(layer, "first")
    set_active(layer, "first", False)
    assert torch.equal(layer.eval()(x), layer.base_layer(x))
    set_active(layer, "first", True)
    assert torch.equal(layer(x), on) and torch.equal(layer.train()(x), on)


@pytest.mark.parametrize("kind", KINDS)
def test_with_block_restores_training_only_switches(kind: str):
    model = adapted(kind)
    groups = LayerGroups(model)
    groups.set_mask([True, False, True], training_only=True)
    assert groups.mask.all()
    with groups.masked([False, True, True]):
        assert groups.mask.tolist() == [False, True, True]
        model.train()
        assert groups.mask.tolist() == [False, True, True]
    assert groups.mask.tolist() == [True, False, True]
    assert model.eval() is model and groups.mask.all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:unmerge")
def test_mask_error_names_the_merged_layer(kind: str):
    groups = LayerGroups(adapted(kind))
    groups.layers[1][0].merge()
    message = f"LayerGroups: mask: {groups.names[1][0]}: 'default': expected an adapter that is"
    for training_only in (False, True):
        with pytest.raises(ValueError, match=re.escape(message)):
            groups.set_mask([True, False, True], training_only)


def test_new_adapter_with_the_name_of_a_deleted_one_has_default_switches():
    layer = some_layer(adapted("ours", "first", "second"))
    set_active(layer, "first", False, training_only=True)
    layer.delete_adapter("first")
    layer.add_adapter("first", r=2)
    assert is_active(layer.train(), "first")
