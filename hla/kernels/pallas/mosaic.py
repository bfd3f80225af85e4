"""The causal pass on an NVIDIA GPU of compute capability 9.0, in Pallas Mosaic GPU.

A warpgroup has 64 values of a head, whose state (64, D) lies in its accumulators; a program has
two such warpgroups where there is room, which wait while the other computes, and one that loads
chunks by TMA. A state is multiplied from registers, all else from shared memory, as `chunk` tells.
Operands are bfloat16; of float16 and float32 they are sums of two and three such planes, whose
products are added smallest first.

Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024, and 32 of a gate's weights:
0.179 ms at 3.0 TB/s for B = 8, T = 4096, H = 16. On one H200 (0.12 ms at 4.5 TB/s) linear took
0.214 ms with a log gate and 1.20 with gradients, 0.574 without a gate; with one warpgroup that
computes 0.353, 2.02 and 0.710.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...core.passes import Shape
from .chunk import ROWS, TOTAL, W, Work, chunk, known
from .ordered import ordered
from .sweep import OWN, Entry, Found, Operands, entry, weights_of
from .warpgroups import (
    BF16,
    F32,
    LOG2E,
    MOVER,
    OWNER,
    WGMMA,
    Array,
    added,
    barrier,
    by_column,
    gathered,
    i32,
    leave_columns,
    leave_rows,
    loaded,
    of_pairs,
    places,
    product,
    put_turned,
    taken_turned,
    tile,
    turned,
    zeros,
)  # fmt: skip

V = 64  # values of a warpgroup
WARPS = 4  # of one, each of which leaves sums of its own values
PLANES = {"bfloat16": 1, "float16": 2, "float32": 3}
SHARED = 216 << 10  # bytes that a program's buffers may take
WIDE = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)


def split(x: Array, planes: int) -> list[Array]:
    """Return float32 values as a sum of bfloat16 ones, the largest first."""
    found = []
    for _ in range(planes):
        found.append(x.astype(BF16))
        x = x - found[-1].astype(F32)
    return found


def planes(x: Array, count: int, columns: int) -> Array:
    """Return an array (..., T, F) as bfloat16 planes (..., count, T, columns), zeros behind F."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])
    if count == 1:
        return x.astype(BF16)[..., None, :, :]
    x, found = x.astype(F32), []
    for _ in range(count):  # a cast there and back is dropped by XLA, this is not
        found.append(lax.reduce_precision(x, 8, 7))
        x = x - found[-1]
    return jnp.stack(found, axis=-3).astype(BF16)


class Tiles:
    """Tiles of one warpgroup: see `chunk.Tiles`. An operand is a list of its planes."""

    def __init__(self, count: int, scratch: Any, gate: Any, numbers: tuple[Any, Any, Any]) -> None:
        self.count, self.scratch, self.gate = count, scratch, gate
        self.read, self.write, self.apart = numbers
        pairs = [(i, j) for i in range(count) for j in range(count) if i + j < count]
        self.pairs = sorted(pairs, key=sum, reverse=True)

    def product(self, a: list[Any], b: list[Any]) -> Array:
        """Return a b'."""
        return self.summed(a, [turned(x) for x in b])

    def outer(self, a: list[Any], b: list[Any], to: Array, left: Any = 1.0) -> Array:
        """Return ``to`` + (left * a') b; what is multiplied by a number comes from registers.

        A tensor core's sum is cut, not rounded, at every 16 products. Of several planes it begins
        with nothing, as what is lost of a state would add up over all chunks.
        """
        a = [turned(x) for x in a] if known(left) else self.state(self.values(a) * left)
        if self.count > 1:
            return to + self.summed(a, b)
        return added((to,), ((a[0], b[0]),))[0]

    def summed(self, a: list[Any], b: list[Any]) -> Array:
        """Return a b of planes."""
        return product(a[0].shape[0], b[0].shape[1], *((a[i], b[j]) for i, j in self.pairs))

    def state(self, S: Array) -> list[Array]:
        """Return a tile of values as an operand, in registers."""
        return split(S, self.count)

    def stored(self, x: Array) -> list[Any]:
        """Return a tile of pairs as an operand, in shared memory."""
        refs = [self.scratch.at[i] for i in range(self.count)]
        for ref, plane in zip(refs, split(x, self.count), strict=True):
            ref[...] = plane
        plgpu.commit_smem()
        return refs

    def values(self, x: list[Any]) -> Array:
        """Return the transpose of an operand's values."""
        found = None
        for ref in reversed(x):
            plane = taken_turned(ref).astype(F32)
            found = plane if found is None else found + plane
        return found

    def weights(self, row: int, axis: int, shape: tuple[int, int]) -> Array:
        """Return a row of the gate's weights along one axis of a tile."""
        x = loaded(self.gate.at[row], WGMMA.reduce(1 - axis))
        return lax.broadcast_in_dim(x, shape, (axis,))

    def total(self) -> Array:
        """Return what the gate leaves of the state over the chunk."""
        return self.gate[TOTAL, 0]

    def exp(self, x: Array) -> Array:
        """Return powers of e; of fewer planes than float32 has by one instruction."""
        return jnp.exp(x) if self.count == PLANES["float32"] else jnp.exp2(x * LOG2E)

    def places(self) -> tuple[Array, Array]:
        """Return the places of tokens along the rows and the columns of a W x W tile."""
        return places()

    def columns(self, a: Array, b: Array, to: Array | None) -> Array:
        """Return the sums of the columns of a * b, as a thread has them."""
        return by_column(a, b, to)

    def of_pairs(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return sums of the rows and of the columns of a * b but its diagonal."""
        return of_pairs(a, b)


def cuda(p: Work, batch: Shape, given: Operands) -> Found:
    """Do a launch as a kernel of Mosaic GPU."""
    count, n = PLANES[p.dtype], math.prod(batch)
    D, tiles = 64 * -(-max(1, p.D) // 64), -(-max(1, p.V) // V)
    arrays: dict[str, Array] = {}
    at: dict[str, Any] = {}
    for name, x, axes in zip(Operands._fields, given, OWN, strict=True):
        if x is None:
            continue
        lead = x.shape[: x.ndim - axes]
        at[name] = entry(batch, lead)
        if name == "start":
            widths = [(0, 0)] * len(lead) + [(0, tiles * V - p.V), (0, D - p.D)]
            x = jnp.pad(x.astype(F32), widths)
        elif name != "gate":
            x = planes(x, count, D if name in "qk" else tiles * V)
        arrays[name] = jnp.reshape(x, (math.prod(lead), *x.shape[len(lead) :]))
    read, write = 1.0 if p.gated else None, None if p.gated or p.write != 1 else 1.0
    own = p._replace(D=D, V=V, read=read, write=write, strict=None)
    arrays["factors"] = jnp.array([p.read, p.write], F32)
    arrays["whole"] = jnp.array([0, p.strict], jnp.int32)
    made = _kernel(own, n, tiles, tuple(at.items()), arrays)
    if p.reads:
        o = made["o"] if p.out == "bfloat16" else made["o"].mT
        made["o"] = o[..., : p.V]
    if p.sums:
        sums = jnp.reshape(made["sums"], (n, tiles, WARPS, p.sums, -1))
        made["sums"] = ordered.sum(sums, axis=2)
    for name in made.keys() & {"kept", "end"}:
        made[name] = made[name][..., : p.V, : p.D]
    shaped = {name: jnp.reshape(x, (*batch, *x.shape[1:])) for name, x in made.items()}
    return Found(**dict.fromkeys(Found._fields) | shaped)


def results(p: Work, n: int, tiles: int, C: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of what a kernel leaves, by name."""
    outs: dict[str, Any] = {}
    if p.reads:
        shape = (n, C * W, tiles * V) if p.out == "bfloat16" else (n, tiles * V, C * W)
        outs["o"] = jax.ShapeDtypeStruct(shape, jnp.dtype(p.out))
    if p.sums:
        outs["sums"] = jax.ShapeDtypeStruct((n, WARPS * tiles, p.sums, C * W), F32)
    if p.period:
        shape = n, -(-C // p.period), tiles * V, p.D
        outs["kept"] = jax.ShapeDtypeStruct(shape, F32)
    if p.end:
        outs["end"] = jax.ShapeDtypeStruct((n, tiles * V, p.D), F32)
    return outs


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _kernel(
    p: Work, n: int, tiles: int, entries: tuple[tuple[str, Entry], ...], arrays: dict[str, Array]
) -> dict[str, Array]:
    """Run one kernel on flat arrays; one function of the program for all launches it can do.

    Each takes seconds to compile. So numbers are inputs: the factors that a gate's weights do not
    have, and `whole`, whether a pass is strict behind a 0. Of one chunk ptxas would otherwise know
    the first state, and may set a register of that operand to 0 behind the product that reads it.
    """
    C, count, at = arrays["k"].shape[-2] // W, PLANES[p.dtype], dict(entries)
    outs = results(p, n, tiles, C)
    names = [name for name in ("q", "k", "v", "x") if name in arrays]
    columns = {"q": p.D, "k": p.D, "v": V, "x": V}
    narrow = p.out == "bfloat16"

    def copies(name: str, owners: int) -> int:
        return owners if name in "vx" else 1

    def room(owners: int, stages: int) -> bool:
        rows = stages * sum(columns[x] * copies(x, owners) for x in names)
        rows = count * (rows + owners * W * p.reads)
        return 2 * W * (rows + owners * V * (1 if narrow else 2)) < SHARED

    owners = 2 if tiles % 2 == 0 and room(2, 2) else 1
    stages, parts = min(2 if room(owners, 2) else 1, C), tiles // owners
    scratch: dict[str, Any] = {
        x + "s": tile(stages, copies(x, owners), count, W, columns[x]) for x in names
    }
    if p.reads:
        scratch["pairs"] = tile(owners, count, W, W)
    if p.gated:
        scratch["gates"] = plgpu.SMEM((stages, ROWS, W), F32)
    if p.reads and narrow:
        scratch["os"] = tile(owners, W, V)
    elif p.reads:
        scratch["os"] = plgpu.SMEM((owners, V, W), F32, transforms=WIDE)
    loads = [(x, n, i) for x in names for n in range(copies(x, owners)) for i in range(count)]
    scratch["full"] = barrier(stages, len(loads) + p.gated)
    scratch["free"] = barrier(stages, owners)

    def place(c: Array) -> Array:
        return C - 1 - c if p.reverse else c

    def body(*refs: Any, **scratch: Any) -> None:
        r = dict(zip([*arrays, *outs], refs, strict=True)) | scratch
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        head, first = lax.div(program, i32(parts)), lax.rem(program, i32(parts)) * owners

        @pl.when(warpgroup < owners)
        def _() -> None:
            if owners > 1:
                plgpu.set_max_registers(OWNER, action="increase")
            mine = pl.ds((first + warpgroup) * V, V)
            chunks = C + r["whole"][0]  # so that the compiler keeps the loop
            factors = p.read or r["factors"][0], p.write or r["factors"][1]
            numbers = *factors, r["whole"][1]
            step = functools.partial(turn, r, head, first, warpgroup, numbers)
            if p.start:
                S = loaded(r["start"].at[at["start"](head), mine], WGMMA, optimized=False)
            else:
                S = zeros(V, p.D)
            S = lax.fori_loop(i32(0), chunks, step, S)
            if p.reads:
                plgpu.wait_smem_to_gmem(0)
            if p.end:
                r["end"][head, mine] = S

        @pl.when(warpgroup == owners)
        def _() -> None:
            if owners > 1:
                plgpu.set_max_registers(MOVER, action="decrease")

            def load(c: Array, _: None) -> None:
                slot = lax.rem(c, i32(stages))

                @pl.when(c >= stages)
                def _() -> None:
                    plgpu.barrier_wait(r["free"].at[slot])

                rows = pl.ds(place(c) * W, W)
                full = r["full"].at[slot]
                for name, n, i in loads:
                    cols = pl.ds((first + n) * V, V) if name in "vx" else pl.ds(0, p.D)
                    part = r[name].at[at[name](head), i, rows, cols]
                    plgpu.copy_gmem_to_smem(part, r[name + "s"].at[slot, n, i], full)
                if p.gated:
                    row = weights_of(arrays["gate"].shape[1], C, place(c))
                    part = r["gate"].at[at["gate"](head), row]
                    plgpu.copy_gmem_to_smem(part, r["gates"].at[slot], full)

            lax.fori_loop(i32(0), i32(C), load, None)

            def drain(c: Array, _: None) -> None:
                plgpu.barrier_wait(r["free"].at[lax.rem(c, i32(stages))])

            lax.fori_loop(i32(max(C - stages, 0)), i32(C), drain, None)

    def turn(
        r: dict[str, Any], head: Array, first: Array, own: Array, numbers: Any, c: Array, S: Array
    ) -> Array:
        slot, at_chunk, mine = lax.rem(c, i32(stages)), place(c), pl.ds((first + own) * V, V)
        plgpu.barrier_wait(r["full"].at[slot])
        gate = r["gates"].at[slot] if p.gated else None
        m = Tiles(count, r["pairs"].at[own] if p.reads else None, gate, numbers)
        q, k, v, x = (
            [r[x + "s"].at[slot, own if x in "vx" else 0, i] for i in range(count)]
            if x in names else None
            for x in ("q", "k", "v", "x")
        )  # fmt: skip
        found = chunk(m, p, q, k, v, x, S)
        if p.period:

            @pl.when(lax.rem(at_chunk, i32(p.period)) == 0)
            def _() -> None:
                period = lax.div(at_chunk, i32(p.period))
                r["kept"][head, period, mine] = found.S if p.reverse else S

        rows = pl.ds(at_chunk * W, W)
        for i, each in enumerate(found.sums):
            to = r["sums"].at[head, pl.ds(WARPS * (first + own), WARPS), i, rows]
            leave_rows(to, each) if i else leave_columns(to, gathered(each))
        if p.reads:
            out = r["os"].at[own]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if narrow:
                put_turned(out, found.o.astype(BF16))
            else:
                out[...] = found.o
            plgpu.commit_smem()
            to = r["o"].at[head, rows, mine] if narrow else r["o"].at[head, mine, rows]
            plgpu.copy_smem_to_gmem(out, to)
        plgpu.barrier_arrive(r["free"].at[slot])
        return found.S

    found = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        scratch_types=scratch,
        grid=(n * parts,),
        grid_names=("program",),
        num_threads=owners + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=p.dtype != "float32",
            reduction_scratch_bytes=0,  # sums cross no warps
        ),
    )(*arrays.values())
    return dict(zip(outs, found, strict=True))
