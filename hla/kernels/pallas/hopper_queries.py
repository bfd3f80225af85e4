"""First token first on Hopper: the gradient of q.

    hla2  F = sum y v', S = sum k k'    dq = F do + S dy
    ahla  E = sum k u', P = sum k v'    dq = E do + P du
    hla3  P = sum k v', S = sum k k'    dq = P du + S dy, and then
          F = sum y u'                  dq += F do

Of D = 128 two warpgroups own 64 rows each of both states, so that dq is one accumulator and rounded
once; both make the two tiles of pairs. The last warpgroup loads. In chunks of W = 64 tokens (for
ahla: X = u, Y = K, C = V; else X = V, Y = Y or K, C = K):

    dQ' = F dO' + Y' up(X dO') + S dY' + K' up(C dY')    F += Y' X, S += K' C

Bytes a token and head, D = V = 128: 6 rows of 256, 0.268 ms for B = 8, T = 4096, H = 16 at 3.0
TB/s; 0.284 ms on one H100 (94%), 0.343 with a decay. hla3 5 rows each, 0.224 ms. No atomics; bits
depend on nothing but the head's data.
"""

from __future__ import annotations

import functools
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
    Load,
    Place,
    Ring,
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
    WGMMA,
    Array,
    W,
    added,
    barrier,
    by_column,
    columns,
    gathered,
    i32,
    leave_columns,
    legal,
    listed,
    loaded,
    pairs,
    product,
    put_turned,
    taken_turned,
    tile,
    turned,
    zeros,
)  # fmt: skip

STAGES = 2  # chunks in shared memory


# Operands by their letters: k, v, the gradient g of what reads F, y, and that of what reads S, e
LETTERS = {"hla2": "kvgye", "ahla": "kvgye", "keys": "kvge", "one": "vgy"}


class Queries(NamedTuple):
    """What a launch does, apart from its arrays."""

    form: str  # hla2; ahla: u and du are y and e; keys: k is y too; one: of F alone
    batch: Shape  # of all arrays of tokens
    gate: str | None = None
    powers: tuple[int, int] = (1, 2)  # of the gate: of S, of F
    scale: float = 1.0  # of what is read
    adds: bool = False  # of F alone: to what comes as e
    tokens: int = 0  # of a segment, one more batch axis of states; 0: the whole
    axis: int = -2  # of tokens, in memory
    dots: bool = False  # what a gate's gradient is made of is asked: of q
    every: int = 0  # and behind every so many chunks, states by what was kept
    over: bool = False  # dq takes the memory of e, read chunk by chunk before it is written

    @property
    def letters(self) -> str:
        """Operands that are read."""
        return LETTERS[self.form] + "e" * self.adds + "q" * self.dots

    @property
    def states(self) -> int:
        """How many states there are: F, or F and S."""
        return 1 if self.form == "one" else 2


class Swept(NamedTuple):
    """What it makes; of F, and of S, for a gate's gradient: see `device.steps.Launch`."""

    dq: Array  # (*batch, T, D), bfloat16
    dots: tuple[Array, ...] = ()
    met: tuple[Array, ...] = ()


def queries(
    p: Queries, given: Sequence[Array], gate: Array | None = None, S: Array | None = None,
    F: Array | None = None, kept: Sequence[Array] = (),
) -> Swept:  # fmt: skip
    """Sweep from the first token to the last.

    Parameters
    ----------
    p : Queries
        What to do.
    given : sequence of array, (*batch, T, D or V), bfloat16
        By the letters of ``p``; batch axes broadcast.
    gate : array, optional
        A decay (*batch) or a log gate (*batch, T).
    S, F : array, (*batch, D, D or V), float32, optional
        Before the first token, of segments (*batch, segments, ...).
    kept : sequence of array, (*batch, N, B, B), bfloat16
        What reverse sweeps kept of the gradients of F, and of S.

    Returns
    -------
    Swept
        The gradient of q, and what is asked.
    """
    by = dict(zip(p.letters, given, strict=True))
    T, D, V = by["g"].shape[-2], by["k" if "k" in by else "y"].shape[-1], by["v"].shape[-1]
    B = wide(max(D, V))
    S, F = (None if x is None else state_in(jnp.swapaxes(x, -1, -2), B, B) for x in (S, F))
    lists = None if gate is None or p.gate is None else listed(gate, p.gate, T)
    rest = [x for x in (lists, S, F) if x is not None]
    parts, owners = -(-T // p.tokens) if p.tokens else 1, B // HALF
    scratch: dict[str, Any] = {n: tile(STAGES, W, B) for n in p.letters if n != "q"}
    if p.dots:  # by halves, where dq takes their place
        scratch |= {f"q{h}": tile(STAGES, W, HALF) for h in range(owners)}
    else:
        scratch["outs"] = tile(owners, W, HALF)
    scratch |= {"tiles": tile(2 * owners, W, W)}
    copies = len(p.letters) + p.dots * (owners - 1) + (p.gate == "log_gate")
    scratch |= {"full": barrier(STAGES, copies)}
    scratch |= {"free": barrier(STAGES, owners)}
    if p.gate is not None:
        scratch |= {"lists": plgpu.SMEM((2, LISTS, W), F32), "gate_full": barrier(1, 2)}
    there = [x is not None for x in (lists, S, F)]
    rest += kept if p.every else ()

    def body(*refs: Any, **scratch: Any) -> None:
        _queries(p, T, parts, owners, there, refs, scratch)

    outs = [] if p.over else [out_shape(p.batch, T, B, p.axis)]
    sums = jax.ShapeDtypeStruct((*p.batch, 4 * owners, T + -T % W), F32)
    outs += [sums] * (p.states if p.dots else 0)
    outs += [jax.ShapeDtypeStruct((*x.shape[:-2], B), F32) for x in kept if p.every]
    over = p.letters.index("e") if p.over else None
    call = launched(body, outs, scratch, entries(p.batch) * parts, owners + 1, over)
    dq, *found = call(*(laid(x, p.axis, B) for x in given), *rest)
    dots, left = found[: p.states if p.dots else 0], found[p.states if p.dots else 0 :]
    return Swept(cut(dq, T, D, p.axis), tuple(x[..., :T] for x in dots), tuple(left))


class Left(NamedTuple):
    """What an owner leaves for a gate's gradient, in memory."""

    sums: Sequence[Any]  # (*batch, 4 * owners, tokens): of what F reads, and what S does
    kept: Sequence[Any]  # (*batch, N, B, B)
    met: Sequence[Any]  # (*batch, N, B)
    every: int
    tokens: int
    scale: float

    def columns(
        self, place: Place, n: int, h: int, row: Array, q: Array, x: Array, before: Array | None
    ) -> Array:
        """Store the products of queries with what is read, less what was there ``before``; both."""
        to, both = self.sums[n], gathered(by_column(x, q))
        own = both if before is None else both - before
        at = *place.entry(to, 2), pl.ds(4 * h, 4), pl.ds(row, W)
        leave_columns(to.at[at], own if self.scale == 1.0 else own * self.scale)
        return both

    def meet(self, place: Place, h: int, row: Array, states: Sequence[Array]) -> None:
        """Store the products of 64 rows of states with those of their gradients there."""
        if not self.every:
            return
        c = lax.div(row, i32(W)) + 1

        @pl.when(jnp.logical_and(lax.rem(c, i32(self.every)) == 0, row + W < self.tokens))
        def _() -> None:
            n = lax.div(c, i32(self.every)) - 1
            for x, kept, met in zip(states, self.kept, self.met, strict=True):
                R = loaded(kept.at[(*place.entry(kept, 3), n, columns(h))], WGMMA, optimized=False)
                met.at[(*place.entry(met, 2), n, columns(h))][...] = jnp.sum(
                    x * R.astype(F32), axis=1
                )


def _queries(
    p: Queries, T: int, parts: int, owners: int, there: Sequence[bool], refs: Any,
    s: dict[str, Any],
) -> None:  # fmt: skip
    """Do a program: its warpgroup's part."""
    inputs = iter(refs)
    given = {n: next(inputs) for n in p.letters}
    lists, S, F = (next(inputs) if x else None for x in there)
    kept = [next(inputs) for _ in range(p.states if p.every else 0)]
    nil, dq = next(inputs), given["e"] if p.over else next(inputs)
    sums = [next(inputs) for _ in range(p.states if p.dots else 0)]
    left = Left(sums, kept, [*inputs], p.every, T, p.scale) if p.dots else None
    i, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    number = lax.rem(i, i32(parts)) if p.tokens else i32(0)
    place = Place(heads(p.batch, lax.div(i, i32(parts)) if p.tokens else i), p.batch, p.axis)
    part, axes = chunks_of(T, p.tokens, number, nil), (number,) if p.tokens else ()

    def owner(h: int) -> None:
        if owners > 1:
            plgpu.set_max_registers(OWNER, action="increase")
        _owner(p, place, part, axes, nil, s, S, F, dq, h, left)

    for h in range(owners):
        pl.when(warpgroup == h)(functools.partial(owner, h))

    @pl.when(warpgroup == owners)
    def _() -> None:
        if owners > 1:
            plgpu.set_max_registers(MOVER, action="decrease")
        at = lambda ref, *cols: lambda c: place.rows(ref, part.first + c * W, *cols)  # noqa: E731
        own = [(at(x), s[n]) for n, x in given.items() if n != "q"]
        for h in range(owners if p.dots else 0):
            own.append((at(given["q"], columns(h)), s[f"q{h}"]))
        if p.gate == "log_gate":
            own.append((lambda c: lists_at(lists, place, part.first + c * W), s["lists"]))
        if p.gate == "decay":
            load_decay(lists, place, s["lists"], s["gate_full"].at[0])
        move(part, [Load(Ring(STAGES, 0, owners), s["full"], s["free"], own)])


def _owner(
    p: Queries, place: Place, part: Chunks, axes: tuple[Array, ...], nil: Any, s: dict[str, Any],
    start_S: Any, start_F: Any, dq: Any, h: int, left: Left | None,
) -> None:  # fmt: skip
    """Own 64 rows of F, [D, V], and of S, [D, D]: make as many columns of dq."""
    B, one = s["v"].shape[-1], p.form == "one"

    def first(start: Any) -> Array:
        if start is None:
            return zeros(HALF, B)
        at = (*place.entry(start, 2 + len(axes)), *axes, columns(h))
        return loaded(start.at[at], WGMMA, optimized=False)

    if p.gate == "decay":
        plgpu.barrier_wait(s["gate_full"].at[0])

    def step(c: Array, carry: Any) -> Any:
        z, F, *S = carry
        z = lax.bitwise_and(z, c)
        slot = lax.rem(c, i32(STAGES))
        row = part.first + c * W
        tile1, tile2 = (s["tiles"].at[z + 2 * h + n] for n in (0, 1))
        out = s[f"q{h}"].at[slot] if left else s["outs"].at[z + h]
        b_k, b_v, b_g, b_y, b_e = (s[n].at[slot] if n in s else None for n in "kvgye")
        # ahla: E += k' u, P += k' v; else F += y' v, S += k' k
        x, y, other = (b_y, b_k, b_v) if p.form == "ahla" else (b_v, b_y or b_k, b_k)
        yT = turned(y.at[:, columns(h)])
        kT = yT if one else turned(b_k.at[:, columns(h)])
        w1, w2 = (weights_of(s.get("lists"), c, slot, part, p.gate, power) for power in p.powers)
        plgpu.barrier_wait(s["full"].at[slot])
        if w1 is None and not one:

            def both(a: Any, b: Any) -> None:
                plgpu.wgmma(a, x, turned(b_g))
                plgpu.wgmma(b, other, turned(b_e))
                tile2[...] = legal(plgpu.wgmma_accumulator_load(a, wait_n=1), upper=True)
                tile1[...] = legal(b[...], upper=True)

            pl.run_scoped(both, plgpu.ACC((W, W), F32), plgpu.ACC((W, W), F32))
        else:  # one after the other, else registers would not suffice
            tile2[...] = pairs(x, b_g, w2, upper=True)
            if not one:
                tile1[...] = pairs(other, b_e, w1, upper=True)
        plgpu.commit_smem()
        if one:
            o = product(HALF, W, (F.astype(BF16), turned(b_g)))
            o = o if w2 is None else o * w2.before(COLUMN, HALF)
            if left:
                left.columns(place, 0, h, row, taken_turned(out), o, None)
            (o,) = added((o,), ((yT, tile2),))
        elif w1 is None or w2 is None:

            def read(acc: Any) -> Array:
                plgpu.wgmma(acc, F.astype(BF16), turned(b_g))
                plgpu.wgmma(acc, yT, tile2)
                plgpu.wgmma(acc, kT, tile1)
                plgpu.wgmma_wait(0)
                plgpu.wgmma(acc, S[0].astype(BF16), turned(b_e))
                return acc[...]

            o = pl.run_scoped(read, plgpu.ACC((HALF, W), F32))
        else:
            o = product(HALF, W, (F.astype(BF16), turned(b_g)))
            of_F: Array | None = None
            if left:
                met_F = o * w2.before(COLUMN, HALF)
                of_F = left.columns(place, 0, h, row, taken_turned(out), met_F, None)
            if w2.power > w1.power:
                o = o * w1._replace(power=w2.power - w1.power).before(COLUMN, HALF)
            (o,) = added((o,), ((S[0].astype(BF16), turned(b_e)),))
            o = o * w1.before(COLUMN, HALF)
            if left:
                left.columns(place, 1, h, row, taken_turned(out), o, of_F)
            (o,) = added((o,), ((yT, tile2), (kT, tile1)))
        o = o if p.scale == 1.0 else o * p.scale
        if p.adds:
            o = o + taken_turned(b_e.at[:, columns(h)]).astype(F32)
        if not left:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put_turned(out, o.astype(BF16))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, place.rows(dq, row, columns(h)))
        if w1 is None or w2 is None:
            F, *S = added((F, *S), ((yT, x),), *[((kT, other),)] * len(S))
        else:
            v = taken_turned(y.at[:, columns(h)]).astype(F32) * w2.after(COLUMN, HALF)
            (F,) = added((F * w2.total(),), ((v.astype(BF16), x),))
            for n, state in enumerate(S):
                v = taken_turned(b_k.at[:, columns(h)]).astype(F32) * w1.after(COLUMN, HALF)
                (S[n],) = added((state * w1.total(),), ((v.astype(BF16), other),))
        if left:  # dq is where the next q goes
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s["free"].at[slot])
        if left:
            left.meet(place, h, row, [F, *S])
        return z, F, *S

    states = first(start_F), *(() if one else (first(start_S),))
    lax.fori_loop(i32(0), part.chunks, step, (nil[0], *states))
    plgpu.wait_smem_to_gmem(0)
