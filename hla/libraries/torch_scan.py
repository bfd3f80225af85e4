"""The operators hla::scan and hla::scan_backward, and the same for ordinary tensors.

Second derivatives are those of the generic code: right, to any order, and slower.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.request import Request
from .exchange import loaded
from .torch_batching import mapped
from .torch_operator import operator
from .torch_options import OPTIONS, Options, apart, inputs_of, like, moved, request_of
from .torch_plain import plain

GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? log_gate, Tensor[] state"


class Eager(torch.autograd.Function):
    """`SCAN` for ordinary tensors."""

    @staticmethod
    def forward(ctx: Any, request: Request, options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        """Run the backend."""
        ctx.request, inputs = request, inputs_of(options, tensors)
        o, end, saved = loaded(options.backend).forward(request, inputs)
        ends = tuple(end) if request.return_state else ()
        _keep(ctx, options, tensors, ends, saved)
        return (o, *ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Pull back, by the operator where a second derivative may follow."""
        if torch.is_grad_enabled():
            *found, state = _pull(ctx, grads)[:6]
            return (None, None, *found, *state)
        options, (given, saved, do, dstate) = ctx.options, _returned(ctx, grads)
        ends = options.kind(*dstate) if dstate else None
        inputs = inputs_of(options, given)
        dq, dk, dv, ddecay, dlog_gate, starts = loaded(options.backend).backward(
            ctx.request, inputs, saved, do, ends
        )
        return (None, None, dq, dk, dv, ddecay, dlog_gate, *(x.clone() for x in starts or ()))


def _scan(*args: Any, fake: bool = False) -> list[Tensor]:
    """Return o, the state where requested, and with ``keep`` what `scan_backward` needs."""
    given, options = [*args[:5], *args[5]], Options(*args[6:-1])
    inputs = inputs_of(options, given)
    request = request_of(inputs, options, args[-1])
    module = loaded(options.backend)
    empty = module.empty  # shapes without running; others launch nothing on fake tensors
    o, end, saved = (empty if fake and empty else module.forward)(request, inputs)
    found = [o, *(end if request.return_state else ()), *saved]
    return apart(found, given) if empty and not fake else found


def _scan_backward(*args: Any, fake: bool = False) -> list[Tensor]:
    """Return gradients of q, k, v, of the gate where given as an array, and of the state."""
    given, (saved, do, dstate) = [*args[:5], *args[5]], args[6:9]
    options = Options(*args[9:])
    module = loaded(options.backend)
    told = module.empty is not None
    if fake and told:
        return like([given[i] for i in moved(given, options)])
    inputs = inputs_of(options, given)
    request = request_of(inputs, options, True)
    dstate = options.kind(*dstate) if dstate else None
    grads = module.backward(request, inputs, tuple(saved), do, dstate)
    gate = [x for x in (grads.ddecay, grads.dlog_gate) if x is not None]
    found = [*grads[:3], *gate, *(grads.dinitial_state or ())]
    if told:
        return apart(found, args[:9])
    return [*found[: 3 + len(gate)], *(x.clone() for x in found[3 + len(gate) :])]  # parts of one


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *given, state = inputs[:6]
    options = Options(*inputs[6:-1])
    fields = len(options.kind._fields) if options.return_state else 0
    _keep(ctx, options, (*given, *state), output[1 : 1 + fields], output[1 + fields :])


def _keep(
    ctx: Any,
    options: Options,
    given: Sequence[Any],
    ends: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> None:
    """Save what `_returned` takes: the inputs, the state's fields among them, and the saved."""
    ctx.options, ctx.given = options, len(given)
    ctx.ends = [(x.shape, x.dtype) for x in ends]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *saved)


def _returned(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, Any, Any, list[Any]]:
    """Return the inputs, the saved, and the gradients of o and of the state, whole if any is."""
    tensors = ctx.saved_tensors  # read once: activation checkpointing gives them once
    do, *dstate = grads[: 1 + len(ctx.ends)]
    if all(x is None for x in dstate):
        dstate = []
    for i, x in enumerate(dstate):
        if x is None:
            shape, dtype = ctx.ends[i]
            dstate[i] = tensors[0].new_zeros(shape, dtype=dtype)
    return tensors[: ctx.given], tensors[ctx.given :], do, dstate


def _pull_needed(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return _pull(ctx, grads, gate=any(ctx.needs_input_grad[3:5]))


def _pull(ctx: Any, grads: Sequence[Tensor | None], *, gate: bool = True) -> tuple[Any, ...]:
    options = ctx.options if gate else ctx.options._replace(gate_given=False)
    given, saved, do, dstate = _returned(ctx, grads)
    found = SCAN_BACKWARD(*given[:5], list(given[5:]), list(saved), do, dstate, *options)
    return (*by_argument(found, given, options), *(None,) * (len(options) + 1))


def by_argument(found: Sequence[Any], given: Sequence[Any], options: Options) -> list[Any]:
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


SCAN = operator(
    "scan",
    f"({GIVEN}, {OPTIONS}, bool keep) -> Tensor[]",
    _scan,
    functools.partial(_scan, fake=True),
    _setup,
    _pull,
    mapped,
    backward=_pull_needed,  # torch.func's tensors do not say
)


SCAN_BACKWARD = operator(
    "scan_backward",
    f"({GIVEN}, Tensor[] saved, Tensor? do, Tensor[] dstate, {OPTIONS}) -> Tensor[]",
    _scan_backward,
    functools.partial(_scan_backward, fake=True),
    _setup_twice,
    _pull_twice,
    mapped,
)
