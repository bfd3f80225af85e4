"""Launches of the forward by two state owners on Hopper: which requests it serves, and how."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton

from ...core.passes import broadcast
from ...core.programs import CAUSAL
from ...core.request import Request
from ...device.scan import Call
from ...device.steps import Fused, Ref, Row
from .launch import WIDEST, Kernel, capability, heads, listed, width

NAME = "{} by two state owners"
OPERATORS = "hla2", "ahla"
VERSIONS = (3, 6), (3, 9)  # of Triton, whose Gluon is not the same from one to the next
ROWS = 5  # operands in front that are copied by rows
FIRST = 12  # place of their strides among the scalars


def version() -> tuple[int, ...]:
    """Return the first two numbers of Triton's version."""
    return tuple(int(x) for x in triton.__version__.split(".")[:2])


def able(request: Request, where: torch.device) -> bool:
    """Whether a device and this Triton run kernels of warpgroups in Gluon on such arrays."""
    hopper = where.type == "cuda" and capability(where) == 9
    return hopper and request.dtype == "bfloat16" and VERSIONS[0] <= version() <= VERSIONS[1]


def rows(request: Request) -> tuple[Row, ...]:
    """Return the fused row of a request, where there is one; denominators are passes apart."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if request.operator not in OPERATORS or not WIDEST // 2 < max(D, V) <= WIDEST:
        return ()
    masked = CAUSAL[request.operator].steps
    if request.empty or 0 in (D, V) or request.program.steps[: len(masked)] != masked:
        return ()
    steps = (s for s in request.passes if s.step < len(masked) and "|" not in s.out)
    return (Row(NAME.format(request.operator), tuple(steps), segments=True),)


class Pair(Kernel):
    """The kernel, and how rows are copied: by what the first call shows, and `alike` repeats."""

    def __call__(self, arrays: list[Any], addresses: list[Any], stream: int | None) -> None:
        """Launch it."""
        if self.compiled is None:
            given = zip(self.slots(addresses), self.offsets, strict=True)
            self.settle([0 if p is None else p + n for p, n in given])
        super().__call__(arrays, addresses, stream)

    def settle(self, addresses: Sequence[int]) -> None:
        """Copy by 16 bytes where all rows are of whole ones; strides then count by 8 elements."""
        scalars, fast = list(self.scalars), True
        for i, (x, address) in enumerate(zip(self.operands[:ROWS], addresses, strict=False)):
            *steps, step = scalars[FIRST + 5 * i : FIRST + 5 * i + 5]
            if x is not None:
                fast &= step == 1 and not any(n % 8 for n in (*steps, width(x), address // 2))
        for i in range(FIRST, FIRST + 5 * ROWS):
            scalars[i] //= 8 if fast and (i - FIRST) % 5 < 4 else 1
        self.scalars, self.constants["FAST"] = tuple(scalars), fast
        self.rest = (*scalars, *self.constants.values())


def kernels(operator: str, call: Call, fused: Fused) -> Iterator[Kernel]:
    """Return the kernels of a fused step: one, or more where batch axes cannot become three.

    Raises
    ------
    NotImplementedError
        It adds to what there is.
    """
    from .hopper import pair_kernel

    request, (one, two) = call.request, fused.launches
    if one.add or two.add:
        raise NotImplementedError(f"no fused kernel does {fused}")
    made = None if one.o[0].name in fused.inner else one.o[0]
    v = (one if operator == "ahla" else two).v[0]
    refs: dict[str, Ref | None] = {"q": one.q[0], "k": one.k[0], "v": v, "y": made}
    refs["o"] = next(iter(two.o), None)
    for i, s in enumerate((one, two), 1):
        refs |= {f"start{i}": next(iter(s.start), None), f"end{i}": next(iter(s.end), None)}
    refs["gate"] = None if request.gate is None else Ref("gate")
    places = {name: None if ref is None else call.place(ref) for name, ref in refs.items()}
    D, V = (width(places[n]) for n in "kv")
    BD, BV = (WIDEST if n > WIDEST // 2 else WIDEST // 2 for n in (D, V))
    factors = [f for s in (one, two) for f in (s.read * s.write, s.write, 1 / s.write)]
    constants = {
        "AHLA": operator == "ahla", "READ": len(two.o) > 0,
        "WIDE": any(call.dtypes[x.name].itemsize > 2 for x in two.o),
        "KEEP": made is not None, "GATE": (None, "decay", "log_gate").index(request.gate),
        "POWER1": one.power, "POWER2": two.power,
        "SCALED1": factors[:2] != [1, 1], "SCALED2": factors[3:5] != [1, 1],
        **{n.upper(): refs[n] is not None for n in ("start1", "end1", "start2", "end2")},
        "BD": BD, "BV": BV, "WHOLE_D": BD == D, "WHOLE_V": BV == V, "FAST": False,
    }  # fmt: skip
    sizes = [0 if ref is None else call.dtypes[ref.name].itemsize for ref in refs.values()]
    batch = broadcast(one.batch, two.batch)
    T, tokens = request.tokens, one.tokens
    parts, cut = (-(-T // tokens), True) if tokens else (1, False)
    for counts, first, strides in heads(batch, places, request.gate == "log_gate", cut=cut):
        yield Pair(
            pair_kernel, (math.prod(counts) * parts,), first, sizes, *factors, T, tokens or None,
            D, V, *counts[-2:], *listed(places, strides, cut=cut), **constants, num_warps=4,
        )  # fmt: skip


KERNELS = {NAME.format(x): functools.partial(kernels, x) for x in OPERATORS}
