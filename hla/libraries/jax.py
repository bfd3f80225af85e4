"""JAX's arrays and tracers."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax import export, lax
from jax import numpy as jnp

from ..contract import Capabilities
from ..core.namespace import Array, sum_to
from .generic import Generic


class Jax(Generic):
    """JAX."""

    meshes = True
    strided = False
    rule = "hla.libraries.jax_rule"

    def key(self, x: Array) -> Any:
        """Return abstract value and place, as long as every size is a number."""
        if not all(type(n) is int for n in x.shape):
            return None
        if self.traced(x):
            return type(x), x.aval
        return x.aval, x.sharding, x.committed

    def device(self, x: Array) -> Any:
        """Return None: under jit a tracer has no device, and jit places what it makes."""
        return None

    def device_name(self, x: Array) -> str:
        """Return every device, or "traced"."""
        if self.traced(x):
            return "traced"
        return ",".join(sorted(str(d) for d in x.devices()))

    def same_device(self, x: Array, y: Array) -> bool:
        """Whether two arrays have one place; JAX moves what no one has placed."""
        free = any(self.traced(a) or not a.committed for a in (x, y))
        return free or self.device_name(x) == self.device_name(y)

    def on_accelerator(self, x: Array) -> bool:
        """Whether a device is no CPU; for a tracer, the default one."""
        if self.traced(x):
            return bool(jax.default_backend() != "cpu")
        return any(device.platform != "cpu" for device in x.devices())

    def traced(self, x: Array) -> bool:
        """Whether it is a tracer, of any transform."""
        return isinstance(x, jax.core.Tracer)

    def tf32(self) -> bool:
        """Whether jax_default_matmul_precision asks for less than float32."""
        return jax.config.jax_default_matmul_precision not in (None, "highest", "float32")

    def host_values(self, x: Array) -> np.ndarray[Any, Any] | None:
        """Read an array on the CPU."""
        return None if self.traced(x) or self.on_accelerator(x) else np.asarray(x)

    def wraps(self, capabilities: Capabilities) -> bool:
        """Whether its rule stands for a backend: for an opaque one that takes its tracers.

        Of those that read memory it takes the tracers of an eager gradient alone.
        """
        taken = capabilities.native == "jax" or "jax" in capabilities.traced
        return capabilities.opaque and taken

    def underflow(self) -> AbstractContextManager[Any]:
        """Return no context: JAX reports no underflow."""
        return nullcontext()

    def exact_products(self, x: Array) -> AbstractContextManager[Any]:
        """Context of the highest precision, where the caller asks for none."""
        if jax.config.jax_default_matmul_precision is not None:
            return nullcontext()
        highest: AbstractContextManager[None] = jax.default_matmul_precision("highest")
        return highest

    def run(self, function: Callable[..., Any], request: Any, inputs: Any, *args: Any) -> Any:
        """Make one compiled call, ``request`` static.

        Its numbers are operands of the call: another scale compiles nothing.
        """
        with self.exact_products(inputs.q):
            sizes = (*request.q_shape, *request.k_shape, *request.v_shape)
            if any(map(self.symbolic, sizes)):
                return function(
                    request, inputs, *args
                )  # part of a larger program; symbols are no keys
            static, numbers = _without_numbers(request)
            return _jitted(function)(static, numbers, inputs, *args)

    def symbolic(self, size: Any) -> bool:
        """Whether a size is a symbol of `jax.export`."""
        return type(size) is not int and bool(export.is_symbolic_dim(size))

    def padded(self, x: Array, axis: int, before: int, after: int, fill: float) -> Array:
        """Pad; a concat refuses what does not lie on a mesh as x does."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (before, after)
        return jnp.pad(x, widths, constant_values=fill)

    def powers(self, x: Array, n: Array) -> Array:
        """Raise to a power whose derivative at n = 0 is 0, not 0 / x."""
        return _power(x, jnp.reshape(n, (1,) * (x.ndim - n.ndim) + n.shape))

    def fold(
        self, body: Any, carry: Any, xs: Any, axes: tuple[int, ...], out_axis: int, reverse: bool
    ) -> Any:
        """Loop by lax.scan; its gradient computes a turn again, whose residuals would be larger."""
        repeated = jax.checkpoint(body, prevent_cse=False)
        leading = tuple(jnp.moveaxis(x, axis, 0) for x, axis in zip(xs, axes, strict=True))
        carry, ys = lax.scan(repeated, carry, leading, reverse=reverse)
        return carry, tuple(jnp.moveaxis(y, 0, out_axis) for y in ys)

    def explicit(self, x: Array) -> bool:
        """Whether its mesh has an explicit axis."""
        return jax.sharding.AxisType.Explicit in _mesh(x).axis_types

    def triangle(self, x: Array, k: int, upper: bool) -> Array:
        """Cut by a mask on explicit axes: JAX before 0.8 chooses only by what is split alike."""
        cut = jnp.triu if upper else jnp.tril
        if not self.explicit(x):
            return cut(x, k=k)
        zeros = jnp.zeros_like(x)
        legal = jnp.broadcast_to(cut(jnp.ones(x.shape[-2:], dtype=x.dtype), k=k), x.shape)
        return jnp.where(zeros + legal > 0, x, zeros)

    def aligned(self, xs: Sequence[Array], axes: int) -> list[Array]:
        """Give arrays so many axes (jax_numpy_rank_promotion), and explicit ones one split.

        JAX may be set to refuse a broadcast to more axes, and multiplies only what is split alike.
        """
        xs = [jnp.reshape(x, (1,) * (axes - x.ndim) + x.shape) for x in xs]
        if not any(map(self.explicit, xs)):
            return xs
        zeros = _nothing(xs)
        return [x + sum_to(zeros, (*x.shape[:-2], 1, 1)) for x in xs]

    def laid(self, x: Array, like: Sequence[Array]) -> Array:
        """Add zeros of theirs: the sum varies over the same axes of the mesh (`jax.shard_map`).

        And is split along the same explicit axes. Under jit the zeros are no work.
        """
        return x if all(_mesh(y).empty for y in like) else x + _nothing(like)

    def laid_back(self, grad: Array, x: Array) -> Array:
        """Sum over the devices that share ``x``."""
        if _mesh(grad).empty and _mesh(x).empty:
            return grad
        _, pullback = jax.vjp(lambda x: x + jnp.zeros_like(grad), x)
        return pullback(grad)[0]


JAX = Jax("jax", jnp)


def _mesh(x: Array) -> Any:
    return jax.typeof(x).sharding.mesh


def _nothing(xs: Sequence[Array]) -> Array:
    """Return zeros (*batch, 1, 1) that lie on a mesh as all of ``xs`` (*batch, X, Y) together."""
    sums = (jnp.sum(x, axis=(-2, -1), keepdims=True) for x in xs)
    return functools.reduce(operator.add, map(jnp.zeros_like, sums))


@jax.custom_jvp  # type: ignore[untyped-decorator]
def _power(x: Array, n: Array) -> Array:
    return x**n


@_power.defjvp  # type: ignore[untyped-decorator]
def _power_tangent(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, n), (dx, _) = primals, tangents
    return _power(x, n), n * _power(x, jnp.clip(n - 1, min=0)) * dx


@functools.cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(request: Any, numbers: dict[str, Any], *args: Any) -> Any:
        return function(dataclasses.replace(request, **numbers), *args)

    jitted: Callable[..., Any] = jax.jit(run, static_argnums=0)
    return jitted


@functools.lru_cache(maxsize=1024)
def _without_numbers(request: Any) -> tuple[Any, dict[str, float]]:
    """Split a request into what a program depends on, and the numbers that it may be run with."""
    numbers = {"eps": request.eps}
    if request.scaled:
        numbers["scale"] = request.scale
    if request.ridged:
        numbers["ridge"] = request.ridge
    return dataclasses.replace(request, **dict.fromkeys(numbers)), numbers
