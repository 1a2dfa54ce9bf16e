"""`rank_distribution` and `layer_bytes`: known results, properties and errors."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from federated_rounds import INPUTS, OUTPUTS, make_state
from hypothesis import given
from hypothesis import strategies as st

from lora_ext.methods.legend import LegendConfig, layer_bytes, rank_distribution, resize_lora


def test_total_of_270_ranks_in_twelve_layers_rises_from_17_to_28():
    ranks = rank_distribution(12, 270)
    assert ranks == tuple(range(17, 29))
    assert (sum(ranks[-9:]), sum(ranks[-6:])) == (216, 153)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"L": 1, "total": 7}, (7,)),
        ({"L": 4, "total": 16, "step": 0}, (4, 4, 4, 4)),
        (
            {"L": 4, "total": 18, "shape": "uniform"},
            (4, 4, 5, 5),
        ),  # The remainder is added to the layers nearest to the output.
        ({"L": 4, "total": 17, "step": 2}, (1, 3, 5, 8)),
        ({"L": 4, "total": 16, "step": 2, "shape": "reverse"}, (7, 5, 3, 1)),
        ({"L": 3, "total": 14, "shape": "geometric", "ratio": 4}, (2, 4, 8)),
        # -1, 1, 3, 5 is raised to 1, 1, 3, 5; the last layer is lowered by the 2 that this adds.
        ({"L": 4, "total": 8, "step": 2}, (1, 1, 3, 3)),
        ({"L": 4, "total": 7, "step": 2}, (1, 1, 2, 3)),
        # 1, 3, 5, 7 is cut to 1, 3, 5, 5; the last layer with room gets the 2 that this removes.
        ({"L": 4, "total": 16, "step": 2, "r_max": 5}, (1, 5, 5, 5)),
        ({"L": 3, "total": 0, "step": 0, "r_min": 0}, (0, 0, 0)),
        ({"L": 12, "total": 270, "multiple": 8}, (16,) * 3 + (24,) * 8 + (32,)),
        # Each layer gets the least multiple, so the sum exceeds the total by 7.
        ({"L": 2, "total": 9, "multiple": 8}, (8, 8)),
    ],
)
def test_ranks_equal_known_distributions(settings: dict, expected: tuple[int, ...]):
    assert rank_distribution(**settings) == expected


@given(st.data(), st.sampled_from(["arithmetic", "uniform", "reverse", "geometric"]))
def test_ranks_have_the_sum_order_and_bounds(data: st.DataObject, shape: str):
    L = data.draw(st.integers(1, 14))
    low = data.draw(st.integers(0, 5))
    high = data.draw(st.integers(low, 40))
    total = data.draw(st.integers(L * low, L * high))
    step = data.draw(st.floats(0, 5))
    ranks = rank_distribution(L, total, step=step, r_min=low, r_max=high, shape=shape)  # pyright: ignore
    assert sum(ranks) == total
    assert all(type(rank) is int and low <= rank <= high for rank in ranks)
    assert list(ranks) == sorted(ranks, reverse=shape == "reverse")
    if shape == "uniform":
        assert ranks == rank_distribution(L, total, step=0, r_min=low, r_max=high)
        assert max(ranks) - min(ranks) <= 1


@given(st.integers(1, 12), st.floats(0, 3), st.data())
def test_multiples_of_eight_change_the_sum_by_at_most_four_per_layer(L, step, data):
    total = data.draw(st.integers(8 * L, 40 * L))
    ranks = rank_distribution(L, total, step=step, multiple=8)
    assert all(rank % 8 == 0 and rank >= 8 for rank in ranks)
    assert list(ranks) == sorted(ranks)
    assert abs(sum(ranks) - total) <= 4 * L


def test_sum_of_rounded_ranks_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        rank_distribution(12, 270, multiple=8)
    assert "multiples of 8 sum to 272" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"L": 0}, "L: expected an integer from 1, found 0"),
        ({"total": 11}, "total: expected at least 12, r_min in each layer, found 11"),
        ({"total": 35, "r_min": 3}, "total: expected at least 36"),
        ({"total": 49, "r_max": 4}, "total: expected at most 48, r_max per layer, found 49"),
        ({"step": -1}, "step: expected at least 0 with shape 'arithmetic', found -1"),
        ({"step": float("nan")}, "step: expected a finite number"),
        ({"r_min": 4, "r_max": 3}, "r_max: expected at least r_min = 4, found 3"),
        ({"multiple": 8, "r_max": 7}, "r_max: expected at least 8 for multiple=8, found 7"),
        ({"multiple": 8, "total": 40}, "total: expected at least 96"),
        ({"shape": "flat"}, "shape: expected one of .*, found 'flat'"),
        ({"shape": "geometric", "ratio": 0.5}, "ratio: expected a number from 1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=f"rank_distribution: {message}"):
        rank_distribution(**{"L": 12, "total": 48, **settings})


@pytest.mark.parametrize("name", ["L", "total", "r_max"])
@pytest.mark.parametrize("value", [True, 2.0])
def test_non_integers_are_refused(name: str, value: object):
    with pytest.raises(TypeError, match=f"rank_distribution: {name}: expected an integer"):
        rank_distribution(**{"L": 3, "total": 9, name: value})


def test_layer_bytes_are_those_of_its_modules_at_its_rank():
    state = make_state(layers=3)  # float64, two modules per layer
    each = 8 * 2 * (INPUTS + OUTPUTS)
    assert layer_bytes(state, (1, 2, 3)) == (each, 2 * each, 3 * each)


def test_error_for_a_rank_above_a_module_names_the_module():
    state = make_state(layers=2)
    with pytest.raises(ValueError, match=r"ranks\[1\]: layers.1.q: expected at most 4, found 5"):
        layer_bytes(state, (4, 5))
    with pytest.raises(ValueError, match="ranks: expected one rank for each of 2 layers, found 3"):
        layer_bytes(state, (1, 1, 1))
    with pytest.raises(ValueError, match=r"ranks\[0\]: expected an integer from 1, found 0"):
        layer_bytes(state, (0, 1))


def test_config_distributes_its_total():
    assert LegendConfig(total=21).ranks(6) == (1, 2, 3, 4, 5, 6)
    with pytest.raises(
        ValueError, match="LegendConfig: total: expected a sum of ranks, found None"
    ):
        LegendConfig().ranks(6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total": 0}, "total: expected an integer from 1, found 0"),
        ({"k_min": True}, "k_min: expected an integer from 1, found True"),
        ({"mode": "slow"}, "mode: expected one of .*, found 'slow'"),
        ({"warmup": "none"}, "warmup: expected one of"),
        ({"shape": 3}, "shape: expected one of"),
        ({"rho": 1}, r"rho: expected a number in \[0, 1\), found 1"),
        ({"rho": -0.1}, "rho: expected"),
        ({"forgetting": 0}, "forgetting: expected"),
        ({"eps": -1}, "eps: expected a number from 0"),
        ({"step": -1}, "step: expected a number from 0 with shape 'arithmetic'"),
        ({"r_min": 3, "r_max": 2}, "r_max: expected >= r_min = 3, found 2"),
        ({"k_min": 3, "k_max": 2}, "k_max: expected >= k_min = 3, found 2"),
        ({"byte_budget": 0}, "byte_budget: expected a number above 0"),
        ({"deadline": float("inf")}, "deadline: expected a number above 0"),
        ({"send_frozen": 1}, "send_frozen: expected True or False, found 1"),
    ],
)
def test_errors_name_invalid_config_fields(settings: dict, message: str):
    with pytest.raises(ValueError, match=f"LegendConfig: {message}"):
        LegendConfig(**settings)


def test_numpy_numbers_are_accepted():
    found = rank_distribution(np.int64(12), np.int64(270), r_min=np.int32(1), r_max=np.int32(28))
    assert found == tuple(range(17, 29))
    assert {type(rank) for rank in found} == {int}
    a, _, _ = resize_lora(torch.ones(2, 3), torch.ones(4, 2), np.int64(1))
    assert a.shape == (1, 3)
