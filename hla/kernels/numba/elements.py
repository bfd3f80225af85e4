"""The few generic kernels behind the operations of Numba's arrays.

Each goes over the elements of a result, `o[i] = f(a[i], b[i], c[i])`, or sums along further axes in
one order whatever else there is. Every array is an operand: its address, the number of its type,
and its strides in elements along `AXES` axes. Values are float64 in between, whatever the types, so
one compiled kernel serves all of them. A thread does every so many elements of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from . import package
from .instructions import Constants, Text

AXES = 5
OPS = ("copy", "add", "sub", "mul", "div", "pow", "gt", "ge", "lt", "le", "eq", "ne", "where",
       "neg", "exp", "log", "isinf", "isnan", "abs", "sqrt", "floor", "max", "min")  # fmt: skip
CODE = {name: i for i, name in enumerate(OPS)}
exp, log, sqrt = (np.exp, np.log, np.sqrt) if package.SIMULATED else (math.exp, math.log, math.sqrt)


def elementwise(c: Constants, t: Any) -> Callable[..., None]:
    """Return o[i] = op(a[i], b[i], d[i]), `OPS` by their numbers; of no type: the number."""
    read, write, f64 = t.get64, t.put64, t.f64

    def kernel(op, count, number, sizes, o, a, b, d):
        for i in range(cuda.grid(1), count, cuda.gridsize(1)):
            rest, to, at_a, at_b, at_d = i, 0, 0, 0, 0
            for axis in range(AXES - 1, -1, -1):
                place = rest % sizes[axis]
                rest //= sizes[axis]
                to += place * o[2 + axis]
                at_a += place * a[2 + axis]
                at_b += place * b[2 + axis]
                at_d += place * d[2 + axis]
            x, y, z = f64(number), f64(number), f64(number)
            if a[1] >= 0:
                x = f64(read(a[0], at_a, a[1]))
            if b[1] >= 0:
                y = f64(read(b[0], at_b, b[1]))
            if d[1] >= 0:
                z = f64(read(d[0], at_d, d[1]))
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

    return kernel


def products(c: Constants, t: Any) -> Callable[..., None]:
    """Return o[i] = sum of a[i, n] b[i, n] over n, without b of a[i, n], in so many parts.

    Part j has n = j, j + parts, ... One axis of n needs no division for each.
    """
    read, write, f64 = t.get64, t.put64, t.f64

    def kernel(count, length, parts, sizes, along, o, a, b, step_a, step_b, part_o):
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
                if along[AXES - 1] == length:
                    at_a += n * step_a[AXES - 1]
                    at_b += n * step_b[AXES - 1]
                else:
                    for axis in range(AXES - 1, -1, -1):
                        place = rest % along[axis]
                        rest //= along[axis]
                        at_a += place * step_a[axis]
                        at_b += place * step_b[axis]
                x = f64(read(a[0], at_a, a[1]))
                if b[1] >= 0:
                    x *= f64(read(b[0], at_b, b[1]))
                total += x
            write(o[0], to, o[1], total)

    return kernel


def running(c: Constants, t: Any) -> Callable[..., None]:
    """Return o[i, n] = sum of a[i, m] over m <= n."""
    read, write = t.get64, t.put64

    def kernel(count, length, sizes, o, a, step_o, step_a):
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

    return kernel


def picked(c: Constants, t: Any) -> Callable[..., None]:
    """Return o[i] = a[i, places[i]]."""
    read, write = t.get64, t.put64

    def kernel(count, sizes, o, a, places, step):
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

    return kernel


OPERAND = 2 + AXES
KERNELS = {
    "elementwise": Text(elementwise, (int, int, float, AXES, *[OPERAND] * 4)),
    "products": Text(products, (int, int, int, AXES, AXES, *[OPERAND] * 3, AXES, AXES, int)),
    "running": Text(running, (int, int, AXES, OPERAND, OPERAND, int, int)),
    "picked": Text(picked, (int, AXES, *[OPERAND] * 3, int)),
}
