"""Launches of the fused Triton kernels: settings, operands, and kernels kept ready."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from ...core.passes import broadcast
from ...core.request import Request
from ...device.rows import masked
from ...device.scan import Call
from ...device.steps import Fused, Launch, Ref, Row
from .chain import chain_kernel
from .launch import (
    GATES,
    WIDEST,
    Config,
    Kernel,
    capability,
    heads,
    multiplied,
    placed,
    tile,
    width,
)

NAME = "{} in plain Triton"
# What the launches of a row are, in order. A denominator is that of what comes before it.
ROLES = {"hla2": ("y", "o"), "ahla": ("u", "o"), "hla3": ("y", "u", "o")}
SUMS = {"hla2": ("y", "o", "den"), "ahla": ("u", "one", "o", "den"),
        "hla3": ("y", "u", "one", "o", "den")}  # fmt: skip
STATES = {"y": "S", "u": "P", "o": "F", "one": "m", "den": "n"}


def rows(request: Request, where: torch.device) -> tuple[Row, ...]:
    """Return the fused rows of a request: with all its denominators, and without."""
    count = masked(request)
    if request.empty or not count or chosen(request, where) is None:
        return ()
    steps = tuple(s for s in request.passes if s.step < count)
    alone = tuple(s for s in steps if "|" not in s.out)
    name = NAME.format(request.operator)
    return Row(name, steps, divides=True), Row(name, alone)


def chosen(request: Request, where: torch.device) -> Config | None:
    """Return the launch settings of a request; None where passes are faster, or the only way.

    The interpreter, which has no registers, takes those of bfloat16 for any dtype.
    """
    D, V = request.k_shape[-1], request.v_shape[-1]
    if request.operator not in ROLES or not 0 < min(D, V) <= max(D, V) <= WIDEST:
        return None
    operand, _, _ = multiplied(request, where, narrow=request.dtype == "bfloat16")
    operand = operand if where.type == "cuda" else "bf16"
    return config(request.operator, tile(D), tile(V), operand, request.gate, capability(where))


def config(
    operator: str, D: int, V: int, operand: str, gate: str | None, major: int
) -> Config | None:
    """Return launch settings by tiles, operand, gate and architecture; None: by passes.

    They fix the order of every sum, so they depend on nothing that varies from call to call. Timed
    on an H100 at 128; for other architectures what compiles without spills, not timed. Three states
    with the weights of a gate, or of 128 x 128, and float32 operands in three parts fill more than
    the registers.
    """
    large = max(D, V) > 64
    warps = 8 if large else 4
    if operator == "hla3" and (large or gate):
        return None
    if operand == "tf32" and major == 9 and not large and operator != "hla3":
        return Config(32, warps, 2)
    if operand != "bf16":
        return None
    if major == 9:
        if large:  # of hla2 with a gate passes take as long
            return None if operator == "hla2" and gate else Config(32, warps, 4)
        return Config(64 if operator == "hla2" and gate is None else 32, warps, 3)
    if major == 10:  # no loads ahead: see `launch.config`
        return Config(32, warps, 1)
    return None if large and gate == "log_gate" else Config(16, warps, 2)


def operands(operator: str, request: Request, fused: Fused) -> dict[str, Ref | None]:
    """Return the kernel's operands by name, in order: S is a first state, S' a last one."""
    by = roles(operator, fused)
    first, last = fused.launches[0], by["o"]
    found: dict[str, Ref | None] = {"q": first.q[0], "k": first.k[0]}
    found["v"] = by.get("u", last).v[0]
    for name in ("o", "y", "u", "x", "den", "one"):
        outs = by[role].o if (role := "o" if name == "x" else name) in by else ()
        found[name] = outs[0] if outs and outs[0].name not in fused.inner else None
    if fused.divide:
        found["o"] = fused.divide.o
    else:
        found["x"] = None
    for name, state in STATES.items():
        one = by.get(name)
        found[state] = one.start[0] if one else None
        found[f"{state}'"] = one.end[0] if one and one.end else None
    return found | {"gate": None if request.gate is None else Ref("gate")}


def roles(operator: str, fused: Fused) -> dict[str, Launch]:
    """Return the launches of a fused step by what they make."""
    summed = len(fused.launches) > len(ROLES[operator])
    return dict(zip((SUMS if summed else ROLES)[operator], fused.launches, strict=True))


def kernels(operator: str, call: Call, fused: Fused) -> Iterator[Kernel]:
    """Return the kernels of a fused step: one, or more where batch axes cannot become three.

    Raises
    ------
    NotImplementedError
        It adds to what there is.
    """
    request, by = call.request, roles(operator, fused)
    settings = chosen(request, call.where)
    if settings is None or any(x.add for x in fused.launches):
        raise NotImplementedError(f"no fused kernel does {fused}")
    refs = operands(operator, request, fused)
    places, sizes = placed(call, refs, fused.launches[0])
    there = {name: x is not None for name, x in places.items()}
    T, (D, V) = request.tokens, (width(places[n]) for n in "kv")
    BD, BV = tile(D), tile(V)
    inner, outer = fused.launches[0].read, by["o"].read
    narrow = request.dtype == "bfloat16"
    _, operand, precision = multiplied(request, call.where, narrow=narrow)
    constants = {
        "KEYS": "y" in by, "VALUES": "u" in by, "POWER": by["o"].power,
        "GATE": GATES.index(request.gate),
        "SCALED": (inner, outer) != (1.0, 1.0), "SUMS": "den" in by,
        "NORM": fused.divide is not None, "X": there["x"],
        "DEN": there["den"], "ONE": there["one"], "Y": there["y"], "U": there["u"],
        "START": there["F"], "END": there["F'"],
        "BD": BD, "BV": BV, "W": settings.W, "WHOLE_D": BD == D, "WHOLE_V": BV == V,
        "OPERAND": operand, "PRECISION": precision,
    }  # fmt: skip
    batch = broadcast(*(x.batch for x in fused.launches))
    for counts, first, strides in heads(batch, places, request.gate == "log_gate"):
        yield Kernel(
            chain_kernel, (math.prod(counts),), first, sizes, inner, outer,
            fused.divide.eps if fused.divide else None, T, D, V, *counts[-2:],
            *(n for name, own in zip(places, strides, strict=True)
              for n in (own if name != "x" or there["x"] else [None] * 5)),
            **constants, num_warps=settings.warps, num_stages=settings.stages,
        )  # fmt: skip


KERNELS = {NAME.format(x): functools.partial(kernels, x) for x in ROLES}
