"""One request in each of its forms, over any array library.

chunked, recurrent and dense are one pass at chunk widths w, 1 and T; associative is the paper's
two-level exclusive scan (its Algorithms 1 and 4) with the operator's own combine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import ahla, hla2, hla3, linear, programs, scans
from .algebra import Algebra
from .namespace import Array, device, fold, namespace
from .passes import CHUNK, GROUP, Gate, Shape, broadcast, causal_pass
from .programs import PAPER, RunPass, Trace, final_states, sum_to, with_ones
from .request import Inputs, Request

ALGEBRA: dict[tuple[str, str], Algebra] = {
    (name, mask): getattr(module, mask.upper())
    for name, module in {"linear": linear, "hla2": hla2, "ahla": ahla, "hla3": hla3}.items()
    for mask in ("causal", "prefix")
}
FORMS = ("chunked", "recurrent", "associative", "dense")
Keyed = dict[tuple[str, ...], Array]


class Gradients(NamedTuple):
    """Gradients of a call; None for what was not given as an array."""

    dq: Array
    dk: Array
    dv: Array
    ddecay: Array | None
    dlog_gate: Array | None
    dinitial_state: Any


def refusal(request: Request) -> str | None:
    """Return why no backend can run the form asked for, or None."""
    if request.mask == "none" and request.form in ("recurrent", "associative"):
        return f"mask='none' sees every token at once and has no {request.form} form; use 'chunked'"
    if request.form == "associative" and _algebra(request) is None:
        return (
            "convention='paper' is not an associative scan: its decayed hla2 operator is not "
            "associative and its hla3 recurrence is not the masked sum; use form='chunked'"
        )
    return None


def _algebra(request: Request) -> Algebra | None:
    if request.convention == "exact" or request.mask != "causal" or request.operator not in PAPER:
        return ALGEBRA[request.operator, request.mask]
    return hla2.PAPER if request.operator == "hla2" and request.gate is None else None


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    if request.form == "associative":
        return f"exclusive Blelloch scans within and across chunks of {_width(request)} tokens"
    if request.mask == "none":
        return f"{len(request.program.steps)} full passes"
    return f"{len(request.program.steps)} passes in chunks of {_width(request)} tokens"


def _width(request: Request) -> int:
    widths = {"recurrent": 1, "dense": request.tokens}
    return max(1, widths.get(request.form or "chunked", request.chunk_size or CHUNK))


def form_pass(request: Request, run_pass: RunPass) -> RunPass:
    """Give the pass the chunk width of the request's form."""
    group = GROUP if request.form in (None, "chunked") else 1
    return functools.partial(run_pass, chunk=_width(request), group=group)


def accumulated(request: Request, inputs: Inputs) -> tuple[dict[str, Array], Gate, Keyed]:
    """Inputs in the accumulation dtype, q scaled; the gate; incoming states by their fields."""
    xp = namespace(inputs.q)
    dtype = getattr(xp, request.accumulate)
    q, k, v = (xp.astype(x, dtype, copy=False) for x in inputs[:3])
    if request.scale != 1.0:
        q = q * request.scale
    values = {"q": q, "k": k, "v": with_ones(v) if request.mass else v}
    return values, Gate(inputs.decay, inputs.log_gate), _joined(request, inputs.state)


def _joined(request: Request, state: Any, *, gradient: bool = False) -> Keyed:
    """Matrix and mass of a state side by side, as the passes carry them.

    A mass is the same for all values it is broadcast over, so its gradient is shared out evenly.
    """
    if state is None:
        return {}
    shapes, out = request.state_shapes(), {}
    for key in {s.state for s in request.program.steps}:
        parts = [getattr(state, field) for field in key]
        if any(x is None for x in parts):
            continue
        xp, full = namespace(parts[0]), shapes[key[0]]
        matrix = xp.broadcast_to(parts[0], full)
        if len(parts) == 2 and request.mass:
            copies = math.prod(full[:-1]) // max(1, math.prod(shapes[key[1]])) if gradient else 1
            mass = xp.broadcast_to(parts[1], full[:-1])
            matrix = xp.concat([matrix, (mass / copies if copies > 1 else mass)[..., None]], axis=-1)
        out[key] = matrix
    return out


def _split(finals: Mapping[tuple[str, ...], Array], shapes: dict[str, Shape]) -> dict[str, Array]:
    """Undo `_joined`: each field as a new array of its own full shape."""
    fields = {}
    for key, x in finals.items():
        xp = namespace(x)
        parts = [x] if len(key) == 1 else [x[..., :-1], x[..., -1]]
        for field, part in zip(key, parts, strict=True):
            fields[field] = xp.astype(narrow(part, shapes[field]), x.dtype, copy=True)
    return fields


def narrow(x: Array, shape: Shape) -> Array:
    """Take one of equal copies along the axes where ``shape`` has 1 or no axis."""
    for _ in range(len(x.shape) - len(shape)):
        x = x[0, ...]
    index = tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)
    return x[(*index, ...)]


def forward(
    request: Request, inputs: Inputs, run_pass: RunPass = causal_pass
) -> tuple[Array, Any, Trace | None]:
    """Compute a request in its form.

    Parameters
    ----------
    request : Request
        What is asked.
    inputs : Inputs
        Its arrays.
    run_pass : callable
        `causal_pass`, or a backend's own with the same signature.

    Returns
    -------
    o : array, (*batch, T, V), v's dtype
    state : NamedTuple or None
    trace : Trace or None
        What `backward` needs.
    """
    if request.form == "associative":
        out, state = _associative(request, inputs)
        trace = None
    else:
        out, trace = _run(request, inputs, run_pass)
        finals = final_states(request.program, trace)
        state = None
        if request.return_state:
            assert request.state_type is not None
            state = request.state_type(**_split(finals, request.state_shapes()))
    return _finish(request, inputs, out), state, trace


def _run(request: Request, inputs: Inputs, run_pass: RunPass) -> tuple[Array, Trace]:
    values, gate, initial = accumulated(request, inputs)
    out, trace = programs.run(request.program, values, gate, initial, form_pass(request, run_pass))
    return out, trace


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
    run_pass: RunPass = causal_pass,
    pass_adjoint: Any = None,
) -> Gradients:
    """Gradients of `forward` by the programs' adjoints.

    Parameters
    ----------
    request, inputs, trace, run_pass
        As given to and returned by `forward`.
    do : array, (*batch, T, V), or None
        Gradient of the output.
    dstate : NamedTuple of arrays or None, or None
        Gradient of the final state.
    pass_adjoint : callable, optional
        A backend's own adjoint of one pass.
    """
    if trace is None:  # the associative form has the chunked form's gradient
        request = dataclasses.replace(request, form="chunked")
        _, trace = _run(request, inputs, run_pass)
    xp, program = namespace(inputs.q), request.program
    values, gate, initial = accumulated(request, inputs)
    dtype = values["q"].dtype
    dout = _unfinish(request, trace, values, do)
    dfinal = _joined(request, _cast_state(xp, dstate, dtype), gradient=True)
    grads = programs.adjoint(
        program,
        trace,
        gate,
        initial,
        dout,
        dfinal,
        form_pass(request, run_pass),
        with_gate=request.gate_given,
        pass_adjoint=pass_adjoint,
    )
    dq, dk, dv = (grads.values[x] for x in "qkv")
    if request.scale != 1.0:
        dq = dq * request.scale
    dv = dv[..., :-1] if request.mass else dv
    ddecay = dlog_gate = None
    if grads.gate is not None and gate.log_gate is not None:
        dlog_gate = xp.where(xp.isinf(gate.log_gate), xp.zeros_like(grads.gate), grads.gate)
    elif grads.gate is not None:
        ddecay = xp.sum(grads.gate, axis=-1) / gate.decay
    return Gradients(
        xp.astype(dq, inputs.q.dtype, copy=False),
        xp.astype(dk, inputs.k.dtype, copy=False),
        xp.astype(dv, inputs.v.dtype, copy=False),
        ddecay,
        dlog_gate,
        _state_gradient(request, inputs.state, grads.states),
    )


def _unfinish(request: Request, trace: Trace, values: dict[str, Array], do: Array | None) -> Array:
    """Gradient of the program's output from that of o."""
    out, xp = None, namespace(values["q"])
    for coefficient, name in request.program.outputs:
        term = coefficient * trace.values[name]
        out = term if out is None else out + term
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


def _state_gradient(request: Request, state: Any, grads: Keyed) -> Any:
    """Gradient of the incoming state, each field in the shape it came in."""
    if state is None:
        return None
    fields = {}
    for key in {s.state for s in request.program.steps}:
        x = grads.get(key)
        for i, field in enumerate(key):
            given = getattr(state, field)
            if x is None or (i == 1 and not request.mass):
                fields[field] = namespace(given).zeros_like(given)
            elif len(key) == 1 or not request.mass:
                fields[field] = sum_to(x, given.shape)
            else:
                fields[field] = sum_to(x[..., :-1] if i == 0 else x[..., -1], given.shape)
    return type(state)(**fields)


def summarize(request: Request, inputs: Inputs, run_pass: RunPass = causal_pass) -> Any:
    """Summary of a whole sequence as one segment (design 2), in the accumulation dtype."""
    values, gate, _ = accumulated(request, inputs)
    segment = _segment(request, values, gate, form_pass(request, run_pass))
    shapes = request.state_shapes(segment=True)
    fields = {x: narrow(y, shapes[x]) if x in shapes else y for x, y in segment._asdict().items()}
    return type(segment)(**fields)


def _segment(request: Request, values: dict[str, Array], gate: Gate, run_pass: RunPass) -> Any:
    """Run the segment program; every field has the batch shape that the passes give it."""
    algebra = ALGEBRA[request.operator, request.mask]
    program = programs.segment_program(request.operator, request.mask)
    _, trace = programs.run(program, values, gate, {}, run_pass)
    fields = {}
    for key, x in final_states(program, trace).items():
        parts = (x,) if len(key) == 1 else (x[..., :-1], x[..., -1])
        fields.update(zip(key, parts, strict=True))
    return algebra.segment(**algebra.moments(fields), rho=_attenuation(values["k"], gate))


def _attenuation(k: Array, gate: Gate) -> Array:
    """Rho of a whole sequence, of the gate's batch shape."""
    xp = namespace(k)
    if gate.log_gate is not None:
        return xp.exp(xp.sum(gate.log_gate, axis=-1))
    length = xp.asarray(float(k.shape[-2]), dtype=k.dtype, device=device(k))
    return xp.ones_like(length) if gate.decay is None else gate.decay**length


def _associative(request: Request, inputs: Inputs) -> tuple[Array, Any]:
    """Two-level exclusive scan: chunk summaries, a scan across them, a scan within each chunk.

    Tokens are padded at the front, where a token of zeros with rho = 1 changes nothing.
    """
    algebra = _algebra(request)
    assert algebra is not None
    values, gate, _ = accumulated(request, inputs)
    xp, T, w = namespace(values["q"]), request.tokens, min(_width(request), max(1, request.tokens))
    shapes = request.state_shapes()
    batch = broadcast(*(x.shape[:-2] for x in values.values()), gate.batch)
    state = _started(request, inputs, batch)
    if T == 0:
        out = xp.zeros((*batch, 0, values["v"].shape[-1]), dtype=values["v"].dtype, device=device(values["v"]))
        return out, _as_full(state, shapes)
    pad = -T % w

    def chunks(x: Array, fill: float) -> Array:  # [*b, T, *f] -> [chunks, *batch, w, *f]
        x = xp.broadcast_to(x, (*batch, *x.shape[-2:]))
        if pad:
            head = xp.full((*batch, pad, x.shape[-1]), fill, dtype=x.dtype, device=device(x))
            x = xp.concat([head, x], axis=-2)
        x = xp.reshape(x, (*batch, (T + pad) // w, w, x.shape[-1]))
        return xp.moveaxis(x, -3, 0)

    rho = xp.ones((T, 1), dtype=values["q"].dtype, device=device(values["q"]))
    if gate.decay is not None:
        rho = gate.decay[..., None, None] * rho
    elif gate.log_gate is not None:
        rho = xp.exp(gate.log_gate)[..., None]
    tokens = [chunks(values[x], 0.0) for x in "qkv"]
    rhos = chunks(rho, 1.0)
    inner = Gate(gate.decay) if gate.log_gate is None else Gate(
        log_gate=chunks(gate.log_gate[..., None], 0.0)[..., 0]
    )
    one = functools.partial(causal_pass, chunk=w, group=1)
    padded = dict(zip("qkv", tokens, strict=True))
    if not request.mass:
        padded["v"] = with_ones(padded["v"])
    summary = _segment(request, padded, inner, one)
    summary = type(summary)(
        *(xp.broadcast_to(x, (x.shape[0], *batch, *x.shape[x.ndim - _rank(f) :])) for f, x in summary._asdict().items() if f != "rho"),
        rho=xp.prod(rhos[..., 0], axis=-1),
    )
    before = scans.blelloch(algebra.combine, summary, algebra.identity(scans.element(summary, 0)))
    carries = algebra.extend(state, before)
    final = algebra.extend(scans.element(carries, -1), scans.element(summary, -1))
    read = functools.partial(algebra.read, ridge=request.ridge) if request.ridge else algebra.read
    V = request.v_shape[-1]

    def body(carry: None, xs: tuple[Array, ...]) -> tuple[None, Array]:
        q, k, v, r = (xp.moveaxis(x, -2, 0) for x in xs[:4])  # [w, *batch, features]
        token = algebra.lift(q, k, v[..., :V], r[..., 0])
        prefix = scans.blelloch(algebra.combine, token, algebra.identity(scans.element(token, 0)))
        states = algebra.extend(algebra.extend(type(carries)(*xs[4:]), prefix), token)
        num, den = read(states, q)
        return carry, xp.moveaxis(xp.concat([num, den[..., None]], axis=-1), 0, -2)

    xs = (*tokens, rhos, *carries)
    _, out = fold(body, None, xs, axes=tuple(-x.ndim for x in xs), out_axis=-3)
    out = xp.reshape(out, (*batch, T + pad, V + 1))[..., pad:, :]
    return out if request.mass else out[..., :-1], _as_full(final, shapes)


def _rank(field: str) -> int:
    """Axes of a field beyond the batch: masses are vectors, the rest matrices."""
    return 1 if field[0].islower() else 2


def _started(request: Request, inputs: Inputs, batch: Shape) -> Any:
    """Incoming state, or zeros, broadcast to the whole batch."""
    xp, given = namespace(inputs.q), inputs.state
    assert request.state_type is not None
    dtype = getattr(xp, request.accumulate)
    fields = {}
    for field, shape in request.state_shapes().items():
        full = (*batch, *shape[len(shape) - _rank(field) :])
        x = xp.zeros(full, dtype=dtype, device=device(inputs.q)) if given is None else getattr(given, field)
        fields[field] = xp.broadcast_to(x, full)
    return request.state_type(**fields)


def _as_full(state: Any, shapes: dict[str, Shape]) -> Any:
    """Each field as a new array of its own shape, without the copies over other inputs' batch."""
    fields = {
        f: namespace(x).astype(narrow(x, shapes[f]), x.dtype, copy=True)
        for f, x in state._asdict().items()
    }
    return type(state)(**fields)
