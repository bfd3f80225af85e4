"""The adjoints of hla2 and ahla on Hopper in sweeps: rows of the planner, their launches.

A gate's gradient, and segments, run by passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ...core.programs import adjoint
from ...core.request import Request
from ...device.rows import flipped, masked
from ...device.scan import Call, Do
from ...device.steps import Fused, Ref, Row
from .hopper import GATES, HALF, SHARED, sweeps
from .launch import WIDEST, Card, Constants, Load, passes

HLA2 = "hla2 on Hopper: dy, dv, dk", "hla2 on Hopper: dq"
SWEEPS = {"hla2": ((HLA2[0], True), (HLA2[1], False))}  # name, whether last token first


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the sweeps, where they do a request's adjoint."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if card.capability != (9, 0) or request.dtype != "bfloat16" or request.operator not in SWEEPS:
        return ()
    plain = not (request.normalize or request.empty or (request.gate and request.gate_given))
    plain = plain and masked(request) == len(request.program.steps)
    if not plain or request.scale == 0 or not 0 < min(D, V) <= max(D, V) <= WIDEST:
        return ()
    back = adjoint(tuple(s for s in request.passes if "|" not in s.out))
    return tuple(
        Row(name, tuple(s for s in back if s.reverse == last), in_place=not last)
        for name, last in SWEEPS[request.operator]
    )


def side(D: int, V: int) -> int:
    """Columns of a tile, of keys and values alike."""
    return HALF if max(D, V) <= HALF else WIDEST


def settings(call: Call, D: int, V: int) -> Constants:
    """Return the constants of a sweep but the one that alignment decides."""
    B = side(D, V)
    return {
        "B": B, "GATE": GATES.index(call.request.gate), "WHOLE": int(D == V == B),
        "SHARED": SHARED, "WIDE": 0,
    }  # fmt: skip


def gate(call: Call) -> Ref | None:
    """Return the gate, which is no operand where there is none."""
    return Ref("gate") if call.request.gate else None


def widths(call: Call) -> tuple[int, int]:
    """Return the columns of keys and of values."""
    return call.request.k_shape[-1], call.request.v_shape[-1]


def reverse(load: Load, call: Call, s: Fused) -> Iterator[Do]:
    """Yield hla2's sweep of dy, dv and dk, last token first."""
    dy, dv, _, dk = s.launches
    refs: dict[str, Ref | None] = {
        "q": dy.v[0], "k": dk.q[0], "v": dy.q[0], "do": dv.v[0], "y": dv.q[0],
        "dy": dy.o[0], "dv": dv.o[0], "dk": dk.o[0], "gate": gate(call),
        "R": flipped(dv.start[0]), "Z": dk.start[0],
        "end": flipped(dv.end[0]) if dv.end else None,
    }  # fmt: skip
    D, V = widths(call)
    factors = dv.write, 1 / dv.write
    fixed = settings(call, D, V)
    yield from sweeps(
        load, call, "hopper_reverse.cu", dv.batch, refs, D, V, factors, dv.tokens, fixed
    )
    if any(dk.end):  # of the two that make up Z the kernel keeps the sum
        alone = dk.states_alone()
        yield from passes(load, call, alone)


def queries(load: Load, call: Call, s: Fused) -> Iterator[Do]:
    """Yield the sweep of dq, first token first."""
    first, second = s.launches
    ahla = first.v == second.v != second.k  # k in both
    v, y = (second.k[0], first.k[0]) if ahla else (first.k[0], first.v[0])
    refs = {
        "k": second.v[0], "v": v, "do": first.q[0], "y": y, "dy": second.q[0], "dq": first.o[0],
        "gate": gate(call), "S": second.start[0], "F": first.start[0],
    }  # fmt: skip
    D, V = widths(call)
    fixed = settings(call, D, V)
    yield from sweeps(
        load, call, "hopper_queries.cu", first.batch, refs, D, V, (first.read,), first.tokens,
        {**fixed, "AHLA": int(ahla)}, threads=128 * (side(D, V) // HALF) + 128,
    )  # fmt: skip


KERNELS: dict[str, Callable[[Load, Call, Fused], Iterator[Do]]] = {
    HLA2[0]: reverse, HLA2[1]: queries,
}  # fmt: skip
