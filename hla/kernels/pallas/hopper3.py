"""hla3 on Hopper: two programs a head, of half of the values each (design: two state owners).

    y = pass(q, k, k) and S    u = pass(q, k, v) and P    o = pass^3(q, y, u) and F

As `hopper` has it, with the same three warpgroups. Three states of 128 x 128 fill more than the
registers, so a program has 64 values: its first owner holds S and makes y, the second holds P' and
F' (64, D), half of the registers each, and makes u and o. The programs of a head run side by side
and read q and k by way of L2; both make y, which the first stores where it is asked.

Chunk by chunk, where A' = upper(K Q') is the first owner's and B' = upper(Y Q') the second's:

    U' = P' Q' + V' A'    O' = F' Q' + U' B'    P' = P' + V' K    F' = F' + U' Y

Operations a token and head at D = V = 128: 393 k, 0.26 ms for B = 8, T = 4096, H = 16 at 790
TFLOP/s; 256 programs are two waves of 132. One H100 took 0.345, 0.358 with y and u, 0.513 with a
decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...core.passes import Shape
from .copies import (
    Chunks,
    Load,
    Place,
    Ring,
    begun,
    chunks_of,
    cut,
    entries,
    heads,
    laid,
    launched,
    lists_at,
    load_decay,
    move,
    out_shape,
    state_in,
    state_out,
    weights_of,
    where,
    wide,
)  # fmt: skip
from .hopper import AHEAD, Pair, Rings, faded, first_owner, read
from .warpgroups import (
    BF16,
    F32,
    HALF,
    LISTS,
    MOVER,
    OWNER,
    Array,
    W,
    added,
    barrier,
    i32,
    listed,
    pairs,
    put_turned,
    tile,
)  # fmt: skip


class Triple(NamedTuple):
    """What a launch does, apart from its arrays."""

    batch: Shape
    gate: str | None = None
    powers: tuple[int, int] = (1, 3)  # of the gate: of y and u, of o
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of what is read
    o: Shape | None = None  # batch of o; None: not asked, the states alone
    wide: bool = False  # o in float32
    y: Shape | None = None  # batches of y and u, where they are kept
    u: Shape | None = None
    ends: tuple[Shape | None, Shape | None, Shape | None] = (None, None, None)
    tokens: int = 0  # of a segment, one more batch axis of states; 0: the whole
    axis: int = -2  # of tokens, in memory

    @property
    def first(self) -> Pair:
        """The pass that makes y."""
        return Pair(
            False, self.batch, self.gate, (self.powers[0], 1), (self.scales[0], 1.0), y=self.y,
            ends=(self.ends[0], None), tokens=self.tokens, axis=self.axis,
        )  # fmt: skip


class Made(NamedTuple):
    """What it makes: None where it is not asked."""

    o: Array | None
    y: Array | None
    u: Array | None
    end1: Array | None
    end2: Array | None
    end3: Array | None


def rings(p: Triple) -> Rings:
    """Return the buffers of q, k and v: as many as there is memory for."""
    k = AHEAD if p.gate is None else AHEAD - 1
    return Ring(AHEAD, 0, 2), Ring(k, AHEAD - k, 2), Ring(3, AHEAD - 3, 1), 1


def triple(
    p: Triple, q: Array, k: Array, v: Array, gate: Array | None = None,
    start1: Array | None = None, start2: Array | None = None, start3: Array | None = None,
) -> Made:  # fmt: skip
    """Run the three passes of hla3.

    Parameters
    ----------
    p : Triple
        What to do.
    q, k : array, (*batch, T, D), bfloat16
        Batch axes broadcast to ``p.batch``.
    v : array, (*batch, T, V), bfloat16
    gate : array, optional
        A decay (*batch) or a log gate (*batch, T).
    start1, start2, start3 : array, (*batch, D, D or V), float32, optional
        First S, P and F, of segments (*batch, segments, D, D or V).

    Returns
    -------
    Made
        What is asked.
    """
    T, D, V = q.shape[-2], q.shape[-1], v.shape[-1]
    BD, BV = wide(D), wide(V)
    Q, K, X, _ = rings(p)
    wanted = (start1, BD), (start2, BV), (start3, BV)
    starts = [None if s is None else state_in(s, BD, b) for s, b in wanted]
    lists = None if gate is None or p.gate is None else listed(gate, p.gate, T)
    given = [laid(x, p.axis, b) for x, b in ((q, BD), (k, BD), (v, BV))]
    given += [x for x in (lists, *starts) if x is not None]
    parts = -(-T // p.tokens) if p.tokens else 1
    axes = (parts,) if p.tokens else ()
    outs: list[Any] = []
    if p.o is not None:
        outs.append(out_shape(p.o, T, BV, p.axis, F32 if p.wide else BF16))
    outs += [out_shape(x, T, b, p.axis) for x, b in ((p.y, BD), (p.u, BV)) if x is not None]
    for lead, b in zip(p.ends, (BD, BV, BV), strict=True):
        if lead is not None:
            outs.append(jax.ShapeDtypeStruct((*lead, *axes, b, BD), F32))
    scratch = {
        "qs": tile(Q.size, W, BD), "ks": tile(K.size, W, BD), "xs": tile(X.size, W, HALF),
        "made": tile(2, W, BD), "us": tile(1, W, HALF), "out": tile(1, W, HALF),
        "tiles": tile(3, W, W),
        "q_full": barrier(Q.size, 1 + (p.gate == "log_gate")), "q_free": barrier(Q.size, 2),
        "k_full": barrier(K.size), "k_free": barrier(K.size, K.readers),
        "v_full": barrier(X.size), "v_free": barrier(X.size),
        "there": barrier(2), "taken": barrier(2),
    }  # fmt: skip
    if p.gate is not None:
        scratch |= {"lists": plgpu.SMEM((AHEAD if p.gate == "log_gate" else 2, LISTS, W), F32)}
        scratch |= {"gate_full": barrier(1, 2)}

    def body(*refs: Any, **scratch: Any) -> None:
        there = [x is not None for x in (lists, *starts)]
        _triple(p, T, parts, BV // HALF, there, refs, scratch)

    programs = entries(p.batch) * parts * (BV // HALF)
    found = iter(launched(body, outs, scratch, programs, 3)(*given))
    o, y, u = (
        None if x is None else cut(next(found), T, n, p.axis)
        for x, n in ((p.o, V), (p.y, D), (p.u, V))
    )
    ends = (
        None if lead is None else state_out(next(found), D, n)
        for lead, n in zip(p.ends, (D, V, V), strict=True)
    )
    return Made(o, y, u, *ends)


def _triple(
    p: Triple, T: int, parts: int, tiles: int, there: Sequence[bool], refs: Any, s: dict[str, Any]
) -> None:
    """Do a program: its warpgroup's part. The grid counts tiles of values fastest."""
    inputs = iter(refs)
    q, k, v = (next(inputs) for _ in "qkv")
    lists, *starts = (next(inputs) if x else None for x in there)
    nil = next(inputs)
    o, y, u, *ends = (None if x is None else next(inputs) for x in (p.o, p.y, p.u, *p.ends))
    i, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    i_v, i = lax.rem(i, i32(tiles)), lax.div(i, i32(tiles))
    number = lax.rem(i, i32(parts)) if p.tokens else i32(0)
    place = Place(heads(p.batch, lax.div(i, i32(parts)) if p.tokens else i), p.batch, p.axis)
    part, axes = chunks_of(T, p.tokens, number, nil), (number,) if p.tokens else ()
    cols = pl.ds(i_v * HALF, HALF)
    width = s["qs"].shape[-1]
    Q, K, X, _ = rings(p)

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.set_max_registers(OWNER, action="increase")
        first_owner(
            p.first, rings(p), place, part, axes, nil, s, starts[0], ends[0], y, width // HALF,
            width, hands=True, mine=True if tiles == 1 else i_v == 0,
        )  # fmt: skip

    @pl.when(warpgroup == 1)
    def _() -> None:
        plgpu.set_max_registers(OWNER, action="increase")
        _second(p, place, part, axes, nil, s, starts[1:], ends[1:], o, u, cols, width)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(MOVER, action="decrease")
        at = lambda ref, *cols: lambda c: place.rows(ref, part.first + c * W, *cols)  # noqa: E731
        own = [(at(q), s["qs"])]
        if p.gate == "log_gate":
            own.append((lambda c: lists_at(lists, place, part.first + c * W), s["lists"]))
        if p.gate == "decay":
            load_decay(lists, place, s["lists"], s["gate_full"].at[0])
        move(part, [
            Load(K, s["k_full"], s["k_free"], [(at(k), s["ks"])]),
            Load(Q, s["q_full"], s["q_free"], own),
            Load(X, s["v_full"], s["v_free"], [(at(v, cols), s["xs"])]),
        ])  # fmt: skip


def _second(
    p: Triple, place: Place, part: Chunks, axes: tuple[Array, ...], nil: Any, s: dict[str, Any],
    starts: Sequence[Any], ends: Sequence[Any], o: Any, u: Any, cols: Any, width: int,
) -> None:  # fmt: skip
    """Own the states of u and of o."""
    Q, K, X, _ = rings(p)

    def first(start: Any) -> Array:
        if start is None:
            return begun(None, place, axes, 1, width)[0]
        at = (*place.entry(start, 2 + len(axes)), *axes, cols)
        return begun(start.at[at], place._replace(heads=()), (), 1, width)[0]

    keeps = u is not None and (p.u == p.batch or place.first(u, 2, p.axis))
    if p.gate == "decay":
        plgpu.barrier_wait(s["gate_full"].at[0])

    def step(c: Array, carry: Any) -> Any:
        z, P, F = carry
        z = lax.bitwise_and(z, c)
        i_q, i_k, i_x, h = (lax.rem(c, i32(n)) for n in (Q.size, K.size, X.size, 2))
        b_q, b_k, b_v, b_y = (
            s[n].at[i] for n, i in (("qs", i_q), ("ks", i_k), ("xs", i_x), ("made", h))
        )
        b_u, out, b_tile = s["us"].at[z], s["out"].at[z], s["tiles"].at[z + 2]
        w1, w3 = (weights_of(s.get("lists"), c, i_q, part, p.gate, n) for n in p.powers)
        row = part.first + c * W
        plgpu.barrier_wait(s["q_full"].at[i_q])
        plgpu.barrier_wait(s["k_full"].at[i_k])
        plgpu.barrier_wait(s["v_full"].at[i_x])
        plgpu.barrier_wait(s["there"].at[h])
        if u is not None:  # o's is the last
            plgpu.wait_smem_to_gmem(int(o is not None and not p.wide), wait_read_only=True)
        leave: Callable[[int, Array], None] = lambda _, x: put_turned(b_u, x.astype(BF16))  # noqa: E731
        (P,), (x,) = read([P], b_q, b_v, s["tiles"].at[h], w1, p.scales[1], leave)
        if o is not None:
            b_tile[...] = pairs(b_y, b_q, w3, upper=True)
        plgpu.commit_smem()
        if u is not None:
            where(keeps, lambda: plgpu.copy_smem_to_gmem(b_u, place.rows(u, row, cols)))
        if o is None:
            (F,), (t,) = faded([F], b_u, w3)
        elif p.wide:
            leave = lambda _, x: put_turned(place.rows(o, row, cols), x)  # noqa: E731
            (F,), (t,) = read([F], b_q, b_u, b_tile, w3, p.scales[2], leave)
        else:
            plgpu.wait_smem_to_gmem(int(keeps is True), wait_read_only=True)
            leave = lambda _, x: put_turned(out, x.astype(BF16))  # noqa: E731
            (F,), (t,) = read([F], b_q, b_u, b_tile, w3, p.scales[2], leave)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, place.rows(o, row, cols))
        P, F = added((P, F), ((x, b_k),), ((t, b_y),))
        plgpu.commit_smem()  # every warp has read u
        for name, i in (("q_free", i_q), ("k_free", i_k), ("v_free", i_x), ("taken", h)):
            plgpu.barrier_arrive(s[name].at[i])
        return z, P, F

    _, *S = lax.fori_loop(i32(0), part.chunks, step, (nil[0], *map(first, starts)))
    for end, lead, state in zip(ends, p.ends[1:], S, strict=True):
        if end is not None:
            at = (*place.entry(end, 2 + len(axes)), *axes, cols)
            own = lead == p.batch or place.first(end, 2 + len(axes))

            def go(end: Any = end, at: Any = at, state: Array = state) -> None:
                end.at[at][...] = state

            where(own, go)
    plgpu.wait_smem_to_gmem(0)
