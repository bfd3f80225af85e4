"""CUDA C++ on an NVIDIA GPU, for CuPy's arrays; by name for those of torch and JAX, by DLPack."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from ..contract import Capabilities, Machine
from ..core.namespace import Array
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from . import array_api

CAPABILITIES = Capabilities(
    ("float16", "bfloat16", "float32"),
    libraries=("cupy", "torch", "jax", "numba"),
    native="cupy",
    serves=(("cupy", True),),
    forms=("chunked",),
    traced=("jax",),  # of an eager gradient; there is no memory under jit or vmap
    opaque=True,
    packed=True,
)


@functools.cache
def _missing() -> str:
    """Why nothing can run on this machine, or ""."""
    if importlib.util.find_spec("cupy") is None:
        return 'cupy is not installed; pip install ".[cupy]" in a checkout of hla'
    try:
        import cupy

        able = cupy.is_available()
    except Exception as error:  # one that is installed and broken
        return f"cupy does not import: {type(error).__name__}: {error}"
    return "" if able else "CuPy sees no NVIDIA GPU"


@functools.cache
def _unable(device: int) -> str | None:
    """Why a device cannot run the kernels, or None."""
    import cupy

    facts = cupy.cuda.runtime.getDeviceProperties(device)
    if cupy.cuda.runtime.is_hip:
        return "it runs on NVIDIA GPUs"
    at = f"{facts['major']}.{facts['minor']}"
    return None if facts["major"] >= 8 else f"it needs compute capability 8.0, the GPU has {at}"


def _index(request: Request) -> int:
    """Return the number of a request's device, which libraries name apart."""
    digits = "".join(x for x in request.device if x.isdigit())
    return int(digits or 0)


def unable(request: Request) -> str | None:
    """Return why no device here takes ``request``, or None."""
    if not request.accelerator:
        return f"it runs on NVIDIA GPUs, these arrays are on {request.device}"
    return _unable(_index(request))


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    from ..device import plan as plans
    from ..kernels.cupy import driver, launch, rows, step

    card = driver.card_of(_index(request))
    token = "" if request.mask == "none" else f"; one token: {step.named(request)}"
    token += launch.untimed(card)
    if request.tokens == 1 and request.return_state:
        return token[2:]
    tokens = launch.segments(request, card)
    found = plans.forward(request, launch.limits(request, card), rows.rows(request, card), tokens)
    return found.summary(tokens) + token


@functools.cache
def _kernels() -> Any:
    from ..kernels.cupy.driver import CUPY

    return CUPY


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
    """Return (o, state, what `backward` needs)."""
    return _kernels().forward(request, inputs)  # type: ignore[no-any-return]


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    found: Gradients = _kernels().backward(request, inputs, saved, do, dstate)
    return found


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token, with ``donate`` in the given state's memory where it can."""
    found: tuple[Array, Any] = _kernels().step(request, inputs, donate)
    return found


def again_step(request: Request, inputs: Inputs, donate: bool) -> Any:
    """Return what does such a `step` of other arrays laid out alike, or None."""
    return _kernels().steps.again(request, inputs, donate)


def again_forward(request: Request, inputs: Inputs, axis: int) -> Any:
    """Return what does such a `forward` of other arrays laid out alike, or None."""
    return _kernels().again_forward(request, inputs, axis)


def again_backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any, axis: int
) -> Any:
    """Return what does such a `backward` of other arrays laid out alike, or None."""
    return _kernels().again_backward(request, inputs, saved, do, dstate, axis)


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence, by the generic code."""
    return array_api.summarize(request, inputs)


def machine() -> Machine:
    """Describe what it finds here."""
    if _missing():
        return Machine(_missing())
    return _found()


@functools.cache
def _found() -> Machine:
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    dtypes = None if importlib.util.find_spec("ml_dtypes") else ("float16", "float32")
    return Machine("", name, f"cupy {cupy.__version__}", dtypes)
