"""Rows for compiled graphs.

torch.compile cannot see a ContextVar. A graph asks for its ids through an op that reads the block
while the graph runs, so one graph serves every assignment of rows to adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext._torch import READS_MORE, traced

from . import _context
from ._assignment import Batch, TokensFirstError
from ._attachment import layer_names
from ._rows import Rows, constant, rows_of


class _Noted:
    """What the model's forward that is being traced was given: the number of sequences, then their
    lengths in tokens; nothing where no attached model's forward is. An attribute, as dynamo traces
    neither contextvars nor thread-locals: of two threads that trace, the one may read the other's,
    which its names then do not fit, or fit as well."""

    batch: tuple[int, ...] = ()


noted = _Noted()


#: The default of a layer whose active adapter begins in mid-sequence.
NOBODY = -2


def no_rows(name: str) -> ValueError:
    """Of a forward outside every block, of which nobody knows where such an adapter begins."""
    return ValueError(
        f"adapters: input_ids: expected the rows in which {name} is invoked, as it begins in "
        "mid-sequence (alora_invocation_tokens), found no block around the layer; enter "
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
) -> Rows:
    """Rows for a pool's layer in whatever block the graph will run; ids are slots."""
    ids = _active_adapter_ids(
        handle, leading, device, tokens_first, of_tokens, noted.batch, default
    )
    return Rows(tuple(range(num_slots)), ids, ops.lora_plan(ids, num_slots))


def layer_rows(
    names: tuple[str, ...],
    default: int,
    leading: torch.Size,
    device: torch.device,
    tokens_first: bool,
    of_tokens: bool,
) -> Rows:
    """Rows for a layer with these adapters of its own, all of which take part; outside a block
    every row has the adapter ``default``; :data:`NOBODY`: that raises."""
    ids = _layer_adapter_ids(list(names), default, leading, device, tokens_first, of_tokens)
    return rows_of(ids, len(names))


def block_of_graph(handle: int, default: str | None) -> _context.Block | None:
    """The block that a compiled graph runs in.

    Raises:
        RuntimeError: there is none, and the base model is not to serve then.
    """
    block = _context.current(handle, in_graph=True)
    if block is None and default is not None:
        raise RuntimeError(
            f"attach: default={default!r}: expected a block around a compiled forward, found none: "
            "torch.compile does not trace the one that default enters; enter "
            "lora_ext.adapters(...) around the call"
        )
    return block


@traced(
    "active_adapter_ids(int handle, SymInt[] leading, Device device, bool tokens_first, "
    "bool of_tokens, SymInt[] batch, str? default) -> Tensor",
    fake=lambda handle, leading, device, *_: _empty_ids(leading, device),
    tags=READS_MORE,
)
def _active_adapter_ids(
    handle: int,
    leading: Sequence[int],
    device: torch.device,
    tokens_first: bool,
    of_tokens: bool,
    batch: Sequence[int],
    default: str | None,
) -> Tensor:
    block = block_of_graph(handle, default)
    if block is None:
        return torch.full((math.prod(leading),), -1, dtype=torch.int32, device=device)
    with _context.forward_of(batch_of(batch)):
        try:
            rows = block.rows(torch.Size(leading), device, tokens_first, of_tokens)
        except TokensFirstError:
            rows = block.rows(torch.Size(leading), device, True, of_tokens)
    return rows.ids.clone()  # a graph may reuse the memory of what an op returns


def batch_of(batch: Sequence[int]) -> Batch | None:
    """:class:`Batch` as a graph holds it."""
    return Batch(batch[0], frozenset(batch[1:])) if batch else None


@traced(
    "layer_adapter_ids(str[] names, int default, SymInt[] leading, Device device, "
    "bool tokens_first, bool of_tokens) -> Tensor",
    fake=lambda names, default, leading, device, *_: _empty_ids(leading, device),
    tags=READS_MORE,
)
def _layer_adapter_ids(
    names: Sequence[str],
    default: int,
    leading: Sequence[int],
    device: torch.device,
    tokens_first: bool,
    of_tokens: bool,
) -> Tensor:
    block = _context.current(layer_names.handle, in_graph=True)
    if block is None:
        if default == NOBODY:
            raise no_rows(repr(list(names)))
        return torch.full((math.prod(leading),), default, dtype=torch.int32, device=device)
    shape = torch.Size(leading)
    rows = block.rows_among(tuple(names), shape, device, tokens_first, of_tokens)
    return constant([*rows.used, -1], torch.int32, device)[rows.ids.long()]  # -1 finds the last


def _empty_ids(leading: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty((math.prod(leading),), dtype=torch.int32, device=device)
