"""hla2's adjoint on Hopper in two sweeps, as rows of the planner and their launches.

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

Weights of a gate are those of `causal`: the reverse sweep reads its states by the weights of what
is left of a chunk, and writes by those of what came before.

Bytes a token and head, D = V = 128, bfloat16: 3584, 0.627 ms for B = 8, T = 4096, H = 16 at 3.0
TB/s; 0.681 ms on one H100 (92%). Operations: 524 k, 0.35 ms at 790 TFLOP/s. No atomics; bits depend
on nothing but the head's data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...core.passes import Shape
from ...core.programs import CAUSAL, adjoint
from ...core.request import Request
from ...device.scan import Call, Do
from ...device.steps import Fused, Ref, Row
from .launch import Kernel, heads, passes, width

REVERSE, QUERIES = "hla2 on Hopper: dy, dv, dk", "hla2 on Hopper: dq"
WIDEST = 128  # columns of a tile
FAR = 1 << 24  # elements between tokens: offsets inside a chunk have 32 bits


def rows(request: Request) -> tuple[Row, ...]:
    """Return the two sweeps, where they do a request's adjoint."""
    steps = tuple(s for s in request.passes if "|" not in s.out)
    plain = request.program.steps == CAUSAL["hla2"].steps and not request.normalize
    gated = request.gate_given and request.gate is not None  # its gradient asks for more
    wide = max(request.k_shape[-1], request.v_shape[-1]) > WIDEST
    if not plain or gated or wide or request.empty or request.scale == 0:
        return ()
    back = adjoint(steps)
    return (
        Row(REVERSE, tuple(s for s in back if s.reverse)),
        Row(QUERIES, tuple(s for s in back if not s.reverse)),
    )


class Aligned:
    """Of two kernels that do the same, the first where all rows begin at whole 16 bytes.

    Memory is aligned alike in all calls of one plan, so the first call chooses.
    """

    def __init__(self, aligned: Kernel, other: Kernel, rows: int) -> None:
        self.aligned, self.other, self.rows = aligned, other, rows
        self.chosen: Kernel | None = None

    def __call__(self, arrays: list[Any], addresses: list[Any], stream: int | None) -> None:
        """Launch one of them."""
        if self.chosen is None:
            starts = zip(self.aligned.slots(addresses), self.aligned.offsets, strict=True)
            apart = [(p + n) % 16 for p, n in itertools.islice(starts, self.rows)]
            self.chosen = self.other if any(apart) else self.aligned
        self.chosen(arrays, addresses, stream)


def launched(
    call: Call,
    function: Any,
    batch: Shape,
    refs: Mapping[str, Ref | None],
    letters: str,
    numbers: tuple[float, ...],
    powers: tuple[int, int],
    **constants: bool,
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
        Operands by name: of rows as many as ``letters``, then states and the gate.
    letters : str
        How the kernel names the strides of rows.
    numbers : tuple of float
        What the kernel takes first.
    powers : tuple of int
        Of the gate, by the passes of the program.
    constants : bool
        Which states there are.
    """
    places = {name: None if ref is None else call.place(ref) for name, ref in refs.items()}
    sizes = [0 if ref is None else call.dtypes[ref.name].itemsize for ref in refs.values()]
    T, D, V = call.request.tokens, width(places["k"]), width(places["v"])
    B = 64 if max(D, V) <= 64 else WIDEST
    gated = {None: 0, "decay": 1, "log_gate": 2}[call.request.gate]
    power1, power2 = powers if gated else (0, 0)
    for counts, first, strides in heads(batch, places, gated == 2):
        own, rest = strides[: len(letters)], strides[len(letters) :]
        steps = {f"s{x}{e}": n for x, s in zip(letters, own, strict=True)
                 for e, n in zip("td", s[3:], strict=True)}  # fmt: skip
        fits = D % 8 == V % 8 == 0 and all(
            s[4] == 1 and s[3] < FAR and not any(n % 8 for n in s[:4]) for s in own
        )

        lead, after = [n for x in own for n in x[:3]], [n for x in rest for n in x]
        made = [
            Kernel(
                function, (math.prod(counts),), first, sizes,
                *numbers, T, D, V, *counts[-2:], *(n // 8 if fast else n for n in lead), *after,
                **steps, GATE=gated, POWER1=power1, POWER2=power2, **constants, B=B,
                WHOLE_D=D == B, WHOLE_V=V == B, FAST=fast, num_warps=4,
            )
            for fast in ((True, False) if fits else (False,))
        ]  # fmt: skip
        if math.prod(counts):
            yield Aligned(made[0], made[-1], len(letters)) if fits else made[0]


def reverse(call: Call, s: Fused) -> Iterator[Do]:
    """Yield the sweep of dy, dv and dk, last token first."""
    from .hopper_reverse import reverse_kernel

    dy, dv, _, dk = s.launches
    refs = {
        "q": dy.v[0], "k": dk.q[0], "v": dy.q[0], "do": dv.v[0], "y": dv.q[0],
        "dy": dy.o[0], "dv": dv.o[0], "dk": dk.o[0],
        "Z": dk.start[0], "R": dv.start[0], "end": dv.end[0] if dv.end else None,
        "gate": Ref("gate") if call.request.gate else None,
    }  # fmt: skip
    yield from launched(
        call, reverse_kernel, dv.batch, refs, "qkvgyabc", (dv.write, 1 / dv.write),
        (dk.power, dv.power),
        START1=refs["Z"] is not None, START2=refs["R"] is not None, END2=refs["end"] is not None,
    )  # fmt: skip
    if any(dk.end):  # of the two that make up Z the kernel keeps the sum
        yield from passes(call, dk._replace(q=(), o=(), add=False, batch=dk.held))


def queries(call: Call, s: Fused) -> Iterator[Do]:
    """Yield the sweep of dq, first token first."""
    from .hopper_queries import queries_kernel

    first, second = s.launches
    S, F = (x and x._replace(turned=not x.turned) for x in (second.start[0], first.start[0]))
    refs = {
        "k": second.k[0], "v": first.k[0], "do": first.q[0], "y": first.v[0],
        "dy": second.q[0], "dq": first.o[0], "S": S, "F": F,
        "gate": Ref("gate") if call.request.gate else None,
    }  # fmt: skip
    yield from launched(
        call, queries_kernel, first.batch, refs, "kvgyab", (first.read,),
        (second.power, first.power),
        START1=S is not None, START2=F is not None,
    )  # fmt: skip


KERNELS = {REVERSE: reverse, QUERIES: queries}
