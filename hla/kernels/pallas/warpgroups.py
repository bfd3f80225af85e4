"""What kernels of warpgroups on Hopper share, in Pallas Mosaic GPU: tiles, products, weights.

A chunk of W tokens lies in shared memory as rows of 64 or 128 columns, zero where there are none:
copies fill what is outside of an array. States are held transposed, [V, D], as halves of 64 rows.

A gate comes as one list of float32 a chunk: log2 of the product of its gates up to each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...core.passes import Shape
from ...device.elementwise import LEAST

Array = Any
W = 64  # tokens in a chunk
HALF = 64  # rows of a state that are held together
WIDEST = 128  # columns of a tile
RESET = -160.0  # log2 of what a gate of less than any float32 becomes
LOG2E = 1.4426950408889634
BF16, F32 = jnp.bfloat16, jnp.float32
ACC, WGMMA = plgpu.ACC, plgpu.Layout.WGMMA
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROW, COLUMN = 0, 1  # which axis of a tile tokens are on


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


def put_turned(ref: Any, x: Array) -> None:
    """Leave the transpose of x, [64, W], in columns of a tile of W rows."""
    turned(ref)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def taken_turned(ref: Any) -> Array:
    """Return the transpose of columns of a tile as an operand from registers, [64, W]."""
    x = plgpu.load(turned(ref), layout=plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(x, WGMMA)


def legal(x: Array, *, upper: bool) -> Array:
    """Return pairs, bfloat16, without those whose row is later (not ``upper``: earlier)."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (W, W), i, layout=WGMMA) for i in (0, 1))
    return jnp.where(row <= column if upper else row >= column, x, 0.0).astype(BF16)


class Weights(NamedTuple):
    """Weights of a chunk in a pass: ``c`` its list in shared memory, ``power`` of the gate."""

    c: Any
    power: int

    def list(self, axis: int, rows: int) -> Array:
        """Return the list along an axis of a tile, [rows, W] or [W, rows]."""
        x = plgpu.load(self.c, layout=WGMMA.reduce(1 - axis))
        shape = (W, rows) if axis == ROW else (rows, W)
        x = lax.broadcast_in_dim(x, shape, (axis,))
        return x if self.power == 1 else x * float(self.power)

    def last(self) -> Array:
        """Return log2 of the product over the chunk."""
        return self.c[W - 1] * float(self.power)

    def pairs(self, *, upper: bool) -> Array:
        """Return the weights of pairs, inf where no pair is."""
        later, earlier = (COLUMN, ROW) if upper else (ROW, COLUMN)
        return jnp.exp2(self.list(later, W) - self.list(earlier, W))

    def before(self, axis: int, rows: int) -> Array:
        """Return what is left of a state at each token."""
        return jnp.exp2(self.list(axis, rows))

    def after(self, axis: int, rows: int) -> Array:
        """Return what is left of each token after the last."""
        return jnp.exp2(self.last() - self.list(axis, rows))

    def total(self) -> Array:
        """Return what is left of a state after the last token."""
        return jnp.exp2(self.last())


def pairs(a: Any, b: Any, weights: Weights | None, *, upper: bool) -> Array:
    """Return the legal pairs of a b', weighed, [W, W]."""
    x = product(W, W, (a, turned(b)))
    if weights is not None:
        x = x * weights.pairs(upper=upper)
    return legal(x, upper=upper)


def sums(gate: Array, kind: str, tokens: int) -> Array:
    """Return the lists of a gate: of a decay those of a whole chunk and of the last one.

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
        counts = jnp.concatenate([t, jnp.minimum(t, rest)])
        return jnp.log2(g)[..., None] * counts
    a = gate.astype(F32) * LOG2E
    a = jnp.where(a < RESET, RESET, a)  # not maximum: a NaN stays
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, chunks * W - tokens)])
    c = jnp.cumsum(a.reshape(*a.shape[:-1], chunks, W), axis=-1)
    return c.reshape(a.shape)


class Place(NamedTuple):
    """Which entry of an array a program reads: one of its batch, of ``axis`` tokens are."""

    heads: tuple[Array, ...]  # by batch axis
    batch: Shape
    axis: int = -2

    def entry(self, ref: Any, rank: int) -> tuple[Array, ...]:
        """Return the index of an array with so many own axes; it is broadcast over the rest."""
        lead = len(ref.shape) - rank
        if rank == 2 and self.axis == -3 and lead:
            sizes = (*ref.shape[: lead - 1], ref.shape[-2])
        else:
            sizes = ref.shape[:lead]
        own = self.heads[len(self.heads) - lead :]
        return tuple(i if n > 1 else i32(0) for i, n in zip(own, sizes, strict=True))

    def rows(self, ref: Any, first: Array, cols: Any = None) -> Any:
        """Return W rows of an array of tokens, (*batch, T, D) in the order of its memory."""
        entry, cols = self.entry(ref, 2), [] if cols is None else [cols]
        if self.axis == -3 and entry:
            return ref.at[(*entry[:-1], pl.ds(first, W), entry[-1], *cols)]
        return ref.at[(*entry, pl.ds(first, W), *cols)]

    def first(self, ref: Any, rank: int) -> Array:
        """Whether a program is the first of those that share an array."""
        entry = self.entry(ref, rank)
        shared = [i for i, n in zip(self.heads, self.batch, strict=True) if n > 1]
        own = {id(i) for i in entry}
        there = [i == 0 for i in shared if id(i) not in own]
        found = i32(0) == 0
        for x in there:
            found = jnp.logical_and(found, x)
        return found


def heads(batch: Shape, i: Array) -> tuple[Array, ...]:
    """Return the places along batch axes of the i-th entry, the last axis fastest."""
    found = []
    for n in reversed(batch):
        found.append(lax.rem(i, i32(n)) if n > 1 else i32(0))
        i = lax.div(i, i32(n)) if n > 1 else i
    return tuple(reversed(found))


def launched(
    body: Callable[..., None],
    outs: Sequence[jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    programs: int,
    threads: int,
) -> Callable[..., Any]:
    """Return a kernel of so many programs and warpgroups.

    Its last input is one int32 of 0. Carried round loops as z = z & i, and used to index buffers of
    a fixed place, it keeps the compiler from moving their addresses out of loops into registers.
    """
    call = plgpu.kernel(
        body, out_type=list(outs), scratch_types=scratch, grid=(programs,), grid_names=("head",),
        num_threads=threads, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=512,
        ),
    )  # fmt: skip
    return lambda *x: call(*x, jnp.zeros((1,), jnp.int32))


def wide(x: int) -> int:
    """Return the columns of the tile that holds so many."""
    return HALF if x <= HALF else WIDEST


def laid(x: Array, axis: int, width: int) -> Array:
    """Return an array of tokens (*batch, T, D) in the order of memory, where copies can read it.

    The transpose cancels that of the caller. Copies go by tiles of 8 tokens and 64 columns: where
    these do not divide an array, there is a padded copy of it.
    """
    T, D = x.shape[-2:]
    if T % 8 or width != D:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -T % 8), (0, width - D)])
    return jnp.swapaxes(x, -3, -2) if axis == -3 and x.ndim > 2 else x


def out_shape(lead: Shape, tokens: int, width: int, axis: int, dtype: Any = BF16) -> Any:
    """Return the type of an array of tokens that a kernel makes, in the order of memory."""
    T = tokens + (-tokens % 8 if dtype == BF16 else -tokens % W)
    shape = (*lead[:-1], T, lead[-1], width) if axis == -3 and lead else (*lead, T, width)
    return jax.ShapeDtypeStruct(shape, dtype)


def cut(x: Array, tokens: int, width: int, axis: int) -> Array:
    """Return what a kernel made, (*batch, T, D), without what is padded."""
    x = jnp.swapaxes(x, -3, -2) if axis == -3 and x.ndim > 2 else x
    return x[..., :tokens, :width] if x.shape[-2:] != (tokens, width) else x


def state_in(x: Array, keys: int, values: int) -> Array:
    """Return a state (*batch, D, V) as kernels hold it, [V, D] and padded."""
    D, V = x.shape[-2:]
    more = [(0, 0)] * (x.ndim - 2) + [(0, values - V), (0, keys - D)]
    return jnp.pad(jnp.swapaxes(x, -1, -2).astype(F32), more)


def state_out(x: Array, D: int, V: int) -> Array:
    """Return a state (*batch, D, V) that a kernel left."""
    return jnp.swapaxes(x[..., :V, :D], -1, -2)


def entries(batch: Shape) -> int:
    """Return how many heads there are."""
    return math.prod(batch)
