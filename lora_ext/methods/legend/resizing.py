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
    """Change the rank of a pair of factors such that ``B A`` changes as little as possible.

    For a larger rank, random rows are added to A and zero columns to B, so that ``B A`` is
    unchanged. For a smaller rank, the largest singular values of ``B A`` are kept, and the square
    root of each is multiplied into both factors. If a singular value is zero, its row of A is
    random as well, so that training can use every rank. The scale does not depend on the rank and
    is not changed.

    Args:
        a: Factor A, ``(r, I)``.
        b: Factor B, ``(O, r)``.
        r_new: New rank; for 0, the results are ``(0, I)`` and ``(O, 0)``.
        generator: Generator of random rows, on the CPU; default is a generator with seed 0.

    Returns:
        A ``(r_new, I)`` and B ``(O, r_new)`` in the dtypes of the arguments, and the Frobenius norm
        of the change of ``B A``, which is 0 unless the rank becomes smaller.

    Raises:
        ValueError: If the shapes do not match, a factor is not a matrix or not finite, or the new
            rank is below 0.

    Source: LEGEND (the method is our choice); :func:`lora_ext.adapter.resize_adapter` for a whole
    adapter.
    """
    where = "resize_lora"
    for name, factor in (("a", a), ("b", b)):
        require(factor.dim() == 2, where, name, "a matrix", list(factor.shape))
        require(bool(factor.isfinite().all()), where, name, "finite values", "NaN or inf")
    require(a.shape[0] == b.shape[1], where, "b", f"shape (O, {a.shape[0]})", list(b.shape))
    return resized(where, a, b, integer(where, "r_new", r_new, 0), generator)


def resize_state(
    state: Mapping[str, Tensor],
    ranks: Sequence[int],
    pattern: str = PATTERN,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], dict[int, float]]:
    """Change the ranks of the layers of a global adapter.

    Args:
        state: Tensors of the adapter under PEFT's names; tensors other than factors are returned
            unchanged.
        ranks: New rank of each layer, at least 1.
        pattern: Regular expression for the layer's index in a name.
        generator: Generator of random rows of A, on the CPU; default is a generator with seed 0.

    Returns:
        The new state, and the error of each layer: the square root of the summed squared errors of
        its modules.

    Raises:
        ValueError: If there is not one rank per layer, a rank is below 1, or :func:`resize_lora`
            raises it.
    """
    where = "resize_state"
    pairs = layer_pairs(f"{where}: state", state, pattern)
    count = check_layers(where, {pair.layer for pair in pairs})
    require(len(ranks) == count, where, "ranks", f"one rank for each of {count} layers", len(ranks))
    require(min(ranks) >= 1, where, "ranks", "at least 1 each", min(ranks))
    generator = generator or torch.Generator().manual_seed(0)
    found = dict(state)
    squares = dict.fromkeys(range(count), 0.0)
    for pair in pairs:
        a, b = state[pair.a], state[pair.b]
        found[pair.a], found[pair.b], error = resize_lora(a, b, ranks[pair.layer], generator)
        squares[pair.layer] += error**2
    return found, {layer: math.sqrt(square) for layer, square in squares.items()}
