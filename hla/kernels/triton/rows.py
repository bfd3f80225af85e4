"""Which fused kernels serve a request on Triton, and what launches each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from ...core.request import Request
from ...device.scan import Call, Do
from ...device.steps import Fused, Row
from . import fused, hopper_backward, owners

KERNELS: dict[str, Callable[[Call, Fused], Iterator[Do]]] = {  # by the row's name
    **owners.KERNELS,
    **hopper_backward.KERNELS,
    **fused.KERNELS,
}


@functools.lru_cache(maxsize=1024)
def rows(request: Request, where: torch.device) -> tuple[Row, ...]:
    """Return the fused kernels of a request, of either direction, the best first."""
    if not owners.able(request, where):
        return fused.rows(request, where)
    forward = owners.rows(request) or fused.rows(request, where)
    return forward + hopper_backward.rows(request)
