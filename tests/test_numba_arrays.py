"""Numba's device arrays, in its simulator, which conftest chooses where there is no GPU."""

import ctypes
import importlib

import ml_dtypes
import numpy as np
import pytest
from conftest import draw, installed

import hla
from hla import dispatch
from hla.backends import numba as backend
from hla.kernels.cupy import run as cupy_run
from hla.kernels.numba import blocks, dlpack, package, streams
from hla.libraries import numba as adapter

installed("numba")
if not package.SIMULATED:
    pytest.skip("the rows of a GPU have them there", allow_module_level=True)
cuda, xp = package.cuda, importlib.import_module("hla.kernels.numba.standard").xp
device, run = (importlib.import_module(f"hla.kernels.numba.{x}") for x in ("device", "run"))
Device = type(cuda.to_device(np.ones(1)))


def on_device(tree):
    if isinstance(tree, tuple):
        found = [on_device(x) for x in tree]
        return type(tree)(*found) if hasattr(tree, "_fields") else tuple(found)
    return cuda.to_device(np.ascontiguousarray(tree)) if isinstance(tree, np.ndarray) else tree


def same(found, want, tolerance=1e-12):
    """Compare arrays in tuples, all of the device, with those of the host."""
    if isinstance(want, tuple):
        assert type(found).__name__ == type(want).__name__
        for x, y in zip(found, want, strict=True):
            same(x, y, tolerance)
    elif want is None:
        assert found is None
    else:
        assert type(found) is Device
        host = found.copy_to_host()
        assert host.dtype == want.dtype
        assert 0 not in [s for n, s in zip(host.shape, found.strides, strict=True) if n > 1]
        to = (x.astype(np.float64) for x in (host, want))
        np.testing.assert_allclose(*to, rtol=tolerance, atol=tolerance)


GATES = {
    "none": {},
    "decay": {"decay": 0.9},
    "decays": {"decay": np.array([0.9, 0.5])},
    "log gate": {"log_gate": np.log(draw(2, 7, positive=True)[0][..., 0] / 9)},
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("operator", "mask"), [("hla2", "causal"), ("ahla", "prefix"), ("hla3", "causal")]
)
def test_every_call_takes_and_gives_device_arrays(operator, mask, gate):
    """Values are those of NumPy's generic code, in float64."""
    given, options = draw(2, 7, D=3, V=4), {"operator": operator, "mask": mask, **GATES[gate]}
    device = {n: on_device(x) for n, x in options.items()}
    want, pull = hla.vjp(*given, return_state=True, backend="array_api", **options)
    found, pulled = hla.vjp(*on_device(given), return_state=True, **device, backend="array_api")
    same(found, want)
    same(pulled(*on_device(want)), pull(*want), 1e-11)
    segment = hla.summarize(*on_device(given), backend="array_api", **device)
    own = hla.summarize(*given, backend="array_api", **options)
    same(segment, own)
    same(segment.to_state(), own.to_state())
    same(hla.combine(segment, segment), hla.combine(own, own))
    state = own.to_state()
    same(hla.combine(on_device(state), segment), hla.combine(state, own))
    same(on_device(state).pack(), state.pack())
    same(on_device(state.pack()).unpack(), state)
    if gate != "log gate":
        token = tuple(x[:, 0] for x in given)
        stepped = hla.step(*on_device(token), on_device(state), backend="array_api", **device)
        same(stepped, hla.step(*token, state, backend="array_api", **options))


def test_the_kernels_are_chosen_for_them(monkeypatch):
    """And are given their memory: a plan with steps between its launches, a call like another."""
    simulator = importlib.import_module("numba_simulator")
    monkeypatch.setattr(backend, "_missing", lambda: "")
    monkeypatch.setattr(adapter.Arrays, "on_accelerator", lambda self, x: True)
    memory = run.NUMBA.memory._replace(load=simulator.load)
    monkeypatch.setattr(backend, "_device", lambda: cupy_run.Library(memory, device.KERNELS))
    dispatch._pick.cache_clear()
    given, decay = draw(1, 5, D=3, V=4), np.array([0.9])
    options = {"operator": "linear", "axis": -2, "return_state": True}
    want, pull = hla.vjp(*given, decay=decay, backend="array_api", **options)
    narrow = [on_device(x.astype(np.float32)) for x in (*given, decay)]
    assert hla.explain(*narrow[:3], operator="linear").backend == "numba"
    for _ in range(2):  # the second is a call like the first
        found, pulled = hla.vjp(*narrow[:3], decay=narrow[3], **options)
    grads = pulled(on_device(want[0].astype(np.float32)), None)
    made, true = (found[0], *found[1], *grads[:4]), (want[0], *want[1], *pull(want[0])[:4])
    for x, y in zip(made, true, strict=True):
        np.testing.assert_allclose(x.copy_to_host(), y, rtol=2e-5, atol=2e-5)
    assert len(simulator.LAUNCHES) > 4
    dispatch._pick.cache_clear()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_and_strides_as_they_come(dtype):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    wide = [np.zeros((2, 9, 4, 8), kind) for _ in range(3)]
    for x, y in zip(wide, draw(2, 9, 4, D=4, V=4), strict=True):
        x[..., ::2] = y
    device = [cuda.to_device(x)[:, ::-1, 1:3, ::2] for x in wide]
    host = [np.ascontiguousarray(x[:, ::-1, 1:3, ::2]) for x in wide]
    want = hla.scan(*host, axis=-3, backend="array_api")
    same(hla.scan(*device, axis=-3, backend="array_api"), want, {"float32": 1e-5}.get(dtype, 1e-2))


def test_errors_are_those_of_every_library():
    q, k, v = on_device(draw(2, 5))
    with pytest.raises(ValueError, match="k has shape"):
        hla.scan(q, k[:, :3], v)
    with pytest.raises(TypeError, match=r"k has dtype float32; expected float64 like q"):
        hla.scan(q, on_device(k.copy_to_host().astype(np.float32)), v)
    with pytest.raises(TypeError, match="k is an array of numpy; expected numba like q"):
        hla.scan(q, k.copy_to_host(), v)
    with pytest.raises(TypeError, match="k has memory of a GPU"):
        hla.scan(q.copy_to_host(), k, v)
    with pytest.raises(TypeError, match="q has dtype int64"):
        hla.scan(*map(on_device, (np.ones((3, 2), np.int64),) * 3))


def test_work_is_on_the_first_stream_that_an_array_names(monkeypatch):
    """It waits for those of others, and results name it."""
    found, read = [], adapter.read
    names = iter([None, 7, 7, 8])
    monkeypatch.setattr(adapter, "read", lambda x: (next(names), read(x)[1]))
    monkeypatch.setattr(adapter, "made", lambda x, stream: (stream, streams.current()))
    monkeypatch.setattr(blocks, "wait", lambda *given: found.append(given))
    q, k, v = on_device(draw(2, 3))
    decay = on_device(np.array([0.5, 0.25]))
    assert hla.scan(q, k, v, decay=decay, backend="array_api") == (7, 7)
    assert found == [(7, 8)]
    assert streams.current() == streams.DEFAULT


def test_operations_are_numpys():
    """Of views, more axes than a kernel counts, and sums of several parts."""
    x, y = np.arange(2.0 * 3**6).reshape(2, *[3] * 6), np.arange(3.0)
    a, b = xp.asarray(x), xp.asarray(y)
    turned, axes = (6, 0, 5, 1, 4, 2, 3), (0, 3, 5)
    c, z = xp.permute_dims(a, turned), x.transpose(turned)
    pairs = [
        (c * b, z * y),
        (xp.sum(c[..., ::2], axis=axes), z[..., ::2].sum(axes)),
        (xp.sum(a), x.sum()),
        (xp.reshape(a.mT, (-1, 9))[1:, None], np.swapaxes(x, -1, -2).reshape(-1, 9)[1:, None]),
        (xp.cumulative_sum(a, axis=-2), np.cumsum(x, -2)),
        (xp.tril(a, k=-1) + xp.triu(a, k=1), np.tril(x, -1) + np.triu(x, 1)),
        (xp.stack([a, -a], axis=-2), np.stack([x, -x], -2)),
        (a[..., 0, :] @ a.mT[0, 0, 0], x[..., 0, :] @ np.swapaxes(x, -1, -2)[0, 0, 0]),
        (xp.where(a > 3, 2 / (a + 1), a**2), np.where(x > 3, 2 / (x + 1), x**2)),
    ]
    for found, want in pairs:
        np.testing.assert_allclose(found.get(), want, rtol=1e-15)


def test_dlpack_both_ways():
    """Memory is shared, and let go of when the last taker is gone."""
    x = np.arange(6.0).reshape(2, 3)
    a = xp.asarray(x)
    there = np.from_dlpack(a.mT)
    np.testing.assert_array_equal(there, x.T)
    assert len(dlpack._lent) == 1
    del there
    a.__dlpack__()
    assert not dlpack._lent
    back = xp.from_dlpack(x.T)
    x[1, 0] = 9
    assert float(back[0, 1]) == 9
    narrow = xp.astype(a, np.dtype(ml_dtypes.bfloat16))
    assert str(xp.from_dlpack(narrow).dtype) == "bfloat16"
    assert ctypes.sizeof(dlpack.Managed) == 64
