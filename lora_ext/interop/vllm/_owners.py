"""Adapter of each row of a step, read from the buffers that vLLM fills once per step.

vLLM stores each loaded adapter in a *slot*, and the buffers contain the slot of each row. Shape
letters: ``T`` rows of a matrix, ``N`` length of a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
        """Store the ``lora_int_id`` of each row's adapter in a new step; 0 is the base model."""
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
        # The cached plan is used by all layers. In a captured graph, the first op computes it, so
        # each replay groups the rows of its step once.
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
