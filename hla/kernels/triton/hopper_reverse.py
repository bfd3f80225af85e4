"""Last token first: the gradients of y, v and k (`hopper_backward` has the equations).

The first partition owns R, the second Z, which is symmetric: of its four blocks of 64 three are
kept, and the one beside the diagonal is read the other way round from a copy in shared memory. R is
read both ways round, from a bfloat16 copy. The third partition moves: it stores what the owners
leave in the place of an operand that nobody reads any more (dY takes V's, dV Y's, dK K's) and loads
the next chunk there. With SUM the parts of dk that come from R and Z are added: K and dY are loaded
(into the places of Y and K), dK takes V's place, and dV K's once the owner of Z has read it.
Without Z what dY adds to is loaded in the place of K.

Bytes a token and head, D = V = 128: 8 rows of 256, 0.358 ms for B = 8, T = 4096, H = 16 at 3.0
TB/s; 0.399 ms on one H100 (90%), 0.197 at D = 64 (91%).
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
    _accumulated,
    _added,
    _by_column,
    _fetch,
    _gate,
    _gate_sums,
    _kept,
    _lines,
    _masked,
    _operand,
    _pairs,
    _power,
    _put,
    _put_decay,
    _put_gate,
    _put_pairs,
    _put_tokens,
    _rounded,
    _scaled,
    _slot,
    _spans,
    _state_at,
    _total,
    _weigh,
    _weighed,
)
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
    follow,
    load_state,
    store_half,
)


@gluon.jit
def _weighed_rows(o, weights, slot, POWER: gl.constexpr, ACC: gl.constexpr):
    """Weigh what rows read from a state, as the gate does if there is one."""
    if POWER > 0:
        o = warpgroup_mma_wait(0, deps=[o])
        o *= _power(_weigh(weights, slot, AFTER, gl.SliceLayout(1, ACC)), POWER)[:, None]
    return o


@gluon.jit
def _read_rows(a, R, weights, slot, POWER: gl.constexpr, B: gl.constexpr):
    """Return what rows read from a state, [W, B]."""
    ACC: gl.constexpr = ACC128 if B == 128 else ACC64
    o = gl.zeros([W, B], gl.float32, ACC)
    o = warpgroup_mma(a, R, o, use_acc=False, is_async=True)
    return _weighed_rows(o, weights, slot, POWER, ACC)


@gluon.jit
def _rows(
    a, R, tile, b, weights, slot,
    POWER: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """Return a R + tile b, [W, B]."""
    o = _read_rows(a, R, weights, slot, POWER, B)
    o = warpgroup_mma(tile, b, o, is_async=True)
    return warpgroup_mma_wait(0, deps=[o])


@gluon.jit
def _owner_r(
    qs, ks, vs, gs, ys, copies, tiles, weights, pieces, ends, full, dy_there, dv_there, k_read,
    chunks, zero,
    p_start, ssd, ssv, p_end, sed, sev, D, V, scale, unscale,
    p_dots, p_kept, length, total, earlier,
    HALVES: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, SCALED: gl.constexpr, POWER: gl.constexpr,
    SUM: gl.constexpr, HELD: gl.constexpr, ALONE: gl.constexpr, READ: gl.constexpr,
    START: gl.constexpr, END: gl.constexpr, DOTS: gl.constexpr, EVERY: gl.constexpr,
):  # fmt: skip
    """Own R, [D, V]: make dy and dv."""
    ACC: gl.constexpr = ACC128 if B == 128 else ACC64
    A: gl.constexpr = A128 if B == 128 else A64
    LATE: gl.constexpr = ALONE or (SUM and POWER == 0)  # else registers would not suffice
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
        slot, copy, tile = _slot(c, s, chunks, GATE), copies.index(z), tiles.index(z)
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        fence_async_shared()
        b_q, b_v, b_g, b_y = qs.index(s), vs.index(s), gs.index(s), ys.index(s)
        if ALONE:  # both products at once: there are registers
            a, dy = _pairs(b_v, b_g), gl.zeros([W, B], gl.float32, ACC)
            dy = warpgroup_mma(b_v, copy.permute((1, 0)), dy, use_acc=False, is_async=True)
            if POWER > 0:
                w = _spans(weights, slot, True, POWER)  # while the products run
                a, dy = warpgroup_mma_wait(1, deps=[a, dy])
                a *= w
            else:
                a, dy = warpgroup_mma_wait(1, deps=[a, dy])
                a = _masked(a, True)
            tile.store(a.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            dy = _weighed_rows(dy, weights, slot, POWER, ACC)
        else:
            _put_pairs(tile, b_v, b_g, weights, slot, True, POWER)
            fence_async_shared()
            barrier()
            dy = _read_rows(b_v, copy.permute((1, 0)), weights, slot, POWER, B)
        if DOTS:
            d = gl.sum(b_y.load(ACC).to(gl.float32) * dy, 1)
        dy = warpgroup_mma(tile, b_q, dy, is_async=True)
        dy = warpgroup_mma_wait(0, deps=[dy])
        dy = _scaled(dy, scale, SCALED)
        if HELD:  # what dy adds to
            dy += ks.index(s).load(ACC).to(gl.float32)
        b_v.store(dy.to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(dy_there.index(s), count=1)
        if READ:
            if DOTS:
                a = _pairs(b_y, b_q)
                x = tile.load(ACC64)  # of v and do; while the product runs
                a = warpgroup_mma_wait(0, deps=[a])
                x = x.to(gl.float32) * a
                d += gl.convert_layout(gl.sum(x, 1), d.type.layout)
                _put_tokens(p_dots + c * W, d * scale, length - c * W)
                by_query = _by_column(x)
                tile.store((a * _spans(weights, slot, True, POWER)).to(gl.bfloat16))
            else:
                _put_pairs(tile, b_y, b_q, weights, slot, True, POWER)
            fence_async_shared()
            barrier()
            dv = _read_rows(b_y, copy, weights, slot, POWER, B)
            dv = warpgroup_mma(tile, b_g, dv, is_async=True)
        qT = b_q.permute((1, 0))
        x0, x1 = qT.slice(0, 64, 0), qT.slice(64 * HALVES - 64, 64, 0)
        if POWER > 0:  # while the product runs
            R0 = _total(R0, ends, slot, POWER, ACC)
            if HALVES == 2:
                R1 = _total(R1, ends, slot, POWER, ACC)
        if READ:
            dv = warpgroup_mma_wait(0, deps=[dv])
            left = _scaled(dv, scale, SCALED).to(gl.bfloat16)
            if not LATE:
                if SUM:
                    mbarrier.wait(k_read.index(s), (i // STAGES) & 1)
                b_y.store(left)
        if POWER > 0:
            x0 = _weighed(x0, pieces, slot, 1, A)
        R0 = warpgroup_mma(x0, b_g, R0, is_async=True)
        if HALVES == 2:
            if POWER > 0:
                x1 = _weighed(x1, pieces, slot, 1, A)
            R1 = warpgroup_mma(x1, b_g, R1, is_async=True)
        if READ and LATE:  # under the product
            if SUM:
                mbarrier.wait(k_read.index(s), (i // STAGES) & 1)
            b_y.store(left)
        if DOTS:
            lines, p, left = _lines(tile), p_dots + c * W, length - c * W
            lines.store(by_query)
            _put_tokens(p + total, _added(lines) * scale, left)
        if HALVES == 2:
            R0, R1 = warpgroup_mma_wait(0, deps=[R0, R1])
            copy.slice(64, 64, 0).store(R1.to(gl.bfloat16))
        else:
            R0 = warpgroup_mma_wait(0, deps=[R0])
        copy.slice(0, 64, 0).store(R0.to(gl.bfloat16))
        mbarrier.arrive(dv_there.index(s), count=1)
        if EVERY > 0 and _kept(earlier + c, EVERY):
            at = p_kept + ((earlier + c) // EVERY - 1).to(gl.int64) * (B * B)
            gl.store(at + _state_at(0, B, ACC, B), (R0 * scale).to(gl.bfloat16))
            if HALVES == 2:
                gl.store(at + _state_at(64, B, ACC, B), (R1 * scale).to(gl.bfloat16))
    if END:
        store_half(p_end, R0, sev, sed, V, D, scale, 0, B, True)
        if HALVES == 2:
            store_half(p_end, R1, sev, sed, V, D, scale, 64, B, True)


@gluon.jit
def _block(p, s0, s1, D, unscale, ROW: gl.constexpr, COLUMN: gl.constexpr, START: gl.constexpr):
    """Return a block of Z after the last token, of the sum of a matrix and its transpose."""
    Z = gl.zeros([64, 64], gl.float32, ACC64)
    if START:
        d = ROW + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC64)).to(gl.int64)[:, None]
        e = COLUMN + gl.arange(0, 64, layout=gl.SliceLayout(0, ACC64)).to(gl.int64)[None, :]
        there = (d < D) & (e < D)
        Z = gl.load(p + d * s0 + e * s1, mask=there, other=0.0)
        Z = (Z + gl.load(p + e * s0 + d * s1, mask=there, other=0.0)) * unscale
    return Z


@gluon.jit
def _leave_block(p, Z, s0, s1, D, factor, ROW: gl.constexpr, COLUMN: gl.constexpr):
    """Store a block of Z, times a factor, and the one that mirrors it."""
    d = ROW + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC64)).to(gl.int64)[:, None]
    e = COLUMN + gl.arange(0, 64, layout=gl.SliceLayout(0, ACC64)).to(gl.int64)[None, :]
    there = (d < D) & (e < D)
    gl.store(p + d * s0 + e * s1, Z * factor, mask=there)
    if ROW != COLUMN:
        gl.store(p + e * s0 + d * s1, Z * factor, mask=there)


@gluon.jit
def _read_block(o, weights, slot, POWER: gl.constexpr):
    """Weigh what was read from a state, tokens in columns."""
    if POWER > 0:
        o = warpgroup_mma_wait(0, deps=[o])
        o *= _power(_weigh(weights, slot, AFTER, gl.SliceLayout(0, ACC64)), POWER)[None, :]
    return o


@gluon.jit
def _add_block(Z, qT, dyT, b_q, b_dy):
    """Start a block of Z + Q' dY + dY' Q."""
    Z = warpgroup_mma(qT, b_dy, Z, is_async=True)
    return warpgroup_mma(dyT, b_q, Z, is_async=True)


@gluon.jit
def _owner_z(
    qs, ks, vs, ys, tiles, crosses, weights, pieces, ends, full, k_full, dy_there, dk_there, k_read,
    chunks, zero,
    p_start, ss0, ss1, p_end, se0, se1, D, scale, unscale,
    p_dots, p_kept, length, total, earlier,
    HALVES: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, SCALED: gl.constexpr,
    POWER: gl.constexpr, SUM: gl.constexpr, READ: gl.constexpr,
    START: gl.constexpr, END: gl.constexpr, DOTS: gl.constexpr, EVERY: gl.constexpr,
):  # fmt: skip
    """Own Z, [D, D], symmetric: of its four blocks three; make dk."""
    Z00 = _block(p_start, ss0, ss1, D, unscale, 0, 0, START)
    Z01, Z11 = Z00, Z00
    if HALVES == 2:
        Z01 = _block(p_start, ss0, ss1, D, unscale, 0, 64, START)
        Z11 = _block(p_start, ss0, ss1, D, unscale, 64, 64, START)
        crosses.index(zero).store(Z01.to(gl.bfloat16))
    z = zero
    for i in range(chunks):
        c, s, z = chunks - 1 - i, i % STAGES, z & i
        slot, tile1, tile2 = _slot(c, s, chunks, GATE), tiles.index(z + 1), tiles.index(z + 2)
        if SUM:
            b_q, b_k, b_dy = qs.index(s), ys.index(s), ks.index(s)
        else:
            b_q, b_k, b_dy = qs.index(s), ks.index(s), vs.index(s)
        kT = b_k.permute((1, 0))
        outT = vs.index(s).permute((1, 0)) if SUM else kT
        qT0, dyT0 = b_q.permute((1, 0)).slice(0, 64, 0), b_dy.permute((1, 0)).slice(0, 64, 0)
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        if READ:
            mbarrier.wait(k_full.index(s), (i // STAGES) & 1)
        fence_async_shared()
        if READ:
            a = _pairs(b_q, b_k)
            if POWER > 0:
                w = _spans(weights, slot, False, POWER)  # while the product runs
                a = warpgroup_mma_wait(0, deps=[a]) * w
            else:
                a = _masked(warpgroup_mma_wait(0, deps=[a]), False)
            tile1.store(a.to(gl.bfloat16))
        if not SUM:
            mbarrier.wait(dy_there.index(s), (i // STAGES) & 1)
        if READ:
            a = _pairs(b_dy, b_k)
            if DOTS:
                x = tile1.load(ACC64)  # while the product runs
            a = warpgroup_mma_wait(0, deps=[a])
            if DOTS:
                x = x.to(gl.float32) * a
                by_query, by_key = gl.sum(x, 1), _by_column(x)
            a = a * w if POWER > 0 else _masked(a, False)
            tile2.store(a.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            o = gl.zeros([64, W], gl.float32, ACC64)
            o = warpgroup_mma(_operand(Z00), kT.slice(0, 64, 0), o, use_acc=False, is_async=True)
            if HALVES == 2:
                o = warpgroup_mma(_operand(Z01), kT.slice(64, 64, 0), o, is_async=True)
            o = _read_block(o, weights, slot, POWER)
            if DOTS:  # Z has a gradient and its transpose
                by_key += _by_column(_accumulated(kT.slice(0, 64, 0).load(A64)) * o) * 0.5
            o = warpgroup_mma(dyT0, tile1, o, is_async=True)
            o = warpgroup_mma(qT0, tile2, o, is_async=True)
            if POWER > 0:  # while the products run
                Z00 = _total(Z00, ends, slot, POWER, ACC64)
                if HALVES == 2:
                    Z01 = _total(Z01, ends, slot, POWER, ACC64)
            o = warpgroup_mma_wait(0, deps=[o])
            if SUM and HALVES == 1:
                mbarrier.arrive(k_read.index(s), count=1)
            if SUM:
                mbarrier.wait(dy_there.index(s), (i // STAGES) & 1)
            dk0 = _rounded(o, outT.slice(0, 64, 0), scale, SCALED, SUM)
        elif POWER > 0:
            Z00 = _total(Z00, ends, slot, POWER, ACC64)
            if HALVES == 2:
                Z01 = _total(Z01, ends, slot, POWER, ACC64)
        q0, dy0 = b_q.slice(0, 64, 1), b_dy.slice(0, 64, 1)
        if POWER == 0:
            Z00 = _add_block(Z00, qT0, dyT0, q0, dy0)
        if HALVES == 2:
            q1, dy1 = b_q.slice(64, 64, 1), b_dy.slice(64, 64, 1)
            qT1, dyT1 = q1.permute((1, 0)), dy1.permute((1, 0))
            if READ:
                o = gl.zeros([64, W], gl.float32, ACC64)
                o = warpgroup_mma(
                    crosses.index(z).permute((1, 0)), kT.slice(0, 64, 0), o, use_acc=False,
                    is_async=True,
                )  # fmt: skip
                o = warpgroup_mma(_operand(Z11), kT.slice(64, 64, 0), o, is_async=True)
                o = _read_block(o, weights, slot, POWER)
                if DOTS:
                    by_key += _by_column(_accumulated(kT.slice(64, 64, 0).load(A64)) * o) * 0.5
                o = warpgroup_mma(dyT1, tile1, o, is_async=True)
                o = warpgroup_mma(qT1, tile2, o, is_async=True)
            if POWER > 0:
                Z11 = _total(Z11, ends, slot, POWER, ACC64)
            if READ:
                Z00, o = warpgroup_mma_wait(0, deps=[Z00, o])
                if SUM:
                    mbarrier.arrive(k_read.index(s), count=1)
                dk1 = _rounded(o, outT.slice(64, 64, 0), scale, SCALED, SUM)
                outT.slice(64, 64, 0).store(dk1)
                outT.slice(0, 64, 0).store(dk0)
            else:
                Z00 = warpgroup_mma_wait(0, deps=[Z00])
        elif READ:
            outT.store(dk0)
        if POWER > 0:  # half by half, else registers would not suffice
            w_q = _weighed(qT0, pieces, slot, 0, A64)
            w_dy = _weighed(dyT0, pieces, slot, 0, A64)
            Z00 = _add_block(Z00, w_q, w_dy, q0, dy0)
            if HALVES == 2:
                Z01 = _add_block(Z01, w_q, w_dy, q1, dy1)
                if DOTS:
                    Z00, Z01 = warpgroup_mma_wait(0, deps=[Z00, Z01])
                w_q1 = _weighed(qT1, pieces, slot, 0, A64)
                w_dy1 = _weighed(dyT1, pieces, slot, 0, A64)
                Z11 = _add_block(Z11, w_q1, w_dy1, q1, dy1)
        elif HALVES == 2:
            Z01 = _add_block(Z01, qT0, dyT0, q1, dy1)
            Z11 = _add_block(Z11, qT1, dyT1, q1, dy1)
        if DOTS:
            lines, p, left = _lines(tile1), p_dots + c * W, length - c * W
            lines.store(by_key)
            _put_tokens(p, _added(lines) * scale, left)
            _put_tokens(p + total, by_query * scale, left)
        if HALVES == 1:
            Z00 = warpgroup_mma_wait(0, deps=[Z00])
        elif POWER > 0 and not DOTS:
            Z00, Z01, Z11 = warpgroup_mma_wait(0, deps=[Z00, Z01, Z11])
        elif POWER > 0:
            Z11 = warpgroup_mma_wait(0, deps=[Z11])
        else:
            Z01, Z11 = warpgroup_mma_wait(0, deps=[Z01, Z11])
        if HALVES == 2:
            crosses.index(z).store(Z01.to(gl.bfloat16))
        mbarrier.arrive(dk_there.index(s), count=1)
        if EVERY > 0 and _kept(
            earlier + c, EVERY
        ):  # what lies above the diagonal for what lies below, too
            SIDE: gl.constexpr = 64 * HALVES
            at = p_kept + ((earlier + c) // EVERY - 1).to(gl.int64) * (SIDE * SIDE)
            at += _state_at(0, SIDE, ACC64, 64)
            gl.store(at, (Z00 * (0.5 * scale)).to(gl.bfloat16))
            if HALVES == 2:
                gl.store(at + 64, (Z01 * scale).to(gl.bfloat16))
                gl.store(at + 64 * SIDE + 64, (Z11 * (0.5 * scale)).to(gl.bfloat16))
    if END:
        _leave_block(p_end, Z00, se0, se1, D, 0.5 * scale, 0, 0)
        if HALVES == 2:
            _leave_block(p_end, Z01, se0, se1, D, 0.5 * scale, 0, 64)
            _leave_block(p_end, Z11, se0, se1, D, 0.5 * scale, 64, 64)


@gluon.jit
def _mover_r(
    p_q, p_k, p_v, p_g, p_y, p_dy, p_dv, p_dk, p_gate, qs, ks, vs, gs, ys, weights, pieces, ends,
    full, k_full, dy_there, dv_there, dk_there, chunks, T, D, V,
    sqt, sqd, skt, skd, svt, svd, sgt, sgd, syt, syd, sat, sad, sbt, sbd, sct, scd, sft,
    Z: gl.constexpr, SUM: gl.constexpr, ADD: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, POWER1: gl.constexpr, POWER2: gl.constexpr,
    FAST: gl.constexpr, WHOLE_D: gl.constexpr, WHOLE_V: gl.constexpr,
):  # fmt: skip
    """Load what the owners read; store what they leave in its place."""
    if GATE == 2:  # of a chunk ahead: behind copies it would wait for them
        a = _gate(p_gate, sft, (chunks - 1) * W, T)
    for i in range(chunks + STAGES):
        s, turn = i % STAGES, ((i // STAGES) & 1) ^ 1
        row = (chunks - 1 - i) * W
        left = row + STAGES * W
        if i >= STAGES:
            if not SUM:
                mbarrier.wait(dy_there.index(s), turn)
                _put(p_dy, vs.index(s), left, T, D, sat, sad, B, FAST, WHOLE_D, ADD and Z)
            mbarrier.wait(dv_there.index(s), turn)
            _put(p_dv, ys.index(s), left, T, V, sbt, sbd, B, FAST, WHOLE_V)
            barrier()
        if i < chunks:
            _fetch(ys.index(s), p_y, row, T, D, syt, syd, B, FAST, WHOLE_D)
            _fetch(gs.index(s), p_g, row, T, V, sgt, sgd, B, FAST, WHOLE_V)
            if ADD and not Z:
                _fetch(ks.index(s), p_dy, row, T, D, sat, sad, B, FAST, WHOLE_D)
        if GATE == 2:
            sums, last = _gate_sums(a)
        if Z and i >= STAGES:
            mbarrier.wait(dk_there.index(s), turn)
            if SUM:
                _put(p_dy, vs.index(s), left, T, D, sat, sad, B, FAST, WHOLE_D, ADD)
                barrier()
        if i < chunks:
            _fetch(qs.index(s), p_q, row, T, D, sqt, sqd, B, FAST, WHOLE_D)
            _fetch(vs.index(s), p_v, row, T, V, svt, svd, B, FAST, WHOLE_V)
        if i < chunks:
            if FAST:
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            if GATE == 2:
                _put_gate(weights, pieces, ends, s, sums, last, False, POWER1, POWER2)
            if GATE == 2 or not FAST:
                mbarrier.arrive(full.index(s), count=1)
        if GATE == 2:
            a = _gate(p_gate, sft, row - W, T)
        if Z:
            if i >= STAGES and not SUM:
                _put(p_dk, ks.index(s), left, T, D, sct, scd, B, FAST, WHOLE_D)
                barrier()
            if i < chunks:
                _fetch(ks.index(s), p_k, row, T, D, skt, skd, B, FAST, WHOLE_D)
                if FAST:
                    async_copy.mbarrier_arrive(k_full.index(s), increment_count=False)
                else:
                    mbarrier.arrive(k_full.index(s), count=1)


@gluon.jit
def _mover_z(
    p_q, p_k, p_v, p_g, p_y, p_dy, p_dv, p_dk, p_gate, qs, ks, vs, gs, ys, weights, pieces, ends,
    full, k_full, dy_there, dv_there, dk_there, chunks, T, D, V,
    sqt, sqd, skt, skd, svt, svd, sgt, sgd, syt, syd, sat, sad, sbt, sbd, sct, scd, sft,
    Z: gl.constexpr, SUM: gl.constexpr, ADD: gl.constexpr, B: gl.constexpr, STAGES: gl.constexpr,
    GATE: gl.constexpr, POWER1: gl.constexpr, POWER2: gl.constexpr,
    FAST: gl.constexpr, WHOLE_D: gl.constexpr, WHOLE_V: gl.constexpr,
):  # fmt: skip
    """Load what Z alone is made of."""
    if GATE == 2:
        a = _gate(p_gate, sft, (chunks - 1) * W, T)
    for i in range(chunks):
        s, turn = i % STAGES, ((i // STAGES) & 1) ^ 1
        row = (chunks - 1 - i) * W
        if GATE == 2:
            sums, last = _gate_sums(a)
        if i >= STAGES:
            mbarrier.wait(dv_there.index(s), turn)
            mbarrier.wait(dk_there.index(s), turn)
        _fetch(gs.index(s), p_g, row, T, V, sgt, sgd, B, FAST, WHOLE_V)
        _fetch(qs.index(s), p_q, row, T, D, sqt, sqd, B, FAST, WHOLE_D)
        _fetch(vs.index(s), p_v, row, T, V, svt, svd, B, FAST, WHOLE_V)
        if FAST:
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        if GATE == 2:
            _put_gate(weights, pieces, ends, s, sums, last, False, POWER1, POWER2)
        if GATE == 2 or not FAST:
            mbarrier.arrive(full.index(s), count=1)
        if GATE == 2:
            a = _gate(p_gate, sft, row - W, T)


@gluon.jit(
    do_not_specialize=[
        "scale", "unscale", "T", "D", "V", "N1", "N2",
        "sq0", "sq1", "sq2", "sk0", "sk1", "sk2",
        "sv0", "sv1", "sv2", "sg0", "sg1", "sg2",
        "sy0", "sy1", "sy2", "sa0", "sa1", "sa2",
        "sb0", "sb1", "sb2", "sc0", "sc1", "sc2",
        "ss0", "ss1", "ss2", "ssn", "ssd", "ssv", "se0", "se1", "se2", "sen", "sed", "sev",
        "sz0", "sz1", "sz2", "szn", "szd", "sze", "sw0", "sw1", "sw2", "swn", "swd", "swe",
        "sf0", "sf1", "sf2", "sft",
    ],
    do_not_specialize_on_alignment=["p_gate", "p_start1", "p_start2", "p_end2", "p_end1"],
)  # fmt: skip
def reverse_kernel(
    p_q, p_k, p_v, p_g, p_y, p_dy, p_dv, p_dk, p_start1, p_start2, p_end2, p_end1, p_gate,
    p_dots1, p_dots2, p_kept1, p_kept2,  # of Z and R, in order: (heads, 2 T), (heads, N, B, B)
    scale, unscale, T, tokens, D, V, N1, N2,
    sq0, sq1, sq2,
    sk0, sk1, sk2,
    sv0, sv1, sv2,
    sg0, sg1, sg2,
    sy0, sy1, sy2,
    sa0, sa1, sa2,  # dy
    sb0, sb1, sb2,  # dv
    sc0, sc1, sc2,  # dk
    sz0, sz1, sz2, szn, szd, sze,  # the last Z
    ss0, ss1, ss2, ssn, ssd, ssv,  # the last R
    se0, se1, se2, sen, sed, sev,  # R at the first token
    sw0, sw1, sw2, swn, swd, swe,  # half of Z there
    sf0, sf1, sf2, sft,
    sqt: gl.constexpr,
    sqd: gl.constexpr,
    skt: gl.constexpr,
    skd: gl.constexpr,
    svt: gl.constexpr,
    svd: gl.constexpr,
    sgt: gl.constexpr,
    sgd: gl.constexpr,
    syt: gl.constexpr,
    syd: gl.constexpr,
    sat: gl.constexpr,
    sad: gl.constexpr,
    sbt: gl.constexpr,
    sbd: gl.constexpr,
    sct: gl.constexpr,
    scd: gl.constexpr,
    GATE: gl.constexpr,  # 0 none, 1 decay, 2 log_gate
    SCALED: gl.constexpr,  # scale is not 1
    Z: gl.constexpr,  # there is Z, which makes dk
    SUM: gl.constexpr,  # of hla3: dk adds to dy, of keys that come as y; Z is of dy that comes as k
    ADD: gl.constexpr,  # dy is added to what is there
    READ: gl.constexpr,  # dy, dv and dk are requested, not Z alone
    POWER1: gl.constexpr,  # of Z
    POWER2: gl.constexpr,  # of R
    START1: gl.constexpr,
    START2: gl.constexpr,
    END1: gl.constexpr,
    END2: gl.constexpr,
    DOTS: gl.constexpr,  # also leave what a gate's gradient is made of: see `gate`
    EVERY: gl.constexpr,  # and the states before every so many chunks but the first; 0: not
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
    total, earlier = T.to(gl.int64), 0  # tokens of the sequence, and chunks before those here
    if tokens is not None:  # a segment is a batch entry
        parts = (T + tokens - 1) // tokens
        part, i_head = (i_head % parts).to(gl.int64), i_head // parts
        first = part * tokens
        earlier = (first // W).to(gl.int32)
        T = gl.minimum(T - first, tokens).to(gl.int32)
        p_q += first * sqt
        p_v += first * svt
        p_g += first * sgt
        if READ:
            p_y += first * syt
            p_dy += first * sat
            p_dv += first * sbt
        if READ and Z:
            p_k += first * skt
        if READ and Z and not SUM:
            p_dk += first * sct
        if GATE == 2:
            p_gate += first * sft
        if START1:
            p_start1 += part * szn
        if START2:
            p_start2 += part * ssn
        if END1:
            p_end1 += part * swn
        if END2:
            p_end2 += part * sen
    if DOTS:
        ahead = i_head.to(gl.int64) * 2 * total + earlier * W
        p_dots2 += ahead
        if Z:
            p_dots1 += ahead
    if EVERY > 0:
        kept = i_head.to(gl.int64) * ((total - 1) // (EVERY * W)) * (B * B)
        p_kept2 += kept
        if Z:
            p_kept1 += kept
    i_2 = (i_head % N2).to(gl.int64)
    i_1 = (i_head // N2 % N1).to(gl.int64)
    i_0 = (i_head // N2 // N1).to(gl.int64)
    p_q += (i_0 * sq0 + i_1 * sq1 + i_2 * sq2) * UNIT
    if READ and Z:
        p_k += (i_0 * sk0 + i_1 * sk1 + i_2 * sk2) * UNIT
    p_v += (i_0 * sv0 + i_1 * sv1 + i_2 * sv2) * UNIT
    p_g += (i_0 * sg0 + i_1 * sg1 + i_2 * sg2) * UNIT
    if READ:
        p_y += (i_0 * sy0 + i_1 * sy1 + i_2 * sy2) * UNIT
        p_dy += (i_0 * sa0 + i_1 * sa1 + i_2 * sa2) * UNIT
        p_dv += (i_0 * sb0 + i_1 * sb1 + i_2 * sb2) * UNIT
    if READ and Z and not SUM:
        p_dk += (i_0 * sc0 + i_1 * sc1 + i_2 * sc2) * UNIT
    if START1:
        p_start1 += i_0 * sz0 + i_1 * sz1 + i_2 * sz2
    if START2:
        p_start2 += i_0 * ss0 + i_1 * ss1 + i_2 * ss2
    if END1:
        p_end1 += i_0 * sw0 + i_1 * sw1 + i_2 * sw2
    if END2:
        p_end2 += i_0 * se0 + i_1 * se1 + i_2 * se2
    if GATE > 0:
        p_gate += i_0 * sf0 + i_1 * sf1 + i_2 * sf2

    chunks = (T + W - 1) // W
    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES if Z or ADD else 1, W, B], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    gs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    ys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    copies = gl.allocate_shared_memory(gl.bfloat16, [1, B, B], TILE)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [3, W, W], TILE)
    crosses = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], TILE)
    SLOTS: gl.constexpr = STAGES if GATE == 2 else 2
    weights = gl.allocate_shared_memory(gl.float32, [SLOTS * LISTS, W], LIST)
    LISTED: gl.constexpr = PIECES // 2 if POWER1 == POWER2 else PIECES
    pieces = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * LISTED, W], LIST)
    ends = gl.allocate_shared_memory(gl.float32, [SLOTS, 1], LIST)
    ALONE: gl.constexpr = 0 if GATE == 2 or not FAST else 1
    LOADS: gl.constexpr = 128 if FAST else 0  # a copy arrives with each of the mover's threads
    full = barriers(STAGES, LOADS + (1 - ALONE))
    dy_there, dv_there = barriers(STAGES, 1), barriers(STAGES, 1)
    k_full, dk_there, k_read = None, None, None  # see `barriers`
    if Z and READ:
        k_full = barriers(STAGES, LOADS if FAST else 1)
    if Z:
        dk_there = barriers(STAGES, 1)
    if SUM:
        k_read = barriers(STAGES, 1)
    MOVER: gl.constexpr = 40 if DOTS else 48  # registers; the first owner has what is left
    follow()
    if GATE == 1:
        _put_decay(weights, pieces, ends, p_gate, T, chunks, False, POWER1, POWER2)
    fence_async_shared()
    barrier()
    if Z:
        gl.warp_specialize(
            [
                (_owner_r, (
                    qs, ks, vs, gs, ys, copies, tiles, weights, pieces, ends, full, dy_there,
                    dv_there, k_read, chunks, T >> 31, p_start2, ssd, ssv, p_end2, sed, sev, D, V,
                    scale, unscale, p_dots2, p_kept2, T, total, earlier,
                    HALVES, B, STAGES, GATE, SCALED, POWER2, SUM, ADD and not Z, not Z and not DOTS,
                    READ, START2, END2, DOTS, EVERY,
                )),
                (_owner_z, (
                    qs, ks, vs, ys, tiles, crosses, weights, pieces, ends, full, k_full, dy_there,
                    dk_there, k_read, chunks, T >> 31, p_start1, szd, sze, p_end1, swd, swe, D,
                    scale, unscale, p_dots1, p_kept1, T, total, earlier,
                    HALVES, STAGES, GATE, SCALED, POWER1, SUM, READ, START1, END1, DOTS, EVERY,
                )),
                (_mover_r if READ else _mover_z, (
                    p_q, p_k, p_v, p_g, p_y, p_dy, p_dv, p_dk, p_gate, qs, ks, vs, gs, ys,
                    weights, pieces, ends, full, k_full, dy_there, dv_there, dk_there, chunks,
                    T, D, V,
                    sqt, sqd, skt, skd, svt, svd, sgt, sgd, syt, syd, sat, sad, sbt, sbd, sct, scd,
                    sft, Z, SUM, ADD, B, STAGES, GATE, POWER1, POWER2, FAST, WHOLE_D, WHOLE_V,
                )),
            ],
            [4, 4],
            [264 - MOVER, MOVER],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_owner_r, (
                    qs, ks, vs, gs, ys, copies, tiles, weights, pieces, ends, full, dy_there,
                    dv_there, k_read, chunks, T >> 31, p_start2, ssd, ssv, p_end2, sed, sev, D, V,
                    scale, unscale, p_dots2, p_kept2, T, total, earlier,
                    HALVES, B, STAGES, GATE, SCALED, POWER2, SUM, ADD and not Z, not Z and not DOTS,
                    READ, START2, END2, DOTS, EVERY,
                )),
                (_mover_r, (
                    p_q, p_k, p_v, p_g, p_y, p_dy, p_dv, p_dk, p_gate, qs, ks, vs, gs, ys,
                    weights, pieces, ends, full, k_full, dy_there, dv_there, dk_there, chunks,
                    T, D, V,
                    sqt, sqd, skt, skd, svt, svd, sgt, sgd, syt, syd, sat, sad, sbt, sbd, sct, scd,
                    sft, Z, SUM, ADD, B, STAGES, GATE, POWER1, POWER2, FAST, WHOLE_D, WHOLE_V,
                )),
            ],
            [4],
            [56],
        )  # fmt: skip
