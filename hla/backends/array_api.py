"""The reference: core over any array library; refuses nothing valid."""

from __future__ import annotations

from typing import Any

import array_api_compat

from .. import arrays
from ..core import forms
from ..core.adjoint import ONE_TOKEN
from ..core.forms import Gradients
from ..core.namespace import Array
from ..core.request import Inputs, Request
from ..dispatch import Info


def supports(request: Request) -> str | None:
    """Return the reason for refusing ``request``, or None."""
    return None


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    """Return (o, state, what `backward` needs)."""
    o, state, trace = arrays.call(forms.forward, request, inputs.q, inputs)
    return o, state, trace


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    grads: Gradients = arrays.call(forms.backward, request, inputs.q, inputs, saved, do, dstate)
    return grads


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; never donates."""
    o, state, _ = arrays.call(_one_token, request, inputs.q, inputs)
    return o, state


def _one_token(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    o, state, _ = forms.forward(request, inputs, ONE_TOKEN)
    return o, state, None


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence."""
    return arrays.call(forms.summarize, request, inputs.q, inputs)


def info() -> Info:
    """Describe this backend on this machine."""
    return Info(
        available=True,
        reason="",
        device="that of the arrays",
        version=f"array-api-compat {array_api_compat.__version__}",
        operators=("linear", "hla2", "ahla", "hla3"),
        dtypes=arrays.FLOATS,
        gradients=True,
    )
