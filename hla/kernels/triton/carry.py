"""States over segments on an NVIDIA GPU: what each segment adds, joined in order.

    S <- r_n S + local_n, o_n the S before it        r_n = exp(power * sum of the log gate over n)

One program a head and E elements of the state. Its segments are rows of a tile, in BLOCKS runs of
`per`: each run sums its own (all runs at once), the runs are joined in order, and each goes again
from what was carried. So 132 segments are two loops of 9 steps of which all loads are known, not a
chain of 132; up to BLOCKS segments are one step, read once. float32, gates in float64; the order of
every sum depends on the number of segments alone.

Bytes a head and segment: `local` and o, 8 D V, 131 kB at D = V = 128; `local` twice where there are
more than BLOCKS segments, the second time from L2. At 3.0 TB/s 16 heads of 8 segments take 6 us;
one H100 took 4, from L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...device.scan import Call, heads
from ...device.steps import Carry, Fading
from .causal import LEAST, RESET
from .launch import Kernel, follows

E = 128  # elements of a state that a program of one warp carries: four a lane
BLOCKS = 16
TOKENS = 1024  # that a program sums at once


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["T", "N1", "N2", "sg0", "sg1", "sg2"],
    do_not_specialize_on_alignment=["p_gate"],
)
def fading_kernel(  # type: ignore[no-untyped-def]
    p_gate, p_o, T, tokens, N1, N2,
    sg0, sg1, sg2, sgt,
    so0, so1, so2, son,
    LOG: tl.constexpr, TOKENS: tl.constexpr,
    LEADS: tl.constexpr,  # as in `causal`
):  # fmt: skip
    """Sum of the log gate over one segment of one head; of a decay by its length."""
    if LEADS:
        gdc_launch_dependents()
    parts = tl.cdiv(T, tokens)
    part, i_head = (tl.program_id(0) % parts).to(tl.int64), tl.program_id(0).to(tl.int64) // parts
    i_2, i_1, i_0 = i_head % N2, i_head // N2 % N1, i_head // N2 // N1
    p_gate += i_0 * sg0 + i_1 * sg1 + i_2 * sg2
    length = tl.minimum(T - part * tokens, tokens)
    total = tl.full([], 0.0, tl.float64)
    if LOG:
        t = tl.arange(0, TOKENS).to(tl.int64)
        p_gate += part * tokens * sgt
        for i in range(0, length, TOKENS):
            a = tl.load(p_gate + (i + t) * sgt, mask=i + t < length, other=0.0).to(tl.float64)
            total += tl.sum(tl.where(a < RESET, RESET, a), 0)  # which would drop a NaN: maximum
    else:
        g = tl.load(p_gate).to(tl.float64)
        total += tl.log(tl.where(g < LEAST, LEAST, g)) * length
    tl.store(p_o + i_0 * so0 + i_1 * so1 + i_2 * so2 + part * son, total)


@triton.jit  # type: ignore[untyped-decorator]
def _fades(p_fading, n, m_n, power, GATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the log of what the gate leaves over segments n, [BLOCKS]."""
    a = tl.full(n.shape, 0.0, tl.float64)
    if GATE:
        a = tl.load(p_fading + n, mask=m_n, other=0.0) * power
    return a


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["power", "count", "per", "N1", "N2"]
)
def carry_kernel(  # type: ignore[no-untyped-def]
    p_local, p_o, p_start, p_end, p_fading,
    power, count, per, size, V, N1, N2,
    ss0, ss1, ss2, ssd, ssv,
    se0, se1, se2, sed, sev,
    sf0, sf1, sf2, sfn,
    REVERSE: tl.constexpr,
    ONCE: tl.constexpr,  # per == 1: a run is a segment
    BLOCKS: tl.constexpr,
    E: tl.constexpr,
    FOLLOWS: tl.constexpr,  # it may begin before the kernel before it has ended
):  # fmt: skip
    """One head and E elements of its state; `local` and o lie in order (*batch, count, D, V)."""
    GATE: tl.constexpr = p_fading is not None
    if FOLLOWS:
        gdc_launch_dependents()
        gdc_wait()
    tiles = tl.cdiv(size, E)
    i_head = (tl.program_id(0) // tiles).to(tl.int64)
    e = tl.program_id(0) % tiles * E + tl.arange(0, E)
    i_2, i_1, i_0 = i_head % N2, i_head // N2 % N1, i_head // N2 // N1
    m_e, d, v = e < size, (e // V).to(tl.int64), (e % V).to(tl.int64)
    p_local += i_head * count * size + e  # [E]
    p_o += i_head * count * size + e
    if GATE:
        p_fading += i_0 * sf0 + i_1 * sf1 + i_2 * sf2
    S = tl.zeros([E], tl.float32)
    if p_start is not None:
        p_start += i_0 * ss0 + i_1 * ss1 + i_2 * ss2 + d * ssd + v * ssv
        S = tl.load(p_start, mask=m_e, other=0.0)

    run = tl.arange(0, BLOCKS).to(tl.int64)
    sums, fades = tl.zeros([BLOCKS, E], tl.float32), tl.full([BLOCKS], 0.0, tl.float64)
    for i in range(1 if ONCE else per):
        n = run * per + i
        m_n = n < count
        at = count - 1 - n if REVERSE else n
        a = _fades(p_fading, at * sfn, m_n, power, GATE)
        m = (m_n if p_end is not None else n < count - 1)[:, None] & m_e[None, :]
        local = tl.load(p_local[None, :] + (at * size)[:, None], mask=m, other=0.0)
        if GATE:
            sums *= tl.exp(a).to(tl.float32)[:, None]
            fades += a
        sums += local

    begin = tl.zeros([BLOCKS, E], tl.float32)  # the state before each run
    for j in tl.static_range(BLOCKS):
        begin = tl.where((run == j)[:, None], S[None, :], begin)
        if GATE:
            S *= tl.exp(tl.sum(tl.where(run == j, fades, 0.0), 0)).to(tl.float32)
        S += tl.sum(tl.where((run == j)[:, None], sums, 0.0), 0)
    if p_end is not None:
        p_end += i_0 * se0 + i_1 * se1 + i_2 * se2 + d * sed + v * sev
        tl.store(p_end, S, mask=m_e)

    for i in range(1 if ONCE else per):
        n = run * per + i
        m_n = n < count
        at = count - 1 - n if REVERSE else n
        m = m_n[:, None] & m_e[None, :]
        tl.store(p_o[None, :] + (at * size)[:, None], begin, mask=m)
        if not ONCE:
            if GATE:
                a = _fades(p_fading, at * sfn, m_n, power, GATE)
                begin *= tl.exp(a).to(tl.float32)[:, None]
            m = (n < count - 1)[:, None] & m_e[None, :]
            begin += tl.load(p_local[None, :] + (at * size)[:, None], mask=m, other=0.0)


def fading(call: Call, s: Fading) -> Iterator[Kernel]:
    """Return the kernels of a Fading."""
    gate, o = call.place(s.gate), call.place(s.o)
    log, T = call.request.gate == "log_gate", call.request.tokens
    batch, parts = o.layout.shape[:-1], o.layout.shape[-1]
    for counts, strides, first, own in heads(batch, (gate, o), (int(log), 1)):
        if not math.prod(counts):
            continue
        every = [n for a, b in zip(strides, own, strict=True) for n in (*a, *(b or (0,)))]
        sizes = [call.dtypes[x.name].itemsize for x in (s.gate, s.o)]
        yield Kernel(
            fading_kernel, (math.prod(counts) * parts,), first, sizes, T, s.tokens, *counts[-2:],
            *every, LOG=log, TOKENS=TOKENS, LEADS=follows(call.where), num_warps=4,
        )  # fmt: skip


def carry(call: Call, s: Carry) -> Iterator[Kernel]:
    """Return the kernels of a Carry."""
    refs = s.local, s.o, s.start, s.end, s.fading
    places = [None if x is None else call.place(x) for x in refs]
    sizes = [0 if x is None else call.dtypes[x.name].itemsize for x in refs]
    ranks = 3, 3, 2, 2, 1
    *batch, count, D, V = call.place(s.local).layout.shape
    blocks = min(BLOCKS, triton.next_power_of_2(count))
    per = triton.cdiv(count, blocks)
    for counts, strides, first, own in heads(tuple(batch), places, ranks):
        programs = math.prod(counts) * triton.cdiv(D * V, E)
        if not programs:
            continue
        parts = zip(strides[2:], own[2:], ranks[2:], strict=True)
        every = [n for a, b, rank in parts for n in (*a, *(b or (0,) * rank))]
        yield Kernel(
            carry_kernel, (programs,), first, sizes, s.power, count, per, D * V, V, *counts[-2:],
            *every, REVERSE=s.reverse, ONCE=per == 1, BLOCKS=blocks, E=E,
            FOLLOWS=follows(call.where), num_warps=1,
        )  # fmt: skip
