"""Launches of the forward by two state owners on Hopper: which requests it serves, and how."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...core.passes import Shape, broadcast
from ...core.programs import Passes
from ...core.request import Request
from ...device.rows import kept, masked
from ...device.scan import Call, heads, left_out
from ...device.steps import Fused, Launch, Ref, Row
from .launch import WIDEST, Card, Constants, Kernel, Load, located, operand, own_axes, walks

NAME = "{} by two state owners"
OPERATORS = {"ahla": 1, "hla2": 2, "hla3": 3}  # by their numbers in hopper.cu
GATES = (None, "decay", "log_gate")
HALF = WIDEST // 2  # columns of a tile
SHARED = 227 << 10  # bytes of shared memory, all that a block can have
LEFT = {"dots": "dots", "kept": "kept", "met ": "dots"}  # kinds, by how names begin
STARTS, ENDS = ("start1", "start2", "start3"), ("end1", "end2", "end3")


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the fused rows of a request."""
    found = steps(request) if card.capability == (9, 0) else ()
    return (Row(NAME.format(request.operator), found, segments=True),) if found else ()


def steps(request: Request) -> Passes:
    """Return the passes that a fused kernel of the forward does of a request, if any."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if request.dtype != "bfloat16" or not 0 < min(D, V) <= max(D, V) <= WIDEST:
        return ()
    count = masked(request) if request.operator in OPERATORS else 0
    if request.empty or not count:
        return ()
    return tuple(s for s in request.passes if s.step < count and "|" not in s.out)


def operands(operator: str, fused: Fused, gate: str | None) -> dict[str, Ref | None]:
    """Return the operands of a fused step in their order in the kernel."""
    first, *_, last = launches = fused.launches
    values = last if operator == "hla2" else launches[-2]  # whose values are v
    refs: dict[str, Ref | None] = {
        "q": first.q[0], "k": first.k[0], "v": values.v[0], "y": kept(fused, first),
        "u": kept(fused, launches[1]) if operator == "hla3" else None, "o": kept(fused, last),
        "gate": None if gate is None else Ref("gate"),
    }  # fmt: skip
    refs |= dict.fromkeys((*STARTS, *ENDS))
    for start, end, s in zip(STARTS, ENDS, launches, strict=False):
        refs |= {start: next(iter(s.start), None), end: next(iter(s.end), None)}
    return refs


def kernels(operator: str, load: Load, call: Call, fused: Fused) -> Iterator[Kernel]:
    """Return the kernels of a fused step: one, or more where batch axes cannot become three.

    Raises
    ------
    NotImplementedError
        It adds to what there is, or weighs what it writes.
    """
    refs, dtypes, D, V = given(operator, call, fused)
    launches = fused.launches
    fixed = settings(operator, refs, dtypes, D, V, call.request.gate)
    yield from sweeps(
        load, call, "hopper.cu", broadcast(*(x.batch for x in launches)), refs, D, V,
        [x.read for x in launches], launches[0], fixed,
        tiles=-(-V // HALF) if operator == "hla3" else 1,
    )  # fmt: skip


def given(
    operator: str, call: Call, fused: Fused
) -> tuple[dict[str, Ref | None], dict[str, Any], int, int]:
    """Return the operands of a fused step, their dtypes, and the columns of keys and values."""
    if any(x.add or x.write != 1.0 for x in fused.launches):
        raise NotImplementedError(f"no fused kernel does {fused}")
    refs = operands(operator, fused, call.request.gate)
    dtypes = {n: call.dtypes[x.name] for n, x in refs.items() if x}
    D, V = (call.place(x).layout.shape[-1] for x in (refs["k"], refs["v"]) if x)
    return refs, dtypes, D, V


def sweeps(
    load: Load,
    call: Call,
    name: str,
    batch: Shape,
    refs: Mapping[str, Ref | None],
    D: int,
    V: int,
    factors: Sequence[float],
    s: Launch,
    fixed: Constants,
    *,
    threads: int = 384,
    tiles: int = 1,
) -> Iterator[Kernel]:
    """Return the kernels of one sweep, of operands in their order in the kernel.

    Before the gate they are of rows, behind it states, and by `LEFT` what is left for a gate's
    gradient; ``s`` is one of its launches, which have the same segments.
    """
    names, T = list(refs), s.length(call.request.tokens)
    rows = names.index("gate")
    places, dtypes, sizes = located(call, refs.values())
    kinds = ["rows"] * rows + ["gate" if call.request.gate == "log_gate" else "decay"]
    kinds += [LEFT.get(n[:4], "state") for n in names[rows + 1 :]]
    places = [left_out(s, x, kind) for x, kind in zip(places, kinds, strict=True)]
    parts = tiles * (-(-T // s.tokens) if s.tokens else 1)
    for counts, strides, first, _ in heads(batch, places, own_axes(kinds, s)):
        every = walks(kinds, strides, first, s)
        words = b"".join(map(operand, every, dtypes))
        words += struct.pack("<3d", *[*factors, 1.0, 1.0][:3])
        words += struct.pack("<6q", T, s.tokens, D, V, *counts[-2:])
        if math.prod(counts):
            yield Kernel(
                load, call.where, name, math.prod(counts) * parts, threads, first, sizes, words,
                functools.partial(constants, fixed, names[:rows], every),
            )  # fmt: skip


def settings(
    operator: str, refs: Mapping[str, Ref | None], dtypes: Mapping[str, object], D: int, V: int,
    gate: str | None,
) -> Constants:  # fmt: skip
    """Return the constants of a kernel but the one that alignment decides."""
    narrow = V <= HALF or operator == "hla3"
    return {
        "OPERATOR": OPERATORS[operator], "BD": WIDEST if D > HALF else HALF,
        "BV": HALF if narrow else WIDEST, "GATE": GATES.index(gate),
        "READ": int(refs["o"] is not None), "WIDE": int(str(dtypes.get("o")) == "float32"),
        "KEEP": int(refs["y"] is not None), "KEEP_U": int(refs["u"] is not None),
        "WHOLE": int(D % HALF == V % HALF == 0), "SHARED": SHARED,
    }  # fmt: skip


def constants(
    fixed: Constants, names: Sequence[str], strides: Sequence[Shape], addresses: Sequence[int]
) -> tuple[Constants, int]:
    """Return all constants, and the bytes of shared memory: rows may be of whole 16 bytes."""
    fast = True
    for name, address, own in zip(names, addresses, strides, strict=False):
        if address and not (name == "o" and fixed["WIDE"]):
            moves = (address, *(2 * n for n in own[:-1]))
            fast &= own[-1] == 1 and not any(n % 16 for n in moves)
    return {**fixed, "FAST": int(fast)}, fixed.get("SHARED_BYTES", SHARED)


KERNELS = {NAME.format(x): functools.partial(kernels, x) for x in OPERATORS}
