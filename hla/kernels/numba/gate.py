"""Kernels of a gate: its gradient by one pass, and its sums over segments.

The gate of token s multiplies every product that crosses it (derivations 5). In a chunk

    G_s = E + sum_{t>=s} c_t + sum_{j<s} (d_j + w_j) - sum_{t<s} r_t, E = B - sum c, B <- E + sum d

where c_t is read from earlier chunks, d_j is written to later ones, r_t and w_j sum the chunk's own
pairs by query and by key, and B and E are what crosses its start and what crosses all of it. B is
<S, R>, the state and its gradient, at both borders of every period: from the first it is carried
on, and what is then missing at the second is added along the way. E is 0 in a chunk whose gate
leaves nothing. For a decay the sum of G over all tokens is needed. Sums in float64, in one order.

Arguments are those of `cupy.between.gate_gradient` and `cupy.between.fading`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..cupy.launch import AXES
from .instructions import Constants, Text

LEAST, RESET, NOTHING = 1e-30, -1e6, 5.9604644775390625e-08


class Operands(NamedTuple):
    """Addresses of arrays, in order but for the gate, or the numbers of their types."""

    reads: int
    writes: int
    gate: int
    border: int
    state: int
    gradient: int
    met: int
    o: int


class Sizes(NamedTuple):
    """What there is to do."""

    tokens: int
    keys: int
    values: int
    log: int
    strict: int
    ends: int
    reads: int
    writes: int
    met: int


def gradient(c: Constants, t: Any) -> Callable[..., None]:
    """Return the gradient by one pass: a block of threads a head and period, a thread a token."""
    get, put, up, across, device = t.get64, t.put64, t.up, t.across, t.device
    f64, i32, i64 = t.f64, t.i32, t.i64
    W, PERIOD = c["W"], c["PERIOD"]
    CHUNKS, WARPS, OWN = PERIOD // W, PERIOD // 32, W // 32

    @device
    def summed(x, shared, thread):
        """Return the sum over the block, the same in all threads."""
        for n in (16, 8, 4, 2, 1):
            x += across(x, n)
        cuda.syncthreads()
        if thread % 32 == 0:
            shared[thread // 32] = x
        cuda.syncthreads()
        x = f64(0)
        for i in range(WARPS):
            x += shared[i]
        return x

    @device
    def in_chunk(x, shared, thread):
        """Return the sums over the chunk of a thread: up to its own token, and of all."""
        lane, warp = thread % 32, thread // 32
        upto = x
        for n in (1, 2, 4, 8, 16):
            other = up(upto, n)
            if lane >= n:
                upto += other
        cuda.syncthreads()
        if lane == 31:
            shared[warp] = upto
        cuda.syncthreads()
        whole, before, first = f64(0), f64(0), warp // OWN * OWN
        for n in range(OWN):
            whole += shared[first + n]
            if first + n < warp:
                before += shared[first + n]
        return upto + before, whole

    @device
    def crossing(at, types, size, n, factor, shared, thread):
        """Return <S, R>, the sum of its parts, or factor times that of (D, V) and (V, D)."""
        count, total = size.keys * size.values, f64(0)
        if at.met:
            for i in range(size.met):
                total += get(at.met, n * size.met + i, types.met)
        else:
            for i in range(thread, count, PERIOD):
                d, v = i // size.values, i % size.values
                S = get(at.state, n * count + i, types.state)
                total += S * get(at.gradient, n * count + v * size.keys + d, types.gradient)
            total = summed(total, shared, thread) * factor
        return total

    @device
    def of_gate(head, sizes, strides):
        """Return the elements from the gate's first to a head's."""
        at = i64(0)
        for n in range(AXES):
            axis = AXES - 1 - n
            if sizes[axis] != 1:
                at += head % sizes[axis] * strides[axis]
                head //= sizes[axis]
        return at

    def gate_gradient(at, types, size, power, factor, sizes, strides, step):
        shared = cuda.shared.array(0, f64)  # 32 sums, then three lists of chunks
        thread = i32(cuda.threadIdx.x)
        T = size.tokens
        parts = (T + PERIOD - 1) // PERIOD
        part, head = i64(cuda.blockIdx.x) % parts, i64(cuda.blockIdx.x) // parts
        first, i, i_t = part * PERIOD, thread // W, thread % W
        token = first + thread
        there = token < T
        B, after = f64(0), f64(0)
        if part == 0 and at.border:
            B = get(at.border, head, types.border)
        states = at.state or at.met
        if part > 0 and states:
            n = head * (parts - 1) + part - 1
            B = crossing(at, types, size, n, factor, shared, thread)
        if part < parts - 1 and states:
            n = head * (parts - 1) + part
            after = crossing(at, types, size, n, factor, shared, thread)

        c, d, query, a = f64(0), f64(0), f64(0), f64(0)  # d with what pairs sum to by key
        if there:
            for n in range(size.reads):
                c += get(at.reads, (head * size.reads + n) * T + token, types.reads)
            for n in range(size.writes):
                place = (head * size.writes + n) * 2 * T + token
                d += get(at.writes, place, types.writes)
                query += get(at.writes, place + T, types.writes)
            place = of_gate(head, sizes, strides)
            a = get(at.gate, place + token * step if size.log else place, types.gate)
            if not size.log:
                a = math.log(LEAST if a < LEAST else a)
        _, sum_a = in_chunk(a, shared, thread)
        read, _ = in_chunk(c + query, shared, thread)
        written, _ = in_chunk(d, shared, thread)
        _, sum_c = in_chunk(c, shared, thread)
        _, sum_d = in_chunk(d - query, shared, thread)  # of its own pairs both sums are the same
        if i_t == 0:
            shared[32 + i], shared[32 + CHUNKS + i] = sum_c, sum_d
            leaves = 0.0 if math.exp(sum_a * power) < NOTHING else 1.0
            shared[32 + 2 * CHUNKS + i] = leaves
        cuda.syncthreads()
        begin, E = f64(0), f64(0)
        for n in range(CHUNKS):  # what crosses a chunk, and what is missing behind all
            kept = shared[32 + 2 * CHUNKS + n]
            through = kept * (B - shared[32 + n])
            if n == i:
                E = through
            B = through + shared[32 + CHUNKS + n]
            if kept == 0:
                begin = n + 0.5
        rest = min(T - first, i64(PERIOD))
        missing = (after - B) / (f64((rest + W - 1) // W) - begin)
        if not size.ends and part == parts - 1:
            missing = f64(0)
        through = E + (missing * (i + 0.5 - begin) if i + 0.5 > begin else 0.0)
        if size.log:
            ahead = read if size.strict else read - (c + query)
            if there:
                G = through + sum_c - ahead + written - d
                put(at.o, head * T + token, types.o, G * power)
        else:
            n = f64(max(min(rest - i * W, i64(W)), i64(0)))
            last = f64(i_t - 1 if size.strict else i_t)  # the last gate that a read has met
            crossed = (last + 1) * c + (n - 1 - i_t) * d - (n - 1 - last) * query
            if not there:
                crossed = f64(0)
            if i_t == 0:
                crossed += n * through
            total = summed(crossed, shared, thread)
            if thread == 0:
                put(at.o, head * parts + part, types.o, total * power)

    return gate_gradient


class Parts(NamedTuple):
    """Strides of the gate and its sums, and what there is to do."""

    gate0: int
    gate1: int
    gate2: int
    gate_token: int
    o0: int
    o1: int
    o2: int
    o_segment: int
    tokens: int
    segment: int
    heads1: int
    heads2: int
    log: int
    type: int


def fading(c: Constants, t: Any) -> Callable[..., None]:
    """Return the sums of the log gate over segments: a warp a head and segment."""
    get, put, across, f64, i64 = t.get64, t.put64, t.across, t.f64, t.i64

    def sums(gate, o, p):
        parts = (p.tokens + p.segment - 1) // p.segment
        part, index = i64(cuda.blockIdx.x) % parts, i64(cuda.blockIdx.x) // parts
        first, i2, rest = part * p.segment, index % p.heads2, index // p.heads2
        i0, i1 = rest // p.heads1, rest % p.heads1
        count = min(p.tokens - first, p.segment)
        from_ = i0 * p.gate0 + i1 * p.gate1 + i2 * p.gate2
        total = f64(0)
        for token in range(cuda.threadIdx.x, count, 32):
            a = get(gate, from_ + (first + token) * p.gate_token, p.type)
            if not p.log:
                a = math.log(LEAST if a < LEAST else a)
            total += RESET if a < RESET else a  # a NaN stays
        for n in (16, 8, 4, 2, 1):
            total += across(total, n)
        if cuda.threadIdx.x == 0:
            put(o, part * p.o_segment + i0 * p.o0 + i1 * p.o1 + i2 * p.o2, 3, total)

    return sums


def _macros(c: Constants) -> Constants:
    return {"SUM_TYPE": "double"}


def _registers(c: Constants) -> int:
    return min(255, 65536 // c["PERIOD"])  # of a multiprocessor, a thread a token


KERNELS = {
    "gate.cu": Text(
        gradient, (Operands, Operands, Sizes, float, float, AXES, AXES, int), _macros, _registers
    ),
    "fading.cu": Text(fading, (int, int, Parts), _macros),
}
