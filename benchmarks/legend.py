"""Compare LEGEND with four rivals on devices of unequal speed: `python benchmarks/legend.py`.

Twelve devices of three speeds train LoRA and a head on a pretrained encoder
(claims/section_texts.py), six per round. LEGEND gives each device a depth such that the devices of
a round finish together, with ranks that rise toward the output. Rivals are training all layers on
all devices (uniform), HetLoRA with ranks by speed, a deadline that slow devices miss, and the fast
devices alone. In the partition "unique", a third of the sections is on slow devices only. Seconds
are simulated.

`--full` adds LEGEND's depths with flat or falling ranks, and a diagnosis on digits
(federated_digits.py), in which all that must be learned is either at the input, far from LEGEND's
layers, or at the output.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import federated_digits
import study
import torch
from claims import section_texts
from federated_digits import Run, World, federate, shared_state
from study import Claim, Criterion, Gate, Interval, Row, Rows

from lora_ext.federated import Client, LayerPlan, LoraLayerManager
from lora_ext.methods.legend import (
    Estimate,
    LegendAllocator,
    LegendConfig,
    SimulatedClock,
    rank_distribution,
)

CLAIM = Claim(
    paper="Adaptive Parameter-Efficient Federated Fine-Tuning on Heterogeneous Devices "
    "(LEGEND, arXiv 2412.20004)",
    claim="Each device trains LoRA on as many layers near the output as fit into the time of the "
    "others, with rising ranks. This reaches the target accuracy 1.5 to 2.8 times sooner, with "
    "about 42 % less traffic, at comparable accuracy.",
    setup="MiniLM with a trained and averaged head, 20 sections of Debian's packages. 12 simulated "
    "devices of 3 speeds, 6 per round, 30 rounds. A third of the sections is on slow devices "
    "only. Rivals: uniform (rank 8 in all layers), HetLoRA, a deadline, the fast devices alone. "
    "Seconds are simulated.",
    headline="time to the target against the best rival, traffic and accuracy against uniform",
    use="devices differ in speed, rounds wait for the slowest, and the task can be learned near "
    "the output, such as a new task on a pretrained model with a trained head",
    avoid="the new data differ at the input (another script, another sensor), devices are equally "
    "fast, or the fast devices have all classes. The depths matter more than the shape of the "
    "ranks",
    seeds=5,
    earlier="against uniform only, IID: 3.0 times sooner, the ratio of the simulated rounds; the "
    "fast devices alone 3.3 times (5 seeds, revision 1b90df0): reproduced, against a weak rival",
    gate="uniform learns and reaches the target, the fast devices alone do not where slow devices "
    "have unique data, and rates are inside the grid",
)
# For each kind of device: seconds without a trained layer, per trained layer, and per 1000 bytes
# of its part of the adapter.
SPEEDS = ((1.0, 0.2, 0.004), (1.3, 0.5, 0.01), (1.8, 1.0, 0.02))
IID, UNIQUE = "iid", "unique"
ABSENT, EACH = 7, 5  # sections on slow devices only; sections of each device
TARGET = 0.9  # share of uniform's accuracy in the last rounds
ROUNDS, LAST, SMOOTH = 30, 5, 3  # readings are means of the last five, or of three rounds
RATES = study.Grid((3e-3, 1e-2, 3e-2), most=2)
CHOOSING, GATE_SEED, IID_SEEDS = study.TRIALS, study.TRIALS + 1, 3
RISING = rank_distribution(6, 48)
KNOWN = LegendConfig(warmup="prior")  # the speeds of the devices are known


@dataclass(frozen=True)
class Method:
    """Settings of a federation; if ``legend`` is None, devices train all layers.

    Attributes:
        speeds: Number of kinds of devices that take part, the fastest first.
        by_speed: Ranks of the kinds of devices, or empty.
        deadline: Whether all devices are drawn, but only those of ``speeds`` finish in time.
    """

    ranks: tuple[int, ...] = (8,) * 6
    legend: LegendConfig | None = None
    speeds: int = 3
    by_speed: tuple[int, ...] = ()
    deadline: bool = False


UNIFORM, LEGEND, FAST, HETLORA, DEADLINE = "uniform", "legend", "fast alone", "HetLoRA", "deadline"
RIVALS = (UNIFORM, HETLORA, DEADLINE, FAST)
METHODS = {
    UNIFORM: Method(),
    LEGEND: Method(RISING, KNOWN),
    "flat": Method((8,) * 6, KNOWN),
    "falling": Method(RISING[::-1], KNOWN),
    FAST: Method(speeds=1),
    HETLORA: Method(by_speed=(8, 5, 2)),
    DEADLINE: Method(speeds=2, deadline=True),
}
TOYS = ("digits, shift at the input", "digits, shift at the output")


def settings(quick: bool) -> Mapping[str, object]:
    sizes, found = dataclasses.asdict(_sizes(quick)), section_texts.load(quick).hash
    rules = (ABSENT, EACH, TARGET, LAST, SMOOTH, RATES.rates)
    return {"sizes": sizes, "speeds": SPEEDS, "rules": rules, "texts": found}


def trials(rows: Rows, quick: bool) -> Iterator[Row]:
    """Yield the runs that choose the learning rates of uniform and LEGEND, then the runs that the
    gate judges."""
    first = {"task": "sections", "partition": UNIQUE}
    for method in (UNIFORM, LEGEND):
        for rate in RATES.asked(errors(rows, method)):
            yield {"seed": CHOOSING, **first, "method": method, "rate": rate}
    for method in (UNIFORM, FAST):
        yield {"seed": GATE_SEED, **first, "method": method}


def errors(rows: Rows, method: str) -> dict[float, float]:
    """Return the error rate on held-out texts for each learning rate that was tried."""
    own = [row for row in rows if (row["seed"], row["method"]) == (CHOOSING, method)]
    return {row["rate"]: 1 - row["last"] for row in own}


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield the arms that the criteria compare."""
    for seed in seeds:
        for partition in (UNIQUE, IID) if seed < IID_SEEDS else (UNIQUE,):
            for method in (*RIVALS, LEGEND):
                yield {"seed": seed, "task": "sections", "partition": partition, "method": method}


def minutes(arm: Row) -> float:
    return 3.5


def more(seeds: Sequence[int], quick: bool) -> list[Row]:
    """Return the arms of ``--full``: LEGEND's depths with other ranks, and the diagnosis."""
    tasks = [("sections", part, name) for part in (IID, UNIQUE) for name in ("flat", "falling")]
    tasks += [(toy, IID, name) for toy in TOYS for name in (UNIFORM, LEGEND, "falling")]
    return [
        {"seed": seed, "task": task, "partition": partition, "method": name}
        for seed in seeds
        for task, partition, name in tasks
    ]


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Run one federation with the simulated clock; rivals use the learning rate of uniform."""
    torch.set_num_threads(1)
    method = METHODS[arm["method"]]
    rate = arm.get("rate") or RATES.best(errors(rows, LEGEND if method.legend else UNIFORM))
    world = _world(arm["seed"], arm["task"], dataclasses.replace(_sizes(quick), lr=rate), quick)
    run, seconds, waiting = follow(world, arm["partition"], method)
    up, down = (run.comm.cumulative(name) for name in ("up", "down"))
    yield {
        "rate": rate,
        "last": statistics.fmean(run.accuracy[-LAST:]),
        "noise": statistics.pstdev(run.accuracy[-LAST:]) / LAST**0.5,
        "waiting": statistics.fmean(waiting),
        "accuracies": " ".join(f"{a:.4f}" for a in run.accuracy),
        "times": " ".join(f"{s:.5g}" for s in seconds),
        "traffic": " ".join(str(up[i] + down[i]) for i in sorted(up)),
    }


def _sizes(quick: bool) -> federated_digits.Sizes:
    if quick:
        return section_texts.QUICK
    return dataclasses.replace(section_texts.SIZES, rounds=ROUNDS)


@functools.lru_cache(1)
def _world(seed: int, task: str, sizes: federated_digits.Sizes, quick: bool) -> World:
    if task == "sections":
        return section_texts.make_world(seed, sizes, quick)
    sizes = federated_digits.QUICK if quick else federated_digits.Sizes(rounds=15)
    shift = "input" if task == TOYS[0] else "output"
    return federated_digits.make_world(seed, dataclasses.replace(sizes, rank=8), shift)


def follow(world: World, partition: str, method: Method) -> tuple[Run, list[float], list[float]]:
    """Run one federation; return its results, and the simulated time and waiting time of every
    round."""
    sizes = world.sizes
    model = world.adapted(method.ranks)
    head = sum(tensor.nbytes for tensor in shared_state(world, model).values())
    devices = range(sizes.clients)
    speeds: dict[Client, Estimate] = {d: speed_of(d, sizes.clients, head) for d in devices}
    state = LoraLayerManager(model).state_slice()
    clock = SimulatedClock(speeds, state)
    allocator = method.legend and LegendAllocator.of(method.legend, state, prior=speeds)
    seconds: list[float] = []
    waiting: list[float] = []

    def kind(device: int) -> int:
        return len(SPEEDS) * device // sizes.clients

    def whole(device: int) -> LayerPlan:
        ranks = (method.by_speed[kind(device)],) * sizes.blocks if method.by_speed else method.ranks
        return LayerPlan(tuple(range(sizes.blocks)), ranks)

    def planner(round: int, clients: Sequence[int]) -> Any:
        if allocator is None:
            late = [c for c in clients if method.deadline and kind(c) >= method.speeds]
            plans: dict[Client, LayerPlan] = {c: whole(c) for c in clients if c not in late}
            if not plans:  # If all drawn devices are slow, the round waits for them.
                plans = {c: whole(c) for c in clients}
        else:
            plans = allocator.plan_round(round, dict.fromkeys(clients, sizes.blocks))
            for client, plan in plans.items():
                allocator.tracker.update(clock.report(client, plan))
        waiting.append(clock.advance(plans).waiting)
        seconds.append(clock.seconds)
        return plans

    alone = method.speeds < len(SPEEDS) and not method.deadline
    slow = [device for device in devices if kind(device) == len(SPEEDS) - 1]
    shares = (
        section_texts.shares_without(world, [d for d in devices if d not in slow], ABSENT, EACH)
        if partition == UNIQUE
        else world.shares(partition)
    )
    run = federate(
        world,
        shares,
        planner,
        clients=[d for d in devices if kind(d) < method.speeds] if alone else None,
        model=model,
        others="disabled",
    )
    return run, seconds, waiting


def speed_of(device: int, devices: int, head: int) -> Estimate:
    """Return the speed of a device. The first third of the devices is fast and the last third is
    slow. Each device also sends the head, which has ``head`` bytes."""
    f, mu, beta = SPEEDS[len(SPEEDS) * device // devices]
    return Estimate(f + beta / 1000 * head, mu, beta / 1000)


# -------------------------------------------------------------------------------------------------
# Judging


def of_seed(rows: Rows, partition: str) -> list[dict[str, Row]]:
    """Return the rows of each seed by method."""
    own = [r for r in rows if (r["task"], r["partition"]) == ("sections", partition)]
    own = [r for r in own if r.get("rate", "") != "" and r["seed"] != CHOOSING]
    seeds = sorted({row["seed"] for row in own})
    return [{r["method"]: r for r in own if r["seed"] == seed} for seed in seeds]


def at_target(runs: Mapping[str, Row], method: str, column: str) -> float:
    """Return the seconds or bytes at which a run reaches the target; infinite if it does not.

    The target is 90 % of uniform's accuracy in the last rounds, and the reading is the mean of
    three rounds.
    """
    target, row = TARGET * runs[UNIFORM]["last"], runs[method]
    found = curve(row, "accuracies")
    for place in range(SMOOTH - 1, len(found)):
        if statistics.fmean(found[place - SMOOTH + 1 : place + 1]) >= target:
            return curve(row, column)[place]
    return math.inf


def sooner(runs: Mapping[str, Row], rivals: Sequence[str] = RIVALS, method: str = LEGEND) -> float:
    """Return the time of the best rival divided by that of the method; 0 if the method misses the
    target."""
    own = at_target(runs, method, "times")
    best = min(at_target(runs, rival, "times") for rival in rivals)
    longest = max(curve(row, "times")[-1] for row in runs.values())
    return 0.0 if math.isinf(own) else min(best, longest) / own


def saved(runs: Mapping[str, Row], rival: str = UNIFORM) -> float:
    """Return the share of a rival's traffic that LEGEND saves, both counted up to the target
    accuracy."""
    own = at_target(runs, LEGEND, "traffic")
    of_rival = min(at_target(runs, rival, "traffic"), curve(runs[rival], "traffic")[-1])
    return -1.0 if math.isinf(own) else 1 - own / of_rival


def over(each: Sequence[Mapping[str, Row]], figure: Callable[[Mapping[str, Row]], float]) -> Any:
    """Return the mean of ``figure`` over the seeds, with its interval."""
    return study.interval([figure(runs) for runs in each])


def gain(runs: Mapping[str, Row], rival: str = UNIFORM) -> float:
    return runs[LEGEND]["last"] - runs[rival]["last"]


def gate(rows: Rows) -> list[Gate]:
    """Check that uniform learns, and that the fast devices alone miss the target."""
    (runs,) = of_seed(rows, UNIQUE)
    uniform, fast = runs[UNIFORM], runs[FAST]
    above = uniform["last"] - 1 / section_texts.CLASSES
    times = {name: at_target(runs, name, "times") for name in (UNIFORM, FAST)}
    return [
        study.gate_above("accuracy of uniform above chance", above, 0.15),
        Gate(
            "the same, over the noise of a reading",
            "at least 10",
            f"{above / max(uniform['noise'], 1e-9):.0f}",
            above >= 10 * uniform["noise"],
        ),
        Gate(
            "seconds until uniform reaches the target",
            "before the end",
            f"{times[UNIFORM]:.0f} of {curve(uniform, 'times')[-1]:.0f}",
            math.isfinite(times[UNIFORM]),
        ),
        Gate(
            "the fast devices alone, which lack a third of the sections",
            "miss the target",
            f"accuracy {fast['last']:.3f}, target {TARGET * uniform['last']:.3f}",
            math.isinf(times[FAST]),
        ),
        *(RATES.gate(errors(rows, name), name) for name in (UNIFORM, LEGEND)),
    ]


def criteria(rows: Rows) -> list[Criterion]:
    """Check LEGEND where slow devices have unique data (the headline), and on IID data."""
    found: list[Criterion] = []
    for partition in (UNIQUE, IID):
        head, each = partition == UNIQUE, of_seed(rows, partition)
        times, less, better = over(each, sooner), over(each, saved), over(each, gain)
        waiting = over(each, lambda runs: runs[LEGEND]["waiting"] / runs[UNIFORM]["waiting"])
        found += [
            Criterion(
                f"{partition}: time to the target, best rival / LEGEND",
                "interval above 1",
                f"{times:.2f}",
                times.low > 1,
                head,
                times.middle > 1,
            ),
            Criterion(
                f"{partition}: traffic saved until the target, against uniform",
                ">= 25 %",
                f"{less:.0%}",
                less.middle >= 0.25,
                head,
                less.middle > 0,
            ),
            Criterion(
                f"{partition}: accuracy in the last rounds, LEGEND - uniform",
                ">= -0.05",
                f"{better:+.3f}",
                better.middle >= -0.05,
                head,
            ),
            Criterion(
                f"{partition}: waiting time, LEGEND / uniform",
                "<= 0.4",
                f"{waiting:.2f}",
                waiting.middle <= 0.4,
            ),
        ]
    return found


def figure(rows: Rows) -> str:
    """Return a text with times, traffic and accuracies, with their intervals."""
    each = of_seed(rows, UNIQUE)
    rivals = ", ".join(
        f"{name} {over(each, lambda runs, name=name: sooner(runs, [name])):.2f}" for name in RIVALS
    )
    listed = ", ".join(
        f"{name} {study.mean(rows, 'last', partition=UNIQUE, method=name):.3f}"
        for name in (LEGEND, *RIVALS)
    )
    return (
        f"with unique data on slow devices, time of rivals over LEGEND's (at most the longest "
        f"run): {rivals}; {over(each, saved):.0%} less traffic than uniform; accuracy: {listed}. "
        f"IID: best rival {over(of_seed(rows, IID), sooner):.2f}"
    )


def panels(rows: Rows) -> study.Panels:
    """Return the rivals' times divided by LEGEND's, and LEGEND's accuracy minus that of each
    rival."""
    own = [row for row in rows if row["seed"] < study.TRIALS]
    found: dict[str, dict[str, Interval]] = {}
    for partition in (UNIQUE, IID):
        each = of_seed(own, partition)
        found[f"{partition}: time over LEGEND's"] = {
            name: over(each, lambda runs, name=name: sooner(runs, [name])) for name in RIVALS
        }
        found[f"{partition}: LEGEND's accuracy minus the rival's"] = {
            name: over(each, lambda runs, name=name: gain(runs, name)) for name in RIVALS
        }
    return found


def curve(row: Mapping[str, Any], column: str) -> list[float]:
    """Parse a column with one number per round."""
    return [float(number) for number in str(row[column]).split()]


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
