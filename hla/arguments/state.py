"""Checks of the incoming state, which may be packed, broadcast, or of a lower dtype."""

from __future__ import annotations

from typing import Any

from ..core.namespace import Array, namespace
from ..core.request import Request
from ..errors import kind_of
from ..libraries import library_of
from ..states import HLA2RidgeState, HLA2State
from ..states.packed import STATE_OF, packed_shape
from .arrays import array, broadcasts, floating


def kinds(state_type: type[Any]) -> tuple[type[Any], ...]:
    """Return the types of state that do for one: a ridge reads more of the same state."""
    ridge = (HLA2State, HLA2RidgeState)
    return ridge if state_type in ridge else (state_type,)


def state_type(name: str, state: Any, default: type[Any] | None, ridge: float) -> type[Any]:
    """Check that a state, packed or not, is of the request's kind; return its type unpacked."""
    assert default is not None
    if not hasattr(state, "_fields"):
        raise TypeError(
            f"{name} is {kind_of(state)}; expected {default.__name__}, packed or not, or None. Of"
            f" saved arrays make one: hla.states.{default.__name__}(**fields)"
        )
    kind: type[Any] = STATE_OF.get(type(state), type(state))
    if kind not in kinds(default):
        raise ValueError(
            f"{name} is {kind_of(state)}; expected {default.__name__}, packed or not, the state of"
            " this operator, mask and convention. Pass those that it was made with"
        )
    if ridge and kind is HLA2State:
        raise ValueError(
            f"{name} is {type(state).__name__}, which lacks the C and m that ridge > 0 reads; start"
            " from a state made with ridge > 0 or from Segment.to_state()"
        )
    return kind


def brought(name: str, request: Request, q: Array, state: Any) -> Any:
    """Check each field of the incoming state and bring it to the accumulation dtype."""
    xp, fields, packed = namespace(q), {}, type(state) in STATE_OF
    dtype = getattr(xp, request.accumulate)
    for field, shape in request.state_shapes().items():
        label, x = f"{name}.{field}", getattr(state, field)
        try:
            x = array(label, x, q, "q_t" if name == "state" else "q")
        except TypeError as error:
            raise ValueError(str(error)) from None
        floating(label, x)
        if library_of(x).dtype_name(x) == "float64" and request.accumulate != "float64":
            raise ValueError(
                f"{label} has dtype {x.dtype}; expected {request.accumulate} or lower. Cast it"
            )
        full = packed_shape(shape) if packed and field == "S" else shape
        extra = max(0, x.ndim - len(full))
        if all(n == 1 for n in x.shape[:extra]):  # as a segment's field has them
            x = xp.reshape(x, x.shape[extra:]) if extra else x
        broadcasts(label, x.shape, full, "its shape here. Keep the heads and widths of its call")
        fields[field] = xp.astype(x, dtype, copy=False)
    return type(state)(**fields)
