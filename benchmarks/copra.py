"""CopRA against LoRA on a residual network of eight blocks: `python benchmarks/copra.py --check`.

A network learns the labels of a fixed teacher and is frozen. Adapters of rank 4 on the first matrix
of every block then learn the same teacher behind a rotation of its inputs, with LoRA and with
CopRA. Reported are their accuracies alone, merged with those of other seeds, and pruned, Shapley
values of the blocks, and what a training step costs. Last, sixteen coalitions of SmolLM2's layers
are evaluated one by one and many in a forward.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import study
import torch
from common import interleaved
from study import DIRECTION, NOT_REPRODUCED, REPRODUCED, Claim, Criterion, Row, Rows, Verdict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lora_ext
from lora_ext.adapter import LoraAdapter
from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods.copra import CopraConfig, CopraController, layer_shapley, lmc_barrier
from lora_ext.methods.copra.shapley import coalitions_at_once

CLAIM = Claim(
    paper="CopRA: A Progressive LoRA Training Strategy (arXiv 2410.22911)",
    claim="Adapters that are trained with progressive random layer dropping are as good as LoRA's "
    "alone, and better after merging and after pruning, at no additional cost of training.",
    setup="A residual MLP of 8 blocks (width 48) pretrained on the labels of a teacher; LoRA of "
    "rank 4 on each block's first matrix learns the teacher behind a rotation of its inputs, 1500 "
    "points, 1200 steps of 64; 3000 points to test.",
    seeds=3,
)
WIDTH, HIDDEN, BLOCKS, INPUTS, CLASSES = 48, 192, 8, 16, 10
METHODS = {"LoRA": (1.0, 1.0), "CopRA": (0.1, 1.0)}  # p0 and p1
KINDS = ("ours", "peft", "from_peft")
KEPT = {
    "even": [i % 2 == 0 for i in range(BLOCKS)],
    "odd": [i % 2 == 1 for i in range(BLOCKS)],
    "upper": [i >= BLOCKS // 2 for i in range(BLOCKS)],
    "lower": [i < BLOCKS // 2 for i in range(BLOCKS)],
}
SPACES, GRID, CHUNK = ("factors", "delta"), 11, 20
SPACE_NAMES = {"factors": "factors", "delta": "weights"}
COALITIONS, SHAPES = 16, ((1, 16, 5), (8, 32, 2))  # sequences, tokens, rounds


@dataclass(frozen=True)
class Sizes:
    """Of the runs."""

    pretraining: int = 1500
    steps: int = 1200
    timed_steps: int = 400
    points: tuple[int, int, int] = (6000, 1500, 3000)  # to pretrain, to adapt, to test
    for_shapley: int = 500


QUICK = Sizes(20, 40, 20, (200, 100, 100), 20)


class Network(nn.Module):
    """Residual blocks; the first matrix of each gets an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    "w1": nn.Linear(WIDTH, HIDDEN),
                    "w2": nn.Linear(HIDDEN, WIDTH),
                }
            )
            for _ in range(BLOCKS)
        )
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """``(points, INPUTS)`` to ``(points, CLASSES)``."""
        h = self.first(x)
        for block in self.blocks:
            h = h + block["w2"](torch.tanh(block["w1"](block["norm"](h))))
        return self.last(h)


@dataclass(frozen=True)
class Task:
    """Points and their labels."""

    x: Tensor
    y: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Of random points."""
        chosen = torch.randint(len(self.x), (size,), generator=generator)
        return self.x[chosen], self.y[chosen]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Part of the points whose label the model finds."""
        return (model(self.x).argmax(1) == self.y).double().mean().item()


def tasks(sizes: Sizes) -> tuple[Task, Task, Task]:
    """To pretrain, to adapt, to test: the teacher, then the teacher behind a rotation."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    t1, t2 = normal(INPUTS, 32), normal(32, CLASSES)
    turn = torch.linalg.qr(torch.eye(INPUTS) + 0.35 * normal(INPUTS, INPUTS)).Q
    found = []
    for count, q in zip(sizes.points, (torch.eye(INPUTS), turn, turn), strict=True):
        x = normal(count, INPUTS)
        found.append(Task(x, (torch.tanh(x @ q @ t1 / 2) @ t2).argmax(1)))
    return found[0], found[1], found[2]


def measure(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Networks on one thread, as threads gain nothing at this size; then SmolLM2 on all."""
    sizes, threads = QUICK if quick else Sizes(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from networks(seeds, sizes)
    finally:
        torch.set_num_threads(threads)
    yield from coalitions(quick)


def networks(seeds: Sequence[int], sizes: Sizes) -> Iterator[Row]:
    """Accuracies by seed, merges by pair of seeds, and times by kind of layer."""
    pretraining, adapting, testing = tasks(sizes)
    steps = sizes.pretraining + 2 * (len(seeds) * sizes.steps + len(KINDS) * sizes.timed_steps)
    with tqdm(total=steps, desc="copra", unit="step", disable=None) as bar:
        base = pretrain(pretraining, sizes, bar)
        yield {
            "seed": 0,
            "part": "base",
            "pretrained": pretraining.accuracy(base),
            "single": testing.accuracy(base),
        }
        adapters: dict[tuple[str, int], LoraAdapter] = {}
        model, controller = adapted(base, "ours", "LoRA", 0, sizes.steps)
        for seed in seeds:
            runs = {m: adapted(base, "ours", m, seed, sizes.steps) for m in METHODS}
            costs = train(runs, adapting, seed, sizes.steps, bar)
            for method, (model, controller) in runs.items():
                adapters[method, seed] = LoraAdapter.from_model(model)
                yield {
                    "seed": seed,
                    "part": "seed",
                    "method": method,
                    **costs[method],
                    **scores(model, controller, testing, sizes),
                }
        for method in METHODS:
            for one, two in itertools.combinations(seeds, 2):
                pair = adapters[method, one], adapters[method, two]
                for space in SPACES:
                    yield {
                        "seed": f"{one}+{two}",
                        "part": "pair",
                        "method": method,
                        "space": space,
                        **line(model, *pair, testing, space),
                    }
        for kind in KINDS:
            runs = {m: adapted(base, kind, m, 0, sizes.timed_steps) for m in METHODS}
            costs = train(runs, adapting, 0, sizes.timed_steps, bar)
            for method in METHODS:
                yield {"seed": 0, "part": "step", "method": method, "kind": kind, **costs[method]}


def pretrain(task: Task, sizes: Sizes, bar: Any) -> Network:
    """The base, which is the same for all seeds."""
    torch.manual_seed(0)
    model, generator = Network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(sizes.pretraining):
        x, y = task.batch(128, generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        bar.update()
    return model


def adapted(
    base: Network, kind: str, method: str, seed: int, steps: int
) -> tuple[Any, CopraController]:
    """A copy with fresh adapters, and what switches them; LoRA's are all on at every step."""
    torch.manual_seed(seed)
    model, settings = copy.deepcopy(base), {"r": 4, "lora_alpha": 8, "target_modules": ["w1"]}
    if kind == "ours":
        model = lora_ext.nn.wrap(model, lora_ext.LoraConfig(**settings))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        model = lora_ext.from_peft(model) if kind == "from_peft" else model
    p0, p1 = METHODS[method]
    return model.train(), CopraController(model, CopraConfig(p0=p0, p1=p1, seed=seed), steps)


def train(runs: dict[str, Any], task: Task, seed: int, steps: int, bar: Any) -> dict[str, Row]:
    """Train models on the same batches, some steps of each at a time, so that a machine that slows
    down slows all; milliseconds a step of the process's own time, and the part of layers that
    were on."""
    optimizers = {
        name: torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for name, (model, _) in runs.items()
    }
    generators = {name: torch.Generator().manual_seed(seed) for name in runs}
    seconds, active = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0.0)
    for start in range(0, steps, CHUNK):
        for name, (model, controller) in runs.items():
            optimizer, began = optimizers[name], time.process_time()
            for step in range(start, min(start + CHUNK, steps)):
                active[name] += float(controller.step(step).float().mean())
                x, y = task.batch(64, generators[name])
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
                bar.update()
            seconds[name] += time.process_time() - began
    return {
        name: {
            "step_ms": 1e3 * seconds[name] / steps,
            "activation": active[name] / steps,
            "formula": controller.schedule.mean_activation(),
        }
        for name, (_, controller) in runs.items()
    }


def scores(model: Any, controller: CopraController, testing: Task, sizes: Sizes) -> Row:
    """Accuracy alone and pruned; Shapley values of the blocks, and how far their sum is off."""
    model.eval()
    row: Row = {"single": testing.accuracy(model)}
    for name, mask in KEPT.items():
        with controller.coalition(mask):
            row[name] = testing.accuracy(model)
    few = Task(testing.x[: sizes.for_shapley], testing.y[: sizes.for_shapley])
    found = layer_shapley(model, controller, few.accuracy, "exact")
    with controller.coalition([False] * BLOCKS):
        none = few.accuracy(model)
    phi = found.values.tolist()
    row["sum_error"] = abs(sum(phi) - (few.accuracy(model) - none))
    return row | {f"phi_{i}": value for i, value in enumerate(phi)}


def line(model: Any, first: LoraAdapter, second: LoraAdapter, testing: Task, space: Any) -> Row:
    """Accuracies along the line between two adapters, and the barrier of the error."""
    found = lmc_barrier(model, first, second, lambda m: -testing.accuracy(m), GRID, space)
    accuracies = {f"line_{i}": -loss for i, loss in enumerate(found.losses)}
    return {"merged": -found.losses[GRID // 2], "barrier": found.barrier, **accuracies}


# -------------------------------------------------------------------------------------------------
# Many coalitions in one forward


def coalitions(quick: bool) -> Iterator[Row]:
    """Sixteen coalitions one by one, and as many in a forward as ``layer_shapley`` takes; checked
    to agree, then timed in turns."""
    model = language_model(quick)
    lora_ext.nn.wrap(
        model,
        lora_ext.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    controller = CopraController(model, CopraConfig(), 1)
    generator = torch.Generator().manual_seed(0)
    groups = len(controller.layers)
    masks = torch.rand(COALITIONS, groups, generator=generator) < 0.5
    for sequences, tokens, rounds in SHAPES:
        shape = sequences, tokens
        ids = torch.randint(model.config.vocab_size, shape, generator=generator)
        at_once = coalitions_at_once(ids, COALITIONS)

        @torch.no_grad()
        def losses(ids: Tensor) -> Tensor:  # (rows,)
            logits = model(input_ids=ids, use_cache=False).logits
            # Row by row: a copy of all logits would be new memory, and cost as much as a block.
            return torch.stack(
                [cross_entropy(y[:-1], t[1:]) for y, t in zip(logits, ids, strict=True)]
            )

        def one_by_one(ids: Tensor = ids, losses: Any = losses) -> Tensor:
            found = []
            for mask in masks:
                with controller.coalition(mask):
                    found.append(losses(ids))
            return torch.cat(found)

        def together(ids: Tensor = ids, losses: Any = losses, at_once: int = at_once) -> Tensor:
            found = []
            for part in masks.split(at_once):
                with lora_ext.nn.coalitions(controller.layers, part, len(ids)):
                    found.append(losses(ids.repeat(len(part), 1)))
            return torch.cat(found)

        expected = one_by_one()
        error = ((together() - expected).abs() / expected.abs()).max().item()
        assert error <= 1e-5, f"coalitions in one forward are off by {error}"
        calls = {"one_by_one": one_by_one, "together": together}
        times = interleaved(calls, 1 if quick else rounds, warm_up=0)
        yield {
            "seed": 0,
            "part": "coalitions",
            "sequences": sequences,
            "tokens": tokens,
            "one_by_one_ms": 1e3 * times["one_by_one"].median,
            "together_ms": 1e3 * times["together"].median,
            "speedup": times["one_by_one"].over(times["together"]),
            "error": error,
        }


def language_model(quick: bool) -> Any:
    """SmolLM2-135M, or one that is as large as a test needs."""
    if not quick:
        return load_smollm2()[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "vocab_size": 99}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


# -------------------------------------------------------------------------------------------------
# What the rows say; means over the seeds


def of(rows: Rows, method: str, column: str) -> float:
    """A column of the runs of a method."""
    return study.mean(rows, column, part="seed", method=method)


def merged(rows: Rows, method: str, space: str) -> float:
    """Accuracy half way between two seeds."""
    return study.mean(rows, "merged", part="pair", method=method, space=space)


def pruned(rows: Rows, method: str) -> float:
    """Mean accuracy with every other adapter."""
    return (of(rows, method, "even") + of(rows, method, "odd")) / 2


def criteria(rows: Rows) -> list[Criterion]:
    """Those of the specification."""
    paired = any(row["part"] == "pair" for row in rows)
    single = of(rows, "CopRA", "single") - of(rows, "LoRA", "single")
    cut = pruned(rows, "CopRA") - pruned(rows, "LoRA")
    off = abs(of(rows, "CopRA", "activation") - of(rows, "CopRA", "formula"))
    error = max(row["sum_error"] for row in rows if row["part"] == "seed")
    found = [
        Criterion("alone, CopRA - LoRA", ">= -0.02", f"{single:+.3f}", single >= -0.02),
        Criterion("every other adapter pruned", ">= 0.05", f"{cut:+.3f}", cut >= 0.05),
        Criterion("layers active, off the formula by", "<= 0.02", f"{off:.4f}", off <= 0.02),
        Criterion("Shapley values, sum off by", "<= 1e-9", f"{error:.1e}", error <= 1e-9),
    ]
    if paired:
        gain = merged(rows, "CopRA", "factors") - merged(rows, "LoRA", "factors")
        found.insert(
            1, Criterion("merged in factors, CopRA - LoRA", ">= 0.05", f"{gain:+.3f}", gain >= 0.05)
        )
    else:  # a single seed has no pairs
        found.insert(1, Criterion("merged in factors", ">= 0.05", "no pair of seeds", False))
    for kind in KINDS:
        ratio = step_ratio(rows, kind)
        name = f"time of a step over LoRA's, {kind}"
        found.append(Criterion(name, "<= 0.9", f"{ratio:.3f}", ratio <= 0.9))
    return found


def step_ratio(rows: Rows, kind: str) -> float:
    """Mean time of a step of CopRA's over LoRA's; ours over all runs, the others over their own."""
    times = {
        method: [
            row["step_ms"]
            for row in rows
            if row.get("method") == method and (row["kind"] or "ours") == kind and row["step_ms"]
        ]
        for method in METHODS
    }
    return sum(times["CopRA"]) / sum(times["LoRA"])


def verdict(rows: Rows) -> Verdict:
    """Every criterion, or at least gains from merging in factors and from pruning."""
    gains = {
        "alone": of(rows, "CopRA", "single") - of(rows, "LoRA", "single"),
        "every other adapter pruned": pruned(rows, "CopRA") - pruned(rows, "LoRA"),
    }
    if any(row["part"] == "pair" for row in rows):
        for space in SPACES:
            gain = merged(rows, "CopRA", space) - merged(rows, "LoRA", space)
            gains[f"merged in {SPACE_NAMES[space]}"] = gain
    figure = ", ".join(f"{name} {gain:+.3f}" for name, gain in gains.items())
    times = ", ".join(f"{step_ratio(rows, kind):.2f} ({kind})" for kind in KINDS)
    better = [gains["every other adapter pruned"] > 0, gains.get("merged in factors", 0) > 0]
    word = DIRECTION if all(better) else NOT_REPRODUCED
    if all(criterion.passed for criterion in criteria(rows)):
        word = REPRODUCED
    return Verdict(f"accuracy of CopRA over LoRA: {figure}; time of a step {times}", word)


def show(rows: Rows) -> None:
    """The table of accuracies, Shapley values, and coalitions in one forward."""
    base = next(row for row in rows if row["part"] == "base")
    print(f"base: {base['pretrained']:.3f} where it was trained, {base['single']:.3f} on the task")
    paired = any(row["part"] == "pair" for row in rows)
    columns = ("single", *KEPT)
    lines = []
    for method in METHODS:
        merges = [merged(rows, method, s) if paired else float("nan") for s in SPACES]
        values = [of(rows, method, c) for c in columns]
        step = of(rows, method, "step_ms")
        lines.append([method, *(f"{v:.3f}" for v in (*values, *merges)), f"{step:.2f}"])
    header = ("method", "alone", *(f"keep {k}" for k in KEPT), "merged, factors", "merged, delta")
    print(study.markdown((*header, "ms a step"), lines) + "\n")
    phi = [
        (method, *(f"{of(rows, method, f'phi_{i}'):.3f}" for i in range(BLOCKS)))
        for method in METHODS
    ]
    print(study.markdown(("Shapley value", *map(str, range(BLOCKS))), phi) + "\n")
    timed = [
        (
            f"{row['sequences']} x {row['tokens']}",
            f"{row['one_by_one_ms']:.0f}",
            f"{row['together_ms']:.0f}",
            f"{row['speedup']:.2f}",
        )
        for row in rows
        if row["part"] == "coalitions"
    ]
    header = (f"{COALITIONS} coalitions", "one by one, ms", "together, ms", "x faster")
    print(study.markdown(header, timed) + "\n")


def draw(rows: Rows, path: Path) -> None:
    """Shapley values of the blocks, accuracies along the lines, accuracies pruned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"LoRA": "#E69F00", "CopRA": "#0072B2"}
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    kept = ("single", *KEPT)
    for place, (method, color) in enumerate(colors.items()):
        bars: dict[str, Any] = {"width": 0.38, "color": color, "label": method}
        x = [i + 0.4 * place - 0.2 for i in range(BLOCKS)]
        axes[0].bar(x, [of(rows, method, f"phi_{i}") for i in range(BLOCKS)], **bars)
        for space, style in zip(SPACES, ("-", "--"), strict=True):
            pairs = [
                r
                for r in rows
                if r["part"] == "pair" and (r["method"], r["space"]) == (method, space)
            ]
            if pairs:
                mean = [sum(r[f"line_{i}"] for r in pairs) / len(pairs) for i in range(GRID)]
                grid = [i / (GRID - 1) for i in range(GRID)]
                axes[1].plot(grid, mean, style, color=color, label=f"{method}, {space}")
        x = [i + 0.4 * place - 0.2 for i in range(len(kept))]
        axes[2].bar(x, [of(rows, method, name) for name in kept], **bars)
    axes[0].set(xlabel="block", ylabel="Shapley value, accuracy", title="what a block is worth")
    axes[1].set(
        xlabel="lambda, from one seed to another", ylabel="accuracy", title="between two seeds"
    )
    axes[2].set_xticks(range(len(kept)), ["all", *KEPT])
    axes[2].set(xlabel="adapters kept", ylabel="accuracy", title="pruned")
    for axis in axes:
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
