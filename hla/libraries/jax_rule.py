"""An opaque backend as a function of JAX, which differentiates it, maps it and compiles it.

It is run as it is under jit; its own ``backward`` is its gradient (custom_vjp), and an axis that
vmap adds is one more batch axis in front (custom_vmap). Second derivatives are those of the generic
code: right, to any order, and slower. There is no forward mode.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from ..core.fields import rank
from ..core.namespace import Array
from ..core.passes import Gate, broadcast
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from ..device.token import unpacked
from . import jax_eager
from .exchange import loaded
from .jax_partition import Split, laid

Found = tuple[Array, Any, Any]


def forward(backend: str, node: bool, request: Request, inputs: Inputs) -> Found:
    """Return (o, state, what `backward` needs where the request asks for it)."""
    run = jax_eager.forward if _reads_memory(backend) else _jitted(_scan)
    found: Found = run(backend, request, inputs)
    return found


def backward(
    backend: str, node: bool, request: Request, inputs: Inputs, saved: Any, do: Any, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`, differentiable."""
    run = jax_eager.backward if _reads_memory(backend) else _jitted(_pull)
    found: Gradients = run(backend, request, inputs, saved, do, dstate)
    return found


def _reads_memory(backend: str) -> bool:
    return loaded(backend).capabilities.native != "jax"


def step(
    backend: str, node: bool, request: Request, inputs: Inputs, donate: bool
) -> tuple[Array, Any]:
    """Return (o, state) of one token, differentiable."""
    if donate and request.traced:
        request = dataclasses.replace(request, donate=True)
    o, state, _ = forward(backend, node, request, inputs._replace(state=unpacked(inputs.state)))
    return o, state


def summarize(backend: str, node: bool, request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence."""
    return loaded(backend).summarize(request, inputs)


@functools.cache
def _jitted(function: Any) -> Any:
    return jax.jit(function, static_argnums=(0, 1))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A request among residuals, which otherwise are arrays."""

    request: Request


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(backend: str, request: Request, inputs: Inputs) -> Found:
    o, state, saved = _mapped("forward", backend, request, inputs)
    return o, state, saved if request.gradient else ()


def _scan_forward(backend: str, request: Request, inputs: Any) -> tuple[Found, Any]:
    """Keep what the gradient needs, which is less without that of the gate."""
    moves = any(x.perturbed for x in jax.tree.leaves(inputs[3:5]))
    given: Inputs = jax.tree.map(lambda x: x.value, inputs)
    kept = request
    if not request.gradient:
        kept = dataclasses.replace(request, gradient=True, gate_given=moves)
    o, state, saved = _scan(backend, kept, given)  # not the backend: a derivative may follow
    return (o, state, saved if request.gradient else ()), (_Static(kept), given, saved)


def _scan_backward(backend: str, _: Request, residuals: Any, grads: Any) -> tuple[Inputs]:
    static, inputs, saved = residuals
    do, dstate, _ = grads  # what is saved is a function of the inputs, whose gradient is complete
    do = None if isinstance(do, SymbolicZero) else do
    if all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(dstate)):
        dstate = None
    dstate = jax.tree.map(_whole, dstate)
    found = _pull(backend, static.request, inputs, saved, do, dstate)
    pairs = zip(inputs, found, strict=True)  # always of one structure, as JAX before 0.8 needs
    grads = (jnp.zeros_like(x) if d is None and x is not None else d for x, d in pairs)
    return (jax.tree.map(lambda x, d: laid(d, jax.typeof(x).sharding), inputs, Inputs(*grads)),)


def _whole(x: Any) -> Array:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pull(backend: str, request: Request, *given: Any) -> Gradients:
    found: Gradients = _mapped("backward", backend, request, *given)
    return found


def _pull_forward(backend: str, request: Request, *given: Any) -> tuple[Gradients, Any]:
    inputs, _, do, dstate = given
    return _pull(backend, request, *given), (inputs, do, dstate)


def _pull_backward(backend: str, request: Request, residuals: Any, grads: Any) -> tuple[Any, ...]:
    _, pullback = jax.vjp(functools.partial(_generic, request), *residuals)
    dinputs, ddo, ddstate = pullback(grads)
    return dinputs, None, ddo, ddstate


def _generic(request: Request, inputs: Inputs, do: Array | None, dstate: Any) -> Gradients:
    """Return the gradients that the generic code has."""
    request = dataclasses.replace(request, gradient=False)
    run = functools.partial(loaded("array_api").forward, request)
    (o, state), pullback = jax.vjp(lambda inputs: run(inputs)[:2], inputs)
    do = jnp.zeros_like(o) if do is None else do.astype(o.dtype)
    dstate = jax.tree.map(jnp.zeros_like, state) if dstate is None else dstate
    grads = Gradients(*pullback((do, dstate))[0])
    return grads if request.gate_given else grads._replace(ddecay=None, dlog_gate=None)


_pull.defvjp(_pull_forward, _pull_backward)


def _mapped(call: str, backend: str, request: Request, *given: Any) -> Any:
    """Call a backend's forward or backward; an axis that vmap adds becomes a batch axis."""
    run = functools.partial(getattr(loaded(backend), call), request)

    def rule(size: int, mapped: Any, *given: Any) -> tuple[Any, Any]:
        batch = max(map(len, (request.q_shape, request.k_shape, request.v_shape))) - 2

        def front(x: Array, is_mapped: bool, own: int) -> Array:
            """Put the mapped axis in front; behind it come all batch axes, then its own."""
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            missing = batch + own - (x.ndim - 1)
            return jnp.reshape(x, (size, *(1,) * missing, *x.shape[1:]))

        one = jax.eval_shape(run, *jax.tree.map(_entry, given, tuple(mapped)))
        given = jax.tree.map(front, given, tuple(mapped), _own_axes(*given)[: len(given)])
        found = _mapped(call, backend, _described(request, given[0]), *given)
        found = jax.tree.map(lambda x, y: jnp.reshape(x, (size, *y.shape)), found, one)
        return found, jax.tree.map(lambda x: True, found)

    mappable = custom_vmap(_shared(call, backend, request, *given))
    mappable.def_vmap(rule)
    return mappable(*given)


def _shared(call: str, backend: str, request: Request, *given: Any) -> Any:
    """Return a backend's forward or backward as a call that a mesh may split."""

    def run(*given: Any) -> Any:
        return getattr(loaded(backend), call)(_described(request, given[0]), *given)

    def found(result: Any) -> Any:
        if call == "backward":
            return _own_axes(Inputs(*result))[0]
        return 2, _fields(result[1]), jax.tree.map(lambda x: 2, result[2])

    batch = broadcast(*(x.shape[:-2] for x in given[0][:3]))
    return Split(run, batch, _own_axes(*given)[: len(given)], found, sums=call == "backward")


def _entry(x: Array, is_mapped: bool) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:] if is_mapped else x.shape, x.dtype)


def _own_axes(inputs: Inputs, saved: Any = (), do: Any = None, dstate: Any = None) -> Any:
    """Axes of each array beyond the batch, as the arguments of a call have them."""
    own = Inputs(2, 2, 2, 0, 1, _fields(inputs.state))
    own = Inputs(*(None if x is None else n for x, n in zip(inputs, own, strict=True)))
    pull = jax.tree.map(lambda x: 2, saved), jax.tree.map(lambda x: 2, do), _fields(dstate)
    return own, *pull


def _fields(state: Any) -> Any:
    return None if state is None else type(state)(*map(rank, state._fields))


def _described(request: Request, inputs: Inputs) -> Request:
    """Return the request of the same call with other shapes."""
    shapes = {f"{name}_shape": x.shape for name, x in zip("qkv", inputs, strict=False)}
    gate = Gate(inputs.decay, inputs.log_gate)
    return dataclasses.replace(request, gate_batch=gate.batch, **shapes)
