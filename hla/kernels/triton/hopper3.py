"""hla3 on Hopper: two programs a head, of half of the values each (design: two state owners).

    y = pass(q, k, k) and S    u = pass(q, k, v) and P    o = pass^3(q, y, u) and F

As `hopper` has it, with the same three warpgroups. Three states of 128 x 128 fill more than the
registers, so a program has 64 values: its first owner holds S and makes y, the second holds P' and
F' (64, D), half of the registers each, and makes u and o. u is stored only where
it is requested. The programs of a head run side by side and read q and k by way of L2; both make y.

Chunk by chunk, where A' = upper(K Q') is the first owner's and B' = upper(Y Q') the second's:

    U' = P' Q' + V' A'    O' = F' Q' + U' B'    P' = P' + V' K    F' = F' + U' Y

Operations a token and head at D = V = 128: 393 k, 0.26 ms for B = 8, T = 4096, H = 16 at 790
TFLOP/s; 256 programs are two waves of 132. One H100 took 0.313 ms (by passes 0.437), 0.393 with a
mild decay and 0.49 to 0.52 with other gates.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .denominators import COUNT
from .hopper import (
    AHEAD,
    _at,
    _begin,
    _fade,
    _first,
    _is_mild,
    _leave,
    _mover,
    _pairs,
    _put_decays,
    _read,
    _weighed,
)
from .warpgroups import (
    LIST,
    LISTS,
    MADE,
    OUT,
    TILE,
    W,
    barrier,
    barriers,
    follow,
    is_first,
    load_state,
    store_state,
)


@gluon.jit
def _own_second(
    v_full, MILD: gl.constexpr,
    qs, ks, vs, made, us, out, tiles, weights, ends, q_full, q_free, k_free, v_free,
    there, taken, u_there, u_taken, ready, stored, paired, divided, lists, chunks,
    p_o, T, sot, sod,
    p_start2, sPd, sPv, p_end2, sPed, sPev, p_start3, sFd, sFv, p_end3, sFed, sFev,
    writes_P, writes_F, D, V, scale_u, scale_o,
    BD: gl.constexpr, GATE: gl.constexpr, GROUPS: gl.constexpr, SCALED: gl.constexpr,
    READ: gl.constexpr, KEEP_U: gl.constexpr,
    START2: gl.constexpr, END2: gl.constexpr, START3: gl.constexpr, END3: gl.constexpr,
    Q: gl.constexpr, K: gl.constexpr, V_: gl.constexpr,
):  # fmt: skip
    """Own the states of u and of o."""
    GATED: gl.constexpr = GATE > 0 and not MILD
    P = load_state(p_start2, sPd, sPv, D, V, 1.0, 0, BD, START2, False)
    F = load_state(p_start3, sFd, sFv, D, V, 1.0, 0, BD, START3, False)
    out_0 = None
    if out is not None:
        out_0 = out.index(0)
    for c in range(chunks):
        i_q, i_k, i_v, h = c % Q, c % K, c % V_, c % 2
        at1, at3 = (
            _at(c, i_q, chunks, GATE, GROUPS, 0),
            _at(c, i_q, chunks, GATE, GROUPS, GROUPS - 1),
        )
        b_qT, b_k, b_y = qs.index(i_q).permute((1, 0)), ks.index(i_k), made.index(h)
        b_vT, tile = vs.index(i_v).permute((1, 0)), tiles.index(2)
        b_uT = us.index(0).permute((1, 0))
        mbarrier.wait(q_full.index(i_q), (c // Q) & 1)
        mbarrier.wait(v_full.index(i_v), (c // V_) & 1)
        mbarrier.wait(there.index(h), (c // 2) & 1)
        fence_async_shared()
        if MILD:
            P = _fade(P, ends, at1, BD)
        u, P = _read(P, b_qT, b_vT, tiles.index(h), weights, ends, at1, 0, BD, GATED)
        if KEEP_U:
            mbarrier.wait(u_taken.index(0), (c & 1) ^ 1)
        factors = None
        if MILD:
            factors = weights.index(at1 * LISTS + MADE)
        _leave(us.index(0), None, u, 0, 0, 0, 0, 0, scale_u, factors, None, 0, SCALED)
        if READ:
            a = _begin(b_y, b_qT)
            if MILD:
                F = _fade(F, ends, at3, BD)
            _pairs(tile, a, weights, at3, GATED)  # and fences u
            if divided is not None:
                mbarrier.arrive(paired.index(0), count=1)
        else:
            fence_async_shared()
            barrier()
        if KEEP_U:
            mbarrier.arrive(u_there.index(0), count=1)
        if READ:
            if out is not None:
                mbarrier.wait(stored.index(0), (c & 1) ^ 1)
            o, F = _read(F, b_qT, b_uT, tile, weights, ends, at3, 0, BD, GATED)
            if divided is not None:
                o = warpgroup_mma_wait(0, deps=[o])
                mbarrier.wait(divided.index(0), c & 1)
            if MILD:
                factors = weights.index(at1 * LISTS + OUT)
            _leave(out_0, p_o, o, c * W, T, V, sot, sod, scale_o, factors, lists, 0, SCALED)
            if out is not None:
                mbarrier.arrive(ready.index(0), count=1)
        elif GATE > 0:
            F = _fade(F, ends, at3, BD)
        if GATE < 2:
            mbarrier.arrive(q_free.index(i_q), count=1)
        P = warpgroup_mma(_weighed(b_vT, weights, at1, 0, BD, GATED), b_k, P, is_async=True)
        F = warpgroup_mma(_weighed(b_uT, weights, at3, 0, BD, GATED), b_y, F, is_async=True)
        P, F = warpgroup_mma_wait(0, deps=[P, F])
        if GATE == 2:
            mbarrier.arrive(q_free.index(i_q), count=1)
        mbarrier.arrive(k_free.index(i_k), count=1)
        mbarrier.arrive(v_free.index(i_v), count=1)
        mbarrier.arrive(taken.index(h), count=1)
    if END2:
        store_state(p_end2, P, P, sPed, sPev, writes_P, D, V, 1, BD)
    if END3:
        store_state(p_end3, F, F, sFed, sFev, writes_F, D, V, 1, BD)


@gluon.jit
def _second(mild, v_full, v_ready, rest):
    """Own the states of u and of o, by the decay's factors if it is mild."""
    if mild is None:
        _own_second(v_full, False, *rest)
    elif mild:
        _own_second(v_ready, True, *rest)
    else:
        _own_second(v_full, False, *rest)


@gluon.jit(
    do_not_specialize=[
        "scale_y", "scale_u", "scale_o", "eps", "T", "D", "V", "N1", "N2",
        "sq0", "sq1", "sq2", "sqt", "sqd",
        "sk0", "sk1", "sk2", "skt", "skd",
        "sv0", "sv1", "sv2", "svt", "svd",
        "sy0", "sy1", "sy2", "syt", "syd",
        "su0", "su1", "su2", "sut", "sud",
        "so0", "so1", "so2", "sot", "sod",
        "sS0", "sS1", "sS2", "sSn", "sSd", "sSv",
        "sSe0", "sSe1", "sSe2", "sSen", "sSed", "sSev",
        "sP0", "sP1", "sP2", "sPn", "sPd", "sPv",
        "sPe0", "sPe1", "sPe2", "sPen", "sPed", "sPev",
        "sF0", "sF1", "sF2", "sFn", "sFd", "sFv",
        "sFe0", "sFe1", "sFe2", "sFen", "sFed", "sFev", "sx0", "sx1", "sx2", "sxt", "sxd",
        "sden0", "sden1", "sden2", "sdent", "sdend", "sone0", "sone1", "sone2", "sonet", "soned",
        "sm0", "sm1", "sm2", "smn", "smd", "smv", "sme0", "sme1", "sme2", "smen", "smed", "smev",
        "sn0", "sn1", "sn2", "snn", "snd", "snv", "sne0", "sne1", "sne2", "snen", "sned", "snev",
        "sg0", "sg1", "sg2", "sgt",
    ],
    do_not_specialize_on_alignment=[
        "p_gate", "p_start1", "p_end1", "p_start2", "p_end2", "p_start3", "p_end3",
        "p_x", "p_den", "p_one", "p_m", "p_me", "p_n", "p_ne",
    ],
)  # fmt: skip
def triple_kernel(
    p_q, p_k, p_v, p_y, p_u, p_o, p_start1, p_end1, p_start2, p_end2, p_start3, p_end3,
    p_x, p_den, p_one, p_m, p_me, p_n, p_ne, p_gate,
    scale_y, scale_u, scale_o, eps, T, tokens, D, V, N1, N2,
    sq0, sq1, sq2, sqt, sqd,
    sk0, sk1, sk2, skt, skd,
    sv0, sv1, sv2, svt, svd,
    sy0, sy1, sy2, syt, syd,
    su0, su1, su2, sut, sud,
    so0, so1, so2, sot, sod,
    sS0, sS1, sS2, sSn, sSd, sSv,
    sSe0, sSe1, sSe2, sSen, sSed, sSev,
    sP0, sP1, sP2, sPn, sPd, sPv,
    sPe0, sPe1, sPe2, sPen, sPed, sPev,
    sF0, sF1, sF2, sFn, sFd, sFv,
    sFe0, sFe1, sFe2, sFen, sFed, sFev,
    sx0, sx1, sx2, sxt, sxd,  # the numerators, in float32
    sden0, sden1, sden2, sdent, sdend,  # the denominators of o, and of u
    sone0, sone1, sone2, sonet, soned,
    sm0, sm1, sm2, smn, smd, smv,  # states of denominators: those of u, first and last
    sme0, sme1, sme2, smen, smed, smev,
    sn0, sn1, sn2, snn, snd, snv,  # and those of o
    sne0, sne1, sne2, snen, sned, snev,
    sg0, sg1, sg2, sgt,
    READ: gl.constexpr,  # o is requested, not the states alone
    WIDE: gl.constexpr,  # in float32
    KEEP_Y: gl.constexpr,  # y is stored
    KEEP_U: gl.constexpr,
    GATE: gl.constexpr,  # 0 none, 1 decay, 2 log_gate
    POWER1: gl.constexpr,  # of y and u
    POWER2: gl.constexpr,
    SCALED: gl.constexpr,  # a scale is not 1
    START1: gl.constexpr,
    END1: gl.constexpr,
    START2: gl.constexpr,
    END2: gl.constexpr,
    START3: gl.constexpr,
    END3: gl.constexpr,
    SUMS: gl.constexpr,  # there are denominators, stored or divided by, or states of them
    DEN: gl.constexpr,  # the first; with eps o is divided
    BD: gl.constexpr,  # tile of 64 or 128 keys; of values it is 64
    WHOLE_D: gl.constexpr,  # D == BD
    WHOLE_V: gl.constexpr,  # 64 divides V
    FAST: gl.constexpr,  # rows are of whole 16 bytes; strides of q, k, v, y, u and o count by 8
):  # fmt: skip
    """One head, or a segment of ``tokens`` of one, and 64 values; the grid counts these fastest."""
    UNIT: gl.constexpr = 8 if FAST else 1
    tiles_v = (V + 63) // 64
    i_v, i_head = gl.program_id(0) % tiles_v, gl.program_id(0) // tiles_v
    if tokens is not None:
        parts = (T + tokens - 1) // tokens
        part, i_head = (i_head % parts).to(gl.int64), i_head // parts
        first = part * tokens
        T = gl.minimum(T - first, tokens).to(gl.int32)
        p_q += first * sqt * UNIT
        p_k += first * skt * UNIT
        p_v += first * svt * UNIT
        if KEEP_Y:
            p_y += first * syt * UNIT
        if KEEP_U:
            p_u += first * sut * UNIT
        if READ:
            p_o += first * sot * UNIT
        if GATE == 2:
            p_gate += first * sgt
        if START1:
            p_start1 += part * sSn
        if END1:
            p_end1 += part * sSen
        if START2:
            p_start2 += part * sPn
        if END2:
            p_end2 += part * sPen
        if START3:
            p_start3 += part * sFn
        if END3:
            p_end3 += part * sFen
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
    v64 = i_v.to(gl.int64) * 64
    V = V - i_v * 64
    p_q += (i_0 * sq0 + i_1 * sq1 + i_2 * sq2) * UNIT
    p_k += (i_0 * sk0 + i_1 * sk1 + i_2 * sk2) * UNIT
    p_v += (i_0 * sv0 + i_1 * sv1 + i_2 * sv2) * UNIT + v64 * svd
    if READ:
        p_o += (i_0 * so0 + i_1 * so1 + i_2 * so2) * UNIT + v64 * sod
    T_y, T_u = T, T
    if KEEP_Y:
        p_y += (i_0 * sy0 + i_1 * sy1 + i_2 * sy2) * UNIT
        T_y = gl.where(is_first(i_0, i_1, i_2, sy0, sy1, sy2) & (i_v == 0), T, 0)
    if KEEP_U:
        p_u += (i_0 * su0 + i_1 * su1 + i_2 * su2) * UNIT + v64 * sud
        T_u = gl.where(is_first(i_0, i_1, i_2, su0, su1, su2), T, 0)
    if START1:
        p_start1 += i_0 * sS0 + i_1 * sS1 + i_2 * sS2
    if START2:
        p_start2 += i_0 * sP0 + i_1 * sP1 + i_2 * sP2 + v64 * sPv
    if START3:
        p_start3 += i_0 * sF0 + i_1 * sF1 + i_2 * sF2 + v64 * sFv
    writes_S, writes_P, writes_F = True, True, True
    if END1:
        p_end1 += i_0 * sSe0 + i_1 * sSe1 + i_2 * sSe2
        writes_S = is_first(i_0, i_1, i_2, sSe0, sSe1, sSe2) & (i_v == 0)
    if END2:
        p_end2 += i_0 * sPe0 + i_1 * sPe1 + i_2 * sPe2 + v64 * sPev
        writes_P = is_first(i_0, i_1, i_2, sPe0, sPe1, sPe2)
    if END3:
        p_end3 += i_0 * sFe0 + i_1 * sFe1 + i_2 * sFe2 + v64 * sFev
        writes_F = is_first(i_0, i_1, i_2, sFe0, sFe1, sFe2)
    if p_x is not None:
        p_x += i_0 * sx0 + i_1 * sx1 + i_2 * sx2 + v64 * sxd
    T_den, T_one, writes_m, writes_n = T, T, True, True
    if p_den is not None:
        p_den += i_0 * sden0 + i_1 * sden1 + i_2 * sden2
        T_den = gl.where(is_first(i_0, i_1, i_2, sden0, sden1, sden2) & (i_v == 0), T, 0)
    if p_one is not None:
        p_one += i_0 * sone0 + i_1 * sone1 + i_2 * sone2
        T_one = gl.where(is_first(i_0, i_1, i_2, sone0, sone1, sone2) & (i_v == 0), T, 0)
    if p_m is not None:
        p_m += i_0 * sm0 + i_1 * sm1 + i_2 * sm2
    if p_n is not None:
        p_n += i_0 * sn0 + i_1 * sn1 + i_2 * sn2
    if p_me is not None:
        p_me += i_0 * sme0 + i_1 * sme1 + i_2 * sme2
        writes_m = is_first(i_0, i_1, i_2, sme0, sme1, sme2) & (i_v == 0)
    if p_ne is not None:
        p_ne += i_0 * sne0 + i_1 * sne1 + i_2 * sne2
        writes_n = is_first(i_0, i_1, i_2, sne0, sne1, sne2) & (i_v == 0)
    if GATE > 0:
        p_gate += i_0 * sg0 + i_1 * sg1 + i_2 * sg2

    chunks = (T + W - 1) // W
    if WIDE:
        p_x, sxt, sxd = p_o, gl.to_tensor(sot).to(gl.int64) * UNIT, sod
    Q: gl.constexpr = AHEAD
    K: gl.constexpr = AHEAD if GATE == 0 else AHEAD - 1
    V_: gl.constexpr = 3
    GROUPS: gl.constexpr = 1 if POWER1 == POWER2 else 2
    SLOTS: gl.constexpr = (AHEAD if GATE == 2 else 2) * GROUPS
    LOADS: gl.constexpr = 128 if FAST else 1  # a copy arrives with each of the mover's threads
    qs = gl.allocate_shared_memory(gl.bfloat16, [Q, W, BD], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [K, W, BD], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [V_, W, 64], TILE)
    made = gl.allocate_shared_memory(gl.bfloat16, [2, W, BD], TILE)
    us = gl.allocate_shared_memory(gl.bfloat16, [1, W, 64], TILE)
    out = gl.allocate_shared_memory(gl.bfloat16, [1, W, 64], TILE)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [3, W, W], TILE)  # A', A', B'
    weights = gl.allocate_shared_memory(gl.float32, [SLOTS * LISTS, W], LIST)
    ends = gl.allocate_shared_memory(gl.float32, [SLOTS, 1], LIST)
    q_full, q_free = barriers(Q, LOADS + (1 if GATE == 2 else 0)), barriers(Q, 2)
    k_full, k_free = barriers(K, LOADS), barriers(K, 2)
    v_full, v_free = barriers(V_, LOADS), barriers(V_, 1)
    there, taken = barriers(2, 1), barriers(2, 2 if KEEP_Y or SUMS else 1)
    u_there, u_taken, ready, stored = None, None, None, None  # see `barriers`
    if KEEP_U:
        u_there, u_taken = barriers(1, 1), barriers(1, 1)
    if READ and not WIDE:
        ready, stored = barriers(1, 1), barriers(1, 1)
    lists, paired, divided = None, None, None
    if SUMS:
        lists = gl.allocate_shared_memory(gl.float32, [COUNT, W], LIST)
    if DEN:
        paired, divided = barriers(1, 1), barriers(1, 1)
    FACTORED: gl.constexpr = GATE == 1 and not SUMS
    mild, k_ready, v_ready = None, None, None
    follow()
    if FACTORED:
        mild = _is_mild(p_gate, POWER2)
        k_ready, v_ready = barriers(K, 1), barriers(V_, 1)
    if GATE == 1:
        _put_decays(mild, weights, ends, p_gate, T, chunks, POWER1, POWER2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_first, (mild, k_full, k_ready, (
                qs, ks, vs, made, tiles, weights, ends, q_full, q_free, k_free, v_full, v_free,
                there, taken, chunks, p_start1, sSd, sSv, p_end1, sSed, sSev, writes_S, D, D,
                scale_y, BD // 64, BD, False, True, GATE, GROUPS, SCALED, START1, END1, Q, K, V_,
            ))),
            (_second, (mild, v_full, v_ready, (
                qs, ks, vs, made, us, out if READ and not WIDE else None, tiles, weights, ends,
                q_full, q_free, k_free, v_free, there, taken, u_there, u_taken,
                ready, stored, paired, divided, lists if eps is not None else None,
                chunks, p_x, T, sxt, sxd,
                p_start2, sPd, sPv, p_end2, sPed, sPev, p_start3, sFd, sFv, p_end3, sFed, sFev,
                writes_P, writes_F, D, V, scale_u, scale_o,
                BD, GATE, GROUPS, SCALED, READ, KEEP_U, START2, END2, START3, END3, Q, K, V_,
            ))),
            (_mover, (mild, k_ready, v_ready, (
                p_q, p_k, p_v, p_y, p_u, p_o, p_gate, qs, ks, vs, made, us, out, weights, ends,
                q_full, q_free, k_full, k_free, v_full, v_free, there, taken, u_there, u_taken,
                ready, stored, chunks, T, T_y, T_u, D, V,
                sqt, sqd, skt, skd, svt, svd, syt, syd, sut, sud, sot, sod, sgt,
                tiles, lists, paired, divided, p_one, T_one, sonet, scale_u, p_den, T_den, sdent,
                scale_o, eps, p_m, smd, p_me, smed, writes_m, p_n, snd, p_ne, sned, writes_n,
                BD, 64, False, GATE, POWER1, POWER2, READ and not WIDE, KEEP_Y, KEEP_U, SUMS, True,
                2, FAST, WHOLE_D, WHOLE_V, Q - K, Q - V_, Q, K, V_,
            ))),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip
