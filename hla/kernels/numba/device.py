"""The kernels in Python by the names that launches know, and which steps of a plan they do."""

from __future__ import annotations

from typing import Any

from ...device.steps import Carry, Divide, Launch, Sum
from ..cupy import between as launches
from ..cupy import launch
from ..cupy.run import Kernels
from . import between, causal, elements
from .instructions import Text

TEXTS: dict[str, Text] = {"pass.cu": causal.TEXT, **between.KERNELS, **elements.KERNELS}
STEPS: dict[type, Any] = {
    Launch: launch.passes, Sum: launch.total, Divide: launches.divide, Carry: launches.carry,
}  # fmt: skip
KERNELS = Kernels(STEPS, lambda request, card: (), {}, token=False)
