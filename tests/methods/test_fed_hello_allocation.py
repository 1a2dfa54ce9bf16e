"""`HLA`: plans of clients, importance by round, state and errors."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext.federated import LayerPlan
from lora_ext.methods.fed_hello import (
    HLA,
    FedHelloConfig,
    Pattern,
    cluster_weights,
    gd_layers,
    pattern_weights,
    rgd_layers,
)

SCORES = [0.1, 0.11, 5, 5.2, 9, 9]


def test_each_kind_selects_its_layers():
    for pattern in Pattern:
        for c in range(7):
            assert HLA(pattern, 6).plan(3, 1, c) == LayerPlan(gd_layers(pattern, 6, c))
            drawn = rgd_layers(pattern_weights(pattern, 6), c, seed=2, round=3, client=9)
            assert HLA(pattern, 6, kind="rgd", seed=2).plan(3, 9, c) == LayerPlan(drawn)
    assert HLA("uniform", 12).plan(0, "phone", np.int64(6)).layers == (0, 2, 4, 6, 8, 10)


def test_given_weights_replace_the_pattern():
    weights = [0.0, 1.0, 5.0, 1.0]
    # Layers 1 and 3 have equal weights: the lower one is chosen.
    assert HLA("uniform", 4, weights=weights).plan(0, 0, 2).layers == (1, 2)
    drawn = HLA("uniform", 4, kind="rgd", weights=weights)
    assert {layer for r in range(50) for layer in drawn.plan(r, 0, 2).layers} == {1, 2, 3}
    assert drawn.weights(0).tolist() == pytest.approx([0, 1 / 7, 5 / 7, 1 / 7])
    for kind in ("gd", "rgd"):
        with pytest.raises(ValueError, match=r"weights: expected .*4 weights above 0, found"):
            HLA("uniform", 4, kind=kind, weights=weights).plan(0, 0, 4)


def test_importance_is_requested_by_round_and_applies_from_then_on():
    hla = HLA("bottleneck", 6, kind="fim", prior_rounds=4, every=3)
    assert [round for round in range(14) if hla.wants_scores(round)] == [6, 9, 12]
    prior, scored = pattern_weights("bottleneck", 6), cluster_weights(SCORES)
    assert torch.equal(hla.weights(5), prior)
    hla.update(6, SCORES)
    assert torch.equal(hla.weights(5), prior)  # a past round keeps its weights
    for round in (6, 7, 8):
        assert torch.equal(hla.weights(round), scored)
    hla.update(9, torch.tensor(SCORES).flip(0))
    assert torch.equal(hla.weights(8), scored)
    assert torch.equal(hla.weights(11), scored.flip(0))
    plan = rgd_layers(scored, 3, seed=0, round=7, client=5)
    assert hla.plan(7, 5, 3).layers == plan
    assert not any(HLA("bottleneck", 6, kind="rgd").wants_scores(round) for round in range(200))


def test_default_rounds_are_multiples_of_fifty():
    hla = HLA("bottleneck", 6, kind="fim")
    assert [round for round in range(151) if hla.wants_scores(round)] == [50, 100, 150]


def test_importance_may_expire_or_be_mixed_with_the_pattern():
    prior, scored = pattern_weights("triangle", 6), cluster_weights(SCORES)
    lapsing = HLA("triangle", 6, kind="fim", prior_rounds=2, every=2, hold=False)
    lapsing.update(2, SCORES)
    assert torch.equal(lapsing.weights(2), scored) and torch.equal(lapsing.weights(3), prior)
    mixed = HLA("triangle", 6, kind="fim", prior_rounds=2, every=2, mix=0.25)
    mixed.update(2, SCORES)
    torch.testing.assert_close(mixed.weights(2), 0.25 * scored + 0.75 * prior)
    early = HLA("triangle", 6, kind="fim", prior_rounds=8)
    early.update(2, SCORES)
    assert torch.equal(early.weights(7), prior) and torch.equal(early.weights(8), scored)


@given(
    pattern=st.sampled_from([*Pattern]),
    kind=st.sampled_from(["gd", "rgd", "fim"]),
    L=st.integers(1, 14),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_plans_depend_only_on_seed_round_and_client(pattern, kind, L, data):
    asked = data.draw(
        st.lists(
            st.tuples(st.integers(0, 99), st.integers(0, 2**63), st.integers(0, L)),
            min_size=1,
            max_size=8,
        )
    )
    scores = data.draw(st.lists(st.floats(0, 1e3), min_size=L, max_size=L))
    hlas = [HLA(pattern, L, kind=kind, seed=4, prior_rounds=20) for _ in range(2)]
    for hla in hlas:
        hla.update(50, scores)
    plans = {each: hlas[0].plan(*each) for each in asked}
    for each in reversed(asked):
        assert hlas[1].plan(*each) == plans[each]
        layers = plans[each].layers
        assert len(layers) == each[2] and set(layers) <= set(range(L))


def test_state_restores_every_plan_through_json():
    before = HLA("inverted_triangle", 6, kind="fim", seed=3, prior_rounds=2, every=2, mix=0.5)
    before.update(2, SCORES)
    before.update(4, SCORES[::-1])
    state = json.loads(json.dumps(before.state_dict()))
    after = HLA("uniform", 6)
    after.load_state_dict(state)
    assert after.config == before.config and after.state_dict() == before.state_dict()
    for round in range(8):
        assert torch.equal(after.weights(round), before.weights(round))
        assert [after.plan(round, c, 3) for c in range(9)] == [
            before.plan(round, c, 3) for c in range(9)
        ]
    for bad, message in (
        ({**state, "L": 5}, "L: expected 6, found 5"),
        ({**state, "importance": [[2, [1.0]]]}, "weights: expected shape (6,), found [1]"),
        ({**state, "config": {**state["config"], "mix": 2}}, "mix: expected a number in [0, 1]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            after.load_state_dict(bad)
        assert after.state_dict() == before.state_dict()


def test_uncovered_lists_layers_that_no_client_can_train():
    assert HLA("bottleneck", 6).uncovered([3, 4]) == (2, 3)
    assert HLA("bottleneck", 6).uncovered([3, 6]) == ()
    assert HLA("triangle", 4).uncovered([]) == (0, 1, 2, 3)
    assert HLA("triangle", 4, kind="rgd").uncovered([1]) == ()
    assert HLA("triangle", 4, kind="rgd").uncovered([0]) == (0, 1, 2, 3)
    given = {"weights": [0.0, 1.0, 1.0, 1.0]}
    assert HLA("triangle", 4, kind="rgd", **given).uncovered([1]) == (0,)
    assert HLA("triangle", 4, kind="fim", **given).uncovered([1]) == ()
    assert HLA("triangle", 4, kind="fim", mix=0.0, **given).uncovered([1]) == (0,)


def test_repr_shows_the_weights():
    text = repr(HLA("triangle", 3, kind="rgd"))
    assert text == "HLA(rgd, triangle, 3 layers of weights 0.500, 0.333, 0.167)"
    assert "given weights" in repr(HLA("triangle", 1, weights=[2.0]))


def test_config_and_arguments_give_the_same_allocation():
    config = FedHelloConfig("triangle", "fim", seed=1, prior_rounds=3, every=2, weights=(1, 2, 3))
    hla = HLA("triangle", 3, kind="fim", seed=1, prior_rounds=3, every=2, weights=[1, 2, 3])
    assert HLA.of(config, 3).state_dict() == hla.state_dict()
    assert FedHelloConfig() == FedHelloConfig(Pattern.BOTTLENECK)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HLA("cone", 6), ValueError, "pattern: expected one of ('uniform', 'triangle', "),
        (lambda: HLA("uniform", 0), ValueError, "L: expected an integer from 1, found 0"),
        (lambda: HLA("uniform", True), TypeError, "L: expected an integer from 1, found True"),
        (
            lambda: HLA("uniform", 6, kind="random"),
            ValueError,
            "kind: expected one of ('gd', 'rgd', 'fim'), found 'random'",
        ),
        (
            lambda: HLA("uniform", 2, weights=[1.0]),
            ValueError,
            "weights: expected shape (2,), found [1]",
        ),
        (
            lambda: HLA("uniform", 2, weights=[1.0, float("nan")]),
            ValueError,
            "weights: expected finite numbers >= 0, at least one > 0, found [1.0, nan]",
        ),
        (lambda: HLA("uniform", 2, weights=[0, 0]), ValueError, "weights: expected finite numbers"),
        (
            lambda: HLA("uniform", 6, prior_rounds=0),
            ValueError,
            "prior_rounds: expected an integer from 1, found 0",
        ),
        (
            lambda: HLA("uniform", 6, every=0),
            ValueError,
            "every: expected an integer from 1, found 0",
        ),
        (
            lambda: HLA("uniform", 6, mix=1.5),
            ValueError,
            "mix: expected a number in [0, 1], found 1.5",
        ),
        (lambda: HLA("uniform", 6, k=0), ValueError, "k: expected an integer from 1, found 0"),
        (
            lambda: HLA("uniform", 6, k=4),
            ValueError,
            "levels: expected at least k = 4 positive numbers, found (1, 2, 3)",
        ),
        (
            lambda: HLA("uniform", 6).plan(1, 4, 7),
            ValueError,
            "capability of client 4: expected an integer from 0 to 6, found 7",
        ),
        (
            lambda: HLA("uniform", 6).plan(1, 4, True),
            TypeError,
            "capability of client 4: expected an integer from 0 to 6, found True",
        ),
        (
            lambda: HLA("uniform", 6).plan(-1, 4, 2),
            ValueError,
            "round: expected an integer from 0, found -1",
        ),
        (
            lambda: HLA("uniform", 6).update(1, [1.0]),
            ValueError,
            "scores: expected shape (6,), found [1]",
        ),
        (
            lambda: HLA("uniform", 1).update(1, [float("inf")]),
            ValueError,
            "scores: expected finite numbers, found [inf]",
        ),
        (lambda: FedHelloConfig(hold=1), ValueError, "hold: expected True or False, found 1"),
        (lambda: FedHelloConfig(seed=-1), ValueError, "seed: expected an integer from 0"),
        (lambda: FedHelloConfig(score="loss"), ValueError, "score: expected one of ('log_prob', "),
        (lambda: FedHelloConfig(chunk=0), ValueError, "chunk: expected an integer from 1, fo"),
    ],
)
def test_errors_name_the_field(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_numpy_numbers_are_accepted_and_the_state_is_json():
    one = HLA(
        "uniform",
        np.int64(6),
        kind="fim",
        seed=np.int64(3),
        prior_rounds=np.int64(2),
        mix=np.float32(0.5),
        levels=np.array([1, 2, 3]),
    )
    one.update(np.int64(50), np.array(SCORES))
    other = HLA("uniform", 6, kind="fim", seed=3, prior_rounds=2, mix=0.5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.config == one.config
    assert other.plan(50, 1, 3) == one.plan(50, 1, 3)
