"""Copies between host and device. The one place in this package that knows about CUDA streams."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def copy_(destination: Tensor, source: Tensor) -> None:
    """Every byte that the pool writes to a slab or a table goes through here."""
    destination.copy_(source, non_blocking=True)


class Transfer:
    """Ordered, complete copies to one device.

    On CUDA the copies run on a side stream, behind everything that may still read the memory they
    overwrite, and the host waits for them: once :meth:`run` returns, every stream sees the new
    bytes. The CUDA half has not run yet: it waits for a machine with a GPU.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._side: torch.cuda.Stream | None = None
        self._last_use: dict[int, torch.cuda.Event] = {}  # by stream: the end of the last step seen

    def mark_use(self) -> None:
        """A pin is released: the step that used it has been queued on the current stream."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            self._last_use.setdefault(stream.cuda_stream, torch.cuda.Event()).record(stream)

    def run(self, jobs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy source to destination, pair by pair."""
        if self._device.type != "cuda":
            for destination, source in jobs:
                copy_(destination, source)
            return
        side = self._side = self._side or torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))  # the slabs' own allocation too
        for event in self._last_use.values():
            side.wait_event(event)
        with torch.cuda.stream(side):
            for destination, source in jobs:
                copy_(destination, source)
        side.synchronize()
