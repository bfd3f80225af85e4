"""An array of device memory, with the operators of the standard: what Numba's arrays lack.

It is memory, shape and strides: an index, a transpose or a broadcast is another view. Everything
that makes numbers is done by the kernels of `loops`, on the current stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ...core.passes import Shape
from . import blocks, dlpack, loops, streams
from .package import dtype_of

Index = Any


def _operator(op: str, swapped: bool = False, kind: str | None = None) -> Any:
    """Return a method that does an operation with another array or a number."""

    def operator(self: Array, other: Any) -> Any:
        if not isinstance(other, (Array, int, float, np.number)):
            return NotImplemented
        pair = (other, self) if swapped else (self, other)
        return mapped(op, *pair, dtype=kind and dtype_of(kind))

    return operator


class Array:
    """Memory of a device, which ``owner`` keeps alive; strides are in bytes."""

    __slots__ = ("_device", "address", "dtype", "owner", "shape", "strides")
    xp: ClassVar[Any]  # the namespace, `standard`

    def __init__(
        self, owner: Any, address: int, shape: Shape, strides: Shape, dtype: Any,
        device: int | None = None,
    ) -> None:  # fmt: skip
        self.owner, self.address, self.dtype = owner, address, dtype
        self.shape, self.strides, self._device = shape, strides, device

    @property
    def device(self) -> int:
        """Number of the device."""
        if self._device is None:
            self._device = blocks.device_of(self.address)
        return self._device

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def mT(self) -> Array:
        """The transpose of the last two axes."""
        return self.permuted((*range(self.ndim - 2), self.ndim - 1, self.ndim - 2))

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return self.xp

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if stream != -1:
            blocks.wait(stream or streams.DEFAULT, streams.current())
        return dlpack.capsule(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.device(self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "strides": self.strides,
            "data": (self.address, False),
            "typestr": self.dtype.str,
            "stream": streams.current(),
            "version": 3,
        }

    def viewed(self, shape: Shape, strides: Shape, offset: int = 0) -> Array:
        """Return a view of other shape and strides, ``offset`` bytes behind."""
        at = self.address + offset
        return Array(self.owner, at, shape, strides, self.dtype, self._device)

    def permuted(self, axes: Sequence[int]) -> Array:
        """Return a view with axes in another order."""
        return self.viewed(tuple(self.shape[i] for i in axes), tuple(self.strides[i] for i in axes))

    def broadcast(self, shape: Shape) -> Array:
        """Return a view of a shape that it broadcasts to."""
        extra = len(shape) - self.ndim
        own = zip(self.shape, shape[extra:], self.strides, strict=True)
        if extra < 0 or any(n not in (1, to) for n, to, _ in own):
            raise ValueError(f"shape {self.shape} does not broadcast to {shape}")
        kept = zip(self.shape, self.strides, strict=True)
        return self.viewed(tuple(shape), (0,) * extra + tuple(0 if n == 1 else s for n, s in kept))

    def __getitem__(self, index: Index) -> Array:
        index = index if isinstance(index, tuple) else (index,)
        missing = self.ndim - sum(x is not None and x is not Ellipsis for x in index)
        if Ellipsis not in index:
            index = (*index, Ellipsis)
        at, axis, shape, strides = 0, 0, list[int](), list[int]()
        for x in index:
            if x is None:
                shape.append(1)
                strides.append(0)
            elif x is Ellipsis:
                shape += self.shape[axis : axis + missing]
                strides += self.strides[axis : axis + missing]
                axis += missing
            elif isinstance(x, slice):
                start, stop, step = x.indices(self.shape[axis])
                shape.append(len(range(start, stop, step)))
                strides.append(step * self.strides[axis])
                at += start * self.strides[axis] if shape[-1] else 0
                axis += 1
            else:
                place = range(self.shape[axis])[x]  # refuses what is outside
                at += place * self.strides[axis]
                axis += 1
        return self.viewed(tuple(shape), tuple(strides), at)

    def __setitem__(self, index: Index, value: Any) -> None:
        to = self[index]
        if isinstance(value, Array):
            loops.apply("copy", to, value.broadcast(to.shape))
        else:
            loops.apply("copy", to, None, number=value)

    def get(self) -> np.ndarray[Any, Any]:
        """Return the values, once the current stream has come to them."""
        x = ordered(self)
        found = np.empty(x.shape, x.dtype)
        blocks.download(x.address, x.device, found)
        return found

    def __float__(self) -> float:
        return float(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __repr__(self) -> str:
        return f"Array(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    def __neg__(self) -> Array:
        return mapped("neg", self)

    def __abs__(self) -> Array:
        return mapped("abs", self)

    def __matmul__(self, other: Array) -> Array:
        a, b = self.broadcast_rows(other)
        return sums(a, b, 1, promoted(self, other))

    def broadcast_rows(self, other: Array) -> tuple[Array, Array]:
        """Return the operands of a matrix product as (*batch, rows, columns, summed)."""
        if self.shape[-1] != other.shape[-2]:
            raise ValueError(f"shapes {self.shape} and {other.shape} do not multiply")
        a, b = self[..., :, None, :], other.mT[..., None, :, :]
        shape = np.broadcast_shapes(a.shape, b.shape)
        return a.broadcast(shape), b.broadcast(shape)

    __add__, __radd__ = _operator("add"), _operator("add", True)
    __sub__, __rsub__ = _operator("sub"), _operator("sub", True)
    __mul__, __rmul__ = _operator("mul"), _operator("mul", True)
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", True)
    __pow__, __rpow__ = _operator("pow"), _operator("pow", True)
    __gt__, __ge__ = _operator("gt", kind="bool"), _operator("ge", kind="bool")
    __lt__, __le__ = _operator("lt", kind="bool"), _operator("le", kind="bool")
    __eq__, __ne__ = _operator("eq", kind="bool"), _operator("ne", kind="bool")
    __hash__ = object.__hash__


def made(shape: Sequence[int], dtype: Any, device: int, strides: Shape | None = None) -> Array:
    """Allocate an array, in order or with strides in bytes that leave no gaps."""
    shape = tuple(shape)
    dtype = dtype_of(dtype) if isinstance(dtype, str) else dtype
    if strides is None:
        strides = whole(shape, dtype.itemsize)
    block = blocks.inside(
        device, lambda: blocks.allocate(math.prod(shape) * dtype.itemsize, device)
    )
    return Array(block, block.address, shape, strides, dtype, device)


def whole(shape: Shape, size: int) -> Shape:
    """Return the strides of an array in order."""
    found = list[int]()
    for n in reversed(shape):
        found.append(size)
        size *= max(n, 1)
    return tuple(reversed(found))


def is_ordered(x: Array) -> bool:
    """Whether an array is one piece of memory in the order of its axes."""
    steps = zip(x.shape, x.strides, whole(x.shape, x.dtype.itemsize), strict=True)
    return all(n == 1 or a == b for n, a, b in steps) or 0 in x.shape


def ordered(x: Array) -> Array:
    """Return x, or a copy of it, in order."""
    return x if is_ordered(x) else mapped("copy", x)


def promoted(*given: Any) -> Any:
    """Return the dtype of a result; numbers take that of the arrays."""
    kinds = {x.dtype for x in given if isinstance(x, Array)}
    if len(kinds) == 1:
        return kinds.pop()
    return np.result_type(*kinds)


def mapped(op: str, *given: Any, dtype: Any = None) -> Array:
    """Return ``op`` of arrays and at most one number, element by element."""
    arrays = [x for x in given if isinstance(x, Array)]
    numbers = [x for x in given if not isinstance(x, Array)]
    kind = dtype or promoted(*given[-2:])
    o = made(np.broadcast_shapes(*(x.shape for x in arrays)), kind, arrays[0].device)
    operands = [x.broadcast(o.shape) if isinstance(x, Array) else None for x in given]
    loops.apply(op, o, *operands, number=numbers[0] if numbers else 0.0)
    return o


def sums(a: Array, b: Array | None, last: int, dtype: Any) -> Array:
    """Return the sums of a, or of a b, over their last so many axes."""

    def make(shape: Sequence[int], kind: Any) -> Array:
        return made(shape, kind, a.device)

    o = make(a.shape[: a.ndim - last], dtype)
    loops.add_up(o, a, b, last, make)
    return o
