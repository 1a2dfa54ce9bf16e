"""Copies between host and device. The one place in this package that knows about CUDA streams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def copy_(destination: Tensor, source: Tensor) -> None:
    """Copy; every byte that the pool writes to a slab or a table goes through here."""
    destination.copy_(source, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy to host memory, pinned for a CUDA tensor; done on return."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


class Transfer:
    """Copies to the host's own memory: done when :meth:`run` returns, so that nobody waits."""

    def mark_use(self) -> None:
        """A pin is released: the step that used it has been queued on the current stream."""

    def run(self, jobs: Iterable[tuple[Tensor, Tensor]], wait: bool) -> Any:
        """Copy to destinations from sources, which are in pinned memory where they go to a device;
        return what :meth:`before_reading` and :meth:`finish` are to be given.

        Args:
            wait: return when the bytes are there. Otherwise they are queued.
        """
        for destination, source in jobs:
            copy_(destination, source)

    def before_reading(self, written: Any) -> bool:
        """Let the current stream read what :meth:`run` wrote. True: every stream may, by now."""
        return True

    def finish(self, written: Any) -> None:
        """Wait until the bytes are there."""

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Copies to this memory may still be queued when it is given back."""

    def check_outside_capture(self) -> None:
        """Refuse a pin that begins inside the capture of a graph."""


class StreamTransfer(Transfer):
    """Ordered copies to one CUDA device, which the host does not wait for.

    They run on a side stream, behind everything that may still read the memory they overwrite: what
    is queued on the stream of the caller, and all steps whose pins have been released. An event
    marks their end; a stream that will read them waits for it. This half has not run on a device
    yet: its order is tested on streams that are queues.

    ``cuda`` is ``torch.cuda``, or what stands for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self._device = device
        self._cuda = cuda
        self._side: Any = None
        self._last_use: dict[int, Any] = {}  # by stream, the end of the last step seen on it

    def mark_use(self) -> None:
        """The next copies go behind what is queued on the current stream now."""
        stream = self._cuda.current_stream(self._device)
        self._last_use.setdefault(stream.cuda_stream, self._cuda.Event()).record(stream)

    def run(self, jobs: Iterable[tuple[Tensor, Tensor]], wait: bool) -> Any:
        """Queue the copies; an event that marks their end."""
        side = self._side = self._side or self._cuda.Stream(self._device)
        side.wait_stream(self._cuda.current_stream(self._device))  # the slabs' own allocation too
        for event in self._last_use.values():
            side.wait_event(event)
        try:
            with self._cuda.stream(side):
                for destination, source in jobs:
                    copy_(destination, source)
        except BaseException:
            side.synchronize()  # nothing may be written into memory that is given up now
            raise
        written = self._cuda.Event()
        written.record(side)
        if wait:
            written.synchronize()
        return written

    def before_reading(self, written: Any) -> bool:
        """Make the current stream wait for the event, unless it has passed."""
        if written.query():
            return True
        self._cuda.current_stream(self._device).wait_event(written)
        return False

    def finish(self, written: Any) -> None:
        """Wait for the event on the host."""
        written.synchronize()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Tell torch's allocator that the side stream uses this memory."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(self._side)

    def check_outside_capture(self) -> None:
        """The graph cannot wait for an event from outside, and its replays would not be covered by
        a pin that ends with the capture."""
        if self._cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AdapterPool.acquire: expected a stream that is not capturing a graph, found one "
                "that is; enter the block around the capture, and leave it after the last replay"
            )
