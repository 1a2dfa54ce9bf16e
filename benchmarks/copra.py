"""Compare CopRA with LoRA on the line between two adapters: `python benchmarks/copra.py`.

Two adapters that learned the same task from different samples are merged, and the error on the line
between them is measured. On a residual network of eight blocks that has learned a teacher, the task
is the same teacher with rotated inputs. On MiniLM (claims/section_texts.py), it is the sections of
Debian's packages, with a frozen head that was trained before. Schedules are LoRA, CopRA with the
ramp of the authors' code (from 0.1), and CoTo, its successor: from 0, and slow at first.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import study
import torch
from claims import section_texts
from federated_digits import World, right, trimmed
from study import Claim, Criterion, Interval, Row, Rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lora_ext
from lora_ext.adapter import LoraAdapter
from lora_ext.methods.copra import CopraConfig, CopraController, lmc_barrier

CLAIM = Claim(
    paper="CopRA: A Progressive LoRA Training Strategy (arXiv 2410.22911)",
    claim="Adapters trained with progressive random layer dropping are as good as LoRA's when used "
    "alone, are connected by a line of low error, and are better after merging and pruning. "
    "Training costs nothing extra.",
    setup="(1) A residual MLP of 8 blocks (width 48), pretrained on a teacher's labels. LoRA of "
    "rank 4 on each block's first matrix learns the teacher with rotated inputs: 1500 points, 1200 "
    "steps of batch 64. (2) MiniLM, its head trained first: rank 8 on queries and values, 20 "
    "sections, 80 steps of batch 16. Per seed, two adapters learn different samples; 11 points "
    "between them are tested.",
    headline="barrier",
    use="you will merge adapters in factors or prune them to some blocks, and LoRA's adapters "
    "become much worse by it, as on the small network here (measure this first)",
    avoid="LoRA's adapters do not become worse (on the pretrained encoder here, CopRA's merged "
    "adapters were 0.02 worse), or you use a single complete adapter, or merge weights "
    "(delta)",
    seeds=3,
    earlier="the network alone, without a criterion on the barrier (0.214; LoRA's was 0.327). "
    "Merged in factors +0.101, every other adapter pruned +0.126, alone -0.011, a step 0.85 of "
    "LoRA's time (3 seeds, revision d7d1598): reproduced. CoTo (ICML 2025) is the authors' "
    "successor",
)
WIDTH, HIDDEN, BLOCKS, INPUTS, CLASSES = 48, 192, 8, 16, 10
LORA, COPRA = "LoRA", "CopRA"
METHODS: dict[str, Mapping[str, Any]] = {
    LORA: {"p0": 1.0},
    COPRA: {},
    "CoTo, from 0": {"p0": 0.0},
    "CoTo, slow at first": {"p0": 0.0, "ramp": "exponential"},
}
NETWORK, MINILM = "network", "MiniLM"
SPACES, GRID = ("factors", "delta"), 11
POINTS = 6000, 1500, 3000  # to pretrain, to train adapters, to test
STEPS = {NETWORK: 1200, MINILM: 80}
PRETRAINING, HEAD_STEPS = 1500, 100


def settings(quick: bool) -> Mapping[str, object]:
    return {"methods": METHODS, "steps": STEPS, "texts": section_texts.load(quick).hash}


def arms(seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Yield the arms; each trains a pair of adapters with one schedule."""
    for seed in seeds:
        for task in (NETWORK, MINILM):
            for method in METHODS:
                yield {"seed": seed, "task": task, "method": method}


def measure(arm: Row, quick: bool, rows: Rows) -> Iterator[Row]:
    """Train two adapters; measure them alone, pruned, and on the line between them."""
    torch.set_num_threads(1)
    task = (network if arm["task"] == NETWORK else minilm)(arm["seed"], quick)
    steps = 4 if quick else STEPS[arm["task"]]
    found: list[LoraAdapter] = []
    alone: list[float] = []
    cut: list[float] = []
    for draw in (2 * arm["seed"], 2 * arm["seed"] + 1):
        torch.manual_seed(draw)
        model = task.adapted()
        config = CopraConfig(seed=draw, **METHODS[arm["method"]])
        controller = CopraController(model, config, steps)
        train(model.train(), controller, task, draw, steps)
        model.eval()
        alone.append(task.score(model))
        for start in (0, 1):
            kept = [i % 2 == start for i in range(len(controller.layers))]
            with controller.coalition(kept):
                cut.append(task.score(model))
        found.append(LoraAdapter.from_model(model))
    row: Row = {
        "alone": sum(alone) / 2,
        "pruned": sum(cut) / 4,
        "activation": controller.schedule.mean_activation(),
    }
    for space in SPACES:
        line = lmc_barrier(model, *found, lambda m: -task.score(m), 3 if quick else GRID, space)
        row |= {
            f"barrier_{space}": line.barrier,
            f"merged_{space}": -line.losses[len(line.losses) // 2],
        }
    yield row


class Task:
    """Task: training samples, a function that returns a model to train, and a score."""

    def __init__(
        self,
        adapted: Callable[[], Any],
        samples: tuple[Tensor, Tensor],
        score: Callable[[Any], float],
        batch: int,
        rate: float,
    ):
        self.adapted, self.samples, self.score = adapted, samples, score
        self.batch, self.rate = batch, rate


def train(model: Any, controller: CopraController, task: Task, draw: int, steps: int) -> None:
    """Run Adam on random samples; the controller draws a mask at every step."""
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=task.rate)
    generator = torch.Generator().manual_seed(draw)
    x, y = task.samples
    for step in range(steps):
        controller.step(step)
        chosen = torch.randint(len(x), (task.batch,), generator=generator)
        adam.zero_grad()
        cross_entropy(model(trimmed(x[chosen])), y[chosen]).backward()
        adam.step()


# -------------------------------------------------------------------------------------------------
# The network


class Network(nn.Module):
    """Network of residual blocks; the first matrix of each gets an adapter."""

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
        """Map ``(points, INPUTS)`` to ``(points, CLASSES)``."""
        h = self.first(x)
        for block in self.blocks:
            h = h + block["w2"](torch.tanh(block["w1"](block["norm"](h))))
        return self.last(h)


@functools.cache
def _pretrained(quick: bool) -> tuple[Network, list[tuple[Tensor, Tensor]]]:
    """Return the base of all seeds, and points to pretrain, to train adapters, and to test."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    t1, t2 = normal(INPUTS, 32), normal(32, CLASSES)
    turn = torch.linalg.qr(torch.eye(INPUTS) + 0.35 * normal(INPUTS, INPUTS)).Q
    points: list[tuple[Tensor, Tensor]] = []
    sizes = (200, 100, 100) if quick else POINTS
    for count, q in zip(sizes, (torch.eye(INPUTS), turn, turn), strict=True):
        x = normal(count, INPUTS)
        points.append((x, (torch.tanh(x @ q @ t1 / 2) @ t2).argmax(1)))
    torch.manual_seed(0)
    model, generator = Network(), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    x, y = points[0]
    for _ in range(4 if quick else PRETRAINING):
        chosen = torch.randint(len(x), (128,), generator=generator)
        adam.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        adam.step()
    return model, points


def network(seed: int, quick: bool) -> Task:
    """Return the task of the teacher with rotated inputs."""
    base, (_, adapting, testing) = _pretrained(quick)

    def adapted() -> Any:
        config = lora_ext.LoraConfig(r=4, lora_alpha=8, target_modules=["w1"])
        return lora_ext.nn.wrap(copy.deepcopy(base), config)

    return Task(adapted, adapting, lambda m: right(m, testing).float().mean().item(), 64, 5e-3)


# -------------------------------------------------------------------------------------------------
# MiniLM


@functools.lru_cache(1)
def _headed(seed: int, quick: bool) -> World:
    """Return MiniLM with a head that was trained on the sections, with the encoder frozen."""
    sizes = section_texts.QUICK if quick else section_texts.SIZES
    world = section_texts.make_world(seed, sizes, quick)
    base = copy.deepcopy(world.base)
    x, y = world.training
    states: list[Tensor] = []
    hook = base.head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        for part in x.split(100):
            base(trimmed(part))
    hook.remove()
    adam = torch.optim.Adam([p.requires_grad_() for p in base.head.parameters()], lr=1e-2)
    for _ in range(2 if quick else HEAD_STEPS):
        adam.zero_grad()
        cross_entropy(base.head(torch.cat(states)), y).backward()
        adam.step()
    base.requires_grad_(False)
    return World(seed, sizes, world.training, world.testing, base, world.targets)


def minilm(seed: int, quick: bool) -> Task:
    """Return the task of Debian's sections with a frozen head."""
    world = _headed(seed, quick)

    def score(model: Any) -> float:
        return right(model, world.testing).float().mean().item()

    return Task(world.adapted, world.training, score, 16, 3e-3)


# -------------------------------------------------------------------------------------------------
# Judging


def less(rows: Rows, task: str, column: str, method: str = COPRA, sign: int = 1) -> Interval:
    """Return a method's value minus LoRA's over the seeds, or the negative with ``sign=-1``."""
    of = {name: study.column(rows, column, task=task, method=name) for name in (LORA, method)}
    return study.interval([sign * (b - a) for a, b in zip(of[LORA], of[method], strict=True)])


def criteria(rows: Rows) -> list[Criterion]:
    """Check the barrier between two adapters, on both models."""
    found: list[Criterion] = []
    for task in (NETWORK, MINILM):
        gain = less(rows, task, "barrier_factors", sign=-1)
        found.append(
            Criterion(
                f"{task}: error barrier between factors, LoRA - CopRA",
                "interval above 0",
                f"{gain:+.3f}",
                gain.low > 0,
                headline=True,
                points=gain.middle > 0,
            )
        )
    for task in (NETWORK, MINILM):
        alone, merged = less(rows, task, "alone"), less(rows, task, "merged_factors")
        cut = less(rows, task, "pruned")
        for name, each, bound in (
            ("of one adapter", alone, -0.02),
            ("merged in factors", merged, 0.05),
            ("with every other block pruned", cut, 0.05),
        ):
            found.append(
                Criterion(
                    f"{task}: accuracy {name}, CopRA - LoRA",
                    f">= {bound}",
                    f"{each:+.3f}",
                    each.middle >= bound,
                )
            )
    return found


def figure(rows: Rows) -> str:
    """Format the barriers and the share of layers trained."""
    parts: list[str] = []
    for task in (NETWORK, MINILM):
        barriers = {
            method: study.mean(rows, "barrier_factors", task=task, method=method)
            for method in METHODS
        }
        each = ", ".join(f'"{method}" {barrier:.3f}' for method, barrier in barriers.items())
        gain = less(rows, task, "barrier_factors", sign=-1)
        parts.append(f"{task}, barrier of {each}; LoRA - CopRA {gain:+.3f}")
    active = study.mean(rows, "activation", method=COPRA)
    return f"{'. '.join(parts)}. CopRA trains {active:.0%} of the layers per step"


def panels(rows: Rows) -> study.Panels:
    columns = {
        "barrier_factors": "barrier in factors",
        "merged_factors": "merged",
        "alone": "alone",
    }
    return {
        f"{task}: {title}": {
            method: study.interval(study.column(rows, column, task=task, method=method))
            for method in METHODS
        }
        for task in (NETWORK, MINILM)
        for column, title in columns.items()
    }


if __name__ == "__main__":
    sys.exit(study.run(sys.modules[__name__]))
