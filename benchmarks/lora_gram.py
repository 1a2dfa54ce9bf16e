"""Cases of `--matrix gram`: Gram matrices of all adapters, and pair statistics, in one call each.

The adapters are those of SmolLM2-135M at rank 16 on its seven linear layers; no weight of the model
is read. The peers are torch's products, one adapter after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from lora_ops import timer
from row import Row, timing_columns
from torch import Tensor

from lora_ext import ops, reference

BLOCKS, RANK = 30, 16
# (O, I) of q, k, v, o, gate, up, down.
LAYERS = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
Factors = tuple[list[Tensor], list[Tensor], list[Tensor]]


def loop(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Compute both Gram matrices of each adapter, with one torch product each."""
    return [*(t @ t.T for t in a), *(t.T @ t for t in b)]


def loop_of_stats(a: list[Tensor], b: list[Tensor], p: list[Tensor]) -> Tensor:
    """Compute the four sums of every adapter with torch, in float64."""
    rows = []
    for a_s, b_s, p_s in zip(a, b, p, strict=True):
        wide_a, wide_b, wide_p = a_s.double(), b_s.double(), p_s.double()
        gram, moved = wide_a @ wide_a.T, wide_p - wide_b
        pairs = ((wide_b, wide_b), (wide_p, wide_p), (wide_p, wide_b), (moved, moved))
        rows.append(torch.stack([((x.T @ y) * gram).sum() for x, y in pairs]))
    return torch.stack(rows)


def bench_gram(device: str, rounds: int) -> Iterator[Row]:
    """Check both ops and their peers in float32 and bfloat16, and yield the rows of their times."""
    for dtype in (torch.float32, torch.bfloat16):
        a, b, p = factors(device, dtype)
        calls: dict[str, dict[str, Callable[[], object]]] = {
            "gram": {
                "lora_ext": lambda a=a, b=b: ops.lora_gram(a, b),
                # torch rounds sums of 16-bit factors to 16 bits, so factors are cast to float32.
                "loop": lambda a=a, b=b: loop([t.float() for t in a], [t.float() for t in b]),
            },
            "pair stats": {
                "lora_ext": lambda a=a, b=b, p=p: ops.lora_pair_stats(a, b, p),
                "loop": lambda a=a, b=b, p=p: loop_of_stats(a, b, p),
            },
        }
        for case, providers in calls.items():
            errors = {n: error_of(call(), case, a, b, p) for n, call in providers.items()}
            times = timer(device)(providers, rounds)
            factor_bytes = sum(t.nbytes for t in [*a, *b, *(p if case == "pair stats" else [])])
            for name, one in times.items():
                yield Row(
                    "gram",
                    case=f"SmolLM2's shape, {7 * BLOCKS} adapters: {case}",
                    provider=name,
                    dtype=str(dtype).removeprefix("torch."),
                    adapters=len(a),
                    rank=RANK,
                    **timing_columns(one),
                    mbytes=factor_bytes / 1e6,
                    gbytes_per_s=factor_bytes / one.median / 1e9,
                    worst_error=errors[name],
                )


def factors(device: str, dtype: torch.dtype) -> Factors:
    """Return random factors a and b of every adapter, and random values in place of the projected
    b."""
    make = torch.Generator(device).manual_seed(0)
    lists: Factors = ([], [], [])
    for out, wide in LAYERS * BLOCKS:
        for kept, size in zip(lists, ((RANK, wide), (out, RANK), (out, RANK)), strict=True):
            kept.append(torch.randn(*size, generator=make, device=device).to(dtype))
    return lists


def error_of(found: object, case: str, a: list[Tensor], b: list[Tensor], p: list[Tensor]) -> float:
    """Return the largest error, divided by its bound.

    The bound is n float32 roundings in sequence, or 1e-12 of the squares for pair statistics.
    """
    if case == "pair stats":
        assert isinstance(found, Tensor)
        formula = reference.lora_pair_stats(a, b, p, [1.0] * len(a))
        bound = 1e-12 * formula[:, :2].sum(1, keepdim=True)
        worst = ((found - formula).abs() / bound).max().item()
    else:
        assert isinstance(found, list | tuple)
        lists = [found] if isinstance(found, list) else found
        mine = [t for kept in lists for t in kept]
        exact = [t for kept in reference.lora_gram(a, b, torch.float64) for t in kept]
        sizes = [[t.abs() for t in kept] for kept in (a, b)]
        size = [t for kept in reference.lora_gram(*sizes, torch.float64) for t in kept]
        lengths = [*(t.shape[1] for t in a), *(t.shape[0] for t in b)]
        worst = max(
            ((m.double() - e).abs() / (n * 2.0**-24 * s)).max().item()
            for m, e, s, n in zip(mine, exact, size, lengths, strict=True)
        )
    if not worst <= 1:
        raise SystemExit(f"bench_lora: {case}: result is off by {worst:.3g} times its bound")
    return worst
