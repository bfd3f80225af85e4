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
from ...device.steps import Fused, Launch, Ref, Row
from .launch import GATES, WIDEST, Kernel, capability, heads, listed, placed, width

NAME = "{} by two state owners"
OPERATORS = "hla2", "ahla", "hla3"
VERSIONS = (3, 6), (3, 9)  # of Triton, whose Gluon is not the same from one to the next
HALF = WIDEST // 2  # columns of a tile


def version() -> tuple[int, ...]:
    """Return the first two numbers of Triton's version."""
    return tuple(int(x) for x in triton.__version__.split(".")[:2])


def able(request: Request, where: torch.device) -> bool:
    """Whether a device and this Triton run kernels of warpgroups in Gluon on such arrays."""
    hopper = where.type == "cuda" and capability(where) == 9
    return hopper and request.dtype == "bfloat16" and VERSIONS[0] <= version() <= VERSIONS[1]


def masked(request: Request) -> int:
    """Count the steps of the operator's causal program, 0 where a request does not begin so."""
    steps = CAUSAL[request.operator].steps
    begins = [s.does for s in request.program.steps[: len(steps)]]
    return len(steps) if begins == [s.does for s in steps] else 0


def rows(request: Request) -> tuple[Row, ...]:
    """Return the fused row of a request, where there is one; denominators are passes apart."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if request.operator not in OPERATORS or max(D, V) > WIDEST:
        return ()
    count = masked(request)
    if request.empty or 0 in (D, V) or not count:
        return ()
    steps = (s for s in request.passes if s.step < count and "|" not in s.out)
    return (Row(NAME.format(request.operator), tuple(steps), segments=True),)


class Owners(Kernel):
    """A kernel, and how it copies rows: by what the first call shows, and `alike` repeats."""

    rows = 5  # operands in front that are copied by rows
    scalars_before = 12  # numbers in front of their strides

    def __call__(self, arrays: list[Any], addresses: list[Any], stream: int | None) -> None:
        """Launch it."""
        if self.compiled is None:
            given = zip(self.slots(addresses), self.offsets, strict=True)
            self.settle([0 if p is None else p + n for p, n in given])
        super().__call__(arrays, addresses, stream)

    def settle(self, addresses: Sequence[int]) -> None:
        """Copy by 16 bytes where all rows are of whole ones; strides then count by 8 elements."""
        scalars, first, fast = list(self.scalars), self.scalars_before, True
        for i, (x, address) in enumerate(zip(self.operands[: self.rows], addresses, strict=False)):
            *steps, step = scalars[first + 5 * i : first + 5 * i + 5]
            if x is not None:
                fast &= step == 1 and not any(n % 8 for n in (*steps, width(x), address // 2))
        for i in range(5 * self.rows):
            scalars[first + i] //= 8 if fast and i % 5 < 4 else 1
        self.scalars, self.constants["FAST"] = tuple(scalars), fast
        self.rest = (*scalars, *self.constants.values())


class ThirdOrder(Owners):
    """The kernel of hla3."""

    rows = 6
    scalars_before = 9


def kernels(operator: str, call: Call, fused: Fused) -> Iterator[Kernel]:
    """Return the kernels of a fused step: one, or more where batch axes cannot become three.

    Raises
    ------
    NotImplementedError
        It adds to what there is, or weighs what it writes.
    """
    from .hopper import pair_kernel
    from .hopper3 import triple_kernel

    request, (first, *_, last) = call.request, fused.launches
    if any(x.add or x.write != 1.0 for x in fused.launches):
        raise NotImplementedError(f"no fused kernel does {fused}")
    third = operator == "hla3"
    refs, constants = (triple if third else pair)(operator, fused)
    refs["gate"] = None if request.gate is None else Ref("gate")
    places, sizes = placed(call, refs)
    D, V = (width(places[n]) for n in "kv")
    constants |= {
        "WIDE": any(call.dtypes[x.name].itemsize > 2 for x in last.o),
        "GATE": GATES.index(request.gate),
        "POWER1": first.power, "POWER2": last.power,
        "BD": WIDEST if D > HALF else HALF, "WHOLE_D": D % HALF == 0,
        "BV": WIDEST if V > HALF else HALF, "WHOLE_V": V % HALF == 0, "FAST": False,
    }  # fmt: skip
    make, kernel, tiles = Owners, pair_kernel, 1
    factors = [n for read in (first.read, last.read) for n in (read, 1.0, 1.0)]
    if third:
        make, kernel, tiles = ThirdOrder, triple_kernel, -(-V // HALF)
        factors = [x.read for x in fused.launches]
    given = {name: constants[name] for name in kernel.arg_names if name in constants}
    batch = broadcast(*(x.batch for x in fused.launches))
    T, tokens = request.tokens, first.tokens
    parts, cut = (-(-T // tokens), True) if tokens else (1, False)
    for counts, operands, strides in heads(batch, places, request.gate == "log_gate", cut=cut):
        yield make(
            kernel, (math.prod(counts) * parts * tiles,), operands, sizes, *factors, T,
            tokens or None, D, V, *counts[-2:], *listed(places, strides, cut=cut), **given,
            num_warps=4,
        )  # fmt: skip


def kept(fused: Fused, s: Launch) -> Ref | None:
    """Return where a launch leaves what it makes, if anywhere."""
    return s.o[0] if s.o and s.o[0].name not in fused.inner else None


Operands = tuple[dict[str, Ref | None], dict[str, Any]]


def pair(operator: str, fused: Fused) -> Operands:
    """Return the operands of hla2 or ahla, in order, and what follows from them."""
    one, two = fused.launches
    v = one.v if operator == "ahla" else two.v
    refs: dict[str, Ref | None] = {"q": one.q[0], "k": one.k[0], "v": v[0]}
    refs |= {"y": kept(fused, one), "o": kept(fused, two)}
    for i, s in enumerate((one, two), 1):
        refs |= {f"start{i}": next(iter(s.start), None), f"end{i}": next(iter(s.end), None)}
    return refs, {
        "AHLA": operator == "ahla", "READ": refs["o"] is not None, "KEEP": refs["y"] is not None,
        "SCALED1": one.read != 1.0, "SCALED2": two.read != 1.0,
        **{n.upper(): x is not None for n, x in refs.items() if n[-1] in "12"},
    }  # fmt: skip


def triple(operator: str, fused: Fused) -> Operands:
    """Return the same of hla3."""
    y, u, o = fused.launches
    refs: dict[str, Ref | None] = {"q": y.q[0], "k": y.k[0], "v": u.v[0]}
    refs |= {"y": kept(fused, y), "u": kept(fused, u), "o": kept(fused, o)}
    constants: dict[str, Any] = {"SCALED": any(s.read != 1.0 for s in fused.launches)}
    for i, s in enumerate(fused.launches, 1):
        refs |= {f"start{i}": next(iter(s.start), None), f"end{i}": next(iter(s.end), None)}
    constants |= {n.upper(): x is not None for n, x in refs.items() if n[-1] in "123"}
    constants |= {f"KEEP_{n.upper()}": refs[n] is not None for n in "yu"}
    return refs, constants | {"READ": refs["o"] is not None}


KERNELS = {NAME.format(x): functools.partial(kernels, x) for x in OPERATORS}
