"""Numba's compiler for GPUs, whichever is installed: numba-cuda, or its successor numba-cuda-mlir.

In numba-cuda's simulator (NUMBA_ENABLE_CUDASIM=1) a device's memory is the host's.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from typing import Any

import numpy as np

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
MODULES = {"numba-cuda": "numba.cuda", "numba-cuda-mlir": "numba_cuda_mlir.cuda"}
SIMULATOR = {"numba": "numba.cuda"}  # Numba has it by itself


@functools.cache
def installed() -> str:
    """Return the first package that is installed, "" for none."""
    names = SIMULATOR if SIMULATED else MODULES
    return next((x for x in names if find_spec(x.replace("-", "_"))), "")


def version() -> str:
    """Return name and release of what is used."""
    from importlib import metadata

    return f"{installed()} {metadata.version(installed())}"


def __getattr__(name: str) -> Any:
    if name == "cuda":
        module = (SIMULATOR if SIMULATED else MODULES)[installed()]
        globals()["cuda"] = found = importlib.import_module(module)
        return found
    raise AttributeError(name)


@functools.cache
def dtype_of(name: str) -> Any:
    """Return a dtype by its name; NumPy and Numba know bfloat16 by that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
