"""Launches of the generic kernels (`elements`) behind the operations of Numba's arrays.

Neighbouring axes are made one where all strides allow, so that `AXES` are enough.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import blocks, elements, package, simulated
from .elements import AXES, CODE

Array = Any
THREADS, BLOCKS = 128, 1 << 14
RUN = 256  # elements that one thread sums
TYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3, "bool": 4, "int64": 5}
NONE = (0, -1, *(0,) * AXES)  # the operand that is the call's number


def launch(name: str, device: int, count: int, *args: Any) -> None:
    """Launch a kernel of so many elements on the current stream."""
    if not count:
        return
    text = elements.KERNELS[name]
    if package.SIMULATED:
        simulated.launch(text, *args)
        return
    words = [x for y in args for x in (y if isinstance(y, tuple) else (y,))]
    argument = np.frombuffer(struct_of(name).pack(*words), np.uint8)
    grid = (min(-(-count // THREADS), BLOCKS),)
    blocks.inside(
        device, lambda: function(name, device)(grid, (THREADS,), (argument,), shared_mem=0)
    )


@functools.cache
def struct_of(name: str) -> struct.Struct:
    """Return how the arguments of a kernel lie in memory."""
    kinds = elements.KERNELS[name].arguments
    return struct.Struct(
        "<" + "".join("q" if x is int else "d" if x is float else f"{x}q" for x in kinds)
    )


@functools.cache
def function(name: str, device: int) -> Any:
    """Return a kernel on a device."""
    from . import driver

    return driver.load(name, {}, 0, blocks.card_of(device))


def steps(x: Array | None, rank: int) -> tuple[int, ...]:
    """Return strides of x in elements along the last ``rank`` axes of what it is broadcast to."""
    if x is None:
        return (0,) * rank
    size = x.dtype.itemsize
    own = (0 if n == 1 else s // size for n, s in zip(x.shape, x.strides, strict=True))
    return (0,) * (rank - len(x.shape)) + tuple(own)


def merged(axes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Make neighbouring axes, each its size and strides, one where all strides allow."""
    found: list[tuple[int, ...]] = []
    for n, *strides in axes:
        if n == 1:
            continue
        if found and all(a == b * n for a, b in zip(found[-1][1:], strides, strict=True)):
            found[-1] = (found[-1][0] * n, *strides)
        else:
            found.append((n, *strides))
    return found


def columns(axes: Sequence[tuple[int, ...]], operands: int) -> list[tuple[int, ...]]:
    """Return sizes and each operand's strides along `AXES` axes."""
    filled = [(1, *(0,) * operands)] * (AXES - len(axes)) + [*axes]
    return [*zip(*filled, strict=True)]


def together(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the merged axes of a shape."""
    return merged([(n, *x) for n, *x in zip(shape, *strides, strict=True)])


def operand(x: Array | None, strides: Sequence[int], offset: int = 0) -> tuple[int, ...]:
    """Return the words of an operand, ``offset`` elements from its start."""
    if x is None:
        return NONE
    return (x.address + offset * x.dtype.itemsize, TYPES[str(x.dtype)], *strides)


def apply(op: str, o: Array, *given: Array, number: float = 0.0) -> None:
    """Write ``op`` of arrays that are broadcast to it into o; None stands for a number."""
    every = [o, *given, *[None] * (3 - len(given))]
    axes = together(o.shape, *(steps(x, len(o.shape)) for x in every))
    count = math.prod(o.shape)
    outer, inner = axes[: max(0, len(axes) - AXES)], axes[max(0, len(axes) - AXES) :]
    sizes, *strides = columns(inner, 4)
    for place in np.ndindex(*(n for n, *_ in outer)) if count else ():
        at = [sum(p * x[1 + i] for p, x in zip(place, outer, strict=True)) for i in range(4)]
        words = [operand(x, s, i) for x, s, i in zip(every, strides, at, strict=True)]
        inside = math.prod(sizes)
        launch("elementwise", o.device, inside, CODE[op], inside, float(number), sizes, *words)


def add_up(o: Array, a: Array, b: Array | None, last: int, make: Any) -> None:
    """Write the sums of a, or of a b, over their last so many axes into o.

    Long sums are taken of parts, whose number depends on the length alone; ``make`` makes an array
    for them, of a shape and the name of a dtype.
    """
    rank = len(a.shape)
    kept, summed = a.shape[: rank - last], a.shape[rank - last :]
    sides = [steps(x, rank) for x in (a, b)]
    length = math.prod(summed)
    parts = -(-length // RUN) if b is None else 1
    to = make((*kept, parts), "float64") if parts > 1 else o
    own = steps(to, len(to.shape))
    axes = together(kept, own[: len(kept)], *(x[: rank - last] for x in sides))
    along = together(summed, *(x[rank - last :] for x in sides))
    if len(axes) > AXES or len(along) > AXES:
        whole = make(a.shape, "float64")
        apply("copy" if b is None else "mul", whole, a, b)
        return add_up(o, whole, None, last, make)
    sizes, *strides = columns(axes, 3)
    lengths, *each = columns(along, 2)
    words = [operand(x, s) for x, s in zip((to, a, b), strides, strict=True)]
    count = math.prod(kept)
    if count:
        numbers, step = (count, length, parts, sizes, lengths), own[-1] if parts > 1 else 0
        launch("products", o.device, count * parts, *numbers, *words, *each, step)
    if parts > 1:
        add_up(o, to, None, 1, make)
    return None


def run_up(o: Array, a: Array, axis: int) -> None:
    """Write the sums of a up to each element along a negative axis into o."""
    rank = len(a.shape)
    sides, axis = [steps(x, rank) for x in (o, a)], rank + axis
    rest = [i for i in range(rank) if i != axis]
    axes = together([a.shape[i] for i in rest], *([x[i] for i in rest] for x in sides))
    sizes, *strides = columns(axes, 2)
    words = [operand(x, s) for x, s in zip((o, a), strides, strict=True)]
    count = math.prod(sizes)
    if math.prod(a.shape):
        step_o, step_a = (x[axis] for x in sides)
        launch("running", o.device, count, count, a.shape[axis], sizes, *words, step_o, step_a)


def pick(o: Array, a: Array, places: Array) -> None:
    """Write the elements of a at places of its last axis into o, both in order."""
    lead = steps(a, len(a.shape))
    axes = together(o.shape, steps(o, len(o.shape)), (*lead[:-1], 0), steps(places, len(o.shape)))
    sizes, *strides = columns(axes, 3)
    words = [operand(x, s) for x, s in zip((o, a, places), strides, strict=True)]
    count = math.prod(sizes)
    launch("picked", o.device, count, count, sizes, *words, lead[-1])
