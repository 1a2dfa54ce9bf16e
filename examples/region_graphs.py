"""Draw the region graphs of the package side by side and print a description of each.

Inputs are at the bottom, the root is at the top. A dot is a product of units with the same index, a
cross a product of all pairs. `python examples/region_graphs.py` needs matplotlib and writes to
out/region_graphs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_ext.circuits import Bernoulli, RegionGraph

OUT = Path(__file__).resolve().parents[1] / "out" / "region_graphs"


def main() -> None:
    """Draw one graph of each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no effect: always quick")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    leaf = Bernoulli()
    graphs = {
        "cp": RegionGraph.cp(4, 2, leaf),
        "hmm": RegionGraph.hmm(4, 2, leaf),
        "btree": RegionGraph.btree(4, 2, leaf),
        "hclt": RegionGraph.hclt([-1, 0, 0, 1], 2, leaf),
        "rat_spn": RegionGraph.rat_spn(4, 1, 2, 2, 2, leaf),
        "poon_domingos": RegionGraph.poon_domingos(2, 2, 2, leaf),
    }
    figure = Figure(figsize=(18, 10))
    for axes, (name, graph) in zip(figure.subplots(2, 3).flat, graphs.items(), strict=True):
        print(f"{name}: {graph}")
        draw_graph(graph, axes)
        axes.set_title(name)
    figure.savefig(args.out / "graphs.png", dpi=100, bbox_inches="tight")
    print(f"picture in {args.out}")


def draw_graph(graph: RegionGraph, axes: Axes) -> None:
    """Draw regions by depth, inputs at the bottom; partitions are dots between them."""
    depths = graph.depths()
    levels = {d: [i for i, depth in enumerate(depths) if depth == d] for d in depths}
    at = {
        i: ((n + 0.5) / len(members), float(d))
        for d, members in levels.items()
        for n, i in enumerate(members)
    }
    for i, region in enumerate(graph.regions):
        x, y = at[i]
        for n, p in enumerate(region.partitions):
            dot = (x + (n - (len(region.partitions) - 1) / 2) * 0.02, y - 0.35)
            for ends in ((x, y), *(at[c] for c in p.children)):
                axes.plot(*zip(dot, ends, strict=True), color="0.6", linewidth=0.8, zorder=1)
            axes.plot(*dot, marker="x" if p.kind == "kronecker" else ".", color="0.2", zorder=2)
        face = "#cfe2f3" if region.leaf else "#fce5cd"
        box = {"boxstyle": "round", "facecolor": face, "edgecolor": "0.4"}
        text = f"{graph.label(i)} ({region.units})"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, max(depths) + 0.5)
    axes.axis("off")


if __name__ == "__main__":
    main()
