"""The functions of the Array API standard that core and the plans ask for, of Numba's arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...core.passes import Shape
from . import blocks, dlpack, loops
from .array import Array, made, mapped, ordered, promoted, sums, whole
from .package import dtype_of


def asarray(x: Any, *, dtype: Any = None, device: int | None = None, copy: bool = False) -> Array:
    """Return an array of numbers or an array of the host, or ``x`` itself."""
    if isinstance(x, Array):
        return astype(x, dtype or x.dtype, copy=copy)
    x = np.asarray(x, dtype)
    x = np.ascontiguousarray(x.astype(np.int64) if x.dtype.kind in "iu" else x).reshape(x.shape)
    found = made(x.shape, x.dtype, blocks.here() if device is None else device)
    blocks.upload(found.address, found.device, x)
    return found


def astype(x: Array, dtype: Any, *, copy: bool = True) -> Array:
    """Cast."""
    return mapped("copy", x, dtype=dtype) if copy or x.dtype != dtype else x


def full(shape: Any, value: float, *, dtype: Any = None, device: int | None = None) -> Array:
    """Return one number, broadcast: it takes the memory of one."""
    found = made((), dtype or _default(value), blocks.here() if device is None else device)
    loops.apply("copy", found, None, number=value)
    return found.broadcast((shape,) if isinstance(shape, int) else tuple(shape))


def _default(value: Any) -> Any:
    return dtype_of("bool" if isinstance(value, bool) else "int64" if isinstance(value, int)
                    else "float64")  # fmt: skip


def zeros(shape: Any, *, dtype: Any = None, device: int | None = None) -> Array:
    """Return zeros."""
    return full(shape, 0.0, dtype=dtype, device=device)


def ones(shape: Any, *, dtype: Any = None, device: int | None = None) -> Array:
    """Return ones."""
    return full(shape, 1.0, dtype=dtype, device=device)


def full_like(x: Array, value: float, *, dtype: Any = None) -> Array:
    """Return one number in x's shape."""
    return full(x.shape, value, dtype=dtype or x.dtype, device=x.device)


def zeros_like(x: Array, *, dtype: Any = None) -> Array:
    """Return zeros in x's shape."""
    return full_like(x, 0.0, dtype=dtype)


def ones_like(x: Array, *, dtype: Any = None) -> Array:
    """Return ones in x's shape."""
    return full_like(x, 1.0, dtype=dtype)


def empty(shape: Sequence[int], *, dtype: Any = None, device: int | None = None) -> Array:
    """Return an array of nothing in particular."""
    return made(shape, dtype or dtype_of("float64"), blocks.here() if device is None else device)


def arange(
    start: int, stop: int | None = None, step: int = 1, *, dtype: Any = None,
    device: int | None = None,
) -> Array:  # fmt: skip
    """Return whole numbers in a row."""
    start, stop = (0, start) if stop is None else (start, stop)
    return asarray(np.arange(start, stop, step), dtype=dtype or dtype_of("int64"), device=device)


def broadcast_to(x: Array, shape: Shape) -> Array:
    """Return a view of a shape."""
    return x.broadcast(tuple(shape))


def broadcast_arrays(*xs: Array) -> tuple[Array, ...]:
    """Return views of the common shape."""
    shape = np.broadcast_shapes(*(x.shape for x in xs))
    return tuple(x.broadcast(shape) for x in xs)


def reshape(x: Array, shape: Any, *, copy: bool | None = None) -> Array:
    """Return x with its elements in order as another shape: a view where that can be."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if -1 in shape:
        known = -math.prod(shape)
        shape = tuple(x.size // known if n == -1 else n for n in shape)
    if math.prod(shape) != x.size:
        raise ValueError(f"shape {x.shape} cannot be {shape}")
    strides = None if x.size == 0 else _as(x, shape)
    if strides is None:
        x = ordered(x)
        strides = whole(shape, x.dtype.itemsize)
    return x.viewed(shape, strides)


def _as(x: Array, shape: Shape) -> Shape | None:
    """Return the strides of a view of x in another shape, None if there are none."""
    found = list[int]()
    run = loops.together(x.shape, x.strides)
    inside, step = run.pop() if run else (1, x.dtype.itemsize)
    for n in reversed(shape):
        if n == 1:
            found.append(step)
            continue
        if inside == 1 and run:
            inside, step = run.pop()
        if inside % n:
            return None
        found.append(step)
        inside, step = inside // n, step * n
    return tuple(reversed(found))


def permute_dims(x: Array, axes: Sequence[int]) -> Array:
    """Return a view with axes in another order."""
    return x.permuted([i % x.ndim for i in axes])


def moveaxis(x: Array, source: int, destination: int) -> Array:
    """Return a view with one axis moved."""
    axes = [i for i in range(x.ndim) if i != source % x.ndim]
    axes.insert(destination % x.ndim, source % x.ndim)
    return x.permuted(axes)


def matrix_transpose(x: Array) -> Array:
    """Return the transpose of the last two axes."""
    return x.mT


def expand_dims(x: Array, *, axis: int = 0) -> Array:
    """Return a view with one more axis, of one."""
    at = axis % (x.ndim + 1)
    return x[(*(slice(None),) * at, None)]


def squeeze(x: Array, axis: int) -> Array:
    """Return a view without an axis of one."""
    return x[(*(slice(None),) * (axis % x.ndim), 0)]


def unstack(x: Array, *, axis: int = 0) -> tuple[Array, ...]:
    """Return a view of each slice."""
    before = (slice(None),) * (axis % x.ndim)
    return tuple(x[(*before, i)] for i in range(x.shape[axis]))


def concat(xs: Sequence[Array], *, axis: int = 0) -> Array:
    """Return a copy of arrays side by side."""
    xs = tuple(xs)
    first = xs[0]
    axis %= first.ndim
    shape = list(first.shape)
    shape[axis] = sum(x.shape[axis] for x in xs)
    found, at = made(shape, promoted(*xs), first.device), 0
    for x in xs:
        found[(*(slice(None),) * axis, slice(at, at + x.shape[axis]))] = x
        at += x.shape[axis]
    return found


def stack(xs: Sequence[Array], *, axis: int = 0) -> Array:
    """Return a copy of arrays along a new axis."""
    return concat([expand_dims(x, axis=axis) for x in xs], axis=axis)


def where(condition: Array, x: Any, y: Any) -> Array:
    """Return x where the condition holds, else y."""
    return mapped("where", condition, x, y)


def take(x: Array, indices: Array, *, axis: int = -1) -> Array:
    """Return the elements at places of the last axis."""
    if axis % x.ndim != x.ndim - 1:
        raise NotImplementedError("take is of the last axis; move another one there")
    x = ordered(x)
    found = made((*x.shape[:-1], *indices.shape), x.dtype, x.device)
    loops.pick(found, x, indices)
    return found


def tril(x: Array, *, k: int = 0) -> Array:
    """Clear what is above the diagonal k."""
    return _triangle(x, "ge", k)


def triu(x: Array, *, k: int = 0) -> Array:
    """Clear what is below the diagonal k."""
    return _triangle(x, "le", k)


def _triangle(x: Array, op: str, k: int) -> Array:
    rows, columns = (
        arange(i, n + i, device=x.device) for i, n in zip((k, 0), x.shape[-2:], strict=True)
    )
    kept = mapped(op, rows[:, None], columns[None, :], dtype=dtype_of("bool"))
    return where(kept, x, zeros((), dtype=x.dtype, device=x.device))


def total(x: Array, *, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Array:
    """Sum over axes, in one order."""
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    axes = [i % x.ndim for i in axes]
    kept = [i for i in range(x.ndim) if i not in axes]
    kind = dtype or (dtype_of("int64") if x.dtype.kind == "b" else x.dtype)
    found = sums(x.permuted([*kept, *axes]), None, len(axes), kind)
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return reshape(found, shape) if keepdims else found


def cumulative_sum(x: Array, *, axis: int = -1, dtype: Any = None) -> Array:
    """Sum up to each element along an axis."""
    found = made(x.shape, dtype or x.dtype, x.device)
    loops.run_up(found, x, axis % x.ndim - x.ndim)
    return found


def matmul(a: Array, b: Array) -> Array:
    """Return the matrix product."""
    return a @ b


def _unary(op: str, dtype: str | None = None) -> Any:
    def function(x: Array) -> Array:
        return mapped(op, x, dtype=dtype and dtype_of(dtype))

    return function


def _binary(op: str, dtype: str | None = None) -> Any:
    def function(x: Any, y: Any) -> Array:
        return mapped(op, x, y, dtype=dtype and dtype_of(dtype))

    return function


def from_dlpack(x: Any, *, device: int | None = None, copy: bool | None = None) -> Array:
    """Return an array of the memory of another library's, whose work is waited for."""
    owner, address, shape, strides, dtype, number = dlpack.taken(x)
    strides = whole(shape, dtype.itemsize) if strides is None else strides
    return Array(owner, address, shape, strides, dtype, number)


_OWN = (
    asarray, astype, full, zeros, ones, full_like, zeros_like, ones_like, empty, arange,
    broadcast_to, broadcast_arrays, reshape, permute_dims, moveaxis, matrix_transpose, expand_dims,
    squeeze, unstack, concat, stack, where, take, tril, triu, cumulative_sum, matmul, from_dlpack,
)  # fmt: skip
_DTYPES = ("float16", "float32", "float64", "bool", "int64")
xp = SimpleNamespace(
    __name__="numba",
    **{f.__name__: f for f in _OWN},
    **{name: dtype_of(name) for name in _DTYPES},
    **{name: _unary(name) for name in ("exp", "log", "abs", "sqrt", "floor")},
    **{name: _unary(name, "bool") for name in ("isinf", "isnan")},
    sum=total,
    maximum=_binary("max"),
    minimum=_binary("min"),
    isdtype=lambda dtype, kind: dtype.kind == {"bool": "b", "integral": "i"}.get(kind, "f"),
)
Array.xp = xp
