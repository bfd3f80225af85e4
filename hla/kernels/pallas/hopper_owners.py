"""What owns a state in the sweeps of `hopper_reverse`: products of a chunk, last token first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .copies import Chunks, Place, begun, ended, weights_of
from .warpgroups import (
    BF16,
    COLUMN,
    F32,
    HALF,
    HALVED,
    ROW,
    WGMMA,
    Array,
    W,
    Weights,
    added,
    by_column,
    by_row,
    columns,
    gathered,
    halved,
    i32,
    leave,
    leave_columns,
    leave_rows,
    loaded,
    of_pairs,
    pairs,
    product,
    put_turned,
    sums_of,
    taken_turned,
    turned,
    weighed,
    with_halved,
)  # fmt: skip

STAGES = 2  # chunks in shared memory


class Work(NamedTuple):
    """What both owners of a program know of it."""

    place: Place
    part: Chunks
    axes: tuple[Array, ...]  # of a segment's states
    nil: Any
    scratch: dict[str, Any]
    gate: str | None
    scale: float  # of what is written to states
    read: bool  # all is asked, not the states alone

    def chunk(self, i: Array) -> tuple[Array, Array]:
        """Return the chunk of a turn, and its buffers' slot."""
        return self.part.chunks - 1 - i, lax.rem(i, i32(STAGES))

    def row(self, i: Array) -> Array:
        """Return the first token of a turn's chunk."""
        return self.part.first + self.chunk(i)[0] * W

    def weights(self, i: Array, power: int) -> Weights | None:
        """Return the weights of a turn's chunk."""
        c, slot = self.chunk(i)
        return weights_of(self.scratch.get("lists"), c, slot, self.part, self.gate, power)

    def begin(self) -> None:
        """Wait for a decay's weights."""
        if self.gate == "decay":
            plgpu.barrier_wait(self.scratch["gate_full"].at[0])

    def ready(self, names: Iterable[str], i: Array) -> None:
        """Wait for those of a turn's barriers that there are."""
        for name in names:
            if name in self.scratch:
                self.wait(name, i)

    def wait(self, name: str, i: Array) -> None:
        """Wait for a turn's barrier."""
        plgpu.barrier_wait(self.scratch[name].at[self.chunk(i)[1]])

    def arrive(self, name: str, i: Array) -> None:
        """Arrive at a turn's barrier."""
        plgpu.barrier_arrive(self.scratch[name].at[self.chunk(i)[1]])


class Pass(NamedTuple):
    """The adjoint of a pass of q, keys k and values v: R = sum q g', dk = R v, dv = R' k.

    Of k, v and g, the gradient of what the pass makes, the letters of their buffers, and whose
    places dk and dv take; names of barriers.
    """

    k: str
    v: str
    g: str
    dk: str
    dv: str
    waits: tuple[str, ...]
    done: str  # all is there
    handed: str = ""  # dk is there
    freed: str = ""  # nobody else reads any more what dv takes the place of
    adds: bool = False  # dk to what is there
    copy: int = 0  # which copy of a state is its
    alone: str = ""  # what is made where states alone are asked


class Keys(NamedTuple):
    """The adjoint of a pass of q and keys k as values too: Z = sum q e' + e q', dk = Z k.

    Of k and e, the gradient of what the pass makes, the letters of their buffers, and whose place
    dk takes; names of barriers.
    """

    k: str
    e: str
    dk: str
    waits: tuple[str, ...]
    done: str
    handed: str  # e is there or, where dk adds, what it adds to
    freed: str = ""  # k is not read any more
    adds: bool = False  # dk to what is there


class Left(NamedTuple):
    """What an owner leaves for a gate's gradient, in memory: sums of a token, and states."""

    sums: Any  # (*batch, 4, 2, tokens), of four parts: d + w, and r
    kept: Any  # (*batch, N, B, B), before every so many chunks but the first; None: there are none
    every: int
    scale: float

    def at(self, work: Work, i: Array, which: int) -> Any:
        """Return the place of a chunk's sums."""
        place = work.place.entry(self.sums, 3)
        return self.sums.at[(*place, pl.ds(0, 4), which, pl.ds(work.row(i), W))]

    def scaled(self, x: Array) -> Array:
        """Return sums times the scale of what is written."""
        return x if self.scale == 1.0 else x * self.scale

    def rows(self, work: Work, i: Array, which: int, x: Array) -> None:
        """Store sums of rows."""
        leave_rows(self.at(work, i, which), self.scaled(x))

    def columns(self, work: Work, i: Array, which: int, x: Array) -> None:
        """Store sums of columns."""
        leave_columns(self.at(work, i, which), self.scaled(gathered(x)))

    def keep(self, work: Work, i: Array, store: Callable[[Any], None]) -> None:
        """Store a state, where it is one of those that are kept."""
        if self.kept is None:
            return
        c, every = lax.div(work.row(i), i32(W)), i32(self.every)

        @pl.when(jnp.logical_and(c > 0, lax.rem(c, every) == 0))
        def _() -> None:
            at = *work.place.entry(self.kept, 3), lax.div(c, every) - 1
            store(self.kept.at[at])


def rows_of(
    a: Any, parts: Sequence[Any], b_tile: Array, b: Any, w: Weights | None, scale: float,
    to: Sequence[Any] = (), seen: Callable[[int, Array], None] | None = None,
) -> list[Array]:  # fmt: skip
    """Return a R + tile b (+ to), [W, B] by columns of 64; parts are those of R, [B, 64].

    What is read of R alone is ``seen``.
    """
    found = []
    for h, r in enumerate(parts):
        own = b.at[:, columns(h)]
        if w is None:
            x = product(W, HALF, (a, r), (b_tile, own))
        else:
            x = product(W, HALF, (a, r)) * w.after(ROW, HALF)
            if seen:
                seen(h, x)
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


def owner_r(work: Work, own: Pass, power: int, start: Any, end: Any, left: Left | None) -> None:
    """Own R, [D, V]: make dk and dv; of each token leave v . (R' k) and the sums of its pairs.

    Of these the first and those by key have a token to a row of a tile, those by query to a column.
    """
    s = work.scratch
    B = s["q"].shape[-1]
    halves = range(B // HALF)
    R = begun(start, work.place, work.axes, B // HALF, B)
    for h in halves:
        s["copies"][own.copy, columns(h), :] = R[h].astype(BF16)
    plgpu.commit_smem()
    work.begin()

    def step(i: Array, carry: Any) -> Any:
        z, *R = carry
        z = lax.bitwise_and(z, i)
        _, slot = work.chunk(i)
        copy = s["copies"].at[z + own.copy]
        q, g = (s[n].at[slot] for n in ("q", own.g))
        w = work.weights(i, power)
        work.ready(own.waits, i)
        if work.read or own.alone == "dk":
            v, to = (s[n].at[slot] for n in (own.v, own.dk))
            t = pairs(v, g, w, upper=True)
            turns = [turned(copy.at[columns(h), :]) for h in halves]
            more = [to.at[:, columns(h)] for h in halves] if own.adds else ()
            d: list[Array] = []

            def seen(h: int, x: Array) -> None:
                k = loaded(s[own.k].at[slot].at[:, columns(h)], WGMMA)
                d[:] = [by_row(x, k, *d)]

            dk = rows_of(v, turns, t, q, w, work.scale, more, seen if left else None)
            if left:
                s["dots"].at[z + own.copy][...] = halved(d[0])
            if left and "pairs" in s:
                s["pairs"].at[z][...] = t
            plgpu.commit_smem()  # every warp has read v
            for h in halves:
                to[:, columns(h)] = dk[h]
            if own.handed:
                plgpu.commit_smem()
                work.arrive(own.handed, i)
        R = updated(R, q, g, w)
        dv: list[Array] = []
        if work.read or own.alone == "dv":
            k = s[own.k].at[slot]
            a = product(W, W, (k, turned(q)))
            if left:
                b = loaded(s["pairs"].at[z], WGMMA) if "pairs" in s else t
                by_key, by_query = of_pairs(a, b)
                left.columns(work, i, 1, by_query)
                dots = loaded(s["dots"].at[z + own.copy], sums_of(HALVED).layout)
                left.rows(work, i, 0, with_halved(by_key, dots))
            t = weighed(a, w, upper=True)
            dv = rows_of(k, [copy.at[:, columns(h)] for h in halves], t, g, w, work.scale)
        plgpu.commit_smem()  # every warp has read all, and the copy
        if own.freed:
            work.wait(own.freed, i)
        for h, x in enumerate(dv):
            s[own.dv].at[slot][:, columns(h)] = x
        for h in halves:
            copy[columns(h), :] = R[h].astype(BF16)
        plgpu.commit_smem()
        work.arrive(own.done, i)
        if left:
            left.keep(work, i, lambda to: stored(to, [left.scaled(x) for x in R]))
        return z, *R

    _, *R = lax.fori_loop(i32(0), work.part.chunks, step, (work.nil[0], *R))
    ended(end, work.place, work.axes, True, True, R)


def stored(to: Any, R: Sequence[Array]) -> None:
    """Store a state in bfloat16, by halves."""
    for h, x in enumerate(R):
        leave(to.at[columns(h), :], x.astype(BF16))


def blocks_of(start: Any, place: Place, axes: tuple[Array, ...], B: int) -> list[Array]:
    """Return blocks of Z after the last token: 00, or 00, 01 and 11."""
    if B == HALF:
        return begun(start, place, axes, 1, HALF)
    if start is None:
        return [x for _ in range(3) for x in begun(None, place, axes, 1, HALF)]
    upper, lower = begun(start, place, axes, 2, B)
    return [upper[:, :HALF], upper[:, HALF:], lower[:, HALF:]]


def leave_blocks(to: Any, Z: Sequence[Array]) -> None:
    """Store Z by its blocks, and the one beside the diagonal as its mirror too."""
    leave(to.at[columns(0), columns(0)], Z[0])
    if len(Z) > 1:
        leave(to.at[columns(0), columns(1)], Z[1])
        leave(to.at[columns(1), columns(1)], Z[2])
        mirror = plgpu.layout_cast(Z[1], plgpu.Layout.WGMMA_TRANSPOSED)
        leave(turned(to.at[columns(1), columns(0)]), mirror)


def blocks_added(
    Z: Sequence[Array], q: Sequence[Any], e: Sequence[Any], w: Weights | None
) -> list[Array]:
    """Return Z + Q' E + E' Q by its blocks, of columns of 64."""
    at = range(len(q))
    if w is None:
        both = [(g, h) for g in at for h in at if g <= h]
        return list(added(Z, *(
            ((turned(q[g]), e[h]), (turned(e[g]), q[h])) for g, h in both
        )))  # fmt: skip
    Z, r = list(Z), w.total()
    for g in at:
        before = w.before(COLUMN, HALF)
        x, y = ((taken_turned(z[g]).astype(F32) * before).astype(BF16) for z in (q, e))
        for h in range(g, len(at)):
            (Z[g + h],) = added((Z[g + h] * r,), ((x, e[h]), (y, q[h])))
    return Z


def owner_z(work: Work, own: Keys, power: int, start: Any, half: Any, left: Left | None) -> None:
    """Own Z, [D, D], symmetric: of its four blocks three; make dk.

    Of each token leave the sums of its pairs and half of k . (Z k): Z has a gradient and its
    transpose. By query a token has a row of the tile of pairs, else a column of a tile.
    """
    s = work.scratch
    B = s["q"].shape[-1]
    at = range(B // HALF)
    both = len(at) == 2
    Z = blocks_of(start, work.place, work.axes, B)
    if both:
        s["cross"][0] = Z[1].astype(BF16)
        plgpu.commit_smem()
    work.begin()
    d: list[Array] = []  # sums by key of a chunk

    def made(
        Z: Sequence[Array], h: int, k: Any, rest: Any, w: Weights | None, z: Array, i: Array
    ) -> Array:
        """Return 64 columns of dk, transposed: of Z, and of pairs."""
        halves = [turned(k.at[:, columns(n)]) for n in at]
        if not both:
            own = [(Z[0].astype(BF16), halves[0])]
        elif h == 0:
            own = [(Z[n].astype(BF16), halves[n]) for n in at]
        else:
            own = [(turned(s["cross"].at[z]), halves[0]), (Z[2].astype(BF16), halves[1])]
        if w is None:
            return product(HALF, W, *own, *rest)
        x = product(HALF, W, *own) * w.after(COLUMN, HALF)
        if left:
            d[:] = [by_column(x, taken_turned(k.at[:, columns(h)]), *d, factor=0.5)]
        (x,) = added((x,), rest)
        return x

    def step(i: Array, carry: Any) -> Any:
        z, *Z = carry
        z = lax.bitwise_and(z, i)
        _, slot = work.chunk(i)
        tile1, tile2 = s["tiles"].at[z], s["tiles"].at[z + 1]
        b_q, b_e = (s[n].at[slot] for n in ("q", own.e))
        q, e = ([x.at[:, columns(h)] for h in at] for x in (b_q, b_e))
        w = work.weights(i, power)
        work.ready(own.waits, i)
        if work.read:
            b_k = s[own.k].at[slot]
            tile1[...] = pairs(b_q, b_k, w, upper=False)
        if not own.adds:
            work.wait(own.handed, i)
        dk: list[Array] = []
        if work.read:
            a = product(W, W, (b_e, turned(b_k)))
            if left:
                by_query, by_key = of_pairs(a, loaded(tile1, WGMMA))
                left.rows(work, i, 1, by_query)
                d[:] = [by_key]
            tile2[...] = weighed(a, w, upper=False)
            plgpu.commit_smem()
            for h in at:
                rest = (turned(e[h]), tile1), (turned(q[h]), tile2)
                x = made(Z, h, b_k, rest, w, z, i)
                x = x if work.scale == 1.0 else x * work.scale
                if own.adds:
                    if h == 0:
                        work.wait(own.handed, i)
                    x = x + taken_turned(s[own.dk].at[slot].at[:, columns(h)]).astype(F32)
                dk.append(x.astype(BF16))
            if left:
                left.columns(work, i, 0, d.pop())
        plgpu.commit_smem()  # every warp has read k and the copy
        if own.freed:
            work.arrive(own.freed, i)
        for h, x in enumerate(dk):
            put_turned(s[own.dk].at[slot].at[:, columns(h)], x)
        Z = blocks_added(Z, q, e, w)
        if both:
            s["cross"].at[z][...] = Z[1].astype(BF16)
        plgpu.commit_smem()
        work.arrive(own.done, i)
        if left:

            def keep(to: Any) -> None:  # the gradient without its transpose
                leave_blocks(to, [(0.5 * left.scaled(x)).astype(BF16) for x in Z])

            left.keep(work, i, keep)
        return z, *Z

    _, *Z = lax.fori_loop(i32(0), work.part.chunks, step, (work.nil[0], *Z))
    if half is not None:
        leave_blocks(half.at[(*work.place.entry(half, 2 + len(work.axes)), *work.axes)], Z)
