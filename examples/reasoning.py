"""Train adapters for planning and for reasoning on one small model, and compare their ranks.

A transformer learns to follow short chains and is frozen. One adapter then learns to follow three
hops, and another to find the shorter of two chains. A monitor records the ranks of the updates. The
example takes two minutes on two cores, without GPU or network: `python examples/reasoning.py` if
`.[demo]` is installed. `--quick` takes seconds and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from number_map import draw_map
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lora_ext import nn
from lora_ext.methods import reasoning

OUT = Path(__file__).resolve().parents[1] / "out" / "reasoning"
VOCAB, BATCH = 32, 128
SHORT = [reasoning.HashHop(1 << 20, 6, 2, seed=1), reasoning.HashChain(1 << 20, (2, 3), 2, seed=2)]
TASKS = {
    "planning": reasoning.HashHop(1 << 20, 6, 3, seed=3),
    "reasoning": reasoning.HashChain(1 << 20, (2, 3, 4), 2, seed=4),
}


def train(model: Any, tasks: list[Any], steps: int, lr: float, label: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    share = BATCH // len(tasks)
    for step in (bar := tqdm(range(steps), desc=f"{label:>9}", unit="step")):
        places = range(step * share, (step + 1) * share)
        batch = reasoning.collate_symbols([task[i] for task in tasks for i in places], VOCAB)
        loss = cross_entropy(model(**batch), batch["target"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")


@torch.no_grad()
def accuracy(model: Any, task: Any) -> float:
    batch = reasoning.collate_symbols([task[-i] for i in range(1, 1001)], VOCAB)
    return (model(**batch).argmax(1) == batch["target"]).float().mean().item()


def draw_report(report: Any, figure: str, axes: Any, top: float) -> None:
    """Draw one figure of a report by block and module; modules outside blocks are left out."""
    places: dict[tuple[str, int], float] = {}
    for row in report:
        block, index = nn.block_name(row["module"]), nn.block_index(row["module"])
        if block is not None and index is not None:
            places[row["module"][len(block) + 1 :], index] = row[figure]
    modules = list(dict.fromkeys(module for module, _ in places))
    blocks = sorted({index for _, index in places})
    values = [[places.get((module, block), float("nan")) for block in blocks] for module in modules]
    draw_map(axes, values, modules, blocks, top)
    axes.set(xlabel="block", title=figure)


def draw(reports: dict[str, Any], histories: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(12, 6), layout="constrained")
    for line, (name, report) in zip(figure.subplots(len(reports), 3), reports.items(), strict=True):
        titles = {"entropy": "entropy rank", "fro": "norm of the update"}
        for axis, (column, title) in zip(line, titles.items(), strict=False):
            top = max(row[column] for each in reports.values() for row in each)  # the same scale
            draw_report(report, column, axis, top)
            axis.set_title(f"{title}, {name}")
        rows = histories[name]
        for i, module in enumerate(dict.fromkeys(row["module"] for row in rows)):
            own = [(r["step"], r["participation"]) for r in rows if r["module"] == module]
            line[2].plot(*zip(*own, strict=True), color=colormaps["cividis"](i / 16), linewidth=1)
        line[2].set(
            xlabel="step", ylabel="participation rank", title=f"each module, {name}", ylim=0
        )
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train both adapters, record their ranks, and draw the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(TASKS["reasoning"].text(0), end="\n\n")  # a question and its answer
    base = reasoning.SymbolModel(VOCAB)
    train(base, SHORT, 3 if args.quick else 900, 1e-3, "base")
    modules = reasoning.select_modules(base, ("c_attn", "c_proj", "c_fc"))  # of every block
    config = nn.LoraConfig(r=16, lora_alpha=8, target_modules=modules, init_lora_weights="gaussian")
    reports, histories = {}, {}
    for name, task in TASKS.items():
        model = nn.wrap(copy.deepcopy(base), config)
        with reasoning.RankMonitor(model, every=1 if args.quick else 10) as monitor:
            train(model, [task], 3 if args.quick else 300, 3e-3, name)
        reports[name], histories[name] = reasoning.rank_report(model), monitor.history
        mean = sum(row["entropy"] for row in reports[name]) / len(reports[name])
        scores = f"{accuracy(base, task):.3f} -> {accuracy(model, task):.3f}"
        print(f"{name}: accuracy {scores}; mean entropy rank {mean:.2f} of 16")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(reports, histories, args.out / "reasoning.png")
    print(f"picture: {args.out / 'reasoning.png'}")


if __name__ == "__main__":
    main()
