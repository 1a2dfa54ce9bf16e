"""Do devices of unequal speed reach an accuracy sooner by LEGEND? `python benchmarks/legend.py`.

Twelve devices of three speeds train LoRA on digits (federated_digits.py), six a round. LEGEND gives
each a depth such that those of a round finish together, with ranks 1 to 6 toward the output; its
rival trains all layers at rank 4 on all devices. Seconds are simulated from the speeds.

legend_full.py has, without a criterion, other modes, ranks and payloads, and other methods.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import study
import torch
from federated_digits import QUICK, Run, Sizes, World, federate, make_world
from study import DIRECTION, NOT_REPRODUCED, Claim, Criterion, Row, Rows, Verdict
from torch import Tensor
from tqdm import tqdm

from lora_ext.federated import LayerPlan, LoraLayerManager
from lora_ext.federated.update import Client
from lora_ext.methods.fed_hello import pattern_weights, rgd_layers
from lora_ext.methods.legend import (
    Estimate,
    LegendAllocator,
    LegendConfig,
    SimulatedClock,
)

CLAIM = Claim(
    paper="Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices "
    "(LEGEND, arXiv 2412.20004)",
    claim="LoRA on the layers near the output, of as many layers as each device can train in the "
    "time of the others and of ranks that rise toward the output, reaches the target accuracy 1.5 "
    "to 2.8 times sooner, with about 42 % less traffic, at comparable accuracy.",
    setup="scikit-learn's digits, a frozen transformer of 6 blocks (width 32), 12 simulated "
    "devices of 3 speeds, 6 a round, 30 rounds; against LoRA of rank 4 in all layers of all "
    "devices. Seconds are simulated: this checks the direction only, where the paper's figures "
    "come from real devices and language models.",
    seeds=5,
)
# By device: seconds without a trained layer, for each layer, and for 1000 bytes of its slice.
SPEEDS = ((1.0, 0.2, 0.004), (1.3, 0.5, 0.01), (1.8, 1.0, 0.02))
PARTITIONS = ("iid", "3 classes", "dirichlet 0.3", "dirichlet 1.0")
GATE = ("uniform", "legend")
TARGET = 0.95  # of the smaller of the two best accuracies


@dataclass(frozen=True)
class Method:
    """One way to federate."""

    ranks: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    settings: Mapping[str, Any] | None = None  # of LEGEND's config; None plans all layers
    others: Literal["frozen", "disabled"] = "disabled"
    fast_alone: bool = False
    caps: tuple[int, ...] = ()  # ranks by class of speed
    aggregation: Mapping[str, Any] = field(default_factory=dict)


KNOWN = {"warmup": "prior"}  # speeds of the devices
METHODS = {"uniform": Method(ranks=(4,) * 6), "legend": Method(settings=KNOWN)}


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """One row for every seed, partition and method."""
    runs = [(method, partition) for method in METHODS for partition in PARTITIONS]
    yield from measured(seeds, quick, METHODS, runs)


def measured(
    seeds: Sequence[int],
    quick: bool,
    methods: Mapping[str, Method],
    runs: Sequence[tuple[str, str]],
) -> Iterator[Row]:
    """One row for every seed and (method, partition); the uniform method of a partition first."""
    sizes = QUICK if quick else Sizes()
    torch.set_num_threads(1)  # products this small gain nothing from two
    with tqdm(total=len(seeds) * len(runs) * sizes.rounds, unit="round", disable=None) as bar:
        for seed in seeds:
            world = make_world(seed, sizes)
            rivals: dict[str, Course] = {}
            for name, partition in runs:
                course = follow(world, partition, methods[name], bar.update)
                compared = course.compared(rivals.setdefault(partition, course))
                yield {"seed": seed, "partition": partition, "method": name, **compared}


@dataclass
class Course:
    """One federation by the simulated clock."""

    run: Run
    seconds: list[float]  # after each round
    waiting: list[float]

    def reached(self, target: float) -> int | None:
        """The first round with this accuracy."""
        return next((i for i, a in enumerate(self.run.accuracy) if a >= target), None)

    def traffic(self) -> list[int]:
        """Bytes up and down, after each round."""
        up, down = (self.run.comm.cumulative(name) for name in ("up", "down"))
        return [up[i] + down[i] for i in sorted(up)]

    def compared(self, rival: Course) -> Row:
        """The columns of a row."""
        target = TARGET * min(self.run.best, rival.run.best)
        mine, others = self.reached(target), rival.reached(target)
        assert mine is not None and others is not None  # neither target is above its own best
        return {
            "best": self.run.best,
            "speedup": rival.seconds[others] / self.seconds[mine],
            "saved": 1 - self.traffic()[mine] / rival.traffic()[others],
            "waiting": statistics.fmean(self.waiting),
            "waiting_uniform": statistics.fmean(rival.waiting),
            "seconds": self.seconds[-1],
            "bytes": self.traffic()[-1],
            "accuracies": " ".join(f"{a:.4f}" for a in self.run.accuracy),
            "times": " ".join(f"{s:.4g}" for s in self.seconds),
        }


def follow(world: World, partition: str, method: Method, tick: Any) -> Course:
    """Run one federation, every round timed by the speeds."""
    sizes = world.sizes
    speeds = {device: speed_of(device, sizes.clients) for device in range(sizes.clients)}
    model = world.adapted(method.ranks)
    state = LoraLayerManager(model).state_slice()
    clock = SimulatedClock(speeds, state, send_frozen=method.others == "frozen")
    allocator = allocator_of(world, method, state, speeds)
    seconds: list[float] = []
    waiting: list[float] = []

    def planner(round: int, clients: Sequence[int]) -> dict[int, LayerPlan]:
        if allocator is None:
            plans = {client: whole_plan(method, client, sizes) for client in clients}
        else:
            plans = allocator.plan_round(round, dict.fromkeys(clients, sizes.blocks))
            for client, plan in plans.items():
                allocator.tracker.update(clock.report(client, plan))
        waiting.append(clock.advance(plans).waiting)
        seconds.append(clock.seconds)
        return plans

    fastest = [device for device, speed in speeds.items() if speed == speeds[0]]
    run = federate(
        world,
        world.shares(partition),
        planner,
        clients=fastest if method.fast_alone else None,
        model=model,
        others=method.others,
        tick=tick,
        **method.aggregation,
    )
    return Course(run, seconds, waiting)


def speed_of(device: int, devices: int) -> Estimate:
    """The first third of the devices is fast, the last slow."""
    f, mu, beta = SPEEDS[len(SPEEDS) * device // devices]
    return Estimate(f, mu, beta / 1000)


def whole_plan(method: Method, device: int, sizes: Sizes) -> LayerPlan:
    """All layers, at the device's rank."""
    layers = tuple(range(sizes.blocks))
    if not method.caps:
        return LayerPlan(layers, method.ranks)
    return LayerPlan(
        layers, (method.caps[len(method.caps) * device // sizes.clients],) * len(layers)
    )


def allocator_of(
    world: World, method: Method, state: Mapping[str, Tensor], speeds: Mapping[int, Estimate]
) -> LegendAllocator | None:
    """LEGEND's server, where the method has one."""
    if method.settings is None:
        return None
    config = LegendConfig(**method.settings)
    weights = pattern_weights("bottleneck", world.sizes.blocks)

    def drawn(count: int, round: int, client: Client) -> tuple[int, ...]:
        return rgd_layers(weights, count, seed=world.seed, round=round, client=client)

    return LegendAllocator.of(
        config,
        state,
        draw=drawn if config.depth_as_count else None,
        prior=speeds if config.warmup == "prior" else None,
    )


# -------------------------------------------------------------------------------------------------
# Judging


def criteria(rows: Rows) -> list[Criterion]:
    """The specification's, of the IID partition."""
    speedup, saved = (middle(rows, name, "legend") for name in ("speedup", "saved"))
    waiting, uniform = (
        study.mean(rows, name, partition="iid", method="legend")
        for name in ("waiting", "waiting_uniform")
    )
    best, others = (middle(rows, "best", method) for method in ("legend", "uniform"))
    return [
        Criterion("IID: median speed-up to the target", ">= 1.5", f"{speedup:.2f}", speedup >= 1.5),
        Criterion("IID: median traffic saved up to it", ">= 25 %", f"{saved:.0%}", saved >= 0.25),
        Criterion(
            "IID: mean waiting time, of uniform LoRA's",
            "<= 0.4",
            f"{waiting / uniform:.2f} ({waiting:.2f} s of {uniform:.2f} s)",
            waiting <= 0.4 * uniform,
        ),
        Criterion(
            "IID: median best accuracy",
            f">= {others:.3f} - 0.05",
            f"{best:.3f}",
            best >= others - 0.05,
        ),
    ]


def middle(rows: Rows, column: str, method: str, partition: str = "iid") -> float:
    """The median over the seeds."""
    return statistics.median(
        row[column] for row in rows if (row["method"], row["partition"]) == (method, partition)
    )


def verdict(rows: Rows) -> Verdict:
    """Of the direction alone, and of both kinds of data."""
    holds = all(c.passed for c in criteria(rows))
    skewed = [middle(rows, "best", method, "3 classes") for method in GATE]
    return Verdict(
        f"IID: {middle(rows, 'speedup', 'legend'):.2f} times sooner at the target, "
        f"{middle(rows, 'saved', 'legend'):.0%} less traffic, best accuracy "
        f"{middle(rows, 'best', 'legend'):.3f} against {middle(rows, 'best', 'uniform'):.3f}. With "
        f"three classes a device {skewed[1]:.3f} against {skewed[0]:.3f}, at "
        f"{middle(rows, 'speedup', 'legend', '3 classes'):.2f} times the speed to the lower target",
        DIRECTION if holds else NOT_REPRODUCED,
    )


def show(rows: Rows) -> None:
    """Medians over the seeds, a table for each partition."""
    header = ("method", "best", "speed-up", "traffic saved", "waiting, s", "seconds", "MB")
    columns = ("best", "speedup", "saved", "waiting", "seconds", "bytes")
    seeds = len({row["seed"] for row in rows})
    for partition in dict.fromkeys(row["partition"] for row in rows):
        print(f"\n{partition}, median of {seeds} seeds")
        table = []
        for name in dict.fromkeys(r["method"] for r in rows if r["partition"] == partition):
            of = {column: middle(rows, column, name, partition) for column in columns}
            of["bytes"] /= 1e6
            forms = (".3f", ".2f", ".0%", ".2f", ".0f", ".2f")
            cells = [format(of[c], form) for c, form in zip(columns, forms, strict=True)]
            table.append((name, *cells))
        print(study.markdown(header, table))


def draw(rows: Rows, path: Path) -> None:
    """Accuracy over simulated seconds in every partition, a line for every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"uniform": "0.45", "legend": "#0072B2"}
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharey=True)
    for axis, partition in zip(axes, PARTITIONS, strict=True):
        for row in (row for row in rows if row["partition"] == partition):
            times, heights = (
                [float(x) for x in str(row[c]).split()] for c in ("times", "accuracies")
            )
            axis.plot(times, heights, color=colours[row["method"]], lw=0.9, alpha=0.8)
        axis.set(title=partition, xlabel="simulated seconds", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, every seed")
    for method, colour in colours.items():
        axes[0].plot([], [], color=colour, label=method)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
