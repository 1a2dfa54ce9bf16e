"""Replies of which the server needs the sums alone, added up and divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .. import Aggregate, Update
from .._masked import divided, masked_shapes, weights_key
from .._update import Client, Rejected, Rules, by_client, need, only, weight_of


def aggregate_replies(rules: Rules, updates: Sequence[Update]) -> Aggregate:
    """Return the "covered" mean of replies that :func:`lora_ext.federated.masked_payload` made.

    A reply is rejected if it is not finite, or has another weight than its plan and its number of
    examples give. Sums are float64, in the order of the clients.
    """
    state, pairs, settings = rules.state, rules.pairs, rules.settings
    found: dict[Client, Update] = {}
    rejected: dict[Client, str] = {}
    shapes = masked_shapes(pairs, state)
    for client, own in by_client(updates).items():
        try:
            update = only(own)
            _check(update, rules, shapes)
            found[client] = update
        except Rejected as error:
            rejected[client] = f"client {client}: {error}"
    trained = {layer for update in found.values() for layer in update.plan.layers}
    uncovered = tuple(sorted({pair.layer for pair in pairs} - trained))
    result = Aggregate(dict(state), tuple(found), rejected, uncovered)
    if len(found) < settings.min_replies:
        reason = f"replies: expected at least {settings.min_replies}, found {len(found)}"
        return replace(result, skipped=True, reason=reason)
    sums = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    for update in found.values():
        for key, total in sums.items():
            total += update.tensors[key].double()
    try:
        new = divided(pairs, state, sums, settings.server_lr)
    except ValueError as error:  # sums that the dtype of the state cannot hold
        return replace(result, skipped=True, reason=str(error))
    return replace(result, state=new)


def _check(update: Update, rules: Rules, shapes: Mapping[str, tuple[int, ...]]) -> None:
    weight = 1.0
    if rules.settings.weighted_by is not None:
        weight = weight_of(update.num_examples)
    for key in shapes:
        need(key in update.tensors, key, "a tensor of every client", "none")
        need(bool(update.tensors[key].isfinite().all()), key, "finite values", "others")
    for pair in rules.pairs:
        full = shapes[pair.a][0]
        planned = pair.layer in update.plan.layers
        rank = update.plan.rank_of(pair.layer, full) if planned else 0
        key = weights_key(pair)
        weights = torch.zeros_like(update.tensors[key])
        weights[:rank] = weight
        holds = torch.equal(update.tensors[key], weights)
        need(holds, key, f"{weight:g} for {rank} ranks, and zeros", "others")
        for axis, key in enumerate((pair.a, pair.b)):
            beyond = update.tensors[key].narrow(axis, rank, full - rank)
            need(not bool(beyond.any()), key, f"zeros beyond rank {rank}", "others")
