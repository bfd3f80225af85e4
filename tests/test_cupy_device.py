"""The CuPy backend on a GPU: streams, memory, graphs, devices, and arrays of torch and JAX."""

import types

import numpy as np
import pytest
from conftest import installed

import hla

pytestmark = pytest.mark.gpu
SLEEP = r"""
extern "C" __global__ void sleep(long long cycles) {
    for (long long start = clock64(); clock64() - start < cycles;) {}
}
"""


@pytest.fixture
def gpu():
    """CuPy, on a GPU."""
    cupy = installed("cupy")
    if not cupy.is_available():
        pytest.skip("no CUDA device for cupy")
    return cupy


def drawn(gpu, count=3):
    return [*gpu.asarray(np.random.default_rng(0).normal(size=(count, 2, 70, 16)), np.float32)]


@pytest.mark.parametrize("start", [1, 3])
def test_the_current_stream(gpu, start):
    """What a stream has yet to write is waited for, by first calls and by later ones."""
    given, late = drawn(gpu), [gpu.zeros((2, 70, 16), np.float32) for _ in range(3)]
    want = hla.scan(*given, backend="cupy")
    sleep = gpu.RawKernel(SLEEP, "sleep")
    with gpu.cuda.Stream(non_blocking=True) as stream:
        for _ in range(start):
            for x in late:
                x.fill(0)
            sleep((1,), (1,), (np.int64(100_000_000),))
            for x, y in zip(late, given, strict=True):
                x[...] = y
            o = hla.scan(*late, backend="cupy")
        stream.synchronize()
    assert (o == want).all()


def test_the_current_pool(gpu):
    given, pool = drawn(gpu), gpu.cuda.MemoryPool()
    with gpu.cuda.using_allocator(pool.malloc):
        for _ in range(2):
            o = hla.scan(*given, backend="cupy")
            assert o.nbytes <= pool.used_bytes()
            del o
            assert not pool.used_bytes()


@pytest.mark.parametrize("packed", [False, True])
def test_calls_are_captured(gpu, packed):
    """A scan with a number as decay, and tokens in place, by a graph of them launched twice."""
    q, k, v = drawn(gpu)
    _, state = hla.scan(q, k, v, decay=0.5, return_state=True, backend="cupy")
    state = state.pack() if packed else state
    own = type(state)(*(x.copy() for x in state))

    def call(state):
        o = hla.scan(q, k, v, decay=0.5, backend="cupy")
        return o, *hla.step(o[:, 0], k[:, 0], v[:, 0], state, decay=0.5, donate=True)

    with gpu.cuda.Stream(non_blocking=True) as stream:
        call(type(state)(*(x.copy() for x in state)))  # compiled
        stream.begin_capture()
        o, token, new = call(own)
        graph = stream.end_capture()
        for _ in range(2):
            graph.launch()
        stream.synchronize()
    for _ in range(2):
        want, expected, state = call(state)
    for x, y in zip((o, token, *new), (want, expected, *state), strict=True):
        assert (x == y).all()


def test_another_device_than_the_current_one(gpu):
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one CUDA device")
    want = gpu.asnumpy(hla.scan(*drawn(gpu), decay=0.5))
    with gpu.cuda.Device(1):
        given = drawn(gpu)
    for _ in range(2):
        o = hla.scan(*given, decay=0.5)
        assert o.device.id == 1
        np.testing.assert_array_equal(gpu.asnumpy(o), want)


TINY = [*(("linear", n) for n in "qkv"), *((n, "v") for n in ("hla2", "ahla", "hla3"))]


@pytest.mark.parametrize(("operator", "small"), TINY)
def test_tiny_values(gpu, operator, small):
    """What is below 2**-126, parts of a number too, may count as 0; nothing else is lost."""
    given = dict(zip("qkv", drawn(gpu), strict=True))
    given[small] *= 2.0**-118
    exact = {n: gpu.asnumpy(x).astype(float) for n, x in given.items()}
    sizes = {n: abs(x) for n, x in exact.items()}
    ones = sizes | {small: np.ones_like(exact[small])}
    allowed = 4e-6 * hla.scan(**sizes, operator=operator)
    allowed += 2.0**-125 * hla.scan(**ones, operator=operator)
    found = gpu.asnumpy(hla.scan(**given, operator=operator))
    assert (abs(found - hla.scan(**exact, operator=operator)) <= allowed).all()


@pytest.mark.parametrize("old", [False, True])
def test_tensors_on_their_stream(gpu, old, monkeypatch):
    """By name, with their gradients; of CuPy before 14 too, which has no Stream.from_external."""
    torch = installed("torch")
    if old:
        namespace = types.SimpleNamespace(Stream=int, ExternalStream=gpu.cuda.ExternalStream)
        module = types.SimpleNamespace(cuda=namespace, ndarray=gpu.ndarray)
        monkeypatch.setattr(installed("hla.libraries.cupy"), "cupy", module)
    tensors = [torch.from_dlpack(x) for x in drawn(gpu, 4)]
    *exact, do = [x.double().cpu() for x in tensors]
    exact = [x.requires_grad_() for x in exact]
    want = hla.scan(*exact)
    wanted = [want, *torch.autograd.grad(want, exact, do)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        *given, do = [x.clone() for x in tensors]
        given = [x.requires_grad_() for x in given]
        o = hla.scan(*given, backend="cupy")
        found = [o, *torch.autograd.grad(o, given, do)]
        torch.cuda.current_stream().synchronize()
    for x, y in zip(found, wanted, strict=True):
        assert (x.cpu() - y).norm() <= 2e-6 * y.norm()


@pytest.mark.filterwarnings("ignore::hla.SlowPathWarning")
def test_a_gradient_of_jax_outside_of_jit(gpu):
    jax = installed("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU for jax")
    given = [jax.numpy.asarray(gpu.asnumpy(x)) for x in drawn(gpu)]

    def loss(backend):
        return lambda *xs: (hla.scan(*xs, backend=backend) ** 2).sum()

    found = jax.grad(loss("cupy"), (0, 1, 2))(*given)
    with jax.default_matmul_precision("highest"):
        wanted = jax.grad(loss("array_api"), (0, 1, 2))(*given)
    for x, y in zip(found, wanted, strict=True):
        assert jax.numpy.linalg.norm(x - y) <= 4e-6 * jax.numpy.linalg.norm(y)
    with pytest.raises(hla.Unsupported, match="under jit or vmap"):
        jax.jit(loss("cupy"))(*given)
