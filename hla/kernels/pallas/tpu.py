"""The causal pass as a Pallas kernel for TPUs, which the interpreter runs on the host.

A grid of (heads, chunks), the chunks one after the other, with the state in VMEM scratch. Right
where it is interpreted, with checks for races; it was never timed on a TPU. Bytes a token and head,
D = V = 128, bfloat16: q, k, v and o once, 1024, and 32 of a gate's weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...core.passes import Shape
from .chunk import ROWS, W, Work, chunk
from .sweep import OWN, Found, Operands, Plain, entry, varying, weights_of

Array = Any


def specs(p: Work, batch: Shape, given: Operands, C: int) -> tuple[dict[str, Any], ...]:
    """Return arrays of one batch axis, and their blocks by (head, chunk), by name."""
    arrays, blocks = {}, {}

    def place(c: Any) -> Any:
        return C - 1 - c if p.reverse else c

    for name, x, own in zip(Operands._fields, given, OWN, strict=True):
        if x is None:
            continue
        lead, tail = x.shape[: x.ndim - own], x.shape[x.ndim - own :]
        at = entry(batch, lead)
        arrays[name] = jnp.reshape(x, (math.prod(lead), *tail))
        block: Any = (1, W, tail[-1]), lambda i, c, at=at: (at(i), place(c), 0)
        if name == "start":
            block = (1, *tail), lambda i, c, at=at: (at(i), 0, 0)
        elif name == "gate":
            block = (
                (1, 1, ROWS, W),
                lambda i, c, at=at, n=tail[0]: (at(i), weights_of(n, C, place(c)), 0, 0),
            )
        blocks[name] = pl.BlockSpec(*block)
    return arrays, blocks


def outputs(p: Work, n: int, C: int) -> dict[str, tuple[Any, Any]]:
    """Return shape and blocks of what a launch leaves, by name."""

    def place(c: Any) -> Any:
        return C - 1 - c if p.reverse else c

    def at_period(i: Any, c: Any) -> Any:
        return i, lax.div(place(c), jnp.int32(p.period)), 0, 0

    found: dict[str, Any] = {}
    if p.reads:
        found["o"] = (n, C * W, p.V), p.out, (1, W, p.V), lambda i, c: (i, place(c), 0)
    if p.sums:
        block = 1, 1, p.sums, W
        found["sums"] = (n, C, p.sums, W), "float32", block, lambda i, c: (i, place(c), 0, 0)
    if p.period:
        shape, block = (n, -(-C // p.period), p.V, p.D), (1, 1, p.V, p.D)
        found["kept"] = shape, "float32", block, at_period
    if p.end:
        found["end"] = (n, p.V, p.D), "float32", (1, p.V, p.D), lambda i, c: (i, 0, 0)
    return {
        name: ((shape, jnp.dtype(dtype)), pl.BlockSpec(block, at))
        for name, (shape, dtype, block, at) in found.items()
    }


def tpu(p: Work, batch: Shape, given: Operands, interpret: Any = False) -> Found:
    """Do a launch."""
    n, C = math.prod(batch), given.k.shape[-2] // W
    arrays, blocks = specs(p, batch, given, C)
    outs = outputs(p, n, C)

    def body(*refs: Any) -> None:
        own = dict(zip([*arrays, *outs, "S"], refs, strict=True))
        c, S = pl.program_id(1), own["S"]

        @pl.when(c == 0)
        def _() -> None:
            S[...] = own["start"][0] if p.start else jnp.zeros(S.shape, jnp.float32)

        m = Plain(p, own["gate"][0, 0] if p.gated else None)
        q, k, v, x = (m.operand(own[n][0]) if n in own else None for n in ("q", "k", "v", "x"))
        before = S[...]
        found = chunk(m, p, q, k, v, x, before)
        S[...] = found.S
        if p.reads:
            own["o"][0] = found.o.T.astype(p.out)
        for i, x in enumerate(found.sums):
            own["sums"][0, 0, i, :] = x
        if p.period:
            at = C - 1 - c if p.reverse else c

            @pl.when(lax.rem(at, jnp.int32(p.period)) == 0)
            def _() -> None:
                own["kept"][0, 0] = found.S if p.reverse else before

        if p.end:

            @pl.when(c == C - 1)
            def _() -> None:
                own["end"][0] = found.S

    found = pl.pallas_call(
        body,
        out_shape=[varying(*shape, given) for shape, _ in outs.values()],
        grid=(n, C),
        in_specs=list(blocks.values()),
        out_specs=[block for _, block in outs.values()],
        scratch_shapes=[pltpu.VMEM((p.V, p.D), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(*arrays.values())
    made = dict(zip(outs, found, strict=True))
    if p.sums:
        made["sums"] = jnp.reshape(jnp.moveaxis(made["sums"], 1, 2), (n, 1, p.sums, C * W))
    shaped = {name: jnp.reshape(x, (*batch, *x.shape[1:])) for name, x in made.items()}
    return Found(**dict.fromkeys(Found._fields) | shaped)


interpreted = functools.partial(tpu, interpret=True)
