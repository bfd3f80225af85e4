"""torch.func and JAX transformations: jit, vmap, grad, scan; graphs that do not grow."""

import functools
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import OPERATORS, close, draw, installed, load, to_numpy

import hla


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_func(operator):
    """torch.func: vmap over scan, and grad of each batch entry, equal the batched call."""
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(3, 9))
    f = functools.partial(hla.scan, operator=operator, decay=0.9, chunk_size=4)
    close(to_numpy(torch.func.vmap(f)(q, k, v)), to_numpy(f(q, k, v)), 1e-12)
    gradient = torch.func.grad(lambda q, k, v: (f(q, k, v) ** 2).sum(), argnums=(0, 1, 2))
    each = torch.func.vmap(gradient)(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    (f(*leaves) ** 2).sum().backward()
    for x, y in zip(each, leaves, strict=True):
        close(to_numpy(x), to_numpy(y.grad), 1e-12)


def test_torch_layouts_and_tensors_that_need_gradients():
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(2, 9))
    want = hla.scan(q, k, v)
    close(to_numpy(hla.scan(q.mT.contiguous().mT, k, v.expand(2, 9, 3))), to_numpy(want), 1e-12)
    q.requires_grad_()
    _, state = hla.scan(q, k, v, return_state=True)
    assert all(isinstance(x, torch.Tensor) for x in state)
    o, _ = hla.step(q[:, 0], k[:, 0], v[:, 0], state)
    o.sum().backward()
    assert q.grad is not None


@pytest.fixture(scope="module")
def jax():
    load("jax")
    return installed("jax")


def test_jax_transformations(jax):
    """jit, vmap over a batch axis anywhere, and grad, with a state going in and out."""
    lib = load("jax")
    inputs = draw(3, 9)
    q, k, v = lib.arrays(*inputs)
    want, end = hla.scan(*inputs, decay=0.9, return_state=True)

    @jax.jit
    def f(q, k, v, decay):
        return hla.scan(q, k, v, decay=decay, chunk_size=4, return_state=True)

    o, state = f(q, k, v, 0.9)
    close(to_numpy(o), want)
    assert type(state).__name__ == type(end).__name__
    o, state = jax.vmap(f, in_axes=(0, 0, 1, None))(q, k, v.swapaxes(0, 1), 0.9)
    close(to_numpy(o), want)
    for x, y in zip(state, end, strict=True):
        close(to_numpy(x), y)
    loss = jax.jit(jax.grad(lambda q: hla.scan(q, k, v, decay=0.9).sum()))
    close(to_numpy(loss(q)), hla.vjp(*inputs, decay=0.9)[1](np.ones((3, 9, 3))).dq)


@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_jax_scan_over_steps(jax, operator):
    """The state is a pytree of one type and shape, so lax.scan carries it; packed states too."""
    inputs = draw(2, 9)
    arrays = load("jax").arrays(*(x.swapaxes(0, 1) for x in inputs))
    f = functools.partial(hla.step, operator=operator, decay=0.9)
    empty = hla.scan(
        *(x[:, :0] for x in load("jax").arrays(*inputs)), operator=operator, return_state=True
    )[1]

    def body(state, x):
        return f(*x, state)[::-1]

    want, end = hla.scan(*inputs, operator=operator, decay=0.9, return_state=True)
    state, o = jax.jit(lambda s, x: jax.lax.scan(body, s, x))(empty, arrays)
    close(to_numpy(o).swapaxes(0, 1), want)
    for x, y in zip(state, end, strict=True):
        close(to_numpy(x), y)
    _, o = jax.lax.scan(body, empty.pack(), arrays)
    close(to_numpy(o).swapaxes(0, 1), want)


def test_packed_states_are_differentiated_as_they_are_given(jax):
    """Autograd, torch.func and jax.grad through packed states: what hla.vjp gives."""
    torch = installed("torch")
    inputs = draw(2, 9)
    options = {"decay": 0.9, "return_state": True}
    start = hla.scan(*inputs, **options)[1].pack()
    (o, end), pullback = hla.vjp(*inputs, initial_state=start, **options)
    want = pullback(o, end).dinitial_state

    def loss(q, k, v, state):
        o, end = hla.scan(q, k, v, initial_state=state, **options)
        assert type(end) is type(start)
        return sum((x**2).sum() for x in (o, *end)) / 2

    lib = load("torch")
    leaves = type(start)(*(x.requires_grad_() for x in lib.arrays(*start)))
    loss(*lib.arrays(*inputs), leaves).backward()
    by_func = torch.func.grad(loss, argnums=3)(
        *lib.arrays(*inputs), type(start)(*lib.arrays(*start))
    )
    lib = load("jax")
    by_jax = jax.jit(jax.grad(loss, argnums=3))(
        *lib.arrays(*inputs), type(start)(*lib.arrays(*start))
    )
    assert type(by_func) is type(by_jax) is type(start)
    for x, y, z, g in zip(leaves, by_func, by_jax, want, strict=True):
        for found in (x.grad, y.detach(), z):
            close(to_numpy(found), g, 1e-12)


def test_torch_compiles_what_takes_packed_states():
    """scan, step and combine in one graph, and packing itself; gradients too."""
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(2, 9))
    _, start = hla.scan(q, k, v, return_state=True)
    later = hla.summarize(q, k, v, decay=0.9)

    def f(q, packed, later):
        _, packed = hla.scan(q, k, v, initial_state=packed, return_state=True)
        o, packed = hla.step(q[:, 0], k[:, 0], v[:, 0], packed)
        return o, hla.combine(packed, later).unpack().pack()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    found = []
    for call in (f, compiled):
        leaf = q.clone().requires_grad_()
        o, end = call(leaf, start.pack(), later)
        assert type(end) is type(start.pack())
        (o.sum() + sum(x.sum() for x in end)).backward()
        found.append((o.detach(), *(x.detach() for x in end), leaf.grad))
    for x, y in zip(*found, strict=True):
        close(to_numpy(y), to_numpy(x), 1e-12)


def test_packing_copies_constants_from_the_host_once(monkeypatch):
    """As a CUDA graph needs, which is captured after one run; what a trace makes is not kept."""
    torch = installed("torch")
    namespace = installed("hla.core.namespace")
    monkeypatch.setattr(namespace, "_kept", {})
    _, state = hla.scan(*load("torch").arrays(*draw(2, 9)), return_state=True)
    torch.func.vmap(lambda S: state._replace(S=S).pack().unpack().S)(state.S)
    torch.func.grad(lambda S: state._replace(S=S).pack().unpack().S.sum())(state.S)
    with torch.inference_mode():
        state.pack().unpack()

    def copied(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(namespace.namespace(state.S), "asarray", copied)
    S = state.S.clone().requires_grad_()
    state._replace(S=S).pack().unpack().S.sum().backward()
    close(to_numpy(S.grad[0]), np.triu(np.full((5, 5), 2.0)) - np.eye(5))


def equations(jaxpr):
    """The number of equations of a jaxpr, those of its inner ones included."""
    found = 0
    for eqn in jaxpr.eqns:
        found += 1
        for value in eqn.params.values():
            for x in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(x, "jaxpr", x)
                if hasattr(inner, "eqns"):
                    found += equations(inner)
    return found


def test_jaxpr_counter_sees_inner_loops(jax):
    def body(x, _):
        return x + 1 + 2 + 3, None

    loop = jax.make_jaxpr(lambda x: jax.lax.scan(body, x, length=3))(0.0)
    assert equations(loop.jaxpr) >= 4


@pytest.mark.parametrize("operator", OPERATORS)
def test_jax_graphs_do_not_grow_with_the_sequence(jax, operator):
    """Chunked and recurrent: one graph for any T, backwards too; associative: log T."""

    def size(T, form, gradient=False):
        x = jax.ShapeDtypeStruct((T, 8), np.float32)
        a = jax.ShapeDtypeStruct((T,), np.float32)

        def f(q, k, v, a):
            return hla.scan(q, k, v, log_gate=a, operator=operator, form=form, chunk_size=16)

        def g(*args):
            return jax.grad(lambda *args: f(*args).sum())(*args)

        return equations(jax.make_jaxpr(g if gradient else f)(x, x, x, a).jaxpr)

    for form in ("chunked", "recurrent"):
        assert size(512, form) == size(2048, form)
        assert size(512, form, gradient=True) == size(2048, form, gradient=True)
    small, middle, large = (size(T, "associative") for T in (128, 512, 2048))
    assert large - middle <= 1.2 * (middle - small) + 50


def test_jax_tracers_skip_value_checks(jax):
    """Under jit only shapes are checked: a bad decay is not an error there, a bad shape is."""
    q, k, v = load("jax").arrays(*draw(2, 9))
    f = jax.jit(lambda decay: hla.scan(q, k, v, decay=decay))
    assert f(np.float64(1.5)).shape == (2, 9, 3)
    with pytest.raises(ValueError, match="decay"):
        f(np.ones(9))


def test_jax_without_x64():
    """JAX as it comes: float32 throughout, and nothing asks for a float64 that it would not get."""
    code = """
        import numpy as np, jax, jax.numpy as jnp, hla
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((3, 2, 70, 8)))
        a = jnp.asarray(-rng.random((2, 70)), jnp.float32)
        wide = [np.asarray(x, np.float64) for x in (q, k, v, a)]
        o, state = hla.scan(q, k, v, log_gate=a, return_state=True)
        want, end = hla.scan(*wide[:3], log_gate=wide[3], return_state=True)
        assert {x.dtype for x in (o, *state)} == {jnp.dtype("float32")}
        assert abs(o - want).max() < 1e-5 * abs(want).max()
        hla.step(q[:, 0], k[:, 0], v[:, 0], state, decay=0.9)
        hla.combine(hla.summarize(q, k, v, decay=0.9), hla.summarize(q, k, v, decay=0.9))
        jax.grad(lambda q: hla.scan(q, k, v, decay=0.9).sum())(q)
        hla.scan(*(x.astype(jnp.bfloat16) for x in (q, k, v)), decay=np.float64(0.9))
    """
    root = str(pathlib.Path(hla.__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": root, "JAX_ENABLE_X64": "0"},
        check=True,
    )
