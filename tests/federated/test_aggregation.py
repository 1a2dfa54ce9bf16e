"""`aggregate` of valid replies, compared with examples computed by hand and formulas in numpy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from federated_rounds import MODULES, RANK, key, make_state, make_update, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_ext.federated import LayerNotFound, LayerPlan, Update, aggregate

RULES = ("covered", "zero_pad", "fro", "svd", "stack")
MIXED = [
    make_update(3, (0, 2), (1, 3), examples=10),
    make_update(17, (0, 1), (2, 2), examples=30),
    make_update("late", (0, 2), (3, 1), examples=60),
]


def product(state: dict[str, Tensor], layer: int, module: str = "q") -> np.ndarray:
    return state[key(layer, "B", module)].numpy() @ state[key(layer, "A", module)].numpy()


def value_of(state: dict[str, Tensor], update: Update, layer: int, module: str):
    """Return A and B of a module after the client's update, as numpy arrays."""
    da = update.tensors[key(layer, "A", module)].numpy()
    db = update.tensors[key(layer, "B", module)].numpy()
    r = len(da)
    a, b = state[key(layer, "A", module)].numpy(), state[key(layer, "B", module)].numpy()
    return a[:r] + da, b[:, :r] + db


def test_mean_of_three_clients_equals_the_mean_computed_by_hand():
    # Layer 0 is trained by all clients, with weights 10, 30 and 60; layer 1 only by the second.
    state = {key(i, "A"): torch.tensor([[1.0, 2.0]]) for i in range(2)}
    state |= {key(i, "B"): torch.tensor([[0.0]]) for i in range(2)}

    def reply(client: int, examples: int, layers: tuple[int, ...], step: float) -> Update:
        tensors = {key(i, "A"): torch.tensor([[step, 0.0]]) for i in layers}
        tensors |= {key(i, "B"): torch.tensor([[2 * step]]) for i in layers}
        return Update(client, examples, tensors, LayerPlan(layers))

    replies = [reply(1, 10, (0,), 1.0), reply(2, 30, (0, 1), 2.0), reply(3, 60, (0,), 4.0)]
    found = aggregate(state, replies)
    # (10 * 1 + 30 * 2 + 60 * 4) / 100 = 3.1
    assert torch.allclose(found.state[key(0, "A")], torch.tensor([[4.1, 2.0]]))
    assert torch.allclose(found.state[key(0, "B")], torch.tensor([[6.2]]))
    assert torch.equal(found.state[key(1, "A")], torch.tensor([[3.0, 2.0]]))
    assert torch.equal(found.state[key(1, "B")], torch.tensor([[4.0]]))
    assert (found.accepted, found.rejected, found.uncovered) == ((1, 2, 3), {}, ())
    # The products B A of the clients are 2 * (2, 2), 4 * (3, 2) and 8 * (5, 2). The mean of their
    # first entries is (10 * 4 + 30 * 12 + 60 * 40) / 100 = 28, and the mean of their second entries
    # is 12.4. The product of the mean factors is 6.2 * (4.1, 2).
    off, size = (28 - 6.2 * 4.1, 12.4 - 12.4), (28, 12.4)
    assert found.noise[0] == pytest.approx(math.hypot(*off) / math.hypot(*size))
    assert found.noise[1] == 0
    halved = aggregate(state, replies, server_lr=0.5, weighted_by=None)
    # server_lr halves the unweighted mean update: (1 + 2 + 4) / 3 / 2 = 7 / 6.
    assert torch.allclose(halved.state[key(0, "A")], torch.tensor([[1 + 7 / 6, 2.0]]))


@pytest.mark.parametrize("upload", ["delta", "value"])
@pytest.mark.parametrize("server_lr", [1.0, 0.3])
@pytest.mark.parametrize("rank_agg", ["covered", "zero_pad", "fro"])
def test_means_of_mixed_ranks_equal_a_formula_row_by_row(
    upload: str, server_lr: float, rank_agg: str
):
    state = make_state()
    replies = MIXED
    if upload == "value":
        replies = [
            dataclasses.replace(
                u,
                tensors={
                    k: v + (state[k][: len(v)] if "lora_A" in k else state[k][:, : v.shape[1]])
                    for k, v in u.tensors.items()
                },
            )
            for u in MIXED
        ]
    found = aggregate(state, replies, upload=upload, server_lr=server_lr, rank_agg=rank_agg)
    for layer in range(3):
        for module in MODULES:
            own = [(u, *value_of(state, u, layer, module)) for u in MIXED if layer in u.plan.layers]
            for factor, transposed in (("A", False), ("B", True)):
                before = state[key(layer, factor, module)].numpy()
                wanted = (before.T if transposed else before).copy()
                for j in range(RANK):
                    above = below = 0.0
                    for u, a, b in own:
                        weight = u.num_examples
                        if rank_agg == "fro":
                            weight *= np.linalg.norm(b @ a)
                        rows = b.T if transposed else a
                        if j < len(rows):
                            above = above + weight * rows[j]
                            below += weight
                        elif rank_agg == "zero_pad":
                            below += weight
                    if below:
                        wanted[j] += server_lr * (above / below - wanted[j])
                got = found.state[key(layer, factor, module)].numpy()
                got = got.T if transposed else got
                assert np.abs(got - wanted).max() < 1e-12


def weighted_sum(state: dict[str, Tensor], layer: int, module: str) -> np.ndarray:
    own = [
        (u.num_examples, *value_of(state, u, layer, module))
        for u in MIXED
        if layer in u.plan.layers
    ]
    return sum(w * (b @ a) for w, a, b in own) / sum(w for w, _, _ in own)


@pytest.mark.parametrize("server_lr", [1.0, 0.3, 1.5])
def test_stack_equals_the_weighted_sum_of_products(server_lr: float):
    state = make_state()
    found = aggregate(state, MIXED, rank_agg="stack", server_lr=server_lr)
    for layer in range(3):
        for module in MODULES:
            a, b = found.stacked[f"layers.{layer}.{module}"]
            wanted = weighted_sum(state, layer, module)
            wanted = wanted * server_lr + (1 - server_lr) * product(state, layer, module)
            assert np.abs((b @ a).numpy() - wanted).max() < 1e-12
            assert not found.state[key(layer, "B", module)].any()
            assert torch.equal(found.state[key(layer, "A", module)], state[key(layer, "A", module)])
    assert found.noise == {0: 0.0, 1: 0.0, 2: 0.0}


@pytest.mark.parametrize("server_lr", [1.0, 0.3])
def test_svd_is_the_best_approximation_of_the_global_rank(server_lr: float):
    state = make_state()
    scaling = {f"layers.{i}.{m}": 0.5 + i + (m == "v") for i in range(3) for m in MODULES}
    found = aggregate(state, MIXED, rank_agg="svd", server_lr=server_lr, scaling=scaling)
    for layer in range(3):
        lost = whole = 0.0
        for module in MODULES:
            wanted = weighted_sum(state, layer, module)
            wanted = wanted * server_lr + (1 - server_lr) * product(state, layer, module)
            u, s, vh = np.linalg.svd(wanted)
            nearest = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
            assert np.abs(product(found.state, layer, module) - nearest).max() < 1e-12
            a, b = found.state[key(layer, "A", module)], found.state[key(layer, "B", module)]
            squares = (b.T @ b).diagonal()
            # Each factor contains the root of the singular value.
            assert torch.allclose((a @ a.T).diagonal()[squares > 0], squares[squares > 0])
            assert a.any(1).all()  # Even the third rank is not 0 if the only client has rank 2.
            squared = scaling[f"layers.{layer}.{module}"] ** 2
            lost += squared * (s[RANK:] ** 2).sum()
            whole += squared * (s**2).sum()
        assert found.noise[layer] == pytest.approx(math.sqrt(lost / whole), abs=1e-12)


def test_noise_is_the_error_of_averaging_the_factors_separately():
    state = make_state()
    scaling = {
        f"base_model.model.layers.{i}.{m}": 2.0 + (m == "v") for i in range(3) for m in MODULES
    }
    found = aggregate(state, MIXED, scaling=scaling)
    for layer in (0, 2):
        error = size = 0.0
        for module in MODULES:
            squared = (2.0 + (module == "v")) ** 2
            wanted = weighted_sum(state, layer, module)
            error += squared * np.square(wanted - product(found.state, layer, module)).sum()
            size += squared * np.square(wanted).sum()
        assert found.noise[layer] == pytest.approx(math.sqrt(error / size), rel=1e-9)
    assert found.noise[1] == 0  # Only one client, of a smaller rank, trains layer 1.


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("rank_agg", ["covered", "zero_pad", "fro"])
def test_noise_is_zero_if_all_clients_share_one_factor(factor: str, rank_agg: str):
    state = make_state()
    replies = [make_update(i, examples=10 * i) for i in range(1, 4)]
    for reply in replies:
        for k in reply.tensors:
            if f"lora_{factor}" in k:
                reply.tensors[k] = replies[0].tensors[k]
    found = aggregate(state, replies, rank_agg=rank_agg)
    assert max(found.noise.values()) < 1e-14


@pytest.mark.parametrize("rank_agg", RULES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_order_of_replies_changes_no_bit(rank_agg: str, data: st.DataObject):
    state = make_state(dtype=torch.float32)
    clients = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True))
    replies = []
    for i, client in enumerate(clients):
        layers = data.draw(st.sets(st.integers(0, 2), min_size=1))
        ranks = [data.draw(st.integers(1, RANK)) for _ in layers]
        replies.append(make_update(client, sorted(layers), ranks, 1 + 7 * i, seed=i))
    if len(replies) > 2:
        key_, value = next(iter(replies[0].tensors.items()))
        replies[0].tensors[key_] = value * math.nan
    first = aggregate(state, replies, rank_agg=rank_agg, max_update_norm=3.0)
    second = aggregate(
        state, data.draw(st.permutations(replies)), rank_agg=rank_agg, max_update_norm=3.0
    )
    assert same_bits(first.state, second.state)
    assert first.stacked.keys() == second.stacked.keys()
    for module, (a, b) in first.stacked.items():
        assert torch.equal(a, second.stacked[module][0])
        assert torch.equal(b, second.stacked[module][1])
    assert dataclasses.replace(first, state={}, stacked={}) == dataclasses.replace(
        second, state={}, stacked={}
    )
    assert list(first.rejected) == list(second.rejected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank_agg", ["covered", "zero_pad", "fro"])
def test_single_client_determines_the_state(dtype: torch.dtype, rank_agg: str):
    state, reply = make_state(dtype=dtype), make_update(5, (0, 2), examples=7, dtype=dtype)
    found = aggregate(state, [reply], rank_agg=rank_agg)
    values = {k: v + state[k].double() for k, v in reply.tensors.items()}
    for k, before in state.items():
        wanted = values[k].to(dtype) if k in values else before
        assert torch.equal(found.state[k], wanted)
        assert found.state[k].dtype == dtype
    assert set(found.noise.values()) == {0.0}
    assert found.uncovered == (1,)
    sent = {k: v.to(dtype) for k, v in values.items()}
    back = aggregate(state, [dataclasses.replace(reply, tensors=sent)], upload="value")
    assert all(torch.equal(back.state[k], v) for k, v in sent.items())


@given(st.integers(1, 5), st.floats(1e-3, 1e3))
@settings(max_examples=10, deadline=None)
def test_equal_clients_give_the_state_of_a_single_client(clients: int, examples: float):
    state = make_state()
    reply = make_update(0)
    replies = [
        dataclasses.replace(reply, client=i, num_examples=examples * (i + 1))
        for i in range(clients)
    ]
    alone = aggregate(state, [reply])
    assert same_bits(aggregate(state, replies).state, alone.state)


def test_covered_equals_zero_pad_if_all_clients_train_everything():
    state = make_state()
    replies = [make_update(i, examples=i) for i in range(1, 5)]
    covered, padded = (aggregate(state, replies, rank_agg=r) for r in ("covered", "zero_pad"))
    assert same_bits(covered.state, padded.state)
    assert covered.noise == padded.noise


def test_untrained_tensors_are_returned_without_a_copy():
    state = make_state()
    found = aggregate(state, [make_update(1, (2,), (2,)), make_update(2, (2,), (1,))])
    assert found.uncovered == (0, 1)
    assert all(found.state[k] is state[k] for k in state if ".layers.2." not in k)
    a, b = found.state[key(2, "A")], found.state[key(2, "B")]
    assert torch.equal(a[2:], state[key(2, "A")][2:])  # no client has this rank
    assert torch.equal(b[:, 2:], state[key(2, "B")][:, 2:])
    assert not torch.equal(a[:2], state[key(2, "A")][:2])
    padded = aggregate(state, [make_update(1, (2,), (2,))], rank_agg="zero_pad").state
    assert not padded[key(2, "A")][2:].any()


def test_fro_with_zero_norms_uses_the_weights_alone():
    state = {k: v if "lora_A" in k else torch.zeros_like(v) for k, v in make_state().items()}
    replies = [make_update(i, examples=10 * i) for i in range(1, 4)]
    for reply in replies:
        for k in reply.tensors:
            if "lora_B" in k:
                reply.tensors[k] = torch.zeros_like(reply.tensors[k])
    fro, covered = (aggregate(state, replies, rank_agg=r) for r in ("fro", "covered"))
    assert same_bits(fro.state, covered.state)
    assert set(fro.noise.values()) == {0.0}


def test_fro_client_of_norm_zero_determines_ranks_that_no_other_client_has():
    state = {k: v if "lora_A" in k else torch.zeros_like(v) for k, v in make_state(1).items()}
    narrow, wide = make_update(1, (0,), (1,)), make_update(2, (0,), (3,))
    wide.tensors[key(0, "B")] = torch.zeros_like(wide.tensors[key(0, "B")])
    found = aggregate(state, [narrow, wide], rank_agg="fro").state[key(0, "A")]
    start = state[key(0, "A")]
    assert torch.allclose(found[0], start[0] + narrow.tensors[key(0, "A")][0])
    assert torch.allclose(found[1:], start[1:] + wide.tensors[key(0, "A")][1:])


def test_update_above_the_norm_bound_is_clipped():
    state = make_state()
    long, short = make_update(1), make_update(2)
    short = dataclasses.replace(short, tensors={k: v * 1e-3 for k, v in short.tensors.items()})
    norm = math.sqrt(sum(float(v.square().sum()) for v in long.tensors.values()))
    found = aggregate(state, [long, short], max_update_norm=0.5)
    assert found.clipped == {1: pytest.approx(0.5 / norm)}
    clipped = dataclasses.replace(
        long, tensors={k: v * 0.5 / norm for k, v in long.tensors.items()}
    )
    wanted = aggregate(state, [clipped, short])
    for k in state:
        assert torch.allclose(found.state[k], wanted.state[k], atol=1e-14)
    values = [
        dataclasses.replace(u, tensors={k: state[k] + v for k, v in u.tensors.items()})
        for u in (long, short)
    ]
    as_values = aggregate(state, values, max_update_norm=0.5, upload="value")
    assert as_values.clipped == {1: pytest.approx(0.5 / norm)}
    for k in state:
        assert torch.allclose(as_values.state[k], wanted.state[k], atol=1e-14)


def test_head_is_averaged_over_all_clients_that_send_it():
    state = make_state() | {"score.weight": torch.zeros(2, 2, dtype=torch.float64)}
    replies = [make_update(i, (i,), examples=i) for i in (1, 2)]
    for reply in replies:
        reply.tensors["score.weight"] = torch.full((2, 2), float(reply.client))
    found = aggregate(state, replies, shared=["score.weight"])
    assert torch.allclose(found.state["score.weight"], torch.full((2, 2), 5 / 3).double())
    assert "score.weight: expected a name" in aggregate(state, replies).rejected[1]
    del replies[0].tensors["score.weight"]
    found = aggregate(state, replies, shared=["score.weight"])
    assert found.rejected[1].endswith("expected a tensor from every client, found none")


def test_names_need_no_prefix_and_inputs_are_unchanged():
    state = {k.removeprefix("base_model.model."): v for k, v in make_state().items()}
    reply = make_update(1)
    short = {k.removeprefix("base_model.model."): v for k, v in reply.tensors.items()}
    before = {k: v.clone() for k, v in state.items()}
    sent = {k: v.clone() for k, v in short.items()}
    found = aggregate(state, [dataclasses.replace(reply, tensors=short)])
    assert found.accepted == (1,)
    assert found.state.keys() == state.keys()
    for rule in RULES:
        aggregate(state, [dataclasses.replace(reply, tensors=short)], rank_agg=rule)
    assert same_bits(state, before) and same_bits(short, sent)


def test_convolution_kernels_are_averaged_like_matrices():
    state = {key(0, "A"): torch.randn(2, 3, 3, 3), key(0, "B"): torch.randn(4, 2, 1, 1)}
    tensors = {key(0, "A"): torch.randn(1, 3, 3, 3), key(0, "B"): torch.randn(4, 1, 1, 1)}
    reply = Update(1, 1, tensors, LayerPlan((0,), (1,)))
    for rule in RULES:
        found = aggregate(state, [reply], rank_agg=rule).state
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in state.items()}
    kept = aggregate(state, [reply]).state[key(0, "A")]
    assert torch.equal(kept[1], state[key(0, "A")][1])
    assert torch.allclose(kept[0], (state[key(0, "A")][0] + tensors[key(0, "A")][0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_agg": "mean"}, "rank_agg: expected one of .*'covered'.*, found 'mean'"),
        ({"upload": "grad"}, "upload: expected one of .*, found 'grad'"),
        ({"weighted_by": "batches"}, "weighted_by: expected one of .*, found 'batches'"),
        ({"nan_policy": "zero"}, "nan_policy: expected one of .*, found 'zero'"),
        ({"server_lr": 0.0}, "server_lr: expected a finite number above 0, found 0.0"),
        ({"server_lr": math.nan}, "server_lr: expected a finite number above 0, found nan"),
        ({"max_update_norm": -1}, "max_update_norm: expected a finite number above 0, found -1"),
        ({"min_replies": 0}, "min_replies: expected an integer from 1, found 0"),
        ({"min_replies": True}, "min_replies: expected an integer from 1, found True"),
        ({"scaling": math.inf}, "scaling: layers.0.q: expected a finite number, found inf"),
        ({"scaling": {"layers.0.q": 1.0}}, "scaling: expected a scale for layers.0.v, fo"),
        ({"shared": ["head"]}, "shared: expected names of tensors of the state, found 'head'"),
    ],
)
def test_invalid_settings_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=f"^aggregate: {message}"):
        aggregate(make_state(), [make_update(1)], **options)


def test_states_without_adapter_pairs_are_refused():
    with pytest.raises(LayerNotFound, match="found none among 12 tensors"):
        aggregate(make_state(), [], pattern=r"blocks\.(\d+)\.")
    state = make_state()
    with pytest.raises(ValueError, match=r"state: layers.0.q: expected equal ranks .*\[4, 2"):
        aggregate({**state, key(0, "B"): torch.zeros(4, 2)}, [])
    del state[key(1, "B")]
    with pytest.raises(KeyError, match=r"layers.1.q: expected lora_A and lora_B"):
        aggregate(state, [])
