"""Updates for secure summation: shapes are equal for all plans, and the server uses only sums.

Secure summation adds vectors without revealing a single vector. Each client therefore sends all
layers multiplied by its weight, with zeros for untrained layers, and its weight for each rank of
each module. The server divides the sum of the layers by the sum of the weights. The result is the
"covered" mean of :func:`aggregate`. The other methods of :func:`aggregate` would need the
individual replies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lora_ext._checks import number, renamed, require
from lora_ext.adapter import TooLarge, rounded

from ._aggregation import Aggregate
from ._plan import PATTERN, Pair, layer_pairs
from ._update import (
    Rejected,
    Rules,
    Settings,
    Update,
    Upload,
    accept,
    need,
    once,
    weight_of,
)


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
    """Return one client's terms of the sums: ``w * mask * delta`` and, per rank, ``w * mask``.

    ``w`` is the client's weight, ``mask`` is 1 for the ranks that the client trained and 0 for all
    others, and ``delta`` is the client's change of the global adapter.

    Args:
        state, update, upload, weighted_by, max_update_norm, pattern: see :func:`aggregate`.

    Returns:
        tensors for all factors in the layers of the state, and ``<module>.rank_weights`` ``(r,)``
        for each module of rank r, whatever the plan; float64 for a float64 state, else float32.

    Raises:
        ValueError: If :func:`aggregate` would reject the update; the message contains the reason.
    """
    pairs = layer_pairs("masked_payload: state", state, pattern)
    with renamed("masked_payload"):
        settings = Settings(upload=upload, weighted_by=weighted_by, max_update_norm=max_update_norm)
    rules = Rules(state, pairs, settings)
    replies, rejected = accept([update], rules)
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
        found[_weights_key(pair)] = weights.to(_wide(state[pair.a]))
    return found


def masked_shapes(pairs: Sequence[Pair], state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors from :func:`masked_payload`; they do not depend on
    the plan."""
    shapes = {key: tuple(state[key].shape) for p in pairs for key in (p.a, p.b)}
    return shapes | {_weights_key(p): (state[p.a].shape[0],) for p in pairs}


@torch.no_grad()
def aggregate_masked(
    state: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    *,
    server_lr: float = 1.0,
    pattern: str = PATTERN,
) -> dict[str, Tensor]:
    """Compute the new global adapter from the sums of :func:`masked_payload` over the clients.

    Args:
        state: the global adapter from which the clients started.
        sums: for each name in :func:`masked_payload`, the sum of the clients' tensors.
        server_lr: step size of the server, above 0.

    Returns:
        the new global adapter. Tensors that no client trained are the objects in ``state``.

    Raises:
        ValueError: If a name is missing or unknown, a shape or dtype differs, weights are negative,
            or values are not finite or overflow the state's dtype.
    """
    where = "aggregate_masked"
    number(where, "server_lr", server_lr, above=0, expected="a finite number above 0")
    pairs = layer_pairs(f"{where}: state", state, pattern)
    shapes = masked_shapes(pairs, state)
    odd = sorted(shapes.keys() ^ sums.keys())
    expected = f"exactly the names of {len(shapes)} tensors"
    require(not odd, where, "sums", expected, f"missing or unknown names {odd[:3]}")
    for key, shape in shapes.items():
        value = sums[key]
        require(tuple(value.shape) == shape, where, key, f"shape {shape}", tuple(value.shape))
        fits = value.is_floating_point() and bool(value.isfinite().all())
        found = f"NaN or inf in {value.dtype}" if value.is_floating_point() else value.dtype
        require(fits, where, key, "finite floating-point values", found)
    for pair in pairs:
        least = min(sums[_weights_key(pair)].tolist(), default=0)
        require(least >= 0, where, pair.module, "weights of at least 0", least)
    return _divided(pairs, state, sums, server_lr)


def _divided(
    pairs: Sequence[Pair],
    state: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    server_lr: float,
) -> dict[str, Tensor]:
    """Compute :func:`aggregate_masked` from checked sums; raise if a value overflows."""
    result = dict(state)
    for pair in pairs:
        weights = sums[_weights_key(pair)].to("cpu", torch.float64)
        trained = weights > 0
        if not bool(trained.any()):
            continue
        for axis, key in enumerate((pair.a, pair.b)):
            before = state[key].detach().to("cpu", torch.float64)
            by_rank = [1] * before.dim()
            by_rank[axis] = -1
            # The quotients of untrained ranks are not used; dividing by 1 prevents NaN.
            total = torch.where(trained, weights, torch.ones_like(weights)).view(by_rank)
            moved = before + server_lr * sums[key].to("cpu", torch.float64) / total
            value = torch.where(trained.view(by_rank), moved, before)
            result[key] = rounded(value, state[key], state[key].dtype, f"aggregate_masked: {key}")
    return result


@torch.no_grad()
def average_masked(rules: Rules, updates: Sequence[Update]) -> Aggregate:
    """Return the "covered" mean of replies from :func:`masked_payload`.

    A reply is rejected if a value is not finite, or if its weights do not match its plan and its
    number of examples. Sums are computed in float64, with the clients in sorted order.
    """
    state, pairs, settings = rules.state, rules.pairs, rules.settings
    shapes = masked_shapes(pairs, state)
    replies, rejected = once(updates)
    found: list[Update] = []
    for update in replies:
        try:
            _check_sums(update, rules, shapes)
            found.append(update)
        except Rejected as error:
            rejected[update.client] = f"client {update.client}: {error}"
    trained = {layer for update in found for layer in update.plan.layers}
    uncovered = tuple(sorted({pair.layer for pair in pairs} - trained))
    clients = tuple(update.client for update in found)
    result = Aggregate(dict(state), clients, rejected, uncovered)
    if len(found) < settings.min_replies:
        few = f"replies: expected at least {settings.min_replies}, found {len(found)}"
        return replace(result, skipped=True, reason=few)
    sums = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    for update in found:
        for key, total in sums.items():
            total += update.tensors[key].double()
    try:
        return replace(result, state=_divided(pairs, state, sums, settings.server_lr))
    except TooLarge as error:
        return replace(result, skipped=True, reason=str(error))


def _check_sums(update: Update, rules: Rules, shapes: Mapping[str, tuple[int, ...]]) -> None:
    weight = 1.0
    if rules.settings.weighted_by is not None:
        weight = weight_of(update.num_examples)
    for key in shapes:
        need(key in update.tensors, key, "a tensor from every client", "none")
        count = int((~update.tensors[key].isfinite()).sum())
        need(count == 0, key, "finite values", f"{count} that are not finite")
    for pair in rules.pairs:
        full = shapes[pair.a][0]
        planned = pair.layer in update.plan.layers
        rank = update.plan.rank_of(pair.layer, full) if planned else 0
        key = _weights_key(pair)
        weights = torch.zeros_like(update.tensors[key])
        weights[:rank] = weight
        found = update.tensors[key]
        expected = f"{weight:g} for {rank} ranks, and zeros for all other ranks"
        need(torch.equal(found, weights), key, expected, found.tolist())
        for axis, key in enumerate((pair.a, pair.b)):
            beyond = int(update.tensors[key].narrow(axis, rank, full - rank).count_nonzero())
            need(beyond == 0, key, f"zeros beyond rank {rank}", f"{beyond} nonzero values")


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _weights_key(pair: Pair) -> str:
    """Return the name of the tensor with the weights of a module's ranks."""
    return f"{pair.module}.rank_weights"
