"""Copies between host and device, ordered with CUDA streams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def copy_(destination: Tensor, source: Tensor) -> None:
    """Copy ``source`` to ``destination``. All writes to pages and tables call this function."""
    destination.copy_(source, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, which is pinned for a CUDA tensor, and wait for the copy."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


class Transfer:
    """Copies to tensors on the CPU. All of them are done when :meth:`run` returns."""

    def mark_use(self) -> None:
        """Record that work queued on the current stream may read pages that are unpinned now."""

    def run(self, jobs: Iterable[tuple[Tensor, Tensor]], wait: bool) -> Any:
        """Copy sources to destinations.

        Args:
            jobs: pairs of destination and source. Sources of copies to a CUDA device must be in
                pinned memory.
            wait: whether to wait until the copies are done. If False, they may still be queued.

        Returns:
            The value to pass as ``written`` to the other methods.
        """
        for destination, source in jobs:
            copy_(destination, source)

    def before_reading(self, written: Any) -> bool:
        """Make the current stream wait for the copies; return whether they are done already."""
        return True

    def finish(self, written: Any) -> None:
        """Wait until the copies are done."""

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Delay the reuse of these tensors' memory until the queued copies to them are done."""

    def check_outside_capture(self) -> None:
        """Raise RuntimeError if the current stream is capturing a graph."""


class StreamTransfer(Transfer):
    """Asynchronous copies to one CUDA device, ordered with the work that reads the same memory.

    The copies run on a side stream. They begin after all work that may still read the overwritten
    memory: the work queued on the caller's stream, and all steps whose pins have been released. An
    event marks the end of the copies, and a stream that reads the copied values waits for it.
    This class has not run on a device yet; tests check the order with a mock of streams.

    Args:
        device: CUDA device of the destinations.
        cuda: ``torch.cuda``, or its mock in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self._device = device
        self._cuda = cuda
        self._side: Any = None
        self._last_use: dict[int, Any] = {}  # event after the last step on each stream

    def mark_use(self) -> None:
        """Make later copies wait for the work queued on the current stream."""
        stream = self._cuda.current_stream(self._device)
        self._last_use.setdefault(stream.cuda_stream, self._cuda.Event()).record(stream)

    def run(self, jobs: Iterable[tuple[Tensor, Tensor]], wait: bool) -> Any:
        """Queue the copies; return an event that is recorded after them."""
        side = self._side = self._side or self._cuda.Stream(self._device)
        # The current stream may still be initialising new tables, too.
        side.wait_stream(self._cuda.current_stream(self._device))
        for event in self._last_use.values():
            side.wait_event(event)
        try:
            with self._cuda.stream(side):
                for destination, source in jobs:
                    copy_(destination, source)
        except BaseException:
            side.synchronize()  # no copy may write after the memory is freed
            raise
        written = self._cuda.Event()
        written.record(side)
        if wait:
            written.synchronize()
        return written

    def before_reading(self, written: Any) -> bool:
        """Make the current stream wait for the event; return True if it is complete already."""
        if written.query():
            return True
        self._cuda.current_stream(self._device).wait_event(written)
        return False

    def finish(self, written: Any) -> None:
        """Wait for the event on the host."""
        written.synchronize()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Record in torch's allocator that the side stream uses these tensors."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(self._side)

    def check_outside_capture(self) -> None:
        """Raise RuntimeError if the current stream is capturing a graph.

        A graph cannot wait for an event that was recorded outside of the capture. Moreover, a pin
        that is released after the capture does not protect adapters in later replays.
        """
        if self._cuda.is_current_stream_capturing():
            raise RuntimeError(
                "AdapterPool.acquire: expected a stream that is not capturing a graph, found one "
                "that is; enter the block around the capture, and leave it after the last replay"
            )
