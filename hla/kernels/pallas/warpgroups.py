"""What kernels of warpgroups on Hopper share, in Pallas Mosaic GPU: tiles, products, weights.

A chunk of W tokens lies in shared memory as rows of 64 or 128 columns, zero where there are none:
copies fill what is outside of an array. States are held transposed, [V, D], as halves of 64 rows.

The weights of a gate lie beside a chunk as lists of float32 (`listed`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, vector

from ...device.elementwise import LEAST
from .ordered import ordered

Array = Any
W = 64  # tokens in a chunk
HALF = 64  # rows of a state that are held together
WIDEST = 128  # columns of a tile
OWNER, MOVER = 240, 24  # registers of a thread
RESET = -160.0  # log2 of what a gate of less than any float32 becomes
LOG2E = 1.4426950408889634
BF16, F32 = jnp.bfloat16, jnp.float32
ACC, WGMMA = plgpu.ACC, plgpu.Layout.WGMMA
_IDX = inspect.signature(plgpu.load).parameters.get("idx")  # which JAX 0.12 has no more
WHOLE = ((),) if _IDX and _IDX.default is _IDX.empty else ()  # and before 0.11 it is needed
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


def leave(ref: Any, x: Array) -> None:
    """Store registers to memory, also by half sectors, which JAX 0.12 must be told."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def put_turned(ref: Any, x: Array) -> None:
    """Leave the transpose of x, [64, W], in columns of a tile of W rows."""
    turned(ref)[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def taken_turned(ref: Any) -> Array:
    """Return the transpose of columns of a tile as an operand from registers, [64, W]."""
    x = loaded(turned(ref), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(x, WGMMA)


def _registers(x: Any) -> list[list[list[Any]]]:
    """Return what a thread has of [64, n], float32: by 8 columns, 8 rows, and two columns."""
    found = x.registers.reshape(-1, 2)
    if x.mlir_dtype != ir.F32Type.get():
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        found = [[arith.extf(pair, v) for v in y] for y in found]
    return [[[vector.extract(v, [], [n]) for n in (0, 1)] for v in y] for y in found]


def _zero() -> Any:
    """Return 0."""
    return arith.constant(ir.F32Type.get(), 0.0)


def _added_rows(a: Any, b: Any, to: list[Any]) -> list[Any]:
    """Return two rows' sums of a * b, added to others, of two chains each."""
    found = []
    for i in (0, 1):
        chains = [to[i], _zero()]
        for x, y in zip(a, b, strict=True):
            chains = [math.fma(u, v, s) for u, v, s in zip(x[i], y[i], chains, strict=True)]
        found.append(arith.addf(*chains))
    return found


def _columns(a: Any, b: Any) -> list[Any]:
    """Return columns' sums of a * b over the two rows that a thread has."""
    return [
        math.fma(x[1][n], y[1][n], arith.mulf(x[0][n], y[0][n]))
        for x, y in zip(a, b, strict=True) for n in (0, 1)
    ]  # fmt: skip


def _thread() -> tuple[Any, Any, Callable[[int], Any]]:
    """Return a thread's warp in its warpgroup, its place in the warp, and what makes constants."""
    i32, thread = ir.IntegerType.get_signless(32), mgpu.utils.thread_idx()
    number = lambda n: arith.constant(i32, n)  # noqa: E731
    warp = arith.remui(arith.divui(thread, number(32)), number(4))
    return warp, arith.remui(thread, number(32)), number


def _is(a: Any, b: Any) -> Any:
    """Whether two numbers are equal."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


# What a thread has of sums of rows and of columns of a tile: only the functions below read them
BY_ROW, BY_COLUMN, GATHERED, HALVED = (W, 4), (32, W), (4, W), (2, W)


def sums_of(shape: tuple[int, int]) -> Any:
    """Return the type of sums in registers."""
    return plgpu.ShapeDtypeStruct(shape, F32, layout=plgpu.Layout.WG_STRIDED(shape, 1))


def _numbers(x: Any) -> list[Any]:
    """Return the numbers that a thread has of sums."""
    return [vector.extract(v, [], [0]) for v in x.registers]


def _made(shape: tuple[int, int], numbers: Sequence[Any]) -> Any:
    """Return sums of a thread's numbers, each a register of its own: pairs would stay pairs."""
    one = ir.VectorType.get((1,), ir.F32Type.get())
    found = np.array([vector.broadcast(one, x) for x in numbers], dtype=object)
    layout = mgpu.WGStridedFragLayout(shape, 1)
    return mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=None)


def by_row(a: Array, b: Array, to: Array | None = None) -> Array:
    """Return the sums of the rows of a * b, [64, n], added to others."""
    given = [] if to is None else [to]

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, *[sums_of(BY_ROW).layout] * len(given)),
        return_type=sums_of(BY_ROW),
    )
    def go(_: Any, a: Any, b: Any, *to: Any) -> Any:
        found = _numbers(to[0]) if to else [_zero()] * 2
        return _made(BY_ROW, _added_rows(_registers(a), _registers(b), found))

    return go(a, b, *given)


def by_column(a: Array, b: Array, to: Array | None = None, factor: float = 1.0) -> Array:
    """Return the sums of the columns of a * b, [64, W], times a factor added to others."""
    given = [] if to is None else [to]

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, *[sums_of(BY_COLUMN).layout] * len(given)),
        return_type=sums_of(BY_COLUMN),
    )
    def go(_: Any, a: Any, b: Any, *to: Any) -> Any:
        found = _columns(_registers(a), _registers(b))
        if to:
            f = arith.constant(ir.F32Type.get(), factor)
            found = [math.fma(f, x, s) for x, s in zip(found, _numbers(to[0]), strict=True)]
        return _made(BY_COLUMN, found)

    return go(a, b, *given)


def of_pairs(a: Array, b: Array) -> tuple[Array, Array]:
    """Return sums of the rows and of the columns of the products of two tiles of pairs.

    Those of a token with itself are not in them.
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA), return_type=(sums_of(BY_ROW), sums_of(BY_COLUMN)))
    def go(_: Any, a: Any, b: Any) -> Any:
        warp, lane, number = _thread()
        quad, place = (
            arith.divui(lane, number(4)),
            arith.muli(arith.remui(lane, number(4)), number(2)),
        )
        own = [_is(quad, arith.addi(place, number(n))) for n in (0, 1)]
        a, b = _registers(a), _registers(b)
        for j in range(W // 8):
            mine = _is(warp, number(j // 2))  # has the tokens of these columns as its rows
            b[j][j % 2] = [arith.select(arith.andi(mine, z), _zero(), e)
                           for z, e in zip(own, b[j][j % 2], strict=True)]  # fmt: skip
        rows = _added_rows(a, b, [_zero()] * 2)
        return _made(BY_ROW, rows), _made(BY_COLUMN, _columns(a, b))

    return go(a, b)


def halved(x: Array) -> Array:
    """Return sums of two rows, each left to one of two threads that have parts of both.

    So a thread has one number of them: they lie in shared memory until the kernel needs them, as
    two registers held meanwhile spill many others.
    """

    @plgpu.inline_mgpu(arg_types=(sums_of(BY_ROW).layout,), return_type=sums_of(HALVED))
    def go(_: Any, x: Any) -> Any:
        _, lane, number = _thread()
        even = _is(arith.andi(lane, number(1)), number(0))
        a, b = _numbers(x)
        other = mgpu.utils.shfl_bfly(arith.select(even, b, a), 1)
        return _made(HALVED, [arith.addf(arith.select(even, a, b), other)])

    return go(x)


def with_halved(x: Array, own: Array) -> Array:
    """Return sums of rows with those that were halved."""

    @plgpu.inline_mgpu(
        arg_types=(sums_of(BY_ROW).layout, sums_of(HALVED).layout), return_type=sums_of(BY_ROW)
    )
    def go(_: Any, x: Any, own: Any) -> Any:
        _, lane, number = _thread()
        even = _is(arith.andi(lane, number(1)), number(0))
        (a, b), (c,) = _numbers(x), _numbers(own)
        return _made(BY_ROW, [
            arith.select(even, arith.addf(a, c), a), arith.select(even, b, arith.addf(b, c))
        ])  # fmt: skip

    return go(x, own)


def gathered(x: Array) -> Array:
    """Return the sums of columns over all rows of a warp, [4, W].

    They meet in three rounds, in each of which a thread keeps half of its columns and gives the
    others away, so that at last it has two of them.
    """

    @plgpu.inline_mgpu(arg_types=(sums_of(BY_COLUMN).layout,), return_type=sums_of(GATHERED))
    def go(_: Any, x: Any) -> Any:
        _, lane, number = _thread()
        sums = _numbers(x)
        for stride in (16, 8, 4):
            near = _is(arith.andi(lane, number(stride)), number(0))
            pairs = list(zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True))
            given = [mgpu.utils.shfl_bfly(arith.select(near, b, a), stride) for a, b in pairs]
            sums = [arith.addf(arith.select(near, a, b), x)
                    for (a, b), x in zip(pairs, given, strict=True)]  # fmt: skip
        return _made(GATHERED, sums)

    return go(x)


def leave_columns(to: Any, x: Array) -> None:
    """Store what is `gathered` to memory, [4, W], of each warp's rows."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), sums_of(GATHERED).layout))
    def go(_: Any, to: Any, x: Any) -> None:
        warp, lane, number = _thread()
        at = warp, arith.muli(lane, number(2))
        both = vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), _numbers(x))
        vector.store(both, to, [arith.index_cast(ir.IndexType.get(), n) for n in at])

    go(to, x)


def leave_rows(to: Any, x: Array) -> None:
    """Store sums of rows to memory, [4, W], of each of the four threads that have a row."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), sums_of(BY_ROW).layout))
    def go(_: Any, to: Any, x: Any) -> None:
        warp, lane, number = _thread()
        row = arith.addi(arith.muli(warp, number(16)), arith.divui(lane, number(4)))
        for i, one in enumerate(x.registers):
            at = arith.remui(lane, number(4)), arith.addi(row, number(8 * i))
            vector.store(one, to, [arith.index_cast(ir.IndexType.get(), n) for n in at])

    go(to, x)


def places() -> tuple[Array, Array]:
    """Return the places of tokens along the rows and the columns of a tile of pairs.

    Each is made along its own axis: a quarter of the code, and registers that the kernels lack.
    """

    def along(axis: int) -> Array:
        x = plgpu.broadcasted_iota(jnp.int32, (W,), 0, layout=WGMMA.reduce(1 - axis))
        return lax.broadcast_in_dim(x, (W, W), (axis,))

    return along(0), along(1)


def legal(x: Array, *, upper: bool) -> Array:
    """Return pairs, bfloat16, without those whose row is later (not ``upper``: earlier)."""
    row, column = places()
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


def weighed(x: Array, weights: Weights | None, *, upper: bool) -> Array:
    """Return the legal ones of pairs, weighed, [W, W], bfloat16."""
    return legal(x if weights is None else x * weights.pairs(upper=upper), upper=upper)


def pairs(a: Any, b: Any, weights: Weights | None, *, upper: bool) -> Array:
    """Return the legal pairs of a b', weighed, [W, W], bfloat16."""
    return weighed(product(W, W, (a, turned(b))), weights, upper=upper)


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
        c = ordered.cumulative_sum(a.reshape(*a.shape[:-1], chunks, W))
    lists = jnp.stack([c, jnp.exp2(c[..., -1:] - c)], axis=-2)
    return lists.reshape(*lists.shape[:-3], -1, W)
