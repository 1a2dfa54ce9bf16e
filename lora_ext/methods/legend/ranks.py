"""Distribution of a total rank over the layers, sizes of layers in bytes, and changes of ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_ext._checks import choice, integer, number, require
from lora_ext.adapter import resized
from lora_ext.federated import PATTERN, check_layers, layer_pairs

Shape = Literal["arithmetic", "uniform", "reverse", "geometric"]

_log = logging.getLogger(__name__)


def rank_distribution(
    L: int,
    total: int,
    *,
    step: float = 1,
    r_min: int = 1,
    r_max: int | None = None,
    multiple: int = 1,
    shape: Shape = "arithmetic",
    ratio: float = 2.0,
) -> tuple[int, ...]:
    """Return the rank of every layer, ``r_l = r_0 + step * l``, such that the ranks sum to
    ``total``.

    Layer 0 is at the input. The ranks are rounded to integers by the largest remainder method; of
    equal remainders, those nearer to the output are rounded up first. The ranks are then clipped to
    ``[r_min, r_max]``, and the sum is restored by changing ranks near the output first. The ranks
    stay in ascending order.

    Args:
        L: Number of layers.
        total: Sum of the ranks.
        step: lambda, the increase of the rank from one layer to the next.
        r_min: Lower bound of every rank.
        r_max: Upper bound of every rank; None means no bound.
        multiple: Number that divides every rank; adapter pools store ranks in pages of 8. The sum
            is the possible sum nearest to ``total``, within ``multiple * L / 2`` of it, and is
            logged if it differs.
        shape: "arithmetic", the formula above; "uniform", the formula with step 0; "reverse", the
            formula with the layers in reverse order; "geometric", a geometric sequence in which the
            last layer has ``ratio`` times the rank of the first.
        ratio: Rank of the last layer over that of the first, for "geometric".

    Returns:
        ``L`` ranks in ascending order from layer 0 ("reverse": in descending order); neighbours may
        be equal.

    Raises:
        ValueError: If a setting is out of range, or the bounds do not allow the sum; the message
            then contains the smallest or the largest possible sum.
        TypeError: If L, the sum or a bound is not an int.

    Source: LEGEND (arXiv 2412.20004): higher ranks nearer to the output. The general formula, its
    rounding and its other shapes are our choice.
    """
    where = "rank_distribution"
    L = integer(where, "L", L, 1)
    total = integer(where, "total", total, 0)
    r_min = integer(where, "r_min", r_min, 0)
    r_max = None if r_max is None else integer(where, "r_max", r_max, 0)
    multiple = integer(where, "multiple", multiple, 1)
    choice(where, "shape", shape, get_args(Shape))
    number(where, "step", step)
    rises = step >= 0 or shape in ("uniform", "geometric")
    require(rises, where, "step", f"at least 0 with shape {shape!r}", step)
    number(where, "ratio", ratio, 1)
    require(r_max is None or r_max >= r_min, where, "r_max", f"at least r_min = {r_min}", r_max)

    low = -(-r_min // multiple)  # in units of ``multiple``
    high = None if r_max is None else r_max // multiple
    units = (2 * total + multiple) // (2 * multiple)  # nearest to the sum; halves are rounded up
    sum_of = min(max(units, L * low), math.inf if high is None else L * high)
    slack = multiple * L / 2 if multiple > 1 else 0
    enough = high is None or high >= low
    require(enough, where, "r_max", f"at least {low * multiple} for multiple={multiple}", r_max)
    least = L * low * multiple
    require(total >= least - slack, where, "total", f"at least {least}, r_min in each layer", total)
    if high is not None:
        most = L * high * multiple
        require(total <= most + slack, where, "total", f"at most {most}, r_max per layer", total)
    if shape == "geometric":
        growth = [ratio ** (i / max(1, L - 1)) for i in range(L)]
        wished = [total * g / math.fsum(growth) for g in growth]
    else:
        step = 0 if shape == "uniform" else step
        first = (total - step * L * (L - 1) / 2) / L
        wished = [first + step * i for i in range(L)]
    rounded = _rounded([value / multiple for value in wished], int(sum_of))
    ranks = [rank * multiple for rank in _clipped(rounded, int(sum_of), low, high)]
    if sum(ranks) != total:
        _log.info("%s: ranks that are multiples of %d sum to %d", where, multiple, sum(ranks))
    return tuple(reversed(ranks) if shape == "reverse" else ranks)


def layer_bytes(
    state: Mapping[str, Tensor], ranks: Sequence[int], pattern: str = PATTERN
) -> tuple[int, ...]:
    """Return the number of bytes of every layer's factors, for one direction of the transfer.

    Layer l has ``itemsize * r_l * sum of (I + O)`` bytes. The sum is over the layer's modules, with
    I inputs and O outputs each.

    Args:
        state: Tensors of the global adapter; their ranks are not used.
        ranks: Rank of each layer.
        pattern: Regular expression for the layer's index in a name.

    Raises:
        ValueError: If there is not one rank per layer, or a rank is above ``min(I, O)`` of a
            module, since no update has a higher rank.
        TypeError: If a rank is not an int.
    """
    where = "layer_bytes"
    pairs = _pairs(where, state, ranks, pattern)
    sums = [0] * len(ranks)
    for pair in pairs:
        a, b = state[pair.a], state[pair.b]
        most = min(a[0].numel(), b.shape[0])
        rank = integer(where, f"ranks[{pair.layer}]", ranks[pair.layer], 1)
        require(rank <= most, where, f"ranks[{pair.layer}]: {pair.module}", f"at most {most}", rank)
        sums[pair.layer] += rank * (a.element_size() * a[0].numel() + b.element_size() * b.shape[0])
    return tuple(sums)


def _rounded(values: Sequence[float], total: int) -> list[int]:
    """Round ascending values up or down to ascending integers with a sum as near to ``total`` as
    possible."""
    # Remainders that differ only by rounding errors must count as equal.
    found = [math.floor(value + 1e-9) for value in values]
    rest = [round(value - whole, 9) for value, whole in zip(values, found, strict=True)]
    order = sorted(range(len(values)), key=lambda i: (-rest[i], -i))
    for place in order[: max(0, total - sum(found))]:
        found[place] += 1
    return found


def _clipped(ranks: list[int], total: int, low: int, high: int | None) -> list[int]:
    """Clip ascending ranks to the bounds, then change them until their sum is ``total``."""
    top = math.inf if high is None else high
    ranks = [int(min(max(rank, low), top)) for rank in ranks]
    last = len(ranks) - 1
    while sum(ranks) > total:  # lower the last rank that exceeds its predecessor
        i = next(i for i in range(last, -1, -1) if ranks[i] > (ranks[i - 1] if i else low))
        ranks[i] -= 1
    while sum(ranks) < total:  # raise the last rank that is below its successor
        i = next(i for i in range(last, -1, -1) if ranks[i] < (top if i == last else ranks[i + 1]))
        ranks[i] += 1
    return ranks


@torch.no_grad()
def resize_lora(
    a: Tensor, b: Tensor, r_new: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, float]:
    """Change the rank of a pair of factors such that ``B A`` changes as little as possible.

    For a larger rank, random rows are added to A and zero columns to B, so that ``B A`` is
    unchanged. For a smaller rank, the largest singular values of ``B A`` are kept, and the square
    root of each is multiplied into both factors. If a singular value is zero, its row of A is
    random as well, so that training can use every rank. The adapter's scale must stay the same.

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

    Source: LEGEND (the method is our choice). For a whole adapter, use
    :func:`lora_ext.adapter.resize_adapter`.
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
    pairs = _pairs(where, state, ranks, pattern)
    require(min(ranks) >= 1, where, "ranks", "at least 1 each", min(ranks))
    generator = generator or torch.Generator().manual_seed(0)
    found = dict(state)
    squares = dict.fromkeys(range(len(ranks)), 0.0)
    for pair in pairs:
        a, b = state[pair.a], state[pair.b]
        found[pair.a], found[pair.b], error = resize_lora(a, b, ranks[pair.layer], generator)
        squares[pair.layer] += error**2
    return found, {layer: math.sqrt(square) for layer, square in squares.items()}


def _pairs(
    where: str, state: Mapping[str, Tensor], ranks: Sequence[int], pattern: str
) -> list[Any]:
    """Return the names of the factors in ``state``; raise unless there is one rank per layer."""
    pairs = layer_pairs(f"{where}: state", state, pattern)
    count = check_layers(where, {pair.layer for pair in pairs})
    require(len(ranks) == count, where, "ranks", f"one rank for each of {count} layers", len(ranks))
    return pairs
