"""Pointwise functions and their table row. The op runs on the CPU only."""

from collections.abc import Iterator
from typing import Any

import torch
from contract import Check, Op, Outputs, Wrong, wrong_calls

from lora_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16]
FUNCTIONS = [
    "cos", "sin", "gelu", "gelu_tanh", "rsqrt", "sigmoid", "silu", "softplus", "tanh",
]  # fmt: skip
SHAPES = [(0,), (1,), (3, 7), (2, 16), (33,), (5, 172), (1000,)]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0, exact: bool = False,
    device: str = "cpu", spread: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    return {"x": (torch.randn(shape, generator=g, dtype=torch.float64) * spread).to(dtype)}


def run(i: dict[str, Any]) -> Outputs:
    x = i["x"]
    return {f: ops.pointwise(x.abs() if f == "rsqrt" else x, f) for f in FUNCTIONS}


def formula(i: dict[str, Any]) -> Outputs:
    x = i["x"]
    return {f: reference.pointwise(x.abs() if f == "rsqrt" else x, f) for f in FUNCTIONS}


def bounds(i: dict[str, Any], exact: Outputs) -> Outputs:
    """Return the largest |error| allowed for each function.

    A result has eight roundings to float32. The absolute error of the exponent, which is a relative
    error of the exponential, adds a few more. One rounding to the dtype follows. The exponent of
    GELU is ``x^2 / 2``, the exponent of its approximation is up to ``0.1 |x|^3 + 1.6 |x|``, and the
    exponent of the other functions is ``x``. torch's formulas add small numbers to 1 or -1, which
    loses their digits, and their exponentials can overflow. Results below 4e-37 are therefore not
    compared.
    """
    x = i["x"].double().abs()
    grown = {"gelu": x.square(), "gelu_tanh": 0.1 * x**3 + 1.6 * x, "cos": 0 * x, "sin": 0 * x}
    found: Outputs = {}
    for f, y in exact.items():
        bound = 2.0**-24 * (8 + 2 * grown.get(f, x)) * y.abs() + 4e-37
        if f in ("cos", "sin"):
            bound = bound + 2.0**-40
        if f in ("gelu", "gelu_tanh"):  # In float64, 1 + erf and 1 + tanh lose digits.
            bound = bound + 2.0**-50 * x
        if f in ("rsqrt",):
            bound = 2.0**-23 * y.abs()
        found[f] = bound + torch.finfo(i["x"].dtype).eps / 2 * (y.abs() + bound)
    return found


def checks() -> Iterator[Check]:
    for dtype in DTYPES:
        x = inputs((5, 33), dtype)["x"]
        for each in (x, x.t(), x.t()[:, ::2], x[:1].expand(4, 33)):  # The last two are not dense.
            yield "pointwise", (each, "silu")


def wrong(device: str) -> list[Wrong]:
    x = torch.zeros(3)
    named = "function: expected the name of a function, such as 'silu', found 'relu'"
    rows = [
        ("x: expected float32 or bfloat16, found Double", x.double(), "silu"),
        (named, x, "relu"),
    ]
    return wrong_calls("pointwise", ops.pointwise, rows)


OPS = [
    Op(
        "pointwise",
        inputs,
        run,
        formula,
        bounds,
        small=SHAPES,
        variants=(({"spread": 1.0}, {"spread": 5.0}), ({"spread": 0.01}, {"spread": 40.0})),
        dtypes=lambda backend: DTYPES,
        on_gpu=False,
        exact=False,
        checks=checks,
        wrong=wrong,
    )
]
