"""Kernels of one platform in a program that is lowered for several, or for a mesh of devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

alone_p = Primitive("hla_alone")
alone_p.multiple_results = True


def alone(platform: str, function: Callable[..., Any], like: Callable[..., Any]) -> Any:
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
    """

    def run(*given: Any) -> Any:
        flat, tree = jax.tree.flatten(given)
        traced, made = jax.make_jaxpr(like, return_shape=True)(*given)

        def call(*flat: Any) -> Any:
            return jax.tree.leaves(function(*jax.tree.unflatten(tree, flat)))

        avals = tuple(traced.out_avals)
        found = alone_p.bind(*flat, call=call, platform=platform, avals=avals)
        return jax.tree.unflatten(jax.tree.structure(made), found)

    return run


@alone_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract(*given: Any, call: Any, platform: str, avals: tuple[Any, ...]) -> tuple[Any, ...]:
    return avals


def _lowered(ctx: Any, *given: Any, call: Any, platform: str, avals: Any) -> Any:
    module = ctx.module_context
    if platform and len(module.platforms) > 1:
        ctx = ctx.replace(module_context=module.replace(platforms=(platform,)))
    return mlir.lower_fun(call, multiple_results=True)(ctx, *given)


mlir.register_lowering(alone_p, _lowered)
