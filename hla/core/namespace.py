"""What the Array API standard lacks: naming a library, a device under a trace, a loop.

The only file of the core that knows array libraries by name, through array-api-compat.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat as compat
import numpy as np

Array = Any
Namespace = Any

# By class: a look-up by array-api-compat costs as much as a small product.
_libraries: dict[type, str | None] = {}
_namespaces: dict[type, Namespace] = {}


def library(x: Array) -> str | None:
    """Name the array library of ``x`` ("numpy", "torch", "jax", ...); None if it has none."""
    if type(x) not in _libraries:
        refused = isinstance(x, np.ma.MaskedArray) or compat.is_dask_array(x)
        refused = refused or compat.is_pydata_sparse_array(x)
        found = None
        if not refused and compat.is_array_api_obj(x):
            name: str = namespace(x).__name__
            found = name.removeprefix("array_api_compat.").split(".", 1)[0]
        _libraries[type(x)] = found
    return _libraries[type(x)]


def namespace(x: Array) -> Namespace:
    """Array API namespace of ``x``."""
    if type(x) not in _namespaces:
        _namespaces[type(x)] = compat.array_namespace(x)
    return _namespaces[type(x)]


def expand(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast ``x`` to ``shape``; x itself where it has it."""
    return x if tuple(x.shape) == tuple(shape) else namespace(x).broadcast_to(x, shape)


def device(x: Array) -> Any:
    """Device of ``x``, or None where a tracer has none (then new arrays follow the trace)."""
    name = library(x)
    if name == "jax":
        return None  # under jit a tracer has no device, and jit places what it makes
    return x.device if name in ("numpy", "torch") else compat.device(x)


_kept: dict[Any, Any] = {}  # constants by what tells them apart, and torch's by their device too


def beside(like: Array, key: tuple[Any, ...], make: Callable[[], np.ndarray[Any, Any]]) -> Array:
    """Return constants, which ``make`` gives on the host, where ``like`` is.

    torch's are kept there: while a CUDA graph is captured nothing can be copied from the host.
    """
    xp, torch = namespace(like), sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return xp.asarray(make(), device=device(like))
    if key not in _kept:
        _kept[key] = make()
    if torch is None or type(like) is not torch.Tensor:
        return xp.asarray(_kept[key], device=device(like))
    placed = (*key, like.device)
    if placed not in _kept:
        with torch.inference_mode(False):
            made = xp.asarray(_kept[key], device=like.device)
        if type(made) is not torch.Tensor or torch._C._functorch.is_functorch_wrapped_tensor(made):
            return made  # a trace or a transform will be over
        _kept[placed] = made
    return _kept[placed]


def is_jax(x: Array) -> bool:
    """Whether ``x`` is a JAX array or tracer."""
    return library(x) == "jax"


def underflow(x: Array) -> AbstractContextManager[Any]:
    """Context in which a result too small for its dtype is 0, whatever np.errstate says of it."""
    return nullcontext() if library(x) in ("torch", "jax") else np.errstate(under="ignore")


def moveaxis(x: Array, source: int, destination: int) -> Array:
    """Move one axis; torch by its movedim, since ``torch.func.vmap`` knows no moveaxis."""
    if library(x) == "torch":
        return x.movedim(source, destination)
    return namespace(x).moveaxis(x, source, destination)


def symbolic(size: Any) -> bool:
    """Whether a size is a symbol of `jax.export`, of which no comparison is known."""
    export = sys.modules.get("jax.export")
    return export is not None and bool(export.is_symbolic_dim(size))


def padded(x: Array, axis: int, *, before: int = 0, after: int = 0, fill: float = 0.0) -> Array:
    """Lengthen ``x`` along a negative axis by so many entries of ``fill``."""
    xp = namespace(x)
    if is_jax(x):  # its concat refuses what does not lie on a mesh as x does
        widths = [(0, 0)] * x.ndim
        widths[axis] = (before, after)
        return xp.pad(x, widths, constant_values=fill)
    parts = [x]
    for count, place in ((before, 0), (after, 2)):
        if count:
            shape = (*x.shape[:axis], count, *x.shape[len(x.shape) + axis + 1 :])
            parts.insert(place, xp.full(shape, fill, dtype=x.dtype, device=device(x)))
    return xp.concat(parts, axis=axis)


def powers(x: Array, n: Array) -> Array:
    """Raise ``x`` to whole powers n >= 0, with its derivatives also where x is 0."""
    if is_jax(x):
        return _powers()(x, namespace(n).reshape(n, (1,) * (x.ndim - n.ndim) + n.shape))
    if library(x) != "torch" or not _followed(x):
        return x**n
    # torch's own derivative of x^0 is 0 / x: near 0 x is multiplied, up to a power that is 0 there
    where, near = namespace(x).where, x < 1e-3
    found, square, left = where(near, 1.0, x) ** n, where(near, x, 0.0), n.clip(max=31)
    product = namespace(x).ones_like(found)
    for i in range(5):
        product = where(left // 2**i % 2 == 1, product * square, product)
        square = square * square
    return where(near, product, found)


def _followed(x: Array) -> bool:
    """Whether torch differentiates what is made of ``x``, or may."""
    torch = sys.modules["torch"]
    return bool(
        (x.requires_grad and torch.is_grad_enabled()) or torch._C._are_functorch_transforms_active()
    )


@functools.cache
def _powers() -> Any:
    """Return the power of JAX whose derivative at n = 0 is 0, not 0 / x."""

    def tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, n), (dx, _) = primals, tangents
        return power(x, n), n * power(x, namespace(n).clip(n - 1, min=0)) * dx

    power = sys.modules["jax"].custom_jvp(operator.pow)
    power.defjvp(tangent)
    return power


def triangle(x: Array, k: int, *, upper: bool) -> Array:
    """Clear ``x`` below (else above) the diagonal k of its last two axes."""
    xp = namespace(x)
    cut = xp.triu if upper else xp.tril
    if not explicit(x):
        return cut(x, k=k)
    zeros = xp.zeros_like(x)  # JAX before 0.8 chooses only by what is split alike
    legal = expand(cut(xp.ones(x.shape[-2:], dtype=x.dtype), k=k), x.shape)
    return xp.where(zeros + legal > 0, x, zeros)


def on_mesh(x: Array) -> bool:
    """Whether the type of ``x`` says how it lies on a mesh of devices, as JAX's do."""
    return is_jax(x) and not _mesh(x).empty


def _mesh(x: Array) -> Any:
    return sys.modules["jax"].typeof(x).sharding.mesh


def explicit(x: Array) -> bool:
    """Whether the type of ``x`` says along which axes it is split among devices."""
    if not is_jax(x):
        return False
    return sys.modules["jax"].sharding.AxisType.Explicit in _mesh(x).axis_types


def laid(x: Array, like: Sequence[Array]) -> Array:
    """Lay ``x`` on a mesh as all of ``like`` together; arrays (*batch, X, Y).

    A sum with zeros of theirs varies over the same axes of the mesh (`jax.shard_map`) and is split
    along the same (explicit axes). Only types are read: under jit the zeros are no work.
    """
    return x + nothing(like) if any(map(on_mesh, like)) else x


def laid_back(grad: Array, x: Array) -> Array:
    """Return the gradient of x from that of x as `laid`: a sum over the devices that share it."""
    if not (on_mesh(grad) or on_mesh(x)):
        return grad
    _, pullback = sys.modules["jax"].vjp(lambda x: x + namespace(grad).zeros_like(grad), x)
    return pullback(grad)[0]


def nothing(xs: Sequence[Array]) -> Array:
    """Return zeros (*batch, 1, 1) that lie on a mesh as all of ``xs`` (*batch, X, Y) together."""
    sums = (namespace(x).sum(x, axis=(-2, -1), keepdims=True) for x in xs)
    return functools.reduce(operator.add, (namespace(x).zeros_like(x) for x in sums))


def unstack(x: Array, axis: int) -> tuple[Array, ...]:
    """Split along one axis into its slices.

    Not by indexing, whose gradient is a whole array of zeros a slice; and torch by its own unbind,
    since array-api-compat's unstack is made of `moveaxis`.
    """
    if library(x) == "torch":
        return tuple(x.unbind(axis))
    return tuple(namespace(x).unstack(x, axis=axis))


def fold(
    body: Callable[[Any, tuple[Array, ...]], tuple[Any, tuple[Array, ...]]],
    carry: Any,
    xs: tuple[Array, ...],
    *,
    axes: tuple[int, ...],
    out_axis: int,
    reverse: bool = False,
) -> tuple[Any, tuple[Array, ...]]:
    """Loop ``carry, ys = body(carry, slices)`` over one axis of each x; stack the ys on one axis.

    Parameters
    ----------
    body : callable
        Takes the carry and a tuple with one slice of each x; returns the carry and a tuple.
    carry : pytree
        Keeps its shapes and dtypes from turn to turn.
    xs : tuple of arrays
        Sliced along ``axes[i]`` (negative), all of one length there, at least 1.
    axes : tuple of int
        The sliced axis of each x.
    out_axis : int
        Axis of the results that counts the turns, negative or 0.
    reverse : bool
        Last slice first; the ys stay at their slice's place.

    Returns
    -------
    carry, ys
        A plain loop for eager libraries and ``lax.scan`` under JAX, where the graph must not grow.
    """
    xp = namespace(xs[0])
    if is_jax(xs[0]):
        jax = sys.modules["jax"]
        # the gradient computes a turn again: its residuals would be larger and slower than its sums
        repeated = jax.checkpoint(body, prevent_cse=False)
        leading = tuple(moveaxis(x, axis, 0) for x, axis in zip(xs, axes, strict=True))
        carry, ys = jax.lax.scan(repeated, carry, leading, reverse=reverse)
        return carry, tuple(moveaxis(y, 0, out_axis) for y in ys)
    out = []
    turns = list(zip(*(unstack(x, axis) for x, axis in zip(xs, axes, strict=True)), strict=True))
    for turn in reversed(turns) if reverse else turns:
        carry, ys = body(carry, turn)
        out.append(ys)
    if reverse:
        out.reverse()
    return carry, tuple(xp.stack(y, axis=out_axis) for y in zip(*out, strict=True))
