"""`BatchedClients`: the update of each client equals training it alone; the model is restored."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from adapted_models import KINDS, adapted
from client_models import (
    PLANS,
    WIDTH,
    Classifier,
    assert_as_alone,
    assert_close,
    next_token,
    specs,
    tokens,
    vectors,
)
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
from lora_ext.nn import LoraLinear, adapted_layers


@pytest.mark.parametrize("slots", [None, 3, 1])
@pytest.mark.parametrize("others", ["frozen", "disabled"])
def test_batch_of_clients_equals_training_them_one_by_one(slots: int | None, others: str):
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    batched = BatchedClients(model, specs(), slots=slots, others=others)
    found = batched.run_round(PLANS, state)
    assert same_bits(dict(model.state_dict()), before)
    assert dict(model.named_modules()) == modules
    assert all(p.grad is None for p in model.parameters())
    assert [u.client for u in found] == [1, "b", 3, 4]
    assert [u.num_examples for u in found] == [10, 4, 8, 11]
    assert_as_alone(found, model, state, specs(), PLANS, others)
    assert all(any(bool(t.any()) for t in update.tensors.values()) for update in found)
    assert aggregate(state, found).accepted == (1, 3, 4, "b")


def test_float32_batch_equals_the_loop_up_to_rounding():
    model = Classifier()
    state = LoraLayerManager(model).state_slice()
    clients = [
        dataclasses.replace(s, batches=[(x.float(), y) for x, y in s.batches]) for s in specs()
    ]
    found = BatchedClients(model, clients).run_round(PLANS, state)
    assert_as_alone(found, model, state, clients, PLANS, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_with_sequences_of_different_lengths_equals_the_loop(kind: str):
    model = adapted(kind).double()
    state = LoraLayerManager(model).state_slice()
    clients = [
        ClientSpec(1, tokens([4, 6], 1), lr=0.05),
        ClientSpec(2, tokens([7], 2, rows=3), lr=0.05),
        ClientSpec(3, tokens([3, 3, 5], 3, rows=1), lr=0.05, max_grad_norm=0.1),
    ]
    plans = [LayerPlan((2,)), LayerPlan((0, 1, 2), (4, 1, 2)), LayerPlan((1,))]
    found = BatchedClients(model, clients).run_round(plans, state)
    assert_as_alone(found, model, state, clients, plans, loss_of=next_token)


def test_client_that_fails_in_its_last_step_changes_no_bit_of_others():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    clients = specs()
    good = BatchedClients(model, clients).run_round(PLANS, state)
    x, y = clients[1].batches[0]
    clients[1] = dataclasses.replace(clients[1], batches=[(x * math.nan, y)])
    found = BatchedClients(model, clients).run_round(PLANS, state)
    assert [u.failed for u in found] == [False, True, False, False]
    assert not found[1].tensors
    for i in (0, 2, 3):
        assert same_bits(dict(found[i].tensors), dict(good[i].tensors))
    result = aggregate(state, found)
    assert result.accepted == (1, 3, 4)
    assert "found a failed update" in result.rejected["b"]


def test_client_that_fails_early_does_not_change_others():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    clients = specs()
    good = BatchedClients(model, clients).run_round(PLANS, state)
    batches = [(x * math.inf, y) for x, y in clients[0].batches[:1]] + clients[0].batches[1:]
    clients[0] = dataclasses.replace(clients[0], batches=batches)
    found = BatchedClients(model, clients).run_round(PLANS, state)
    assert [u.failed for u in found] == [True, False, False, False]
    for update, wanted in zip(found[1:], good[1:], strict=True):
        assert_close(update, wanted, 1e-10)


def test_finished_client_does_not_change_by_a_bit():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    first = [dataclasses.replace(s, batches=s.batches[:1], weight_decay=0.1) for s in specs()]
    alone = BatchedClients(model, first).run_round(PLANS, state)
    long = [dataclasses.replace(s, weight_decay=0.1) for s in specs()]
    found = BatchedClients(model, long).run_round(PLANS, state)
    assert [len(s.batches) for s in long] == [3, 1, 2, 4]
    assert same_bits(dict(found[1].tensors), dict(alone[1].tensors))
    assert not same_bits(dict(found[0].tensors), dict(alone[0].tensors))


def test_clients_of_equal_settings_share_optimizer_steps_at_all_ranks():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    clients = [
        ClientSpec(i, vectors([2] * (1 + i % 3), i), lr=0.05, weight_decay=0.1) for i in range(7)
    ]
    plans = [LayerPlan((i % 3,), (1 + i % 3,)) for i in range(7)]
    found = BatchedClients(model, clients).run_round(plans, state)
    assert_as_alone(found, model, state, clients, plans)


def test_client_with_nonfinite_factors_at_the_end_fails():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    client = ClientSpec(1, vectors([3], 1), lr=1e308, weight_decay=1e10)
    (found,) = BatchedClients(model, [client]).run_round([LayerPlan((0,))], state)
    assert found.failed


def test_clients_without_data_are_returned_and_without_a_plan_skipped():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    clients = [ClientSpec(1, [], lr=0.1), *specs()[1:]]
    found = BatchedClients(model, clients).run_round({1: LayerPlan((0,)), "b": PLANS["b"]}, state)
    assert [u.client for u in found] == [1, "b"]
    assert found[0].num_examples == 0
    assert not any(bool(t.any()) for t in found[0].tensors.values())
    assert math.isnan(found[0].loss)
    assert "num-examples" in aggregate(state, found).rejected[1]


def test_empty_batch_fails_alone_and_among_others():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    clients = [ClientSpec(i, vectors([rows], i), lr=0.1) for i, rows in enumerate((0, 3))]
    for some in (clients, clients[:1]):
        updates = BatchedClients(model, some).run_round([LayerPlan((0,))] * len(some), state)
        assert [u.failed for u in updates] == [True, False][: len(some)]
        assert updates[0].num_examples == 0


def test_custom_loss_and_another_dtype_of_factors_are_supported():
    model = Classifier()
    state = LoraLayerManager(model).state_slice()
    seen: list[tuple[int, ...]] = []

    def loss_fn(output: Tensor, batch: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return output.square().mean()

    clients = [ClientSpec(i, [torch.randn(i, WIDTH)], lr=0.1) for i in (1, 2)]
    batched = BatchedClients(model, clients, loss_fn=loss_fn, dtype=torch.float64)
    found = batched.run_round([LayerPlan((0,))] * 2, state)
    assert seen == [(1, 4), (2, 4)]
    assert {t.dtype for u in found for t in u.tensors.values()} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_the_base_is_refused_in_training_mode(kind: str):
    model = adapted(kind).double()
    model.add_module("drop", nn.Dropout(0.1))
    state = LoraLayerManager(model).state_slice()
    clients = [ClientSpec(1, tokens([4], 1), lr=0.1)]
    batched = BatchedClients(model.eval(), clients)
    batched.run_round([LayerPlan((0,))], state)
    model.train()
    with pytest.raises(UnsupportedModule, match=r"drop: expected no dropout .*, found p = 0.1"):
        batched.run_round([LayerPlan((0,))], state)


def test_dropout_inside_a_forward_is_refused():
    model = adapted("ours").train()
    model.model.layers[1].self_attn.attention_dropout = 0.2
    with pytest.raises(UnsupportedModule, match=r"self_attn: .*, found attention_dropout = 0.2"):
        BatchedClients(model, [ClientSpec(1, tokens([4], 1), lr=0.1)])
    model.model.layers[1].self_attn.attention_dropout = 0.0
    model.model.layerdrop = 0.5  # attribute of models that skip layers at random
    with pytest.raises(UnsupportedModule, match=r"model: .*, found layerdrop = 0.5"):
        BatchedClients(model, [ClientSpec(1, tokens([4], 1), lr=0.1)])


@pytest.mark.parametrize("kind", KINDS)
def test_second_active_adapter_is_refused(kind: str):
    model = adapted(kind, "default", "other")
    clients = [ClientSpec(1, tokens([4], 1), lr=0.1)]
    BatchedClients(model, clients)
    for layer in adapted_layers(model).values():
        layer.set_adapter(["default", "other"])
    message = r"q_proj: expected no active adapter except 'default', found \['default', 'other'\]"
    with pytest.raises(UnsupportedModule, match=message):
        BatchedClients(model, clients)


@pytest.mark.filterwarnings("ignore")  # warnings of checkpointing in transformers and torch
@pytest.mark.parametrize("embeddings", [False, True])
def test_checkpoints_that_stop_gradients_are_refused(embeddings: bool):
    model = adapted("ours").double().train()
    state = LoraLayerManager(model).state_slice()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if embeddings:
        model.enable_input_require_grads()
    clients = [ClientSpec(i, tokens([4], i), lr=0.1) for i in range(2)]
    with pytest.raises(
        UnsupportedModule, match=r"model: expected losses that depend on .*reentrant"
    ):
        BatchedClients(model, clients).run_round([LayerPlan((0,)), LayerPlan((2,))], state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.add_module("norm", nn.BatchNorm1d(4)), "norm: expected a module that does n"),
        (lambda m: m.layers[1].merge(), "layers.1: expected no adapter merged into the base"),
        (
            lambda m: m.layers.__setitem__(0, LoraLinear(nn.Linear(6, 6), use_dora=True)),
            "layers.0: expected LoRA without DoRA, found DoRA",
        ),
        (
            lambda m: m.layers.__setitem__(0, LoraLinear(nn.Linear(6, 6), lora_bias=True)),
            "layers.0: expected only lora_A and lora_B, found a bias",
        ),
    ],
)
def test_modules_that_mix_rows_or_change_the_base_are_refused(change, message: str):
    model = Classifier()
    change(model)
    with pytest.raises(UnsupportedModule, match=f"^BatchedClients: {message}"):
        BatchedClients(model, specs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected 'adamw', found 'sgd'"),
        ({"slots": 0}, "slots: expected a number above 0, or None, found 0"),
        ({"others": "off"}, "others: expected .*, found 'off'"),
        ({"clients": []}, "clients: expected at least one client, found"),
        ({"clients": [specs()[0]] * 2}, "clients: expected unique names"),
    ],
)
def test_invalid_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=f"^BatchedClients: {message}"):
        BatchedClients(Classifier(), **{"clients": specs(), **options})
    with pytest.raises(ValueError, match="ClientSpec: lr: expected a finite number from 0"):
        ClientSpec(1, [], lr=-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "fast"}, "lr: expected a finite number from 0, found 'fast'"),
        ({"lr": math.nan}, "lr: expected a finite number from 0, found nan"),
        ({"betas": (0.9,)}, r"betas: expected two numbers in \[0, 1\), found \(0.9,\)"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), found \(0.9, 1.0\)"),
        ({"seed": 1.5}, "seed: expected an integer, found 1.5"),
    ],
)
def test_invalid_client_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=f"^ClientSpec: {message}$"):
        ClientSpec(**{"client": 1, "batches": [], "lr": 0.1, **options})


def test_invalid_rounds_are_refused_and_leave_the_model_unchanged():
    model = Classifier().double()
    state = LoraLayerManager(model).state_slice()
    modules = dict(model.named_modules())
    batched = BatchedClients(model, specs())
    short = {k: v for k, v in state.items() if "layers.1." not in k}
    odd = {k: v[..., :4] if "layers.0.lora_A" in k else v for k, v in state.items()}
    for plans, lora, message in (
        ({9: LayerPlan((0,))}, state, "plans: expected names of clients, found 9"),
        ([LayerPlan((0,))], state, "plans: expected 4, one per client, found 1"),
        ({1: LayerPlan((7,))}, state, "plan.layers: expected layers among .* found 7"),
        ({1: LayerPlan((0,), (9,))}, state, "plan.ranks: layers.0: expected at most 3, found 9"),
        (PLANS, short, "global_lora: expected factors of layers.1, found none"),
        (PLANS, odd, r"layers.0.lora_A.weight: expected shape\[1\] = 6, found \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            batched.run_round(plans, lora)
    bad = [ClientSpec(1, [torch.ones(2, WIDTH)], lr=0.1), ClientSpec(2, [torch.ones(2, 5)], lr=0.1)]
    with pytest.raises(ValueError, match="batches: x: expected rows of one shape and dtype"):
        BatchedClients(model, bad).run_round([LayerPlan((0,))] * 2, state)
    lost = BatchedClients(nn.Sequential(model, nn.Flatten(0)), specs())
    inner = {k.replace("layers.", "0.layers."): v for k, v in state.items()}
    with pytest.raises(ValueError, match=r"model: expected an output of 10 rows, found shape"):
        lost.run_round(PLANS, inner)
    assert dict(model.named_modules()) == modules
