"""Which adapter has each row of a batch: ``adapters([...])``, ids, plans, and layouts of rows."""

from . import attachment, context, layouts
from .assignment import BASE, Assignment, Batch, NamedRows, Names
from .attachment import Pool, UnknownAdapterError, attachments, pool_handle
from .context import Block, adapters, current, forward_of, innermost, of_call
from .generation import generation_scope, repeat_rows, select_rows
from .layer_names import LayerNames, Places, layer_names
from .media_rows import Owners, mixes_names, serve_media
from .packed_rows import packed_block
from .pool_layer import ERROR, PoolLayer, no_block, pool_of
from .rows import (
    Kept,
    Rows,
    all_rows,
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
)
from .traced import batch_of, block_of_graph, layer_rows, noted, pool_rows

__all__ = [
    "BASE",
    "ERROR",
    "Assignment",
    "Batch",
    "Block",
    "Kept",
    "LayerNames",
    "NamedRows",
    "Names",
    "Owners",
    "Places",
    "Pool",
    "PoolLayer",
    "Rows",
    "UnknownAdapterError",
    "adapters",
    "all_rows",
    "attachment",
    "attachments",
    "batch_of",
    "block_of_graph",
    "capturing",
    "constant",
    "context",
    "current",
    "everywhere",
    "forward_of",
    "generation_scope",
    "group",
    "innermost",
    "keep",
    "layer_names",
    "layer_rows",
    "layouts",
    "mixes_names",
    "no_block",
    "noted",
    "of_call",
    "packed_block",
    "pool_handle",
    "pool_of",
    "pool_rows",
    "repeat_rows",
    "rows_of",
    "scales",
    "select_rows",
    "serve_media",
    "several_processes",
    "subset",
    "together",
]
