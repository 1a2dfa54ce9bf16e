"""Pictures of what layers are worth, and of the way between two adapters; by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .connectivity import Barrier
from .shapley import Shapley

#: Of Okabe and Ito, told apart with any colour vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def draw_shapley(
    games: Mapping[str, Shapley], unit: str, names: Sequence[str] | None = None, axes: Any = None
) -> Any:
    """Draw Shapley values as bars, side by side where there are several games, with an error bar of
    one standard error.

    Args:
        games: by label, all of the same players.
        unit: of the values: "accuracy", say.
        names: of the players; default is their numbers.
        axes: matplotlib axes, or None for new ones.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    for place, (label, game) in enumerate(games.items()):
        width = 0.8 / len(games)
        x = [i + (place - (len(games) - 1) / 2) * width for i in range(len(game.values))]
        color = COLORS[place % len(COLORS)]
        errors = game.standard_error.nan_to_num(0).tolist()
        axes.bar(x, game.values.tolist(), width, yerr=errors, label=label, color=color)
    if names is not None:
        axes.set_xticks(range(len(names)), names, rotation=90)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="group of layers", ylabel=f"Shapley value, {unit}")
    axes.legend()
    return axes


def draw_barriers(lines: Mapping[str, Barrier], unit: str = "loss", axes: Any = None) -> Any:
    """Draw the loss along lines between two adapters, and dotted the line between its ends.

    Args:
        lines: by label. unit: of the loss.
        axes: matplotlib axes, or None for new ones.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    for place, (label, line) in enumerate(lines.items()):
        color = COLORS[place % len(COLORS)]
        label = f"{label}, barrier {line.barrier:.3g}"
        axes.plot(line.lambdas, line.losses, marker="o", color=color, label=label)
        ends = [(line.lambdas[i], line.losses[i]) for i in (0, -1)]
        axes.plot(*zip(*ends, strict=True), linestyle=":", color=color)
    axes.set(xlabel="lambda, from the first adapter to the second", ylabel=unit)
    axes.legend()
    return axes


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]
