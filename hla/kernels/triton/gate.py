"""The gradient of a gate by one pass on an NVIDIA GPU, from what the passes of dq and dv leave.

The gate of token s multiplies every product that crosses it (derivations 5). In a chunk

    G_s = E + sum_{t>=s} c_t + sum_{j<s} (d_j + w_j) - sum_{t<s} r_t      E = B - sum c
                                                                           B <- E + sum d

where c_t is read from earlier chunks, d_j is written to later ones, r_t and w_j sum the chunk's
own pairs j < t by query and by key, and B and E are what crosses its start and what crosses all of
it. B is <S, R>, the state and its gradient, at both borders of every period of tokens. From the
first the chunks carry it on, and what is then missing at the second is added along the way in equal
parts: c and d round S and R each by itself, and most of what that adds up to grows evenly. E is 0
in a chunk whose gate leaves nothing. So differences, which lose digits, are taken of no more than
the chunks of a period. For a decay the sum of G over all tokens is needed, in which each product
counts by the gates that it crosses.

One program a head and period, whose tokens are read at once; chunks are joined by a scan of what
each makes of B. Bytes a token and head: 24 (float64: 44), of a decay 16 (32), and 8 D V (bfloat16:
4 D V) a period, which the two programs that it borders read; of fused rows their products of S and
R alone, 0.012 ms on one H100 for B = 8, T = 4096, H = 16.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...device import elementwise

FORGOTTEN = tl.constexpr(elementwise.FORGOTTEN)


@triton.jit  # type: ignore[untyped-decorator]
def _border(p_S, p_R, D, V, BD: tl.constexpr, BV: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return <S, R> of contiguous (D, V) and (V, D)."""
    B = tl.full([], 0.0, tl.float64)
    for i in range(0, D, BD):
        d = i + tl.arange(0, BD)
        for j in range(0, V, BV):
            v = j + tl.arange(0, BV)
            m = (d < D)[:, None] & (v < V)[None, :]
            S = tl.load(p_S + d[:, None] * V + v[None, :], mask=m, other=0.0).to(tl.float32)
            R = tl.load(p_R + v[None, :] * D + d[:, None], mask=m, other=0.0).to(tl.float32)
            B += tl.sum(tl.sum((S * R).to(tl.float64), 1), 0)
    return B


@triton.jit  # type: ignore[untyped-decorator]
def _product(p, i, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return <S, R> of entry i, the sum of N parts."""
    return tl.sum(tl.load(p + i * N + tl.arange(0, N)).to(tl.float64), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _summed(p, t, m, step, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sum of N rows a ``step`` apart, float64."""
    x = tl.load(p + t, mask=m, other=0.0).to(tl.float64)
    for i in tl.static_range(1, N):
        x += tl.load(p + i * step + t, mask=m, other=0.0).to(tl.float64)
    return x


@triton.jit
def _then(a, b, c, d):  # type: ignore[no-untyped-def]
    """Return the steps x -> a x + b and x -> c x + d as one."""
    return c * a, c * b + d


@triton.jit(do_not_specialize=["power", "T", "D", "V"])  # type: ignore[untyped-decorator]
def gate_kernel(  # type: ignore[no-untyped-def]
    p_reads, p_writes, p_gate, p_border, p_S, p_R, p_met, p_o, power, factor, T, D, V,
    PERIOD: tl.constexpr, W: tl.constexpr, LOG: tl.constexpr, STRICT: tl.constexpr,
    ENDS: tl.constexpr,  # no gradient comes from after the last token
    LEAST: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    READS: tl.constexpr, WRITES: tl.constexpr, MET: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the log gate, or its sum, over one period of one head.

    Of arrays that lie in order: c (*batch, READS, T), d + w and r (*batch, WRITES, 2 T), the gate
    (*batch, T) or a decay (*batch), <S, R> at the first token (*batch) or None for 0, and S
    (*batch, N, D, V) and R (*batch, N, V, D), states and their gradients at the N later periods, or
    their products (*batch, N, MET), or None. READS, WRITES and MET count terms of sums.
    """
    parts = tl.cdiv(T, PERIOD)
    part, head = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    B, after = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    at = (head * (parts - 1) + part) * D * V
    if part == 0:
        if p_border is not None:
            B += tl.load(p_border + head)
    elif p_S is not None:
        B += _border(p_S + at - D * V, p_R + at - D * V, D, V, BD, BV) * factor
    elif p_met is not None:
        B += _product(p_met, head * (parts - 1) + part - 1, MET)
    if part < parts - 1:
        if p_met is not None:
            after += _product(p_met, head * (parts - 1) + part, MET)
        if p_S is not None:
            after += _border(p_S + at, p_R + at, D, V, BD, BV) * factor
    log_g = tl.full([], 0.0, tl.float64)
    if LOG:
        p_gate += head * T
    else:
        g = tl.load(p_gate + head).to(tl.float64)
        log_g = tl.log(tl.where(g < LEAST, LEAST, g))
    p_reads += head * READS * T
    p_writes += head * 2 * WRITES * T
    first, T64 = part.to(tl.int64) * PERIOD, T.to(tl.int64)
    i, i_t = tl.arange(0, PERIOD // W), tl.arange(0, W)
    t = first + (i * W)[:, None] + i_t[None, :]  # [chunks, W]
    m = t < T
    c = _summed(p_reads, t, m, T64, READS)
    d = _summed(p_writes, t, m, 2 * T64, WRITES)  # with w
    query = _summed(p_writes + T64, t, m, 2 * T64, WRITES)
    a = tl.load(p_gate + t, mask=m, other=0.0).to(tl.float64) if LOG else tl.where(m, log_g, 0.0)

    # What crosses a chunk, and what is missing at the border behind.
    kept = tl.where(tl.exp(tl.sum(a, 1) * power) < FORGOTTEN, 0.0, 1.0).to(tl.float64)
    # What the chunk's own pairs sum to is the same by query and by key.
    sum_c, sum_d = tl.sum(c, 1), tl.sum(d, 1) - tl.sum(query, 1)
    by, plus = tl.associative_scan((kept, sum_d - kept * sum_c), 0, _then)
    behind = by * B + plus
    E = kept * (behind - sum_d)
    carried = tl.sum(tl.where(i == PERIOD // W - 1, behind, 0.0), 0)
    begin = tl.max(tl.where(kept > 0, 0.0, i + 0.5), 0)  # from which chunk on it came to miss
    chunks = tl.cdiv(tl.minimum(T - first, PERIOD), W)
    missing = (after - carried) / (chunks - begin)
    if not ENDS:
        missing = tl.where(part < parts - 1, missing, 0.0)
    through = E + tl.where(i + 0.5 > begin, missing * (i + 0.5 - begin), 0.0)

    if LOG:
        ahead = tl.cumsum(c + query, 1)  # a strict pass reads before the token's own gate
        if not STRICT:
            ahead -= c + query
        G = (through + sum_c)[:, None] - ahead + tl.cumsum(d, 1) - d
        tl.store(p_o + head * T + t, (G * power).to(tl.float32), mask=m)
    else:
        n = tl.maximum(tl.minimum(T - first - i * W, W), 0)
        upto = (i_t - 1 if STRICT else i_t)[None, :]  # the last gate that a read has met
        crossed = (upto + 1) * c + upto * query - i_t[None, :] * d
        whole = tl.sum(tl.sum(crossed, 1) + (n - 1) * sum_d + n * through, 0)
        tl.store(p_o + head * parts + part, whole * power)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def sum_kernel(p_1, p_2, p_3, p_gate, p_o, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the sum of what up to three passes leave for n log gates, 0 where a gate is -inf."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    G = tl.load(p_1 + i, mask=m)
    if p_2 is not None:
        G += tl.load(p_2 + i, mask=m)
    if p_3 is not None:
        G += tl.load(p_3 + i, mask=m)
    a = tl.load(p_gate + i, mask=m)
    tl.store(p_o + i, tl.where(tl.abs(a) == float("inf"), 0.0, G), mask=m)


def settings(
    *,
    strict: bool,
    log: bool,
    ends: bool,
    least: float,
    period: int,
    chunk: int,
    reads: int = 1,
    writes: int = 1,
    met: int = 1,
) -> dict[str, Any]:
    """Return the constants and settings of a launch, of one program a head and period.

    Parameters
    ----------
    strict : bool
        Whether the pass is.
    log : bool
        Whether the gate is the log gate.
    ends : bool
        Whether no gradient comes from after the last token, that of its state.
    least : float
        What stands for a smaller decay.
    period, chunk : int
        Tokens in each.
    reads, writes, met : int
        Terms of which c, of which d + w and r, and of which <S, R> is the sum: powers of two.
    """
    return {
        "PERIOD": period, "W": chunk, "LOG": log, "STRICT": strict, "ENDS": ends, "LEAST": least,
        "BD": 64, "BV": 64, "READS": reads, "WRITES": writes, "MET": met,
        "num_warps": 4,
    }  # fmt: skip
