"""Plans on torch tensors: prepared once for what a request's arrays are like, then run.

A call that is like an earlier one (its request, strides, alignment of addresses) allocates what it
returns, collects addresses and launches kernels that are ready.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from ...core.fields import rank
from ...core.passes import Shape
from ...core.reference import Gradients
from ...core.request import Inputs, Request
from ...core.shapes import saved as saved_names
from ...core.shapes import shapes
from ...device import plan as plans
from ...device.scan import gradients
from ...device.steps import Buffer, Divide, GateGradient, GateSum, Launch, Plan, Ref, Step, Sum
from ...device.tiles import Layout, strides_like, whole
from . import normalize
from .causal import LEAST
from .gate import gate_gradient
from .launch import (
    Call,
    Kernel,
    Place,
    addresses,
    limits,
    passes,
    shapes_alone,
    stream_of,
    view,
)

Do = Callable[[list[Any], list[Any], int | None], None]  # of arrays, their addresses, a stream
READY = 4096


class Turn(NamedTuple):
    """One step: what it needs allocated, how it is done, and what nobody reads after it."""

    fresh: tuple[
        tuple[int, int, Shape, Shape, torch.dtype], ...
    ]  # slot, slot whose memory it takes
    do: tuple[Do, ...]
    dead: tuple[int, ...]


class Ready:
    """A plan for arrays of known strides and alignment."""

    def __init__(
        self, plan: Plan, request: Request, named: dict[str, torch.Tensor], device: torch.device
    ) -> None:
        order = [*named, *(n for n in plan.buffers if n not in named)]
        slots = {name: i for i, name in enumerate(order)}
        self.layouts = {name: _column(name, x) for name, x in named.items()}
        self.dtypes = {name: x.dtype for name, x in named.items()}
        self.call = Call(request, slots, self.layouts, self.dtypes, device)
        self.plan, self.slots, self.device = plan, slots, device
        self.more = len(order) - len(named)
        made = {s.o.name for s in plan.steps if isinstance(s, (GateGradient, GateSum))}
        self.constants: list[tuple[int, Shape, float, torch.dtype]] = []
        self.turns = []
        for step, fresh, dead in zip(plan.steps, plan.fresh, plan.dead, strict=True):
            new = [self.allocation(n, plan.buffers[n]) for n in fresh if n not in made]
            gone = tuple(slots[n] for n in dead)
            self.turns.append(Turn(tuple(filter(None, new)), tuple(self.prepared(step)), gone))
        self.results = {name: slots[own] for name, own in plan.results.items()}
        self.saved = tuple(slots[name] for name in plan.saved)

    def allocation(self, name: str, b: Buffer) -> Any:
        """Lay out a buffer; return how to allocate it, None of a constant."""
        dtype = getattr(torch, b.dtype)
        if b.fill is not None:
            self.constants.append((self.slots[name], b.shape, b.fill, dtype))
            strides: Shape = (0,) * len(b.shape)
        elif b.reuses:
            strides = self.layouts[b.reuses].strides
        elif b.like:
            strides = strides_like(b.shape, *self.layouts[b.like][:2])
        else:
            strides = whole(b.shape)
        self.layouts[name], self.dtypes[name] = Layout(b.shape, strides), dtype
        if b.fill is not None:
            return None
        reused = self.slots[b.reuses] if b.reuses else -1
        return self.slots[name], reused, b.shape, strides, dtype

    def prepared(self, step: Step) -> list[Do]:
        """Return what does a step."""
        if isinstance(step, Launch):
            return list(passes(self.call, step))
        if isinstance(step, Sum):
            terms = [(factor, self.place(x)) for factor, x in step.terms]
            return [functools.partial(_sum, self.place(step.o), terms)]
        if isinstance(step, Divide):
            return [self.divided(step)]
        if isinstance(step, GateGradient):
            return [functools.partial(_gate_gradient, self, step)]
        if isinstance(step, GateSum):
            return [functools.partial(_gate_sum, self, step)]
        raise NotImplementedError(f"Triton has no {type(step).__name__}")

    def place(self, ref: Ref) -> Place:
        """Return which array, or part of one, a reference means."""
        place = self.call.place(ref)
        assert place is not None
        return place

    def divided(self, s: Divide) -> Do:
        """Return what does a Divide: one kernel, where all rows lie in memory as those of o."""
        places = [None if x is None else self.place(x) for x in (s.x, s.den, s.o, s.num, s.dden)]
        o = self.place(s.o).layout
        if math.prod(o.shape) and all(x is None or _alike(x.layout, o) for x in places):
            V = o.shape[-1]
            rows, BV = math.prod(o.shape) // V, min(normalize.TILE, triton.next_power_of_2(V))
            R = normalize.TILE // BV
            return Kernel(
                normalize.normalize_kernel, (triton.cdiv(rows, R),), places, [0] * 5,
                s.eps, rows, V, BACK=s.dden is not None, R=R, BV=BV,
            )  # fmt: skip

        def divide(arrays: list[Any], addresses: list[Any], stream: int | None) -> None:
            x, den, o, num, dden = (view(arrays, y) for y in places)
            normalize.divide(o, x, den, s.eps, num, dden)

        return divide

    def __call__(self, tensors: Sequence[torch.Tensor], pointers: list[Any]) -> list[Any]:
        """Run the plan on arrays with these addresses; return every array that is left."""
        device = self.device
        if device.type != "cuda":
            return self.run(tensors, pointers, None)
        if torch.cuda.current_device() == device.index:
            return self.run(tensors, pointers, stream_of(device))
        with torch.cuda.device(device):
            return self.run(tensors, pointers, stream_of(device))

    def run(
        self, tensors: Sequence[torch.Tensor], pointers: list[Any], stream: int | None
    ) -> list[Any]:
        """Do every step; where all is ready this allocates, collects addresses and launches."""
        arrays = [*tensors, *(None,) * self.more]
        pointers += (None,) * (self.more + 1)
        device, empty = self.device, torch.empty_strided
        for slot, shape, fill, dtype in self.constants:
            arrays[slot] = x = constant(fill, dtype, device).expand(shape)
            pointers[slot] = x.data_ptr()
        for turn in self.turns:
            for slot, reused, shape, strides, dtype in turn.fresh:
                if reused < 0:
                    arrays[slot] = x = empty(shape, strides, dtype=dtype, device=device)
                    pointers[slot] = x.data_ptr()
                else:
                    arrays[slot], pointers[slot] = arrays[reused], pointers[reused]
            for do in turn.do:
                do(arrays, pointers, stream)
            for slot in turn.dead:
                arrays[slot] = None
        return arrays


def _column(name: str, x: torch.Tensor) -> Layout:
    """Layout of a given array; the denominator's part of a state is a column of a matrix."""
    field = name.removeprefix("d.")
    if field[-2:] in ("@0", "@T") and rank(field) == 1:
        return Layout((*x.shape, 1), (*x.stride(), 1))
    return Layout(tuple(x.shape), x.stride())


def _alike(x: Layout, o: Layout) -> bool:
    """Whether the rows of x lie in memory, without gaps, in the order of those of o."""
    if x.shape[:-1] != o.shape[:-1]:
        return False
    wanted = strides_like(x.shape, o.shape, o.strides)
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.strides, wanted, strict=True))


_constants: dict[Any, torch.Tensor] = {}


def constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a number on a device, once made; what a CUDA graph captures is not yet there."""
    found = _constants.get((value, dtype, device))
    if found is None:
        found = torch.full((), value, dtype=dtype, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _constants[value, dtype, device] = found
    return found


def _fit(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Sum x over the axes where ``shape`` has 1 or none, then broadcast to it."""
    extra = max(0, x.ndim - len(shape))
    axes = [i for i in range(x.ndim) if i < extra or (shape[i - x.ndim] == 1 and x.shape[i] != 1)]
    x = x.sum(axes, keepdim=True) if axes else x
    return x.reshape(x.shape[extra:]).expand(shape)


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
        x = _fit(x, o.shape)
        x = x if factor == 1 else factor * x
        total = x if total is None else total + x
    if total is None:
        o.zero_()
    else:
        o.copy_(total)


def _tokens(ready: Ready, refs: Sequence[Ref], arrays: list[Any]) -> torch.Tensor:
    """Add up dots."""
    total: Any = None
    for ref in refs:
        x = view(arrays, ready.place(ref))
        assert x is not None
        x = x[..., 0, :] if x.shape[-2] == 1 else x.sum(-2)
        total = x if total is None else total + x
    return total


def _gate_gradient(
    ready: Ready, s: GateGradient, arrays: list[Any], pointers: list[Any], _: int | None
) -> None:
    border: Any = None
    for start, grad in s.border:
        S, dS = (view(arrays, ready.place(x)) for x in (start, grad))
        assert S is not None
        assert dS is not None
        term = (S * dS).sum((-2, -1), dtype=torch.float64)
        border = term if border is None else border + term
    S, R = (None if x is None else view(arrays, ready.place(x)) for x in (s.S, s.R))
    arrays[ready.slots[s.o.name]] = gate_gradient(
        _tokens(ready, s.reads, arrays), _tokens(ready, s.writes, arrays),
        arrays[ready.slots["gate"]], border, S, R, power=s.power, factor=s.factor, strict=s.strict,
        log=ready.call.request.gate == "log_gate", least=LEAST.value, period=s.period,
        chunk=s.chunk,
    )  # fmt: skip


def _gate_sum(
    ready: Ready, s: GateSum, arrays: list[Any], pointers: list[Any], _: int | None
) -> None:
    gate, total = arrays[ready.slots["gate"]], None
    log = ready.call.request.gate == "log_gate"
    shape = tuple(gate.shape) if log else (*gate.shape, 1)
    for ref in s.terms:
        x = _fit(arrays[ready.slots[ref.name]], shape)
        total = x if total is None else total + x
    if total is None:
        total = torch.zeros(shape, dtype=torch.float32, device=ready.device)
    if log:
        total = torch.where(gate.isinf(), torch.zeros_like(total), total)
    else:
        total = total[..., 0] / gate.clamp(min=LEAST.value)
    arrays[ready.slots[s.o.name]] = total.float()


_ready: dict[Any, Ready] = {}


class Kind(NamedTuple):
    """What a request does not tell of a call."""

    back: bool
    start: bool  # there is an initial state
    do: torch.dtype | None = None  # of the gradient of o
    dstate: bool = False

    def plan(self, request: Request) -> Plan:
        """Return the plan of such a call."""
        if not self.back:
            return plans.forward(request, limits(request), start=self.start)
        do = self.do is not None
        return plans.backward(request, limits(request), start=self.start, do=do, dstate=self.dstate)

    def names(self, request: Request) -> list[str]:
        """Return the names of the arrays of such a call, in order."""
        fields = [] if request.state_type is None else list(_fields(request))
        found = ["q", "k", "v", *(["gate"] if request.gate else [])]
        found += [f"{x}@0" for x in fields if self.start]
        if self.back:
            found += saved_names(request)
            found += [] if self.do is None else ["d.out" if request.normalize else "d.o"]
            found += [f"d.{x}@T" for x in fields if self.dstate]
        return found


def _fields(request: Request) -> tuple[str, ...]:
    kind: Any = request.state_type
    return kind._fields  # type: ignore[no-any-return]


def run(request: Request, kind: Kind, tensors: Sequence[torch.Tensor]) -> tuple[Ready, list[Any]]:
    """Run the plan of a call on its arrays, in the order of `Kind.names`."""
    pointers = addresses(tensors)
    key = (request, kind, *[x.stride() for x in tensors], *[p & 15 for p in pointers])
    ready = _ready.get(key)
    if ready is None:
        if len(_ready) >= READY:
            _ready.clear()
        named = dict(zip(kind.names(request), tensors, strict=True))
        ready = _ready[key] = Ready(kind.plan(request), request, named, tensors[0].device)
    return ready, ready(tensors, pointers)


def _given(request: Request, inputs: Inputs) -> list[torch.Tensor]:
    q, k, v, decay, log_gate, state = inputs
    found = [q, k, v]
    if request.gate is not None:
        found.append(decay if log_gate is None else log_gate)
    return found if state is None else [*found, *_states(request, state)]


def _states(request: Request, state: Any) -> list[torch.Tensor]:
    """Fields of a state in their full shape."""
    full = request.state_shapes()
    return [
        x if tuple(x.shape) == full[n] else x.expand(full[n])
        for n, x in zip(state._fields, state, strict=True)
    ]


def forward(request: Request, inputs: Inputs) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return (o, state, the tensors that `backward` needs)."""
    if request.traced and shapes_alone(inputs.q):
        return empty(request, inputs)
    kind = Kind(back=False, start=inputs.state is not None)
    ready, arrays = run(request, kind, _given(request, inputs))
    results, state = ready.results, None
    if request.return_state:
        fields = ((n, arrays[results[f"{n}@T"]]) for n in _fields(request))
        state = request.state_type(*(x if rank(n) == 2 else x[..., 0] for n, x in fields))  # type: ignore[misc]
    return arrays[results["o"]], state, tuple([arrays[i] for i in ready.saved])


def backward(
    request: Request, inputs: Inputs, saved: Sequence[Any], do: Any, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    if request.traced and shapes_alone(inputs.q):
        return empty_gradients(request, inputs)
    tensors = _given(request, inputs) + list(saved)
    if do is not None:
        narrow = request.dtype == "bfloat16" and do.dtype != torch.bfloat16
        tensors.append(do := do.to(torch.bfloat16) if narrow else do)
    if dstate is not None:
        tensors += _states(request, dstate)
    start, dtype = inputs.state is not None, None if do is None else do.dtype
    kind = Kind(True, start, dtype, dstate is not None)
    ready, arrays = run(request, kind, tensors)
    by = {name: arrays[slot] for name, slot in ready.results.items()}
    return gradients(request, inputs, by)


def empty(request: Request, inputs: Inputs) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return what `forward` does, of the same shapes, strides and dtypes and of any values."""
    told, q, kind = shapes(request), inputs.q, request.state_type

    def like_q(shape: Shape, dtype: str) -> torch.Tensor:
        strides = strides_like(shape, tuple(q.shape), q.stride())
        return q.new_empty_strided(shape, strides, dtype=getattr(torch, dtype))

    state = None
    if kind is not None and request.return_state:
        state = kind(*(q.new_empty(x, dtype=torch.float32) for x in told.state.values()))
    saved = [like_q(shape, plans.dtype_of(request, n)) for n, shape in told.saved.items()]
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
