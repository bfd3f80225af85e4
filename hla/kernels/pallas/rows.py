"""Which fused kernels serve a request on a Hopper GPU, and what does each.

What does a fused step is given ``take``, the array that a reference means, and the gate; it returns
pairs of a reference and its new array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax import numpy as jnp

from ...core.passes import Gate, Shape, broadcast
from ...core.programs import adjoint
from ...core.request import Request
from ...device.elementwise import Made, Take
from ...device.rows import flipped, kept, masked
from ...device.scan import Call
from ...device.steps import Fused, Launch, Ref, Row

Array = Any
Make = Callable[[Take, Gate], Made]
FORWARD = "{} by two state owners"
OPERATORS = "hla2", "ahla", "hla3"
HLA2 = "hla2 on Hopper: dy, dv, dk", "hla2 on Hopper: dq"
AHLA = "ahla on Hopper: du, dv, dk", "ahla on Hopper: dq"
WIDEST = 128  # columns of a tile
CHUNK = 64  # tokens


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
    names = {"hla2": HLA2, "ahla": AHLA}.get(request.operator)
    plain = not request.normalize and request.scale != 0
    asked = request.gate is not None and request.gate_given  # whose gradient asks for more
    if names is None or not plain or asked or count != len(request.program.steps):
        return ()
    if request.tokens <= CHUNK:  # of one token a GPU had another dq, for reasons not found
        return ()
    back = adjoint(tuple(s for s in request.passes if "|" not in s.out))
    reverse, queries = (tuple(s for s in back if s.reverse == x) for x in (True, False))
    return Row(names[0], reverse, segments=True), Row(names[1], queries, segments=True)


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


def reverse(call: Call, fused: Fused) -> Make:
    """Return what makes dy, dv and dk of hla2, last token first.

    In segments also what makes dy again and, of the two that make up Z, half of their sum.
    """
    if len(fused.launches) == 2:
        dy, dk = fused.launches
        dv, refs = None, [None, None, None, None, dk.end[0]]
        R, Z = flipped(next(iter(dy.start), None)), None
    else:
        dy, dv, _, dk = fused.launches
        R, end, Z = (next(iter(x), None) for x in (dv.start, dv.end, dk.start))
        refs = [kept(fused, dy), dv.o[0], dk.o[0], end, None]

    def make(take: Take, gate: Gate) -> Made:
        from . import hopper_reverse as sweep

        if 0 in dy.batch:
            return zeros(refs, take)
        p = sweep.Reverse(
            dy.batch, call.request.gate, (dk.power, dy.power), dy.write, refs[3] is not None,
            dv is None, dv is not None, dy.tokens, memory_axis(call, dy.v[0].name),
        )  # fmt: skip
        k, y = (dk.q[0], dv.q[0]) if dv else (None, None)
        given: Any = [taken(take, x) for x in (dy.v[0], k, dy.q[0], dy.k[0], y)]
        given += [gate_of(call, gate), taken(take, R), taken(take, Z)]
        made = sweep.reverse(p, *given)
        return [(r, x) for r, x in zip(refs, made, strict=True) if r is not None]

    return make


def reverse_ahla(call: Call, fused: Fused) -> Make:
    """Return what makes du, dv and dk of ahla, last token first; in segments also the second state.

    That is of du, which is made again, and q; it or its transpose may be asked twice.
    """
    refs: list[Ref | None]
    v: Ref | None
    u: Ref | None
    if not fused.launches[1].q:
        du, *states = fused.launches
        lasts = [x.end[0] if x.k == du.k else flipped(x.end[0]) for x in states]
        refs, v, u, P = [None, None, None, None], None, None, None
    else:
        one, du, two, dv = fused.launches
        P, end, last = (next(iter(x), None) for x in (dv.start, du.end, dv.end))
        refs, v, u, lasts = [kept(fused, du), dv.o[0], two.o[0], end], two.q[0], one.q[0], [last]
    R = next(iter(du.start), None)

    def make(take: Take, gate: Gate) -> Made:
        from . import hopper_reverse_ahla as sweep

        if 0 in du.batch:
            return zeros([*refs, *lasts], take)
        p = sweep.Reverse(
            du.batch, call.request.gate, du.write, (refs[3] is not None, lasts[0] is not None),
            v is not None, du.tokens, memory_axis(call, du.k[0].name),
        )  # fmt: skip
        given: Any = [taken(take, x) for x in (du.k[0], du.q[0], v, du.v[0], u)]
        given += [gate_of(call, gate), taken(take, R), taken(take, P)]
        made = sweep.reverse(p, *given)
        found: Any = zip([*refs, *lasts], [*made[:4], *[made.P] * len(lasts)], strict=True)
        found = [(r, x) for r, x in found if r is not None]
        return [(r._replace(turned=False), x.mT if r.turned else x) for r, x in found]

    return make


def after(fused: Fused) -> tuple[Launch, ...]:
    """Return what a fused step leaves to passes: of hla2 the gradient of the first S.

    It is one of the two that make up Z, of which the kernel keeps the sum.
    """
    *_, dk = fused.launches
    if fused.row != HLA2[0] or not dk.q or not any(dk.end):
        return ()
    return (dk._replace(q=(), o=(), add=False, batch=dk.held),)


def queries(call: Call, fused: Fused) -> Make:
    """Return what makes dq, first token first."""
    first, second = fused.launches
    S, F = (flipped(next(iter(x.start), None)) for x in (second, first))
    ahla = first.v == second.v  # the k of both passes
    v, y = (second.k[0], first.k[0]) if ahla else (first.k[0], first.v[0])

    def make(take: Take, gate: Gate) -> Made:
        from . import hopper_queries as sweep

        if 0 in first.batch:
            return zeros([first.o[0]], take)
        p = sweep.Queries(
            ahla, first.batch, call.request.gate, (second.power, first.power), first.read,
            first.tokens, memory_axis(call, second.v[0].name),
        )  # fmt: skip
        given: Any = [take(x) for x in (second.v[0], v, first.q[0], y, second.q[0])]
        given += [gate_of(call, gate), taken(take, S), taken(take, F)]
        return [(first.o[0], sweep.queries(p, *given))]

    return make


KERNELS: dict[str, Callable[[Call, Fused], Make]] = {
    **{FORWARD.format(x): functools.partial(pair, x) for x in OPERATORS[:2]},
    FORWARD.format("hla3"): triple,
    **dict(zip(HLA2, (reverse, queries), strict=True)),
    **dict(zip(AHLA, (reverse_ahla, queries), strict=True)),
}
