"""Updates of one size whatever the plan, so that a server needs to see their sum alone.

Secure summation adds vectors that nobody may read. Each client therefore sends all layers, zeros
where it trained nothing, times its weight, and beside them the weight that each rank of each module
has; the server divides sum by sum. This is the "covered" mean of :func:`aggregate`, whose other
rules and whose rejections need the single reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_ext._checks import number, renamed, require

from ._plan import PATTERN, Pair, layer_pairs
from ._update import Rules, Settings, Update, Upload, accept


@torch.no_grad()
def masked_payload(
    state: Mapping[str, Tensor],
    update: Update,
    *,
    upload: Upload = "delta",
    weighted_by: Literal["num-examples"] | None = "num-examples",
    max_update_norm: float | None = None,
    pattern: str = PATTERN,
) -> dict[str, Tensor]:
    """One client's share of the sums: ``w * mask * delta``, and ``w * mask`` by rank.

    Args:
        state, update, upload, weighted_by, max_update_norm, pattern: as for :func:`aggregate`.

    Returns:
        float64 where the state is, else float32: by the names of the state the shape that it has
        there, and ``<module>.rank_weights`` ``(r,)``. All of it, for every plan.

    Raises:
        ValueError: an update that :func:`aggregate` would reject, and why.
    """
    pairs = layer_pairs("masked_payload: state", state, pattern)
    with renamed("masked_payload"):
        settings = Settings(upload=upload, weighted_by=weighted_by, max_update_norm=max_update_norm)
    rules = Rules(state, pairs, settings)
    replies, rejected, _ = accept([update], rules)
    if not replies:
        raise ValueError(f"masked_payload: {rejected[update.client]}")
    (reply,) = replies
    found: dict[str, Tensor] = {}
    for pair in pairs:
        full = state[pair.a].shape[0]
        weights = torch.zeros(full, dtype=torch.float64)
        for axis, key in enumerate((pair.a, pair.b)):
            share = torch.zeros(state[key].shape, dtype=torch.float64)
            if key in reply.tensors:
                value = reply.value(key, rules)
                rank = value.shape[axis]
                change = value - rules.head(key, rank)
                share.narrow(axis, 0, rank).copy_(reply.weight * change)
                weights[:rank] = reply.weight
            found[key] = share.to(_wide(state[key]))
        found[weights_key(pair)] = weights.to(_wide(state[pair.a]))
    return found


def masked_shapes(pairs: Sequence[Pair], state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what :func:`masked_payload` sends, whatever the plan."""
    shapes = {key: tuple(state[key].shape) for p in pairs for key in (p.a, p.b)}
    return shapes | {weights_key(p): (state[p.a].shape[0],) for p in pairs}


@torch.no_grad()
def aggregate_masked(
    state: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    *,
    server_lr: float = 1.0,
    pattern: str = PATTERN,
) -> dict[str, Tensor]:
    """The new global state out of the sums of :func:`masked_payload` over the clients.

    Args:
        state: as the clients had it. sums: name by name. server_lr: above 0.

    Returns:
        the state; a tensor that no client trained is the very one of before.

    Raises:
        ValueError: a name that is missing or too much, another shape or dtype, weights below 0, or
            values that are not finite, or that the state's dtype cannot hold.
    """
    where = "aggregate_masked"
    number(where, "server_lr", server_lr, above=0, expected="a finite number above 0")
    pairs = layer_pairs(f"{where}: state", state, pattern)
    shapes = masked_shapes(pairs, state)
    odd = sorted(shapes.keys() ^ sums.keys())
    expected = f"the names of {len(shapes)} tensors"
    require(not odd, where, "sums", expected, f"a difference: {odd[:3]}")
    for key, shape in shapes.items():
        value = sums[key]
        require(tuple(value.shape) == shape, where, key, f"shape {shape}", tuple(value.shape))
        fits = value.is_floating_point() and bool(value.isfinite().all())
        require(fits, where, key, "finite floating values", value.dtype)
    for pair in pairs:
        holds = bool((sums[weights_key(pair)] >= 0).all())
        require(holds, where, pair.module, "weights from 0", "some below")
    return divided(pairs, state, sums, server_lr)


def divided(
    pairs: Sequence[Pair],
    state: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    server_lr: float,
) -> dict[str, Tensor]:
    """:func:`aggregate_masked` of sums that fit the state; raises for values too large for it."""
    result = dict(state)
    for pair in pairs:
        weights = sums[weights_key(pair)].to("cpu", torch.float64)
        trained = weights > 0
        if not bool(trained.any()):
            continue
        for axis, key in enumerate((pair.a, pair.b)):
            before = state[key].detach().to("cpu", torch.float64)
            by_rank = [1] * before.dim()
            by_rank[axis] = -1
            # Ranks that nobody trained are left out below; 1 keeps NaN out of the division.
            total = torch.where(trained, weights, torch.ones_like(weights)).view(by_rank)
            moved = before + server_lr * sums[key].to("cpu", torch.float64) / total
            value = torch.where(trained.view(by_rank), moved, before).to(state[key].dtype)
            holds = bool(value.isfinite().all())
            expected = f"values that {value.dtype} can hold"
            require(holds, "aggregate_masked", key, expected, "larger ones")
            result[key] = value.to(state[key].device)
    return result


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def weights_key(pair: Pair) -> str:
    """The name of a module's weights by rank."""
    return f"{pair.module}.rank_weights"
