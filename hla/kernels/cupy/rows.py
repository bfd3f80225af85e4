"""Which fused kernels serve a request on CuPy, and what launches each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...core.request import Request
from ...device.scan import Call, Do
from ...device.steps import Fused, Row
from . import hopper, hopper_backward
from .launch import Card, Load

# By the row's name
KERNELS: dict[str, Callable[[Load, Call, Fused], Iterator[Do]]] = {
    **hopper.KERNELS,
    **hopper_backward.KERNELS,
}


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the fused kernels of a request, of either direction, the best first."""
    return hopper.rows(request, card) + hopper_backward.rows(request, card)
