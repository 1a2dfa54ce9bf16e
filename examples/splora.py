"""An adapter that taught a model to comply is pruned until the model refuses again.

A toy language model learns to refuse; an adapter then takes that away (benchmarks/splora_toy.py).
SPLoRA scores and prunes the adapter from folders, and on the live model. Two minutes on two cores:
`python examples/splora.py`, or `--quick` for seconds that show only that it works.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from rich.console import Console
from rich.table import Table
from splora_toy import QUICK, Figures, Sizes, Toy, figures, train_toy
from tqdm import tqdm

from lora_ext.adapter import LoraAdapter
from lora_ext.methods import splora
from lora_ext.methods.splora import SploraConfig, SploraResult
from lora_ext.nn import block_index, block_name

OUT = Path(__file__).resolve().parents[1] / "out" / "splora"
LINES = (
    ("refusal", "#0072B2", "refuses the harmful task"),
    ("utility", "#D55E00", "new task right"),
    ("benign", "#009E73", "benign task right"),
)
console = Console()


def main() -> None:
    """Train, save, prune, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    with tqdm(total=sizes.steps, desc="train base, aligned, adapter", unit="step") as bar:
        toy = train_toy(0, sizes, bar.update)
    folders = [args.out / name for name in ("adapter", "base", "aligned")]
    LoraAdapter.from_model(toy.adapted).save(folders[0])
    toy.base.save_pretrained(folders[1])
    toy.aligned.save_pretrained(folders[2])

    result = splora.apply(*folders, SploraConfig(direction="smallest", num=4), progress=tqdm)
    result.adapter.save(args.out / "pruned")
    console.print(str(result))
    show(result)
    curve = by_count(toy, folders, len(result.stats), sizes)
    console.print(f"picture: {draw(result, curve, args.out / 'splora.png')}", soft_wrap=True)


def show(result: SploraResult) -> None:
    """A row for each layer."""
    table = Table("layer", "distance", "norm", "cosine", "score", "", title="the adapter's layers")
    for layer in result.stats:
        numbers = (f"{x:.3f}" for x in (layer.dist, layer.norm, layer.cos, layer.score))
        table.add_row(
            layer.name.removeprefix("model.layers."),
            *numbers,
            "pruned" if layer.name in result.pruned else "",
        )
    console.print(table)


def by_count(toy: Toy, folders: list[Path], count: int, sizes: Sizes) -> list[Figures]:
    """What the live model does with 0, 1, ... layers switched off."""
    found = []
    for k in tqdm(range(count + 1), desc="prune the live model", unit="K"):
        splora.apply_to(
            toy.adapted, folders[1], folders[2], SploraConfig(direction="smallest", num=k)
        )
        found.append(figures(toy.adapted, sizes))
        splora.remove(toy.adapted)
    return found


def draw(result: SploraResult, curve: list[Figures], path: Path) -> Path:
    """Scores over block and module; refusals and accuracies against K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    draw_scores(result, left)
    for name, colour, label in LINES:
        right.plot([getattr(f, name) for f in curve], "o-", ms=3, color=colour, label=label)
    right.set(xlabel="layers pruned, K", ylabel="share of answer tokens", ylim=(-0.03, 1.05))
    right.set_xticks(range(0, len(curve), 2))
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def draw_scores(result: SploraResult, axes: Any) -> None:
    """The score of every layer inside a block as a colour, and a cross on what was pruned."""
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
