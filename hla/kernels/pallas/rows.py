"""Which fused kernels serve a request on a Hopper GPU, and what does each.

What does a fused step is given ``take``, the array that a reference means, and the gate; it returns
pairs of a reference and its new array.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax import numpy as jnp

from ...core.passes import Gate, Shape, broadcast
from ...core.programs import adjoint
from ...core.request import Request
from ...device.elementwise import Made, Take
from ...device.rows import flipped, gate_parts, kept, masked, matched
from ...device.scan import Call
from ...device.steps import Fused, Launch, Parts, Ref, Row

Array = Any
Make = Callable[[Take, Gate], Made]
FORWARD = "{} by two state owners"
OPERATORS = "hla2", "ahla", "hla3"
HLA2 = "hla2 on Hopper: dy, dv, dk", "hla2 on Hopper: dq"
AHLA = "ahla on Hopper: du, dv, dk", "ahla on Hopper: dq"
HLA3 = tuple(f"hla3 on Hopper: {x}" for x in ("dy, du", "dv, dk", "dq of y and u", "dq of o"))
Sweep = tuple[str, bool, tuple[int, ...]]  # name, whether last token first, of which steps
SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "hla2": ((HLA2[0], True, (0, 1)), (HLA2[1], False, (0, 1))),
    "ahla": ((AHLA[0], True, (0, 1)), (AHLA[1], False, (0, 1))),
    "hla3": (
        (HLA3[0], True, (2,)), (HLA3[1], True, (0, 1)),
        (HLA3[2], False, (0, 1)), (HLA3[3], False, (2,)),
    ),
}  # fmt: skip
WIDEST, HALF = 128, 64  # columns of a tile
CHUNK, PERIOD = 64, 1024  # tokens by which dots count, and between the states that are kept


def rows(request: Request) -> tuple[Row, ...]:
    """Return the fused kernels of a request, of either direction; denominators are passes apart."""
    widths = request.k_shape[-1], request.v_shape[-1]
    fits = request.dtype == "bfloat16" and 0 < min(widths) <= max(widths) <= WIDEST
    count = masked(request)
    if request.operator not in OPERATORS or request.empty or not (fits and count):
        return ()
    steps = (s for s in request.passes if s.step < count and "|" not in s.out)
    forward = Row(FORWARD.format(request.operator), tuple(steps), segments=True)
    return (forward, *sweeps(request, count))


def sweeps(request: Request, count: int) -> tuple[Row, ...]:
    """Return the sweeps of an adjoint, where they do all of it."""
    plain = not request.normalize and request.scale != 0
    if not plain or count != len(request.program.steps):
        return ()
    back = adjoint(tuple(s for s in request.passes if "|" not in s.out))
    alike = request.operator != "hla3" or matched(request)
    side = HALF if max(request.k_shape[-1], request.v_shape[-1]) <= HALF else WIDEST
    reads = 4 * side // HALF  # of each warp, and of both that have rows of a state
    own = Parts(CHUNK, PERIOD, reads, 4, side=side, met=side, block=side)
    parts = gate_parts(request, own)
    return tuple(
        Row(name, tuple(s for s in back if s.reverse == last and s.step in of),
            segments=True, parts=parts, adds=name in HLA3[1:])
        for name, last, of in SWEEPS[request.operator] if alike or len(of) == 1
    )  # fmt: skip


def lead(call: Call, ref: Ref | None) -> Shape | None:
    """Return the batch of an array of tokens, None of none."""
    return None if ref is None else call.layouts[ref.name].shape[:-2]


def memory_axis(call: Call, name: str) -> int:
    """Return which axis is that of tokens in memory: -3 where the last batch axis lies within."""
    strides = call.layouts[name].strides
    return -3 if len(strides) > 2 and 0 < strides[-3] < strides[-2] else -2


def gate_of(call: Call, gate: Gate) -> Array | None:
    """Return the gate of a call as the array that was given."""
    return gate.decay if call.request.gate == "decay" else gate.log_gate


def taken(take: Take, ref: Ref | None) -> Array | None:
    """Return what a reference means, None of none."""
    return None if ref is None else take(ref)


def zeros(refs: list[Ref | None], take: Take) -> Made:
    """Return what comes of no heads."""
    return [(ref, jnp.zeros_like(take(ref))) for ref in refs if ref is not None]


def pair(operator: str, call: Call, fused: Fused) -> Make:
    """Return what makes o (y, u) and last states of hla2 or ahla."""
    one, two = fused.launches
    if any(x.add or x.write != 1.0 for x in fused.launches):
        raise NotImplementedError(f"no fused kernel does {fused}")
    y, o = (kept(fused, s) for s in (one, two))
    starts = [next(iter(s.start), None) for s in fused.launches]
    ends = [next(iter(s.end), None) for s in fused.launches]
    batch, ahla = broadcast(one.batch, two.batch), operator == "ahla"
    rest = 3 if one.tokens or two.tokens else 2  # a state's own axes, and that of segments
    v = one.v[0] if ahla else two.v[0]

    def make(take: Take, gate: Gate) -> Made:
        from . import hopper

        refs = [o, y, *ends]
        if 0 in batch:
            return zeros(refs, take)
        p = hopper.Pair(
            ahla, batch, call.request.gate, (one.power, two.power), (one.read, two.read),
            lead(call, o), o is not None and call.dtypes[o.name].itemsize > 2, lead(call, y),
            (left(call, ends[0], rest), left(call, ends[1], rest)), one.tokens or two.tokens,
            memory_axis(call, one.q[0].name),
        )  # fmt: skip
        given: Any = [take(x) for x in (one.q[0], one.k[0], v)]
        given += [gate_of(call, gate), *(taken(take, x) for x in starts)]
        made = hopper.pair(p, *given)
        return [(r, x) for r, x in zip(refs, made, strict=True) if r is not None]

    return make


def left(call: Call, end: Ref | None, own: int) -> Shape | None:
    """Return the batch of a last state with so many own axes, None of none."""
    return None if end is None else call.layouts[end.name].shape[:-own]


def triple(call: Call, fused: Fused) -> Make:
    """Return what makes o (y, u) and last states of hla3."""
    launches = fused.launches
    if any(x.add or x.write != 1.0 for x in launches):
        raise NotImplementedError(f"no fused kernel does {fused}")
    y, u, o = (kept(fused, s) for s in launches)
    starts = [next(iter(s.start), None) for s in launches]
    ends = [next(iter(s.end), None) for s in launches]
    batch = broadcast(*(s.batch for s in launches))
    tokens = max(s.tokens for s in launches)
    first, second, third = launches

    def make(take: Take, gate: Gate) -> Made:
        from . import hopper3

        refs = [o, y, u, *ends]
        if 0 in batch:
            return zeros(refs, take)
        own = [left(call, x, 3 if tokens else 2) for x in ends]
        p = hopper3.Triple(
            batch, call.request.gate, (first.power, third.power),
            (first.read, second.read, third.read), lead(call, o),
            o is not None and call.dtypes[o.name].itemsize > 2, lead(call, y), lead(call, u),
            (own[0], own[1], own[2]), tokens, memory_axis(call, first.q[0].name),
        )  # fmt: skip
        given: Any = [take(x) for x in (first.q[0], first.k[0], second.v[0])]
        given += [gate_of(call, gate), *(taken(take, x) for x in starts)]
        made = hopper3.triple(p, *given)
        return [(r, x) for r, x in zip(refs, made, strict=True) if r is not None]

    return make


def added(x: Launch, ref: Ref | None, take: Take, o: Array) -> Array:
    """Return what a launch made, added to what is there where it adds."""
    return take(ref).astype(jnp.float32) + o if x.add and ref is not None else o


def every(x: Launch) -> int:
    """Chunks between the states that a launch keeps or reads, of which a segment has a multiple."""
    return math.gcd(x.tokens, PERIOD) // CHUNK if x.states or x.kept else 0


def left_of(*launches: Launch) -> list[Ref | None]:
    """Return where launches leave what a gate's gradient is made of, if they do."""
    found = [x.dots for x in launches] + [x.states for x in launches]
    return [x for x in found if x is not None]


def swept(
    call: Call, given: Sequence[Ref], first: Launch, power: int, second: Ref | None,
    *, ends: bool, read: bool, sweep: str,
) -> Callable[[Take, Gate], Any]:  # fmt: skip
    """Return what runs a sweep, last token first, R as ``first`` has it; ``second`` its other."""
    R, asked = next(iter(first.start), None), any(first.end) and read

    def run(take: Take, gate: Gate) -> Any:
        from . import hopper_reverse as sweeps

        p = sweeps.Reverse(
            getattr(sweeps, sweep), first.batch, call.request.gate, (power, first.power),
            first.write, (asked, ends), read, first.tokens, memory_axis(call, given[0].name),
            first.dots is not None, every(first),
        )  # fmt: skip
        states = gate_of(call, gate), taken(take, R), taken(take, second)
        return sweeps.reverse(p, [take(x) for x in given], *states)

    return run


def finished(
    refs: list[Ref | None],
    batch: Shape,
    run: Callable[[Take, Gate], Any],
    adds: Launch | None = None,
) -> Make:
    """Return what puts all that a sweep makes into its places, the first where it adds."""

    def make(take: Take, gate: Gate) -> Made:
        if 0 in batch:
            return zeros(refs, take)
        rows, first, second, dots, kept = run(take, gate)
        made = [*rows, first, second, *dots, *kept]
        if adds is not None:
            made[0] = added(adds, refs[0], take, made[0])
        found = [(r, x) for r, x in zip(refs, made, strict=True) if r is not None]
        return [(r._replace(turned=False), x.mT if r.turned else x) for r, x in found]

    return make


def reverse(call: Call, fused: Fused) -> Make:
    """Return what makes dy, dv and dk of hla2, last token first.

    In segments also what makes dy again and, of the two that make up Z, half of their sum.
    """
    read = len(fused.launches) > 2
    if not read:
        dy, dk = fused.launches
        first = dy._replace(start=(flipped(next(iter(dy.start), None)),))
        refs, Z, given = [None, dk.end[0]], None, [dy.v[0], dy.q[0], dy.k[0]]
    else:
        dy, first, _, dk = fused.launches
        refs, Z = [next(iter(first.end), None), None], next(iter(dk.start), None)
        refs = [kept(fused, dy), first.o[0], dk.o[0], *refs, *left_of(first, dk)]
        given = [dy.v[0], dk.q[0], dy.q[0], dy.k[0], first.q[0]]
    run = swept(call, given, first, dk.power, Z, ends=not read, read=read, sweep="HLA2")
    return finished(refs, dy.batch, run)


def reverse_ahla(call: Call, fused: Fused) -> Make:
    """Return what makes du, dv and dk of ahla, last token first; in segments also the second state.

    That is of du, which is made again, and q; it or its transpose may be asked twice.
    """
    if not fused.launches[1].q:
        du, *states = fused.launches
        lasts = [x.end[0] if x.k == du.k else flipped(x.end[0]) for x in states]
        given = [du.k[0], du.q[0], du.v[0]]
        run = swept(call, given, du, du.power, None, ends=True, read=False, sweep="AHLA")

        def again(take: Take, gate: Gate) -> Any:
            found = run(take, gate)
            return (), *[found.second] * len(lasts), *[None] * (2 - len(lasts)), (), ()

        return finished([*lasts, None][:2], du.batch, again)
    one, du, two, dv = fused.launches
    P, last = next(iter(dv.start), None), next(iter(dv.end), None)
    refs = [kept(fused, du), dv.o[0], two.o[0], next(iter(du.end), None), last, *left_of(du, dv)]
    given = [du.k[0], du.q[0], two.q[0], du.v[0], one.q[0]]
    ends = last is not None
    run = swept(call, given, du, dv.power, P, ends=ends, read=True, sweep="AHLA")
    return finished(refs, du.batch, run)


def reverse_last(call: Call, fused: Fused) -> Make:
    """Return what makes dy and du of hla3, last token first."""
    dy, du = fused.launches
    given = [dy.v[0], dy.q[0], dy.k[0], du.q[0]]
    refs = [kept(fused, dy), kept(fused, du), next(iter(du.end), None), None, *left_of(du)]
    run = swept(call, given, du, du.power, None, ends=False, read=True, sweep="ONE")
    return finished(refs, dy.batch, run)


def reverse_both(call: Call, fused: Fused) -> Make:
    """Return what makes dv and all of dk of hla3, last token first."""
    dk, dv, _, more = fused.launches
    given = [dk.v[0], dv.q[0], dk.q[0], dk.k[0], more.v[0]]
    refs = [dk.o[0], dv.o[0], next(iter(dv.end), None), None, *left_of(dv, more)]
    Z = next(iter(more.start), None)
    run = swept(call, given, dv, more.power, Z, ends=False, read=True, sweep="SUM")
    return finished(refs, dk.batch, run, dk)


def after(fused: Fused) -> tuple[Launch, ...]:
    """Return what a fused step leaves to passes: of Z the gradient of the first S.

    It is one of the two that make up Z, of which the kernel keeps the sum.
    """
    *_, dk = fused.launches
    if fused.row not in (HLA2[0], HLA3[1]) or not dk.q or not any(dk.end):
        return ()
    return (dk.states_alone(),)


def queries(call: Call, fused: Fused) -> Make:
    """Return what makes dq, first token first."""
    first, *rest = fused.launches
    v, y = first.k[0], first.v[0]
    form = "one"
    k = e = S = None
    if rest:
        (second,) = rest
        k, e, S = second.v[0], second.q[0], flipped(next(iter(second.start), None))
        form = "hla2" if y != k else "keys"
        if first.v == second.v != second.k:  # the k of both passes
            form, v, y = "ahla", second.k[0], first.k[0]
    F, o = flipped(next(iter(first.start), None)), first.o[0]
    by = {"k": k, "v": v, "g": first.q[0], "y": y, "e": e if rest else o, "q": first.x}
    powers = (rest[0] if rest else first).power, first.power
    refs = [x.dots for x in (first, *rest) if x.dots] + [x.met for x in (first, *rest) if x.met]
    like = (*first.batch, *call.layouts[o.name].shape[-2:])
    # dq lies where dy or du did, but for hla3, whose dk is made of dy as well
    over = e is not None and form != "keys" and call.layouts[e.name].shape == like

    def make(take: Take, gate: Gate) -> Made:
        from . import hopper_queries as sweep

        if 0 in first.batch:
            return zeros([o, *refs], take)
        alone = not rest and first.add and take(o).dtype == jnp.bfloat16
        p = sweep.Queries(
            form, first.batch, call.request.gate, powers, first.read, alone, first.tokens,
            memory_axis(call, first.q[0].name), first.dots is not None, every(first),
            over=over or alone,
        )  # fmt: skip
        given: Any = [taken(take, by[n]) for n in p.letters]
        states = gate_of(call, gate), taken(take, S), taken(take, F)
        kept = [take(x.kept) for x in (first, *rest) if x.kept]
        dq, dots, met = sweep.queries(p, given, *states, kept)
        made = dq if alone else added(first, o, take, dq)
        return [(o, made), *zip(refs, (*dots, *met), strict=True)]

    return make


KERNELS: dict[str, Callable[[Call, Fused], Make]] = {
    **{FORWARD.format(x): functools.partial(pair, x) for x in OPERATORS[:2]},
    FORWARD.format("hla3"): triple,
    **dict(zip(HLA2, (reverse, queries), strict=True)),
    **dict(zip(AHLA, (reverse_ahla, queries), strict=True)),
    **dict(zip(HLA3, (reverse_last, reverse_both, queries, queries), strict=True)),
}
