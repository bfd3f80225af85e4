"""The kernels of the host, compiled by Numba: the causal pass over a sequence, and one token.

The pass takes W = 4 tokens at a time, so that a state is read and written once for them. With S
before them, in the order in which they come (reverse: the last token first),

    o_i = sum_{j<=i} L_ij (q_i . k_j) v_j + a_i q_i S         S <- r S + sum_j b_j k_j v_j'

where L, a, b and r are products of the gates between. A head's state lies in a buffer, at most
`PITCH` columns of it at a time: 20 KB at D = 64 in float32, which the nearest cache holds. The
innermost loops run along its rows, as vector instructions: D V multiply-adds a token for the sums
and as many for the reads, beside which those of the pairs are 1/8 at D = V = 64. Only q_i . k_j is
summed in an order that the compiler chooses, so a head's bits depend on no other head and on no
later token.

Arrays are one-dimensional; where each head of theirs begins is in a table (`memory`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
from numba import types

W = 4  # tokens at a time
PITCH = 80  # from row to row of a state: 64 columns and a denominator, an odd 5 cache lines
SUMS = {"contract"}  # a product and a sum may be one instruction
DOTS = {"contract", "reassoc"}  # and a sum may be one of vectors


@numba.njit(nogil=True, fastmath=DOTS)
def dot(x, i, y, j, D):
    """Return x[i:i+D] . y[j:j+D]."""
    total = x[i] * y[j]
    for r in range(1, D):
        total += x[i + r] * y[j + r]
    return total


@numba.njit(nogil=True, fastmath=SUMS)
def pairs(A, v, o, columns):
    """Write o = A v, of W tokens."""
    for c in range(columns):
        for i in range(W):
            total = A[i * W] * v[c]
            for j in range(1, i + 1):
                total += A[i * W + j] * v[j * PITCH + c]
            o[i * PITCH + c] = total


@numba.njit(nogil=True, fastmath=SUMS)
def update(S, q, k, v, o, gate, rest, rows, columns):
    """Add q S to o, then S <- gate S + k v', of W tokens; q and k are [D, W].

    It takes two rows of S at a time, and rounds a state once for all tokens; the gate is in two
    parts, so that a constant one's rounding does not add up.
    """
    for r in range(0, rows, 2):
        s, x, y = S[r * PITCH : (r + 2) * PITCH], q[r * W : (r + 2) * W], k[r * W : (r + 2) * W]
        for c in range(columns):
            s0, s1 = s[c], s[PITCH + c]
            new0, new1 = y[0] * v[c], y[W] * v[c]
            for i in range(1, W):
                new0 += y[i] * v[i * PITCH + c]
                new1 += y[W + i] * v[i * PITCH + c]
            for i in range(W):
                o[i * PITCH + c] += x[i] * s0 + x[W + i] * s1
            s[c], s[PITCH + c] = gate * s0 + (rest * s0 + new0), gate * s1 + (rest * s1 + new1)


def room(D: int) -> int:
    """Return the numbers that a thread of `causal_pass` works with."""
    return (D + 1) * (PITCH + 2 * W) + W * (2 * PITCH + W + 1)


def causal_pass(q, k, v, g, start, o, end, work, heads, steps, D, V, T, strict, reverse):
    """Run a pass on the heads that have a row in ``heads``, -1 of an end that others write.

    ``steps`` are the distances of tokens in q, k, v and g, the gate of each token; ``work`` has
    room for `room` numbers.
    """
    (d_q, d_k, d_v, d_g), way = steps, -1 if reverse else 1
    s_q, s_k, s_v, s_g = way * d_q, way * d_k, way * d_v, way * d_g
    late = 1 if strict or reverse else 0  # a query reads the state before its own gate
    early = 1 if reverse and not strict else 0  # a key is followed by its own gate
    rows = D + D % 2
    S, work = work[: rows * PITCH], work[rows * PITCH :]  # [D, V]
    qs, ks, work = work[: rows * W], work[rows * W : 2 * rows * W], work[2 * rows * W :]  # [D, W]
    vs, out, work = work[: W * PITCH], work[W * PITCH : 2 * W * PITCH], work[2 * W * PITCH :]
    A, cast = work[: W * W], q.dtype.type
    work[:], qs[:], ks[:] = 0, 0, 0
    for n in range(heads.shape[0]):
        i_q, i_k, i_v, i_g, i_start, i_o, i_end = heads[n]
        for left in range(0, V, PITCH):
            columns = min(PITCH, V - left)
            S[:] = 0
            for r in range(D):
                for c in range(columns):
                    S[r * PITCH + c] = start[i_start + r * V + left + c]
            for first in range(0, T, W):
                here, total, t = min(W, T - first), 1.0, T - 1 - first if reverse else first
                x, y, z, w = i_q + t * d_q, i_k + t * d_k, i_v + t * d_v + left, i_g + t * d_g
                if here < W:
                    qs[:], ks[:], vs[:], A[:] = 0, 0, 0, 0
                for i in range(here):
                    for c in range(columns):
                        vs[i * PITCH + c] = v[z + i * s_v + c]
                    total *= g[w + i * s_g]
                for j in range(here):
                    L = 1.0
                    for i in range(j, here):
                        if i - late > j - early:
                            L *= g[w + (i - late) * s_g]
                        if i > j or not strict:
                            A[i * W + j] = cast(L) * dot(q, x + i * s_q, k, y + j * s_k, D)
                a = b = 1.0
                for i in range(here):  # weigh the queries, and the keys from the last
                    if i >= late:
                        a *= g[w + (i - late) * s_g]
                    for r in range(D):
                        qs[r * W + i] = cast(a) * q[x + i * s_q + r]
                    j = here - 1 - i
                    if j + 1 - early < here:
                        b *= g[w + (j + 1 - early) * s_g]
                    for r in range(D):
                        ks[r * W + j] = cast(b) * k[y + j * s_k + r]
                pairs(A, vs, out, columns)
                gate = cast(total)
                update(S, qs, ks, vs, out, gate, cast(total - gate), rows, columns)
                for i in range(here):
                    to = i_o + (t + i * way) * V + left
                    for c in range(columns):
                        o[to + c] = out[i * PITCH + c]
            if i_end >= 0:
                for r in range(D):
                    for c in range(columns):
                        end[i_end + r * V + left + c] = S[r * PITCH + c]


def token(q, k, v, g, before, o, after, heads, D, V, copy):
    """Take one token of heads: S <- g S + k v', then o = q S, two rows of S at a time.

    With ``copy`` S is that of ``before`` first, else what ``after`` holds.
    """
    for n in range(heads.shape[0]):
        i_q, i_k, i_v, i_g, i_before, i_o, i_after = heads[n]
        gate, x, y = g[i_g], v[i_v : i_v + V], o[i_o : i_o + V]
        y[:] = 0
        for r in range(0, D - 1, 2):
            S = after[i_after + r * V : i_after + r * V + 2 * V]
            if copy:
                old = before[i_before + r * V : i_before + r * V + 2 * V]
                for c in range(2 * V):
                    S[c] = old[c]
            k0, k1, q0, q1 = k[i_k + r], k[i_k + r + 1], q[i_q + r], q[i_q + r + 1]
            for c in range(V):
                s0, s1 = gate * S[c] + k0 * x[c], gate * S[V + c] + k1 * x[c]
                y[c] += q0 * s0 + q1 * s1
                S[c], S[V + c] = s0, s1
        if D % 2:
            S = after[i_after + D * V - V : i_after + D * V]
            if copy:
                S[:] = before[i_before + D * V - V : i_before + D * V]
            k0, q0 = k[i_k + D - 1], q[i_q + D - 1]
            for c in range(V):
                S[c] = gate * S[c] + k0 * x[c]
                y[c] += q0 * S[c]


@functools.cache
def compiled(kernel: Callable[..., None], dtype: Any) -> Callable[..., None]:
    """Compile a kernel for arrays of one dtype, kept on disk where that can be written."""
    of = numba.from_dtype(dtype)
    given, made = types.Array(of, 1, "C", readonly=True), types.Array(of, 1, "C")
    gates = types.Array(types.float64, 1, "C", readonly=True)
    table, n, yes = types.Array(types.int64, 2, "C"), types.int64, types.boolean
    shapes = (types.UniTuple(n, 4), n, n, n, yes, yes)
    takes = {
        causal_pass: (given, given, given, gates, given, made, made, made, table, *shapes),
        token: (*[given] * 5, made, made, table, n, n, yes),
    }
    jit = functools.partial(numba.njit, [types.void(*takes[kernel])], nogil=True)
    try:
        return jit(cache=True, fastmath=SUMS)(kernel)
    except (OSError, RuntimeError):  # of a cache that cannot be read or written
        return jit(fastmath=SUMS)(kernel)
