"""Inputs and table row of row attention, with masks of the keys that each row attends to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from contract import Check, Op, Outputs, Wrong, wide
from torch import Tensor

from lora_ext import ops, reference


@dataclass(frozen=True)
class Case:
    """Sizes of one call. ``sees`` names the pattern of keys that a row attends to."""

    batch: int
    heads: int
    groups: int
    rows: int
    keys: int
    width: int
    value_width: int
    sees: str = "all"

    def __str__(self) -> str:
        heads = f"H{self.heads}-G{self.groups}-D{self.width}-E{self.value_width}"
        return f"B{self.batch}-{heads}-T{self.rows}-L{self.keys}-{self.sees}"


SMALL = [
    Case(0, 2, 1, 3, 4, 8, 8),
    Case(1, 1, 1, 0, 4, 8, 8),
    Case(2, 2, 2, 3, 0, 8, 8),
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(1, 3, 1, 1, 21, 64, 64),
    Case(2, 4, 2, 5, 5, 12, 20, "causal"),
    Case(2, 9, 3, 7, 19, 16, 16, "causal"),  # The first keys come from a cache.
    Case(1, 2, 1, 9, 4, 8, 8, "causal"),  # The first rows precede the first key and see none.
    Case(3, 2, 2, 6, 17, 10, 33, "padded"),
    Case(2, 6, 2, 11, 40, 8, 32, "holes"),
    Case(2, 5, 1, 8, 35, 3, 5, "window"),
    Case(1, 2, 1, 3, 9, 136, 136, "causal"),  # More features than a block holds at a time.
]
MEDIUM = [
    Case(1, 9, 3, 70, 70, 64, 64, "causal"),
    Case(2, 2, 1, 33, 200, 80, 128, "holes"),
    Case(1, 7, 7, 19, 300, 33, 48, "window"),
    Case(1, 2, 1, 40, 70, 264, 200, "holes"),
]


def seen_of(case: Case, g: torch.Generator) -> dict[str, Any]:
    """Return ``causal``, ``spans`` and ``mask``; some rows see no key."""
    how: dict[str, Any] = {"causal": case.sees in ("causal", "padded", "holes")}
    if case.sees == "padded":  # Each sequence has a different length of left padding.
        pads = torch.arange(case.batch)[:, None, None] * 3
        mask = torch.arange(case.keys) >= pads
        how["mask"] = mask.expand(case.batch, case.rows, case.keys)
    if case.sees == "holes":
        mask = torch.rand(case.batch, case.rows, case.keys, generator=g) < 0.6
        mask[0, 0] = False
        how["mask"] = mask
    if case.sees == "window":
        last = torch.randint(-2, case.keys + 9, (case.batch, case.rows), generator=g)
        how["spans"] = torch.stack([last - case.keys // 3, last], -1)
    return how


def inputs(
    case: Case, dtype: torch.dtype, *, seed: int = 0, exact: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Return the arguments of a case. If ``exact``, scores are multiples of 1024. The keys with the
    largest score then share all the weight, and the result of a row is a mean of a few small
    integers."""
    g = torch.Generator().manual_seed(seed)

    def numbers(*size: int) -> Tensor:
        if exact:
            return torch.randint(-2, 3, size, generator=g).to(dtype)
        return torch.randn(size, generator=g).to(dtype)

    # The layout is that of a model: heads are the second-to-last dimension in memory, and each row
    # of q and k is half of a wider row, as if both shared one tensor.
    q, k = (
        numbers(case.batch, n, heads, 2 * case.width)[..., : case.width].transpose(1, 2)
        for n, heads in ((case.rows, case.heads), (case.keys, case.groups))
    )
    v = numbers(case.batch, case.keys, case.groups, case.value_width).transpose(1, 2)
    how = {"scale": 1024.0 if exact else None, **seen_of(case, g)}
    found = {"q": q, "k": k, "v": v, **how}
    return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in found.items()}


def bounds(i: dict[str, Any], exact: Outputs) -> Outputs:
    """Return the largest |error| allowed. The relative error of a weight has three parts: the
    absolute error of its score, a sum of D products; the error of the exponential (its last place,
    and half a place of its argument); and the errors of two sums over L. The result is rounded
    once."""
    w = wide(i)
    eps = torch.finfo(torch.float64 if i["q"].dtype == torch.float64 else torch.float32).eps
    heads, width = w["q"].shape[1], w["q"].shape[3]
    keys = w["k"].abs().repeat_interleave(heads // max(w["k"].shape[1], 1), 1)
    sizes = w["q"].abs() @ keys.transpose(2, 3) * (w["scale"] or width**-0.5)
    largest = sizes.amax(-1, keepdim=True) if sizes.numel() else sizes.sum(-1, keepdim=True)
    relative = ((2 * width + 6) * largest + 2 * w["k"].shape[2] + 8) * eps
    signless = reference.row_attention(**{**w, "v": w["v"].abs()})
    bound = relative * signless
    y = bound + torch.finfo(i["q"].dtype).eps / 2 * (exact["y"].abs() + bound)
    return {"y": y + torch.finfo(i["q"].dtype).smallest_normal}


def checks() -> Iterator[Check]:
    for case in (SMALL[5], SMALL[9], SMALL[10]):
        i = inputs(case, torch.float32)
        leaves = [i[n].clone().requires_grad_() for n in "qkv"]
        yield "row_attention", (*leaves, 0.3, i["causal"], i.get("spans"), i.get("mask"))


def wrong(device: str) -> list[Wrong]:
    q, k, v = (torch.zeros(2, n, 3, 4, device=device) for n in (4, 2, 2))
    mask = torch.ones(2, 3, 3, dtype=torch.bool, device=device)
    spans = torch.zeros(2, 3, 2, dtype=torch.int64, device=device)
    op = ops.row_attention
    return [
        (r"row_attention: q: expected shape \(B, H, T, D\), found \[4\]",
         lambda: op(q[0, 0, 0], k, v)),
        (r"row_attention: q: expected float32", lambda: op(q.int(), k, v)),
        (r"row_attention: k: expected the dtype of q", lambda: op(q, k.half(), v)),
        (r"row_attention: k: expected shape \(B, G, L, D\) = \[2, 2, 3, 4\]",
         lambda: op(q, k[:1], v)),
        (r"row_attention: k: expected a number of heads that divides that of q, 4, found 3",
         lambda: op(q, k[:, :1].expand(2, 3, 3, 4), v)),
        (r"row_attention: v: expected shape \(B, G, L, E\) = \[2, 2, 3, 4\]",
         lambda: op(q, k, v[:, :, :2])),
        (r"row_attention: v: expected shape \(B, G, L, E\)", lambda: op(q, k, v[0])),
        (r"row_attention: scale: expected a finite number", lambda: op(q, k, v, float("nan"))),
        (r"row_attention: mask: expected Bool", lambda: op(q, k, v, mask=mask.int())),
        (r"row_attention: mask: expected shape \(B or 1, T, L\) = \[2, 3, 3\]",
         lambda: op(q, k, v, mask=mask[:, :2])),
        (r"row_attention: spans: expected Long", lambda: op(q, k, v, spans=spans.int())),
        (r"row_attention: spans: expected shape \(B or 1, T, 2\) = \[2, 3, 2\]",
         lambda: op(q, k, v, spans=spans[:, :, :1])),
    ]  # fmt: skip


OPS = [
    Op(
        "row_attention",
        inputs,
        run=lambda i: {"y": ops.row_attention(**i)},
        formula=lambda i: {"y": reference.row_attention(**wide(i))},
        bounds=bounds,
        small=SMALL,
        medium=MEDIUM,
        checks=checks,
        wrong=wrong,
    )
]
