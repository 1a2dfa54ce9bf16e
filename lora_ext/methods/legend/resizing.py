"""Other ranks between two rounds."""

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
    """Factors of another rank: the same ``B A``, or the nearest that the rank allows.

    A larger rank adds drawn rows to A and columns of zeros to B. A smaller one keeps the largest
    singular values, their roots in either factor; a rank for which none is left gets a drawn row
    as well, so that training moves every rank. The scale is one for all ranks, and stays.

    Args:
        a: ``(r, I)``. b: ``(O, r)``.
        r_new: rank 0 leaves ``(0, I)`` and ``(O, 0)``.
        generator: of new rows, on the CPU; default is one of seed 0.

    Returns:
        A ``(r_new, I)``, B ``(O, r_new)`` in their dtypes, and the Frobenius norm of the change of
        ``B A``, which is 0 where the rank did not fall.

    Raises:
        ValueError: factors that do not fit, are no matrices or not finite; a rank below 0.

    Source: LEGEND (our choice of how); :func:`lora_ext.adapter.resize_adapter` for a whole adapter.
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
    """A global adapter whose layers have other ranks.

    Args:
        state: the factors under PEFT's names; other tensors are passed on.
        ranks: one for each layer, from 1.
        pattern: finds the index of a layer in a name. generator: of new rows of A.

    Returns:
        the state, and by layer the root of the summed squares of its modules' errors.

    Raises:
        ValueError: another number of ranks than of layers; what :func:`resize_lora` refuses.
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
