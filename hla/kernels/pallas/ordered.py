"""jnp with sums in an order that their length alone decides.

XLA orders a reduction, and a cumulative sum, by the shape of the whole array: a head's last bits
would depend on how many heads there are. Additions that are written out keep their order.
"""

from __future__ import annotations

import functools
from typing import Any

from jax import lax
from jax import numpy as jnp

Array = Any
PIECES, AT_ONCE = 16, 8  # elements that one of XLA's kernels adds to one


class Ordered:
    """The namespace of `device.elementwise`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def sum(x: Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Array:
        """Return sums over axes, each cut into pieces that are added until one is left."""
        axes = [i % x.ndim for i in ((axis,) if isinstance(axis, int) else axis)]
        for i in axes:
            n = x.shape[i]
            size = 1 << max(0, n - 1).bit_length()
            x = _padded(x, i, 0, size - n)
            while size > 1:
                count = min(size, PIECES)
                size //= count
                pieces = (_cut(x, i, j * size, (j + 1) * size) for j in range(count))
                x = functools.reduce(jnp.add, pieces)
        return x if keepdims else jnp.squeeze(x, axis=tuple(axes))

    @staticmethod
    def cumulative_sum(x: Array, axis: int = -1) -> Array:
        """Return sums up to each element: of the last two, then four, and so on.

        After some steps they are stored, as XLA would else make them for each element again.
        """
        i, step = axis % x.ndim, 1
        while step < x.shape[i]:
            x = x + _padded(_cut(x, i, 0, x.shape[i] - step), i, step, 0)
            step *= 2
            x = lax.optimization_barrier(x) if step == AT_ONCE else x
        return x


def _cut(x: Array, axis: int, begin: int, end: int) -> Array:
    """Return a part of an array along an axis."""
    return lax.slice_in_dim(x, begin, end, axis=axis)


def _padded(x: Array, axis: int, before: int, behind: int) -> Array:
    """Return an array with zeros at both ends of an axis."""
    widths = [(before, behind, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), widths) if before or behind else x


ordered = Ordered()
