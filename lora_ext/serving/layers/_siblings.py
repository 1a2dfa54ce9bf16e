"""Compute the updates of layers that receive the same tensor (q, k, v; gate, up) in one op.

``lora_ext.attach(model, pool, fuse_siblings=True)`` sets one :class:`Siblings` on all layers of a
parent module. Groups of layers are found by observing the calls in an ``adapters`` block. The first
layer that is called with a tensor is the leader. A layer that is called later with the same tensor
becomes a follower of the leader. Names are not compared, so q of cross-attention is not grouped
with k and v, which receive another tensor.

A model calls ``q_proj(x)`` before ``k_proj(x)``. The leader therefore also calls the base modules
of its followers, runs one op for all of them, and stores the outputs of the followers. A follower
returns its stored output if it is called with the same unchanged tensor in the same block, thread
and stream. Otherwise the follower computes its output itself. Stored outputs are deleted at the
next call with another tensor, or when the tensor or the block is freed.

The output of a follower is computed before the model calls the follower, so the tensor must not
change in between. The version counter of a tensor shows changes, but inference tensors have no
counter. Under ``torch.inference_mode``, a call that searches for followers therefore keeps a copy
of the tensor. A layer becomes a follower if the tensor equals this copy when the layer is called.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_ext import ops
from lora_ext.layers import PackedLinear, has_other_hooks
from lora_ext.rows import Block, Rows, _rows, innermost

from ._multi_lora import MultiLoraLinear, scale_and_groups, with_bias

#: Number of consecutive calls with an unused stored output after which a leader drops its
#: followers.
MAX_MISSED_CALLS = 3
#: Number of calls of layers without followers after which the search for followers ends. The count
#: restarts when a layer first computes a row with an adapter.
MAX_OBSERVED_CALLS = 64
#: Whether layers on the CPU share ops, too. The CPU has no kernel launches to save, and no decode
#: step or prefill of a whole model became faster (docs/notes/lora.md).
SHARE_ON_CPU = False


def set_siblings(layers: Mapping[str, nn.Module]) -> None:
    """Set one :class:`Siblings` on all linear layers with the same parent and input width."""
    families: defaultdict[tuple[str, int], list[MultiLoraLinear]] = defaultdict(list)
    for name, layer in layers.items():
        if type(layer) is MultiLoraLinear and not layer.is_head:
            families[name.rpartition(".")[0], layer.slab.in_features].append(layer)
    for members in families.values():
        if len(members) > 1:
            siblings = Siblings(members)
            for layer in members:
                layer.siblings = siblings


@dataclass(eq=False)
class _Member:
    """State of one layer, shared by all threads.

    Attributes:
        layer: weak reference to the layer, because the layer owns the :class:`Siblings`.
        followers: layers whose outputs this layer also computes. The tuple is replaced by a new
            one, never changed in place.
        missed_calls: number of consecutive calls, up to the latest, in which a stored output was
            not used.
        adapted: True if the layer has computed a row with an adapter.
    """

    layer: weakref.ref[MultiLoraLinear]
    followers: tuple[_Member, ...] = ()
    missed_calls: int = 0
    adapted: bool = False


class _Call:
    """Latest call in a thread of a leader, or of a layer that may become a leader.

    It does not keep the input or the block alive. If one of them is freed, the outputs are deleted.

    Attributes:
        leader: layer that was called.
        outputs: stored outputs that were not used yet, by name of the follower.
        waiting: number of stored outputs that were not used, including deleted outputs.
    """

    __slots__ = ("_block", "_copy", "_stream", "_version", "_x", "leader", "outputs", "waiting")

    def __init__(self, leader: _Member, x: Tensor, block: Block, keeps_copy: bool):
        self.leader, self.waiting = leader, 0
        outputs: dict[str, Tensor] = {}
        self.outputs = outputs
        self._x = weakref.ref(x, lambda _: outputs.clear())
        self._block = weakref.ref(block, lambda _: outputs.clear())
        self._version, self._stream = _version(x), _stream(x)
        keeps_copy = keeps_copy and x.is_inference() and not _rows.capturing(x.device)
        self._copy = x.clone() if keeps_copy else None

    def has_input(self, x: Tensor) -> bool:
        """Return whether ``x`` is this call's tensor, in the same version, block and stream."""
        block = innermost()
        return (
            self._x() is x
            and self._version == _version(x)
            and block is not None
            and self._block() is block
            and _is_plain_mode(x)
            and self._stream == _stream(x)
        )

    def is_unchanged(self, x: Tensor) -> bool:
        """Return whether ``x`` has the same values as in this call.

        For inference tensors this compares values, which waits for the device.
        """
        if not x.is_inference():
            return self._version == x._version
        return self._copy is not None and torch.equal(self._copy, x)


class _ThreadState(threading.local):
    """State of one thread."""

    call: _Call | None = None


class Siblings:
    """Layers with the same parent and input width. Any thread may call them.

    State:

    * ``_members``: one :class:`_Member` per layer, by name, shared by all threads.
    * ``_observations``: remaining number of :data:`MAX_OBSERVED_CALLS`, shared by all threads.
    * ``_needs_copy``: True if the next call keeps a copy of its input for
      :meth:`_Call.is_unchanged`, even if the layer has followers already.
    * ``_thread.call``: the latest call in this thread, until the next call with another tensor.
    """

    def __init__(self, layers: Iterable[MultiLoraLinear]) -> None:
        self._members = {layer.name: _Member(weakref.ref(layer)) for layer in layers}
        self._observations = MAX_OBSERVED_CALLS
        self._needs_copy = False
        self._thread = _ThreadState()

    def take_output(self, layer: MultiLoraLinear, x: Tensor) -> Tensor | None:
        """Remove and return the layer's output for ``x`` that a leader has stored, or None."""
        call = self._thread.call
        if call is None or not call.outputs:
            return None
        if not call.has_input(x):
            self._drop(call)
            return None
        y = call.outputs.pop(layer.name, None)
        if y is not None:
            call.waiting -= 1
            if not call.waiting:
                call.leader.missed_calls = 0
        return y

    def fused_output(
        self, layer: MultiLoraLinear, x: Tensor, y: Tensor, rows: Rows
    ) -> Tensor | None:
        """Return the layer's output, computed in one op with the outputs of its followers.

        The layer calls this method if there is no stored output for it and a row has an adapter.

        1. Observe: if ``x`` is the tensor of the latest call in this thread, and another layer was
           called, that layer is the leader. This layer becomes a follower if there is room for it.
        2. Otherwise drop the latest call (a missed call if an output was not used), and store this
           call as the latest one.
        3. Call the base layers of this layer's followers, add the updates of all layers in one op,
           and store the followers' outputs.

        Args:
            layer: layer that the model calls.
            x: input of the layer.
            y: output of the base layer for ``x``; changed in place unless the result is None.
            rows: adapters of the rows.

        Returns:
            The output, or None if the caller must compute this layer alone. This is the case if one
            of these statements is true:

            * Layers on this device do not share ops.
            * The layer has no followers, even if calls are still observed to find them.
            * The layer is recomputed in backward, or ``x`` is not :func:`plain <is_plain_input>`.
            * The layer is a follower (step 1). The leader will compute the layer's output from its
              next call on, or later if this call had no copy of an inference tensor.
            * The layer is not :func:`plain <is_plain_layer>`, or none of its followers is.
            * The output of a base layer is not contiguous, or its dtype is not that of ``x``.

        Raises:
            ValueError: If the op rejects its arguments.
        """
        if not (x.is_cuda or SHARE_ON_CPU):
            return None
        member = self._members[layer.name]
        if not member.adapted:  # observe again, since the first adapter may also target siblings
            member.adapted, self._observations = True, MAX_OBSERVED_CALLS
        if not (member.followers or self._observations > 0):
            return None
        # In a backward pass the innermost block is usually None; layers use the forward's block.
        block = innermost()
        if block is None or not is_plain_input(x):
            return None
        last = self._thread.call
        if last is not None:
            if last.leader is not member and last.has_input(x):
                if last.is_unchanged(x):
                    _add_follower(last.leader, member)
                else:  # an inference tensor that has changed, or that was not copied before
                    self._needs_copy = True
                return None  # the leader's call stays the latest one, for other followers
            self._drop(last)
        keeps_copy, self._needs_copy = self._needs_copy or not member.followers, False
        self._thread.call = call = _Call(member, x, block, keeps_copy)
        if not member.followers:  # this call only lets other layers find their leader
            self._observations -= 1
            return None
        if not is_plain_layer(layer, x):
            return None
        ys, slabs, names = [y], [layer.slab], []
        for each in member.followers:
            follower = each.layer()
            if (
                follower is not None
                and follower.tokens_first == layer.tokens_first
                and is_plain_layer(follower, x)
            ):
                ys.append(follower.base(x))
                slabs.append(follower.slab)
                names.append(follower.name)
        if not names:
            return None
        for each in ys:  # the op adds in place
            if each.dtype != x.dtype or not each.is_contiguous():
                return None
        _add_updates(ys, x, slabs, rows)
        call.waiting = len(names)
        call.outputs.update(zip(names, ys[1:], strict=True))
        return ys[0]

    def _drop(self, call: _Call) -> None:
        """Discard a call. Count the call as missed if an output was not used."""
        self._thread.call = None
        if call.waiting:
            call.outputs.clear()
            call.leader.missed_calls += 1
            if call.leader.missed_calls >= MAX_MISSED_CALLS:
                call.leader.followers = ()


def _add_follower(leader: _Member, member: _Member) -> None:
    known = leader.followers
    room = len(known) < ops.MOST_SIBLINGS - 1
    if room and member not in known and leader.missed_calls < MAX_MISSED_CALLS:
        leader.followers = (*known, member)


def _is_plain_mode(x: Tensor) -> bool:
    """Return whether no mode of torch (such as autograd or autocast) affects ops on ``x``."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
        or _rows.traced_by_python()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or _has_any_global_hook()
    )


def is_plain_input(x: Tensor) -> bool:
    """Return whether products with ``x`` may be computed before the model calls the layers."""
    return type(x) is Tensor and _is_plain_mode(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def is_plain_layer(layer: MultiLoraLinear, x: Tensor) -> bool:
    """Return whether a layer computes only a product and an update for ``x``.

    This is false if an adapter scales the layer's outputs, or if its base layer has hooks,
    is offloaded, or stores its weight in another format.
    """
    base, slab = layer.base, layer.slab
    a, kind = slab.a_pages, type(base)
    return not (
        a is None
        or slab.dtype != x.dtype
        or slab.scaled
        or slab.before is not None
        or slab.was_replaced
        or (kind is not nn.Linear and kind is not PackedLinear)
        or type(base._parameters.get("weight")) is not nn.Parameter
        or "forward" in layer.__dict__
        or "forward" in base.__dict__
        or has_other_hooks(base)
        or layer._forward_hooks
        or layer._forward_pre_hooks
    )


def _add_updates(ys: list[Tensor], x: Tensor, slabs: list[Any], rows: Rows) -> None:
    """Add the rows' updates in place to each of the contiguous tensors ``ys (..., O)``."""
    scales, groups = zip(*(scale_and_groups(slab, rows.weights) for slab in slabs), strict=True)
    how: dict[str, Any] = {} if rows.weights is None else {"weights": rows.weights}
    how |= {} if groups[0] is None else {"groups": groups}
    ops.lora_apply_siblings_(
        [y.view(-1, y.shape[-1]) for y in ys],
        x.reshape(-1, slabs[0].in_features),
        [slab.a_pages for slab in slabs],
        [slab.b_pages for slab in slabs],
        rows.ids,
        scales,
        [slab.ranks for slab in slabs],
        [slab.page_table for slab in slabs],
        rows.plan,
        **how,
    )
    for i, slab in enumerate(slabs):
        if slab.bias is not None:
            ys[i] = with_bias(ys[i], slab, rows)
