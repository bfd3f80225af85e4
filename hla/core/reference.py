"""One request in each of its forms, over any array library.

chunked, recurrent and dense are one pass at chunk widths w, 1 and T; associative is the paper's
two-level exclusive scan (its Algorithms 1 and 4) with the operator's own combine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import associative
from .adjoint import CORE, Engine, sum_to
from .fields import Keyed, aligned, gradient_fields, joined, split
from .namespace import Array, library_of, namespace
from .passes import CHUNK, Gate, Shape, broadcast
from .programs import Trace, all_shapes, final_states, summed, with_ones
from .request import Inputs, Request

FORMS = ("chunked", "recurrent", "associative", "dense")


class Gradients(NamedTuple):
    """Gradients of a call; None for what was not given as an array."""

    dq: Array
    dk: Array
    dv: Array
    ddecay: Array | None
    dlog_gate: Array | None
    dinitial_state: Any


def width(request: Request) -> int:
    """Return the tokens in a chunk."""
    widths = {"recurrent": 1, "dense": request.tokens or 1}
    return widths.get(request.form or "chunked", request.chunk_size or CHUNK)


def accumulated(request: Request, inputs: Inputs) -> tuple[dict[str, Array], Gate, Keyed]:
    """Return inputs in the accumulation dtype, q scaled; the gate; states by their fields."""
    xp = namespace(inputs.q)
    dtype = getattr(xp, request.accumulate)
    q, k, v = (xp.astype(x, dtype, copy=False) for x in inputs[:3])
    if request.scaled:
        q = q * request.scale
    gate = Gate(inputs.decay, inputs.log_gate)
    if library_of(q).meshes:
        q, k, v, *given = aligned(request, (q, k, v, *gate.arrays))
        gate = gate.of(given)
    values = {"q": q, "k": k, "v": with_ones(v) if request.mass else v}
    return values, gate, joined(request, inputs.state)


def forward(
    request: Request, inputs: Inputs, engine: Engine = CORE
) -> tuple[Array, Any, Trace | None]:
    """Compute a request in its form.

    Parameters
    ----------
    request : Request
        What is asked.
    inputs : Inputs
        Its arrays.
    engine : Engine
        What runs the programs; core's own, or a backend's.

    Returns
    -------
    o : array, (*batch, T, V), v's dtype
    state : NamedTuple or None
    trace : Trace or None
        What `backward` needs.
    """
    if request.form == "associative":
        plain = dataclasses.replace(request, normalize=False, return_state=False)
        values, gate, _ = accumulated(plain, inputs)
        out, state = associative.scan(request, values, gate, inputs.state, width(request))
        out, trace = out if request.mass else out[..., :-1], None
        state = state if request.return_state else None
    else:
        out, trace = _run(request, inputs, engine)
        finals = final_states(request.program, trace)
        state = None
        if request.return_state:
            assert request.state_type is not None
            state = request.state_type(**split(finals, request.state_shapes()))
    return _finish(request, inputs, out), state, trace


def _run(request: Request, inputs: Inputs, engine: Engine) -> tuple[Array, Trace]:
    values, gate, initial = accumulated(request, inputs)
    return engine.run(
        request.program, values, gate, initial, chunk=width(request), keep=request.gradient
    )


def saved(request: Request, trace: Trace | None) -> tuple[Array, ...]:
    """Return what `backward` needs of a trace beside the inputs; `restored` undoes it."""
    if trace is None or not request.gradient:
        return ()
    assert not trace.kept, "core's engine keeps nothing else"
    return tuple(trace.values[s.out] for s in request.program.steps)


def restored(request: Request, inputs: Inputs, saved: Sequence[Array]) -> Trace | None:
    """Return the trace that was `saved`."""
    if not saved:
        return None
    steps = request.program.steps
    values, _, _ = accumulated(request, inputs)
    return Trace(values | {s.out: x for s, x in zip(steps, saved, strict=True)}, ())


def shapes(request: Request) -> tuple[Shape, tuple[Shape, ...], tuple[Shape, ...]]:
    """Shapes of the output, of the state's fields where asked, and of what is `saved`."""
    kind: Any = request.state_type
    given = [request.q_shape, request.k_shape, request.v_shape]
    o = (*broadcast(*(x[:-2] for x in given)), request.tokens, request.v_shape[-1])
    fields = request.state_shapes()
    state = tuple(fields[x] for x in kind._fields) if request.return_state else ()
    if request.form == "associative" or not request.gradient:
        return o, state, ()
    given[2] = (*given[2][:-1], given[2][-1] + request.mass)
    named = dict(zip("qkv", given, strict=True))
    values, _ = all_shapes(request.program, named, request.gate_batch)
    return o, state, tuple(values[s.out] for s in request.program.steps)


def _finish(request: Request, inputs: Inputs, out: Array) -> Array:
    """Divide by the denominator where asked and return to the caller's dtype."""
    xp = namespace(out)
    if request.normalize:
        out = out[..., :-1] / (out[..., -1:] + request.eps)
    elif request.mass:
        out = out[..., :-1]
    return xp.astype(out, inputs.v.dtype, copy=False)


def backward(
    request: Request,
    inputs: Inputs,
    trace: Trace | None,
    do: Array | None,
    dstate: Any,
    engine: Engine = CORE,
) -> Gradients:
    """Gradients of `forward` by the programs' adjoints.

    Parameters
    ----------
    request, inputs, trace, engine
        As given to and returned by `forward`.
    do : array, (*batch, T, V), or None
        Gradient of the output.
    dstate : NamedTuple of arrays or None, or None
        Gradient of the final state.
    """
    if trace is None:  # the associative form has the chunked form's gradient
        request = dataclasses.replace(request, form="chunked")
        _, trace = _run(request, inputs, engine)
    xp = namespace(inputs.q)
    values, gate, initial = accumulated(request, inputs)
    dtype = values["q"].dtype
    dout = _unfinish(request, trace, values, do)
    dfinal = joined(request, _cast_state(xp, dstate, dtype), gradient=True)
    options = {"with_gate": request.gate_given, "chunk": width(request)}
    grads = engine.adjoint(request.program, trace, gate, initial, dout, dfinal, **options)
    dq, dk, dv = (grads.values[x] for x in "qkv")
    if request.scaled:
        dq = dq * request.scale
    dv = dv[..., :-1] if request.mass else dv
    gates = gate_gradients(gate, grads.gate)
    dinitial = gradient_fields(request, inputs.state, grads.states)
    return Gradients(
        *(_of_input(*x) for x in zip((dq, dk, dv, *gates, dinitial), inputs, strict=True))
    )


def _of_input(grad: Any, x: Any) -> Any:
    """Return the gradient of an input from that of the input as `accumulated` brings it."""
    if grad is None:
        return None
    if isinstance(x, tuple):
        return type(x)(*map(_of_input, grad, x))
    grad = namespace(x).astype(sum_to(grad, x.shape), x.dtype, copy=False)
    return library_of(x).laid_back(grad, x)


def gate_gradients(gate: Gate, grad: Array | None) -> tuple[Array | None, Array | None]:
    """Gradients of decay and log_gate from that of the gate; 0 where its logarithm is -inf."""
    if grad is None or gate.log_gate is None:
        return grad, None
    xp = namespace(grad)
    return None, xp.where(xp.isinf(gate.log_gate), xp.zeros_like(grad), grad)


def _unfinish(request: Request, trace: Trace, values: dict[str, Array], do: Array | None) -> Array:
    """Gradient of the program's output from that of o."""
    xp, out = namespace(values["q"]), summed(request.program, trace.values)
    assert out is not None
    if do is None:
        return xp.zeros_like(out)
    do = xp.broadcast_to(xp.astype(do, out.dtype), (*out.shape[:-1], do.shape[-1]))
    if not request.mass:
        return do
    if not request.normalize:
        return xp.concat([do, xp.zeros_like(out[..., -1:])], axis=-1)
    dnum = do / (out[..., -1:] + request.eps)
    dden = -xp.sum(dnum * out[..., :-1], axis=-1, keepdims=True) / (out[..., -1:] + request.eps)
    return xp.concat([dnum, dden], axis=-1)


def _cast_state(xp: Any, state: Any, dtype: Any) -> Any:
    if state is None:
        return None
    return type(state)(*(None if x is None else xp.astype(x, dtype) for x in state))


def summarize(request: Request, inputs: Inputs) -> Any:
    """Summary of a whole sequence as one segment, in the accumulation dtype."""
    values, gate, _ = accumulated(request, inputs)
    return associative.segment(request, values, gate, chunk=width(request))
