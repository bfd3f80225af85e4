"""The reference: core over any array library; refuses nothing valid."""

from __future__ import annotations

from typing import Any, cast

import array_api_compat

from ..contract import Capabilities, Machine
from ..core import reference
from ..core.namespace import Array, device, library_of, namespace
from ..core.passes import Shape
from ..core.reference import Gradients
from ..core.request import FLOATS, Inputs, Request
from ..core.run import ONE_TOKEN

CAPABILITIES = Capabilities(FLOATS, serves=(("any", False), ("any", True)))


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
    """Return (o, state, what `backward` needs)."""
    found: tuple[Array, Any, tuple[Array, ...]]
    found = library_of(inputs.q).run(_forward, request, inputs)
    return found


def _forward(request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
    o, state, env = reference.forward(request, inputs)
    return o, state, reference.saved(request, env)


def empty(request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
    """Return what `forward` does, of the same shapes and dtypes and of any values."""
    q, kind = inputs.q, cast("Any", request.state_type)
    xp = namespace(q)
    o, fields, saved = reference.shapes(request)

    def sums(shape: Shape) -> Array:
        return xp.empty(shape, dtype=getattr(xp, request.accumulate), device=device(q))

    state = kind(*map(sums, fields)) if request.return_state else None
    return xp.empty(o, dtype=q.dtype, device=device(q)), state, tuple(map(sums, saved))


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    given = inputs, saved, do, dstate
    grads: Gradients = library_of(inputs.q).run(_backward, request, *given)
    return grads


def _backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    return reference.backward(request, inputs, reference.restored(request, saved), do, dstate)


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token, with ``donate`` in the given state's memory where it can."""
    library: Any = library_of(inputs.q)
    found: tuple[Array, Any] | None = library.in_place(request, inputs) if donate else None
    if found is not None:
        return found
    o, state, _ = library.run(_one_token, request, inputs)
    return o, state


def _one_token(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    o, state, _ = reference.forward(request, inputs, ONE_TOKEN)
    return o, state, None


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence."""
    return library_of(inputs.q).run(reference.summarize, request, inputs)


def machine() -> Machine:
    """Describe what it finds here."""
    return Machine(
        device="that of the arrays", version=f"array-api-compat {array_api_compat.__version__}"
    )
