"""Launches of the forward by two state owners on Hopper: which requests it serves, and how."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence

from ...core.passes import Shape, broadcast
from ...core.request import Request
from ...device.rows import kept, masked
from ...device.scan import Call
from ...device.steps import Fused, Ref, Row
from ...device.tiles import grids, inner
from .launch import TYPES, WIDEST, Card, Constants, Kernel, Load, operand, walked

NAME = "{} by two state owners"
OPERATORS = {"ahla": 1, "hla2": 2, "hla3": 3}  # by their numbers in hopper.cu
GATES = (None, "decay", "log_gate")
HALF = WIDEST // 2  # columns of a tile
SHARED = 227 << 10  # bytes of shared memory, all that a block can have
ROWS = ("q", "k", "v", "y", "u", "o")  # operands of rows of tokens
STARTS, ENDS = ("start1", "start2", "start3"), ("end1", "end2", "end3")


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the fused rows of a request."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if card.capability != (9, 0) or request.dtype != "bfloat16" or max(D, V) > WIDEST:
        return ()
    count = masked(request) if request.operator in OPERATORS else 0
    if request.empty or 0 in (D, V) or not count:
        return ()
    steps = tuple(s for s in request.passes if s.step < count and "|" not in s.out)
    return (Row(NAME.format(request.operator), steps, segments=True),)


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
    if any(x.add or x.write != 1.0 for x in fused.launches):
        raise NotImplementedError(f"no fused kernel does {fused}")
    request = call.request
    refs = operands(operator, fused, request.gate)
    tokens, T = fused.launches[0].tokens, request.tokens
    places = [None if x is None else call.place(x) for x in refs.values()]
    dtypes = [None if x is None else call.dtypes[x.name] for x in refs.values()]
    sizes = [0 if x is None else x.itemsize for x in dtypes]
    D, V = (x.layout.shape[-1] for x in places[1:3] if x)
    fixed = settings(operator, refs, dtypes, D, V, request.gate)
    own = [2] * len(ROWS) + [int(request.gate == "log_gate")] + [2 + (tokens > 0)] * 6
    lists = [None if x is None else (x.layout, n) for x, n in zip(places, own, strict=True)]
    parts = -(-T // tokens) if tokens else 1
    parts *= -(-V // HALF) if operator == "hla3" else 1
    reads = [x.read for x in fused.launches]
    for counts, strides, offsets in grids(broadcast(*(x.batch for x in fused.launches)), lists):
        first = [
            None if x is None else x._replace(layout=inner(x.layout, n, offset))
            for x, n, offset in zip(places, own, offsets, strict=True)
        ]
        kinds = ["gate" if n == "gate" else "start" if n[-1].isdigit() else n for n in refs]
        every = [
            (*lead, *walked(kind, x, tokens > 0))
            for kind, lead, x in zip(kinds, strides, first, strict=True)
        ]
        words = b"".join(map(operand, every, dtypes))
        words += struct.pack("<3d", *[*reads, 1.0][:3])
        words += struct.pack("<6q", T, tokens, D, V, *counts[-2:])
        yield Kernel(
            load, call.where, "hopper.cu", math.prod(counts) * parts, 384, first, sizes, words,
            functools.partial(constants, fixed, every),
        )  # fmt: skip


def settings(
    operator: str, refs: Mapping[str, Ref | None], dtypes: Sequence[object], D: int, V: int,
    gate: str | None,
) -> Constants:  # fmt: skip
    """Return the constants of a kernel but the one that alignment decides."""
    types = dict(zip(refs, dtypes, strict=True))
    narrow = V <= HALF or operator == "hla3"
    found: dict[str, int] = {
        "OPERATOR": OPERATORS[operator], "BD": WIDEST if D > HALF else HALF,
        "BV": HALF if narrow else WIDEST, "GATE": GATES.index(gate),
        "READ": int(refs["o"] is not None), "WIDE": int(str(types["o"]) == "float32"),
        "KEEP": int(refs["y"] is not None), "KEEP_U": int(refs["u"] is not None),
        "WHOLE": int(D % HALF == V % HALF == 0), "SHARED": SHARED,
    }  # fmt: skip
    for i, name in enumerate(STARTS, 1):
        found[f"START_{i}"] = 2 if types[name] is None else TYPES[str(types[name])]
    return found


def constants(
    fixed: Constants, strides: Sequence[Shape], addresses: Sequence[int]
) -> tuple[Constants, int]:
    """Return all constants, and the bytes of shared memory."""
    fast = True
    for name, address, own in zip(ROWS, addresses, strides, strict=False):
        if address and not (name == "o" and fixed["WIDE"]):
            moves = (address, *(2 * n for n in own[:-1]))
            fast &= own[-1] == 1 and not any(n % 16 for n in moves)
    return {**fixed, "FAST": int(fast)}, SHARED


KERNELS = {NAME.format(x): functools.partial(kernels, x) for x in OPERATORS}
