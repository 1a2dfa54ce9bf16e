"""Compare Fed-HeLLo with strong clients alone: `python benchmarks/fed_hello.py`.

Of 36 clients, a third can train 3, a third 4 and a third all 6 blocks of a pretrained encoder
(claims/section_texts.py); six train per round. The last third, the strong clients, have texts of 10
of the 20 sections, so the other clients have data that the strong clients lack. In "strong only",
clients that can train all blocks do so in every round. "all clients, all layers" is what could be
reached without limits. Each of the three has its own learning rate, chosen on a separate seed.

`--full` adds the other patterns, importance, Dirichlet's partition, and strong clients that are
drawn as rarely as all others (the comparison in the authors' logs). It also adds baselines: those
of claims/peers.py on all clients and all layers, HetLoRA and FlexLoRA with ranks by capability, and
FedAvg with differential privacy (claims/private.py).
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import federated_digits
import numpy as np
import study
import torch
from claims import peers, private, section_texts
from federated_digits import Run, World, federate
from study import Claim, Criterion, Gate, Interval, Row, Rows
from torch import Tensor

from lora_ext.federated import LayerPlan, LoraLayerManager
from lora_ext.methods.fed_hello import HLA, Pattern, fim_scores
from lora_ext.nn import block_index

CLAIM = Claim(
    paper="Fed-HeLLo (arXiv 2506.12213)",
    claim="If clients can train different numbers of layers, training as many as possible on each "
    "is better than training on the strong clients alone, and the gain grows with label skew.",
    setup="MiniLM with a trained and averaged head, 20 sections of Debian's packages. 36 clients "
    "of 4 sections each can train 3, 4 or 6 of 6 blocks with LoRA of rank 8; the strong third "
    "has only 10 sections. 60 rounds of 6 clients, mean of the last ten. A second partition does "
    "not restrict strong clients.",
    headline="accuracy of RGD (bottleneck) minus that of the strong clients alone",
    use="labels are skewed, and the clients that can train every layer lack classes that only "
    "weaker clients have (the gain depends on the number of these classes)",
    avoid="data are IID, or the strong clients have every class",
    seeds=5,
    earlier="20 rounds, unrestricted, best of 20 readings: +0.044; by the last round -0.019 "
    "[-0.039, +0.005] (5 seeds, revision 1b90df0): direction only",
    gate="all arms learn, strong clients alone reach 10 to 90 % of the accuracy of all clients "
    "with all layers, and rates are inside the grid",
)
RESTRICTED, SKEWED, IID, UNEVEN = "restricted", "4 classes", "iid", "dirichlet 0.1"
OURS, STRONG, DRAWN = "RGD bottleneck", "strong only", "strong, drawn from all"
CEILING = "all clients, all layers"
CHOICES = (OURS, STRONG, CEILING)
RATES = study.Grid((3e-3, 1e-2, 3e-2), most=2)
ABSENT, EACH = 10, 4  # sections that strong clients lack; sections of each client
CHOOSING, GATE_SEED = study.TRIALS, study.TRIALS + 1
UNRESTRICTED_SEEDS = 3
FIM = {"FIM": 1.0, "FIM, mix 0.5": 0.5}  # share of importance in a layer's weight
PATTERNS = [f"RGD {pattern}" for pattern in Pattern]
RANKED = {"HetLoRA": "zero_pad", "FlexLoRA": "svd"}  # how ranks of 2, 5 and 8 are aggregated
PROXY = 100  # number of texts on the server, for FIM
LOSS = -0.01
CLIENTS, ROUNDS, CHOOSING_ROUNDS, LAST = 36, 60, 30, 10


def settings(quick: bool) -> Mapping[str, object]:
    return {
        "sizes": dataclasses.asdict(_sizes(quick)),
        "partition": (ABSENT, EACH, CHOOSING_ROUNDS, LAST, PROXY),
        "texts": section_texts.load(quick).hash,
    }


def trials(rows: Rows, quick: bool) -> Iterator[Row]:
    """Yield the runs that choose the learning rate of each way to train, then the runs that the
    gate judges."""
    for name in CHOICES:
        for rate in RATES.asked(errors(rows, name)):
            yield {"seed": CHOOSING, "partition": RESTRICTED, "arm": name, "rate": rate}
    for name in CHOICES:
        yield {"seed": GATE_SEED, "partition": RESTRICTED, "arm": name}


def errors(rows: Rows, arm: str) -> dict[float, float]:
    """Return the error rate on held-out texts for each learning rate that was tried."""
    own = [row for row in rows if (row["seed"], row["arm"]) == (CHOOSING, arm)]
    return {row["rate"]: 1 - row["last"] for row in own}


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield the arms that the criteria compare."""
    for seed in seeds:
        for partition in (RESTRICTED, SKEWED) if seed < UNRESTRICTED_SEEDS else (RESTRICTED,):
            for arm in (OURS, STRONG):
                yield {"seed": seed, "partition": partition, "arm": arm}


def minutes(arm: Row) -> float:
    return 2.5 if arm["seed"] == CHOOSING else 5.0


def more(seeds: Sequence[int], quick: bool) -> list[Row]:
    """Return the arms of ``--full``: all patterns, importance, baselines, and other partitions."""
    others = [*(name for name in PATTERNS if name != OURS), *FIM, DRAWN, *peers.NAMES, *RANKED]
    others.append(CEILING)
    iid, both = [*others, *private.NOISE], [OURS, STRONG, *others]
    return [
        {"seed": seed, "partition": partition, "arm": arm}
        for seed in seeds
        for partition, names in (
            (RESTRICTED, others),
            (SKEWED, others),
            (IID, [OURS, STRONG, *iid]),
            (UNEVEN, both),
        )
        for arm in names
    ]


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Run one federation with the arm's learning rate or, if the arm has none, with the chosen
    rate.

    The arms of ``more`` use the learning rate that was chosen for RGD.
    """
    torch.set_num_threads(1)
    name = arm["arm"]
    rate = arm.get("rate") or RATES.best(errors(rows, name if name in CHOICES else OURS))
    sizes = dataclasses.replace(_sizes(quick), lr=rate)
    if arm["seed"] == CHOOSING and not quick:
        sizes = dataclasses.replace(sizes, rounds=CHOOSING_ROUNDS)
    world = _world(arm["seed"], sizes, quick)
    restricted = arm["partition"] == RESTRICTED
    shares = (
        section_texts.shares_without(world, _strong(world), ABSENT, EACH)
        if restricted
        else world.shares(arm["partition"])
    )
    peer = peers.Peer(name, world) if name in peers.NAMES else None
    noise = private.NOISE.get(name)
    if noise is not None:
        run, hides = private.run(world, shares, noise), {"epsilon": private.epsilon(world, noise)}
    else:
        run, hides = peer.run(shares) if peer else one(world, shares, name), {}
    right = [run.right[run.accuracy.index(run.best)]] * len(shares)
    if peer and peer.own:  # At the end, each client has a different B.
        right = [peer.accuracy_of(client) for client in range(len(shares))]
    labels = world.training[1].numpy()
    strong = np.concatenate([shares[c] for c in _strong(world)])
    last = run.accuracy[-LAST:]
    yield {
        "rate": rate,
        "last": statistics.fmean(last),
        "noise": statistics.pstdev(last) / len(last) ** 0.5,
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
    """Return each client's accuracy per class, averaged over the classes of its own samples."""
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

    def tested(round: int) -> bool:  # Testing takes as long as training.
        return round > sizes.rounds - LAST or round % LAST == 0

    if arm in (STRONG, CEILING):
        clients = strong if arm == STRONG else None
        return federate(
            world,
            shares,
            lambda _, drawn: dict.fromkeys(drawn, whole),
            clients=clients,
            tested=tested,
        )
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
    return federate(world, shares, planner_of(hla, world), tested=tested)


def planner_of(hla: HLA, world: World) -> federated_digits.Planner:
    """Return a planner that plans as many layers for each client as the client can train."""
    return lambda round, drawn: {c: hla.plan(round, c, world.sizes.capability(c)) for c in drawn}


def by_importance(world: World, shares: Sequence[Any], mix: float) -> Run:
    """Train with layers chosen by the bottleneck pattern for a third of the rounds, then by
    importance.

    Importance is computed after each third of the rounds, on ``PROXY`` texts of the server, which
    no client has.
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


def gain(rows: Rows, partition: str, arm: str = OURS, rival: str = STRONG) -> Interval:
    """Return the gain in accuracy of ``arm`` over ``rival``, with its interval over the seeds. The
    accuracy is the mean over the last rounds."""
    found: dict[tuple[int, str], float] = {
        (row["seed"], row["arm"]): row["last"] for row in rows if row["partition"] == partition
    }
    seeds = sorted(seed for seed, name in found if name == arm and (seed, rival) in found)
    return study.interval([found[seed, arm] - found[seed, rival] for seed in seeds])


def gate(rows: Rows) -> list[Gate]:
    """Check that the arms learn, that there is room for a gain, and that the best learning rates
    are inside the grid."""
    own = [row for row in rows if row["seed"] == GATE_SEED]
    found = {name: study.mean(own, "last", arm=name) for name in CHOICES}
    above = {name: accuracy - 1 / section_texts.CLASSES for name, accuracy in found.items()}
    noise = max(study.column(own, "noise"))
    return [
        study.gate_above("least accuracy above chance", min(above.values()), 0.15),
        Gate(
            "the same, over the noise of a reading",
            "at least 10",
            f"{min(above.values()) / max(noise, 1e-9):.0f}",
            min(above.values()) >= 10 * noise,
        ),
        study.gate_between(
            "accuracy of strong clients alone over the ceiling",
            found[STRONG] / max(found[CEILING], 1e-9),
            0.1,
            0.9,
        ),
        Gate(
            "ceiling minus strong clients alone",
            "at least three times the noise",
            f"{found[CEILING] - found[STRONG]:+.3f}, noise {noise:.4f}",
            found[CEILING] - found[STRONG] >= 3 * noise,
        ),
        *(RATES.gate(errors(rows, name), name) for name in CHOICES),
    ]


def criteria(rows: Rows) -> list[Criterion]:
    """Check the gain if strong clients lack sections (the headline), the gain if they do not, and
    the bytes."""
    restricted, skewed = gain(rows, RESTRICTED), gain(rows, SKEWED)
    # All layers are sent down, so the bytes sent down equal those of an upload of all layers.
    share = study.mean(rows, "up", arm=OURS) / study.mean(rows, "down", arm=OURS)
    return [
        Criterion(
            f"gain of {OURS} over {STRONG}, strong clients lack {ABSENT} of 20 sections",
            "interval above 0",
            f"{restricted:+.3f}",
            restricted.low > 0,
            headline=True,
            points=restricted.middle > 0,
        ),
        Criterion(
            "the same gain, strong clients not restricted",
            f"at least {LOSS}",
            f"{skewed:+.3f}",
            skewed.middle >= LOSS,
        ),
        Criterion(
            "bytes uploaded, as a share of those for all layers of all clients",
            "at most 0.75",
            f"{share:.3f}",
            share <= 0.75,
        ),
    ]


def figure(rows: Rows) -> str:
    """Return a text with the gains and the accuracies."""
    ours, strong = (study.mean(rows, "last", partition=RESTRICTED, arm=a) for a in (OURS, STRONG))
    have = sorted(set(study.column(rows, "strong_have", partition=SKEWED)))
    return (
        f"gain over strong clients alone {gain(rows, RESTRICTED):+.3f} (accuracy {ours:.3f} "
        f"against {strong:.3f}) where they lack {ABSENT} of 20 sections, {gain(rows, SKEWED):+.3f} "
        f"where they have {have[0]} to {have[-1]}"
    )


def panels(rows: Rows) -> study.Panels:
    """Return the gain of every arm over strong clients alone."""
    own = [row for row in rows if row["seed"] < study.TRIALS]
    found: dict[str, dict[str, Interval]] = {}
    for partition in (RESTRICTED, SKEWED, IID, UNEVEN):
        names = {row["arm"] for row in own if row["partition"] == partition}
        if STRONG in names:
            title = f"{partition}: gain over strong clients alone"
            found[title] = {n: gain(own, partition, n) for n in sorted(names - {STRONG})}
    return found


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
