"""Arrays in and out of kernels of warpgroups: places of heads, rings of chunks, states, layouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...core.passes import Shape
from .lowering import alone
from .sweep import varying
from .warpgroups import (
    BF16,
    F32,
    HALF,
    LISTS,
    WGMMA,
    WIDEST,
    Array,
    W,
    Weights,
    columns,
    i32,
    loaded,
    zeros,
)  # fmt: skip


class Place(NamedTuple):
    """Which entry of an array a program reads: one of its batch, of ``axis`` tokens are."""

    heads: tuple[Array, ...]  # by batch axis
    batch: Shape
    axis: int = -2

    def entry(self, ref: Any, rank: int, axis: int = -2) -> tuple[Array, ...]:
        """Return the index of an array with so many own axes; it is broadcast over the rest."""
        lead = len(ref.shape) - rank
        sizes = ref.shape[:lead]
        if axis == -3 and lead:
            sizes = (*ref.shape[: lead - 1], ref.shape[-2])
        own = self.heads[len(self.heads) - lead :]
        return tuple(i if n > 1 else i32(0) for i, n in zip(own, sizes, strict=True))

    def rows(self, ref: Any, first: Array, cols: Any = None) -> Any:
        """Return W rows of an array of tokens, (*batch, T, D) in the order of its memory."""
        entry, cols = self.entry(ref, 2, self.axis), [] if cols is None else [cols]
        if self.axis == -3 and entry:
            return ref.at[(*entry[:-1], pl.ds(first, W), entry[-1], *cols)]
        return ref.at[(*entry, pl.ds(first, W), *cols)]

    def first(self, ref: Any, rank: int, axis: int = -2) -> Array:
        """Whether a program is the first of those that share an array."""
        entry = self.entry(ref, rank, axis)
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
    over: int | None = None,
) -> Callable[..., Any]:
    """Return a kernel of so many programs and warpgroups; its first result lies ``over`` an array.

    Its last input is one int32 of 0. Carried round loops as z = z & i, and used to index buffers of
    a fixed place, it keeps the compiler from moving their addresses out of loops into registers.
    """
    params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True,
        approx_math=True, reduction_scratch_bytes=0,  # sums cross no warps
    )  # fmt: skip
    mesh = {"grid": (programs,), "grid_names": ("head",), "num_threads": threads}
    mesh["thread_name"] = "warpgroup"
    if over is not None:
        call = _replaced(body, outs, scratch, plgpu.Mesh(**mesh), params, over)
    else:
        call = plgpu.kernel(
            body, out_type=list(outs), scratch_types=scratch, compiler_params=params, **mesh
        )
    return lambda *x: call(*x, jnp.zeros((1,), jnp.int32))


def _replaced(
    body: Callable[..., None],
    outs: Sequence[jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    mesh: Any,
    params: Any,
    over: int,
) -> Callable[..., Any]:
    """Return a kernel whose first result lies where its array of that number does.

    XLA has a reference's last value where the first one was; no transform sees the reference.
    """

    def scoped(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **scratch)

    def run(*given: Array) -> list[Array]:
        refs = [*given]
        refs[over] = jax.new_ref(given[over])
        types = [varying(x.shape, x.dtype, given) for x in outs]
        rest = pl.kernel(scoped, out_type=types, mesh=mesh, compiler_params=params)(*refs)
        return [jax.freeze(refs[over]), *rest]

    def like(*given: Array) -> list[Array]:
        return [given[over], *(jnp.zeros(x.shape, x.dtype) for x in outs)]

    return alone("", run, like)


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


class Chunks(NamedTuple):
    """The part of a sequence that a program does."""

    first: Array  # token
    chunks: Array | int
    last: Array | bool  # whether it ends with the sequence's last chunk


def chunks_of(tokens: int, segment: int, part: Array, nil: Any) -> Chunks:
    """Return the chunks of a segment, or of the whole; of one the compiler must not know.

    Else it removes the loop, a state is a constant, and ptxas 13.0 sets registers to zero behind
    the product that reads them.
    """
    whole = -(-tokens // W)
    if not segment:
        return Chunks(i32(0), whole if whole > 1 else whole + nil[0], True)
    parts, each = -(-tokens // segment), segment // W
    last = part == parts - 1
    return Chunks(part * segment, jnp.where(last, i32(whole - (parts - 1) * each), i32(each)), last)


def weights_of(
    lists: Any, c: Array, slot: Array, part: Chunks, kind: str | None, power: int
) -> Weights | None:
    """Return the weights of a chunk; of a decay all chunks but the last have the same."""
    if kind is None:
        return None
    if kind == "decay":
        slot = jnp.logical_and(part.last, c == part.chunks - 1).astype(jnp.int32)
    return Weights(lists.at[slot], power)


def load_decay(lists: Any, place: Place, buffers: Any, full: Any) -> None:
    """Load the weights of a decay: all chunks but the last have the same."""
    for n in range(2):
        rows = lists.at[(*place.entry(lists, 2), pl.ds(n * LISTS, LISTS))]
        plgpu.copy_gmem_to_smem(rows, buffers.at[n], full)


def lists_at(lists: Any, place: Place, first: Array) -> Any:
    """Return the weights of the chunk that begins with a token."""
    at = lax.div(first, i32(W)) * LISTS
    return lists.at[(*place.entry(lists, 2), pl.ds(at, LISTS))]


def begun(
    start: Any, place: Place, axes: tuple[Array, ...], halves: int, width: int
) -> list[Array]:
    """Return a first state by halves."""
    if start is None:
        return [zeros(HALF, width)] * halves
    at = (*place.entry(start, 2 + len(axes)), *axes)
    places = [start.at[(*at, columns(h))] for h in range(halves)]
    return [loaded(x, WGMMA, optimized=False) for x in places]


def ended(
    end: Any, place: Place, axes: tuple[Array, ...], own: bool, mine: Array | bool,
    S: Sequence[Array],
) -> None:  # fmt: skip
    """Store a last state, in the head that is to: ``own`` where each has its own, and ``mine``."""
    if end is None:
        return
    at = (*place.entry(end, 2 + len(axes)), *axes)

    def go() -> None:
        for h, s in enumerate(S):
            end.at[(*at, columns(h))][...] = s

    where(mine if own else jnp.logical_and(mine, place.first(end, 2 + len(axes))), go)


def where(there: Array | bool, go: Callable[[], None]) -> None:
    """Do something where a condition holds, which may be known."""
    go() if there is True else pl.when(there)(go)


class Ring(NamedTuple):
    """Buffers of one operand: how many, how much later than q's they are free, and by how many."""

    size: int
    later: int
    readers: int


class Load(NamedTuple):
    """How an operand is loaded: barriers of its buffers; copies as rows of a chunk and buffers."""

    ring: Ring
    full: Any
    free: Any
    copies: Sequence[tuple[Callable[[Array], Any], Any]]

    def __call__(self, chunk: Array) -> None:
        """Load a chunk once there is a buffer for it."""
        slot = lax.rem(chunk, i32(self.ring.size))

        @pl.when(chunk >= self.ring.size)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for rows, buffers in self.copies:
            plgpu.copy_gmem_to_smem(rows(chunk), buffers.at[slot], self.full.at[slot])


def move(part: Chunks, loads: Sequence[Load]) -> None:
    """Load all operands, each chunk of one in the order in which its buffers are free."""

    def go(c: Array, _: None) -> None:
        for load in loads:
            e = c - load.ring.later
            there = jnp.logical_and(e >= 0, e < part.chunks)
            pl.when(there)(functools.partial(load, e))

    lax.fori_loop(i32(0), part.chunks + max(x.ring.later for x in loads), go, None)
    for x in loads:
        drain(x.free, x.ring.size, part.chunks)


def drain(free: Any, count: int, chunks: Array | int) -> None:
    """Wait for what is still to be freed of a ring: each barrier must be waited for."""

    def go(c: Array, _: None) -> None:
        plgpu.barrier_wait(free.at[lax.rem(c, i32(count))])

    lax.fori_loop(jnp.maximum(chunks - count, i32(0)), chunks, go, None)
