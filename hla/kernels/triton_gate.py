"""The gradient of a gate by one pass on an NVIDIA GPU, from what the passes of dq and dv leave.

The gate of token s multiplies every product that crosses it (derivations 5). In a chunk

    G_s = E + sum_{t>=s} c_t + sum_{j<s} d_j + pairs_s        E = B - sum c        B <- E + sum d

where c_t is read from earlier chunks, d_j is written to later ones, pairs_s crosses s within the
chunk, and B and E are what crosses its start and what crosses all of it. B starts as <S, R>, the
state and its gradient, at every period of tokens, and E is 0 in a chunk whose gate leaves nothing:
so the difference, which loses digits, is taken of no more than the chunks of a period.

One program a head and period. Bytes a token and head: 16, and 8 D V a period.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_launch import addresses, shapes_alone

FORGOTTEN = tl.constexpr(2.0**-24)  # of a product: below what float32 sums of it resolve


@triton.jit(do_not_specialize=["power", "T"])  # type: ignore[untyped-decorator]
def gate_kernel(  # type: ignore[no-untyped-def]
    p_reads, p_writes, p_gate, p_border, p_S, p_R, p_o, power, T, D, V,
    PERIOD: tl.constexpr, W: tl.constexpr, LOG: tl.constexpr, STRICT: tl.constexpr,
    LEAST: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the log gate over one period of one head."""
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    B = tl.full([], 0.0, tl.float64)
    if part == 0:
        if p_border is not None:
            B += tl.load(p_border + head)
    else:
        at = (head * (tl.num_programs(1) - 1) + part - 1) * D * V
        for i in range(0, D, BD):
            d = i + tl.arange(0, BD)
            for j in range(0, V, BV):
                v = j + tl.arange(0, BV)
                m = (d < D)[:, None] & (v < V)[None, :]
                S = tl.load(p_S + at + d[:, None] * V + v[None, :], mask=m, other=0.0)
                R = tl.load(p_R + at + v[None, :] * D + d[:, None], mask=m, other=0.0)
                B += tl.sum(tl.sum((S * R).to(tl.float64), 1), 0)
    log_g = tl.full([], 0.0, tl.float64)
    if not LOG:
        g = tl.load(p_gate + head).to(tl.float64)
        log_g = tl.log(tl.where(g < LEAST, LEAST, g))
    first = part.to(tl.int64) * PERIOD
    for i in range(tl.cdiv(tl.minimum(T - first, PERIOD), W)):
        t = first + i * W + tl.arange(0, W)
        m = t < T
        c = tl.load(p_reads + head * T + t, mask=m, other=0.0).to(tl.float64)
        d = tl.load(p_writes + 2 * head * T + t, mask=m, other=0.0).to(tl.float64)
        pairs = tl.load(p_writes + (2 * head + 1) * T + t, mask=m, other=0.0).to(tl.float64)
        if LOG:
            a = tl.load(p_gate + head * T + t, mask=m, other=0.0).to(tl.float64)
        else:
            a = tl.where(m, log_g, 0.0)
        total = tl.exp(tl.sum(a, 0) * power)
        read, written = tl.sum(c, 0), tl.sum(d, 0)
        through = tl.where(total < FORGOTTEN, 0.0, B - read)
        G = through + (read - tl.cumsum(c, 0)) + (tl.cumsum(d, 0) - d) + pairs
        if not STRICT:  # else what a token reads has not met its own gate
            G += c
        tl.store(p_o + head * T + t, (G * power).to(tl.float32), mask=m)
        B = through + written


def gate_gradient(
    reads: torch.Tensor,
    writes: torch.Tensor,
    gate: torch.Tensor,
    border: torch.Tensor | None,
    S: torch.Tensor | None,
    R: torch.Tensor | None,
    *,
    power: int,
    strict: bool,
    log: bool,
    least: float,
    period: int,
    chunk: int,
) -> torch.Tensor:
    """Return the gradient of the log gate by one pass, float32, (*batch, T).

    Parameters
    ----------
    reads, writes : tensor, float32, (*batch, 1, T) and (*batch, 2, T)
        c, and d with pairs.
    gate : tensor, float32, (*batch, T), or (*batch) for a decay
    border : tensor, float64, (*batch), or None
        <S, R> at the first token; None for 0.
    S, R : tensor, float32, (*batch, N, D, V) and (*batch, N, V, D), contiguous, or None
        States and their gradients at the N later periods.
    power, strict
        Of the pass.
    log : bool
        Whether the gate is the log gate.
    least : float
        What stands for a smaller decay.
    period, chunk : int
        Tokens in each.
    """
    T, heads = reads.shape[-1], reads.shape[:-2]
    o = torch.empty((*heads, T), dtype=torch.float32, device=reads.device)
    if o.numel() and not shapes_alone(o):
        D, V = (1, 1) if S is None else S.shape[-2:]
        gate = gate.expand((*heads, T) if log else heads)
        given = (reads, writes, gate, border, S, R)
        operands = [None if x is None else x.contiguous() for x in given]
        addresses(operands)
        grid = (o.numel() // T, triton.cdiv(T, period))
        with torch.cuda.device_of(o):
            gate_kernel[grid](
                *operands, o, power, T, D, V, PERIOD=period, W=chunk, LOG=log, STRICT=strict,
                LEAST=least, BD=32, BV=32, num_warps=1,
            )  # fmt: skip
    return o
