"""Calls of `hla.scan` like an earlier one, of tensors as the caller gave them: see `hla.again`.

They are done by what the backend prepared for memory laid out so. Where a gradient is followed, a
call is one node of autograd, without any for views of what it is given and returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.request import Inputs, Request
from . import prepared
from .exchange import loaded
from .prepared import Pulls, Run
from .torch_alike import alike
from .torch_rule import backward, keeping


def scan(
    backend: str, request: Request, inputs: Inputs, layout: Any, tensors: Sequence[Tensor]
) -> Run | None:
    """Return what does such calls, of tensors and their addresses; None if nothing can.

    Parameters
    ----------
    backend : str
        The one to do them.
    request, inputs, layout
        The call as the checks found it.
    tensors : sequence of Tensor
        As the caller gave them: q, k, v, the gate and the fields of the state.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if learns:
        request = keeping(request, inputs)
    forward = prepared.forward(backend, request, inputs, layout, tensors)
    if forward is None:
        return None
    kind: Any = request.state_type if request.return_state else None
    call = Call(backend, request, layout, forward, 1 + len(kind._fields if kind else ()), {})
    apply = super(torch.autograd.Function, Node).apply  # what asks for transforms, left out

    def run(tensors: list[Tensor], addresses: list[int]) -> Any:
        found = apply(call, addresses, *tensors) if learns else forward(tensors, addresses)
        return found[0] if kind is None else (found[0], kind(*found[1 : call.results]))

    return run


class Call(NamedTuple):
    """Calls of one kind, and how gradients are pulled back, by their number and their layout."""

    backend: str
    request: Request
    layout: Any  # takes arrays from the caller's layout, and back
    forward: Run
    results: int
    pulls: Pulls


class Node(torch.autograd.Function):  # type: ignore[misc]
    """Such a call, differentiable."""

    @staticmethod
    def forward(ctx: Any, call: Call, addresses: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run what the backend prepared."""
        found = call.forward([*tensors], addresses)
        ctx.call, ctx.given = call, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *found[call.results :])
        return tuple(found[: call.results])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Pull back, by what was prepared where the tensors are like earlier ones."""
        call, tensors = ctx.call, ctx.saved_tensors  # read once
        if grads[0] is not None and not torch.is_grad_enabled():
            arrays = [*tensors, *(x for x in grads if x is not None)]
            found = prepared.pulled(call.pulls, arrays)
            if found is not None:
                return (None, None, *found)
        return (None, None, *_pull(call, tensors[: ctx.given], tensors[ctx.given :], grads))


def _pull(
    call: Call, tensors: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of all tensors, differentiable, and prepare for more such calls."""
    _, request, layout, *_ = call
    kind: Any = request.state_type
    inputs = prepared.inputs_of(request, layout, tensors)
    do, *ends = grads
    do, dstate = None if do is None else layout.tokens_in(do), None
    if any(x is not None for x in ends):
        full, dtype = request.state_shapes(), getattr(torch, request.accumulate)
        dstate = kind(*(
            tensors[0].new_zeros(full[n], dtype=dtype) if x is None else x
            for n, x in zip(kind._fields, ends, strict=True)
        ))  # fmt: skip
    found = backward(call.backend, False, request, inputs, saved, do, dstate)
    whole = do is not None and (dstate is None or all(x is not None for x in ends))
    if whole and not torch.is_grad_enabled():
        arrays = [*tensors, *saved, *(x for x in grads if x is not None)]
        _prepare(call, arrays, inputs, saved, do, dstate)
    return [
        *map(layout.tokens_out, found[:3]),
        *_of_gate(call, found.ddecay, found.dlog_gate),
        *(x.clone() for x in found.dinitial_state or ()),
    ]


def _of_gate(call: Call, ddecay: Any, dlog_gate: Any) -> tuple[Tensor | None, ...]:
    """Return the gradient of the gate as the caller gave it, where there is one."""
    if call.request.gate != "log_gate":
        return (ddecay,) if call.request.gate else ()
    return (None if dlog_gate is None else call.layout.gate_out(dlog_gate),)


def _prepare(
    call: Call, arrays: list[Tensor], inputs: Inputs, saved: Sequence[Tensor], do: Any, dstate: Any
) -> None:
    """Keep what pulls back such gradients, of arrays as they come."""
    addresses_of, request = alike(arrays), call.request
    way: Any = loaded(call.backend).again_backward
    back = addresses_of and way(request, inputs, saved, do, dstate, call.layout.axis)
    if addresses_of is None or back is None:
        return

    def pull(arrays: list[Tensor], addresses: list[int]) -> Sequence[Tensor | None]:
        found: list[Tensor | None] = back(arrays, addresses)
        if request.gate == "log_gate" and request.gate_given:
            found[3:4] = _of_gate(call, None, found[3])
        elif request.gate and not request.gate_given:
            found.insert(3, None)
        return found

    prepared.keep(call.pulls, len(arrays), addresses_of, pull)
