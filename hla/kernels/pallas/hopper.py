"""Two causal passes on Hopper, the second of what the first makes (design: two state owners).

    hla2: y_t = pass(q, k, k), o_t = pass(q, y, v)    ahla: u_t = pass(q, k, v), o_t = pass(q, k, u)

A program does a head with three warpgroups. Two own a state each, transposed, in float32
registers: the first makes y (or u), up to two chunks ahead of the second, which makes o; only y
passes between them, in shared memory. The third loads q, k and v, each once there is a buffer for
it. A chunk of W = 64 tokens, of keys K and values X of either pass, operands as they are stored:

    A' = upper(K Q')  [W, W]    O' = S' Q' + X' A'  [V, W]    S' = S' + X' K  [V, D]

S' enters its product from registers, in bfloat16 and by halves of 64 values: a half is read and
its O' stored before the other is touched, else registers would not suffice. ahla has one A'.

The weights of a gate are those of each pass's power: of pairs on A', of what is read on S' Q', of
what is written on X', which then comes from registers.

Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024 (y too: 1280). Operations:
197 k (hla2). At 3.0 TB/s and 790 TFLOP/s the bytes bind: 0.179 ms for B = 8, T = 4096, H = 16 (y
too: 0.224). One H100 took 0.199 (90%), 0.269 with y, with a decay 0.255, with a log gate 0.261;
ahla 0.195. No atomics; bits depend on nothing but the head's data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
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
    drain,
    ended,
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
from .warpgroups import (
    BF16,
    COLUMN,
    F32,
    HALF,
    LISTS,
    MOVER,
    OWNER,
    Array,
    W,
    Weights,
    added,
    barrier,
    columns,
    i32,
    listed,
    pairs,
    put_turned,
    taken_turned,
    tile,
    turned,
)  # fmt: skip

AHEAD = 4  # chunks of q in shared memory


class Pair(NamedTuple):
    """What a launch does, apart from its arrays."""

    ahla: bool  # the first pass makes the values of the second; else its keys
    batch: Shape
    gate: str | None = None
    powers: tuple[int, int] = (1, 1)  # of the gate
    scales: tuple[float, float] = (1.0, 1.0)  # of what is read
    o: Shape | None = None  # batch of o; None: not asked, the states alone
    wide: bool = False  # o in float32
    y: Shape | None = None  # batch of y (u), where it is kept
    ends: tuple[Shape | None, Shape | None] = (None, None)  # batches of last states
    tokens: int = 0  # of a segment, one more batch axis of states; 0: the whole
    axis: int = -2  # of tokens, in memory


class Made(NamedTuple):
    """What it makes: None where it is not asked."""

    o: Array | None
    y: Array | None
    end1: Array | None
    end2: Array | None


def weighed(b_x: Any, w: Weights | None) -> Any:
    """Return one half of the values as they enter the state, [64, W]."""
    if w is None:
        return turned(b_x)
    return (taken_turned(b_x).astype(F32) * w.after(COLUMN, HALF)).astype(BF16)


def read(
    S: Sequence[Array], b_q: Any, b_x: Any, b_tile: Any, w: Weights | None, scale: float,
    leave: Callable[[int, Array], None],
) -> tuple[list[Array], list[Any]]:  # fmt: skip
    """Leave O' = S' Q' + X' A' by halves; return states and values as the gate has them."""
    states, values = [], []
    for h, s in enumerate(S):
        own = b_x.at[:, columns(h)]

        def go(acc: Any, s: Array = s, own: Any = own) -> tuple[Array, ...]:
            plgpu.wgmma(acc, s.astype(BF16), turned(b_q))
            if w is None:
                plgpu.wgmma(acc, turned(own), b_tile)
                return (acc[...],)
            s = s * w.total()  # as the product runs, and so below
            acc[...] = acc[...] * w.before(COLUMN, HALF)
            plgpu.wgmma(acc, turned(own), b_tile)
            x = weighed(own, w)
            return acc[...], s, x

        o, *rest = pl.run_scoped(go, plgpu.ACC((HALF, W), F32))
        leave(h, o if scale == 1.0 else o * scale)
        states.append(rest[0] if rest else s)
        values.append(rest[1] if rest else turned(own))
    return states, values


def faded(S: Sequence[Array], b_x: Any, w: Weights | None) -> tuple[list[Array], list[Any]]:
    """Return states and values as the gate has them, where nothing is read."""
    values = [weighed(b_x.at[:, columns(h)], w) for h in range(len(S))]
    return [s if w is None else s * w.total() for s in S], values


Rings = tuple[Ring, Ring, Ring, int]  # of q, k and v, and how many buffers o has


def rings(p: Pair) -> Rings:
    """Return the buffers of q, k, v and how many of o: as many as there is memory for.

    They are shared out by how long they are read; the first pass is one chunk ahead of the second.
    Where y is stored too, stores take longer than a chunk, so that o has two.
    """
    tight = p.y is not None or p.gate == "log_gate"
    if p.ahla:
        k = Ring(AHEAD - 1, 1, 2) if tight else Ring(AHEAD, 0, 2)
        return Ring(AHEAD, 0, 2), k, Ring(2, AHEAD - 3, 1), 1 + tight
    v = Ring(2, 2, 1) if tight else Ring(AHEAD - 1, 1, 1)
    return Ring(AHEAD, 0, 2), Ring(AHEAD - 1, 0, 1), v, 1 + tight


def pair(p: Pair, q: Array, k: Array, v: Array, gate: Array | None = None,
         start1: Array | None = None, start2: Array | None = None) -> Made:  # fmt: skip
    """Run two passes, the second of what the first makes.

    Parameters
    ----------
    p : Pair
        What to do.
    q, k : array, (*batch, T, D), bfloat16
        Batch axes broadcast to ``p.batch``.
    v : array, (*batch, T, V), bfloat16
    gate : array, optional
        A decay (*batch) or a log gate (*batch, T).
    start1, start2 : array, (*batch, D, V), float32, optional
        First states, of segments (*batch, segments, D, V).

    Returns
    -------
    Made
        What is asked.
    """
    T, D, V = q.shape[-2], q.shape[-1], v.shape[-1]
    BD, BV = wide(D), wide(V)
    Y, BY = (V, BV) if p.ahla else (D, BD)
    Q, K, X, O = rings(p)
    starts = [None if s is None else state_in(s, BD, b) for s, b in ((start1, BY), (start2, BV))]
    lists = None if gate is None or p.gate is None else listed(gate, p.gate, T)
    given = [laid(x, p.axis, b) for x, b in ((q, BD), (k, BD), (v, BV))]
    given += [x for x in (lists, *starts) if x is not None]
    parts = -(-T // p.tokens) if p.tokens else 1
    axes = (parts,) if p.tokens else ()
    outs: list[Any] = []
    if p.o is not None:
        outs.append(out_shape(p.o, T, BV, p.axis, F32 if p.wide else BF16))
    if p.y is not None:
        outs.append(out_shape(p.y, T, BY, p.axis))
    for lead, b in zip(p.ends, (BY, BV), strict=True):
        if lead is not None:
            outs.append(jax.ShapeDtypeStruct((*lead, *axes, b, BD), F32))
    scratch = {
        "qs": tile(Q.size, W, BD), "ks": tile(K.size, W, BD), "xs": tile(X.size, W, BV),
        "made": tile(2, W, BY), "out": tile(O, W, BV), "tiles": tile(2, W, W),
        "q_full": barrier(Q.size, 1 + (p.gate == "log_gate")), "q_free": barrier(Q.size, 2),
        "k_full": barrier(K.size), "k_free": barrier(K.size, K.readers),
        "v_full": barrier(X.size), "v_free": barrier(X.size),
        "there": barrier(2), "taken": barrier(2),
    }  # fmt: skip
    if p.gate is not None:
        scratch |= {"lists": plgpu.SMEM((AHEAD if p.gate == "log_gate" else 2, LISTS, W), F32)}
        scratch |= {"gate_full": barrier(1, 2)}

    def body(*refs: Any, **scratch: Any) -> None:
        _pair(p, T, parts, (lists is not None, *(s is not None for s in starts)), refs, scratch)

    found = iter(launched(body, outs, scratch, entries(p.batch) * parts, 3)(*given))
    o = None if p.o is None else cut(next(found), T, V, p.axis)
    y = None if p.y is None else cut(next(found), T, Y, p.axis)
    ends = [
        None if lead is None else state_out(next(found), D, n)
        for lead, n in zip(p.ends, (Y, V), strict=True)
    ]
    return Made(o, y, *ends)


def _pair(p: Pair, T: int, parts: int, there: Sequence[bool], refs: Any, s: dict[str, Any]) -> None:
    """Do a program: its warpgroup's part."""
    inputs = iter(refs)
    q, k, v = (next(inputs) for _ in "qkv")
    lists, start1, start2 = (next(inputs) if x else None for x in there)
    nil = next(inputs)
    o, y, end1, end2 = (None if x is None else next(inputs) for x in (p.o, p.y, *p.ends))
    i, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    number = lax.rem(i, i32(parts)) if p.tokens else i32(0)
    place = Place(heads(p.batch, lax.div(i, i32(parts)) if p.tokens else i), p.batch, p.axis)
    part, axes = chunks_of(T, p.tokens, number, nil), (number,) if p.tokens else ()
    Q, K, X, _ = rings(p)
    BD, BV = s["qs"].shape[-1], s["xs"].shape[-1]
    BY = BV if p.ahla else BD
    args = p, rings(p), place, part, axes, nil, s

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.set_max_registers(OWNER, action="increase")
        first_owner(*args, start1, end1, y, BY // HALF, BD, hands=p.ahla)

    @pl.when(warpgroup == 1)
    def _() -> None:
        plgpu.set_max_registers(OWNER, action="increase")
        _second(*args, start2, end2, o, BV // HALF, BD)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(MOVER, action="decrease")
        at = lambda ref: lambda e: place.rows(ref, part.first + e * W)  # noqa: E731
        own = [(at(q), s["qs"])]
        if p.gate == "log_gate":
            own.append((lambda c: lists_at(lists, place, part.first + c * W), s["lists"]))
        if p.gate == "decay":
            load_decay(lists, place, s["lists"], s["gate_full"].at[0])
        move(part, [
            Load(K, s["k_full"], s["k_free"], [(at(k), s["ks"])]),
            Load(Q, s["q_full"], s["q_free"], own),
            Load(X, s["v_full"], s["v_free"], [(at(v), s["xs"])]),
        ])  # fmt: skip


def first_owner(
    p: Pair,
    ring: Rings,
    place: Place,
    part: Chunks,
    axes: tuple[Array, ...],
    nil: Any,
    s: dict[str, Any],
    start: Any,
    end: Any,
    y: Any,
    halves: int,
    width: int,
    *,
    hands: bool,
    mine: Array | bool = True,
) -> None:
    """Own the state of the first pass; hand on what it makes, and where asked its A'.

    What leaves the kernel does so in the programs that are ``mine``.
    """
    Q, K, X, _ = ring
    S = begun(start, place, axes, halves, width)
    keeps = mine
    if y is not None and p.y != p.batch:
        keeps = jnp.logical_and(mine, place.first(y, 2, p.axis))
    if p.gate == "decay":
        plgpu.barrier_wait(s["gate_full"].at[0])

    def step(c: Array, carry: Any) -> Any:
        z, *S = carry
        z = lax.bitwise_and(z, c)
        i_q, i_k, i_x, h = (lax.rem(c, i32(n)) for n in (Q.size, K.size, X.size, 2))
        b_q, b_k, made = s["qs"].at[i_q], s["ks"].at[i_k], s["made"].at[h]
        b_x = s["xs"].at[i_x] if p.ahla else b_k
        b_tile = s["tiles"].at[h if hands else z]
        w = weights_of(s.get("lists"), c, i_q, part, p.gate, p.powers[0])

        def free() -> None:
            @pl.when(c >= 2)
            def _() -> None:
                plgpu.barrier_wait(s["taken"].at[h])

        plgpu.barrier_wait(s["k_full"].at[i_k])
        plgpu.barrier_wait(s["q_full"].at[i_q])
        if hands:
            free()
        b_tile[...] = pairs(b_k, b_q, w, upper=True)
        plgpu.commit_smem()
        if p.ahla:
            plgpu.barrier_wait(s["v_full"].at[i_x])
        if not hands:
            free()
        if y is not None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        leave = lambda n, x: put_turned(made.at[:, columns(n)], x.astype(BF16))  # noqa: E731
        S, x = read(S, b_q, b_x, b_tile, w, p.scales[0], leave)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["there"].at[h])
        if y is not None:
            rows = place.rows(y, part.first + c * W)
            where(keeps, lambda: plgpu.copy_smem_to_gmem(made, rows))
        S = added(S, *(((own, b_k),) for own in x))
        plgpu.barrier_arrive(s["k_free"].at[i_k])
        plgpu.barrier_arrive(s["q_free"].at[i_q])
        if p.ahla:
            plgpu.barrier_arrive(s["v_free"].at[i_x])
        return z, *S

    _, *S = lax.fori_loop(i32(0), part.chunks, step, (nil[0], *S))
    drain(s["taken"], 2, part.chunks)
    ended(end, place, axes, p.ends[0] == p.batch, mine, S)
    if y is not None:
        plgpu.wait_smem_to_gmem(0)


def _second(
    p: Pair,
    ring: Rings,
    place: Place,
    part: Chunks,
    axes: tuple[Array, ...],
    nil: Any,
    s: dict[str, Any],
    start: Any,
    end: Any,
    o: Any,
    halves: int,
    width: int,
) -> None:
    """Own the state of the second pass, whose keys (of ahla: whose values) the first made."""
    Q, K, X, O = ring
    S = begun(start, place, axes, halves, width)
    if p.gate == "decay":
        plgpu.barrier_wait(s["gate_full"].at[0])

    def step(c: Array, carry: Any) -> Any:
        z, *S = carry
        z = lax.bitwise_and(z, c)
        i_q, i_k, i_x, h = (lax.rem(c, i32(n)) for n in (Q.size, K.size, X.size, 2))
        b_q = s["qs"].at[i_q]
        out = s["out"].at[lax.rem(c, i32(2)) if O == 2 else z]
        if p.ahla:
            b_k, b_x, b_tile = s["ks"].at[i_k], s["made"].at[h], s["tiles"].at[h]
        else:
            b_k, b_x, b_tile = s["made"].at[h], s["xs"].at[i_x], s["tiles"].at[z + 1]
        w = weights_of(s.get("lists"), c, i_q, part, p.gate, p.powers[1])
        plgpu.barrier_wait(s["q_full"].at[i_q])
        plgpu.barrier_wait(s["there"].at[h])
        if p.ahla:  # orders what the other copies wrote before this warpgroup reads it
            plgpu.barrier_wait(s["k_full"].at[i_k])
        if o is not None and not p.ahla:
            b_tile[...] = pairs(b_k, b_q, w, upper=True)
            plgpu.commit_smem()
        if not p.ahla:
            plgpu.barrier_wait(s["v_full"].at[i_x])
        if o is None:
            S, x = faded(S, b_x, w)
        elif p.wide:
            rows = lambda n: place.rows(o, part.first + c * W, columns(n))  # noqa: E731
            S, x = read(S, b_q, b_x, b_tile, w, p.scales[1], lambda n, x: put_turned(rows(n), x))
            plgpu.commit_smem()  # every warp has read its pairs
        else:
            plgpu.wait_smem_to_gmem(O - 1, wait_read_only=True)
            leave = lambda n, x: put_turned(out.at[:, columns(n)], x.astype(BF16))  # noqa: E731
            S, x = read(S, b_q, b_x, b_tile, w, p.scales[1], leave)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, place.rows(o, part.first + c * W))
        S = added(S, *(((own, b_k),) for own in x))
        plgpu.barrier_arrive(s["q_free"].at[i_q])
        plgpu.barrier_arrive(s["k_free" if p.ahla else "v_free"].at[i_k if p.ahla else i_x])
        plgpu.barrier_arrive(s["taken"].at[h])
        return z, *S

    _, *S = lax.fori_loop(i32(0), part.chunks, step, (nil[0], *S))
    ended(end, place, axes, p.ends[1] == p.batch, True, S)
    plgpu.wait_smem_to_gmem(0)
