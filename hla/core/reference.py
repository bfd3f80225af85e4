"""Reference forward and backward of every `form`, over any array library.

chunked, recurrent and dense are one pass at chunk widths w, 1 and T; associative is the paper's
two-level exclusive scan (its Algorithms 1 and 4) with the operator's own combine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import associative
from .fields import aligned, gradient_fields, joined, split
from .namespace import Array, library_of, namespace, padded, sum_to
from .passes import CHUNK, Gate, Shape, broadcast
from .programs import all_shapes
from .request import Inputs, Request
from .run import CORE, GATE, Engine, Env

FORMS = ("chunked", "recurrent", "associative", "dense")


class Gradients(NamedTuple):
    """Gradients of a call, each of the shape of what it is the gradient of.

    dq, dk and dv have the dtype of q, k and v; ddecay and dlog_gate are float32, or float64 for
    float64 inputs; dinitial_state is a state, packed where the given one was. The last three are
    None where nothing, or a number, was given.
    """

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


def accumulated(request: Request, inputs: Inputs, engine: Engine = CORE) -> tuple[Env, Gate]:
    """Return inputs and states by name in the accumulation dtype, and the gate.

    q is scaled unless the engine does it.
    """
    xp = namespace(inputs.q)
    dtype = getattr(xp, request.accumulate)
    q, k, v = (xp.astype(x, dtype, copy=False) for x in inputs[:3])
    if request.scaled and not engine.scales:
        q = q * request.scale
    gate = Gate(inputs.decay, inputs.log_gate)
    if library_of(q).meshes:
        q, k, v, *given = aligned(request, (q, k, v, *gate.arrays))
        gate = gate.of(given)
    v = padded(v, -1, after=1, fill=1.0) if request.ones else v
    return {"q": q, "k": k, "v": v} | joined(request, inputs.state), gate


def forward(
    request: Request, inputs: Inputs, engine: Engine = CORE
) -> tuple[Array, Any, Env | None]:
    """Compute a request in its form.

    Parameters
    ----------
    request : Request
        The call.
    inputs : Inputs
        Its arrays.
    engine : Engine
        What runs the programs; core's own, or a backend's.

    Returns
    -------
    o : array, (*batch, T, V), v's dtype
    state : NamedTuple or None
    env : dict or None
        What `backward` needs, by name.
    """
    if request.form == "associative":
        plain = dataclasses.replace(request, normalize=False, return_state=False)
        values, gate = accumulated(plain, inputs)
        out, state = associative.scan(request, values, gate, inputs.state, width(request))
        state = state if request.return_state else None
        return _finish(request, inputs, out if request.ones else out[..., :-1]), state, None
    env, steps = _run(request, inputs, engine), request.program.steps
    state = None
    if request.return_state:
        assert request.state_type is not None
        finals = {s.state: env[s.end] for s in steps if s.end}
        state = request.state_type(**split(finals, request.state_shapes()))
    return _finish(request, inputs, env["o"]), state, env


def _run(request: Request, inputs: Inputs, engine: Engine) -> Env:
    values, gate = accumulated(request, inputs, engine)
    steps = request.alive(request.program.steps, inputs.state is not None)
    return engine.run(steps, values, gate, keep=request.gradient, **_options(request, engine))


def _options(request: Request, engine: Engine) -> dict[str, Any]:
    return {"chunk": width(request)} | ({"scale": request.scale} if engine.scales else {})


def saved_names(request: Request) -> tuple[str, ...]:
    """Name what `backward` needs beside the inputs."""
    return () if request.form == "associative" else request.saved(request.program.steps)


def saved(request: Request, env: Env | None) -> tuple[Array, ...]:
    """Return the arrays of `saved_names`; `restored` undoes it."""
    return () if env is None else tuple(env[name] for name in saved_names(request))


def restored(request: Request, saved: Sequence[Array]) -> Env | None:
    """Return what was `saved`, by name; None where nothing was to be."""
    kept = request.gradient and request.form != "associative"
    return dict(zip(saved_names(request), saved, strict=True)) if kept else None


def shapes(request: Request) -> tuple[Shape, tuple[Shape, ...], tuple[Shape, ...]]:
    """Shapes of the output, of the state's fields where requested, and of what is `saved`."""
    kind: Any = request.state_type
    given = [request.q_shape, request.k_shape, request.v_shape]
    o = (*broadcast(*(x[:-2] for x in given)), request.tokens, request.v_shape[-1])
    fields = request.state_shapes()
    state = tuple(fields[x] for x in kind._fields) if request.return_state else ()
    given[2] = (*given[2][:-1], given[2][-1] + request.ones)
    named = dict(zip("qkv", given, strict=True))
    values, _ = all_shapes(request.program.steps, named, request.gate_batch)
    return o, state, tuple(values[name] for name in saved_names(request))


def _finish(request: Request, inputs: Inputs, out: Array) -> Array:
    """Divide by the denominator where requested and return to the caller's dtype."""
    xp = namespace(out)
    if request.normalize:
        out = out[..., :-1] / (out[..., -1:] + request.eps)
    elif request.ones:
        out = out[..., :-1]
    return xp.astype(out, inputs.v.dtype, copy=False)


def backward(
    request: Request,
    inputs: Inputs,
    env: Mapping[str, Array] | None,
    do: Array | None,
    dstate: Any,
    engine: Engine = CORE,
) -> Gradients:
    """Gradients of `forward` by the programs' adjoints.

    Parameters
    ----------
    request, inputs, env, engine
        As given to and returned by `forward`, of ``env`` at least what is `saved`.
    do : array, (*batch, T, V), or None
        Gradient of the output.
    dstate : NamedTuple of arrays or None, or None
        Gradient of the final state.
    """
    if env is None:  # the associative form has the chunked form's gradient
        request = dataclasses.replace(request, form="chunked")
        env = _run(request, inputs, engine)
    values, gate = accumulated(request, inputs, engine)
    values = dict(env) | values | joined(request, dstate, gradient=True)
    if do is not None:
        values["d.o"] = _unfinish(request, values, do)
    found = engine.pull(
        request.alive(request.program.steps, inputs.state is not None),
        values,
        gate,
        with_gate=request.gate_given,
        **_options(request, engine),
    )
    dq, dk, dv = (
        found[f"d.{x}"] if f"d.{x}" in found else namespace(values[x]).zeros_like(values[x])
        for x in "qkv"
    )
    if request.scaled and not engine.scales:
        dq = dq * request.scale
    dv = dv[..., :-1] if request.ones else dv
    gates = gate_gradients(gate, found.get(GATE))
    grads = (dq, dk, dv, *gates, gradient_fields(request, inputs.state, found))
    return Gradients(*(_of_input(*x) for x in zip(grads, inputs, strict=True)))


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


def _unfinish(request: Request, values: Env, do: Array) -> Array:
    """Gradient of the program's output from that of o."""
    xp, like = namespace(values["q"]), values["q"]
    do = xp.astype(do, like.dtype, copy=False)
    if not request.normalize:
        return padded(do, -1, after=1) if request.ones else do
    out = values["o"]
    dnum = do / (out[..., -1:] + request.eps)
    dden = -xp.sum(dnum * out[..., :-1], axis=-1, keepdims=True) / (out[..., -1:] + request.eps)
    return xp.concat([dnum, dden], axis=-1)


def summarize(request: Request, inputs: Inputs) -> Any:
    """Summary of a whole sequence as one segment, in the accumulation dtype."""
    values, gate = accumulated(request, inputs)
    return associative.segment(request, values, gate, chunk=width(request))
