"""Growth of an adapter's features with the width n, as exponents: ``gamma[v] = g`` if v is of order
``n^g``."""

from __future__ import annotations

import math

from lora_ext._checks import integer, require
from lora_ext.layers import known_scheme

_ZERO = -math.inf  # gamma of the value 0
#: gamma of Z_A = A x and gamma of B before the first step.
_INITIAL_EXPONENTS = {
    **dict.fromkeys(("init_a", "init_a_normal"), (0.0, _ZERO)),
    "gaussian": (0.5, _ZERO),  # The variance of A does not depend on n.
    **dict.fromkeys(("init_b", "init_b_normal", "init_b_unit"), (_ZERO, 0.0)),
    "init_ab": (0.0, 0.0),
}
_TOLERANCE = 1e-9  # for comparisons with 0: (-1/3 + 1) - 2/3 is 1e-16


def gamma_exponents(
    scheme: bool | str, eta_A_exp: float, eta_B_exp: float, steps: int = 2
) -> dict[str, float | bool]:
    """Return how an adapter's features and updates grow with the width n after some steps of Adam.

    ``gamma[v]`` is the exponent g if v is of order ``n^g``. For the input x, ``Z_A = A x`` and
    ``Z_B = B A x``. The entries of Adam's update directions are of order one. For the direction g_A
    of A, ``gamma[g_A x] = 1``: its signs are the signs of x, so that n terms add up. Therefore:

        gamma[Z_A^t] = max(gamma[Z_A^(t-1)], gamma[eta_A] + 1)
        gamma[B_t]   = max(gamma[B_(t-1)],   gamma[eta_B])
        gamma[Z_B^t] = gamma[B_t] + gamma[Z_A^t]
        gamma[d1]    = gamma[B_(t-1)] + gamma[eta_A] + 1        d1 = B_(t-1) (A_t - A_(t-1)) x
        gamma[d2]    = gamma[eta_B] + gamma[Z_A^(t-1)]          d2 = (B_t - B_(t-1)) A_(t-1) x

    Args:
        scheme: Scheme of :func:`lora_ext.nn.init_lora_` that draws the factors independently.
        eta_A_exp: gamma of the learning rate of A, for example -0.5 if the rate is proportional to
            ``n ** -0.5``, or minus infinity if A is not trained.
        eta_B_exp: gamma of the learning rate of B.
        steps: t, number of steps, at least 1. The result is the same for all t >= 2.

    Returns:
        Dictionary. ``Z_A``, ``B``, ``Z_B``, ``d1`` and ``d2`` are exponents, minus infinity for a
        value of zero. ``stable`` is True if Z_B is of order one or below, ``internally_stable`` if
        Z_A is of order one or below, and ``efficient`` if ``stable`` is True and both d1 and d2 are
        of order one.

    Raises:
        ValueError: If the scheme is unknown, or its exponents are not known ("orthogonal", and the
            schemes that split the base weight); if an exponent is NaN or plus infinity; or if
            ``steps`` is below 1.

    Source: Hayou et al. 2024, sections 3 and 4.
    """
    name = known_scheme(scheme, "gamma_exponents: scheme")
    expected = f"True, False or one of {', '.join(map(repr, _INITIAL_EXPONENTS))}"
    require(name in _INITIAL_EXPONENTS, "gamma_exponents", "scheme", expected, repr(scheme))
    for argument, value in (("eta_A_exp", eta_A_exp), ("eta_B_exp", eta_B_exp)):
        fits = not math.isnan(value) and value != math.inf
        require(fits, "gamma_exponents", argument, "a number or minus infinity", value)
    integer("gamma_exponents", "steps", steps, 1)
    z_a, b = _INITIAL_EXPONENTS[name]
    d1 = d2 = _ZERO
    for _ in range(steps):
        d1, d2 = b + eta_A_exp + 1, eta_B_exp + z_a
        z_a, b = max(z_a, eta_A_exp + 1), max(b, eta_B_exp)
    stable = b + z_a <= _TOLERANCE
    return {
        "Z_A": z_a,
        "B": b,
        "Z_B": b + z_a,
        "d1": d1,
        "d2": d2,
        "stable": stable,
        "internally_stable": z_a <= _TOLERANCE,
        "efficient": stable and abs(d1) <= _TOLERANCE and abs(d2) <= _TOLERANCE,
    }
