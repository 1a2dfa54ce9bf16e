"""True ranks of the adapters in vLLM's stacks.

vLLM keeps the adapters of a layer in one tensor, a *stack*, ``(slots, 1, R, I)`` or ``(slots, 1,
O, R)`` with ``R`` the engine's ``max_lora_rank``, and fills the rest of each adapter with zeros. A
stack has the layout of a bank of lora_ext's ops; only the ranks are missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.rows import capturing


class Stack:
    """One stack, seen as a bank, and the rank of each slot in it.

    The rank of a slot ends with the last row of ``a``, or column of ``b``, that is not zero.
    """

    def __init__(self, stack: Tensor, rank_dim: int):
        self.bank = stack.flatten(0, 1)  # (slots, R, I) or (slots, O, R)
        self._other_dim = {1: 1, 2: 0}[rank_dim]
        self._on_host = [0] * self.bank.shape[0]
        with torch.inference_mode(False):  # vLLM fills slots outside of inference mode, too
            self.ranks = torch.zeros(self.bank.shape[0], dtype=torch.int32, device=stack.device)
        for slot in range(self.bank.shape[0]):
            self.read(slot)

    def idle(self) -> bool:
        """Return whether no adapter touches this layer, outside of a capture."""
        return not any(self._on_host) and not capturing(self.bank.device)

    def read(self, slot: int) -> None:
        """Note the rank of a slot; on a device this waits for it."""
        held = self.bank[slot].abs().amax(self._other_dim).nonzero()[:, 0]  # ranks that are in use
        self._on_host[slot] = int(held[-1]) + 1 if len(held) else 0
        self.ranks[slot] = self._on_host[slot]  # in place: a captured graph reads it


class Stacks:
    """The stacks of a wrapper, by the address of their memory."""

    def __init__(self) -> None:
        self._met: dict[int, Stack] = {}

    def of_a(self, stack: Tensor) -> Stack:
        """The stack ``(slots, 1, R, I)``."""
        return self._met.get(stack.data_ptr()) or self._meet(stack, 1)

    def of_b(self, stack: Tensor) -> Stack:
        """The stack ``(slots, 1, O, R)``."""
        return self._met.get(stack.data_ptr()) or self._meet(stack, 2)

    def _meet(self, stack: Tensor, rank_dim: int) -> Stack:
        self._met[stack.data_ptr()] = met = Stack(stack, rank_dim)
        return met

    def read(self, slot: int) -> None:
        """Note the ranks of a slot whose adapter has changed."""
        for stack in self._met.values():
            stack.read(slot)
