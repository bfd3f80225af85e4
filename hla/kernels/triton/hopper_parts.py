"""What the sweeps of `hopper_backward` share: layouts, tiles in shared memory, weights of a gate.

The weights of a gate (`causal` defines them) lie in shared memory, those of a log gate put there by
the mover chunk by chunk, those of a decay once, of a whole chunk and of the last one. They are c_t
in base 2 as two float32 numbers, exp(c_t), exp(c_last - c_t) and exp(c_last); a pass of power p
takes the p-th powers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from ...device import elementwise

copy = async_copy.async_load if hasattr(async_copy, "async_load") else (
    async_copy.async_copy_global_to_shared
)  # fmt: skip
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a partition's threads

RESET = gl.constexpr(-1e6)  # what a log gate of -inf becomes
LEAST = gl.constexpr(elementwise.LEAST)  # what a decay of 0 becomes
LOG2E = gl.constexpr(1.4426950408889634)

W = gl.constexpr(64)  # tokens in a chunk
WEIGHTS = gl.constexpr(5)  # lists of a chunk: c in two parts, before, after, total
HIGH, LOW, BEFORE, AFTER, TOTAL = (gl.constexpr(i) for i in range(5))

# Layouts: of tiles in shared memory, of accumulators by their width, of what registers feed
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
LIST = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
ACC64 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ACC128 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
A64 = gl.constexpr(gl.DotOperandLayout(0, ACC64.value, 2))
A128 = gl.constexpr(gl.DotOperandLayout(0, ACC128.value, 2))
ROWS64 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # by 16 bytes a thread
ROWS128 = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
TOKENS = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # a chunk in each warp


@gluon.jit
def _sum(a, b):
    return a + b


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
def _put_weights(weights, slot, c, last):
    """Leave the weights of a chunk, by the sums of its gate in base 2, [W], float64."""
    at = slot * WEIGHTS
    high = c.to(gl.float32)
    weights.index(at + HIGH).store(high)
    weights.index(at + LOW).store((c - high.to(gl.float64)).to(gl.float32))
    weights.index(at + BEFORE).store(gl.exp2(high))
    weights.index(at + AFTER).store(gl.exp2((last - c).to(gl.float32)))
    weights.index(at + TOTAL).store(gl.exp2((last + c * 0.0).to(gl.float32)))


@gluon.jit
def _weigh(weights, slot, row: gl.constexpr, layout: gl.constexpr):
    """Return one list of a chunk's weights, [W]."""
    return weights.index(slot * WEIGHTS + row).load(layout)


@gluon.jit
def _put_decay(weights, p_gate, T, chunks):
    """Leave the weights of a decay: of a whole chunk, and of the last one."""
    g = gl.load(p_gate).to(gl.float64)
    log_g = gl.log(gl.where(g < LEAST, LEAST, g)) * LOG2E  # not maximum: a NaN stays
    t = gl.arange(0, W, layout=TOKENS)
    rest = T - (chunks - 1) * W
    _put_weights(weights, 0, (t + 1) * log_g, W * log_g)
    _put_weights(weights, 1, gl.where(t < rest, t + 1, rest) * log_g, rest * log_g)


@gluon.jit
def _put_gate(weights, slot, p_gate, sgt, row, T):
    """Leave the weights of a chunk by its log gate; zeros past the last token."""
    t = row + gl.arange(0, W, layout=TOKENS)
    a = gl.load(p_gate + t.to(gl.int64) * sgt, mask=t < T, other=0.0)
    a = gl.where(a < RESET, RESET, a).to(gl.float64) * LOG2E  # not maximum: a NaN stays
    _put_weights(weights, slot, gl.associative_scan(a, 0, _sum), gl.sum(a, 0))


@gluon.jit
def _slot(c, s, chunks, GATE: gl.constexpr):
    """Which weights a chunk has: a log gate's its own; of a decay all but the last the same."""
    if GATE == 1:
        return (c == chunks - 1).to(gl.int32)
    else:
        return s


@gluon.jit
def _state(
    p, s0, s1, rows, columns, factor,
    ROW: gl.constexpr, B: gl.constexpr, START: gl.constexpr,
):  # fmt: skip
    """Return 64 rows of a first state, [64, B], times a factor."""
    ACC: gl.constexpr = ACC128 if B == 128 else ACC64
    S = gl.zeros([64, B], gl.float32, ACC)
    if START:
        i = ROW + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)).to(gl.int64)[:, None]
        j = gl.arange(0, B, layout=gl.SliceLayout(0, ACC)).to(gl.int64)[None, :]
        S = gl.load(p + i * s0 + j * s1, mask=(i < rows) & (j < columns), other=0.0) * factor
    return S


@gluon.jit
def _leave(p, S, s0, s1, rows, columns, factor, ROW: gl.constexpr, B: gl.constexpr):
    """Store 64 rows of a last state, times a factor."""
    ACC: gl.constexpr = ACC128 if B == 128 else ACC64
    i = ROW + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)).to(gl.int64)[:, None]
    j = gl.arange(0, B, layout=gl.SliceLayout(0, ACC)).to(gl.int64)[None, :]
    gl.store(p + i * s0 + j * s1, S * factor, mask=(i < rows) & (j < columns))


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
        t, d, m = _there(row, T, width, 0, W, B, FAST, WHOLE)
        copy(tile, p + (t * st + d), mask=m)
    else:
        for i in gl.static_range(W // 16):
            t, d, m = _there(row, T, width, i * 16, 16, B, FAST, WHOLE)
            x = gl.load(p + (t.to(gl.int64) * st + d.to(gl.int64) * sd), mask=m, other=0.0)
            tile.slice(i * 16, 16, 0).store(x)


@gluon.jit
def _put(
    p, tile, row, T, width, st: gl.constexpr, sd: gl.constexpr,
    B: gl.constexpr, FAST: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Copy a chunk's rows from shared memory, few at a time: registers."""
    p += row.to(gl.int64) * st
    for i in gl.static_range(W // 16):
        t, d, m = _there(row, T, width, i * 16, 16, B, FAST, WHOLE)
        x = tile.slice(i * 16, 16, 0).load(ROWS128 if B == 128 else ROWS64)
        if FAST:
            gl.store(p + (t * st + d), x, mask=m)
        else:
            gl.store(p + (t.to(gl.int64) * st + d.to(gl.int64) * sd), x, mask=m)


@gluon.jit
def _pairs(a, b):
    """Start the product of all pairs of a chunk, a b'."""
    o = gl.zeros([W, W], gl.float32, ACC64)
    return warpgroup_mma(a, b.permute((1, 0)), o, use_acc=False, is_async=True)


@gluon.jit
def _put_pairs(tile, a, weights, slot, UP: gl.constexpr, POWER: gl.constexpr):
    """Leave the pairs of a chunk in shared memory, masked and weighed."""
    s = gl.arange(0, W, layout=gl.SliceLayout(1, ACC64))[:, None]
    t = gl.arange(0, W, layout=gl.SliceLayout(0, ACC64))[None, :]
    if POWER > 0:
        high = (
            _weigh(weights, slot, HIGH, gl.SliceLayout(0, ACC64))[None, :]
            - (_weigh(weights, slot, HIGH, gl.SliceLayout(1, ACC64))[:, None])
        )
        low = (
            _weigh(weights, slot, LOW, gl.SliceLayout(0, ACC64))[None, :]
            - (_weigh(weights, slot, LOW, gl.SliceLayout(1, ACC64))[:, None])
        )
        a *= gl.exp2((high + low) * (POWER if UP else -POWER))  # where it overflows no pair is
    a = gl.where((s <= t) if UP else (s >= t), a, 0.0)
    tile.store(a.to(gl.bfloat16))


@gluon.jit
def _operand(S):
    """Return what registers feed a product with."""
    return gl.convert_layout(S.to(gl.bfloat16), A64)


@gluon.jit
def _weighed(x, weights, slot, ROW: gl.constexpr, POWER: gl.constexpr, A: gl.constexpr):
    """Return a transposed operand as the gate weighs its tokens, [64, W]."""
    w = _power(_weigh(weights, slot, ROW, gl.SliceLayout(0, A)), POWER)
    return (x.load(A).to(gl.float32) * w[None, :]).to(gl.bfloat16)


@gluon.jit
def _total(S, weights, slot, POWER: gl.constexpr, ACC: gl.constexpr):
    """Return a state as it is a chunk later."""
    return S * _power(_weigh(weights, slot, TOTAL, gl.SliceLayout(1, ACC)), POWER)[:, None]
