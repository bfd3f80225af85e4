"""The kernels in Python by the names that launches know, and which steps of a plan they do."""

from __future__ import annotations

from ...core.request import Request
from ...device.steps import Row
from ..cupy import fused as forward
from ..cupy import run
from ..cupy.launch import Card
from . import adjoint, backward, between, causal, elements, fused, gate, step
from .instructions import Text

TEXTS: dict[str, Text] = {
    "pass.cu": causal.TEXT, "fused.cu": fused.TEXT, "backward": backward.TEXT, "step.cu": step.TEXT,
    **between.KERNELS, **gate.KERNELS, **elements.KERNELS,
}  # fmt: skip


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the fused kernels of a request, of either direction."""
    return forward.rows(request, card) + adjoint.rows(request, card)


KERNELS = run.Kernels(run.STEPS, rows, {**forward.KERNELS, **adjoint.KERNELS}, step.Steps)
