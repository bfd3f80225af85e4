"""The causal pass on an NVIDIA GPU, in Triton (design: one program a head and a tile of values).

    o_t = read * (a_t q_t S + sum_j write * L[j, t] (q_t . k_j) v_j)     S <- r S + write * (b k)' v

The state is held transposed, S' (V, D) in float32 registers, so that every product on it has the
state's V rows whatever the chunk: with M >= 64 rows Hopper's wgmma serves, and the cast state feeds
it from registers. A chunk of W tokens, all operands q, k, v as they are stored:

    A' = upper(K Q')  [W, W]    O' = S' Q' + V' A'  [V, W]    S' = S' + V' K  [V, D]

Weights. With c_t the sum of the log gate over the chunk up to t and e_t the same without t itself
(what a strict pass reads), L = exp(c_t - c_j), a = exp(c_t), b = exp(c_last - c_j); the reverse
pass exchanges a and b and transposes L. The sums run inside a chunk and in float64: their
differences then keep float32's digits whatever the gate, and a reset is a gate of -1e6 (its
exponential is 0, and differences of such sums still resolve 1e-8): -inf is never subtracted.

Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024 (768 where v is k: the same
lines of L2). Operations at W = 64: 2 (2 W + 2 D) V = 98 k. At 3.0 TB/s and 790 TFLOP/s the bytes
bind: 0.179 ms for B = 8, T = 4096, H = 16; one H100 took 0.190 (94%), and 0.104 at D = 64 (86%). No
atomics; bits depend on nothing but the head's data.

float32 operands are two float16 matrices each, high and low, in a unit: a power of 2 by the largest
number of a tile, of a state by that of each row. The three products but low times low keep the
digits of 3xTF32 at half the cost: 295 k operations at W = 64. The 2048 bytes then bind, 0.36 ms;
one H100 took 0.73 (49%), where a chunk's chain of products and conversions binds, and 1.71 with six
products of bfloat16. A number less than 2^-17 of the largest loses low digits, to 2^-40 of that.
The sums of a chunk are added to the state in float32: the matrix unit would truncate them. Of tiles
of up to 64 columns low and high parts are added in float32 too (`_add_dot`); at 128 that spills: an
H100 took 1.69 ms for hla2's forward instead of 1.46.

Two parts of the values that share q and k go in one launch, with a state each: [k | v] of hla3 in
1280 bytes instead of 1792, or values and their denominators. Two passes that are summed and have
each other's k and v, as the gradient of k in S = sum k k' has, are one with one state. bfloat16
keys may exceed a tile by up to 16 columns, which have their own part of the state: the adjoint of
denominators has keys [v | 1] and queries [do | dden], 0.24 ms at D = 128. Wider keys are split into
parts, whose results are added.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ...device import elementwise

RESET = tl.constexpr(-1e6)  # what a log gate of -inf becomes
LEAST_EXPONENT = tl.constexpr(15 << 23)  # so that a unit and its inverse are normal numbers
LEAST = tl.constexpr(elementwise.LEAST)  # what a decay of 0 becomes


@triton.jit
def _operand(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Cast to what products take; to the nearest TF32, which the matrix unit would truncate to.

    For ``fp16x3`` an operand is a tuple: two parts and their unit.
    """
    if PRECISION == "fp16x3":
        x = x.to(tl.float32)
        return _parts(x, _exponent(tl.max(tl.max(tl.abs(x), 1), 0)))
    else:
        x = x.to(OPERAND)
        if PRECISION == "tf32":
            nearest = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
        return x


@triton.jit
def _exponent(most):
    """Return the exponent of a float32, in its place among the bits."""
    return tl.maximum(most.to(tl.int32, bitcast=True) & 0x7F800000, LEAST_EXPONENT)


@triton.jit
def _parts(x, exponent):
    """Return two float16 matrices, whose sum times a unit is x, and that unit, a power of 2.

    Of x the largest is between 2^14 and 2^15 units, or as an exponent for each row says.
    """
    unit = exponent - (14 << 23)
    scale = ((254 << 23) - unit).to(tl.float32, bitcast=True)
    return _halves(x * scale, unit.to(tl.float32, bitcast=True))


@triton.jit
def _halves(x, unit):
    """Return the same of x that is in its units already."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16), unit


@triton.jit
def _row_operand(S, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Cast a state to what products take; its parts have a unit a row."""
    if PRECISION == "fp16x3":
        return _parts(S, _exponent(tl.max(tl.abs(S), 1)[:, None]))
    else:
        return _operand(S, OPERAND, PRECISION)


@triton.jit
def _transposed(x, PRECISION: tl.constexpr):
    """Return x', of an operand."""
    if PRECISION == "fp16x3":
        return tl.trans(x[0]), tl.trans(x[1]), x[2]
    else:
        return tl.trans(x)


@triton.jit
def _dot(a, b):
    """Return a b of operands in two parts, in their units; what is least is added first."""
    c = tl.dot(a[1], b[0], out_dtype=tl.float32)
    c = tl.dot(a[0], b[1], c, out_dtype=tl.float32)
    return tl.dot(a[0], b[0], c, out_dtype=tl.float32)


@triton.jit
def _add_dot(c, a, b, unit):
    """Return c + a b, of operands in two parts and the product of their units.

    The matrix unit truncates what it adds: in tiles of up to 64 columns, for which there are
    registers, products with low parts and those of high ones are added in float32.
    """
    if c.shape[0] * a[0].shape[1] * b[0].shape[1] <= 64 * 64 * 64:
        d = tl.dot(a[1], b[0], out_dtype=tl.float32)
        c += tl.dot(a[0], b[1], d, out_dtype=tl.float32) * unit
        return c + tl.dot(a[0], b[0], out_dtype=tl.float32) * unit
    else:
        return c + _dot(a, b) * unit


@triton.jit
def _chunk_weights(p_gate, m_t, m_pair, power, STRICT: tl.constexpr, REVERSE: tl.constexpr):
    """Weights of one chunk by its log gate: pairs [W, W], before and after [W], total."""
    a = tl.load(p_gate, mask=m_t, other=0.0).to(tl.float64) * power
    a = tl.where(a < RESET, RESET, a)  # not maximum, which would drop a NaN
    c = tl.cumsum(a, 0)
    up, last = c - a if STRICT else c, tl.sum(a, 0)
    span = up[:, None] - c[None, :] if REVERSE else up[None, :] - c[:, None]
    pair = tl.exp(tl.where(m_pair, span, 0.0).to(tl.float32))
    before, after = tl.exp(up).to(tl.float32), tl.exp(last - c).to(tl.float32)
    return pair, before, after, tl.exp(last).to(tl.float32)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """Return a b', of operands."""
    if PRECISION == "fp16x3":
        return _dot(a, _transposed(b, PRECISION)) * (a[2] * b[2])
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _add_product(c, a, b, PRECISION: tl.constexpr):
    """Return c + a b'."""
    if PRECISION == "fp16x3":
        return c + _product(a, b, PRECISION)
    else:
        return tl.dot(a, tl.trans(b), c, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _pairs(
    A, m_pair, weight, write,
    GATE: tl.constexpr, WRITE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return A' = upper(K Q'), weighed, [W, W], from K Q'; in float32 and as an operand."""
    if GATE != 0:
        A *= weight
    if WRITE:
        A *= write
    A = tl.where(m_pair, A, 0.0)  # a product with the mask would let inf through
    return A, _operand(A, OPERAND, PRECISION)


@triton.jit
def _read(b_o, b_v, A, UPDATE: tl.constexpr, PRECISION: tl.constexpr):
    """Return O' = S' Q' + V' A', [BV, W], from S' Q' as the gate weighs it."""
    if UPDATE:
        if PRECISION == "fp16x3":
            b_o = _add_dot(b_o, _transposed(b_v, PRECISION), A, b_v[2] * A[2])
        else:
            b_o = tl.dot(tl.trans(b_v), A, b_o, input_precision=PRECISION, out_dtype=tl.float32)
    return b_o


@triton.jit
def _write(
    S, b_k, b_v, weight, total, write,
    GATE: tl.constexpr, WRITE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return S' + V' K, [BV, BD]."""
    if GATE != 0:
        S *= total
    vT = _transposed(b_v, PRECISION)
    if PRECISION == "fp16x3":
        if GATE != 0:
            vT = _halves((vT[0].to(tl.float32) + vT[1].to(tl.float32)) * weight[None, :], vT[2])
        unit = vT[2] * b_k[2]
        if WRITE:
            unit *= write
        S = _add_dot(S, vT, b_k, unit)
    else:
        if GATE != 0:
            vT = _operand(vT * (weight * write if WRITE else weight)[None, :], OPERAND, PRECISION)
        elif WRITE:
            vT = _operand(vT * write, OPERAND, PRECISION)
        S = tl.dot(vT, b_k, S, input_precision=PRECISION, out_dtype=tl.float32)
    return S


@triton.jit
def _keep(p_states, step, S, m_S, chunk, EVERY: tl.constexpr, ROW: tl.constexpr):
    """Store the state at the start of every EVERY-th chunk but the first."""
    if (chunk % EVERY == 0) & (chunk > 0):
        place = tl.full([], chunk // EVERY - 1, tl.int64) * step
        v, d = tl.arange(0, S.shape[0]).to(tl.int64), tl.arange(0, S.shape[1]).to(tl.int64)
        tl.store(p_states + place + v[:, None] * ROW + d[None, :], S, mask=m_S)


@triton.jit(  # the gate of some heads is no other kernel than that of all
    do_not_specialize=["power", "T", "D", "DC", "V", "V2", "N1", "N2", "sg0", "sg1", "sg2"],
    do_not_specialize_on_alignment=["p_gate"],
)
def pass_kernel(
    p_q, p_k, p_v, p_o, p_start, p_end, p_v2, p_o2, p_start2, p_end2, p_x, p_qc, p_kc,
    p_gate, p_dots, p_states,
    read, write, power, T, tokens, D, DC, V, V2, N1, N2,
    sq0, sq1, sq2, sqt, sqd,
    sk0, sk1, sk2, skt, skd,
    sv0, sv1, sv2, svt, svd,
    so0, so1, so2, sot, sod,
    ss0, ss1, ss2, ssn, ssd, ssv,
    se0, se1, se2, sen, sed, sev,
    sv20, sv21, sv22, sv2t, sv2d,
    so20, so21, so22, so2t, so2d,
    ss20, ss21, ss22, ss2n, ss2d, ss2v,
    se20, se21, se22, se2n, se2d, se2v,
    sx0, sx1, sx2, sxt, sxd,
    sqc0, sqc1, sqc2, sqct, sqcd,
    skc0, skc1, skc2, skct, skcd,
    sg0, sg1, sg2, sgt,
    sa0, saa,
    READ: tl.constexpr,  # outputs are requested, not the state alone
    UPDATE: tl.constexpr,  # tokens enter the state; else every token reads the same one
    STRICT: tl.constexpr,
    REVERSE: tl.constexpr,
    GATE: tl.constexpr,  # 0 none, 1 decay, 2 log_gate
    WRITE: tl.constexpr,  # write != 1
    ADD: tl.constexpr,  # o holds an earlier part of the sum
    START: tl.constexpr,
    END: tl.constexpr,
    TWO: tl.constexpr,  # values v2 go with v
    BOTH: tl.constexpr,  # add the pass with k and v exchanged; D = V
    DOT: tl.constexpr,  # write sum_v x (a_t q_t S) token by token, a row a tile of values
    PAIRS: tl.constexpr,  # and of the pairs of q, k and v, x: see `gate`
    EVERY: tl.constexpr,  # also write the state before every EVERY-th chunk but the first; 0: none
    V_IS_K: tl.constexpr,
    ROW: tl.constexpr,  # stride between rows of the states that are kept
    BD: tl.constexpr,
    BC: tl.constexpr,  # of further columns of q and k; 0 where there are none
    BV: tl.constexpr,
    BV2: tl.constexpr,
    W: tl.constexpr,
    WHOLE_D: tl.constexpr,  # D == BD
    WHOLE_V: tl.constexpr,  # BV divides V
    WHOLE_V2: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of the operands of products
    PRECISION: tl.constexpr,
    LEADS: tl.constexpr,  # the kernel after this one may begin before it has ended
):  # fmt: skip
    """One head and one tile of values; the grid counts tiles fastest, so that they share loads.

    With ``tokens`` (None: the whole sequence) also one segment of so many: it counts after tiles.
    """
    if LEADS:
        gdc_launch_dependents()
    tiles = tl.cdiv(V, BV)
    i_v, i_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if tokens is not None:
        parts = tl.cdiv(T, tokens)
        part, i_head = (i_head % parts).to(tl.int64), i_head // parts
    i_2 = (i_head % N2).to(tl.int64)
    i_1 = (i_head // N2 % N1).to(tl.int64)
    i_0 = (i_head // N2 // N1).to(tl.int64)
    t, d = tl.arange(0, W), tl.arange(0, BD)
    v, v2 = i_v * BV + tl.arange(0, BV), tl.arange(0, BV2)
    m_d, m_v2 = d < (BD if WHOLE_D else D), v2 < (BV2 if WHOLE_V2 else V2)
    m_v = tl.arange(0, BV) < (BV if WHOLE_V else V - i_v * BV)
    t64, d64, v64, v264 = t.to(tl.int64), d.to(tl.int64), v.to(tl.int64), v2.to(tl.int64)
    p_k += i_0 * sk0 + i_1 * sk1 + i_2 * sk2 + t64[:, None] * skt + d64[None, :] * skd  # [W, BD]
    p_v += i_0 * sv0 + i_1 * sv1 + i_2 * sv2 + t64[:, None] * svt + v64[None, :] * svd  # [W, BV]
    if TWO:
        p_v2 += i_0 * sv20 + i_1 * sv21 + i_2 * sv22 + t64[:, None] * sv2t + v264[None, :] * sv2d
    if BC:
        c64 = tl.arange(0, BC).to(tl.int64)
        m_c = tl.arange(0, BC) < DC
        p_kc += i_0 * skc0 + i_1 * skc1 + i_2 * skc2 + t64[:, None] * skct + c64[None, :] * skcd
    if READ:
        p_q += i_0 * sq0 + i_1 * sq1 + i_2 * sq2 + t64[:, None] * sqt + d64[None, :] * sqd
        p_o += i_0 * so0 + i_1 * so1 + i_2 * so2 + t64[:, None] * sot + v64[None, :] * sod
        if BC:
            p_qc += i_0 * sqc0 + i_1 * sqc1 + i_2 * sqc2
            p_qc += t64[:, None] * sqct + c64[None, :] * sqcd
        if TWO:
            p_o2 += (
                i_0 * so20 + i_1 * so21 + i_2 * so22 + t64[:, None] * so2t + v264[None, :] * so2d
            )
    if DOT:
        p_x += i_0 * sx0 + i_1 * sx1 + i_2 * sx2 + t64[:, None] * sxt + v64[None, :] * sxd
        i_row = i_head.to(tl.int64) * tiles + i_v
        T64 = T.to(tl.int64)
        p_dots += i_row * (2 * T64 if PAIRS else T64) + t64
    if EVERY:
        p_states += i_head.to(tl.int64) * sa0 + i_v.to(tl.int64) * BV * ROW
    if GATE != 0:
        p_gate += i_0 * sg0 + i_1 * sg1 + i_2 * sg2
    length, earlier = T, 0  # tokens, and chunks before them
    if tokens is not None:
        first = part * tokens
        length, earlier = tl.minimum(T - first, tokens).to(tl.int32), (first // W).to(tl.int32)
        p_k += first * skt
        p_v += first * svt
        if TWO:
            p_v2 += first * sv2t
        if BC:
            p_kc += first * skct
        if READ:
            p_q += first * sqt
            p_o += first * sot
            if BC:
                p_qc += first * sqct
            if TWO:
                p_o2 += first * so2t
        if DOT:
            p_x += first * sxt
            p_dots += first
        if GATE == 2:
            p_gate += first * sgt
        if START:
            p_start += part * ssn
            if TWO or BC:
                p_start2 += part * ss2n
        if END:
            p_end += part * sen
            if TWO or BC:
                p_end2 += part * se2n

    S = tl.zeros([BV, BD], tl.float32)
    m_S = m_v[:, None] & m_d[None, :]
    if START:
        p_start += i_0 * ss0 + i_1 * ss1 + i_2 * ss2
        S = tl.load(p_start + v64[:, None] * ssv + d64[None, :] * ssd, mask=m_S, other=0.0)
    if BC:
        Sc = tl.zeros([BV, BC], tl.float32)
        m_Sc = m_v[:, None] & m_c[None, :]
        if START:
            p_start2 += i_0 * ss20 + i_1 * ss21 + i_2 * ss22
            p_startc = p_start2 + v64[:, None] * ss2v + c64[None, :] * ss2d
            Sc = tl.load(p_startc, mask=m_Sc, other=0.0)
    if TWO:
        S2 = tl.zeros([BV2, BD], tl.float32)
        m_S2 = m_v2[:, None] & m_d[None, :]
        if START:
            p_start2 += i_0 * ss20 + i_1 * ss21 + i_2 * ss22
            S2 = tl.load(
                p_start2 + v264[:, None] * ss2v + d64[None, :] * ss2d, mask=m_S2, other=0.0
            )
    if REVERSE:  # [W key, W query]
        m_pair = t[:, None] > t[None, :] if STRICT else t[:, None] >= t[None, :]
    else:
        m_pair = t[:, None] < t[None, :] if STRICT else t[:, None] <= t[None, :]

    chunks = tl.cdiv(length, W)
    if GATE == 1:
        g = tl.load(p_gate).to(tl.float64)
        log_g = tl.log(tl.where(g < LEAST, LEAST, g)) * power  # not maximum, which would drop a NaN
        up = (t if STRICT else t + 1) * log_g
        span = up[:, None] - ((t + 1) * log_g)[None, :]  # [W, W], of (later, earlier)
        span = span if REVERSE else tl.trans(span)
        pair = tl.exp(tl.where(m_pair, span, 0.0)).to(tl.float32)
        before, after = tl.exp(up).to(tl.float32), tl.exp((W - 1 - t) * log_g).to(tl.float32)
        total = tl.exp(W * log_g).to(tl.float32)
        rest = length - (chunks - 1) * W  # tokens of the last chunk
        after_rest = tl.exp(tl.where(t < rest, rest - 1 - t, 0) * log_g).to(tl.float32)
        total_rest = tl.exp(rest * log_g).to(tl.float32)

    for i in range(chunks):
        row = ((chunks - 1 - i) if REVERSE else i) * W
        m_t = t < length - row
        row64 = row.to(tl.int64)
        if EVERY and not REVERSE:
            _keep(p_states, saa, S, m_S, earlier + i, EVERY, ROW)
            if BC:
                _keep(p_states + D.to(tl.int64), saa, Sc, m_Sc, earlier + i, EVERY, ROW)
        m_tk, m_tv, m_tv2 = m_t[:, None] & m_d, m_t[:, None] & m_v, m_t[:, None] & m_v2
        w_pair, w_in, w_out, w_total = 1.0, 1.0, 1.0, 1.0
        if GATE == 1:
            w_pair, w_in, w_out = pair, before, tl.where(row + W > length, after_rest, after)
            w_total = tl.where(row + W > length, total_rest, total)
        if GATE == 2:
            w_pair, w_in, w_out, w_total = _chunk_weights(
                p_gate + (row64 + t64) * sgt, m_t, m_pair, power, STRICT, REVERSE
            )
        if REVERSE:
            w_in, w_out = w_out, w_in
        if UPDATE:
            b_k = tl.load(p_k + row64 * skt, mask=m_tk, other=0.0)  # [W, BD]
            b_k = _operand(b_k, OPERAND, PRECISION)
            if BC:
                b_kc = tl.load(p_kc + row64 * skct, mask=m_t[:, None] & m_c, other=0.0)  # [W, BC]
                b_kc = _operand(b_kc, OPERAND, PRECISION)
            if V_IS_K:
                b_v = b_k
            else:
                b_v = tl.load(p_v + row64 * svt, mask=m_tv, other=0.0)  # [W, BV]
                b_v = _operand(b_v, OPERAND, PRECISION)
            if TWO:
                b_v2 = tl.load(p_v2 + row64 * sv2t, mask=m_tv2, other=0.0)  # [W, BV2]
                b_v2 = _operand(b_v2, OPERAND, PRECISION)
        if READ:
            b_q = tl.load(p_q + row64 * sqt, mask=m_tk, other=0.0)  # [W, BD]
            b_q = _operand(b_q, OPERAND, PRECISION)
            if BC:
                b_qc = tl.load(p_qc + row64 * sqct, mask=m_t[:, None] & m_c, other=0.0)  # [W, BC]
                b_qc = _operand(b_qc, OPERAND, PRECISION)
            A, pairs, a_v, a_v2 = b_q, 0.0, b_q, b_q
            if UPDATE:
                A = _product(b_k, b_q, PRECISION)
                if BC:
                    A = _add_product(A, b_kc, b_qc, PRECISION)
                pairs, A = _pairs(A, m_pair, w_pair, write, GATE, WRITE, OPERAND, PRECISION)
                a_v = b_v
            if DOT:
                b_x = tl.load(p_x + row64 * sxt, mask=m_tv, other=0.0)  # [W, BV]
            if PAIRS:
                if BOTH:
                    M = _product(b_v, b_q, PRECISION)
                    pairs *= read
                else:  # so there are registers
                    M = _product(b_v, _operand(b_x, OPERAND, PRECISION), PRECISION) * read
                m_apart = m_pair & (t[:, None] != t[None, :])
                M = tl.where(m_apart, tl.fma(pairs, M, 0.0), 0.0)  # [W query, W key]
                M = M.to(p_dots.dtype.element_ty)  # float64: both sums are of the same products
                by_key = tl.sum(M, 0)
                tl.store(p_dots + T64 + row64, tl.sum(M, 1), mask=m_t)
            b_o = _product(_row_operand(S, OPERAND, PRECISION), b_q, PRECISION)
            if BC:
                b_o = _add_product(b_o, _operand(Sc, OPERAND, PRECISION), b_qc, PRECISION)
            if GATE != 0:
                b_o *= w_in[None, :]
            if DOT:
                # Products rounded before they are added: fused with the add of another lane's
                # they would leave the lanes of a row with different sums, and all store theirs.
                dots = tl.fma(b_o * read, tl.trans(b_x).to(tl.float32), 0.0)  # [BV, W]
                dots = tl.sum(dots, 0).to(p_dots.dtype.element_ty)
                if BOTH:  # b_o is of both its operands
                    dots *= 0.5
                if PAIRS:
                    dots += by_key
                tl.store(p_dots + row64, dots, mask=m_t)
            b_o = _read(b_o, a_v, A, UPDATE, PRECISION)
            if BOTH:
                B = _product(b_v, b_q, PRECISION)
                _, B = _pairs(B, m_pair, w_pair, write, GATE, WRITE, OPERAND, PRECISION)
                b_o = _read(b_o, b_k, B, True, PRECISION)
            b_o = tl.trans(b_o * read)  # [W, BV]
            if ADD:
                b_o += tl.load(p_o + row64 * sot, mask=m_tv, other=0.0).to(tl.float32)
            tl.store(p_o + row64 * sot, b_o.to(p_o.dtype.element_ty), mask=m_tv)
            if TWO:
                if UPDATE:
                    a_v2 = b_v2
                b_o2 = _product(_row_operand(S2, OPERAND, PRECISION), b_q, PRECISION)
                if GATE != 0:
                    b_o2 *= w_in[None, :]
                b_o2 = _read(b_o2, a_v2, A, UPDATE, PRECISION)
                b_o2 = tl.trans(b_o2 * read)  # [W, BV2]
                if ADD:
                    b_o2 += tl.load(p_o2 + row64 * so2t, mask=m_tv2, other=0.0).to(tl.float32)
                tl.store(p_o2 + row64 * so2t, b_o2.to(p_o2.dtype.element_ty), mask=m_tv2)
        if UPDATE:
            if BC:  # before S, whose product is awaited: see `launch.config`
                Sc = _write(Sc, b_kc, b_v, w_out, w_total, write, GATE, WRITE, OPERAND, PRECISION)
            if TWO:
                S2 = _write(S2, b_k, b_v2, w_out, w_total, write, GATE, WRITE, OPERAND, PRECISION)
            S = _write(S, b_k, b_v, w_out, w_total, write, GATE, WRITE, OPERAND, PRECISION)
            if BOTH:
                S = _write(S, b_v, b_k, w_out, 1.0, write, GATE, WRITE, OPERAND, PRECISION)
            if not READ:  # no chunk would await the last product: see `launch.config`
                S = tl.where(chunks > 0, S, 0.0)
            if EVERY and REVERSE:
                chunk = earlier + chunks - 1 - i
                _keep(p_states, saa, S, m_S, chunk, EVERY, ROW)
                if BC:
                    _keep(p_states + D.to(tl.int64), saa, Sc, m_Sc, chunk, EVERY, ROW)

    if END:  # of the heads that share a state, those along an axis of stride 0, the first writes it
        later = tl.where(se0 == 0, i_0, 0) + tl.where(se1 == 0, i_1, 0) + tl.where(se2 == 0, i_2, 0)
        if later == 0:
            p_end += i_0 * se0 + i_1 * se1 + i_2 * se2
            tl.store(p_end + v64[:, None] * sev + d64[None, :] * sed, S, mask=m_S)
        if BC:
            laterc = tl.where(se20 == 0, i_0, 0) + tl.where(se21 == 0, i_1, 0)
            if laterc + tl.where(se22 == 0, i_2, 0) == 0:
                p_end2 += i_0 * se20 + i_1 * se21 + i_2 * se22
                p_endc = p_end2 + v64[:, None] * se2v + c64[None, :] * se2d
                tl.store(p_endc, Sc, mask=m_Sc)
        if TWO:
            later2 = tl.where(se20 == 0, i_0, 0) + tl.where(se21 == 0, i_1, 0)
            if later2 + tl.where(se22 == 0, i_2, 0) == 0:
                p_end2 += i_0 * se20 + i_1 * se21 + i_2 * se22
                tl.store(p_end2 + v264[:, None] * se2v + d64[None, :] * se2d, S2, mask=m_S2)
