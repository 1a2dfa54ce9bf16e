"""A picture of the scores over blocks and modules, by matplotlib."""

from __future__ import annotations

from typing import Any

from lora_ext.layers import block_index, block_name

from .pruning import SploraResult


def draw_scores(result: SploraResult, axes: Any = None) -> Any:
    """Draw the score of every layer as a colour, and a cross on what was pruned.

    Args:
        result: of :func:`lora_ext.methods.splora.apply` or ``apply_to``.
        axes: matplotlib axes, or None for new ones.

    Returns:
        The axes; ``axes.figure.savefig(path)`` writes a file. Modules outside all blocks are not
        drawn, and layers that were not scored stay empty.
    """
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(5, 5), layout="constrained")[1]
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
    return axes
