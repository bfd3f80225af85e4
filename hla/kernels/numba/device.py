"""The kernels in Python by the names that launches know, and which steps of a plan they do."""

from __future__ import annotations

from typing import Any

from ...device.steps import Carry, Divide, Launch, Sum
from ..cupy import between as launches
from ..cupy import fused as forward
from ..cupy import launch
from ..cupy.run import Kernels
from . import between, causal, elements, fused
from .instructions import Text

TEXTS: dict[str, Text] = {
    "pass.cu": causal.TEXT, "fused.cu": fused.TEXT, **between.KERNELS, **elements.KERNELS,
}  # fmt: skip
STEPS: dict[type, Any] = {
    Launch: launch.passes, Sum: launch.total, Divide: launches.divide, Carry: launches.carry,
}  # fmt: skip
KERNELS = Kernels(STEPS, forward.rows, forward.KERNELS, token=False)
