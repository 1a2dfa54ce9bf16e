"""Pictures of who predicts what: the layers' weights over the tokens of a text; by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def draw_routing(weights: Tensor, tokens: Sequence[str], first_layer: int, axes: Any = None) -> Any:
    """Draw the weights of the late layers over tokens as a map, its colours logarithmic. The last
    layer's are left out: they are what the others lack.

    Args:
        weights: ``(T, k)``, ``routing_weights`` of one sequence.
        tokens: T texts, of the tokens that the positions predict.
        first_layer: the number of the ensemble's first layer, counted from 1.
        axes: matplotlib axes, or None for new ones.

    Returns:
        The axes.
    """
    from matplotlib.colors import LogNorm

    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots(figsize=(10, 2), layout="constrained")[1]
    late = weights[:, :-1].detach().float().T.cpu().numpy()  # (k - 1, T)
    scale = LogNorm(1e-4, 1, clip=True)
    shown = axes.imshow(late, aspect="auto", cmap="viridis", norm=scale, interpolation="nearest")
    axes.set_yticks(range(len(late)), [str(first_layer + e) for e in range(len(late))])
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
    axes.set(xlabel="token that is predicted", ylabel="layer")
    axes.figure.colorbar(shown, ax=axes, label="weight")
    return axes
