"""Load kernels that are compiled, and launch them on the current stream of this thread."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from cuda.bindings import driver

from ..cupy.launch import Card
from . import blocks, streams
from .build import kept
from .instructions import Constants

Extra = ctypes.c_void_p * 5
POINTER, SIZE = 1, 2  # CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE


def checked(found: Any) -> Any:
    """Return what a function of the driver gives beside its error, which is raised."""
    error, *rest = found
    if error.value:
        raise RuntimeError(f"the CUDA driver reports {error.name}")
    return rest[0] if rest else None


class Function:
    """A kernel on a device, launched with all of its arguments as one array."""

    def __init__(self, code: bytes, shared: int) -> None:
        self.module = checked(driver.cuModuleLoadData(code))
        (self.handle,) = checked(driver.cuModuleEnumerateFunctions(1, self.module))
        if shared > 48 << 10:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self.handle, most, shared))

    def __call__(
        self, grid: tuple[int], block: tuple[int], arguments: tuple[Any], *, shared_mem: int
    ) -> None:
        """Put it on the current stream."""
        (given,) = arguments
        size = ctypes.c_size_t(given.nbytes)
        at = given.__array_interface__["data"][0]
        extra = Extra(POINTER, at, SIZE, ctypes.addressof(size), 0)
        (error,) = driver.cuLaunchKernel(
            self.handle, grid[0], 1, 1, block[0], 1, 1, shared_mem, streams.current(), 0,
            ctypes.addressof(extra),
        )  # fmt: skip
        if error.value:
            raise RuntimeError(f"the CUDA driver reports {error.name}")


_functions: dict[Any, Function] = {}
_locks: dict[Any, threading.Lock] = {}  # of each


def load(name: str, constants: Constants, shared: int, card: Card) -> Function:
    """Return a kernel on a device, compiled once for its constants."""
    key = name, tuple(constants.items()), shared, card.device
    found = _functions.get(key)
    if found is None:
        with _locks.setdefault(key, threading.Lock()):
            if key in _functions:
                return _functions[key]
            found = _functions[key] = blocks.inside(  # also of a thread that has no device yet
                card.device,
                lambda: Function(kept(name, constants, card.capability), shared),
            )
    return found
