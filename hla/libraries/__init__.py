"""Array libraries: a class for each, with what the standard leaves open about its arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from ..core import namespace
from ..core.namespace import Array
from .generic import Generic
from .generic import recording as recording
from .numba import NUMBA, Arrays


# By import statements, which torch's compiler runs where it reads a call of theirs.
def _numpy(*_: Any) -> Generic:
    from .numpy import NUMPY

    return NUMPY


def _torch(*_: Any) -> Generic:
    from .torch import TORCH

    return TORCH


def _jax(*_: Any) -> Generic:
    from .jax import JAX

    return JAX


def _cupy(*_: Any) -> Generic:
    from .cupy import CUPY

    return CUPY


@functools.cache
def _numba() -> Generic:
    return Arrays()


def _memory(*_: Any) -> Generic:
    return NUMBA


namespace.ADAPTERS |= {
    "": functools.cache(Generic),
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
    "numba": lambda *_: _numba(),
    namespace.MEMORY: _memory,
}
NODES: dict[str, Callable[..., Any]] = {}  # what a compiler takes as one node of its graph

library_of = cast("Callable[[Array], Generic]", namespace.library_of)  # it finds these classes


def named(name: str) -> Generic:
    """Return a library by its name; what is known of others, but not their namespace."""
    return cast("Generic", namespace.adapter(name, None))
