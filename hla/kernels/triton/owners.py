"""Launches of the forward by two state owners on Hopper: which requests it serves, and how."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from ...core.passes import broadcast
from ...core.request import Request
from ...device.rows import kept, masked
from ...device.scan import Call, Do
from ...device.steps import Fused, Launch, Ref, Row
from .launch import (
    GATES,
    WIDEST,
    Aligned,
    Kernel,
    capability,
    heads,
    listed,
    placed,
    version,
    width,
)

NAME = "{} by two state owners"
OPERATORS = "hla2", "ahla", "hla3"
VERSIONS = (3, 6), (3, 9)  # of Triton, whose Gluon is not the same from one to the next
HALF = WIDEST // 2  # columns of a tile
SUMS = "x", "den", "one", "m", "me", "n", "ne"  # operands of denominators


def able(request: Request, where: torch.device) -> bool:
    """Whether a device and this Triton run kernels of warpgroups in Gluon on such arrays."""
    hopper = where.type == "cuda" and capability(where) == 9
    return hopper and request.dtype == "bfloat16" and VERSIONS[0] <= version() <= VERSIONS[1]


def rows(request: Request) -> tuple[Row, ...]:
    """Return the fused rows of a request: with all its denominators, and without."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    if request.operator not in OPERATORS or max(D, V) > WIDEST:
        return ()
    count = masked(request)
    if request.empty or 0 in (D, V) or not count:
        return ()
    steps = tuple(s for s in request.passes if s.step < count)
    alone = tuple(s for s in steps if "|" not in s.out)
    name = NAME.format(request.operator)
    hla2 = request.operator == "hla2"
    whole = Row(name, steps, segments=hla2, divides=True)
    # Of ahla and hla3 sums without a division gain nothing (0.355 and 0.503 ms, 0.339 and 0.515 by
    # passes). hla3's numerators, saved in float32, are slower to leave than to make apart: 0.93 ms,
    # 0.77 by passes.
    taken = hla2 or (request.normalize and not (request.operator == "hla3" and request.gradient))
    apart = Row(name, alone, segments=True)
    return (whole, apart) if taken else (apart,)


def kernels(operator: str, call: Call, fused: Fused) -> Iterator[Do]:
    """Return the kernels of a fused step: one, or more where batch axes cannot become three.

    Raises
    ------
    NotImplementedError
        It adds to what there is, or weighs what it writes.
    """
    from .hopper import pair_kernel
    from .hopper3 import triple_kernel

    request = call.request
    (first, *_, last), sums = parted(fused)
    if any(x.add or x.write != 1.0 for x in fused.launches):
        raise NotImplementedError(f"no fused kernel does {fused}")
    third = operator == "hla3"
    refs, constants = (triple if third else pair)(operator, fused)
    refs, constants = refs | denominators(fused), constants | {"SUMS": bool(sums)}
    constants["DEN"] = bool(sums and sums[-1].o)
    refs["gate"] = None if request.gate is None else Ref("gate")
    places, sizes = placed(call, refs, first)
    D, V = (width(places[n]) for n in "kv")
    constants |= {
        "WIDE": not fused.divide and any(call.dtypes[x.name].itemsize > 2 for x in last.o),
        "GATE": GATES.index(request.gate),
        "POWER1": first.power, "POWER2": last.power,
        "BD": WIDEST if D > HALF else HALF, "WHOLE_D": D % HALF == 0,
        "BV": WIDEST if V > HALF else HALF, "WHOLE_V": V % HALF == 0,
    }  # fmt: skip
    kernel, tiles = (triple_kernel, -(-V // HALF)) if third else (pair_kernel, 1)
    factors = *(x.read for x in parted(fused)[0]), fused.divide.eps if fused.divide else None
    given = {name: constants[name] for name in kernel.arg_names if name in constants}
    rows = 6 if third else 5  # operands in front that are copied by rows
    batch = broadcast(*(x.batch for x in fused.launches))
    T, tokens = first.length(request.tokens), first.tokens
    parts, cut = (-(-T // tokens), True) if tokens else (1, False)
    for counts, operands, strides in heads(batch, places, request.gate == "log_gate", cut=cut):
        own = [s for x, s in zip(operands, strides[:rows], strict=False) if x is not None]
        fits = D % 8 == V % 8 == 0 and all(s[4] == 1 and not any(n % 8 for n in s[:4]) for s in own)
        made = []
        for fast in (True, False) if fits else (False,):
            by = [(*(n // 8 for n in s[:4]), s[4]) if fast else s for s in strides[:rows]]
            steps = [
                None if x is None and name in SUMS else n
                for name, x, s in zip(places, operands, by + strides[rows:], strict=True)
                for n in listed((name,), (s,), cut=cut)
            ]
            made.append(
                Kernel(
                    kernel, (math.prod(counts) * parts * tiles,), operands, sizes, *factors, T,
                    tokens or None, D, V, *counts[-2:], *steps, **given, FAST=fast, num_warps=4,
                    launch_pdl=True,
                )
            )  # fmt: skip
        yield Aligned(made[0], made[-1], rows) if fits else made[0]


def parted(fused: Fused) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """Return the launches of a fused step, and those of its denominators."""
    sums = tuple(x for x in fused.launches if "|" in x.v[0].name)
    return tuple(x for x in fused.launches if x not in sums), sums


def denominators(fused: Fused) -> dict[str, Ref | None]:
    """Return the operands of denominators, in order; x is a numerator that is stored."""
    (*_, last), sums = parted(fused)
    refs: dict[str, Ref | None] = dict.fromkeys(SUMS)
    refs["x"] = kept(fused, last) if fused.divide else None
    names = (("one", "m", "me"), ("den", "n", "ne"))
    for s, (made, start, end) in zip(sums[::-1], names[::-1], strict=False):
        refs |= {made: kept(fused, s), start: next(iter(s.start), None)}
        refs[end] = next(iter(s.end), None)
    return refs


Operands = tuple[dict[str, Ref | None], dict[str, Any]]


def pair(operator: str, fused: Fused) -> Operands:
    """Return the operands of hla2 or ahla, in order, and what follows from them."""
    one, two = parted(fused)[0]
    v = one.v if operator == "ahla" else two.v
    refs: dict[str, Ref | None] = {"q": one.q[0], "k": one.k[0], "v": v[0]}
    refs |= {"y": kept(fused, one), "o": fused.divide.o if fused.divide else kept(fused, two)}
    for i, s in enumerate((one, two), 1):
        refs |= {f"start{i}": next(iter(s.start), None), f"end{i}": next(iter(s.end), None)}
    return refs, {
        "AHLA": operator == "ahla", "READ": refs["o"] is not None, "KEEP": refs["y"] is not None,
        "SCALED1": one.read != 1.0, "SCALED2": two.read != 1.0,
        **{n.upper(): x is not None for n, x in refs.items() if n[-1] in "12"},
    }  # fmt: skip


def triple(operator: str, fused: Fused) -> Operands:
    """Return the same of hla3."""
    y, u, o = parted(fused)[0]
    refs: dict[str, Ref | None] = {"q": y.q[0], "k": y.k[0], "v": u.v[0]}
    refs |= {"y": kept(fused, y), "u": kept(fused, u)}
    refs["o"] = fused.divide.o if fused.divide else kept(fused, o)
    constants: dict[str, Any] = {"SCALED": any(s.read != 1.0 for s in (y, u, o))}
    for i, s in enumerate((y, u, o), 1):
        refs |= {f"start{i}": next(iter(s.start), None), f"end{i}": next(iter(s.end), None)}
    constants |= {n.upper(): x is not None for n, x in refs.items() if n[-1] in "123"}
    constants |= {f"KEEP_{n.upper()}": refs[n] is not None for n in "yu"}
    return refs, constants | {"READ": refs["o"] is not None}


KERNELS = {NAME.format(x): functools.partial(kernels, x) for x in OPERATORS}
