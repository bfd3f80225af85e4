"""Device memory: blocks of a pool of the driver's, allocated and freed in the order of a stream.

Numba's own manager would wait for the device at each release. In the simulator it is the host's.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np

from ..cupy.launch import Card
from . import package, streams


@functools.cache
def driver() -> Any:
    """Return the bindings of CUDA's driver, which numba-cuda brings."""
    from cuda.bindings import driver

    return driver


def done(result: tuple[Any, ...]) -> Any:
    """Return what a call of the driver found."""
    error, *found = result
    if error:
        name = driver().cuGetErrorString(error)[1].decode()
        kind = MemoryError if "memory" in name else RuntimeError
        raise kind(f"CUDA: {name}")
    return found[0] if found else None


class Block:
    """Memory of a device, freed after all that is queued now on the stream it was made for."""

    __slots__ = ("_free", "address", "device", "stream")

    def __init__(self, size: int, device: int) -> None:
        cuda = driver()
        self._free = None
        self.device, self.stream = device, streams.current()
        self.address = int(done(cuda.cuMemAllocFromPoolAsync(size, pool(device), self.stream)))
        self._free = cuda.cuMemFreeAsync

    def __del__(self) -> None:
        if self._free is not None and int(self._free(self.address, self.stream)[0]):
            with suppress(Exception):  # its stream is gone, or this thread has no context
                inside(self.device, lambda: driver().cuMemFree(self.address))


class HostBlock:
    """The same in the simulator."""

    device = 0

    def __init__(self, size: int, device: int) -> None:
        self._memory = np.empty(size + 15, np.uint8)
        self.address = (self._memory.ctypes.data + 15) // 16 * 16


@functools.cache
def pool(device: int) -> Any:
    """Return the pool of a device, which keeps what is freed."""
    cuda = driver()
    facts = cuda.CUmemPoolProps()
    facts.allocType = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    facts.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    facts.location.id = device
    found = done(cuda.cuMemPoolCreate(facts))
    most = cuda.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    done(cuda.cuMemPoolSetAttribute(found, most, cuda.cuuint64_t(2**63)))
    return found


def allocate(size: int, device: int) -> Any:
    """Return a block of so many bytes, at least one, for the current stream."""
    return (HostBlock if package.SIMULATED else Block)(max(size, 1), device)


def upload(address: int, device: int, x: np.ndarray[Any, Any]) -> None:
    """Copy an array of the host, in order, to a device."""

    def copy() -> None:  # pageable memory is read before the call returns
        done(driver().cuMemcpyHtoDAsync(address, x.ctypes.data, x.nbytes, streams.current()))

    if package.SIMULATED:
        ctypes.memmove(address, x.ctypes.data, x.nbytes)
    elif x.nbytes:
        inside(device, copy)


def download(address: int, device: int, x: np.ndarray[Any, Any]) -> None:
    """Copy from a device to an array of the host, in order; wait for the current stream."""

    def copy() -> None:
        done(driver().cuMemcpyDtoHAsync(x.ctypes.data, address, x.nbytes, streams.current()))
        done(driver().cuStreamSynchronize(streams.current()))

    if package.SIMULATED:
        ctypes.memmove(x.ctypes.data, address, x.nbytes)
    elif x.nbytes:
        inside(device, copy)


def device_of(address: int) -> int:
    """Return the number of the device that has an address."""
    if package.SIMULATED or not address:
        return 0
    cuda = driver()
    what = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(done(cuda.cuPointerGetAttribute(what, address)))


@functools.cache
def card_of(device: int) -> Card:
    """Return what launches depend on of a device."""
    if package.SIMULATED:
        return Card(0, (9, 0), 4, 227 << 10)
    cuda = driver()
    what, number = cuda.CUdevice_attribute, done(cuda.cuDeviceGet(device))

    def fact(name: str) -> int:
        kind = getattr(what, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(done(cuda.cuDeviceGetAttribute(kind, number)))

    at = fact("COMPUTE_CAPABILITY_MAJOR"), fact("COMPUTE_CAPABILITY_MINOR")
    shared = fact("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
    return Card(device, at, fact("MULTIPROCESSOR_COUNT"), shared)


def name_of(device: int) -> str:
    """Return the name of a device."""
    cuda = driver()
    done(cuda.cuInit(0))
    name: bytes = done(cuda.cuDeviceGetName(80, done(cuda.cuDeviceGet(device))))
    return name.split(b"\0")[0].decode()


def here() -> int:
    """Return the number of the current device."""
    if package.SIMULATED:
        return 0
    return max(_current(), 0)


def _current() -> int:
    """Return the number of a thread's current device, -1 where it has none yet."""
    cuda = driver()
    error, context = cuda.cuCtxGetCurrent()
    return int(done(cuda.cuCtxGetDevice())) if not error and int(context) else -1


class _Local(threading.local):
    inside = -1  # the device that `inside` has made the current one


_local, _listing = _Local(), threading.Lock()


def _context(device: int) -> Any:
    """Return what makes a device the current one; Numba lists devices at first use, unlocked."""
    with _listing:
        return package.cuda.gpus[device]


def inside(device: int, function: Callable[[], Any]) -> Any:
    """Call a function with a device as the current one."""
    if package.SIMULATED or _local.inside == device:
        return function()
    before: int = _local.inside
    with nullcontext() if _current() == device else _context(device):
        _local.inside = device
        try:
            return function()
        finally:
            _local.inside = before


def wait(stream: int, other: int) -> None:
    """Let what will be queued on a stream wait for what is queued now on another."""
    if package.SIMULATED or stream == other:
        return
    cuda = driver()
    event = done(cuda.cuEventCreate(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    done(cuda.cuEventRecord(event, other))
    done(cuda.cuStreamWaitEvent(stream, event, 0))
    done(cuda.cuEventDestroy(event))


def recorded(stream: int) -> Callable[[], bool]:
    """Return what tells whether the work queued until now on a stream is done."""
    if package.SIMULATED:
        return lambda: True
    cuda = driver()
    event = done(cuda.cuEventCreate(cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    done(cuda.cuEventRecord(event, stream))

    def query() -> bool:
        nonlocal event
        if event is not None and not int(cuda.cuEventQuery(event)[0]):
            done(cuda.cuEventDestroy(event))
            event = None
        return event is None

    return query
