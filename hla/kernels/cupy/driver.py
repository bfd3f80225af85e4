"""CuPy's arrays: memory from its current pool, kernels compiled by NVRTC and cached by CuPy."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from array_api_compat import cupy as xp

from ...core.passes import Shape
from .launch import Card, Constants, Function
from .run import Library, Memory
from .source import source

Array = Any
_functions: dict[Any, Function] = {}
_lock = threading.Lock()
_locks: dict[Any, threading.Lock] = {}  # of what is compiled


def options(name: str) -> tuple[str, ...]:
    """Return options of the compiler beside CuPy's own."""
    return ("-arch=sm_90a",) if name.startswith("hopper") else ()


def load(name: str, constants: Constants, shared: int, card: Card) -> Function:
    """Return a kernel, the only one of its file, on a device: compiled once for its constants."""
    key = name, tuple(constants.items()), shared, card.device
    found = _functions.get(key)
    if found is not None:
        return found
    with _lock:
        own = _locks.setdefault(key, threading.Lock())
    with own, cupy.cuda.Device(card.device):
        found = _functions.get(key)
        if found is None:
            module = cupy.RawModule(code=source(name, constants), options=options(name))
            kernel = module.get_function(f"{name.removesuffix('.cu')}_kernel")
            if shared > 48 << 10:
                kernel.max_dynamic_shared_size_bytes = shared
            found = _functions[key] = kernel.kernel  # without a look-up by device at each launch
    return found


@functools.cache
def card_of(index: int) -> Card:
    """Return what launches depend on of a device."""
    facts = cupy.cuda.runtime.getDeviceProperties(index)
    return Card(
        index, (facts["major"], facts["minor"]), facts["multiProcessorCount"],
        facts["sharedMemPerBlockOptin"],
    )  # fmt: skip


def empty(shape: Shape, strides: Shape, dtype: Any, card: Card) -> Array:
    """Allocate an array with strides, in elements, that leave no gaps."""
    size, steps = _bytes(shape, strides, dtype.itemsize)
    return cupy.ndarray(shape, dtype, cupy.cuda.alloc(size), steps)


def room(size: int, card: Card) -> tuple[Any, int]:
    """Allocate so many bytes, and return their address too."""
    memory = cupy.cuda.alloc(size)
    return memory, memory.ptr


def view(x: Array, shape: Shape, strides: Shape) -> Array:
    """Return an array of the memory of x, of strides in elements."""
    return cupy.ndarray(shape, x.dtype, x.data, _bytes(shape, strides, x.dtype.itemsize)[1])


@functools.lru_cache(maxsize=4096)
def _bytes(shape: Shape, strides: Shape, size: int) -> tuple[int, Shape]:
    """Return the bytes of an array without gaps, and its strides in bytes."""
    return math.prod(shape) * size, tuple(n * size for n in strides)


_constants: dict[Any, Array] = {}


def constant(value: float, shape: Shape, dtype: Any, card: Card) -> Array:
    """Return a number, made once a stream, as an array; a CUDA graph has yet to write its own."""
    stream = cupy.cuda.get_current_stream()
    key = value, dtype, card, stream.ptr
    found = _constants.get(key)
    if found is None:
        bits = np.dtype(f"u{dtype.itemsize}")  # CuPy computes little with bfloat16
        found = cupy.full((), np.asarray(value, dtype).view(bits), bits).view(dtype)
        if not stream.is_capturing():
            _constants[key] = found
    return cupy.broadcast_to(found, shape)


def dtype(name: str) -> Any:
    """Return a dtype by its name."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def inside(card: Card, function: Callable[[], Any]) -> Any:
    """Call a function with a device as the current one."""
    if cupy.cuda.runtime.getDevice() == card.device:
        return function()
    with cupy.cuda.Device(card.device):
        return function()


CUPY = Library(
    Memory(
        xp, load, lambda x: card_of(x.data.device_id), empty, view, constant, dtype,
        lambda x: x.data.ptr, inside, room,
    )
)  # fmt: skip
