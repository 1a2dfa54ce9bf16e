"""Adapters of the rows of a step, from the buffers that vLLM fills once per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lora_ext import ops
from lora_ext.rows import Kept, capturing

_PLANS = 64  # cached plans, one for each part of a step: tokens, samples, a prompt


class OwnedRows(NamedTuple):
    """Slots of the rows of one matrix, -1 for the base model, and their plan."""

    ids: Tensor  # (T,)
    plan: Tensor  # rows grouped by slot


class Owners:
    """Slots of one kind of rows: of tokens, or of the sampled positions.

    Args:
        buffer: ``(N,)`` int64, filled by vLLM; a compiled or captured graph reads it when it runs.
        slots: number of adapters in vLLM's stacks.
        kind: "tokens" or "samples", for messages.
    """

    def __init__(self, buffer: Tensor, slots: int, kind: str):
        self._buffer, self._slots, self._kind = buffer, slots, kind
        self._kept = Kept(_PLANS)
        self._names: frozenset[int] = frozenset()
        self.count = 0

    def follow(self, names: Sequence[int]) -> None:
        """Store the adapter of each row of a new step, 0 for the base model."""
        self._kept = Kept(_PLANS)
        self.count, self._names = len(names), frozenset(names)
        self._buffer[self.count :] = -1  # rows that pad a batch use the base model

    def rows(self, count: int, begin: int = 0) -> OwnedRows | None:
        """Return rows ``begin`` to ``begin + count`` of the step.

        Returns None if all rows of the step use the base model.
        """
        device = self._buffer.device
        if not (any(self._names) or capturing(device)):
            return None
        # A captured graph groups the rows of each step once, in its first op.
        return self._kept.get((begin, count), device, self._part, begin, count)

    def _part(self, begin: int, count: int) -> OwnedRows:
        return self._group(self._buffer[begin : begin + count])

    def as_first(self, count: int) -> OwnedRows | None:
        """Return ``count`` rows with the adapter of the step's first row, None for the base model.

        All rows of the step must be alike.
        """
        return self._group(self._buffer[:1].repeat(count)) if any(self._names) else None

    def _group(self, ids: Tensor) -> OwnedRows:
        return OwnedRows(ids, ops.lora_plan(ids, self._slots))

    def all_alike(self) -> bool:
        """Return whether all rows of the step use the same adapter, or all the base model."""
        return len(self._names) == 1

    def mismatch(self, count: int) -> RuntimeError:
        """Return the error for a matrix whose rows cannot be assigned to adapters."""
        return RuntimeError(
            f"lora_ext: expected a matrix of the {self.count} {self._kind} of this step, found "
            f"{count} rows, whose adapters are unknown; set LORA_EXT_VLLM=0 to use vLLM's own "
            "kernels"
        )
