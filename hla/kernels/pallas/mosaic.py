"""The causal pass on an NVIDIA GPU of compute capability 9.0, in Pallas Mosaic GPU.

A program has a head and 64 of its values, whose state (64, D) lies in the accumulators of one
warpgroup; another loads chunks by TMA. A state is multiplied from registers, all else from shared
memory, as `chunk` tells. Operands are bfloat16; of float16 and float32 they are sums of two and
three such planes, whose products are added smallest first.

Bytes a token and head, D = V = 128, bfloat16: q, k, v and o once, 1024 (q and k are read twice, by
neighbours), and 32 of a gate's weights: 0.179 ms at 3.0 TB/s for B = 8, T = 4096, H = 16.
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
from .chunk import ROWS, TOTAL, W, Work, chunk
from .sweep import OWN, Entry, Found, Operands, entry, weights_of
from .warpgroups import loaded, places
from .warpgroups import turned as transposed

Array = Any
V = 64  # values of a program
PLANES = {"bfloat16": 1, "float16": 2, "float32": 3}
SHARED = 200 << 10  # bytes that a program's buffers may take
SWIZZLE = plgpu.SwizzleTransform(128)
NARROW = plgpu.TilingTransform((8, 64)), SWIZZLE
WIDE = plgpu.TilingTransform((8, 32)), SWIZZLE
WGMMA = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED


def split(x: Array, planes: int) -> list[Array]:
    """Return float32 values as a sum of bfloat16 ones, the largest first."""
    found = []
    for _ in range(planes):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return found


def planes(x: Array, count: int, columns: int) -> Array:
    """Return an array (..., T, F) as bfloat16 planes (..., count, T, columns), zeros behind F."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])])
    if count == 1:
        return x.astype(jnp.bfloat16)[..., None, :, :]
    x, found = x.astype(jnp.float32), []
    for _ in range(count):  # a cast there and back is dropped by XLA, this is not
        found.append(lax.reduce_precision(x, 8, 7))
        x = x - found[-1]
    return jnp.stack(found, axis=-3).astype(jnp.bfloat16)


class Tiles:
    """Tiles of one warpgroup: see `chunk.Tiles`. An operand is a list of its planes."""

    def __init__(
        self, count: int, scratch: dict[str, Any], gate: Any, numbers: tuple[Any, Any, Any]
    ) -> None:
        self.count, self.scratch, self.gate = count, scratch, gate
        self.read, self.write, self.apart = numbers
        pairs = [(i, j) for i in range(count) for j in range(count) if i + j < count]
        self.pairs = sorted(pairs, key=sum, reverse=True)

    def product(self, a: list[Any], b: list[Any]) -> Array:
        """Return a b'."""
        return self.summed(a, [transposed(x) for x in b])

    def outer(self, a: list[Any], b: list[Any], to: Array) -> Array:
        """Return ``to`` + a' b.

        A tensor core's sum is cut, not rounded, at every 16 products. Of several planes it begins
        with nothing, as what is lost of a state would add up over all chunks.
        """
        a = [transposed(x) for x in a]
        if self.count > 1:
            return to + self.summed(a, b)
        return pl.run_state(lambda to: plgpu.wgmma(to, a[0], b[0]))(plgpu.ACC.init(to))

    def summed(self, a: list[Any], b: list[Any]) -> Array:
        """Return a b of planes."""

        def multiply(to: Any) -> Array:
            for i, j in self.pairs:
                plgpu.wgmma(to, a[i], b[j])
            return to[...]

        return pl.run_scoped(multiply, plgpu.ACC((a[0].shape[0], b[0].shape[1]), jnp.float32))

    def state(self, S: Array) -> list[Array]:
        """Return a state as an operand, in registers."""
        return split(S, self.count)

    def stored(self, name: str, x: Array) -> list[Any]:
        """Return a tile as an operand, in shared memory."""
        refs = [self.scratch[name].at[i] for i in range(self.count)]
        for ref, plane in zip(refs, split(x, self.count), strict=True):
            ref[...] = plane
        plgpu.commit_smem()
        return refs

    def values(self, x: list[Any], turned: bool = False) -> Array:
        """Return an operand's values, or their transpose."""
        found = None
        for ref in reversed(x):
            if turned:
                plane = loaded(transposed(ref), TURNED)
                plane = plgpu.layout_cast(plane, WGMMA)
            else:
                plane = loaded(ref, WGMMA)
            plane = plane.astype(jnp.float32)
            found = plane if found is None else found + plane
        return found

    def weights(self, row: int, axis: int, shape: tuple[int, int]) -> Array:
        """Return a row of the gate's weights along one axis of a tile."""
        x = loaded(self.gate.at[row], WGMMA.reduce(1 - axis))
        return lax.broadcast_in_dim(x, shape, (axis,))

    def total(self) -> Array:
        """Return what the gate leaves of the state over the chunk."""
        return self.gate[TOTAL, 0]

    def places(self) -> tuple[Array, Array]:
        """Return the places of tokens along the rows and the columns of a W x W tile."""
        return places()

    def sum(self, x: Array, axis: int) -> Array:
        """Return sums along one axis."""
        return jnp.sum(x, axis=axis)


def cuda(p: Work, batch: Shape, given: Operands) -> Found:
    """Do a launch as kernels of Mosaic GPU, one program a head and 64 of its values."""
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
            x = jnp.pad(x.astype(jnp.float32), widths)
        elif name != "gate":
            x = planes(x, count, D if name in "qk" else tiles * V)
        arrays[name] = jnp.reshape(x, (math.prod(lead), *x.shape[len(lead) :]))
    weighed = None if p.weighed else 1.0
    own = p._replace(D=D, V=V, read=None, write=weighed, strict=None)
    arrays["factors"] = jnp.array([p.read, p.write], jnp.float32)
    arrays["whole"] = jnp.array([0, p.strict], jnp.int32)
    made = _kernel(own, n, tiles, tuple(at.items()), arrays)
    if p.reads:
        o = made["o"] if p.out == "bfloat16" else made["o"].mT
        made["o"] = o[..., : p.V]
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
        outs["sums"] = jax.ShapeDtypeStruct((n, tiles, p.sums, C * W), jnp.float32)
    if p.period:
        shape = n, -(-C // p.period), tiles * V, p.D
        outs["kept"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if p.end:
        outs["end"] = jax.ShapeDtypeStruct((n, tiles * V, p.D), jnp.float32)
    return outs


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _kernel(
    p: Work, n: int, tiles: int, entries: tuple[tuple[str, Entry], ...], arrays: dict[str, Array]
) -> dict[str, Array]:
    """Run one kernel on flat arrays; one function of the program for all launches it can do.

    Each takes seconds to compile. So numbers are inputs: the factors of what is read and written,
    and `whole`, whether a pass is strict behind a 0. Of one chunk ptxas would otherwise know the
    first state, and may set a register of that operand to 0 behind the product that reads it.
    """
    C, count, at = arrays["k"].shape[-2] // W, PLANES[p.dtype], dict(entries)
    outs = results(p, n, tiles, C)
    names = [name for name in ("q", "k", "v", "x") if name in arrays]
    columns = {"q": p.D, "k": p.D, "v": V, "x": V}
    narrow = p.out == "bfloat16"
    scratch: dict[str, Any] = {}
    sizes = {name: (W, columns[name]) for name in names}
    fixed = {"A": (W, W)} if p.reads else {}
    fixed |= {"k kept": (W, p.D)} if p.weighed else {}
    bytes_of = [sum(2 * count * a * b for a, b in x.values()) for x in (sizes, fixed)]
    stages = 2 if 2 * bytes_of[0] + bytes_of[1] + 4 * W * V < SHARED else 1
    stages = min(stages, C)
    for name, size in sizes.items():
        scratch[name + "s"] = plgpu.SMEM((stages, count, *size), jnp.bfloat16, transforms=NARROW)
    for name, size in fixed.items():
        scratch[name] = plgpu.SMEM((count, *size), jnp.bfloat16, transforms=NARROW)
    if p.gated:
        scratch["gates"] = plgpu.SMEM((stages, ROWS, W), jnp.float32)
    if p.reads and narrow:
        scratch["os"] = plgpu.SMEM((W, V), jnp.bfloat16, transforms=NARROW)
    elif p.reads:
        scratch["os"] = plgpu.SMEM((V, W), jnp.float32, transforms=WIDE)
    copies = len(names) * count + p.gated
    scratch["full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    scratch["free"] = plgpu.Barrier(num_barriers=stages)

    def i32(x: int) -> Array:
        return jnp.array(x, jnp.int32)

    def place(c: Array) -> Array:
        return C - 1 - c if p.reverse else c

    def body(*refs: Any) -> None:
        r = dict(zip([*arrays, *outs, *scratch], refs, strict=True))
        program = lax.axis_index("program")
        head, tile = lax.div(program, i32(tiles)), lax.rem(program, i32(tiles))
        mine = pl.ds(tile * V, V)

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _() -> None:
            chunks = C + r["whole"][0]  # so that the compiler keeps the loop
            numbers = r["factors"][0], p.write or r["factors"][1], r["whole"][1]
            step = functools.partial(turn, r, head, tile, mine, numbers)
            if p.start:
                S = loaded(r["start"].at[at["start"](head), mine], WGMMA, optimized=False)
            else:
                S = plgpu.layout_cast(jnp.full((V, p.D), 0, jnp.float32), WGMMA)
            S = lax.fori_loop(i32(0), chunks, step, S)
            if p.reads:
                plgpu.wait_smem_to_gmem(0)
            if p.end:
                r["end"][head, mine] = S

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _() -> None:
            def load(c: Array, _: None) -> None:
                slot = lax.rem(c, i32(stages))

                @pl.when(c >= stages)
                def _() -> None:
                    plgpu.barrier_wait(r["free"].at[slot])

                rows = pl.ds(place(c) * W, W)
                full = r["full"].at[slot]
                for name in names:
                    for i in range(count):
                        part = r[name].at[at[name](head), i, rows]
                        if name in "vx":
                            part = r[name].at[at[name](head), i, rows, mine]
                        plgpu.copy_gmem_to_smem(part, r[name + "s"].at[slot, i], full)
                if p.gated:
                    row = weights_of(arrays["gate"].shape[1], C, place(c))
                    part = r["gate"].at[at["gate"](head), row]
                    plgpu.copy_gmem_to_smem(part, r["gates"].at[slot], full)

            lax.fori_loop(i32(0), i32(C), load, None)

            def drain(c: Array, _: None) -> None:
                plgpu.barrier_wait(r["free"].at[lax.rem(c, i32(stages))])

            lax.fori_loop(i32(max(C - stages, 0)), i32(C), drain, None)

    def turn(
        r: dict[str, Any], head: Array, tile: Array, mine: Any, numbers: Any, c: Array, S: Array
    ) -> Array:
        slot, at_chunk = lax.rem(c, i32(stages)), place(c)
        plgpu.barrier_wait(r["full"].at[slot])
        kept = {"A": r.get("A"), "k": r.get("k kept")}
        m = Tiles(count, kept, r["gates"].at[slot] if p.gated else None, numbers)
        q, k, v, x = (
            [r[name + "s"].at[slot, i] for i in range(count)] if name in names else None
            for name in ("q", "k", "v", "x")
        )
        found = chunk(m, p, q, k, v, x, S)
        if p.period:

            @pl.when(lax.rem(at_chunk, i32(p.period)) == 0)
            def _() -> None:
                period = lax.div(at_chunk, i32(p.period))
                r["kept"][head, period, mine] = found.S if p.reverse else S

        rows = pl.ds(at_chunk * W, W)
        for i, each in enumerate(found.sums):
            r["sums"][head, tile, i, rows] = each
        if p.reads:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if narrow:
                o = plgpu.layout_cast(found.o.astype(jnp.bfloat16), TURNED)
                transposed(r["os"])[...] = o
            else:
                r["os"][...] = found.o
            plgpu.commit_smem()
            to = r["o"].at[head, rows, mine] if narrow else r["o"].at[head, mine, rows]
            plgpu.copy_smem_to_gmem(r["os"], to)
        plgpu.barrier_arrive(r["free"].at[slot])
        return found.S

    found = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        scratch_types=list(scratch.values()),
        grid=(n * tiles,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*arrays.values())
    return dict(zip(outs, found, strict=True))
