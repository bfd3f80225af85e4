"""A backend as operators of torch: hla::scan, hla::scan_backward and hla::summarize.

An operator is one node for autograd, torch.compile, torch.export, torch.func and CUDA graphs; the
backend behind it stays a pure function. An opaque backend runs as one wherever torch must look at a
call. One whose code torch sees runs as one where torch compiles or exports, which would unroll the
code. Second derivatives are those of the generic code: right, to any order, and slower.

A new process imports this module before `torch.export.load`: it has what the program names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .. import states
from ..core.algebra import ALGEBRA
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from ..device.token import unpacked
from ..states.packed import STATE_OF
from . import torch_tracing as tracing
from .exchange import loaded
from .torch_options import Options, inputs_of, no_forward_mode, options_of, present, request_of
from .torch_plain import plain
from .torch_scan import SCAN, SCAN_BACKWARD, Eager, by_argument

for _kind in (*(getattr(states, name) for name in states.__all__), Gradients):
    # so that an exported program that takes or returns one can be saved and loaded
    _register_namedtuple(_kind, serialized_type_name=f"hla.{_kind.__name__}")
    torch.serialization.add_safe_globals([_kind])


def forward(
    backend: str, node: bool, request: Request, inputs: Inputs
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """Return (o, state, what `backward` needs where the request asks for it)."""
    module, learns, node = _way(backend, node, request, inputs)
    if module is not None:
        return module.forward(request, inputs)  # type: ignore[no-any-return]
    return _as_operator(backend, node, request, inputs, learns)


def _way(backend: str, node: bool, request: Request, inputs: Inputs) -> tuple[Any, bool, bool]:
    """Return the backend to call as it is, or None; whether a gradient is followed; node."""
    tensors = [x for x in inputs[:5] if x is not None]
    if inputs.state is not None:
        tensors += inputs.state
    module = _in_forward_mode(backend, tensors)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    node = node or _looked_at(request) or (learns and request.gradient)
    if module is None and not (learns or node):
        module = loaded(backend)
    return module, learns, node


def _as_operator(
    backend: str, node: bool, request: Request, inputs: Inputs, learns: bool
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    state = [] if inputs.state is None else list(inputs.state)
    if node:
        keep = learns or request.gradient or tracing.may_follow()
        options = options_of(backend, request)
        o, *rest = SCAN(*inputs[:5], state, *options, keep)
    else:  # the same without the dispatcher, which takes longer than a short pass
        request = keeping(request, inputs)
        options = _options(backend, request)
        o, *rest = Eager.apply(request, options, *inputs[:5], *state)
    if not request.return_state:
        return o, None, rest
    fields = len(options.kind._fields)
    return o, options.kind(*rest[:fields]), rest[fields:]


def backward(
    backend: str,
    node: bool,
    request: Request,
    inputs: Inputs,
    saved: Sequence[Tensor],
    do: Tensor | None,
    dstate: Any,
) -> Gradients:
    """Return the gradients of `forward`, differentiable."""
    tensors = present(*inputs, list(saved), do, dstate)
    module = _in_forward_mode(backend, tensors)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    node = node or learns or _looked_at(request) or any(map(tracing.traced, tensors))
    if module is None and not node:
        module = loaded(backend)
    if module is not None:
        return module.backward(request, inputs, saved, do, dstate)  # type: ignore[no-any-return]
    ends, full = [], request.state_shapes()
    for field, x in () if dstate is None else dstate._asdict().items():
        dtype = getattr(torch, request.accumulate)
        ends.append(inputs.q.new_zeros(full[field], dtype=dtype) if x is None else x)
    options, state = options_of(backend, request), list(inputs.state or ())
    found = SCAN_BACKWARD(*inputs[:5], state, list(saved), do, ends, *options)
    dq, dk, dv, ddecay, dlog_gate, starts = by_argument(found, inputs[:5], options)
    dinitial = None if inputs.state is None else type(inputs.state)(*starts)
    return Gradients(dq, dk, dv, ddecay, dlog_gate, dinitial)


def step(
    backend: str, node: bool, request: Request, inputs: Inputs, donate: bool
) -> tuple[Tensor, Any]:
    """Return (o, state) of one token, differentiable."""
    module, learns, node = _way(backend, node, request, inputs)
    if module is not None:
        return module.step(request, inputs, donate)  # type: ignore[no-any-return]
    packed = type(inputs.state) in STATE_OF
    inputs = inputs._replace(state=unpacked(inputs.state))
    o, state, _ = _as_operator(backend, node, request, inputs, learns)
    return o, state.pack() if packed else state


def summarize(backend: str, node: bool, request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence, differentiable."""
    if not node or _in_forward_mode("array_api", present(*inputs[:5])):
        return loaded(backend).summarize(request, inputs)
    kind, options = ALGEBRA[request.operator, request.mask].segment, options_of(backend, request)
    return kind(*plain("summarize", _segment, _empty_segment, inputs[:5], [], options))


def _in_forward_mode(backend: str, tensors: Sequence[Tensor]) -> Any:
    """Return the backend itself where forward mode differentiates its code; refuse if opaque."""
    has_tangent = tracing.in_forward_mode(tensors)
    module = loaded(backend)
    if not module.capabilities.opaque:
        return module if has_tangent or tracing.in_jvp() else None
    if has_tangent:
        raise no_forward_mode(backend)
    return None


def _looked_at(request: Request) -> bool:
    """Whether torch must look at a call: tensors stand for others, or a mode or transform sees."""
    return request.traced or tracing.watched()


def keeping(request: Request, inputs: Inputs) -> Request:
    """Return the request of a call whose gradient may follow, that of the gate where requested.

    A gate without a gradient saves a sum in every pass of the adjoint.
    """
    return _keeping(request, any(x is not None and x.requires_grad for x in inputs[3:5]))


@functools.lru_cache(maxsize=1024)
def _keeping(request: Request, gate: bool) -> Request:
    return dataclasses.replace(request, gradient=True, gate_given=gate)


_options = functools.lru_cache(maxsize=1024)(options_of)


def _segment(options: Options, tensors: Sequence[Any]) -> Sequence[Tensor]:
    inputs = inputs_of(options, tensors)
    request = request_of(inputs, options, False)
    return tuple(loaded(options.backend).summarize(request, inputs))


def _empty_segment(options: Options, tensors: Sequence[Any]) -> Sequence[Tensor]:
    """Return a segment of one token: no shape depends on the number of tokens."""
    q, k, v, decay, log_gate = tensors
    q, k, v = (x.new_empty((*x.shape[:-2], 1, x.shape[-1])) for x in (q, k, v))
    if log_gate is not None:
        log_gate = log_gate.new_empty((*log_gate.shape[:-1], 1))
    return _segment(options, (q, k, v, decay, log_gate))
