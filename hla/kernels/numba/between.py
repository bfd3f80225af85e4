"""Kernels of what goes on between passes: sums of arrays, quotients, states over segments.

Their arguments are those of `cupy.launch.total` and `cupy.between`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..cupy.launch import AXES, TERMS
from .instructions import Constants, Text

LEAST = 1e-30  # decay


def total(c: Constants, t: Any) -> Callable[..., None]:
    """Return o = sum of factor * term, each broadcast, or summed over axes: a thread an element.

    A term is walked by the axes of o (stride 0 where it is broadcast), then by up to two of its own
    that are summed, in order. Of gradients of a gate's logarithm (GATE_KIND 1: a decay) the sum is
    divided by it, or (2: a log gate) 0 where it is -inf.
    """
    get, put, f32, f64, i64, device = t.get64, t.put64, t.f32, t.f64, t.i64, t.device
    kind, GATE_KIND = f64 if c["TOTAL"] == "double" else f32, c["GATE_KIND"]

    @device
    def one(base, strides, own, factor, places):
        """Return factor times a term's sum."""
        at = i64(0)
        for axis in range(AXES):
            at += places[axis] * strides[axis]
        found = kind(0)
        for a in range(own[0]):
            for b in range(own[1]):
                found += kind(get(base, at + a * own[2] + b * own[3], own[4]))
        return kind(factor) * found

    def add(at, s0, n0, f0, s1, n1, f1, s2, n2, f2, s3, n3, f3, sizes, strides, gate, rest):
        i = i64(cuda.blockIdx.x) * 256 + cuda.threadIdx.x
        type_o, type_gate, count, terms = rest
        if i < count:
            places = cuda.local.array(AXES, i64)
            to, of_gate = i64(0), i64(0)
            for n in range(AXES):
                axis = AXES - 1 - n
                if sizes[axis] == 1:
                    places[axis] = 0
                else:
                    places[axis] = i % sizes[axis]
                    i //= sizes[axis]
                to += places[axis] * strides[axis]
                of_gate += places[axis] * gate[axis]
            found = kind(0)
            if terms > 0:
                found += one(at[0], s0, n0, f0, places)
            if terms > 1:
                found += one(at[1], s1, n1, f1, places)
            if terms > 2:
                found += one(at[2], s2, n2, f2, places)
            if terms > 3:
                found += one(at[3], s3, n3, f3, places)
            if GATE_KIND:
                a = f32(get(at[4], of_gate, type_gate))
                if GATE_KIND == 1:
                    found /= kind(LEAST if a < LEAST else a)  # a NaN stays
                elif a == -math.inf:
                    found = kind(0)
            put(at[5], to, type_o, f64(found))

    return add


class Row(NamedTuple):
    """Strides of an operand's rows and columns, and its type by number."""

    s0: int
    s1: int
    s2: int
    s3: int
    s4: int
    s5: int
    s6: int
    s7: int
    column: int
    type: int


def divide(c: Constants, t: Any) -> Callable[..., None]:
    """Return o = x / (den + eps), and dden = -(o . num) / (den + eps): a warp a row."""
    get, put, f32, f64, i32, i64, across, device = (
        t.get, t.put, t.f32, t.f64, t.i32, t.i64, t.across, t.device,
    )  # fmt: skip

    @device
    def place(of, places):
        at = places[0] * of.s0 + places[1] * of.s1 + places[2] * of.s2 + places[3] * of.s3
        return at + places[4] * of.s4 + places[5] * of.s5 + places[6] * of.s6 + places[7] * of.s7

    def quotient(at, x, den, o, num, dden, sizes, rows, columns, eps):
        row, lane = i64(cuda.blockIdx.x) * 8 + cuda.threadIdx.x // 32, i32(cuda.threadIdx.x % 32)
        if row < rows:
            places = cuda.local.array(AXES, i64)
            for n in range(AXES):
                axis = AXES - 1 - n
                if sizes[axis] == 1:
                    places[axis] = 0
                else:
                    places[axis] = row % sizes[axis]
                    row //= sizes[axis]
            by = get(at[1], place(den, places), den.type) + f32(eps)
            at_x, at_o, at_num = place(x, places), place(o, places), place(num, places)
            dot = f32(0)
            for v in range(lane, columns, 32):
                found = get(at[0], at_x + v * x.column, x.type) / by
                put(at[2], at_o + v * o.column, o.type, f64(found))
                if at[4]:
                    dot += found * get(at[3], at_num + v * num.column, num.type)
            if at[4]:
                for n in range(5):
                    dot += across(dot, 16 >> n)
                if lane == 0:
                    put(at[4], place(dden, places), dden.type, f64(-dot / by))

    return quotient


class Walk(NamedTuple):
    """Strides of a state along three axes of heads, its rows and its columns."""

    head0: int
    head1: int
    head2: int
    row: int
    column: int


class Fade(NamedTuple):
    """Strides of sums of the log gate along three axes of heads, and of segments."""

    head0: int
    head1: int
    head2: int
    segment: int


class Segments(NamedTuple):
    """What a carry goes through."""

    parts: int
    rows: int
    columns: int
    heads1: int
    heads2: int
    reverse: int
    tiles: int


def carry(c: Constants, t: Any) -> Callable[..., None]:
    """Return S <- r_n S + local_n, o_n the S before it: a thread an element of a head's state."""
    get, put, f32, f64, i64, device = t.get64, t.put64, t.f32, t.f64, t.i64, t.device

    @device
    def place(of, i0, i1, i2):
        return i0 * of.head0 + i1 * of.head1 + i2 * of.head2

    def join(at, start, end, fading, p, power):
        size, index = p.rows * p.columns, i64(cuda.blockIdx.x) // p.tiles
        e = i64(cuda.blockIdx.x) % p.tiles * 128 + cuda.threadIdx.x
        if e < size:
            i2, rest = index % p.heads2, index // p.heads2
            i0, i1 = rest // p.heads1, rest % p.heads1
            row, column = e // p.columns, e % p.columns
            faded, first, S = place(fading, i0, i1, i2), index * p.parts * size + e, f32(0)
            if at[2]:
                from_ = place(start, i0, i1, i2) + row * start.row + column * start.column
                S = f32(get(at[2], from_, 2))
            for i in range(p.parts):
                n = p.parts - 1 - i if p.reverse else i
                more = f32(0)
                if i + 1 < p.parts or at[3]:  # the last may not be there
                    more = f32(get(at[0], first + n * size, 2))
                put(at[1], first + n * size, 2, f64(S))
                if at[4]:
                    S *= f32(math.exp(power * get(at[4], faded + n * fading.segment, 3)))
                S += more
            if at[3]:
                to = place(end, i0, i1, i2) + row * end.row + column * end.column
                put(at[3], to, 2, f64(S))

    return join


KERNELS = {
    "sum.cu": Text(total, (TERMS + 2, *(AXES, 5, float) * TERMS, AXES, AXES, AXES, 4)),
    "divide.cu": Text(divide, (5, *[Row] * 5, AXES, int, int, float)),
    "carry.cu": Text(carry, (5, Walk, Walk, Fade, Segments, float)),
}
