"""What core needs of an array library: its namespace, and a few things that the standard lacks.

`hla.libraries` answers: `Generic` in terms of the standard alone, other adapters better where a
library has a way of its own. What adapts which library is data, `ADAPTERS`, and an adapter is
imported when the first array of its library comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np

Array = Any
Namespace = Any
Library = Any  # one object of `hla.libraries` for each; arrays are arguments, so it serves all

# The adapter of each library by its name, from name and namespace; of any other by "".
MEMORY = "memory"  # of those that are memory of a device and have no namespace
ADAPTERS: dict[str, Callable[[str, Namespace], Library]] = {}


_libraries: dict[type, Library] = {}  # by class: a look-up takes as long as a small product


def library_of(x: Array) -> Library:
    """Return the library of ``x``; its name is "" if ``x`` is no array that is computed with."""
    if type(x) not in _libraries:
        _libraries[type(x)] = _library(x)
    return _libraries[type(x)]


def _library(x: Array) -> Library:
    if hasattr(type(x), "__cuda_ndarray__"):  # Numba's, in its simulator too
        return adapter(MEMORY, None)
    if not compat.is_array_api_obj(x):
        memory = hasattr(type(x), "__cuda_array_interface__")  # on a device, without a namespace
        return adapter(MEMORY if memory else "", None)
    xp = compat.array_namespace(x)
    refused = isinstance(x, np.ma.MaskedArray) or compat.is_dask_array(x)
    if refused or compat.is_pydata_sparse_array(x):
        return adapter("", xp)
    name = xp.__name__.removeprefix("array_api_compat.").split(".", 1)[0]
    return adapter(name, xp)


def adapter(name: str, xp: Namespace) -> Library:
    """Return the one object that adapts a library."""
    return ADAPTERS.get(name, ADAPTERS[""])(name, xp)


def namespace(x: Array) -> Namespace:
    """Array API namespace of ``x``."""
    return library_of(x).xp or compat.array_namespace(x)  # which reports what is wrong with x


def device(x: Array) -> Any:
    """Device on which to make arrays beside ``x``; None where they follow it by themselves."""
    return library_of(x).device(x)


def symbolic(size: Any) -> bool:
    """Whether a size is a symbol of any library, of which no comparison is known."""
    return type(size) is not int and any(x.symbolic(size) for x in {*_libraries.values()})


def expand(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast ``x`` to ``shape``; x itself where it has it."""
    return x if tuple(x.shape) == tuple(shape) else namespace(x).broadcast_to(x, shape)


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum ``x`` over the axes along which ``shape`` was broadcast to it."""
    extra = len(x.shape) - len(shape)
    axes = tuple(range(extra)) + tuple(
        i + extra for i, n in enumerate(shape) if n == 1 and x.shape[i + extra] != 1
    )
    if not axes:
        return x
    xp = namespace(x)
    return xp.reshape(xp.sum(x, axis=axes), shape)


def moveaxis(x: Array, source: int, destination: int) -> Array:
    """Move one axis."""
    return library_of(x).moveaxis(x, source, destination)


def padded(x: Array, axis: int, *, before: int = 0, after: int = 0, fill: float = 0.0) -> Array:
    """Lengthen ``x`` along a negative axis by so many entries of ``fill``."""
    return library_of(x).padded(x, axis, before, after, fill)
