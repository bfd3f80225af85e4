"""One token of NumPy's arrays, each state advanced and read by the kernel of the host."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from ...core.passes import Shape, broadcast
from ...core.request import Inputs, Request
from ..numpy import token as numpy_token
from .host import compiled, token
from .memory import Array, heads


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token; with ``donate`` in the memory of the given state."""
    return numpy_token.step(request, inputs, donate, OPS)


def _both(
    before: Array | None,
    gate: Array | None,
    q: Array,
    k: Array,
    v: Array,
    shape: Shape,
    donate: bool,
) -> tuple[Array, Array] | None:
    """Advance a state and read it; None where several queries read one, or memory is unaligned."""
    lead, dtype = shape[:-2], k.dtype
    if broadcast(q.shape[:-1], lead) != lead:
        return None
    o = np.empty((*lead, shape[-1]), dtype)
    after = before if donate and before is not None else np.empty(shape, dtype)
    start = np.zeros(shape[-2:], dtype) if before is None else before
    if not all(x.flags.aligned for x in (q, k, v, start)):
        return None
    arrays = (q, k, v, _one(dtype) if gate is None else gate, start, o, after)
    table = _heads(lead, tuple([x.shape for x in arrays]))
    flat = [x.ravel() for x in arrays]
    compiled(token, dtype)(*flat, table, *shape[-2:], after is not before)
    return after, o


@functools.cache
def _one(dtype: Any) -> Array:
    return np.ones(1, dtype)


@functools.lru_cache(maxsize=1024)
def _heads(lead: Shape, shapes: tuple[Shape, ...]) -> Array:
    """Return `heads` of contiguous arrays of these shapes."""
    own = (1, 1, 1, 1, 2, 1, 2)  # axes beyond the batch
    strides = [tuple(math.prod(x[i + 1 :]) for i in range(len(x))) for x in shapes]
    return heads(lead, *((x[:-n], y[:-n]) for x, y, n in zip(shapes, strides, own, strict=True)))


OPS = numpy_token.OPS._replace(both=_both)
