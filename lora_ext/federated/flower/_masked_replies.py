"""Aggregation of masked replies, of which only the sums over the clients are used.

A masked reply contains all layers, multiplied by the client's weight, with zeros for untrained
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lora_ext.adapter import TooLarge

from .. import Aggregate, Update
from .._masked import divided, masked_shapes, weights_key
from .._update import Client, Rejected, Rules, by_client, need, only, weight_of


def aggregate_replies(rules: Rules, updates: Sequence[Update]) -> Aggregate:
    """Return the "covered" mean of replies from :func:`lora_ext.federated.masked_payload`.

    A reply is rejected if a value is not finite, or if its weights do not match its plan and its
    number of examples. Sums are computed in float64, with the clients in sorted order.
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
    except TooLarge as error:
        return replace(result, skipped=True, reason=str(error))
    return replace(result, state=new)


def _check(update: Update, rules: Rules, shapes: Mapping[str, tuple[int, ...]]) -> None:
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
        key = weights_key(pair)
        weights = torch.zeros_like(update.tensors[key])
        weights[:rank] = weight
        found = update.tensors[key]
        expected = f"{weight:g} for {rank} ranks, and zeros for the others"
        need(torch.equal(found, weights), key, expected, found.tolist())
        for axis, key in enumerate((pair.a, pair.b)):
            beyond = int(update.tensors[key].narrow(axis, rank, full - rank).count_nonzero())
            need(beyond == 0, key, f"zeros beyond rank {rank}", f"{beyond} other values")
