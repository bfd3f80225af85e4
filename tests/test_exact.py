"""Equal bits where sums are exact, run to run and in threads; cost grows linearly."""

import itertools
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import (
    DTYPES,
    OPERATORS,
    SERIAL,
    Row,
    draw,
    load,
    of_a_device,
    place,
    rows,
    same_fields,
)

import hla
from hla.core import run
from hla.core.passes import Gate, Pass
from hla.kernels.numpy import program as numpy_program
from hla.kernels.numpy import threads as numpy_threads

STREAMING = ("causal", "prefix")


SIZES = [(64, 130, 0.03), (128, 130, 0.02), (257, 67, 0.02), (32, 67, 0.06)]  # D, T, density


def integers(D, T, density):
    """Sparse ternary q, k and small integer v: every sum is exact in any order and precision."""
    rng = np.random.default_rng([D, T])
    q, k = rng.choice([-1.0, 0.0, 1.0], (2, 2, T, D), p=[density / 2, 1 - density, density / 2])
    return q, k, rng.integers(-4, 5, (2, T, 9)).astype(float)


@pytest.mark.parametrize(("D", "T", "density"), SIZES)
@pytest.mark.parametrize("name", ["numpy", "torch", "array_api_strict"])
def test_exact_integers(name, D, T, density):
    """Every form, chunk width, backend, dtype and library: the same bits.

    The associative form joins by the same code in every library. Of a device, interpreted here,
    float32 has the widest keys, the other dtypes the rest.
    """
    q, k, v = integers(D, T, density)
    serial = SERIAL if name == "numpy" else ("recurrent",)
    forms = ("chunked", "dense", *(serial if D == 32 else ()))
    lines = {entry.name: entry for entry in hla.available()}
    oracles = {
        x: hla.scan(q, k, v, operator=x, form="dense", backend="array_api") for x in OPERATORS
    }
    for oracle in oracles.values():
        assert abs(oracle).max() < 2**24
        assert np.mean(oracle != 0) > 0.2
        assert (oracle == np.round(oracle)).all()
    found = rows(masks=("causal",), forms=forms, library=name, dtype="float32")
    for (row,) in (x.values for x in found):
        lib = load(name, place(row.backend, name))
        devices = of_a_device(row.backend)  # with kernels, which have their own chunks
        dtypes = [x for x in DTYPES[name] if x in lines[row.backend].dtypes]
        if row.form != "chunked" or (name in devices and D > 128):
            dtypes = ["float32"]
        for dtype in dtypes:
            want = lib.numpy(lib.array(oracles[row.operator], dtype))
            for W in (16, 64, T) if row.form == "chunked" and not devices else (None,):
                o = hla.scan(*lib.arrays(q, k, v, dtype=dtype), chunk_size=W, **row.options)
                np.testing.assert_array_equal(lib.numpy(o), want)


@pytest.mark.parametrize("operator", OPERATORS)
def test_exact_integers_in_jax(operator):
    arrays = integers(*SIZES[-1])
    oracle = hla.scan(*arrays, operator=operator, form="dense", backend="array_api")
    lib = load("jax")
    for dtype in ("float32", "bfloat16"):
        o = hla.scan(*lib.arrays(*arrays, dtype=dtype), operator=operator, chunk_size=16)
        np.testing.assert_array_equal(lib.numpy(o), lib.numpy(lib.array(oracle, dtype)))


@pytest.mark.parametrize(("D", "T", "density"), SIZES[::3])
@pytest.mark.parametrize("row", rows(masks=STREAMING, forms=("chunked", "recurrent")))
def test_exact_integers_through_states_and_gradients(row: Row, D, T, density):
    """Cut and continued by scan, step or combine, and backwards: the same bits as the whole."""
    q, k, v = (x.astype(np.float32) for x in integers(D, T, density))
    names = {"operator": row.operator, "mask": row.mask}
    whole, last = hla.scan(q, k, v, return_state=True, form="recurrent", **names)
    for t in (1, 16, T // 2, T - 1):
        head, tail = ([x[:, part] for x in (q, k, v)] for part in (slice(t), slice(t, None)))
        _, state = hla.scan(*head, return_state=True, **row.options)
        o, end = hla.scan(*tail, initial_state=state, return_state=True, **row.options)
        np.testing.assert_array_equal(o, whole[:, t:])
        same_fields(end, last)
        same_fields(hla.combine(state, hla.summarize(*tail, **names)), last)
        o, _ = hla.step(*(x[:, 0] for x in tail), state, **names)
        np.testing.assert_array_equal(o, whole[:, t])
    rng = np.random.default_rng(D)
    do = rng.integers(-1, 2, v.shape).astype("f") * (rng.random(v.shape) < 0.3)
    want = hla.vjp(*(x.astype(float) for x in (q, k, v)), form="dense", **names)[1](
        do.astype(float)
    )
    got = hla.vjp(q, k, v, **row.options)[1](do.astype("f"))
    for x, y in zip(got[:3], want[:3], strict=True):
        assert abs(y).max() < 2**24
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_runs_repeat_and_threads_agree_to_the_bit(name):
    lib = load(name)
    q, k, v = lib.arrays(*draw(2, 4, 300, D=32, V=16), dtype="float32")

    def call(operator):
        if name == "jax":  # compiling gradients takes long and proves no more
            return [lib.numpy(hla.scan(q, k, v, operator=operator, decay=0.97))]
        o, pullback = hla.vjp(q, k, v, operator=operator, decay=0.97)
        return [lib.numpy(x) for x in (o, *pullback(v)[:3])]

    operators = OPERATORS if name != "jax" else ("hla2",)
    want = {operator: call(operator) for operator in operators}
    barrier = threading.Barrier(8)

    def start(operator):
        barrier.wait()
        return operator, call(operator)

    with ThreadPoolExecutor(8) as pool:
        tasks = list(itertools.islice(itertools.cycle(operators), 8))
        found = list(pool.map(start, tasks)) + [(x, call(x)) for x in operators]
    for operator, got in found:
        for x, y in zip(got, want[operator], strict=True):
            np.testing.assert_array_equal(x, y)


def test_work_and_memory_grow_linearly(monkeypatch):
    """Eight times the tokens: eight times the products, in a small multiple of the output."""
    work, matmul = [], np.matmul

    def counted(a, b, out):
        work.append(out.size * a.shape[-1])
        return matmul(a, b, out=out)

    monkeypatch.setattr(np, "matmul", counted)

    def cost(T):
        work.clear()
        q, k, v = (x.astype(np.float32) for x in draw(1, T, D=16, V=16))
        tracemalloc.start()
        o = hla.scan(q, k, v, decay=0.99)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert np.isfinite(o).all()
        return sum(work), peak / o.nbytes

    (short, _), (long, memory) = cost(2**12), cost(2**15)
    assert long == 8 * short > 0
    assert memory < 16


def test_a_scale_makes_no_copy_of_the_queries(monkeypatch):
    """NumPy's kernels scale q group by group, in each thread: one core would copy all of it."""
    monkeypatch.setattr(numpy_threads, "_most", lambda: 2)
    q, k, v = (x.astype(np.float32) for x in draw(4, 2**14, D=16, V=16))

    def peak(scale):
        tracemalloc.start()
        hla.scan(q, k, v, scale=scale)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(0.3) < peak(1.0) + q.nbytes / 2


@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_threads_that_share_a_state_do_not_disturb_each_other(operator, monkeypatch):
    """One query and key head for equal values; shared arrays spoiled a run in ten."""
    monkeypatch.setattr(numpy_threads, "_most", lambda: 3)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1500, 48)).astype(np.float32)
    v = np.repeat(rng.normal(size=(1, 1500, 48)).astype(np.float32), 8, axis=0)
    want, _ = hla.vjp(q, k, v[:1], operator=operator, decay=0.99)
    for _ in range(60):
        o, _ = hla.vjp(q, k, v, operator=operator, decay=0.99)
        np.testing.assert_array_equal(o, np.broadcast_to(want, o.shape))


@pytest.mark.parametrize("cores", [2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(cores, monkeypatch):
    rng = np.random.default_rng(1)
    q, k, v, do = rng.normal(size=(4, 2, 5, 200, 16))
    options = {"operator": "hla3", "log_gate": -rng.uniform(size=(5, 200)), "return_state": True}
    results = []
    for n in (1, cores):
        monkeypatch.setattr(numpy_threads, "_most", lambda n=n: n)
        monkeypatch.setattr(numpy_threads, "SPREAD", 0)
        (o, state), pullback = hla.vjp(q, k[:, :1], v, **options)
        results.append([o, *state, *pullback(do, state)[:3]])
    for one, many in zip(*results, strict=True):
        np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize(("D", "V"), [(16, 8), (64, 64), (64, 65), (100, 60), (128, 128)])
def test_no_product_is_large_enough_for_threads_of_blas(D, V, monkeypatch):
    """OpenBLAS's threads and ours would wait for one another."""
    sizes, matmul = [], np.matmul

    def counted(a, b, out):
        sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        return matmul(a, b, out=out)

    q, k, v = draw(2, 150, D=D, V=V)
    _, pullback = hla.vjp(q, k, v, operator="hla3")
    monkeypatch.setattr(np, "matmul", counted)
    hla.scan(q, k, v, operator="hla3")
    pullback(v)
    assert sizes
    assert max(sizes) < numpy_program.ONE_THREAD


def test_pairs_used_again_keep_their_own_keys():
    """Steps between two uses of (q, k) that transpose the same k, then another, disturb neither."""
    q, k, v = np.random.default_rng(2).integers(-2, 3, size=(3, 2, 70, 4)).astype(np.float64)
    steps = (
        Pass("a", "q", "k", "v", ("A",), end="A@T"),
        Pass("b", "k", "k", "k", ("B",), end="B@T"),
        Pass("o", "q", "b", "v", ("C",), end="C@T"),
        Pass("o", "q", "k", "v", ("D",), end="D@T"),
    )
    values = {"q": q, "k": k, "v": v}
    want = run.run(steps, values, Gate(), chunk=8)
    got = numpy_program.run(steps, values, Gate(), chunk=8)
    for name in ("o", *(s.end for s in steps)):
        np.testing.assert_array_equal(got[name], want[name])
