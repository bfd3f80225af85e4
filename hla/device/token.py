"""One token through a program: each state is decayed, updated by one product, then read.

With k, v and the gate g of the token, a state S and its part m of the denominator (S of the column
of ones of v):

    S <- g S + k v'     m <- g m + k w     out = q' S     w of out = q' m

and a strict pass reads before it updates. A donated state is updated where it lies; then it is read
and written once, and nothing of its size is made but, at most, k v'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..core.namespace import Array, namespace
from ..core.passes import Shape
from ..core.programs import Program, summed
from ..core.request import Inputs, Request
from ..core.triangle import STATE_OF


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
    mass: str | None  # field of the state
    shape: Shape  # of the matrix
    mass_shape: Shape
    power: int
    strict: bool
    first: bool  # of those that share this state
    weighs: bool  # the mass of what it reads is asked for


@functools.lru_cache(maxsize=1024)
def turns(request: Request) -> tuple[Program, tuple[Turn, ...]]:
    """Return the program of a request, and its passes."""
    program, shapes = request.program, request.state_shapes()
    weighed = {s.v for s in program.steps}
    if request.normalize:
        weighed |= {name for _, name in program.outputs}
    found: list[Turn] = []
    for s in program.steps:
        matrix, mass = s.state[0], s.state[1] if len(s.state) == 2 else None
        first = all(turn.matrix != matrix for turn in found)
        sizes = shapes[matrix], shapes[mass] if mass else ()
        strict, weighs = s.kind == "strict", mass is not None and s.out in weighed
        found.append(
            Turn(s.q, s.k, s.v, s.out, matrix, mass, *sizes, s.power, strict, first, weighs)
        )
    return program, tuple(found)


@functools.lru_cache(maxsize=1024)
def updates(request: Request) -> bool:
    """Whether a state may be updated where it lies: no pass reads what it was before."""
    return not any(turn.strict for turn in turns(request)[1])


class Ops(NamedTuple):
    """What one array library does with a token."""

    cast: Callable[[Array, Any], Array]
    advanced: Callable[[Array | None, Array | None, Array, Any, Shape, bool], Array]
    read: Callable[[Array, Array | None, Shape], Array]
    weight: Callable[[Array, Array | None, Shape], Array]


def run(request: Request, inputs: Inputs, ops: Ops, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; with ``donate`` in the memory of the given state.

    Parameters
    ----------
    request, inputs
        The call.
    ops : Ops
        ``advanced(S, gate, k, v, shape, donate)`` is gate * S + k * v of its full shape, S and the
        gate None where there are none; ``read(q, S, shape)`` is q' S and ``weight(q, m, shape)``
        q' m, zeros of None.
    donate : bool
        Whether `updates`, and the fields are whole and in memory of their own.
    """
    program, passes = turns(request)
    dtype = getattr(namespace(inputs.q), request.accumulate)
    x = {name: ops.cast(getattr(inputs, name)[..., 0, :], dtype) for name in "qkv"}
    if request.scaled:
        x["q"] = x["q"] * request.scale
    given = {} if inputs.state is None else inputs.state._asdict()
    factors: dict[int, Array] = {}
    before: dict[str, Array | None] = {}
    after: dict[str, Array] = {}
    mass: dict[str, Array] = {}  # of every name that has one but v, whose is 1
    for turn in passes:
        q, k, v, matrix = x[turn.q], x[turn.k], x[turn.v], turn.matrix
        if turn.first:
            gate = _gate(inputs, turn.power, factors)
            before[matrix] = given.get(matrix)
            square = None if gate is None else gate[..., None]
            pair = k[..., :, None], v[..., None, :]
            after[matrix] = ops.advanced(before[matrix], square, *pair, turn.shape, donate)
            if turn.mass:
                before[turn.mass] = given.get(turn.mass)
                ones = 1 if turn.v == "v" else mass[turn.v][..., None]
                own = before[turn.mass], gate, k, ones, turn.mass_shape
                after[turn.mass] = ops.advanced(*own, donate)
        states = before if turn.strict else after
        x[turn.out] = ops.read(q, states[matrix], turn.shape)
        if turn.weighs and turn.mass:
            mass[turn.out] = ops.weight(q, states[turn.mass], turn.mass_shape)
    o: Array = summed(program, x)
    if request.normalize:
        den: Array = summed(program, mass)
        o = o / (den[..., None] + request.eps)
    kind: Any = request.state_type
    return ops.cast(o[..., None, :], inputs.v.dtype), kind(**after)


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


def apart(addresses: Sequence[int], sizes: Sequence[int], first: int) -> bool:
    """Whether no array from ``first`` on shares memory with another, by addresses and bytes."""
    spans = [(p, p + n) for p, n in zip(addresses, sizes, strict=True)]
    for i in range(first, len(spans)):
        start, stop = spans[i]
        for a, b in spans[:i]:
            if a < stop and start < b:
                return False
    return True
