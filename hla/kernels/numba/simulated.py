"""The generic kernels in Numba's simulator, where a device's memory is the host's."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from typing import Any

import numpy as np

from . import package
from .package import dtype_of

f64 = np.float64  # with `get64` and `put64` what a kernel needs of instructions.cu


def _kind(type: int) -> Any:
    return dtype_of(("bfloat16", "float16", "float32", "float64", "bool", "int64")[type])


def _element(address: int, at: int, type: int) -> Any:
    kind = _kind(type)
    memory = (ctypes.c_char * kind.itemsize).from_address(address + at * kind.itemsize)
    return np.frombuffer(memory, kind)


def get64(address: int, at: int, type: int) -> Any:
    """Read an element."""
    return _element(address, at, type)[0].astype(np.float64)


def put64(address: int, at: int, type: int, x: Any) -> None:
    """Write an element."""
    _element(address, at, type)[...] = np.float64(x)


@functools.cache
def _kernel(text: Any) -> Any:
    return package.cuda.jit(text.make({}, sys.modules[__name__]))


def launch(text: Any, *args: Any) -> None:
    """Run a kernel, of one thread; an overflow or an invalid value is none of the host's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _kernel(text)[1, 1](*args)
