"""Weights of a pass by its gate, chunk by chunk: a few vectors, made outside of the kernels.

With c_t the sum of the log gate over a chunk up to t and e_t the same without t itself where the
pass is strict, the weight of a pair is exp(e_t - c_j), of the state to a token exp(e_t), of a token
to the state exp(c_last - c_t). The reverse pass exchanges the last two and has the pair's turned.

A difference of sums must keep float32's digits whatever the gate; so a log gate is split into
multiples of 2^-14, which int32 adds without an error, and a rest below 2^-15. What is less than
-1024 is taken as that, a reset, which weighs 0: -inf is never subtracted.
"""

from __future__ import annotations

from typing import Any

from jax import numpy as jnp

from ...device.elementwise import LEAST
from .chunk import ROWS, TOTAL

Array = Any
RESET = -1024.0
UNIT = 2.0**-14
COARSE = 4096  # units that a float32 adds without an error


def vectors(gate: Array, power: int, *, strict: bool, reverse: bool) -> Array:
    """Return the weights (*batch, C, ROWS, W) of a log gate (*batch, C, W); see `chunk.SPAN`."""
    a = jnp.clip(power * gate.astype(jnp.float32), RESET, -RESET)  # keeps a NaN
    whole = jnp.where(jnp.isnan(a), 0.0, jnp.round(a / UNIT)).astype(jnp.int32)
    rest = a - whole.astype(jnp.float32) * UNIT
    c, d = (jnp.cumsum(x, axis=-1, dtype=x.dtype) for x in (whole, rest))
    up = (c - whole, d - rest) if strict else (c, d)
    last = c[..., -1:] - c, d[..., -1:] - d

    def exp(x: tuple[Array, Array]) -> Array:
        return jnp.exp(x[0].astype(jnp.float32) * UNIT + x[1])

    def split(x: tuple[Array, Array], sign: int) -> tuple[Array, Array]:
        coarse = x[0] // COARSE
        fine = (x[0] - coarse * COARSE).astype(jnp.float32) * UNIT + x[1]
        return sign * coarse.astype(jnp.float32) * (COARSE * UNIT), sign * fine

    later, earlier = split(up, 1), split((c, d), -1)
    columns, rows = (earlier, later) if reverse else (later, earlier)
    into, out = (exp(last), exp(up)) if reverse else (exp(up), exp(last))
    total = jnp.broadcast_to(exp((c[..., -1:], d[..., -1:])), into.shape)
    found = [columns[0], rows[0], columns[1], rows[1], into, out]
    found += [total] * (ROWS - TOTAL)
    return jnp.stack(found, axis=-2)


def of_decay(decay: Array, tokens: int, length: int) -> Array:
    """Return the log gate (*batch, length) of a decay, 0 behind so many tokens."""
    log = jnp.log(jnp.where(decay < LEAST, LEAST, decay).astype(jnp.float32))
    return jnp.where(jnp.arange(length) < tokens, log[..., None], 0.0)
