"""How a plan's steps are done by CUDA C++ kernels: of any library whose arrays are memory.

`Memory` is what that library must do; `driver` has CuPy's. Small steps between launches run in the
library's own namespace, on float32 and float64 alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...core.passes import Shape
from ...core.reference import Gradients
from ...core.request import Inputs, Request
from ...device.elementwise import elementwise, part
from ...device.scan import Again, Call, Device, Do, Ready, Runner
from ...device.steps import (
    Carry,
    Divide,
    Fading,
    Fused,
    GateGradient,
    GateSum,
    Launch,
    Ref,
    Row,
    Step,
    Sum,
    names,
    written,
)
from ...device.tiles import Layout, whole
from ...device.token import unpacked
from ...states.packed import STATE_OF
from . import between, hopper_states, launch, rows
from . import step as one_token

Array = Any
NARROW = ("bfloat16", "float16")
ALIGNED = 256  # an address, as pools give it


class Memory(NamedTuple):
    """Arrays of one library, and their device."""

    xp: Any  # namespace of the standard
    load: launch.Load
    card: Callable[[Array], launch.Card]  # where an array is
    empty: Callable[[Shape, Shape, Any, Any], Array]  # of a shape, strides in elements, dtype
    view: Callable[[Array, Shape, Shape], Array]  # of its memory, of such strides
    constant: Callable[[float, Shape, Any, Any], Array]
    dtype: Callable[[str], Any]
    address: Callable[[Array], int]
    inside: Callable[[launch.Card, Callable[[], Any]], Any]  # call a function on a device
    room: Callable[[int, launch.Card], tuple[Any, int]] | None = None  # bytes, and their address


class Kernels(NamedTuple):
    """What a backend has kernels of: steps of a plan, fused rows, one token."""

    steps: Mapping[type, Callable[[launch.Load, Call, Any], Iterator[launch.Kernel]]]
    rows: Callable[[Request, launch.Card], tuple[Row, ...]]
    fused: Mapping[str, Callable[[launch.Load, Call, Fused], Iterator[Do]]]
    token: Callable[[Memory], one_token.Steps]


def steps(memory: Memory, kernels: Kernels, call: Call, step: Step) -> Iterable[Do]:
    """Return what does a step."""
    if isinstance(step, Fused):
        return kernels.fused[step.row](memory.load, call, step)
    able = not isinstance(step, GateSum) or launch.summable(call, step)
    if able and type(step) in kernels.steps:
        return list(kernels.steps[type(step)](memory.load, call, step))
    narrow = [n for n in sorted(names(step)) if str(call.dtypes[n]) in NARROW]
    return [_of_copies(memory, call, step, narrow)]


STEPS: dict[type, Callable[[launch.Load, Call, Any], Iterator[launch.Kernel]]] = {
    Launch: launch.passes,
    Sum: launch.total,
    Divide: between.divide,
    GateGradient: between.gate_gradient,
    GateSum: launch.gate_sum,
    Fading: between.fading,
    Carry: between.carry,
}
CUDA = Kernels(STEPS | {Launch: hopper_states.passes}, rows.rows, rows.KERNELS, one_token.Steps)


def _by_library(memory: Memory, call: Call, step: Step) -> list[Do]:
    """Return what does a step in the library's namespace, whose results are written in place."""
    make = elementwise(memory.xp, call, step, _put)
    given = {*names(step), *(["gate"] if call.request.gate else [])}
    seen = [(call.slots[n], *call.layouts[n][:2]) for n in sorted(given)]

    def do(arrays: list[Array], addresses: list[Any], stream: Any) -> None:
        arrays = list(arrays)  # which may lie as the caller has them
        for slot, shape, strides in seen:
            arrays[slot] = memory.view(arrays[slot], shape, strides)
        make(arrays, addresses, stream)

    return [do]


def _of_copies(memory: Memory, call: Call, step: Step, copied: Sequence[str]) -> Do:
    """Return what does a step in the library's namespace on float32 copies, copied back."""
    wide, count = memory.dtype("float32"), len(call.slots)
    here = {f"{n}#": count + i for i, n in enumerate(copied)}
    shapes = [call.layouts[n].shape for n in copied]
    layouts = {n: Layout(shape, whole(shape)) for n, shape in zip(here, shapes, strict=True)}
    both = call._replace(
        slots={**call.slots, **here},
        layouts={**call.layouts, **layouts},
        dtypes={**call.dtypes, **dict.fromkeys(here, wide)},
    )
    alone = call._replace(
        slots={**call.slots, **{n: here[f"{n}#"] for n in copied}},
        layouts={**call.layouts, **{n: layouts[f"{n}#"] for n in copied}},
        dtypes={**call.dtypes, **dict.fromkeys(copied, wide)},
    )

    def copies(to: str, of: str, which: Iterable[str]) -> list[Do]:
        found = (Sum(Ref(n + to), ((1.0, Ref(n + of)),)) for n in which)
        return [x for s in found for x in launch.total(memory.load, both, s)]

    doing = copies("#", "", copied) + _by_library(memory, alone, step)
    doing += copies("", "#", sorted(written(step).intersection(copied)))

    def do(arrays: list[Array], addresses: list[Any], stream: Any) -> None:
        more = [memory.empty(x.shape, x.strides, wide, call.where) for x in layouts.values()]
        own = [*arrays[:count], *more]
        found = [*addresses[:count], *map(memory.address, more), None]
        for x in doing:
            x(own, found, stream)

    return do


def _put(old: Array, ref: Ref, x: Array) -> Array:
    part(old, ref)[...] = x
    return old


def device(memory: Memory, kernels: Kernels) -> Device:
    """Return the device of a library's arrays, with a backend's kernels."""
    address = memory.address

    def alike(arrays: Sequence[Array], addresses: list[Any]) -> tuple[Any, ...]:
        card = memory.card(arrays[0])
        return (card, *[x.strides for x in arrays], *[p & 15 for p in addresses])

    def layout(x: Array) -> Layout:
        size = x.dtype.itemsize
        return Layout(tuple(x.shape), tuple(s // size for s in x.strides))

    def begin(ready: Ready, arrays: Sequence[Array], addresses: list[Any], follows: Any) -> None:
        """Load a plan's kernels; what it will allocate begins at whole 16 bytes."""
        every = [x for turn in ready.turns for x in turn.do if isinstance(x, launch.Kernel)]
        launch.load_all(every, [*addresses, *[ALIGNED] * ready.more, None])

    return Device(
        steps=functools.partial(steps, memory, kernels),
        limits=launch.limits,
        rows=kernels.rows,
        segments=launch.segments,
        layout=layout,
        empty=memory.empty,
        constant=memory.constant,
        dtype=memory.dtype,
        where=memory.card,
        addresses=lambda arrays: [address(x) for x in arrays],
        address=address,
        alike=alike,
        begin=begin,
        bare=lambda do: isinstance(do, launch.Kernel),
        room=memory.room,
        run=lambda ready, arrays, addresses: memory.inside(
            ready.call.where, lambda: ready(arrays, addresses, None)
        ),
    )


class Library:
    """The calls of a backend, for one library's arrays."""

    def __init__(self, memory: Memory, kernels: Kernels = CUDA) -> None:
        self.memory = memory
        self.runner = Runner(device(memory, kernels))
        self.steps = kernels.token(memory)

    def forward(self, request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
        """Return (o, state, the arrays that `backward` needs)."""
        if request.tokens == 1 and request.return_state and not request.gradient:
            return *self.step(request, inputs, False), ()
        return self.runner.forward(request, inputs)

    def backward(
        self, request: Request, inputs: Inputs, saved: Sequence[Array], do: Any, dstate: Any
    ) -> Gradients:
        """Return the gradients of `forward`."""
        return self.runner.backward(request, inputs, saved, do, dstate)

    def again_forward(self, request: Request, inputs: Inputs, axis: int) -> Again | None:
        """Return what does such a `forward` of other arrays; see `Runner.again`."""
        if request.tokens == 1 and request.return_state and not request.gradient:
            return None  # has a kernel of its own
        return self.runner.again_forward(request, inputs, axis)

    def again_backward(
        self, request: Request, inputs: Inputs, saved: Sequence[Array], do: Any, dstate: Any,
        axis: int,
    ) -> Again | None:  # fmt: skip
        """Return what does such a `backward` of other arrays; see `Runner.again`."""
        return self.runner.again_backward(request, inputs, saved, do, dstate, axis)

    def step(self, request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
        """Return (o, state) of one token; the state may be packed."""
        if self.steps.takes(request, inputs.state):
            return self.steps.step(request, inputs, donate)
        packed = type(inputs.state) in STATE_OF
        inputs = inputs._replace(state=unpacked(inputs.state))
        o, state, _ = self.runner.forward(request, inputs)
        return o, state.pack() if packed else state
