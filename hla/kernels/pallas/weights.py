"""Weights of a pass by its gate, chunk by chunk: a few vectors, made outside of the kernels.

With c_t the sum of the log gate over a chunk up to t and e_t the same without t itself where the
pass is strict, the weight of a pair is exp(e_t - c_j), of the state to a token exp(e_t), of a token
to the state exp(c_last - c_t). The reverse pass exchanges the last two and has the pair's turned.

A difference of sums must keep float32's digits whatever the gate; so a log gate is split into
multiples of 1/4, of 2^-14 and of 2^-32, the last rounded, whose sums over a chunk are exact: they
have the same bits in any order. What is less than -1024 is taken as that, a reset, which weighs 0:
-inf is never subtracted.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax import numpy as jnp

from ...device.elementwise import LEAST
from .chunk import ROWS, TOTAL, W

Array = Any
RESET = -1024.0
COARSE, FINE, LAST = 2.0**-2, 2.0**-14, 2.0**-32


def vectors(
    gate: Array, power: int, *, strict: bool, reverse: bool, read: float = 1.0, write: float = 1.0
) -> Array:
    """Return the weights (*batch, C, ROWS, W) of a log gate (*batch, C, W); see `chunk.SPAN`.

    What is read of the state and what is written to it have these factors, which cost nothing here.
    """
    a = jnp.clip(power * gate.astype(jnp.float32), RESET, -RESET)  # keeps a NaN
    whole = jnp.where(jnp.isnan(a), 0.0, jnp.round(a / FINE))
    coarse = jnp.floor(whole * (FINE / COARSE))
    parts = [coarse, whole - coarse * (COARSE / FINE), jnp.round((a - whole * FINE) / LAST)]
    # products with ones: of a constant gate XLA folds them fast, and cumulative sums slowly
    ones = jnp.triu(jnp.ones((W, W), jnp.float32))
    c = jnp.matmul(jnp.stack(parts), ones, precision=lax.Precision.HIGHEST)
    up = c - jnp.stack(parts) if strict else c
    last = c[..., -1:] - c

    def exp(x: Array) -> Array:  # a large exponent that is rounded would lose digits
        more = jnp.round(x[1] * (FINE / COARSE))
        rest = x[1] * FINE - more * COARSE + x[2] * LAST
        return jnp.exp((x[0] + more) * COARSE) * jnp.exp(rest)

    def exponents(x: Array) -> tuple[Array, Array]:
        return x[0] * COARSE, x[1] * FINE + x[2] * LAST

    columns, rows = exponents(up), exponents(-c)
    into, out = exp(up), exp(last)
    if reverse:
        columns, rows, into, out = rows, columns, out, into
    total = jnp.broadcast_to(exp(c[..., -1:]), into.shape)
    found = [columns[0], rows[0], columns[1], rows[1], read * into, write * out]
    return jnp.stack(found + [total] * (ROWS - TOTAL), axis=-2)


def of_decay(decay: Array, tokens: int, length: int) -> Array:
    """Return the log gate (*batch, length) of a decay, 0 behind so many tokens."""
    log = jnp.log(jnp.where(decay < LEAST, LEAST, decay).astype(jnp.float32))
    return jnp.where(jnp.arange(length) < tokens, log[..., None], 0.0)
