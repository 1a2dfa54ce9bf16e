"""Which factor starts random, and the best learning rate: `python benchmarks/lora_init.py --check`.

A frozen network with one adapted layer, f(x) = w_out . relu((W + B A) relu(W_in x)) at widths 128,
512 and 2048, learns from one with another update of rank 20. For each width and start, fourteen
rates from 2^-2 to 2^-15 are trained side by side: they are fourteen adapters of one batch. Adam
with betas (0.9, 0.99), 100 full steps. Two minutes on two cores.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import study
import torch
from study import DIRECTION, NOT_REPRODUCED, REPRODUCED, Claim, Criterion, Row, Rows, Verdict
from torch import Tensor
from tqdm import tqdm

from lora_ext import ops
from lora_ext.methods.lora_init import init_lora_

CLAIM = Claim(
    paper="Hayou et al. 2024, The Impact of Initialization on LoRA Finetuning Dynamics "
    "(arXiv 2406.08447)",
    claim="Starting with A random (Init[A]) rather than B (Init[B]) allows a larger learning rate, "
    "which falls with the width n as n^(-1/2) against n^(-1), and ends better, while A x grows "
    "with the width.",
    setup="A frozen network of one adapted layer (rank 4; widths 128, 512, 2048) learns from a "
    "teacher with an update of rank 20 on 256 points; Adam, 100 steps, 14 rates, each start at its "
    "own best.",
    seeds=2,
)
STARTS = {"Init[A]": "init_a_normal", "Init[B]": "init_b_normal"}
WIDTHS, RANK, POINTS, INPUTS, TEACHER_RANK = (128, 512, 2048), 4, 256, 5, 20
STEPS = 100
RATES = tuple(2.0**-k for k in range(2, 16))


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Final loss and rms of A u of every seed, width, start and rate."""
    widths, steps = ((16, 32, 64), 3) if quick else (WIDTHS, STEPS)
    cells = [(seed, n, start) for seed in seeds for n in widths for start in STARTS]
    for seed, n, start in tqdm(cells, desc="lora_init", unit="sweep", disable=None):
        losses, sizes = sweep(seed, n, STARTS[start], steps)
        for rate, loss, size in zip(RATES, losses.tolist(), sizes.tolist(), strict=True):
            yield {
                "seed": seed,
                "width": n,
                "start": start,
                "log2_rate": round(math.log2(rate)),
                "loss": loss,
                "rms_z_a": size,
            }


def sweep(seed: int, n: int, scheme: str, steps: int) -> tuple[Tensor, Tensor]:
    """Losses and rms of A u after training, one per rate."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*shape, generator=g) / math.sqrt(fan_in)

    x = normal(POINTS, INPUTS)
    w_in, w, w_out = normal(n, INPUTS, fan_in=INPUTS), normal(n, n, fan_in=n), normal(n, fan_in=n)
    teacher_a = normal(TEACHER_RANK, n, fan_in=n)
    teacher_b = normal(n, TEACHER_RANK, fan_in=TEACHER_RANK)
    u = (x @ w_in.T).relu()  # (N, n)
    base = u @ w.T
    target = (base + u @ teacher_a.T @ teacher_b.T).relu() @ w_out  # (N,)

    a, b = torch.empty(RANK, n), torch.empty(n, RANK)
    init_lora_(a, b, scheme, generator=g)
    factors = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for _ in RATES]
    groups = [{"params": pair, "lr": lr} for pair, lr in zip(factors, RATES, strict=True)]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-8)
    ids = torch.arange(len(RATES)).repeat_interleave(POINTS)
    rows = u.repeat(len(RATES), 1)  # (rates N, n)

    def losses() -> Tensor:
        update = ops.lora_apply(rows, *(torch.stack(f) for f in zip(*factors, strict=True)), ids)
        hidden = (base + update.view(len(RATES), POINTS, n)).relu()
        return (hidden @ w_out - target).square().mean(1)  # (rates,)

    for _ in range(steps):
        adam.zero_grad()
        losses().sum().backward()
        adam.step()
    with torch.no_grad():
        sizes = torch.stack([(u @ a.T).square().mean().sqrt() for a, _ in factors])
        return losses(), sizes


# -------------------------------------------------------------------------------------------------
# What the rows say


class Best:
    """Of one width and start: the rate with the lowest mean loss over the seeds."""

    def __init__(self, rows: Rows, width: int, start: str):
        own = [r for r in rows if (r["width"], r["start"]) == (width, start)]
        self.losses = {
            rate: study.mean(own, "loss", log2_rate=rate) for rate in {r["log2_rate"] for r in own}
        }
        finite = {rate: loss for rate, loss in self.losses.items() if math.isfinite(loss)}
        self.log2_rate = min(finite, key=finite.__getitem__)
        self.loss = finite[self.log2_rate]
        self.z_a = study.mean(own, "rms_z_a", log2_rate=self.log2_rate)


def bests(rows: Rows) -> dict[str, dict[int, Best]]:
    """By start, then width."""
    widths = sorted({row["width"] for row in rows})
    return {start: {n: Best(rows, n, start) for n in widths} for start in STARTS}


def slope(of: dict[int, Best]) -> float:
    """Of log2(best rate) against log2(width)."""
    rates = [best.log2_rate for best in of.values()]
    return float(np.polyfit(np.log2(list(of)), rates, 1)[0])


def criteria(rows: Rows) -> list[Criterion]:
    """Loss, slopes, rates and growth."""
    a, b = bests(rows).values()
    first, last = min(a), max(a)
    slope_a, slope_b = slope(a), slope(b)
    losses = ", ".join(f"{a[n].loss:.2g} to {b[n].loss:.2g}" for n in a)
    times = 2.0 ** (a[last].log2_rate - b[last].log2_rate)
    growth = a[last].z_a / a[first].z_a
    return [
        Criterion(
            "best loss of Init[A] below that of Init[B]",
            "at every width",
            losses,
            all(a[n].loss < b[n].loss for n in a),
        ),
        Criterion(
            "slope of log2(best rate) over log2(n), Init[A]",
            "-0.75 to -0.25 (theory -0.5)",
            f"{slope_a:.2f}",
            -0.75 <= slope_a <= -0.25,
        ),
        Criterion(
            "the same, Init[B]",
            "-1.25 to -0.5 (theory -1)",
            f"{slope_b:.2f}",
            -1.25 <= slope_b <= -0.5,
        ),
        Criterion(
            "slope of Init[B] below that of Init[A]",
            "by at least 0.15",
            f"{slope_a - slope_b:.2f}",
            slope_a - slope_b >= 0.15,
        ),
        Criterion(
            f"best rate of Init[A] over that of Init[B], n = {last}",
            "at least 2",
            f"{times:g}",
            times >= 2,
        ),
        Criterion(
            f"rms of A u at the best rate, Init[A], n = {last} over n = {first}",
            "at least 1.3",
            f"{growth:.2f}",
            growth >= 1.3,
        ),
    ]


def verdict(rows: Rows) -> Verdict:
    """Reproduced where all holds; direction only where loss and rate order as claimed."""
    a, b = bests(rows).values()
    last = max(a)
    met = [c.passed for c in criteria(rows)]
    word = REPRODUCED if all(met) else DIRECTION if met[0] and met[4] else NOT_REPRODUCED
    return Verdict(
        f"best rate falls as n^{slope(a):.2f} (Init[A]) and n^{slope(b):.2f} (Init[B]); at n = "
        f"{last} it is 2^{a[last].log2_rate} with loss {a[last].loss:.2g} against "
        f"2^{b[last].log2_rate} with loss {b[last].loss:.2g}; rms of A u at the best rate of "
        f"Init[A] grows from {a[min(a)].z_a:.1f} to {a[last].z_a:.1f}",
        word,
    )


def show(rows: Rows) -> None:
    """Best rate, loss and size of A u of each width and start."""
    found = bests(rows)
    header = ["n", *(f"{start} {what}" for start in found for what in ("rate", "loss", "A u"))]
    lines = []
    for n in found["Init[A]"]:
        line = [str(n)]
        for of in found.values():
            line += [f"2^{of[n].log2_rate}", f"{of[n].loss:.2g}", f"{of[n].z_a:.1f}"]
        lines.append(line)
    print(study.markdown(header, lines), end="\n\n")


def draw(rows: Rows, path: Path) -> None:
    """Loss against rate at each width, and the best rate against the width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = bests(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (start, of), color in zip(found.items(), ("#0072B2", "#D55E00"), strict=True):
        widths = np.array(list(of))
        for (n, best), style in zip(of.items(), (":", "--", "-"), strict=False):
            rates = sorted(rate for rate in best.losses if math.isfinite(best.losses[rate]))
            values = [best.losses[rate] for rate in rates]
            left.plot(rates, values, style, color=color, label=f"{start}, n = {n}")
            left.plot(best.log2_rate, best.loss, "o", color=color)
        best_rates = np.array([best.log2_rate for best in of.values()])
        power = -0.5 if start == "Init[A]" else -1.0
        law = best_rates.mean() + power * (np.log2(widths) - np.log2(widths).mean())
        right.plot(widths, 2.0**best_rates, "o-", color=color, label=f"{start}, measured")
        right.plot(widths, 2.0**law, ":", color=color, label=f"n^{power:g}, theory")
    left.set(xlabel="log2 of the learning rate", ylabel="loss after training", yscale="log")
    left.set_ylim(top=1)  # what diverged lies above
    right.set(xlabel="width n", ylabel="best learning rate")
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
