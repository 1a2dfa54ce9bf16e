"""Shared heads, which all clients train besides their adapters: in batches, one by one, and with
Flower."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from adapted_models import KINDS, adapted
from client_models import PLANS, WIDTH, Classifier, assert_as_alone, next_token, specs, tokens
from federated_rounds import same_bits
from torch import Tensor, nn

from lora_ext.federated import (
    BatchedClients,
    ClientSpec,
    LayerPlan,
    LoraLayerManager,
    UnsupportedModule,
    aggregate,
)
from lora_ext.nn import LoraLinear

HEAD = ("head.weight", "head.bias")


def state_of(model: nn.Module, shared) -> dict[str, Tensor]:
    """Return a global state in which the shared parameters differ from those of the model."""
    g = torch.Generator().manual_seed(3)
    heads = {name: model.get_parameter(name).detach() for name in shared}
    noise = {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in heads.items()}
    moved = {name: p + 0.1 * noise[name] for name, p in heads.items()}
    return {**LoraLayerManager(model).state_slice(), **moved}


class Pooled(nn.Module):
    """Head that consists of several modules and a parameter, and takes a keyword argument."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 4, bias=False)

    def forward(self, x: Tensor, *, residual: Tensor) -> Tensor:
        return self.out(torch.tanh(self.dense(x)) * self.scale + residual)


class WithHead(Classifier):
    """Classifier with a given head."""

    def __init__(self, head: nn.Module, **keywords: str):
        super().__init__()
        self.head, self.keywords = head, keywords

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        given = {"first": first}
        return self.head(x, **{name: given[which] for name, which in self.keywords.items()})


# -------------------------------------------------------------------------------------------------
# Equality with training alone


@pytest.mark.parametrize("slots", [None, 3, 1])
@pytest.mark.parametrize("others", ["frozen", "disabled"])
@pytest.mark.parametrize("shared", [r"^head\.", HEAD, "head.weight"])
def test_batch_of_clients_with_a_head_equals_the_loop(shared, slots: int | None, others: str):
    model = Classifier().double()
    names = HEAD if shared != "head.weight" else HEAD[:1]
    state = state_of(model, names)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: {*module.__dict__} for name, module in model.named_modules()}
    batched = BatchedClients(model, specs(), slots=slots, others=others, shared=shared)
    assert batched.shared == names
    found = batched.run_round(PLANS, state)
    assert same_bits(dict(model.state_dict()), before)
    assert {name: {*module.__dict__} for name, module in model.named_modules()} == attributes
    assert_as_alone(found, model, state, specs(), PLANS, others, shared=names)
    assert all(bool(update.tensors[name].any()) for update in found for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_head_and_last_norm_of_a_language_model_equal_the_loop(kind: str):
    model = adapted(kind).double()
    names = tuple(
        n
        for n, _ in model.named_parameters()
        if n.endswith(("model.norm.weight", "lm_head.weight"))
    )
    assert len(names) == 2
    state = state_of(model, names)
    clients = [
        ClientSpec(1, tokens([4, 6], 1), lr=0.05),
        ClientSpec(2, tokens([7], 2, rows=3), lr=0.05, weight_decay=0.1),
        ClientSpec(3, tokens([3, 3, 5], 3, rows=1), lr=0.05, max_grad_norm=0.1),
    ]
    plans = [LayerPlan((2,)), LayerPlan((0, 1, 2), (4, 1, 2)), LayerPlan((1,))]
    batched = BatchedClients(model, clients, shared=r"(^|\.)(norm|lm_head)\.weight$")
    assert sorted(batched.shared) == sorted(names)
    found = batched.run_round(plans, state)
    assert_as_alone(found, model, state, clients, plans, loss_of=next_token, shared=names)


def test_head_of_several_modules_equals_the_loop():
    torch.manual_seed(1)
    model = WithHead(Pooled(), residual="first").double()
    names = tuple(n for n, _ in model.named_parameters() if n.startswith("head."))
    state = state_of(model, names)
    batched = BatchedClients(model, specs(), shared="head")
    found = batched.run_round(PLANS, state)
    assert_as_alone(found, model, state, specs(), PLANS, shared=names)


def test_client_without_layers_trains_the_head():
    model = Classifier().double()
    state = state_of(model, HEAD)
    plans = {1: LayerPlan(()), "b": LayerPlan((2,)), 3: LayerPlan(()), 4: LayerPlan(())}
    for some in (plans, {1: plans[1], 3: plans[3]}):
        found = BatchedClients(model, specs(), shared="head").run_round(some, state)
        clients = [spec for spec in specs() if spec.client in some]
        assert_as_alone(found, model, state, clients, some, shared=HEAD)
    assert found[0].tensors.keys() == {*HEAD}


def test_head_missing_in_the_state_starts_from_the_model():
    model = Classifier().double()
    manager = LoraLayerManager(model)
    own = {name: model.get_parameter(name).detach() for name in HEAD}
    batched = BatchedClients(model, specs(), shared="head")
    found = batched.run_round(PLANS, manager.state_slice())
    wanted = batched.run_round(PLANS, {**manager.state_slice(), **own})
    for one, two in zip(found, wanted, strict=True):
        assert same_bits(dict(one.tensors), dict(two.tensors))


def test_unshared_head_is_not_sent():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    batched = BatchedClients(model, specs())
    assert batched.shared == ()
    assert not any("head" in k for u in batched.run_round(PLANS, state) for k in u.tensors)


def test_aggregate_computes_the_weighted_mean_of_heads():
    model = Classifier().double()
    state = state_of(model, HEAD)
    batched = BatchedClients(model, specs(), shared="head")
    for _ in range(2):
        updates = batched.run_round(PLANS, state)
        found = aggregate(state, updates, shared=batched.shared)
        assert found.accepted == (1, 3, 4, "b")
        total = sum(u.num_examples for u in updates)
        for name in HEAD:
            mean = sum(u.num_examples * (state[name] + u.tensors[name]) for u in updates) / total
            torch.testing.assert_close(found.state[name], mean, rtol=0, atol=1e-12)
        state = found.state


def test_client_that_fails_changes_no_bit_of_other_heads():
    model = Classifier().double()
    state = state_of(model, HEAD)
    clients = specs()
    good = BatchedClients(model, clients, shared="head").run_round(PLANS, state)
    x, y = clients[1].batches[0]
    clients[1] = dataclasses.replace(clients[1], batches=[(x * math.nan, y)])
    found = BatchedClients(model, clients, shared="head").run_round(PLANS, state)
    assert [u.failed for u in found] == [False, True, False, False] and not found[1].tensors
    for i in (0, 2, 3):
        assert same_bits(dict(found[i].tensors), dict(good[i].tensors))


def test_client_with_a_nonfinite_head_at_the_end_fails():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    client = ClientSpec(1, specs()[0].batches[:1], lr=1e308, weight_decay=1e10)
    (found,) = BatchedClients(model, [client], shared="head").run_round([LayerPlan(())], state)
    assert found.failed and not found.tensors


# -------------------------------------------------------------------------------------------------
# Flower


def test_looped_batched_and_existing_clients_agree_with_flower():
    pytest.importorskip("flwr")
    import flower_apps as apps

    from lora_ext.federated import LocalGrid, LoraStrategy, make_client_app
    from lora_ext.federated.flower import from_arrays

    model = apps.Classifier()
    heads = {name: model.get_parameter(name).detach() for name in HEAD}
    there = [ClientSpec(i, apps.batches(i), lr=1e-2) for i in range(3)]
    nodes = {
        "loop": make_client_app(apps.Classifier, apps.batches),
        "batched": make_client_app(apps.Classifier, apps.batches, backend="batched"),
        "there": BatchedClients(model, there, shared="head"),
    }
    ends = {}
    for name, node in nodes.items():
        strategy = LoraStrategy(apps.Suffixes(), capability={0: 1, 1: 2, 2: 3}, shared=HEAD)
        result = apps.run(strategy, LocalGrid(node, 3), 2, {**apps.initial(), **heads})
        assert [log.accepted for log in strategy.history] == [(0, 1, 2)] * 2, strategy.history
        ends[name] = from_arrays(result.arrays)
    for key, value in ends["loop"].items():
        for name in ("batched", "there"):
            assert (value - ends[name][key]).abs().max() < 1e-5, (name, key)
    assert all(not torch.equal(ends["loop"][name], heads[name]) for name in HEAD)


def test_clients_that_share_another_head_than_the_strategy_are_rejected():
    pytest.importorskip("flwr")
    import flower_apps as apps

    from lora_ext.federated import LocalGrid, LoraStrategy

    there = [ClientSpec(0, apps.batches(0), lr=1e-2)]
    strategy = LoraStrategy(apps.Suffixes())
    apps.run(strategy, LocalGrid(BatchedClients(apps.Classifier(), there, shared="head"), 1), 1)
    reason = "expected shared=[], as in the strategy, found ['head.bias', 'head.weight']"
    assert reason in strategy.history[0].rejected[0]


# -------------------------------------------------------------------------------------------------
# Errors


class Below(Classifier):
    """Classifier with a module below its layers."""

    def __init__(self):
        super().__init__()
        self.below = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.below(x))


class Reads(Classifier):
    """Classifier that reads the weight of its head and does not call the head."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x @ self.head.weight.T


class Flattens(Classifier):
    """Classifier that passes more rows than sequences to its head."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x.repeat_interleave(2, 0))[::2]


class InATuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (super().forward(x),)


def tied() -> nn.Module:
    model = Classifier()
    model.other = nn.Linear(WIDTH, 4)
    model.other.weight = model.head.weight
    return model


def with_an_adapter_on_its_head() -> nn.Module:
    model = Classifier()
    model.head = LoraLinear(model.head, r=2)
    return model


def of_integers() -> nn.Module:
    model = Classifier()
    weight = torch.ones(4, WIDTH, dtype=torch.int8)
    model.head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def of_the_model_itself() -> nn.Module:
    model = Classifier()
    model.temperature = nn.Parameter(torch.ones(()))
    return model


@pytest.mark.parametrize(
    ("make", "shared", "kind", "message"),
    [
        (Classifier, "tail", ValueError, "shared: expected a pattern .* adapters, found 'tail'"),
        (Classifier, "lora_A", ValueError, "shared: expected a pattern that .*, found 'lora_A'"),
        (Classifier, "(", ValueError, r"shared: expected a regular expression, found '\('"),
        (Classifier, ["head"], ValueError, "shared: expected names of parameters .*, found 'head'"),
        (
            Classifier,
            "weight",
            UnsupportedModule,
            "layers.0.base_layer.weight: expected a parameter outside the layers, found it in",
        ),
        (tied, "head", UnsupportedModule, r"head.weight: .*, found one tied to \['other.weight'\]"),
        (
            with_an_adapter_on_its_head,
            "head.base_layer",
            UnsupportedModule,
            "head.base_layer.weight: expected a module without adapters, found adapters in",
        ),
        (
            of_the_model_itself,
            "temperature",
            UnsupportedModule,
            "temperature: expected a module without adapters, found adapters in",
        ),
        (of_integers, "head", UnsupportedModule, "head.weight: expected a floating-poi.*int8"),
    ],
)
def test_parameters_that_cannot_be_copied_per_client_are_refused_by_name(
    make, shared, kind, message: str
):
    with pytest.raises(kind, match=f"^BatchedClients: {message}"):
        BatchedClients(make(), specs(), shared=shared)


@pytest.mark.parametrize(
    ("make", "shared", "message"),
    [
        (Below, "below", "below: expected shared parameters above the layers, found that layers"),
        (Reads, "head.weight", "head: expected a module that the forward calls, found no call"),
        (Flattens, "head", r"head: expected input shape \(10, \.\.\.\), found \[20"),
        (
            lambda: WithHead(InATuple(WIDTH, 4)),
            "head",
            "head: expected a module that returns a tensor, found tuple",
        ),
    ],
)
def test_errors_found_in_the_forward_leave_the_model_unchanged(make, shared: str, message: str):
    model = make().double()
    modules = {name: (m, {*m.__dict__}) for name, m in model.named_modules()}
    state = LoraLayerManager(model).state_slice()
    batched = BatchedClients(model, specs(), shared=shared)
    with pytest.raises(UnsupportedModule, match=f"^BatchedClients: {message}"):
        batched.run_round(PLANS, state)
    assert {name: (m, {*m.__dict__}) for name, m in model.named_modules()} == modules


def test_head_of_another_shape_in_the_state_is_refused():
    model = Classifier().double()
    state = {**LoraLayerManager(model).state_slice(), "head.weight": torch.ones(3, WIDTH)}
    with pytest.raises(ValueError, match=r"head.weight: expected torch.Size\(\[4, 6\]\), found "):
        BatchedClients(model, specs(), shared="head").run_round(PLANS, state)
