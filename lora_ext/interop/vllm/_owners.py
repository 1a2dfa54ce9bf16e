"""Whose each row of a step is, in the buffers that vLLM fills once per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lora_ext import ops
from lora_ext.rows import Kept, capturing

_PLANS = 64  # pieces of a step: of tokens, of samples, of a prompt


class OwnedRows(NamedTuple):
    """Slots of the rows of one matrix, -1 for the base model, and the rows grouped by slot."""

    ids: Tensor  # (T,)
    plan: Tensor


class Owners:
    """The slots of one kind of rows: of tokens, or of the positions that are sampled from.

    Args:
        buffer: ``(most,)`` int64, vLLM's own; a compiled or captured graph reads it when it runs.
        slots: how many adapters vLLM's stacks hold.
        kind: "tokens" or "samples", for messages.
    """

    def __init__(self, buffer: Tensor, slots: int, kind: str):
        self._buffer, self._slots, self._kind = buffer, slots, kind
        self._kept = Kept(_PLANS)
        self._names: frozenset[int] = frozenset()
        self.count = 0

    def follow(self, names: Sequence[int]) -> None:
        """Take over a new step. names: the adapter of each row, 0 for the base model."""
        self._kept = Kept(_PLANS)
        self.count, self._names = len(names), frozenset(names)
        self._buffer[self.count :] = -1  # rows that pad a batch are the base model's

    def rows(self, count: int, begin: int = 0) -> OwnedRows | None:
        """Rows ``begin`` to ``begin + count`` of the step; None where all are the base model's."""
        device = self._buffer.device
        if not (any(self._names) or capturing(device)):
            return None
        # A graph groups the rows of each step once, with its first op.
        return self._kept.get((begin, count), device, self._part, begin, count)

    def _part(self, begin: int, count: int) -> OwnedRows:
        return self._group(self._buffer[begin : begin + count])

    def as_first(self, count: int) -> OwnedRows | None:
        """``count`` rows of whoever has the first row of the step; None where that is the base."""
        return self._group(self._buffer[:1].repeat(count)) if any(self._names) else None

    def _group(self, ids: Tensor) -> OwnedRows:
        return OwnedRows(ids, ops.lora_plan(ids, self._slots))

    def all_alike(self) -> bool:
        """Whether all rows of the step have the same adapter, or none."""
        return len(self._names) == 1

    def mismatch(self, count: int) -> RuntimeError:
        """The error of a matrix of which it is not clear whose each row is."""
        return RuntimeError(
            f"lora_ext: expected a matrix of the {self.count} {self._kind} of this step, found "
            f"{count} rows: it is not clear which adapter each has; LORA_EXT_VLLM=0 leaves "
            "the step to vLLM's own kernels"
        )
