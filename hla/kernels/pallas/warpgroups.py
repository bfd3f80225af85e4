"""What kernels of warpgroups on Hopper share, in Pallas Mosaic GPU: tiles, products, weights.

A chunk of W tokens lies in shared memory as rows of 64 or 128 columns, zero where there are none:
copies fill what is outside of an array. States are held transposed, [V, D], as halves of 64 rows.

The weights of a gate lie beside a chunk as lists of float32 (`listed`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...device.elementwise import LEAST

Array = Any
W = 64  # tokens in a chunk
HALF = 64  # rows of a state that are held together
WIDEST = 128  # columns of a tile
OWNER, MOVER = 240, 24  # registers of a thread
RESET = -160.0  # log2 of what a gate of less than any float32 becomes
LOG2E = 1.4426950408889634
BF16, F32 = jnp.bfloat16, jnp.float32
ACC, WGMMA = plgpu.ACC, plgpu.Layout.WGMMA
_IDX = inspect.signature(plgpu.load).parameters["idx"].default
WHOLE = ((),) if _IDX is inspect.Parameter.empty else ()  # `plgpu.load` before JAX 0.11 needs it
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROW, COLUMN = 0, 1  # which axis of a tile tokens are on
UNTIL, AFTER, LISTS = range(3)  # of a chunk's weights, and how many there are


def i32(x: int) -> Array:
    """Return a constant that x64 mode leaves alone."""
    return jnp.array(x, jnp.int32)


def tile(*shape: int) -> Any:
    """Return the type of shared memory that products read."""
    return plgpu.SMEM(shape, BF16, transforms=TILED)


def barrier(count: int, arrivals: int = 1) -> Any:
    """Return the type of so many barriers."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def turned(ref: Any) -> Any:
    """Return the transpose of a tile."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def columns(half: int) -> Any:
    """Return the columns of one half."""
    return pl.ds(HALF * half, HALF)


def zeros(*shape: int) -> Array:
    """Return an empty state."""
    return plgpu.layout_cast(jnp.full(shape, 0, F32), WGMMA)


def product(m: int, n: int, *pairs: tuple[Any, Any]) -> Array:
    """Return the sum of a b over pairs."""

    def go(acc: Any) -> Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(go, ACC((m, n), F32))


def added(states: Sequence[Array], *pairs: Sequence[tuple[Any, Any]]) -> tuple[Array, ...]:
    """Return states, to each of which the sum of a b over its pairs is added."""

    def go(accs: Any) -> None:
        for acc, own in zip(accs, pairs, strict=True):
            for a, b in own:
                plgpu.wgmma(acc, a, b)

    return tuple(pl.run_state(go)(tuple(ACC.init(x) for x in states)))


def loaded(ref: Any, layout: Any, *, optimized: bool = True) -> Array:
    """Return what a reference means, in registers of a layout."""
    return plgpu.load(ref, *WHOLE, layout=layout, optimized=optimized)


def put_turned(ref: Any, x: Array) -> None:
    """Leave the transpose of x, [64, W], in columns of a tile of W rows."""
    turned(ref)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def taken_turned(ref: Any) -> Array:
    """Return the transpose of columns of a tile as an operand from registers, [64, W]."""
    x = loaded(turned(ref), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(x, WGMMA)


def legal(x: Array, *, upper: bool) -> Array:
    """Return pairs, bfloat16, without those whose row is later (not ``upper``: earlier)."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (W, W), i, layout=WGMMA) for i in (0, 1))
    return jnp.where(row <= column if upper else row >= column, x, 0.0).astype(BF16)


def raised(x: Array, power: int) -> Array:
    """Return the first, second or third power."""
    return x if power == 1 else x * x if power == 2 else x * x * x


class Weights(NamedTuple):
    """Weights of a chunk in a pass: ``lists`` of `listed`, of the power 1, and that of the pass."""

    lists: Any
    power: int

    def along(self, row: int, axis: int, n: int) -> Array:
        """Return a list along an axis of a tile, [n, W] or [W, n]."""
        x = loaded(self.lists.at[row], WGMMA.reduce(1 - axis))
        return lax.broadcast_in_dim(x, (W, n) if axis == ROW else (n, W), (axis,))

    def pairs(self, *, upper: bool) -> Array:
        """Return the weights of pairs, inf where no pair is."""
        later, earlier = (COLUMN, ROW) if upper else (ROW, COLUMN)
        x = self.along(UNTIL, later, W) - self.along(UNTIL, earlier, W)
        return jnp.exp2(x if self.power == 1 else x * float(self.power))

    def before(self, axis: int, n: int) -> Array:
        """Return what is left of a state at each token."""
        return raised(jnp.exp2(self.along(UNTIL, axis, n)), self.power)

    def after(self, axis: int, n: int) -> Array:
        """Return what is left of each token after the last."""
        return raised(self.along(AFTER, axis, n), self.power)

    def total(self) -> Array:
        """Return what is left of a state after the last token."""
        return raised(jnp.exp2(self.lists[UNTIL, W - 1]), self.power)


def pairs(a: Any, b: Any, weights: Weights | None, *, upper: bool) -> Array:
    """Return the legal pairs of a b', weighed, [W, W]."""
    x = product(W, W, (a, turned(b)))
    if weights is not None:
        x = x * weights.pairs(upper=upper)
    return legal(x, upper=upper)


def listed(gate: Array, kind: str, tokens: int) -> Array:
    """Return the weights of chunks, (*batch, chunks * LISTS, W), of a decay those of two.

    Lists are log2 of the product of gates up to a token, and the product behind it. A decay's are
    those of a whole chunk and of the last one.

    Parameters
    ----------
    gate : array
        A decay (*batch) or a log gate (*batch, T).
    kind : str
        Which of them.
    tokens : int
        T.
    """
    chunks = -(-tokens // W)
    if kind == "decay":
        g = jnp.where(gate < LEAST, LEAST, gate).astype(F32)
        t = jnp.arange(1, W + 1, dtype=F32)
        rest = float(tokens - (chunks - 1) * W)
        c = jnp.log2(g)[..., None, None] * jnp.stack([t, jnp.minimum(t, rest)])
    else:
        a = gate.astype(F32) * LOG2E
        a = jnp.where(a < RESET, RESET, a)  # not maximum: a NaN stays
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, chunks * W - tokens)])
        c = jnp.cumsum(a.reshape(*a.shape[:-1], chunks, W), axis=-1)
    lists = jnp.stack([c, jnp.exp2(c[..., -1:] - c)], axis=-2)
    return lists.reshape(*lists.shape[:-3], -1, W)
