"""`LoraLayerManager`: trained, frozen and disabled layers, and tensors saved for the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import KINDS, adapted, llama
from torch import Tensor, nn

from lora_ext.adapter import LoraAdapter
from lora_ext.federated import LayerNotFound, LayerPlan, LoraLayerManager
from lora_ext.nn import LoraConfig, LoraLinear, adapted_layers, adapter_parameters, is_active, wrap

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def names_of(model: nn.Module, layers: set[int]) -> set[str]:
    return {
        n
        for n, _ in model.named_parameters()
        if ".lora_" in n and any(f".layers.{i}." in n for i in layers)
    }


def saved_bytes(manager: LoraLayerManager) -> int:
    """Return the number of bytes that a forward saves for its backward. Each storage counts once,
    and parameters do not count."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model = manager.model
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), manager.boundary():
        loss_of(model)
    return sum(size for where, size in found.items() if where not in frozen)


class Stack(nn.Module):
    """Model of residual layers without an embedding, so its input may require gradients."""

    def __init__(self, layers: int = 12, width: int = 6, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        linears = [nn.Linear(width, width).requires_grad_(False) for _ in range(layers)]
        settings = {"r": 2, "init_lora_weights": False, "lora_dropout": dropout}
        self.layers = nn.ModuleList(LoraLinear(linear, **settings) for linear in linears)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = []
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
            self.seen.append(x)
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_planned_layers_train_and_others_are_frozen_but_compute(kind: str):
    model = adapted(kind)
    before = model(input_ids=IDS).logits
    manager = LoraLayerManager(model)
    assert (manager.num_layers, manager.lowest_trainable) == (3, None)
    manager.apply(LayerPlan((1,)))
    assert trained(model) == names_of(model, {1})
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert manager.lowest_trainable == 1
    manager.apply(LayerPlan((1,)), mode="eval")
    assert not trained(model)
    assert manager.lowest_trainable is None


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_layers_equal_their_base_layers(kind: str):
    model = adapted(kind)
    manager = LoraLayerManager(model)
    full = model(input_ids=IDS).logits
    manager.apply(LayerPlan((2,)), others="disabled")
    only_last = model(input_ids=IDS).logits
    for name, layer in adapted_layers(model).items():
        assert is_active(layer, "default") == (".layers.2." in name)
    manager.apply(LayerPlan((0, 1, 2)))
    assert torch.equal(model(input_ids=IDS).logits, full)
    zeroed = {k: torch.zeros_like(v) for k, v in manager.state_slice([0, 1]).items()}
    manager.load_slice(zeroed)
    assert torch.allclose(model(input_ids=IDS).logits, only_last, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", ["frozen", "disabled"])
def test_weight_decay_changes_only_planned_layers(kind: str, others: str):
    model = adapted(kind)
    manager = LoraLayerManager(model)
    loss_of(model).backward()  # Now all factors have gradients.
    manager.apply(LayerPlan((0, 2)), others=others)
    before = manager.state_slice()
    optimizer = torch.optim.AdamW(
        [p for m in adapted_layers(model).values() for p in adapter_parameters(m, "default")],
        lr=0.1,
        weight_decay=0.5,
    )
    loss_of(model).backward()
    optimizer.step()
    for key, value in manager.state_slice().items():
        assert torch.equal(value, before[key]) == (".layers.1." in key)
    assert len(optimizer.state) == 8  # two layers with two modules of two factors


@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes_decrease_with_the_trained_depth(kind: str):
    model = adapted(kind).train()
    model.get_input_embeddings().weight.requires_grad_(True)
    manager = LoraLayerManager(model)
    found = []
    for lowest in range(3):
        manager.apply(LayerPlan(tuple(range(lowest, 3))))
        found.append(saved_bytes(manager))
    assert found[0] > 1.3 * found[1] > 1.3 * 1.3 * found[2]
    manager.apply(LayerPlan((0, 1, 2)), mode="eval")
    assert saved_bytes(manager) < found[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_above_the_boundary_equal_those_of_the_full_graph(kind: str, checkpointing: bool):
    model = adapted(kind).train()
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((1, 2)))
    loss_of(model).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    with manager.boundary():
        loss_of(model).backward()
    assert wanted
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in wanted)
        if name in wanted:
            assert torch.equal(parameter.grad, wanted[name])
    block = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
    assert not block._forward_hooks and not block._forward_pre_hooks


def test_no_graph_is_built_below_the_lowest_trained_layer():
    model = Stack()
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((10, 11)))
    with manager.boundary():
        model(torch.randn(3, 6))
    assert [x.requires_grad for x in model.seen] == [False] * 10 + [True] * 2
    assert all(x.grad_fn is None for x in model.seen[:10])


def test_copy_made_within_the_boundary_is_independent_and_trainable():
    # Clients make such a copy, for example, to compare the trained with the initial model.
    model = Stack()
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((10, 11)))
    x = torch.randn(3, 6)
    with manager.boundary():
        copied = copy.deepcopy(model)
        expected = copied(x)
        assert [t.requires_grad for t in copied.seen] == [False] * 10 + [True] * 2
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(copied(x), expected)
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    copied(x).sum().backward()
    assert all(p.grad is not None for n, p in copied.named_parameters() if ".lora_" in n)


def test_error_below_the_boundary_restores_the_grad_mode():
    model = Stack()
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((11,)))
    with manager.boundary(), pytest.raises(ValueError, match=r"lora_linear: a.shape"):
        model(torch.randn(3, 5))
    assert torch.is_grad_enabled()


def test_layers_1_10_and_11_are_distinguished():
    model = Stack(12)
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((1,)))
    assert trained(model) == {f"layers.1.lora_{x}.default.weight" for x in "AB"}
    assert {k.split(".")[3] for k in manager.state_slice([1, 11])} == {"1", "11"}


@pytest.mark.parametrize("kind", KINDS)
def test_state_slice_has_the_names_and_values_of_a_saved_file(kind: str):
    model = adapted(kind)
    manager = LoraLayerManager(model)
    saved = LoraAdapter.from_model(model).state_dict()
    found = manager.state_slice()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], saved[key]) for key in saved)
    part = manager.state_slice([2], [3])
    assert {tuple(v.shape) for v in part.values()} == {(3, 16), (16, 3), (3, 24)}
    next(iter(found.values())).zero_()  # The returned slice is a copy.
    assert torch.equal(manager.state_slice()[next(iter(saved))], next(iter(saved.values())))


@pytest.mark.parametrize("kind", KINDS)
def test_state_slice_of_smaller_rank_trains_like_an_adapter_of_that_rank(kind: str):
    wide, narrow = adapted(kind), adapted(kind, r=2, lora_alpha=3)  # Both scales are 1.5.
    part = LoraLayerManager(narrow).state_slice()
    for model in (wide, narrow):
        manager = LoraLayerManager(model)
        manager.load_slice(part)
        manager.apply(LayerPlan((0, 1, 2), (2, 2, 2)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    found = LoraLayerManager(wide).state_slice()
    small = LoraLayerManager(narrow).state_slice()
    for key, value in small.items():
        rows = found[key][:2] if "lora_A" in key else found[key][:, :2]
        assert torch.allclose(rows, value, atol=1e-5)
        rest = found[key][2:] if "lora_A" in key else found[key][:, 2:]
        assert not rest.any()
        assert not torch.equal(value, part[key])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_frozen_layers_can_be_switched_off(kind: str):
    model = adapted(kind, lora_dropout=0.5).train()
    quiet = LoraLayerManager(model, frozen_dropout=False)
    quiet.apply(LayerPlan((2,)))
    model.train()
    torch.manual_seed(0)
    blocks: list[Tensor] = []
    hook = next(m for n, m in model.named_modules() if n.endswith("layers.1"))
    hook.register_forward_hook(lambda m, i, o: blocks.append(o[0] if isinstance(o, tuple) else o))
    last = [loss_of(model).item() for _ in range(2)]
    assert torch.equal(blocks[0], blocks[1])
    assert last[0] != last[1]  # the planned layer keeps its dropout
    quiet.apply(LayerPlan((0, 1, 2)))
    assert {m.lora_dropout["default"].p for m in adapted_layers(model).values()} == {0.5}
    LoraLayerManager(model).apply(LayerPlan((2,)))
    loss_of(model), loss_of(model)
    assert not torch.equal(blocks[2], blocks[3])
    copied = copy.deepcopy(quiet)
    copied.apply(LayerPlan((2,)))
    assert {m.lora_dropout["default"].p for m in adapted_layers(copied.model).values()} == {0, 0.5}


def test_modules_outside_all_layers_are_frozen_and_compute():
    model = llama()
    wrap(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((0,)), others="disabled")
    assert trained(model) == names_of(model, {0})
    assert is_active(model.lm_head, "default")
    assert not any("lm_head" in key for key in manager.state_slice())


def test_models_without_numbered_layers_are_refused():
    with pytest.raises(LayerNotFound, match="found none among 0 tensors"):
        LoraLayerManager(adapted("ours"), r"h\.(\d+)\.")
    gaps = Stack(4)
    gaps.layers[1] = nn.Identity()
    with pytest.raises(LayerNotFound, match=r"0 to 3 without a gap, found \[0, 2, 3\]"):
        LoraLayerManager(gaps)
    two = nn.ModuleDict({"encoder": Stack(2), "decoder": Stack(2)})
    with pytest.raises(LayerNotFound, match=r"one block of index 0, found .'decoder.layers.0'"):
        LoraLayerManager(two)
    assert LoraLayerManager(two, r"decoder\.layers\.(\d+)\.").num_layers == 2


@pytest.mark.parametrize(
    ("settings", "found"), [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "a bias")]
)
def test_dora_and_biases_are_refused(settings: dict, found: str):
    with pytest.raises(ValueError, match=f"expected only lora_A and lora_B, found {found}"):
        LoraLayerManager(adapted("ours", **settings))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.apply(LayerPlan((3,))), r"plan.layers: expected layers below 3, found 3"),
        (lambda m: m.apply(LayerPlan((1,), (5,))), r"plan.ranks: expected at most 4, .* found 5"),
        (lambda m: m.apply(LayerPlan(()), "test"), r"mode: expected one of .*, found 'test'"),
        (lambda m: m.apply(LayerPlan(()), others="off"), r"others: expected one of .* 'off'"),
        (lambda m: m.state_slice([7]), r"plan.layers: expected layers below 3, found 7"),
        (lambda m: m.load_slice({"x": torch.ones(1)}), r"x: expected the name of a factor"),
        (
            lambda m: m.load_slice({k: v[:1] for k, v in m.state_slice([0]).items()}),
            r"down_proj.lora_B.weight: expected shape \[16, 4\], or with a smaller .*\[1, 4",
        ),
        (
            lambda m: m.load_slice(dict(list(m.state_slice([0]).items())[:2])),
            r"state: expected factors of .'model.layers.0.*, found none",
        ),
    ],
)
def test_invalid_calls_are_refused_and_change_nothing(call, message: str):
    model = adapted("ours")
    manager = LoraLayerManager(model)
    manager.apply(LayerPlan((1,)))
    before, flags = manager.state_slice(), trained(model)
    with pytest.raises(ValueError, match=message):
        call(manager)
    after = manager.state_slice()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trained(model) == flags


def test_merged_and_inactive_adapters_are_refused():
    model = adapted("ours", "default", "other")
    with pytest.raises(ValueError, match=r"expected 'other' to be active, found .'default'"):
        LoraLayerManager(model, adapter="other").apply(LayerPlan((1,)))
    next(iter(adapted_layers(model).values())).merge()
    with pytest.raises(ValueError, match="an adapter that is not merged, found a merged adapter"):
        LoraLayerManager(model).apply(LayerPlan((1,)))


def test_incomplete_pairs_are_refused():
    manager = LoraLayerManager(adapted("ours"))
    half = {k: v for k, v in manager.state_slice([0]).items() if "q_proj.lora_B" not in k}
    with pytest.raises(KeyError, match="q_proj: expected lora_A and lora_B, found"):
        manager.load_slice(half)
