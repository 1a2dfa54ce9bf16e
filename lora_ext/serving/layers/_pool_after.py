"""Rescaling of a layer's outputs, for adapters of a pool such as those of IA3.

For slot ``s``, with scales ``c[s]`` (O,) that :meth:`lora_ext.kinds.Kind.after` computes::

    y = c[s] * ((W + scale[s] B[s] A[s]) x) + bias

The kind may also scale the bias. The pool does not contain base weights. Each layer therefore
computes ``c[s]`` when the slot is first used, and caches it until the slot or the weight changes.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._checks import FLOATS
from lora_ext._torch import READS_MORE, traced
from lora_ext.kinds import Factors
from lora_ext.layers import is_quantised, readable_weight
from lora_ext.rows import Block, PoolLayer, _context, _traced, capturing

# A compiled graph can contain numbers and tensors but not objects. An op in the graph finds the
# PoolAfter of a layer by number in this registry, which does not keep layers alive.
_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, PoolAfter] = weakref.WeakValueDictionary()


class Rescale(NamedTuple):
    """Scales of the outputs of D rows."""

    # (D,) indices of the rows, or None in a graph: all T rows, with 1 for rows without scales
    rows: Tensor | None
    c: Tensor  # (D, O + 1), scales; the last column is 1 if the bias is not scaled, else 0
    bias: Tensor | None  # (O,)


def rescaled(y: Tensor, rescale: Rescale) -> Tensor:
    """Replace rows of ``y (..., O)`` by ``c * (y - bias) + bias``, and return the result.

    Rows whose bias is scaled, too, become ``c * y``. Values are rounded once to the dtype of ``y``.
    Other rows are unchanged. If ``y`` is contiguous, it may be changed in place.
    """
    rows, c, bias = rescale
    c, unscaled = c[:, :-1], c[:, -1:]
    if bias is not None:
        bias = bias * unscaled.to(bias.dtype)
    flat = y.reshape(-1, y.shape[-1])  # (T, O)
    part = flat if rows is None else flat[rows]  # (D, O)
    wide = part.to(torch.promote_types(part.dtype, c.dtype))
    total = wide * c if bias is None else (wide - bias) * c + bias
    if rows is None:
        flat = torch.where(c == 1, flat, total.to(y.dtype))
    else:
        flat.index_copy_(0, rows, total.to(y.dtype))
    return flat.view(y.shape)


class PoolAfter:
    """Scales ``c`` of one layer's outputs, by slot of the pool.

    This class is thread-safe: a pinned slot does not change, so threads that compute the same
    scales at the same time get identical results, and any of them may be cached.

    Args:
        base: base layer of the adapters.
        slab: pages and tables of the layer in the pool.
        name: name of the layer, for messages.
    """

    def __init__(self, base: nn.Module, slab: Any, name: str):
        self.base, self.slab, self.name = base, slab, name
        self.number = next(_numbers)  # identifies this object in a compiled graph
        self._known: dict[int, tuple[tuple[Any, ...], Tensor]] = {}
        _by_number[self.number] = self

    def rescale(
        self, block: Block, leading: torch.Size, device: torch.device, tokens_first: bool
    ) -> Rescale | None:
        """Return the scales for :func:`rescaled` of an output with shape ``(*leading, O)``.

        Returns None if no adapter of the rows scales its outputs.
        """
        layout = _context.current_layout(leading, device, tokens_first)
        of_step = block.step_rows(layout)
        if of_step is not None:
            assert block.step is not None
            return Rescale(None, block.step.table(self)[of_step.ids.long()], self.bias)
        if not self.slab.scaled:
            return None
        found = block.slot_rows(self.slab.scaled.keys(), layout)
        if found is None:
            return None
        scales = torch.stack([self.factor(slot) for slot in found.slots])  # (slots, O + 1)
        return Rescale(found.rows, scales[found.which], self.bias)

    def traced_rescale(
        self, layer: PoolLayer, leading: Sequence[int], device: torch.device
    ) -> Rescale:
        """Return the scales for :func:`rescaled` of all rows of a layer in a compiled graph.

        The adapters of the rows are those of the block in which the graph runs.
        """
        width, dtype = self.slab.out_features + 1, self.slab.after.dtype
        where = dtype, device, layer.tokens_first, _traced.tracing.batch
        c = _active_after(layer.handle, self.number, leading, width, *where)
        return Rescale(None, c, self.bias)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer before any scaling, or None."""
        return getattr(self.base, "bias", None)

    def factor(self, slot: int) -> Tensor:
        """Return ``(O + 1,)``: the scales of a slot, then 1 if the bias is not scaled, else 0.

        The tensor is cached until the slot or the weight changes.
        """
        version, kind, of_bias = self.slab.scaled[slot]
        key: tuple[Any, ...] = (version,)
        weight = None
        if kind.needs_weight and is_quantised(self.base):
            # The key contains the stored tensors, so that a hit does not dequantise the weight.
            stored = itertools.chain(self.base.parameters(), self.base.buffers())
            key += tuple((id(t), 0 if t.is_inference() else t._version) for t in stored)
        elif kind.needs_weight:
            weight = self._weight(kind.title)
            changes = 0 if weight.is_inference() else weight._version
            key += weight.data_ptr(), changes, weight.dtype, weight.device
        known = self._known.get(slot)
        if known is not None and known[0] == key:
            return known[1]
        slab = self.slab
        # The result must not be an inference tensor, because a later forward may need gradients.
        with torch.inference_mode(False), torch.no_grad():
            c = slab.after[slot]  # (O,)
            if kind.needs_weight:
                weight = self._weight(kind.title) if weight is None else weight
                pages = slab.page_table[slot]
                pages = pages[pages >= 0].long()
                a = slab.a_pages[pages].flatten(0, 1)  # (8n, I), rows after the rank are 0
                b = slab.b_pages[pages].permute(1, 0, 2).flatten(1)  # (O, 8n)
                factors = Factors(a.to(weight.device), b.to(weight.device), float(slab.scale[slot]))
                after = kind.after({kind.vector: c}, factors, weight.detach())
                c = after.scale
            c = torch.cat([c, torch.full_like(c[:1], not of_bias)])
        if c.is_cuda:
            if capturing(c.device):
                return c  # not cached, as its memory belongs to the graph
            # Other streams may read the cached tensor without waiting for this one.
            torch.cuda.current_stream(c.device).synchronize()
        self._known[slot] = key, c
        return c

    def _weight(self, title: str) -> Tensor:
        purpose = f"MultiLoraLinear: {self.name}: {title}"
        linear = isinstance(self.base, nn.Linear)
        weight, _ = readable_weight(self.base, purpose, fan_in_fan_out=not linear)
        if weight.is_meta or weight.dtype not in FLOATS:  # quantised weights have separate scales
            raise ValueError(
                f"{purpose}: expected a base weight with values in float16, bfloat16, float32 or "
                f"float64, to scale its outputs, found {weight.dtype} on {weight.device}"
            )
        return weight


class AfterTable:
    """Scales of one layer's outputs at a fixed address, for captured graphs.

    Args:
        factors: scales of the layer.
        slots: number of slots of the pool.

    Attributes:
        c: scales ``(slots + 1, O + 1)``. Rows of slots without scales contain ones, and so does the
            last row, which is for the base model (slot -1).
    """

    def __init__(self, factors: PoolAfter, slots: int):
        self._factors = factors
        self._holds: dict[int, Tensor] = {}
        like = factors.slab.after
        with torch.inference_mode(False):
            self.c = torch.ones(slots + 1, like.shape[1] + 1, dtype=like.dtype, device=like.device)

    def follow(self, residents: Iterable[Any]) -> None:
        """Write the scales of a step's adapters, if they have changed since the last call."""
        for slot in (resident.slot for resident in residents):
            c = self._factors.factor(slot) if slot in self._factors.slab.scaled else None
            if self._holds.get(slot) is c:
                continue
            if c is None:
                self.c[slot].fill_(1)
                del self._holds[slot]
            else:
                self.c[slot].copy_(c)
                self._holds[slot] = c


# This is an op like ``active_adapters``, because a compiled graph cannot read a ContextVar.
@traced(
    "active_after(int handle, int layer, SymInt[] leading, SymInt features, "
    "ScalarType dtype, Device device, bool tokens_first, SymInt[] batch) -> Tensor",
    fake=lambda handle, layer, leading, features, dtype, device, *_: torch.empty(
        math.prod(leading), features, dtype=dtype, device=device
    ),
    tags=READS_MORE,
)
def _active_after(
    handle: int, layer: int, leading: Sequence[int], features: int, *where: Any
) -> Tensor:
    dtype, device, tokens_first, batch = where
    c = torch.ones(math.prod(leading), features, dtype=dtype, device=device)
    block, factors = _context.current(handle, in_graph=True), _by_number[layer]
    if block is not None:
        with _context.forward_of(_traced.batch_of(batch)):
            rescale = factors.rescale(block, torch.Size(leading), device, tokens_first)
        if rescale is not None:
            rows, found, _ = rescale
            return found if rows is None else c.index_copy_(0, rows, found)
    return c
