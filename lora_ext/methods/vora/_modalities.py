"""Context manager that marks the vision tokens for layers that adapt only vision tokens.

The mask assigns one adapter to some of the tokens. The context manager is therefore implemented as
an :func:`lora_ext.adapters` block with its own pool. Such a block supports threads and activation
checkpointing, and all layers in it share one tensor of adapter ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext.rows import Block, Places, Rows, _attachment, _context, pool_rows

_NAME = "vision"


class _Vision:
    """Pool with a single adapter, which the vision tokens use."""

    max_slots = 1
    modules = ()

    def __init__(self) -> None:
        self.handle = _attachment.pool_handle(self)

    def acquire(self, names: Sequence[object]) -> Places:
        return Places(range(len(names)))


_vision = _Vision()


@contextlib.contextmanager
def modality(vision_mask: Tensor) -> Iterator[None]:
    """Mark the vision tokens of every forward in a ``with`` block.

    Layers of route "vision" (:class:`lora_ext.nn.VoraLinear`) adapt only these tokens; all other
    layers ignore the mask. The innermost block applies. Each thread and each asyncio task has its
    own blocks. If activation checkpointing recomputes a layer in the backward pass, the layer uses
    the block of its forward pass, even if this block has ended.

    Args:
        vision_mask: mask of bools, or of integers 0 and 1, with True or 1 for vision tokens. Its
            shape is that of the activations without the feature dimension, usually ``(B, T)``. The
            mask is copied and checked here, which synchronizes with the device.

    Raises:
        ValueError: If the mask is not a tensor of bools or integers, or has values other than 0 and
            1. A layer raises it if the mask does not have the shape of the layer's activations.
    """
    with _context.adapters([_NAME], _token_ids(vision_mask), pool=_vision):
        yield


def vision_block() -> Block | None:
    """Return the innermost :func:`modality` block, or None. Compiled code calls
    :func:`traced_vision_rows` instead."""
    return _context.current(_vision.handle)


def vision_rows(block: Block, leading: torch.Size, device: torch.device) -> Rows:
    """Return the adapter ids of activations ``(*leading, I)`` as :class:`Rows`: 0 for vision
    tokens, -1 for all other tokens."""
    found, shape = tuple(block.assignment.shape), tuple(leading)
    expected = f"the shape of the activations without the feature dimension, {shape}"
    require(found == shape, "modality", "vision_mask", expected, found)
    return block.rows(leading, device)


def traced_vision_rows(leading: torch.Size, device: torch.device) -> Rows | None:
    """Return the result of :func:`vision_rows` for the block in which a compiled graph will run.

    The result is None if no block is open; this case is compiled as a separate graph.
    """
    return pool_rows(_vision.handle, leading, device, 1) if _context.any_block else None


def _token_ids(vision_mask: Tensor) -> Tensor:
    fits = False
    if not isinstance(vision_mask, Tensor):
        found = type(vision_mask).__name__
    elif vision_mask.dim() == 0:
        found = "a single number"
    elif vision_mask.is_floating_point() or vision_mask.is_complex():
        found = vision_mask.dtype
    elif vision_mask.dtype == torch.bool or not vision_mask.numel():
        fits = True
        found = vision_mask.dtype
    else:
        low, high = (int(v) for v in vision_mask.aminmax())
        fits = 0 <= low <= high <= 1
        found = f"{low} to {high}"
    expected = "a tensor of bools, or of integers 0 and 1, with at least one dimension"
    require(fits, "modality", "vision_mask", expected, found)
    return vision_mask.to(torch.int8) - 1
