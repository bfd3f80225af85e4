"""Last token first on Hopper: the gradients of u, v and k of ahla, in one sweep.

From q, k, v, the gradient do of o and the saved u:

    R = sum q do'     du = R' k, dk = R u
    P = sum q du'     dv = P' k, dk += P v

A program does a head with three warpgroups, in chunks of W = 64 tokens. The first owns R, the
second P, a chunk behind, and both do the same: the first with X = dO, U = u, the second with X =
dU, U = v. States are read both ways round, from bfloat16 copies:

    dU (dV) = K R + up(K Q') X     dK = U R' + up(U X') Q     R += Q' X

The third warpgroup loads, and stores what the owners leave in the place of an operand that nobody
reads any more: dU takes dO's, dV v's, and dK u's, where the second adds its part to the first's.

Bytes a token and head, D = V = 128: 8 rows of 256, 0.358 ms for B = 8, T = 4096, H = 16 at 3.0
TB/s; 0.415 ms on one H100 (86%), 0.435 with a decay. No atomics; bits depend on nothing but the
head's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...core.passes import Shape
from .copies import (
    Chunks,
    Place,
    begun,
    chunks_of,
    cut,
    ended,
    entries,
    heads,
    laid,
    launched,
    lists_at,
    load_decay,
    out_shape,
    state_in,
    state_out,
    weights_of,
    wide,
)  # fmt: skip
from .hopper_reverse import STAGES, rows_of, updated
from .warpgroups import (
    BF16,
    F32,
    HALF,
    LISTS,
    MOVER,
    OWNER,
    Array,
    W,
    barrier,
    columns,
    i32,
    listed,
    pairs,
    tile,
    turned,
)  # fmt: skip


class Reverse(NamedTuple):
    """What a launch does, apart from its arrays."""

    batch: Shape  # of all arrays of tokens
    gate: str | None = None
    scale: float = 1.0  # of what is written to the states
    ends: tuple[bool, bool] = (False, False)  # which states at the first token are asked: R, P
    read: bool = True  # du, dv and dk are asked, not the states alone: of q, k and do
    tokens: int = 0  # of a segment, one more batch axis of states; 0: the whole
    axis: int = -2  # of tokens, in memory


class Swept(NamedTuple):
    """What it makes: None where it is not asked."""

    du: Array | None
    dv: Array | None
    dk: Array | None
    R: Array | None
    P: Array | None


def reverse(
    p: Reverse, q: Array, k: Array, v: Array | None, do: Array, u: Array | None,
    gate: Array | None = None, R: Array | None = None, P: Array | None = None,
) -> Swept:  # fmt: skip
    """Sweep from the last token to the first.

    Parameters
    ----------
    p : Reverse
        What to do.
    q, k, v, do, u : array, (*batch, T, D or V), bfloat16
        Batch axes of q, k and v broadcast. Of states alone there are no v and u.
    gate : array, optional
        A decay (*batch) or a log gate (*batch, T).
    R, P : array, (*batch, D, V), float32, optional
        After the last token, of segments (*batch, segments, D, V).

    Returns
    -------
    Swept
        Gradients of u, v and k in bfloat16, and the states before the first token that are asked.
    """
    T, D, V = q.shape[-2], q.shape[-1], do.shape[-1]
    B = wide(max(D, V))
    R, P = (
        None if x is None else state_in(jnp.swapaxes(x, -1, -2) / p.scale, B, B) for x in (R, P)
    )
    lists = None if gate is None or p.gate is None else listed(gate, p.gate, T)
    given = [laid(x, p.axis, B) for x in ((q, k, v, do, u) if p.read else (q, k, do))]
    given += [x for x in (lists, R, P) if x is not None]
    parts = -(-T // p.tokens) if p.tokens else 1
    state = jax.ShapeDtypeStruct((*p.batch, *((parts,) if p.tokens else ()), B, B), F32)
    outs = [out_shape(p.batch, T, B, p.axis)] * (3 * p.read) + [state] * sum(p.ends)
    scratch = {n: tile(STAGES, W, B) for n in ("qs", "ks", "vs", "gs", "us")}
    scratch |= {"copies": tile(2, B, B), "full": barrier(STAGES, 2 + (p.gate == "log_gate"))}
    scratch |= {"u_full": barrier(STAGES, 1 + p.read), "v_full": barrier(STAGES)}
    scratch |= {n: barrier(STAGES) for n in ("there", "done")}
    if p.gate is not None:
        scratch |= {"lists": plgpu.SMEM((2, LISTS, W), F32), "gate_full": barrier(1, 2)}

    def body(*refs: Any, **scratch: Any) -> None:
        _reverse(p, T, parts, [x is not None for x in (lists, R, P)], refs, scratch)

    found = launched(body, outs, scratch, entries(p.batch) * parts, 3)(*given)
    left = iter(found[3 * p.read :])
    ends = [
        jnp.swapaxes(state_out(next(left), V, D), -1, -2) * p.scale if asked else None
        for asked in p.ends
    ]
    made = [cut(x, T, n, p.axis) for x, n in zip(found[: 3 * p.read], (V, V, D), strict=False)]
    return Swept(*(made or [None] * 3), *ends)


def _reverse(
    p: Reverse, T: int, parts: int, there: Sequence[bool], refs: Any, s: dict[str, Any]
) -> None:
    """Do a program: its warpgroup's part."""
    inputs = iter(refs)
    given = {n: next(inputs) for n in ("qkvgu" if p.read else "qkg")}
    lists, *starts = (next(inputs) if x else None for x in there)
    nil = next(inputs)
    made = [next(inputs) for _ in range(3 * p.read)]
    ends = [next(inputs) if x else None for x in p.ends]
    i, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    number = lax.rem(i, i32(parts)) if p.tokens else i32(0)
    place = Place(heads(p.batch, lax.div(i, i32(parts)) if p.tokens else i), p.batch, p.axis)
    part, axes = chunks_of(T, p.tokens, number), (number,) if p.tokens else ()

    for n in (0, 1):

        @pl.when(warpgroup == n)
        def _(n: int = n) -> None:
            plgpu.set_max_registers(OWNER, action="increase")
            _owner(p, place, part, axes, nil, s, starts[n], ends[n], n)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(MOVER, action="decrease")
        _mover(p, place, part, lists, s, given, made)


def _mover(
    p: Reverse, place: Place, part: Chunks, lists: Any, s: dict[str, Any], given: Any, made: Any
) -> None:
    """Load what the owners read; store what they leave in its place."""
    if p.gate == "decay":
        load_decay(lists, place, s["lists"], s["gate_full"].at[0])

    def step(i: Array, _: None) -> None:
        slot = lax.rem(i, i32(STAGES))
        row = part.first + (part.chunks - 1 - i) * W
        left = row + STAGES * W
        more, late = i < part.chunks, i >= STAGES

        def load(name: str, full: str) -> None:
            rows = place.rows(given[name], row)
            plgpu.copy_gmem_to_smem(rows, s[f"{name}s"].at[slot], s[full].at[slot])

        def store(x: Any, name: str) -> None:
            plgpu.copy_smem_to_gmem(s[name].at[slot], place.rows(x, left))

        @pl.when(late)
        def _() -> None:
            plgpu.barrier_wait(s["there"].at[slot])
            if p.read:
                store(made[0], "gs")
            plgpu.barrier_wait(s["done"].at[slot])
            if p.read:
                store(made[2], "us")
                store(made[1], "vs")

        @pl.when(more)
        def _() -> None:
            load("q", "full")
            load("k", "full")
            if p.gate == "log_gate":
                rows = lists_at(lists, place, row)
                plgpu.copy_gmem_to_smem(rows, s["lists"].at[slot], s["full"].at[slot])

        @pl.when(late)
        def _() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(more)
        def _() -> None:
            load("g", "u_full")
            if p.read:
                load("u", "u_full")
                load("v", "v_full")

    lax.fori_loop(i32(0), part.chunks + STAGES, step, None)
    plgpu.wait_smem_to_gmem(0)


def _owner(
    p: Reverse, place: Place, part: Chunks, axes: tuple[Array, ...], nil: Any, s: dict[str, Any],
    start: Any, end: Any, n: int,
) -> None:  # fmt: skip
    """Own R (n = 0): make du and the first part of dk; or P (n = 1): dv and the rest."""
    B = s["qs"].shape[-1]
    halves = range(B // HALF)
    R = begun(start, place, axes, B // HALF, B)
    for h in halves:
        s["copies"][n, columns(h), :] = R[h].astype(BF16)
    plgpu.commit_smem()
    if p.gate == "decay":
        plgpu.barrier_wait(s["gate_full"].at[0])

    def step(i: Array, carry: Any) -> Any:
        z, *R = carry
        z = lax.bitwise_and(z, i)
        slot, copy = lax.rem(i, i32(STAGES)), s["copies"].at[z + n]
        b_q, b_k, b_g = (s[x].at[slot] for x in ("qs", "ks", "gs"))
        b_u = s["vs" if n else "us"].at[slot]
        w = weights_of(s.get("lists"), part.chunks - 1 - i, slot, part, p.gate, 1)
        plgpu.barrier_wait(s["full"].at[slot])
        if n and p.read:
            plgpu.barrier_wait(s["v_full"].at[slot])
        plgpu.barrier_wait(s["there" if n else "u_full"].at[slot])
        if p.read:
            own = [s["us"].at[slot].at[:, columns(h)] for h in halves]
            t = pairs(b_u, b_g, w, upper=True)
            turns = [turned(copy.at[columns(h), :]) for h in halves]
            dk = rows_of(b_u, turns, t, b_q, w, p.scale, own if n else ())
            plgpu.commit_smem()  # every warp has read u
            for h in halves:
                own[h][...] = dk[h]
        R = updated(R, b_q, b_g, w)
        if p.read or not n:
            t = pairs(b_k, b_q, w, upper=True)
            made = rows_of(b_k, [copy.at[:, columns(h)] for h in halves], t, b_g, w, p.scale)
        plgpu.commit_smem()  # every warp has read x and the copy
        for h in halves:
            if p.read or not n:
                (b_u if n else b_g)[:, columns(h)] = made[h]
            copy[columns(h), :] = R[h].astype(BF16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["done" if n else "there"].at[slot])
        return z, *R

    _, *R = lax.fori_loop(i32(0), part.chunks, step, (nil[0], *R))
    ended(end, place, axes, True, True, R)
