"""Plain code of torch as one operator, which has its derivatives of any order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_operator import Rule, operator
from .torch_options import OPTIONS, Options, apart, like, moved, present, whole

Plain = Callable[[Options, Sequence[Any]], Sequence[Tensor]]


def derivative(
    function: Plain, sizes: Sequence[int], tensors: Sequence[Tensor | None], options: Options
) -> Sequence[Tensor]:
    """Value of plain torch code or, with ``sizes``, of its gradient, or of the gradient of that.

    Parameters
    ----------
    function : callable
        Given the options and tensors returns tensors.
    sizes : sequence of int
        One for each order: how many of the tensors are those of the order before. What follows them
        are the gradients of its results; one that is None, or not there, is 0.
    tensors, options
        All tensors (q, k, v, decay, log_gate, ...), and the options.
    """
    if not sizes:
        return function(options, tensors)
    *before, n = sizes
    given, learning = tensors[:n], moved(tensors[:n], options)

    def inner(*some: Tensor) -> tuple[Tensor, ...]:
        whole = dict(enumerate(given)) | dict(zip(learning, some, strict=True))
        return tuple(derivative(function, before, list(whole.values()), options))

    found, pullback = torch.func.vjp(inner, *(given[i] for i in learning))
    back = [*tensors[n:], *(None,) * (n + len(found) - len(tensors))]
    zeros = torch.zeros_like
    grads = pullback(tuple(zeros(x) if g is None else g for x, g in zip(found, back, strict=True)))
    return list(grads)


@functools.cache
def _plain(name: str, function: Plain, shapes: Plain, order: int) -> Rule:
    def run(
        tensors: Sequence[Tensor],
        there: Sequence[int],
        sizes: Any,
        mapped: Sequence[int],
        *options: Any,
    ) -> Any:
        def each(*some: Tensor) -> tuple[Tensor, ...]:
            return tuple(derivative(function, sizes, whole(some, there), Options(*options)))

        with _anew():
            for axes in _levels(mapped, tensors):
                each = torch.func.vmap(each, in_dims=tuple(0 if x else None for x in axes))
            found = each(*tensors)
        return apart(found, tensors)

    def fake(
        tensors: Sequence[Tensor],
        there: Sequence[int],
        sizes: Any,
        mapped: Sequence[int],
        *options: Any,
    ) -> Any:
        batch: tuple[int, ...] = ()
        for axes in reversed(_levels(mapped, tensors)):  # the last one is in front
            pairs = list(zip(tensors, axes, strict=True))
            batch += next(x.shape[:1] for x, is_mapped in pairs if is_mapped)
            tensors = [x[0] if is_mapped else x for x, is_mapped in pairs]
        every = whole(tensors, there)
        given = Options(*options)
        learning = present(*(every[i] for i in moved(every[: sizes[-1]], given))) if order else ()
        found = learning or shapes(given, every)
        return like([x.expand(*batch, *x.shape) for x in found])

    def setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        tensors, ctx.there, ctx.sizes, _, *options = inputs  # not mapped: that is below autograd
        ctx.options = Options(*options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def pull(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        every = whole(ctx.saved_tensors, ctx.there)
        found = plain(
            name, function, shapes, [*every, *grads], [*ctx.sizes, len(every)], ctx.options
        )
        by_place = dict(zip(moved(every, ctx.options), found, strict=True))
        given = [by_place.get(i) for i, there in enumerate(ctx.there) if there]
        return given, None, None if ctx.sizes else [], [], *(None,) * len(ctx.options)

    def vmap(
        info: Any, in_dims: Any, tensors: Any, there: Any, sizes: Any, mapped: Any, *options: Any
    ) -> Any:
        """Put the axis in front, for the operator to map: here no transform can begin."""
        axes = [int(d is not None) for d in in_dims[0]]
        tensors = [
            x if d is None else x.movedim(d, 0) for x, d in zip(tensors, in_dims[0], strict=True)
        ]
        found = rule.op(tensors, there, sizes, [*mapped, *axes], *options)
        return found, [0] * len(found)

    # int[] there and mapped, each 0 or 1: torch.jit.trace records no bool[]
    schema = f"(Tensor[] tensors, int[] there, int[] sizes, int[] mapped, {OPTIONS}) -> Tensor[]"
    rule = operator(name + "_backward" * order, schema, run, fake, setup, pull, vmap)
    return rule


def _levels(mapped: Sequence[int], tensors: Sequence[Tensor]) -> list[Sequence[int]]:
    """Which tensors have an axis of each vmap, the innermost first, whose axis is the last."""
    n = len(tensors)
    return [mapped[i : i + n] for i in range(0, len(mapped), n)]


def plain(
    name: str,
    function: Plain,
    shapes: Plain,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    options: Options,
) -> list[Tensor]:
    """Run plain torch code, or a derivative of it, as an operator that has derivatives.

    Parameters
    ----------
    name : str
        Of the operator of the code itself.
    function, sizes, tensors, options
        See `derivative`.
    shapes : callable
        The same as ``function``, for tensors that have shapes alone.
    """
    there = [int(x is not None) for x in tensors]
    rule = _plain(name, function, shapes, len(sizes))
    return rule(present(*tensors), there, list(sizes), [], *options)


@contextlib.contextmanager
def _anew() -> Iterator[None]:
    """Context within an operator's implementation in which torch differentiates again."""
    keys, off = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    on = torch._C._dispatch_tls_local_include_set()
    for name, key in keys.__members__.items():
        if off.has(key) and not name.startswith("Autocast"):
            off = off.remove(key)
    for key in (keys.Python, keys.PythonTLSSnapshot, keys.PythonDispatcher):
        on = on.remove(key)
    with torch._C._ForceDispatchKeyGuard(on, off):
        yield
