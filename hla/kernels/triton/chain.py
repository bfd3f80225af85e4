"""The masked operators of second and third order in one kernel, in plain Triton: a program a head.

    y = pass(q, k, k) and S        u = pass(q, k, v) and P        o = pass^p(q, a, b) and F
    hla2: a, b, p = y, v, 2        ahla: k, u, 1                  hla3: y, u, 3

Chunk by chunk as `causal` does one pass, all states transposed in float32 registers. Of W tokens,
of q, k, v as they are stored, with the weights of the gate left out:

    A' = upper(K Q')            [W, W]
    Y' = S Q' + K' A            [D, W]    S  = S + K' K       [D, D]
    U' = P' Q' + V' A           [V, W]    P' = P' + V' K      [V, D]
    B = upper(Y Q') (or A)      [W, W]
    O' = F' Q' + (V' or U') B   [V, W]    F' = F' + (V' or U') (Y or K)

Y' and U' reach memory only where somebody else reads them. For chunks of 64 tokens B' = lower(Q Y')
is made: Y is not then the transposed result of a product as a first operand, which Triton up to
3.7.0 can mistake (fla 640). Triton spreads warps over the rows alone of a small product that its
slice of uses connects with another one: all of Q' would lie in the registers of each warp. A
transpose ends the slice, hence some that seem to do nothing.

Denominators are columns of ones beside v: their sums are no products and run in float32 (o is then
divided as it is stored),

    u1 = Q m + A' 1                   m = m + K' 1
    den = Q n + B (u1 or 1)           n = n + (Y or K)' (u1 or 1)

Weights are exponentials of differences of sums of the gate's logarithm over a chunk, as in
`causal`: of a log gate sums in float64, taken apart into two floats, whose differences are exact to
the digits of the difference; those of the powers 2 and 3 are products.

Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024 (1280 with y or u, hla3
1536). Operations at W = 32: 4 small and 4 large products, 164 k (hla3 6 and 6, 246 k). At 3.0 TB/s
the bytes bind: 0.179 ms for B = 8, T = 4096, H = 16; one H100 took 0.229 for hla2 (78%; two passes
0.325) and 0.191 for ahla (94%; 0.369), with a decay 0.323 (0.362): the weights of states and keys
are as many instructions as all else. No atomics; bits depend on nothing but the head's data.
"""

import triton
import triton.language as tl

from .causal import LEAST, RESET, _operand, _pairs, _product, _read


@triton.jit
def _weigh(x, w):
    """Return x (*, W), token by token times w."""
    return x * w[None, :]


@triton.jit
def _power(w, POWER: tl.constexpr):
    """Return w^1, w^2 or w^3."""
    if POWER == 2:
        w = w * w
    if POWER == 3:
        w = w * w * w
    return w


@triton.jit
def _decayed(log_g, t, n):
    """Weights of n tokens by the log of a decay: after each, and of the state before them."""
    after = tl.exp(tl.where(t < n, n - 1 - t, 0).to(tl.float32) * log_g)
    return after, tl.exp(n.to(tl.float32) * log_g)


@triton.jit
def _gated(p_gate, m_t, m_back):
    """Weights of a chunk by its log gate: of pairs [W query, W key], and before, after, total."""
    a = tl.load(p_gate, mask=m_t, other=0.0).to(tl.float64)
    a = tl.where(a < RESET, RESET, a)  # not maximum, which would drop a NaN
    c, last = tl.cumsum(a, 0), tl.sum(a, 0)
    high = c.to(tl.float32)
    low = (c - high.to(tl.float64)).to(tl.float32)
    span = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    pair = tl.exp(tl.where(m_back, span, 0.0))
    return pair, tl.exp(high), tl.exp((last - c).to(tl.float32)), tl.exp(last.to(tl.float32))


@triton.jit
def _begin(p, step_v, step_d, v, d, m, START: tl.constexpr):
    """Return a state (V, D), transposed, that lies at p; zeros where there is none."""
    S = tl.zeros([v.shape[0], d.shape[0]], tl.float32)
    if START:
        S = tl.load(p + v[:, None] * step_v + d[None, :] * step_d, mask=m, other=0.0)
    return S


@triton.jit
def _later(i_0, i_1, i_2, s0, s1, s2):
    """Not 0 in a head that is not the first of those that share an array, of strides 0."""
    return tl.where(s0 == 0, i_0, 0) + tl.where(s1 == 0, i_1, 0) + tl.where(s2 == 0, i_2, 0)


@triton.jit(do_not_specialize=["T", "D", "V", "N1", "N2", "sg0", "sg1", "sg2"],
            do_not_specialize_on_alignment=["p_gate"])  # fmt: skip
def chain_kernel(
    p_q, p_k, p_v, p_o, p_y, p_u, p_x, p_den, p_one,
    p_S, p_Se, p_P, p_Pe, p_F, p_Fe, p_m, p_me, p_n, p_ne, p_gate,
    inner, outer, eps, T, D, V, N1, N2,
    sq0, sq1, sq2, sqt, sqd,
    sk0, sk1, sk2, skt, skd,
    sv0, sv1, sv2, svt, svd,
    so0, so1, so2, sot, sod,
    sy0, sy1, sy2, syt, syd,
    su0, su1, su2, sut, sud,
    sx0, sx1, sx2, sxt, sxd,
    sden0, sden1, sden2, sdent, sdend,
    sone0, sone1, sone2, sonet, soned,
    sS0, sS1, sS2, sSd, sSv,
    sSe0, sSe1, sSe2, sSed, sSev,
    sP0, sP1, sP2, sPd, sPv,
    sPe0, sPe1, sPe2, sPed, sPev,
    sF0, sF1, sF2, sFd, sFv,
    sFe0, sFe1, sFe2, sFed, sFev,
    sm0, sm1, sm2, smd, smv,
    sme0, sme1, sme2, smed, smev,
    sn0, sn1, sn2, snd, snv,
    sne0, sne1, sne2, sned, snev,
    sg0, sg1, sg2, sgt,
    KEYS: tl.constexpr,  # there are y and S
    VALUES: tl.constexpr,  # there are u and P
    POWER: tl.constexpr,  # of the gate in the last pass
    GATE: tl.constexpr,  # 0 none, 1 decay, 2 log_gate
    SCALED: tl.constexpr,  # inner and outer are not both 1
    SUMS: tl.constexpr,  # there are denominators or, in states, what they are made of
    NORM: tl.constexpr,  # o is divided, by its denominator and eps
    X: tl.constexpr,  # and stored before, too
    DEN: tl.constexpr,  # the denominator of o is stored
    ONE: tl.constexpr,  # and that of u
    Y: tl.constexpr,  # y is stored
    U: tl.constexpr,  # u is
    START: tl.constexpr,
    END: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    W: tl.constexpr,
    WHOLE_D: tl.constexpr,  # D == BD
    WHOLE_V: tl.constexpr,  # V == BV
    OPERAND: tl.constexpr,  # dtype of the operands of products
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One head."""
    i_head = tl.program_id(0)
    i_2 = (i_head % N2).to(tl.int64)
    i_1 = (i_head // N2 % N1).to(tl.int64)
    i_0 = (i_head // N2 // N1).to(tl.int64)
    t = tl.arange(0, W)
    t64, d, v = t.to(tl.int64), tl.arange(0, BD).to(tl.int64), tl.arange(0, BV).to(tl.int64)
    m_d, m_v = d < (BD if WHOLE_D else D), v < (BV if WHOLE_V else V)
    p_q += i_0 * sq0 + i_1 * sq1 + i_2 * sq2 + t64[:, None] * sqt + d[None, :] * sqd  # [W, BD]
    p_k += i_0 * sk0 + i_1 * sk1 + i_2 * sk2 + t64[:, None] * skt + d[None, :] * skd  # [W, BD]
    p_v += i_0 * sv0 + i_1 * sv1 + i_2 * sv2 + t64[:, None] * svt + v[None, :] * svd  # [W, BV]
    p_o += i_0 * so0 + i_1 * so1 + i_2 * so2 + t64[:, None] * sot + v[None, :] * sod  # [W, BV]
    if Y:
        p_y += i_0 * sy0 + i_1 * sy1 + i_2 * sy2 + t64[:, None] * syt + d[None, :] * syd
        T_y = tl.where(_later(i_0, i_1, i_2, sy0, sy1, sy2) == 0, T, 0)
    if U:
        p_u += i_0 * su0 + i_1 * su1 + i_2 * su2 + t64[:, None] * sut + v[None, :] * sud
        T_u = tl.where(_later(i_0, i_1, i_2, su0, su1, su2) == 0, T, 0)
    if X:
        p_x += i_0 * sx0 + i_1 * sx1 + i_2 * sx2 + t64[:, None] * sxt + v[None, :] * sxd
    if DEN:
        p_den += i_0 * sden0 + i_1 * sden1 + i_2 * sden2 + t64 * sdent
        T_den = tl.where(_later(i_0, i_1, i_2, sden0, sden1, sden2) == 0, T, 0)
    if ONE:
        p_one += i_0 * sone0 + i_1 * sone1 + i_2 * sone2 + t64 * sonet
        T_one = tl.where(_later(i_0, i_1, i_2, sone0, sone1, sone2) == 0, T, 0)
    if START:
        p_F += i_0 * sF0 + i_1 * sF1 + i_2 * sF2
        if KEYS:
            p_S += i_0 * sS0 + i_1 * sS1 + i_2 * sS2
        if VALUES:
            p_P += i_0 * sP0 + i_1 * sP1 + i_2 * sP2
    if GATE != 0:
        p_gate += i_0 * sg0 + i_1 * sg1 + i_2 * sg2
    if GATE == 1:
        g = tl.load(p_gate).to(tl.float64)
        log_g = tl.log(tl.where(g < LEAST, LEAST, g)).to(tl.float32)

    m_S, m_F = m_d[:, None] & m_d[None, :], m_v[:, None] & m_d[None, :]
    F = _begin(p_F, sFv, sFd, v, d, m_F, START)
    if KEYS:
        S = _begin(p_S, sSv, sSd, d, d, m_S, START)
    if VALUES:
        P = _begin(p_P, sPv, sPd, v, d, m_F, START)
    if SUMS:
        n = tl.zeros([BD], tl.float32)
        if START:
            p_n += i_0 * sn0 + i_1 * sn1 + i_2 * sn2
            n = tl.load(p_n + d * snd, mask=m_d, other=0.0)
        if VALUES:
            m = tl.zeros([BD], tl.float32)
            if START:
                p_m += i_0 * sm0 + i_1 * sm1 + i_2 * sm2
                m = tl.load(p_m + d * smd, mask=m_d, other=0.0)
    m_pair, m_back = t[:, None] <= t[None, :], t[:, None] >= t[None, :]
    if GATE == 1:  # what depends on no chunk, for all of them
        span = tl.where(m_pair, t[None, :] - t[:, None], 0).to(tl.float32) * log_g
        decayed, decayed_o = tl.exp(span), tl.exp(POWER * span)
        span = (t + 1).to(tl.float32) * log_g
        fading, fading_o = tl.exp(span), tl.exp(POWER * span)[None, :]

    chunks = tl.cdiv(T, W)
    for i in range(chunks):
        row = i * W
        row64, m_t = row.to(tl.int64), t < T - row
        m_td, m_tv = m_t[:, None] & m_d[None, :], m_t[:, None] & m_v[None, :]
        pair, before, pair_o, before_o, after, total = 1.0, 1.0, 1.0, 1.0, 1.0, 1.0
        if GATE == 1:
            pair, before, pair_o, before_o = decayed, fading, decayed_o, fading_o
            after, total = _decayed(log_g, t, tl.minimum(T - row, W))
        if GATE == 2:
            back, before, after, total = _gated(p_gate + (row64 + t64) * sgt, m_t, m_back)
            pair, pair_o = tl.trans(back), tl.trans(_power(back, POWER))
            before_o = tl.trans(_power(before, POWER)[:, None])
        after_o, total_o = _power(after, POWER), _power(total, POWER)
        b_q = _operand(tl.load(p_q + row64 * sqt, mask=m_td, other=0.0), OPERAND, PRECISION)
        b_k = _operand(tl.load(p_k + row64 * skt, mask=m_td, other=0.0), OPERAND, PRECISION)
        b_v = _operand(tl.load(p_v + row64 * svt, mask=m_tv, other=0.0), OPERAND, PRECISION)
        k_w = b_k
        if GATE != 0:
            k_w = tl.trans(_operand(_weigh(tl.trans(b_k), after), OPERAND, PRECISION))
        A = _product(b_k, b_q, PRECISION)
        pairs, A = _pairs(A, m_pair, pair, 1.0, GATE, False, OPERAND, PRECISION)
        if KEYS:
            b_y = _product(_operand(S, OPERAND, PRECISION), b_q, PRECISION)  # [BD, W]
            if GATE != 0:
                b_y = _weigh(b_y, before)
            b_y = _read(b_y, b_k, A, True, PRECISION)
            if SCALED:
                b_y *= inner
            if GATE != 0:
                S *= total
            S = tl.dot(tl.trans(b_k), k_w, S, input_precision=PRECISION, out_dtype=tl.float32)
            y = _operand(b_y, OPERAND, PRECISION)
            # Weighed now and not when it is added: its place in shared memory is then not that of
            # an earlier tile, of which two ptxas 12 describes one wrongly (sass.misdescribed).
            keys = tl.trans(y)
            if GATE != 0:
                keys = tl.trans(_operand(_weigh(b_y, after_o), OPERAND, PRECISION))
            if Y:
                y_t = tl.trans(b_y).to(p_y.dtype.element_ty)
                tl.store(p_y + row64 * syt, y_t, mask=(t < T_y - row)[:, None] & m_d[None, :])
        if VALUES:
            b_u = _product(_operand(P, OPERAND, PRECISION), b_q, PRECISION)  # [BV, W]
            if GATE != 0:
                b_u = _weigh(b_u, before)
            b_u = _read(b_u, b_v, A, True, PRECISION)
            if SCALED:
                b_u *= inner
            if KEYS:
                if GATE != 0:
                    P *= total
                P = tl.dot(tl.trans(b_v), k_w, P, input_precision=PRECISION, out_dtype=tl.float32)
            u = _operand(b_u, OPERAND, PRECISION)
            if U:
                u_t = tl.trans(b_u).to(p_u.dtype.element_ty)
                tl.store(p_u + row64 * sut, u_t, mask=(t < T_u - row)[:, None] & m_v[None, :])
        if SUMS:
            each = tl.zeros([W], tl.float32) + 1.0
            if VALUES:
                each = tl.sum(b_q.to(tl.float32) * m[None, :], 1)
                if GATE != 0:
                    each *= before
                each = (each + tl.sum(pairs, 0)) * inner
                rows = b_k.to(tl.float32)
                if GATE != 0:
                    m *= total
                    rows *= after[:, None]
                m += tl.sum(rows, 0)
                if ONE:
                    tl.store(p_one + row64 * sonet, each, mask=t < T_one - row)
        if KEYS:
            if W < 64:
                B = _product(tl.trans(y), b_q, PRECISION)
                pairs, A = _pairs(B, m_pair, pair_o, 1.0, GATE, False, OPERAND, PRECISION)
            else:
                B = tl.dot(b_q, y, input_precision=PRECISION, out_dtype=tl.float32)
                w_back = pair_o
                if GATE != 0:
                    w_back = tl.trans(pair_o)
                pairs, B = _pairs(B, m_back, w_back, 1.0, GATE, False, OPERAND, PRECISION)
                pairs, A = tl.trans(pairs), tl.trans(B)
        b_o = _product(_operand(F, OPERAND, PRECISION), b_q, PRECISION)  # [BV, W]
        if GATE != 0:
            b_o *= before_o
        x = tl.trans(b_v)
        if VALUES:
            x = u
        b_o = tl.dot(x, A, b_o, input_precision=PRECISION, out_dtype=tl.float32)
        if SCALED:
            b_o *= outer
        if X:
            tl.store(p_x + row64 * sxt, tl.trans(b_o), mask=m_tv)
        if not NORM:
            tl.store(p_o + row64 * sot, tl.trans(b_o).to(p_o.dtype.element_ty), mask=m_tv)
        if SUMS:
            if DEN or NORM:
                den = tl.sum(b_q.to(tl.float32) * n[None, :], 1)
                if GATE != 0:
                    den *= tl.reshape(before_o, [W])
                if VALUES:
                    pairs *= each[:, None]
                den = (den + tl.sum(tl.trans(pairs), 1)) * outer
                if DEN:
                    tl.store(p_den + row64 * sdent, den, mask=t < T_den - row)
                if NORM:
                    b_o *= (1.0 / (den + eps))[None, :]
                    o_t = tl.trans(b_o).to(p_o.dtype.element_ty)
                    tl.store(p_o + row64 * sot, o_t, mask=m_tv)
            if GATE != 0:
                n *= total_o
                each *= after_o
            if KEYS:
                n += tl.sum(y.to(tl.float32) * each[None, :], 1)
            else:
                n += tl.sum(b_k.to(tl.float32) * each[:, None], 0)
        if GATE != 0:
            F *= total_o
        if not KEYS:
            keys = k_w
        F = tl.dot(x, keys, F, input_precision=PRECISION, out_dtype=tl.float32)
        if not KEYS:  # the last product, which the next chunk awaits at once: see `launch.config`
            if GATE != 0:
                P *= total
            P = tl.dot(tl.trans(b_v), k_w, P, input_precision=PRECISION, out_dtype=tl.float32)

    if END:  # of the heads that share a state the first writes it
        if _later(i_0, i_1, i_2, sFe0, sFe1, sFe2) == 0:
            p_Fe += i_0 * sFe0 + i_1 * sFe1 + i_2 * sFe2
            tl.store(p_Fe + v[:, None] * sFev + d[None, :] * sFed, F, mask=m_F)
        if KEYS:
            S_later = _later(i_0, i_1, i_2, sSe0, sSe1, sSe2)
            if S_later == 0:
                p_Se += i_0 * sSe0 + i_1 * sSe1 + i_2 * sSe2
                tl.store(p_Se + d[:, None] * sSev + d[None, :] * sSed, S, mask=m_S)
        if VALUES:
            P_later = _later(i_0, i_1, i_2, sPe0, sPe1, sPe2)
            if P_later == 0:
                p_Pe += i_0 * sPe0 + i_1 * sPe1 + i_2 * sPe2
                tl.store(p_Pe + v[:, None] * sPev + d[None, :] * sPed, P, mask=m_F)
        if SUMS:
            if _later(i_0, i_1, i_2, sne0, sne1, sne2) == 0:
                p_ne += i_0 * sne0 + i_1 * sne1 + i_2 * sne2
                tl.store(p_ne + d * sned, n, mask=m_d)
            if VALUES:
                m_later = _later(i_0, i_1, i_2, sme0, sme1, sme2)
                if m_later == 0:
                    p_me += i_0 * sme0 + i_1 * sme1 + i_2 * sme2
                    tl.store(p_me + d * smed, m, mask=m_d)
