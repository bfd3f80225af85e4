"""Operators of torch: what a call says of itself, their gradients, and plain code as one operator.

An operator's arguments are tensors and plain options, from which the Request is made again, so that
symbolic shapes stay symbolic.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import states
from ..core.request import Inputs, Request
from ..errors import Unsupported
from .describe import describe
from .torch_tracing import transforming


class Options(NamedTuple):
    """The plain arguments of an operator, in its order."""

    backend: str
    operator: str
    mask: str
    convention: str
    normalize: bool
    eps: float
    scale: float
    ridge: float
    return_state: bool
    state_type: str  # its name, "" for none
    gate_given: bool
    tf32: bool
    form: str  # "" for none
    chunk_size: int  # 0 for none

    @property
    def kind(self) -> Any:
        """Type of the state."""
        return getattr(states, self.state_type) if self.state_type else None


SHARED = [name for name in Options._fields if name not in ("backend", "state_type")]
OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items())
ABSENT = {"form": "", "chunk_size": 0}  # what stands for None


def options_of(backend: str, request: Request) -> Options:
    """Return what an operator is told of a request beside its arrays."""
    kind: Any = request.state_type
    shared = {name: getattr(request, name) for name in SHARED}
    shared |= {name: shared[name] or absent for name, absent in ABSENT.items()}
    return Options(backend, state_type="" if kind is None else kind.__name__, **shared)


def inputs_of(options: Options, tensors: Sequence[Any]) -> Inputs:
    """Return q, k, v, decay, log_gate and the state's fields as the inputs of a call."""
    q, k, v, decay, log_gate, *fields = tensors
    return Inputs(q, k, v, decay, log_gate, options.kind(*fields) if fields else None)


def request_of(inputs: Inputs, options: Options, keep: bool) -> Request:
    """Return the request that `options_of` was told of; ``keep`` says that a gradient follows."""
    shared = {name: getattr(options, name) for name in SHARED}
    shared |= {name: shared[name] or None for name in ABSENT}
    others = [x for x in (*inputs[3:5], *(inputs.state or ())) if x is not None]
    return describe(inputs, others, state_type=options.kind, gradient=keep, **shared)


class Rule(NamedTuple):
    """An operator with its gradient, as the dispatcher and as torch.func take it."""

    op: Any
    setup: Callable[[Any, Sequence[Any], Sequence[Tensor]], None]
    pull: Callable[[Any, Sequence[Tensor | None]], tuple[Any, ...]]

    def __call__(self, *args: Any) -> list[Tensor]:
        """Call the operator; torch.func cannot see its gradient, but that of a Function."""
        if not transforming():
            found: list[Tensor] = self.op(*args)
            return found
        flat, tree = tree_flatten(list(args), is_leaf=_plain_list)
        return list(_function(self).apply(tree, *flat))


@functools.cache
def _function(rule: Rule) -> Any:
    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(tree: Any, *flat: Any) -> tuple[Tensor, ...]:
            return tuple(rule.op(*tree_unflatten(flat, tree)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            rule.setup(ctx, tree_unflatten(inputs[1:], inputs[0]), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = rule.pull(ctx, grads)
            return (None, *tree_flatten(list(found), is_leaf=_plain_list)[0])

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise no_forward_mode(ctx.options.backend)

    return Function


def _plain_list(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(isinstance(y, int) for y in x)


def no_forward_mode(backend: str) -> Unsupported:
    """Return the error of a backend that torch's forward mode cannot see through."""
    return Unsupported(f"backend {backend} has no forward-mode derivative; use backend='array_api'")


def operator(
    name: str, schema: str, function: Any, fake: Any, setup: Any, pull: Any, vmap: Any, **other: Any
) -> Rule:
    """Define hla::name.

    Parameters
    ----------
    name, schema : str
        The operator's.
    function, fake : callable
        It on tensors, and on tensors that have shapes alone.
    setup, pull : callable
        What its gradient keeps, and that gradient.
    vmap : callable
        As `torch.library.register_vmap` takes it.
    **other
        ``backward``: the gradient where torch says which inputs need one.
    """
    op = torch.library.custom_op(f"hla::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(other.get("backward", pull), setup_context=setup)
    op.register_vmap(vmap)
    return Rule(op, setup, pull)


def present(*given: Any) -> list[Tensor]:
    """Every tensor that there is among arguments and lists of them."""
    return [x for x in tree_flatten(given)[0] if x is not None]


def like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Empty tensors of the same shapes, whole."""
    return [x.new_empty(x.shape) for x in tensors]


def apart(found: Sequence[Tensor], *given: Any) -> list[Tensor]:
    """Each result whole, as `like` has it, and in memory of its own: what torch asks for."""
    taken = {x.untyped_storage().data_ptr() for x in present(given)}
    out = []
    for x in found:
        strides = [math.prod(max(n, 1) for n in x.shape[i + 1 :]) for i in range(x.ndim)]
        if list(x.stride()) != strides or x.untyped_storage().data_ptr() in taken:
            x = x.new_empty(x.shape).copy_(x)
        taken.add(x.untyped_storage().data_ptr())
        out.append(x)
    return out


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


def moved(tensors: Sequence[Tensor | None], options: Options) -> list[int]:
    """Places of the tensors that have a gradient."""
    gate = (3, 4)
    there = (i for i, x in enumerate(tensors) if x is not None)
    return [i for i in there if options.gate_given or i not in gate]


@functools.cache
def _plain(name: str, function: Plain, shapes: Plain, order: int) -> Rule:
    def run(tensors: Sequence[Tensor], there: Sequence[bool], sizes: Any, *options: Any) -> Any:
        with _anew():
            found = derivative(function, sizes, whole(tensors, there), Options(*options))
        return apart(found, tensors)

    def fake(tensors: Sequence[Tensor], there: Sequence[bool], sizes: Any, *options: Any) -> Any:
        every = whole(tensors, there)
        if not order:
            return like(shapes(Options(*options), every))
        return like([every[i] for i in moved(every[: sizes[-1]], Options(*options))])

    def setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        tensors, ctx.there, ctx.sizes, *options = inputs
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
        return given, None, None if ctx.sizes else [], *(None,) * len(ctx.options)

    def vmap(info: Any, in_dims: Any, tensors: Any, there: Any, sizes: Any, *options: Any) -> Any:
        def each(*some: Tensor) -> tuple[Tensor, ...]:
            return tuple(derivative(function, sizes, whole(some, there), Options(*options)))

        found = torch.func.vmap(each, in_dims=tuple(in_dims[0]))(*tensors)
        return list(found), [0] * len(found)

    schema = f"(Tensor[] tensors, bool[] there, int[] sizes, {OPTIONS}) -> Tensor[]"
    return operator(name + "_backward" * order, schema, run, fake, setup, pull, vmap)


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
    there = [x is not None for x in tensors]
    rule = _plain(name, function, shapes, len(sizes))
    return rule(present(*tensors), there, list(sizes), *options)


def whole(tensors: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    """Put None where a tensor is not there."""
    left = iter(tensors)
    return [next(left) if x else None for x in there]


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
