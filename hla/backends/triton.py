"""Triton on an NVIDIA GPU: plans by launches of the causal pass, for torch, CuPy and JAX arrays.

Without a GPU, Triton's own interpreter runs the same kernels on the host where TRITON_INTERPRET=1
was set before the first import: for tests, not for use.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from ..core.namespace import Array
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from ..dispatch import Info
from ..libraries import exchange
from . import array_api

OPAQUE = True  # to the array library's autograd: `hla.libraries` wraps it
DTYPES = ("float16", "bfloat16", "float32")
LIBRARIES = ("torch", "cupy", "jax")


@functools.cache
def _missing() -> str:
    """Why nothing can run on this machine, or ""."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f'{name} is not installed; pip install ".[triton]" in a checkout of hla'
    try:
        import torch

        able = _interpreted() or torch.cuda.is_available()
    except Exception as error:  # one that is installed and broken
        return f"torch or triton does not import: {type(error).__name__}: {error}"
    return "" if able else "torch sees no NVIDIA GPU"


@functools.cache
def _interpreted() -> bool:
    from triton.runtime import JITFunction

    from ..kernels.triton.causal import pass_kernel

    return not isinstance(pass_kernel, JITFunction)


@functools.cache
def _unable(device: str) -> str | None:
    """Why a device cannot run the kernels, or None."""
    import torch

    if not device.startswith("cuda") or torch.version.hip:
        return f"it runs on NVIDIA GPUs, these arrays are on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, {device} has {major}.{minor}"


def supports(request: Request) -> str | None:
    """Return the reason for refusing ``request``, or None."""
    if request.library not in LIBRARIES:
        return f"it runs on arrays of torch, CuPy and JAX, these are arrays of {request.library}"
    if request.library == "jax" and request.traced:
        return (
            "a traced JAX array (jit, grad, vmap) has no memory that another library could read; "
            "call it outside of the trace, with hla.vjp for gradients, or use backend='array_api'"
        )
    if _missing():
        return _missing()
    if request.form not in (None, "chunked"):
        return f"it runs form='chunked', not {request.form!r}; use backend='array_api'"
    if request.dtype not in DTYPES:
        return f"it multiplies {', '.join(DTYPES)}, not {request.dtype}; use backend='array_api'"
    if not _interpreted():
        cuda = request.accelerator and request.library != "torch"  # JAX and CuPy name theirs apart
        return _unable("cuda" if cuda else request.device)
    if request.dtype == "bfloat16":
        return "Triton's interpreter computes bfloat16 products wrongly; use float32 there"
    return None


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    from ..device import plan as plans
    from ..kernels.triton.launch import limits

    found = plans.forward(request, limits(request))
    count = sum(hasattr(step, "held") for step in found.steps)
    return f"{count} launches of the causal pass: {found}"


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
    """Return (o, state, what `backward` needs)."""
    from ..kernels.triton import run

    if request.library == "torch":
        return exchange.on_memory(functools.partial(run.forward, request), inputs)
    with exchange.torch_for(request.library) as (into, back):
        o, state, saved = run.forward(request, into(inputs))
        return back(o), back(state), saved


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    from ..kernels.triton import run

    if request.library == "torch":
        pull = functools.partial(run.backward, request)
        return exchange.on_memory(pull, inputs, saved, do, dstate)
    with exchange.torch_for(request.library) as (into, back):
        given = into(inputs), saved, into(do), into(dstate)
        grads: Gradients = back(run.backward(request, *given))
        return grads


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; never donates."""
    o, state, _ = forward(request, inputs)
    return o, state


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence, by the generic code."""
    return array_api.summarize(request, inputs)


def info() -> Info:
    """Describe this backend on this machine."""
    reason, device, version = _missing(), "", ""
    if not reason:
        import torch
        import triton

        version = f"triton {triton.__version__}"
        device = "Triton's interpreter" if _interpreted() else torch.cuda.get_device_name()
    dtypes = DTYPES if reason or not _interpreted() else ("float16", "float32")
    return Info(
        not reason, reason, device, version, ("linear", "hla2", "ahla", "hla3"), dtypes, True
    )
