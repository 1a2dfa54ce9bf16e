"""Pictures of where in a model an adapter is wide, and where it is large; by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_ext.adapter import RankReport
from lora_ext.layers import block_index, block_name


def draw_map(
    axes: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[object],
    columns: Sequence[object],
    top: float | None = None,
) -> Any:
    """Draw a table of numbers as colours, each number written in its field.

    Args:
        axes: matplotlib axes.
        values: by row, then column; NaN leaves a field empty.
        rows, columns: what the fields are of.
        top: the number of the darkest colour; default is the largest.

    Returns:
        The axes.
    """
    highest = max((v for line in values for v in line if v == v), default=0.0)
    top = top or highest or 1.0
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
    return axes


def draw_report(
    report: RankReport, figure: str = "entropy", axes: Any = None, top: float | None = None
) -> Any:
    """Draw one figure of a report over blocks and modules.

    Args:
        report: of :func:`lora_ext.adapter.rank_report`. figure: a column of it, ``"fro"`` say.
        axes: matplotlib axes, or None for new ones.
        top: the number of the darkest colour, for reports that are compared.

    Returns:
        The axes; ``axes.figure.savefig(path)`` writes a file. Modules outside all blocks are not
        drawn.
    """
    places: dict[tuple[str, int], float] = {}
    for row in report:
        block, index = block_name(row["module"]), block_index(row["module"])
        if block is not None and index is not None:
            places[row["module"][len(block) + 1 :], index] = row[figure]
    modules = list(dict.fromkeys(module for module, _ in places))
    blocks = sorted({index for _, index in places})
    if axes is None:
        from matplotlib.figure import Figure

        size = 2 + 0.5 * len(blocks), 1 + 0.4 * len(modules)
        axes = Figure(figsize=size, layout="constrained").subplots()
    values = [[places.get((module, block), float("nan")) for block in blocks] for module in modules]
    draw_map(axes, values, modules, blocks, top)
    axes.set(xlabel="block", title=figure)
    return axes
