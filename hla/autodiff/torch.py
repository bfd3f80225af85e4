"""A backend as operators of torch, hla::scan and hla::scan_backward.

An operator is one node for autograd, torch.compile, torch.export, torch.func and CUDA graphs; the
backend behind it stays a pure function. Its arguments are tensors and plain options, from which the
Request is made again, so that symbolic shapes stay symbolic. Second derivatives are those of the
generic code: right, to any order, and slower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import dispatch, states
from ..core.request import Inputs, Request
from ..core.states import rank
from ..errors import Unsupported
from ..request import describe

GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? log_gate, Tensor[] state"


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

    @property
    def kind(self) -> Any:
        """Type of the state."""
        return getattr(states, self.state_type) if self.state_type else None


SHARED = [name for name in Options._fields if name not in ("backend", "state_type")]
OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(Options).items())


class Rule(NamedTuple):
    """An operator with its gradient, as the dispatcher and as torch.func take it."""

    op: Any
    setup: Callable[[Any, Sequence[Any], Sequence[Tensor]], None]
    pull: Callable[[Any, Sequence[Tensor | None]], tuple[Any, ...]]

    def __call__(self, *args: Any) -> list[Tensor]:
        """Call the operator; torch.func cannot see its gradient, but that of a Function."""
        if not torch._C._are_functorch_transforms_active():
            found: list[Tensor] = self.op(*args)
            return found
        flat, tree = tree_flatten(list(args))
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
            return (None, *tree_flatten(list(rule.pull(ctx, grads)))[0])

    return Function


def forward(backend: str, request: Request, inputs: Inputs) -> tuple[Tensor, Any, None]:
    """Return (o, state, None) of a request, differentiable."""
    state = [] if inputs.state is None else list(inputs.state)
    tensors = [x for x in (*inputs[:5], *state) if x is not None]
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise Unsupported(
            f"backend {backend} has no forward-mode derivative; use backend='array_api'"
        )
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    as_node = request.traced or _get_current_dispatch_mode() is not None
    if not (keep or as_node):
        return dispatch.load(backend).forward(request, inputs)  # type: ignore[no-any-return]
    if not as_node:  # a gate without a gradient saves a sum in every pass of the adjoint
        request = _keeping(request, any(x is not None and x.requires_grad for x in inputs[3:5]))
    kind: Any = request.state_type
    shared = {name: getattr(request, name) for name in SHARED}
    options = Options(backend, state_type="" if kind is None else kind.__name__, **shared)
    if as_node:
        o, *rest = SCAN(*inputs[:5], state, *options, keep or request.traced)
    else:  # the same without the dispatcher, which takes longer than a short pass
        o, *rest = Eager.apply(request, options, *inputs[:5], *state)
    return o, kind(*rest[: len(kind._fields)]) if request.return_state else None, None


def _has_tangent(x: Tensor) -> bool:
    """Whether forward mode follows ``x``, at any level of torch.func's transforms."""
    functorch = torch._C._functorch
    top = functorch.peek_interpreter_stack()
    if top is None:
        return forward_ad.unpack_dual(x).tangent is not None
    own = functorch.maybe_get_level(x) == top.level()
    forward = own and top.key() == functorch.TransformType.Jvp
    if forward and forward_ad.unpack_dual(x).tangent is not None:
        return True
    with temporarily_pop_interpreter_stack():
        return _has_tangent(functorch.get_unwrapped(x) if own else x)


class Eager(torch.autograd.Function):
    """`SCAN` for ordinary tensors."""

    @staticmethod
    def forward(ctx: Any, request: Request, options: Options, *tensors: Any) -> tuple[Tensor, ...]:
        """Run the backend."""
        ctx.request = request
        args = (*tensors[:5], tensors[5:], *options, True)
        output = tuple(_scan(*args, request=request))
        _setup(ctx, args, output)
        return output[: 1 + len(ctx.ends)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Pull back, by the operator where a second derivative may follow."""
        directly = functools.partial(_scan_backward, request=ctx.request)
        backward = None if torch.is_grad_enabled() else directly
        *found, state = _pull(ctx, grads, backward=backward)[:6]
        return (None, None, *found, *state)


@functools.lru_cache(maxsize=1024)
def _keeping(request: Request, gate: bool) -> Request:
    """Return the request of a call whose gradient may follow, that of the gate where asked."""
    return dataclasses.replace(request, gradient=True, gate_given=gate)


def step(backend: str, request: Request, inputs: Inputs, donate: bool) -> tuple[Tensor, Any]:
    """Return (o, state) of one token, differentiable."""
    o, state, _ = forward(backend, request, inputs)
    return o, state


def _inputs(options: Options, arrays: Sequence[Any], state: Sequence[Any]) -> Inputs:
    q, k, v, decay, log_gate = arrays
    return Inputs(q, k, v, decay, log_gate, options.kind(*state) if state else None)


def _described(inputs: Inputs, options: Options, keep: bool) -> Request:
    shared = {name: getattr(options, name) for name in SHARED}
    return describe(inputs, state_type=options.kind, gradient=keep, **shared)


def _scan(*args: Any, request: Request | None = None) -> list[Tensor]:
    """Return o, the state where asked, and with ``keep`` what `scan_backward` needs."""
    *arrays, state = args[:6]
    options = Options(*args[6:-1])
    inputs = _inputs(options, arrays, state)
    request = request or _described(inputs, options, args[-1])
    o, end, saved = dispatch.load(options.backend).forward(request, inputs)
    return [o, *(end if request.return_state else ()), *saved]


def _scan_backward(*args: Any, request: Request | None = None) -> list[Tensor]:
    """Return gradients of q, k, v, of the gate where given as an array, and of the state."""
    arrays, (state, saved, do, dstate), options = args[:5], args[5:9], Options(*args[9:])
    inputs = _inputs(options, arrays, state)
    request = request or _described(inputs, options, True)
    dstate = options.kind(*dstate) if dstate else None
    grads = dispatch.load(options.backend).backward(request, inputs, tuple(saved), do, dstate)
    gate = [x for x in (grads.ddecay, grads.dlog_gate) if x is not None]
    starts = [x.clone() for x in grads.dinitial_state or ()]  # parts of one array as yet
    return [*grads[:3], *gate, *starts]


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *given, state = inputs[:6]
    ctx.options = options = Options(*inputs[6:-1])
    ends = output[1 : 1 + len(options.kind._fields)] if options.return_state else ()
    ctx.ends = [(x.shape, x.dtype) for x in ends]
    ctx.fields = len(state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *state, *output[1 + len(ends) :])


def _pull_needed(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return _pull(ctx, grads, gate=any(ctx.needs_input_grad[3:5]))


def _pull(
    ctx: Any,
    grads: Sequence[Tensor | None],
    *,
    gate: bool = True,
    backward: Callable[..., Any] | None = None,
) -> tuple[Any, ...]:
    options = ctx.options if gate else ctx.options._replace(gate_given=False)
    tensors = ctx.saved_tensors  # read once: activation checkpointing gives them once
    given, state, saved = tensors[:5], tensors[5 : 5 + ctx.fields], tensors[5 + ctx.fields :]
    do, *dstate = grads[: 1 + len(ctx.ends)]
    if all(x is None for x in dstate):
        dstate = []
    for i, x in enumerate(dstate):
        if x is None:
            shape, dtype = ctx.ends[i]
            dstate[i] = given[0].new_zeros(shape, dtype=dtype)
    args = (*given, list(state), list(saved), do, dstate, *options)
    found = (backward or SCAN_BACKWARD)(*args)
    return (*_by_argument(found, given, options), *(None,) * (len(options) + 1))


def _by_argument(found: Sequence[Any], given: Sequence[Any], options: Options) -> list[Any]:
    """Gradients of the six tensor arguments from those that there are."""
    dq, dk, dv, *rest = found
    gate = rest.pop(0) if options.gate_given else None
    ddecay, dlog_gate = (None, gate) if given[3] is None else (gate, None)
    return [dq, dk, dv, ddecay, dlog_gate, rest]


def _setup_twice(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    given, state, saved, do, dstate = inputs[:5], inputs[5], inputs[6], inputs[7], inputs[8]
    ctx.options = Options(*inputs[9:])
    ctx.sizes = len(state), len(saved), len(dstate)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *state, do, *dstate)


def _pull_twice(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    options, (fields, saved, ends) = ctx.options, ctx.sizes
    tensors = ctx.saved_tensors
    given, state, (do, *dstate) = tensors[:5], tensors[5 : 5 + fields], tensors[5 + fields :]
    gate = [x for x in given[3:] if x is not None and options.gate_given]
    inputs = (*given[:3], *gate, *state)

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, decay, log_gate, state = _by_argument(inputs, given, options)
        if not options.gate_given:
            decay, log_gate = given[3:]
        whole = _inputs(options, (q, k, v, decay, log_gate), state)
        request = _described(whole, options, False)
        o, end, _ = dispatch.load("array_api").forward(request, whole)
        return (o, *(end if options.return_state else ()))

    def first(*both: Tensor) -> tuple[Tensor, ...]:
        found, pullback = torch.func.vjp(outputs, *both[: len(inputs)])
        cotangents = both[len(inputs) :]
        if do is None:
            cotangents = (torch.zeros_like(found[0]), *cotangents)
        missing = (torch.zeros_like(x) for x in found[len(cotangents) :])
        return tuple(pullback((*cotangents, *missing)))

    cotangents = (*(() if do is None else (do,)), *dstate)
    found, pullback = torch.func.vjp(first, *inputs, *cotangents)
    given_back = (
        torch.zeros_like(x) if g is None else g for x, g in zip(found, grads, strict=True)
    )
    twice = list(pullback(tuple(given_back)))
    ddo = None if do is None else twice[len(inputs)]
    rest = (*[[None] * saved, ddo], twice[len(twice) - ends :])
    return (*_by_argument(twice[: len(inputs)], given, options), *rest, *(None,) * len(options))


def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[list[Tensor], list[int]]:
    """Take a mapped axis as one more batch axis, in front of all."""
    rows = max(x.ndim - (d is not None) for x, d in zip(args[:3], in_dims[:3], strict=True))
    back = len(args) - 9 == len(Options._fields)
    options = Options(*(args[9:] if back else args[6:-1]))
    fields = [rank(name) for name in options.kind._fields] if options.kind else []

    def front(x: Tensor | None, dim: int | None, own: int | None = None) -> Tensor | None:
        """Move the mapped axis to the front; with ``own``, behind it come all batch axes."""
        if x is None:
            return None
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        missing = 0 if own is None else rows - 2 + own - (x.ndim - 1)
        return x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:])

    given = [front(args[i], in_dims[i], own) for i, own in enumerate((2, 2, 2, 0, 1))]
    state = [front(x, d, own) for x, d, own in zip(args[5], in_dims[5], fields, strict=False)]
    rest: list[Any] = []
    if back:
        saved, dstate = (
            [front(x, d) for x, d in zip(args[i], in_dims[i], strict=True)] for i in (6, 8)
        )
        rest = [saved, front(args[7], in_dims[7]), dstate]
    out = (SCAN_BACKWARD if back else SCAN).op(*given, state, *rest, *args[6 + len(rest) :])
    if back:  # without the batch axes that an input lacks
        inputs = zip((*args[:5], *args[5]), (*in_dims[:5], *in_dims[5]), strict=True)
        shapes = [
            x.shape if d is None else (*x.shape[:d], *x.shape[d + 1 :])
            for i, (x, d) in enumerate(inputs)
            if x is not None and (i not in (3, 4) or options.gate_given)
        ]
        out = [x.reshape(x.shape[0], *n) for x, n in zip(out, shapes, strict=True)]
    return out, [0] * len(out)


def _operator(
    name: str, function: Any, schema: str, setup: Any, pull: Any, needed: Any = None
) -> Rule:
    op = torch.library.custom_op(f"hla::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(function)  # a backend launches nothing on fake tensors
    op.register_autograd(needed or pull, setup_context=setup)
    op.register_vmap(_vmap)
    return Rule(op, setup, pull)


SCAN = _operator(
    "scan",
    _scan,
    f"({GIVEN}, {OPTIONS}, bool keep) -> Tensor[]",
    _setup,
    _pull,
    _pull_needed,  # torch.func's tensors do not say
)
SCAN_BACKWARD = _operator(
    "scan_backward",
    _scan_backward,
    f"({GIVEN}, Tensor[] saved, Tensor? do, Tensor[] dstate, {OPTIONS}) -> Tensor[]",
    _setup_twice,
    _pull_twice,
)
