"""How arrays lie in memory and how a launch walks over them: shapes and strides alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..core.passes import Shape
from .steps import Ref


class Layout(NamedTuple):
    """Where an array, or a part of one, lies: in elements from its first."""

    shape: Shape
    strides: Shape
    offset: int = 0

    def behind(self, axis: int, n: int) -> Layout:
        """Return what comes after the first n along an axis."""
        shape = list(self.shape)
        shape[axis] -= n
        return Layout(tuple(shape), self.strides, self.offset + n * self.strides[axis])


@functools.lru_cache(maxsize=1024)
def _strides(shape: Shape, like: Shape, order: Shape) -> Shape:
    missing = len(shape) - len(like)
    keys = [(0, 0)] * missing  # outermost, as axes of one entry
    keys += [(0 if n == 1 else 1, -s) for n, s in zip(like[:-1], order, strict=False)]
    axes = sorted(range(len(shape) - 1), key=lambda i: keys[i])
    strides, step = [1] * len(shape), shape[-1]
    for axis in reversed(axes):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)


def strides_like(shape: Shape, like: Shape, order: Shape) -> Shape:
    """Return the strides of a new array with its rows in the order of another's.

    Parameters
    ----------
    shape : tuple of int
        Of the new array, (*batch, T, F); it may have more axes in front.
    like, order : tuple of int
        Shape and strides of the other.
    """
    try:
        return _strides(shape, like, order)
    except TypeError:  # a compiler's symbols have no hash
        return _strides.__wrapped__(shape, like, order)


def whole(shape: Shape) -> Shape:
    """Return the strides of an array that lies in the order of its axes."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(1, n)
    return tuple(reversed(strides))


def located(ref: Ref, layouts: Mapping[str, Layout]) -> Layout:
    """Return where what a reference means lies."""
    shape, strides, offset = layouts[ref.name]
    if ref.turned:
        shape = (*shape[:-2], shape[-1], shape[-2])
        strides = (*strides[:-2], strides[-1], strides[-2])
    for axis, part in ((-2, ref.rows), (-1, ref.columns)):
        if part is not None:
            offset += part[0] * strides[axis]
            at = len(shape) + axis
            shape = (*shape[:at], part[1] - part[0], *shape[at + 1 :])
    return Layout(shape, strides, offset)


def inner(x: Layout, rank: int, offset: int = 0) -> Layout:
    """Return one entry of a batch, which starts so many elements from the first."""
    at = len(x.shape) - rank
    return Layout(x.shape[at:], x.strides[at:], x.offset + offset)


Operands = Sequence[tuple[Layout, int] | None]  # with the number of its own last axes


def folded(batch: Shape, operands: Operands) -> tuple[Shape, list[Shape]]:
    """Make neighbouring batch axes one where all operands allow.

    Along a batch axis that an operand lacks or is broadcast over its stride is 0. An axis of one
    entry keeps its stride where there is no other: what a kernel is compiled for then is that of
    many heads.

    Returns
    -------
    sizes : tuple of int
        Of the axes that are left.
    strides : list of tuple of int
        Of each axis, operand by operand.
    """
    leads = []
    for operand in operands:
        if operand is None:
            leads.append((0,) * len(batch))
            continue
        (shape, strides, _), rank = operand
        lead = len(shape) - rank
        given = zip(shape[:lead], batch[len(batch) - lead :], strides[:lead], strict=True)
        missing = (0,) * (len(batch) - lead)
        leads.append((*missing, *(0 if n < full else step for n, full, step in given)))
    sizes: list[int] = []
    steps: list[Shape] = []
    for i, (n, step) in enumerate(zip(batch, zip(*leads, strict=True), strict=True)):
        if n == 1 and (steps or i < len(batch) - 1):
            continue
        if steps and all(a == b * n for a, b in zip(steps[-1], step, strict=True)):
            sizes[-1], steps[-1] = sizes[-1] * n, step
        else:
            sizes.append(n)
            steps.append(step)
    return tuple(sizes), steps


def grids(
    batch: Shape, operands: Operands, most: int = 3
) -> Iterator[tuple[Shape, list[Shape], Shape]]:
    """Cut a batch into launches of at most so many axes, which the grid of one counts.

    Yields
    ------
    sizes : tuple of int
        Of ``most`` axes, ones in front.
    strides : list of tuple of int
        Of each operand, along those axes.
    offsets : tuple of int
        Of each operand's first element.
    """
    sizes, steps = folded(batch, operands)
    first = max(0, len(sizes) - most)
    none = (0,) * len(operands)
    inner = [none] * (most - len(sizes[first:])) + steps[first:]
    padded = (1,) * (most - len(sizes[first:])) + sizes[first:]
    for places in _places(sizes[:first]):
        offsets = [
            sum(i * step[j] for i, step in zip(places, steps[:first], strict=True))
            for j in range(len(operands))
        ]
        yield padded, list(zip(*inner, strict=True)), tuple(offsets)


def _places(sizes: Shape) -> Iterator[Shape]:
    if not sizes:
        yield ()
        return
    for i in range(sizes[0]):
        for rest in _places(sizes[1:]):
            yield (i, *rest)
