"""The causal pass on a GPU: one block of threads a head, a segment and a tile of values.

    o_t = read * (a_t q_t S + sum_j write * L[j, t] (q_t . k_j) v_j)    S <- r S + write * (b k)' v

The state is held transposed, S' (V, D) in float32 registers: warp w has its rows 16 w .. 16 w + 15.
Of a chunk of W = 32 tokens, in blocks of 16 x 16 (instructions.py),

    P = lower(Q K')  [W, W]    O = a * (Q S) + P V  [W, V]    S' = r S' + V' (b K)  [V, D]

Every product is x y' of blocks whose sums run along rows: Q and S', P and V', V' and K'. So S' is
an operand as it is, without an exchange between lanes. P goes through shared memory, its blocks
shared out among the warps, while the chunk before is multiplied: one barrier a chunk. Chunks are
copied ``STAGES - 1`` ahead; rows that are not aligned, or of another dtype, element by element.

With c_t the sum of the log gate over the chunk up to t and e_t the same without t itself (what a
strict pass reads), L = exp(c_t - c_j), a = exp(c_t), b = exp(c_last - c_j); the reverse pass
exchanges a and b and transposes L. One warp sums two chunks ahead, in float64; c is kept as two
floats, so that differences have float32's digits whatever the gate. A reset is a gate of -1e6.

Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024: 0.18 ms at 3.0 TB/s for
B = 8, T = 4096, H = 16. Products: 2 (1.25 W + 2 D) V operations, 76 k. One H100 took 0.296 ms for
linear (60% of its bytes' time), CuPy's kernel of the same algorithm 0.294 in that run.

Constants are those of `cupy.launch.settings`, arguments those of `cupy.launch.passes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..cupy.launch import CHUNK as W
from ..cupy.launch import PAD
from .instructions import Constants, Text

LEAST = 1e-30  # decay
RESET = -1e6  # log gate


class Addresses(NamedTuple):
    """Where the operands are; 0 of one that is not."""

    q: int
    k: int
    v: int
    o: int
    x: int
    start: int
    end: int
    gate: int
    dots: int
    states: int


class Operand(NamedTuple):
    """Strides of an operand in elements, and the type of an element by its number."""

    head0: int
    head1: int
    head2: int
    segment: int
    row: int
    column: int
    type: int


class Sizes(NamedTuple):
    """What there is to do."""

    tokens: int
    segment: int
    keys: int
    values: int
    heads1: int
    heads2: int
    strict: int
    log: int
    tiles: int
    period: int


class Head(NamedTuple):
    """Which head a block of threads has, on three axes."""

    index0: int
    index1: int
    index2: int


FACTORS = 3  # read, write, power
ARGUMENTS = (Addresses, *[Operand] * len(Addresses._fields), *[float] * FACTORS, Sizes)


def macros(c: Constants) -> Constants:
    """Return the macros of the instructions for the constants of a pass."""
    kept = ("NARROW", "PARTS", "ADD", "TYPE_O", "SUM_TYPE")
    pitches = {f"PITCH_{i + 1}": n + PAD for i, n in enumerate((c["BD"], c["BV"], W))}
    return {name: c[name] for name in kept} | pitches


def shared_functions(t: Any) -> tuple[Callable[..., Any], ...]:
    """Return what the kernels of states in registers read and write sums and find rows by."""
    i64, device = t.i64, t.device

    @device
    def eight(S, n):
        """Return the n-th sums of an array of them."""
        i = 8 * n
        return (S[i], S[i + 1], S[i + 2], S[i + 3], S[i + 4], S[i + 5], S[i + 6], S[i + 7])

    @device
    def put_eight(S, n, x):
        i = 8 * n
        S[i], S[i + 1], S[i + 2], S[i + 3] = x[0], x[1], x[2], x[3]
        S[i + 4], S[i + 5], S[i + 6], S[i + 7] = x[4], x[5], x[6], x[7]

    @device
    def place(of, head, segment, row, column):
        """Return the elements from an array's first to the head's at a segment, row and column."""
        at = head.index0 * of.head0 + head.index1 * of.head1 + head.index2 * of.head2
        return at + segment * of.segment + row * of.row + column * of.column

    @device
    def width(type):
        """Return the bytes of an element of a type by its number."""
        return 2 if type < 2 else 4 if type == 2 else 8

    @device
    def address(base, of, head, segment, row, column):
        """Return where a row of a head begins."""
        return base + place(of, head, segment, row, column) * width(of.type)

    @device
    def located(index, size):
        """Return a block's head, and of its segment the number, the first token and how many."""
        segment, first, count = i64(0), i64(0), size.tokens
        if size.segment:
            segments = (size.tokens + size.segment - 1) // size.segment
            segment, index = index % segments, index // segments
            first = segment * size.segment
            count = min(size.segment, size.tokens - first)
        index, head2 = index // size.heads2, index % size.heads2
        return Head(index // size.heads1, index % size.heads1, head2), segment, first, count

    return eight, put_eight, place, width, address, located


def make(c: Constants, t: Any) -> Callable[..., None]:
    """Return the kernel of a pass with such constants, which calls the instructions ``t``."""
    f32, f64, i32, i64, dot, device = t.f32, t.f64, t.i32, t.i64, t.dot, t.device
    load, load_turned, second, second_turned = t.load, t.load_turned, t.second, t.second_turned
    multiply, block_of, weighed = t.multiply, t.block_of, t.weighed
    value, put_value, put_pair, put_out, out = t.value, t.put_value, t.put_pair, t.put_out, t.out
    copy16, widen8, leave16, get, put = t.copy16, t.widen8, t.leave16, t.get, t.put
    copies_commit, copies_wait, syncwarp = t.copies_commit, t.copies_wait, t.syncwarp
    number, put_number, dot_at, put_dot = t.number, t.put_number, t.dot_at, t.put_dot
    up, of_lane, across, get_block, put_block = t.up, t.of_lane, t.across, t.get_block, t.put_block

    READ, UPDATE, GATED, REVERSE = c["READ"], c["UPDATE"], c["GATED"], c["REVERSE"]
    BOTH, DOTS, KEEP, WRITE, ADD = c["BOTH"], c["DOTS"], c["KEEP"], c["WRITE"], c["ADD"]
    V_IS_K, STAGES, TYPE_O, ASYNC_O = c["V_IS_K"], c["STAGES"], c["TYPE_O"], c["ASYNC_O"]
    BD, BV, SIZE = c["BD"], c["BV"], 2 if c["NARROW"] else 4
    WARPS = BV // 16 if BV > 64 else 4
    THREADS, KEYS, BLOCKS = 32 * WARPS, BD // 16, W // 16
    PITCH, PITCH_V, PITCH_P = BD + PAD, BV + PAD, W + PAD
    PITCH_OF_V = PITCH if V_IS_K else PITCH_V
    OWN_V, PAIRS, SQUARES = UPDATE and not V_IS_K, READ and UPDATE, 2 if BOTH else 1
    AHEAD = 1 if PAIRS and STAGES > 2 else 0  # a chunk's pairs are multiplied while the last runs
    WEIGHER = (3 if REVERSE else 4) if WARPS > 4 else 0  # a warp with no pairs, where there is one
    OUT_SIZE = 4 if ADD or TYPE_O == 2 else 2

    # Shared memory: tiles in elements, results in bytes, weights and sums in their own numbers
    AT_K = W * PITCH if READ else 0
    AT_V = AT_K + (W * PITCH if UPDATE else 0)
    AT_X = AT_V + (W * PITCH_V if OWN_V else 0)
    STAGE = AT_X + (W * PITCH_V if DOTS else 0)
    SQUARE = W * PITCH_P
    AT_PAIRS = STAGES * STAGE
    AT_OUT = (AT_PAIRS + (2 * SQUARES * SQUARE if PAIRS else 0)) * SIZE
    AT_WEIGHTS = (AT_OUT + (W * PITCH_V * OUT_SIZE if READ else 0)) // 4
    COLUMN, INTO, FADE, TOTAL, NUMBERS = 2 * W, 4 * W, 5 * W, 6 * W, 6 * W + 4
    AT_SUMS = (AT_WEIGHTS + (3 * NUMBERS if GATED else 0)) * 4 // (4 if dot is f32 else 8)
    PAIR_SUMS = AT_SUMS + 2 * WARPS * W  # reads (2, WARPS, W), then of pairs (3, by key and query)
    STATE, SUMS, ZEROS = 8 * KEYS, 8 * BLOCKS, (f32(0),) * 8

    eight, put_eight, _, width, address, located = shared_functions(t)

    def fetcher(columns_there, pitch, kind):
        """Return what copies the rows of a chunk into a tile, zeros behind its last row and column.

        Of a kind: 1 by copies of 16 bytes, 2 of eight 16-bit numbers, 0 one by one.
        """
        piece = 8 if kind == 2 else 16 // SIZE if kind else 1
        pieces, stored = columns_there // piece, 2 if kind == 2 else SIZE
        rounds = -(-W * pieces // THREADS)

        @device
        def fetch(tile, base, of, first, rows, columns, thread):
            for n in range(rounds):
                i = thread + n * THREADS
                if i < W * pieces:
                    row, column = i // pieces, i % pieces * piece
                    there, to = row < rows and column < columns, tile + row * pitch + column
                    if kind:
                        more = (first + row) * of.row + column if there else i64(0)
                        if kind == 1:
                            copy16(to, base + more * stored, 16 if there else 0)
                        else:
                            widen8(to, base + more * stored, of.type, 1 if there else 0)
                    elif there:
                        at = (first + row) * of.row + column * of.column
                        put_value(to, get(base, at, of.type))
                    else:
                        put_value(to, f32(0))

        return fetch

    fetch_q, fetch_k = fetcher(BD, PITCH, c["ASYNC_Q"]), fetcher(BD, PITCH, c["ASYNC_K"])
    fetch_v, fetch_x = fetcher(BV, PITCH_V, c["ASYNC_V"]), fetcher(BV, PITCH_V, c["ASYNC_X"])

    @device
    def row_of(chunk, chunks):
        """Return the first token of a chunk, in the order of the pass."""
        return (chunks - 1 - chunk if REVERSE else chunk) * i64(W)

    @device
    def tokens_of(row, count):
        return i32(min(count - row, i64(W)))

    @device
    def fetch_chunk(chunk, chunks, count, bases, q, k, v, x, keys, values, thread):
        to, row = chunk % STAGES * STAGE, row_of(chunk, chunks)
        n = tokens_of(row, count)
        if READ:
            fetch_q(to, bases[0], q, row, n, keys, thread)
        if UPDATE:
            fetch_k(to + AT_K, bases[1], k, row, n, keys, thread)
        if OWN_V:
            fetch_v(to + AT_V, bases[2], v, row, n, values, thread)
        if DOTS:
            fetch_x(to + AT_X, bases[3], x, row, n, values, thread)

    @device
    def legal(query, key, strict):
        return key - query >= strict if REVERSE else query - key >= strict

    @device
    def legal_blocks(query, key):
        return key >= query if REVERSE else query >= key

    @device
    def gate_of(base, of, token, log, power):
        """Return the log gate of a token; of a decay its logarithm."""
        a = f64(get(base, token * of.row, of.type))
        if not log:
            a = math.log(LEAST if a < LEAST else a)  # a NaN stays
        a *= power
        return RESET if a < RESET else a

    @device
    def put_parts(at, x):
        """Put a number as two floats."""
        high = f32(x)
        put_number(at, high)
        put_number(at + 1, f32(x - f64(high)))

    @device
    def weigh(to, a, lane, strict, write):
        """Leave the weights of a chunk by one warp, a token a lane."""
        upto = a
        for n in (1, 2, 4, 8, 16):
            other = up(upto, n)
            if lane >= n:
                upto += other
        before, last = up(upto, 1), of_lane(upto, 31)
        if lane == 0:
            before = f64(0)
        query = before if strict else upto
        put_parts(to + 2 * lane, -upto if REVERSE else query)
        put_parts(to + COLUMN + 2 * lane, query if REVERSE else -upto)
        into, after = math.exp(f32(query)), math.exp(f32(last - upto))
        put_number(to + INTO + lane, after if REVERSE else into)
        put_number(to + FADE + lane, (into if REVERSE else after) * f32(write))
        if lane == 0:
            put_number(to + TOTAL, math.exp(f32(last)))

    @device
    def put_sum(chunk, by, other, at, x, first):
        """Leave a sum over a row (by 1) or column (by 0) of a block of pairs."""
        if by:
            x += across(x, 1)
            x += across(x, 2)
        else:
            x += across(x, 4)
            x += across(x, 8)
            x += across(x, 16)
        if first:
            put_dot(PAIR_SUMS + ((chunk % 3 * 2 + by) * BLOCKS + other) * W + at, x)

    @device
    def pair_up(chunk, warp, lane, strict, read, write, tile):
        """Leave P of a chunk, and the sums over it."""
        g, j = lane // 4, 2 * (lane % 4)
        q = chunk % STAGES * STAGE
        k, x, w = q + AT_K, q + AT_X, AT_WEIGHTS + chunk % 3 * NUMBERS
        v = k + tile * BV if V_IS_K else q + AT_V
        to = AT_PAIRS + (chunk & 1) * SQUARES * SQUARE
        p, rest, m = cuda.local.array(8, f32), cuda.local.array(8, f32), cuda.local.array(8, f32)
        by_query, by_key = cuda.local.array(2, dot), cuda.local.array(4, dot)
        for i in range(warp, BLOCKS * BLOCKS, WARPS):
            t0, s0 = i % BLOCKS * 16, i // BLOCKS * 16
            if legal_blocks(t0, s0):
                A, B, M = ZEROS, ZEROS, ZEROS
                for n in range(BD // 16):  # two sums: half as long a chain
                    d = 16 * n
                    a, b = load(q + t0 * PITCH + d, PITCH), second(k + s0 * PITCH + d, PITCH)
                    if n % 2:
                        B = multiply(*(B + a + b))
                    else:
                        A = multiply(*(A + a + b))
                if BOTH or DOTS == 2:
                    for n in range(BV // 16):
                        d = 16 * n
                        if BOTH:
                            a = load(q + t0 * PITCH + d, PITCH)
                        else:
                            a = load(x + t0 * PITCH_V + d, PITCH_V)
                        b = second(v + s0 * PITCH_OF_V + d, PITCH_OF_V)
                        M = multiply(*(M + a + b))
                put_eight(p, 0, A)
                put_eight(rest, 0, B)
                put_eight(m, 0, M)
                for e in range(4):
                    by_query[e % 2], by_key[e] = 0, 0
                for e in range(8):
                    r, h = e // 2 % 2, e % 2 + e // 4 * 2
                    t, s = t0 + g + 8 * r, s0 + j + e % 2 + e // 4 * 8
                    able, weight = legal(t, s, strict), f32(1)
                    if WRITE:
                        weight = f32(write)
                    if GATED:
                        high = number(w + 2 * t) + number(w + COLUMN + 2 * s)
                        low = number(w + 2 * t + 1) + number(w + COLUMN + 2 * s + 1)
                        weight = weight * f32(math.exp(high + low if able else f32(0)))
                    found = (p[e] + rest[e]) * weight if able else f32(0)
                    if DOTS == 2 and able and t != s:
                        both = dot(found * f32(read) * m[e])
                        by_query[r] += both
                        by_key[h] += both
                    p[e] = found
                    m[e] = m[e] * weight if able else f32(0)
                for r in range(2):
                    for h in range(2):
                        at, e = to + (t0 + g + 8 * r) * PITCH_P + s0 + j + 8 * h, 4 * h + 2 * r
                        put_pair(at, p[e], p[e + 1])
                        if BOTH:
                            put_pair(at + SQUARE, m[e], m[e + 1])
                if DOTS == 2:
                    for r in range(2):
                        put_sum(chunk, 1, s0 // 16, t0 + g + 8 * r, by_query[r], j == 0)
                    for h in range(4):
                        at = s0 + j + h % 2 + h // 2 * 8
                        put_sum(chunk, 0, t0 // 16, at, by_key[h], g == 0)

    @device
    def leave(base, of, row, n, mine, values, lane):
        """Write a warp's columns of o, from where it alone has put them."""
        syncwarp()
        if ASYNC_O:
            piece = 16 // OUT_SIZE
            pieces = 16 // piece
            for m in range(W * pieces // 32):
                i = lane + 32 * m
                t, c = i // pieces, i % pieces * piece
                if t < n and mine + c < values:
                    at = (row + t) * of.row + mine + c
                    size = 4 if TYPE_O == 2 else 2
                    leave16(base + at * size, AT_OUT + (t * PITCH_V + mine + c) * OUT_SIZE)
        else:
            for m in range(W * 16 // 32):
                i = lane + 32 * m
                t, c = i // 16, i % 16
                if t < n and mine + c < values:
                    at = (row + t) * of.row + (mine + c) * of.column
                    found = out(AT_OUT + (t * PITCH_V + mine + c) * OUT_SIZE)
                    if ADD:
                        found += get(base, at, of.type)
                    put(base, at, of.type, f64(found))

    @device
    def leave_sums(chunk, base, of, row, n, tile, tokens, thread):
        """Write the sums of what is read, with those of pairs by query, and by key."""
        t = thread
        if t < n:
            read, by_key = dot(0), dot(0)
            for w in range(WARPS):
                read += dot_at(AT_SUMS + ((chunk & 1) * WARPS + w) * W + t)
            if BOTH:
                read *= dot(0.5)  # it is of both operands
            if DOTS == 2:
                pairs = PAIR_SUMS + chunk % 3 * 2 * BLOCKS * W + t
                for b in range(BLOCKS):
                    if legal_blocks(b, t // 16):
                        by_key += dot_at(pairs + b * W)
                    if legal_blocks(t // 16, b):
                        read += dot_at(pairs + (BLOCKS + b) * W)
            at = (row + t) * of.row + tile * of.segment
            put(base, at, of.type, f64(read))
            if DOTS == 2:
                put(base, at + tokens, of.type, f64(by_key))

    @device
    def put_states(S, base, of, rows, keys):
        """Write the elements of a warp's rows of S' into a matrix, from its first on."""
        for d in range(KEYS):
            more = base + 16 * d * of.column * width(of.type)
            put_block(more, of.row, of.column, of.type, rows, keys - 16 * d, *eight(S, d))

    @device
    def update(S, O, v, pitch_v, k, pitch, P, w, mine, j, write):
        """Add P v to o, and weighed v' k to S', of 16 tokens after 16."""
        for s in range(BLOCKS):
            b = load_turned(v + 16 * s * pitch_v + mine, pitch_v)
            if READ:
                for t in range(BLOCKS):
                    if legal_blocks(t, s):
                        a = load(P + 16 * t * PITCH_P + 16 * s, PITCH_P)
                        put_eight(O, t, multiply(*(eight(O, t) + a + b)))
            if GATED:
                n = w + FADE + 16 * s + j
                b = weighed(number(n), number(n + 1), number(n + 8), number(n + 9), *b)
            elif WRITE:
                b = weighed(f32(write), f32(write), f32(write), f32(write), *b)
            for d in range(KEYS):
                a = second_turned(k + 16 * s * pitch + 16 * d, pitch)
                put_eight(S, d, multiply(*(eight(S, d) + b + a)))

    def causal_pass(
        at, q, k, v, o, x, start, end, gate, dots, states, read, write, power, size
    ):  # fmt: skip
        S, O = cuda.local.array(STATE, f32), cuda.local.array(SUMS, f32)
        thread = i32(cuda.threadIdx.x)
        warp, lane = thread // 32, thread % 32
        g, j, mine = lane // 4, 2 * (lane % 4), 16 * warp  # its first row of S'
        index = i64(cuda.blockIdx.x)  # of a tile, a segment and a head
        tile, index = index % size.tiles, index // size.tiles
        head, segment, first, count = located(index, size)
        v0, strict = tile * BV, i32(size.strict)
        keys, values = i32(size.keys), i32(min(size.values - v0, i64(BV)))
        chunks, holds = i32((count + W - 1) // W), mine < values

        none = i64(0)
        bases = (
            address(at.q, q, head, none, first, none) if READ else none,
            address(at.k, k, head, none, first, none) if UPDATE else none,
            address(at.v, v, head, none, first, v0) if OWN_V else none,
            address(at.x, x, head, none, first, v0) if DOTS else none,
        )
        p_o = address(at.o, o, head, none, first, v0) if READ else none
        p_gate = address(at.gate, gate, head, none, first, none) if GATED else none
        p_dots = address(at.dots, dots, head, none, first, none) if DOTS else none
        for i in range(8 * KEYS):
            S[i] = f32(0)
        if at.start and holds:
            p_start = address(at.start, start, head, segment, v0 + mine, none)
            for d in range(KEYS):
                there = p_start + 16 * d * start.column * width(start.type)
                down, right = values - mine, keys - 16 * d
                found = get_block(there, start.row, start.column, start.type, down, right)
                put_eight(S, d, found)
        # Of the heads that share a state, those along a stride of 0, the first writes it
        later = (end.head0 == 0 and head.index0 > 0) or (end.head1 == 0 and head.index1 > 0)
        later = later or (end.head2 == 0 and head.index2 > 0)
        p_end = none
        if at.end and holds and not later:
            p_end = address(at.end, end, head, segment, v0 + mine, none)
        p_states = address(at.states, states, head, none, v0 + mine, none) if KEEP else none
        for i in range(STAGES - 1):
            if i < chunks:
                fetch_chunk(i, chunks, count, bases, q, k, v, x, keys, values, thread)
            copies_commit()
        a = f64(0)  # gate of the chunk whose weights are next
        if GATED and warp == WEIGHER:
            for i in range(2):
                row = row_of(i, chunks)
                if i < chunks:
                    a = f64(0)
                    if row + lane < count:
                        a = gate_of(p_gate, gate, row + lane, size.log, power)
                    weigh(AT_WEIGHTS + i * NUMBERS, a, lane, strict, write)
            row = row_of(2, chunks)
            a = f64(0)
            if chunks > 2 and row + lane < count:
                a = gate_of(p_gate, gate, row + lane, size.log, power)
        if PAIRS and chunks:
            copies_wait(STAGES - 2)
            cuda.syncthreads()
            pair_up(0, warp, lane, strict, read, write, tile)

        for c in range(chunks):
            copies_wait(STAGES - 2 - AHEAD)
            cuda.syncthreads()  # this chunk and its pairs are there, the next too
            if c + STAGES - 1 < chunks:
                late = c + i32(STAGES - 1)
                fetch_chunk(late, chunks, count, bases, q, k, v, x, keys, values, thread)
            copies_commit()
            row = row_of(c, chunks)
            n = tokens_of(row, count)
            if DOTS and c > 0:
                last = row_of(c - 1, chunks)
                left = tokens_of(last, count)
                leave_sums(c - 1, p_dots, dots, last, left, tile, size.tokens, thread)
            t_q = c % STAGES * STAGE
            t_k, t_x, w = t_q + AT_K, t_q + AT_X, AT_WEIGHTS + c % 3 * NUMBERS
            t_v = t_k + i32(v0) if V_IS_K else t_q + AT_V
            period = (first + row) // size.period - 1  # whose end is before this chunk
            kept = KEEP and period >= 0 and (first + row) % size.period == 0 and holds
            if KEEP and kept and not REVERSE:
                where = p_states + period * states.segment * width(states.type)
                put_states(S, where, states, values - mine, keys)

            if READ and holds:
                for i in range(8 * BLOCKS):
                    O[i] = f32(0)
                for d in range(KEYS):
                    s = block_of(*eight(S, d))
                    for t in range(BLOCKS):
                        b = load(t_q + 16 * t * PITCH + 16 * d, PITCH)
                        put_eight(O, t, multiply(*(eight(O, t) + b + s)))
                if GATED:
                    for t in range(BLOCKS):
                        for i in range(8):
                            O[8 * t + i] *= number(w + INTO + 16 * t + g + i // 2 % 2 * 8)
            if DOTS:
                for t in range(BLOCKS):
                    for r in range(2):
                        all_ = dot(0)
                        mate = t_x + (16 * t + g + 8 * r) * PITCH_V + mine + j
                        if holds:
                            for i in range(4):
                                found = O[8 * t + i // 2 * 4 + 2 * r + i % 2] * f32(read)
                                all_ += dot(found * value(mate + i // 2 * 8 + i % 2))
                        all_ += across(all_, 1)
                        all_ += across(all_, 2)
                        if j == 0:
                            place = AT_SUMS + ((c & 1) * WARPS + warp) * W + 16 * t + g + 8 * r
                            put_dot(place, all_)
            if UPDATE and holds:
                if GATED:
                    total = number(w + TOTAL)
                    for i in range(8 * KEYS):
                        S[i] *= total
                P = AT_PAIRS + (c & 1) * SQUARES * SQUARE
                update(S, O, t_v, PITCH_OF_V, t_k, PITCH, P, w, mine, j, write)
                if BOTH:  # the same with k and v exchanged
                    update(S, O, t_k, PITCH, t_v, PITCH_OF_V, P + SQUARE, w, mine, j, write)
            if KEEP and kept and REVERSE:
                where = p_states + period * states.segment * width(states.type)
                put_states(S, where, states, values - mine, keys)
            if READ and holds:
                for t in range(BLOCKS):
                    for i in range(4):
                        place = (16 * t + g + i % 2 * 8) * PITCH_V + mine + j + i // 2 * 8
                        one, two = O[8 * t + 2 * i] * f32(read), O[8 * t + 2 * i + 1] * f32(read)
                        put_out(AT_OUT + place * OUT_SIZE, one, two)
                leave(p_o, o, row, n, mine, values, lane)
            if PAIRS and not AHEAD and c + 1 < chunks:
                copies_wait(0)
                cuda.syncthreads()
            if PAIRS and c + 1 < chunks:
                pair_up(c + i32(1), warp, lane, strict, read, write, tile)
            if GATED and warp == WEIGHER and c + 2 < chunks:
                weigh(AT_WEIGHTS + (c + 2) % 3 * NUMBERS, a, lane, strict, write)
                row = row_of(c + 3, chunks)
                a = f64(0)
                if c + 3 < chunks and row + lane < count:
                    a = gate_of(p_gate, gate, row + lane, size.log, power)
        if DOTS and chunks:
            cuda.syncthreads()
            row = row_of(chunks - 1, chunks)
            n = tokens_of(row, count)
            leave_sums(chunks - 1, p_dots, dots, row, n, tile, size.tokens, thread)
        if p_end:
            put_states(S, p_end, end, values - mine, keys)

    return causal_pass


TEXT = Text(make, ARGUMENTS, macros)
