"""Time drafting and verifying: `python benchmarks/circuit_decode.py [--device cuda]`.

Each of B = 1, 8, 64 rows has one window of K = 8 tokens over C = 32 states and V = 320 tokens.
Three calls are timed: the sample with its conditionals and posteriors, the verification, and the
max-product draft. They are compared with the formulas of `lora_ext.reference` in the same dtype.
Every result is checked against float64 before it is timed. Rows are appended to
OUT/circuit_decode_<device>.csv.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from common import ROOT, Call, Timing, append_rows, machine_columns
from lora_ops import timer
from row import timing_columns
from torch import Tensor

from lora_ext import ops, reference
from lora_ext.reference._circuit import CircuitSample, num_transitions

KINDS = ("cp", "hmm", "btree")
ROWS = (1, 8, 64)
TOKENS, COMPONENTS, VOCABULARY = 8, 32, 320
BOUND = 1e-4  # error of log-probabilities near 50: float32 sums over K positions


@dataclass
class Problem:
    """Batch of circuits, logits of a verifier, and one draft."""

    kind: str
    circuit: tuple[Tensor, Tensor, Tensor]
    target: Tensor
    uniforms: Tensor
    tests: Tensor
    draft: CircuitSample | None = None

    @classmethod
    def make(cls, kind: str, rows: int, device: str, dtype: torch.dtype) -> Problem:
        """Draw random logits with standard deviation 2, uniform numbers and a draft.

        At each position, the verifier's logits are those of the circuit's first state.
        """
        g = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return (torch.randn(*size, generator=g, device=device) * 2).to(dtype)

        k, c, v = TOKENS, COMPONENTS, VOCABULARY
        leaf = normal(rows, k, c, v)
        p = cls(
            kind,
            (leaf, normal(rows, c), normal(rows, num_transitions(kind, k), c, c)),
            torch.cat([leaf[:, :, 0], normal(rows, 1, v)], 1),
            torch.rand(rows, k, 2, generator=g, device=device),
            torch.rand(rows, k + 1, generator=g, device=device),
        )
        p.draft = ops.circuit_sample(kind, *p.circuit, p.uniforms)
        return p

    def double(self) -> Problem:
        """Return the problem in float64, with the same draft."""
        leaf, prior, trans = (t.double() for t in self.circuit)
        return replace(self, circuit=(leaf, prior, trans), target=self.target.double())


def sample(of: object, p: Problem) -> CircuitSample:
    """Return sampled tokens with their conditional probabilities and posteriors, computed by
    ``of``."""
    return of.circuit_sample(p.kind, *p.circuit, p.uniforms)


def verify(of: object, p: Problem) -> tuple[Tensor, Tensor]:
    """Return the number of accepted tokens and the next token of each row, computed by ``of``."""
    return of.spec_verify(p.target, *p.draft, p.circuit[0], p.tests)


def argmax(of: object, p: Problem) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens of each row and their log-probability, computed by ``of``."""
    return of.circuit_argmax(p.kind, *p.circuit)


CASES: dict[str, Callable[[object, Problem], tuple[Tensor, ...]]] = {
    "sample": sample,
    "verify": verify,
    "argmax": argmax,
}


def check(case: str, p: Problem, provider: object) -> float:
    """Check tokens and counts; return the largest error against float64, divided by its bound.

    The seed is fixed such that no draw is so close to a boundary that float32 and float64 differ.
    """
    found, exact = (CASES[case](of, q) for of, q in ((provider, p), (reference, p.double())))
    worst = 0.0
    for got, expected in zip(found, exact, strict=True):
        if got.is_floating_point():
            worst = max(worst, float((got.double() - expected).abs().max()) / BOUND)
        elif not torch.equal(got, expected):
            worst = torch.inf
    if not worst <= 1:
        raise SystemExit(f"circuit_decode: {p.kind} {case}: off by {worst:.3g} times its bound")
    return worst


def bench(device: str, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, object]]:
    """Yield the rows of every case, kind and size; our op and the formula are timed in the same
    rounds."""
    providers = {"lora_ext": ops, "reference": reference}
    for kind in KINDS:
        for rows in ROWS:
            p = Problem.make(kind, rows, device, dtype)
            for case, run in CASES.items():
                errors = {name: check(case, p, of) for name, of in providers.items()}
                calls: dict[str, Call] = {
                    name: partial(run, of, p) for name, of in providers.items()
                }
                options = {"min_seconds": 0.02} if device == "cpu" else {}
                times: dict[str, Timing] = timer(device)(calls, rounds, **options)
                for name in providers:
                    yield {
                        **machine_columns(device),
                        "case": case,
                        "kind": kind,
                        "rows": rows,
                        "provider": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        **timing_columns(times[name]),
                        "over_lora_ext": f"{times[name].over(times['lora_ext']):.4g}",
                        "worst_error": f"{errors[name]:.3g}",
                    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        for row in bench(args.device, torch.float32, args.rounds):
            append_rows(args.out / f"circuit_decode_{args.device}.csv", [row])
            print(
                f"{row['case']:7} {row['kind']:6} B={row['rows']:<3} {row['provider']:9} "
                f"{row['median']:9.1f} us  {row['over_lora_ext']:>6} of lora_ext",
                flush=True,
            )


if __name__ == "__main__":
    main()
