"""First token first: the gradient of q (`hopper_backward` has the equations).

Of D = 128 two partitions own 64 rows each of F and of S, so that dq is one accumulator and rounded
once; both make the two tiles of pairs. The last partition loads, and stores dq.

Bytes a token and head, D = V = 128: 6 rows of 256, 0.268 ms for B = 8, T = 4096, H = 16 at 3.0
TB/s; 0.288 ms on one H100 (93%), 0.147 at D = 64 (91%).
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
    COLUMNS,
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
    _put_tokens,
    _rounded,
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
    BEFORE,
    LIST,
    LISTS,
    TILE,
    W,
    barrier,
    barriers,
    follow,
    load_state,
)


@gluon.jit
def _met(p, p_kept, n, S, H: gl.constexpr, B: gl.constexpr, UPPER: gl.constexpr):
    """Store the product of 64 rows of a state with those of its gradient there, in four parts."""
    ACC: gl.constexpr = ACC128 if B == 128 else ACC64
    there = gl.arange(0, B, layout=gl.SliceLayout(0, ACC))[None, :] >= (64 * H if UPPER else 0)
    R = gl.load(p_kept + n * (B * B) + _state_at(64 * H, B, ACC, B), mask=there, other=0.0)
    x = gl.sum(gl.sum(S * R.to(gl.float32), 1).reshape([4, 16]), 1)
    gl.store(p + n * (B // 16) + 4 * H + gl.arange(0, 4, layout=x.type.layout), x)


@gluon.jit
def _owner_f(
    ks, vs, gs, ys, es, outs, tiles, weights, pieces, ends, full, free, there, stored, chunks, zero,
    p_start1, szd, sze, p_start2, ssd, ssv, D, V, scale,
    p_dots1, p_dots2, p_kept1, p_kept2, p_met1, p_met2, length, total, earlier,
    H: gl.constexpr, AHLA: gl.constexpr, ONE: gl.constexpr, ADD: gl.constexpr,
    B: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr, SCALED: gl.constexpr,
    POWER1: gl.constexpr, POWER2: gl.constexpr, START1: gl.constexpr, START2: gl.constexpr,
    DOTS: gl.constexpr, EVERY: gl.constexpr,
):  # fmt: skip
    """Own 64 rows of F, [D, V], and of S, [D, D]: make as many columns of dq."""
    ACC: gl.constexpr = ACC128 if B == 128 else ACC64
    A: gl.constexpr = A128 if B == 128 else A64
    ROW: gl.constexpr = 64 * H
    F = load_state(p_start2, ssv, ssd, V, D, 1.0, ROW, B, START2, False)
    if not ONE:
        S = load_state(p_start1, sze, szd, V if AHLA else D, D, 1.0, ROW, B, START1, False)
    z = zero
    for c in range(chunks):
        s, h, z = c % STAGES, c % 2, z & c
        slot = _slot(c, s, chunks, GATE)
        tile1, tile2 = tiles.index(z + 2 * H), tiles.index(z + 2 * H + 1)
        b_k, b_g, b_e = ks.index(s), gs.index(s), es.index(s)
        if AHLA:  # E += k' u, P += k' v
            b_x, b_y, b_z = ys.index(s), b_k, vs.index(s)
        else:  # F += y' v, S += k' k
            b_x, b_y, b_z = vs.index(s), ys.index(s), b_k
        kT, yT = b_k.permute((1, 0)).slice(ROW, 64, 0), b_y.permute((1, 0)).slice(ROW, 64, 0)
        mbarrier.wait(full.index(s), (c // STAGES) & 1)
        fence_async_shared()
        a = _pairs(b_x, b_g)
        if not ONE:
            b = _pairs(b_z, b_e)
        if POWER1 > 0:
            w = _spans(weights, slot, True, POWER1)  # while the products run
            if ONE:
                a = warpgroup_mma_wait(0, deps=[a]) * w
            else:
                a, b = warpgroup_mma_wait(0, deps=[a, b])
                tile1.store((b * w).to(gl.bfloat16))
                a *= _power(w, POWER2 // POWER1)
        else:
            if ONE:
                a = _masked(warpgroup_mma_wait(0, deps=[a]), True)
            else:
                a, b = warpgroup_mma_wait(1, deps=[a, b])
                a = _masked(a, True)
        tile2.store(a.to(gl.bfloat16))
        if not ONE and POWER1 == 0:
            b = _masked(warpgroup_mma_wait(0, deps=[b]), True)
            tile1.store(b.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        gT, eT = b_g.permute((1, 0)), b_e.permute((1, 0))
        out = outs.index(h).permute((1, 0)).slice(ROW, 64, 0)
        o = gl.zeros([64, W], gl.float32, ACC64)
        o = warpgroup_mma(_operand(F), gT, o, use_acc=False, is_async=True)
        if POWER1 > 0:
            o = warpgroup_mma_wait(0, deps=[o])
            before = _weigh(weights, slot, BEFORE, gl.SliceLayout(0, ACC64))[None, :]
            if DOTS:  # of F alone, and below of both; the queries are where dq will be
                of_F = _by_column(_accumulated(out.load(A64)) * o)
            if POWER2 > POWER1:
                o *= _power(before, POWER2 - POWER1)
            if not ONE:
                o = warpgroup_mma(_operand(S), eT, o, is_async=True)
                o = warpgroup_mma_wait(0, deps=[o])
            if DOTS and not ONE:  # read again, else registers would not suffice
                before = _weigh(weights, slot, BEFORE, gl.SliceLayout(0, ACC64))[None, :]
                of_both = _by_column(_accumulated(out.load(A64)) * o)
            o *= _power(before, POWER1)
            o = warpgroup_mma(yT, tile2, o, is_async=True)
            if not ONE:
                o = warpgroup_mma(kT, tile1, o, is_async=True)
            F = _total(F, ends, slot, POWER2, ACC)  # while the products run
            w_y = _weighed(yT, pieces, slot, 1, A)
            o = warpgroup_mma_wait(0, deps=[o])
            F = warpgroup_mma(w_y, b_x, F, is_async=True)
        else:
            o = warpgroup_mma(yT, tile2, o, is_async=True)
            if not ONE:
                o = warpgroup_mma(kT, tile1, o, is_async=True)
                o = warpgroup_mma_wait(0, deps=[o])
                o = warpgroup_mma(_operand(S), eT, o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            F = warpgroup_mma(yT, b_x, F, is_async=True)
            if not ONE:
                S = warpgroup_mma(kT, b_z, S, is_async=True)
        if not DOTS:
            mbarrier.wait(stored.index(h), ((c // 2) & 1) ^ 1)
        out.store(_rounded(o, kT, scale, SCALED, ONE and ADD))
        mbarrier.arrive(there.index(h), count=1)
        if POWER1 > 0 and not ONE:
            S = _total(S, ends, slot, POWER1, ACC)
            w_k = _weighed(kT, pieces, slot, 0, A)
            S = warpgroup_mma(w_k, b_z, S, is_async=True)
        if DOTS:
            lines2, at, left = _lines(tile2), H * total + c * W, length - c * W
            lines2.store(of_F)
            if not ONE:
                lines1 = _lines(tile1)
                lines1.store(of_both)
            ahead = _weigh(weights, slot, BEFORE, gl.SliceLayout(0, COLUMNS))
            c_F = _added(lines2) * (_power(ahead, POWER2) * scale)
            _put_tokens(p_dots2 + at, c_F, left)
            if not ONE:
                c_both = _added(lines1) * (_power(ahead, POWER1) * scale)
                _put_tokens(p_dots1 + at, c_both - c_F, left)
        if ONE:
            F = warpgroup_mma_wait(0, deps=[F])
        else:
            F, S = warpgroup_mma_wait(0, deps=[F, S])
        mbarrier.arrive(free.index(s), count=1)
        behind = earlier + c + 1
        if EVERY > 0 and behind * W < total and _kept(behind, EVERY):
            n = (behind // EVERY - 1).to(gl.int64)
            _met(p_met2, p_kept2, n, F, H, B, False)
            if not ONE:
                _met(p_met1, p_kept1, n, S, H, B, not AHLA)


@gluon.jit
def _mover_f(
    p_k, p_v, p_g, p_y, p_e, p_dq, p_q, p_gate, ks, vs, gs, ys, es, outs, weights, pieces, ends,
    full, free, there, stored, chunks, T, D, V,
    skt, skd, svt, svd, sgt, sgd, syt, syd, sat, sad, sbt, sbd, sqt, sqd, sft,
    AHLA: gl.constexpr, ONE: gl.constexpr, ADD: gl.constexpr, B: gl.constexpr,
    STAGES: gl.constexpr, GATE: gl.constexpr, POWER1: gl.constexpr, POWER2: gl.constexpr,
    FAST: gl.constexpr,
    WHOLE_D: gl.constexpr, WHOLE_V: gl.constexpr, DOTS: gl.constexpr,
):  # fmt: skip
    """Load what the owners read; store dq, which with ``DOTS`` they leave in the place of q."""
    MADE = V if AHLA else D  # columns of u, du or y, dy
    WHOLE: gl.constexpr = WHOLE_V if AHLA else WHOLE_D
    if GATE == 2 and not DOTS:  # of a chunk ahead, before its copies: behind them it would wait
        a = _gate(p_gate, sft, 0, T)
    for c in range(chunks + STAGES):
        s, e = c % STAGES, c - STAGES
        row = c * W
        if GATE == 2 and not DOTS:
            sums, last = _gate_sums(a)
            a = _gate(p_gate, sft, row + W, T)
        if c < chunks:
            mbarrier.wait(free.index(s), ((c // STAGES) & 1) ^ 1)
            if GATE == 2 and not DOTS:
                _put_gate(weights, pieces, ends, s, sums, last, True, POWER1, POWER2)
            if ONE and ADD:
                _fetch(ks.index(s), p_dq, row, T, D, sbt, sbd, B, FAST, WHOLE_D)
            if not ONE:
                _fetch(ks.index(s), p_k, row, T, D, skt, skd, B, FAST, WHOLE_D)
                _fetch(es.index(s), p_e, row, T, MADE, sat, sad, B, FAST, WHOLE)
            _fetch(vs.index(s), p_v, row, T, V, svt, svd, B, FAST, WHOLE_V)
            _fetch(gs.index(s), p_g, row, T, V, sgt, sgd, B, FAST, WHOLE_V)
            _fetch(ys.index(s), p_y, row, T, MADE, syt, syd, B, FAST, WHOLE)
        if GATE == 2 and DOTS and FAST:
            sums, last = _gate_sums(_gate(p_gate, sft, row, T))
        if DOTS:
            if c >= STAGES:
                mbarrier.wait(there.index(s), ((c // STAGES) & 1) ^ 1)
                _put(p_dq, outs.index(s), e * W, T, D, sbt, sbd, B, FAST, WHOLE_D, ADD and not ONE)
                barrier()
            if c < chunks:
                _fetch(outs.index(s), p_q, row, T, D, sqt, sqd, B, FAST, WHOLE_D)
        if c < chunks:
            if FAST:
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            if GATE == 2 and DOTS:
                if not FAST:  # else registers would not suffice
                    sums, last = _gate_sums(_gate(p_gate, sft, row, T))
                _put_gate(weights, pieces, ends, s, sums, last, True, POWER1, POWER2)
            if GATE == 2 or not FAST:
                mbarrier.arrive(full.index(s), count=1)
        if not DOTS and c >= STAGES:
            mbarrier.wait(there.index(e % 2), (e // 2) & 1)
            _put(p_dq, outs.index(e % 2), e * W, T, D, sbt, sbd, B, FAST, WHOLE_D, ADD and not ONE)
            mbarrier.arrive(stored.index(e % 2), count=1)


@gluon.jit(
    do_not_specialize=[
        "scale", "T", "D", "V", "N1", "N2",
        "sk0", "sk1", "sk2", "sv0", "sv1", "sv2",
        "sg0", "sg1", "sg2", "sy0", "sy1", "sy2",
        "sa0", "sa1", "sa2", "sb0", "sb1", "sb2", "sq0", "sq1", "sq2",
        "ss0", "ss1", "ss2", "ssn", "ssd", "ssv", "sz0", "sz1", "sz2", "szn", "szd", "sze",
        "sf0", "sf1", "sf2", "sft",
    ],
    do_not_specialize_on_alignment=["p_gate", "p_start1", "p_start2"],
)  # fmt: skip
def queries_kernel(
    p_k, p_v, p_g, p_y, p_e, p_dq, p_q, p_start1, p_start2, p_gate,
    # of S and F, in order: (heads, B / 64, T), (heads, N, B, B), (heads, N, B / 16)
    p_dots1, p_dots2, p_kept1, p_kept2, p_met1, p_met2,
    scale, T, tokens, D, V, N1, N2,
    sk0, sk1, sk2,
    sv0, sv1, sv2,
    sg0, sg1, sg2,
    sy0, sy1, sy2,
    sa0, sa1, sa2,  # dy
    sb0, sb1, sb2,  # dq
    sq0, sq1, sq2,
    sz0, sz1, sz2, szn, szd, sze,  # the first S
    ss0, ss1, ss2, ssn, ssd, ssv,  # the first F
    sf0, sf1, sf2, sft,
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
    sqt: gl.constexpr,
    sqd: gl.constexpr,
    GATE: gl.constexpr,  # 0 none, 1 decay, 2 log_gate
    SCALED: gl.constexpr,  # scale is not 1
    AHLA: gl.constexpr,  # u and du come as y and dy, and S, F are P, E
    ONE: gl.constexpr,  # of hla3: F alone, without k and dy
    ADD: gl.constexpr,  # to what dq holds
    POWER1: gl.constexpr,  # of S
    POWER2: gl.constexpr,  # of F
    START1: gl.constexpr,
    START2: gl.constexpr,
    DOTS: gl.constexpr,  # also leave what a gate's gradient is made of: see `gate`
    EVERY: gl.constexpr,  # and behind every so many chunks, states by what was kept; 0: not
    B: gl.constexpr,  # tiles of 64 or 128 keys and values
    WHOLE_D: gl.constexpr,  # D == B
    WHOLE_V: gl.constexpr,
    FAST: gl.constexpr,  # rows are of whole 16 bytes; strides of the batch count by 8
):  # fmt: skip
    """One head, or one segment of so many ``tokens`` of it, its first token first: dq."""
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
        if not ONE:
            p_k += first * skt
            p_e += first * sat
        p_v += first * svt
        p_g += first * sgt
        p_y += first * syt
        p_dq += first * sbt
        if DOTS:
            p_q += first * sqt
        if GATE == 2:
            p_gate += first * sft
        if START1:
            p_start1 += part * szn
        if START2:
            p_start2 += part * ssn
    if DOTS:
        ahead = (i_head * HALVES).to(gl.int64) * total + earlier * W
        if not ONE:
            p_dots1 += ahead
        p_dots2 += ahead
    if EVERY > 0:
        kept = i_head.to(gl.int64) * ((total - 1) // (EVERY * W))
        if not ONE:
            p_kept1 += kept * (B * B)
            p_met1 += kept * (B // 16)
        p_kept2 += kept * (B * B)
        p_met2 += kept * (B // 16)
    i_2 = (i_head % N2).to(gl.int64)
    i_1 = (i_head // N2 % N1).to(gl.int64)
    i_0 = (i_head // N2 // N1).to(gl.int64)
    if not ONE:
        p_k += (i_0 * sk0 + i_1 * sk1 + i_2 * sk2) * UNIT
        p_e += (i_0 * sa0 + i_1 * sa1 + i_2 * sa2) * UNIT
    p_v += (i_0 * sv0 + i_1 * sv1 + i_2 * sv2) * UNIT
    p_g += (i_0 * sg0 + i_1 * sg1 + i_2 * sg2) * UNIT
    p_y += (i_0 * sy0 + i_1 * sy1 + i_2 * sy2) * UNIT
    p_dq += (i_0 * sb0 + i_1 * sb1 + i_2 * sb2) * UNIT
    if DOTS:
        p_q += (i_0 * sq0 + i_1 * sq1 + i_2 * sq2) * UNIT
    if START1:
        p_start1 += i_0 * sz0 + i_1 * sz1 + i_2 * sz2
    if START2:
        p_start2 += i_0 * ss0 + i_1 * ss1 + i_2 * ss2
    if GATE > 0:
        p_gate += i_0 * sf0 + i_1 * sf1 + i_2 * sf2

    chunks = (T + W - 1) // W
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    gs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    ys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    es = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, B], TILE)
    outs = gl.allocate_shared_memory(gl.bfloat16, [2, W, B], TILE)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * HALVES, W, W], TILE)
    SLOTS: gl.constexpr = STAGES if GATE == 2 else 2
    weights = gl.allocate_shared_memory(gl.float32, [SLOTS * LISTS, W], LIST)
    pieces = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * PIECES, W], LIST)
    ends = gl.allocate_shared_memory(gl.float32, [SLOTS, 1], LIST)
    ALONE: gl.constexpr = 0 if GATE == 2 or not FAST else 1
    LOADS: gl.constexpr = 128 if FAST else 0  # a copy arrives with each of the mover's threads
    full, free = barriers(STAGES, LOADS + (1 - ALONE)), barriers(STAGES, HALVES)
    there, stored = barriers(2, HALVES), None
    if not DOTS:
        stored = barriers(2, 1)
    MOVER: gl.constexpr = 32 if DOTS else 40  # registers; the first owner has what is left
    follow()
    if GATE == 1:
        _put_decay(weights, pieces, ends, p_gate, T, chunks, True, POWER1, POWER2)
    fence_async_shared()
    barrier()
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_owner_f, (
                    ks, vs, gs, ys, es, outs, tiles, weights, pieces, ends, full, free, there,
                    stored, chunks, T >> 31, p_start1, szd, sze, p_start2, ssd, ssv, D, V, scale,
                    p_dots1, p_dots2, p_kept1, p_kept2, p_met1, p_met2, T, total, earlier,
                    0, AHLA, ONE, ADD, B, STAGES, GATE, SCALED, POWER1, POWER2, START1, START2,
                    DOTS, EVERY,
                )),
                (_owner_f, (
                    ks, vs, gs, ys, es, outs, tiles, weights, pieces, ends, full, free, there,
                    stored, chunks, T >> 31, p_start1, szd, sze, p_start2, ssd, ssv, D, V, scale,
                    p_dots1, p_dots2, p_kept1, p_kept2, p_met1, p_met2, T, total, earlier,
                    1, AHLA, ONE, ADD, B, STAGES, GATE, SCALED, POWER1, POWER2, START1, START2,
                    DOTS, EVERY,
                )),
                (_mover_f, (
                    p_k, p_v, p_g, p_y, p_e, p_dq, p_q, p_gate, ks, vs, gs, ys, es, outs,
                    weights, pieces, ends, full, free, there, stored, chunks, T, D, V,
                    skt, skd, svt, svd, sgt, sgd, syt, syd, sat, sad, sbt, sbd, sqt, sqd, sft,
                    AHLA, ONE, ADD, B, STAGES, GATE, POWER1, POWER2, FAST, WHOLE_D, WHOLE_V, DOTS,
                )),
            ],
            [4, 4],
            [232, MOVER],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_owner_f, (
                    ks, vs, gs, ys, es, outs, tiles, weights, pieces, ends, full, free, there,
                    stored, chunks, T >> 31, p_start1, szd, sze, p_start2, ssd, ssv, D, V, scale,
                    p_dots1, p_dots2, p_kept1, p_kept2, p_met1, p_met2, T, total, earlier,
                    0, AHLA, ONE, ADD, B, STAGES, GATE, SCALED, POWER1, POWER2, START1, START2,
                    DOTS, EVERY,
                )),
                (_mover_f, (
                    p_k, p_v, p_g, p_y, p_e, p_dq, p_q, p_gate, ks, vs, gs, ys, es, outs,
                    weights, pieces, ends, full, free, there, stored, chunks, T, D, V,
                    skt, skd, svt, svd, sgt, sgd, syt, syd, sat, sad, sbt, sbd, sqt, sqd, sft,
                    AHLA, ONE, ADD, B, STAGES, GATE, POWER1, POWER2, FAST, WHOLE_D, WHOLE_V, DOTS,
                )),
            ],
            [4],
            [MOVER],
        )  # fmt: skip
