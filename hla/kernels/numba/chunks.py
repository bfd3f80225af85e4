"""What the kernels share that hold all states of a head in one block of threads (`fused`).

A state is held transposed, S' (V, D) in float32 registers, 32 rows a warp. Of a chunk of W tokens,
of queries Q, keys K and values X, in blocks of 16 x 16,

    P = lower(Q K')  [W, W]    O = Q S + P X  [W, V]    S' = S' + X' K  [V, D]

and from the last token on P = upper(Q K'). Every block that is read from shared memory serves two
products, of a warp's two rows of blocks.

Weights of a gate, in base 2, lie beside a chunk as lists of power 1, which a pass raises: until a
token, its power of two, that of what comes after it, and that of the whole chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..cupy.launch import PAD
from .causal import shared_functions
from .instructions import Constants

LOG2E, LEAST, RESET = 1.4426950408889634, 1e-30, -160.0


class Chunks(NamedTuple):
    """Device functions, and where weights lie in a list of them."""

    is_first: Any
    copier: Callable[[int], Any]
    piece_of: Any
    put_weights: Any
    gate_of: Any
    make_own_pairs: Any
    read: Any
    update: Any
    leave: Any
    get_state: Any
    put_state: Any
    put_rows: Any
    put_wide: Any
    lists: int  # floats of a list


def macros(c: Constants) -> Constants:
    """Return the macros of the instructions for the constants of a kernel."""
    return {"NARROW": 1, "TYPE_O": 0, "PITCH_1": c["B"] + PAD, "PITCH_2": c["W"] + PAD}


def functions(c: Constants, t: Any, threads: int, *, reverse: bool = False) -> Chunks:
    """Return the functions for the constants of a kernel of so many threads."""
    f32, f64, device = t.f32, t.f64, t.device
    load, load_turned, second, second_turned = t.load, t.load_turned, t.second, t.second_turned
    multiply, block_of, weighed, put_pair, value = (
        t.multiply, t.block_of, t.weighed, t.put_pair, t.value,
    )  # fmt: skip
    copy16, put_value, leave16, get, put = t.copy16, t.put_value, t.leave16, t.get, t.put
    syncwarp, up, of_lane, power_of_2 = t.syncwarp, t.up, t.of_lane, t.power_of_2
    number, put_number, get_block, put_block = t.number, t.put_number, t.get_block, t.put_block

    B, W, GATE, FAST, WHOLE = c["B"], c["W"], c["GATE"], c["FAST"], c["WHOLE"]
    KEYS, BLOCKS, THREADS, REVERSE = B // 16, W // 16, threads, reverse
    PITCH, PITCH_P = B + PAD, W + PAD
    TRIANGLE, STATE, SUMS = BLOCKS * (BLOCKS + 1) // 2, 16 * KEYS, 16 * BLOCKS
    BEFORE, AFTER, TOTAL, LISTS = W, 2 * W, 3 * W, 3 * W + 4
    INTO, FADE = (AFTER, BEFORE) if REVERSE else (BEFORE, AFTER)  # of what is read, and written

    eight, put_eight, place, *_ = shared_functions(t)

    @device
    def is_first(of, head):
        """Whether it is the first of the heads that share an array, of strides 0."""
        one = of.head0 != 0 or head.index0 == 0
        two = of.head1 != 0 or head.index1 == 0
        return one and two and (of.head2 != 0 or head.index2 == 0)

    @device
    def raised(x, power):
        return x if power == 1 else x * x if power == 2 else x * x * x

    def copier(width):
        """Return what copies this thread's pieces of a chunk's rows into a tile."""
        in_row = width // 8
        apart = THREADS // in_row

        @device
        def copy(tile, base, row_step, column_step, rows, left, thread):
            for n in range(-(-W // apart)):
                row = thread // in_row + n * apart
                to = tile + row * PITCH + thread % in_row * 8
                there = row < rows
                if n * apart + apart <= W or row < W:
                    if FAST:
                        copy16(to, base + n * apart * row_step * 2,
                               16 if there and (WHOLE or left > 0) else 0)  # fmt: skip
                    else:
                        for i in range(8):
                            x = f32(0)
                            if there and i < left:
                                x = get(base, n * apart * row_step + i * column_step, 0)
                            put_value(to + i, x)

        return copy

    @device
    def piece_of(base, of, head, first, columns, column0, thread, in_row):
        """Return where this thread's first piece of a tile is, and the columns from there on."""
        column = column0 + thread % in_row * 8
        return base + place(of, head, 0, first + thread // in_row, column) * 2, columns - column

    @device
    def put_weights(lists, a, lane):
        """Leave the weights of a chunk by one warp, a token a lane."""
        a = a * LOG2E
        a = RESET if a < RESET else a  # a NaN stays
        for n in (1, 2, 4, 8, 16):
            other = up(a, n)
            if lane >= n:
                a += other
        last = of_lane(a, W - 1)
        if lane < W:
            put_number(lists + lane, f32(a))
            put_number(lists + BEFORE + lane, power_of_2(f32(a)))
            put_number(lists + AFTER + lane, power_of_2(f32(last - a)))
            if lane == 0:
                put_number(lists + TOTAL, power_of_2(f32(last)))

    @device
    def gate_of(base, of, first, lane, tokens):
        """Return the gate of a lane's token, from a chunk's first on; of a decay its logarithm."""
        t, a = first + lane, f64(0)
        if t < tokens and lane < W:
            a = f64(get(base, t * of.row if GATE == 2 else 0, of.type))
            if GATE == 1:
                a = math.log(LEAST if a < LEAST else a)  # a NaN stays
        return a

    def pair_maker(count):
        """Return what leaves so many blocks of P in a row of blocks, from one on."""
        room = 8 * count

        @device
        def make_pairs(q, k, tile, lists, t, first_s, power, lane):
            g, j = lane // 4, 2 * (lane % 4)
            A, rest = cuda.local.array(room, f32), cuda.local.array(room, f32)
            for i in range(room):
                A[i], rest[i] = f32(0), f32(0)
            for d in range(KEYS):  # two sums: half as long a chain
                a = load(q + t * 16 * PITCH + 16 * d, PITCH)
                for n in range(count):
                    b = second(k + (first_s + n) * 16 * PITCH + 16 * d, PITCH)
                    if d % 2:
                        put_eight(rest, n, multiply(*(eight(rest, n) + a + b)))
                    else:
                        put_eight(A, n, multiply(*(eight(A, n) + a + b)))
            for n in range(count):
                s = first_s + n
                for e in range(8):
                    i, row, column = 8 * n + e, g + e // 2 % 2 * 8, j + e % 2 + e // 4 * 8
                    x = A[i] + rest[i]
                    if GATE:  # where it overflows no pair is
                        until = number(lists + 16 * t + row) - number(lists + 16 * s + column)
                        if REVERSE:
                            until = -until
                        x = x * power_of_2(until * f32(power))
                    none = column < row if REVERSE else row < column
                    A[i] = f32(0) if t == s and none else x
                for e in range(4):
                    at = tile + (16 * t + g + e % 2 * 8) * PITCH_P + 16 * s + j + e // 2 * 8
                    put_pair(at, A[8 * n + 2 * e], A[8 * n + 2 * e + 1])

        return make_pairs

    make_one, make_row = pair_maker(1), pair_maker(BLOCKS)

    @device
    def make_own_pairs(q, k, tile, lists, rank, warps, power, lane):
        """Leave a warp's share of P, of a part of so many warps."""
        last = BLOCKS - 1
        if warps >= TRIANGLE:
            if rank < TRIANGLE:
                t, s = 1 if rank > 0 else 0, 1 if rank > 1 else 0
                if REVERSE:
                    t, s = s, t
                make_one(q, k, tile, lists, t, s, power, lane)
        elif rank == 0:
            make_row(q, k, tile, lists, 0 if REVERSE else last, 0, power, lane)
        elif BLOCKS > 1 and rank == 1:
            own = last if REVERSE else 0
            make_one(q, k, tile, lists, own, own, power, lane)

    @device
    def read(S, O, queries, lists, power, lane):
        """Set O to a warp's columns of what is read of its state, weighed."""
        for i in range(SUMS):
            O[i] = f32(0)
        for d in range(KEYS):
            s0, s1 = block_of(*eight(S, d)), block_of(*eight(S, KEYS + d))
            for t in range(BLOCKS):
                b = load(queries + 16 * t * PITCH + 16 * d, PITCH)
                put_eight(O, 2 * t, multiply(*(eight(O, 2 * t) + b + s0)))
                put_eight(O, 2 * t + 1, multiply(*(eight(O, 2 * t + 1) + b + s1)))
        if GATE:
            for t in range(2 * BLOCKS):
                for r in range(2):
                    w = raised(number(lists + INTO + t // 2 * 16 + lane // 4 + 8 * r), power)
                    for i in range(4):
                        O[8 * t + i // 2 * 4 + 2 * r + i % 2] *= w

    @device
    def update(S, O, reads, keys, values, P, lists, power, lane):
        """Add P X to O, where it reads, and weighed X' K to S', from a warp's columns of X on."""
        j = 2 * (lane % 4)
        if GATE:
            total = raised(number(lists + TOTAL), power)
            for i in range(STATE):
                S[i] *= total
        for s in range(BLOCKS):
            b0 = load_turned(values + 16 * s * PITCH, PITCH)
            b1 = load_turned(values + 16 * s * PITCH + 16, PITCH)
            if reads:
                for t in range(BLOCKS):
                    if t <= s if REVERSE else t >= s:
                        x = load(P + 16 * t * PITCH_P + 16 * s, PITCH_P)
                        put_eight(O, 2 * t, multiply(*(eight(O, 2 * t) + x + b0)))
                        more = multiply(*(eight(O, 2 * t + 1) + x + b1))
                        put_eight(O, 2 * t + 1, more)
            if GATE:
                w = lists + FADE + 16 * s + j
                w0, w1 = raised(number(w), power), raised(number(w + 1), power)
                w8, w9 = raised(number(w + 8), power), raised(number(w + 9), power)
                b0, b1 = weighed(w0, w1, w8, w9, *b0), weighed(w0, w1, w8, w9, *b1)
            for d in range(KEYS):
                x = second_turned(keys + 16 * s * PITCH + 16 * d, PITCH)
                put_eight(S, d, multiply(*(eight(S, d) + b0 + x)))
                put_eight(S, KEYS + d, multiply(*(eight(S, KEYS + d) + b1 + x)))

    @device
    def leave(base, of, made, rows, left, lane):
        """Write a warp's 32 columns of what it has put into shared memory."""
        syncwarp()
        for n in range(W // 8):
            row, at = 8 * n + lane // 4, made + (8 * n + lane // 4) * PITCH + lane % 4 * 8
            if row < rows:
                if not FAST:
                    for i in range(8):
                        if i < left:
                            x = f64(value(at + i))
                            put(base, 8 * n * of.row + i * of.column, 0, x)
                elif WHOLE or left > 0:
                    leave16(base + 8 * n * of.row * 2, 2 * at)

    @device
    def get_state(S, base, of, head, segment, row0, rows, columns):
        """Set a warp's rows of S' to those of a matrix, or to zeros where there is none."""
        for i in range(STATE):
            S[i] = f32(0)
        if base:
            for n in range(2 * KEYS):
                row, column = row0 + 16 * (n // KEYS), 16 * (n % KEYS)
                there = base + place(of, head, segment, row, column) * 4
                x = get_block(there, of.row, of.column, 2, rows - row, columns - column)
                put_eight(S, n, x)

    @device
    def put_state(S, base, of, head, segment, row0, rows, columns):
        for n in range(2 * KEYS):
            row, column = row0 + 16 * (n // KEYS), 16 * (n % KEYS)
            there = base + place(of, head, segment, row, column) * 4
            put_block(there, of.row, of.column, 2, rows - row, columns - column, *eight(S, n))

    @device
    def put_rows(O, made, factor, lane):
        """Put factor * O into shared memory, from a warp's columns of a tile on."""
        g, j = lane // 4, 2 * (lane % 4)
        for t in range(2 * BLOCKS):
            for i in range(4):
                row = t // 2 * 16 + g + i % 2 * 8
                to = made + row * PITCH + t % 2 * 16 + j + i // 2 * 8
                put_pair(to, O[8 * t + 2 * i] * factor, O[8 * t + 2 * i + 1] * factor)

    @device
    def put_wide(O, base, of, head, first, rows, column0, columns, factor):
        """Write factor * O as float32, from a token and column on."""
        for t in range(2 * BLOCKS):
            row, column = t // 2 * 16, column0 + t % 2 * 16
            there = base + place(of, head, 0, first + row, column) * 4
            for i in range(8):
                O[8 * t + i] *= factor
            put_block(there, of.row, of.column, 2, rows - row, columns - column, *eight(O, t))

    return Chunks(
        is_first, copier, piece_of, put_weights, gate_of, make_own_pairs, read, update, leave,
        get_state, put_state, put_rows, put_wide, LISTS,
    )  # fmt: skip
