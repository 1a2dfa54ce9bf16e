"""``with modality(mask)``: which tokens are vision tokens, for layers that adapt these alone.

A mask is an assignment of one adapter to tokens, so it is an ``adapters`` block of a pool of its
own: threads, checkpoints and what layers share are that block's.
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
    """A pool whose one slot has the vision tokens."""

    max_slots = 1
    modules = ()

    def __init__(self) -> None:
        self.handle = _attachment.pool_handle(self)

    def acquire(self, names: Sequence[str | None]) -> Places:
        return Places(range(len(names)))


_vision = _Vision()


@contextlib.contextmanager
def modality(vision_mask: Tensor) -> Iterator[None]:
    """Say which tokens of every forward inside the block are vision tokens.

    Layers of route "vision" (:class:`lora_ext.nn.VoraLinear`) adapt these alone, all others pay no
    attention. Blocks nest: the innermost counts. Each thread and each asyncio task has its own. A
    backward that computes layers again (activation checkpointing) sees the block of their forward,
    also when it has been left since.

    Args:
        vision_mask: True, or 1, for vision tokens: bool, or integers that are all 0 or 1, of the
            shape of the activations without features, ``(B, T)`` as a rule. It is copied and
            checked here, which waits for the device.

    Raises:
        ValueError: a mask of another kind; and from the first layer whose activations have another
            shape.
    """
    with _context.adapters([_NAME], _token_ids(vision_mask), pool=_vision):
        yield


def vision_block() -> Block | None:
    """The innermost :func:`modality` block, as layers see it; not for a graph that is traced."""
    return _context.current(_vision.handle)


def vision_rows(block: Block, leading: torch.Size, device: torch.device) -> Rows:
    """Rows of activations ``(*leading, I)``: id 0 for vision tokens, -1 for all others. They are
    made once for all layers."""
    found, shape = tuple(block.assignment.shape), tuple(leading)
    expected = f"the activations' shape without features, {shape}"
    require(found == shape, "modality", "vision_mask", expected, found)
    return block.rows(leading, device)


def traced_vision_rows(leading: torch.Size, device: torch.device) -> Rows | None:
    """:func:`vision_rows` of whatever block a compiled graph will run in; None where the graph is
    for the time without blocks."""
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
    expected = "a tensor of bools, or of integers that are all 0 or 1, of the activations' shape"
    require(fits, "modality", "vision_mask", f"{expected} without features", found)
    return vision_mask.to(torch.int8) - 1
