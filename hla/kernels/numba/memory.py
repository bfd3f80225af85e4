"""Arrays of NumPy as the kernels of the host take them: flat, with a table of their heads."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ...core.passes import Shape
from ...device.token import span

Array = np.ndarray[Any, Any]


class Flat(NamedTuple):
    """An array's memory in elements, and how its axes lie in it."""

    memory: Array  # one-dimensional
    shape: Shape
    strides: Shape  # in elements


def flat(x: Array) -> Flat:
    """Return the memory of ``x``; of a copy, unless its rows are whole and its strides positive."""
    item = x.itemsize
    strides = tuple(s // item for s in x.strides)
    if x.flags.c_contiguous and x.flags.aligned:
        return Flat(x.reshape(-1), x.shape, strides)
    rows = x.size and x.flags.aligned and (x.shape[-1] == 1 or x.strides[-1] == item)
    if not rows or any(s < 0 or s % item for s in x.strides):
        return flat(x.copy())
    return Flat(as_strided(x, (span(x.shape, strides),), (item,)), x.shape, strides)


@functools.lru_cache(maxsize=1024)
def heads(batch: Shape, *arrays: tuple[Shape, Shape]) -> Array:
    """Return where each head of ``batch`` begins in arrays of these shapes and strides.

    Of those that share an entry of the last array, which is written, the first has its place and
    the others -1.
    """
    found = []
    for shape, strides in arrays:
        at = np.zeros((), np.int64)
        for n, step in zip(shape, strides, strict=True):
            at = at[..., None] + np.arange(n) * step
        found.append(np.broadcast_to(at, batch).reshape(-1))
    first = np.zeros(found[-1].shape, bool)
    first[np.unique(found[-1], return_index=True)[1]] = True
    return np.stack([*found[:-1], np.where(first, found[-1], -1)], axis=-1)
