"""Launches of the adjoints of hla2, ahla and hla3 two passes at a time (`backward`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...core.programs import Passes, adjoint
from ...core.request import Request
from ...device.rows import gate_parts, masked, matched
from ...device.scan import Call
from ...device.steps import Fused, Launch, Parts, Ref, Row
from ..cupy.hopper import GATES, HALF, OPERATORS, sweeps
from ..cupy.launch import PAD, WIDEST, Card, Constants, Kernel, Load

NAME = "{} in one block, two passes of its adjoint"
SIZES = ((32, 5), (32, 4), (32, 3), (16, 6), (16, 4), (16, 3))  # tokens of a chunk, chunks there
TILES = 6  # the most operands of a launch
CHUNK, PERIOD = 32, 1024  # tokens by which dots count, and between the states that are kept


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the rows of a request's adjoint: two passes each, of one step or of the first two."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if request.dtype != "bfloat16" or request.operator not in OPERATORS or request.scale == 0:
        return ()
    plain = not (request.normalize or request.empty)
    plain = plain and masked(request) == len(request.program.steps)
    fits = card.capability >= (8, 0) and memory(TILES, *SIZES[-1], WIDEST) <= card.shared
    if not plain or not fits or not 0 < min(D, V) <= max(D, V) <= WIDEST:
        return ()
    back = adjoint(tuple(s for s in request.passes if "|" not in s.out))
    found: list[Passes] = [
        tuple(s for s in back if s.reverse and s.step == i) for i in {s.step: 0 for s in back}
    ]
    if matched(request):  # else the two parts of dq have not the same heads
        found.append(tuple(s for s in back if not s.reverse and s.step < 2))
    B = side(D, V)
    parts = Parts(CHUNK, PERIOD, reads=1, writes=1, side=B, met=B // 32)
    able = memory(TILES, CHUNK, 3, B, dotted=True) <= card.shared
    asked = gate_parts(request, parts) if able else None
    name = NAME.format(request.operator)
    return tuple(  # of hla3's last step dq is by a pass
        Row(name, x, segments=True, adds=True, parts=asked if x[0].step < 2 else None)
        for x in found
    )


def side(D: int, V: int) -> int:
    """Columns of a tile, of keys and values alike."""
    return HALF if max(D, V) <= HALF else WIDEST


def memory(
    tiles: int, W: int, stages: int, B: int, *, summed: bool = True, dotted: bool = False
) -> int:
    """Bytes of shared memory, as backward.py lays them out, with a gate."""
    handed = 2 * B * W * 4 if summed else W * (B + PAD) * 2  # sums, or one more result
    rows = (tiles * stages + 1) * W * (B + PAD) * 2
    sums = 4 * (B // 32 + W // 8) * W * 4 if dotted else 0
    return rows + handed + 2 * W * (W + PAD) * 2 + 3 * (12 * W + 16) + sums


def kernels(load: Load, call: Call, fused: Fused) -> Iterator[Kernel]:
    """Yield the kernels of two passes: one, or more where batch axes cannot become three.

    Raises
    ------
    NotImplementedError
        They differ in what the kernel has only one of.
    """
    one, two = fused.launches
    alike = all(getattr(one, x) == getattr(two, x) for x in ("reverse", "read", "write", "batch"))
    summed = one.o == two.o
    if not alike or one.tokens != two.tokens or not (one.q and two.q) or (summed and not two.add):
        raise NotImplementedError(f"no fused kernel does {fused}")
    tiles: dict[Ref, int] = {}

    def numbers(x: Launch, *, adds: bool) -> tuple[int, ...]:
        given = (x.q[0], x.k[0], x.v[0], *((x.o[0],) if adds else ()))
        return (*(tiles.setdefault(ref, len(tiles)) for ref in given), *(() if adds else (-1,)))

    first = numbers(one, adds=one.add and not summed)
    second = numbers(two, adds=one.add if summed else two.add)
    dotted = two.dots is not None
    if two.x:  # of reverse passes an operand of the first
        tiles.setdefault(two.x, len(tiles))
    refs: dict[str, Ref | None] = dict.fromkeys(f"x{i}" for i in range(TILES))
    refs |= {f"x{i}": ref for ref, i in tiles.items()}
    gate = call.request.gate
    refs |= {
        "o1": one.o[0], "o2": None if summed else two.o[0], "gate": Ref("gate") if gate else None,
        "start1": one.start[0], "start2": two.start[0], "end1": one.end[0], "end2": two.end[0],
        "dots1": one.dots, "dots2": two.dots, "kept1": one.kept or one.states,
        "kept2": two.kept or two.states, "met 1": one.met, "met 2": two.met,
    }  # fmt: skip
    D, V = call.request.k_shape[-1], call.request.v_shape[-1]
    of_values = tuple(int(call.place(x).layout.shape[-1] != D) for x in tiles)
    wide = tuple(int(str(call.dtypes[x.o[0].name]) == "float32") for x in (one, two))
    if any(w and old >= 0 for w, old in zip(wide, (first[3], second[3]), strict=True)):
        raise NotImplementedError(f"no fused kernel does {fused}")
    B = side(D, V)
    fixed: Constants = {
        "FIRST": first, "SECOND": second, "OF_VALUES": of_values, "SUM": int(summed),
        "REVERSE": int(one.reverse), "WIDE": wide, "GATE": GATES.index(gate),
        "POWERS": (one.power, two.power) if gate else (1, 1), "WHOLE": int(D == V == B), "B": B,
        "DOTS": int(dotted), "X": tiles[two.x] if two.x else -1,
        "EVERY": math.gcd(one.tokens, PERIOD) // CHUNK if dotted else 0,
        **size(len(tiles), B, call.where, summed=summed, chunk=two.chunk),
    }  # fmt: skip
    yield from sweeps(
        load, call, "backward", one.batch, refs, D, V,
        (one.read * one.write, 1 / one.write, one.write), one, fixed, threads=2 * B,
    )  # fmt: skip


def size(tiles: int, B: int, card: Card, *, summed: bool, chunk: int) -> Constants:
    """Return the tokens of a chunk, how many chunks are in shared memory, and its bytes.

    Parameters
    ----------
    tiles, B, card, summed
        Operands, columns of a tile, where it runs, and whether the results are summed.
    chunk : int
        Tokens by which dots count; 0 of no dots.
    """
    for W, stages in SIZES:
        shared = memory(tiles, W, stages, B, summed=summed, dotted=chunk > 0)
        if chunk in (0, W) and shared <= card.shared:
            break
    return {"W": W, "STAGES": stages, "SHARED_BYTES": shared}


KERNELS = {NAME.format(x): kernels for x in OPERATORS}
