"""Which adapter has each row of a batch: ``adapters([...])``, ids, plans, and layouts of rows.
What is not in ``__all__`` is for other rooms."""

from . import _attachment, _context, _layouts
from ._activation import Activated, last_start
from ._assignment import BASE, Assignment, Batch, NamedRows, Names, refuse_singular
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
    current,
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
    rows_of,
    scales,
    several_processes,
    subset,
    together,
    traced_by_python,
)
from ._traced import NOBODY, batch_of, block_of_graph, layer_rows, no_rows, noted, pool_rows

__all__ = [
    "BASE", "Block", "Names", "PoolLayer", "Rows", "UnknownAdapterError", "adapters", "current",
    "layer_names", "rows_of",
]  # fmt: skip
