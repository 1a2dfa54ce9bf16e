"""Blocks whose products keep the dtype that they are given."""

from contextlib import AbstractContextManager, nullcontext

import torch

AUTOCASTS = ("cpu", "cuda")  # torch.autocast refuses other devices, meta among them


def exactly(device: torch.device) -> AbstractContextManager[object]:
    """A block that autocast leaves alone."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCASTS else nullcontext()
