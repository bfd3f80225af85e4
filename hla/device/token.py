"""One token through a program: each state is decayed, updated by one product, then read.

With k, v and the gate g of the token, a state S and its part m of the denominator (S of the column
of ones of v):

    S <- g S + k v'     m <- g m + k w     out = q' S     w of out = q' m

and a strict pass reads before it updates. A donated state is updated where it lies; then it is read
and written once, and nothing of its size is made but, at most, k v'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.namespace import Array, namespace
from ..core.passes import Shape
from ..core.request import Inputs, Request
from ..states.packed import STATE_OF


def unpacked(state: Any) -> Any:
    """Return a state unpacked, whether or not it was packed."""
    return state.unpack() if type(state) in STATE_OF else state


class Turn(NamedTuple):
    """One pass: what it reads and writes, by name."""

    q: str
    k: str
    v: str
    out: str
    matrix: str
    vector: str | None  # field of the state, of the denominator
    shape: Shape  # of the matrix
    vector_shape: Shape
    power: int
    strict: bool
    factor: float  # of what is read
    first: bool  # of those that share this state
    weighs: bool  # the denominator of what it reads is requested


@functools.lru_cache(maxsize=1024)
def turns(request: Request) -> tuple[Turn, ...]:
    """Return the passes of a request's program."""
    steps, shapes = request.program.steps, request.state_shapes()
    weighed = {s.v for s in steps} | ({"o"} if request.normalize else set())
    found: list[Turn] = []
    for s in steps:
        matrix, vector = s.state[0], s.state[1] if len(s.state) == 2 else None
        first = all(turn.matrix != matrix for turn in found)
        sizes = shapes[matrix], shapes[vector] if vector else ()
        strict, weighs = s.kind == "strict", vector is not None and s.out in weighed
        one = Turn(
            s.q, s.k, s.v, s.out, matrix, vector, *sizes, s.power, strict, s.read, first, weighs
        )
        found.append(one)
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def updates(request: Request) -> bool:
    """Whether a state may be updated where it lies: no pass reads what it was before."""
    return not any(turn.strict for turn in turns(request))


class Ops(NamedTuple):
    """What one array library does with a token."""

    cast: Callable[[Array, Any], Array]
    advanced: Callable[[Array | None, Array | None, Array, Any, Shape, bool], Array]
    read: Callable[[Array, Array | None, Shape], Array]
    weight: Callable[[Array, Array | None, Shape], Array]
    both: Callable[..., tuple[Array, Array] | None] | None = None


def run(request: Request, inputs: Inputs, ops: Ops, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; with ``donate`` in the memory of the given state.

    Parameters
    ----------
    request, inputs
        The call.
    ops : Ops
        ``advanced(S, gate, k, v, shape, donate)`` is gate * S + k * v of its full shape, S and the
        gate None where there are none; ``read(q, S, shape)`` is q' S and ``weight(q, m, shape)``
        q' m, zeros of None. ``both(S, gate, q, k, v, shape, donate)``, where there is one, advances
        a matrix and reads it, or returns None.
    donate : bool
        Whether `updates`, and the fields are whole and in memory of their own.
    """
    dtype = getattr(namespace(inputs.q), request.accumulate)
    x = {name: ops.cast(getattr(inputs, name)[..., 0, :], dtype) for name in "qkv"}
    if request.scaled:
        x["q"] = x["q"] * request.scale
    given = {} if inputs.state is None else inputs.state._asdict()
    factors: dict[int, Array] = {}
    before: dict[str, Array | None] = {}
    after: dict[str, Array] = {}
    dens: dict[str, Array] = {}  # denominators of every name that has one but v, whose is 1
    for turn in turns(request):
        q, k, v, matrix = x[turn.q], x[turn.k], x[turn.v], turn.matrix
        both = None
        if turn.first:
            gate = _gate(inputs, turn.power, factors)
            before[matrix] = S = given.get(matrix)
            if ops.both and not turn.strict:
                both = ops.both(S, gate, q, k, v, turn.shape, donate)
            if both:
                after[matrix] = both[0]
            else:
                square = None if gate is None else gate[..., None]
                pair = k[..., :, None], v[..., None, :]
                after[matrix] = ops.advanced(S, square, *pair, turn.shape, donate)
            if turn.vector:
                before[turn.vector] = given.get(turn.vector)
                ones = 1 if turn.v == "v" else dens[turn.v][..., None]
                own = before[turn.vector], gate, k, ones, turn.vector_shape
                after[turn.vector] = ops.advanced(*own, donate)
        states = before if turn.strict else after
        _add(x, turn, both[1] if both else ops.read(q, states[matrix], turn.shape))
        if turn.weighs and turn.vector:
            _add(dens, turn, ops.weight(q, states[turn.vector], turn.vector_shape))
    o = x["o"]
    if request.normalize:
        o = o / (dens["o"][..., None] + request.eps)
    kind: Any = request.state_type
    return ops.cast(o[..., None, :], inputs.v.dtype), kind(**after)


def _add(results: dict[str, Array], turn: Turn, x: Array) -> None:
    x = x if turn.factor == 1 else turn.factor * x
    results[turn.out] = results[turn.out] + x if turn.out in results else x


def _gate(inputs: Inputs, power: int, factors: dict[int, Array]) -> Array | None:
    """Return the decay of this token for states of one power, (*batch, 1)."""
    if not power or (inputs.decay is None and inputs.log_gate is None):
        return None
    if power not in factors:
        a: Any = inputs.log_gate
        g: Any = inputs.decay
        factors[power] = namespace(a).exp(power * a) if g is None else (g**power)[..., None]
    return factors[power]


def dense(shape: Shape, strides: Shape) -> bool:
    """Whether no two elements of an array are one."""
    end = 1
    for step, n in sorted(zip(strides, shape, strict=True)):
        if n > 1 and step < end:
            return False
        end = step * (n - 1) + end if n > 1 else end
    return True


def span(shape: Shape, strides: Shape) -> int:
    """Elements from the first to the last of an array, which has no negative strides."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


@functools.lru_cache(maxsize=1024)
def apart(addresses: tuple[int, ...], sizes: tuple[int, ...], first: int) -> bool:
    """Whether no array from ``first`` on shares memory with another, by addresses and bytes."""
    spans = [(p, p + n) for p, n in zip(addresses, sizes, strict=True)]
    for i in range(first, len(spans)):
        start, stop = spans[i]
        for a, b in spans[:i]:
            if a < stop and start < b:
                return False
    return True
