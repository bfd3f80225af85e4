"""Which fused kernels serve a request on a Hopper GPU, and what does each.

A row's function makes, of a `Fused` step, what puts its results: it is given ``take``, the array
that a reference means, and the gate, and returns pairs of a reference and its new array.
"""

from __future__ import annotations

from collections.abc import Callable

from ...core.passes import Gate
from ...core.request import Request
from ...device.elementwise import Made, Take
from ...device.scan import Call
from ...device.steps import Fused, Row

Make = Callable[[Take, Gate], Made]
KERNELS: dict[str, Callable[[Call, Fused], Make]] = {}  # by the row's name


def rows(request: Request) -> tuple[Row, ...]:
    """Return the fused kernels of a request, of either direction, the best first."""
    return ()
