"""What Numba adds to the rows of its backend: a cache that may be missing, memory as it comes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import draw, installed

import hla

numba = installed("numba")


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    from hla.kernels.numba import host

    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(file / "cache"))
    compiled = host.compiled.__wrapped__(host.token, np.dtype(np.float32))
    q, S, o = np.ones(2, np.float32), np.zeros(4, np.float32), np.zeros(2, np.float32)
    compiled(q, q, q, q, S, o, S, np.zeros((1, 7), np.int64), 2, 2, False)
    assert o.tolist() == [2, 2]


@pytest.mark.parametrize("shared", ["q", "k", "v", "kv"])
def test_shared_heads_are_read_where_they_lie(shared):
    """Whatever their strides, and where nothing may be written."""
    given = dict(zip("qkv", draw(2, 3, 40, D=7, V=83), strict=True))
    for name in shared:
        given[name] = given[name][:, :1]
    want = hla.vjp(**given, decay=0.9, backend="array_api")
    own = {n: np.ascontiguousarray(np.moveaxis(x, 1, 2)) for n, x in given.items()}
    apart = {n: np.repeat(x, 2, 1)[:, ::2] for n, x in own.items()}
    turned = {n: np.ascontiguousarray(x[..., ::-1])[..., ::-1] for n, x in own.items()}
    for arrays in (own, apart, turned):
        for x in arrays.values():
            x.flags.writeable = False
        o, pull = hla.vjp(**arrays, decay=0.9, axis=-3, backend="numba")
        np.testing.assert_allclose(np.moveaxis(o, 2, 1), want[0], rtol=1e-11, atol=1e-11)
        grads = pull(np.moveaxis(want[0], 1, 2))
        for x, y in zip(grads[:3], want[1](want[0])[:3], strict=True):
            np.testing.assert_allclose(np.moveaxis(x, 2, 1), y, rtol=1e-9, atol=1e-9)


def test_a_sum_of_no_products_is_zero():
    """Of no features, with numbers of others where they would begin."""
    q, k = np.full((2, 3, 5, 9), np.nan)[..., :0]
    (o, end), pull = hla.vjp(q, k, np.ones((3, 5, 2)), return_state=True, backend="numba")
    for x in (o, *pull(o, type(end)(*map(np.zeros_like, end)))[:3]):
        assert not x.any()


def test_a_thread_without_a_device_is_not_asked_for_it(monkeypatch):
    """The driver reports an error where there is no context, which sanitizers count."""
    from hla.kernels.numba import blocks

    class Driver:
        def __init__(self, context):
            self.context = context

        def cuCtxGetCurrent(self):
            return 0, self.context

        def cuCtxGetDevice(self):
            assert self.context
            return 0, 3

    monkeypatch.setattr(blocks.package, "SIMULATED", False)
    for context, device in ((0, 0), (4096, 3)):
        monkeypatch.setattr(blocks, "driver", lambda context=context: Driver(context))
        assert blocks.here() == device


def test_devices_are_listed_by_one_thread_at_a_time(monkeypatch):
    """Numba makes its list at the first use, and two threads that do so at once fail."""
    from hla.kernels.numba import blocks

    free = threading.Lock()

    class Devices:
        def __getitem__(self, number):
            assert free.acquire(blocking=False)
            time.sleep(0.01)
            free.release()
            return number

    monkeypatch.setattr(blocks.package, "cuda", SimpleNamespace(gpus=Devices()))
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(blocks._context, range(4))] == [0, 1, 2, 3]
