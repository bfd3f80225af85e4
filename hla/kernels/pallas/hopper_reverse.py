"""Last token first on Hopper: the gradients of y, v and k of hla2.

From q, k, v, the gradient do of o and the saved y, with powers p of the gate:

    R = sum q do' (p = 2)          dy = R v, dv = R' y
    Z = sum q dy' + dy q' (p = 1)  dk = Z k

A program does a head with three warpgroups, in chunks of W = 64 tokens. The first owns R, [D, V],
the second Z, which is symmetric: of its four blocks of 64 three are kept, and the one beside the
diagonal is read the other way round from a copy in shared memory. R is read both ways round, from
a bfloat16 copy. Up (lo) keeps the pairs whose row is not later (not earlier) than its column:

    dY = V R' + up(V dO') Q     dV = Y R + up(Y Q') dO     R += Q' dO
    dK' = Z K' + dY' lo(Q K') + Q' lo(dY K')               Z += Q' dY + dY' Q

The third moves: it stores what the owners leave in the place of an operand that nobody reads any
more (dY takes V's, dV Y's, dK K's) and loads the next chunk there.

Bytes a token and head, D = V = 128: 8 rows of 256, 0.358 ms for B = 8, T = 4096, H = 16 at 3.0
TB/s; 0.413 ms on one H100 (87%), 0.424 with a decay, 0.443 with a log gate. No atomics; bits
depend on nothing but the head's data.
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
from .warpgroups import (
    BF16,
    COLUMN,
    F32,
    HALF,
    LISTS,
    MOVER,
    OWNER,
    ROW,
    WGMMA,
    Array,
    W,
    Weights,
    added,
    barrier,
    columns,
    i32,
    listed,
    loaded,
    pairs,
    product,
    put_turned,
    taken_turned,
    tile,
    turned,
)  # fmt: skip

STAGES = 2  # chunks in shared memory


class Reverse(NamedTuple):
    """What a launch does, apart from its arrays."""

    batch: Shape  # of all arrays of tokens
    gate: str | None = None
    powers: tuple[int, int] = (1, 2)  # of the gate: of Z, of R
    scale: float = 1.0  # of what is written to R
    end: bool = False  # R at the first token is asked
    half: bool = False  # half of Z there is asked
    read: bool = True  # dy, dv and dk are asked, not the states alone: of q, v and do
    tokens: int = 0  # of a segment, one more batch axis of states; 0: the whole
    axis: int = -2  # of tokens, in memory


class Swept(NamedTuple):
    """What it makes: None where it is not asked."""

    dy: Array | None
    dv: Array | None
    dk: Array | None
    R: Array | None
    half: Array | None


def reverse(
    p: Reverse, q: Array, k: Array | None, v: Array, do: Array, y: Array | None,
    gate: Array | None = None, R: Array | None = None, Z: Array | None = None,
) -> Swept:  # fmt: skip
    """Sweep from the last token to the first.

    Parameters
    ----------
    p : Reverse
        What to do.
    q, k, v, do, y : array, (*batch, T, D or V), bfloat16
        Batch axes of q, k and v broadcast. Of states alone there are no k and y.
    gate : array, optional
        A decay (*batch) or a log gate (*batch, T).
    R, Z : array, (*batch, D, V) and (*batch, D, D), float32, optional
        After the last token, of segments (*batch, segments, ...); of Z a matrix of which the sum
        with its transpose counts.

    Returns
    -------
    Swept
        Gradients of y, v and k in bfloat16, and the states before the first token that are asked.
    """
    T, D, V = q.shape[-2], q.shape[-1], v.shape[-1]
    B = wide(max(D, V))
    if R is not None:
        R = state_in(jnp.swapaxes(R, -1, -2) / p.scale, B, B)
    if Z is not None:
        Z = state_in((Z + jnp.swapaxes(Z, -1, -2)) / p.scale, B, B)
    lists = None if gate is None or p.gate is None else listed(gate, p.gate, T)
    states = [x for x in (lists, R, Z) if x is not None]
    given = [laid(x, p.axis, B) for x in ((q, k, v, do, y) if p.read else (q, v, do))]
    parts = -(-T // p.tokens) if p.tokens else 1
    state = jax.ShapeDtypeStruct((*p.batch, *((parts,) if p.tokens else ()), B, B), F32)
    outs = [out_shape(p.batch, T, B, p.axis)] * (3 * p.read) + [state] * (p.end + p.half)
    scratch = {n: tile(STAGES, W, B) for n in ("qs", "ks", "vs", "gs", "ys")}
    scratch |= {"copies": tile(1, B, B), "tiles": tile(2, W, W)}
    scratch |= {"cross": tile(1, HALF, HALF)}
    scratch |= {
        "full": barrier(STAGES, 3 + p.read + (p.gate == "log_gate")),
        "k_full": barrier(STAGES),
    }
    scratch |= {n: barrier(STAGES) for n in ("dy_there", "dv_there", "dk_there")}
    if p.gate is not None:
        scratch |= {"lists": plgpu.SMEM((2, LISTS, W), F32), "gate_full": barrier(1, 2)}

    def body(*refs: Any, **scratch: Any) -> None:
        _reverse(p, T, parts, [x is not None for x in (lists, R, Z)], refs, scratch)

    found = launched(body, outs, scratch, entries(p.batch) * parts, 3)(*given, *states)
    rows, rest = found[: 3 * p.read], found[3 * p.read :]
    end = jnp.swapaxes(state_out(rest[0], V, D), -1, -2) * p.scale if p.end else None
    half = rest[-1][..., :D, :D] * (0.5 * p.scale) if p.half else None
    made = [cut(x, T, n, p.axis) for x, n in zip(rows, (D, V, D), strict=False)]
    return Swept(*(made or [None] * 3), end, half)


def _reverse(
    p: Reverse, T: int, parts: int, there: Sequence[bool], refs: Any, s: dict[str, Any]
) -> None:
    """Do a program: its warpgroup's part."""
    inputs = iter(refs)
    given = {n: next(inputs) for n in ("qkvgy" if p.read else "qvg")}
    lists, R, Z = (next(inputs) if x else None for x in there)
    nil = next(inputs)
    made = [next(inputs) for _ in range(3 * p.read)]
    end, half = (next(inputs) if x else None for x in (p.end, p.half))
    i, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    number = lax.rem(i, i32(parts)) if p.tokens else i32(0)
    place = Place(heads(p.batch, lax.div(i, i32(parts)) if p.tokens else i), p.batch, p.axis)
    part, axes = chunks_of(T, p.tokens, number), (number,) if p.tokens else ()

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.set_max_registers(OWNER, action="increase")
        _owner_r(p, place, part, axes, nil, s, R, end)

    @pl.when(warpgroup == 1)
    def _() -> None:
        plgpu.set_max_registers(OWNER, action="increase")
        _owner_z(p, place, part, axes, nil, s, Z, half)

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

        def load(name: str, full: str = "full") -> None:
            rows = place.rows(given[name], row)
            plgpu.copy_gmem_to_smem(rows, s[f"{name}s"].at[slot], s[full].at[slot])

        def store(x: Any, name: str) -> None:
            plgpu.copy_smem_to_gmem(s[name].at[slot], place.rows(x, left))

        @pl.when(late)
        def _() -> None:
            plgpu.barrier_wait(s["dy_there"].at[slot])
            if p.read:
                store(made[0], "vs")
            plgpu.barrier_wait(s["dv_there"].at[slot])
            if p.read:
                store(made[1], "ys")
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(more)
        def _() -> None:
            if p.read:
                load("y")
            load("g")

        @pl.when(late)
        def _() -> None:
            plgpu.barrier_wait(s["dk_there"].at[slot])
            if p.read:
                store(made[2], "ks")

        @pl.when(more)
        def _() -> None:
            load("q")
            load("v")
            if p.gate == "log_gate":
                rows = lists_at(lists, place, row)
                plgpu.copy_gmem_to_smem(rows, s["lists"].at[slot], s["full"].at[slot])

        if not p.read:
            return

        @pl.when(late)
        def _() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(more)
        def _() -> None:
            load("k", "k_full")

    lax.fori_loop(i32(0), part.chunks + STAGES, step, None)
    plgpu.wait_smem_to_gmem(0)


def rows_of(
    a: Any, parts: Sequence[Any], b_tile: Array, b: Any, w: Weights | None, scale: float,
    to: Sequence[Any] = (),
) -> list[Array]:  # fmt: skip
    """Return a R + tile b (+ to), [W, B] by columns of 64; parts are those of R, [B, 64]."""
    found = []
    for h, r in enumerate(parts):
        own = b.at[:, columns(h)]
        if w is None:
            x = product(W, HALF, (a, r), (b_tile, own))
        else:
            x = product(W, HALF, (a, r)) * w.after(ROW, HALF)
            (x,) = added((x,), ((b_tile, own),))
        x = x if scale == 1.0 else x * scale
        x = x + loaded(to[h], WGMMA).astype(F32) if to else x
        found.append(x.astype(BF16))
    return found


def updated(R: Sequence[Array], b_q: Any, b_x: Any, w: Weights | None) -> tuple[Array, ...]:
    """Return R + Q' X, by halves."""
    halves = [b_q.at[:, columns(h)] for h in range(len(R))]
    if w is None:
        return added(R, *(((turned(q), b_x),) for q in halves))
    found: tuple[Array, ...] = ()
    for r, q in zip(R, halves, strict=True):
        x = (taken_turned(q).astype(F32) * w.before(COLUMN, HALF)).astype(BF16)
        found += added((r * w.total(),), ((x, b_x),))
    return found


def _owner_r(
    p: Reverse, place: Place, part: Chunks, axes: tuple[Array, ...], nil: Any, s: dict[str, Any],
    start: Any, end: Any,
) -> None:  # fmt: skip
    """Own R, [D, V]: make dy and dv."""
    B = s["qs"].shape[-1]
    halves = range(B // HALF)
    R = begun(start, place, axes, B // HALF, B)
    for h in halves:
        s["copies"][0, columns(h), :] = R[h].astype(BF16)
    plgpu.commit_smem()
    if p.gate == "decay":
        plgpu.barrier_wait(s["gate_full"].at[0])

    def step(i: Array, carry: Any) -> Any:
        z, *R = carry
        z = lax.bitwise_and(z, i)
        slot, copy = lax.rem(i, i32(STAGES)), s["copies"].at[z]
        b_q, b_v, b_g, b_y = (s[n].at[slot] for n in ("qs", "vs", "gs", "ys"))
        c = part.chunks - 1 - i
        w = weights_of(s.get("lists"), c, slot, part, p.gate, p.powers[1])
        plgpu.barrier_wait(s["full"].at[slot])
        t = pairs(b_v, b_g, w, upper=True)
        dy = rows_of(b_v, [turned(copy.at[columns(h), :]) for h in halves], t, b_q, w, p.scale)
        plgpu.commit_smem()  # every warp has read v
        for h in halves:
            b_v[:, columns(h)] = dy[h]
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["dy_there"].at[slot])
        if p.read:
            t = pairs(b_y, b_q, w, upper=True)
            dv = rows_of(b_y, [copy.at[:, columns(h)] for h in halves], t, b_g, w, p.scale)
            plgpu.commit_smem()
            for h in halves:
                b_y[:, columns(h)] = dv[h]
        R = updated(R, b_q, b_g, w)
        plgpu.commit_smem()  # every warp has read the copy
        for h in halves:
            copy[columns(h), :] = R[h].astype(BF16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["dv_there"].at[slot])
        return z, *R

    _, *R = lax.fori_loop(i32(0), part.chunks, step, (nil[0], *R))
    ended(end, place, axes, True, True, R)


def blocks_of(start: Any, place: Place, axes: tuple[Array, ...], B: int) -> list[Array]:
    """Return blocks of Z after the last token: 00, or 00, 01 and 11."""
    if B == HALF:
        return begun(start, place, axes, 1, HALF)
    if start is None:
        return [x for _ in range(3) for x in begun(None, place, axes, 1, HALF)]
    upper, lower = begun(start, place, axes, 2, B)
    return [upper[:, :HALF], upper[:, HALF:], lower[:, HALF:]]


def _owner_z(
    p: Reverse, place: Place, part: Chunks, axes: tuple[Array, ...], nil: Any, s: dict[str, Any],
    start: Any, half: Any,
) -> None:  # fmt: skip
    """Own Z, [D, D], symmetric: of its four blocks three; make dk."""
    B = s["qs"].shape[-1]
    both = B // HALF == 2
    Z = blocks_of(start, place, axes, B)
    if both:
        s["cross"][0] = Z[1].astype(BF16)
        plgpu.commit_smem()
    if p.gate == "decay":
        plgpu.barrier_wait(s["gate_full"].at[0])

    def step(i: Array, carry: Any) -> Any:
        z, *Z = carry
        z = lax.bitwise_and(z, i)
        slot = lax.rem(i, i32(STAGES))
        tile1, tile2, cross = s["tiles"].at[z], s["tiles"].at[z + 1], s["cross"].at[z]
        b_q, b_k, b_dy = (s[n].at[slot] for n in ("qs", "ks", "vs"))
        c = part.chunks - 1 - i
        w = weights_of(s.get("lists"), c, slot, part, p.gate, p.powers[0])
        at = range(B // HALF)
        q, dy, k = ([x.at[:, columns(h)] for h in at] for x in (b_q, b_dy, b_k))
        plgpu.barrier_wait(s["full"].at[slot])
        if p.read:
            plgpu.barrier_wait(s["k_full"].at[slot])
            tile1[...] = pairs(b_q, b_k, w, upper=False)
        plgpu.barrier_wait(s["dy_there"].at[slot])
        if p.read:
            tile2[...] = pairs(b_dy, b_k, w, upper=False)
            plgpu.commit_smem()
        dk = []
        for h in at if p.read else ():
            if not both:
                own = [(Z[0].astype(BF16), turned(b_k))]
            elif h == 0:
                own = [(Z[n].astype(BF16), turned(k[n])) for n in (0, 1)]
            else:
                own = [(turned(cross), turned(k[0])), (Z[2].astype(BF16), turned(k[1]))]
            rest = [(turned(dy[h]), tile1), (turned(q[h]), tile2)]
            if w is None:
                x = product(HALF, W, *own, *rest)
            else:
                (x,) = added((product(HALF, W, *own) * w.after(COLUMN, HALF),), rest)
            dk.append((x if p.scale == 1.0 else x * p.scale).astype(BF16))
        plgpu.commit_smem()  # every warp has read k and the copy
        for h in at if p.read else ():
            put_turned(k[h], dk[h])
        if w is None:
            made = [[(turned(q[0]), dy[0]), (turned(dy[0]), q[0])]]
            if both:
                made.append([(turned(q[0]), dy[1]), (turned(dy[0]), q[1])])
                made.append([(turned(q[1]), dy[1]), (turned(dy[1]), q[1])])
            Z = list(added(Z, *made))
        else:
            r = w.total()
            for h in at:
                before = w.before(COLUMN, HALF)
                x, d = ((taken_turned(y[h]).astype(F32) * before).astype(BF16) for y in (q, dy))
                for n in range(h, len(at)):
                    b = n + h
                    (Z[b],) = added((Z[b] * r,), ((x, dy[n]), (d, q[n])))
        if both:
            cross[...] = Z[1].astype(BF16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["dk_there"].at[slot])
        return z, *Z

    _, *Z = lax.fori_loop(i32(0), part.chunks, step, (nil[0], *Z))
    if half is not None:
        at = (*place.entry(half, 2 + len(axes)), *axes)
        half.at[(*at, columns(0), columns(0))][...] = Z[0]
        if both:
            half.at[(*at, columns(0), columns(1))][...] = Z[1]
            half.at[(*at, columns(1), columns(1))][...] = Z[2]
            turned(half.at[(*at, columns(1), columns(0))])[...] = plgpu.layout_cast(
                Z[1], plgpu.Layout.WGMMA_TRANSPOSED
            )
