"""Compare random A with random B as the initial factor: `python benchmarks/lora_init.py`.

A frozen network with one adapted layer, f(x) = w_out . relu((W + B A) relu(W_in x)) at widths 128,
512 and 2048, learns from one whose update has rank 20. For each width and initialisation, 27
learning rates from 2^-2 to 2^-15, a factor of 1.41 apart, are trained at once, as adapters of one
batch: Adam with betas (0.9, 0.99), 100 full-batch steps. On MiniLM, LoRA of rank 8 and a head learn
Debian's sections (claims/section_texts.py) in 30 steps, one rate at a time.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import study
import torch
from claims import section_texts
from federated_digits import World, trimmed
from study import Claim, Criterion, Interval, Row, Rows
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_ext import ops
from lora_ext.methods.lora_init import init_lora_
from lora_ext.nn import adapted_layers

CLAIM = Claim(
    paper="Hayou et al. 2024, The Impact of Initialization on LoRA Finetuning Dynamics "
    "(arXiv 2406.08447)",
    claim="Starting with A random (Init[A]) rather than B (Init[B]) allows a larger learning rate, "
    "which falls with the width n as n^(-1/2) instead of n^(-1). It reaches a lower loss, while "
    "A x grows with the width.",
    setup="(1) A frozen network with one adapted layer (rank 4; widths 128, 512, 2048) learns a "
    "teacher's update of rank 20 on 256 points: Adam, 100 steps, the best of 27 rates a factor of "
    "1.41 apart. (2) MiniLM: rank 8 on queries and values, 20 sections, 30 steps of batch 32, 12 "
    "rates.",
    headline="best loss",
    use="you start LoRA at all: A random and B zero is the default of PEFT and of this package",
    avoid="you hope to gain from B random: no case was found, and its best rates are smaller",
    seeds=4,
    earlier="the network alone, 2 seeds, 14 rates a factor of 2 apart. The best rate falls as "
    "n^-0.50 and n^-0.75; A's best loss is below B's at every width (revision 672de08): reproduced",
)
STARTS = {"Init[A]": "init_a_normal", "Init[B]": "init_b_normal"}
WIDTHS, RANK, POINTS, INPUTS, TEACHER_RANK = (128, 512, 2048), 4, 256, 5, 20
STEPS = 100
RATES = tuple(2 ** (-k / 2) for k in range(4, 31))
MINILM, MINILM_RATES = "MiniLM", RATES[7:19]  # 2^-5.5 to 2^-11
BATCH, MINILM_STEPS, HEAD_RATE = 32, 30, 3e-3


def settings(quick: bool) -> Mapping[str, object]:
    return {"widths": _widths(quick), "rates": RATES, "texts": section_texts.load(quick).hash}


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield the arms: sweeps of the network, and single rates on MiniLM."""
    for seed in seeds:
        for start in STARTS:
            for width in _widths(quick):
                yield {"seed": seed, "task": "network", "start": start, "width": width}
            for rate in MINILM_RATES[:2] if quick else MINILM_RATES:
                yield {"seed": seed, "task": MINILM, "start": start, "log2_rate": _log2(rate)}


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Yield the loss after training; on the network, also the RMS of A u."""
    torch.set_num_threads(1)
    scheme = STARTS[arm["start"]]
    if arm["task"] == MINILM:
        steps = 2 if quick else MINILM_STEPS
        yield {"loss": on_minilm(_world(arm["seed"], quick), scheme, 2 ** arm["log2_rate"], steps)}
        return
    losses, sizes = sweep(arm["seed"], arm["width"], scheme, 3 if quick else STEPS)
    for rate, loss, size in zip(RATES, losses.tolist(), sizes.tolist(), strict=True):
        yield {"log2_rate": _log2(rate), "loss": loss, "rms_z_a": size}


def _widths(quick: bool) -> tuple[int, ...]:
    return (16, 32, 64) if quick else WIDTHS


def _log2(rate: float) -> float:
    return round(2 * math.log2(rate)) / 2


@functools.lru_cache(1)
def _world(seed: int, quick: bool) -> World:
    sizes = section_texts.QUICK if quick else section_texts.SIZES
    return section_texts.make_world(seed, sizes, quick)


def on_minilm(world: World, scheme: str, rate: float, steps: int) -> float:
    """Return the held-out loss after training; the head has a separate rate."""
    model = world.adapted()
    g = torch.Generator().manual_seed(world.seed)
    for layer in adapted_layers(model).values():
        init_lora_(
            layer.lora_A["default"].weight, layer.lora_B["default"].weight, scheme, generator=g
        )
    named = dict(model.named_parameters())
    lora = [p for name, p in named.items() if "lora_" in name]
    head = [p.requires_grad_() for name, p in named.items() if name.startswith("head.")]
    groups = [{"params": lora, "lr": rate}, {"params": head, "lr": HEAD_RATE}]
    adam = torch.optim.AdamW(groups, weight_decay=0.0)
    x, y = world.training
    order = torch.randperm(len(y), generator=g)
    for part in order.repeat(2).split(BATCH)[:steps]:
        adam.zero_grad()
        cross_entropy(model(trimmed(x[part])), y[part]).backward()
        adam.step()
    x, y = world.testing
    with torch.no_grad():
        parts = zip(x.split(100), y.split(100), strict=True)
        losses = [cross_entropy(model(trimmed(a)), b, reduction="sum") for a, b in parts]
    return (torch.stack(losses).sum() / len(y)).item()


def sweep(seed: int, n: int, scheme: str, steps: int) -> tuple[Tensor, Tensor]:
    """Return the losses and the RMS of A u after training, one per rate."""
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
# Judging


class Best:
    """Rate with the lowest mean loss over the seeds, for one task and initialisation."""

    def __init__(self, rows: Rows, start: str, **task: object):
        own = [r for r in rows if r["start"] == start and all(r[k] == v for k, v in task.items())]
        by_rate = {r["log2_rate"]: study.column(own, "loss", log2_rate=r["log2_rate"]) for r in own}
        means = {rate: sum(losses) / len(losses) for rate, losses in by_rate.items()}
        finite = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
        self.log2_rate = min(finite, key=finite.__getitem__)
        self.loss = finite[self.log2_rate]
        self.losses: list[float] = by_rate[self.log2_rate]  # by seed
        self.rows = [r for r in own if r["log2_rate"] == self.log2_rate]


def bests(rows: Rows) -> dict[str, dict[int, Best]]:
    """Return the best rates of the network by initialisation, then width."""
    widths = sorted({row["width"] for row in rows if row["task"] == "network"})
    return {start: {n: Best(rows, start, width=n) for n in widths} for start in STARTS}


def gain(a: Best, b: Best) -> Interval:
    """Return the share by which the best loss of Init[A] is below that of Init[B]."""
    pairs = zip(a.losses, b.losses, strict=True)
    return study.interval([1 - own / other for own, other in pairs])


def slope(of: dict[int, Best]) -> float:
    """Return the slope of log2(best rate) over log2(width)."""
    rates = [best.log2_rate for best in of.values()]
    return float(np.polyfit(np.log2(list(of)), rates, 1)[0])


def criteria(rows: Rows) -> list[Criterion]:
    """Check losses (the headline), slopes, rates and growth."""
    a, b = bests(rows).values()
    real = [Best(rows, start, task=MINILM) for start in STARTS]
    first, last = min(a), max(a)
    gains = {f"n = {n}": gain(a[n], b[n]) for n in a} | {MINILM: gain(real[0], real[1])}
    found = [
        Criterion(
            f"best loss, {name}: Init[A] below Init[B] by",
            "interval above 0",
            f"{each:.1%}",
            each.low > 0,
            headline=True,
            points=each.middle > 0,
        )
        for name, each in gains.items()
    ]
    slope_a, slope_b = slope(a), slope(b)
    times = 2.0 ** (a[last].log2_rate - b[last].log2_rate)
    growth = study.mean(a[last].rows, "rms_z_a") / study.mean(a[first].rows, "rms_z_a")
    found += [
        Criterion(
            "slope of log2(best rate) over log2(n), Init[A]",
            "-0.75 to -0.25 (theory -0.5)",
            f"{slope_a:.2f}",
            -0.75 <= slope_a <= -0.25,
        ),
        Criterion(
            "slope of log2(best rate) over log2(n), Init[B]",
            "-1.25 to -0.5 (theory -1)",
            f"{slope_b:.2f}",
            -1.25 <= slope_b <= -0.5,
        ),
        Criterion(
            f"best rate of Init[A] over that of Init[B], n = {last}",
            "at least 2",
            f"{times:.3g}",
            times >= 2,
        ),
        Criterion(
            f"rms of A u at the best rate, Init[A], n = {last} over n = {first}",
            "at least 1.3",
            f"{growth:.2f}",
            growth >= 1.3,
        ),
    ]
    return found


def figure(rows: Rows) -> str:
    """Format the best losses and rates."""
    a, b = bests(rows).values()
    real = [Best(rows, start, task=MINILM) for start in STARTS]
    losses = ", ".join(f"{a[n].loss:.2g} against {b[n].loss:.2g} (n = {n})" for n in a)
    return (
        f"best loss of Init[A] and Init[B]: {losses}; MiniLM {real[0].loss:.3f} at rate "
        f"2^{real[0].log2_rate:g} against {real[1].loss:.3f} at 2^{real[1].log2_rate:g} "
        f"({gain(*real):.1%} less); the best rates fall as n^{slope(a):.2f} and n^{slope(b):.2f}"
    )


def panels(rows: Rows) -> study.Panels:
    """Return the losses of all rates on MiniLM, and of the best rates on the network."""
    found: dict[str, dict[str, Interval]] = {}
    for start in STARTS:
        own = [r for r in rows if (r["task"], r["start"]) == (MINILM, start)]
        found[f"MiniLM, {start}: held-out loss by rate"] = {
            f"2^{rate:g}": study.interval(study.column(own, "loss", log2_rate=rate))
            for rate in sorted({r["log2_rate"] for r in own})
        }
        found[f"network, {start}: best loss by width"] = {
            f"{n} at 2^{best.log2_rate:g}": study.interval(best.losses)
            for n, best in bests(rows)[start].items()
        }
    return found


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
