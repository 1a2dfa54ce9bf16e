"""Pictures of a federation, which examples and benchmarks draw: accuracy, who trained which layer,
and bytes, over the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Of Okabe and Ito, told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_accuracy(curves: Mapping[str, Sequence[float]], axes: Any) -> None:
    """Draw the accuracy of the global adapter after each round.

    Args:
        curves: by label, one share of right answers a round, from round 1.
        axes: matplotlib axes.
    """
    _lines(curves, axes)
    axes.set(xlabel="round", ylabel="accuracy, share of the test set")


def draw_heights(heights: Sequence[Sequence[int]], axes: Any) -> None:
    """Draw the height of each layer's column, how many clients trained it, as a colour over rounds.

    Args:
        heights: of each round one number a layer, as ``RoundLog.heights`` has them. Layer 0 is at
            the bottom.
        axes: matplotlib axes.
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
    """Draw how many bytes were sent up to each round, in MB (a million).

    Args:
        sent: by label, one sum a round: ``[*log.cumulative("up").values()]`` of a ``CommLog``.
        axes: matplotlib axes.
    """
    _lines({label: [b / 1e6 for b in each] for label, each in sent.items()}, axes)
    axes.set(xlabel="round", ylabel="sent so far, MB")


def _lines(lines: Mapping[str, Sequence[float]], axes: Any) -> None:
    for place, (label, values) in enumerate(lines.items()):
        rounds = range(1, len(values) + 1)
        axes.plot(rounds, values, color=COLORS[place % len(COLORS)], label=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
