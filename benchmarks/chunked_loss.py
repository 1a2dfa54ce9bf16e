"""Time losses over a vocabulary in chunks: `python benchmarks/chunked_loss.py --check`.

The benchmark times forward and backward of the cross entropy, and of the divergence of two students
from a teacher, at SmolLM2's output layer, frozen or trained. The peers store all logits: the dense
expression in torch, eager and under torch.compile. Rows are appended to
OUT/vocab_<device>.csv. Every loss and gradient is checked before it is timed. `--check` requires a
peak memory, beyond arguments and gradients, of at most a fifth of the dense expression's, and at
most 1.15 of its time.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from common import MIN_PEER_ERROR, ROOT, append_rows, error_over_bound, peak_bytes
from lora_ops import timer
from row import Row, timing_columns
from torch import Tensor
from torch.nn import functional as F

from lora_ext import ops

ROWS, WIDE, VOCAB, HIDDENS, CHUNK = 1024, 576, 49152, 3, 8192
MOST_MEMORY, MOST_TIME = 1 / 5, 1.15

Loss = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]


def dense_cross_entropy(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy from all logits."""
    return F.cross_entropy(hiddens[0] @ weight.T, labels)


def dense_kl(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the divergence from all logits; the teacher gets no gradient."""
    *students, teacher = hiddens
    with torch.no_grad():
        log_p = (teacher @ weight.T).log_softmax(-1)
    parts = [
        F.kl_div((h @ weight.T).log_softmax(-1), log_p, reduction="batchmean", log_target=True)
        for h in students
    ]
    return torch.stack(parts).mean()


def chunked_cross_entropy(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> Tensor:
    return ops.chunked_cross_entropy(hiddens[0], weight, None, labels, CHUNK)


def chunked_kl(hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor) -> Tensor:
    return ops.chunked_kl(hiddens, weight, None, chunk=CHUNK)


def measure(device: str, rounds: int, compiled: bool, rows: int = ROWS) -> Iterator[Row]:
    """Yield rows with times and rows with peak memory, relative to the dense expression."""
    g = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hiddens = [
        torch.randn(rows, WIDE, generator=g, device=device).to(dtype) for _ in range(HIDDENS)
    ]
    weight = torch.randn(VOCAB, WIDE, generator=g, device=device).div(WIDE**0.5).to(dtype)
    labels = torch.randint(VOCAB, (rows,), generator=g, device=device)
    for name, ours, dense in (
        ("cross entropy", chunked_cross_entropy, dense_cross_entropy),
        ("KL, k = 3", chunked_kl, dense_kl),
    ):
        losses = {"lora_ext": ours, "dense": dense}
        if compiled:
            losses["compiled"] = torch.compile(dense)
        for trained in (False, True):
            case = f"{name}, output layer {'trained' if trained else 'frozen'}"
            leaves = [
                h.requires_grad_() for h in hiddens[: 1 if ours is chunked_cross_entropy else 2]
            ]
            weight.requires_grad_(trained)
            leaves += [weight] * trained

            def step(loss: Loss, leaves: list[Tensor] = leaves) -> tuple[Tensor, ...]:
                value = loss(hiddens, weight, labels)
                return value.detach(), *torch.autograd.grad(value, leaves)

            error = check(
                step(ours), step(dense), exact_step(dense, hiddens, weight, labels, leaves), case
            )
            calls = {n: lambda loss=loss, step=step: step(loss) for n, loss in losses.items()}
            own = sum(t.nbytes for t in leaves)
            peaks = (
                {n: peak_bytes(call) - own for n, call in calls.items()} if device == "cpu" else {}
            )
            times = timer(device)(calls, rounds)
            for n, time in times.items():
                shape = {"tokens": rows, "in_features": WIDE, "out_features": VOCAB}
                shape |= {"dtype": str(dtype).removeprefix("torch.")}
                yield Row(
                    "vocab", case, n, **shape, **timing_columns(time, "ms"),
                    over_base=time.over(times["dense"]), worst_error=error,
                )  # fmt: skip
                if n in peaks:
                    yield Row(
                        "vocab", f"{case}: memory", n, **shape, unit="x",
                        median=peaks[n] / peaks["dense"], mbytes=peaks[n] / 1e6,
                    )  # fmt: skip


def exact_step(
    loss: Loss, hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor, leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the loss and the gradients of ``leaves`` in float64."""
    wide = {id(t): t.detach().double().requires_grad_() for t in (*hiddens, weight)}
    value = loss([wide[id(h)] for h in hiddens], wide[id(weight)], labels)
    return value.detach(), *torch.autograd.grad(value, [wide[id(t)] for t in leaves])


def check(
    found: Sequence[Tensor], dense: Sequence[Tensor], exact: Sequence[Tensor], case: str
) -> float:
    """Return the largest error of the loss and the gradients, each divided by its bound.

    The bound is a multiple of the error of the dense expression. The loss is a single number, which
    the dense expression may compute exactly by chance. The error is therefore taken to be at least
    half an epsilon of the dtype, or ``MIN_PEER_ERROR`` if this is larger.

    Raises:
        SystemExit: If an error exceeds its bound.
    """
    least = max(MIN_PEER_ERROR, torch.finfo(found[1].dtype).eps / 2)
    worst = max(error_over_bound(*each, least) for each in zip(found, dense, exact, strict=True))
    if not worst <= 1:
        raise SystemExit(f"chunked_loss: {case}: result is off by {worst:.3g} times its bound")
    return worst


def main() -> None:
    """Measure and append rows; with --check, exit with 1 if a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=ROWS)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / f"vocab_{args.device}.csv"
    missed = False
    for row in measure(args.device, args.rounds, not args.no_compile, args.tokens):
        append_rows(path, [row.columns(args.device)])
        memory = row.unit == "x"
        ratio = row.median if memory else row.over_base
        assert isinstance(ratio, float)
        late = row.provider == "lora_ext" and ratio > (MOST_MEMORY if memory else MOST_TIME)
        missed = missed or late
        size = f"{row.mbytes:9.1f} MB" if memory else f"{row.median:9.1f} ms"
        note = "  MISSED" if late else ""
        print(f"{row.case:44} {row.provider:9} {size}  {ratio:6.3f} of dense{note}", flush=True)
    print(f"\n{path}")
    if args.check:
        sys.exit(missed)


if __name__ == "__main__":
    main()
