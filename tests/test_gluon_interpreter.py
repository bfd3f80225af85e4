"""The interpreter of Gluon: right numbers of a right kernel, and each planted fault is found.

The kernel is hla2's forward by two state owners: the first makes y, the second takes it over in
shared memory and makes o, a third partition loads.
"""

import ml_dtypes
import numpy as np
import pytest
from conftest import installed

installed("triton")
import gluon_interpreter  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.ampere import async_copy  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

W = gl.constexpr(64)
STAGES = gl.constexpr(2)
ACC = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
)
OPERAND = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
BAR = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def chunk(i):
    """Offsets of a chunk."""
    t = gl.arange(0, W, gl.SliceLayout(1, ROWS))
    d = gl.arange(0, W, gl.SliceLayout(0, ROWS))
    return (i * W + t)[:, None] * W + d[None, :]


@gluon.jit
def read(S, x, y, q, tile, FAULT: gl.constexpr):
    """Return S' q' + y' upper(x q')."""
    a = gl.zeros([W, W], gl.float32, ACC)
    a = warpgroup_mma(x, q.permute((1, 0)), a, use_acc=False, is_async=True)
    if FAULT != "tile without wait":
        a = warpgroup_mma_wait(0, deps=[a])
    i = gl.arange(0, W, gl.SliceLayout(1, ACC))
    j = gl.arange(0, W, gl.SliceLayout(0, ACC))
    tile.store(gl.where(i[:, None] <= j[None, :], a, 0.0).to(gl.bfloat16))
    if FAULT != "tile without fence":
        fence_async_shared()
    o = gl.zeros([W, W], gl.float32, ACC)
    cast = gl.convert_layout(S.to(gl.bfloat16), OPERAND)
    o = warpgroup_mma(cast, q.permute((1, 0)), o, use_acc=False, is_async=True)
    o = warpgroup_mma(y.permute((1, 0)), tile, o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[o])
    return o.to(gl.bfloat16)


@gluon.jit
def first(q, k, ys, tile, full, free, y_full, y_free, T, FAULT: gl.constexpr):
    """Owner of S."""
    S = gl.zeros([W, W], gl.float32, ACC)
    for i in range(gl.cdiv(T, W)):
        s = i % STAGES
        if FAULT != "no wait for keys":
            mbarrier.wait(full.index(s), (i // STAGES) & 1)
        fence_async_shared()
        b_k = k.index(s)
        y = read(S, b_k, b_k, q.index(s), tile, FAULT)
        mbarrier.wait(y_free, i & 1 if FAULT == "other phase" else (i & 1) ^ 1)
        ys.permute((1, 0)).store(y)
        if FAULT != "y without fence":
            fence_async_shared()
        mbarrier.arrive(y_full)
        if FAULT == "two arrivals":
            mbarrier.arrive(y_full)
        S = warpgroup_mma(b_k.permute((1, 0)), b_k, S, is_async=True)
        if FAULT == "keys freed early":
            mbarrier.arrive(free.index(s))
        S = warpgroup_mma_wait(0, deps=[S])
        if FAULT != "no arrival" and FAULT != "keys freed early":
            mbarrier.arrive(free.index(s))


@gluon.jit
def second(q, v, ys, tile, o, full, free, y_full, y_free, T, FAULT: gl.constexpr):
    """Owner of F, transposed."""
    F = gl.zeros([W, W], gl.float32, ACC)
    for i in range(gl.cdiv(T, W)):
        s = i % STAGES
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        if FAULT != "copies without fence":
            fence_async_shared()
        mbarrier.wait(y_full, i & 1)
        b_v = v.index(s)
        x = read(F, ys, b_v, q.index(s), tile, FAULT)
        if FAULT == "y freed early":
            mbarrier.arrive(y_free)
        F = warpgroup_mma(b_v.permute((1, 0)), ys, F, is_async=True)
        if FAULT == "v overwritten":
            b_v.permute((1, 0)).store(x)
        F = warpgroup_mma_wait(0, deps=[F])
        b_v.permute((1, 0)).store(x)  # in v's place
        gl.store(o + chunk(i), b_v.load(ROWS), mask=chunk(i) < T * W)
        mbarrier.arrive(free.index(s))
        if FAULT != "y freed early":
            mbarrier.arrive(y_free)


@gluon.jit
def loader(q, k, v, b_q, b_k, b_v, full, free, T, FAULT: gl.constexpr):
    """Copy chunks."""
    for i in range(gl.cdiv(T, W)):
        s = i % STAGES
        mbarrier.wait(free.index(s), ((i // STAGES) & 1) ^ 1)
        there = chunk(i) < T * W
        if FAULT == "outside":
            there = chunk(i) >= 0
        async_copy.async_copy_global_to_shared(b_q.index(s), q + chunk(i), mask=there)
        async_copy.async_copy_global_to_shared(b_k.index(s), k + chunk(i), mask=there)
        async_copy.async_copy_global_to_shared(b_v.index(s), v + chunk(i), mask=there)
        async_copy.mbarrier_arrive(full.index(s), increment_count=FAULT == "counted twice")


@gluon.jit
def kernel(q, k, v, o, T, FAULT: gl.constexpr):
    """One head of [T, W]."""
    b_q = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, W], SHARED)
    b_k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, W], SHARED)
    b_v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, W, W], SHARED)
    ys = gl.allocate_shared_memory(gl.bfloat16, [W, W], SHARED)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, W, W], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    y_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    y_free = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(free.index(i), count=2)
    mbarrier.init(y_full, count=1)
    mbarrier.init(y_free, count=1)
    if FAULT == "barrier unused":
        mbarrier.init(gl.allocate_shared_memory(gl.int64, [1], BAR), count=1)
    bars = (full, free, y_full, y_free)
    gl.warp_specialize(
        [
            (first, (b_q, b_k, ys, tiles.index(0), *bars, T, FAULT)),
            (second, (b_q, b_v, ys, tiles.index(1), o, *bars, T, FAULT)),
            (loader, (q, k, v, b_q, b_k, b_v, full, free, T, FAULT)),
        ],
        [4, 4],
        [240, 40],
    )


def run(fault, seed, *, T=300, exact=False):
    """Error relative to the sums in float64."""
    random = np.random.default_rng(seed)
    dtype = np.float64 if exact else ml_dtypes.bfloat16
    q, k, v = ((random.standard_normal((T, 64)) / 8**0.5).astype(dtype) for _ in range(3))
    o = np.full((T, 64), np.nan, dtype)
    gluon_interpreter.run(kernel, (1,), q, k, v, o, T, seed=seed, exact=exact, FAULT=fault)
    q, k, v, o = (x.astype(np.float64) for x in (q, k, v, o))
    want = np.tril(q @ np.tril(q @ k.T).dot(k).T) @ v
    return np.linalg.norm(o - want) / np.linalg.norm(want)


@pytest.mark.parametrize("seed", range(6))
def test_right(seed):
    assert 1e-3 < run("", seed) < 4e-3  # three roundings to bfloat16
    assert run("", seed, exact=True) < 1e-14


FAULTS = {
    "no arrival": "deadlock: .* waits for phase 0 of free",
    "other phase": "deadlock: .* waits for phase 0 of y_free",
    "counted twice": "deadlock: .* of full",
    "two arrivals": "more arrivals than|a whole phase ahead|unordered|may still read",
    "tile without wait": "read before a wait covers it",
    "tile without fence": "reads what was written and not fenced",
    "y without fence": "reads what was written and not fenced",
    "copies without fence": "reads what was written and not fenced",
    "keys freed early": "a copy writes what partition 0 may still read",
    "y freed early": "a store writes what partition 1 may still read|unordered with a write",
    "v overwritten": "a store writes what",
    "no wait for keys": "a copy is in flight|never written|unordered with a write|not fenced",
    "outside": "outside its array",
    "barrier unused": r"initialised barriers of \[\(1,\)\] that nobody uses",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault):
    with pytest.raises(gluon_interpreter.Fault, match=FAULTS[fault]):
        run(fault, 0)
