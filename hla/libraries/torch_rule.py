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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .. import states
from ..core.associative import ALGEBRA
from ..core.fields import rank
from ..core.reference import Gradients, shapes
from ..core.request import Inputs, Request
from . import torch_tracing as tracing
from .exchange import loaded
from .torch_operator import (
    OPTIONS,
    Options,
    apart,
    inputs_of,
    like,
    moved,
    no_forward_mode,
    operator,
    options_of,
    plain,
    present,
    request_of,
)

GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? log_gate, Tensor[] state"

for _kind in (*(getattr(states, name) for name in states.__all__), Gradients):
    # so that an exported program that takes or returns one can be saved and loaded
    _register_namedtuple(_kind, serialized_type_name=f"hla.{_kind.__name__}")
    torch.serialization.add_safe_globals([_kind])


def forward(
    backend: str, node: bool, request: Request, inputs: Inputs
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """Return (o, state, what `backward` needs where the request asks for it)."""
    state = [] if inputs.state is None else list(inputs.state)
    tensors = present(*inputs[:5], state)
    module = _in_forward_mode(backend, tensors)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    node = node or _looked_at(request) or (learns and request.gradient)
    if module is None and not (learns or node):
        module = loaded(backend)
    if module is not None:
        return module.forward(request, inputs)  # type: ignore[no-any-return]
    if node:  # a transform's tensors do not say whether they need gradients
        keep = learns or request.gradient or tracing.transforming()
        options = options_of(backend, request)
        o, *rest = SCAN(*inputs[:5], state, *options, keep)
    else:  # the same without the dispatcher, which takes longer than a short pass
        # a gate without a gradient saves a sum in every pass of the adjoint
        request = _keeping(request, any(x is not None and x.requires_grad for x in inputs[3:5]))
        options = options_of(backend, request)
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
    dq, dk, dv, ddecay, dlog_gate, starts = _by_argument(found, inputs[:5], options)
    dinitial = None if inputs.state is None else type(inputs.state)(*starts)
    return Gradients(dq, dk, dv, ddecay, dlog_gate, dinitial)


def step(
    backend: str, node: bool, request: Request, inputs: Inputs, donate: bool
) -> tuple[Tensor, Any]:
    """Return (o, state) of one token, differentiable."""
    o, state, _ = forward(backend, node, request, inputs)
    return o, state


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


class Eager(torch.autograd.Function):
    """`SCAN` for ordinary tensors."""

    @staticmethod
    def forward(ctx: Any, request: Request, options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        """Run the backend."""
        ctx.request = request
        args = (*tensors[:5], tensors[5:], *options, True)
        output = tuple(_scan(*args, request=request))
        _setup(ctx, args, output)
        return output[: 1 + len(ctx.ends)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Pull back, by the operator where a second derivative may follow."""
        directly = functools.partial(_scan_backward, request=ctx.request)
        backward = None if torch.is_grad_enabled() else directly
        *found, state = _pull(ctx, grads, backward=backward)[:6]
        return (None, None, *found, *state)


@functools.lru_cache(maxsize=1024)
def _keeping(request: Request, gate: bool) -> Request:
    """Return the request of a call whose gradient may follow, that of the gate where asked."""
    return dataclasses.replace(request, gradient=True, gate_given=gate)


def _scan(*args: Any, request: Request | None = None, fake: bool = False) -> list[Tensor]:
    """Return o, the state where asked, and with ``keep`` what `scan_backward` needs."""
    given, options = [*args[:5], *args[5]], Options(*args[6:-1])
    inputs = inputs_of(options, given)
    request = request or request_of(inputs, options, args[-1])
    module = loaded(options.backend)
    empty = module.empty  # told without being run; others launch nothing on fake tensors
    o, end, saved = (empty if fake and empty else module.forward)(request, inputs)
    found = [o, *(end if request.return_state else ()), *saved]
    return apart(found, given) if empty and not fake else found


def _scan_backward(*args: Any, request: Request | None = None, fake: bool = False) -> list[Tensor]:
    """Return gradients of q, k, v, of the gate where given as an array, and of the state."""
    given, (saved, do, dstate) = [*args[:5], *args[5]], args[6:9]
    options = Options(*args[9:])
    module = loaded(options.backend)
    told = module.empty is not None
    if fake and told:
        return like([given[i] for i in moved(given, options)])
    inputs = inputs_of(options, given)
    request = request or request_of(inputs, options, True)
    dstate = options.kind(*dstate) if dstate else None
    grads = module.backward(request, inputs, tuple(saved), do, dstate)
    gate = [x for x in (grads.ddecay, grads.dlog_gate) if x is not None]
    found = [*grads[:3], *gate, *(grads.dinitial_state or ())]
    if told:
        return apart(found, args[:9])
    return [*found[: 3 + len(gate)], *(x.clone() for x in found[3 + len(gate) :])]  # parts of one


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *given, state = inputs[:6]
    ctx.options = options = Options(*inputs[6:-1])
    ends = output[1 : 1 + len(options.kind._fields)] if options.return_state else ()
    ctx.ends = [(x.shape, x.dtype) for x in ends]
    ctx.fields = len(state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *state, *output[1 + len(ends) :])


def _pull_needed(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return _pull(ctx, grads, gate=any(ctx.needs_input_grad[3:5]))


def _pull(
    ctx: Any,
    grads: Sequence[Tensor | None],
    *,
    gate: bool = True,
    backward: Callable[..., Any] | None = None,
) -> tuple[Any, ...]:
    options = ctx.options if gate else ctx.options._replace(gate_given=False)
    tensors = ctx.saved_tensors  # read once: activation checkpointing gives them once
    given, state, saved = tensors[:5], tensors[5 : 5 + ctx.fields], tensors[5 + ctx.fields :]
    do, *dstate = grads[: 1 + len(ctx.ends)]
    if all(x is None for x in dstate):
        dstate = []
    for i, x in enumerate(dstate):
        if x is None:
            shape, dtype = ctx.ends[i]
            dstate[i] = given[0].new_zeros(shape, dtype=dtype)
    args = (*given, list(state), list(saved), do, dstate, *options)
    found = (backward or SCAN_BACKWARD)(*args)
    return (*_by_argument(found, given, options), *(None,) * (len(options) + 1))


def _by_argument(found: Sequence[Any], given: Sequence[Any], options: Options) -> list[Any]:
    """Gradients of the six tensor arguments from those that there are."""
    dq, dk, dv, *rest = found
    gate = rest.pop(0) if options.gate_given else None
    ddecay, dlog_gate = (None, gate) if given[3] is None else (gate, None)
    return [dq, dk, dv, ddecay, dlog_gate, rest]


def _setup_twice(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    given, state, saved, do, dstate = inputs[:5], inputs[5], inputs[6], inputs[7], inputs[8]
    ctx.options = Options(*inputs[9:])
    ctx.fields, ctx.saved = len(state), len(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *state, do, *dstate)


def _pull_twice(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    options, tensors, n = ctx.options, ctx.saved_tensors, 5 + ctx.fields
    found = plain(
        "generic_scan", _generic, _generic, [*tensors, *grads], [n, len(tensors)], options
    )
    twice = dict(zip(moved(tensors, options), found, strict=True))
    arguments = [twice.get(i) for i in range(len(tensors))]
    given, (do, *dstate) = arguments[:n], arguments[n:]
    rest = [[None] * ctx.saved, do, dstate]
    return (*given[:5], given[5:], *rest, *(None,) * len(options))


def _generic(options: Options, tensors: Sequence[Any]) -> Sequence[Tensor]:
    inputs = inputs_of(options, tensors)
    request = request_of(inputs, options, False)
    o, end, _ = loaded("array_api").forward(request, inputs)
    return (o, *(end if options.return_state else ()))


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


def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[list[Tensor], list[int]]:
    """Take a mapped axis as one more batch axis, in front of all."""
    ranks = [x.ndim - (d is not None) for x, d in zip(args[:3], in_dims[:3], strict=True)]
    back = len(args) - 9 == len(Options._fields)
    options = Options(*(args[9:] if back else args[6:-1]))
    fields = [rank(name) for name in options.kind._fields] if options.kind else []

    def front(x: Tensor | None, dim: int | None, own: int) -> Tensor | None:
        """Move the mapped axis to the front; behind it come all batch axes, then its own."""
        if x is None:
            return None
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        missing = max(ranks) - 2 + own - (x.ndim - 1)
        return x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:])

    def fronts(i: int, ranks: Sequence[int]) -> list[Tensor | None]:
        return [front(x, d, own) for x, d, own in zip(args[i], in_dims[i], ranks, strict=True)]

    given = [front(args[i], in_dims[i], own) for i, own in enumerate((2, 2, 2, 0, 1))]
    state, rest = fronts(5, fields if args[5] else []), []
    if back:
        do, ends = front(args[7], in_dims[7], 2), fields if args[8] else []
        rest = [fronts(6, [2] * len(args[6])), do, fronts(8, ends)]
    out = (SCAN_BACKWARD if back else SCAN).op(*given, state, *rest, *args[6 + len(rest) :])
    # of one entry: without the batch axes that only the others have
    inputs = [
        x if x is None or d is None else x.select(d, 0)
        for x, d in zip((*args[:5], *args[5]), (*in_dims[:5], *in_dims[5]), strict=True)
    ]
    if back:
        one = [inputs[i].shape for i in moved(inputs, options)]
    else:
        o, full, _ = shapes(request_of(inputs_of(options, inputs), options, False))
        one = [o, *full]
    out = [x.reshape(x.shape[0], *one[i]) if i < len(one) else x for i, x in enumerate(out)]
    return out, [0] * len(out)


SCAN = operator(
    "scan",
    f"({GIVEN}, {OPTIONS}, bool keep) -> Tensor[]",
    _scan,
    functools.partial(_scan, fake=True),
    _setup,
    _pull,
    _vmap,
    backward=_pull_needed,  # torch.func's tensors do not say
)
SCAN_BACKWARD = operator(
    "scan_backward",
    f"({GIVEN}, Tensor[] saved, Tensor? do, Tensor[] dstate, {OPTIONS}) -> Tensor[]",
    _scan_backward,
    functools.partial(_scan_backward, fake=True),
    _setup_twice,
    _pull_twice,
    _vmap,
)
