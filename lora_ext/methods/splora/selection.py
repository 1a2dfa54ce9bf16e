"""Which layers are pruned, by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lora_ext._checks import require
from lora_ext.layers import block_name

from .config import SploraConfig
from .scores import LayerStats


def select_layers(stats: Sequence[LayerStats], config: SploraConfig) -> list[str]:
    """Return the names of the layers that are to be pruned, in the order of ``stats``.

    A unit is a module, or with ``granularity="block"`` a block, whose score is the mean of its
    modules' and which is pruned whole. Modules outside all blocks are units of their own.

    Args:
        stats: from :func:`ediem_scores`.
        config: num, threshold, direction and granularity count.

    Raises:
        ValueError: neither num nor threshold is given, or num is above the number of units.
    """
    where = "select_layers"
    units: dict[str, list[LayerStats]] = {}
    for layer in stats:
        block = block_name(layer.name) if config.granularity == "block" else None
        units.setdefault(layer.name if block is None else block, []).append(layer)
    scores = {unit: fmean(layer.score for layer in layers) for unit, layers in units.items()}
    sign = -1 if config.direction == "largest" else 1
    if config.num is not None:
        expected = f"at most {len(units)}, the number of {config.granularity}s that were scored"
        require(config.num <= len(units), where, "num", expected, config.num)
        # The sort is stable: of equal scores the first in the model is taken.
        chosen = set(sorted(scores, key=lambda unit: sign * scores[unit])[: config.num])
    elif config.threshold is not None:
        limit = sign * config.threshold
        chosen = {unit for unit, score in scores.items() if sign * score <= limit}
    else:
        raise ValueError(
            f"{where}: config: expected one of num and threshold, to know how many to prune, found "
            "neither"
        )
    names = {layer.name for unit in chosen for layer in units[unit]}
    return [layer.name for layer in stats if layer.name in names]
