"""Ranks of the adapters in vLLM's stacks.

vLLM stores the factors of all adapters of a layer in two tensors, *stacks*, ``(slots, 1, R, I)``
and ``(slots, 1, O, R)``. ``R`` is the engine's ``max_lora_rank``, ``I`` is the number of input
features and ``O`` of output features. Each adapter has one slot, padded with zeros to ``R``. A
stack has the layout of a bank (stacked factors) of lora_ext's ops, which also need the rank of each
adapter. vLLM does not store the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.rows import capturing


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

        The reason is that a replay may run after an adapter for this layer was loaded.
        """
        return not any(self._on_host) and not capturing(self.bank.device)

    def read(self, slot: int) -> None:
        """Update the rank of a slot from its values. This synchronises with a GPU."""
        # Indices of the rows of a (or columns of b) that are not zero.
        held = self.bank[slot].abs().amax(self._other_dim).nonzero()[:, 0]
        self._on_host[slot] = int(held[-1]) + 1 if len(held) else 0
        self.ranks[slot] = self._on_host[slot]  # in place, because captured graphs read the tensor


class Stacks:
    """:class:`Stack` of each tensor that vLLM passes to a wrapper, by the tensor's address."""

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
