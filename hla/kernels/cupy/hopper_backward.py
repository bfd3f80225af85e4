"""The adjoints of hla2, ahla and hla3 on Hopper in sweeps: rows of the planner, their launches.

For a gate's gradient they also leave sums by token, and states at periods' starts (`dots.cuh`).
Gradients that heads share are left in float32, to be summed.

In segments (`device.segments`) hla2's gradients read 2048 bytes a token and head for the states of
all segments but one, beside the sweeps' 3584; with the forward 7552 of 8 segments, 2.64 ms for B =
1, T = 65536, H = 16, D = V = 128 at 3.0 TB/s. One H100 took 3.04 (87%), Triton 3.34 that time;
the forward alone, 1920 bytes, 0.78 (86%).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from ...core.programs import adjoint
from ...core.request import Request
from ...device.rows import flipped, gate_parts, masked, matched
from ...device.scan import Call, Do
from ...device.steps import Fused, Launch, Parts, Ref, Row
from .hopper import GATES, HALF, SHARED, sweeps
from .hopper_states import passes
from .launch import WIDEST, Card, Constants, Load

Sweep = tuple[str, bool, tuple[int, ...]]  # name, whether last token first, of which steps
SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "hla2": (
        ("hla2 on Hopper: dy, dv, dk", True, (0, 1)),
        ("hla2 on Hopper: dq", False, (0, 1)),
    ),
    "ahla": (
        ("ahla on Hopper: du, dv, dk", True, (0, 1)),
        ("ahla on Hopper: dq", False, (0, 1)),
    ),
    "hla3": (
        ("hla3 on Hopper: dy, du", True, (2,)),
        ("hla3 on Hopper: dv, dk", True, (0, 1)),
        ("hla3 on Hopper: dq of y and u", False, (0, 1)),
        ("hla3 on Hopper: dq of o", False, (2,)),
    ),
}

CHUNK, PERIOD = 64, 1024  # tokens by which dots count, and between the states that are kept
GATED = SWEEPS | {
    "ahla": (
        ("ahla on Hopper: du, dk", True, (1,)),
        ("ahla on Hopper: dv, dk", True, (0,)),
        SWEEPS["ahla"][1],
    ),
}


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the sweeps, where they do a request's adjoint."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if card.capability != (9, 0) or request.dtype != "bfloat16" or request.operator not in SWEEPS:
        return ()
    plain = not (request.normalize or request.empty)
    plain = plain and masked(request) == len(request.program.steps)
    if not plain or request.scale == 0 or not 0 < min(D, V) <= max(D, V) <= WIDEST:
        return ()
    alike = request.operator != "hla3" or matched(request)
    B = side(D, V)
    own = Parts(CHUNK, PERIOD, B // HALF, 1, side=B, met=B // 16, block=HALF)
    parts = gate_parts(request, own)
    back = adjoint(tuple(s for s in request.passes if "|" not in s.out))
    return tuple(
        Row(name, tuple(s for s in back if s.reverse == last and s.step in of),
            segments=True, parts=parts, in_place=not last, adds=not last or len(of) == 1)
        for name, last, of in (GATED if request.gate else SWEEPS)[request.operator]
        if alike or len(of) == 1
    )  # fmt: skip


def side(D: int, V: int) -> int:
    """Columns of a tile, of keys and values alike."""
    return HALF if max(D, V) <= HALF else WIDEST


def settings(call: Call, D: int, V: int, x: Launch) -> Constants:
    """Return the constants of a sweep but the one that alignment decides, by a launch of it."""
    B = side(D, V)
    return {
        "B": B, "GATE": GATES.index(call.request.gate), "WHOLE": int(D == V == B),
        "SHARED": SHARED, "WIDE": 0, "DOTS": int(x.dots is not None),
        "EVERY": math.gcd(x.tokens, PERIOD) // CHUNK,
    }  # fmt: skip


def gate(call: Call) -> Ref | None:
    """Return the gate, which is no operand where there is none."""
    return Ref("gate") if call.request.gate else None


def bytes_of(call: Call, refs: Mapping[str, Ref | None], *results: str) -> Constants:
    """Return the bytes of an element of each result, 2 of one that there is not."""
    given = ((n, refs[n]) for n in results)
    return {f"{n.upper()}_BYTES": call.dtypes[x.name].itemsize if x else 2 for n, x in given}


def widths(call: Call) -> tuple[int, int]:
    """Return the columns of keys and of values."""
    return call.request.k_shape[-1], call.request.v_shape[-1]


def reverse(load: Load, call: Call, s: Fused) -> Iterator[Do]:
    """Yield hla2's sweep of dy, dv and dk, last token first."""
    if not s.launches[1].q:  # of segments: dy again, and of the two that make up Z half the sum
        dy, half = s.launches
        again: dict[str, Ref | None] = dict.fromkeys(("q", "k", "v", "do", "y", "dy", "dv", "dk"))
        again |= {"q": dy.v[0], "v": dy.q[0], "do": dy.k[0]}
        yield from _reverse(load, call, again, dy, half, 2)
        return
    dy, dv, _, dk = s.launches
    refs: dict[str, Ref | None] = {
        "q": dy.v[0], "k": dk.q[0], "v": dy.q[0], "do": dv.v[0], "y": dv.q[0],
        "dy": dy.o[0], "dv": dv.o[0], "dk": dk.o[0],
    }  # fmt: skip
    yield from _reverse(load, call, refs, dv, dk, 2)


def one_state(load: Load, call: Call, s: Fused) -> Iterator[Do]:
    """Yield a sweep of one state: hla3's of dy and du, ahla's of dk and of du or dv."""
    dk, dx = s.launches
    refs: dict[str, Ref | None] = {
        "q": dk.v[0], "k": None, "v": dk.q[0], "do": dk.k[0], "y": dx.q[0],
        "dy": dk.o[0], "dv": dx.o[0], "dk": None,
    }  # fmt: skip
    power = 3 if call.request.operator == "hla3" else 1
    yield from _reverse(load, call, refs, dx, None, power, adds=dk.add)


def summed(load: Load, call: Call, s: Fused) -> Iterator[Do]:
    """Yield hla3's sweep of dv and dk, last token first."""
    dk, dv, _, more = s.launches
    refs: dict[str, Ref | None] = {
        "q": dk.v[0], "k": more.v[0], "v": dk.q[0], "do": dk.k[0], "y": dv.q[0],
        "dy": None, "dv": dv.o[0], "dk": dk.o[0],
    }  # fmt: skip
    yield from _reverse(load, call, refs, dv, more, 1)


def _reverse(
    load: Load,
    call: Call,
    refs: dict[str, Ref | None],
    x: Launch,
    z: Launch | None,
    power: int,
    *,
    adds: bool = False,
) -> Iterator[Do]:
    """Yield a sweep by the launches that leave R, of such a power, and Z, if there is one."""
    read = z is None or bool(z.q)
    refs |= {
        "gate": gate(call), "R": flipped(x.start[0]) if read else x.start[0],
        "Z": z and z.start[0], "end": flipped(x.end[0]) if x.end else None,
        "end Z": None if read or z is None else z.end[0],
        "dots R": x.dots, "dots Z": z and z.dots, "kept R": x.states, "kept Z": z and z.states,
    }  # fmt: skip
    D, V = widths(call)
    own = {"R_POWER": power, "Z": int(z is not None), "READ": int(read)}
    own |= {"CUT": int(x.tokens > 0), "ADDS": int(adds)}
    fixed = {**settings(call, D, V, x), **own, **bytes_of(call, refs, "dy", "dv", "dk")}
    yield from sweeps(
        load, call, "hopper_reverse.cu", x.batch, refs, D, V, (x.write, 1 / x.write), x,
        fixed, threads=384 if z else 256,
    )  # fmt: skip
    if read and z and any(z.end):  # of the two that make up Z the kernel keeps the sum
        yield from passes(load, call, z.states_alone())


def ahla(load: Load, call: Call, s: Fused) -> Iterator[Do]:
    """Yield ahla's sweep of du, dv and dk, last token first."""
    if s.launches[1].q:
        dk, du, more, dv = s.launches
        refs: dict[str, Ref | None] = {
            "q": du.k[0], "k": du.q[0], "v": more.q[0], "do": du.v[0], "u": dk.q[0],
            "du": du.o[0], "dv": dv.o[0], "dk": dk.o[0],
        }  # fmt: skip
        yield from _ahla(load, call, refs, du, dv)
        return
    du, *states = s.launches  # of segments: du again, and sums of q du' or their transposes
    for x in states:
        refs = dict.fromkeys(("q", "k", "v", "do", "u", "du", "dv", "dk"))
        refs |= {"q": du.k[0], "k": du.q[0], "do": du.v[0]}
        turned = x if x.k == du.k else x._replace(end=(flipped(x.end[0]),))
        yield from _ahla(load, call, refs, du, turned)


def _ahla(
    load: Load, call: Call, refs: dict[str, Ref | None], du: Launch, dv: Launch
) -> Iterator[Do]:
    """Yield it by the launches that leave R and Z."""
    refs["gate"] = gate(call)
    for name, x in (("R", du), ("Z", dv)):
        refs |= {name: flipped(x.start[0])}
    for name, x in (("end R", du), ("end Z", dv)):
        refs |= {name: flipped(x.end[0]) if x.end else None}
    D, V = widths(call)
    yield from sweeps(
        load, call, "hopper_ahla.cu", du.batch, refs, D, V, (du.write, 1 / du.write), du,
        {**settings(call, D, V, du), "READ": int(bool(dv.q)),
         **bytes_of(call, refs, "du", "dv", "dk")},
    )  # fmt: skip


def queries(load: Load, call: Call, s: Fused) -> Iterator[Do]:
    """Yield a sweep of dq, first token first: of two states, or hla3's of o alone."""
    first, *rest = s.launches
    second = rest[0] if rest else None
    refs: dict[str, Ref | None] = {
        "k": second and second.v[0], "v": first.k[0], "do": first.q[0], "y": first.v[0],
        "dy": second and second.q[0], "dq": first.o[0], "q": first.x, "gate": gate(call),
        "S": second and second.start[0], "F": first.start[0],
        "dots F": first.dots, "dots S": second and second.dots,
        "kept F": first.kept, "kept S": second and second.kept,
        "met F": first.met, "met S": second and second.met,
    }  # fmt: skip
    ahla = second is not None and first.v == second.v != second.k  # k in both
    if second and ahla:
        refs |= {"v": second.k[0], "y": first.k[0]}
    D, V = widths(call)
    own = {
        "AHLA": int(ahla), "F_POWER": POWERS[call.request.operator, second is None],
        "ONE": int(second is None), "ADDS": int(first.add),
    }  # fmt: skip
    yield from sweeps(
        load, call, "hopper_queries.cu", first.batch, refs, D, V, (first.read,), first,
        {**settings(call, D, V, first), **own, **bytes_of(call, refs, "dq")},
        threads=128 * (side(D, V) // HALF) + 128,
    )  # fmt: skip


# Of F's gate, by the operator and whether F is alone
POWERS = {("hla2", False): 2, ("ahla", False): 1, ("hla3", False): 1, ("hla3", True): 3}
KERNELS: dict[str, Callable[[Load, Call, Fused], Iterator[Do]]] = {
    name: kernel
    for sweeps_of, kernels in (
        (SWEEPS["hla2"], (reverse, queries)), (SWEEPS["ahla"], (ahla, queries)),
        (GATED["ahla"], (one_state, one_state, queries)),
        (SWEEPS["hla3"], (one_state, summed, queries, queries)),
    )
    for (name, *_), kernel in zip(sweeps_of, kernels, strict=True)
}  # fmt: skip
