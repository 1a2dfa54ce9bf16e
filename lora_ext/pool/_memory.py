"""Memory with a fixed address whose physical size grows and shrinks.

A kernel receives one pointer for all pages of a module, and a captured graph stores this pointer.
The addresses of all pages are therefore reserved at once, which needs no memory. Physical memory
backs only the first bytes. On the CPU, the operating system allocates it at the first write. On
CUDA, the virtual memory functions of the driver map it without copies or changes of addresses. On
other devices, all memory is allocated at once.

The driver's functions are called with ctypes, as torch does not expose them. This part has been
tested with a mock that is compiled from ``cuda.h``, but not on a device.

Source: CUDA Driver API, "Virtual Memory Management".
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from collections import deque
from ctypes import POINTER, byref, c_int, c_size_t, c_ubyte, c_uint64, c_ulonglong, c_ushort
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED: memory that stays on its device
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class Memory:
    """Memory that cannot grow: all bytes are allocated on the device at once.

    Attributes:
        tensor: uint8 ``(nbytes,)``; only the first ``backed`` bytes may be used.
        nbytes: reserved bytes, the maximum of ``backed``.
        backed: bytes that are allocated on the device.
        least: minimum of ``backed``.
        granularity: unit of allocation in bytes: ``backed`` is a multiple of it, or ``nbytes``.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.tensor: Tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.nbytes = self.least = self.backed = nbytes
        self.granularity = 1

    def rounded(self, nbytes: int) -> int:
        """Return the number of bytes to allocate so that the first ``nbytes`` can be used."""
        whole = -(-nbytes // self.granularity) * self.granularity
        return max(self.least, min(whole, self.nbytes))

    def resize(self, nbytes: int) -> None:
        """Set the number of allocated bytes to ``nbytes``, a result of :meth:`rounded`.

        Values after these bytes are lost. Before this method frees memory of a CUDA device, it
        waits for the queued work of the device.

        Raises:
            RuntimeError: If the device has no room; the size is then unchanged.
        """


class HostMemory(Memory):
    """CPU memory in a private anonymous mapping."""

    def __init__(self, nbytes: int):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping = mmap.mmap(-1, nbytes, flags=flags)
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.nbytes, self.least, self.backed, self.granularity = nbytes, 0, 0, 1

    def resize(self, nbytes: int) -> None:
        """Free the pages after ``nbytes``; earlier pages are allocated at their first write."""
        start = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < self.backed:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, self.backed - start)
        self.backed = nbytes


class CudaMemory(Memory):
    """Memory of a CUDA device, allocated in pieces of the driver's granularity (usually 2 MiB)."""

    def __init__(self, nbytes: int, index: int, driver: Driver, least: int):
        unit = self.granularity = driver.granularity(index)
        size, least = -(-nbytes // unit) * unit, max(1, -(-least // unit)) * unit
        self._reservation = Reservation(driver, index, size, self.granularity)
        # torch queries attributes of the tensor's address. The query fails for unmapped addresses.
        self._reservation.grow(least)
        self.tensor = self._reservation.tensor()[:nbytes]
        self.nbytes, self.least, self.backed = size, least, least
        self._index = index

    def resize(self, nbytes: int) -> None:
        """Map the first ``nbytes``, or wait for the device and unmap the memory after them."""
        if nbytes > self.backed:
            self._reservation.grow(nbytes)
        elif nbytes < self.backed:
            torch.cuda.synchronize(self._index)
            self._reservation.shrink(nbytes)
        self.backed = nbytes


def memory_on(device: torch.device, nbytes: int, least: int) -> Memory:
    """Return memory of ``nbytes`` bytes. The memory can grow if the device supports this.

    On CUDA devices, the first ``least`` bytes are always allocated.

    Raises:
        RuntimeError: If the device has no room.
        OSError: If the operating system cannot reserve the addresses.
    """
    if device.type == "cpu":
        return HostMemory(nbytes)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        driver = Driver.load(index)
        if driver is not None:
            return CudaMemory(nbytes, index, driver, least)
    return Memory(nbytes, device)


# -------------------------------------------------------------------------------------------------
# CUDA's driver


class _Location(ctypes.Structure):  # CUmemLocation
    _fields_ = (("type", c_int), ("id", c_int))


class _Flags(ctypes.Structure):  # CUmemAllocationProp.allocFlags
    _fields_ = (
        ("compression_type", c_ubyte),
        ("gpu_direct_rdma_capable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    )


class _Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = (
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", _Location),
        ("win32_handle_meta_data", ctypes.c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = (("location", _Location), ("flags", c_int))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(_Properties), c_int),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_ulonglong),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (POINTER(c_ulonglong), c_size_t, POINTER(_Properties), c_ulonglong),
    "cuMemRelease": (c_ulonglong,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(_Access), c_size_t),
}


class Driver:
    """Functions of the CUDA driver; a failed call raises RuntimeError with the function's name."""

    def __init__(self, library: ctypes.CDLL):
        self._functions = {name: getattr(library, name) for name in _SIGNATURES}
        for name, types in _SIGNATURES.items():
            self._functions[name].argtypes, self._functions[name].restype = types, c_int

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function; raise RuntimeError if it returns an error."""
        code = self.code(name, *arguments)
        if code:
            raise RuntimeError(f"{name} returned CUresult {code}")

    def code(self, name: str, *arguments: Any) -> int:
        """Call a function and return its ``CUresult``, which is 0 for success."""
        return self._functions[name](*arguments)

    @staticmethod
    @functools.cache
    def load(index: int) -> Driver | None:
        """Return the driver, or None if it or the device lacks virtual memory functions."""
        try:
            driver = Driver(ctypes.CDLL("libcuda.so.1"))
        except (OSError, AttributeError):
            return None
        supported = c_int(0)
        failed = driver.code("cuInit", 0) or driver.code(
            "cuDeviceGetAttribute", byref(supported), _SUPPORTED, index
        )
        return driver if supported.value and not failed else None

    def granularity(self, index: int) -> int:
        """Return the size in bytes of the smallest piece of device memory that can be mapped."""
        found = c_size_t(0)
        self("cuMemGetAllocationGranularity", byref(found), byref(_properties(index)), 0)
        return found.value


def _properties(index: int) -> _Properties:
    return _Properties(type=_PINNED, location=_Location(_DEVICE, index))


class Reservation:
    """Reserved addresses of ``size`` bytes, the first of which are mapped to memory.

    Memory is mapped in pieces of ``piece`` bytes, and ``size`` is a multiple of ``piece``. When
    this object and its tensors are no longer referenced, :func:`give_back` frees the addresses and
    the memory.
    """

    def __init__(self, driver: Driver, index: int, size: int, piece: int):
        give_back()
        self._driver, self._index, self._size, self._piece = driver, index, size, piece
        address = c_uint64(0)
        driver("cuMemAddressReserve", byref(address), size, 0, 0, 0)
        self.address: int = address.value
        self._handles: list[int] = []
        rest = _Rest(driver, index, self.address, size, self._handles, piece, os.getpid())
        # Not called at exit, as the end of the process frees everything.
        weakref.finalize(self, _left.append, rest).atexit = False

    def tensor(self) -> Tensor:
        """Return a uint8 tensor ``(size,)`` at these addresses; it keeps them reserved."""
        return torch.as_tensor(self, device=torch.device("cuda", self._index))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = self.address, False  # not read-only
        return {"shape": (self._size,), "typestr": "|u1", "data": data, "version": 3}

    def grow(self, nbytes: int) -> None:
        """Map the first ``nbytes``, a multiple of ``piece``.

        Raises:
            RuntimeError: If the device has no room; the mapping is then unchanged.
        """
        before = len(self._handles)
        try:
            while len(self._handles) * self._piece < nbytes:
                self._add_piece()
        except RuntimeError:
            self.shrink(before * self._piece)
            raise

    def _add_piece(self) -> None:
        driver, piece = self._driver, self._piece
        handle, properties = c_ulonglong(0), _properties(self._index)
        create = ("cuMemCreate", byref(handle), piece, byref(properties), 0)
        code = driver.code(*create)
        if code == _OUT_OF_MEMORY:
            give_back()
            torch.cuda.empty_cache()  # cached memory of torch's allocator may be enough
        if code:
            driver(*create)
        at = self.address + len(self._handles) * piece
        try:
            driver("cuMemMap", at, piece, 0, handle, 0)
        except RuntimeError:
            driver("cuMemRelease", handle)
            raise
        self._handles.append(handle.value)
        access = _Access(_Location(_DEVICE, self._index), _READ_WRITE)
        driver("cuMemSetAccess", at, piece, byref(access), 1)

    def shrink(self, nbytes: int) -> None:
        """Free the memory after the first ``nbytes``, which must not be in use."""
        _unmap(self._driver, self.address, self._handles, self._piece, nbytes)


def _unmap(driver: Driver, address: int, handles: list[int], piece: int, nbytes: int) -> None:
    while len(handles) * piece > nbytes:
        handle = handles.pop()
        driver("cuMemUnmap", address + len(handles) * piece, piece)
        driver("cuMemRelease", handle)


class _Rest(NamedTuple):
    """Addresses and memory of a deleted reservation, to be freed later."""

    driver: Driver
    device: int
    address: int
    size: int
    handles: list[int]
    piece: int
    process: int


_left: deque[_Rest] = deque()


def give_back() -> None:
    """Wait for the queued work of devices with deleted reservations, then free the memory of these.

    A pool calls this before it reserves addresses for a module, if a device has no room, and in
    ``trim()``. A finalizer must not call this, because Python may collect garbage at any point. One
    such point is during the capture of a graph, where synchronisation raises. Another is while the
    queued work waits for a kernel that this thread has not launched yet, such as the other half of
    a collective. Synchronisation would then never return.

    Raises:
        RuntimeError: If the device or its driver fails. Reservations that were not freed are kept
            for the next call.
    """
    while _left:
        try:
            rest = _left.popleft()
        except IndexError:  # another thread took the last reservation
            return
        if rest.process != os.getpid():  # the reservation belongs to the parent process
            continue
        try:
            torch.cuda.synchronize(rest.device)
            _unmap(rest.driver, rest.address, rest.handles, rest.piece, 0)
            rest.driver("cuMemAddressFree", rest.address, rest.size)
        except BaseException:
            _left.appendleft(rest)
            raise
