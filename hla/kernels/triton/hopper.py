"""Two causal passes on Hopper, the second of what the first makes (design: two state owners).

    hla2: y_t = pass(q, k, k), o_t = pass(q, y, v)    ahla: u_t = pass(q, k, v), o_t = pass(q, k, u)

A program does a head with three warpgroups. Two own a state each, transposed, in float32
registers: the first makes y (or u), up to two chunks ahead of the second, which makes o; only y
passes between them, in shared memory. The third loads q, k and v, each as soon as a buffer is free
for it (freed together they kept one chunk in flight: 0.228 ms, not 0.198), and stores y and o. A
chunk of W = 64 tokens, of keys K and values X of either pass, operands as they are stored:

    A' = upper(K Q')  [W, W]    O' = S' Q' + X' A'  [V, W]    S' = S' + X' K  [V, D]

S' enters its product from registers, in bfloat16 and by halves of 64 values: a half is read and
its O' stored before the other is touched, else registers would not suffice. ahla has one A'.

Denominators are summed by the third warpgroup (`denominators`), while the owners multiply.

The weights of a gate (`warpgroups`; `causal` defines them) are those of each pass's power. A
decay's lie ready, a log gate's are put beside q by the third warpgroup. Where a head's decay is
mild, a chunk leaving 2^-64 of a state at the least, weights are products of two factors, and owners
multiply as without a gate. With r_t = exp(c_last - c_t), what is left of a token,

    K is r^(1/2) k (ahla r k, hla3's V r^(1/2) v), weighed in shared memory by the third warpgroup;
    S' fades before it is read, so what is read is r y, which goes on as r^2 y
    (ahla u itself, hla3 r^(3/2) y and u), and r^p o, which leave as y and o, times r^-p.

Other gates take weights of pairs, of results, of values and of states.

Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024 (y too: 1280). Operations:
197 k (hla2). At 3.0 TB/s and 790 TFLOP/s the bytes bind: 0.179 ms for B = 8, T = 4096, H = 16 (y
too: 0.224). One H100 took 0.193 (93%), 0.242 with y, ahla 0.192; with a mild decay 0.206 and 0.190,
with other gates 0.241 to 0.252 and 0.219: there the owners' own chains bind. No atomics; bits
depend on nothing but the head's data.

Each product that reads registers is awaited before they change; assemblers up to CUDA 12.9 can
reuse them before (triton-lang/triton 11781), which tests/test_hopper.py looks for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .denominators import (
    COUNT,
    DIVISOR,
    DOTS_M,
    DOTS_N,
    ONES,
    add_rows,
    load_sum,
    read_pairs,
    read_states,
    store_sum,
)
from .warpgroups import (
    A64,
    A128,
    ACC64,
    ACC128,
    AFTER,
    BEFORE,
    KEPT,
    LEAST,
    LIST,
    LISTS,
    LOG2E,
    MADE,
    OUT,
    RESET,
    ROWS,
    TILE,
    TOKENS,
    UNTIL,
    W,
    add,
    arrive_full,
    barrier,
    barriers,
    follow,
    is_first,
    load_chunk,
    load_gate,
    load_state,
    put_weights,
    store_chunk,
    store_state,
    weigh_rows,
)

AHEAD = gl.constexpr(4)  # chunks of q in shared memory
FAINT = gl.constexpr(-64.0)  # log2 of what a mild decay leaves, at the least, of a chunk's state


@gluon.jit
def _is_mild(p_gate, POWER: gl.constexpr):
    """Whether a decay leaves more than FAINT of a chunk's state."""
    return gl.log2(gl.load(p_gate)) * (W * POWER) >= FAINT


@gluon.jit
def _put_factors(weights, ends, slot, rest, last, POWER1: gl.constexpr, POWER2: gl.constexpr):
    """Leave a mild decay's factors, by log2 of what is left of a token and of the state."""
    GROUPS: gl.constexpr = 1 if POWER1 == POWER2 else 2
    BY_ROWS: gl.constexpr = 1.0 if POWER2 == 1 else 0.5
    BY_MADE: gl.constexpr = -1.0 if POWER2 == 1 else (1.0 if POWER2 == 2 else 0.5)
    at = slot * GROUPS * LISTS
    weights.index(at + ROWS).store(gl.exp2(rest * BY_ROWS))
    weights.index(at + MADE).store(gl.exp2(rest * BY_MADE))
    weights.index(at + OUT).store(gl.exp2(rest * (-1.0 * POWER2)))
    end = gl.full([1], last, gl.float32, TOKENS)
    ends.index(slot * GROUPS).store(gl.exp2(end * POWER1))
    if GROUPS == 2:
        weights.index(at + KEPT).store(gl.exp2(rest * (-2.0 if POWER2 == 2 else -1.5)))
        ends.index(slot * 2 + 1).store(gl.exp2(end * POWER2))


@gluon.jit
def _put(
    weights, ends, slot, c, last,
    POWER1: gl.constexpr, POWER2: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """Leave the weights of a chunk in both passes, one list where their powers are one."""
    if MILD:
        _put_factors(weights, ends, slot, (last - c).to(gl.float32), last.to(gl.float32),
                     POWER1, POWER2)  # fmt: skip
    elif POWER1 == POWER2:
        put_weights(weights, ends, slot, c * POWER1, last * POWER1)
    else:
        put_weights(weights, ends, slot * 2, c * POWER1, last * POWER1)
        put_weights(weights, ends, slot * 2 + 1, c * POWER2, last * POWER2)


@gluon.jit
def _put_decay(
    weights, ends, p_gate, T, chunks,
    POWER1: gl.constexpr, POWER2: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """Leave the weights of a decay in a whole chunk and, behind them, in the last one."""
    g = gl.load(p_gate).to(gl.float64)
    log_g = gl.log(gl.where(g < LEAST, LEAST, g)) * LOG2E  # not maximum: a NaN stays
    t = gl.arange(0, W, layout=TOKENS)
    rest = T - (chunks - 1) * W
    c = gl.where(t < rest, t + 1, rest) * log_g
    _put(weights, ends, 0, (t + 1) * log_g, W * log_g, POWER1, POWER2, MILD)
    _put(weights, ends, 1, c, rest * log_g, POWER1, POWER2, MILD)


@gluon.jit
def _begin(b_k, b_qT):
    """Begin K Q'."""
    a = gl.zeros([W, W], gl.float32, ACC64)
    return warpgroup_mma(b_k, b_qT, a, use_acc=False, is_async=True)


@gluon.jit
def _pairs(tile, a, weights, at, GATED: gl.constexpr):
    """Leave A' = upper(K Q'), weighed."""
    s = gl.arange(0, W, layout=gl.SliceLayout(1, ACC64))
    t = gl.arange(0, W, layout=gl.SliceLayout(0, ACC64))
    a = warpgroup_mma_wait(0, deps=[a])
    if GATED:
        until = weights.index(at * LISTS + UNTIL)
        c_s, c_t = until.load(gl.SliceLayout(1, ACC64)), until.load(gl.SliceLayout(0, ACC64))
        a *= gl.exp2(c_t[None, :] - c_s[:, None])  # where it overflows no pair is
    a = gl.where(s[:, None] <= t[None, :], a, 0.0)
    tile.store(a.to(gl.bfloat16))
    fence_async_shared()
    barrier()


@gluon.jit
def _read(
    S, b_qT, b_xT, tile, weights, ends, at,
    FIRST: gl.constexpr, BD: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Begin one half of a Q S + A X; return it, and the state as the gate leaves it."""
    a = gl.convert_layout(S.to(gl.bfloat16), A64)
    o = gl.zeros([64, W], gl.float32, ACC64)
    o = warpgroup_mma(a, b_qT, o, use_acc=False, is_async=True)
    if GATED:
        S = _fade(S, ends, at, BD)  # as the product runs
        before = weights.index(at * LISTS + BEFORE).load(gl.SliceLayout(0, ACC64))
        o = warpgroup_mma_wait(0, deps=[o])
        o *= before[None, :]
    return warpgroup_mma(b_xT.slice(FIRST, 64, 0), tile, o, is_async=True), S


@gluon.jit
def _fade(S, ends, at, BD: gl.constexpr):
    """Return a state, weighed by its chunk's gate."""
    ACC: gl.constexpr = ACC128 if BD == 128 else ACC64
    return S * ends.index(at).load(gl.SliceLayout(1, ACC))[:, None]


@gluon.jit
def _leave(
    made, p_o, o, row, T, V, sot, sod, scale, factors, lists,
    FIRST: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Store one half of what was read once it is there, times ``factors`` if there are any.

    As float32 at p_o; in shared memory as bfloat16, divided where there are ``lists``.
    """
    o = warpgroup_mma_wait(0, deps=[o])
    if factors is not None:
        o *= factors.load(gl.SliceLayout(0, ACC64))[None, :]
    if SCALED:
        o *= scale
    if p_o is not None:
        v = FIRST + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC64))
        t = row + gl.arange(0, W, layout=gl.SliceLayout(0, ACC64))
        p = p_o + t.to(gl.int64)[None, :] * sot + v.to(gl.int64)[:, None] * sod
        gl.store(p, o, mask=(v < V)[:, None] & (t < T)[None, :])
    if made is not None:
        if lists is not None:
            o *= lists.index(DIVISOR).load(gl.SliceLayout(0, ACC64))[None, :]
        made.permute((1, 0)).slice(FIRST, 64, 0).store(o.to(gl.bfloat16))


@gluon.jit
def _weighed(b_xT, weights, at, FIRST: gl.constexpr, BD: gl.constexpr, GATED: gl.constexpr):
    """Return one half of the values as they enter the state, [64, W]."""
    x = b_xT.slice(FIRST, 64, 0)
    if GATED:
        A: gl.constexpr = A128 if BD == 128 else A64
        after = weights.index(at * LISTS + AFTER).load(gl.SliceLayout(0, A))
        return (x.load(A).to(gl.float32) * after[None, :]).to(gl.bfloat16)
    else:
        return x


@gluon.jit
def _reads(
    made, p_o, S0, S1, b_qT, b_xT, tile, weights, ends, at, c, T, V, sot, sod, scale,
    factors, lists, divided, HALVES: gl.constexpr, BD: gl.constexpr, GATED: gl.constexpr,
    SCALED: gl.constexpr, READ: gl.constexpr,
):  # fmt: skip
    """Leave O of a chunk; return both halves of the state and the values as the gate has them."""
    if READ:
        o, S0 = _read(S0, b_qT, b_xT, tile, weights, ends, at, 0, BD, GATED)
        if divided is not None:
            o = warpgroup_mma_wait(0, deps=[o])
            mbarrier.wait(divided.index(0), c & 1)
        if HALVES == 2:
            _leave(made, p_o, o, c * W, T, V, sot, sod, scale, factors, lists, 0, SCALED)
            o, S1 = _read(S1, b_qT, b_xT, tile, weights, ends, at, 64, BD, GATED)
    elif GATED:
        S0, S1 = _fade(S0, ends, at, BD), _fade(S1, ends, at, BD)
    x0 = _weighed(b_xT, weights, at, 0, BD, GATED)
    x1 = x0
    if HALVES == 2:
        x1 = _weighed(b_xT, weights, at, 64, BD, GATED)
    if READ:
        half: gl.constexpr = 64 * HALVES - 64
        _leave(made, p_o, o, c * W, T, V, sot, sod, scale, factors, lists, half, SCALED)
    return S0, S1, x0, x1


@gluon.jit
def _update(S0, S1, x0, x1, b_k, HALVES: gl.constexpr):
    """Return both halves of S' + X' K."""
    S0 = warpgroup_mma(x0, b_k, S0, is_async=True)
    if HALVES == 2:
        S1 = warpgroup_mma(x1, b_k, S1, is_async=True)
        S0, S1 = warpgroup_mma_wait(0, deps=[S0, S1])
    else:
        S0 = warpgroup_mma_wait(0, deps=[S0])
    return S0, S1


@gluon.jit
def _at(c, i_q, chunks, GATE: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Where the weights of a chunk lie; of a decay all chunks but the last have the same."""
    if GATE == 1:
        return (c == chunks - 1).to(gl.int32) * GROUPS + GROUP
    else:
        return i_q * GROUPS + GROUP


@gluon.jit
def _own_first(
    k_full, MILD: gl.constexpr,
    qs, ks, xs, made, tiles, weights, ends, q_full, q_free, k_free, v_full, v_free,
    there, taken, chunks, p_start, ssd, ssv, p_end, sed, sev, writes, D, V, scale,
    HALVES: gl.constexpr, BD: gl.constexpr, AHLA: gl.constexpr, HANDS: gl.constexpr,
    GATE: gl.constexpr, GROUPS: gl.constexpr, SCALED: gl.constexpr,
    START: gl.constexpr, END: gl.constexpr,
    Q: gl.constexpr, K: gl.constexpr, V_: gl.constexpr,
):  # fmt: skip
    """Own the state of the first pass; pass on what it makes and, where requested, its A'."""
    GATED: gl.constexpr = GATE > 0 and not MILD
    S0 = load_state(p_start, ssd, ssv, D, V, 1.0, 0, BD, START, False)
    S1 = S0
    if HALVES == 2:
        S1 = load_state(p_start, ssd, ssv, D, V, 1.0, 64, BD, START, False)
    for c in range(chunks):
        i_q, i_k, i_v, h = c % Q, c % K, c % V_, c % 2
        at = _at(c, i_q, chunks, GATE, GROUPS, 0)
        b_qT, b_k, made_h = qs.index(i_q).permute((1, 0)), ks.index(i_k), made.index(h)
        b_xT, tile = b_k.permute((1, 0)), tiles.index(h if HANDS else 0)
        mbarrier.wait(q_full.index(i_q), (c // Q) & 1)
        mbarrier.wait(k_full.index(i_k), (c // K) & 1)
        if AHLA:
            b_xT = xs.index(i_v).permute((1, 0))
        if HANDS:
            mbarrier.wait(taken.index(h), ((c // 2) & 1) ^ 1)
        fence_async_shared()
        a = _begin(b_k, b_qT)
        if MILD:
            S0, S1 = _fade(S0, ends, at, BD), _fade(S1, ends, at, BD)
        _pairs(tile, a, weights, at, GATED)
        if AHLA:
            mbarrier.wait(v_full.index(i_v), (c // V_) & 1)
            fence_async_shared()
        if not HANDS:
            mbarrier.wait(taken.index(h), ((c // 2) & 1) ^ 1)
        factors = None
        if MILD:
            factors = weights.index(at * LISTS + MADE)
        S0, S1, x0, x1 = _reads(
            made_h, None, S0, S1, b_qT, b_xT, tile, weights, ends, at, c, 0, 0, 0, 0, scale,
            factors, None, None, HALVES, BD, GATED, SCALED, True,
        )  # fmt: skip
        fence_async_shared()
        mbarrier.arrive(there.index(h), count=1)
        S0, S1 = _update(S0, S1, x0, x1, b_k, HALVES)
        mbarrier.arrive(k_free.index(i_k), count=1)
        mbarrier.arrive(q_free.index(i_q), count=1)
        if AHLA:
            mbarrier.arrive(v_free.index(i_v), count=1)
    if END:
        store_state(p_end, S0, S1, sed, sev, writes, D, V, HALVES, BD)


@gluon.jit
def _own_second(
    MILD: gl.constexpr,
    qs, ks, xs, made, out, tiles, weights, ends, q_full, q_free, k_free, v_full, v_free,
    there, taken, ready, stored, paired, divided, lists, chunks, p_o, T, sot, sod,
    p_start, ssd, ssv, p_end, sed, sev, writes, D, V, scale,
    HALVES: gl.constexpr, BD: gl.constexpr, AHLA: gl.constexpr,
    GATE: gl.constexpr, GROUPS: gl.constexpr, SCALED: gl.constexpr, READ: gl.constexpr,
    START: gl.constexpr, END: gl.constexpr,
    Q: gl.constexpr, K: gl.constexpr, V_: gl.constexpr,
):  # fmt: skip
    """Own the state of the second pass, whose keys (of ahla: whose values) the first made."""
    GATED: gl.constexpr = GATE > 0 and not MILD
    S0 = load_state(p_start, ssd, ssv, D, V, 1.0, 0, BD, START, False)
    S1 = S0
    if HALVES == 2:
        S1 = load_state(p_start, ssd, ssv, D, V, 1.0, 64, BD, START, False)
    for c in range(chunks):
        i_q, i_k, i_v, h = c % Q, c % K, c % V_, c % 2
        at = _at(c, i_q, chunks, GATE, GROUPS, GROUPS - 1)
        factors = None
        if MILD:
            factors = weights.index(_at(c, i_q, chunks, GATE, GROUPS, 0) * LISTS + OUT)
        b_qT, out_0 = qs.index(i_q).permute((1, 0)), None
        if out is not None:
            out_0 = out.index(0)
        if AHLA:
            b_k, b_xT, tile = ks.index(i_k), made.index(h).permute((1, 0)), tiles.index(h)
        else:
            b_k, b_xT, tile = made.index(h), xs.index(i_v).permute((1, 0)), tiles.index(1)
        mbarrier.wait(q_full.index(i_q), (c // Q) & 1)
        mbarrier.wait(there.index(h), (c // 2) & 1)
        fence_async_shared()
        if READ:
            if not AHLA:
                a = _begin(b_k, b_qT)
                if MILD:
                    S0, S1 = _fade(S0, ends, at, BD), _fade(S1, ends, at, BD)
                _pairs(tile, a, weights, at, GATED)
                if divided is not None:
                    mbarrier.arrive(paired.index(0), count=1)
            if out is not None:
                mbarrier.wait(stored.index(0), (c & 1) ^ 1)
        if not AHLA:
            mbarrier.wait(v_full.index(i_v), (c // V_) & 1)
            fence_async_shared()
        if MILD and (AHLA or not READ):
            S0, S1 = _fade(S0, ends, at, BD), _fade(S1, ends, at, BD)
        S0, S1, x0, x1 = _reads(
            out_0, p_o, S0, S1, b_qT, b_xT, tile, weights, ends, at, c, T, V, sot, sod, scale,
            factors, lists, divided, HALVES, BD, GATED, SCALED, READ,
        )  # fmt: skip
        if READ:
            if out is not None:
                mbarrier.arrive(ready.index(0), count=1)
            if GATE < 2:
                mbarrier.arrive(q_free.index(i_q), count=1)
        S0, S1 = _update(S0, S1, x0, x1, b_k, HALVES)
        if GATE == 2 or not READ:
            mbarrier.arrive(q_free.index(i_q), count=1)
        if AHLA:
            mbarrier.arrive(k_free.index(i_k), count=1)
        else:
            mbarrier.arrive(v_free.index(i_v), count=1)
        mbarrier.arrive(taken.index(h), count=1)
    if END:
        store_state(p_end, S0, S1, sed, sev, writes, D, V, HALVES, BD)


@gluon.jit
def _sum(
    c, qs, ks, made, tiles, weights, ends, lists, q_full, k_full, there, paired, divided, chunks,
    m, n, p_one, T_one, sone, scale_one, p_den, T_den, sden, scale_den, eps,
    BD: gl.constexpr, AHLA: gl.constexpr, GATE: gl.constexpr, GROUPS: gl.constexpr,
    ONE: gl.constexpr, TILE_1: gl.constexpr, Q: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """Leave the denominators of a chunk; return their states after it (`denominators`)."""
    i_q, i_k, h = c % Q, c % K, c % 2
    at1 = _at(c, i_q, chunks, GATE, GROUPS, 0)
    at2 = _at(c, i_q, chunks, GATE, GROUPS, GROUPS - 1)
    mbarrier.wait(q_full.index(i_q), (c // Q) & 1)
    read_states(lists, qs.index(i_q), m, n, ONE, divided is not None)
    mbarrier.wait(there.index(h), (c // 2) & 1)
    if ONE:
        one = read_pairs(
            lists, DOTS_M, tiles.index(h), weights, at1, p_one, c * W, T_one, sone, scale_one,
            False, GATE > 0,
        )  # fmt: skip
        lists.index(ONES).store(one)
        mbarrier.wait(k_full.index(i_k), (c // K) & 1)
        m = add_rows(m, ks.index(i_k), lists, weights, ends, at1, BD, False, GATE > 0)
    if divided is not None:
        tile = tiles.index(h if AHLA else TILE_1)
        if not AHLA:
            mbarrier.wait(paired.index(0), c & 1)
        den = read_pairs(
            lists, DOTS_N, tile, weights, at2, p_den, c * W, T_den, sden, scale_den, ONE, GATE > 0
        )
        if eps is not None:
            lists.index(DIVISOR).store(1.0 / (den + eps))
        mbarrier.arrive(divided.index(0), count=1)
    keys = ks.index(i_k) if AHLA else made.index(h)
    return m, add_rows(n, keys, lists, weights, ends, at2, BD, ONE, GATE > 0)


@gluon.jit
def _keep(
    e, p_y, made, there, p_u, us, u_there, u_taken, weights, chunks,
    T, T_y, width, syt, syd, T_u, V, sut, sud,
    BY: gl.constexpr, BV: gl.constexpr, GATE: gl.constexpr, MILD: gl.constexpr,
    GROUPS: gl.constexpr, KEEP: gl.constexpr, KEEP_U: gl.constexpr, WAITED: gl.constexpr,
    FAST: gl.constexpr, WHOLE_Y: gl.constexpr, WHOLE_V: gl.constexpr, Q: gl.constexpr,
):  # fmt: skip
    """Store y and u of a chunk."""
    h, row = e % 2, gl.minimum(e * W, T)
    at = _at(e, e % Q, chunks, GATE, GROUPS, 0)
    factors = None
    if MILD and GROUPS == 2:  # ahla's u is what is made
        factors = weights.index(at * LISTS + KEPT)
    if KEEP:
        if not WAITED:
            mbarrier.wait(there.index(h), (e // 2) & 1)
        tile = made.index(h)
        store_chunk(p_y, tile, factors, row, T_y, width, syt, syd, BY, FAST, WHOLE_Y)
    if KEEP_U:
        mbarrier.wait(u_there.index(0), e & 1)
        store_chunk(p_u, us.index(0), factors, row, T_u, V, sut, sud, BV, FAST, WHOLE_V)
        mbarrier.arrive(u_taken.index(0), count=1)


@gluon.jit
def _move(
    k_ready, v_ready, MILD: gl.constexpr,
    p_q, p_k, p_v, p_y, p_u, p_o, p_gate, qs, ks, vs, made, us, out, weights, ends,
    q_full, q_free, k_full, k_free, v_full, v_free, there, taken, u_there, u_taken, ready, stored,
    chunks, T, T_y, T_u, D, V, sqt, sqd, skt, skd, svt, svd, syt, syd, sut, sud, sot, sod, sgt,
    tiles, lists, paired, divided, p_one, T_one, sone, scale_one, p_den, T_den, sden, scale_den,
    eps, p_m, smd, p_m_end, smed, writes_m, p_n, snd, p_n_end, sned, writes_n,
    BD: gl.constexpr, BV: gl.constexpr, AHLA: gl.constexpr,
    GATE: gl.constexpr, POWER1: gl.constexpr, POWER2: gl.constexpr,
    READ: gl.constexpr, KEEP: gl.constexpr, KEEP_U: gl.constexpr, SUMS: gl.constexpr,
    ONE: gl.constexpr, TILE_1: gl.constexpr, FAST: gl.constexpr,
    WHOLE_D: gl.constexpr, WHOLE_V: gl.constexpr, K_LATER: gl.constexpr, V_LATER: gl.constexpr,
    Q: gl.constexpr, K: gl.constexpr, V_: gl.constexpr,
):  # fmt: skip
    """Load what the owners read, in the order in which they free it; store what they make."""
    BY: gl.constexpr = BV if AHLA else BD
    WHOLE_Y: gl.constexpr = WHOLE_V if AHLA else WHOLE_D
    width = V if AHLA else D
    GROUPS: gl.constexpr = 1 if POWER1 == POWER2 else 2
    if GATE == 2:
        a = load_gate(p_gate, sgt, 0, T)
    if SUMS:
        m, n = load_sum(p_m, smd, D, BD), load_sum(p_n, snd, D, BD)
    for c in range(chunks + Q):
        if SUMS:  # noqa: SIM102 - known when it is compiled, which both at once are not
            if c >= Q:
                m, n = _sum(
                    c - Q, qs, ks, made, tiles, weights, ends, lists, q_full, k_full, there, paired,
                    divided, chunks, m, n, p_one, T_one, sone, scale_one, p_den, T_den, sden,
                    scale_den, eps, BD, AHLA, GATE, GROUPS, ONE, TILE_1, Q, K,
                )  # fmt: skip
        if MILD:  # noqa: SIM102 - known when it is compiled
            if (c >= 2) & (c < chunks + 2):
                e = c - 2
                mbarrier.wait(k_full.index(e % K), (e // K) & 1)
                at = _at(e, e % Q, chunks, GATE, GROUPS, 0)
                weigh_rows(ks.index(e % K), weights.index(at * LISTS + ROWS), BD)
                fence_async_shared()
                mbarrier.arrive(k_ready.index(e % K), count=1)
        # A minimum is no sum of steps, of which the compiler would keep an address for each row
        if (c >= K_LATER) & (c < chunks + K_LATER):
            e = c - K_LATER
            i_k = e % K
            row = gl.minimum(e * W, T)
            mbarrier.wait(k_free.index(i_k), ((e // K) & 1) ^ 1)
            load_chunk(ks.index(i_k), p_k, row, T, D, skt, skd, BD, FAST, WHOLE_D)
            arrive_full(k_full.index(i_k), FAST)
        if c < chunks:
            i_q = c % Q
            row = gl.minimum(c * W, T)
            mbarrier.wait(q_free.index(i_q), ((c // Q) & 1) ^ 1)
            load_chunk(qs.index(i_q), p_q, row, T, D, sqt, sqd, BD, FAST, WHOLE_D)
            arrive_full(q_full.index(i_q), FAST)
            if GATE == 2:
                g = a.to(gl.float64) * LOG2E
                g = gl.where(g < RESET, RESET, g)  # not maximum: a NaN stays
                a = load_gate(p_gate, sgt, row + W, T)
                sums = gl.associative_scan(g, 0, add)
                _put(weights, ends, i_q, sums, gl.sum(g, 0), POWER1, POWER2, False)
                mbarrier.arrive(q_full.index(i_q), count=1)
        if c >= Q:
            e = c - Q
            row = gl.minimum(e * W, T)
            if READ:
                mbarrier.wait(ready.index(0), e & 1)
                store_chunk(p_o, out.index(0), None, row, T, V, sot, sod, BV, FAST, WHOLE_V)
                mbarrier.arrive(stored.index(0), count=1)
            _keep(
                e, p_y, made, there, p_u, us, u_there, u_taken, weights, chunks,
                T, T_y, width, syt, syd, T_u, V, sut, sud,
                BY, BV, GATE, MILD, GROUPS, KEEP, KEEP_U, SUMS, FAST, WHOLE_Y, WHOLE_V, Q,
            )  # fmt: skip
            if KEEP or SUMS:
                mbarrier.arrive(taken.index(e % 2), count=1)
        if v_ready is not None:  # noqa: SIM102 - known when it is compiled
            if (c > V_LATER) & (c <= chunks + V_LATER):
                e = c - V_LATER - 1
                mbarrier.wait(v_full.index(e % V_), (e // V_) & 1)
                at = _at(e, e % Q, chunks, GATE, GROUPS, 0)
                weigh_rows(vs.index(e % V_), weights.index(at * LISTS + ROWS), BV)
                fence_async_shared()
                mbarrier.arrive(v_ready.index(e % V_), count=1)
        if (c >= V_LATER) & (c < chunks + V_LATER):
            e = c - V_LATER
            i_v = e % V_
            row = gl.minimum(e * W, T)
            mbarrier.wait(v_free.index(i_v), ((e // V_) & 1) ^ 1)
            load_chunk(vs.index(i_v), p_v, row, T, V, svt, svd, BV, FAST, WHOLE_V)
            arrive_full(v_full.index(i_v), FAST)
    if SUMS:
        store_sum(p_m_end, m, smed, writes_m, D, BD)
        store_sum(p_n_end, n, sned, writes_n, D, BD)


@gluon.jit
def _first(mild, k_full, k_ready, rest):
    """Own the state of the first pass, by the decay's factors if it is mild."""
    if mild is None:
        _own_first(k_full, False, *rest)
    elif mild:
        _own_first(k_ready, True, *rest)
    else:
        _own_first(k_full, False, *rest)


@gluon.jit
def _second(mild, rest):
    """Own the state of the second pass, likewise."""
    if mild is None:
        _own_second(False, *rest)
    elif mild:
        _own_second(True, *rest)
    else:
        _own_second(False, *rest)


@gluon.jit
def _mover(mild, k_ready, v_ready, rest):
    """Load and store, likewise."""
    if mild is None:
        _move(None, None, False, *rest)
    elif mild:
        _move(k_ready, v_ready, True, *rest)
    else:
        _move(None, None, False, *rest)


@gluon.jit
def _put_decays(
    mild, weights, ends, p_gate, T, chunks, POWER1: gl.constexpr, POWER2: gl.constexpr
):  # fmt: skip
    """Leave the weights of a decay, or its factors."""
    if mild is None:
        _put_decay(weights, ends, p_gate, T, chunks, POWER1, POWER2, False)
    elif mild:
        _put_decay(weights, ends, p_gate, T, chunks, POWER1, POWER2, True)
    else:
        _put_decay(weights, ends, p_gate, T, chunks, POWER1, POWER2, False)


@gluon.jit(
    do_not_specialize=[
        "scale1", "scale2", "eps", "T", "D", "V", "N1", "N2",
        "sq0", "sq1", "sq2", "sqt", "sqd", "sk0", "sk1", "sk2", "skt", "skd",
        "sv0", "sv1", "sv2", "svt", "svd", "sy0", "sy1", "sy2", "syt", "syd",
        "so0", "so1", "so2", "sot", "sod", "ss0", "ss1", "ss2", "ssn", "ssd", "ssv",
        "se0", "se1", "se2", "sen", "sed", "sev", "sf0", "sf1", "sf2", "sfn", "sfd", "sfv",
        "sh0", "sh1", "sh2", "shn", "shd", "shv", "sx0", "sx1", "sx2", "sxt", "sxd",
        "sden0", "sden1", "sden2", "sdent", "sdend", "sone0", "sone1", "sone2", "sonet", "soned",
        "sm0", "sm1", "sm2", "smn", "smd", "smv", "sme0", "sme1", "sme2", "smen", "smed", "smev",
        "sn0", "sn1", "sn2", "snn", "snd", "snv", "sne0", "sne1", "sne2", "snen", "sned", "snev",
        "sg0", "sg1", "sg2", "sgt",
    ],
    do_not_specialize_on_alignment=[
        "p_gate", "p_start1", "p_end1", "p_start2", "p_end2",
        "p_x", "p_den", "p_one", "p_m", "p_me", "p_n", "p_ne",
    ],
)  # fmt: skip
def pair_kernel(
    p_q, p_k, p_v, p_y, p_o, p_start1, p_end1, p_start2, p_end2,
    p_x, p_den, p_one, p_m, p_me, p_n, p_ne, p_gate,
    scale1, scale2, eps, T, tokens, D, V, N1, N2,
    sq0, sq1, sq2, sqt, sqd,
    sk0, sk1, sk2, skt, skd,
    sv0, sv1, sv2, svt, svd,
    sy0, sy1, sy2, syt, syd,
    so0, so1, so2, sot, sod,
    ss0, ss1, ss2, ssn, ssd, ssv,
    se0, se1, se2, sen, sed, sev,
    sf0, sf1, sf2, sfn, sfd, sfv,
    sh0, sh1, sh2, shn, shd, shv,
    sx0, sx1, sx2, sxt, sxd,  # the numerators, in float32
    sden0, sden1, sden2, sdent, sdend,  # the denominators of o, and of u
    sone0, sone1, sone2, sonet, soned,
    sm0, sm1, sm2, smn, smd, smv,  # states of denominators: those of u, first and last
    sme0, sme1, sme2, smen, smed, smev,
    sn0, sn1, sn2, snn, snd, snv,  # and those of o
    sne0, sne1, sne2, snen, sned, snev,
    sg0, sg1, sg2, sgt,
    AHLA: gl.constexpr,  # the first pass makes the values of the second; else its keys
    READ: gl.constexpr,  # o is requested, not the states alone
    WIDE: gl.constexpr,  # in float32
    KEEP: gl.constexpr,  # y (u) is stored
    GATE: gl.constexpr,  # 0 none, 1 decay, 2 log_gate
    POWER1: gl.constexpr,
    POWER2: gl.constexpr,
    SCALED1: gl.constexpr,  # scale1, of what is read, is not 1
    SCALED2: gl.constexpr,
    START1: gl.constexpr,
    END1: gl.constexpr,
    START2: gl.constexpr,
    END2: gl.constexpr,
    SUMS: gl.constexpr,  # there are denominators, stored or divided by, or states of them
    DEN: gl.constexpr,  # the first; with eps o is divided
    BD: gl.constexpr,  # tiles of 64 or 128 keys and values
    BV: gl.constexpr,
    WHOLE_D: gl.constexpr,  # D == BD
    WHOLE_V: gl.constexpr,
    FAST: gl.constexpr,  # rows are of whole 16 bytes; strides of q, k, v, y and o count by 8
):  # fmt: skip
    """One head; with ``tokens`` (None: the whole sequence) one segment of so many of it."""
    UNIT: gl.constexpr = 8 if FAST else 1
    BY: gl.constexpr = BV if AHLA else BD
    i_head = gl.program_id(0)
    if tokens is not None:
        parts = (T + tokens - 1) // tokens
        part, i_head = (i_head % parts).to(gl.int64), i_head // parts
        first = part * tokens
        T = gl.minimum(T - first, tokens).to(gl.int32)
        p_q += first * sqt * UNIT
        p_k += first * skt * UNIT
        p_v += first * svt * UNIT
        if KEEP:
            p_y += first * syt * UNIT
        if READ:
            p_o += first * sot * UNIT
        if GATE == 2:
            p_gate += first * sgt
        if START1:
            p_start1 += part * ssn
        if END1:
            p_end1 += part * sen
        if START2:
            p_start2 += part * sfn
        if END2:
            p_end2 += part * shn
        if p_x is not None:
            p_x += first * sxt
        if p_den is not None:
            p_den += first * sdent
        if p_one is not None:
            p_one += first * sonet
        if p_m is not None:
            p_m += part * smn
        if p_me is not None:
            p_me += part * smen
        if p_n is not None:
            p_n += part * snn
        if p_ne is not None:
            p_ne += part * snen
    i_2 = (i_head % N2).to(gl.int64)
    i_1 = (i_head // N2 % N1).to(gl.int64)
    i_0 = (i_head // N2 // N1).to(gl.int64)
    p_q += (i_0 * sq0 + i_1 * sq1 + i_2 * sq2) * UNIT
    p_k += (i_0 * sk0 + i_1 * sk1 + i_2 * sk2) * UNIT
    p_v += (i_0 * sv0 + i_1 * sv1 + i_2 * sv2) * UNIT
    T_y = T  # of the heads that share y, those along an axis of stride 0, the first stores it
    if KEEP:
        p_y += (i_0 * sy0 + i_1 * sy1 + i_2 * sy2) * UNIT
        T_y = gl.where(is_first(i_0, i_1, i_2, sy0, sy1, sy2), T, 0)
    if READ:
        p_o += (i_0 * so0 + i_1 * so1 + i_2 * so2) * UNIT
    if START1:
        p_start1 += i_0 * ss0 + i_1 * ss1 + i_2 * ss2
    if START2:
        p_start2 += i_0 * sf0 + i_1 * sf1 + i_2 * sf2
    writes1, writes2 = True, True
    if END1:
        p_end1 += i_0 * se0 + i_1 * se1 + i_2 * se2
        writes1 = is_first(i_0, i_1, i_2, se0, se1, se2)
    if END2:
        p_end2 += i_0 * sh0 + i_1 * sh1 + i_2 * sh2
        writes2 = is_first(i_0, i_1, i_2, sh0, sh1, sh2)
    if p_x is not None:
        p_x += i_0 * sx0 + i_1 * sx1 + i_2 * sx2
    T_den, T_one, writes_m, writes_n = T, T, True, True
    if p_den is not None:
        p_den += i_0 * sden0 + i_1 * sden1 + i_2 * sden2
        T_den = gl.where(is_first(i_0, i_1, i_2, sden0, sden1, sden2), T, 0)
    if p_one is not None:
        p_one += i_0 * sone0 + i_1 * sone1 + i_2 * sone2
        T_one = gl.where(is_first(i_0, i_1, i_2, sone0, sone1, sone2), T, 0)
    if p_m is not None:
        p_m += i_0 * sm0 + i_1 * sm1 + i_2 * sm2
    if p_n is not None:
        p_n += i_0 * sn0 + i_1 * sn1 + i_2 * sn2
    if p_me is not None:
        p_me += i_0 * sme0 + i_1 * sme1 + i_2 * sme2
        writes_m = is_first(i_0, i_1, i_2, sme0, sme1, sme2)
    if p_ne is not None:
        p_ne += i_0 * sne0 + i_1 * sne1 + i_2 * sne2
        writes_n = is_first(i_0, i_1, i_2, sne0, sne1, sne2)
    if GATE > 0:
        p_gate += i_0 * sg0 + i_1 * sg1 + i_2 * sg2

    chunks = (T + W - 1) // W
    if WIDE:
        p_x, sxt, sxd = p_o, gl.to_tensor(sot).to(gl.int64) * UNIT, sod
    # Buffers of q, k and v: as many as there is memory for, by how long both owners read them
    Q: gl.constexpr = AHEAD
    K: gl.constexpr = AHEAD if AHLA and GATE == 0 else AHEAD - 1
    V_: gl.constexpr = 2 if AHLA or GATE > 0 else 3
    GROUPS: gl.constexpr = 1 if POWER1 == POWER2 else 2
    # Chunks by which a buffer is free again later than that of q: the first pass is one ahead
    K_LATER: gl.constexpr = Q - K if AHLA else Q - K - 1
    V_LATER: gl.constexpr = Q - V_ - 1 if AHLA else Q - V_
    SLOTS: gl.constexpr = (AHEAD if GATE == 2 else 2) * GROUPS
    LOADS: gl.constexpr = 128 if FAST else 1  # a copy arrives with each of the mover's threads
    qs = gl.allocate_shared_memory(gl.bfloat16, [Q, W, BD], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [K, W, BD], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [V_, W, BV], TILE)
    made = gl.allocate_shared_memory(gl.bfloat16, [2, W, BY], TILE)
    out = gl.allocate_shared_memory(gl.bfloat16, [1, W, BV], TILE)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, W, W], TILE)
    weights = gl.allocate_shared_memory(gl.float32, [SLOTS * LISTS, W], LIST)
    ends = gl.allocate_shared_memory(gl.float32, [SLOTS, 1], LIST)
    q_full, q_free = barriers(Q, LOADS + (1 if GATE == 2 else 0)), barriers(Q, 2)
    k_full, k_free = barriers(K, LOADS), barriers(K, 2 if AHLA else 1)
    v_full, v_free = barriers(V_, LOADS), barriers(V_, 1)
    there, taken = barriers(2, 1), barriers(2, 2 if KEEP or SUMS else 1)
    ready, stored = None, None  # see `barriers`
    if READ and not WIDE:
        ready, stored = barriers(1, 1), barriers(1, 1)
    lists, paired, divided = None, None, None
    if SUMS:
        lists = gl.allocate_shared_memory(gl.float32, [COUNT, W], LIST)
    if DEN:
        divided = barriers(1, 1)
        if not AHLA:
            paired = barriers(1, 1)
    FACTORED: gl.constexpr = GATE == 1 and not SUMS
    mild, k_ready = None, None
    follow()
    if FACTORED:
        mild, k_ready = _is_mild(p_gate, POWER2), barriers(K, 1)
    if GATE == 1:
        _put_decays(mild, weights, ends, p_gate, T, chunks, POWER1, POWER2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_first, (mild, k_full, k_ready, (
                qs, ks, vs, made, tiles, weights, ends, q_full, q_free, k_free, v_full, v_free,
                there, taken, chunks, p_start1, ssd, ssv, p_end1, sed, sev, writes1,
                D, V if AHLA else D, scale1,
                BY // 64, BD, AHLA, AHLA, GATE, GROUPS, SCALED1, START1, END1, Q, K, V_,
            ))),
            (_second, (mild, (
                qs, ks, vs, made, out if READ and not WIDE else None, tiles, weights, ends,
                q_full, q_free, k_free, v_full, v_free, there, taken, ready, stored,
                paired, divided, lists if eps is not None else None, chunks, p_x, T, sxt, sxd,
                p_start2, sfd, sfv, p_end2, shd, shv, writes2, D, V, scale2,
                BV // 64, BD, AHLA, GATE, GROUPS, SCALED2, READ, START2, END2, Q, K, V_,
            ))),
            (_mover, (mild, k_ready, None, (
                p_q, p_k, p_v, p_y, None, p_o, p_gate, qs, ks, vs, made, made, out, weights, ends,
                q_full, q_free, k_full, k_free, v_full, v_free, there, taken, there, taken,
                ready, stored, chunks, T, T_y, T_y, D, V,
                sqt, sqd, skt, skd, svt, svd, syt, syd, syt, syd, sot, sod, sgt,
                tiles, lists, paired, divided, p_one, T_one, sonet, scale1, p_den, T_den, sdent,
                scale2, eps, p_m, smd, p_me, smed, writes_m, p_n, snd, p_ne, sned, writes_n,
                BD, BV, AHLA, GATE, POWER1, POWER2, READ and not WIDE, KEEP, False, SUMS, AHLA, 1,
                FAST, WHOLE_D, WHOLE_V, K_LATER, V_LATER, Q, K, V_,
            ))),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip
