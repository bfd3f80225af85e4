"""ahla, last token first: the gradients of u, v and k from two states.

    R1 = sum q do'    dU = K R1 + up(K Q') dO
    R2 = sum q du'    dV = K R2 + up(K Q') dU    dK = U R1' + V R2' + (up(U dO') + up(V dU')) Q

The first partition owns R1, which is read both ways round from a bfloat16 copy: dU takes dO's place
once R1 has it, and its part of dK U's. The second owns R2 as blocks of 64 x 64: dK' is read from
registers, and dV, half of its columns at a time, from copies of two blocks in V's place, which dV
then takes. The third partition moves, as in `hopper_reverse`.

Bytes a token and head, D = V = 128: 8 rows of 256, 0.358 ms for B = 8, T = 4096, H = 16 at 3.0
TB/s; 0.407 ms on one H100 (88%). Two sweeps of a state each move 13 rows and took 0.63.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_parts import (
    PIECES,
    _fetch,
    _gate_sums,
    _operand,
    _power,
    _put,
    _put_decay,
    _put_gate,
    _put_pairs,
    _scaled,
    _slot,
    _total,
    _weigh,
    _weighed,
)
from .hopper_reverse import _read_block, _rounded, _rows
from .warpgroups import (
    A64,
    A128,
    ACC64,
    ACC128,
    AFTER,
    LIST,
    LISTS,
    TILE,
    W,
    barrier,
    barriers,
    load_state,
    store_half,
)


@gluon.jit
def _owner_1(
    qs, ks, gs, us, copies, tiles, weights, pieces, ends, full, du_there, part_there, chunks, zero,
    p_start, ssd, ssv, p_end, sed, sev, D, V, scale, unscale,
    HALVES: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, SCALED: gl.constexpr, POWER: gl.constexpr, READ: gl.constexpr,
    START: gl.constexpr, END: gl.constexpr,
):  # fmt: skip
    """Own R1, [D, V]: make du, and the part of dk that is of u."""
    ACC: gl.constexpr = ACC128 if B == 128 else ACC64
    A: gl.constexpr = A128 if B == 128 else A64
    R0 = load_state(p_start, ssv, ssd, V, D, unscale, 0, B, START, True)
    R1 = R0
    copy = copies.index(zero)
    copy.slice(0, 64, 0).store(R0.to(gl.bfloat16))
    if HALVES == 2:
        R1 = load_state(p_start, ssv, ssd, V, D, unscale, 64, B, START, True)
        copy.slice(64, 64, 0).store(R1.to(gl.bfloat16))
    z = zero
    for i in range(chunks):
        c, s, z = chunks - 1 - i, i % STAGES, z & i
        slot, copy = _slot(c, s, chunks, GATE), copies.index(z)
        tile1, tile2 = tiles.index(z), tiles.index(z + 1)
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        fence_async_shared()
        b_q, b_k, b_g, b_u = qs.index(s), ks.index(s), gs.index(s), us.index(s)
        if READ:  # before du is where do was
            _put_pairs(tile2, b_u, b_g, weights, slot, True, POWER)
        _put_pairs(tile1, b_k, b_q, weights, slot, True, POWER)
        fence_async_shared()
        barrier()
        du = _rows(b_k, copy, tile1, b_g, weights, slot, POWER, B)
        du = _scaled(du, scale, SCALED).to(gl.bfloat16)
        qT = b_q.permute((1, 0))
        if POWER > 0:
            R0 = _total(R0, ends, slot, POWER, ACC)
            x = _weighed(qT.slice(0, 64, 0), pieces, slot, 0, A)
            R0 = warpgroup_mma(x, b_g, R0, is_async=True)
            if HALVES == 2:  # one after the other, else registers would not suffice
                R0 = warpgroup_mma_wait(0, deps=[R0])
                R1 = _total(R1, ends, slot, POWER, ACC)
                x1 = _weighed(qT.slice(64, 64, 0), pieces, slot, 0, A)
                R1 = warpgroup_mma(x1, b_g, R1, is_async=True)
        else:
            R0 = warpgroup_mma(qT.slice(0, 64, 0), b_g, R0, is_async=True)
            if HALVES == 2:
                R1 = warpgroup_mma(qT.slice(64, 64, 0), b_g, R1, is_async=True)
        if HALVES == 2:
            R0, R1 = warpgroup_mma_wait(0, deps=[R0, R1])
        else:
            R0 = warpgroup_mma_wait(0, deps=[R0])
        b_g.store(du)
        fence_async_shared()
        mbarrier.arrive(du_there.index(s), count=1)
        if READ:
            dk = _rows(b_u, copy.permute((1, 0)), tile2, b_q, weights, slot, POWER, B)
            b_u.store(_scaled(dk, scale, SCALED).to(gl.bfloat16))
        copy.slice(0, 64, 0).store(R0.to(gl.bfloat16))
        if HALVES == 2:
            copy.slice(64, 64, 0).store(R1.to(gl.bfloat16))
        mbarrier.arrive(part_there.index(s), count=1)
    if END:
        store_half(p_end, R0, sev, sed, V, D, scale, 0, B, True)
        if HALVES == 2:
            store_half(p_end, R1, sev, sed, V, D, scale, 64, B, True)


@gluon.jit
def _dk(
    R0, R1, vT, qT, tile, weights, slot,
    HALVES: gl.constexpr, POWER: gl.constexpr,
):  # fmt: skip
    """Return R V' + Q' tile of 64 rows of R, which are two blocks."""
    o = gl.zeros([64, W], gl.float32, ACC64)
    o = warpgroup_mma(_operand(R0), vT.slice(0, 64, 0), o, use_acc=False, is_async=True)
    if HALVES == 2:
        o = warpgroup_mma_wait(0, deps=[o])
        o = warpgroup_mma(_operand(R1), vT.slice(64, 64, 0), o, is_async=True)
    o = _read_block(o, weights, slot, POWER)
    o = warpgroup_mma(qT, tile, o, is_async=True)
    return warpgroup_mma_wait(0, deps=[o])


@gluon.jit
def _dv(
    R0, R1, one, b_k, room, tile, b_du, weights, slot,
    HALVES: gl.constexpr, POWER: gl.constexpr,
):  # fmt: skip
    """Return K R + tile dU of 64 columns, which are two blocks of R, copied to shared memory.

    Times one, which the compiler does not know: else it would keep what `_dk` rounded till here.
    """
    room.slice(0, 64, 1).store((R0 * one).to(gl.bfloat16))
    if HALVES == 2:
        room.slice(64, 64, 1).store((R1 * one).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    o = gl.zeros([W, 64], gl.float32, ACC64)
    k0, r0 = b_k.slice(0, 64, 1), room.slice(0, 64, 1)
    o = warpgroup_mma(k0, r0, o, use_acc=False, is_async=True)
    if HALVES == 2:
        o = warpgroup_mma(b_k.slice(64, 64, 1), room.slice(64, 64, 1), o, is_async=True)
    if POWER > 0:
        o = warpgroup_mma_wait(0, deps=[o])
        o *= _power(_weigh(weights, slot, AFTER, gl.SliceLayout(1, ACC64)), POWER)[:, None]
    o = warpgroup_mma(tile, b_du, o, is_async=True)
    return warpgroup_mma_wait(0, deps=[o])


@gluon.jit
def _columns(p_start, sd, sv, D, V, unscale, ROW: gl.constexpr, START: gl.constexpr):
    """Return columns 64 to 127 of 64 rows of a first state."""
    if START:
        p_start += sv.to(gl.int64) * 64
    return load_state(p_start, sv, sd, V - 64, D, unscale, ROW, 64, START, True)


@gluon.jit
def _leave(
    p_end, R0, R1, sd, sv, D, V, scale, ROW: gl.constexpr, HALVES: gl.constexpr
):  # fmt: skip
    """Store 64 rows of a last state, which are two blocks."""
    store_half(p_end, R0, sv, sd, V, D, scale, ROW, 64, True)
    if HALVES == 2:
        p_end += sv.to(gl.int64) * 64
        store_half(p_end, R1, sv, sd, V - 64, D, scale, ROW, 64, True)


@gluon.jit
def _owner_2(
    qs, ks, vs, gs, us, tiles, weights, pieces, ends, full, du_there, part_there, done,
    chunks, zero,
    p_start, ssd, ssv, p_end, sed, sev, D, V, scale, unscale,
    HALVES: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, SCALED: gl.constexpr,
    POWER: gl.constexpr, READ: gl.constexpr, START: gl.constexpr, END: gl.constexpr,
):  # fmt: skip
    """Own R2, [D, V], in blocks: make dv, and dk of its part and that of R1."""
    R00 = load_state(p_start, ssv, ssd, V, D, unscale, 0, 64, START, True)
    R01, R10, R11 = R00, R00, R00
    if HALVES == 2:
        R01 = _columns(p_start, ssd, ssv, D, V, unscale, 0, START)
        R10 = load_state(p_start, ssv, ssd, V, D, unscale, 64, 64, START, True)
        R11 = _columns(p_start, ssd, ssv, D, V, unscale, 64, START)
    z, one = zero, (zero + 1).to(gl.float32)
    for i in range(chunks):
        c, s, z = chunks - 1 - i, i % STAGES, z & i
        slot, tile = _slot(c, s, chunks, GATE), tiles.index(z + 2)
        b_q, b_k, b_v, b_du = qs.index(s), ks.index(s), vs.index(s), gs.index(s)
        qT, vT, outT = b_q.permute((1, 0)), b_v.permute((1, 0)), us.index(s).permute((1, 0))
        qT0, du0 = qT.slice(0, 64, 0), b_du.slice(0, 64, 1)
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        mbarrier.wait(du_there.index(s), (i // STAGES) & 1)
        fence_async_shared()
        if READ:
            _put_pairs(tile, b_du, b_v, weights, slot, False, POWER)
            fence_async_shared()
            barrier()
            o = _dk(R00, R01, vT, qT0, tile, weights, slot, HALVES, POWER)
            mbarrier.wait(part_there.index(s), (i // STAGES) & 1)
            outT.slice(0, 64, 0).store(_rounded(o, outT.slice(0, 64, 0), scale, SCALED, True))
            if HALVES == 2:
                qT1 = qT.slice(64, 64, 0)
                o = _dk(R10, R11, vT, qT1, tile, weights, slot, HALVES, POWER)
                outT.slice(64, 64, 0).store(_rounded(o, outT.slice(64, 64, 0), scale, SCALED, True))
            _put_pairs(tile, b_k, b_q, weights, slot, True, POWER)
            o = _dv(R00, R10, one, b_k, b_v, tile, du0, weights, slot, HALVES, POWER)
            dv0 = _scaled(o, scale, SCALED).to(gl.bfloat16)
            if HALVES == 2:
                du1 = b_du.slice(64, 64, 1)
                o = _dv(R01, R11, one, b_k, b_v, tile, du1, weights, slot, HALVES, POWER)
                b_v.slice(64, 64, 1).store(_scaled(o, scale, SCALED).to(gl.bfloat16))
            b_v.slice(0, 64, 1).store(dv0)
        else:
            mbarrier.wait(part_there.index(s), (i // STAGES) & 1)
        x = qT0
        if POWER > 0:
            R00 = _total(R00, ends, slot, POWER, ACC64)
            x = _weighed(qT0, pieces, slot, 1, A64)
        R00 = warpgroup_mma(x, du0, R00, is_async=True)
        if HALVES == 2:
            du1 = b_du.slice(64, 64, 1)
            if POWER > 0:
                R01 = _total(R01, ends, slot, POWER, ACC64)
            R01 = warpgroup_mma(x, du1, R01, is_async=True)
            x1 = qT.slice(64, 64, 0)
            if POWER > 0:
                R00, R01 = warpgroup_mma_wait(0, deps=[R00, R01])
                R10 = _total(R10, ends, slot, POWER, ACC64)
                R11 = _total(R11, ends, slot, POWER, ACC64)
                x1 = _weighed(x1, pieces, slot, 1, A64)
            R10 = warpgroup_mma(x1, du0, R10, is_async=True)
            R11 = warpgroup_mma(x1, du1, R11, is_async=True)
            R00, R01, R10, R11 = warpgroup_mma_wait(0, deps=[R00, R01, R10, R11])
        else:
            R00 = warpgroup_mma_wait(0, deps=[R00])
        mbarrier.arrive(done.index(s), count=1)
    if END:
        _leave(p_end, R00, R01, sed, sev, D, V, scale, 0, HALVES)
        if HALVES == 2:
            _leave(p_end, R10, R11, sed, sev, D, V, scale, 64, HALVES)


@gluon.jit
def _mover(
    p_q, p_k, p_v, p_g, p_u, p_du, p_dv, p_dk, p_gate, qs, ks, vs, gs, us, weights, pieces, ends,
    full, du_there, done, chunks, T, D, V,
    sqt, sqd, skt, skd, svt, svd, sgt, sgd, sut, sud, sat, sad, sbt, sbd, sct, scd, sft,
    READ: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr,
    POWER1: gl.constexpr, POWER2: gl.constexpr,
    FAST: gl.constexpr, WHOLE_D: gl.constexpr, WHOLE_V: gl.constexpr,
):  # fmt: skip
    """Load what the owners read; store what they leave in its place."""
    for i in range(chunks + STAGES):
        s, turn = i % STAGES, ((i // STAGES) & 1) ^ 1
        row = (chunks - 1 - i) * W
        left = row + STAGES * W
        if i >= STAGES:
            if READ:
                mbarrier.wait(du_there.index(s), turn)
                _put(p_du, gs.index(s), left, T, V, sat, sad, B, FAST, WHOLE_V)
                barrier()
            mbarrier.wait(done.index(s), turn)
        if i < chunks:
            _fetch(ks.index(s), p_k, row, T, D, skt, skd, B, FAST, WHOLE_D)
            _fetch(qs.index(s), p_q, row, T, D, sqt, sqd, B, FAST, WHOLE_D)
            _fetch(gs.index(s), p_g, row, T, V, sgt, sgd, B, FAST, WHOLE_V)
        if READ:
            if i >= STAGES:
                _put(p_dk, us.index(s), left, T, D, sct, scd, B, FAST, WHOLE_D)
                barrier()
            if i < chunks:
                _fetch(us.index(s), p_u, row, T, V, sut, sud, B, FAST, WHOLE_V)
            if i >= STAGES:
                _put(p_dv, vs.index(s), left, T, V, sbt, sbd, B, FAST, WHOLE_V)
                barrier()
            if i < chunks:
                _fetch(vs.index(s), p_v, row, T, V, svt, svd, B, FAST, WHOLE_V)
        if i < chunks:
            if FAST:
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            if GATE == 2:
                sums, last = _gate_sums(p_gate, sft, row, T)
                _put_gate(weights, pieces, ends, s, sums, last, False, POWER1, POWER2)
            if GATE == 2 or not FAST:
                mbarrier.arrive(full.index(s), count=1)


@gluon.jit(
    do_not_specialize=[
        "scale", "unscale", "T", "D", "V", "N1", "N2",
        "sq0", "sq1", "sq2", "sk0", "sk1", "sk2",
        "sv0", "sv1", "sv2", "sg0", "sg1", "sg2",
        "su0", "su1", "su2", "sa0", "sa1", "sa2",
        "sb0", "sb1", "sb2", "sc0", "sc1", "sc2",
        "ss0", "ss1", "ss2", "ssn", "ssd", "ssv", "sz0", "sz1", "sz2", "szn", "szd", "szv",
        "se0", "se1", "se2", "sen", "sed", "sev", "sw0", "sw1", "sw2", "swn", "swd", "swv",
        "sf0", "sf1", "sf2", "sft",
    ],
    do_not_specialize_on_alignment=["p_gate", "p_start1", "p_start2", "p_end1", "p_end2"],
)  # fmt: skip
def ahla_kernel(
    p_q, p_k, p_v, p_g, p_u, p_du, p_dv, p_dk, p_start1, p_start2, p_end1, p_end2, p_gate,
    scale, unscale, T, tokens, D, V, N1, N2,
    sq0, sq1, sq2,
    sk0, sk1, sk2,
    sv0, sv1, sv2,
    sg0, sg1, sg2,
    su0, su1, su2,
    sa0, sa1, sa2,  # du
    sb0, sb1, sb2,  # dv
    sc0, sc1, sc2,  # dk
    ss0, ss1, ss2, ssn, ssd, ssv,  # the last R1
    sz0, sz1, sz2, szn, szd, szv,  # the last R2
    se0, se1, se2, sen, sed, sev,  # R1 at the first token
    sw0, sw1, sw2, swn, swd, swv,  # R2 there
    sf0, sf1, sf2, sft,
    sqt: gl.constexpr,
    sqd: gl.constexpr,
    skt: gl.constexpr,
    skd: gl.constexpr,
    svt: gl.constexpr,
    svd: gl.constexpr,
    sgt: gl.constexpr,
    sgd: gl.constexpr,
    sut: gl.constexpr,
    sud: gl.constexpr,
    sat: gl.constexpr,
    sad: gl.constexpr,
    sbt: gl.constexpr,
    sbd: gl.constexpr,
    sct: gl.constexpr,
    scd: gl.constexpr,
    GATE: gl.constexpr,  # 0 none, 1 decay, 2 log_gate
    SCALED: gl.constexpr,  # scale is not 1
    READ: gl.constexpr,  # du, dv and dk are asked, not R2 alone
    POWER1: gl.constexpr,  # of R1
    POWER2: gl.constexpr,  # of R2
    START1: gl.constexpr,
    START2: gl.constexpr,
    END1: gl.constexpr,
    END2: gl.constexpr,
    B: gl.constexpr,  # tiles of 64 or 128 keys and values
    WHOLE_D: gl.constexpr,  # D == B
    WHOLE_V: gl.constexpr,
    FAST: gl.constexpr,  # rows are of whole 16 bytes; strides of the batch count by 8
):  # fmt: skip
    """One head, or one segment of so many ``tokens`` of it, its last token first."""
    STAGES: gl.constexpr = 2  # chunks in shared memory
    UNIT: gl.constexpr = 8 if FAST else 1
    HALVES: gl.constexpr = B // 64
    i_head = gl.program_id(0)
    if tokens is not None:  # a segment is a batch entry
        parts = (T + tokens - 1) // tokens
        part, i_head = (i_head % parts).to(gl.int64), i_head // parts
        first = part * tokens
        T = gl.minimum(T - first, tokens).to(gl.int32)
        p_q += first * sqt
        p_k += first * skt
        p_g += first * sgt
        if READ:
            p_v += first * svt
            p_u += first * sut
            p_du += first * sat
            p_dv += first * sbt
            p_dk += first * sct
        if GATE == 2:
            p_gate += first * sft
        if START1:
            p_start1 += part * ssn
        if START2:
            p_start2 += part * szn
        if END1:
            p_end1 += part * sen
        if END2:
            p_end2 += part * swn
    i_2 = (i_head % N2).to(gl.int64)
    i_1 = (i_head // N2 % N1).to(gl.int64)
    i_0 = (i_head // N2 // N1).to(gl.int64)
    p_q += (i_0 * sq0 + i_1 * sq1 + i_2 * sq2) * UNIT
    p_k += (i_0 * sk0 + i_1 * sk1 + i_2 * sk2) * UNIT
    p_g += (i_0 * sg0 + i_1 * sg1 + i_2 * sg2) * UNIT
    if READ:
        p_v += (i_0 * sv0 + i_1 * sv1 + i_2 * sv2) * UNIT
        p_u += (i_0 * su0 + i_1 * su1 + i_2 * su2) * UNIT
        p_du += (i_0 * sa0 + i_1 * sa1 + i_2 * sa2) * UNIT
        p_dv += (i_0 * sb0 + i_1 * sb1 + i_2 * sb2) * UNIT
        p_dk += (i_0 * sc0 + i_1 * sc1 + i_2 * sc2) * UNIT
    if START1:
        p_start1 += i_0 * ss0 + i_1 * ss1 + i_2 * ss2
    if START2:
        p_start2 += i_0 * sz0 + i_1 * sz1 + i_2 * sz2
    if END1:
        p_end1 += i_0 * se0 + i_1 * se1 + i_2 * se2
    if END2:
        p_end2 += i_0 * sw0 + i_1 * sw1 + i_2 * sw2
    if GATE > 0:
        p_gate += i_0 * sf0 + i_1 * sf1 + i_2 * sf2

    chunks = (T + W - 1) // W
    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    gs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    us = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    copies = gl.allocate_shared_memory(gl.bfloat16, [1, B, B], TILE)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [3, W, W], TILE)
    SLOTS: gl.constexpr = STAGES if GATE == 2 else 2
    weights = gl.allocate_shared_memory(gl.float32, [SLOTS * LISTS, W], LIST)
    pieces = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * PIECES, W], LIST)
    ends = gl.allocate_shared_memory(gl.float32, [SLOTS, 1], LIST)
    ALONE: gl.constexpr = 0 if GATE == 2 or not FAST else 1
    LOADS: gl.constexpr = 128 if FAST else 0  # a copy arrives with each of the mover's threads
    full = barriers(STAGES, LOADS + (1 - ALONE))
    du_there, part_there, done = barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    if GATE == 1:
        _put_decay(weights, pieces, ends, p_gate, T, chunks, False, POWER1, POWER2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_owner_1, (
                qs, ks, gs, us, copies, tiles, weights, pieces, ends, full, du_there, part_there,
                chunks, T >> 31, p_start1, ssd, ssv, p_end1, sed, sev, D, V, scale, unscale,
                HALVES, B, STAGES, GATE, SCALED, POWER1, READ, START1, END1,
            )),
            (_owner_2, (
                qs, ks, vs, gs, us, tiles, weights, pieces, ends, full, du_there, part_there, done,
                chunks, T >> 31, p_start2, szd, szv, p_end2, swd, swv, D, V, scale, unscale,
                HALVES, STAGES, GATE, SCALED, POWER2, READ, START2, END2,
            )),
            (_mover, (
                p_q, p_k, p_v, p_g, p_u, p_du, p_dv, p_dk, p_gate, qs, ks, vs, gs, us,
                weights, pieces, ends, full, du_there, done, chunks, T, D, V,
                sqt, sqd, skt, skd, svt, svd, sgt, sgd, sut, sud, sat, sad, sbt, sbd, sct, scd,
                sft, READ, B, STAGES, GATE, POWER1, POWER2, FAST, WHOLE_D, WHOLE_V,
            )),
        ],
        [4, 4],
        [232 if GATE == 0 else 224, 40],
    )  # fmt: skip
