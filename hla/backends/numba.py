"""Kernels in Python, compiled by Numba: for NumPy's arrays on the host, by name."""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata
from typing import Any

from ..contract import Capabilities, Machine
from ..core import reference
from ..core.namespace import Array, library_of
from ..core.reference import Gradients
from ..core.request import FLOATS, Inputs, Request
from ..core.run import CORE, Engine
from ..kernels.numpy import token

CAPABILITIES = Capabilities(
    FLOATS,
    libraries=("numpy",),
    serves=(("numpy", False),),
    forms=("chunked",),
)


@functools.cache
def _sweep() -> Engine:
    from ..kernels.numba.passes import SWEEP

    return SWEEP


@functools.cache
def _step() -> Any:
    from ..kernels.numba.token import step

    return step


def _engine(request: Request) -> Engine:
    return CORE if request.mask == "none" else _sweep()  # whole products, which BLAS makes


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    steps = len(request.program.steps)
    if request.mask == "none":
        return f"{steps} full passes, by NumPy"
    return f"{steps} passes compiled by Numba, 4 tokens at a time"


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    """Return (o, state, what `backward` needs)."""
    found: tuple[Array, Any, Any]
    found = library_of(inputs.q).run(reference.forward, request, inputs, _engine(request))
    return found


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    given = (saved, do, dstate, _engine(request))
    found: Gradients = library_of(inputs.q).run(reference.backward, request, inputs, *given)
    return found


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token, with ``donate`` in the given state's memory where it can."""
    found: tuple[Array, Any] = library_of(inputs.q).run(_step(), request, inputs, donate)
    return found


def again_step(request: Request, inputs: Inputs, donate: bool) -> Any:
    """Return what takes a token like this one without its checks."""
    return token.again(step, request, inputs, donate)


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence, by the generic code."""
    return library_of(inputs.q).run(reference.summarize, request, inputs)


def machine() -> Machine:
    """Describe what it finds here; Numba is not imported before it is used."""
    if importlib.util.find_spec("numba") is None:
        return Machine('numba is not installed; pip install ".[numba]" in a checkout of hla')
    return Machine(device="cpu", version=f"numba {metadata.version('numba')}")
