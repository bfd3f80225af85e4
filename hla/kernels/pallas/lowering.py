"""Kernels of one platform in a program that is lowered for several, or for a mesh of devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

alone_p = Primitive("hla_alone")
alone_p.multiple_results = True


def alone(
    platform: str, function: Callable[..., Any], like: Callable[..., Any], ahead: str = ""
) -> Any:
    """Return a function of arrays that is lowered as if for this platform alone, "" for any.

    Pallas refuses to lower a kernel for several platforms, also where it is that of a branch which
    only one of them takes; and in `jax.shard_map` it asks along which axes each result varies.

    Parameters
    ----------
    platform : str
        As JAX names it.
    function : callable
        What is run.
    like : callable
        What returns arrays of the same shapes and dtypes, as plain jnp.
    ahead : str
        Of "cuda", whether its kernels are compiled before the program: "begin" to, or "finish" them
        and all that are begun; "" leaves them to the program.
    """

    def run(*given: Any) -> Any:
        flat, tree = jax.tree.flatten(given)
        traced, made = jax.make_jaxpr(like, return_shape=True)(*given)

        def call(*flat: Any) -> Any:
            return jax.tree.leaves(function(*jax.tree.unflatten(tree, flat)))

        avals = tuple(traced.out_avals)
        found = alone_p.bind(*flat, call=call, platform=platform, avals=avals, ahead=ahead)
        return jax.tree.unflatten(jax.tree.structure(made), found)

    return run


@alone_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract(
    *given: Any, call: Any, platform: str, avals: tuple[Any, ...], ahead: str
) -> tuple[Any, ...]:
    return avals


def _lowered(ctx: Any, *given: Any, call: Any, platform: str, avals: Any, ahead: str) -> Any:
    module = ctx.module_context
    several = len(module.platforms) > 1  # it may never run here
    if platform and several:
        ctx = ctx.replace(module_context=module.replace(platforms=(platform,)))
    found = mlir.lower_fun(call, multiple_results=True)(ctx, *given)
    if ahead and platform == "cuda" and not several and (device := _hopper()):
        from . import beside

        beside.begin(module.module, device)
        if ahead == "finish":
            beside.finish()
    return found


@functools.cache
def _hopper() -> Any:
    """Return a device here that runs kernels of Mosaic GPU, None if there is none."""
    cards = (x for x in jax.local_devices() if getattr(x, "compute_capability", "") == "9.0")
    return next(cards, None)


mlir.register_lowering(alone_p, _lowered)
