"""Time the circuit scan: `python benchmarks/bench_circuit.py`.

The scan of a window is compared with plain torch, eager and under torch.compile: log_softmax of the
logits, then one logsumexp per position, which yields the probability of every prefix. Values and
gradients are checked before they are timed. In each case, the fastest function is listed first.
Rows are appended to OUT/circuit_<device>.csv. The first run compiles for a minute.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from common import ROOT, Call, Timing, append_rows, copy_call, interleaved, machine_columns
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_ext import ops, reference
from lora_ext.reference._circuit import num_transitions

Observed = Callable[[Tensor, Tensor], Tensor]
CASES = {"forward": 1, "all prefixes": 1, "forward and backward": 3}  # passes over the logits


@dataclass(frozen=True)
class Shape:
    """Kind of circuit, rows, positions, components and vocabulary."""

    kind: str
    rows: int = 64
    n_token: int = 8
    components: int = 32
    vocab: int = 320


@dataclass(frozen=True)
class Row:
    """Row of benchmarks/results/circuit_<device>.csv."""

    case: str
    kind: str
    rows: int
    n_token: int
    components: int
    vocab: int
    provider: str
    us: float
    p20: float
    p80: float
    over_lora_ext: float  # time divided by lora_ext's in the same rounds
    gbytes_per_s: float  # logits read (and gradients written) once
    of_copy: float  # gbytes_per_s divided by the machine's copy bandwidth in the same rounds
    worst_error: float  # error of log p / (2e-6 (1 + |log p|)), or of gradients / 1e-4


def inputs(s: Shape) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return random leaf, prior, trans and x."""
    g = torch.Generator().manual_seed(0)
    m = num_transitions(s.kind, s.n_token)
    return (
        torch.randn(s.rows, s.n_token, s.components, s.vocab, generator=g),
        torch.randn(s.rows, s.components, generator=g),
        torch.randn(s.rows, m, s.components, s.components, generator=g) if m else None,
        torch.randint(0, s.vocab, (s.rows, s.n_token), generator=g),
    )


def gathered(leaf: Tensor, x: Tensor) -> Tensor:
    """Compute ``log p(x_k)`` under every component, ``(B, K, C)``; fastest form in eager torch."""
    index = x[..., None, None].expand(*leaf.shape[:3], 1)
    return leaf.log_softmax(-1).gather(-1, index).squeeze(-1)


def crossed(leaf: Tensor, x: Tensor) -> Tensor:
    """Compute the result of `gathered` with cross entropy, whose compiled gradient needs no
    scatter."""
    target = x[..., None].expand(leaf.shape[:3]).flatten()
    return -cross_entropy(leaf.flatten(0, 2), target, reduction="none").view(leaf.shape[:3])


def joint(
    leaf: Tensor, prior: Tensor, trans: Tensor | None, x: Tensor, observed: Observed = gathered
) -> Tensor:
    """Compute ``log p(x)`` of cp (``trans`` is None) and hmm in plain torch."""
    e = observed(leaf, x)
    cur = prior.log_softmax(-1) + e[:, 0]
    if trans is None:
        return torch.logsumexp(cur + e[:, 1:].sum(1), -1)
    step = trans.log_softmax(-1)
    for k in range(1, e.shape[1]):
        cur = torch.logsumexp(cur[:, :, None] + step[:, k - 1], 1) + e[:, k]
    return torch.logsumexp(cur, -1)


def prefixes(
    leaf: Tensor, prior: Tensor, trans: Tensor | None, x: Tensor, observed: Observed = gathered
) -> Tensor:
    """Compute ``log p(x_1 .. x_k)`` for every k in one pass of plain torch: ``(B, K)``."""
    e = observed(leaf, x)
    cur = prior.log_softmax(-1)
    if trans is None:
        return torch.logsumexp(cur[:, None] + e.cumsum(1), -1)
    step, states = trans.log_softmax(-1), [cur + e[:, 0]]
    for k in range(1, e.shape[1]):
        states.append(torch.logsumexp(states[-1][:, :, None] + step[:, k - 1], 1) + e[:, k])
    return torch.logsumexp(torch.stack(states, 1), -1)


def providers(s: Shape, case: str, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Return functions of leaf, prior, trans and x: lora_ext first, then plain torch."""

    def scan(*args: Tensor | None) -> Tensor:
        prefix = ops.circuit_scan(s.kind, *args).prefix
        return prefix if case == "all prefixes" else prefix[:, -1]

    plain = prefixes if case == "all prefixes" else joint
    found = {"lora_ext": scan, "torch": plain}
    if compiled:
        found["torch.compile"] = torch.compile(partial(plain, observed=crossed), dynamic=False)
    return found


def call(case: str, f: Callable[..., Tensor], args: tuple[Tensor | None, ...]) -> Call:
    """Return a function without arguments that calls ``f``, or that computes its gradients if the
    case is "forward and backward"."""
    if case != "forward and backward":

        def value() -> Tensor:
            with torch.inference_mode():
                return f(*args)

        return value
    floating = [t is not None and t.is_floating_point() for t in args]
    own = [
        t.clone().requires_grad_() if t is not None and wanted else t
        for t, wanted in zip(args, floating, strict=True)
    ]
    parts = [t for t, wanted in zip(own, floating, strict=True) if t is not None and wanted]
    return lambda: torch.autograd.grad(f(*own).sum(), parts)


def error(s: Shape, case: str, found: object) -> float:
    """Return the largest error of a result, divided by its bound; exit if this is above 1."""
    args = tuple(t.double() if t is not None and t.is_floating_point() else t for t in inputs(s))
    exact = reference.circuit_scan(s.kind, *args).prefix
    if case == "forward and backward":
        f = providers(s, "forward", False)["torch"]
        pairs = zip(call(case, f, args)(), found, strict=True)  # pyright: ignore
        worst = max(float((got - g).abs().max() / g.abs().max()) for g, got in pairs) / 1e-4
    else:
        exact = exact if case == "all prefixes" else exact[:, -1]
        worst = float(((found - exact).abs() / (2e-6 * (1 + exact.abs()))).max())
    if not worst <= 1:
        raise SystemExit(f"{s}, {case}: result is off, {worst:.2f} times the bound")
    return worst


def measure(s: Shape, rounds: int, compiled: bool) -> Iterator[Row]:
    """Yield the rows of a shape. The rows of each case are sorted by time, the fastest first."""
    args = inputs(s)
    copy, copied = copy_call(64 << 20)
    leaf_bytes = 4 * s.rows * s.n_token * s.components * s.vocab
    for case, moves in CASES.items():
        calls = {n: call(case, f, args) for n, f in providers(s, case, compiled).items()}
        worst = {name: error(s, case, each()) for name, each in calls.items()}
        found: dict[str, Timing] = interleaved({**calls, "copy": copy}, rounds, min_seconds=0.05)
        for name in sorted(calls, key=lambda name: found[name].over(found["lora_ext"])):
            t = found[name]
            rate = moves * leaf_bytes / t.median / 1e9
            yield Row(
                case,
                **asdict(s),
                provider=name,
                us=t.median * 1e6,
                p20=t.p20 * 1e6,
                p80=t.p80 * 1e6,
                over_lora_ext=t.over(found["lora_ext"]),
                gbytes_per_s=rate,
                of_copy=rate / (copied / found["copy"].median / 1e9),
                worst_error=worst[name],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="eager only")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "circuit_cpu.csv"
    for shape in (Shape("cp"), Shape("hmm")):
        for row in measure(shape, args.rounds, args.compile):
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            append_rows(path, [{**machine_columns("cpu"), **values}])
            print(
                f"{row.kind:4} {row.case:22} {row.provider:14} {row.us:9.0f} us  "
                f"{row.over_lora_ext:6.2f} of lora_ext  {row.of_copy:.2f} of copy",
                flush=True,
            )
    print(path)


if __name__ == "__main__":
    main()
