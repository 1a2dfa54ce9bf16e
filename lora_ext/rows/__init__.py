"""The adapter of each row of a batch: ``adapters([...])``, ids, plans, and layouts of rows.

Names that are not in ``__all__`` are for other packages of ``lora_ext``. ``docs/notes/serving.md``
describes the data structures. The table lists all state of this package with its owner and
lifetime:

==========================================  =====================================================
``_context._block``                         context variable: thread and task, until the block is
                                            left; ``change_blocks`` and ``activated_forward``
                                            replace it until their scope is left
``_context._batch``, ``_step``              context variables: thread and task, until ``forward_of``
                                            or ``in_step`` is left
``_context.any_block``, ``any_activated``,  process: the open blocks of all threads, written by
``_open``, ``_changes``                     ``_count`` under ``_open_lock``
``Block.lease``                             the block, until it is left; a backward that recomputes
                                            a layer renews it until the backward ends
``_past.here``                              thread: the blocks that it recorded, by sequence number
                                            of the autograd node; kept after the blocks are left
``_past._timelines``                        process: the same records, of the last 64 threads
``_traced.tracing``                         process: batch of the forward that dynamo traces
``Assignment.kept``, ``_readings``,         the assignment. One that ``change_blocks`` or
``Activated._whole_rows``                   ``Activated.at`` makes may live for one forward. One to
                                            which ``_past``, ``Capturable._assignment`` or
                                            ``AdapterRequests._last`` refers outlives its block
``_rows._constants``                        process: the last 64 tensors
``_rows._by_ids``, ``_widened``             the tensor of ids
``_attachment._handles``, ``attachments``,  process, by weak references: pools, attached models,
``layer_names``                             layers with their own adapters
``_warned...`` of two files                 process: pools that a warning was given for
``PoolLayer.tokens_first``                  the layer, set by the first batch whose shape shows
                                            whether the first dimension is tokens
==========================================  =====================================================
"""

from . import _attachment, _context, _layouts
from ._activation import Activated, last_start
from ._assignment import BASE, Assignment, Batch, Layout, NamedRows, Names, refuse_singular
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
    current_layout,
    forward_of,
    in_step,
    innermost,
    of_call,
    untouched,
)
from ._generation import (
    activated_forward,
    activated_in,
    change_blocks,
    generation_scope,
    has_activated,
    packed_block,
    prompt_known,
    repeat_rows,
    select_rows,
)
from ._pool_layer import ERROR, PoolLayer, no_block, pool_of
from ._rows import (
    Kept,
    Rows,
    all_rows,
    capture,
    capturing,
    constant,
    everywhere,
    group,
    keep,
    planned,
    rows_of,
    scales,
    several_processes,
    subset,
    together,
    traced_by_python,
)
from ._traced import NOBODY, batch_of, block_of_graph, layer_rows, no_rows, pool_rows, tracing

__all__ = [
    "BASE", "Block", "Names", "PoolLayer", "Rows", "UnknownAdapterError", "adapters", "current",
    "layer_names", "rows_of",
]  # fmt: skip
