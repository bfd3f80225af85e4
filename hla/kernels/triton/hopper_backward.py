"""The adjoints of hla2, ahla and hla3 on Hopper in sweeps: rows of the planner, their launches.

From q, k, v, the gradient do of the output and the saved y, with powers p of the gate:

    reverse   R = sum q do' (p = 2)          dy = R v, dv = R' y
              Z = sum q dy' + dy q' (p = 1)  dk = Z k
    queries   F = sum y v' (p = 2), S = sum k k' (p = 1)    dq = F do + S dy

A program does a head: two warpgroups own states in float32 registers, a third moves chunks of W =
64 tokens between memory and shared memory. Rows are tokens; up (lo) keeps the pairs whose row is
not later (not earlier) than its column:

    owner of R   dY = V R' + up(V dO') Q     dV = Y R + up(Y Q') dO     R += Q' dO
    owner of Z   dK' = Z K' + dY' lo(Q K') + Q' lo(dY K')               Z += Q' dY + dY' Q
    of queries   dQ' = F dO' + Y' up(V dO') + S dY' + K' up(K dY')      F += Y' V, S += K' K

ahla's reverse sweep has a kernel of its own (`hopper_ahla`), of R1 = sum q do' and R2 = sum q du';
queries have E and P for F and S, u and du for y and dy. For a gate's gradient it is two sweeps of
one state: du and a part of dk, R1 u; then dv and the other part, R2 v, which is added.

hla3's are four: from R = sum q do' (p = 3) dy = R u and du = R' y; from R2 = sum q du' and Z dv =
R2' k and dk = R2 v + Z k, of which the owner of R2 leaves its part in the place of v to that of Z;
queries have P du + S dy, and once more F do alone, to which the dq so far, loaded beside the
operands, is added. With D = V = 128 these are 6 + 7
+ 5 + 5 = 23 rows of 256 bytes, 1.03 ms (by passes alone 35); one H100 took 1.13, .285 + .367 + .235
+ .242, the last by the pass kernel.

Weights of a gate are those of `causal`: the reverse sweep reads its states by the weights of what
is left of a chunk, and writes by those of what came before.

For a gate's gradient (`gate`) the owners of the reverse sweep leave d = y . (V R') and d = k . (Z
k) / 2, with the sums by key of the product of the two tiles of pairs that each makes, and its sums
by query, in both of which a token with itself cancels; queries, which then read q too and leave dq
in its place, c = q . (F do) and q . (S dy).
What warps sum by columns meets in a tile of pairs that nobody reads any more. R and Z are kept in
bfloat16 before every PERIOD of tokens; queries multiply them by F and S.
Of a first S, which need not be symmetric, that is not the whole of <S, dS>: `Skew` adds the rest.
With a log gate 4000 bytes, 0.70 ms; one H100 took 0.97 (72%: the owners' work, not bytes), and
1.266 with the forward, 1.22 of a decay; hla3 2.49 with the forward.

Bytes a token and head of hla2, D = V = 128, bfloat16: 3584, 0.627 ms for B = 8, T = 4096, H = 16
at 3.0 TB/s; 0.681 ms on one H100 (92%), with a decay 0.724, with a log gate 0.781. Operations: 524
k, 0.35 ms at 790 TFLOP/s. No atomics; bits depend on nothing but the head's data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...core.passes import Shape
from ...core.programs import adjoint
from ...core.request import Request
from ...device.rows import flipped, gate_parts, masked, matched
from ...device.scan import Call, Do
from ...device.steps import Fused, Launch, Parts, Ref, Row
from .launch import GATES, Aligned, Kernel, heads, listed, passes, placed, width

HLA2 = "hla2 on Hopper: dy, dv, dk", "hla2 on Hopper: dq"
AHLA = "ahla on Hopper: du, dk", "ahla on Hopper: dv, dk", "ahla on Hopper: dq"
BOTH = "ahla on Hopper: du, dv, dk"
HLA3 = tuple(f"hla3 on Hopper: {x}" for x in ("dy, du", "dv, dk", "dq of y and u", "dq of o"))
Sweep = tuple[str, bool, tuple[int, ...]]  # name, whether last token first, of which steps
SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "hla2": ((HLA2[0], True, (0, 1)), (HLA2[1], False, (0, 1))),
    "ahla": ((BOTH, True, (0, 1)), (AHLA[2], False, (0, 1))),
    "hla3": (
        (HLA3[0], True, (2,)), (HLA3[1], True, (0, 1)),
        (HLA3[2], False, (0, 1)), (HLA3[3], False, (2,)),
    ),
}  # fmt: skip
GATED = SWEEPS | {  # for a gate's gradient
    "ahla": ((AHLA[0], True, (1,)), (AHLA[1], True, (0,)), (AHLA[2], False, (0, 1))),
}
ADDS = {AHLA[1], *HLA3[1:]}  # to dk or dq, what other passes may have left there
WIDEST = 128  # columns of a tile
CHUNK, PERIOD = 64, 1024  # tokens by which dots count, and between the states that are kept
LATE = "START", "END", "DOTS", "EVERY"  # how constants begin that come behind powers
FAR = 1 << 24  # elements between tokens: offsets inside a chunk have 32 bits


def rows(request: Request) -> tuple[Row, ...]:
    """Return the sweeps, where they do a request's adjoint."""
    widths = request.k_shape[-1], request.v_shape[-1]
    plain = request.operator in SWEEPS and not (request.normalize or request.empty)
    plain = plain and masked(request) == len(request.program.steps)
    if not plain or request.scale == 0 or not 0 < min(widths) <= max(widths) <= WIDEST:
        return ()
    B = side(*widths)
    parts = gate_parts(request, Parts(CHUNK, PERIOD, B // 64, 1, side=B, met=B // 16, block=64))
    back = adjoint(tuple(s for s in request.passes if "|" not in s.out))
    alike = request.operator != "hla3" or matched(request)
    return tuple(
        Row(name, tuple(s for s in back if s.reverse == last and s.step in of),
            segments=True, parts=parts, in_place=not last, adds=name in ADDS)
        for name, last, of in (GATED if parts else SWEEPS)[request.operator]
        if alike or len(of) == 1
    )  # fmt: skip


def side(D: int, V: int) -> int:
    """Columns of a tile, of keys and values alike."""
    return WIDEST // 2 if max(D, V) <= WIDEST // 2 else WIDEST


def launched(
    call: Call,
    function: Any,
    batch: Shape,
    refs: Mapping[str, Ref | None],
    letters: str,
    numbers: tuple[float, ...],
    powers: tuple[int, int],
    s: Launch,
    constants: Mapping[str, int],
) -> Iterator[Do]:
    """Yield what does a sweep.

    Parameters
    ----------
    call : Call
        What is known of the arrays.
    function : kernel
        Of the operands, numbers and sizes, strides, and constants, in this order.
    batch : tuple of int
        Of all operands.
    refs : mapping
        Operands by name: of rows as many as ``letters``, then states and the gate, then what lies
        in order.
    letters : str
        How the kernel names the strides of rows.
    numbers : tuple of float
        What the kernel takes first.
    powers : tuple of int
        Of the gate, by the passes of the program.
    s : Launch
        Which has the tokens of a segment.
    constants : mapping
        What the kernel does, and then which states there are, and dots.
    """
    places, sizes = placed(call, refs, s)
    keys = places.get("q") or places["k"] or places["y"]
    T, D, V = s.length(call.request.tokens), width(keys), width(places["do"])
    B = side(D, V)
    gated = GATES.index(call.request.gate)
    power1, power2 = powers if gated else (0, 0)
    does, states = (
        {n: x for n, x in constants.items() if n.startswith(LATE) == late} for late in (False, True)
    )
    parts, cut = (-(-T // s.tokens), True) if s.tokens else (1, False)
    for counts, first, strides in heads(batch, places, gated == 2, cut=cut):
        own, rest = strides[: len(letters)], strides[len(letters) :]
        steps = {f"s{x}{e}": n for x, s in zip(letters, own, strict=True)
                 for e, n in zip("td", s[3:], strict=True)}  # fmt: skip
        fits = D % 8 == V % 8 == 0 and all(
            x is None or (s[4] == 1 and s[3] < FAR and not any(n % 8 for n in s[:4]))
            for x, s in zip(first, own, strict=False)
        )

        lead = [n for x in own for n in x[:3]]
        names = [*places]
        after = listed(names[len(letters) : names.index("gate") + 1], rest, cut=cut)
        made = [
            Kernel(
                function, (math.prod(counts) * parts,), first, sizes,
                *numbers, T, s.tokens or None, D, V, *counts[-2:],
                *(n // 8 if fast else n for n in lead), *after,
                **steps, GATE=gated, SCALED=numbers[0] != 1.0, **does,
                POWER1=power1, POWER2=power2, **states, B=B, WHOLE_D=D == B,
                WHOLE_V=V == B, FAST=fast, num_warps=4, launch_pdl=True,
            )
            for fast in ((True, False) if fits else (False,))
        ]  # fmt: skip
        if math.prod(counts):
            yield Aligned(made[0], made[-1], len(letters)) if fits else made[0]


def reverse(call: Call, s: Fused) -> Iterator[Do]:
    """Yield hla2's sweep of dy, dv and dk, last token first."""
    if not s.launches[1].q:  # of segments: dy again, and of the two that make up Z half the sum
        dy, half = s.launches
        again = dict.fromkeys(("q", "k", "v", "do", "y", "dy", "dv", "dk", "Z", "R"))
        again |= {"q": dy.v[0], "v": dy.q[0], "do": dy.k[0], "R": flipped(dy.start[0])}
        constants = {"Z": True, "SUM": False, "ADD": False, "READ": False}
        yield from _reverse(call, again, dy, half, half.end[0], **constants)
        return
    dy, dv, _, dk = s.launches
    refs: dict[str, Ref | None] = {
        "q": dy.v[0], "k": dk.q[0], "v": dy.q[0], "do": dv.v[0], "y": dv.q[0],
        "dy": dy.o[0], "dv": dv.o[0], "dk": dk.o[0], "Z": dk.start[0], "R": dv.start[0],
    }  # fmt: skip
    yield from _reverse(call, refs, dv, dk, Z=True, SUM=False, ADD=False, READ=True)
    if any(dk.end):  # of the two that make up Z the kernel keeps the sum
        alone = dk.states_alone()
        yield from passes(call, alone)


def ahla(call: Call, s: Fused) -> Iterator[Do]:
    """Yield ahla's sweep of du, dv and dk, last token first."""
    if s.launches[1].q:
        dk, du, more, dv = s.launches
        refs: dict[str, Ref | None] = {
            "q": du.k[0], "k": du.q[0], "v": more.q[0], "do": du.v[0], "u": dk.q[0],
            "du": du.o[0], "dv": dv.o[0], "dk": dk.o[0], "R": du.start[0], "Z": dv.start[0],
        }  # fmt: skip
        yield from _ahla(call, refs, du, dv, read=True)
        return
    du, *states = s.launches  # of segments: du again, and sums of q du' or their transposes
    for x in states:
        refs = dict.fromkeys(("q", "k", "v", "do", "u", "du", "dv", "dk", "R", "Z"))
        refs |= {"q": du.k[0], "k": du.q[0], "do": du.v[0], "R": du.start[0]}
        left = x if x.k == du.k else x._replace(end=(flipped(x.end[0]),))
        yield from _ahla(call, refs, du, left, read=False)


def _ahla(
    call: Call, refs: dict[str, Ref | None], du: Launch, dv: Launch, *, read: bool
) -> Iterator[Do]:
    """Yield it by the launches that leave R1 and R2."""
    from .hopper_ahla import ahla_kernel

    refs |= {"end": next(iter(du.end), None), "left": next(iter(dv.end), None)}
    there = {"START1": "R", "START2": "Z", "END1": "end", "END2": "left"}
    constants = {"READ": read} | {name: refs[n] is not None for name, n in there.items()}
    refs["gate"] = Ref("gate") if call.request.gate else None
    powers, factors = (du.power, dv.power), (du.write, 1 / du.write)
    yield from launched(
        call, ahla_kernel, du.batch, refs, "qkvguabc", factors, powers, du, constants
    )


def one_state(call: Call, s: Fused) -> Iterator[Do]:
    """Yield a sweep of ahla's, last token first: of du and its part of dk, or of dv and dk."""
    dk, dx = s.launches
    refs = {
        "q": dk.v[0], "k": None, "v": dk.q[0], "do": dk.k[0], "y": dx.q[0],
        "dk": dk.o[0], "dx": dx.o[0], "none": None, "Z": None, "R": dx.start[0],
    }  # fmt: skip
    yield from _reverse(call, refs, dx, None, Z=False, SUM=False, ADD=dk.add, READ=True)


def summed(call: Call, s: Fused) -> Iterator[Do]:
    """Yield hla3's sweep of dv and of all of dk, last token first."""
    dk, dv, _, more = s.launches
    refs: dict[str, Ref | None] = {
        "q": dk.v[0], "k": more.v[0], "v": dk.q[0], "do": dk.k[0], "y": dv.q[0],
        "dk": dk.o[0], "dv": dv.o[0], "none": None, "Z": more.start[0], "R": dv.start[0],
    }  # fmt: skip
    yield from _reverse(call, refs, dv, more, Z=True, SUM=True, ADD=dk.add, READ=True)
    if any(more.end):
        alone = more.states_alone()
        yield from passes(call, alone)


def _reverse(
    call: Call,
    refs: dict[str, Ref | None],
    x: Launch,
    z: Launch | None,
    left: Ref | None = None,
    **constants: int,
) -> Iterator[Do]:
    """Yield a sweep from the last token, by the launches that leave R and, if there is one, Z."""
    from .hopper_reverse import reverse_kernel

    refs |= {"end": x.end[0] if x.end else None, "left": left}
    refs["gate"] = Ref("gate") if call.request.gate else None
    refs |= {"dots1": z and z.dots, "dots2": x.dots, "kept1": z and z.states, "kept2": x.states}
    there = {"START1": "Z", "START2": "R", "END1": "left", "END2": "end", "DOTS": "dots2"}
    constants |= {name: refs[n] is not None for name, n in there.items()}
    constants["EVERY"] = every(x) if x.states else 0
    powers, factors = (z.power if z else 0, x.power), (x.write, 1 / x.write)
    yield from launched(
        call, reverse_kernel, x.batch, refs, "qkvgyabc", factors, powers, x, constants
    )


def every(x: Launch) -> int:
    """Chunks between the states that are kept, of which a segment has a multiple."""
    return math.gcd(x.tokens, PERIOD) // CHUNK


def queries(call: Call, s: Fused) -> Iterator[Do]:
    """Yield the sweep of dq, first token first."""
    from .hopper_queries import queries_kernel

    first, *rest = s.launches
    second = rest[0] if rest else None  # of hla3's o there is F alone
    k, dy = (second.v[0], second.q[0]) if second else (None, None)
    S, F = flipped(second.start[0]) if second else None, flipped(first.start[0])
    v, y, ahla = first.k[0], first.v[0], False
    if second and first.v == second.v != second.k:  # k in both; of hla3 also in S = sum k k'
        v, y, ahla = second.k[0], first.k[0], True
    refs = {
        "k": k, "v": v, "do": first.q[0], "y": y, "dy": dy,
        "dq": first.o[0], "q": first.x, "S": S, "F": F,
        "gate": Ref("gate") if call.request.gate else None,
        "dots1": second and second.dots, "dots2": first.dots,
        "kept1": second and second.kept, "kept2": first.kept,
        "met1": second and second.met, "met2": first.met,
    }  # fmt: skip
    constants: dict[str, int] = {"AHLA": ahla, "ONE": second is None, "ADD": first.add}
    constants |= {"START1": S is not None, "START2": F is not None}
    constants |= {"DOTS": first.dots is not None, "EVERY": every(first) if first.kept else 0}
    powers, factors = ((second or first).power, first.power), (first.read,)
    yield from launched(
        call, queries_kernel, first.batch, refs, "kvgyabq", factors, powers, first, constants
    )


KERNELS = {
    **dict(zip(HLA2, (reverse, queries), strict=True)),
    BOTH: ahla,
    **dict(zip(AHLA, (one_state, one_state, queries), strict=True)),
    **dict(zip(HLA3, (one_state, summed, queries, queries), strict=True)),
}
