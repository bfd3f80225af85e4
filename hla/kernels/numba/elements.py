"""The few generic kernels behind the operations of Numba's arrays.

Each goes over the elements of a result, `o[i] = f(a[i], b[i], c[i])`, or sums along further axes in
one order whatever else there is. Every array is an operand: its address, the number of its type,
and its strides in elements along `AXES` axes. Values are float64 in between, whatever the types, so
one compiled kernel serves all of them.
"""

from __future__ import annotations

import importlib.resources
import math
from typing import Any

import numpy as np

from . import package
from .package import cuda

AXES = 5
OPS = ("copy", "add", "sub", "mul", "div", "pow", "gt", "ge", "lt", "le", "eq", "ne", "where",
       "neg", "exp", "log", "isinf", "isnan", "abs", "sqrt", "floor", "max", "min")  # fmt: skip
CODE = {name: i for i, name in enumerate(OPS)}
exp, log, sqrt = (np.exp, np.log, np.sqrt) if package.SIMULATED else (math.exp, math.log, math.sqrt)


def _elements() -> tuple[Any, Any]:
    """Return the functions that read and write an element of an array, by elements.cu."""
    if package.SIMULATED:
        from . import simulated

        return simulated.read, simulated.write
    text = (
        importlib.resources.files(__package__).joinpath("elements.cu").read_text(encoding="utf-8")
    )
    source, at = cuda.CUSource(text), "int64, int64, int64"
    return (
        cuda.declare_device("hla_read", f"float64({at})", link=source),
        cuda.declare_device("hla_write", f"int32({at}, float64)", link=source),
    )


def _kernel(function: Any) -> Any:
    """Compile a kernel; in the simulator floating-point warnings are none."""
    if not package.SIMULATED:
        return cuda.jit(function)

    def quiet(*args: Any) -> None:
        with np.errstate(all="ignore"):
            function(*args)

    return cuda.jit(quiet)


read, write = _elements()


@_kernel
def elementwise(op, count, number, sizes, o, a, b, c):
    """o[i] = op(a[i], b[i], c[i]), `OPS` by their numbers; the number stands for what is NONE."""
    for i in range(cuda.grid(1), count, cuda.gridsize(1)):
        rest, to, at_a, at_b, at_c = i, 0, 0, 0, 0
        for axis in range(AXES - 1, -1, -1):
            place = rest % sizes[axis]
            rest //= sizes[axis]
            to += place * o[2 + axis]
            at_a += place * a[2 + axis]
            at_b += place * b[2 + axis]
            at_c += place * c[2 + axis]
        x, y, z = number, number, number
        if a[1] >= 0:
            x = read(a[0], at_a, a[1])
        if b[1] >= 0:
            y = read(b[0], at_b, b[1])
        if c[1] >= 0:
            z = read(c[0], at_c, c[1])
        r = x
        if op == 1:
            r = x + y
        elif op == 2:
            r = x - y
        elif op == 3:
            r = x * y
        elif op == 4:
            r = x / y
        elif op == 5:
            r = x**y
        elif op == 6:
            r = 1.0 if x > y else 0.0
        elif op == 7:
            r = 1.0 if x >= y else 0.0
        elif op == 8:
            r = 1.0 if x < y else 0.0
        elif op == 9:
            r = 1.0 if x <= y else 0.0
        elif op == 10:
            r = 1.0 if x == y else 0.0
        elif op == 11:
            r = 1.0 if x != y else 0.0
        elif op == 12:
            r = y if x != 0 else z
        elif op == 13:
            r = -x
        elif op == 14:
            r = exp(x)
        elif op == 15:
            r = log(x)
        elif op == 16:
            r = 1.0 if abs(x) == math.inf else 0.0
        elif op == 17:
            r = 1.0 if x != x else 0.0
        elif op == 18:
            r = abs(x)
        elif op == 19:
            r = sqrt(x)
        elif op == 20:
            r = math.floor(x)
        elif op == 21:
            r = x if x > y or x != x else y
        elif op == 22:
            r = x if x < y or x != x else y
        write(o[0], to, o[1], r)


@_kernel
def products(count, length, parts, sizes, along, o, a, b, step_a, step_b, part_o):
    """o[i] = sum of a[i, n] b[i, n] over n (without b of a[i, n]): n = part, part + parts, ..."""
    for i in range(cuda.grid(1), count * parts, cuda.gridsize(1)):
        rest, part = i // parts, i % parts
        to, from_a, from_b = part * part_o, 0, 0
        for axis in range(AXES - 1, -1, -1):
            place = rest % sizes[axis]
            rest //= sizes[axis]
            to += place * o[2 + axis]
            from_a += place * a[2 + axis]
            from_b += place * b[2 + axis]
        total = 0.0
        for n in range(part, length, parts):
            rest, at_a, at_b = n, from_a, from_b
            for axis in range(AXES - 1, -1, -1):
                place = rest % along[axis]
                rest //= along[axis]
                at_a += place * step_a[axis]
                at_b += place * step_b[axis]
            x = read(a[0], at_a, a[1])
            if b[1] >= 0:
                x *= read(b[0], at_b, b[1])
            total += x
        write(o[0], to, o[1], total)


@_kernel
def running(count, length, sizes, o, a, step_o, step_a):
    """o[i, n] = sum of a[i, m] over m <= n."""
    for i in range(cuda.grid(1), count, cuda.gridsize(1)):
        rest, to, at = i, 0, 0
        for axis in range(AXES - 1, -1, -1):
            place = rest % sizes[axis]
            rest //= sizes[axis]
            to += place * o[2 + axis]
            at += place * a[2 + axis]
        total = 0.0
        for n in range(length):
            total += read(a[0], at + n * step_a, a[1])
            write(o[0], to + n * step_o, o[1], total)


@_kernel
def picked(count, sizes, o, a, places, step):
    """o[i] = a[i, places[i]]."""
    for i in range(cuda.grid(1), count, cuda.gridsize(1)):
        rest, to, at, place_at = i, 0, 0, 0
        for axis in range(AXES - 1, -1, -1):
            place = rest % sizes[axis]
            rest //= sizes[axis]
            to += place * o[2 + axis]
            at += place * a[2 + axis]
            place_at += place * places[2 + axis]
        index = int(read(places[0], place_at, places[1]))
        write(o[0], to, o[1], read(a[0], at + index * step, a[1]))
