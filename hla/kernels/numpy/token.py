"""One token through a program in NumPy: each state is decayed, updated by one product, then read.

With k, v and the gate g of the token, a state S and its denominator m (of v's column of ones):

    S <- g S + k v'     m <- g m + k w     out = q' S     w of out = q' m

and a strict pass reads before it updates. A donated state is updated where it lies; then it is read
and written once, and nothing of its size is made but k v'.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...core.passes import Shape
from ...core.request import Inputs, Request

Array = Any  # of NumPy


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
    weighs: bool  # the denominator of what it reads is asked for


@functools.lru_cache(maxsize=1024)
def _turns(request: Request) -> tuple[Turn, ...]:
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


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; with ``donate`` in the memory of the given state."""
    turns = _turns(request)
    dtype: Any = request.accumulate
    x = {name: getattr(inputs, name)[..., 0, :].astype(dtype, copy=False) for name in "qkv"}
    if request.scaled:
        x["q"] = x["q"] * request.scale
    given = {} if inputs.state is None else inputs.state._asdict()
    donate = donate and not any(turn.strict for turn in turns)
    donate = donate and _owned(given, inputs, request.state_shapes())
    factors: dict[int, Array] = {}
    before: dict[str, Array | None] = {}
    after: dict[str, Array] = {}
    dens: dict[str, Array] = {}  # denominators of every name that has one but v, whose is 1
    for turn in turns:
        q, k, v, matrix = x[turn.q], x[turn.k], x[turn.v], turn.matrix
        if turn.first:
            gate = _gate(inputs, turn.power, factors)
            before[matrix] = given.get(matrix)
            square = None if gate is None else gate[..., None]
            pair = k[..., :, None], v[..., None, :]
            after[matrix] = _advanced(before[matrix], square, *pair, turn.shape, donate)
            if turn.vector:
                before[turn.vector] = given.get(turn.vector)
                ones = 1 if turn.v == "v" else dens[turn.v][..., None]
                own = before[turn.vector], gate, k, ones, turn.vector_shape
                after[turn.vector] = _advanced(*own, donate)
        states = before if turn.strict else after
        _add(x, turn, _read(q, states[matrix], turn.shape))
        if turn.weighs and turn.vector:
            _add(dens, turn, _weight(q, states[turn.vector], turn.vector_shape))
    o = x["o"]
    if request.normalize:
        o = o / (dens["o"][..., None] + request.eps)
    kind: Any = request.state_type
    return o[..., None, :].astype(inputs.v.dtype, copy=False), kind(**after)


def _add(results: dict[str, Array], turn: Turn, x: Array) -> None:
    x = x if turn.factor == 1 else turn.factor * x
    results[turn.out] = results[turn.out] + x if turn.out in results else x


def _owned(given: dict[str, Array], inputs: Inputs, shapes: Mapping[str, Shape]) -> bool:
    """Whether each field of a state is whole, contiguous memory of its own that may be written."""
    fields = list(given.values())
    others = [*fields, *(x for x in inputs[:5] if x is not None)]
    return all(x.flags.carray and x.shape == shapes[name] for name, x in given.items()) and not any(
        np.may_share_memory(x, y) for i, x in enumerate(fields) for y in others[i + 1 :]
    )


def _gate(inputs: Inputs, power: int, factors: dict[int, Array]) -> Array | None:
    """Return the decay of this token for states of one power, (*batch, 1)."""
    if not power or (inputs.decay is None and inputs.log_gate is None):
        return None
    if power not in factors:
        a: Any = inputs.log_gate
        g: Any = inputs.decay
        factors[power] = np.exp(power * a) if g is None else (g**power)[..., None]
    return factors[power]


def _advanced(
    before: Array | None, gate: Array | None, k: Array, v: Any, shape: Shape, donate: bool
) -> Array:
    """Return gate * before + k * v, of its full shape."""
    if before is None:
        return np.multiply(k, v, out=np.empty(shape, k.dtype))
    new = before if donate else np.empty(shape, k.dtype)
    if gate is None:
        return np.add(before, k * v, out=new)
    np.multiply(before, gate, out=new)
    return np.add(new, k * v, out=new)


def _read(q: Array, state: Array | None, shape: Shape) -> Array:
    if state is None:
        return np.zeros((*shape[:-2], shape[-1]), q.dtype)
    return (q[..., None, :] @ state)[..., 0, :]


def _weight(q: Array, state: Array | None, shape: Shape) -> Array:
    if state is None:
        return np.zeros(shape[:-1], q.dtype)
    return np.vecdot(q, state)
