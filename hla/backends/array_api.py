"""The reference: core over any array library; refuses nothing valid."""

from __future__ import annotations

from typing import Any

import array_api_compat

from ..core import forms, namespace
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
    o, state, trace = namespace.call(forms.forward, request, inputs.q, inputs)
    return o, state, trace


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    grads: Gradients = namespace.call(forms.backward, request, inputs.q, inputs, saved, do, dstate)
    return grads


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; never donates."""
    o, state, _ = namespace.call(_one_token, request, inputs.q, inputs)
    return o, state


def _one_token(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    o, state, _ = forms.forward(request, inputs, ONE_TOKEN)
    return o, state, None


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence."""
    return namespace.call(forms.summarize, request, inputs.q, inputs)


def info() -> Info:
    """Describe this backend on this machine."""
    return Info(
        available=True,
        reason="",
        device="that of the arrays",
        version=f"array-api-compat {array_api_compat.__version__}",
        operators=("linear", "hla2", "ahla", "hla3"),
        dtypes=namespace.FLOATS,
        gradients=True,
    )
