"""Launches of what goes on between passes: quotients, gates' gradients, states over segments."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

from ...device.scan import Call, Place, heads
from ...device.steps import Carry, Divide, Fading, GateGradient, Ref
from .launch import AXES, TYPES, Kernel, Load, located, merged, padded


def typed(
    call: Call, refs: Sequence[Ref | None]
) -> tuple[list[Place | None], list[int], list[int]]:
    """Return where arrays lie, the bytes of an element of each, and its type by number."""
    places, dtypes, sizes = located(call, refs)
    return places, sizes, [0 if x is None else TYPES[str(x)] for x in dtypes]


def divide(load: Load, call: Call, s: Divide) -> Iterator[Kernel]:
    """Return the kernel of a Divide."""
    places, sizes, types = typed(call, (s.x, s.den, s.o, s.num, s.dden))
    shape = call.place(s.o).layout.shape
    rows = math.prod(shape[:-1])
    lists = []
    for x in places:
        lead = () if x is None else tuple(
            0 if n == 1 else step
            for n, step in zip(x.layout.shape[:-1], x.layout.strides[:-1], strict=True)
        )  # fmt: skip
        lists.append((*(0,) * (len(shape) - 1 - len(lead)), *lead))
    axes = merged([(n, *steps) for n, *steps in zip(shape[:-1], *lists, strict=True)], AXES)
    counts, *strides = padded(axes, len(places))
    words = b"".join(
        struct.pack(f"<{AXES + 2}q", *steps, 0 if x is None else x.layout.strides[-1], kind)
        for steps, x, kind in zip(strides, places, types, strict=True)
    )
    words += struct.pack(f"<{AXES + 2}qd", *counts, rows, shape[-1], s.eps)
    if rows:
        yield Kernel(
            load, call.where, "divide.cu", -(-rows // 8), 256, places, sizes, words,
            lambda addresses: ({}, 0),
        )  # fmt: skip


def gate_gradient(load: Load, call: Call, s: GateGradient) -> Iterator[Kernel]:
    """Return the kernel of a GateGradient."""
    places, sizes, types = typed(call, (s.reads, s.writes, s.gate, s.border, s.S, s.R, s.met, s.o))
    *batch, reads, _ = call.place(s.reads).layout.shape
    writes, T = call.place(s.writes).layout.shape[-2], call.request.tokens
    D, V = (1, 1) if s.S is None else call.place(s.S).layout.shape[-2:]
    log = call.request.gate == "log_gate"
    met = 1 if s.met is None else call.place(s.met).layout.shape[-1]
    words = struct.pack("<8q", *types)
    words += struct.pack("<9q", T, D, V, log, s.strict, s.ends, reads, writes, met)
    shape, strides, _ = call.place(s.gate).layout
    axes = [*zip(shape, strides, strict=True)]
    counts, steps = padded(merged(axes[:-1] if log else axes, AXES), 1)
    words += struct.pack(
        f"<2d{2 * AXES + 1}q", s.power, s.factor, *counts, *steps, strides[-1] if log else 0
    )
    constants = {"W": s.chunk, "PERIOD": s.period}
    if grid := math.prod(batch) * -(-T // s.period):
        yield Kernel(
            load, call.where, "gate.cu", grid, 32 * s.period // s.chunk, places, sizes, words,
            lambda addresses: (constants, 8 * (32 + 3 * s.period // s.chunk)),
        )  # fmt: skip


def fading(load: Load, call: Call, s: Fading) -> Iterator[Kernel]:
    """Return the kernels of a Fading."""
    places, sizes, types = typed(call, (s.gate, s.o))
    o = call.place(s.o).layout
    log, parts = call.request.gate == "log_gate", o.shape[-1]
    for counts, strides, first, own in heads(o.shape[:-1], places, (int(log), 1)):
        words = struct.pack("<4q", *strides[0], *(own[0] or (0,)))
        words += struct.pack("<4q", *strides[1], *own[1])
        words += struct.pack("<6q", s.total, s.tokens, *counts[-2:], log, types[0])
        if grid := math.prod(counts) * parts:
            yield Kernel(
                load, call.where, "fading.cu", grid, 32, first, sizes, words,
                lambda addresses: ({}, 0),
            )  # fmt: skip


def carry(load: Load, call: Call, s: Carry) -> Iterator[Kernel]:
    """Return the kernels of a Carry."""
    places, sizes, _ = typed(call, (s.local, s.o, s.start, s.end, s.fading))
    *batch, count, D, V = call.place(s.local).layout.shape
    tiles = -(-D * V // 128)
    for counts, strides, first, own in heads(tuple(batch), places, (3, 3, 2, 2, 1)):
        words = struct.pack("<5q", *strides[2], *(own[2] or (0, 0)))
        words += struct.pack("<5q", *strides[3], *(own[3] or (0, 0)))
        words += struct.pack("<4q", *strides[4], *(own[4] or (0,)))
        words += struct.pack("<7qd", count, D, V, *counts[-2:], s.reverse, tiles, s.power)
        if grid := math.prod(counts) * tiles:
            yield Kernel(
                load, call.where, "carry.cu", grid, 128, first, sizes, words,
                lambda addresses: ({}, 0),
            )  # fmt: skip
