"""Opaque backends of JAX arrays: what JAX cannot see through is one function that it can use."""

import sys

import numpy as np
import pytest
from conftest import close, draw, installed, load, to_numpy

import hla
from hla import backends, dispatch
from hla.backends import array_api
from hla.contract import Capabilities
from hla.core.request import FLOATS
from hla.libraries import exchange, rules

H, T, D, V = 2, 7, 4, 3
CALLS = ("plain", "hla2", "log_gate", "state")


class Opaque:
    """The generic code, whose derivatives are all zero and whose shapes must be the request's."""

    CAPABILITIES = Capabilities(FLOATS, native="jax", opaque=True)
    summarize = staticmethod(array_api.summarize)

    def __init__(self, jax):
        self.stop, self.seen = jax.lax.stop_gradient, []

    def forward(self, request, inputs):
        self.seen.append(("forward", request))
        assert [x.shape for x in inputs[:3]] == [
            request.q_shape, request.k_shape, request.v_shape
        ]  # fmt: skip
        return array_api.forward(request, self.hidden(inputs))

    def backward(self, request, inputs, saved, do, dstate):
        self.seen.append(("backward", request))
        given = self.hidden((inputs, saved, do, dstate))
        return array_api.backward(request, *given)

    def step(self, request, inputs, donate):
        raise AssertionError("a step is a forward of one token")

    def hidden(self, tree):
        import jax

        return jax.tree.map(self.stop, tree)


@pytest.fixture(scope="module")
def installed_backend():
    backend = Opaque(installed("jax"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "opaque", backend)
        patch.setattr(backends, "TABLE", {"opaque": "opaque", **backends.TABLE})
        yield backend
    for cached in (backends.load, exchange.loaded, rules.differentiable, dispatch._pick):
        cached.cache_clear()


@pytest.fixture
def opaque(installed_backend, quick_jax):
    installed_backend.seen.clear()
    return installed_backend


def arrays_of(kind):
    """Names and arrays of a call, and its options."""
    q, k, v = draw(H, T, D=D, V=V, positive=True)
    given, options = {"q": q, "k": k, "v": v}, {"normalize": True, "eps": 0.5, "scale": 0.5}
    rng = np.random.default_rng(3)
    if kind != "plain":
        given["decay"] = rng.uniform(0.5, 0.9, H)
    if kind == "log_gate":
        given["log_gate"] = -rng.random((H, T))
        del given["decay"]
    state = None
    if kind == "state":
        before = draw(H, 3, D=D, V=V, positive=True, seed=5)
        _, state = hla.scan(*before, decay=given["decay"], return_state=True)
    array = load("jax").array
    given = {n: array(x, "float64") for n, x in given.items()}
    if state is not None:
        given["initial_state"] = type(state)(*(array(x, "float64") for x in state))
    return given, options


def loss(jax, backend, options):
    def f(given):
        o, state = hla.scan(**given, **options, return_state=True, backend=backend)
        sums = [o, *state]
        return sum((jax.numpy.sin(x) * (1 + i)).sum() for i, x in enumerate(sums))

    return f


def true_loss(given, options):
    """The loss and its gradients by the core on NumPy's arrays, of which XLA compiles nothing."""
    import jax

    call = {"return_state": True, "backend": "array_api"} | options
    (o, state), pullback = hla.vjp(**jax.tree.map(to_numpy, given), **call)
    results = (o, *state)
    do, *rest = (np.cos(x) * (1 + i) for i, x in enumerate(results))
    slopes = pullback(do, type(state)(*rest))
    value = sum((np.sin(x) * (1 + i)).sum() for i, x in enumerate(results))
    return value, {n: getattr(slopes, f"d{n}") for n in given}


def alike(got, want, tol=1e-10):
    import jax

    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        close(to_numpy(x), to_numpy(y), tol)


@pytest.mark.parametrize("kind", CALLS)
def test_values_and_gradients(opaque, kind):
    """Eager and jitted: as the generic code's, though JAX sees none of its derivatives."""
    jax = installed("jax")
    given, options = arrays_of(kind)
    f, want = loss(jax, "opaque", options), true_loss(given, options)
    alike(jax.jit(jax.value_and_grad(f))(given), want)
    if kind == "state":
        alike((f(given), jax.grad(f)(given)), want)
    assert {call for call, _ in opaque.seen} == {"forward", "backward"}


@pytest.mark.parametrize("kind", ["log_gate", "state"])
def test_a_mapped_axis_is_a_batch_axis(opaque, kind):
    """By any of the arrays, mapped or not, mapped twice, and through gradients."""
    jax = installed("jax")
    given, options = arrays_of(kind)

    def times(x, n=3):
        return jax.numpy.stack([x * (0.6 + 0.2 * i) for i in range(n)])

    for names in (["v"] if kind == "log_gate" else [n for n in given if n not in "qkv"], [*given]):
        stacked = {n: jax.tree.map(times, x) if n in names else x for n, x in given.items()}
        axes = ({n: 0 if n in names else None for n in given},)
        f = loss(jax, "opaque", options)
        each, slope = (jax.vmap(x, in_axes=axes) for x in (f, jax.grad(f)))
        whole = jax.grad(lambda x, each=each: each(x).sum())
        both = jax.jit(lambda x, slope=slope, whole=whole: (slope(x), whole(x)))(stacked)
        entries = (
            {n: jax.tree.map(lambda y, i=i: y[i], x) if n in names else x
             for n, x in stacked.items()}
            for i in range(3)
        )  # fmt: skip
        slopes = [true_loss(one, options)[1] for one in entries]
        want = jax.tree.map(lambda *x: np.stack(x), *slopes)
        shared = {n: x if n in names else jax.tree.map(lambda y: y.sum(0), x)
                  for n, x in want.items()}  # fmt: skip
        alike(both, (want, shared))
    assert any(len(r.q_shape) == 4 for _, r in opaque.seen)


def test_a_mapped_axis_may_be_anywhere(opaque):
    """Behind others, beside batch axes that only some arrays have, and within another."""
    jax = installed("jax")
    q = load("jax").array(np.random.default_rng(0).standard_normal((2, 3, T, D)), "float64")
    k, v = q[:, :1], q[0]

    def scan(backend, axes):
        f = lambda q, k, v: hla.scan(q, k, v, operator="ahla", decay=0.9, backend=backend)  # noqa: E731
        for mapped in axes:
            f = jax.vmap(f, in_axes=mapped)
        return jax.jit(f)(q, k, v)

    for axes in ([(1, None, 0)], [(None, 0, None)], [(None, 0, None), (0, None, None)]):
        alike(scan("opaque", axes), scan("array_api", axes))


@pytest.mark.aot
def test_second_derivatives_are_the_generic_codes(opaque):
    jax = installed("jax")
    given, options = arrays_of("hla2")

    def bend(backend):
        f = loss(jax, backend, options)
        slope = jax.grad(f)
        return jax.jit(jax.grad(lambda x: sum((y**2).sum() for y in slope(x).values())))(given)

    alike(bend("opaque"), bend("array_api"), 1e-8)


def test_vjp_and_step(opaque):
    """hla.vjp under jit and vmap, a gradient through its pullback, and a step's gradient."""
    jax = installed("jax")
    given, options = arrays_of("state")

    def pulled(backend):
        def f(given, do):
            o, pullback = hla.vjp(**given, **options, backend=backend)
            return o, pullback(do)

        do = given["v"] * 0.5
        mapped = jax.tree.map(lambda x: x[None], (given, do))
        inner = jax.grad(lambda do: sum(x.sum() for x in f(given, do)[1][:3]))
        return jax.jit(lambda: (f(given, do), jax.vmap(f)(*mapped), inner(do)))()

    alike(pulled("opaque"), pulled("array_api"))

    def stepped(backend):
        def f(q, k, v, state):
            o, state = hla.step(q, k, v, state, decay=0.9, backend=backend)
            return o.sum() + sum((x**2).sum() for x in state)

        token = (given[n][:, 0] for n in "qkv")
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(*token, given["initial_state"])

    alike(stepped("opaque"), stepped("array_api"))


def test_only_the_gates_gradient_that_is_wanted_is_computed(opaque):
    jax = installed("jax")
    given, options = arrays_of("hla2")
    for names in (("q",), ("q", "decay")):
        opaque.seen.clear()
        some = {n: given[n] for n in names}
        jax.grad(lambda x: loss(jax, "opaque", options)(given | x))(some)
        (request,) = {r for call, r in opaque.seen if call == "backward"}
        assert request.gate_given == ("decay" in names)


def test_forward_mode_is_refused(opaque):
    jax = installed("jax")
    given, options = arrays_of("plain")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss(jax, "opaque", options), (given,), (given,))


def test_a_backend_of_another_librarys_memory_is_not_wrapped(monkeypatch):
    """Its arrays are handed over where they are there; a tracer has none."""
    installed("jax")
    library = rules.named("jax")
    for native, wrapped in (("jax", True), ("torch", False)):
        assert library.wraps(Capabilities(FLOATS, native=native, opaque=True)) == wrapped
    assert not library.wraps(Capabilities(FLOATS, native="jax"))
