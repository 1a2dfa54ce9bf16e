"""Bar chart of Shapley values, shared by two examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_ext.methods.copra import Shapley

#: Palette of Okabe and Ito, distinguishable with any colour vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def draw_shapley(games: Mapping[str, Shapley], unit: str, axes: Any) -> None:
    """Draw Shapley values as bars with one standard error, several games side by side.

    Args:
        games: Games of the same players, by label.
        unit: Unit of the values, such as "accuracy".
        axes: Matplotlib axes.
    """
    for place, (label, game) in enumerate(games.items()):
        width = 0.8 / len(games)
        x = [i + (place - (len(games) - 1) / 2) * width for i in range(len(game.values))]
        color = COLORS[place % len(COLORS)]
        errors = game.standard_error.nan_to_num(0).tolist()
        axes.bar(x, game.values.tolist(), width, yerr=errors, label=label, color=color)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="group of layers", ylabel=f"Shapley value, {unit}")
    axes.legend()
