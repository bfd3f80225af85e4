"""Whether torch is compiling, tracing, transforming or following: each question, answered here.

But `recording`, which must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from .generic import recording

functorch = torch._C._functorch


def transforming() -> bool:
    """Whether a transform of torch.func is active."""
    return bool(torch._C._are_functorch_transforms_active())


def transformed() -> bool:
    """Whether plain types and shapes may stand for something else now."""
    return recording() or transforming()


def wrapped(x: Tensor) -> bool:
    """Whether ``x`` is a transform's own tensor."""
    return bool(functorch.is_functorch_wrapped_tensor(x))


def traced(x: Tensor) -> bool:
    """Whether ``x`` stands for values that are not there yet (jit, vmap, compile, fake tensors).

    Also a type that dispatches its own operations: where its values are, only it knows. A subclass
    without that is memory like any tensor's.
    """
    return bool(
        x.device.type == "meta"
        or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or wrapped(x)
        or recording()
    )


def followed(x: Tensor) -> bool:
    """Whether torch differentiates what is made of ``x``, or may."""
    return (x.requires_grad and torch.is_grad_enabled()) or transforming()


def may_follow() -> bool:
    """Whether torch may differentiate what does not tell: in a transform, or when a trace runs."""
    return transforming() or bool(torch._C._is_tracing())


def watched() -> bool:
    """Whether a mode or a transform sees every operation."""
    return _get_current_dispatch_mode() is not None or transforming()


def interposed() -> bool:
    """Whether a mode or a transform sees every operation, or changes or records some."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch._C._is_tracing()
    )


def in_forward_mode(tensors: Iterable[Tensor]) -> bool:
    """Whether forward mode follows one of ``tensors``."""
    return forward_ad._current_level >= 0 and any(map(_has_tangent, tensors))


def in_jvp() -> bool:
    """Whether a transform in forward mode is active, at any level."""
    levels = functorch.get_interpreter_stack() or ()
    return any(x.key() == functorch.TransformType.Jvp for x in levels)


def _has_tangent(x: Tensor) -> bool:
    """Whether forward mode follows ``x``, at any level of torch.func's transforms."""
    top = functorch.peek_interpreter_stack()
    if top is None:
        return forward_ad.unpack_dual(x).tangent is not None
    own = functorch.maybe_get_level(x) == top.level()
    forward = own and top.key() == functorch.TransformType.Jvp
    if forward and forward_ad.unpack_dual(x).tangent is not None:
        return True
    with temporarily_pop_interpreter_stack():
        return _has_tangent(functorch.get_unwrapped(x) if own else x)


@contextmanager
def untransformed() -> Iterator[None]:
    """Context in which torch reads a tensor as itself, whatever transform or mode is active."""
    if not transforming() and not torch._C._len_torch_dispatch_stack():
        yield
        return
    with torch._C._DisableFuncTorch(), _disable_current_modes():
        yield
