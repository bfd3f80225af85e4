"""What the fused rows of any backend read off a request and its launches."""

from __future__ import annotations

from ..core.passes import broadcast
from ..core.programs import CAUSAL
from ..core.request import Request
from .steps import Fused, Launch, Parts, Ref


def masked(request: Request) -> int:
    """Count the steps of the operator's causal program, 0 where a request does not begin so."""
    steps = CAUSAL[request.operator]
    begins = [s.does for s in request.program.steps[: len(steps)]]
    return len(steps) if begins == [s.does for s in steps] else 0


def matched(request: Request) -> bool:
    """Whether y has all the heads that u has, so that what is made of both is of one batch."""
    keys = broadcast(request.q_shape[:-2], request.k_shape[:-2], request.gate_batch)
    return keys == broadcast(keys, request.v_shape[:-2])


def gate_parts(request: Request, parts: Parts) -> Parts | None:
    """Return the parts of a gate's gradient that sweeps of an adjoint leave, if it is requested."""
    return parts if request.gate is not None and request.gate_given else None


def flipped(ref: Ref | None) -> Ref | None:
    """Return the transpose of a state."""
    return ref and ref._replace(turned=not ref.turned)


def kept(fused: Fused, s: Launch) -> Ref | None:
    """Return where a launch leaves what it makes, if anywhere."""
    return s.o[0] if s.o and s.o[0].name not in fused.inner else None
