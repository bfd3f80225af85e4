"""Triton on an NVIDIA GPU: plans by launches of the causal pass, for torch, CuPy and JAX arrays.

Without a GPU, Triton's own interpreter runs the same kernels on the host where TRITON_INTERPRET=1
was set before the first import: for tests, not for use.
"""

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
    libraries=("torch", "cupy", "jax", "numba"),
    native="torch",
    serves=(("torch", True),),
    forms=("chunked",),
    traced=("torch",),
    opaque=True,
    packed=True,
)


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


def _device(request: Request) -> str:
    """Name the device of a request as torch does; JAX and CuPy name theirs apart."""
    cuda = request.accelerator and request.library != "torch"
    return "cuda" if cuda else request.device


def unable(request: Request) -> str | None:
    """Return why no device here takes ``request``, or None."""
    if not _interpreted():
        return _unable(_device(request))
    if request.dtype == "bfloat16":
        return "Triton's interpreter computes bfloat16 products wrongly; use float32 there"
    return None


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    import torch

    from ..device import plan as plans
    from ..kernels.triton import launch, rows

    token = "" if request.mask == "none" else f"; one token: {_kernels().one_token.named(request)}"
    if request.tokens == 1 and request.return_state:
        return token[2:]
    where = torch.device("cpu" if _interpreted() else _device(request))
    tokens = launch.segments(request, where)
    found = plans.forward(request, launch.limits(request, where), rows.rows(request, where), tokens)
    return found.summary(tokens) + token


@functools.cache
def _kernels() -> Any:
    if not _interpreted():
        from ..kernels.triton import launch

        launch.prepare_compiler()  # while the rest is imported
    from ..kernels.triton import run

    return run


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
    return _kernels().one_token.again(request, inputs, donate)


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
    import torch
    import triton

    version = f"triton {triton.__version__}"
    if _interpreted():
        return Machine("", "Triton's interpreter", version, ("float16", "float32"))
    return Machine("", torch.cuda.get_device_name(), version)
