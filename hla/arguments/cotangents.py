"""Checks of what the pullback of `hla.vjp` is given."""

from __future__ import annotations

from typing import Any

from ..core.namespace import Array, device, namespace
from ..core.passes import Shape
from ..core.request import Inputs, Request
from ..errors import kind_of
from ..layout import Layout
from ..states.packed import PACKED_OF, packed_shape
from .arrays import array, floating


def cotangents(
    request: Request, inputs: Inputs, layout: Layout, shape: Shape, do: Any, dstate: Any
) -> tuple[Array | None, Any]:
    """Check the gradients of o, of the given shape, and of the state; return them canonical."""
    q = inputs.q
    if do is not None:
        do = layout.tokens_in(_cotangent("do", do, q, tuple(shape), "o"))
    if dstate is None:
        return do, None
    if not request.return_state or request.state_type is None:
        raise ValueError(
            "dstate was given, but no state was returned; pass None, or hla.vjp return_state=True"
        )
    kind = request.state_type
    expected = PACKED_OF[kind] if layout.packed else kind
    if type(dstate) is not expected:
        raise (ValueError if hasattr(dstate, "_fields") else TypeError)(
            f"dstate is {kind_of(dstate)}; expected {expected.__name__} like the returned state."
            " A field without a gradient may be None"
        )
    xp, fields = namespace(q), {}
    dtype = getattr(xp, request.accumulate)
    for field, full in request.state_shapes().items():
        if layout.packed and field == "S":
            full = packed_shape(full)
        x = getattr(dstate, field)
        if x is None:
            fields[field] = xp.zeros(full, dtype=dtype, device=device(q))
        else:
            x = _cotangent(f"dstate.{field}", x, q, full, f"state.{field}")
            fields[field] = xp.astype(x, dtype, copy=False)
    given = any(x is not None for x in dstate)
    return do, layout.dstate_in(expected(**fields)) if given else None


def _cotangent(name: str, x: Any, q: Array, shape: Shape, like: str) -> Array:
    """Check that ``x`` can be the gradient of an output."""
    x = floating(name, array(name, x, q))
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected {shape} like {like}. Broadcast or sum it"
        )
    return x
