"""Calls done by what a backend prepared for memory laid out so (`hla.again`), of any library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..core.namespace import Array
from ..core.request import Inputs, Request
from .exchange import loaded

Run = Callable[[list[Array], list[int]], Any]  # of arrays and their addresses
Addresses = Callable[[list[Array]], list[int] | None]  # of arrays like earlier ones
Pulls = dict[int, list[tuple[Addresses, Run]]]  # ways to pull gradients back, by arrays
SEVERAL = 8  # layouts of the gradients given to one kind of calls


def forward(
    backend: str, request: Request, inputs: Inputs, layout: Any, arrays: Sequence[Array]
) -> Run | None:
    """Return what does such calls of ``arrays`` as the caller gave them; None if nothing can."""
    module, state = loaded(backend), inputs.state or ()
    if module.again_forward is None or module.again_backward is None:
        return None
    if layout.packed:  # a state without S keeps its arrays, and is returned packed
        return None
    if any(x is not y for x, y in zip(state, arrays[len(arrays) - len(state) :], strict=True)):
        return None  # it was brought to another dtype or shape
    found: Run | None = module.again_forward(request, inputs, layout.axis)
    return found


def inputs_of(request: Request, layout: Any, arrays: Sequence[Array]) -> Inputs:
    """Return q, k, v, the gate and the fields of the state as the checks would leave them."""
    q, k, v = map(layout.tokens_in, arrays[:3])
    rest, decay, log_gate, state = list(arrays[3:]), None, None, None
    if request.gate == "decay":
        decay = rest.pop(0)
    elif request.gate == "log_gate":
        log_gate = layout.gate_in(rest.pop(0), request.tokens)
    if rest:
        kind: Any = request.state_type
        state = kind(*rest)
    return Inputs(q, k, v, decay, log_gate, state)


def pulled(pulls: Pulls, arrays: list[Array]) -> Any:
    """Pull back by what was prepared for gradients like these; None if nothing was."""
    for addresses_of, pull in pulls.get(len(arrays), ()):
        addresses = addresses_of(arrays)
        if addresses is not None:
            return pull(arrays, addresses)
    return None


def keep(pulls: Pulls, count: int, addresses_of: Addresses, pull: Run) -> None:
    """Keep what pulls gradients back of so many arrays."""
    ways = pulls.setdefault(count, [])
    if len(ways) >= SEVERAL:
        ways.clear()
    ways.append((addresses_of, pull))
