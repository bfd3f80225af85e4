"""Last token first on Hopper: the gradients of all that a pass makes or reads but its queries.

A pass of q, keys k and values v, of whose result g is the gradient, has R = sum q g', dk = R v and
dv = R' k; one of k as its values too Z = sum q g' + g q', dk = Z k. With powers p of the gate:

    hla2    R = sum q do' (p = 2)      dy = R v, dv = R' y
            Z of dy (p = 1)            dk = Z k
    ahla    R = sum q do'              du = R' k, dk = R u
            P = sum q du'              dv = P' k, dk += P v
    hla3    R = sum q do' (p = 3)      dy = R u, du = R' y
    then    P = sum q du', Z of dy     dv = P' k, dk = P v + Z k

A program does a head in chunks of W = 64 tokens: one or two warpgroups own states, the last moves.
R is [D, V], and read both ways round from a bfloat16 copy. Z is symmetric: of its four blocks of 64
three are kept, and the one beside the diagonal is read the other way round from a copy. Up (lo)
keeps the pairs whose row is not later (not earlier) than its column:

    dK = V R' + up(V G') Q                   dV = K R + up(K Q') G    R += Q' G
    dK' = Z K' + G' lo(Q K') + Q' lo(G K')                            Z += Q' G + G' Q

The mover stores what the owners leave in the place of an operand that nobody reads any more, and
loads the next chunk there: of hla2 dY takes V's, dV Y's, dK K's; of ahla dU takes dO's, dV v's, and
dK u's, where the second owner adds its part to the first's; of hla3 dY takes u's and dU Y's, then
P's part of dK takes v's, where Z's is added, and dV K's.

For a gate's gradient owners leave, of each token, v . (R' k) or k . (Z k) / 2 with the sums by key
of the product of the two tiles of pairs that each makes, and its sums by query; and states, before
every period but the first (`device.steps.Launch`). Each of the four warps, or of the four threads
that have a row, leaves its part: sums across warps would need memory and barriers, and what reads
them adds four numbers. One H100 took 1.50 ms for hla2's forward and all gradients with a log
gate's, 1.47 with a decay's, 0.965 without, where these were summed in memory.

Bytes a token and head, D = V = 128: hla2 and ahla 8 rows of 256, 0.358 ms for B = 8, T = 4096, H =
16 at 3.0 TB/s; one H100 took 0.413 ms (87%), 0.424 with a decay, 0.443 with a log gate; ahla 0.415
and 0.435. hla3 6 and 7 rows, 0.268 and 0.313 ms; with queries and the forward, 1.38, it took 1.53.
No atomics; bits depend on nothing but the head's data.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...core.passes import Shape
from .copies import (
    Place,
    chunks_of,
    cut,
    entries,
    heads,
    laid,
    launched,
    lists_at,
    load_decay,
    out_shape,
    state_in,
    state_out,
    wide,
)  # fmt: skip
from .hopper_owners import STAGES, Keys, Left, Pass, Work, owner_r, owner_z
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
    i32,
    listed,
    tile,
)  # fmt: skip

Move = tuple[str, str]


class Sweep(NamedTuple):
    """A kernel: operands by their letters, owners, and what its mover does in a turn, in order.

    A chunk's buffers are free again two turns later: the mover waits for a barrier, stores what is
    in the place of an operand, settles (has all stores read), and loads; w are the weights of a
    log gate.
    """

    operands: str  # of them v and g have as many columns as values
    first: Pass
    second: Pass | Keys | None
    makes: str  # the places of what it makes, in order
    values: str  # which of these have as many columns as values
    moves: tuple[Move, ...]
    late: str = ""  # operands with a barrier of their own
    alone: str = ""  # operands where states alone are asked


HLA2 = Sweep(
    "qkvgy", Pass("y", "v", "g", "v", "y", ("full",), "second", "first", alone="dk"),
    Keys("k", "v", "k", ("full", "late"), "third", "first"), "vyk", "y",
    (
        ("wait", "first"), ("store", "v"), ("wait", "second"), ("store", "y"), ("settle", ""),
        ("load", "yg"), ("wait", "third"), ("store", "k"), ("load", "qvw"), ("settle", ""),
        ("load", "k"),
    ),
    late="k", alone="qvg",
)  # fmt: skip
AHLA = Sweep(
    "qkvgy", Pass("k", "y", "g", "y", "g", ("full",), "first", alone="dv"),
    Pass("k", "v", "g", "y", "v", ("full", "late", "first"), "second", adds=True, copy=1),
    "gvy", "gv",
    (
        ("wait", "first"), ("store", "g"), ("wait", "second"), ("store", "y"), ("store", "v"),
        ("load", "qkw"), ("settle", ""), ("load", "gyv"),
    ),
    late="v", alone="qkg",
)  # fmt: skip
ONE = Sweep(  # of hla3's last pass
    "qvgy", Pass("y", "v", "g", "v", "y", ("full",), "second", "first"), None, "vy", "y",
    (
        ("wait", "first"), ("store", "v"), ("wait", "second"), ("store", "y"),
        ("load", "qgw"), ("settle", ""), ("load", "vy"),
    ),
)  # fmt: skip
SUM = Sweep(  # of hla3's others, dy as y
    "qkvgy", Pass("k", "v", "g", "v", "k", ("full",), "second", "first", freed="read"),
    Keys("k", "y", "v", ("full",), "third", "first", freed="read", adds=True), "vk", "k",
    (
        ("wait", "second"), ("store", "k"), ("load", "g"), ("wait", "third"), ("store", "v"),
        ("load", "qyw"), ("settle", ""), ("load", "kv"),
    ),
)  # fmt: skip


class Reverse(NamedTuple):
    """What a launch does, apart from its arrays."""

    sweep: Sweep
    batch: Shape  # of all arrays of tokens
    gate: str | None = None
    powers: tuple[int, int] = (1, 2)  # of the gate: of the second owner's state, of R
    scale: float = 1.0  # of what is written to the states
    ends: tuple[bool, bool] = (False, False)  # asked: R at the first token, P or half of Z there
    read: bool = True  # all is asked, not the states alone
    tokens: int = 0  # of a segment, one more batch axis of states; 0: the whole
    axis: int = -2  # of tokens, in memory
    dots: bool = False  # what a gate's gradient is made of is asked
    every: int = 0  # and states, before every so many chunks but the first

    @property
    def letters(self) -> str:
        """Operands that are read."""
        return self.sweep.operands if self.read else self.sweep.alone

    @property
    def makes(self) -> str:
        """Places of what is made."""
        return self.sweep.makes if self.read else ""

    @property
    def owners(self) -> int:
        """How many warpgroups own a state."""
        return 1 if self.sweep.second is None else 2

    @property
    def keys(self) -> bool:
        """Whether the second state is Z."""
        return isinstance(self.sweep.second, Keys)


class Swept(NamedTuple):
    """What it makes: None where it is not asked."""

    rows: tuple[Array, ...]  # by the places of `Sweep.makes`
    first: Array | None
    second: Array | None
    dots: tuple[Array, ...] = ()  # of R and the second state: see `device.steps.Launch`
    kept: tuple[Array, ...] = ()


def reverse(
    p: Reverse, given: Sequence[Array], gate: Array | None = None, R: Array | None = None,
    second: Array | None = None,
) -> Swept:  # fmt: skip
    """Sweep from the last token to the first.

    Parameters
    ----------
    p : Reverse
        What to do.
    given : sequence of array, (*batch, T, D or V), bfloat16
        By the letters of the sweep, q first, where states alone are asked of those it then has.
        Batch axes broadcast.
    gate : array, optional
        A decay (*batch) or a log gate (*batch, T).
    R, second : array, (*batch, D, V), and so or (*batch, D, D), float32, optional
        After the last token, of segments (*batch, segments, ...); of Z a matrix of which the sum
        with its transpose counts.

    Returns
    -------
    Swept
        What is made in bfloat16, and the states before the first token that are asked.
    """
    by = dict(zip(p.letters, given, strict=True))
    T, D, V = by["q"].shape[-2], by["q"].shape[-1], by["g"].shape[-1]
    B = wide(max(D, V))
    turn = lambda x: jnp.swapaxes(x, -1, -2)  # noqa: E731
    if R is not None:
        R = state_in(turn(R) / p.scale, B, B)
    if second is not None:
        second = state_in(((second if p.keys else 0.0) + turn(second)) / p.scale, B, B)
    lists = None if gate is None or p.gate is None else listed(gate, p.gate, T)
    parts = -(-T // p.tokens) if p.tokens else 1
    state = jax.ShapeDtypeStruct((*p.batch, *((parts,) if p.tokens else ()), B, B), F32)
    outs = [out_shape(p.batch, T, B, p.axis)] * len(p.makes) + [state] * sum(p.ends)
    sums = jax.ShapeDtypeStruct((*p.batch, 4, 2, T + -T % W), F32)
    outs += [sums] * (p.owners if p.dots else 0)
    periods = max(0, T - 1) // (p.every * W) if p.every else 0
    outs += [jax.ShapeDtypeStruct((*p.batch, periods, B, B), BF16)] * (p.owners if periods else 0)
    rest = [x for x in (lists, R, second) if x is not None]

    def body(*refs: Any, **scratch: Any) -> None:
        _reverse(p, T, parts, [x is not None for x in (lists, R, second)], refs, scratch)

    call = launched(body, outs, _scratch(p, B), entries(p.batch) * parts, p.owners + 1)
    found = iter(call(*(laid(x, p.axis, B) for x in given), *rest))
    rows = tuple(cut(next(found), T, V if n in p.sweep.values else D, p.axis) for n in p.makes)
    ends = [next(found) if x else None for x in p.ends]
    end, last = (None if x is None else turn(state_out(x, V, D)) * p.scale for x in ends)
    if ends[1] is not None and p.keys:
        last = ends[1][..., :D, :D] * (0.5 * p.scale)
    dots = tuple(next(found)[..., :T] for _ in range(p.owners if p.dots else 0))
    dots = tuple(x.reshape(*x.shape[:-2], -1) for x in dots)
    return Swept(rows, end, last, dots, tuple(found))


def _scratch(p: Reverse, B: int) -> dict[str, Any]:
    """Return what a program has in shared memory, and its barriers."""
    scratch: dict[str, Any] = {n: tile(STAGES, W, B) for n in p.letters}
    passes = 1 + (p.owners > 1 and not p.keys)
    scratch["copies"] = tile(passes, B, B)
    if p.keys:
        scratch |= {"tiles": tile(2, W, W), "cross": tile(1, HALF, HALF)}
    if p.dots and (p.keys or p.owners == 1):  # the first tile of pairs, where there is memory
        scratch["pairs"] = tile(1, W, W)
    if p.dots:
        scratch["dots"] = plgpu.SMEM((passes, 2, W), F32)
    late = sum(n in p.sweep.late for n in p.letters)
    scratch["full"] = barrier(STAGES, len(p.letters) - late + (p.gate == "log_gate"))
    events = {x for verb, x in p.sweep.moves if verb == "wait"} | {p.sweep.first.freed} - {""}
    events |= {p.sweep.first.handed} - {""}
    scratch |= {n: barrier(STAGES) for n in sorted(events)}
    if late:
        scratch["late"] = barrier(STAGES, late)
    if p.gate is not None:
        scratch |= {"lists": plgpu.SMEM((2, LISTS, W), F32), "gate_full": barrier(1, 2)}
    return scratch


def _reverse(
    p: Reverse, T: int, parts: int, there: Sequence[bool], refs: Any, s: dict[str, Any]
) -> None:
    """Do a program: its warpgroup's part."""
    inputs = iter(refs)
    given = {n: next(inputs) for n in p.letters}
    lists, *starts = (next(inputs) if x else None for x in there)
    nil = next(inputs)
    made = {n: next(inputs) for n in p.makes}
    ends = [next(inputs) if x else None for x in p.ends]
    sums = [next(inputs) for _ in range(p.owners)] if p.dots else []
    kept = [*inputs] or [None] * p.owners
    left: list[Left | None] = [None, None]
    if p.dots:
        left = [Left(*x, p.every, p.scale) for x in zip(sums, kept, strict=True)]
    i, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    number = lax.rem(i, i32(parts)) if p.tokens else i32(0)
    place = Place(heads(p.batch, lax.div(i, i32(parts)) if p.tokens else i), p.batch, p.axis)
    part, axes = chunks_of(T, p.tokens, number, nil), (number,) if p.tokens else ()
    work = Work(place, part, axes, nil, s, p.gate, p.scale, p.read)
    power2, power1 = p.powers

    @pl.when(warpgroup == 0)
    def _() -> None:
        if p.owners > 1:
            plgpu.set_max_registers(OWNER, action="increase")
        owner_r(work, p.sweep.first, power1, starts[0], ends[0], left[0])

    if p.owners > 1:

        @pl.when(warpgroup == 1)
        def _() -> None:
            plgpu.set_max_registers(OWNER, action="increase")
            if isinstance(p.sweep.second, Keys):
                owner_z(work, p.sweep.second, power2, starts[1], ends[1], left[1])
            elif p.sweep.second:
                owner_r(work, p.sweep.second, power2, starts[1], ends[1], left[1])

    @pl.when(warpgroup == p.owners)
    def _() -> None:
        if p.owners > 1:
            plgpu.set_max_registers(MOVER, action="decrease")
        _mover(p, work, lists, given, made)


def _mover(p: Reverse, work: Work, lists: Any, given: Any, made: Any) -> None:
    """Load what the owners read; store what they leave in its place."""
    s, place, part = work.scratch, work.place, work.part
    if p.gate == "decay":
        load_decay(lists, place, s["lists"], s["gate_full"].at[0])

    def move(verb: str, names: str, slot: Array, row: Array) -> None:
        if verb == "wait":
            plgpu.barrier_wait(s[names].at[slot])
        if verb == "settle":
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for n in made if verb == "store" else ():
            if n in names:
                plgpu.copy_smem_to_gmem(s[n].at[slot], place.rows(made[n], row + STAGES * W))
        for n in names if verb == "load" else ():
            full = s["late" if n in given and n in p.sweep.late else "full"].at[slot]
            if n in given:
                plgpu.copy_gmem_to_smem(place.rows(given[n], row), s[n].at[slot], full)
            if n == "w" and p.gate == "log_gate":
                plgpu.copy_gmem_to_smem(lists_at(lists, place, row), s["lists"].at[slot], full)

    def step(i: Array, _: None) -> None:
        slot = lax.rem(i, i32(STAGES))
        row = part.first + (part.chunks - 1 - i) * W
        for load, found in itertools.groupby(p.sweep.moves, lambda x: x[0] == "load"):
            moves = tuple(found)

            @pl.when(i < part.chunks if load else i >= STAGES)
            def _(moves: Sequence[Move] = moves) -> None:
                for verb, names in moves:
                    move(verb, names, slot, row)

    lax.fori_loop(i32(0), part.chunks + STAGES, step, None)
    plgpu.wait_smem_to_gmem(0)
