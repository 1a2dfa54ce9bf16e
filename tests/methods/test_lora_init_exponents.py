"""Exponents of the growth of features with the width, as formulas and as simulated slopes."""

import math

import numpy as np
import pytest
import torch

from lora_ext.layers.model._probe import decompose_step
from lora_ext.methods.lora_init import gamma_exponents, init_lora_

INF = math.inf
# scheme, exponents of both learning rates; exponents of Z_A, Z_B, d1, d2
TABLE = [
    ("init_a", -0.5, -0.5, (0.5, 0, 0, 0)),
    ("init_a", -1, -1, (0, -1, -1, -1)),
    ("init_b", -1, -1, (0, 0, 0, -1)),
    ("init_b", -0.5, -0.5, (0.5, 0.5, 0.5, 0)),
    ("init_a", -1, 0, (0, 0, 0, 0)),
    ("init_b", -1, 0, (0, 0, 0, 0)),
]
COLUMNS = ("Z_A", "Z_B", "d1", "d2")


@pytest.mark.parametrize(("scheme", "eta_a", "eta_b", "expected"), TABLE, ids=str)
def test_exponents_equal_the_table(scheme, eta_a, eta_b, expected):
    found = gamma_exponents(scheme, eta_a, eta_b)
    assert tuple(found[name] for name in COLUMNS) == expected
    z_a, z_b, d1, d2 = expected
    assert found["stable"] is (z_b <= 0)
    assert found["internally_stable"] is (z_a <= 0)
    assert found["efficient"] is (z_b <= 0 and d1 == d2 == 0)
    assert list(found) == [
        *("Z_A", "B", "Z_B", "d1", "d2"),
        *("stable", "internally_stable", "efficient"),
    ]
    assert gamma_exponents(scheme, eta_a, eta_b, steps=7) == found
    assert gamma_exponents(f"{scheme}_normal", eta_a, eta_b) == found


def test_first_step_changes_only_the_factor_that_is_zero():
    found = gamma_exponents(True, -0.5, -0.5, steps=1)
    assert (found["d1"], found["d2"], found["B"]) == (-INF, -0.5, -0.5)
    found = gamma_exponents("init_b", -0.5, -0.5, steps=1)
    assert (found["d1"], found["d2"], found["Z_B"]) == (0.5, -INF, 0.5)


def test_untrained_factor_has_no_exponent():
    frozen_a = gamma_exponents("init_a", -INF, 0)
    assert (frozen_a["Z_A"], frozen_a["d1"], frozen_a["d2"]) == (0, -INF, 0)
    assert frozen_a["stable"] and not frozen_a["efficient"]
    assert gamma_exponents("init_b", -1, -INF)["d2"] == -INF


def test_other_init_schemes_have_known_exponents():
    # A x is of order n^(1/2) before the first step.
    gaussian = gamma_exponents("gaussian", -1, -0.5)
    assert gaussian["Z_A"] == 0.5 and gaussian["stable"] and not gaussian["internally_stable"]
    assert gamma_exponents(False, -1, 0)["efficient"]
    # (-1/3 + 1) - 2/3 is rounded to 1e-16.
    assert gamma_exponents("init_a", -1 / 3, -2 / 3)["stable"]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"scheme": "init_c"}, "gamma_exponents: scheme: expected .*found 'init_c'"),
        ({"scheme": "orthogonal"}, "gamma_exponents: scheme: expected .*found 'orthogonal'"),
        ({"scheme": "pissa"}, "gamma_exponents: scheme: .*found 'pissa'"),
        ({"eta_A_exp": math.nan}, "gamma_exponents: eta_A_exp: .*found nan"),
        ({"eta_B_exp": INF}, "gamma_exponents: eta_B_exp: .*found inf"),
        ({"steps": 0}, "gamma_exponents: steps: expected an integer from 1, found 0"),
        ({"steps": 2.0}, "gamma_exponents: steps: .*found 2.0"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(changed, text):
    arguments = {"scheme": True, "eta_A_exp": -0.5, "eta_B_exp": -0.5, **changed}
    with pytest.raises(ValueError, match=text):
        gamma_exponents(**arguments)


# -------------------------------------------------------------------------------------------------
# Slopes of a simulation with sign steps, for one constant input and output gradient.

WIDTHS = [256, 512, 1024, 2048, 4096, 8192]
RANK, STEPS, SEEDS = 4, 5, 5


def sizes(scheme, n, eta_a, eta_b, seed):
    """Return the RMS of Z_A, Z_B, d1 and d2 in the last step, at width n."""
    generator = torch.Generator().manual_seed(seed)
    x, dz = torch.randn(2, n, generator=generator)
    a, b = torch.empty(RANK, n), torch.empty(n, RANK)
    init_lora_(a, b, f"{scheme}_normal", generator=generator)
    for _ in range(STEPS):
        before = a.clone(), b.clone()
        # The gradients, before either update, are (B^T dz) x^T for A and dz (A x)^T for B.
        step_a = torch.outer((b.T @ dz).sign(), x.sign())
        step_b = torch.outer(dz.sign(), (a @ x).sign())
        a, b = a - eta_a * step_a, b - eta_b * step_b
    parts = decompose_step(x[None], before, (a, b))
    found = (a @ x, b @ (a @ x), parts.d1, parts.d2)
    return [f.square().mean().sqrt().item() for f in found]


@pytest.mark.parametrize(("scheme", "eta_a", "eta_b", "theory"), TABLE, ids=str)
def test_features_grow_with_the_width_by_the_exponents(scheme, eta_a, eta_b, theory):
    mean = [
        np.mean(
            [sizes(scheme, n, n**eta_a, 0.1 if eta_b == 0 else n**eta_b, s) for s in range(SEEDS)],
            axis=0,
        )
        for n in WIDTHS
    ]
    slopes, _ = np.polyfit(np.log(WIDTHS), np.log(mean), 1)
    for name, slope, expected in zip(COLUMNS, slopes, theory, strict=True):
        if (scheme, eta_a) == ("init_b", -0.5) and name in ("Z_B", "d1"):
            # The steps change B by O(n^-1/2), which adds a constant to a term of order n^(1/2). At
            # these widths, this flattens both slopes, which tend to 1/2 for larger n.
            assert 0.3 <= slope <= 0.6
        else:
            assert slope == pytest.approx(expected, abs=0.05), name
