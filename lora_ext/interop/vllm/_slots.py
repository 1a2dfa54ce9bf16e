"""Slots of vLLM: the slot of each row of a step, and the rank of the adapter in each slot.

vLLM stores each loaded adapter in a *slot*. Buffers that vLLM fills once per step contain the slot
of each row.

vLLM stores the factors of all adapters of a layer in two tensors, *stacks*, ``(slots, 1, R, I)``
and ``(slots, 1, O, R)``. ``R`` is the engine's ``max_lora_rank``, ``I`` is the number of input
features and ``O`` of output features. Each adapter has one slot, padded with zeros to ``R``. A
stack has the layout of a *bank*, the stacked factors that lora_ext's ops take. The ops also need
the rank of each adapter, which vLLM does not store.

Shape letters: ``T`` rows of a matrix, ``N`` length of a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.rows import Kept, capturing

_PLANS = 64  # number of cached plans; a step needs one each for tokens, samples and prompts


class OwnedRows(NamedTuple):
    """Slot of each row of a matrix, and the plan: the rows grouped by slot."""

    ids: Tensor  # (T,), -1 for the base model
    plan: Tensor  # result of ops.lora_plan


class Owners:
    """Slots of one kind of rows: of all tokens of a step, or of the sampled positions.

    Args:
        buffer: ``(N,)`` int64, the slot of each row. vLLM fills it, and a compiled or captured
            graph reads it when it runs.
        slots: number of slots.
        kind: "tokens" or "samples", for messages.
    """

    def __init__(self, buffer: Tensor, slots: int, kind: str):
        self._buffer, self._slots, self._kind = buffer, slots, kind
        self._kept = Kept(_PLANS)
        self._names: frozenset[int] = frozenset()
        self.count = 0

    def follow(self, names: Sequence[int]) -> None:
        """Set the adapters of the next step's rows, as ``lora_int_id``; 0 is the base model."""
        self._kept = Kept(_PLANS)
        self.count, self._names = len(names), frozenset(names)
        self._buffer[self.count :] = -1  # Padding rows use the base model.

    def rows(self, count: int, begin: int = 0) -> OwnedRows | None:
        """Return the slots of the step's rows ``begin`` to ``begin + count``, and their plan.

        Returns None if all rows of the step use the base model.
        """
        device = self._buffer.device
        if not (any(self._names) or capturing(device)):
            return None
        # All layers use the cached plan. In a captured graph, the first layer's op computes it, so
        # each replay groups the rows of the current step once.
        return self._kept.get((begin, count), device, self._part, begin, count)

    def _part(self, begin: int, count: int) -> OwnedRows:
        return self._group(self._buffer[begin : begin + count])

    def as_first(self, count: int) -> OwnedRows | None:
        """Return ``count`` rows that use the adapter of the step's first row.

        All rows of the step must use the same adapter. Returns None for the base model.
        """
        return self._group(self._buffer[:1].repeat(count)) if any(self._names) else None

    def _group(self, ids: Tensor) -> OwnedRows:
        return OwnedRows(ids, ops.lora_plan(ids, self._slots))

    def all_alike(self) -> bool:
        """Return whether all rows of the step use the same adapter, or all use the base model."""
        return len(self._names) == 1

    def mismatch(self, count: int) -> RuntimeError:
        """Return the error for a matrix of ``count`` rows if their adapters are not known."""
        return RuntimeError(
            f"lora_ext: expected a matrix of the {self.count} {self._kind} of this step, found "
            f"{count} rows, whose adapters are unknown; set LORA_EXT_VLLM=0 to use vLLM's own "
            "kernels"
        )


class Stack:
    """View of a stack as a bank, and the rank of the adapter in each slot.

    The rank is the number of rows of ``a`` (or columns of ``b``) up to the last nonzero one.
    """

    def __init__(self, stack: Tensor, rank_dim: int):
        self.bank = stack.flatten(0, 1)  # (slots, R, I) or (slots, O, R)
        self._other_dim = {1: 1, 2: 0}[rank_dim]
        self._on_host = [0] * self.bank.shape[0]
        # vLLM also fills slots outside of inference mode, where an inference tensor cannot change.
        with torch.inference_mode(False):
            self.ranks = torch.zeros(self.bank.shape[0], dtype=torch.int32, device=stack.device)
        for slot in range(self.bank.shape[0]):
            self.read(slot)

    def idle(self) -> bool:
        """Return whether no adapter changes this layer; always False during a CUDA graph capture.

        A graph may be replayed after an adapter for this layer was loaded.
        """
        return not any(self._on_host) and not capturing(self.bank.device)

    def read(self, slot: int) -> None:
        """Update the rank of a slot from its values. This synchronises with a GPU."""
        # Indices of the rows of a (or columns of b) that are not zero.
        held = self.bank[slot].abs().amax(self._other_dim).nonzero()[:, 0]
        self._on_host[slot] = int(held[-1]) + 1 if len(held) else 0
        self.ranks[slot] = self._on_host[slot]  # in place, because captured graphs read the tensor


class Stacks:
    """Map from the address of a tensor that vLLM passes to a wrapper to its :class:`Stack`."""

    def __init__(self) -> None:
        self._met: dict[int, Stack] = {}

    def of(self, stack: Tensor, rank_dim: int) -> Stack:
        """Return the :class:`Stack` of the factors ``a (slots, 1, R, I)``, with ``rank_dim`` 1, or
        ``b (slots, 1, O, R)``, with ``rank_dim`` 2."""
        address = stack.data_ptr()
        if address not in self._met:
            self._met[address] = Stack(stack, rank_dim)
        return self._met[address]

    def read(self, slot: int) -> None:
        """Update the ranks of a slot in all stacks, after its adapter has changed."""
        for stack in self._met.values():
            stack.read(slot)
