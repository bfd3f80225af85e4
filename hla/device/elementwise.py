"""The steps between launches in any array library's namespace, for a device that has no better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.passes import Gate, Shape
from .scan import Call, Do
from .steps import Border, Carry, Divide, Fading, GateGradient, GateSum, Ref, Skew, Step, Sum

Array = Any
Take = Callable[[Ref], Array]  # what a reference means
Made = list[tuple[Ref, Array]]
Put = Callable[[Array, Ref, Array], Array]  # a result in its part of an array; that array
FORGOTTEN = 2.0**-24  # of a product: below what float32 sums of it resolve
LEAST = 1e-30  # what stands for a smaller decay


def taking(call: Call, arrays: list[Array]) -> Take:
    """Return what takes the array, or the view of one, that a reference means."""

    def take(ref: Ref) -> Array:
        x = arrays[call.slots[ref.name]]
        x = x if x.ndim == len(call.layouts[ref.name].shape) else x[..., None]
        return part(x, ref)

    return take


def part(x: Array, ref: Ref) -> Array:
    """Return the part of an array that a reference to it means."""
    x = x.mT if ref.turned else x
    x = x if ref.rows is None else x[..., slice(*ref.rows), :]
    return x if ref.columns is None else x[..., slice(*ref.columns)]


def gate_of(call: Call, arrays: list[Array]) -> Gate:
    """Return the gate of a call."""
    if call.request.gate is None:
        return Gate()
    x = arrays[call.slots["gate"]]
    return Gate(decay=x) if call.request.gate == "decay" else Gate(log_gate=x)


def does(call: Call, make: Callable[[Take, Gate], Made], put: Put) -> Do:
    """Return what puts the arrays that a function makes of a step's into their places."""

    def do(arrays: list[Array], addresses: list[Any], stream: Any) -> None:
        for ref, x in make(taking(call, arrays), gate_of(call, arrays)):
            slot = call.slots[ref.name]
            arrays[slot] = put(arrays[slot], ref, x)

    return do


def elementwise(xp: Any, call: Call, step: Step, put: Put) -> Do:
    """Return what does a step between launches."""
    make = ELEMENTWISE[type(step)]
    return does(call, lambda take, gate: make(xp, step, take, gate), put)


def fit(xp: Any, x: Array, shape: Shape) -> Array:
    """Sum x over the axes where ``shape`` has 1 or none, then broadcast to it."""
    if x.shape == shape:
        return x
    extra = max(0, x.ndim - len(shape))
    axes = tuple(range(extra)) + tuple(
        i for i in range(extra, x.ndim) if shape[i - x.ndim] == 1 and x.shape[i] != 1
    )
    x = xp.sum(x, axis=axes, keepdims=True) if axes else x
    return xp.broadcast_to(xp.reshape(x, x.shape[extra:]), shape)


def total(xp: Any, s: Sum, take: Take, gate: Gate) -> Made:
    """Do a Sum."""
    o = take(s.o)
    result = xp.zeros(o.shape, dtype=o.dtype)
    for i, (factor, ref) in enumerate(s.terms):
        x = fit(xp, take(ref), o.shape)
        x = x if factor == 1 else factor * x
        result = result + x if i else x
    return [(s.o, result)]


def divide(xp: Any, s: Divide, take: Take, gate: Gate) -> Made:
    """Do a Divide."""
    den = take(s.den) + s.eps
    o = take(s.x) / den
    if s.num is None or s.dden is None:
        return [(s.o, o)]
    return [(s.o, o), (s.dden, -xp.sum(o * take(s.num), axis=-1, keepdims=True) / den)]


def gate_gradient(xp: Any, s: GateGradient, take: Take, gate: Gate) -> Made:
    """Do a GateGradient, chunk by chunk of all periods at once.

    What crosses a chunk's start is carried from the border before a period, is gone where a chunk's
    gate leaves nothing, and what is missing at the border behind is added along the way:
    differences, which lose digits, are taken of no more than the chunks of a period. No rounded
    product is an addend: a compiler might round it or not, as the shape has it.
    """
    batch, *dots = take(s.o).shape[:-1], take(s.reads), take(s.writes)
    c, w = (xp.sum(x, axis=-2) if x.shape[-2] > 1 else x[..., 0, :] for x in dots)
    T = c.shape[-1]
    d, query = w[..., :T], w[..., T:]  # d with what its pairs sum to by key
    periods, per = -(-T // s.period), s.period // s.chunk
    valid = xp.ones(c.shape, dtype=c.dtype)

    def chunks(x: Array) -> Array:
        none = xp.zeros((*batch, periods * s.period - T), dtype=x.dtype)
        x = xp.concat([xp.broadcast_to(x, (*batch, T)), none], axis=-1)
        return xp.reshape(x, (*batch, periods, per, s.chunk))

    c, d, query, valid = map(chunks, (c, d, query, valid))
    read, written = xp.sum(xp.stack([c, d - query]), axis=-1)
    a = take(s.gate)
    if gate.decay is None:
        log = xp.sum(chunks(a), axis=-1)
    else:
        lengths = [max(0, min(s.chunk, T - i * s.chunk)) for i in range(periods * per)]
        lengths = xp.reshape(xp.asarray(lengths, dtype=a.dtype), (periods, per))
        log = xp.log(xp.where(a < LEAST, LEAST, a))[..., None, None] * lengths
    B = (xp.zeros(batch, dtype=c.dtype) if s.border is None else take(s.border))[..., None]
    if s.met is not None:
        B = xp.concat([B, xp.sum(take(s.met), axis=-1)], axis=-1)
    elif s.S is not None and s.R is not None:
        later = xp.sum(take(s.S) * take(s.R).mT, axis=(-2, -1))
        B = xp.concat([B, s.factor * later], axis=-1)
    # What is missing at the border behind a period, and from which chunk on it came to miss.
    count = [-(-min(T - i * s.period, s.period) // s.chunk) for i in range(periods)]
    after = xp.concat([B[..., 1:], xp.zeros((*batch, 1), dtype=B.dtype)], axis=-1)
    kept = xp.exp(s.power * log) >= FORGOTTEN

    def passed(B: Array, i: int) -> Array:
        """Return what crosses all of a chunk, of what crosses its start."""
        return xp.where(kept[..., i], B - read[..., i], xp.zeros_like(B))

    carried, begin = B, xp.zeros_like(B)
    for i in range(per):
        carried = passed(carried, i) + written[..., i]
        begin = xp.where(kept[..., i], begin, xp.full_like(B, i + 0.5))
    known = xp.asarray([s.ends or i < periods - 1 for i in range(periods)])
    each = (after - carried) / (xp.asarray(count, dtype=B.dtype) - begin)
    missing = xp.where(known, each, xp.zeros_like(B))
    through, share = [], xp.zeros_like(B)  # of what is missing, by the middle of a chunk
    for i in range(per):
        into = passed(B, i)
        B = into + written[..., i]
        share = share + missing if i else 0.5 * missing
        share = xp.where(i + 0.5 > begin, share, xp.zeros_like(B))
        through.append(into + share)
    own = d - (c + query)  # what a token makes of the next one's
    before = xp.cumulative_sum(own, axis=-1) - (d if s.strict else own)
    G = (xp.stack(through, axis=-1) + read)[..., None] + before
    G = sum([G] * s.power) * valid
    if gate.log_gate is None:
        return [(s.o, xp.sum(G, axis=(-2, -1)))]
    return [(s.o, xp.reshape(G, (*batch, periods * s.period))[..., :T])]


def border(xp: Any, s: Border, take: Take, gate: Gate, **sums: Any) -> Made:
    """Do a Border, with such options of sums."""
    o = take(s.o)
    terms = (xp.sum(take(S) * take(dS), axis=(-2, -1), **sums) for S, dS in s.pairs)
    return [(s.o, sum(fit(xp, x, o.shape) for x in terms))]


def skew(xp: Any, s: Skew, take: Take, gate: Gate, **sums: Any) -> Made:
    """Do a Skew, with such options of sums.

    Of S - S' it takes what is below the diagonal blocks, and half of what is in them.
    """
    met, S, R = take(s.met), take(s.S), take(s.R)[..., :-1, :, :]
    A, found = (S - S.mT)[..., None, :, :], xp.zeros_like(met[..., 0])
    for i in range(0, S.shape[-1], s.block):
        rows = slice(i, i + s.block)
        below, within = (A[..., rows, x] * R[..., rows, x] for x in (slice(i), rows))
        found = found + xp.sum(below, axis=(-2, -1), **sums)
        found = found + 0.5 * xp.sum(within, axis=(-2, -1), **sums)
    left = xp.exp(s.power * xp.cumulative_sum(take(s.fading)[..., :-1], axis=-1))
    return [(s.met, met + (left * found)[..., None])]


def gate_sum(xp: Any, s: GateSum, take: Take, gate: Gate) -> Made:
    """Do a GateSum."""
    o = take(s.o)
    shape = o.shape if gate.decay is None else (*o.shape, 1)
    result = xp.zeros(shape, dtype=o.dtype)
    for ref in s.terms:
        x = take(ref)
        x = x if gate.decay is None else xp.sum(x, axis=-1, keepdims=True)
        result = result + fit(xp, x, shape)
    if gate.decay is not None:
        return [(s.o, result[..., 0] / xp.where(gate.decay < LEAST, LEAST, gate.decay))]
    return [(s.o, xp.where(xp.isinf(gate.log_gate), xp.zeros_like(result), result))]


def fading(xp: Any, s: Fading, take: Take, gate: Gate) -> Made:
    """Do a Fading."""
    o, firsts = take(s.o), range(0, s.total, s.tokens)
    if gate.log_gate is not None:
        sums = [xp.sum(gate.log_gate[..., i : i + s.tokens], axis=-1) for i in firsts]
        return [(s.o, xp.stack(sums, axis=-1))]
    lengths = xp.asarray([min(s.tokens, s.total - i) for i in firsts], dtype=o.dtype)
    g = take(s.gate)
    return [(s.o, xp.log(xp.where(g < LEAST, LEAST, g))[..., None] * lengths)]


def carry(xp: Any, s: Carry, take: Take, gate: Gate) -> Made:
    """Do a Carry."""
    local = take(s.local)
    count, shape = local.shape[-3], local.shape[:-3] + local.shape[-2:]
    S = xp.zeros(shape, dtype=local.dtype) if s.start is None else take(s.start)
    r = None if s.fading is None else xp.exp(s.power * take(s.fading))[..., None, None]
    before: list[Array] = [None] * count
    for i in reversed(range(count)) if s.reverse else range(count):
        before[i] = xp.broadcast_to(S, shape)
        S = (S if r is None else S * r[..., i, :, :]) + local[..., i, :, :]
    return [(s.o, xp.stack(before, axis=-3))] + ([(s.end, S)] if s.end else [])


ELEMENTWISE: dict[type, Callable[[Any, Any, Take, Gate], Made]] = {
    Sum: total, Divide: divide, Border: border, GateGradient: gate_gradient, Skew: skew,
    GateSum: gate_sum, Fading: fading, Carry: carry,
}  # fmt: skip
