"""Pallas for JAX arrays: plans by kernels of Mosaic GPU (Hopper) and, by name, of TPUs.

Under a trace, which has no device, the platform is chosen where the program is lowered; elsewhere
than on a GPU or TPU it then runs the kernels' text as plain jnp. On the host Pallas' interpreter
runs the TPU kernels where HLA_PALLAS_INTERPRET=1 is set: for tests, not for use.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from ..contract import Capabilities, Machine
from ..core.namespace import Array
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from . import array_api

CAPABILITIES = Capabilities(
    ("float16", "bfloat16", "float32"),
    libraries=("jax",),
    native="jax",
    serves=(("jax", True),),
    forms=("chunked",),
    traced=("jax",),
    opaque=True,
)
OLDEST = 0, 10, 2
CARD = "9.0"  # compute capability; wgmma is nowhere else
NEEDS = f"NVIDIA GPUs of compute capability {CARD} and on TPUs"


@functools.cache
def _missing() -> str:
    """Why nothing can run with what is installed, or ""."""
    if importlib.util.find_spec("jax") is None:
        return 'jax is not installed; pip install ".[pallas]" in a checkout of hla'
    version = metadata.version("jax")
    if tuple(int(x) for x in version.split(".")[:3] if x.isdigit()) < OLDEST:
        return f"it needs jax {'.'.join(map(str, OLDEST))} or newer, here is {version}"
    return ""


def _mosaic() -> bool:
    """Whether Mosaic GPU imports: before 0.11 JAX does not install what it needs."""
    older = metadata.version("jax").startswith("0.10.")
    return not older or importlib.util.find_spec("absl") is not None


def _interpreted() -> bool:
    return os.environ.get("HLA_PALLAS_INTERPRET") == "1"


def _kernels(device: Any) -> str:
    """Return whose kernels a device of JAX runs: "cuda", "tpu", "" of none."""
    if device.platform == "tpu":
        return "tpu"
    card = device.platform == "gpu" and getattr(device, "compute_capability", "")
    return "cuda" if card == CARD else ""


@functools.cache
def _platforms() -> dict[str, str]:
    """Return where kernels run on each device of JAX, by its name; "" where none do."""
    import jax

    platforms = {jax.default_backend(), "cpu"}
    return {str(x): _kernels(x) for platform in platforms for x in jax.devices(platform)}


def _platform(request: Request) -> str:
    """Return where the kernels of a request run, "" of none or of a trace."""
    if request.device == "traced":
        return ""
    found = {_platforms().get(name, "") for name in request.device.split(",")}
    if found == {""} and _interpreted():
        return "host"
    return found.pop() if len(found) == 1 else ""


def unable(request: Request) -> str | None:
    """Return why no device here takes ``request``, or None."""
    if any(type(n) is not int for n in (*request.q_shape, *request.k_shape, *request.v_shape)):
        return "a kernel's grid has no symbols for sizes; use backend='array_api'"
    if request.device == "traced" or _platform(request):
        return None
    where = "cpu" if "CPU" in request.device else request.device
    return f"it runs on {NEEDS}, these arrays are on {where}"


def automatic(request: Request) -> bool:
    """Whether backend=None may pick it: not on TPUs, where it was never timed.

    A trace may end on any accelerator here: these are to be of one kind.
    """
    here = {where for name, where in _platforms().items() if "CPU" not in name.upper()}
    there = here if request.device == "traced" else {_platform(request)}
    return len(there) == 1 and "tpu" not in there


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    from ..device import plan as plans
    from ..kernels.pallas import run

    where = _platform(request) or "cuda"
    if _one_token(request):
        one = where == "cuda" and _in_one_kernel(request)
        return f"one token, {'in one kernel' if one else 'by what XLA fuses of the generic code'}"
    tokens = run.segments(request, where)
    found = plans.forward(request, run.limits(request, where), run.fitting(request, where), tokens)
    if request.device == "traced":
        return f"{found.summary(tokens)}; lowered for the host, the same chunks as plain jnp"
    return found.summary(tokens)


def _one_token(request: Request) -> bool:
    return request.tokens == 1 and not request.gradient


def _in_one_kernel(request: Request) -> bool:
    """Whether Mosaic GPU has a kernel of one token for a request."""
    if not _mosaic():
        return False
    from ..kernels.pallas import token

    return token.fits(request)


def _run(name: str, request: Request, *given: Any) -> Any:
    """Run "forward" or "backward" where the arrays are or, under a trace, will be."""
    import jax

    from ..kernels.pallas import lowering, run

    call: Callable[..., Any] = getattr(run, name)
    where = _platform(request)
    if where:
        return call(where, request, *given)
    plain = functools.partial(call, "plain", request)
    ahead = "finish" if name == "backward" else "begin" if request.gradient else ""
    on = {
        x: lowering.alone(x, functools.partial(call, x, request), plain, ahead)
        for x in ("cuda", "tpu")
        if x == "tpu" or _mosaic()
    }
    default = plain
    if _interpreted():
        default = lowering.alone("", functools.partial(call, "host", request), plain)
    return jax.lax.platform_dependent(*given, **on, default=default)


def _token(request: Request, inputs: Inputs) -> tuple[Array, Any]:
    """Return (o, state or None) of one token."""
    import jax

    def generic(inputs: Inputs) -> tuple[Array, Any]:
        if request.return_state:
            return array_api.step(request, inputs, False)
        return array_api.forward(request, inputs)[:2]

    where = _platform(request)
    if where not in ("", "cuda") or not _in_one_kernel(request):
        return generic(inputs)
    from ..kernels.pallas import lowering, token

    kernel = functools.partial(token.step, request)
    if where:
        return kernel(inputs)
    found: tuple[Array, Any] = jax.lax.platform_dependent(
        inputs, cuda=lowering.alone("cuda", kernel, generic), default=generic
    )
    return found


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
    """Return (o, state, what `backward` needs)."""
    if _one_token(request):
        return *_token(request, inputs), ()
    found: tuple[Array, Any, tuple[Array, ...]] = _run("forward", request, inputs)
    return found


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    found: Gradients = _run("backward", request, inputs, saved, do, dstate)
    return found


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence, by the generic code."""
    return array_api.summarize(request, inputs)


def machine() -> Machine:
    """Describe what it finds here."""
    if _missing():
        return Machine(_missing())
    try:
        found = _platforms()
    except RuntimeError as error:
        return Machine(f"jax finds no devices: {error}")
    version = f"jax {metadata.version('jax')}"
    if not any(found.values()):
        if _interpreted():
            return Machine("", "Pallas' interpreter", version)
        return Machine(f"it runs on {NEEDS}; jax sees {', '.join(found)}")
    if "cuda" in found.values() and not _mosaic():
        return Machine(f"absl-py is not installed, which Mosaic GPU of {version} imports")
    return Machine("", _kind(), version)


@functools.cache
def _kind() -> str:
    import jax

    return str(jax.devices()[0].device_kind)
