"""Cases of `--matrix large_rank`: rank 1024 as in vision-language models, and plain GEMMs.

"one" is a single adapter on all rows; its peer is torch's products of the same sizes, two in the
forward and four in the backward. "mixed" gives every second row an adapter of rank 1024 and all
other rows an adapter of rank 16. Its peer gathers an adapter's rows, multiplies them and adds them
back, one adapter after another. `over_base` is the time divided by that of the peer in the same
rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lora_ops import timer
from row import Row, timing_columns
from torch import Tensor

from lora_ext import ops, reference

TOKENS, RANK, SMALL_RANK = 1024, 1024, 16
WIDTHS = (576, 2048, 4096)
_c = torch.ops.lora_ext


@dataclass
class Problem:
    """Square layer of one width with one or two adapters."""

    x: Tensor
    y: Tensor
    dy: Tensor
    a: Tensor
    b: Tensor
    ids: Tensor
    plan: Tensor
    ranks: list[int]
    device_ranks: Tensor
    v: Tensor

    @classmethod
    def make(cls, width: int, ranks: list[int], device: str, dtype: torch.dtype) -> Problem:
        """Draw random tensors for which the entries of the results are about 1."""
        g = torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=g, device=device, dtype=torch.float32)
            return values.mul_(std).to(dtype)

        ids = torch.arange(TOKENS, device=device) % len(ranks)
        p = cls(
            normal(TOKENS, width),
            normal(TOKENS, width),
            normal(TOKENS, width),
            normal(len(ranks), RANK, width, std=width**-0.5),
            normal(len(ranks), width, RANK, std=RANK**-0.5),
            ids,
            ops.lora_plan(ids, len(ranks)),
            ranks,
            torch.tensor(ranks, dtype=torch.int32, device=device),
            torch.empty(0),
        )
        p.v = step_forward(p)[1]
        return p

    def rows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the rows and the factors of every adapter; the factors have their true rank."""
        return [
            ((self.ids == s).nonzero()[:, 0], self.a[s, :r], self.b[s, :, :r])
            for s, r in enumerate(self.ranks)
        ]


def apply(p: Problem) -> None:
    """Add the update of each row's adapter to y, with the op that serving uses."""
    ops.lora_apply_(p.y, p.x, p.a, p.b, p.ids, ranks=p.device_ranks, plan=p.plan)


def step_forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Return the output y and the intermediate result v of the op that training uses."""
    return _c.lora_linear_forward(
        p.x, None, None, p.a, p.b, p.ids, None, p.device_ranks, 0.0, None, p.plan
    )


def step_backward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    tail = p.ids, None, p.device_ranks, p.plan, 0.0, None, True, True, True
    return _c.lora_linear_backward(p.dy, p.x, p.v, None, p.a, p.b, *tail)


def gemm_forward(p: Problem) -> None:
    """Run the forward of one adapter as two matrix products of torch."""
    p.y.addmm_(p.x @ p.a[0].T, p.b[0].T)


def gemm_backward(p: Problem) -> list[Tensor]:
    """Run the backward of one adapter as four matrix products of torch."""
    dv = p.dy @ p.b[0]
    return [dv @ p.a[0], dv.T @ p.x, p.dy.T @ p.v]


def gather_forward(p: Problem) -> None:
    """Gather, multiply and add back the rows of one adapter after another."""
    for rows, a, b in p.rows():
        p.y.index_add_(0, rows, p.x.index_select(0, rows) @ a.T @ b.T)


def gather_backward(p: Problem) -> list[Tensor]:
    """Run the backward of ``gather_forward``."""
    dx = torch.zeros_like(p.x)
    results = [dx]
    for rows, a, b in p.rows():
        x, dy = (t.index_select(0, rows) for t in (p.x, p.dy))
        v = p.v.index_select(0, rows)[:, : len(a)]
        dv = dy @ b
        dx.index_add_(0, rows, dv @ a)
        results += [dv.T @ x, dy.T @ v]
    return results


def check(p: Problem) -> float:
    """Return the largest error of y and the gradients, divided by the bounds of lora_train.py."""

    def formula(dy: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        tail = p.ids, None, p.device_ranks, 0.0, None
        y = reference.lora_linear(x, None, None, a, b, *tail)
        return y, *reference.lora_linear_backward(dy, x, None, a, b, *tail)

    inputs = [t.double() for t in (p.dy, p.x, p.a, p.b)]
    exact, sizes = formula(*inputs), formula(*(t.abs() for t in inputs))
    dtype, width = p.x.dtype, p.x.shape[1]
    share = (16 + (TOKENS**0.5 + 2 * width**0.5) / 2) * 2.0**-24
    share += 0 if dtype == torch.float32 else 2.0**-16
    unit = 1.02 * torch.finfo(dtype).eps / 2
    start = p.y.clone()
    p.y.zero_()
    apply(p)
    found = [p.y.clone(), step_forward(p)[0], *step_backward(p)]
    p.y.copy_(start)
    worst = max(
        ((f.double() - e).abs() / (unit * e.abs() + share * s).clamp(min=1e-300)).max().item()
        for f, e, s in zip(found, (exact[0], *exact), (sizes[0], *sizes), strict=True)
    )
    if not worst <= 1:
        raise SystemExit(f"bench_lora: rank {RANK}: result is off by {worst:.3g} times its bound")
    return worst


def bench_large_rank(
    device: str, dtype: torch.dtype, rounds: int, widths: tuple[int, ...] = WIDTHS
) -> Iterator[Row]:
    """Yield the rows of both cases at every width: three calls each, and their peers."""
    for width in widths:
        for case, ranks in (("one", [RANK]), ("mixed", [RANK, SMALL_RANK])):
            p = Problem.make(width, ranks, device, dtype)
            error = check(p)
            forward, backward = (
                (gemm_forward, gemm_backward)
                if case == "one"
                else (gather_forward, gather_backward)
            )
            calls: dict[str, tuple[Callable[[Problem], object], Callable[[Problem], object]]] = {
                "apply": (apply, forward),
                "training forward": (step_forward, forward),
                "training backward": (step_backward, backward),
            }
            for name, (ours, peer) in calls.items():
                times = timer(device)(
                    {"lora_ext": lambda f=ours, p=p: f(p), "gemm": lambda f=peer, p=p: f(p)}, rounds
                )
                for provider, one in times.items():
                    yield Row(
                        "large_rank",
                        case=f"{case}, width {width}: {name}",
                        provider=provider,
                        dtype=str(dtype).removeprefix("torch."),
                        tokens=TOKENS,
                        adapters=len(ranks),
                        in_features=width,
                        out_features=width,
                        rank=", ".join(map(str, ranks)),
                        **timing_columns(one, "ms"),
                        over_base=one.over(times["gemm"]),
                        worst_error=error if provider == "lora_ext" else "",
                    )
