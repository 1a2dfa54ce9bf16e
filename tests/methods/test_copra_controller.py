"""`CopraController`: masks in training and evaluation, cost of masked layers, state and errors."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re

import pytest
import torch
from adapted_models import KINDS, adapted
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_ext.methods.copra import CopraConfig, CopraController
from lora_ext.nn import adapted_layers, adapter_parameters

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SYNCS = ("seed", "touch", "tensor")


def controller_of(model: nn.Module, total: int = 20, **fields) -> CopraController:
    return CopraController(model, CopraConfig(**{"p0": 0.3, **fields}), total)


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def without(kind: str, mask: Tensor) -> Tensor:
    """Return the logits with the adapters of masked groups set to zero."""
    model = adapted(kind)
    for group, on in zip(controller_of(model).layers.layers, mask.tolist(), strict=True):
        for layer in group if not on else ():
            nn.init.zeros_(layer.lora_B["default"].weight)
    return logits(model)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    logits(model).square().mean().backward()
    optimizer.step()


def masked_step(controller: CopraController) -> int:
    """Return a step whose mask is neither full nor empty and excludes the lowest group."""
    masks = ((step, controller.schedule.mask(step)) for step in range(20))
    return next(step for step, mask in masks if not mask[0] and mask.any() and not mask.all())


# -------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", SYNCS)
def test_step_masks_training_and_not_evaluation(kind: str, sync: str):
    model = adapted(kind)
    full = logits(model)
    controller = controller_of(model, sync=sync)
    step = masked_step(controller)
    mask = controller.step(step)
    assert torch.equal(mask, controller.schedule.mask(step))
    assert controller.mask.all() and torch.equal(logits(model), full)
    model.train()
    assert torch.equal(controller.mask, mask)
    torch.testing.assert_close(logits(model), without(kind, mask), rtol=1e-5, atol=1e-5)
    model.eval()
    assert torch.equal(logits(model), full)
    controller.step(19)  # a step after the ramp
    assert controller.mask.all() and torch.equal(logits(model.train()), full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", SYNCS)
def test_explicit_masks_apply_in_both_modes_until_changed(kind: str, sync: str):
    model = adapted(kind)
    full = logits(model)
    controller = controller_of(model, sync=sync)
    mask = torch.tensor([False, True, False])
    expected = without(kind, mask)
    controller.set_mask(mask)
    for mode in (False, True):
        torch.testing.assert_close(logits(model.train(mode)), expected, rtol=1e-5, atol=1e-5)
        assert controller.mask.tolist() == mask.tolist()
    controller.step(19)
    assert torch.equal(logits(model), full) and torch.equal(logits(model.eval()), full)
    controller.set_mask([True, False, False])
    controller.activate_all()
    assert torch.equal(logits(model), full) and torch.equal(logits(model.train()), full)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", SYNCS)
def test_coalitions_nest_and_restore_the_step_also_after_an_exception(kind: str, sync: str):
    model = adapted(kind).train()
    controller = controller_of(model, sync=sync)
    mask = controller.step(masked_step(controller))
    in_training, in_evaluation = logits(model), logits(model.eval())
    with pytest.raises(KeyError), controller.coalition([True, False, False]):
        with controller.coalition([False, False, True]):
            assert controller.mask.tolist() == [False, False, True]
            controller.activate_all()
        assert controller.mask.tolist() == [True, False, False]
        expected = without(kind, torch.tensor([True, False, False]))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        raise KeyError
    assert controller.mask.all() and torch.equal(logits(model), in_evaluation)
    assert torch.equal(logits(model.train()), in_training)
    assert torch.equal(controller.mask, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", SYNCS)
def test_remove_restores_hooks_flags_and_bits(kind: str, sync: str):
    model = adapted(kind)
    before = logits(model)
    attributes = [set(m.__dict__) for m in model.modules()]
    scales = [dict(m.scaling) for m in adapted_layers(model).values()]
    controller = controller_of(model, sync=sync)
    controller.set_mask([False, True, False])
    controller.remove()
    controller.remove()
    assert torch.equal(logits(model), before)
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert [dict(m.scaling) for m in adapted_layers(model).values()] == scales
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_forward_hooks_always_called",
    )
    assert not any(getattr(m, hook) for m in model.modules() for hook in hooks)
    for use in (controller.step, controller.activate_all, lambda: controller.coalition([True] * 3)):
        with pytest.raises(RuntimeError, match="CopraController: the controller was removed"):
            use()


@pytest.mark.parametrize("way", ["pickle", "save", "copy"])
@pytest.mark.parametrize("sync", SYNCS)
def test_model_and_controller_are_copied_and_pickled_together(sync: str, way: str):
    model = adapted("fused").train()
    controller = controller_of(model, sync=sync)
    controller.step(masked_step(controller))
    if way == "copy":
        kept, its = copy.deepcopy((model, controller))
    elif way == "pickle":
        kept, its = pickle.loads(pickle.dumps((model, controller)))
    else:
        torch.save((model, controller), file := io.BytesIO())
        kept, its = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(logits(kept), logits(model))
    its.set_mask([True, False, True])
    expected = without("fused", torch.tensor([True, False, True]))
    torch.testing.assert_close(logits(kept), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), expected, rtol=1e-3)


@pytest.mark.parametrize("first", SYNCS)
@pytest.mark.parametrize("second", SYNCS)
def test_last_mask_of_any_controller_applies(first: str, second: str):
    model = adapted("fused").train()
    one, other = controller_of(model, sync=first), controller_of(model, sync=second)
    one.step(masked_step(one))
    copied = copy.deepcopy(model)
    for masked, last in ((model, other), (copied, controller_of(copied, sync=second))):
        last.set_mask(mask := torch.tensor([True, False, True]))
        expected = without("fused", mask)
        torch.testing.assert_close(logits(masked), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(last.mask, mask)
    one.set_mask(mask := torch.tensor([False, True, True]))
    assert torch.allclose(logits(model), without("fused", mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("group_by", "sizes"), [("block", [2, 2, 2]), ("module", [1] * 6), (3, [3, 3])]
)
def test_groups_are_lists_of_module_names(group_by, sizes: list[int]):
    model = adapted("peft")
    controller = controller_of(model, group_by=group_by)
    assert [len(group) for group in controller.groups] == sizes
    assert [n for group in controller.groups for n in group] == list(adapted_layers(model))
    assert controller.schedule.num_groups == len(sizes)


# -------------------------------------------------------------------------------------------------
# Cost of layers that are masked out


@pytest.mark.parametrize("kind", KINDS)
def test_off_layer_runs_the_operators_of_its_base_layer(kind: str):
    model = adapted(kind).train()
    controller = controller_of(model)
    controller.set_mask([False, True, False])
    layer = controller.layers.layers[2][0]
    x = torch.randn(6, 16, requires_grad=True)

    def operations(run) -> list[str]:
        x.grad = None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            run()
        return [e.name for e in found.events() if "profiler" not in e.name.lower()]

    def saved(run) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(t.shape) or t, lambda t: t
        ):
            run()
        return shapes

    for measure in (operations, saved):
        found = measure(lambda: layer(x).sum().backward())
        assert found == measure(lambda: layer.base_layer(x).sum().backward())
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_below_the_lowest_active_one_build_no_graph(kind: str):
    model = adapted(kind).train()
    controller = controller_of(model)
    controller.set_mask([False, True, False])
    traced: list[bool] = []
    for name, module in model.named_modules():
        if name.endswith(("layers.0", "layers.1", "layers.2")):
            module.register_forward_hook(lambda _, __, out: traced.append(out.requires_grad))
    logits(model)
    assert traced == [False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_leaves_off_parameters_and_their_state_unchanged(kind: str):
    model = adapted(kind).train()
    controller = controller_of(model)
    names = {p: n for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    train_step(model, optimizer)
    off = [p for m in controller.layers.layers[1] for p in adapter_parameters(m, "default")]
    before = {
        p: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in off
    }
    controller.set_mask([True, False, True])
    for _ in range(2):
        train_step(model, optimizer)
    for p in off:
        value, state = before[p]
        assert p.grad is None and torch.equal(p, value), names[p]
        assert state.keys() == optimizer.state[p].keys()
        assert all(torch.equal(v, optimizer.state[p][k]) for k, v in state.items())
    on = adapter_parameters(controller.layers.layers[0][0], "default")
    assert all(p.grad is not None and optimizer.state[p]["step"] == 3 for p in on)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", ["touch", "tensor"])
def test_touch_and_tensor_give_off_parameters_zero_gradients(kind: str, sync: str):
    model = adapted(kind).train()
    controller = controller_of(model, sync=sync)
    expected = {}
    plain = adapted(kind).train()
    controller_of(plain).set_mask([True, False, True])
    logits(plain).square().mean().backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    controller.set_mask([True, False, True])
    logits(model).square().mean().backward()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert p.grad is not None
        if expected[name] is None:
            assert not p.grad.any()
        else:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["ours", "fused", "peft"])
def test_graph_with_gates_is_compiled_once_for_all_masks(kind: str):
    layer_model = adapted(kind, targets=("q_proj",)).train()
    controller = controller_of(layer_model, sync="tensor")
    layer = controller.layers.layers[1][0]
    x, graphs = torch.randn(6, 16), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend=backend)
    for mask in (
        [True, False, True],
        [True, True, True],
        [False, False, False],
        [False, True, False],
    ):
        controller.set_mask(mask)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        assert torch.allclose(compiled(x), layer.base_layer(x)) == (not mask[1])
    assert len(graphs) == 1
    assert isinstance(layer.scaling["default"], float)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_block_is_recomputed_with_the_same_mask(kind: str):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        controller = controller_of(model)
        controller.step(masked_step(controller))
        logits(model).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert 0 < len(gradients[0]) < 12
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# State


def test_state_resumes_the_masks_and_is_plain_json():
    controller = controller_of(adapted("ours"), seed=5)
    for _ in range(7):
        controller.step()
    state = json.loads(json.dumps(controller.state_dict()))
    model = adapted("ours").train()
    resumed = controller_of(model, seed=5)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.mask, controller.schedule.mask(6))
    assert [resumed.step().tolist() for _ in range(5)] == [
        controller.step().tolist() for _ in range(5)
    ]
    fresh = controller_of(adapted("ours"), seed=5)
    fresh.load_state_dict(controller_of(adapted("ours"), seed=5).state_dict())
    assert torch.equal(fresh.step(), fresh.schedule.mask(0))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"total": 21}, r"load_state_dict: total_steps: expected 21, found 20"),
        ({"seed": 1}, r"load_state_dict: seed: expected 1, found 0"),
        ({"p1": 0.9}, r"load_state_dict: p1: expected 0.9, found 1.0"),
        ({"ramp": lambda f: f}, r"load_state_dict: ramp: expected '.*<lambda>', found 'linear'"),
        ({"group_by": "module"}, r"load_state_dict: num_groups: expected 6, found 3"),
    ],
)
def test_state_of_another_schedule_is_refused(other: dict, message: str):
    controller = controller_of(adapted("ours"))
    controller.step()
    another = controller_of(adapted("ours"), **other)
    with pytest.raises(ValueError, match=message):
        another.load_state_dict(controller.state_dict())
    assert another.state_dict()["step"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, r"step: expected an integer from 0, found -1"),
        ({"step": 1.5}, r"step: .* found 1.5"),
        ({"epoch": 1}, r"state: expected the keys \['step', .*\], found"),
    ],
)
def test_invalid_states_are_refused(change: dict, message: str):
    controller = controller_of(adapted("ours"))
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict({**controller.state_dict(), **change})


# -------------------------------------------------------------------------------------------------
# Errors


def test_model_without_the_adapter_is_refused():
    with pytest.raises(ValueError, match=r"adapter_name: .* found 'default'"):
        controller_of(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"which has \['default'\], found 'other'"):
        CopraController(adapted("ours"), CopraConfig(), 10, adapter="other")


@pytest.mark.parametrize("group_by", ["head", 0, -2, True, 4, 2.0])
def test_invalid_groupings_are_refused_with_the_modules(group_by):
    model = adapted("ours")
    listed = re.escape(", ".join(adapted_layers(model)))
    with pytest.raises(
        ValueError, match=rf"CopraController: group_by: expected .* found .*{listed}"
    ):
        controller_of(model, group_by=group_by)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:unmerge")
def test_error_for_merged_adapters_names_the_layer(kind: str):
    model = adapted(kind)
    controller = controller_of(model)
    layer, name = controller.layers.layers[2][1], controller.groups[2][1]
    layer.merge()
    for use in (
        lambda: controller_of(model),
        lambda: controller.set_mask([True, True, False]),
        lambda: controller.coalition([False] * 3).__enter__(),
        lambda: [controller.step() for _ in range(15)],
    ):
        with pytest.raises(ValueError, match=rf"{name}.*merged.*unmerge it first"):
            use()
    controller.set_mask([False, True, True])
    assert controller.mask.tolist() == [False, True, True]


@pytest.mark.parametrize("sync", SYNCS)
def test_invalid_masks_are_refused_and_change_nothing(sync: str):
    controller = controller_of(adapted("ours"), sync=sync)
    controller.set_mask([True, False, True])
    for mask in ([True], torch.ones(3), torch.ones(3, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask: expected"):
            controller.set_mask(mask)
    assert controller.mask.tolist() == [True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_dora_is_refused_with_gates(kind: str):
    model = adapted(kind, use_dora=True)
    with pytest.raises(ValueError, match=r"sync='tensor': .*q_proj: expected .* found a DoRA"):
        controller_of(model, sync="tensor")
    assert not any(m._forward_pre_hooks for m in adapted_layers(model).values())
