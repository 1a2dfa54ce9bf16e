"""Compare Fed-HeLLo with strong clients alone: `python benchmarks/fed_hello.py`.

Of 36 clients, a third can train 3, a third 4 and a third all 6 blocks of a pretrained encoder
(claims/section_texts.py); six train per round. In "strong only", clients that can train all blocks
do so in every round. `--full` adds the other patterns, importance, Dirichlet's partition, and
strong clients drawn as rarely as all others, the comparison in the authors' logs. It also adds
baselines: those of claims/peers.py on all clients and all layers, HetLoRA and FlexLoRA with ranks
by capability, and FedAvg with differential privacy (claims/private.py).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import federated_digits
import numpy as np
import study
import torch
from claims import peers, private, section_texts
from federated_digits import Run, World, federate
from study import Claim, Criterion, Interval, Row, Rows
from torch import Tensor

from lora_ext.federated import LayerPlan, LoraLayerManager
from lora_ext.methods.fed_hello import HLA, Pattern, fim_scores
from lora_ext.nn import block_index

CLAIM = Claim(
    paper="Fed-HeLLo (arXiv 2506.12213)",
    claim="If clients can train different numbers of layers, training as many as possible on each "
    "is better than training on the strong clients alone, and the gain grows with label skew.",
    setup="MiniLM (6 blocks of 384) with a trained and averaged head, on 20 sections of Debian's "
    "packages. 36 clients can train 3, 4 or 6 blocks with LoRA of rank 8. 20 rounds of 6 clients "
    "with 3 steps of batch 8, at a rate chosen on another seed. RGD with the bottleneck pattern; "
    "4 classes per client, and IID.",
    headline="gain over strong clients",
    use="labels are skewed, and the clients that can train every layer lack classes that only "
    "weaker clients have (the gain depends on the number of these classes)",
    avoid="data are IID, or the strong clients have every class",
    seeds=5,
    earlier="digits, 12 clients of 3 classes each. The criterion was a gain in every seed, which "
    "tests the partition. +0.090 with 3 classes per client, between -0.033 and +0.181; IID -0.012 "
    "(5 seeds, revision 9d8c245): direction only",
)
SKEWED, IID, UNEVEN = "4 classes", "iid", "dirichlet 0.1"
OURS, STRONG, DRAWN = "RGD bottleneck", "strong only", "strong, drawn from all"
FIM = {"FIM": 1.0, "FIM, mix 0.5": 0.5}  # share of importance in a layer's weight
PATTERNS = [f"RGD {pattern}" for pattern in Pattern]
RANKED = {"HetLoRA": "zero_pad", "FlexLoRA": "svd"}  # how ranks of 2, 5 and 8 are aggregated
PROXY = 100  # number of texts on the server, for FIM
LOSS = -0.01
CLIENTS, ROUNDS = 36, 20  # With 10 rounds, tried in one arm, accuracy was only 0.17.


def settings(quick: bool) -> Mapping[str, object]:
    return {
        "sizes": dataclasses.asdict(_sizes(quick)),
        "proxy": PROXY,
        "texts": section_texts.load(quick).hash,
    }


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield the arms that choose the learning rate, then those that the criteria compare."""
    for rate in section_texts.RATES:
        yield {"seed": section_texts.CHOOSING, "partition": SKEWED, "arm": "FedAvg", "rate": rate}
    for seed in seeds:
        for partition in (SKEWED, IID):
            for arm in (OURS, STRONG):
                yield {"seed": seed, "partition": partition, "arm": arm}


def more(seeds: Sequence[int], quick: bool) -> list[Row]:
    """Return arms with all patterns, with importance, baselines, and a third kind of data."""
    others = [*(name for name in PATTERNS if name != OURS), *FIM, DRAWN, *peers.NAMES, *RANKED]
    iid = [*others, *private.NOISE]
    return [
        {"seed": seed, "partition": partition, "arm": arm}
        for seed in seeds
        for partition, names in ((SKEWED, others), (IID, iid), (UNEVEN, [OURS, STRONG, *others]))
        for arm in names
    ]


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Run one federation."""
    torch.set_num_threads(1)
    world = _world(arm["seed"], section_texts.sizes_of(arm, rows, _sizes(quick)), quick)
    shares = world.shares(arm["partition"])
    peer = peers.Peer(arm["arm"], world) if arm["arm"] in peers.NAMES else None
    noise = private.NOISE.get(arm["arm"])
    if noise is not None:
        run, hides = private.run(world, shares, noise), {"epsilon": private.epsilon(world, noise)}
    else:
        run, hides = peer.run(shares) if peer else one(world, shares, arm["arm"]), {}
    right = [run.right[run.accuracy.index(run.best)]] * len(shares)
    if peer and peer.own:  # At the end, each client has a different B.
        right = [peer.accuracy_of(client) for client in range(len(shares))]
    labels = world.training[1].numpy()
    strong = np.concatenate([shares[c] for c in _strong(world)])
    yield {
        "best": run.best,
        "last": run.accuracy[-1],
        "up": run.comm.total("up"),
        "down": run.comm.total("down"),
        "strong_have": len(set(labels[strong])),
        "accuracies": " ".join(f"{a:.4f}" for a in run.accuracy),
        "devices": " ".join(f"{a:.4f}" for a in by_device(world, shares, right)),
        **hides,
    }


def _sizes(quick: bool) -> federated_digits.Sizes:
    if quick:
        return dataclasses.replace(section_texts.QUICK, clients=CLIENTS)
    return dataclasses.replace(section_texts.SIZES, clients=CLIENTS, rounds=ROUNDS)


@functools.lru_cache(1)
def _world(seed: int, sizes: federated_digits.Sizes, quick: bool) -> World:
    return section_texts.make_world(seed, sizes, quick)


def _strong(world: World) -> list[int]:
    sizes = world.sizes
    return [c for c in range(sizes.clients) if sizes.capability(c) == sizes.blocks]


def by_device(world: World, shares: Sequence[Any], right: Sequence[Tensor]) -> list[float]:
    """Return each client's accuracy with its model, weighted by the client's classes."""
    labels, test = world.training[1].numpy(), world.testing[1].numpy()
    found: list[float] = []
    for share, each in zip(shares, right, strict=True):
        of_class = [each.numpy()[test == c].mean() for c in range(section_texts.CLASSES)]
        found.append(float(np.array(of_class)[labels[share]].mean()))
    return found


def one(world: World, shares: Sequence[Any], arm: str) -> Run:
    """Run the federation of an arm."""
    sizes, strong = world.sizes, _strong(world)
    whole = LayerPlan(tuple(range(sizes.blocks)))
    if arm == STRONG:
        return federate(world, shares, lambda _, drawn: dict.fromkeys(drawn, whole), clients=strong)
    if arm == DRAWN:
        return federate(world, shares, lambda _, drawn: {c: whole for c in drawn if c in strong})
    if arm in RANKED:
        full = sizes.rank

        def ranked(round: int, drawn: Sequence[int]) -> dict[int, LayerPlan]:
            ranks = {c: full * (1 + c % 3) // 3 for c in drawn}
            return {c: LayerPlan(whole.layers, (r,) * sizes.blocks) for c, r in ranks.items()}

        more: dict[str, Any] = {"scaling": sizes.scaling} if arm == "FlexLoRA" else {}
        return federate(world, shares, ranked, rank_agg=RANKED[arm], **more)
    if arm in FIM:
        return by_importance(world, shares, FIM[arm])
    hla = HLA(arm.removeprefix("RGD "), sizes.blocks, kind="rgd", seed=world.seed)
    return federate(world, shares, planner_of(hla, world))


def planner_of(hla: HLA, world: World) -> federated_digits.Planner:
    """Plan as many layers for each client as it can train."""
    return lambda round, drawn: {c: hla.plan(round, c, world.sizes.capability(c)) for c in drawn}


def by_importance(world: World, shares: Sequence[Any], mix: float) -> Run:
    """Run the bottleneck pattern for a third of the rounds, then importance.

    Importance is recomputed after every third, from texts that are taken from the clients.
    """
    x, y = world.training
    proxy = np.random.default_rng(world.seed).permutation(len(y))[:PROXY]
    rest = [np.setdiff1d(share, proxy) for share in shares]
    third = max(1, world.sizes.rounds // 3)
    hla = HLA(
        Pattern.BOTTLENECK,
        world.sizes.blocks,
        kind="fim",
        seed=world.seed,
        prior_rounds=third,
        every=third,
        mix=mix,
    )
    manager = LoraLayerManager(world.adapted())

    def score(round: int, state: Mapping[str, Tensor]) -> None:
        if hla.wants_scores(round):
            manager.load_slice({name: state[name] for name in manager.state_slice()})
            layer_of: Callable[[str], int | None] = functools.partial(
                block_index, pattern=r"layers\.(\d+)\."
            )
            batches = [(x[proxy], y[proxy])]
            hla.update(round, fim_scores(manager.model, batches, layer_of, chunk=PROXY))

    return federate(world, rest, planner_of(hla, world), before=score)


# -------------------------------------------------------------------------------------------------
# Judging


def judged(rows: Rows) -> Rows:
    """Return the rows without those of the arms that choose the rate."""
    return [row for row in rows if row["seed"] != section_texts.CHOOSING]


def gain(rows: Rows, partition: str, arm: str = OURS, rival: str = STRONG) -> Interval:
    """Return the mean gain in accuracy over a rival, for seeds and devices, with its interval."""
    found: dict[tuple[int, str], list[float]] = {
        (row["seed"], row["arm"]): [float(a) for a in str(row["devices"]).split()]
        for row in judged(rows)
        if row["partition"] == partition
    }
    seeds = sorted({seed for seed, name in found if name == arm})
    return study.interval(
        [
            [a - b for a, b in zip(found[seed, arm], found[seed, rival], strict=True)]
            for seed in seeds
        ]
    )


def criteria(rows: Rows) -> list[Criterion]:
    """Check the gain on skewed labels (the headline), the gain on IID data, and the bytes."""
    skewed, even = gain(rows, SKEWED), gain(rows, IID)
    # All layers are sent down, so these bytes equal those of uploading all layers.
    share = study.mean(rows, "up", arm=OURS) / study.mean(rows, "down", arm=OURS)
    return [
        Criterion(
            f"gain over strong clients, {SKEWED} per client: best accuracy of "
            f"{OURS} minus that of {STRONG}, mean over seeds and clients",
            "interval above 0",
            f"{skewed:+.3f}",
            skewed.low > 0,
            headline=True,
            points=skewed.middle > 0,
        ),
        Criterion("the same gain, IID", f"at least {LOSS}", f"{even:+.3f}", even.middle >= LOSS),
        Criterion(
            "bytes uploaded, as a share of those for all layers of all clients",
            "at most 0.75",
            f"{share:.3f}",
            share <= 0.75,
        ),
    ]


def figure(rows: Rows) -> str:
    """Format the gain, and that of each seed with the number of strong clients' classes."""
    skewed = [row for row in judged(rows) if row["partition"] == SKEWED]
    best = {(row["seed"], row["arm"]): row for row in skewed}
    each = [
        f"{best[seed, OURS]['best'] - best[seed, STRONG]['best']:+.3f} "
        f"({best[seed, STRONG]['strong_have']})"
        for seed in sorted({row["seed"] for row in skewed})
    ]
    ours, strong = (study.mean(skewed, "best", arm=arm) for arm in (OURS, STRONG))
    return (
        f"gain over strong clients alone: {gain(rows, SKEWED):+.3f} with {SKEWED} per client (best "
        f"accuracy {ours:.3f} against {strong:.3f}), {gain(rows, IID):+.3f} for IID; by seed "
        f"(strong clients' number of the {section_texts.CLASSES} classes): {', '.join(each)}"
    )


def panels(rows: Rows) -> study.Panels:
    """Return the gain of every arm over strong clients alone."""
    found: dict[str, dict[str, Interval]] = {}
    for partition in (SKEWED, IID, UNEVEN):
        names = {row["arm"] for row in judged(rows) if row["partition"] == partition}
        if STRONG in names:
            title = f"{partition}: gain over strong clients alone"
            found[title] = {n: gain(rows, partition, n) for n in sorted(names - {STRONG})}
    return found


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
