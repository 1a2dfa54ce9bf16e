"""Memory that has its address from the start and takes bytes of the device as it grows.

A kernel gets one pointer for all pages of a module, and a captured graph keeps it. So the address
space of every page is reserved at once, which costs nothing, and the front of it is backed: on the
CPU by the operating system, which backs what is touched; on CUDA by the driver
(:mod:`lora_ext.pool.cuda_memory`). Elsewhere all of it is allocated at once.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from .cuda_memory import Driver, Reservation


class Memory:
    """Bytes of a device that cannot grow: all of them are taken when they are asked for.

    Attributes:
        tensor: uint8 ``(nbytes,)``; only the first ``backed`` bytes may be touched.
        backed: bytes taken from the device.
        least: bytes that are always taken. granularity: what ``backed`` is a multiple of, unless
            it is all of ``nbytes``.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.tensor: Tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.nbytes = self.least = self.backed = nbytes
        self.granularity = 1

    def rounded(self, nbytes: int) -> int:
        """Bytes that are taken where the first ``nbytes`` are in use."""
        whole = -(-nbytes // self.granularity) * self.granularity
        return max(self.least, min(whole, self.nbytes))

    def resize(self, nbytes: int) -> None:
        """Back the first ``nbytes``, a result of :meth:`rounded`, and no others.

        What lay beyond is lost. A device waits for its queued work before bytes are given back.

        Raises:
            RuntimeError: the device has no room; the size is as before.
        """


class HostMemory(Memory):
    """Bytes of the CPU: a private mapping."""

    def __init__(self, nbytes: int):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping = mmap.mmap(-1, nbytes, flags=flags)
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.nbytes, self.least, self.backed, self.granularity = nbytes, 0, 0, 1

    def resize(self, nbytes: int) -> None:
        """Growing is the operating system's, at the first touch."""
        start = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < self.backed:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, self.backed - start)
        self.backed = nbytes


class CudaMemory(Memory):
    """Bytes of a CUDA device, in pieces of its granularity (2 MiB, as a rule)."""

    def __init__(self, nbytes: int, index: int, driver: Driver):
        self.granularity = driver.granularity(index)
        size = -(-nbytes // self.granularity) * self.granularity
        self._reservation = Reservation(driver, index, size, self.granularity)
        self._reservation.grow(self.granularity)  # torch looks at the address of a tensor
        self.tensor = self._reservation.tensor()[:nbytes]
        self.nbytes, self.least, self.backed = size, self.granularity, self.granularity
        self._index = index

    def resize(self, nbytes: int) -> None:
        """Map what is missing, or wait for the device and unmap what is too much."""
        if nbytes > self.backed:
            self._reservation.grow(nbytes)
        elif nbytes < self.backed:
            torch.cuda.synchronize(self._index)
            self._reservation.shrink(nbytes)
        self.backed = nbytes


def memory_on(device: torch.device, nbytes: int) -> Memory:
    """Memory that grows, where the device can.

    Raises:
        RuntimeError, OSError: there is no room.
    """
    if device.type == "cpu":
        return HostMemory(nbytes)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        driver = Driver.load(index)
        if driver is not None:
            return CudaMemory(nbytes, index, driver)
    return Memory(nbytes, device)
