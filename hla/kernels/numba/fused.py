"""The causal forward on a GPU, all states of a head in one block of threads.

    hla2: y = pass(q, k, k)   o = pass^2(q, y, v)
    ahla: u = pass(q, k, v)   o = pass(q, k, u)
    hla3: y = pass(q, k, k)   u = pass(q, k, v)   o = pass^3(q, y, u)

Warps of the first part make y (of ahla u), those of the middle one hla3's u, those of the last part
o, one chunk later: y and u pass between them in shared memory. Of hla3 a block has 64 values, and S
anew. What a part does of a chunk is in `chunks`. A part's P is made by its warps before they read
their states, and read after a barrier of that part; ahla's serves both, hla3's first that of y and
u. There is one barrier of all threads a chunk. Chunks are copied ``STAGES - 2`` ahead; rows of no
whole 16 bytes element by element.

Bytes a token and head, D = V = 128: q, k, v and o once, 1024 (y too: 1280): 0.179 ms for B = 8,
T = 4096, H = 16 at 3.0 TB/s. Of a chunk of 32 a warp does about 152 products of 16 x 8 x 16. One
H100 takes 0.282 ms for hla2 (CuPy's kernel: 0.266), 0.246 for ahla, 0.598 for hla3; hla2 took 0.419
while a loop had 1169 instructions, 0.310 with 778.

Constants are those of `cupy.fused.settings`, arguments those of `cupy.hopper.sweeps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..cupy.launch import PAD
from .causal import Operand, shared_functions
from .chunks import functions, macros
from .instructions import Constants, Text


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


def make(c: Constants, t: Any) -> Callable[..., None]:
    """Return the kernel with such constants, which calls the instructions ``t``."""
    f32, f64, i32, i64 = t.f32, t.f64, t.i32, t.i64
    copies_commit, copies_wait, threads_sync = t.copies_commit, t.copies_wait, t.threads_sync

    AHLA, HLA3, OPERATOR = c["OPERATOR"] == 1, c["OPERATOR"] == 3, c["OPERATOR"]
    GATE, READ, WIDE, KEEP, KEEP_U = c["GATE"], c["READ"], c["WIDE"], c["KEEP"], c["KEEP_U"]
    B, W, STAGES = c["B"], c["W"], c["STAGES"]
    BV, KEYS, BLOCKS = 64 if HLA3 else B, B // 16, W // 16
    FIRST, MIDDLE, LAST = B // 32, 2 if HLA3 else 0, BV // 32
    WARPS, WEIGHER = FIRST + MIDDLE + LAST, FIRST - 1
    THREADS = 32 * WARPS
    TILE, TILE_P = W * (B + PAD), W * (W + PAD)

    # Shared memory, in elements; weights in floats
    STAGE, MADE = 3 * TILE, 3 * TILE * STAGES
    US = MADE + 2 * TILE
    OUT = US + (2 * TILE if HLA3 else 0)
    TILES = OUT + TILE
    WEIGHTS = (TILES + (2 if AHLA else 4) * TILE_P) // 2
    STATE, SUMS = 16 * KEYS, 16 * BLOCKS

    _, _, place, _, address, located = shared_functions(t)
    shared = functions(c, t, THREADS)
    is_first, piece_of, put_weights, gate_of = (
        shared.is_first, shared.piece_of, shared.put_weights, shared.gate_of,
    )  # fmt: skip
    make_own_pairs, read, update, leave, get_state, put_state, put_rows, put_wide = (
        shared.make_own_pairs, shared.read, shared.update, shared.leave, shared.get_state,
        shared.put_state, shared.put_rows, shared.put_wide,
    )  # fmt: skip
    copy_keys, copy_values, LISTS = shared.copier(B), shared.copier(BV), shared.lists

    def forward(
        at, q, k, v, y, u, o, gate, start1, start2, start3, end1, end2, end3, factor1, factor2,
        factor3, size,
    ):  # fmt: skip
        S, O = cuda.local.array(STATE, f32), cuda.local.array(SUMS, f32)
        thread = i32(cuda.threadIdx.x)
        warp, lane = thread // 32, thread % 32
        first, late = warp < FIRST, 1 if warp >= FIRST + MIDDLE else 0
        rank = warp - (0 if first else FIRST + MIDDLE if late else FIRST)
        order = 5 - rank if HLA3 and rank > 1 else rank  # a scheduler has as many pairs
        power = 1 if AHLA or not late else OPERATOR

        index, tile = i64(cuda.blockIdx.x), i64(0)  # of a head, a segment and a tile of values
        if HLA3:
            tiles = (size.values + 63) // 64
            tile, index = index % tiles, index // tiles
        head, segment, before, tokens = located(index, size)
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
        get_state(S, p_start, start, head, segment, row0, rows, D)

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
            p_gate = address(at.gate, gate, head, 0, before if GATE == 2 else i64(0), 0)
        a = f64(0)  # gate of the chunk whose weights are next
        if GATE and warp == WEIGHER:
            a = gate_of(p_gate, gate, 0, lane, tokens)
            put_weights(WEIGHTS, a, lane)
            a = gate_of(p_gate, gate, W, lane, tokens)
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
                    make_own_pairs(stage, keys, P, lists, order, FIRST, power, lane)
                if READ or not late:
                    read(S, O, stage, lists, power, lane)
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
                    a = gate_of(p_gate, gate, (c + 2) * W, lane, tokens)
                if not late:
                    threads_sync(1, 32 * (FIRST + MIDDLE))
                elif READ and not AHLA:
                    threads_sync(2, 32 * LAST)
                reads = True if READ else not late
                update(S, O, reads, keys, values + own, P, lists, power, lane)
                if WIDE and late and READ:
                    n = T - chunk * W
                    put_wide(O, at.o, o, head, before + chunk * W, n, row0, V, factor)
                elif READ or not late:
                    put_rows(O, made + own, factor, lane)
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
            put_state(S, p_end, end, head, segment, row0, rows, D)

    return forward


TEXT = Text(make, ARGUMENTS, macros)
