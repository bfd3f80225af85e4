"""Two causal passes of an adjoint on a GPU, both states of a head in one block of threads.

    hla2: dy = pass^2(v, do, q), dv = pass^2(y, q, do)
          dk = pass(k, dy, q) + pass(k, q, dy)    dq = pass^2(do, v, y) + pass(dy, k, k)
    ahla: dk = pass(u, do, q), du = pass(k, q, do)
          dk = dk + pass(v, du, q), dv = pass(k, q, du)    dq = pass(do, u, k) + pass(du, v, k)
    hla3: dy = pass^3(u, do, q), du = pass^3(y, q, do)
          dk = pass(v, du, q), dv = pass(k, q, du)    dk = dk + pass(k, dy, q) + pass(k, q, dy)
          dq = pass(du, v, k) + pass(dy, k, k)

all but dq from the last token on. Each line of one or two results is a launch of this kernel. Half
of the warps do the one pass, half the other, each what `chunks` has: so a state that is read both
ways round, as R of dy and dv, is held both ways round, and no warp needs another one's state. Of a
sum the second half does a chunk later what the first has left of it, in float32, in shared memory.
What a result is added to is read like an operand.

With DOTS it leaves what a gate's gradient is made of (gate.py): by token q . (F do) and q . (S dy)
of what dq reads of each state; of the second of two reverse passes the same, and sums over the
chunk's pairs by query and by key, whose weights are those of its P, their products those of the
first pass's, not weighed. Of each period's start the reverse pass keeps its state in bfloat16, and
that of dq leaves the product of both.

Bytes a token and head, D = V = 128, of hla2: q, v, do, y, dy and dv 1536, q, k, dy and dk 1024, k,
v, y, do, dy and dq 1536: 0.27, 0.18 and 0.27 ms for B = 8, T = 4096, H = 16 at 3.0 TB/s. An H100
took 0.366 (74%), 0.284 (63%) and 0.339 (80%), of ahla 0.415, 0.433 and 0.340, of hla3 0.361, 0.409,
0.313 and 0.350. A step with gradients took 1.30 ms, of ahla 1.46, of hla3 2.71; by passes 1.82,
2.31 and 3.58. With a log gate and its gradient the three of hla2 took 1.070, 0.792 and 0.922, of
ahla 1.067, 1.129 and 0.914, and a step 3.32 and 3.61, by passes 4.83 and 5.48. Of a chunk of 32
tokens a warp does 152 products of 16 x 8 x 16 in each, as in the forward, which takes 0.29; its
loop has 774 instructions, those of dy and dv 748, of dq 877.

Constants are those of `adjoint.kernels`, arguments those of `cupy.hopper.sweeps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..cupy.launch import PAD
from .causal import Operand, shared_functions
from .chunks import functions, macros
from .fused import Sizes
from .instructions import Constants, Text


class Addresses(NamedTuple):
    """Where the operands are; 0 of one that is not."""

    x0: int
    x1: int
    x2: int
    x3: int
    x4: int
    x5: int
    o1: int
    o2: int
    gate: int
    start1: int
    start2: int
    end1: int
    end2: int
    dots1: int
    dots2: int
    kept1: int
    kept2: int
    met1: int
    met2: int


FACTORS = 3  # of results, of first states, of last ones
ARGUMENTS = (Addresses, *[Operand] * len(Addresses._fields), *[float] * FACTORS, Sizes)


def make(c: Constants, t: Any) -> Callable[..., None]:
    """Return the kernel with such constants, which calls the instructions ``t``."""
    f32, f64, i32, i64 = t.f32, t.f64, t.i32, t.i64
    copies_commit, copies_wait, threads_sync = t.copies_commit, t.copies_wait, t.threads_sync
    numbers, put_numbers, value, across = t.numbers, t.put_numbers, t.value, t.across
    number, put_number, load, second, multiply = (
        t.number, t.put_number, t.load, t.second, t.multiply,
    )  # fmt: skip
    keep_block, meet_block, put = t.keep_block, t.meet_block, t.put

    # Of each pass the tiles of its queries, keys and values, and of what its result is added to
    (Q1, K1, V1, OLD1), (Q2, K2, V2, OLD2) = c["FIRST"], c["SECOND"]
    OF_VALUES, (POWER1, POWER2) = c["OF_VALUES"], c["POWERS"]  # which have columns of values
    DOTS, X, EVERY = c["DOTS"], c["X"], c["EVERY"]
    SUM, REVERSE, GATE, (WIDE1, WIDE2) = c["SUM"], c["REVERSE"], c["GATE"], c["WIDE"]
    B, W, STAGES = c["B"], c["W"], c["STAGES"]
    COUNT, WARPS = len(OF_VALUES), B // 32  # of a pass
    AHEAD, THREADS = STAGES - 1 - SUM, 64 * WARPS
    PITCH, PITCH_P = B + PAD, W + PAD
    TILE, TILE_P = W * PITCH, W * PITCH_P
    STATE, SUMS, BLOCKS = B, W, W // 16  # numbers of a thread, and rows of blocks

    # Shared memory, in elements; weights and sums in floats
    OUT = STAGES * COUNT * TILE
    TILES = OUT + (TILE if SUM else 2 * TILE)
    WEIGHTS = (TILES + 2 * TILE_P) // 2

    eight, put_eight, place, _, address, located = shared_functions(t)
    shared = functions(c, t, THREADS, reverse=bool(REVERSE))
    is_first, piece_of, put_weights, gate_of = (
        shared.is_first, shared.piece_of, shared.put_weights, shared.gate_of,
    )  # fmt: skip
    make_own_pairs, read, update, leave, get_state, put_state, put_rows, put_wide = (
        shared.make_own_pairs, shared.read, shared.update, shared.leave, shared.get_state,
        shared.put_state, shared.put_rows, shared.put_wide,
    )  # fmt: skip
    copy, LISTS = shared.copier(B), shared.lists
    HANDED = WEIGHTS + (3 * LISTS if GATE else 0)
    AT_SUMS = HANDED + (2 * B * W if SUM else 0)
    BY_KEY = WARPS * W + BLOCKS * W  # behind what warps read and what pairs are by query
    SUMMED, PAIRS = BY_KEY + BLOCKS * W, BLOCKS * (BLOCKS + 1) // 2
    ROOM, KEYS = 8, B // 16

    @t.device
    def row_of(chunk, chunks):
        """Return the first token of a chunk, in the order of the passes."""
        return (chunks - 1 - chunk if REVERSE else chunk) * W

    @t.device
    def copy_chunk(to, p, xs, rows, lefts, thread):
        """Copy this thread's pieces of a chunk of every operand, and go on to the next."""
        for i in range(COUNT):
            left = lefts[OF_VALUES[i]]
            copy(to + i * TILE, p[i], xs[i].row, xs[i].column, rows, left, thread)

    @t.device
    def go_on(p, xs):
        for i in range(COUNT):
            p[i] += (-2 * W if REVERSE else 2 * W) * xs[i].row

    @t.device
    def add_rows(O, tile, lane):
        """Add what is in shared memory, from a warp's columns of a tile on."""
        for t in range(2 * BLOCKS):
            for i in range(8):
                row = t // 2 * 16 + lane // 4 + i // 2 % 2 * 8
                column = t % 2 * 16 + 2 * (lane % 4) + i % 2 + i // 4 * 8
                O[8 * t + i] += value(tile + row * PITCH + column)

    @t.device
    def hand(O, at):
        """Leave sums for the same lane of the other half."""
        for n in range(SUMS // 4):
            put_numbers(at + 128 * n, O[4 * n], O[4 * n + 1], O[4 * n + 2], O[4 * n + 3])

    @t.device
    def take(O, at):
        """Add the sums that were left."""
        for n in range(SUMS // 4):
            x = numbers(at + 128 * n)
            for i in range(4):
                O[4 * n + i] += x[i]

    @t.device
    def put_read(O, x, sums, lane):
        """Leave a warp's sums over its columns of what it has read, by token."""
        j = 2 * (lane % 4)
        for t in range(BLOCKS):
            for r in range(2):
                row, total = 16 * t + lane // 4 + 8 * r, f32(0)
                for h in range(2):
                    for i in range(4):
                        found = value(x + row * PITCH + 16 * h + j + i % 2 + i // 2 * 8)
                        total += O[16 * t + 8 * h + i // 2 * 4 + 2 * r + i % 2] * found
                total += across(total, 1)
                total += across(total, 2)
                if j == 0:
                    put_number(sums + row, total)

    @t.device
    def put_pairs(x, values, P, sums, rank, lane):
        """Leave the sums over P and X V' of a chunk by query and by key, without each own pair."""
        g, j = lane // 4, 2 * (lane % 4)
        M, by_query, by_key = (
            cuda.local.array(ROOM, f32), cuda.local.array(2, f32), cuda.local.array(4, f32),
        )  # fmt: skip
        for n in range(rank, PAIRS, WARPS):
            t, s = 1 if n > 1 else 0, 1 if n > 0 else 0
            for e in range(8):
                M[e] = f32(0)
            for d in range(KEYS):
                a = load(x + 16 * t * PITCH + 16 * d, PITCH)
                b = second(values + 16 * s * PITCH + 16 * d, PITCH)
                put_eight(M, 0, multiply(*(eight(M, 0) + a + b)))
            for e in range(4):
                by_query[e % 2], by_key[e] = f32(0), f32(0)
            for e in range(8):
                r, h = e // 2 % 2, e % 2 + e // 4 * 2
                row, column = g + 8 * r, j + e % 2 + e // 4 * 8
                found = M[e] * value(P + (16 * t + row) * PITCH_P + 16 * s + column)
                if t == s and row == column:
                    found = f32(0)
                by_query[r] += found
                by_key[h] += found
            for r in range(2):
                found = by_query[r]
                found += across(found, 1)
                found += across(found, 2)
                if j == 0:
                    put_number(sums + WARPS * W + s * W + 16 * t + g + 8 * r, found)
            for h in range(4):
                found = by_key[h]
                found += across(found, 4)
                found += across(found, 8)
                found += across(found, 16)
                if g == 0:
                    put_number(sums + BY_KEY + t * W + 16 * s + j + h % 2 + h // 2 * 8, found)

    @t.device
    def leave_sums(base, of, row, rows, tokens, sums, factor, lane):
        """Write the sums of a chunk by a warp, a token a lane; of reverse passes by key behind."""
        if lane < rows and lane < W:
            read, by_key = f32(0), f32(0)
            for w in range(WARPS):
                read += number(sums + w * W + lane)
            if REVERSE:
                for b in range(BLOCKS):
                    if b >= lane // 16:
                        read += number(sums + (WARPS + b) * W + lane)
                    if b <= lane // 16:
                        by_key += number(sums + BY_KEY + b * W + lane)
                put(base, (row + tokens + lane) * of.row, 2, f64(by_key * factor))
            put(base, (row + lane) * of.row, 2, f64(read * factor))

    @t.device
    def keep(S, base, of, own, factor):
        """Write a warp's rows of S', times a factor, in bfloat16."""
        for n in range(2 * KEYS):
            there = base + ((own + 16 * (n // KEYS)) * of.row + 16 * (n % KEYS)) * 2
            keep_block(there, of.row, factor, *eight(S, n))

    @t.device
    def meet(S, base, of, own):
        """Return the sum of a warp's rows of S' times columns of what the other sweep has kept."""
        total = f32(0)
        for n in range(2 * KEYS):
            there = base + (own + 16 * (n // KEYS) + 16 * (n % KEYS) * of.row) * 2
            total += meet_block(there, of.row, *eight(S, n))
        for n in (1, 2, 4, 8, 16):
            total += across(total, n)
        return total

    def backward(
        at, x0, x1, x2, x3, x4, x5, o1, o2, gate, start1, start2, end1, end2, dots1, dots2, kept1,
        kept2, met1, met2, factor, into, out, size,
    ):  # fmt: skip
        S, O = cuda.local.array(STATE, f32), cuda.local.array(SUMS, f32)
        p = cuda.local.array(COUNT, i64)
        thread = i32(cuda.threadIdx.x)
        warp, lane = thread // 32, thread % 32
        first = warp < WARPS
        rank, late = warp if first else warp - WARPS, 0 if first else SUM

        head, segment, before, tokens = located(i64(cuda.blockIdx.x), size)
        D, V, T = i32(size.keys), i32(size.values), i32(tokens)
        chunks = (T + W - 1) // W
        columns = (V if OF_VALUES[K1] else D) if first else (V if OF_VALUES[K2] else D)
        rows = (V if OF_VALUES[V1] else D) if first else (V if OF_VALUES[V2] else D)
        power = POWER1 if first else POWER2
        own = rank * 32  # its columns of a result, rows of S'

        p_start, start = at.start1, start1
        p_end, end = at.end1, end1
        p_o, o, made = at.o1, o1, OUT + own
        if not first:
            p_start, start = at.start2, start2
            p_end, end = at.end2, end2
            if not SUM:
                p_o, o, made = at.o2, o2, OUT + TILE + own
        get_state(S, p_start, start, head, segment, own, rows, columns)
        if p_start:
            for i in range(STATE):
                S[i] *= f32(into)

        xs, bases = (x0, x1, x2, x3, x4, x5), (at.x0, at.x1, at.x2, at.x3, at.x4, at.x5)
        apart = thread % (B // 8) * 8
        lefts = (D - apart, V - apart)
        for i in range(COUNT):
            p[i], _ = piece_of(
                bases[i], xs[i], head, before + row_of(0, chunks), D, 0, thread, B // 8
            )
        for i in range(AHEAD):
            if i < chunks:
                n = T - row_of(i, chunks)
                copy_chunk(i * COUNT * TILE, p, xs, n, lefts, thread)
            go_on(p, xs)
            copies_commit()
        left = rows - own - lane % 4 * 8
        p_o += place(o, head, 0, before + lane // 4, own + lane % 4 * 8) * 2
        p_gate, a = i64(0), f64(0)  # and the gate of the chunk whose weights are next
        if GATE:
            p_gate = address(at.gate, gate, head, 0, before if GATE == 2 else i64(0), 0)
        if GATE and warp == WARPS - 1:
            a = gate_of(p_gate, gate, row_of(0, chunks), lane, tokens)
            put_weights(WEIGHTS, a, lane)
            if chunks > 1:
                a = gate_of(p_gate, gate, row_of(1, chunks), lane, tokens)
        slot = i32(0)  # the place of its next chunk
        # For a gate's gradient
        dotted = DOTS and not (REVERSE and first)
        p_dots, dots, p_kept, kept, p_met, met = at.dots1, dots1, at.kept1, kept1, at.met1, met1
        if not first:
            p_dots, dots, p_kept, kept, p_met, met = at.dots2, dots2, at.kept2, kept2, at.met2, met2
        if DOTS:
            p_dots += place(dots, head, 0, before, 0) * 4
            p_kept += place(kept, head, 0, 0, 0) * 2
            p_met += place(met, head, 0, 0, 0) * 4
        sums = AT_SUMS + (0 if first else 2 * SUMMED)

        for c in range(chunks + SUM):
            copies_wait(AHEAD - 1)
            cuda.syncthreads()  # this chunk is there, and what the first half made of the last one
            chunk = c - late
            works = chunk >= 0 and chunk < chunks
            stage, lists = slot * COUNT * TILE, WEIGHTS + chunk % 3 * LISTS
            queries = stage + (Q1 if first else Q2) * TILE
            keys = stage + (K1 if first else K2) * TILE
            values = stage + (V1 if first else V2) * TILE
            P = TILES + (0 if first else TILE_P)
            x = stage + (Q1 if REVERSE else X) * TILE
            border = 0  # a period's number where this chunk is the first of one, but of none
            if DOTS:
                border = (before + row_of(chunk, chunks)) // W
                border = border // EVERY if dotted and works and border % EVERY == 0 else 0
                if dotted and rank == WARPS - 1 and chunk > 0 and chunk <= chunks:
                    row = row_of(chunk - 1, chunks)
                    at_sums = sums + (chunk - 1 & 1) * SUMMED
                    leave_sums(p_dots, dots, row, T - row, size.tokens, at_sums, f32(factor), lane)
                if border and not REVERSE and p_met:
                    found = meet(S, p_kept + (border - 1) * kept.segment * 2, kept, own)
                    if lane == 0:
                        put(p_met, (border - 1) * met.segment + rank * met.row, 2, f64(found))
            if works:
                slot = slot + 1 if slot + 1 < STAGES else 0
                # The one half makes its P first, the other reads its state first: one has latency
                # to hide when the other has work
                if first:
                    make_own_pairs(queries, keys, P, lists, rank, WARPS, power, lane)
                read(S, O, queries, lists, power, lane)
                if DOTS and dotted:
                    put_read(O, x + own, sums + (chunk & 1) * SUMMED + rank * W, lane)
                if not first:
                    make_own_pairs(queries, keys, P, lists, rank, WARPS, power, lane)
            ahead, to = c + AHEAD, slot + (AHEAD - 1) + late
            to = (to if to < STAGES else to - STAGES) * COUNT * TILE
            if ahead < chunks:
                copy_chunk(to, p, xs, T - row_of(ahead, chunks), lefts, thread)
            go_on(p, xs)
            copies_commit()
            if works:
                if GATE and warp == WARPS - 1 and c + 1 < chunks:
                    # Of a decay all chunks but that of the last tokens have the same
                    if GATE == 2 or c < 3 or (c + 2) * W > T:
                        put_weights(WEIGHTS + (c + 1) % 3 * LISTS, a, lane)
                    if c + 2 < chunks:
                        a = gate_of(p_gate, gate, row_of(c + 2, chunks), lane, tokens)
                threads_sync(1 if first else 2, 32 * WARPS)
                update(S, O, True, keys, values + own, P, lists, power, lane)
                handed = HANDED + ((chunk & 1) * WARPS + rank) * 32 * SUMS + 4 * lane
                if SUM and first:
                    hand(O, handed)
                else:
                    row = row_of(chunk, chunks)
                    if SUM:
                        take(O, handed)
                    for i in range(SUMS):
                        O[i] *= f32(factor)
                    old = OLD1 if first else OLD2
                    if old >= 0:
                        add_rows(O, stage + old * TILE + own, lane)
                    if WIDE1 if first else WIDE2:
                        base = at.o1 if first or SUM else at.o2
                        n = T - row
                        put_wide(O, base, o, head, before + row, n, own, rows, f32(1))
                    else:
                        put_rows(O, made, f32(1), lane)
                        leave(p_o + 2 * row * o.row, o, made, T - row, left, lane)
                if DOTS and REVERSE and not first:
                    put_pairs(x, values, P, sums + (chunk & 1) * SUMMED, rank, lane)
                    if border and p_kept:
                        keep(S, p_kept + (border - 1) * kept.segment * 2, kept, own, f32(out))
        if DOTS and chunks:
            cuda.syncthreads()
            if dotted and rank == WARPS - 1 and not (SUM and first):
                row = row_of(chunks - 1, chunks)
                at_sums = sums + (chunks - 1 & 1) * SUMMED
                leave_sums(p_dots, dots, row, T - row, size.tokens, at_sums, f32(factor), lane)
        if p_end and is_first(end, head):
            for i in range(STATE):
                S[i] *= f32(out)
            put_state(S, p_end, end, head, segment, own, rows, columns)

    return backward


TEXT = Text(make, ARGUMENTS, macros)
