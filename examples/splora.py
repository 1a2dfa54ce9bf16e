"""Prune an adapter that made a model forget to refuse, until the model refuses again.

SmolLM2 learns to refuse the requests of Do-Not-Answer. An adapter then learns lines about Debian's
packages, which removes the refusals (benchmarks/claims/alignment.py). SPLoRA scores and prunes the
adapter, once in its folder and once on the live model. The example takes five minutes on two cores:
`python examples/splora.py`, if the packages that benchmarks/claims/material.py names are installed.
`--quick` uses a tiny random model; it takes seconds and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from claims.alignment import Stage, figures, staged
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lora_ext.methods import splora
from lora_ext.methods.splora import SploraConfig, SploraResult
from lora_ext.nn import block_index, block_name

OUT = Path(__file__).resolve().parents[1] / "out" / "splora"
HOW = {"score": "angle", "projection": "orthogonal", "energy": 0.9, "direction": "largest"}
PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the adapter's modules
console = Console()
Curve = Mapping[int, Mapping[str, float]]  # by K: shares of refusals, and the loss on the task


def main() -> None:
    """Train, save and prune the adapter, and draw the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    console.print("training a copy of the model to refuse, then an adapter on a task ...")
    stage = staged(0, args.quick)
    stage.adapter.save(args.out / "adapter")
    half = SploraConfig(num=len(stage.adapter.modules) // 2, **HOW)
    result = splora.apply(args.out / "adapter", stage.base, stage.aligned, half, progress=tqdm)
    result.adapter.save(args.out / "pruned")
    console.print(str(result))
    show(result)
    curve = by_count(stage)
    console.print(f"picture: {draw(result, curve, args.out / 'splora.png')}", soft_wrap=True)


def show(result: SploraResult) -> None:
    """Print one row per layer."""
    table = Table("layer", "distance", "norm", "cosine", "score", "", title="the adapter's layers")
    for layer in result.stats:
        numbers = (f"{x:.3f}" for x in (layer.dist, layer.norm, layer.cos, layer.score))
        table.add_row(
            layer.name.removeprefix("model.layers."),
            *numbers,
            "pruned" if layer.name in result.pruned else "",
        )
    console.print(table)


def by_count(stage: Stage) -> Curve:
    """Return refusal rates and task loss of the live model for each number K of pruned modules."""
    counts = sorted({round(part * len(stage.adapter.modules)) for part in PARTS})
    found = {}
    for k in tqdm(counts, desc="prune the live model", unit="K"):
        splora.apply_to(stage.tuned, stage.base, stage.aligned, SploraConfig(num=k, **HOW))
        found[k] = figures(stage.tuned, stage, over=True)
        splora.remove(stage.tuned)
    return found


def draw(result: SploraResult, curve: Curve, path: Path) -> Path:
    """Draw the scores by block and module, and refusals and task loss against K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 5), layout="constrained")
    draw_scores(result, left)
    shares = {"refusals": "refuses harmful requests", "over": "refuses harmless questions"}
    for (name, label), colour in zip(shares.items(), ("#0072B2", "#009E73"), strict=True):
        values = [found[name] for found in curve.values()]
        right.plot(list(curve), values, "o-", color=colour, label=label)
    right.set(xlabel="modules pruned, K", ylabel="share", ylim=(-0.03, 1.03))
    task = right.twinx()
    losses = [found["loss"] for found in curve.values()]
    task.plot(list(curve), losses, "s--", color="#D55E00", label="loss on the task")
    task.set_ylabel("loss on the task, nats per token", color="#D55E00")
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in (right, task):
        axes.spines["top"].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def draw_scores(result: SploraResult, axes: Any) -> None:
    """Draw the score of every layer inside a block as a colour; crosses mark pruned layers."""
    places = {}
    for layer in result.stats:
        block, index = block_name(layer.name), block_index(layer.name)
        if block is not None and index is not None:
            places[layer.name] = index, layer.name[len(block) + 1 :].rpartition(".")[2]
    rows = sorted({row for row, _ in places.values()})
    columns = list(dict.fromkeys(column for _, column in places.values()))
    values = [[float("nan")] * len(columns) for _ in rows]
    for layer in result.stats:
        if layer.name in places:
            row, column = places[layer.name]
            i, j = rows.index(row), columns.index(column)
            values[i][j] = layer.score
            if layer.name in result.pruned:
                axes.plot(j, i, "x", color="white", ms=11, mew=5)
                axes.plot(j, i, "x", color="black", ms=9, mew=2)
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    axes.figure.colorbar(image, ax=axes, label="E-DIEM score")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(ylabel="block", title=f"{result.direction} scores pruned (crosses)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
