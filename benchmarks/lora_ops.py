"""Cases of `--matrix decode prefill ops`: single LoRA ops at shapes of 8B models, and peers.

The adapters of a case are in several banks, which are used in turn and are together far larger than
any cache. In serving, too, a step runs all layers before it reads the same factors again. x and y,
which the previous layer has just written, stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from common import Call, Timing, copy_call, interleaved
from row import Row, timing_columns
from torch import Tensor

from lora_ext import ops, reference

COLD_BYTES = 256 << 20
CHECKED_ROWS = 48


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Shape:
    """Sizes of a case: T tokens, of which each of S adapters has an equal, contiguous part; x ``(T,
    I)``, y ``(T, O)``."""

    case: str
    tokens: int
    adapters: int
    in_features: int
    out_features: int
    rank: int


DECODE = (
    Shape("D1", 1, 1, 4096, 4096, 16),
    Shape("D2", 16, 16, 4096, 4096, 16),
    Shape("D3", 32, 8, 4096, 6144, 16),
    Shape("D4", 64, 64, 4096, 28672, 16),
    Shape("D5", 64, 64, 4096, 4096, 64),
    Shape("D6", 256, 64, 14336, 4096, 32),
    Shape("D7", 256, 1, 4096, 4096, 16),
    Shape("D8", 256, 32, 4096, 4096, 8),
)
PREFILL = (
    Shape("P1", 2048, 4, 4096, 4096, 16),
    Shape("P2", 8192, 8, 4096, 6144, 16),
)
MIXED = Shape("mixed ranks", 64, 64, 4096, 4096, 64)


@dataclass
class Problem:
    """Tensors of a case. The banks contain different adapters, with the same ids and ranks."""

    shape: Shape
    x: Tensor
    y: Tensor
    ids: Tensor
    plan: Tensor
    banks: list[tuple[Tensor, Tensor]]
    ranks: Tensor | None = None
    page_table: Tensor | None = None  # if given, banks are pools of pages as in AdapterPool

    @classmethod
    def make(
        cls,
        shape: Shape,
        device: str,
        dtype: torch.dtype,
        ranks: list[int] | None = None,
        paged: bool = False,
    ):
        """Draw random tensors for which the entries of y are about 1. Pages are in random order, as
        after loads and evictions."""
        make = torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=make, device=device, dtype=torch.float32)
            return values.mul_(std).to(dtype)

        s = shape
        bank_bytes = s.adapters * s.rank * (s.in_features + s.out_features) * dtype.itemsize
        count = min(64, max(2, ceil_div(COLD_BYTES, bank_bytes)))
        page_table = None
        a_size = (s.adapters, s.rank, s.in_features)
        b_size = (s.adapters, s.out_features, s.rank)
        if paged:
            ranks = ranks or [s.rank] * s.adapters
            needed = torch.tensor([[8 * p < r for p in range(ceil_div(s.rank, 8))] for r in ranks])
            pages = int(needed.sum())
            page_table = torch.full(needed.shape, -1, dtype=torch.int32)
            order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
            page_table[needed] = order.int()
            page_table = page_table.to(device)
            a_size, b_size = (pages, 8, s.in_features), (pages, s.out_features, 8)
        banks = [
            (normal(*a_size, std=s.in_features**-0.5), normal(*b_size, std=s.rank**-0.5))
            for _ in range(count)
        ]
        ids = torch.arange(s.tokens, device=device) * s.adapters // s.tokens
        table = None if ranks is None else torch.tensor(ranks, dtype=torch.int32, device=device)
        x, y = normal(s.tokens, s.in_features), normal(s.tokens, s.out_features)
        return cls(s, x, y, ids, ops.lora_plan(ids, s.adapters), banks, table, page_table)

    def nbytes(self) -> int:
        """Return the compulsory traffic of one call."""
        s = self.shape
        ranks = s.adapters * s.rank if self.ranks is None else int(self.ranks.sum())
        values = ranks * (s.in_features + s.out_features)
        values += s.tokens * (s.in_features + 2 * s.out_features)
        return values * self.x.dtype.itemsize


# A provider makes one call per bank; each call adds to y.
def run_lora_ext(p: Problem) -> None:
    for a, b in p.banks:
        ops.lora_apply_(p.y, p.x, a, b, p.ids, ranks=p.ranks, page_table=p.page_table, plan=p.plan)


def run_loop(p: Problem) -> None:
    """Run one adapter after another, as PEFT and most training code do; rows are contiguous."""
    s = p.shape
    rows = s.tokens // s.adapters
    for a, b in p.banks:
        for i in range(s.adapters):
            part = slice(i * rows, (i + 1) * rows)
            p.y[part] += (p.x[part] @ a[i].T) @ b[i].T


def run_gather_bmm(p: Problem) -> None:
    """Gather each row's adapter, then run two batched products."""
    for a, b in p.banks:
        v = torch.bmm(a[p.ids], p.x.unsqueeze(2))  # (T, R, 1)
        p.y += torch.bmm(b[p.ids], v).squeeze(2)


PROVIDERS: dict[str, Callable[[Problem], None]] = {
    "lora_ext": run_lora_ext,
    "loop": run_loop,
    "gather_bmm": run_gather_bmm,
}


def providers_of(p: Problem) -> dict[str, Callable[[Problem], None]]:
    """Return the functions to compare by name, without "gather_bmm" if its copies would exceed 1
    GiB."""
    s = p.shape
    gathered = s.tokens * s.rank * (s.in_features + s.out_features) * p.x.dtype.itemsize
    return {n: f for n, f in PROVIDERS.items() if n != "gather_bmm" or gathered <= 1 << 30}


def check(p: Problem, provider: Callable[[Problem], None]) -> float:
    """Return the largest error of some rows of y, divided by its bound, for the first bank.

    The bound is entrywise in float64, for one rounding of y and float32 accumulation: ``1.02 u |y|
    + u |delta| + c 2^-24 (|y0| + |b| |a| |x|)`` with ``c = 16 + sqrt(I) / 2``. The second term
    allows a peer to round its delta. 16-bit peers also round v, which adds ``u |b| |v|``.
    """
    s, (a, b) = p.shape, p.banks[0]
    rows = torch.linspace(0, s.tokens - 1, min(s.tokens, CHECKED_ROWS)).long().to(p.x.device)
    start = p.y.clone()
    provider(replace(p, banks=p.banks[:1]))
    found = p.y[rows].double()
    p.y.copy_(start)
    x, y0, ids = p.x[rows].double(), start[rows].double(), p.ids[rows]
    a64, b64 = a.double(), b.double()
    adapters = {"ranks": p.ranks, "page_table": p.page_table}
    v = reference.lora_shrink(x, a64, ids, **adapters)
    delta = reference.lora_update(v, b64, ids, **adapters)
    v_size = reference.lora_shrink(x.abs(), a64.abs(), ids, **adapters)
    size = reference.lora_update(v_size, b64.abs(), ids, **adapters)
    unit = torch.finfo(p.x.dtype).eps / 2
    bound = 1.02 * unit * (y0 + delta).abs() + unit * delta.abs()
    bound += (16 + s.in_features**0.5 / 2) * 2.0**-24 * (y0.abs() + size)
    if p.x.dtype != torch.float32:
        bound += unit * reference.lora_update(v.abs(), b64.abs(), ids, **adapters)
    worst = ((found - (y0 + delta)).abs() / bound).max().item()
    if not worst <= 1:
        raise SystemExit(f"bench_lora: {s.case}: result is off by {worst:.3g} times its bound")
    return worst


def timer(device: str) -> Callable[..., dict[str, Timing]]:
    """Return the timing function of a device."""
    if device == "cpu":
        return interleaved
    from cuda_timing import interleaved_graphs

    return interleaved_graphs


def bench_shapes(
    matrix: str, shapes: tuple[Shape, ...], device: str, dtype: torch.dtype, rounds: int
) -> Iterator[Row]:
    """Yield the rows of every function at every shape, and of a copy, timed in the same rounds."""
    copy, copied = copy_call(device=device)
    for shape in shapes:
        p = Problem.make(shape, device, dtype)
        providers = providers_of(p)
        errors = {name: check(p, provider) for name, provider in providers.items()}
        calls: dict[str, Call] = {"copy": copy}
        for name, provider in providers.items():
            calls[name] = partial(provider, p)
        times = timer(device)(calls, rounds)
        nbytes = p.nbytes()
        for name in providers:
            one = Timing.of([t / len(p.banks) for t in times[name].rounds])
            yield Row(
                matrix,
                provider=name,
                **shape_columns(shape, dtype),
                **timing_columns(one),
                mbytes=nbytes / 1e6,
                gbytes_per_s=nbytes / one.median / 1e9,
                of_copy=times["copy"].over(one) * nbytes / copied,
                worst_error=errors[name],
            )


def bench_mixed_ranks(device: str, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Yield the rows of a call with ranks 8, 16, 32 and 64, and of a call with all ranks 64.

    The rows show whether the mean rank or the largest rank determines the time. In a pool, an
    adapter has only the pages that its rank needs. In a bank ``b (A, O, 64)``, rows are 64 wide for
    every adapter, and an adapter of rank 8 uses only a part of each cache line.
    """
    mixed = [8, 16, 32, 64] * (MIXED.adapters // 4)
    problems = {
        (case, rank): Problem.make(replace(MIXED, case=case), device, dtype, ranks, paged)
        for case, paged in ((MIXED.case, True), ("mixed ranks, bank", False))
        for rank, ranks in (("all 64", None), ("8, 16, 32, 64", mixed))
    }
    errors = {key: check(p, run_lora_ext) for key, p in problems.items()}
    calls = {"; ".join(key): partial(run_lora_ext, p) for key, p in problems.items()}
    times = timer(device)(calls, rounds)
    for (case, rank), p in problems.items():
        one = Timing.of([t / len(p.banks) for t in times[f"{case}; {rank}"].rounds])
        full = Timing.of([t / len(p.banks) for t in times[f"{case}; all 64"].rounds])
        columns = shape_columns(p.shape, dtype) | {"rank": rank}
        yield Row("ops", provider="lora_ext", **columns, **timing_columns(one),
                  over_full=one.over(full), worst_error=errors[case, rank])  # fmt: skip


def bench_call(rounds: int) -> Iterator[Row]:
    """Yield a row with the time of one op on tiny inputs, called as in serving."""
    shape = Shape("tiny call", 1, 1, 8, 8, 8)
    p = Problem.make(shape, "cpu", torch.float32)
    a, b = p.banks[0]
    error = check(p, run_lora_ext)
    call = partial(ops.lora_apply_, p.y, p.x, a, b, p.ids, plan=p.plan)
    with torch.inference_mode():
        times = interleaved({"lora_ext": call}, rounds, min_seconds=0.05, warm_up=100)
    columns = shape_columns(shape, torch.float32)
    yield Row("ops", provider="lora_ext", **columns, **timing_columns(times["lora_ext"]),
              worst_error=error)  # fmt: skip


def bench_allocation() -> Iterator[Row]:
    """Yield rows with the bytes that one call allocates, from torch's profiler."""
    shape = DECODE[1]
    p = Problem.make(shape, "cpu", torch.float32)
    a, b = p.banks[0]
    calls = {
        "lora_apply_ allocates": lambda: ops.lora_apply_(p.y, p.x, a, b, p.ids, plan=p.plan),
        "lora_apply allocates beyond its result": lambda: ops.lora_apply(
            p.x, a, b, p.ids, plan=p.plan
        ),
    }
    for case, call in calls.items():
        result = 0 if "lora_apply_" in case else p.y.nbytes
        with torch.inference_mode():
            call()
            with torch.profiler.profile(profile_memory=True) as profile:
                call()
        sizes = [
            event.nbytes()
            for event in profile.profiler.kineto_results.events()
            if event.name() == "[memory]" and event.nbytes() > 0
        ]
        columns = shape_columns(shape, torch.float32) | {"case": case}
        yield Row("ops", provider="lora_ext", **columns, unit="bytes", median=sum(sizes) - result)


def shape_columns(shape: Shape, dtype: torch.dtype) -> dict:
    """Return the columns of a row that depend on the shape."""
    return {
        "case": shape.case,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": shape.tokens,
        "adapters": shape.adapters,
        "in_features": shape.in_features,
        "out_features": shape.out_features,
        "rank": shape.rank,
    }
