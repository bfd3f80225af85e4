"""Convert states between public fields and the [matrix | denominator] that passes use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .namespace import Array, expand, library_of, namespace
from .passes import Fields, Shape
from .programs import d
from .request import Request


def aligned(request: Request, xs: Sequence[Array]) -> list[Array]:
    """Give arrays (*batch, X, Y) all batch axes of the request, where their library requires it."""
    axes = max(map(len, (request.q_shape, request.k_shape, request.v_shape)))
    found: list[Array] = library_of(xs[0]).aligned(xs, axes)
    return found


def rank(field: str) -> int:
    """Axes of a field beyond the batch: denominators, the lower-case fields, are vectors."""
    return 1 if field[0].islower() else 2


def batch_rank(field: str, x: Array) -> int:
    """Batch axes of a field of a state or segment; rho has no other."""
    return len(x.shape) - (0 if field == "rho" else rank(field))


def joined(request: Request, state: Any, *, gradient: bool = False) -> dict[str, Array]:
    """Put matrix and, where requested, denominator of each pass side by side, of the full shape.

    The names are those of the first states, of a ``gradient`` those of the last ones' gradients. A
    denominator is the same for all values it is broadcast over, so its gradient is shared out
    evenly among them. Fields that are None are left out.
    """
    if state is None:
        return {}
    shapes, out = request.state_shapes(), {}
    for key in dict.fromkeys(step.state for step in request.program.steps):
        parts = [getattr(state, field) for field in key]
        if any(x is None for x in parts):
            continue
        full = shapes[key[0]]
        found = [expand(parts[0], full)]
        if len(parts) == 2 and request.ones:
            copies = math.prod(full[:-1]) // (math.prod(shapes[key[1]]) or 1)
            x = parts[1] / copies if gradient and copies > 1 else parts[1]
            found.append(expand(x, full[:-1])[..., None])
        found = aligned(request, found)
        whole = found[0] if len(found) == 1 else namespace(found[0]).concat(found, axis=-1)
        out[d(f"{key[0]}@T") if gradient else f"{key[0]}@0"] = whole
    return out


def split(
    finals: Mapping[Fields, Array], shapes: Mapping[str, Shape] | None, *, ones: bool = True
) -> dict[str, Array]:
    """Undo `joined`: each field, with ``shapes`` as a new array of its own full shape."""
    fields = {}
    for key, x in finals.items():
        parts = [x[..., :-1], x[..., -1]] if ones and len(key) == 2 else [x]
        for field, part in zip(key, parts, strict=False):
            fields[field] = part if shapes is None else own(part, shapes[field])
    return fields


def own(x: Array, shape: Shape) -> Array:
    """Copy ``x`` without the equal copies along axes where ``shape`` has 1 or no axis."""
    if library_of(x).explicit(x):  # one of equal copies is not taken from the device that has it
        extra = len(x.shape) - len(shape)
        alike = tuple(i for i in range(len(x.shape)) if i < extra or shape[i - extra] == 1)
        return namespace(x).reshape(namespace(x).max(x, axis=alike), shape)
    for _ in range(len(x.shape) - len(shape)):
        x = x[0, ...]
    index = tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)
    return namespace(x).astype(x[(*index, ...)], x.dtype, copy=True)


def gradient_fields(request: Request, state: Any, grads: Mapping[str, Array]) -> Any:
    """Gradient of the incoming state, each field of the full shape."""
    if state is None:
        return None
    steps = request.program.steps
    found = {s.state: grads[d(s.start)] for s in steps if d(s.start) in grads}
    parts = split(found, None, ones=request.ones)
    fields = state._asdict().items()
    return type(state)(*(parts[f] if f in parts else namespace(x).zeros_like(x) for f, x in fields))
