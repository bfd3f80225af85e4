"""NumPy on the host: the programs over `kernels.numpy_pass`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..core import forms, namespace
from ..core.forms import Gradients
from ..core.namespace import Array
from ..core.programs import Engine
from ..core.request import Inputs, Request
from ..dispatch import Info
from ..kernels import numpy_program

PLAIN = Engine(numpy_program.run, numpy_program.adjoint)
KEEPING = PLAIN._replace(run=functools.partial(numpy_program.run, keep=True))


def supports(request: Request) -> str | None:
    """Return the reason for refusing ``request``, or None."""
    if request.library != "numpy":
        return f"it runs on NumPy arrays, these are arrays of {request.library}"
    if request.mask == "none" or request.form == "associative":
        return "it runs causal passes; array_api does mask='none' and form='associative'"
    return None


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    """Return (o, state, what `backward` needs)."""
    return forms.forward(request, inputs, KEEPING if request.gradient else PLAIN)


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    return forms.backward(request, inputs, saved, do, dstate, KEEPING)


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; never donates."""
    o, state, _ = forms.forward(request, inputs)
    return o, state


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence."""
    return forms.summarize(request, inputs)


def info() -> Info:
    """Describe this backend on this machine."""
    return Info(
        available=True,
        reason="",
        device="cpu",
        version=f"numpy {np.__version__}",
        operators=("linear", "hla2", "ahla", "hla3"),
        dtypes=namespace.FLOATS,
        gradients=True,
    )
