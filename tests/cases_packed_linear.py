"""Weights to be packed, and the row of products with them: for tensors on the CPU alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from cases import _values
from contract import Check, Op, Outputs, Wrong
from torch import Tensor

from lora_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16]
# Rows, I, O: whole and part panels, chunks of 128 steps and beyond, an odd I, nothing at all.
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
    """One rounding to float32 for each of I terms at most, two where pairs are multiplied, then
    one of the result."""
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
    x, w = torch.zeros(3, 4), torch.zeros(40, 4)
    return [
        (
            r"pack_weight: weight: expected shape \(O, I\), found \[4\]",
            lambda: ops.pack_weight(w[0]),
        ),
        (
            "pack_weight: weight: expected float32 or bfloat16, found Double",
            lambda: ops.pack_weight(w.double()),
        ),
        (
            r"packed_linear: x: expected shape \(T, I\), found \[4\]",
            lambda: ops.packed_linear(x[0], ops.pack_weight(w)),
        ),
        (
            "packed_linear: x: expected float32 or bfloat16, found Half",
            lambda: ops.packed_linear(x.half(), ops.pack_weight(w)),
        ),
        (
            "packed_linear: packed: expected the dtype of x, BFloat16, found Float",
            lambda: ops.packed_linear(x.bfloat16(), ops.pack_weight(w)),
        ),
        (
            r"packed: expected pack_weight of a weight \(40, 3\), shape \[2, 3, 32\], found \[2, 4",
            lambda: ops.packed_linear(x[:, :3], ops.pack_weight(w), None, 40),
        ),
        (
            r"pack_weight of a weight \(40, 4\), shape \[2, 2, 32, 2\], found \[2, 2, 64",
            lambda: ops.packed_linear(x.bfloat16(), ops.pack_weight(w[:, :3].bfloat16()), None, 40),
        ),
        (
            r"pack_weight of a weight \(40, 3\), shape \[2, 2, 64\], found \[2, 2, 32",
            lambda: ops.packed_linear(x[:, :3].bfloat16(), ops.pack_weight(w.bfloat16()), None, 40),
        ),
        (
            r"packed: expected pack_weight of a weight \(65, 4\)",
            lambda: ops.packed_linear(x, ops.pack_weight(w), None, 65),
        ),
        (
            "packed_linear: packed: expected contiguous numbers",
            lambda: ops.packed_linear(
                x, ops.pack_weight(w).transpose(0, 1).contiguous().transpose(0, 1), None, 40
            ),
        ),
        (
            r"packed_linear: bias: expected shape \(O,\) = \[40\], found \[64\]",
            lambda: ops.packed_linear(x, ops.pack_weight(w), torch.zeros(64), 40),
        ),
        (
            "packed_linear: out_features: expected at least 0, found -1",
            lambda: ops.packed_linear(x, ops.pack_weight(w), None, -1),
        ),
    ]  # fmt: skip


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
