"""Change of the ranks of an adapter between two rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_ext._checks import integer, require
from lora_ext.adapter import resized
from lora_ext.federated import PATTERN, check_layers, layer_pairs


@torch.no_grad()
def resize_lora(
    a: Tensor, b: Tensor, r_new: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, float]:
    """Change the rank of a pair of factors: ``B A`` stays, or is the nearest that the rank allows.

    A larger rank adds random rows to A and zero columns to B. A smaller one keeps the largest
    singular values, with their roots in both factors. A rank without a singular value gets a random
    row as well, so that training moves every rank. The scale is the same for all ranks, and stays.

    Args:
        a: ``(r, I)``.
        b: ``(O, r)``.
        r_new: New rank; 0 gives ``(0, I)`` and ``(O, 0)``.
        generator: Generator of new rows, on the CPU; default is one with seed 0.

    Returns:
        A ``(r_new, I)``, B ``(O, r_new)`` in their dtypes, and the Frobenius norm of the change of
        ``B A``, which is 0 if the rank did not fall.

    Raises:
        ValueError: If the factors do not fit, are not matrices or not finite, or the rank is below
            0.

    Source: LEGEND (the method is our choice); :func:`lora_ext.adapter.resize_adapter` for a whole
    adapter.
    """
    where = "resize_lora"
    for name, factor in (("a", a), ("b", b)):
        require(factor.dim() == 2, where, name, "a matrix", list(factor.shape))
        require(bool(factor.isfinite().all()), where, name, "finite values", "NaN or inf")
    require(a.shape[0] == b.shape[1], where, "b", f"(O, {a.shape[0]})", list(b.shape))
    return resized(where, a, b, integer(where, "r_new", r_new, 0), generator)


def resize_state(
    state: Mapping[str, Tensor],
    ranks: Sequence[int],
    pattern: str = PATTERN,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[int, float]]:
    """Change the ranks of the layers of a global adapter.

    Args:
        state: Factors under PEFT's names; other tensors are passed on.
        ranks: Rank of each layer, from 1.
        pattern: Regular expression for the layer's index in a name.
        generator: Generator of new rows of A.

    Returns:
        The state, and by layer the root of the summed squared errors of its modules.

    Raises:
        ValueError: If the number of ranks is not that of the layers; or as :func:`resize_lora`.
    """
    where = "resize_state"
    pairs = layer_pairs(f"{where}: state", state, pattern)
    count = check_layers(where, {pair.layer for pair in pairs})
    require(len(ranks) == count, where, "ranks", f"one for each of {count} layers", len(ranks))
    require(min(ranks) >= 1, where, "ranks", "at least 1 each", min(ranks))
    generator = generator or torch.Generator().manual_seed(0)
    found = dict(state)
    squares = dict.fromkeys(range(count), 0.0)
    for pair in pairs:
        a, b = state[pair.a], state[pair.b]
        found[pair.a], found[pair.b], error = resize_lora(a, b, ranks[pair.layer], generator)
        squares[pair.layer] += error**2
    return found, {layer: math.sqrt(square) for layer, square in squares.items()}
