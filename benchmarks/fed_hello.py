"""Fed-HeLLo: who trains which layers, against strong clients alone. `--check` applies the criteria.

Twelve clients of scikit-learn's digits (federated_digits.py), of which a third each can train 3, 4
and 6 of the 6 layers. Strong clients alone: the four that can train all do so, in every round, and
the criteria are held against these. The authors' logs rather draw from all and let the others idle,
which is the weaker rival; it is measured beside. `--full` adds the other patterns, importance, and
what bounds them from below and above.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import study
import torch
from federated_digits import QUICK, Planner, Run, Sizes, World, federate, make_world
from federated_pictures import draw_accuracy, draw_bytes, draw_heights
from study import DIRECTION, NOT_REPRODUCED, REPRODUCED, Claim, Criterion, Row, Rows, Verdict
from torch import Tensor
from tqdm import tqdm

from lora_ext.federated import LayerPlan, LoraLayerManager
from lora_ext.methods.fed_hello import (
    HLA,
    Pattern,
    fim_scores,
    gd_layers,
)
from lora_ext.nn import block_index

CLAIM = Claim(
    paper="Fed-HeLLo (arXiv 2506.12213)",
    claim="Where clients can train different numbers of layers, giving each as many as it can "
    "beats training on the strong clients alone, the more so the more the labels are skewed.",
    setup="Scikit-learn's digits, a frozen transformer of 6 layers with LoRA of rank 4, 12 clients "
    "that can train 3, 4 or 6 layers, 6 of them a round, 30 rounds; RGD with the bottleneck "
    "pattern, with 3 classes a client and IID.",
    seeds=5,
)
SKEWED, IID = "3 classes", "iid"
OURS, STRONG, WHOLE = "RGD bottleneck", "strong only", "all train all"
DRAWN = "strong, drawn from all"
JUDGED = (OURS, STRONG, DRAWN)
FULL = (
    *JUDGED,
    *(f"{kind} {p}" for p in Pattern for kind in ("RGD", "GD") if f"{kind} {p}" != OURS),
    "FIM",
    "same 3 layers",
    WHOLE,
)
PROXY = 100  # pictures of the server's, with FIM
GAP, LOSS, SHARE = 0.08, -0.01, 0.75


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """What the criteria need."""
    yield from _measure(seeds, quick, JUDGED)


def measure_full(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """All patterns, importance, and what bounds them."""
    yield from _measure(seeds, quick, FULL)


def _measure(seeds: Sequence[int], quick: bool, arms: Sequence[str]) -> Iterator[Row]:
    """A row for each run; two run side by side, each on one thread, which is all that products
    this small make use of."""
    tasks = [(s, p, arm, quick) for s in seeds for p in (SKEWED, IID) for arm in arms]
    bar = functools.partial(tqdm, total=len(tasks), desc="fed_hello", unit="run", disable=None)
    torch.set_num_threads(1)
    if quick:
        yield from bar(map(run, tasks))
        return
    with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
        yield from bar(pool.imap(run, tasks))


def run(task: tuple[int, str, str, bool]) -> Row:
    """One federation."""
    seed, partition, arm, quick = task
    world = _world(seed, QUICK if quick else Sizes())
    found = one(world, partition, arm)
    return {
        "seed": seed,
        "partition": partition,
        "arm": arm,
        "best": found.best,
        "last": found.accuracy[-1],
        "up": found.comm.total("up"),
        "down": found.comm.total("down"),
        "curve": " ".join(f"{a:.4f}" for a in found.accuracy),
        "sent": " ".join(map(str, found.comm.cumulative("up").values())),
        "heights": " ".join("".join(map(str, log.heights)) for log in found.history),
    }


_world = functools.lru_cache(2)(make_world)


def one(world: World, partition: str, arm: str) -> Run:
    """The federation of an arm."""
    sizes, shares = world.sizes, world.shares(partition)
    every = tuple(range(sizes.blocks))
    strong = [c for c in range(sizes.clients) if sizes.capability(c) == sizes.blocks]
    if arm == STRONG:
        return federate(world, shares, lambda _, drawn: plans(drawn, every), clients=strong)
    if arm == "FIM":
        return by_importance(world, shares)
    fixed: dict[str, Planner] = {
        WHOLE: lambda _, drawn: plans(drawn, every),
        DRAWN: lambda _, drawn: plans([c for c in drawn if c in strong], every),
        "same 3 layers": lambda _, drawn: plans(
            drawn, gd_layers(Pattern.BOTTLENECK, sizes.blocks, 3)
        ),
    }
    if arm in fixed:
        return federate(world, shares, fixed[arm])
    kind, pattern = arm.split()
    hla = HLA(pattern, sizes.blocks, kind="gd" if kind == "GD" else "rgd", seed=world.seed)
    return federate(world, shares, planner_of(hla, world))


def plans(clients: Sequence[int], layers: tuple[int, ...]) -> dict[int, LayerPlan]:
    """The same layers for all."""
    return dict.fromkeys(clients, LayerPlan(layers))


def planner_of(hla: HLA, world: World) -> Planner:
    """As many layers for each client as it can train."""
    return lambda round, drawn: {c: hla.plan(round, c, world.sizes.capability(c)) for c in drawn}


def by_importance(world: World, shares: Sequence[np.ndarray]) -> Run:
    """The bottleneck for a third of the rounds, then importance, computed anew every ten rounds
    from pictures that the clients give up."""
    x, y = world.training
    proxy = np.random.default_rng(world.seed).permutation(len(y))[:PROXY]
    rest = [np.setdiff1d(share, proxy) for share in shares]
    tenth = max(1, world.sizes.rounds // 3)
    hla = HLA(
        Pattern.BOTTLENECK,
        world.sizes.blocks,
        kind="fim",
        seed=world.seed,
        prior_rounds=tenth,
        every=tenth,
    )
    manager = LoraLayerManager(world.adapted())

    def score(round: int, state: Mapping[str, Tensor]) -> None:
        if hla.wants_scores(round):
            manager.load_slice(state)
            layer_of: Callable[[str], int | None] = functools.partial(
                block_index, pattern=r"layers\.(\d+)\."
            )
            batches = [(x[proxy], y[proxy])]
            hla.update(round, fim_scores(manager.model, batches, layer_of, chunk=PROXY))

    return federate(world, rest, planner_of(hla, world), before=score)


# -------------------------------------------------------------------------------------------------
# Judging


def criteria(rows: Rows) -> list[Criterion]:
    """The specification's."""
    gains = _gains(rows, SKEWED)
    gain, even = sum(gains) / len(gains), _mean_gain(rows, IID)
    # All layers came down: as many bytes as the same clients would have sent up for all.
    share = study.mean(rows, "up", arm=OURS) / study.mean(rows, "down", arm=OURS)
    return [
        Criterion(
            f"{SKEWED} a client: mean best accuracy of {OURS} less that of {STRONG}",
            f"at least {GAP}",
            f"{gain:.3f}",
            gain >= GAP,
        ),
        Criterion(
            "the same, in every seed", "above 0", f"{min(gains):.3f} or more", min(gains) > 0
        ),
        Criterion("IID: the mean difference", f"at least {LOSS}", f"{even:.3f}", even >= LOSS),
        Criterion(
            "bytes up, of what all clients would send for all layers",
            f"at most {SHARE}",
            f"{share:.3f}",
            share <= SHARE,
        ),
    ]


def _gains(rows: Rows, partition: str, rival: str = STRONG) -> list[float]:
    """Of the best accuracy, by seed."""
    found = {
        (row["seed"], row["arm"]): row["best"] for row in rows if row["partition"] == partition
    }
    return [best - found[seed, rival] for (seed, arm), best in found.items() if arm == OURS]


def _mean_gain(rows: Rows, partition: str, rival: str = STRONG) -> float:
    gains = _gains(rows, partition, rival)
    return sum(gains) / len(gains)


def verdict(rows: Rows) -> Verdict:
    """The gain, and that it grows with the skew."""
    skewed, even = _mean_gain(rows, SKEWED), _mean_gain(rows, IID)
    met = all(c.passed for c in criteria(rows)) and skewed > even
    word = REPRODUCED if met else DIRECTION if skewed > max(even, 0) else NOT_REPRODUCED
    ours, strong = (study.mean(rows, "best", partition=SKEWED, arm=arm) for arm in JUDGED[:2])
    weaker = [_mean_gain(rows, partition, DRAWN) for partition in (SKEWED, IID)]
    return Verdict(
        f"With {SKEWED} a client the best accuracy is {ours:.3f}, with strong clients alone "
        f"{strong:.3f}: {skewed:+.3f}, between {min(_gains(rows, SKEWED)):+.3f} and "
        f"{max(_gains(rows, SKEWED)):+.3f} by seed; IID the difference is {even:+.3f}. "
        "Where strong clients are drawn as seldom as all others, it is "
        f"{weaker[0]:+.3f} and {weaker[1]:+.3f}",
        word,
    )


def show(rows: Rows) -> None:
    """Means over the seeds, by arm."""
    seeds = len({row["seed"] for row in rows})
    table: list[tuple[Any, ...]] = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells: list[str] = []
        for partition in (SKEWED, IID):
            own = [r for r in rows if r["arm"] == arm and r["partition"] == partition]
            best = [row["best"] for row in own]
            spread = f" ({min(best):.3f} to {max(best):.3f})"
            cells.append(f"{sum(best) / len(best):.3f}{spread}")
        mega = study.mean(rows, "up", arm=arm) / 1e6
        table.append((arm, *cells, f"{mega:.2f}"))
    print(f"\nbest accuracy, mean of {seeds} seeds (smallest to largest)")
    print(study.markdown(("who trains what", f"{SKEWED} a client", "IID", "MB up a run"), table))


def draw(rows: Rows, path: Path) -> None:
    """Accuracy and bytes over the rounds, means of the seeds; columns of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [a for a in (OURS, "FIM", "same 3 layers", STRONG, WHOLE) if _rows(rows, SKEWED, a)]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    for axis, partition in zip(axes[0], (SKEWED, IID), strict=True):
        draw_accuracy({arm: _mean_of(rows, partition, arm, "curve") for arm in arms}, axis)
        axis.set(title="IID" if partition == IID else f"{partition} a client")
    words = str(_rows(rows, SKEWED, OURS)[0]["heights"]).split()
    draw_heights([[int(height) for height in word] for word in words], axes[1, 0])
    axes[1, 0].set(title=f"{OURS}, seed {rows[0]['seed']}")
    draw_bytes({arm: _mean_of(rows, SKEWED, arm, "sent") for arm in arms}, axes[1, 1])
    axes[1, 1].set(title="bytes up")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _rows(rows: Rows, partition: str, arm: str) -> Rows:
    return [r for r in rows if r["partition"] == partition and r["arm"] == arm]


def _mean_of(rows: Rows, partition: str, arm: str, column: str) -> list[float]:
    """By round, over the seeds."""
    lines = [str(r[column]).split() for r in _rows(rows, partition, arm)]
    return [sum(map(float, values)) / len(values) for values in zip(*lines, strict=True)]


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
