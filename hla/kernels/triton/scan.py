"""A request and its gradient by programs of Triton passes, on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.fields import columns, gradient_fields, joined, own
from ...core.passes import Gate, broadcast
from ...core.programs import Program, summed
from ...core.reference import Gradients, gate_gradients
from ...core.request import Inputs, Request
from . import normalize
from .program import Call, Value, adjoint, run


def _call(request: Request, inputs: Inputs) -> tuple[Call, dict[str, Value]]:
    """Return what all passes share, and the values that a program starts with."""
    q, k, v = inputs[:3]
    tf32 = request.tf32 or q.dtype == torch.float16
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    values: dict[str, Value] = {"q": (q,), "k": (k,), "v": (v,)}
    if request.mass:
        ones = torch.ones((), dtype=torch.float32, device=v.device)
        values["v"] = (v, ones.expand(*v.shape[:-1], 1))
    return Call(Gate(inputs.decay, inputs.log_gate), request.scale, tf32, dtype), values


def _kept(request: Request) -> list[str]:
    """Names of the values that `backward` reads: what later steps read, and num and den."""
    program = request.program
    read = {name for s in program.steps for name in (s.q, s.k, s.v)}
    if request.normalize:
        read |= {name for _, name in program.outputs}
    return [s.out for s in program.steps if s.out in read]


def forward(request: Request, inputs: Inputs) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return (o, state, the tensors that `backward` needs)."""
    call, values = _call(request, inputs)
    program, dtype = request.program, inputs.v.dtype
    plain = len(program.outputs) == 1 and not request.normalize
    values, states = run(
        call, program, values, columns(request, inputs.state),
        keep_states=request.return_state, last=dtype if plain else torch.float32,
    )  # fmt: skip
    out = _sum(program, values)
    o = out[0]
    if request.normalize:
        o, den = out
        o = normalize.normalize(o, den, request.eps, dtype)
    state, saved = None, ()
    if request.return_state:
        assert request.state_type is not None
        state = request.state_type(**_fields(request, states))
    if request.gradient:
        kept = [x for name in _kept(request) for x in values[name]]
        saved = tuple(kept)
    return o.to(dtype), state, saved


def _fields(request: Request, states: list[Value]) -> dict[str, torch.Tensor]:
    """Each field of the final state, in its own shape."""
    shapes, fields = request.state_shapes(), {}
    for s, parts in zip(request.program.steps, states, strict=True):
        matrix, *mass = parts
        for name, x in zip(s.state, (matrix, *(y[..., 0] for y in mass)), strict=False):
            fields[name] = x if x.shape == shapes[name] else own(x, shapes[name])
    return fields


def _sum(program: Program, values: Mapping[str, Value]) -> Value:
    """Return the signed sum of a program's outputs, part by part."""
    names = [name for _, name in program.outputs]
    each = zip(*(values[name] for name in names), strict=True)
    return tuple(summed(program, dict(zip(names, parts, strict=True))) for parts in each)


def backward(request: Request, inputs: Inputs, saved: Any, do: Any, dstate: Any) -> Gradients:
    """Return the gradients of `forward`."""
    call, values = _call(request, inputs)
    program, left = request.program, list(saved)
    count = {name: len(x) for name, x in values.items()}
    for s in program.steps:
        count[s.out] = count[s.v]
    for name in _kept(request):
        values[name] = tuple(left.pop(0) for _ in range(count[name]))
    if do is None:
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs[:3]))
        do = inputs.v.new_zeros(()).expand(*batch, inputs.v.shape[-1])
    if call.dtype == torch.bfloat16:
        do = do.to(torch.bfloat16)
    masses = dstate is not None or inputs.state is not None  # what else reads their gradients
    dout = _unfinish(request, values, do, masses=masses)
    for s in program.steps:
        if s.out not in values:  # an output, of which only the shape is read
            read = [values[name][0].shape[:-2] for name in (s.q, s.k, s.v)]
            batch = broadcast(*read, () if s.kind == "full" else call.gate.batch)
            values[s.out] = tuple(x.new_zeros(()).expand(*batch, *x.shape[-2:]) for x in dout)
    initial = joined(request, inputs.state)
    grads = adjoint(
        call, program, values, initial, dout, joined(request, dstate, gradient=True),
        with_gate=request.gate_given,
    )  # fmt: skip
    dq, dk, dv = (grads.values[name].to(x.dtype) for name, x in zip("qkv", inputs, strict=False))
    ddecay, dlog_gate = (
        None if x is None else x.float() for x in gate_gradients(call.gate, grads.gate)
    )
    dinitial = gradient_fields(request, inputs.state, grads.states)
    return Gradients(dq, dk, dv, ddecay, dlog_gate, dinitial)


def _unfinish(
    request: Request, values: Mapping[str, Value], do: torch.Tensor, *, masses: bool
) -> Value:
    """Gradient of the program's output from that of o; with a column of masses where it matters."""
    if request.normalize:
        num, den = _sum(request.program, values)
        return normalize.adjoint(num, den, request.eps, do)
    if request.mass and masses:
        return do, do.new_zeros(()).expand(*do.shape[:-1], 1)
    return (do,)
