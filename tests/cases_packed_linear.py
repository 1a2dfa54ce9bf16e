"""Inputs and table row of linear layers with packed weights, which run on the CPU only."""

from collections.abc import Iterator
from typing import Any

import torch
from cases import _values
from contract import Check, Op, Outputs, Wrong, wrong_calls
from torch import Tensor

from lora_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16]
# Shapes are (rows, I, O), with full and partial panels of outputs, I up to and above the size of a
# chunk (128), odd I, and empty dimensions.
SHAPES = [
    (1, 1, 1), (2, 7, 31), (3, 64, 32), (5, 33, 40), (8, 128, 96), (9, 129, 65), (12, 300, 33),
    (16, 257, 70), (17, 520, 64), (31, 96, 100), (32, 255, 32), (33, 40, 50), (70, 140, 37),
    (0, 5, 6), (4, 0, 6), (4, 5, 0),
]  # fmt: skip


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide, out = shape
    g = torch.Generator().manual_seed(rows + 7 * wide + 31 * out)
    x, weight = _values(g, exact, (rows, wide), dtype), _values(g, exact, (out, wide), dtype)
    return x, weight, _values(g, exact, (out,), dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.packed_linear(x, ops.pack_weight(weight), bias, weight.shape[0])


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, *, seed: int = 0, exact: bool = False,
    device: str = "cpu", biased: bool = True,
) -> dict[str, Any]:  # fmt: skip
    x, weight, bias = make(shape, dtype, exact)
    return {"x": x + 0 * seed, "weight": weight, "bias": bias if biased else None}


def run(i: dict[str, Any]) -> Outputs:
    return {"packed": ops.pack_weight(i["weight"]), "y": product(i["x"], i["weight"], i["bias"])}


def formula(i: dict[str, Any]) -> Outputs:
    packed = reference.pack_weight(i["weight"])
    y = reference.packed_linear(i["x"], packed, i["bias"], i["weight"].shape[0])
    return {"packed": packed.double(), "y": y}


def bounds(i: dict[str, Any], exact: Outputs) -> Outputs:
    """Return the largest |error| allowed: one float32 rounding for each of at most I terms (two
    roundings if terms are multiplied in pairs), plus one rounding of the result."""
    last = torch.finfo(i["x"].dtype).eps / 2
    signless = {k: None if t is None else t.abs() for k, t in i.items()}
    bound = (2 * i["x"].shape[1] + 1) * 2.0**-24 * formula(signless)["y"]
    y = bound + last * (exact["y"].abs() + bound)
    return {"packed": torch.zeros_like(exact["packed"]), "y": y}


def checks() -> Iterator[Check]:
    for dtype in DTYPES:
        x, weight, bias = make((5, 33, 40), dtype, exact=False)
        yield "pack_weight", (weight,)
        yield "packed_linear", (x, ops.pack_weight(weight), bias, 40)


def wrong(device: str) -> list[Wrong]:
    x, w, pack = torch.zeros(3, 4), torch.zeros(40, 4), ops.pack_weight
    half, thin = x.bfloat16(), w[:, :3].bfloat16()
    pair, of = pack(w.bfloat16()), r"packed: expected pack_weight\(\) of a weight \(40,"
    apart = pack(w).transpose(0, 1).contiguous().transpose(0, 1)
    of_weights = [
        (r"weight: expected shape \(O, I\), found \[4\]", w[0]),
        ("weight: expected float32 or bfloat16, found Double", w.double()),
    ]
    of_products = [
        (r"x: expected shape \(T, I\), found \[4\]", x[0], pack(w)),
        ("x: expected float32 or bfloat16, found Half", x.half(), pack(w)),
        ("packed: expected the dtype of x, BFloat16, found Float", half, pack(w)),
        (rf"{of} 3\), shape \[2, 3, 32\], found \[2, 4", x[:, :3], pack(w), None, 40),
        (rf"{of} 4\), shape \[2, 2, 32, 2\], found \[2, 2, 64", half, pack(thin), None, 40),
        (rf"{of} 3\), shape \[2, 2, 64\], found \[2, 2, 32", half[:, :3], pair, None, 40),
        (r"packed: expected pack_weight\(\) of a weight \(65, 4\)", x, pack(w), None, 65),
        ("packed: expected a contiguous tensor", x, apart, None, 40),
        (r"bias: expected shape \(O,\) = \[40\], found \[64\]", x, pack(w), torch.zeros(64), 40),
        ("out_features: expected at least 0, found -1", x, pack(w), None, -1),
    ]
    return [
        *wrong_calls("pack_weight", pack, of_weights),
        *wrong_calls("packed_linear", ops.packed_linear, of_products),
    ]


OPS = [
    Op(
        "packed_linear",
        inputs,
        run,
        formula,
        bounds,
        small=SHAPES,
        variants=(({"biased": True},), ({"biased": False},)),
        dtypes=lambda backend: DTYPES,
        on_gpu=False,
        checks=checks,
        wrong=wrong,
    )
]
