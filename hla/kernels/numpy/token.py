"""One token through a program in NumPy, with the state updated where it lies where it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...core.passes import Shape
from ...core.request import Inputs, Request
from ...device.token import Ops, run, updates

Array = Any  # of NumPy


def step(
    request: Request, inputs: Inputs, donate: bool, ops: Ops | None = None
) -> tuple[Array, Any]:
    """Return (o, state) of one token; with ``donate`` in the memory of the given state."""
    given = {} if inputs.state is None else inputs.state._asdict()
    donate = donate and updates(request) and _owned(given, inputs, request.state_shapes())
    return run(request, inputs, ops or OPS, donate)


def again(step: Callable[..., Any], request: Request, inputs: Inputs, donate: bool) -> Any:
    """Return what does ``step`` of other arrays laid out alike (`contract.Backend.again_step`)."""
    gate, begins, kind = request.gate, inputs.state is None, type(inputs.state)

    def run(arrays: list[Array], addresses: list[int]) -> tuple[Array, Any]:
        q, k, v, *rest = arrays
        gates = {gate: rest.pop(0)} if gate else {}
        state = None if begins else kind(*rest)
        given = Inputs(q[..., None, :], k[..., None, :], v[..., None, :], None, None, state)
        o, new = step(request, given._replace(**gates), donate)
        return o[..., 0, :], new

    return run


def _owned(given: dict[str, Array], inputs: Inputs, shapes: Mapping[str, Shape]) -> bool:
    """Whether each field of a state is whole, contiguous memory of its own that may be written."""
    fields = list(given.values())
    others = [*fields, *(x for x in inputs[:5] if x is not None)]
    return all(x.flags.carray and x.shape == shapes[name] for name, x in given.items()) and not any(
        np.may_share_memory(x, y) for i, x in enumerate(fields) for y in others[i + 1 :]
    )


def _cast(x: Array, dtype: Any) -> Array:
    return x.astype(dtype, copy=False)


def _advanced(
    before: Array | None, gate: Array | None, k: Array, v: Any, shape: Shape, donate: bool
) -> Array:
    """Return gate * before + k * v, of its full shape."""
    if before is None:
        return np.multiply(k, v, out=np.empty(shape, k.dtype))
    new = before if donate else np.empty(shape, k.dtype)
    if gate is None:
        return np.add(before, k * v, out=new)
    np.multiply(before, gate, out=new)
    return np.add(new, k * v, out=new)


def _read(q: Array, state: Array | None, shape: Shape) -> Array:
    if state is None:
        return np.zeros((*shape[:-2], shape[-1]), q.dtype)
    return (q[..., None, :] @ state)[..., 0, :]


def _weight(q: Array, state: Array | None, shape: Shape) -> Array:
    if state is None:
        return np.zeros(shape[:-1], q.dtype)
    return np.vecdot(q, state)


OPS = Ops(_cast, _advanced, _read, _weight)
