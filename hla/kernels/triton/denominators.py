"""Denominators of the fused forward on Hopper: what its third warpgroup sums beside moving chunks.

A denominator is the pass of one column of ones. Its sums are no products of matrices: they run in
float32, from what lies in shared memory for the owners anyway,

    one = Q m + A 1            m = m + K' 1               (of u: ahla, hla3)
    den = Q n + B (one or 1)   n = n + (Y or K)' (one or 1)

with A and B as the owners' products read them, weighed and in bfloat16. An owner then multiplies
what it made by 1 / (den + eps) as it leaves it.

Each sum is a pass over a tile, 64 values a thread and chunk (pairs 32): hla2 has two of rows and
one of pairs, about 500 instructions a thread of the 5300 cycles that a chunk takes. Only den itself
goes to memory, 4 bytes a token and head, where it is requested. One H100, B = 8, T = 4096, H = 16,
D = V = 128, without a gradient: hla2 0.319 ms, with a log gate 0.435, ahla 0.327, hla3 0.634 (by
passes 0.596, 0.808, 0.704, 0.739; without denominators 0.193 and, hla3, 0.313): the second owner
waits for the sums of its chunk, 8700 cycles. A chunk ahead they were no faster for hla2 (0.364).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .warpgroups import AFTER, BEFORE, LISTS, ROWS64, W

# A warp has all rows of its columns, so that sums over rows cross no warps
SUMS64 = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [1, 4], [1, 0]))
SUMS128 = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [1, 4], [1, 0]))
ONES, DOTS_M, DOTS_N, DIVISOR = (gl.constexpr(i) for i in range(4))  # lists of a chunk, [W] each
COUNT = gl.constexpr(4)


@gluon.jit
def load_sum(p, sd, D, B: gl.constexpr):
    """Return the first state of a denominator, [B]; zeros where there is none."""
    SUMS: gl.constexpr = SUMS128 if B == 128 else SUMS64
    d = gl.arange(0, B, layout=gl.SliceLayout(0, SUMS))
    if p is None:
        return gl.zeros([B], gl.float32, gl.SliceLayout(0, SUMS))
    else:
        return gl.load(p + d.to(gl.int64) * sd, mask=d < D, other=0.0).to(gl.float32)


@gluon.jit
def store_sum(p, x, sd, writes, D, B: gl.constexpr):
    """Store its last one, in the head that is to."""
    if p is not None:
        SUMS: gl.constexpr = SUMS128 if B == 128 else SUMS64
        d = gl.arange(0, B, layout=gl.SliceLayout(0, SUMS))
        gl.store(p + d.to(gl.int64) * sd, x, mask=(d < D) & writes)


@gluon.jit
def _dots(o, x, state):
    """Leave the products of rows with a state, [W]."""
    state = gl.convert_layout(state, gl.SliceLayout(0, ROWS64))
    for i in gl.static_range(W // 16):
        rows = x.slice(i * 16, 16, 0).load(ROWS64).to(gl.float32)
        o.slice(i * 16, 16, 0).store(gl.sum(rows * state[None, :], 1))


@gluon.jit
def _columns(x, after, ones, B: gl.constexpr, GATED: gl.constexpr, ONE: gl.constexpr):
    """Return the sums of columns, of rows as two lists weigh them, [B]."""
    SUMS: gl.constexpr = SUMS128 if B == 128 else SUMS64
    total = gl.zeros([16, B], gl.float32, SUMS)
    for i in gl.static_range(W // 16):
        rows = x.slice(i * 16, 16, 0).load(SUMS).to(gl.float32)
        if GATED:
            rows *= after.slice(i * 16, 16, 0).load(gl.SliceLayout(1, SUMS))[:, None]
        if ONE:
            rows *= ones.slice(i * 16, 16, 0).load(gl.SliceLayout(1, SUMS))[:, None]
        total += rows
    return gl.sum(total, 0)


@gluon.jit
def read_states(
    lists, b_q, m, n, ONE: gl.constexpr, DEN: gl.constexpr
):  # fmt: skip
    """Leave what a chunk's queries read from the states."""
    if ONE:
        _dots(lists.index(DOTS_M), b_q, m)
    if DEN:
        _dots(lists.index(DOTS_N), b_q, n)


@gluon.jit
def read_pairs(
    lists, dots: gl.constexpr, tile, weights, at, p, row, T, st, scale,
    ONE: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Return a chunk's denominators, [W], from what its pairs and its states give; store them."""
    LIST_OF: gl.constexpr = gl.SliceLayout(0, SUMS64)
    x = lists.index(dots).load(LIST_OF)
    if GATED:
        x *= weights.index(at * LISTS + BEFORE).load(LIST_OF)
    x = (x + _columns(tile, None, lists.index(ONES), W, False, ONE)) * scale
    if p is not None:
        t = row + gl.arange(0, W, layout=LIST_OF)
        gl.store(p + t.to(gl.int64) * st, x, mask=t < T)
    return x


@gluon.jit
def add_rows(
    state, rows, lists, weights, ends, at,
    B: gl.constexpr, ONE: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Return a state after a chunk."""
    SUMS: gl.constexpr = SUMS128 if B == 128 else SUMS64
    after = weights
    if GATED:
        state *= ends.index(at).load(gl.SliceLayout(0, SUMS))
        after = weights.index(at * LISTS + AFTER)
    return state + _columns(rows, after, lists.index(ONES), B, GATED, ONE)
