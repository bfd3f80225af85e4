"""Launches of the forward with all states of a head in one block of threads, from sm_80 on."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ...core.passes import broadcast
from ...core.request import Request
from ...device.scan import Call
from ...device.steps import Fused, Row
from . import hopper
from .hopper import HALF, OPERATORS
from .launch import PAD, WIDEST, Card, Constants, Kernel, Load

NAME = "{} in one block"
SIZES = ((32, 5), (32, 4), (16, 6), (16, 4))  # tokens of a chunk, chunks in shared memory


def rows(request: Request, card: Card) -> tuple[Row, ...]:
    """Return the fused rows of a request."""
    steps = hopper.steps(request)
    fits = steps and memory(request.operator, *SIZES[-1], WIDEST) <= card.shared
    return (Row(NAME.format(request.operator), steps, segments=True),) if fits else ()


def memory(operator: str, W: int, stages: int, B: int) -> int:
    """Bytes of shared memory, as fused.cu lays them out, with a gate."""
    tiles = 3 * stages + (5 if operator == "hla3" else 3)
    return tiles * W * (B + PAD) * 2 + 4 * W * (W + PAD) * 2 + 3 * (12 * W + 16)


def kernels(operator: str, load: Load, call: Call, fused: Fused) -> Iterator[Kernel]:
    """Return the kernels of a fused step: one, or more where batch axes cannot become three.

    Raises
    ------
    NotImplementedError
        It adds to what there is, or weighs what it writes.
    """
    refs, dtypes, D, V = hopper.given(operator, call, fused)
    launches = fused.launches
    found = hopper.settings(operator, refs, dtypes, D, V, call.request.gate)
    fixed = settings(operator, found, D, V, call.where)
    B, hla3 = fixed["B"], operator == "hla3"
    warps = B // 32 + (4 if hla3 else B // 32)
    yield from hopper.sweeps(
        load, call, "fused.cu", broadcast(*(x.batch for x in launches)), refs, D, V,
        [x.read for x in launches], launches[0], fixed, threads=32 * warps,
        tiles=-(-V // HALF) if hla3 else 1,
    )  # fmt: skip


def settings(operator: str, found: Constants, D: int, V: int, card: Card) -> Constants:
    """Return the constants of a kernel from those of Hopper's."""
    hla3 = operator == "hla3"
    B = found["BD"] if hla3 else max(found["BD"], found["BV"])
    sizes = ((*size, memory(operator, *size, B)) for size in SIZES)
    W, stages, shared = next(x for x in sizes if x[2] <= card.shared)
    own = {"B": B, "W": W, "STAGES": stages, "SHARED_BYTES": shared}
    own["WHOLE"] = int(D == B and V % (HALF if hla3 else B) == 0)
    kept = ("OPERATOR", "GATE", "READ", "WIDE", "KEEP", "KEEP_U")
    return {name: found[name] for name in kept} | own


KERNELS = {NAME.format(x): functools.partial(kernels, x) for x in OPERATORS}
