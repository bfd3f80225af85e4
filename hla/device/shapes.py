"""Shapes of all that a request computes, by name; no backend is asked."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from ..core.passes import Shape, broadcast
from ..core.programs import Passes, prune
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
    found = {"q": request.q_shape, "k": request.k_shape, "v": request.v_shape}
    found["v|1"] = (request.tokens, 1)
    for s in request.passes:
        q, k, v = found[s.q], found[s.k], found[s.v]
        held = broadcast(k[:-2], v[:-2], request.gate_batch if s.kind != "full" else ())
        found[s.start] = found[s.start.replace("@0", "@T")] = (*held, k[-1], v[-1])
        before = found.get(s.out, (1, 1))[:-2]
        found[s.out] = (*broadcast(before, held, q[:-2]), k[-2], v[-1])
    return found


def alive(request: Request, start: bool) -> Passes:
    """Return the passes that a forward runs, from an initial state where there is one."""
    given = {"q", "k", "v", "v|1"} | {s.start for s in request.passes if start}
    wanted = {"o"} | ({"o|1"} if request.normalize else set())
    wanted |= {s.end for s in request.passes} - {""} if request.return_state else set()
    return prune(request.passes, given, wanted)[0]


def saved(request: Request) -> tuple[str, ...]:
    """Name what the gradient reads beside the inputs, whatever ran the forward.

    These are the intermediates that later passes read and, of a quotient, both of its terms.
    """
    if not request.gradient:
        return ()
    steps = alive(request, False)
    read = {name for s in steps for name in (s.q, s.k, s.v)}
    read |= {"o", "o|1"} if request.normalize else set()
    return tuple(dict.fromkeys(s.out for s in steps if s.out in read))


def shapes(request: Request) -> Shapes:
    """Return the shapes of o, of the final state's fields where asked, and of what is `saved`."""
    found, kind = named(request), cast("Any", request.state_type)
    fields = request.state_shapes()
    names = kind._fields if request.return_state else ()
    return Shapes(
        found["o"], {x: fields[x] for x in names}, {name: found[name] for name in saved(request)}
    )
