"""Ops that return the adapter of each row while a compiled graph runs.

torch.compile cannot trace a ContextVar. A graph therefore calls an op that reads the current
``adapters`` block and returns the ids when the graph runs. The same graph is valid for every
assignment of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._torch import READS_MORE, traced

from . import _context
from ._assignment import Batch, TokensFirstError
from ._attachment import layer_names
from ._rows import Rows, planned, renumbered, rows_of


class _Tracing:
    """Batch of the model's forward that dynamo traces, set by ``serving/_hooks.py``.

    For an eager forward, the batch is stored in a context variable. Dynamo can trace neither
    context variables nor thread-locals, but it can trace an attribute of a global object. All
    threads share this attribute. If two threads trace at the same time, a graph may contain the
    batch of the other thread. Names that do not match that batch then raise ValueError.
    """

    # Number of sequences, then their lengths in tokens; empty outside a forward.
    batch: tuple[int, ...] = ()


tracing = _Tracing()


#: Value of ``default`` for a layer whose active adapter is an aLoRA adapter. Outside every block
#: such a layer raises an error.
NOBODY = -2


def no_rows(name: str) -> ValueError:
    """Return the error for an activated adapter outside every block."""
    return ValueError(
        f"adapters: input_ids: expected the prompts, because {name} begins at its invocation "
        "(alora_invocation_tokens), found no block around the layer; enter "
        "lora_ext.adapters(names, input_ids=...)"
    )


def pool_rows(
    handle: int,
    leading: Sequence[int],
    device: torch.device,
    num_slots: int,
    tokens_first: bool = False,
    of_tokens: bool = False,
    default: str | None = None,
    mixed: int = 0,
) -> Rows:
    """Return a pool layer's rows, with slots as ids, from the block around a compiled graph."""
    where = handle, leading, device, tokens_first, of_tokens
    return planned(tuple(range(num_slots)), *slots_and_weights(*where, default, mixed))


def slots_and_weights(*where: Any) -> tuple[Tensor, Tensor | None]:
    """Return the slots and weights of a pool layer's rows, from the block around a compiled graph.

    The arguments are those of the op ``active_adapters`` except ``batch``. The last argument is the
    number of weights per row. If it is 0, no block has had weights, and the weights are None.
    """
    at, default, mixed = where[:-2], *where[-2:]
    ids, weights = _active_adapters(*at, tracing.batch, default, mixed)
    return ids, weights if mixed else None


def layer_rows(names: tuple[str, ...], default: int, *where: Any) -> Rows:
    """Return the rows of a layer that owns adapters of these names; all adapters count as used.

    The arguments are those of the op ``layer_adapter_ids``. Outside every block, all rows use the
    adapter at index ``default``; if ``default`` is :data:`NOBODY`, the op raises ValueError.
    """
    return rows_of(_layer_adapter_ids(list(names), default, *where), len(names))


def block_of_graph(handle: int, default: str | None) -> _context.Block | None:
    """Return the block in which a compiled graph runs, or None if there is no block.

    Raises:
        RuntimeError: If there is no block and ``default``, the text of an entry, is not None.
    """
    block = _context.current(handle, in_graph=True)
    if block is None and default is not None:
        raise RuntimeError(
            f"attach: default={default}: expected a compiled forward inside "
            "lora_ext.adapters(...), found one outside; torch.compile cannot trace the choice of "
            "the default adapter"
        )
    return block


def _empty_ids_and_weights(
    _handle: int, leading: Sequence[int], device: torch.device, *rest: Any
) -> tuple[Tensor, Tensor]:
    ids = _empty_ids(leading, device)
    return ids, ids.new_empty(ids.shape[0], rest[-1], dtype=torch.float32)


@traced(
    "active_adapters(int handle, SymInt[] leading, Device device, bool tokens_first, "
    "bool of_tokens, SymInt[] batch, str? default, int mixed) -> (Tensor, Tensor)",
    fake=_empty_ids_and_weights,
    tags=READS_MORE,
)
def _active_adapters(
    handle: int, leading: Sequence[int], device: torch.device, *where: Any
) -> tuple[Tensor, Tensor]:
    tokens_first, of_tokens, batch, default, mixed = where
    ids, weights = _empty_ids_and_weights(handle, leading, device, mixed)
    ids.fill_(-1)
    weights.fill_(1)
    block = block_of_graph(handle, default)
    if block is None:
        return ids, weights
    with _context.forward_of(batch_of(batch)):
        try:  # as in PoolLayer.rows_in, but an op cannot set tokens_first of the layer
            rows = block.rows(torch.Size(leading), device, tokens_first, of_tokens)
        except TokensFirstError:
            rows = block.rows(torch.Size(leading), device, True, of_tokens)
    if mixed and rows.weights is not None:
        weights[:, : rows.weights.shape[1]] = rows.weights
    # Copy the ids: the block caches them, and a graph may overwrite the result of an op.
    return ids.copy_(rows.ids), weights


def batch_of(batch: Sequence[int]) -> Batch | None:
    """Return the :class:`Batch` that ``tracing.batch`` describes, or None if it is empty."""
    return Batch(batch[0], frozenset(batch[1:])) if batch else None


@traced(
    "layer_adapter_ids(str[] names, int default, SymInt[] leading, Device device, "
    "bool tokens_first, bool of_tokens) -> Tensor",
    fake=lambda names, default, leading, device, *_: _empty_ids(leading, device),
    tags=READS_MORE,
)
def _layer_adapter_ids(
    names: Sequence[str], default: int, leading: Sequence[int], device: torch.device, *where: Any
) -> Tensor:
    block = _context.current(layer_names.handle, in_graph=True)
    if block is None:
        if default == NOBODY:
            raise no_rows(repr(list(names)))
        return torch.full((math.prod(leading),), default, dtype=torch.int32, device=device)
    tokens_first, of_tokens = where
    rows = block.rows_among(tuple(names), torch.Size(leading), device, tokens_first, of_tokens)
    return renumbered(rows.ids, rows.used)


def _empty_ids(leading: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty((math.prod(leading),), dtype=torch.int32, device=device)
