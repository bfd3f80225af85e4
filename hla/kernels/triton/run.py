"""The device of torch tensors and Triton kernels: how a plan's steps are done."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import torch
import triton
from array_api_compat import torch as xp

from ...core.passes import Shape
from ...core.reference import Gradients
from ...core.request import Inputs, Request
from ...device.elementwise import border, does, fit, part, skew
from ...device.plan import dtype_of
from ...device.scan import Again, Call, Device, Do, Place, Ready, Runner
from ...device.shapes import shapes
from ...device.steps import (
    Border,
    Carry,
    Divide,
    Fading,
    Fused,
    GateGradient,
    GateSum,
    Launch,
    Ref,
    Skew,
    Step,
    Sum,
)
from ...device.tiles import Layout, strides_like, whole
from ...device.token import unpacked
from ...states.packed import STATE_OF
from . import normalize, rows
from . import step as one_token
from .carry import carry, fading
from .causal import LEAST
from .gate import gate_kernel, settings, sum_kernel
from .launch import (
    Aligned,
    Kernel,
    addresses,
    compile_together,
    empty_strided,
    is_begun,
    limits,
    on_device,
    passes,
    segments,
    shapes_alone,
    view,
)


def steps(call: Call, step: Step) -> list[Do]:
    """Return what does a step."""
    if isinstance(step, Launch):
        return list(passes(call, step))
    if isinstance(step, Fused):
        return list(rows.KERNELS[step.row](call, step))
    if isinstance(step, Sum):
        terms = [(factor, call.place(x)) for factor, x in step.terms]
        return [functools.partial(_sum, call.place(step.o), terms)]
    if isinstance(step, Divide):
        return [_divided(call, step)]
    if isinstance(step, GateGradient):
        return _gate_gradient(call, step)
    if isinstance(step, GateSum):
        return [_gates_summed(call, step)]
    if isinstance(step, Border | Skew):
        make: Any = border if isinstance(step, Border) else skew
        return [does(call, functools.partial(make, xp, step, dtype=torch.float64), _put)]
    if isinstance(step, Fading):
        return list(fading(call, step))
    if isinstance(step, Carry):
        return list(carry(call, step))
    raise NotImplementedError(f"Triton has no {type(step).__name__}")


def _divided(call: Call, s: Divide) -> Do:
    """Return what does a Divide: one kernel, where all rows lie in memory as those of o."""
    places = [None if x is None else call.place(x) for x in (s.x, s.den, s.o, s.num, s.dden)]
    o = call.place(s.o).layout
    if math.prod(o.shape) and all(x is None or _alike(x.layout, o) for x in places):
        V = o.shape[-1]
        rows, BV = math.prod(o.shape) // V, min(normalize.TILE, triton.next_power_of_2(V))
        R = normalize.TILE // BV
        return Kernel(
            normalize.normalize_kernel, (triton.cdiv(rows, R),), places, [0] * 5,
            s.eps, rows, V, BACK=s.dden is not None, R=R, BV=BV,
        )  # fmt: skip

    def divide(arrays: list[Any], addresses: list[Any], stream: Any) -> None:
        x, den, o, num, dden = (view(arrays, y) for y in places)
        normalize.divide(o, x, den, s.eps, num, dden)

    return divide


def _alike(x: Layout, o: Layout) -> bool:
    """Whether the rows of x lie in memory, without gaps, in the order of those of o."""
    if x.shape[:-1] != o.shape[:-1]:
        return False
    wanted = strides_like(x.shape, o.shape, o.strides)
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.strides, wanted, strict=True))


_constants: dict[Any, torch.Tensor] = {}


def constant(value: float, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a number, made once a stream, as an array; a CUDA graph has yet to write its own."""
    cuda = device.type == "cuda"
    key = value, dtype, device, torch.cuda.current_stream(device).cuda_stream if cuda else 0
    found = _constants.get(key)
    if found is None:
        found = torch.full((), value, dtype=dtype, device=device)
        if not cuda or not torch.cuda.is_current_stream_capturing():
            _constants[key] = found
    return found.expand(shape)


def _sum(
    place: Place,
    terms: list[tuple[float, Place]],
    arrays: list[Any],
    pointers: list[Any],
    _: int | None,
) -> None:
    o, total = view(arrays, place), None
    assert o is not None
    for factor, term in terms:
        x = view(arrays, term)
        assert x is not None
        x = fit(torch, x, o.shape)
        x = x if factor == 1 else factor * x
        total = x if total is None else total + x
    if total is None:
        o.zero_()
    else:
        o.copy_(total)


def _gate_gradient(call: Call, s: GateGradient) -> list[Do]:
    """Return what does a GateGradient: one kernel, of a gate that lies in order."""
    refs = (s.reads, s.writes, s.gate, s.border, s.S, s.R, s.met, s.o)
    places = [None if x is None else call.place(x) for x in refs]
    T, gate = call.request.tokens, call.place(s.gate)
    *batch, reads, _ = call.place(s.reads).layout.shape
    heads, writes = math.prod(batch), call.place(s.writes).layout.shape[-2]
    D, V = (1, 1) if s.S is None else call.place(s.S).layout.shape[-2:]
    options = settings(
        strict=s.strict, log=call.request.gate == "log_gate", ends=s.ends, least=LEAST.value,
        period=s.period, chunk=s.chunk, reads=reads, writes=writes,
        met=1 if s.met is None else call.place(s.met).layout.shape[-1],
    )  # fmt: skip
    shape, strides, _ = gate.layout
    order = whole(shape)
    places[2] = gate._replace(layout=Layout(shape, order))
    grid = (heads * triton.cdiv(T, s.period),)
    if not grid[0]:
        return []
    given = gate_kernel, grid, places, [0] * 8, s.power, s.factor, T, D, V
    if all(n == 1 or a == b for n, a, b in zip(shape, strides, order, strict=True)):
        return [Kernel(*given, **options)]
    return [_OfCopy(gate, *given, **options)]


class _OfCopy(Kernel):
    """A kernel of a gate that is copied first, to lie in order; all else is allocated for it."""

    def __init__(self, gate: Place, *given: Any, **constants: Any) -> None:
        super().__init__(*given, **constants)
        self.gate = gate

    def compile(self, arrays: list[Any], dtypes: Mapping[int, torch.dtype]) -> None:
        super().compile([], dtypes)

    def __call__(self, arrays: list[Any], addresses: list[Any], stream: int | None) -> None:
        arrays, addresses = list(arrays), list(addresses)
        x: Any = view(arrays, self.gate)
        arrays[self.gate.slot] = x = x.contiguous()
        addresses[self.gate.slot] = x.data_ptr()
        super().__call__(arrays, addresses, stream)


def _put(old: torch.Tensor, ref: Ref, x: torch.Tensor) -> torch.Tensor:
    part(old, ref).copy_(x)
    return old


def _gates_summed(call: Call, s: GateSum) -> Do:
    """Return what does a GateSum: of log gates that lie in order, one for each term, one kernel."""
    log, places = call.request.gate == "log_gate", [call.place(x) for x in s.terms]
    o, gate = call.place(s.o), call.place(s.gate)
    shape = o.layout.shape
    n, order = math.prod(shape), Layout(shape, whole(shape))
    same = all(x.layout[:2] == order[:2] for x in (o, gate, *places))
    if log and n and same and 0 < len(places) <= 3:
        given = [*places, None, None][:3]
        return Kernel(
            sum_kernel, (triton.cdiv(n, 1024),), [*given, gate, o], [0] * 5, n, BLOCK=1024,
            num_warps=4,
        )  # fmt: skip
    return functools.partial(_gate_sum, log, o, gate, places)


def _gate_sum(
    log: bool, o: Place, gate: Place, terms: list[Place], arrays: list[Any], _: Any, stream: Any
) -> None:
    g: Any = view(arrays, gate)
    total = None
    shape = tuple(g.shape) if log else (*g.shape, 1)
    for term in terms:
        x = arrays[term.slot]
        x = x if log or x.shape[-1] == 1 else x.sum(-1, keepdim=True)
        x = fit(torch, x, shape)
        total = x if total is None else total + x
    if total is None:
        total = torch.zeros(shape, dtype=torch.float32, device=g.device)
    if log:
        arrays[o.slot] = torch.where(g.isinf(), 0.0, total)
    else:
        arrays[o.slot] = (total[..., 0] / g.clamp(min=LEAST.value)).float()


def alike(tensors: Sequence[torch.Tensor], pointers: Sequence[int]) -> tuple[Any, ...]:
    """Return what kernels are compiled for."""
    return (tensors[0].device, *[x.stride() for x in tensors], *[p & 15 for p in pointers])


def run(ready: Ready, tensors: list[Any], pointers: list[Any]) -> list[Any]:
    """Run a plan on the device of its arrays and on torch's stream."""
    return on_device(ready.call.where, lambda stream: ready(tensors, pointers, stream))


def begin(
    ready: Ready, arrays: Sequence[Any], pointers: list[Any], follows: Callable[[], Ready] | None
) -> None:
    """Compile the kernels of a plan at once, before its first run, and begin those of its backward.

    The backward's longest, which takes longest of all, comes first, its others last. What fails of
    them, the backward raises. Their memory is taken to be aligned, as what torch allocates is.
    """
    if ready.call.where.type != "cuda":
        return
    kernels = _kernels(ready, [*pointers, *(None,) * (ready.more + 1)])
    later, theirs = ready, list[Kernel]()
    if follows is not None and not all(map(is_begun, kernels)):
        with contextlib.suppress(Exception):
            later = follows()
            theirs = _kernels(later, [*(16,) * len(later.call.slots), None])
            _begun(later, theirs[:1], ())
    begun = _begun(ready, kernels, arrays)
    with contextlib.suppress(Exception):
        _begun(later, theirs[1:], ())
    futures.wait(begun)


def _kernels(ready: Ready, pointers: list[Any]) -> list[Kernel]:
    """Return the kernels of a plan, those of the most operands and constants first: the longest."""
    found = [do.choice(pointers) if isinstance(do, Aligned) else do
             for turn in ready.turns for do in turn.do]  # fmt: skip
    kernels = [do for do in found if isinstance(do, Kernel)]
    sizes = {x: len(x.constants) + sum(y is not None for y in x.operands) for x in kernels}
    return sorted(kernels, key=sizes.__getitem__, reverse=True)


def _begun(
    ready: Ready, kernels: Sequence[Kernel], arrays: Sequence[Any]
) -> list[futures.Future[None]]:
    """Begin to compile kernels of a plan."""
    dtypes = {ready.call.slots[name]: dtype for name, dtype in ready.dtypes.items()}
    return compile_together(kernels, list(arrays), dtypes, ready.call.where)


RUNNER = Runner(
    Device(
        steps=steps,
        limits=lambda request, where: limits(request, where),
        rows=lambda request, where: rows.rows(request, where),
        segments=lambda request, where: segments(request, where),
        layout=lambda x: Layout(tuple(x.shape), x.stride()),
        empty=empty_strided,
        constant=constant,
        dtype=lambda name: getattr(torch, name),
        where=lambda x: x.device,
        addresses=addresses,
        address=torch.Tensor.data_ptr,
        alike=alike,
        run=run,
        begin=begin,
    )
)


def forward(request: Request, inputs: Inputs) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return (o, state, the tensors that `backward` needs)."""
    if request.traced and shapes_alone(inputs.q):
        return empty(request, inputs)
    if request.tokens == 1 and request.return_state and not request.gradient:
        return *step(request, inputs, False), ()
    return RUNNER.forward(request, inputs)


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Any, Any]:
    """Return (o, state) of one token; the state may be packed, and with ``donate`` is written."""
    if one_token.fits(request):
        return one_token.step(request, inputs, donate)
    packed = type(inputs.state) in STATE_OF
    inputs = inputs._replace(state=unpacked(inputs.state))
    o, state, _ = RUNNER.forward(request, inputs)
    return o, state.pack() if packed else state


def again_forward(request: Request, inputs: Inputs, axis: int) -> Again | None:
    """Return what does such a `forward` of other tensors; see `Runner.again`."""
    if request.tokens == 1 and request.return_state and not request.gradient:
        return None  # has a kernel of its own
    return RUNNER.again_forward(request, inputs, axis)


def again_backward(
    request: Request, inputs: Inputs, saved: Sequence[Any], do: Any, dstate: Any, axis: int
) -> Again | None:
    """Return what does such a `backward` of the inputs, what is saved, do and dstate in a row."""
    if do is not None and request.dtype == "bfloat16" and do.dtype is not torch.bfloat16:
        return None
    return RUNNER.again_backward(request, inputs, saved, do, dstate, axis)


def backward(
    request: Request, inputs: Inputs, saved: Sequence[Any], do: Any, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    if request.traced and shapes_alone(inputs.q):
        return empty_gradients(request, inputs)
    if do is not None and request.dtype == "bfloat16":
        do = do.to(torch.bfloat16)
    return RUNNER.backward(request, inputs, saved, do, dstate)


def empty(request: Request, inputs: Inputs) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return what `forward` does, of the same shapes, strides and dtypes and of any values."""
    told, q, kind = shapes(request), inputs.q, request.state_type

    def like_q(shape: Shape, dtype: str) -> torch.Tensor:
        strides = strides_like(shape, tuple(q.shape), q.stride())
        return q.new_empty_strided(shape, strides, dtype=getattr(torch, dtype))

    state = None
    if kind is not None and request.return_state:
        state = kind(*(q.new_empty(x, dtype=torch.float32) for x in told.state.values()))
    saved = [like_q(shape, dtype_of(request, n)) for n, shape in told.saved.items()]
    return like_q(told.o, request.dtype), state, tuple(saved)


def empty_gradients(request: Request, inputs: Inputs) -> Gradients:
    """Return what `backward` does, of the same shapes, strides and dtypes and of any values."""
    q, k, v, decay, log_gate, state = inputs

    def whole(x: Any) -> Any:
        given = x is not None and request.gate_given
        return x.new_empty(x.shape, dtype=torch.float32) if given else None

    dq, dk, dv = (
        x.new_empty_strided(x.shape, strides_like(tuple(x.shape), tuple(x.shape), x.stride()))
        for x in (q, k, v)
    )
    if state is not None:
        state = type(state)(*(x.new_empty(x.shape) for x in state))
    return Gradients(dq, dk, dv, whole(decay), whole(log_gate), state)
