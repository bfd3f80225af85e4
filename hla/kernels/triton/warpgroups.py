"""What kernels of warpgroups on Hopper share, in Gluon: layouts, copies of chunks, weights, states.

A chunk of W tokens lies in shared memory as rows of 64 or 128 columns, zero where there are none. A
gate's weights lie beside it, as lists of W: the logarithm c_t of the product up to t, in base 2,
exp(c_t) and exp(c_last - c_t), and apart exp(c_last). Sums are float64; what no float32 holds
counts as 2^-160, so that a reset subtracts like any gate and c keeps its digits beside it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...device import elementwise

copy = async_copy.async_load if hasattr(async_copy, "async_load") else (
    async_copy.async_copy_global_to_shared
)  # fmt: skip
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of a partition's threads

RESET = gl.constexpr(-160.0)  # log2 of what a gate of less than any float32 becomes
LEAST = gl.constexpr(elementwise.LEAST)  # what a decay of 0 becomes
LOG2E = gl.constexpr(1.4426950408889634)

W = gl.constexpr(64)  # tokens in a chunk
UNTIL, BEFORE, AFTER = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
ROWS, MADE, OUT, KEPT = (gl.constexpr(i) for i in range(4))  # of a mild decay: see `hopper`
LISTS = gl.constexpr(3)  # of a chunk's weights: log2 of the product up to t, that, and from t on

# Layouts: of tiles in shared memory, of accumulators by their width, of what registers feed
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
LIST = gl.constexpr(gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0]))
ACC64 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ACC128 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
A64 = gl.constexpr(gl.DotOperandLayout(0, ACC64.value, 2))
A128 = gl.constexpr(gl.DotOperandLayout(0, ACC128.value, 2))
ROWS64 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # by 16 bytes a thread
ROWS128 = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
ONES64 = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [2, 2], [1, 0]))  # by a column a thread
ONES128 = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0]))
TOKENS = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # a chunk in each warp


@gluon.jit
def follow():
    """Let the kernel after this one begin, and wait for the one before it (`launch.follows`)."""
    gdc_launch_dependents()
    gdc_wait()


@gluon.jit
def add(a, b):
    """Return a sum, for a scan."""
    return a + b


@gluon.jit
def barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """Allocate barriers, each of so many arrivals.

    Of those that nobody uses Triton gives the memory away, still initialised: what is there then is
    not defined (an H100 left NaN).
    """
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def put_weights(weights, ends, at, c, last):
    """Leave the weights of a chunk by the sums of its gate in base 2, [W] and the last, float64."""
    weights.index(at * LISTS + UNTIL).store(c.to(gl.float32))
    weights.index(at * LISTS + BEFORE).store(gl.exp2(c.to(gl.float32)))
    weights.index(at * LISTS + AFTER).store(gl.exp2((last - c).to(gl.float32)))
    ends.index(at).store(gl.exp2(gl.full([1], last, gl.float64, TOKENS).to(gl.float32)))


@gluon.jit
def weigh_rows(tile, factors, B: gl.constexpr):
    """Multiply a chunk's rows in shared memory by a list; with few barriers, of N rows at once."""
    BY: gl.constexpr = ROWS128 if B == 128 else ROWS64
    N: gl.constexpr = 32 if B == 128 else W
    for i in gl.static_range(W // N):
        rows = tile.slice(i * N, N, 0)
        by = factors.slice(i * N, N, 0).load(gl.SliceLayout(1, BY))
        rows.store((rows.load(BY).to(gl.float32) * by[:, None]).to(gl.bfloat16))


@gluon.jit
def load_state(
    p_start, sd, sv, D, V, unwrite,
    FIRST: gl.constexpr, BD: gl.constexpr, START: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Return 64 rows of a first state, [values, keys]: a transpose by its strides."""
    ACC: gl.constexpr = ACC128 if BD == 128 else ACC64
    S = gl.zeros([64, BD], gl.float32, ACC)
    if START:
        v = FIRST + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
        d = gl.arange(0, BD, layout=gl.SliceLayout(0, ACC))
        p = p_start + v.to(gl.int64)[:, None] * sv + d.to(gl.int64)[None, :] * sd
        S = gl.load(p, mask=(v < V)[:, None] & (d < D)[None, :], other=0.0).to(gl.float32)
        if SCALED:
            S *= unwrite
    return S


@gluon.jit
def store_half(
    p_end, S, sd, sv, D, V, write,
    FIRST: gl.constexpr, BD: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Store 64 rows of a last state, as `load_state` has them."""
    ACC: gl.constexpr = ACC128 if BD == 128 else ACC64
    v = FIRST + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    d = gl.arange(0, BD, layout=gl.SliceLayout(0, ACC))
    p = p_end + v.to(gl.int64)[:, None] * sv + d.to(gl.int64)[None, :] * sd
    if SCALED:
        S *= write
    gl.store(p, S, mask=(v < V)[:, None] & (d < D)[None, :])


@gluon.jit
def store_state(
    p_end, S0, S1, sd, sv, writes, D, V, HALVES: gl.constexpr, BD: gl.constexpr
):  # fmt: skip
    """Store the state after the last token, in the head that is to."""
    if writes:
        store_half(p_end, S0, sd, sv, D, V, 1.0, 0, BD, False)
        if HALVES == 2:
            store_half(p_end, S1, sd, sv, D, V, 1.0, 64, BD, False)


@gluon.jit
def load_chunk(
    tile, p, row, T, width, st, sd,
    B: gl.constexpr, FAST: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Copy a chunk's rows to shared memory; rows and columns that are not there are zeros."""
    if FAST:
        ROWS: gl.constexpr = ROWS128 if B == 128 else ROWS64
        t = row + gl.arange(0, W, layout=gl.SliceLayout(1, ROWS))
        d = gl.arange(0, B, layout=gl.SliceLayout(0, ROWS))
        m = (t < T)[:, None]
        if not WHOLE:
            m = m & (d // 8 < width // 8)[None, :]
        copy(tile, p + t.to(gl.int64)[:, None] * st * 8 + d.to(gl.int64)[None, :], mask=m)
    else:
        ONES: gl.constexpr = ONES128 if B == 128 else ONES64
        for i in gl.static_range(W // 8):
            t = row + i * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, ONES))
            d = gl.arange(0, B, layout=gl.SliceLayout(0, ONES))
            m = (t < T)[:, None] & (d < width)[None, :]
            at = t.to(gl.int64)[:, None] * st + d.to(gl.int64)[None, :] * sd
            tile.slice(i * 8, 8, 0).store(gl.load(p + at, mask=m, other=0.0))
            barrier()  # else all rows would be in registers at once


@gluon.jit
def arrive_full(bar, FAST: gl.constexpr):
    """Arrive once what was copied is there: with each thread where copies are asynchronous."""
    if FAST:
        async_copy.mbarrier_arrive(bar, increment_count=False)
    else:
        mbarrier.arrive(bar, count=1)


@gluon.jit
def store_chunk(
    p, tile, factors, row, T, width, st, sd,
    B: gl.constexpr, FAST: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Copy a chunk's rows from shared memory, times a list if there is one."""
    N: gl.constexpr = 16 if FAST else 8
    FULL: gl.constexpr = ROWS128 if B == 128 else ROWS64
    ONES: gl.constexpr = ONES128 if B == 128 else ONES64
    BY: gl.constexpr = FULL if FAST else ONES
    for i in gl.static_range(W // N):
        t = row + i * N + gl.arange(0, N, layout=gl.SliceLayout(1, BY))
        d = gl.arange(0, B, layout=gl.SliceLayout(0, BY))
        x = tile.slice(i * N, N, 0).load(BY)
        if factors is not None:
            by = factors.slice(i * N, N, 0).load(gl.SliceLayout(1, BY))
            x = (x.to(gl.float32) * by[:, None]).to(gl.bfloat16)
        m = (t < T)[:, None]
        if FAST:
            if not WHOLE:
                m = m & (d // 8 < width // 8)[None, :]
            gl.store(p + t.to(gl.int64)[:, None] * st * 8 + d.to(gl.int64)[None, :], x, mask=m)
        else:
            m = m & (d < width)[None, :]
            at = t.to(gl.int64)[:, None] * st + d.to(gl.int64)[None, :] * sd
            gl.store(p + at, x, mask=m)
            barrier()


@gluon.jit
def load_gate(p_gate, sgt, row, T):
    """Return the log gate of a chunk, [W]; zeros past the last token."""
    t = row + gl.arange(0, W, layout=TOKENS)
    return gl.load(p_gate + t.to(gl.int64) * sgt, mask=t < T, other=0.0)


@gluon.jit
def is_first(i_0, i_1, i_2, s0, s1, s2):
    """Whether a head is the first of those that share an array, of strides 0."""
    return ((s0 != 0) | (i_0 == 0)) & ((s1 != 0) | (i_1 == 0)) & ((s2 != 0) | (i_2 == 0))
