"""One token of ordinary tensors with the state updated where it lies, by torch's own operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.passes import Shape
from ..core.request import Inputs, Request
from ..device.token import Ops, apart, dense, run, span, updates
from . import torch_tracing as tracing
from .torch_memory import PLAIN


def step(request: Request, inputs: Inputs) -> tuple[Tensor, Any] | None:
    """Return (o, state) of one token, the state in its own memory; None where it may not be.

    Its fields must be whole, in memory of their own that no other array of the call shares, and
    nothing of the call be differentiated, traced or seen by a mode.
    """
    tensors = [x for x in inputs[:5] if x is not None]
    first, full = len(tensors), request.state_shapes()
    if inputs.state is None or request.traced or tracing.watched() or not updates(request):
        return None
    tensors += inputs.state
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if learns or tracing.in_forward_mode(tensors):
        return None
    if not all(
        type(x) in PLAIN
        and tuple(x.shape) == full[name]
        and dense(x.shape, x.stride())
        and not x.requires_grad
        and (torch.is_inference_mode_enabled() or not x.is_inference())
        for name, x in inputs.state._asdict().items()
    ):
        return None
    sizes = tuple(span(x.shape, x.stride()) * x.element_size() for x in tensors)
    if not apart(tuple(x.data_ptr() for x in tensors), sizes, first):
        return None
    return run(request, inputs, OPS, True)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _advanced(
    before: Tensor | None, gate: Tensor | None, k: Tensor, v: Any, shape: Shape, donate: bool
) -> Tensor:
    assert before is not None
    if gate is not None:
        before.mul_(gate)
    return before.add_(k) if isinstance(v, int) else before.addcmul_(k, v)


def _read(q: Tensor, state: Tensor | None, shape: Shape) -> Tensor:
    assert state is not None
    return (q[..., None, :] @ state)[..., 0, :]


def _weight(q: Tensor, state: Tensor | None, shape: Shape) -> Tensor:
    assert state is not None
    return torch.linalg.vecdot(q, state)


OPS = Ops(_cast, _advanced, _read, _weight)
