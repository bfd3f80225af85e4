"""A backend of one library's arrays, called with those of any that shares its memory."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import close, draw, installed, load, to_numpy

import hla
from hla import backends, dispatch
from hla.backends import array_api
from hla.contract import Capabilities
from hla.core.request import FLOATS
from hla.kernels.numba import package
from hla.libraries import exchange, rules

H, T, D, V = 2, 6, 4, 3


@pytest.fixture
def seen(monkeypatch):
    """Addresses of what a backend of NumPy's arrays is given, by its function."""
    found = {"forward": [], "backward": [], "step": []}

    def spied(name):
        def call(request, inputs, *given):
            arrays = [x for x in (*inputs[:5], *(inputs.state or ())) if x is not None]
            assert all(type(x) is np.ndarray for x in arrays)
            found[name] += [x.ctypes.data for x in arrays]
            return getattr(array_api, name)(request, inputs, *given)

        return call

    backend = SimpleNamespace(
        CAPABILITIES=Capabilities(FLOATS, native="numpy", opaque=True),
        empty=array_api.empty,
        **{name: spied(name) for name in found},
    )
    monkeypatch.setitem(sys.modules, "native", backend)
    monkeypatch.setattr(backends, "TABLE", {"native": "native", **backends.TABLE})
    caches = backends.load, exchange.loaded, rules.differentiable, dispatch._pick
    for cached in caches:
        cached.cache_clear()
    yield found
    for cached in caches:
        cached.cache_clear()


def call(library, backend):
    """Results of each function, and the addresses of its inputs where the library tells."""
    array, options = load(library).array, {"decay": 0.9, "backend": backend}
    q, k, v = (array(x, "float64") for x in draw(H, T, D=D, V=V))
    _, state = hla.scan(q, k, v, decay=0.9, return_state=True, backend="array_api")
    (o, end), pullback = hla.vjp(q, k, v, initial_state=state, return_state=True, **options)
    gradients = pullback(o, end)
    token = hla.step(q[:, 0, :], k[:, 0, :], v[:, 0, :], state, **options)
    given = [np.from_dlpack(x) for x in (q, k, v, *state)]
    found = [o, *end, *gradients[:3], *gradients.dinitial_state, token[0], *token[1]]
    assert {type(x) for x in found} == {type(q)}
    return [to_numpy(x) for x in found], [x.ctypes.data for x in given]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "array_api_strict"])
def test_arrays_are_handed_over_and_back(library, seen):
    """Without a copy, by forward, backward and step; results are the caller's arrays."""
    installed(library)
    got, addresses = call(library, "native")
    want, _ = call(library, "array_api")
    for x, y in zip(got, want, strict=True):
        close(x, y, 1e-12)
    for name in ("forward", "backward"):
        assert set(addresses) <= set(seen[name])
    if library != "torch":  # whose operator takes a step as a sequence of one token
        assert set(addresses[3:]) <= set(seen["step"])


def test_torch_knows_a_backend_of_other_memory(seen):
    """Autograd, a subclass's memory, strides, a pending sign, vmap and compile."""
    torch = installed("torch")
    q, k, v = (torch.tensor(x, requires_grad=True) for x in draw(H, T, D=D, V=V))
    strided = q.detach().movedim(0, -1).contiguous().movedim(-1, 0)
    negated = torch.complex(strided, -strided).conj().imag

    def grads(backend, q=q):
        o = hla.scan(q, k, v, operator="hla3", decay=0.9, backend=backend)
        return o, *torch.autograd.grad((o**2).sum(), (k, v))

    for x in (q, strided, negated):
        for a, b in zip(grads("native", x), grads("array_api", x), strict=True):
            torch.testing.assert_close(a, b)
    by = {b: lambda q, b=b: hla.scan(q, k, v, backend=b) for b in ("native", "array_api")}
    stacked = torch.stack([q, 2 * q])
    got, want = (torch.func.vmap(by[b])(stacked) for b in by)
    torch.testing.assert_close(got, want)
    compiled = torch.compile(by["native"], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), by["array_api"](q))


def test_an_eager_gradient_of_jax_reaches_a_backend_of_other_memory(seen):
    """With concrete arrays; a trace has none."""
    jax = installed("jax")
    can = Capabilities(FLOATS, native="numpy", opaque=True, traced=("jax",))
    sys.modules["native"].CAPABILITIES = can
    q, k, v = load("jax").arrays(*draw(H, T, D=D, V=V))
    a = load("jax").array(-draw(H, T, positive=True)[0][..., 0], "float64")

    def loss(q, a, backend="native"):
        o, state = hla.scan(q, k, v, log_gate=a, return_state=True, backend=backend)
        return (o**2).sum() + sum(x.sum() for x in state)

    want = jax.grad(loss, (0, 1))(q, a, "array_api")
    for x, y in zip(jax.grad(loss, (0, 1))(q, a), want, strict=True):
        close(to_numpy(x), to_numpy(y), 1e-9)
    mapped = jax.vmap(lambda q: hla.scan(q, k[0], v[0], backend="native"))
    for traced in (jax.jit(loss), jax.jit(jax.grad(loss)), lambda q, a: mapped(q)):
        with pytest.raises(hla.Unsupported, match="jit or vmap"):
            traced(q, a)


class DeviceArray:
    """Like Numba's device arrays: memory of a device, without a namespace; here the host has it."""

    def __init__(self, host, stream=None):
        self.host, self.stream = host, stream

    @property
    def __cuda_array_interface__(self):
        return self.host.__array_interface__ | {"version": 3, "stream": self.stream}


@pytest.mark.parametrize("place", ["q", "decay", "initial_state"])
def test_device_arrays_are_named(place, monkeypatch):
    """Where Numba is not here, or they come beside arrays of another library."""
    monkeypatch.setattr(package, "installed", lambda: "")
    x = np.ones((3, 2))
    given = {"q": x, "k": x, "v": x, place: DeviceArray(x)}
    if place == "initial_state":
        _, state = hla.scan(x, x, x, return_state=True)
        given[place] = state._replace(eta=DeviceArray(x))
    with pytest.raises((TypeError, ValueError), match=r"memory of a GPU.*cupy\.asarray"):
        hla.scan(**given)


@pytest.mark.parametrize("switch", ["allow_tf32", "fp32_precision"])
def test_torchs_switches_of_precision_are_read(switch):
    """Each of the two that torch has; it refuses to read the older where the newer is set."""
    torch = installed("torch")
    matmul, x = torch.backends.cuda.matmul, torch.ones(3, 2)
    on, off = {"allow_tf32": (True, False), "fp32_precision": ("tf32", "none")}[switch]
    assert "reduced" not in hla.explain(x, x, x).plan
    try:
        setattr(matmul, switch, on)
        assert "reduced precision" in hla.explain(x, x, x).plan
    finally:
        setattr(matmul, switch, off)
    assert "reduced" not in hla.explain(x, x, x).plan
