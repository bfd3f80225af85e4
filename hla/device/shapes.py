"""Shapes of all that a request computes, by name, without a backend."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from ..core.passes import Shape
from ..core.programs import Passes, all_shapes
from ..core.request import Request


class Shapes(NamedTuple):
    """Of the results of a forward: a state by its fields, intermediates by their names."""

    o: Shape
    state: dict[str, Shape]
    saved: dict[str, Shape]


def named(request: Request) -> dict[str, Shape]:
    """Return the shape of every array of a program: inputs, outputs, states.

    The "P@0" and "P@T" of a denominator are columns, (*batch, D, 1). A state has the batch axes of
    just the inputs that it is made of.
    """
    given = {"q": request.q_shape, "k": request.k_shape, "v": request.v_shape}
    given["v|1"] = (request.tokens, 1)
    found, states = all_shapes(request.passes, given, request.gate_batch)
    for s, shape in zip(request.passes, states, strict=True):
        found[s.start] = found[s.start.replace("@0", "@T")] = shape
    return found


def alive(request: Request, start: bool) -> Passes:
    """Return the passes that a forward runs, from an initial state where there is one."""
    return request.alive(request.passes, start)


def saved(request: Request) -> tuple[str, ...]:
    """Name what the gradient reads beside the inputs, whatever ran the forward."""
    return request.saved(request.passes)


def shapes(request: Request) -> Shapes:
    """Shapes of o, of the final state's fields where requested, and of what is `saved`."""
    found, kind = named(request), cast("Any", request.state_type)
    fields = request.state_shapes()
    names = kind._fields if request.return_state else ()
    return Shapes(
        found["o"], {x: fields[x] for x in names}, {name: found[name] for name in saved(request)}
    )
