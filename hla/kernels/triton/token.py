"""One token through a program on an NVIDIA GPU: every state is read once and written once.

    S <- g^p S + k v'      m <- g^p m + k w      out = q' S      w of out = q' m

for each pass in turn, w of v being 1. `token_kernel` runs any program of up to three passes, a
program of the grid for a batch entry: passes hand y, u or z on in registers, whole, and go through
their states R rows at a time. A packed S is read and written as the triangle that it is.

`rows_kernel` is hla2 alone: R rows of S give as many numbers of y by themselves, S being symmetric,
and these are what the same rows of F wait for. So both are loaded together, and where batch entries
are few several programs share one: they leave the part of o of each R rows, which `add_kernel` adds
in the order in which one program would, to the same bits.

Bytes a batch entry, D = V = 128, float32: S and F in and out, 256 KB, packed 194 KB. At the 2.85
TB/s of an H100 that multiplies in place, 0.094 and 0.071 ms for 1024 entries. In a CUDA graph one
took 0.099 (95%), ahla 0.099, hla3 0.146, linear 0.052; of 16 entries 0.0047 (0.0050 where a launch
waits for the end of the one before; of 64 entries 0.0069 and 0.0075), where a graph's empty launch
takes 0.0009. Packed took 0.082 (87%; 0.083 where lines of states do not leave the cache
first, or the next launch begins later): 0.092 with no loads ahead, 0.136 with the compiler's
own, which copy four bytes at a time; with rows D - 1 - r beside rows r, of which no lane is idle,
0.107 and more, for the sums then cross all lanes. Of 16 entries it takes 0.0144.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _vector(p, stride, n, B: tl.constexpr):
    """Load n numbers, zeros behind them, [B]."""
    i = tl.arange(0, B)
    return tl.load(p + i.to(tl.int64) * stride, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def _power(g, POWER: tl.constexpr):
    """Return g^POWER, POWER of 1 to 3."""
    out = g
    for _ in tl.static_range(POWER - 1):
        out = out * g
    return out


@triton.jit
def _of(NAME: tl.constexpr, q, k, v, x, y):
    """Return the vector that a number names: q, k, v, what the first pass left, or the second."""
    if NAME == 0:  # noqa: SIM116
        return q
    elif NAME == 1:
        return k
    elif NAME == 2:
        return v
    elif NAME == 3:
        return x
    else:
        return y


@triton.jit
def _rows(x, b, R: tl.constexpr):
    """Return the b-th R numbers of a vector, [R]."""
    if x.shape[0] == R:
        return x
    else:
        x = tl.reshape(x, [x.shape[0] // R, R])
        i = tl.arange(0, x.shape[0])
        return tl.sum(tl.where((i == b)[:, None], x, 0.0), 0)


@triton.jit
def _own_rows(i0, i1, i2, s0, s1, s2, D):
    """Rows of a state that this program writes: all, if it is the first of those that share it."""
    return tl.where(i0 * (s0 == 0) + i1 * (s1 == 0) + i2 * (s2 == 0) == 0, D, 0)


@triton.jit
def _denominator(
    q, k, w, g, p_m, p_n, i0, i1, i2, sm0, sm1, sm2, smd, sn0, sn1, sn2, snd, D,
    START: tl.constexpr,
):  # fmt: skip
    """Update a state's part of the denominator, m as n, and read it: return q' n."""
    d = tl.arange(0, k.shape[0])
    m = k * w
    if START:
        m += g * _vector(p_m + (i0 * sm0 + i1 * sm1 + i2 * sm2), smd, D, k.shape[0])
    m = tl.where(d < D, m, 0.0)
    own = _own_rows(i0, i1, i2, sn0, sn1, sn2, D)
    tl.store(p_n + (i0 * sn0 + i1 * sn1 + i2 * sn2) + d.to(tl.int64) * snd, m, mask=d < own)
    return tl.sum(q * m, 0)


@triton.jit
def _block(
    p, sd, sv, b, D, V,
    WHOLE: tl.constexpr, ONCE: tl.constexpr, R: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Load the b-th R rows of a state, zeros behind them, [R, BV]."""
    r, c = b * R + tl.arange(0, R), tl.arange(0, BV)
    at = r.to(tl.int64)[:, None] * sd + c.to(tl.int64)[None, :] * sv
    if WHOLE:
        return tl.load(p + at, eviction_policy=ONCE)
    else:
        m = (r < D)[:, None] & (c < V)[None, :]
        return tl.load(p + at, mask=m, other=0.0, eviction_policy=ONCE)


@triton.jit
def _turn(
    first, q, k, v, w, g, p_S, p_m, p_T, p_n, i0, i1, i2,
    sS0, sS1, sS2, sSd, sSv, sm0, sm1, sm2, smd, sT0, sT1, sT2, sTd, sTv, sn0, sn1, sn2, snd, D, V,
    POWER: tl.constexpr, DEN: tl.constexpr, START: tl.constexpr, GATE: tl.constexpr,
    WHOLE: tl.constexpr, ONCE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Update a state (S, m) as (T, n), R rows at a time, and read it: return q' T and q' n.

    Where its ``first`` rows are there already, each block is loaded before the one before it is
    written.
    """
    BD: tl.constexpr = k.shape[0]
    BV: tl.constexpr = v.shape[0]
    c = tl.arange(0, BV)
    own = _own_rows(i0, i1, i2, sT0, sT1, sT2, D)
    p_T += i0 * sT0 + i1 * sT1 + i2 * sT2
    if START:
        p_S += i0 * sS0 + i1 * sS1 + i2 * sS2
    if GATE != 0:
        g = _power(g, POWER)
    sums = tl.zeros([R, BV], tl.float32)
    for b in range(BD // R):
        r = b * R + tl.arange(0, R)
        m_r, m_c = (r < D)[:, None], (c < V)[None, :]
        S = _rows(k, b, R)[:, None] * v[None, :]
        if first is not None:
            S += g * first
            if b + 1 < BD // R:
                first = _block(p_S, sSd, sSv, b + 1, D, V, WHOLE, ONCE, R, BV)
        elif START:
            S += g * _block(p_S, sSd, sSv, b, D, V, WHOLE, ONCE, R, BV)
        if not WHOLE:
            S = tl.where(m_r & m_c, S, 0.0)  # no 0 * inf beside what there is
        at = r.to(tl.int64)[:, None] * sTd + c.to(tl.int64)[None, :] * sTv
        if WHOLE:
            tl.store(p_T + at, S, mask=(r < own)[:, None], eviction_policy=ONCE)
        else:
            tl.store(p_T + at, S, mask=(r < own)[:, None] & m_c, eviction_policy=ONCE)
        sums += S * _rows(q, b, R)[:, None]
    weight = 0.0
    if DEN:
        weight = _denominator(
            q, k, w, g, p_m, p_n, i0, i1, i2, sm0, sm1, sm2, smd, sn0, sn1, sn2, snd, D, START
        )
    return tl.sum(sums, 0), weight


@triton.jit
def _upper(p, sd, b, D, ONCE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):
    """Load the b-th R rows of a packed triangle, zeros beside it, [R, BD]."""
    r, c = b * R + tl.arange(0, R), tl.arange(0, BD)
    there = (r < D)[:, None] & (c < D)[None, :] & (r[:, None] <= c[None, :])
    at = (r * (2 * D - r - 1) // 2)[:, None] + c[None, :]
    return tl.load(p + at.to(tl.int64) * sd, mask=there, other=0.0, eviction_policy=ONCE)


@triton.jit
def _triangle(
    q, k, g, p_S, p_T, i0, i1, i2, sS0, sS1, sS2, sSd, sT0, sT1, sT2, sTd, D,
    START: tl.constexpr, ONCE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Update S = sum k k', packed as its upper triangle, R rows at a time; return S q.

    Rows begin at any number, so a lane takes one number at a time and a warp 32 that lie together.
    Each block is loaded before the one before it is written.
    """
    BD: tl.constexpr = k.shape[0]
    c = tl.arange(0, BD)
    own = _own_rows(i0, i1, i2, sT0, sT1, sT2, D)
    p_T += i0 * sT0 + i1 * sT1 + i2 * sT2
    if START:
        p_S += i0 * sS0 + i1 * sS1 + i2 * sS2
    sums, below = tl.zeros([R, BD], tl.float32), tl.zeros([BD // R, R], tl.float32)
    if START:
        ahead = _upper(p_S, sSd, 0, D, ONCE, R, BD)
    for b in range(BD // R):
        r = b * R + tl.arange(0, R)
        S = _rows(k, b, R)[:, None] * k[None, :]
        there = (r < D)[:, None] & (c < D)[None, :] & (r[:, None] <= c[None, :])
        at = (r * (2 * D - r - 1) // 2)[:, None] + c[None, :]
        if START:
            S += g * ahead
            ahead = _upper(p_S, sSd, b + 1, D, ONCE, R, BD)
        S = tl.where(there, S, 0.0)
        m = there & (r < own)[:, None]
        tl.store(p_T + at.to(tl.int64) * sTd, S, mask=m, eviction_policy=ONCE)
        sums += S * _rows(q, b, R)[:, None]
        above = tl.where(r[:, None] < c[None, :], S, 0.0)  # stands for what is below too
        part = tl.sum(above * q[None, :], 1)
        below = tl.where((tl.arange(0, BD // R) == b)[:, None], part[None, :], below)
    return tl.sum(sums, 0) + tl.reshape(below, [BD])


@triton.jit
def _finish(p_o, sod, o, den, eps, V, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        o = o / (den + eps)
    d = tl.arange(0, o.shape[0])
    tl.store(p_o + d.to(tl.int64) * sod, o.to(p_o.dtype.element_ty), mask=d < V)


@triton.jit(do_not_specialize=["scale", "eps", "ridge", "N1", "N2"])
def token_kernel(
    p_q, p_k, p_v, p_gate, p_o,
    p_S1, p_m1, p_T1, p_n1, p_S2, p_m2, p_T2, p_n2, p_S3, p_m3, p_T3, p_n3,
    scale, eps, ridge, D, V, N1, N2,
    sq0, sq1, sq2, sqd, sk0, sk1, sk2, skd, sv0, sv1, sv2, svd, sg0, sg1, sg2, so0, so1, so2, sod,
    sS10, sS11, sS12, sS1d, sS1v, sm10, sm11, sm12, sm1d,
    sT10, sT11, sT12, sT1d, sT1v, sn10, sn11, sn12, sn1d,
    sS20, sS21, sS22, sS2d, sS2v, sm20, sm21, sm22, sm2d,
    sT20, sT21, sT22, sT2d, sT2v, sn20, sn21, sn22, sn2d,
    sS30, sS31, sS32, sS3d, sS3v, sm30, sm31, sm32, sm3d,
    sT30, sT31, sT32, sT3d, sT3v, sn30, sn31, sn32, sn3d,
    Q1: tl.constexpr, K1: tl.constexpr, V1: tl.constexpr, POWER1: tl.constexpr,
    WIDE1: tl.constexpr, DEN1: tl.constexpr,
    Q2: tl.constexpr, K2: tl.constexpr, V2: tl.constexpr, POWER2: tl.constexpr,
    WIDE2: tl.constexpr, DEN2: tl.constexpr,
    Q3: tl.constexpr, K3: tl.constexpr, V3: tl.constexpr, POWER3: tl.constexpr,
    WIDE3: tl.constexpr, DEN3: tl.constexpr,
    PACKED: tl.constexpr, RIDGE: tl.constexpr, OUT: tl.constexpr,
    START: tl.constexpr, GATE: tl.constexpr,
    NORMALIZE: tl.constexpr, WHOLE: tl.constexpr,
    ONCE: tl.constexpr,  # how long lines of states are kept
    FOLLOWS: tl.constexpr,  # it may begin before the kernel before it has ended
    R: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one batch entry, by one to three passes; the last two may be missing."""
    if FOLLOWS:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0).to(tl.int64)
    i2, i1, i0 = i % N2, i // N2 % N1, i // N2 // N1
    q = _vector(p_q + (i0 * sq0 + i1 * sq1 + i2 * sq2), sqd, D, BD) * scale
    k = _vector(p_k + (i0 * sk0 + i1 * sk1 + i2 * sk2), skd, D, BD)
    v = _vector(p_v + (i0 * sv0 + i1 * sv1 + i2 * sv2), svd, V, BV)
    g = 1.0
    if GATE != 0:
        g = tl.load(p_gate + (i0 * sg0 + i1 * sg1 + i2 * sg2))
    if GATE == 2:
        g = tl.exp(g)
    first = None
    if PACKED:  # the first pass is that of S
        w1 = 0.0
        if START:
            first = _block(
                p_S2 + (i0 * sS20 + i1 * sS21 + i2 * sS22), sS2d, sS2v, 0, D, V if WIDE2 else D,
                WHOLE, ONCE, R, BV if WIDE2 else BD,
            )  # fmt: skip
        x1 = _triangle(
            q, k, g, p_S1, p_T1, i0, i1, i2, sS10, sS11, sS12, sS1v, sT10, sT11, sT12, sT1v, D,
            START, ONCE, R,
        )  # fmt: skip
    else:
        x1, w1 = _turn(
            None,
            _of(Q1, q, k, v, None, None), _of(K1, q, k, v, None, None),
            _of(V1, q, k, v, None, None), 1.0, g, p_S1, p_m1, p_T1, p_n1, i0, i1, i2,
            sS10, sS11, sS12, sS1d, sS1v, sm10, sm11, sm12, sm1d,
            sT10, sT11, sT12, sT1d, sT1v, sn10, sn11, sn12, sn1d, D, V if WIDE1 else D,
            POWER1, DEN1, START, GATE, WHOLE, ONCE, R,
        )  # fmt: skip
    if K2 >= 0:
        x2, w2 = _turn(
            first, _of(Q2, q, k, v, x1, None), _of(K2, q, k, v, x1, None),
            _of(V2, q, k, v, x1, None), _of(V2, 1.0, 1.0, 1.0, w1, None), g,
            p_S2, p_m2, p_T2, p_n2, i0, i1, i2,
            sS20, sS21, sS22, sS2d, sS2v, sm20, sm21, sm22, sm2d,
            sT20, sT21, sT22, sT2d, sT2v, sn20, sn21, sn22, sn2d, D, V if WIDE2 else D,
            POWER2, DEN2, START, GATE, WHOLE, ONCE, R,
        )  # fmt: skip
    if K3 >= 0:
        x3, w3 = _turn(
            None, _of(Q3, q, k, v, x1, x2), _of(K3, q, k, v, x1, x2), _of(V3, q, k, v, x1, x2),
            _of(V3, 1.0, 1.0, 1.0, w1, w2), g, p_S3, p_m3, p_T3, p_n3, i0, i1, i2,
            sS30, sS31, sS32, sS3d, sS3v, sm30, sm31, sm32, sm3d,
            sT30, sT31, sT32, sT3d, sT3v, sn30, sn31, sn32, sn3d, D, V if WIDE3 else D,
            POWER3, DEN3, START, GATE, WHOLE, ONCE, R,
        )  # fmt: skip
    if OUT == 1:
        o, den = x1, w1
    elif OUT == 2:
        o, den = x2, w2
    else:
        o, den = x3, w3
    if RIDGE:
        o, den = o + ridge * x3, den + ridge * w3
    _finish(p_o + (i0 * so0 + i1 * so1 + i2 * so2), sod, o, den, eps, V, NORMALIZE)


@triton.jit(do_not_specialize=["scale", "eps", "N1", "N2", "N"])
def rows_kernel(
    p_q, p_k, p_v, p_gate, p_o, p_S, p_T, p_F, p_G, p_m, p_n, p_parts,
    scale, eps, D, V, N1, N2, N,
    sq0, sq1, sq2, sqd, sk0, sk1, sk2, skd, sv0, sv1, sv2, svd, sg0, sg1, sg2, so0, so1, so2, sod,
    sS0, sS1, sS2, sSd, sSv, sT0, sT1, sT2, sTd, sTv, sF0, sF1, sF2, sFd, sFv,
    sG0, sG1, sG2, sGd, sGv, sm0, sm1, sm2, smd, sn0, sn1, sn2, snd,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    ONCE: tl.constexpr, FOLLOWS: tl.constexpr,
    R: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of hla2: R rows of S give as many numbers of y, and these serve R rows of F.

    With ``SPLIT`` one of N programs of a batch entry, which leaves sums over R rows of F in p_parts
    (entries, BD / R, V + 1), else the only one, which adds them as `add_kernel` does.
    """
    if FOLLOWS:
        gdc_launch_dependents()
        gdc_wait()
    i, n = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        i, n = i // N, (i % N).to(tl.int32)
        p_parts += i * (BD // R) * (V + 1)
    i2, i1, i0 = i % N2, i // N2 % N1, i // N2 // N1
    c = tl.arange(0, BD)
    p_q += i0 * sq0 + i1 * sq1 + i2 * sq2
    p_k += i0 * sk0 + i1 * sk1 + i2 * sk2
    p_S += i0 * sS0 + i1 * sS1 + i2 * sS2
    p_T += i0 * sT0 + i1 * sT1 + i2 * sT2
    p_F += i0 * sF0 + i1 * sF1 + i2 * sF2
    p_G += i0 * sG0 + i1 * sG1 + i2 * sG2
    p_m += i0 * sm0 + i1 * sm1 + i2 * sm2
    p_n += i0 * sn0 + i1 * sn1 + i2 * sn2
    q = _vector(p_q, sqd, D, BD) * scale
    k = _vector(p_k, skd, D, BD)
    v = _vector(p_v + (i0 * sv0 + i1 * sv1 + i2 * sv2), svd, V, BV)
    g = 1.0
    if GATE != 0:
        g = tl.load(p_gate + (i0 * sg0 + i1 * sg1 + i2 * sg2))
    if GATE == 2:
        g = tl.exp(g)
    d = tl.arange(0, BV)
    m_c, m_d = (c < D)[None, :], (d < V)[None, :]
    blocks = BD // R // N if SPLIT else BD // R
    o, den = tl.zeros([BV], tl.float32), 0.0
    for b in range(n * blocks, n * blocks + blocks):
        r = b * R + tl.arange(0, R)
        m_r = r < D
        at_S = r.to(tl.int64)[:, None] * sSd + c.to(tl.int64)[None, :] * sSv
        at_F = r.to(tl.int64)[:, None] * sFd + d.to(tl.int64)[None, :] * sFv
        if WHOLE:
            S = tl.load(p_S + at_S, eviction_policy=ONCE)
            F = tl.load(p_F + at_F, eviction_policy=ONCE)
        else:
            S = tl.load(p_S + at_S, mask=m_r[:, None] & m_c, other=0.0, eviction_policy=ONCE)
            F = tl.load(p_F + at_F, mask=m_r[:, None] & m_d, other=0.0, eviction_policy=ONCE)
        m = tl.load(p_m + r.to(tl.int64) * smd, mask=m_r, other=0.0)
        b_q = tl.load(p_q + r.to(tl.int64) * sqd, mask=m_r, other=0.0).to(tl.float32) * scale
        b_k = tl.load(p_k + r.to(tl.int64) * skd, mask=m_r, other=0.0).to(tl.float32)
        S = g * S + b_k[:, None] * k[None, :]
        at_S = r.to(tl.int64)[:, None] * sTd + c.to(tl.int64)[None, :] * sTv
        if WHOLE:
            tl.store(p_T + at_S, S, eviction_policy=ONCE)
        else:
            tl.store(p_T + at_S, S, mask=m_r[:, None] & m_c, eviction_policy=ONCE)
        y = tl.sum(tl.where(m_c, S * q[None, :], 0.0), 1)
        F = (g * g) * F + y[:, None] * v[None, :]
        at_F = r.to(tl.int64)[:, None] * sGd + d.to(tl.int64)[None, :] * sGv
        if WHOLE:
            tl.store(p_G + at_F, F, eviction_policy=ONCE)
        else:
            tl.store(p_G + at_F, F, mask=m_r[:, None] & m_d, eviction_policy=ONCE)
        m = (g * g) * m + y
        tl.store(p_n + r.to(tl.int64) * snd, m, mask=m_r)
        part = tl.sum(tl.where(m_r[:, None], F * b_q[:, None], 0.0), 0)
        weight = tl.sum(tl.where(m_r, m * b_q, 0.0), 0)
        if SPLIT:
            tl.store(p_parts + b * (V + 1) + d, part, mask=d < V)
            tl.store(p_parts + b * (V + 1) + V, weight)
        else:
            o, den = o + part, den + weight
    if not SPLIT:
        _finish(p_o + (i0 * so0 + i1 * so1 + i2 * so2), sod, o, den, eps, V, NORMALIZE)


@triton.jit(do_not_specialize=["eps", "N1", "N2"])
def add_kernel(
    p_o, p_parts, eps, V, N1, N2, so0, so1, so2, sod,
    NORMALIZE: tl.constexpr, FOLLOWS: tl.constexpr, BLOCKS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Add what the programs of `rows_kernel` left of one batch entry, in order."""
    if FOLLOWS:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0).to(tl.int64)
    i2, i1, i0 = i % N2, i // N2 % N1, i // N2 // N1
    p_parts += i * BLOCKS * (V + 1)
    d = tl.arange(0, BV)
    o, den = tl.zeros([BV], tl.float32), 0.0
    for b in tl.static_range(BLOCKS):
        o += tl.load(p_parts + b * (V + 1) + d, mask=d < V, other=0.0)
        den += tl.load(p_parts + b * (V + 1) + V)
    _finish(p_o + (i0 * so0 + i1 * so1 + i2 * so2), sod, o, den, eps, V, NORMALIZE)
