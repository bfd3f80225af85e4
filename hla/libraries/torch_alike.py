"""Whether tensors are like earlier ones in all that a call's checks, choice and plan look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

from . import torch_tracing as tracing
from .torch_memory import PLAIN

PRODUCTS = "cuda", "matmul"
_precision: Any = torch._C._get_fp32_precision_getter


def alike(arrays: Sequence[Tensor]) -> Callable[[list[Tensor]], list[int] | None] | None:
    """Return what gives the addresses of tensors like these, and None of others.

    None also where a mode or transform looks at what torch does, and of what is no plain memory.
    One call asks of all tensors what torch.compile asks before it runs compiled code again: type,
    dtype, device, shape, strides, requires_grad, and dispatch keys, which tell inference mode, a
    pending sign and other layouts. Alignment, grad mode where a tensor learns, the level of forward
    mode and the precision of products are asked beside.
    """
    if tracing.interposed():
        return None
    if forward_ad._current_level >= 0 or not all(map(_plain, arrays)):
        return None
    same = TensorGuards(
        *arrays,
        dynamic_dims_sizes=[list(x.shape) for x in arrays],
        dynamic_dims_strides=[list(x.stride()) for x in arrays],
    ).check
    if not same(*arrays):  # one tensor twice, which torch.compile asks for apart
        return None
    alignment = [x.data_ptr() & 15 for x in arrays]
    learns, grad = any(x.requires_grad for x in arrays), torch.is_grad_enabled()
    precision = _precision(*PRODUCTS)

    def addresses(arrays: list[Tensor]) -> list[int] | None:
        if tracing.interposed() or not same(*arrays) or forward_ad._current_level >= 0:
            return None
        if (learns and torch.is_grad_enabled() != grad) or _precision(*PRODUCTS) != precision:
            return None
        found = [x.data_ptr() for x in arrays]
        return found if [p & 15 for p in found] == alignment else None

    return addresses


def _plain(x: Tensor) -> bool:
    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested or x.is_meta:
        return False
    return not (x.is_neg() or x._is_zerotensor() or tracing.wrapped(x))
