"""Plots of a federation over its rounds: accuracy, clients per layer, and bytes.

Examples and benchmarks use these functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Palette of Okabe and Ito, distinguishable with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_accuracy(curves: Mapping[str, Sequence[float]], axes: Any) -> None:
    """Draw the accuracy of the global adapter after each round.

    Args:
        curves: Shares of right answers per round, from round 1, by label.
        axes: Matplotlib axes.
    """
    _lines(curves, axes)
    axes.set(xlabel="round", ylabel="accuracy, share of the test set")


def draw_heights(heights: Sequence[Sequence[int]], axes: Any) -> None:
    """Draw the number of clients that trained each layer, as a heat map over the rounds.

    Args:
        heights: One number per layer for each round, as in ``RoundLog.heights``. Layer 0 is at the
            bottom.
        axes: Matplotlib axes.
    """
    columns = [list(column) for column in zip(*heights, strict=True)]
    extent = (0.5, len(heights) + 0.5, -0.5, len(columns) - 0.5)
    image = axes.imshow(
        columns, cmap="cividis", aspect="auto", origin="lower", extent=extent, vmin=0
    )
    axes.figure.colorbar(image, ax=axes, label="clients that trained the layer")
    axes.set_yticks(range(len(columns)))
    axes.set(xlabel="round", ylabel="layer, from the input")
    axes.spines[:].set_visible(False)


def draw_bytes(sent: Mapping[str, Sequence[int]], axes: Any) -> None:
    """Draw the number of bytes sent up to each round, in MB (a million bytes).

    Args:
        sent: Cumulative bytes per round, ``[*log.cumulative("up").values()]`` of a ``CommLog``, by
            label.
        axes: Matplotlib axes.
    """
    _lines({label: [b / 1e6 for b in each] for label, each in sent.items()}, axes)
    axes.set(xlabel="round", ylabel="sent so far, MB")


def _lines(lines: Mapping[str, Sequence[float]], axes: Any) -> None:
    for place, (label, values) in enumerate(lines.items()):
        rounds = range(1, len(values) + 1)
        axes.plot(rounds, values, color=COLORS[place % len(COLORS)], label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
