"""Compare random A with random B as the initial factor: `python benchmarks/lora_init.py`.

A frozen network with one adapted layer, f(x) = w_out . relu((W + B A) relu(W_in x)) at widths 128,
512 and 2048, learns from a network whose update has rank 20. For each width and initialisation, 27
learning rates from 2^-2 to 2^-15, a factor of 1.41 apart, are trained at once, as adapters of one
batch: Adam with betas (0.9, 0.99), 100 full-batch steps. The learning rate of a seed is the best
one on the other seeds. On MiniLM, LoRA of rank 8 and a head learn Debian's sections
(claims/section_texts.py) in 30 steps, at the learning rate that was best on two separate seeds.
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
from study import Claim, Criterion, Gate, Interval, Row, Rows
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_ext import ops
from lora_ext.methods.lora_init import init_lora_
from lora_ext.nn import adapted_layers

CLAIM = Claim(
    paper="Hayou et al. 2024, The Impact of Initialization on LoRA Finetuning Dynamics "
    "(arXiv 2406.08447)",
    claim="Starting with A random (Init[A]) rather than B (Init[B]) allows a larger learning rate "
    "and reaches a lower loss.",
    setup="(1) A frozen network with one adapted layer (rank 4) learns a teacher's update: 27 "
    "rates, ten seeds at width 128 and five at 512 and 2048; the rate of a seed is the best of "
    "the other seeds. (2) MiniLM: rank 8 on queries and values, 20 sections, 30 steps, ten "
    "seeds.",
    headline="loss of Init[A] below that of Init[B], at each width and on MiniLM",
    use="you start LoRA at all: A random and B zero is the default of PEFT and of this package",
    avoid="you hope to gain from B random: no case was found, and its best learning rates are "
    "smaller",
    seeds=10,
    earlier="four seeds, each rate the best on the same seeds: 32 % [-3, 61] less loss at n = 128, "
    "37 % and 84 % at 512 and 2048, 2.9 % [0.2, 5.6] on MiniLM (revision 1b90df0): direction only",
    gate="each start has learned, is not at the floor of float32, and its best rate is inside the "
    "grid",
)
STARTS = {"Init[A]": "init_a_normal", "Init[B]": "init_b_normal"}
WIDTHS, RANK, POINTS, INPUTS, TEACHER_RANK = (128, 512, 2048), 4, 256, 5, 20
STEPS = 100
RATES = tuple(2 ** (-k / 2) for k in range(4, 31))
SEEDS_OF_WIDTH = {128: 10, 512: 5, 2048: 5}
MINILM, HEAD = "MiniLM", "head alone"
#: log2 of the learning rates tried first on MiniLM; more are added if the best is at an end.
FIRST = {"Init[A]": (-8.5, -8.0, -7.5, -7.0, -6.5), "Init[B]": (-10.5, -10.0, -9.5, -9.0, -8.5)}
GRIDS = {name: study.Grid(tuple(2**k for k in each), most=6) for name, each in FIRST.items()}
CHOOSING = (study.TRIALS, study.TRIALS + 1)
DRAWS = 10  # added to the seeds, since an earlier protocol had the draws 0 to 3
LEARNED, FLOOR, LEAST_GAIN = 0.1, 1e-5, 0.1
BATCH, MINILM_STEPS, HEAD_RATE = 32, 30, 3e-3


def settings(quick: bool) -> Mapping[str, object]:
    found = section_texts.load(quick).hash
    return {"widths": _widths(quick), "rates": (RATES, FIRST), "draws": DRAWS, "texts": found}


def trials(rows: Rows, quick: bool) -> Iterator[Row]:
    """Yield the runs that choose the learning rates on MiniLM, and the runs that the gate
    judges."""
    for seed in CHOOSING:
        yield {"seed": seed, "task": MINILM, "start": HEAD}
        for start, grid in GRIDS.items():
            for rate in grid.rates[:3] if quick else grid.asked(minilm_losses(rows, start)):
                yield {"seed": seed, "task": MINILM, "start": start, "log2_rate": _log2(rate)}
            for width in _widths(quick):
                yield {"seed": seed, "task": "network", "start": start, "width": width}


def minilm_losses(rows: Rows, start: str) -> dict[float, float]:
    """Return the mean loss on MiniLM for each learning rate with rows of both separate seeds."""
    own = [row for row in rows if (row["task"], row["start"]) == (MINILM, start)]
    by_rate: dict[float, list[float]] = {}
    for row in own:
        if row["seed"] in CHOOSING:
            by_rate.setdefault(row["log2_rate"], []).append(row["loss"])
    return {2**k: sum(x) / len(x) for k, x in by_rate.items() if len(x) == len(CHOOSING)}


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield the arms: sweeps over learning rates on the network, and MiniLM at the chosen rate."""
    for seed in seeds:
        for start in STARTS:
            yield {"seed": seed, "task": MINILM, "start": start}
            for width in _widths(quick):
                if seed < SEEDS_OF_WIDTH.get(width, 1):
                    yield {"seed": seed, "task": "network", "start": start, "width": width}


def minutes(arm: Row) -> float:
    return 0.15 if arm["task"] == MINILM else {128: 0.05, 512: 0.1, 2048: 0.5}[arm["width"]]


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Yield the loss after training; for the network, also the loss before training and the RMS of
    A u."""
    torch.set_num_threads(1)
    start, draw = arm["start"], arm["seed"] + DRAWS
    if arm["task"] == MINILM:
        log2 = arm.get("log2_rate", "")
        if log2 == "" and start != HEAD:
            log2 = _log2(GRIDS[start].best(minilm_losses(rows, start)))
        scheme, rate = STARTS.get(start, STARTS["Init[A]"]), 2**log2 if log2 != "" else 0.0
        steps = 2 if quick else MINILM_STEPS
        yield {"log2_rate": log2, "loss": on_minilm(_world(draw, quick), scheme, rate, steps)}
        return
    scheme = STARTS[start]
    untrained = sweep(draw, arm["width"], scheme, 0)[0][0].item()
    losses, sizes = sweep(draw, arm["width"], scheme, 3 if quick else STEPS)
    for rate, loss, size in zip(RATES, losses.tolist(), sizes.tolist(), strict=True):
        yield {"log2_rate": _log2(rate), "loss": loss, "rms_z_a": size, "untrained": untrained}


def _widths(quick: bool) -> tuple[int, ...]:
    return (16, 32, 64) if quick else WIDTHS


def _log2(rate: float) -> float:
    return round(2 * math.log2(rate)) / 2


@functools.lru_cache(1)
def _world(seed: int, quick: bool) -> World:
    sizes = section_texts.QUICK if quick else section_texts.SIZES
    return section_texts.make_world(seed, sizes, quick)


def on_minilm(world: World, scheme: str, rate: float, steps: int) -> float:
    """Train MiniLM's adapters with learning rate ``rate`` and the head with ``HEAD_RATE``; return
    the held-out loss."""
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
    """Return the losses and the RMS of A u after training, one per learning rate."""
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
    """Learning rates of the network for one width and initialisation.

    Attributes:
        log2_rate: log2 of the learning rate with the lowest mean loss over the seeds.
        losses: Loss of each seed at the learning rate that is best on the other seeds.
    """

    def __init__(self, rows: Rows, start: str, width: int):
        own = [r for r in rows if (r["task"], r["start"]) == ("network", start)]
        own = [r for r in own if r["width"] == width]
        seeds = sorted({r["seed"] for r in own})
        by_rate: dict[float, list[float]] = {
            rate: study.column(own, "loss", log2_rate=rate)
            for rate in {r["log2_rate"] for r in own}
        }

        def best(left_out: int | None) -> float:
            def loss(rate: float) -> float:
                each = [x for k, x in enumerate(by_rate[rate]) if k != left_out]
                total = sum(each) / max(1, len(each))
                return total if math.isfinite(total) else math.inf

            return min(sorted(by_rate), key=loss)

        self.log2_rate = best(None)
        alone = len(seeds) == 1
        self.losses = [by_rate[best(None if alone else k)][k] for k in range(len(seeds))]
        self.loss = sum(self.losses) / len(self.losses)
        self.rows = [r for r in own if r["log2_rate"] == self.log2_rate]
        self.untrained = study.mean(own, "untrained")
        self.inside = min(by_rate) < self.log2_rate < max(by_rate)


def bests(rows: Rows) -> dict[str, dict[int, Best]]:
    """Return the best learning rates of the network by initialisation, then width."""
    widths = sorted({row["width"] for row in rows if row["task"] == "network"})
    return {start: {n: Best(rows, start, n) for n in widths} for start in STARTS}


def gain(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return the share by which the losses ``a`` of Init[A] are below the losses ``b`` of
    Init[B]."""
    return study.interval([1 - own / other for own, other in zip(a, b, strict=True)])


def real(rows: Rows, start: str) -> list[float]:
    """Return the loss of each seed on MiniLM."""
    return study.column(rows, "loss", task=MINILM, start=start)


def gate(rows: Rows) -> list[Gate]:
    """Check that every initialisation learns, that no loss is near the floor, and that the best
    learning rates are inside the grid."""
    each = [best for of in bests(rows).values() for best in of.values()]
    shares = [best.loss / best.untrained for best in each]
    head = study.mean(rows, "loss", task=MINILM, start=HEAD)
    tried = {start: minilm_losses(rows, start) for start in STARTS}
    gains = [head - min(losses.values()) for losses in tried.values()]
    ends = f"{min(best.log2_rate for best in each):g} to {max(best.log2_rate for best in each):g}"
    return [
        Gate(
            "network: loss left",
            f"{FLOOR:g} to {LEARNED:g}",
            f"{min(shares):.2g} to {max(shares):.2g}",
            FLOOR <= min(shares) and max(shares) <= LEARNED,
        ),
        Gate(
            "log2 of rates",
            f"inside {_log2(RATES[-1]):g} to {_log2(RATES[0]):g}",
            ends,
            all(best.inside for best in each),
        ),
        study.gate_above("MiniLM: gain over the head", min(gains), LEAST_GAIN),
        *(GRIDS[start].gate(losses, f"{start} on MiniLM") for start, losses in tried.items()),
    ]


def slope(of: dict[int, Best]) -> float:
    """Return the slope of log2(best learning rate) over log2(width)."""
    rates = [best.log2_rate for best in of.values()]
    return float(np.polyfit(np.log2(list(of)), rates, 1)[0])


def criteria(rows: Rows) -> list[Criterion]:
    """Check the losses (the headline), slopes and ratio of the best learning rates, and the growth
    of A u with the width."""
    a, b = bests(rows).values()
    first, last = min(a), max(a)
    gains = {f"n = {n}": gain(a[n].losses, b[n].losses) for n in a}
    gains[MINILM] = gain(*(real(rows, start) for start in STARTS))
    found = [
        Criterion(
            f"{name}: loss of Init[A] below that of Init[B] by",
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
    """Return a text with the losses and their ratios, and the slopes of the best learning rates."""
    a, b = bests(rows).values()
    each = ", ".join(f"{gain(a[n].losses, b[n].losses):.0%} at n = {n}" for n in a)
    losses = [real(rows, start) for start in STARTS]
    means = [sum(x) / len(x) for x in losses]
    return (
        f"Init[A]'s loss is below Init[B]'s by {each}, and by {gain(*losses):.1%} on MiniLM "
        f"({means[0]:.3f} against {means[1]:.3f}); the best rates fall as n^{slope(a):.2f} and "
        f"n^{slope(b):.2f}"
    )


def panels(rows: Rows) -> study.Panels:
    """Return the losses on MiniLM, and the losses of the network at its best learning rates."""
    own = [row for row in rows if row["seed"] < study.TRIALS]
    found: dict[str, dict[str, Interval]] = {
        "MiniLM: held-out loss": {start: study.interval(real(own, start)) for start in STARTS}
    }
    for start, of in bests(own).items():
        found[f"network, {start}: loss by width"] = {
            f"{n} at 2^{best.log2_rate:g}": study.interval(best.losses) for n, best in of.items()
        }
    return found


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
