"""What the sweeps of `hopper_backward` share beyond `warpgroups`: copies, weights, pairs and dots.

Strides of tokens and of columns are constants, so that what copies a chunk computes an address a
thread and not one a row: a kernel is compiled for each (D, or heads times D).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .warpgroups import (
    A64,
    ACC64,
    LEAST,
    LISTS,
    LOG2E,
    RESET,
    ROWS64,
    ROWS128,
    TOKENS,
    UNTIL,
    W,
    add,
    copy,
    load_gate,
    put_weights,
)

NEVER = gl.constexpr(float("-inf"))  # log2 of the weight of a pair that is none
PIECES = gl.constexpr(4)  # lists of a chunk in bfloat16: two of what each state is written by

# x times a weight of two pieces, rounded once; two numbers a register
WEIGHED = gl.constexpr("{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }")
NAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # by later versions

# Rows of float32 in shared memory, eight apart in other banks, and by half a column a thread
LINES = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))
COLUMNS = gl.constexpr(gl.BlockedLayout([16, 1], [2, 16], [1, 4], [0, 1]))


@gluon.jit
def _power(x, POWER: gl.constexpr):
    """Return the first, second or third power."""
    if POWER == 1:
        return x
    elif POWER == 2:
        return x * x
    else:
        return x * x * x


@gluon.jit
def _weigh(weights, slot, row: gl.constexpr, layout: gl.constexpr):
    """Return one list of a chunk's weights, [W]."""
    return weights.index(slot * LISTS + row).load(layout)


@gluon.jit
def _put_pieces(pieces, at, w):
    """Leave a list of weights as the sum of two in bfloat16."""
    high = w.to(gl.bfloat16)
    pieces.index(at).store(high)
    pieces.index(at + 1).store((w - high.to(gl.float32)).to(gl.bfloat16))


@gluon.jit
def _put_gate(
    weights, pieces, ends, at, c, last,
    LATE: gl.constexpr, POWER1: gl.constexpr, POWER2: gl.constexpr,
):  # fmt: skip
    """Leave the weights of a chunk by the sums of its gate in base 2, [W] and the last, float64.

    States are written by what comes after a token or, not ``LATE``, by what came before.
    """
    put_weights(weights, ends, at, c, last)
    w = gl.exp2((last - c if LATE else c).to(gl.float32))
    N: gl.constexpr = pieces.shape[0] // 2  # lists of a chunk, fewer where both powers are one
    if POWER1 > 0 and N == PIECES:
        _put_pieces(pieces, at * N, _power(w, POWER1))
    _put_pieces(pieces, at * N + N - 2, _power(w, POWER2))


@gluon.jit
def _put_decay(
    weights, pieces, ends, p_gate, T, chunks,
    LATE: gl.constexpr, POWER1: gl.constexpr, POWER2: gl.constexpr,
):  # fmt: skip
    """Leave the weights of a decay: of a whole chunk, and of the last one."""
    g = gl.load(p_gate).to(gl.float64)
    log_g = gl.log(gl.where(g < LEAST, LEAST, g)) * LOG2E  # not maximum: a NaN stays
    t = gl.arange(0, W, layout=TOKENS)
    rest = T - (chunks - 1) * W
    c, last = (t + 1) * log_g, W * log_g
    _put_gate(weights, pieces, ends, 0, c, last, LATE, POWER1, POWER2)
    c, last = gl.where(t < rest, t + 1, rest) * log_g, rest * log_g
    _put_gate(weights, pieces, ends, 1, c, last, LATE, POWER1, POWER2)


@gluon.jit
def _gate(p_gate, sgt, row, T):
    """Return the log gate of a chunk, [W]; zeros past the last token."""
    return load_gate(p_gate, sgt, gl.maximum(row, 0), T)


@gluon.jit
def _gate_sums(a):
    """Return the sums of a chunk's log gate in base 2, [W] and the last.

    A mover makes them where it waits anyway: the scan takes long.
    """
    a = a.to(gl.float64) * LOG2E
    a = gl.where(a < RESET, RESET, a)  # not maximum: a NaN stays
    return gl.associative_scan(a, 0, add), gl.sum(a, 0)


@gluon.jit
def _slot(c, s, chunks, GATE: gl.constexpr):
    """Which weights a chunk has: a log gate's its own; of a decay all but the last the same."""
    if GATE == 1:
        return (c == chunks - 1).to(gl.int32)
    else:
        return s


@gluon.jit
def _there(
    row, T, width,
    ROW: gl.constexpr, N: gl.constexpr, B: gl.constexpr, FAST: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Return N rows of a chunk and its columns, and which of them there are."""
    ROWS: gl.constexpr = ROWS128 if B == 128 else ROWS64
    t = gl.arange(0, N, layout=gl.SliceLayout(1, ROWS))[:, None]
    d = gl.arange(0, B, layout=gl.SliceLayout(0, ROWS))[None, :]
    m = t < T - row - ROW
    if not WHOLE:
        m = m & ((d // 8 < width // 8) if FAST else (d < width))  # by 16 bytes
    return t + ROW, d, m


@gluon.jit
def _fetch(
    tile, p, row, T, width, st: gl.constexpr, sd: gl.constexpr,
    B: gl.constexpr, FAST: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Copy a chunk's rows to shared memory; rows and columns that are not there are zeros."""
    p += row.to(gl.int64) * st
    if FAST:
        for i in gl.static_range(W // 16):
            t, d, m = _there(row, T, width, i * 16, 16, B, FAST, WHOLE)
            copy(tile.slice(i * 16, 16, 0), p + (t * st + d), mask=m)
    else:
        for i in gl.static_range(W // 16):
            t, d, m = _there(row, T, width, i * 16, 16, B, FAST, WHOLE)
            x = gl.load(p + (t.to(gl.int64) * st + d.to(gl.int64) * sd), mask=m, other=0.0)
            tile.slice(i * 16, 16, 0).store(x)


@gluon.jit
def _put(
    p, tile, row, T, width, st: gl.constexpr, sd: gl.constexpr,
    B: gl.constexpr, FAST: gl.constexpr, WHOLE: gl.constexpr, ADD: gl.constexpr = False,
):  # fmt: skip
    """Copy a chunk's rows from shared memory, or add them; few at a time: registers."""
    p += row.to(gl.int64) * st
    for i in gl.static_range(W // 16):
        t, d, m = _there(row, T, width, i * 16, 16, B, FAST, WHOLE)
        x = tile.slice(i * 16, 16, 0).load(ROWS128 if B == 128 else ROWS64)
        to = p + (t * st + d) if FAST else p + (t.to(gl.int64) * st + d.to(gl.int64) * sd)
        if ADD:
            x = (x.to(gl.float32) + gl.load(to, mask=m, other=0.0).to(gl.float32)).to(gl.bfloat16)
        gl.store(to, x, mask=m)


@gluon.jit
def _pairs(a, b):
    """Start the product of all pairs of a chunk, a b'."""
    o = gl.zeros([W, W], gl.float32, ACC64)
    return warpgroup_mma(a, b.permute((1, 0)), o, use_acc=False, is_async=True)


@gluon.jit
def _spans(weights, slot, UP: gl.constexpr, POWER: gl.constexpr):
    """Return what a gate weighs pairs of a chunk by, 0 where there is none, [W, W]."""
    s = gl.arange(0, W, layout=gl.SliceLayout(1, ACC64))[:, None]
    t = gl.arange(0, W, layout=gl.SliceLayout(0, ACC64))[None, :]
    rows = (_weigh(weights, slot, UNTIL, gl.SliceLayout(1, ACC64)) * POWER)[:, None]
    columns = (_weigh(weights, slot, UNTIL, gl.SliceLayout(0, ACC64)) * POWER)[None, :]
    span = columns - rows if UP else rows - columns
    return gl.exp2(gl.where((s <= t) if UP else (s >= t), span, NEVER))


@gluon.jit
def _masked(a, UP: gl.constexpr):
    """Return the pairs of a chunk without those that are none."""
    s = gl.arange(0, W, layout=gl.SliceLayout(1, ACC64))[:, None]
    t = gl.arange(0, W, layout=gl.SliceLayout(0, ACC64))[None, :]
    return gl.where((s <= t) if UP else (s >= t), a, 0.0)


@gluon.jit
def _put_pairs(tile, a, b, weights, slot, UP: gl.constexpr, POWER: gl.constexpr):
    """Leave in shared memory the pairs of a chunk, whose product was begun, masked and weighed."""
    a = _pairs(a, b)
    if POWER > 0:
        w = _spans(weights, slot, UP, POWER)  # while the product runs
        a = warpgroup_mma_wait(0, deps=[a]) * w
    else:
        a = _masked(warpgroup_mma_wait(0, deps=[a]), UP)
    tile.store(a.to(gl.bfloat16))


@gluon.jit
def _operand(S):
    """Return what registers feed a product with."""
    return gl.convert_layout(S.to(gl.bfloat16), A64)


@gluon.jit
def _weighed(x, pieces, slot, STATE: gl.constexpr, A: gl.constexpr):
    """Return a transposed operand as the gate weighs its tokens for a state, [64, W]."""
    N: gl.constexpr = pieces.shape[0] // 2
    at = slot * N + (2 * STATE if N == PIECES else 0)
    high = pieces.index(at).load(gl.SliceLayout(0, A))[None, :]
    low = pieces.index(at + 1).load(gl.SliceLayout(0, A))[None, :]
    given = [x.load(A), high, low]
    return gl.inline_asm_elementwise(
        WEIGHED, "=r,r,r,r", given, dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _scaled(x, scale, SCALED: gl.constexpr):
    """Return x times a factor, if it is not 1."""
    return x * scale if SCALED else x


@gluon.jit
def _rounded(o, out, scale, SCALED: gl.constexpr, SUM: gl.constexpr):
    """Return what is stored, [64, W]: with SUM, of what another has left in its place too."""
    o = _scaled(o, scale, SCALED)
    if SUM:
        o += out.load(ACC64).to(gl.float32)
    return o.to(gl.bfloat16)


@gluon.jit
def _total(S, ends, slot, POWER: gl.constexpr, ACC: gl.constexpr):
    """Return a state as it is a chunk later."""
    return S * _power(ends.index(slot).load(gl.SliceLayout(1, ACC)), POWER)[:, None]


@gluon.jit
def _by_column(x):
    """Return sums over rows in 32 parts, [32, W]: over the two rows that a thread has."""
    return gl.sum(x.reshape([4, 2, 8, W]), 1).reshape([32, W])


@gluon.jit
def _lines(tile):
    """Return a tile of pairs that nobody reads any more as 32 rows of W float32."""
    if NAMED:
        return tile.reinterpret(gl.float32, [32, W], LINES)
    else:
        return tile._reinterpret(gl.float32, [32, W], LINES)


@gluon.jit
def _added(lines):
    """Return the sum of all rows, one number a token."""
    return gl.sum(lines.load(COLUMNS), 0)


@gluon.jit
def _put_tokens(p, x, left):
    """Store one number a token."""
    t = gl.arange(0, W, layout=x.type.layout)
    gl.store(p + t, x, mask=t < left)


@gluon.jit
def _accumulated(x):
    """Return an operand in registers, [64, W], as an accumulator lies there."""
    return gl.convert_layout(x.to(gl.float32), ACC64)


@gluon.jit
def _kept(chunk, EVERY: gl.constexpr):
    """Whether states are kept before a chunk."""
    return (chunk > 0) & (chunk % EVERY == 0)


@gluon.jit
def _state_at(ROW: gl.constexpr, SIDE: gl.constexpr, ACC: gl.constexpr, N: gl.constexpr):
    """Return offsets of 64 rows and N columns of a kept state from its first row."""
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))[:, None]
    j = gl.arange(0, N, layout=gl.SliceLayout(0, ACC))[None, :]
    return (i + ROW) * SIDE + j
