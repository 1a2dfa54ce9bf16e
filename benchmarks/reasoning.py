"""Effective ranks of planning and of reasoning: `python benchmarks/reasoning.py --check`.

A transformer of four blocks learns short versions of both tasks, one id a hash, and is frozen.
Adapters of rank 2, 8 and 32 on the second MLP matrix of every block then learn each task. Reported
are accuracies, and the effective ranks that the updates have.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import study
import torch
from study import DIRECTION, NOT_REPRODUCED, REPRODUCED, Claim, Criterion, Row, Rows, Verdict
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lora_ext.methods.reasoning import (
    HashChain,
    HashHop,
    SweepPoint,
    SymbolModel,
    collate_symbols,
    rank_sweep,
    solve,
)

CLAIM = Claim(
    paper="Planning vs Reasoning: Ablations to Test Capabilities of LoRA layers (arXiv 2412.00029)",
    claim="What LoRA learns for a reasoning task has 2 to 3 times lower effective rank than what "
    "it learns for a planning task, and little rank is enough for most of the gain.",
    setup="A transformer of 4 blocks (width 64) over edges of one id a hash; 1000 steps on 1 and 2 "
    "hops and on chains of 2 and 3 hashes; then LoRA of rank 2, 8, 32 on the second MLP matrices, "
    "300 steps on up to 3 hops or on chains of 2 to 4.",
    seeds=3,
)
TASKS, RANKS, VOCAB, BATCH = ("planning", "reasoning"), (2, 8, 32), 32, 128
FIGURES = ("entropy", "threshold@0.1", "threshold@0.01")
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of the runs."""

    base_steps: int = 1000
    lora_steps: int = 300
    batch: int = BATCH
    held_out: int = 2000
    width: int = 64


QUICK = Sizes(2, 2, 8, 16, 8)


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Agreement with the solver, accuracy of the frozen base, and of adapters with their ranks."""
    sizes = QUICK if quick else Sizes()
    steps = len(seeds) * (sizes.base_steps + len(TASKS) * len(RANKS) * sizes.lora_steps)
    with tqdm(total=steps, desc="reasoning", unit="step", disable=None) as bar:
        for seed in seeds:
            yield from agreement(seed, sizes)
            torch.manual_seed(seed)
            base = SymbolModel(VOCAB, width=sizes.width)
            train(base, base_batches(seed, sizes), lr=1e-3, bar=bar)
            for name in TASKS:
                yield from adapt(base, name, seed, sizes, bar)


def agreement(seed: int, sizes: Sizes) -> Iterator[Row]:
    """How many answers of the generator its independent solver finds from the prompt alone."""
    hops = HashHop(sizes.held_out, chain_length=20, max_hops=10, seed=seed)
    chains = HashChain(sizes.held_out, chains=range(2, 9), num_chains=4, seed=seed)
    for name, task in zip(TASKS, (hops, chains), strict=True):
        agreed = sum(solve(instance) == instance.target for instance in task)
        yield {"seed": seed, "task": name, "part": "solver", "count": len(task), "agreed": agreed}


def base_batches(seed: int, sizes: Sizes) -> Iterator[Batch]:
    """A quarter of one hop, a half of one or two, a quarter of two chains of 2 and 3 hashes."""
    quarter, count = sizes.batch // 4, sizes.base_steps * sizes.batch
    parts = (
        (HashHop(count, 6, 1, seed=10 * seed), quarter),
        (HashHop(count, 6, 2, seed=10 * seed + 1), 2 * quarter),
        (HashChain(count, (2, 3), 2, seed=10 * seed + 2), quarter),
    )
    for step in range(sizes.base_steps):
        yield collate_symbols(
            [task[step * size + i] for task, size in parts for i in range(size)], VOCAB
        )


def lora_task(name: str, count: int, seed: int) -> HashHop | HashChain:
    """What adapters learn."""
    if name == "planning":
        return HashHop(count, chain_length=6, max_hops=3, seed=seed)
    return HashChain(count, chains=(2, 3, 4), num_chains=2, seed=seed)


@dataclass(frozen=True)
class Data:
    """Of one task and seed, the same for every rank."""

    batches: list[Batch]
    held_out: Batch


def adapt(base: SymbolModel, name: str, seed: int, sizes: Sizes, bar: Any) -> Iterator[Row]:
    """The frozen base's accuracy, and a row for each rank."""
    task = lora_task(name, sizes.lora_steps * sizes.batch, 10 * seed + 3)
    firsts = range(0, len(task), sizes.batch)
    held_out = list(lora_task(name, sizes.held_out, 10 * seed + 4))
    data = Data(
        [collate_symbols([task[i + j] for j in range(sizes.batch)], VOCAB) for i in firsts],
        collate_symbols(held_out, VOCAB),
    )

    def make_model() -> SymbolModel:
        torch.manual_seed(seed)  # of the adapter's first values
        return copy.deepcopy(base)

    def learn(model: SymbolModel, data: Data) -> None:
        train(model, data.batches, lr=3e-3, bar=bar)

    common = {"seed": seed, "task": name, "count": sizes.held_out}
    yield {**common, "part": "base", "accuracy": accuracy(base, data)}
    for point in rank_sweep(
        make_model,
        data,
        RANKS,
        train=learn,
        score=accuracy,
        kinds=("entropy", "threshold"),
        taus=(0.1, 0.01),
    ):
        yield {**common, "part": "lora", "accuracy": point.score, **figures(point)}


def figures(point: SweepPoint) -> Row:
    """Rank, mean effective ranks, and what each block has."""
    row: Row = {"rank": point.rank, **{name: point.mean(name) for name in FIGURES}}
    for block, module in enumerate(point.report):
        row |= {f"entropy_{block}": module["entropy"], f"fro_{block}": module["fro"]}
    return row


def train(model: SymbolModel, batches: Any, lr: float, bar: Any) -> None:
    """AdamW on what is not frozen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        loss = cross_entropy(model(**batch), batch["target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()


@torch.no_grad()
def accuracy(model: SymbolModel, data: Data) -> float:
    """On held-out instances."""
    answers = model(**data.held_out).argmax(1)
    return (answers == data.held_out["target"]).float().mean().item()


# -------------------------------------------------------------------------------------------------
# What the rows say; means over the seeds


def lora(rows: Rows, task: str, rank: int, column: str = "accuracy") -> float:
    """A column of the adapters of a rank."""
    return study.mean(rows, column, part="lora", task=task, rank=rank)


def gain(rows: Rows, task: str) -> float:
    """Accuracy of the best rank over the frozen base."""
    best = max(lora(rows, task, rank) for rank in RANKS)
    return best - study.mean(rows, "accuracy", part="base", task=task)


def ratios(rows: Rows, rank: int) -> dict[str, float]:
    """Effective ranks of planning over those of reasoning; the paper has 2 to 3."""
    return {
        name: lora(rows, TASKS[0], rank, name) / lora(rows, TASKS[1], rank, name)
        for name in FIGURES
    }


def criteria(rows: Rows) -> list[Criterion]:
    """Solver, gains, little rank, low effective rank. The ratio of ranks is reported alone."""
    solved = [row for row in rows if row["part"] == "solver"]
    agreed, count = (sum(row[name] for row in solved) for name in ("agreed", "count"))
    gains = {task: gain(rows, task) for task in TASKS}
    more = {task: lora(rows, task, 32) - lora(rows, task, 8) for task in TASKS}
    entropies = {task: lora(rows, task, 32, "entropy") for task in TASKS}

    def words(found: dict[str, float]) -> str:
        return ", ".join(f"{task} {value:.3f}" for task, value in found.items())

    return [
        Criterion(
            "answers of the generator that the solver finds",
            f"all {count}",
            str(agreed),
            agreed == count,
        ),
        Criterion(
            "accuracy of the best rank over the frozen base",
            "at least 0.05 on each task",
            words(gains),
            min(gains.values()) >= 0.05,
        ),
        Criterion(
            "gain on reasoning over gain on planning",
            "above 0",
            f"{gains['reasoning'] - gains['planning']:.3f}",
            gains["reasoning"] > gains["planning"],
        ),
        Criterion(
            "accuracy of rank 32 over rank 8",
            "at most 0.15 on each task",
            words(more),
            max(more.values()) <= 0.15,
        ),
        Criterion(
            "mean entropy rank at rank 32",
            "below 16 on each task",
            words(entropies),
            max(entropies.values()) < 16,
        ),
    ]


def verdict(rows: Rows) -> Verdict:
    """Reproduced where all ratios at rank 32 are at least 2, direction only where all exceed 1."""
    found = ratios(rows, 32)
    least = min(found.values())
    word = REPRODUCED if least >= 2 else DIRECTION if least > 1 else NOT_REPRODUCED
    gains = ", ".join(f"{task} by {gain(rows, task):.2f}" for task in TASKS)
    named = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    return Verdict(
        f"effective rank of planning over reasoning at rank 32: {named}; LoRA lifts {gains}", word
    )


def show(rows: Rows) -> None:
    """Accuracies and effective ranks of each task and rank."""
    header = ["task", "rank", "accuracy", *FIGURES, *(f"entropy, block {i}" for i in range(4))]
    lines: list[list[str]] = []
    for task in TASKS:
        base = study.mean(rows, "accuracy", part="base", task=task)
        lines.append([task, "frozen", f"{base:.3f}", *[""] * (len(header) - 3)])
        for rank in RANKS:
            columns = (*FIGURES, *(f"entropy_{i}" for i in range(4)))
            means = [f"{lora(rows, task, rank, column):.2f}" for column in columns]
            lines.append([task, str(rank), f"{lora(rows, task, rank):.3f}", *means])
    print(study.markdown(header, lines), end="\n\n")
    named = [[f"r = {r}", *(f"{value:.2f}" for value in ratios(rows, r).values())] for r in RANKS]
    print(study.markdown(["planning / reasoning", *FIGURES], named), end="\n\n")


def draw(rows: Rows, path: Path) -> None:
    """Accuracy by rank; maps of effective rank and of norm over rank and block."""
    from matplotlib.figure import Figure
    from number_map import draw_map

    figure = Figure(figsize=(10, 5), layout="constrained")
    blocks = range(4)
    values = {
        (task, name): [[lora(rows, task, r, f"{name}_{i}") for i in blocks] for r in RANKS]
        for task in TASKS
        for name in ("entropy", "fro")
    }
    for line, task in zip(figure.subplots(2, 3), TASKS, strict=True):
        base = study.mean(rows, "accuracy", part="base", task=task)
        line[0].axhline(base, color="0.5", linestyle="--", label="frozen base")
        for seed in sorted({row["seed"] for row in rows}):
            own = [row for row in rows if row["seed"] == seed]
            line[0].plot(RANKS, [lora(own, task, r) for r in RANKS], "o", color="#56B4E9", ms=3)
        line[0].plot(
            RANKS, [lora(rows, task, r) for r in RANKS], "o-", color="#0072B2", label="LoRA"
        )
        line[0].set(xlabel="rank r", ylabel="accuracy", title=task, ylim=(0, 1))
        line[0].set_xscale("log", base=2)
        line[0].set_xticks(RANKS, RANKS)
        line[0].spines[["top", "right"]].set_visible(False)
        line[0].legend(frameon=False, fontsize=8, loc="lower right")
        names = (("entropy", "entropy rank"), ("fro", "norm of the update"))
        for axis, (name, title) in zip(line[1:], names, strict=True):
            top = max(max(map(max, values[each, name])) for each in TASKS)  # one scale for both
            draw_map(axis, values[task, name], [f"r = {r}" for r in RANKS], list(blocks), top)
            axis.set(xlabel="block", title=f"{title}, {task}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
