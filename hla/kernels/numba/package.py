"""Numba's compiler for GPUs, numba-cuda, where it is installed.

In its simulator (NUMBA_ENABLE_CUDASIM=1) a device's memory is the host's.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from typing import Any

import numpy as np

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@functools.cache
def installed() -> str:
    """Return the package that compiles for GPUs, "" for none; Numba has the simulator by itself."""
    name = "numba" if SIMULATED else "numba-cuda"
    return name if find_spec("numba") and find_spec(name.replace("-", "_")) else ""


def version() -> str:
    """Return name and release of what is used."""
    from importlib import metadata

    return f"{installed()} {metadata.version(installed())}"


def __getattr__(name: str) -> Any:
    if name == "cuda":
        globals()["cuda"] = found = importlib.import_module("numba.cuda")
        return found
    raise AttributeError(name)


@functools.cache
def dtype_of(name: str) -> Any:
    """Return a dtype by its name; NumPy and Numba know bfloat16 by that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
