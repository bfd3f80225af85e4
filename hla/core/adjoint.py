"""The adjoint of a program, step by step backwards, and the engines that run both (derivations 4).

The adjoint of one pass is three passes: dq = pass(do, v, k), dk = reverse(v, do, q) and
dv = reverse(k, q, do), where reverse is the transposed map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .namespace import Array, fold, namespace, triangle
from .passes import (
    CHUNK,
    Fields,
    Gate,
    Pass,
    Shape,
    Weights,
    begun,
    cut_short,
    pieces,
    rows,
    slopes,
    token_pass,
    weights,
    weights_adjoint,
)
from .programs import (
    Program,
    RunPass,
    Trace,
    prune,
    run,
    run_passes,
    run_single,
    weighted,
)
from .programs import adjoint as adjoint_program


class Adjoint(NamedTuple):
    """Gradients of q, k, v, of the incoming states and of the gate, the last two where asked."""

    values: dict[str, Array]
    states: dict[Fields, Array]
    gate: Array | None


class Pulled(NamedTuple):
    """Gradients of one pass: q, k, v, the state that it starts from, and, where asked, the gate."""

    q: Array
    k: Array
    v: Array
    state: Array | None  # as wide as the output's batch
    gate: Array | None  # of the gate's shape


Pull = Callable[..., Pulled]


def pull_pass(
    s: Pass,
    gate: Gate,
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    start: Array | None,
    end: Array | None,
    *,
    chunk: int = CHUNK,
    with_gate: bool,
) -> Pulled:
    """Pull a gradient back through one pass: a sweep forward for dq, one backward for the rest.

    In a chunk with S the state before it, R the gradient of the state after it and the weights
    L, a, b, r of `passes`, A = q k' and dA = do v',

        dq = (L * dA) k + a * (do S')        dk = (L * dA)' q + b * (v R')
        dv = (L * A)' do + (b * k) R         R <- r R + (a * q)' do

    The gradients of L, a, b and r are A * dA, q.(do S'), k.(v R') and <S, R>.

    Parameters
    ----------
    s, gate
        The pass and its decay.
    q, k, v : array, (*batch, T, features)
        What it read.
    do : array, (*batch, T, V)
        Gradient of what it returned, of its whole batch.
    start, end : array or None
        State that it started from; gradient of the one that it left.
    chunk : int
        Tokens in a chunk.
    with_gate : bool
        Whether the gate's gradient is asked.

    Returns
    -------
    Pulled
    """
    if s.kind == "full":
        R = q.mT @ do
        return Pulled(do @ (k.mT @ v).mT, v @ R.mT, k @ R, None, None)
    xp, S, R = namespace(q), begun(start, k, v, gate), begun(end, q, do, gate)
    with_gate, each, T = with_gate and s.power > 0, (s.power, s.kind), k.shape[-2]
    late = -1 if s.kind == "strict" else 0
    given = [q, k, v, do]
    if gate.log_gate is not None:
        given.append(gate.log_gate[..., None])
    cuts, ends = pieces(given, chunk)
    widths = {cut[0].shape[-2] for cut in cuts}
    fixed = {W: weights(gate, *each, W, like=k) for W in widths if gate.log_gate is None}
    slope = {W: slopes(gate, *each, W, like=k) for W in fixed if with_gate}

    def legal(x: Array) -> Array:
        return triangle(x, late, upper=False)

    def weighed(xs: Sequence[Array]) -> tuple[Weights, Weights | None]:
        W = xs[0].shape[-2]
        w = fixed[W] if fixed else weights(Gate(log_gate=xs[4][..., 0]), *each, W, like=k)
        if ends is None:
            return w, slope.get(W)
        tokens = xs[-1][0, 0]
        short = slopes(gate, *each, W, like=k, tokens=tokens) if with_gate else None
        return cut_short(w, gate, s.power, tokens), short

    def ahead(S: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        q, k, v, do = xs[:4]
        w, _ = weighed(xs)
        into = do @ S.mT  # [W, D]
        dq = legal(_times(do @ v.mT, w.pair)) @ k + _times(into, w.query)
        kept = (xp.sum(q * into, axis=-1, keepdims=True), S) if with_gate else ()
        return _times(S, w.total) + _times(k, w.key).mT @ v, (dq, *kept)

    def back(R: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        (query, S), xs = (xs[:2], xs[2:]) if with_gate else ((None, None), xs)
        q, k, v, do = xs[:4]
        w, short = weighed(xs)
        A, dA, into = q @ k.mT, do @ v.mT, v @ R.mT
        dk = legal(_times(dA, w.pair)).mT @ q + _times(into, w.key)
        dv = legal(_times(A, w.pair)).mT @ do + _times(k, w.key) @ R
        grads: tuple[Array, ...] = (dk, dv)
        if with_gate:
            key = xp.sum(k * into, axis=-1, keepdims=True)
            total = xp.sum(S * R, axis=(-2, -1), keepdims=True)
            dw = Weights(w.mask, legal(A * dA), query, key, total)
            d = weights_adjoint(*each, w, short, dw)
            grads = (dk, dv, sum_to(d, (*gate.batch, *d.shape[-2:])))
        return _times(R, w.total) + _times(q, w.query).mT @ do, grads

    more = () if ends is None else (ends,)
    kept: list[tuple[Array, ...]] = []
    for cut in cuts:
        xs = (*cut, *more)
        S, outs = fold(ahead, S, xs, axes=(-3,) * len(xs), out_axis=-3)
        kept.append(outs)
    pulled: list[tuple[Array, ...]] = []
    for cut, (_, *read) in zip(reversed(cuts), reversed(kept), strict=True):
        xs = (*read, *cut, *more)
        R, outs = fold(back, R, xs, axes=(-3,) * len(xs), out_axis=-3, reverse=True)
        pulled.append(outs)
    dq = rows([x[0] for x in kept], T)
    dk, dv, *dgate = zip(*reversed(pulled), strict=True)
    dgates = [rows(x) for x in dgate]  # of a decay one of each chunk
    if dgates:
        (d,) = dgates
        d = xp.sum(d, axis=(-2, -1)) if gate.log_gate is None else d[..., :T, 0]
    return Pulled(dq, rows(dk, T), rows(dv, T), R, d if dgates else None)


def _times(x: Array, weight: Array | None) -> Array:
    return x if weight is None else x * weight


def adjoint(
    program: Program,
    trace: Trace,
    gate: Gate,
    initial: Mapping[Fields, Array],
    do: Array,
    dfinal: Mapping[Fields, Array],
    *,
    with_gate: bool,
    chunk: int = CHUNK,
    pull: Pull = pull_pass,
) -> Adjoint:
    """Run a program's adjoint: every step backwards, last first.

    Parameters
    ----------
    program, trace, gate, initial, chunk
        As in and, with ``keep``, from `run`.
    do : array
        Gradient of the output, (*batch, T, V) with the column of the denominator where v has one.
    dfinal : mapping
        Gradients of final states by their fields.
    with_gate : bool
        Whether the gate's gradient is asked.
    pull : callable
        `pull_pass`, or what stands in for it.

    Returns
    -------
    Adjoint
    """
    grads: dict[str, Array] = {}
    dinitial: dict[Fields, Array] = {}
    dgate, pending, xp = None, dict(dfinal), namespace(do)
    for coefficient, name in program.outputs:
        dout = weighted(coefficient, do)
        grads[name] = sum_to(dout, trace.values[name].shape)  # a term may have fewer batch axes
    for s in reversed(program.steps):
        dout, dstate = grads.pop(s.out, None), pending.pop(s.state, None)
        if dout is None and dstate is None:
            continue
        if dout is None:
            dout = xp.zeros_like(trace.values[s.out])
        read = [trace.values[name] for name in (s.q, s.k, s.v)]
        start, end = initial.get(s.state), shared_out(dstate, trace.values[s.out].shape)
        found = pull(s, gate, *read, dout, start, end, chunk=chunk, with_gate=with_gate)
        for name, x, g in zip((s.q, s.k, s.v), read, found, strict=False):
            g = sum_to(g, x.shape)
            grads[name] = grads[name] + g if name in grads else g
        if start is not None:
            g = sum_to(found.state, start.shape)
            dinitial[s.state] = dinitial[s.state] + g if s.state in dinitial else g
        if found.gate is not None:
            dgate = found.gate if dgate is None else dgate + found.gate
    return Adjoint(grads, dinitial, dgate)


def shared_out(dstate: Array | None, out: Shape) -> Array | None:
    """Share a state's gradient among the batch entries that the state was broadcast to."""
    if dstate is None:
        return None
    copies = math.prod(out[:-2]) // (math.prod(dstate.shape[:-2]) or 1)
    return dstate / copies if copies > 1 else dstate


class Engine(NamedTuple):
    """What runs programs: `run` and `adjoint`, or a backend's own with the same signatures."""

    run: Callable[..., tuple[Any, Trace]]
    adjoint: Callable[..., Adjoint]


CORE = Engine(run, adjoint)
ONE_TOKEN = Engine(functools.partial(run_passes, run_pass=token_pass), adjoint)


PULLED = ("d.q", "d.k", "d.v", "d.S@0")


def by_passes(run_pass: RunPass) -> Engine:
    """Return the engine of a backend whose only kernel is the pass: the adjoint is its program."""

    def pull(s: Pass, gate: Gate, *arrays: Any, chunk: int = CHUNK, with_gate: bool) -> Pulled:
        there = zip(("q", "k", "v", "d.o", "S@0", "d.S@T"), arrays, strict=True)
        values = {name: x for name, x in there if x is not None}
        one = Pass("o", "q", "k", "v", s.state, s.power, s.kind, start="S@0", end="S@T")
        steps, _ = prune(adjoint_program((one,)), values, PULLED)
        found = run_single(steps, values, gate, chunk=chunk, run_pass=run_pass)
        dq, dk, dv, dstart = (found.get(name) for name in PULLED)
        dgate = None
        if with_gate:
            dgate = pull_pass(s, gate, *arrays, chunk=chunk, with_gate=True).gate
        return Pulled(dq, dk, dv, dstart, dgate)

    return Engine(
        functools.partial(run_passes, run_pass=run_pass), functools.partial(adjoint, pull=pull)
    )


def sum_to(x: Array, shape: Shape) -> Array:
    """Sum ``x`` over the axes along which ``shape`` was broadcast to it."""
    extra = len(x.shape) - len(shape)
    axes = tuple(range(extra)) + tuple(
        i + extra for i, n in enumerate(shape) if n == 1 and x.shape[i + extra] != 1
    )
    if not axes:
        return x
    xp = namespace(x)
    return xp.reshape(xp.sum(x, axis=axes), shape)
