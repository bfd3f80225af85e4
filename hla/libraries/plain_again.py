"""Calls of `hla.scan` and `hla.vjp` like an earlier one, of a library without an autograd.

They are done by what the backend prepared for memory laid out so: see `hla.again`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..core.namespace import Array
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from . import library_of, prepared
from .exchange import loaded
from .prepared import Pulls, Run


def scan(
    backend: str, request: Request, inputs: Inputs, layout: Any, arrays: Sequence[Array]
) -> Run | None:
    """Return what does such calls, of arrays and their addresses; None if nothing can.

    Parameters
    ----------
    backend : str
        The one to do them.
    request, inputs, layout
        The call as the checks found it.
    arrays : sequence of array
        As the caller gave them: q, k, v, the gate and the fields of the state.
    """
    forward = prepared.forward(backend, request, inputs, layout, arrays)
    kind: Any = request.state_type if request.return_state else None
    if forward is None or kind is None:
        return forward and (lambda arrays, addresses: forward(arrays, addresses)[0])
    results = 1 + len(kind._fields)

    def run(arrays: list[Array], addresses: list[int]) -> Any:
        found = forward(arrays, addresses)
        return found[0], kind(*found[1:results])

    return run


def vjp(
    backend: str,
    request: Request,
    inputs: Inputs,
    layout: Any,
    arrays: Sequence[Array],
    pull: Callable[..., Gradients],
) -> Run | None:
    """Return what does such calls of `hla.vjp`, as `scan` does.

    ``pull(inputs, o, saved, do, dstate)`` is the way of a gradient that is like no earlier one.
    """
    forward = prepared.forward(backend, request, inputs, layout, arrays)
    if forward is None:
        return None
    kind: Any = request.state_type if request.return_state else None
    results = 1 + len(kind._fields if kind else ())
    pulls: Pulls = {}

    def run(arrays: list[Array], addresses: list[int]) -> Any:
        given = arrays[:]
        o, *found = forward(arrays, addresses)
        call = Call(backend, request, layout, given, found[results - 1 :], pulls)

        def pullback(do: Array | None, dstate: Any = None) -> Gradients:
            """Gradients of every array input from those of the outputs."""
            return _again(call, do, dstate) or _anew(call, pull, o, do, dstate)

        return ((o, kind(*found[: results - 1])) if kind else o), pullback

    return run


class Call(NamedTuple):
    """One call, and how gradients of its kind are pulled back, by the number of arrays."""

    backend: str
    request: Request
    layout: Any  # takes arrays from the caller's layout, and back
    arrays: list[Array]
    saved: list[Array]
    pulls: Pulls


def _again(call: Call, do: Array | None, dstate: Any) -> Gradients | None:
    """Pull back by what was prepared for gradients like these; None if nothing was."""
    ends = () if dstate is None else dstate
    if not isinstance(ends, tuple) or (ends and type(ends) is not call.request.state_type):
        return None
    found: Gradients | None = prepared.pulled(call.pulls, [*call.arrays, *call.saved, do, *ends])
    return found


def _anew(
    call: Call, pull: Callable[..., Gradients], o: Array, do: Array | None, dstate: Any
) -> Gradients:
    """Pull back after all checks, and prepare for more gradients like these."""
    inputs = prepared.inputs_of(call.request, call.layout, call.arrays)
    found = pull(inputs, o, call.saved, do, dstate)
    ends = () if dstate is None else dstate
    wide = call.request.accumulate
    if do is not None and all(x is not None and str(x.dtype) == wide for x in ends):
        _prepare(call, inputs, do, dstate)
    return found


def _prepare(call: Call, inputs: Inputs, do: Array, dstate: Any) -> None:
    """Keep what pulls back such gradients, of arrays as they come."""
    backend, request, layout, arrays, saved, pulls = call
    every = [*arrays, *saved, do, *(dstate or ())]
    addresses_of = library_of(do).alike(every)
    way: Any = loaded(backend).again_backward
    back = addresses_of and way(request, inputs, saved, layout.tokens_in(do), dstate, layout.axis)
    if addresses_of is None or back is None:
        return
    kind: Any = request.state_type

    def pull(arrays: list[Array], addresses: list[int]) -> Gradients:
        dq, dk, dv, *rest = back(arrays, addresses)
        gate = rest.pop(0) if request.gate_given else None
        state = kind(*rest) if rest else None
        if gate is None or request.gate == "decay":
            return Gradients(dq, dk, dv, gate, None, state)
        return Gradients(dq, dk, dv, None, layout.gate_out(gate), state)

    prepared.keep(pulls, len(every), addresses_of, pull)
