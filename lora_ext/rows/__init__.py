"""Choice of an adapter for each row of a batch: ``adapters([...])``, adapter ids, plans, layouts.

Names that are not in ``__all__`` are for other packages of ``lora_ext``. ``docs/notes/serving.md``
describes the data structures. The table lists all state of this package:

==========================================  ===============  ======================================
State                                       Owner            Content and lifetime
==========================================  ===============  ======================================
``_context._block``                         thread and task  innermost block, until it is left;
                                                             ``change_blocks`` and
                                                             ``activated_forward`` replace it until
                                                             their scope is left
``_context._batch``, ``_step``              thread and task  batch or step of the innermost
                                                             ``forward_of`` or ``in_step``
``_context.any_block``, ``any_activated``,  process          open blocks of all threads, written by
``_open``, ``_changes``                                      ``_count`` under ``_open_lock``
``Block.lease``                             block            until the block is left; a backward
                                                             that recomputes a layer renews it until
                                                             the backward ends
``_past.here``                              thread           recorded blocks, by sequence number of
                                                             the autograd node; kept after the
                                                             blocks are left
``_past._timelines``                        process          records of the last 64 threads
``_traced.tracing``                         process          batch of the forward that dynamo traces
``Assignment.kept``, ``_readings``,         assignment       caches, as long as the assignment: for
``Activated._whole_rows``                                    one forward if ``Activated.at`` or
                                                             ``change_blocks`` made it; beyond the
                                                             block if ``_past``, a ``Capturable`` or
                                                             ``AdapterRequests._last`` refers to it
``_rows._constants``                        process          the last 64 tensors
``_rows._by_ids``, ``_widened``             tensor of ids    as long as the tensor
``_attachment._handles``, ``attachments``,  process          weak references to pools, attached
``layer_names``                                              models and layers with their own
                                                             adapters
``_warned...`` of two files                 process          pools for which a warning was shown
``PoolLayer.tokens_first``                  layer            set by the first batch whose shape
                                                             shows whether tokens are the first
                                                             dimension
==========================================  ===============  ======================================
"""

from . import _attachment, _context, _entries, _generation, _layouts, _rows, _traced
from ._activation import Activated, last_start
from ._assignment import Assignment, Batch, Layout, NamedRows, Names, refuse_singular
from ._attachment import (
    LayerNames,
    Places,
    Pool,
    UnknownAdapterError,
    attachments,
    layer_names,
    pool_handle,
)
from ._context import (
    Block,
    adapters,
    context_value,
    current,
    in_step,
    innermost,
    of_call,
    untouched,
)
from ._entries import BASE, Entry, Members, Name
from ._generation import activated_forward, generation_scope, prompt_known, select_rows
from ._pool_layer import ERROR, PoolLayer, no_block, pool_of
from ._rows import (
    Kept,
    Rows,
    capturing,
    constant,
    everywhere,
    group,
    keep,
    planned,
    renumbered,
    rows_of,
    several_processes,
    together,
)
from ._traced import pool_rows

__all__ = [
    "BASE", "Block", "Names", "PoolLayer", "Rows", "UnknownAdapterError", "adapters", "current",
    "layer_names", "rows_of",
]  # fmt: skip
