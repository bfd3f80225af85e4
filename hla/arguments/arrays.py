"""Checks of the arrays of a call: kind, dtype, device, token axis, shapes."""

from __future__ import annotations

from typing import Any

from ..core.namespace import Array
from ..core.passes import Shape, broadcast
from ..core.request import FLOATS
from ..errors import kind_of
from ..layout import Layout
from ..libraries import library_of


def array(
    name: str, x: Any, like: Array | None = None, like_name: str = "q", *, number: str = ""
) -> Array:
    """Check that ``x`` is an array of one library and device with ``like``, plain in memory.

    ``number`` names the numbers that would be accepted too, for the error.
    """
    library = library_of(x)
    if not library.name:
        raise TypeError(
            f"{name} is {kind_of(x)}; expected {number}an array of NumPy, torch, JAX, CuPy or"
            " another library of the Array API standard. Convert lists; compute Dask arrays, make"
            " sparse ones dense, fill masked ones"
        )
    irregular = library.irregular(x)
    if irregular is not None:
        what, remedy = irregular
        raise TypeError(f"{name} {what}; expected a plain array. Convert it: {remedy}")
    if like is not None:
        expected = library_of(like)
        if library is not expected:
            raise TypeError(
                f"{name} is an array of {library.name}; expected {expected.name} like {like_name}."
                " Convert it"
            )
        if not library.same_device(x, like):
            raise ValueError(
                f"{name} is on device {library.device_name(x)}; expected"
                f" {library.device_name(like)} like {like_name}. Move it first"
            )
    return library.plain(x)


def floating(name: str, x: Array) -> Array:
    """Check that an array has a dtype that is computed with."""
    if library_of(x).dtype_name(x) not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected one of {', '.join(FLOATS)}. Cast it")
    return x


def operands(given: dict[str, Any], axis: int | None) -> tuple[Array, Array, Array, int | None]:
    """Check kind, dtype, device and the token axis of q, k and v."""
    first, *_ = given
    for name, x in given.items():
        given[name] = array(name, x, None if name == first else given[first], first)
    for name, x in given.items():
        floating(name, x)
        expected = given[first].dtype
        if x.dtype != expected:
            raise TypeError(
                f"{name} has dtype {x.dtype}; expected {expected} like {first}. Cast it"
            )
    q, k, v = given.values()
    lowest = 1
    if axis is not None:
        negative = axis if axis < 0 else axis - q.ndim
        if q.ndim >= 2 and not -q.ndim <= negative <= -2:
            raise ValueError(
                f"axis is {axis} for q of shape {tuple(q.shape)}; expected the token axis, from"
                f" {-q.ndim} to -2 (the feature axis is last)"
            )
        axis, lowest = negative, max(2, -negative)
    for name, x in given.items():
        if x.ndim < lowest:
            layout = "(*batch, D)" if axis is None else "(*batch, T, D)"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected at least {lowest} axes, {layout}"
            )
    return q, k, v, axis


def shapes(given: dict[str, Array], layout: Layout) -> Shape:
    """Check widths, lengths and batch axes as the caller sees them; return the batch shape."""
    axis, (first, second, _) = layout.axis, given
    q = given[first]
    hint = "" if axis is None else f". Is the token axis {axis}? Pass axis="
    places = {-1, axis} - {None}
    batches: dict[str, Shape] = {}
    batch: Shape = ()
    for name, x in given.items():
        shape = tuple(x.shape)
        wrong = name == second and shape[-1] != q.shape[-1]
        if wrong or (axis is not None and shape[axis] != q.shape[axis]):
            expected = list(shape)
            if axis is not None:
                expected[axis] = q.shape[axis]
            if name == second:
                expected[-1] = q.shape[-1]
            raise ValueError(
                f"{name} has shape {shape}; expected {tuple(expected)} to go with {first} of shape"
                f" {tuple(q.shape)}{hint}"
            )
        others = " and ".join(batches)
        batches[name] = tuple(n for i, n in enumerate(shape) if i - len(shape) not in places)
        try:
            batch = broadcast(*batches.values())
        except ValueError:
            heads = _grouped(given, name, axis)
            raise ValueError(
                f"{name} has shape {shape}; expected batch axes that broadcast (equal sizes or 1)"
                f" with {batch} of {others}{heads or hint}"
            ) from None
    return batch


def _grouped(given: dict[str, Array], name: str, axis: int | None) -> str:
    """Tell how groups of heads are laid out, where two numbers of heads call for it; or ""."""
    first, second, third = given
    q, x = tuple(given[first].shape), tuple(given[name].shape)
    places = [i for i in range(-min(len(q), len(x)), -1) if i != axis]
    unequal = [i for i in places if q[i] != x[i] and 1 not in (q[i], x[i])]
    if len(unequal) != 1:
        return ""
    (i,) = unequal
    few, many = sorted((q[i], x[i]))
    if few == 0 or many % few:
        return ""

    def split(shape: Shape) -> Shape:
        place = len(shape) + i
        return (*shape[:place], few, shape[place] // few, *shape[place + 1 :])

    alike = f" ({third} alike)" if name == second else ""
    moved = "" if axis is None or i < axis else f", and axis={axis - 1}"
    return f". For groups of heads give {first} as {split(q)}, {name} as {split(x)}{alike}{moved}"


def broadcasts(name: str, shape: Shape, to: Shape, what: str) -> None:
    """Check that a shape broadcasts to another one."""
    try:
        if broadcast(tuple(shape), to) == to:
            return
    except ValueError:
        pass
    raise ValueError(
        f"{name} has shape {tuple(shape)}; expected a shape that broadcasts to {tuple(to)}, {what}"
    )
