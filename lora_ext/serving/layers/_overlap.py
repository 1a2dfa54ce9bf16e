"""Computation of the first half of an update, in parallel with the base layer's product.

``lora_ext.attach(model, pool, overlap=True)`` sets an :class:`Overlap` on every linear layer. The
first half of the update, shrink (``A x``), needs only x, so it can run on a second CUDA stream at
the same time as the base product. The second half, expand, adds ``B A x`` to the output of the base
layer, so it runs after both. In a captured graph the two streams become two branches.

Our choice: off by default, and used for at most :data:`MOST_ROWS` rows. With few rows the time of
the base product is the time to read its weights, and multiprocessors are idle, so the latency of
shrink can be hidden. With more rows the thread blocks of the product fill the device, and shrink
would compete with them. Neither case has been timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext.rows import current

from ._multi_lora import MultiLoraLinear, with_bias
from ._siblings import is_plain_input, is_plain_layer

#: Maximum number of rows of an overlapped update; it is the limit of the decode kernels.
MOST_ROWS = 256


def begin_early(layers: Mapping[str, nn.Module]) -> None:
    """Set the same :class:`Overlap` on all linear layers in ``layers``."""
    overlap = Overlap()
    for layer in layers.values():
        if type(layer) is MultiLoraLinear:
            layer.overlap = overlap


class Overlap:
    """Side streams, one for each stream that calls layers.

    A side stream writes the result of shrink, and the calling stream reads it. When this tensor is
    freed, torch may reuse its memory for the next shrink on the same side stream. Before that
    shrink, the side stream waits for the earlier work of the stream that calls the layer. This work
    includes the read only if the same stream made both calls. Two calling streams therefore never
    share a side stream.

    Args:
        cuda: ``torch.cuda``, or its replacement in a test.
        devices: device types that have streams.
    """

    def __init__(self, cuda: Any = torch.cuda, devices: Collection[str] = ("cuda",)):
        self._cuda = cuda
        self._devices = devices
        self._sides: dict[tuple[torch.device, int], Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Overlap:
        return self

    def output(self, layer: MultiLoraLinear, x: Tensor) -> Tensor | None:
        """Return the output of a layer, or None if the layer must compute it on one stream.

        Raises:
            ValueError: If an op rejects its arguments.
        """
        slab = layer.slab
        few = x.numel() <= MOST_ROWS * slab.in_features
        if x.device.type not in self._devices or not (few and is_plain_input(x)):
            return None
        block = current(layer.handle)
        if block is None or layer.is_head or not is_plain_layer(layer, x):
            return None
        rows = layer.rows_in(block, x.shape[:-1], x.device)
        if not rows.used:
            return None
        here = self._cuda.current_stream(x.device)
        key = x.device, here.cuda_stream
        side = self._sides.get(key)
        if side is None:
            side = self._sides[key] = self._cuda.Stream(x.device)
        x2d = x.reshape(-1, slab.in_features)  # (T, I)
        table, ranks = slab.page_table, slab.ranks
        side.wait_stream(here)
        try:
            with self._cuda.stream(side):
                v = ops.lora_shrink(
                    x2d, slab.a_pages, rows.ids, slab.scale, ranks, table, rows.plan
                )  # (T, R)
            y = layer.base(x)
        finally:
            here.wait_stream(side)  # x and v may be freed after this
        y = y.contiguous()
        y2d = y.view(-1, y.shape[-1])  # (T, O)
        ops.lora_expand_(y2d, v, slab.b_pages, rows.ids, ranks, table, rows.plan)
        return y if slab.bias is None else with_bias(y, slab, rows.ids)
