"""One token of a program on a GPU: its passes in order, a block of threads a head.

    S <- g S + k v'    m <- g m + k w    out = factor * q' S    den = factor * q' m

A pass reads and writes its state once, in place or beside: warp w has every eighth row, a lane four
columns, the loads of 16 rows under way at once. q' S is summed over a warp's rows in registers,
then over warps in shared memory, in order. Vectors (q, k, v, y ...) lie there too, by their
numbers. A strict pass reads the state before its update; one whose state an earlier pass has
updated reads it alone. The kernel is of one program: its passes are constants.

Bytes a head of hla2, D = V = 128: 2 x 2 x 64 KB. 1024 heads: 268 MB, 0.094 ms at 2.85 TB/s; one
H100 takes 0.1055 in place (89%), 0.1059 beside; by eight rows at a time 0.1049 and 0.1192.

Arguments are those of `cupy.step.Steps`, of which the words of a pass give its sizes alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numba import cuda

from ..cupy import step
from ..cupy.step import MATRICES, NAMES, TURNS, VECTORS
from .causal import Head
from .instructions import Constants, Text

WARPS, ROWS = 8, 16
ROOM = 4 * ROWS  # elements of a lane
THREADS = 32 * WARPS
GATE, O, OLD = 3, 4, 5  # operands by number, as step.cuh has them
NEW = OLD + MATRICES
OLD_VECTOR = NEW + MATRICES
NEW_VECTOR = OLD_VECTOR + VECTORS
OPERANDS = NEW_VECTOR + VECTORS
FIELDS = 6  # strides of three axes of heads, of rows and columns; the type of an element
WORDS = 7  # of a pass
REGISTERS = 128  # of a thread, so that a multiprocessor has two blocks


class Sizes(NamedTuple):
    """What there is to do."""

    turns: int
    keys: int
    values: int
    heads: int
    blocks: int
    heads1: int
    heads2: int
    log: int
    gated: int
    divides: int


ARGUMENTS = (OPERANDS, FIELDS * OPERANDS, WORDS * TURNS, Sizes, float, float)


def make(c: Constants, t: Any) -> Callable[..., None]:
    """Return the kernel of a program with such constants, which calls the instructions ``t``."""
    f32, f64, i32, i64, device = t.f32, t.f64, t.i32, t.i64, t.device
    get, put, load4, store4 = t.get, t.put, t.load4, t.store4
    number, put_number, across = t.number, t.put_number, t.across
    WIDTH, WHOLE, PROGRAM = c["WIDTH"], c["WHOLE"], c["PROGRAM"]
    PARTS = NAMES * WIDTH  # of sums, in shared memory: of each warp; vectors are before them
    DENS = PARTS + WARPS * WIDTH  # denominators of each vector
    WEIGHTS = DENS + NAMES  # of each warp

    @device
    def width(type):
        """Return the bytes of an element of a type by its number."""
        return 2 if type < 2 else 4 if type == 2 else 8

    def operand(i):
        """Return what tells where an operand of a head begins, and whether that head writes it."""
        first = FIELDS * i

        @device
        def base(at, of, head):
            n = head.index0 * of[first] + head.index1 * of[first + 1] + head.index2 * of[first + 2]
            return at[i] + n * width(of[first + 5])

        @device
        def is_first(of, head):
            """Whether it is the first of the heads that share the array."""
            one = of[first] != 0 or head.index0 == 0
            two = of[first + 1] != 0 or head.index1 == 0
            return one and two and (of[first + 2] != 0 or head.index2 == 0)

        return base, is_first, first + 3, first + 4, first + 5

    def reader(i):
        """Return what puts q, k or v into shared memory."""
        base, _, _, column, type = operand(i)

        @device
        def read(at, of, head, count, factor, thread):
            p = base(at, of, head)
            for n in range(thread, count, THREADS):
                put_number(i * WIDTH + n, get(p, n * of[column], of[type]) * factor)

        return read

    @device
    def advanced(g, x, key, value):
        return g * x + key * value

    @device
    def row_of(S, row, c, row_step, column_step, columns):
        """Return four elements of a row, zeros behind its last."""
        here = S + (row * row_step + c * column_step) * 4
        if WHOLE:
            return load4(here)
        return (
            get(here, 0, 2),
            get(here, column_step, 2) if c + 1 < columns else f32(0),
            get(here, 2 * column_step, 2) if c + 2 < columns else f32(0),
            get(here, 3 * column_step, 2) if c + 3 < columns else f32(0),
        )

    @device
    def put_row(S, row, c, row_step, column_step, columns, y):
        here = S + (row * row_step + c * column_step) * 4
        if WHOLE:
            store4(here, y[0], y[1], y[2], y[3])
        else:
            for i in range(4):
                if c + i < columns:
                    put(here, i * column_step, 2, f64(y[i]))

    def turn(n, q, k, v, out, matrix, vector, power, strict, first, weighs, factor):
        """Return what does a pass: its operands by their numbers, its kind as constants."""
        old = OLD + matrix if first or strict else NEW + matrix
        old_base, _, old_row, old_column, _ = operand(old)
        new_base, owns, new_row, new_column, _ = operand(NEW + matrix)
        was = max(vector, 0) + (OLD_VECTOR if first or strict else NEW_VECTOR)
        was_base, _, was_row, _, _ = operand(was)
        m_base, m_owns, m_row, _, _ = operand(NEW_VECTOR + max(vector, 0))
        size, q, k, v, out_at = WORDS * n + 5, q * WIDTH, k * WIDTH, v * WIDTH, out * WIDTH
        den_v, den = DENS + v // WIDTH, DENS + out

        @device
        def matrix_of(at, of, head, rows, columns, g, warp, lane):
            """Advance a warp's rows of the matrix, and leave the sums of what is read of them."""
            S, made = old_base(at, of, head), new_base(at, of, head)
            there, writes = at[old] != 0, first and owns(of, head)
            x, mate = cuda.local.array(ROOM, f32), cuda.local.array(4, f32)
            total, y = cuda.local.array(4, f32), cuda.local.array(4, f32)
            for c0 in range(0, columns, 128):
                c = c0 + 4 * lane
                for i in range(4):
                    total[i] = f32(0)
                    mate[i] = number(v + c + i) if c + i < columns else f32(0)
                for r0 in range(warp, rows, WARPS * ROWS):
                    for r in range(ROWS):
                        row = r0 + r * WARPS
                        four = (f32(0), f32(0), f32(0), f32(0))
                        if there and row < rows and c < columns:
                            four = row_of(S, row, c, of[old_row], of[old_column], columns)
                        x[4 * r], x[4 * r + 1] = four[0], four[1]
                        x[4 * r + 2], x[4 * r + 3] = four[2], four[3]
                    for r in range(ROWS):
                        row = r0 + r * WARPS
                        if row < rows and c < columns:
                            key, query = number(k + row), number(q + row)
                            for i in range(4):
                                before = x[4 * r + i]
                                y[i] = advanced(g, before, key, mate[i]) if first else before
                                total[i] += query * (before if strict else y[i])
                            if writes:
                                put_row(made, row, c, of[new_row], of[new_column], columns, y)
                for i in range(4):
                    if c + i < columns:
                        put_number(PARTS + warp * WIDTH + c + i, total[i])

        @device
        def vector_of(at, of, head, rows, g, thread):
            """Advance the denominator's part of the state; return this thread's sum of it."""
            m, made = was_base(at, of, head), m_base(at, of, head)
            there, writes = at[was] != 0, first and m_owns(of, head)
            w, weight = number(den_v), f32(0)
            for d in range(thread, rows, THREADS):
                x = get(m, d * of[was_row], 2) if there else f32(0)
                y = advanced(g, x, number(k + d), w) if first else x
                weight += number(q + d) * (x if strict else y)
                if writes:
                    put(made, d * of[m_row], 2, f64(y))
            return weight

        @device
        def take(at, of, words, head, log_g, thread):
            rows, columns = i32(words[size] & 0xFFFFFFFF), i32(words[size] >> 32)
            warp, lane = thread // 32, thread % 32
            g = f32(math.exp(log_g * power)) if power else f32(1)
            matrix_of(at, of, head, rows, columns, g, warp, lane)
            weight = f32(0)
            if vector >= 0 and (first or weighs):
                weight = vector_of(at, of, head, rows, g, thread)
            if weighs:
                for step in (16, 8, 4, 2, 1):
                    weight += across(weight, step)
                if lane == 0:
                    put_number(WEIGHTS + warp, weight)
            cuda.syncthreads()
            for c in range(thread, columns, THREADS):
                found = f32(0)
                for i in range(WARPS):
                    found += number(PARTS + i * WIDTH + c)
                put_number(out_at + c, number(out_at + c) + f32(factor) * found)
            if weighs and thread == 0:
                found = f32(0)
                for i in range(WARPS):
                    found += number(WEIGHTS + i)
                put_number(den, number(den) + f32(factor) * found)
            cuda.syncthreads()

        return take

    def behind(before, after):
        """Return what does one pass after others."""

        @device
        def both(at, of, words, head, log_g, thread):
            before(at, of, words, head, log_g, thread)
            after(at, of, words, head, log_g, thread)

        return both

    passes = functools.reduce(behind, [turn(n, *one) for n, one in enumerate(PROGRAM)])
    read_q, read_k, read_v = reader(0), reader(1), reader(2)
    gate_base, _, _, _, gate_type = operand(GATE)
    o_base, _, _, o_column, o_type = operand(O)

    def token(at, of, words, size, scale, eps):
        thread, index = i32(cuda.threadIdx.x), i64(cuda.blockIdx.x)
        index, head2 = index // size.heads2, index % size.heads2
        head = Head(index // size.heads1, index % size.heads1, head2)
        for i in range(thread, NAMES * WIDTH, THREADS):
            put_number(i, f32(0))
        if thread < NAMES:
            put_number(DENS + thread, f32(1) if thread == 2 else f32(0))
        cuda.syncthreads()
        read_q(at, of, head, size.keys, f32(scale), thread)
        read_k(at, of, head, size.keys, f32(1), thread)
        read_v(at, of, head, size.values, f32(1), thread)
        log_g = f64(0)
        if size.gated:
            log_g = f64(get(gate_base(at, of, head), 0, of[gate_type]))
            if not size.log:
                log_g = math.log(log_g)
        cuda.syncthreads()
        passes(at, of, words, head, log_g, thread)
        by, o = f32(1), o_base(at, of, head)
        if size.divides:
            by = number(DENS + 3) + f32(eps)
        for i in range(thread, size.values, THREADS):
            put(o, i * of[o_column], of[o_type], f64(number(3 * WIDTH + i) / by))

    return token


TEXT = Text(make, ARGUMENTS, registers=lambda constants: REGISTERS)


class Steps(step.Steps):
    """Tokens on one library's arrays, by this kernel alone."""

    bulk = packs = False

    def constants(self, width: int, able: bool, packed: bool, program: step.Program) -> step.Chosen:
        """Return what gives the constants of the kernel of a program."""
        found = super().constants(width, able, packed, program)

        def chosen(at: Sequence[int]) -> tuple[dict[str, Any], int]:
            fixed, shared = found(at)
            return {"WIDTH": fixed["WIDTH"], "WHOLE": fixed["WHOLE"], "PROGRAM": program}, shared

        return chosen
