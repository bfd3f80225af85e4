"""Kernels in Python, compiled by Numba: for its device arrays, and by name for NumPy's on the host.

By name also for those of torch, CuPy and JAX on a GPU, by DLPack.
"""

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
from ..kernels.numba import package
from ..kernels.numpy import token

CAPABILITIES = Capabilities(
    FLOATS,
    libraries=("numpy", "numba", "torch", "cupy", "jax"),
    native="numba",
    serves=(("numpy", False), ("numba", True)),
    forms=("chunked",),
    traced=("jax",),  # of an eager gradient; there is no memory under jit or vmap
    opaque=True,
)
DEVICE = FLOATS[:3]  # dtypes of the device's kernels


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


@functools.cache
def _device() -> Any:
    from ..kernels.numba.run import NUMBA

    return NUMBA


@functools.cache
def _missing() -> str:
    """Why nothing can run on a GPU of this machine, or ""."""
    if not package.installed():
        return 'numba-cuda is not installed; pip install ".[numba]" in a checkout of hla'
    if package.SIMULATED:
        return "Numba's simulator runs the generic code alone"
    try:
        able = package.cuda.is_available()
    except Exception as error:  # one that is installed and broken
        return f"{package.installed()} does not import: {type(error).__name__}: {error}"
    return "" if able else f"{package.installed()} sees no NVIDIA GPU"


def _index(request: Request) -> int:
    """Return the number of a request's device, which libraries name apart."""
    return int("".join(x for x in request.device if x.isdigit()) or 0)


def _card(request: Request) -> Any:
    from ..kernels.numba import blocks

    return blocks.card_of(_index(request))


def unable(request: Request) -> str | None:
    """Return why no device here takes ``request``, or None."""
    if not request.accelerator:
        if request.library == "numpy":
            return None
        return f"it runs on NVIDIA GPUs, these arrays are on {request.device}"
    if _missing():
        return _missing()
    if request.dtype not in DEVICE:
        names = ", ".join(DEVICE)
        return f"on a GPU it multiplies {names}, not {request.dtype}; use backend='array_api'"
    at = _card(request).capability
    return None if at >= (8, 0) else f"it needs compute capability 8.0, the GPU has {at[0]}.{at[1]}"


def _device_plan(request: Request) -> str:
    from ..device import plan as plans
    from ..kernels.cupy import launch, step
    from ..kernels.numba import device

    if request.tokens == 1 and request.return_state and step.fits(request):
        return "one token by a kernel, its states read and written once"
    card = _card(request)
    tokens = launch.segments(request, card)
    rows = device.KERNELS.rows(request, card)
    return plans.forward(request, launch.limits(request, card), rows, tokens).summary(tokens)


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    if request.accelerator:
        return _device_plan(request)
    steps = len(request.program.steps)
    if request.mask == "none":
        return f"{steps} full passes, by NumPy"
    return f"{steps} passes compiled by Numba, 4 tokens at a time"


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    """Return (o, state, what `backward` needs)."""
    found: tuple[Array, Any, Any]
    if request.accelerator:
        found = _device().forward(request, inputs)
        return found
    found = library_of(inputs.q).run(reference.forward, request, inputs, _engine(request))
    return found


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    found: Gradients
    if request.accelerator:
        found = _device().backward(request, inputs, saved, do, dstate)
        return found
    given = (saved, do, dstate, _engine(request))
    found = library_of(inputs.q).run(reference.backward, request, inputs, *given)
    return found


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token, with ``donate`` in the given state's memory where it can."""
    found: tuple[Array, Any]
    if request.accelerator:
        found = _device().step(request, inputs, donate)
        return found
    found = library_of(inputs.q).run(_step(), request, inputs, donate)
    return found


def again_step(request: Request, inputs: Inputs, donate: bool) -> Any:
    """Return what takes a token like this one without its checks, or None."""
    if request.accelerator:
        return _device().steps.again(request, inputs, donate)
    return token.again(step, request, inputs, donate)


def again_forward(request: Request, inputs: Inputs, axis: int) -> Any:
    """Return what does such a `forward` of other arrays laid out alike, or None."""
    return _device().again_forward(request, inputs, axis) if request.accelerator else None


def again_backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any, axis: int
) -> Any:
    """Return what does such a `backward` of other arrays laid out alike, or None."""
    if not request.accelerator:
        return None
    return _device().again_backward(request, inputs, saved, do, dstate, axis)


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence, by the generic code."""
    return library_of(inputs.q).run(reference.summarize, request, inputs)


@functools.cache
def machine() -> Machine:
    """Describe what it finds here; Numba is not imported for the host alone."""
    if importlib.util.find_spec("numba") is None:
        return Machine('numba is not installed; pip install ".[numba]" in a checkout of hla')
    version = f"numba {metadata.version('numba')}"
    if not package.installed() or package.SIMULATED:
        return Machine(device="cpu", version=version)
    version += f", {package.version()}"
    if _missing():
        return Machine(device="cpu", version=version)
    from ..kernels.numba import blocks

    return Machine(device=blocks.name_of(0), version=version)
