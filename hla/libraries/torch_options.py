"""The arguments of torch's operators for a call: tensors, and plain options.

From both the Request is made again, so that symbolic shapes stay symbolic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor
from torch.utils._pytree import tree_flatten

from .. import states
from ..core.request import Inputs, Request
from ..errors import Unsupported
from .describe import describe


class Options(NamedTuple):
    """The plain arguments of an operator, in its order."""

    backend: str
    operator: str
    mask: str
    convention: str
    normalize: bool
    eps: float
    scale: float
    ridge: float
    return_state: bool
    state_type: str  # its name, "" for none
    gate_given: bool
    tf32: bool
    form: str  # "" for none
    chunk_size: int  # 0 for none

    @property
    def kind(self) -> Any:
        """Type of the state."""
        return getattr(states, self.state_type) if self.state_type else None


SHARED = [name for name in Options._fields if name not in ("backend", "state_type")]
OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items())
ABSENT = {"form": "", "chunk_size": 0}  # what stands for None


def options_of(backend: str, request: Request) -> Options:
    """Return an operator's arguments for a request beside its arrays."""
    kind: Any = request.state_type
    shared = {name: getattr(request, name) for name in SHARED}
    shared |= {name: shared[name] or absent for name, absent in ABSENT.items()}
    return Options(backend, state_type="" if kind is None else kind.__name__, **shared)


def inputs_of(options: Options, tensors: Sequence[Any]) -> Inputs:
    """Return q, k, v, decay, log_gate and the state's fields as the inputs of a call."""
    q, k, v, decay, log_gate, *fields = tensors
    return Inputs(q, k, v, decay, log_gate, options.kind(*fields) if fields else None)


def request_of(inputs: Inputs, options: Options, keep: bool) -> Request:
    """Return the request that `options_of` was given; ``keep`` says that a gradient follows."""
    shared = {name: getattr(options, name) for name in SHARED}
    shared |= {name: shared[name] or None for name in ABSENT}
    others = [x for x in (*inputs[3:5], *(inputs.state or ())) if x is not None]
    return describe(inputs, others, state_type=options.kind, gradient=keep, **shared)


def no_forward_mode(backend: str) -> Unsupported:
    """Return the error of a backend that torch's forward mode cannot see through."""
    return Unsupported(f"backend {backend} has no forward-mode derivative; use backend='array_api'")


def present(*given: Any) -> list[Tensor]:
    """Every tensor that there is among arguments and lists of them."""
    return [x for x in tree_flatten(given)[0] if x is not None]


def whole(tensors: Sequence[Tensor], there: Sequence[int]) -> list[Tensor | None]:
    """Put None where a tensor is not there."""
    left = iter(tensors)
    return [next(left) if x else None for x in there]


def moved(tensors: Sequence[Tensor | None], options: Options) -> list[int]:
    """Places of the tensors that have a gradient."""
    gate = (3, 4)
    there = (i for i, x in enumerate(tensors) if x is not None)
    return [i for i in there if options.gate_given or i not in gate]


def like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Empty tensors of the same shapes, whole."""
    return [x.new_empty(x.shape) for x in tensors]


def apart(found: Sequence[Tensor], *given: Any) -> list[Tensor]:
    """Each result whole, as `like` has it, and in memory of its own, as torch requires."""
    taken = {x.untyped_storage().data_ptr() for x in present(given)}
    out = []
    for x in found:
        strides = [math.prod(max(n, 1) for n in x.shape[i + 1 :]) for i in range(x.ndim)]
        if list(x.stride()) != strides or x.untyped_storage().data_ptr() in taken:
            x = x.new_empty(x.shape).copy_(x)
        taken.add(x.untyped_storage().data_ptr())
        out.append(x)
    return out
