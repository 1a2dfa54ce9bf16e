"""Replies of which the server needs the sums alone, added up and divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lora_ext._checks import require

from .. import Aggregate, Update, aggregate_masked
from .._masked import masked_shapes, weights_key
from .._plan import Pair, layer_pairs
from .._update import Client, Rejected, same, weight_of


def aggregate_replies(
    state: Mapping[str, Tensor],
    updates: Sequence[Update],
    *,
    weighted_by: Literal["num-examples"] | None,
    server_lr: float,
    min_replies: int,
    pattern: str,
) -> Aggregate:
    """The "covered" mean of replies that :func:`lora_ext.federated.masked_payload` made.

    A reply is rejected where it is not finite, or has another weight than its plan and its number
    of examples give. Sums are float64, in the order of the clients.
    """
    pairs = layer_pairs("state", state, pattern)
    shapes = masked_shapes(state, pattern)
    by_client: dict[Client, list[Update]] = {}
    for update in updates:
        by_client.setdefault(update.client, []).append(update)
    accepted: dict[Client, Update] = {}
    rejected: dict[Client, str] = {}
    for client, (first, *others) in by_client.items():
        where = f"client {client}"
        try:
            once = all(same(first, other) for other in others)
            require(once, where, "reply", "one, or equal ones", "two that differ")
            _check(where, first, pairs, shapes, weighted_by)
            accepted[client] = first
        except Rejected as error:
            rejected[client] = f"{where}: {error}"
        except ValueError as error:
            rejected[client] = str(error)
    clients = tuple(sorted(accepted, key=int))
    trained = {layer for update in accepted.values() for layer in update.plan.layers}
    uncovered = tuple(sorted({pair.layer for pair in pairs} - trained))
    result = Aggregate(dict(state), clients, rejected, uncovered)
    if len(clients) < min_replies:
        reason = f"replies: expected at least {min_replies}, found {len(clients)}"
        return replace(result, skipped=True, reason=reason)
    sums = {
        key: sum(
            (accepted[client].tensors[key].double() for client in clients),
            torch.zeros(shape, dtype=torch.float64),
        )
        for key, shape in shapes.items()
    }
    try:
        new = aggregate_masked(state, sums, server_lr=server_lr, pattern=pattern)
    except ValueError as error:  # sums that the dtype of the state cannot hold
        return replace(result, skipped=True, reason=str(error))
    return replace(result, state=new)


def _check(
    where: str,
    update: Update,
    pairs: Sequence[Pair],
    shapes: Mapping[str, tuple[int, ...]],
    weighted_by: str | None,
) -> None:
    weight = weight_of(update.num_examples) if weighted_by is not None else 1.0
    for key in shapes:
        require(key in update.tensors, where, key, "a tensor of every client", "none")
        finite = bool(update.tensors[key].isfinite().all())
        require(finite, where, key, "finite values", "others")
    for pair in pairs:
        full = shapes[pair.a][0]
        planned = pair.layer in update.plan.layers
        rank = update.plan.rank_of(pair.layer, full) if planned else 0
        key = weights_key(pair)
        weights = update.tensors[key]
        expected = torch.zeros_like(weights)
        expected[:rank] = weight
        holds = torch.equal(weights, expected)
        require(holds, where, key, f"{weight:g} for {rank} ranks, and zeros", "others")
        for axis, key in enumerate((pair.a, pair.b)):
            beyond = update.tensors[key].narrow(axis, rank, full - rank)
            require(not bool(beyond.any()), where, key, f"zeros beyond rank {rank}", "others")
