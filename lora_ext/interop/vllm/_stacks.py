"""True ranks of the adapters in vLLM's stacks.

vLLM keeps the adapters of a layer in one tensor, a *stack*, ``(slots, 1, R, I)`` or ``(slots, 1, O,
R)`` with ``R`` the engine's ``max_lora_rank``, and pads each adapter with zeros. A stack has the
layout of a bank of lora_ext's ops; only the ranks are missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.rows import capturing


class Stack:
    """View of a stack as a bank, and the rank of each slot in it.

    The rank of a slot is the index of the last nonzero row of ``a``, or column of ``b``, plus one.
    """

    def __init__(self, stack: Tensor, rank_dim: int):
        self.bank = stack.flatten(0, 1)  # (slots, R, I) or (slots, O, R)
        self._other_dim = {1: 1, 2: 0}[rank_dim]
        self._on_host = [0] * self.bank.shape[0]
        with torch.inference_mode(False):  # vLLM also fills slots outside of inference mode
            self.ranks = torch.zeros(self.bank.shape[0], dtype=torch.int32, device=stack.device)
        for slot in range(self.bank.shape[0]):
            self.read(slot)

    def idle(self) -> bool:
        """Return whether no adapter changes this layer; False during a capture."""
        return not any(self._on_host) and not capturing(self.bank.device)

    def read(self, slot: int) -> None:
        """Update the rank of a slot; synchronises with a device."""
        held = self.bank[slot].abs().amax(self._other_dim).nonzero()[:, 0]  # nonzero rows of a
        self._on_host[slot] = int(held[-1]) + 1 if len(held) else 0
        self.ranks[slot] = self._on_host[slot]  # in place: a captured graph reads it


class Stacks:
    """Stacks of a wrapper, by the address of their memory."""

    def __init__(self) -> None:
        self._met: dict[int, Stack] = {}

    def of_a(self, stack: Tensor) -> Stack:
        """Return the :class:`Stack` of ``(slots, 1, R, I)``."""
        return self._met.get(stack.data_ptr()) or self._meet(stack, 1)

    def of_b(self, stack: Tensor) -> Stack:
        """Return the :class:`Stack` of ``(slots, 1, O, R)``."""
        return self._met.get(stack.data_ptr()) or self._meet(stack, 2)

    def _meet(self, stack: Tensor, rank_dim: int) -> Stack:
        self._met[stack.data_ptr()] = met = Stack(stack, rank_dim)
        return met

    def read(self, slot: int) -> None:
        """Update the ranks of a slot whose adapter has changed."""
        for stack in self._met.values():
            stack.read(slot)
