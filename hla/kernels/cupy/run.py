"""How a plan's steps are done by CUDA C++ kernels: of any library whose arrays are memory.

`Memory` is what that library must do; `driver` has CuPy's. Small steps between launches run in the
library's own namespace, on float32 and float64 alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ...core.passes import Shape
from ...core.reference import Gradients
from ...core.request import Inputs, Request
from ...core.triangle import STATE_OF
from ...device.elementwise import elementwise, part
from ...device.scan import Call, Device, Do, Ready, Runner
from ...device.steps import Fused, Launch, Ref, Step, Sum, names, written
from ...device.tiles import Layout, whole
from ...device.token import unpacked
from . import launch, rows

Array = Any
NARROW = ("bfloat16", "float16")


class Memory(NamedTuple):
    """Arrays of one library, and their device."""

    xp: Any  # namespace of the standard
    load: launch.Load
    card: Callable[[Array], launch.Card]  # where an array is
    empty: Callable[[Shape, Shape, Any, Any], Array]  # of a shape, strides in elements, dtype
    constant: Callable[[float, Shape, Any, Any], Array]
    dtype: Callable[[str], Any]
    address: Callable[[Array], int]
    run: Callable[[Ready, list[Array], list[Any]], list[Array]]


def steps(memory: Memory, call: Call, step: Step) -> Iterator[Do]:
    """Return what does a step."""
    if isinstance(step, Launch):
        return launch.passes(memory.load, call, step)
    if isinstance(step, Fused):
        return rows.KERNELS[step.row](memory.load, call, step)
    if isinstance(step, Sum):
        return launch.total(memory.load, call, step)
    return iter((_between(memory, call, step),))


def _between(memory: Memory, call: Call, step: Step) -> Do:
    """Return what does a step in the library's namespace; narrow arrays are copied to float32."""
    narrow = [n for n in sorted(names(step)) if str(call.dtypes[n]) in NARROW]
    wide = memory.dtype("float32")
    copied = call._replace(
        slots=dict(call.slots) | {n: len(call.slots) + i for i, n in enumerate(narrow)},
        dtypes=dict(call.dtypes) | dict.fromkeys(narrow, wide),
    )
    both = copied._replace(
        slots=dict(call.slots) | {f"{n}#wide": copied.slots[n] for n in narrow},
        layouts=dict(call.layouts) | {f"{n}#wide": _ordered(call.layouts[n]) for n in narrow},
        dtypes=dict(call.dtypes) | {f"{n}#wide": wide for n in narrow},
    )

    def copies(to: str, of: str) -> list[tuple[str, launch.Kernel]]:
        found = (Sum(Ref(n + to), ((1.0, Ref(n + of)),)) for n in narrow)
        return [
            (n, k) for n, s in zip(narrow, found, strict=True)
            for k in launch.total(memory.load, both, s)
        ]  # fmt: skip

    widen, narrowed = copies("#wide", ""), copies("", "#wide")
    write = written(step)
    own = elementwise(memory.xp, copied, step, _put)

    def do(arrays: list[Array], addresses: list[Any], stream: Any) -> None:
        more = [
            memory.empty(call.layouts[n].shape, _ordered(call.layouts[n]).strides, wide, call.where)
            for n in narrow
        ]
        arrays = [*arrays[: len(call.slots)], *more]
        addresses = [*addresses[: len(call.slots)], *map(memory.address, more), None]
        for _, kernel in widen:
            kernel(arrays, addresses, stream)
        own(arrays, addresses, stream)
        for n, kernel in narrowed:
            if n in write:
                kernel(arrays, addresses, stream)

    return do if narrow else own


def _ordered(x: Layout) -> Layout:
    return Layout(x.shape, whole(x.shape))


def _put(old: Array, ref: Ref, x: Array) -> Array:
    part(old, ref)[...] = x
    return old


def device(memory: Memory) -> Device:
    """Return the device of a library's arrays."""
    address = memory.address

    def alike(arrays: Sequence[Array], addresses: list[Any]) -> tuple[Any, ...]:
        card = memory.card(arrays[0])
        return (card, *[x.strides for x in arrays], *[p & 15 for p in addresses])

    def layout(x: Array) -> Layout:
        size = x.dtype.itemsize
        return Layout(tuple(x.shape), tuple(s // size for s in x.strides))

    return Device(
        steps=functools.partial(steps, memory),
        limits=launch.limits,
        rows=rows.rows,
        segments=launch.segments,
        layout=layout,
        empty=memory.empty,
        constant=memory.constant,
        dtype=memory.dtype,
        where=memory.card,
        addresses=lambda arrays: [address(x) for x in arrays],
        address=address,
        alike=alike,
        run=memory.run,
    )


class Library:
    """The calls of a backend, for one library's arrays."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.runner = memory, Runner(device(memory))

    def forward(self, request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
        """Return (o, state, the arrays that `backward` needs)."""
        return self.runner.forward(request, inputs)

    def backward(
        self, request: Request, inputs: Inputs, saved: Sequence[Array], do: Any, dstate: Any
    ) -> Gradients:
        """Return the gradients of `forward`."""
        return self.runner.backward(request, inputs, saved, do, dstate)

    def step(self, request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
        """Return (o, state) of one token; the state may be packed."""
        packed = type(inputs.state) in STATE_OF
        inputs = inputs._replace(state=unpacked(inputs.state))
        o, state, _ = self.runner.forward(request, inputs)
        return o, state.pack() if packed else state
