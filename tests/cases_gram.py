"""Factors of adapters of many shapes, and the table row of the Gram ops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from backends import Backend
from cases import _values
from contract import Check, Op, Outputs, Wrong, wrong_calls
from torch import Tensor

from lora_ext import ops, reference

Shape = tuple[int, int, int]  # (O, I, r) of an adapter

SMALL: list[Shape] = [
    (1, 1, 1), (1, 9, 2), (9, 1, 2), (5, 7, 3), (24, 16, 0), (0, 6, 4), (6, 0, 4), (40, 32, 8),
    (70, 257, 16), (33, 48, 24), (20, 72, 64), (18, 24, 65),
]  # fmt: skip
LARGE: list[Shape] = [
    (576, 1536, 16), (192, 576, 16), (1100, 300, 32), (150, 330, 100), (70, 40, 256),
    (36, 20, 300),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # kernels support all

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def adapters(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    backend: Backend | None = None,
    *,
    exact: bool = False,
    device: str = "cpu",
) -> Lists:
    """Return lists of random a, b and projected b, with one entry per shape."""
    lists: Lists = ([], [], [])
    for out, wide, rank in shapes:
        g = torch.Generator().manual_seed(out + 7 * wide + 31 * rank)
        for kept, size in zip(lists, ((rank, wide), (out, rank), (out, rank)), strict=True):
            kept.append(_values(g, exact, size, dtype).to(backend.device if backend else device))
    return lists


def shapes_of(backend: Backend) -> list[Shape]:
    return SMALL if backend.small else SMALL + LARGE


def grams(a: list[Tensor], b: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    first, second = ops.lora_gram(a, b, dtype)
    return [*first, *second]


def wide_grams(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    first, second = reference.lora_gram([t.cpu() for t in a], [t.cpu() for t in b], torch.float64)
    return [*first, *second]


@dataclass(frozen=True)
class List:
    name: str
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        return self.name


def inputs(
    of: List, dtype: torch.dtype, *, seed: int = 0, exact: bool = False, device: str = "cpu",
    asked: torch.dtype | None = None,
) -> dict[str, Any]:  # fmt: skip
    a, b, projected = adapters(of.shapes, dtype, exact=exact, device=device)
    scaling = 0.5 * 2.0 ** (torch.arange(len(a)) + seed).remainder(3).double()
    return {"a": a, "b": b, "projected": projected, "scaling": scaling.to(device), "dtype": asked}


def _named(grams: list[Tensor], stats: Tensor) -> Outputs:
    return {**{f"gram {n}": g for n, g in enumerate(grams)}, "stats": stats}


def run(i: dict[str, Any]) -> Outputs:
    stats = ops.lora_pair_stats(i["a"], i["b"], i["projected"], i["scaling"])
    return _named(grams(i["a"], i["b"], i["dtype"]), stats)


def formula(i: dict[str, Any]) -> Outputs:
    lists = ([t.cpu() for t in i[k]] for k in ("a", "b", "projected"))
    stats = reference.lora_pair_stats(*lists, i["scaling"].tolist())
    return _named(wide_grams(i["a"], i["b"]), stats)


def checks() -> Iterator[Check]:
    for dtype in DTYPES:
        a, b, projected = adapters([(5, 7, 3), (9, 4, 2)], dtype)
        yield "lora_gram", (a, b)
        yield "lora_gram", (a, b, torch.float64)
        yield "lora_pair_stats", (a, b, projected)


def wrong(device: str) -> list[Wrong]:
    (a,), (b,), (p,) = adapters([(5, 7, 3)], torch.float32, device=device)
    of_grams = [
        ("b: expected as many tensors as a, 1, found 0", [a], []),
        (r"b\[1\]: expected shape \(O, r\) with r = 3, found \[5, 2\]", [a, a], [b, b[:, 1:]]),
        (r"a\[0\]: expected shape \(r, I\), found", [a[0]], [b]),
        (r"a\[0\]: expected float32, .*, found Int", [a.int()], [b]),
        (r"b\[0\]: expected a tensor on .*", [a], [b.to("meta")]),
        ("dtype: expected None, float32 or float64, found BFloat16", [a], [b], torch.bfloat16),
    ]
    of_stats = [
        ("projected_b: expected as many tensors as a, 1, found 0", [a], [b], []),
        (r"projected_b\[0\]: expected shape \(O, r\) = \[5, 3\], found \[4, 3\]", a, b, p[1:]),
        (r"scaling: expected shape \(L,\) = \[1\], found \[2\]", [a], [b], [p], [1.0, 2.0]),
    ]
    return [
        *wrong_calls("lora_gram", ops.lora_gram, of_grams),
        *wrong_calls("lora_pair_stats", ops.lora_pair_stats, of_stats),
    ]


OPS = [
    Op(
        "gram",
        inputs,
        run,
        formula,
        small=[List("small", tuple(SMALL))],
        medium=[List("large", tuple(LARGE))],
        variants=(
            tuple({"asked": dtype} for dtype in (None, torch.float32, torch.float64)),
            ({"asked": None}, {"asked": torch.float64}),
        ),
        dtypes=lambda backend: DTYPES,
        replays=[List("two", ((40, 32, 8), (20, 72, 65)))],
        checks=checks,
        wrong=wrong,
    )
]
