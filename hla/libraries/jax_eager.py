"""A backend that reads memory, for JAX's arrays: differentiable where they are concrete.

An eager `jax.grad` hands concrete arrays to the functions of a custom_vjp; a trace (jit, vmap) has
none, and is refused. No second derivatives and no forward mode.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp

from ..core.namespace import Array
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from ..errors import Unsupported
from .exchange import loaded

Found = tuple[Array, Any, Any]


def _concrete(backend: str, *trees: Any) -> None:
    """Refuse arrays without memory."""
    for x in jax.tree.leaves(trees):
        if isinstance(x, jax.core.Tracer):
            raise Unsupported(
                f"backend {backend} reads memory, which JAX's arrays under jit or vmap, or in a"
                " second derivative, do not have; call it outside of them, or use backend='pallas'"
                " or 'array_api'"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def forward(backend: str, request: Request, inputs: Inputs) -> Found:
    """Return (o, state, what `backward` needs where the request asks for it)."""
    _concrete(backend, inputs)
    o, state, saved = loaded(backend).forward(request, inputs)
    return o, state, saved if request.gradient else ()


def _forward(backend: str, request: Request, inputs: Inputs) -> tuple[Found, Any]:
    _concrete(backend, inputs)
    given = inputs.decay is not None or inputs.log_gate is not None
    kept = dataclasses.replace(request, gradient=True, gate_given=given)
    o, state, saved = loaded(backend).forward(kept, inputs)
    return (o, state, saved if request.gradient else ()), (inputs, saved)


def _backward(backend: str, request: Request, residuals: Any, grads: Any) -> tuple[Inputs]:
    inputs, saved = residuals
    do, dstate, _ = grads  # what is saved is a function of the inputs, whose gradient is complete
    given = inputs.decay is not None or inputs.log_gate is not None
    kept = dataclasses.replace(request, gradient=True, gate_given=given)
    found = backward(backend, kept, inputs, saved, do, dstate)
    pairs = zip(inputs, found, strict=True)
    return (Inputs(*(jnp.zeros_like(x) if d is None and x is not None else d for x, d in pairs)),)


forward.defvjp(_forward, _backward)


def backward(
    backend: str, request: Request, inputs: Inputs, saved: Any, do: Any, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    _concrete(backend, inputs, saved, do, dstate)
    found: Gradients = loaded(backend).backward(request, inputs, saved, do, dstate)
    return found
