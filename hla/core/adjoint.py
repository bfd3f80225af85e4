"""The adjoint of a program, step by step backwards, and the engines that run both (derivations 4).

The adjoint of one pass is three passes: dq = pass(do, v, k), dk = reverse(v, do, q) and
dv = reverse(k, q, do), where reverse is the transposed map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .namespace import Array, namespace
from .passes import CHUNK, Fields, Gate, Pass, Shape, causal_pass, token_pass
from .programs import Program, RunPass, Trace, run, run_passes


class Adjoint(NamedTuple):
    """Gradients of q, k, v, of the incoming states and of the gate, the last two where asked."""

    values: dict[str, Array]
    states: dict[Fields, Array]
    gate: Array | None


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
    run_pass: RunPass = causal_pass,
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
    run_pass : callable
        `passes.causal_pass`, or a backend's own with the same signature.

    Returns
    -------
    Adjoint
    """
    grads: dict[str, Array] = {}
    dinitial: dict[Fields, Array] = {}
    dgate, pending, xp = None, dict(dfinal), namespace(do)
    for coefficient, name in program.outputs:
        grads[name] = do if coefficient == 1 else coefficient * do
    for s, state in zip(reversed(program.steps), reversed(trace.states), strict=True):
        q, k, v = (trace.values[name] for name in (s.q, s.k, s.v))
        dout, dstate = grads.pop(s.out, None), pending.pop(s.state, None)
        if dout is None and dstate is None:
            continue
        if dout is None:
            dout = xp.zeros_like(trace.values[s.out])
        start, end = initial.get(s.state), shared_out(dstate, trace.values[s.out].shape)
        once = functools.partial(run_pass, gate=gate, power=s.power, kind=s.kind, chunk=chunk)
        back = functools.partial(once, reverse=True)
        dq, _ = once(dout, v, k, state=None if start is None else start.mT)
        dk, _ = back(v, dout, q, state=None if end is None else end.mT)
        dv, dstate0 = back(k, q, dout, state=end)
        if with_gate:
            reads = xp.sum(dout * trace.values[s.out], axis=-1)
            term = gate_gradient(s, gate, reads, xp.sum(v * dv, axis=-1), state, dstate)
            dgate = term if dgate is None else dgate + term
        for name, x, g in ((s.q, q, dq), (s.k, k, dk), (s.v, v, dv)):
            g = sum_to(g, x.shape)
            grads[name] = grads[name] + g if name in grads else g
        if start is not None:
            g = sum_to(dstate0, start.shape)
            dinitial[s.state] = dinitial[s.state] + g if s.state in dinitial else g
    return Adjoint(grads, dinitial, dgate)


def shared_out(dstate: Array | None, out: Shape) -> Array | None:
    """Share a state's gradient among the batch entries that the state was broadcast to."""
    if dstate is None:
        return None
    copies = math.prod(out[:-2]) // max(1, math.prod(dstate.shape[:-2]))
    return dstate / copies if copies > 1 else dstate


def gate_gradient(
    step: Pass, gate: Gate, reads: Array, writes: Array, state: Array, dstate: Array | None
) -> Array:
    """Gradient of the log gate by one pass, p (<dS_T, S_T> + sum_{t>=s} (do.o - v.dv)).

    Parameters
    ----------
    step, gate
        The pass and its decay.
    reads, writes : array, (*batch, T)
        do.o and v.dv token by token.
    state, dstate : array, (*batch, D, V)
        The final state and its gradient; None where that is 0.

    Returns
    -------
    array, (*gate's batch, T)
        For a strict pass the sum of do.o begins one token later.
    """
    xp, batch = namespace(reads), gate.batch
    reads = sum_to(reads, (*batch, reads.shape[-1]))
    if step.kind == "strict":
        reads = xp.concat([reads[..., 1:], xp.zeros_like(reads[..., :1])], axis=-1)
    total = gate_total(reads - sum_to(writes, (*batch, writes.shape[-1])))
    if dstate is not None:
        total = total + sum_to(xp.sum(xp.sum(dstate * state, axis=-1), axis=-1), batch)[..., None]
    return step.power * total


def gate_total(change: Array) -> Array:
    """Sum ``change`` (..., T) over each token and all after it."""
    xp = namespace(change)
    return xp.flip(xp.cumulative_sum(xp.flip(change, axis=-1), axis=-1), axis=-1)


class Engine(NamedTuple):
    """What runs programs: `run` and `adjoint`, or a backend's own with the same signatures."""

    run: Callable[..., tuple[Any, Trace]]
    adjoint: Callable[..., Adjoint]


CORE = Engine(run, adjoint)
ONE_TOKEN = Engine(functools.partial(run_passes, run_pass=token_pass), adjoint)


def by_passes(run_pass: RunPass) -> Engine:
    """Return the engine of a backend whose only kernel is the pass."""
    return Engine(
        functools.partial(run_passes, run_pass=run_pass),
        functools.partial(adjoint, run_pass=run_pass),
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
