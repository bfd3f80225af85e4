"""Run the plans of requests on a device, prepared once for what a request's arrays are like.

A call that is like an earlier one (its request, and what the device knows of its arrays) allocates
what its plan names and does the steps that are ready.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..core.fields import rank
from ..core.namespace import expand, sum_to
from ..core.passes import Shape
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from ..states.packed import STATE_OF
from . import plan as plans
from .shapes import saved as saved_names
from .steps import Buffer, Launch, Limits, Plan, Ref, Row, Step
from .tiles import Layout, grids, inner, located, strides_like, whole

Array = Any
Again = Callable[[list[Array], list[Any]], list[Array]]  # of arrays and their addresses
Do = Callable[[list[Array], list[Any], Any], None]  # of arrays, their addresses, a stream
READY = 4096
PIECE = 256  # bytes, of which a piece of memory has a multiple
SMALL = 8  # an array that is smaller than the largest given one by so much


class Place(NamedTuple):
    """Which array, and which part of it."""

    slot: int
    layout: Layout


class Call(NamedTuple):
    """What is known of all arrays of a plan, by their names."""

    request: Request
    slots: Mapping[str, int]
    layouts: Mapping[str, Layout]
    dtypes: Mapping[str, Any]
    where: Any  # as `Device.where` gives it

    def place(self, ref: Ref) -> Place:
        """Return the place that a reference means."""
        return Place(self.slots[ref.name], located(ref, self.layouts))


class Device(NamedTuple):
    """A backend, as this package sees it.

    ``steps`` returns what does a step: it reads the arrays of a list and writes into them, or puts
    new ones in their places. The other functions take arrays of the device's library.
    """

    steps: Callable[[Call, Step], Iterable[Do]]
    limits: Callable[[Request, Any], Limits]
    layout: Callable[[Array], Layout]
    empty: Callable[[Shape, Shape, Any, Any], Array]  # of a shape, strides and dtype, where
    constant: Callable[[float, Shape, Any, Any], Array]
    dtype: Callable[[str], Any]  # by its name
    where: Callable[[Array], Any] = lambda array: None  # on which device an array is
    addresses: Callable[[Sequence[Array]], list[Any]] = lambda arrays: [None] * len(arrays)
    address: Callable[[Array], Any] = lambda array: None
    alike: Callable[[Sequence[Array], list[Any]], tuple[Any, ...]] = lambda arrays, addresses: ()
    run: Callable[[Ready, list[Array], list[Any]], list[Array]] = lambda ready, arrays, addresses: (
        ready(arrays, addresses, None)
    )
    rows: Callable[[Request, Any], tuple[Row, ...]] = lambda request, where: ()  # that fit it
    segments: Callable[[Request, Any], int] = lambda request, where: 0  # tokens of one; 0: whole
    begin: Callable[[Ready, Sequence[Array], list[Any], Callable[[], Ready] | None], None] = (
        lambda ready, arrays, addresses, follows: None
    )  # before the first run of a plan; of a forward with gradients what makes its backward's
    bare: Callable[[Do], bool] = lambda do: False  # whether it reads addresses alone
    room: Callable[[int, Any], tuple[Any, Any]] | None = None  # so many bytes, and their address


def heads(
    batch: Shape, places: Sequence[Place | None], ranks: Sequence[int]
) -> Iterator[tuple[Shape, list[Shape], list[Place | None], list[Shape]]]:
    """Yield grids of at most three batch axes: sizes, strides along them, first heads, own strides.

    Of operands with so many axes of their own; 0 along what one lacks.
    """
    lists = [None if x is None else (x.layout, n) for x, n in zip(places, ranks, strict=True)]
    for counts, strides, offsets in grids(batch, lists):
        first = [
            None if x is None else x._replace(layout=inner(x.layout, n, offset))
            for x, n, offset in zip(places, ranks, offsets, strict=True)
        ]
        yield counts, strides, first, [() if x is None else x.layout.strides for x in first]


def left_out(s: Launch, x: Place | None, kind: str) -> Place | None:
    """Return where an operand of a launch lies behind its first segment, if that is left out.

    It has "rows", is a "state" of each segment, a log "gate", or a "decay", which has no tokens.
    """
    if x is None or kind == "decay" or not (s.short and s.reverse):
        return x
    axis, n = {"rows": (-2, s.tokens), "state": (-3, 1), "gate": (-1, s.tokens)}[kind]
    return x._replace(layout=x.layout.behind(axis, n))


class Turn(NamedTuple):
    """One step: what it needs allocated, what does it, and what nobody reads after it."""

    fresh: tuple[tuple[int, int, Shape, Shape, Any], ...]  # slot, slot whose memory it takes, ...
    do: tuple[Do, ...]
    dead: tuple[int, ...]


class Ready:
    """A plan for arrays of known strides and alignment."""

    def __init__(
        self, device: Device, plan: Plan, request: Request, given: Mapping[str, Array]
    ) -> None:
        order = [*given, *(name for name in plan.buffers if name not in given)]
        self.device, self.plan = device, plan
        slots = {name: i for i, name in enumerate(order)}
        self.more = len(order) - len(given)
        self.layouts = {name: _column(name, device.layout(x)) for name, x in given.items()}
        self.dtypes = {name: x.dtype for name, x in given.items()}
        where = device.where(next(iter(given.values())))
        self.call = Call(request, slots, self.layouts, self.dtypes, where)
        self.constants: list[tuple[int, Shape, float, Any]] = []
        self.turns = []
        for step, fresh, dead in zip(plan.steps, plan.fresh, plan.dead, strict=True):
            new = [self.allocation(name, plan.buffers[name]) for name in fresh]
            do = tuple(device.steps(self.call, step))
            gone = tuple(slots[name] for name in dead)
            self.turns.append(Turn(tuple(x for x in new if x), do, gone))
        self.results = {name: slots[own] for name, own in plan.results.items()}
        self.saved = tuple(slots[name] for name in plan.saved)
        self.bytes = 0  # of small temporaries, which are pieces of one allocation
        self.pieces: list[tuple[int, int]] = []  # their slots, and bytes before them
        if device.room and all(device.bare(do) for turn in self.turns for do in turn.do):
            self.share([x.dtype.itemsize * math.prod(x.shape) for x in given.values()])

    def allocation(self, name: str, b: Buffer) -> tuple[int, int, Shape, Shape, Any] | None:
        """Lay out a buffer; return how to allocate it, None of a constant."""
        dtype, layouts, slots = self.device.dtype(b.dtype), self.layouts, self.call.slots
        if b.fill is not None:
            strides: Shape = (0,) * len(b.shape)
        elif b.reuses:
            strides = layouts[b.reuses].strides
        else:
            strides = strides_like(b.shape, *layouts[b.like][:2]) if b.like else whole(b.shape)
        layouts[name], self.dtypes[name] = Layout(b.shape, strides), dtype
        if b.fill is not None:
            self.constants.append((slots[name], b.shape, b.fill, dtype))
            return None
        return slots[name], slots[b.reuses] if b.reuses else -1, b.shape, strides, dtype

    def share(self, given: Sequence[int]) -> None:
        """Allocate small temporaries at once: each as an array takes as long as a launch."""
        kept = {*self.results.values(), *self.saved}
        kept |= {reused for turn in self.turns for _, reused, *_ in turn.fresh}
        for i, turn in enumerate(self.turns):
            own = []
            for slot, reused, shape, strides, dtype in turn.fresh:
                size = dtype.itemsize * math.prod(shape)
                if reused < 0 and slot not in kept and size * SMALL <= max(given):
                    self.pieces.append((slot, self.bytes))
                    self.bytes += -(-size // PIECE) * PIECE
                else:
                    own.append((slot, reused, shape, strides, dtype))
            self.turns[i] = turn._replace(fresh=tuple(own))

    def outward(self, names: Sequence[str], axis: int) -> Ready | None:
        """Return the same with results as the caller lays them out; None where one is no array.

        Tokens lie on ``axis``, and a denominator's part of a state is a vector.
        """
        before = {x: y for turn in self.turns for x, y, *_ in turn.fresh}
        change: dict[int, Callable[[Shape], Shape]] = {}
        for name in names:
            slot = self.results[name]
            while before.get(slot, -1) >= 0:
                slot = before[slot]
            if slot not in before or slot in change:
                return None
            if name in ("o", "d.q", "d.k", "d.v"):
                change[slot] = functools.partial(_moved, axis=axis)
            else:
                change[slot] = _vector if _is_column(name) else tuple
        found = copy.copy(self)
        found.turns = [
            turn._replace(
                fresh=tuple(
                    (i, j, change[i](shape), change[i](strides), dtype)
                    if i in change
                    else (i, j, shape, strides, dtype)
                    for i, j, shape, strides, dtype in turn.fresh
                )
            )
            for turn in self.turns
        ]
        return found

    def __call__(self, arrays: list[Array], addresses: list[Any], stream: Any) -> list[Array]:
        """Do every step on arrays with these addresses; return every array that is left."""
        where, device = self.call.where, self.device
        empty, constant, address = device.empty, device.constant, device.address
        arrays += (None,) * self.more
        addresses += (None,) * (self.more + 1)  # the last is that of nothing
        for slot, shape, fill, dtype in self.constants:
            arrays[slot] = x = constant(fill, shape, dtype, where)
            addresses[slot] = address(x)
        if self.bytes and device.room:
            _held, first = device.room(self.bytes, where)  # until all is launched
            for slot, before in self.pieces:
                addresses[slot] = first + before
        for turn in self.turns:
            for slot, reused, shape, strides, dtype in turn.fresh:
                if reused < 0:
                    arrays[slot] = x = empty(shape, strides, dtype, where)
                    addresses[slot] = address(x)
                else:
                    arrays[slot], addresses[slot] = arrays[reused], addresses[reused]
            for do in turn.do:
                do(arrays, addresses, stream)
            for slot in turn.dead:
                arrays[slot] = None
        return arrays


def _column(name: str, x: Layout) -> Layout:
    """Layout of a given array; the denominator's part of a state is a column of a matrix."""
    return Layout((*x.shape, 1), (*x.strides, 1)) if _is_column(name) else x


def _is_column(name: str) -> bool:
    field = name.removeprefix("d.")
    return field[-2:] in ("@0", "@T") and rank(field) == 1


def _vector(sizes: Shape) -> Shape:
    return sizes[:-1]


def _moved(sizes: Shape, axis: int) -> Shape:
    """Move the token axis from -2."""
    *batch, tokens, width = sizes
    batch.insert(len(batch) + axis + 2, tokens)
    return (*batch, width)


class Kind(NamedTuple):
    """Facts of a call that its request does not hold."""

    back: bool
    start: bool  # there is an initial state
    do: Any = None  # dtype of the gradient of o
    dstate: bool = False
    tokens: int | None = None  # of a segment; None: as the device has it

    def plan(self, device: Device, request: Request, where: Any) -> Plan:
        """Return the plan of such a call."""
        tokens = device.segments(request, where) if self.tokens is None else self.tokens
        rows = device.rows(request, where)
        given = request, device.limits(request, where), rows, tokens
        if not self.back:
            return plans.forward(*given, start=self.start)
        there = self.do is not None
        return plans.backward(*given, start=self.start, do=there, dstate=self.dstate)

    def names(self, request: Request) -> list[str]:
        """Return the names of the arrays of such a call, in order."""
        fields = _fields(request)
        found = ["q", "k", "v", *(["gate"] if request.gate else [])]
        found += [f"{x}@0" for x in fields if self.start]
        if self.back:
            found += saved_names(request)
            found += [] if self.do is None else ["d.out" if request.normalize else "d.o"]
            found += [f"d.{x}@T" for x in fields if self.dstate]
        return found


def _fields(request: Request) -> tuple[str, ...]:
    kind: Any = request.state_type
    return () if kind is None else kind._fields


class Runner:
    """A device with the plans that are ready on it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.ready: dict[Any, Ready] = {}

    def run(self, request: Request, kind: Kind, arrays: list[Array]) -> tuple[Ready, list[Array]]:
        """Run the plan of a call on its arrays, in the order of `Kind.names`."""
        addresses = self.device.addresses(arrays)
        ready = self.found(request, kind, arrays, addresses)
        return ready, self.device.run(ready, arrays, addresses)

    def found(
        self, request: Request, kind: Kind, arrays: Sequence[Array], addresses: list[Any]
    ) -> Ready:
        """Return the plan of a call, ready for arrays like these."""
        device = self.device
        key = (request, kind, *device.alike(arrays, addresses))
        ready = self.ready.get(key)
        if ready is None:
            if len(self.ready) >= READY:
                self.ready.clear()
            given = dict(zip(kind.names(request), arrays, strict=True))
            plan = kind.plan(device, request, device.where(arrays[0]))
            ready = Ready(device, plan, request, given)
            follows = None
            if request.gradient and not kind.back:
                follows = functools.partial(following, ready, request, kind, given)
            device.begin(ready, arrays, addresses, follows)
            self.ready[key] = ready
        return ready

    def again(self, request: Request, kind: Kind, arrays: list[Array], axis: int) -> Again | None:
        """Return what runs the plan of a call on other arrays like its own, and their addresses.

        They may come as the caller lays them out, tokens on ``axis``, and the results do: o and the
        fields of the state, then what `backward` reads; or the gradients of q, k, v, the gate if it
        has one, and the fields of the state.
        """
        device, fields = self.device, _fields(request)
        if 0 in (n for x in arrays for n in x.shape):
            return None
        if kind.back:
            names = ["d.q", "d.k", "d.v"] + [f"d.{x}@0" for x in fields if kind.start]
        else:
            names = ["o"] + [f"{x}@T" for x in fields if request.return_state]
        ready = self.found(request, kind, arrays, device.addresses(arrays))
        moved = ready.outward(names, axis)
        if moved is None:
            return None
        if kind.back and request.gate_given:
            names.insert(3, "d.gate")
        slots = [*(moved.results[name] for name in names), *moved.saved]

        def again(arrays: list[Array], addresses: list[Any]) -> list[Array]:
            found = device.run(moved, arrays, addresses)
            return [found[i] for i in slots]

        return again

    def again_forward(self, request: Request, inputs: Inputs, axis: int) -> Again | None:
        """Return what does such a `forward` of other arrays, or None; see `again`."""
        if not _full(request, inputs.state):
            return None
        return self.again(
            request, Kind(False, inputs.state is not None), given(request, inputs), axis
        )

    def again_backward(
        self, request: Request, inputs: Inputs, saved: Sequence[Array], do: Any, dstate: Any,
        axis: int,
    ) -> Again | None:  # fmt: skip
        """Return what does such a `backward` of the inputs, saved, do and dstate in a row."""
        if do is None or not (_full(request, inputs.state) and _full(request, dstate)):
            return None
        kind = Kind(True, inputs.state is not None, do.dtype, dstate is not None)
        arrays = [*given(request, inputs), *saved, do, *(dstate or ())]
        return self.again(request, kind, arrays, axis)

    def forward(
        self, request: Request, inputs: Inputs, tokens: int | None = None
    ) -> tuple[Array, Any, tuple[Array, ...]]:
        """Return (o, state, the arrays that `backward` reads).

        Parameters
        ----------
        request, inputs
            The call, and its arrays.
        tokens : int, optional
            Of a segment, 0 for the whole sequence as one; by default as the device has it.
        """
        kind = Kind(False, inputs.state is not None, tokens=tokens)
        ready, found = self.run(request, kind, given(request, inputs))
        results, state = ready.results, None
        if request.return_state:
            fields = ((n, found[results[f"{n}@T"]]) for n in _fields(request))
            make: Any = request.state_type
            state = make(*(x if rank(n) == 2 else x[..., 0] for n, x in fields))
        return found[results["o"]], state, tuple([found[i] for i in ready.saved])

    def backward(
        self,
        request: Request,
        inputs: Inputs,
        saved: Sequence[Array],
        do: Array | None,
        dstate: Any,
        tokens: int | None = None,
    ) -> Gradients:
        """Return the gradients of `forward`.

        Parameters
        ----------
        request, inputs, tokens
            As given to `forward`.
        saved : sequence of array
            As any backend's forward returned them.
        do : array or None, dstate : NamedTuple or None
            Gradients of its other results.
        """
        arrays = [*given(request, inputs), *saved, *(() if do is None else (do,))]
        if dstate is not None:
            arrays += _states(request, dstate)
        dtype = None if do is None else do.dtype
        kind = Kind(True, inputs.state is not None, dtype, dstate is not None, tokens)
        ready, found = self.run(request, kind, arrays)
        by = {name: found[slot] for name, slot in ready.results.items()}
        state, gate = inputs.state, by.get("d.gate")
        if state is not None:  # in the shapes in which it came
            fields = ((n, x, by[f"d.{n}@0"]) for n, x in state._asdict().items())
            state = type(state)(
                *(sum_to(g if rank(n) == 2 else g[..., 0], x.shape) for n, x, g in fields)
            )
        dq, dk, dv = (by[f"d.{name}"] for name in "qkv")
        log = request.gate == "log_gate"
        return Gradients(dq, dk, dv, None if log else gate, gate if log else None, state)


class Like(NamedTuple):
    """An array that is not there yet."""

    layout: Layout
    dtype: Any


def following(ready: Ready, request: Request, kind: Kind, given: Mapping[str, Array]) -> Ready:
    """Return the backward's plan behind a forward's, to be compiled and not to be run.

    For a gradient of o alone that lies in memory like o: of another one kernels may differ.
    """
    device, where = ready.device, ready.call.where
    arrays = {name: Like(device.layout(x), x.dtype) for name, x in given.items()}
    names = {slot: name for name, slot in ready.call.slots.items()}
    made = [names[slot] for slot in (*ready.saved, ready.results["o"])]
    others = [Like(ready.layouts[name], ready.dtypes[name]) for name in made]
    back = Kind(True, kind.start, others[-1].dtype, tokens=kind.tokens)
    arrays |= dict(zip(back.names(request)[len(arrays) :], others, strict=True))
    like = device._replace(layout=lambda x: x.layout, where=lambda x: where)
    return Ready(like, back.plan(device, request, where), request, arrays)


def given(request: Request, inputs: Inputs) -> list[Array]:
    """Return the arrays of a call in the order of `Kind.names`."""
    q, k, v, decay, log_gate, state = inputs
    found = [q, k, v]
    if request.gate is not None:
        found.append(decay if log_gate is None else log_gate)
    return found if state is None else [*found, *_states(request, state)]


def _full(request: Request, state: Any) -> bool:
    """Whether every field of a state, if there is one, has its full shape."""
    if state is None:
        return True
    if type(state) in STATE_OF:
        return False
    full = request.state_shapes()
    return all(x is not None and tuple(x.shape) == full[n] for n, x in state._asdict().items())


def _states(request: Request, state: Any) -> list[Array]:
    """Fields of a state in their full shape."""
    full = request.state_shapes()
    return [expand(x, full[n]) for n, x in zip(state._fields, state, strict=True)]
