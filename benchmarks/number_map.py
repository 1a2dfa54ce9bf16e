"""Heat map of a table, drawn by the example and the benchmark of reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def draw_map(
    axes: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[object],
    columns: Sequence[object],
    top: float,
) -> None:
    """Draw a table of numbers as a heat map, with each number in its cell.

    Args:
        axes: Matplotlib axes.
        values: Numbers by row, then column; NaN leaves a cell empty.
        rows, columns: Labels of the rows and columns.
        top: Number with the darkest colour. If it is 0, all cells have the lightest colour.
    """
    top = top or 1.0
    axes.imshow(values, cmap="cividis_r", vmin=0, vmax=top, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value == value:
                color = "white" if value > 0.55 * top else "black"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
