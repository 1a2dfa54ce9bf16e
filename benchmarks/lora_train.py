"""Cases of `--matrix train`: forward and backward of LoRA in training, without the base GEMMs.

T1 to T3 are a layer of an 8B model on 8192 tokens. The peer is the usual training code for several
adapters: it computes one adapter after another, with two GEMMs for the forward, four for the
backward, and a new mask of torch's dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from common import copy_call
from lora_ops import Shape, shape_columns, timer
from row import Row, timing_columns
from torch import Tensor

from lora_ext import ops, reference

TRAIN = (
    Shape("T1", 8192, 4, 4096, 4096, 16),
    Shape("T1b", 8192, 4, 4096, 4096, 64),
    Shape("T2", 8192, 8, 4096, 14336, 64),
    Shape("T3", 8192, 1, 4096, 14336, 16),
)
TRAIN_CPU = (Shape("T1, 512 rows", 512, 4, 4096, 4096, 16),)
DROPOUT = 0.1
_c = torch.ops.lora_ext


@dataclass
class Problem:
    """Tensors of a shape; the rows of each adapter are contiguous."""

    shape: Shape
    x: Tensor
    dy: Tensor
    a: Tensor
    b: Tensor
    ids: Tensor
    plan: Tensor
    seed: Tensor
    v: Tensor | None = None

    @classmethod
    def make(cls, s: Shape, device: str, dtype: torch.dtype) -> Problem:
        """Draw random tensors with entries of about 1, for which products have entries of about 1
        too."""
        g = torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=g, device=device, dtype=torch.float32)
            return values.mul_(std).to(dtype)

        ids = torch.arange(s.tokens, device=device) * s.adapters // s.tokens
        p = cls(
            s,
            normal(s.tokens, s.in_features),
            normal(s.tokens, s.out_features),
            normal(s.adapters, s.rank, s.in_features, std=s.in_features**-0.5),
            normal(s.adapters, s.out_features, s.rank, std=s.out_features**-0.5),
            ids,
            ops.lora_plan(ids, s.adapters),
            torch.tensor([7], device=device),
        )
        p.v = forward(p)[1]
        return p

    def nbytes(self) -> dict[str, int]:
        """Return the bytes that forward and backward must read or write at least."""
        s, size = self.shape, self.x.dtype.itemsize
        weights = s.adapters * s.rank * (s.in_features + s.out_features)
        # Here y and dx start as zeros instead of base products.
        return {
            "forward": size * (s.tokens * (s.in_features + 2 * s.out_features) + weights),
            "backward": size * (s.tokens * (3 * s.in_features + 2 * s.out_features) + 2 * weights),
        }


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Return y and v."""
    return _c.lora_linear_forward(
        p.x, None, None, p.a, p.b, p.ids, None, None, DROPOUT, p.seed, p.plan
    )


def backward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, db, _ = _c.lora_linear_backward(
        p.dy, p.x, p.v, None, p.a, p.b, p.ids, None, None, p.plan, DROPOUT, p.seed, True, True, True
    )
    return dx, da, db


def loop_forward(p: Problem) -> list[Tensor]:
    rows = p.shape.tokens // p.shape.adapters
    return [
        torch.dropout(p.x[i * rows : (i + 1) * rows], DROPOUT, True) @ a.T @ b.T
        for i, (a, b) in enumerate(zip(p.a, p.b, strict=True))
    ]


def loop_backward(p: Problem) -> list[tuple[Tensor, ...]]:
    """Run the backward of ``loop_forward`` as autograd does, with the saved input after dropout.

    In the last product, x takes the place of the mask, which has the same number of bytes; the
    result is not used.
    """
    rows = p.shape.tokens // p.shape.adapters
    gradients = []
    for i, (a, b) in enumerate(zip(p.a, p.b, strict=True)):
        part = slice(i * rows, (i + 1) * rows)
        x, dy = p.x[part], p.dy[part]
        v, dv = x @ a.T, dy @ b
        gradients.append(((dv @ a) * x, dv.T @ x, dy.T @ v))
    return gradients


def check(p: Problem) -> float:
    """Return the largest error of an entry of y or a gradient, divided by its bound.

    The bound is one rounding, ``1.02 u |y|``, plus a multiple of the same formula of absolute
    values: ``c 2^-24`` for float32 sums, with ``c = 16 + (sqrt(T) + sqrt(I) + sqrt(O)) / 2``, and
    for 16-bit types ``2^-16``, since v and dv enter products with 16 bits.
    """

    def formula(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        tail = (p.ids, None, None, DROPOUT, p.seed)
        y = reference.lora_linear(x, None, None, a, b, *tail)
        return y, *reference.lora_linear_backward(dy, x, None, a, b, *tail)

    inputs = [t.double() for t in (p.dy, p.x, p.a, p.b)]
    exact, sizes = formula(*inputs), formula(*(t.abs() for t in inputs))
    s, dtype = p.shape, p.x.dtype
    roots = (s.tokens**0.5 + s.in_features**0.5 + s.out_features**0.5) / 2
    share = (16 + roots) * 2.0**-24 + (0 if dtype == torch.float32 else 2.0**-16)
    unit = 1.02 * torch.finfo(dtype).eps / 2
    errors = []
    for found, wanted, size in zip((forward(p)[0], *backward(p)), exact, sizes, strict=True):
        bound = (unit * wanted.abs() + share * size).clamp(min=1e-300)
        errors.append(((found.double() - wanted).abs() / bound).max())
    worst = torch.stack(errors).max().item()  # NaN stays NaN
    if not worst <= 1:
        raise SystemExit(f"bench_lora: {s.case}: result is off by {worst:.3g} times its bound")
    return worst


def bench_train(
    shapes: tuple[Shape, ...], device: str, dtype: torch.dtype, rounds: int
) -> Iterator[Row]:
    """Yield the rows of forward and backward at every shape, for lora_ext, the loop and a copy."""
    copy, copied = copy_call(device=device)
    for shape in shapes:
        p = Problem.make(shape, device, dtype)
        error = check(p)
        directions: dict[str, dict[str, Callable[[Problem], object]]] = {
            "forward": {"lora_ext": forward, "loop": loop_forward},
            "backward": {"lora_ext": backward, "loop": loop_backward},
        }
        for direction, providers in directions.items():
            calls = {name: partial(f, p) for name, f in providers.items()}
            times = timer(device)({"copy": copy, **calls}, rounds)
            nbytes = p.nbytes()[direction]
            for name in providers:
                yield Row(
                    "train",
                    provider=name,
                    **shape_columns(shape, dtype) | {"case": f"{shape.case} {direction}"},
                    **timing_columns(times[name]),
                    mbytes=nbytes / 1e6,
                    gbytes_per_s=nbytes / times[name].median / 1e9,
                    of_copy=times["copy"].over(times[name]) * nbytes / copied,
                    worst_error=error if name == "lora_ext" else "",
                )
