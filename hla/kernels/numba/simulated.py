"""What Numba's simulator calls in place of elements.cu: a device's memory is the host's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .package import dtype_of


def _kind(type: int) -> Any:
    return dtype_of(("bfloat16", "float16", "float32", "float64", "bool", "int64")[type])


def read(address: int, at: int, type: int) -> Any:
    """Read an element in the simulator."""
    kind = _kind(type)
    memory = (ctypes.c_char * kind.itemsize).from_address(address + at * kind.itemsize)
    return np.frombuffer(memory, kind)[0].astype(np.float64)


def write(address: int, at: int, type: int, x: Any) -> None:
    """Write an element in the simulator."""
    kind = _kind(type)
    memory = (ctypes.c_char * kind.itemsize).from_address(address + at * kind.itemsize)
    np.frombuffer(memory, kind)[...] = np.float64(x).astype(kind)
