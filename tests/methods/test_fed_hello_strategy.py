"""`FedHello` on Flower, with clients in this process, sends the plans of its allocation."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; it is in the extra `fed`")

import torch
from federated_rounds import same_bits
from flower_apps import Classifier, batches, initial, run

from lora_ext.federated import LayerPlan, LocalGrid, LoraLayerManager, make_client_app
from lora_ext.federated.flower import from_arrays
from lora_ext.methods import fed_hello
from lora_ext.methods.fed_hello import HLA, EmptyProxySet, FedHelloConfig, fim_scores
from lora_ext.nn import block_index

CAPABILITY = {0: 1, 1: 2, 2: 3, 3: 0}
PROXY = batches(9)


def grid(**settings: Any) -> LocalGrid:
    return LocalGrid(make_client_app(Classifier, batches, **settings), 4)


def fim(**fields: Any) -> HLA:
    return HLA("bottleneck", 3, kind="fim", prior_rounds=2, every=2, **fields)


def strategy(allocator: HLA | FedHelloConfig, **settings: Any) -> Any:
    return fed_hello.FedHello(
        allocator, capability=CAPABILITY, **{"model_fn": Classifier, "proxy": PROXY, **settings}
    )


@pytest.mark.parametrize("trained", ["loop", "batched"])
def test_clients_receive_the_plans_of_the_allocation(trained):
    hla = HLA("triangle", 3, kind="rgd", seed=5)
    own = strategy(hla)
    run(own, grid(backend=trained), rounds=3)
    assert [log.round for log in own.history] == [1, 2, 3]
    for log in own.history:
        assert log.plans == {c: hla.plan(log.round, c, CAPABILITY[c]) for c in (0, 1, 2)}
        assert log.accepted == (0, 1, 2) and not log.rejected
        assert sum(log.heights) == 6


def test_layers_are_scored_with_the_global_adapter_before_planning():
    own = strategy(fim())
    first = from_arrays(run(own, grid(), rounds=1).arrays)
    expected = HLA.of(own.config, 3)
    model = Classifier()
    LoraLayerManager(model).load_slice(first)
    scores = fim_scores(model, PROXY, lambda name: block_index(name, r"layers\.(\d+)\."))
    expected.update(2, scores)
    run(own, grid(), rounds=1, state=first)
    assert own.history[1].plans == {c: expected.plan(2, c, CAPABILITY[c]) for c in (0, 1, 2)}
    assert torch.equal(own.allocator.weights(2), expected.weights(2))
    assert len(set(own.allocator.weights(2).tolist())) > 1
    assert own.allocator.state_dict()["importance"][0][0] == 2


def test_strategy_accepts_a_config_and_a_function_that_returns_the_proxy():
    calls = []

    def proxy():
        calls.append(1)
        return iter(PROXY)

    config = FedHelloConfig(kind="fim", prior_rounds=2, every=2)
    own, other = strategy(config, proxy=proxy), strategy(fim())
    ends = [from_arrays(run(each, grid(), rounds=4).arrays) for each in (own, other)]
    assert len(calls) == 2 and same_bits(*ends)
    assert own.allocator.L == 3


@pytest.mark.parametrize("given", [fim(), FedHelloConfig(kind="fim", prior_rounds=2, every=2)])
def test_restarted_server_continues_bitwise(given):
    whole = strategy(fim())
    end = from_arrays(run(whole, grid(), rounds=5).arrays)
    stopped = strategy(fim())
    middle = from_arrays(run(stopped, grid(), rounds=3).arrays)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = strategy(given)
    resumed.load_state_dict(state)
    assert same_bits(from_arrays(run(resumed, grid(), rounds=2, state=middle).arrays), end)
    plans = [{c: p.layers for c, p in log.plans.items()} for log in resumed.history]
    assert plans == [{c: p.layers for c, p in log.plans.items()} for log in whole.history]


def test_nonfinite_scores_keep_the_weights(caplog):
    x, y = PROXY[0]
    hla = fim()
    own = strategy(hla, proxy=[(x * float("inf"), y)])
    with caplog.at_level("WARNING", logger="flwr"):
        run(own, grid(), rounds=2)
    assert torch.equal(hla.weights(2), hla.weights(1))
    assert own.history[1].accepted == (0, 1, 2)
    warned = [r.getMessage() for r in caplog.records]
    assert any(m.startswith("round 2: scores [nan") and "weights kept" in m for m in warned)


def test_log_contains_the_weights_once(caplog):
    with caplog.at_level("INFO", logger="flwr"):
        run(strategy(HLA("triangle", 3, kind="rgd")), grid(), rounds=2)
    logged = [r.getMessage() for r in caplog.records if "weights" in r.getMessage()]
    assert logged == ["FedHello: HLA(rgd, triangle, 3 layers of weights 0.500, 0.333, 0.167)"]


def test_layers_that_no_client_can_train_warn_once():
    message = re.escape("layers [2] can never be trained: HLA(gd, triangle, 3 layers")
    with pytest.warns(UserWarning, match=message):
        own = fed_hello.FedHello(HLA("triangle", 3), capability={0: 1, 1: 2, 2: 0, 3: 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(own, grid())
        strategy(HLA("triangle", 3))  # no warning: client 2 trains all layers
    with pytest.warns(UserWarning, match=message):
        run(fed_hello.FedHello(HLA("triangle", 3), capability=lambda client: 2), grid())


def test_round_without_plans_is_skipped():
    hla = HLA("triangle", 3)
    own = fed_hello.FedHello(hla, capability=lambda client: 0)
    result = run(own, grid(), rounds=1)
    assert own.history[0].skipped and own.history[0].plans == {}
    assert same_bits(from_arrays(result.arrays), initial())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: strategy(LayerPlan((0,))), TypeError, "allocator: expected a FedHelloConfig or"),
        (
            lambda: strategy(fim(), proxy=[]),
            EmptyProxySet,
            "proxy: expected samples for kind 'fim', found none",
        ),
        (lambda: strategy(fim(), proxy=None), EmptyProxySet, "proxy: expected samples"),
        (
            lambda: run(strategy(fim(), proxy=lambda: []), grid()),
            EmptyProxySet,
            "batches: expected at least one sample, found none",
        ),
        (
            lambda: strategy(fim(), model_fn=None),
            ValueError,
            "model_fn: expected a function, for kind 'fim', found None",
        ),
        (
            lambda: run(strategy(HLA("triangle", 4, kind="rgd")), grid()),
            ValueError,
            "allocator: expected an HLA of 3 layers, found 4",
        ),
        (
            lambda: run(fed_hello.FedHello(HLA("uniform", 3), capability={0: 3}), grid()),
            ValueError,
            "capability: expected a number for client 1",
        ),
        (
            lambda: fed_hello.FedHello(HLA("uniform", 3), capability={0: True}),
            TypeError,
            "capabilities: expected an integer from 0 to 3, found True",
        ),
        (lambda: strategy(HLA("uniform", 3), fraction_train=0.0), ValueError, "fraction_train: ex"),
    ],
)
def test_errors_name_the_argument_before_anything_is_sent(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_unknown_attribute_raises():
    with pytest.raises(AttributeError, match="has no attribute 'FedGoodbye'"):
        fed_hello.FedGoodbye  # noqa: B018
