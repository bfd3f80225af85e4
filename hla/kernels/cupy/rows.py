"""Which fused kernels serve a request on CuPy, and what launches each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...core.request import Request
from ...device.scan import Call, Do
from ...device.steps import Fused, Row
from . import fused, hopper, hopper_backward
from .launch import Card, Load

# By the row's name
KERNELS: dict[str, Callable[[Load, Call, Fused], Iterator[Do]]] = {
    **hopper.KERNELS,
    **fused.KERNELS,
    **hopper_backward.KERNELS,
}


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the fused kernels of a request, of either direction, the best first."""
    forward = hopper.rows(request, card) or fused.rows(request, card)
    return forward + hopper_backward.rows(request, card)
