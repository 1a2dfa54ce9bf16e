"""A picture of a region graph by matplotlib."""

from __future__ import annotations

from typing import Any

from lora_ext.circuits.region_graph import RegionGraph


def draw_graph(graph: RegionGraph, axes: Any = None) -> Any:
    """Draw regions by depth, inputs at the bottom; partitions are dots between them.

    Args:
        graph: any region graph of a size that one can look at.
        axes: matplotlib axes, or None for new ones.

    Returns:
        The axes; ``axes.figure.savefig(path)`` writes a file.
    """
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(8, 5))[1]
    depth: list[int] = []
    for region in graph.regions:
        below = [depth[c] for p in region.partitions for c in p.children]
        depth.append(1 + max(below) if below else 0)
    levels: dict[int, list[int]] = {}
    for i, d in enumerate(depth):
        levels.setdefault(d, []).append(i)
    at = {
        i: ((n + 0.5) / len(members), float(d))
        for d, members in levels.items()
        for n, i in enumerate(members)
    }
    for i, region in enumerate(graph.regions):
        x, y = at[i]
        for n, p in enumerate(region.partitions):
            dot = (x + (n - (len(region.partitions) - 1) / 2) * 0.02, y - 0.35)
            axes.plot([x, dot[0]], [y, dot[1]], color="0.4", linewidth=0.8, zorder=1)
            for c in p.children:
                axes.plot(
                    [dot[0], at[c][0]], [dot[1], at[c][1]], color="0.7", linewidth=0.8, zorder=1
                )
            marker = "x" if p.kind == "kronecker" else "."
            axes.plot(*dot, marker=marker, color="0.2", zorder=2)
        face = "#cfe2f3" if region.leaf else "#fce5cd"
        box = {"boxstyle": "round", "facecolor": face, "edgecolor": "0.4"}
        text = f"{graph.label(i)} ({region.units})"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, max(depth) + 0.5)
    axes.axis("off")
    return axes
