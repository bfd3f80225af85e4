"""The causal forward on a GPU, all states of a head in one block of threads.

    hla2: y = pass(q, k, k)   o = pass^2(q, y, v)
    ahla: u = pass(q, k, v)   o = pass(q, k, u)
    hla3: y = pass(q, k, k)   u = pass(q, k, v)   o = pass^3(q, y, u)

The states are held transposed, S' (V, D) in float32 registers: a warp has 32 rows of one. Warps of
the first part make y (of ahla u), those of the middle one hla3's u, those of the last part o, one
chunk later: y and u pass between them in shared memory. Of hla3 a block has 64 values, and S anew.
Of a chunk of W tokens, of keys K and values X of each pass, in blocks of 16 x 16,

    P = lower(Q K')  [W, W]    O = Q S + P X  [W, V]    S' = S' + X' K  [V, D]

Every block that is read from shared memory serves two products, of a warp's two rows of blocks. A
part's P is made by its warps before they read their states, and read after a barrier of that part;
ahla's serves both, hla3's first that of y and u. There is one barrier of all threads a chunk.
Chunks are copied ``STAGES - 2`` ahead; rows of no whole 16 bytes element by element.

Weights of a gate, in base 2, lie beside a chunk as lists of power 1, which a pass raises: until a
token, its power of two, that of what comes after it, and that of the whole chunk.

Bytes a token and head, D = V = 128: q, k, v and o once, 1024 (y too: 1280): 0.179 ms for B = 8,
T = 4096, H = 16 at 3.0 TB/s. Of a chunk of 32 a warp does about 152 products of 16 x 8 x 16. One
H100 takes 0.282 ms for hla2 (CuPy's kernel: 0.266), 0.246 for ahla, 0.598 for hla3; hla2 took 0.419
while a loop had 1169 instructions, 0.310 with 778.

Constants are those of `cupy.fused.settings`, arguments those of `cupy.hopper.sweeps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..cupy.launch import PAD
from .causal import Head, Operand, shared_functions
from .instructions import Constants, Text

LOG2E, LEAST, RESET = 1.4426950408889634, 1e-30, -160.0


class Addresses(NamedTuple):
    """Where the operands are; 0 of one that is not."""

    q: int
    k: int
    v: int
    y: int
    u: int
    o: int
    gate: int
    start1: int
    start2: int
    start3: int
    end1: int
    end2: int
    end3: int


class Sizes(NamedTuple):
    """What there is to do."""

    tokens: int
    segment: int
    keys: int
    values: int
    heads1: int
    heads2: int


ARGUMENTS = (Addresses, *[Operand] * len(Addresses._fields), *[float] * 3, Sizes)


def macros(c: Constants) -> Constants:
    """Return the macros of the instructions for the constants of a kernel."""
    return {"NARROW": 1, "TYPE_O": 0, "PITCH_1": c["B"] + PAD, "PITCH_2": c["W"] + PAD}


def make(c: Constants, t: Any) -> Callable[..., None]:
    """Return the kernel with such constants, which calls the instructions ``t``."""
    f32, f64, i32, i64, device = t.f32, t.f64, t.i32, t.i64, t.device
    load, load_turned, second, second_turned = t.load, t.load_turned, t.second, t.second_turned
    multiply, block_of, weighed, put_pair, value = (
        t.multiply, t.block_of, t.weighed, t.put_pair, t.value,
    )  # fmt: skip
    copy16, put_value, leave16, get, put = t.copy16, t.put_value, t.leave16, t.get, t.put
    copies_commit, copies_wait, syncwarp = t.copies_commit, t.copies_wait, t.syncwarp
    up, of_lane, get_block, put_block = t.up, t.of_lane, t.get_block, t.put_block
    power_of_2, threads_sync = t.power_of_2, t.threads_sync
    number, put_number = t.number, t.put_number

    AHLA, HLA3, OPERATOR = c["OPERATOR"] == 1, c["OPERATOR"] == 3, c["OPERATOR"]
    GATE, READ, WIDE, KEEP, KEEP_U = c["GATE"], c["READ"], c["WIDE"], c["KEEP"], c["KEEP_U"]
    B, W, STAGES, FAST, WHOLE = c["B"], c["W"], c["STAGES"], c["FAST"], c["WHOLE"]
    BV, KEYS, BLOCKS = 64 if HLA3 else B, B // 16, W // 16
    FIRST, MIDDLE, LAST = B // 32, 2 if HLA3 else 0, BV // 32
    WARPS, WEIGHER = FIRST + MIDDLE + LAST, FIRST - 1
    THREADS = 32 * WARPS
    PITCH, PITCH_P = B + PAD, W + PAD
    TILE, TILE_P = W * PITCH, W * PITCH_P
    TRIANGLE = BLOCKS * (BLOCKS + 1) // 2

    # Shared memory, in elements; weights in floats
    STAGE, MADE = 3 * TILE, 3 * TILE * STAGES
    US = MADE + 2 * TILE
    OUT = US + (2 * TILE if HLA3 else 0)
    TILES = OUT + TILE
    WEIGHTS = (TILES + (2 if AHLA else 4) * TILE_P) // 2
    BEFORE, AFTER, TOTAL, LISTS = W, 2 * W, 3 * W, 3 * W + 4
    STATE, SUMS = 16 * KEYS, 16 * BLOCKS

    eight, put_eight, place = shared_functions(device)

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

    copy_keys, copy_values = copier(B), copier(BV)

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
    def gate_of(base, of, chunk, lane, tokens):
        """Return the gate of a lane's token in a chunk; of a decay its logarithm."""
        t, a = chunk * W + lane, f64(0)
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
                        x = x * power_of_2(until * f32(power))
                    A[i] = f32(0) if t == s and row < column else x
                for e in range(4):
                    at = tile + (16 * t + g + e % 2 * 8) * PITCH_P + 16 * s + j + e // 2 * 8
                    put_pair(at, A[8 * n + 2 * e], A[8 * n + 2 * e + 1])

        return make_pairs

    make_one, make_row = pair_maker(1), pair_maker(BLOCKS)

    @device
    def make_own_pairs(q, k, tile, lists, rank, warps, power, lane):
        """Leave this warp's share of P, of a part of so many warps."""
        if warps >= TRIANGLE:
            pair = 5 - rank if HLA3 and rank > 1 else rank  # a scheduler has as many
            if pair < TRIANGLE:
                t, s = 1 if pair > 0 else 0, 1 if pair > 1 else 0
                make_one(q, k, tile, lists, t, s, power, lane)
        elif rank == 0:
            make_row(q, k, tile, lists, BLOCKS - 1, 0, power, lane)
        elif BLOCKS > 1 and rank == 1:
            make_one(q, k, tile, lists, 0, 0, power, lane)

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

    def forward(
        at, q, k, v, y, u, o, gate, start1, start2, start3, end1, end2, end3, factor1, factor2,
        factor3, size,
    ):  # fmt: skip
        S, O = cuda.local.array(STATE, f32), cuda.local.array(SUMS, f32)
        thread = i32(cuda.threadIdx.x)
        warp, lane = thread // 32, thread % 32
        g, j = lane // 4, 2 * (lane % 4)
        first, late = warp < FIRST, 1 if warp >= FIRST + MIDDLE else 0
        rank = warp - (0 if first else FIRST + MIDDLE if late else FIRST)
        power = 1 if AHLA or not late else OPERATOR

        index, tile = i64(cuda.blockIdx.x), i64(0)  # of a head, a segment and a tile of values
        if HLA3:
            tiles = (size.values + 63) // 64
            tile, index = index % tiles, index // tiles
        segment, before, tokens = i64(0), i64(0), size.tokens
        if size.segment:
            segments = (size.tokens + size.segment - 1) // size.segment
            segment, index = index % segments, index // segments
            before = segment * size.segment
            tokens = min(size.segment, size.tokens - before)
        index, head2 = index // size.heads2, index % size.heads2
        head = Head(index // size.heads1, index % size.heads1, head2)
        D, V, v0, T = i32(size.keys), i32(size.values), i32(64 * tile), i32(tokens)
        chunks = (T + W - 1) // W
        rows = D if first and not AHLA else V
        row0 = (0 if first else v0) + rank * 32  # of S'

        # Of this warp's pass: where its state begins, and what it makes
        p_start, start = at.start1, start1
        p_made, of_made, factor = at.y, y, f32(factor1)
        stores = KEEP and is_first(y, head) and tile == 0
        if HLA3 and not first and not late:
            p_start, start = at.start2, start2
            p_made, of_made, factor = at.u, u, f32(factor2)
            stores = KEEP_U and is_first(u, head)
        if late:
            p_start, start = (at.start3, start3) if HLA3 else (at.start2, start2)
            p_made, of_made, factor = at.o, o, f32(factor3 if HLA3 else factor2)
            stores = READ and not WIDE
        for i in range(STATE):
            S[i] = f32(0)
        if p_start:
            for n in range(2 * KEYS):
                row, column = row0 + 16 * (n // KEYS), 16 * (n % KEYS)
                there = p_start + place(start, head, segment, row, column) * 4
                x = get_block(there, start.row, start.column, 2, rows - row, D - column)
                put_eight(S, n, x)

        p_q, left_q = piece_of(at.q, q, head, before, D, 0, thread, B // 8)
        p_k, left_k = piece_of(at.k, k, head, before, D, 0, thread, B // 8)
        p_v, left_v = piece_of(at.v, v, head, before, V, v0, thread, BV // 8)
        for i in range(STAGES - 2):
            if i < chunks:
                to, n = i * STAGE, T - i * W
                copy_keys(to, p_q, q.row, q.column, n, left_q, thread)
                copy_keys(to + TILE, p_k, k.row, k.column, n, left_k, thread)
                copy_values(to + 2 * TILE, p_v, v.row, v.column, n, left_v, thread)
            p_q, p_k, p_v = p_q + 2 * W * q.row, p_k + 2 * W * k.row, p_v + 2 * W * v.row
            copies_commit()
        left = rows - row0 - lane % 4 * 8
        p_made += place(of_made, head, 0, before + lane // 4, row0 + lane % 4 * 8) * 2
        p_gate = i64(0)
        if GATE:
            p_gate = place(gate, head, 0, before if GATE == 2 else i64(0), 0)
            p_gate = at.gate + p_gate * (2 if gate.type < 2 else 4 if gate.type == 2 else 8)
        a = f64(0)  # gate of the chunk whose weights are next
        if GATE and warp == WEIGHER:
            a = gate_of(p_gate, gate, 0, lane, tokens)
            put_weights(WEIGHTS, a, lane)
            a = gate_of(p_gate, gate, 1, lane, tokens)
        own, slot = rank * 32, i32(0)  # its columns, and the place of its next chunk

        for c in range(chunks + 1):
            copies_wait(STAGES - 3)
            cuda.syncthreads()  # this chunk is there, and what was made of the last one
            chunk = c - late
            works = chunk >= 0 and chunk < chunks
            parity, stage = chunk & 1, slot * STAGE
            lists = WEIGHTS + chunk % 3 * LISTS
            made_y = MADE + parity * TILE
            made_u = made_y if AHLA else US + parity * TILE
            keys = made_y if late and not AHLA else stage + TILE
            values = stage + (2 * TILE if not first or AHLA else TILE)
            if late and (AHLA or HLA3):
                values = made_u
            made = made_y if first else OUT if late else made_u
            P = TILES + (parity + (2 if late and not AHLA else 0)) * TILE_P
            if works:
                slot = slot + 1 if slot + 1 < STAGES else 0
                # The first part makes its P first, the last reads its state first: one has latency
                # to hide when the other has work
                if first:
                    make_own_pairs(stage, keys, P, lists, rank, FIRST, power, lane)
                if READ or not late:
                    for i in range(SUMS):
                        O[i] = f32(0)
                    for d in range(KEYS):
                        s0, s1 = block_of(*eight(S, d)), block_of(*eight(S, KEYS + d))
                        for t in range(BLOCKS):
                            b = load(stage + 16 * t * PITCH + 16 * d, PITCH)
                            put_eight(O, 2 * t, multiply(*(eight(O, 2 * t) + b + s0)))
                            put_eight(O, 2 * t + 1, multiply(*(eight(O, 2 * t + 1) + b + s1)))
                    if GATE:
                        for t in range(2 * BLOCKS):
                            for r in range(2):
                                w = number(lists + BEFORE + t // 2 * 16 + g + 8 * r)
                                w = raised(w, power)
                                for i in range(4):
                                    O[8 * t + i // 2 * 4 + 2 * r + i % 2] *= w
                    if late and not AHLA:
                        make_own_pairs(stage, keys, P, lists, rank, LAST, power, lane)
            ahead, to = c + (STAGES - 2), slot + (STAGES - 3) + late
            to = (to if to < STAGES else to - STAGES) * STAGE
            if ahead < chunks:
                n = T - ahead * W
                copy_keys(to, p_q, q.row, q.column, n, left_q, thread)
                copy_keys(to + TILE, p_k, k.row, k.column, n, left_k, thread)
                copy_values(to + 2 * TILE, p_v, v.row, v.column, n, left_v, thread)
            p_q, p_k, p_v = p_q + 2 * W * q.row, p_k + 2 * W * k.row, p_v + 2 * W * v.row
            copies_commit()
            if works:
                if GATE and warp == WEIGHER and c + 1 < chunks:
                    # of a decay all chunks but the last have the same
                    if GATE == 2 or c < 2 or (c + 2) * W > T:
                        put_weights(WEIGHTS + (c + 1) % 3 * LISTS, a, lane)
                    a = gate_of(p_gate, gate, c + 2, lane, tokens)
                if not late:
                    threads_sync(1, 32 * (FIRST + MIDDLE))
                elif READ and not AHLA:
                    threads_sync(2, 32 * LAST)
                if GATE:
                    total = raised(number(lists + TOTAL), power)
                    for i in range(STATE):
                        S[i] *= total
                for s in range(BLOCKS):
                    b0 = load_turned(values + 16 * s * PITCH + own, PITCH)
                    b1 = load_turned(values + 16 * s * PITCH + own + 16, PITCH)
                    if READ or not late:
                        for t in range(BLOCKS):
                            if t >= s:
                                x = load(P + 16 * t * PITCH_P + 16 * s, PITCH_P)
                                put_eight(O, 2 * t, multiply(*(eight(O, 2 * t) + x + b0)))
                                more = multiply(*(eight(O, 2 * t + 1) + x + b1))
                                put_eight(O, 2 * t + 1, more)
                    if GATE:
                        w = lists + AFTER + 16 * s + j
                        w0, w1 = raised(number(w), power), raised(number(w + 1), power)
                        w8, w9 = raised(number(w + 8), power), raised(number(w + 9), power)
                        b0, b1 = weighed(w0, w1, w8, w9, *b0), weighed(w0, w1, w8, w9, *b1)
                    for d in range(KEYS):
                        x = second_turned(keys + 16 * s * PITCH + 16 * d, PITCH)
                        put_eight(S, d, multiply(*(eight(S, d) + b0 + x)))
                        put_eight(S, KEYS + d, multiply(*(eight(S, KEYS + d) + b1 + x)))
                if WIDE and late and READ:
                    for t in range(2 * BLOCKS):
                        row, column = chunk * W + t // 2 * 16, row0 + t % 2 * 16
                        there = at.o + place(o, head, 0, before + row, column) * 4
                        for i in range(8):
                            O[8 * t + i] *= factor
                        put_block(there, o.row, o.column, 2, T - row, V - column, *eight(O, t))
                elif READ or not late:
                    for t in range(2 * BLOCKS):
                        for i in range(4):
                            row = t // 2 * 16 + g + i % 2 * 8
                            to = made + row * PITCH + own + t % 2 * 16 + j + i // 2 * 8
                            put_pair(to, O[8 * t + 2 * i] * factor, O[8 * t + 2 * i + 1] * factor)
                    if stores:
                        to = p_made + 2 * chunk * W * of_made.row
                        leave(to, of_made, made + own, T - chunk * W, left, lane)
        p_end, end = at.end1, end1
        if HLA3 and not first and not late:
            p_end, end = at.end2, end2
        if late:
            p_end, end = (at.end3, end3) if HLA3 else (at.end2, end2)
        # Of the heads that share a state the first writes it, and of a head's blocks the first
        if p_end and is_first(end, head) and (tile == 0 or not first):
            for n in range(2 * KEYS):
                row, column = row0 + 16 * (n // KEYS), 16 * (n % KEYS)
                there = p_end + place(end, head, segment, row, column) * 4
                put_block(there, end.row, end.column, 2, rows - row, D - column, *eight(S, n))

    return forward


TEXT = Text(make, ARGUMENTS, macros)
