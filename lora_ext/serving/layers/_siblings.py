"""Layers of one parent that see the very same tensor (q, k, v; gate, up): their updates in one op.

``lora_ext.attach(model, pool, fuse_siblings=True)`` introduces the layers of each parent to each
other. Who are siblings is learned, not named: where one layer is called with the tensor that
another was called with before, under one block, it follows that one from then on. So attention
over other states has its own siblings, whatever its layers are called.

A model calls ``q_proj(x)`` before ``k_proj(x)``. The first sibling therefore calls the bases of its
followers as well, runs one op for all, and keeps the others' outputs until they are called with the
same tensor, unchanged, in the same block, thread and stream. Whatever else happens goes the way of
single layers, and what was kept is dropped: at the next call with another tensor, at the latest
when the tensor or the block goes.

Under ``torch.inference_mode`` nothing counts changes in place. There a layer follows another only
after a look: the tensor was the same, bit for bit, when the second layer was called. A model that
changes it in between does so in the look as well, unless it chooses anew at every call.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch

from lora_ext import ops
from lora_ext.layers import PackedLinear, has_other_hooks
from lora_ext.rows import Block, Rows, capturing, innermost, traced_by_python

from ._multi_lora import MultiLoraLinear, with_bias

#: So many times in a row may a follower not come for its output; then its leader is alone again.
_PATIENCE = 3
#: Calls of a parent's layers after which those without followers are left alone, until an adapter
#: comes to another of them.
_LESSONS = 64
#: Whether layers on the CPU share ops, too. It saves no launches there, and neither decode steps
#: nor prefills of whole models gained by it (docs/notes/lora.md).
_ON_CPU = False


def introduce(layers: Mapping[str, nn.Module]) -> None:
    """Let those of ``layers``, by their names, that may be siblings know each other."""
    families: defaultdict[tuple[str, int], list[MultiLoraLinear]] = defaultdict(list)
    for name, layer in layers.items():
        if type(layer) is MultiLoraLinear and not layer.is_head:
            families[name.rpartition(".")[0], layer.slab.in_features].append(layer)
    for members in families.values():
        if len(members) > 1:
            siblings = Siblings(members)
            for layer in members:
                layer.siblings = siblings


class _Call:
    """A tensor as a layer was called with it, and where. Keeps neither of them alive."""

    __slots__ = ("_block", "_copy", "_stream", "_version", "_x", "leader", "outputs", "waiting")

    def __init__(self, leader: str, x: Tensor, block: Block, looks: bool):
        self.leader = leader
        self.waiting = 0  # followers that were not called yet
        outputs: dict[str, Tensor] = {}
        self.outputs = outputs  # theirs
        self._x = weakref.ref(x, lambda _: outputs.clear())
        self._block = weakref.ref(block, lambda _: outputs.clear())
        self._version, self._stream = _version(x), _stream(x)
        # No version of an inference tensor says that it was changed in place.
        looks = looks and x.is_inference() and not capturing(x.device)
        self._copy = x.clone() if looks else None

    def had(self, x: Tensor) -> bool:
        """Whether the same tensor comes again, not changed since, to the same place."""
        block = innermost()
        return (
            self._x() is x
            and self._version == _version(x)
            and block is not None
            and self._block() is block
            and _unwatched(x)
            and self._stream == _stream(x)
        )

    def is_as_it_was(self, x: Tensor) -> bool:
        """Whether nobody has changed the tensor in place since; waits for an inference tensor's
        device."""
        if not x.is_inference():
            return self._version == x._version
        return self._copy is not None and torch.equal(self._copy, x)


class _Here(threading.local):
    """What a thread remembers of one parent: calls of others mean nothing to it."""

    first: _Call | None = None  # with the tensor that the last call had


class Siblings:
    """The layers of one parent that read rows of one width.

    Any thread may call them; what they know of each other is replaced, never changed.
    """

    def __init__(self, members: Iterable[MultiLoraLinear]) -> None:
        self._members = {layer.name: weakref.ref(layer) for layer in members}
        self._followers: dict[str, tuple[str, ...]] = {}
        self._missed: dict[str, int] = {}
        self._adapted: frozenset[str] = frozenset()  # members that have had an adapter
        self._lessons = _LESSONS
        self._looks = False  # whether the next call keeps a copy of its tensor
        self._here = _Here()

    def output(self, layer: MultiLoraLinear, x: Tensor) -> Tensor | None:
        """What a sibling has computed for this layer and tensor, which is then forgotten here."""
        first = self._here.first
        if first is None or not first.outputs:
            return None
        if not first.had(x):
            self._drop(first)
            return None
        y = first.outputs.pop(layer.name, None)
        if y is not None:
            first.waiting -= 1
            if not first.waiting and self._missed:
                self._missed.pop(first.leader, None)
        return y

    def together(self, layer: MultiLoraLinear, x: Tensor, y: Tensor, rows: Rows) -> Tensor | None:
        """``y``, the base's output, with the update of each row, as well as its followers'; None
        where the layer is to do its own.

        Raises:
            ValueError: what the op refuses.
        """
        if not (x.is_cuda or _ON_CPU):
            return None
        if layer.name not in self._adapted:
            self._adapted |= {layer.name}
            self._lessons = _LESSONS
        leads = layer.name in self._followers
        # There is none in a backward, which sees that of its forward.
        block = innermost()
        if not (leads or self._lessons > 0) or block is None:
            return None
        if not plain(x):
            return None
        first = self._here.first
        if first is not None:
            if first.leader != layer.name and first.had(x):
                if first.is_as_it_was(x):
                    self._learn(first.leader, layer.name)
                else:
                    self._looks = True  # at the next call
                return None
            self._drop(first)
        self._here.first = call = _Call(layer.name, x, block, self._looks or not leads)
        self._looks = False
        names = self._followers.get(layer.name)
        if names is None:
            self._lessons -= 1
            return None
        if not goes_along(layer, layer, x):
            return None
        ys, slabs, coming = [y], [layer.slab], []
        for name in names:
            follower = self._members[name]()
            if follower is not None and goes_along(follower, layer, x):
                ys.append(follower.base(x))
                slabs.append(follower.slab)
                coming.append(name)
        for each in ys:
            if each.dtype != x.dtype or not each.is_contiguous():
                return None
        if coming:
            _update(ys, x, slabs, rows)
            call.waiting = len(coming)
            for i, name in enumerate(coming, 1):
                call.outputs[name] = ys[i]
            return ys[0]
        return None

    def _learn(self, leader: str, follower: str) -> None:
        known = self._followers.get(leader, ())
        alone = self._missed.get(leader, 0) >= _PATIENCE
        if not alone and follower not in known and len(known) < ops.MOST_SIBLINGS - 1:
            self._followers[leader] = (*known, follower)

    def _drop(self, first: _Call) -> None:
        """Forget a call, and outputs that nobody came for."""
        self._here.first = None
        if first.waiting:
            first.outputs.clear()
            missed = self._missed[first.leader] = self._missed.get(first.leader, 0) + 1
            if missed >= _PATIENCE:
                self._followers.pop(first.leader, None)


def _unwatched(x: Tensor) -> bool:
    """Whether nobody records products, or computes them in another way, at this moment."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
        or traced_by_python()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or modules_of_torch._has_any_global_hook()
    )


def plain(x: Tensor) -> bool:
    """Whether a product with ``x`` may be made early."""
    return type(x) is Tensor and _unwatched(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def goes_along(layer: MultiLoraLinear, leader: MultiLoraLinear, x: Tensor) -> bool:
    """Whether a layer does no more with ``x`` than product and update, and its base is called by
    nobody's rules but torch's: no hook, no offloading, no format of its own."""
    base, slab = layer.base, layer.slab
    a, kind = slab.a_pages, type(base)
    return not (
        a is None
        or a.dtype != x.dtype
        or slab.dora
        or slab.was_replaced
        or layer.tokens_first != leader.tokens_first
        or (kind is not nn.Linear and kind is not PackedLinear)
        or type(base._parameters.get("weight")) is not nn.Parameter
        or "forward" in layer.__dict__
        or "forward" in base.__dict__
        or has_other_hooks(base)
        or layer._forward_hooks
        or layer._forward_pre_hooks
    )


def _update(ys: list[Tensor], x: Tensor, slabs: list[Any], rows: Rows) -> None:
    """Each of ``ys (..., O)``, all contiguous, with the update of each row, in place."""
    ops.lora_apply_siblings_(
        [y.view(-1, y.shape[-1]) for y in ys],
        x.reshape(-1, slabs[0].in_features),
        [slab.a_pages for slab in slabs],
        [slab.b_pages for slab in slabs],
        rows.ids,
        [slab.scale for slab in slabs],
        [slab.ranks for slab in slabs],
        [slab.page_table for slab in slabs],
        rows.plan,
    )
    for i, slab in enumerate(slabs):
        if slab.bias is not None:
            ys[i] = with_bias(ys[i], slab, rows.ids)
