"""Circuit benchmarks: `python benchmarks/bench_circuit.py`.

The scan of a window against what one writes in torch: log_softmax, gather, and a loop of logsumexp.
Rows are appended to OUT/circuit_<device>.csv. Every result is checked before it is timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import ROOT, Timing, append_rows, copy_call, interleaved, machine_columns
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.reference.circuit import num_transitions

Scan = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One circuit: kind, rows, positions, components, vocabulary."""

    kind: str
    rows: int = 64
    n_token: int = 8
    components: int = 32
    vocab: int = 320


@dataclass(frozen=True)
class Row:
    """One row of benchmarks/results/circuit_<device>.csv."""

    case: str
    kind: str
    rows: int
    n_token: int
    components: int
    vocab: int
    us: float
    p20: float
    p80: float
    eager_us: float
    over_eager: float  # time of the torch expression over this one, same rounds
    gbytes_per_s: float  # logits read (and gradients written) once
    of_copy: float  # the same over the machine's copy bandwidth, same rounds
    worst_error: float  # of log p against float64, over 2e-6 (1 + |log p|)


def inputs(s: Shape) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """leaf, prior, trans, x."""
    g = torch.Generator().manual_seed(0)
    m = num_transitions(s.kind, s.n_token)
    return (
        torch.randn(s.rows, s.n_token, s.components, s.vocab, generator=g),
        torch.randn(s.rows, s.components, generator=g),
        torch.randn(s.rows, m, s.components, s.components, generator=g) if m else None,
        torch.randint(0, s.vocab, (s.rows, s.n_token), generator=g),
    )


def eager_joint(leaf: Tensor, prior: Tensor, trans: Tensor | None, x: Tensor) -> Tensor:
    """``log p(x)`` of cp (no transitions) and hmm, as one writes it; -1 marginalises."""
    index = x.clamp(min=0)[..., None, None].expand(*leaf.shape[:3], 1)
    e = leaf.log_softmax(-1).gather(-1, index).squeeze(-1)  # (B, K, C)
    e = torch.where(x[..., None] < 0, 0, e)
    cur = prior.log_softmax(-1) + e[:, 0]
    if trans is None:
        return torch.logsumexp(cur + e[:, 1:].sum(1), -1)
    step = trans.log_softmax(-1)
    for k in range(1, e.shape[1]):
        cur = torch.logsumexp(cur[:, :, None] + step[:, k - 1], 1) + e[:, k]
    return torch.logsumexp(cur, -1)


def eager_prefixes(leaf: Tensor, prior: Tensor, trans: Tensor | None, x: Tensor) -> Tensor:
    """Every prefix as a marginal of its own: one pass per position."""
    position = torch.arange(x.shape[1])
    return torch.stack(
        [eager_joint(leaf, prior, trans, x.masked_fill(position > k, -1)) for k in position], 1
    )


def cases(s: Shape) -> Iterator[tuple[str, Callable[[], object], Callable[[], object], int]]:
    """Name, ours, torch's, and how often the logits must move."""
    leaf, prior, trans, x = inputs(s)

    def ours(*parts: Tensor | None) -> reference.CircuitScan:
        return ops.circuit_scan(s.kind, *parts, x)

    def step(joint: Callable[..., Tensor]) -> Callable[[], object]:
        parts = [t.clone().requires_grad_() for t in (leaf, prior, trans) if t is not None]
        padded = [*parts, *[None] * (3 - len(parts))]
        return lambda: torch.autograd.grad(joint(*padded).sum(), parts)

    def plain(f: Callable[..., object], *args: object) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return f(*args)

        return call

    parts = (leaf, prior, trans)
    yield "forward", plain(ours, *parts), plain(eager_joint, *parts, x), 1
    yield "all prefixes", plain(ours, *parts), plain(eager_prefixes, *parts, x), 1
    mine = step(lambda *p: ours(*p).prefix[:, -1])
    yield "forward and backward", mine, step(lambda *p: eager_joint(*p, x)), 3


def check(s: Shape) -> float:
    """The worst error of log p over 2e-6 (1 + |log p|); more than 1 ends the run."""
    leaf, prior, trans, x = inputs(s)
    mine = ops.circuit_scan(s.kind, leaf, prior, trans, x).prefix
    wide = (t.double() if t is not None else None for t in (leaf, prior, trans))
    exact = reference.circuit_scan(s.kind, *wide, x).prefix
    worst = ((mine - exact).abs() / (2e-6 * (1 + exact.abs()))).max().item()
    if not worst <= 1:
        raise SystemExit(f"{s}: result is off, {worst:.2f} times the bound")
    return worst


def measure(s: Shape, rounds: int) -> Iterator[Row]:
    """All rows of a shape."""
    worst = check(s)
    copy, copied = copy_call(64 << 20)
    leaf_bytes = 4 * s.rows * s.n_token * s.components * s.vocab
    for name, mine, eager, moves in cases(s):
        found: dict[str, Timing] = interleaved(
            {"mine": mine, "eager": eager, "copy": copy}, rounds, min_seconds=0.05
        )
        t = found["mine"]
        rate = moves * leaf_bytes / t.median / 1e9
        yield Row(
            name,
            **asdict(s),
            us=t.median * 1e6,
            p20=t.p20 * 1e6,
            p80=t.p80 * 1e6,
            eager_us=found["eager"].median * 1e6,
            over_eager=found["eager"].over(t),
            gbytes_per_s=rate,
            of_copy=rate / (copied / found["copy"].median / 1e9),
            worst_error=worst,
        )


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "circuit_cpu.csv"
    for shape in (Shape("cp"), Shape("hmm")):
        for row in measure(shape, args.rounds):
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            append_rows(path, [{**machine_columns("cpu"), **values}])
            print(
                f"{row.kind:4} {row.case:22} {row.us:9.0f} us  {row.over_eager:6.1f} x eager  "
                f"{row.gbytes_per_s:5.1f} GB/s, {row.of_copy:.2f} of copy",
                flush=True,
            )
    print(path)


if __name__ == "__main__":
    main()
