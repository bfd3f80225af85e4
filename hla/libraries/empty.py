"""Calls of no batch entries: what their inputs share still has a state and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.fields import rank
from ..core.namespace import Array, padded
from ..core.passes import Shape, broadcast
from ..core.reference import Gradients
from ..core.request import Inputs, Request


class Filled:
    """A backend that runs each empty batch axis as one entry of zeros, and takes it off again.

    A shared denominator lies beside its matrices, and a shared key's gradient is summed over the
    entries: of no entries there would be nothing to read them from.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.capabilities = backend.capabilities._replace(packed=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
        """As the backend's."""
        o, state, saved = self._backend.forward(*_filled(request, inputs))
        return _cut(o, _output(request)), _cut_state(state, request), saved

    def backward(
        self, request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
    ) -> Gradients:
        """As the backend's."""
        do = None if do is None else _fill(do, 2)
        found = self._backend.backward(*_filled(request, inputs), saved, do, _fill_state(dstate))
        return Gradients(*map(_cut_like, found, inputs))

    def step(self, request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
        """As the backend's."""
        o, state = self._backend.step(*_filled(request, inputs), donate)
        return _cut(o, _output(request)), _cut_state(state, request)

    def summarize(self, request: Request, inputs: Inputs) -> Any:
        """As the backend's."""
        segment = self._backend.summarize(*_filled(request, inputs))
        shapes = request.state_shapes(segment=True) | {"rho": request.gate_batch}
        shapes |= {x: shapes[y] for x, y in (("G", "F"), ("h", "eta")) if y in shapes}
        return type(segment)(*(_cut(x, shapes[f]) for f, x in segment._asdict().items()))


def _filled(request: Request, inputs: Inputs) -> tuple[Request, Inputs]:
    """Return the call on arrays that have one entry where they had none; nothing is divided."""
    q, k, v = (_fill(x, 2) for x in inputs[:3])
    decay = None if inputs.decay is None else _fill(inputs.decay, 0, 1.0)
    log_gate = None if inputs.log_gate is None else _fill(inputs.log_gate, 1)
    request = dataclasses.replace(
        request,
        normalize=False,
        q_shape=tuple(q.shape),
        k_shape=tuple(k.shape),
        v_shape=tuple(v.shape),
        gate_batch=tuple(1 if n == 0 else n for n in request.gate_batch),
    )
    return request, Inputs(q, k, v, decay, log_gate, _fill_state(inputs.state))


def _fill(x: Array, own: int, fill: float = 0.0) -> Array:
    """Give ``x`` one entry along each empty axis before its ``own`` last ones."""
    for axis in range(-x.ndim, -own):
        x = padded(x, axis, after=1, fill=fill) if x.shape[axis] == 0 else x
    return x


def _fill_state(state: Any) -> Any:
    if state is None:
        return None
    return type(state)(*(_fill(x, rank(f)) for f, x in state._asdict().items()))


def _output(request: Request) -> Shape:
    q, k, v = request.q_shape, request.k_shape, request.v_shape
    return (*broadcast(q[:-2], k[:-2], v[:-2]), request.tokens, v[-1])


def _cut(x: Array, shape: Shape) -> Array:
    """Return no entries of ``x`` along the axes where ``shape``, its last axes, has none."""
    lengths = (1,) * (x.ndim - len(shape)) + tuple(shape)
    return x[tuple(slice(0, 0) if n == 0 else slice(None) for n in lengths)]


def _cut_like(dx: Any, x: Any) -> Any:
    """Return a gradient in the shape of its input, of each field in that of the field."""
    if dx is None or isinstance(x, tuple):
        return dx if dx is None else type(dx)(*map(_cut_like, dx, x))
    return _cut(dx, tuple(x.shape))


def _cut_state(state: Any, request: Request) -> Any:
    if state is None:
        return None
    shapes = request.state_shapes()
    return type(state)(*(_cut(x, shapes[f]) for f, x in state._asdict().items()))
