"""The kernels in Python by the names that launches know, and which steps of a plan they do."""

from __future__ import annotations

from ..cupy import fused as forward
from ..cupy import run
from . import between, causal, elements, fused, gate, step
from .instructions import Text

TEXTS: dict[str, Text] = {
    "pass.cu": causal.TEXT, "fused.cu": fused.TEXT, "step.cu": step.TEXT, **between.KERNELS,
    **gate.KERNELS, **elements.KERNELS,
}  # fmt: skip
KERNELS = run.Kernels(run.STEPS, forward.rows, forward.KERNELS, step.Steps)
