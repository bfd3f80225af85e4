"""The libraries' own autograd through hla.scan: equal to hla.vjp, right in higher orders."""

import numpy as np
import pytest
from conftest import (
    MOVABLE,
    OPERATORS,
    Row,
    close,
    draw,
    gated,
    installed,
    load,
    movable,
    states,
    symmetric,
    to_numpy,
)

import hla

H, T = 2, 9


def with_reference(row, gate):
    """Inputs, options, cotangent, and hla.vjp's gradients on NumPy, for the libraries' autograd."""
    q, k, v = draw(H, T)
    inputs = {"q": q, "k": k, "v": v} | movable(gate, H, T)
    options = {"operator": row.operator, "mask": row.mask, "scale": 0.8, "chunk_size": 4}
    options |= {"form": row.form}
    if row.mask != "none":
        start, _ = states(H, {n: options[n] for n in ("operator", "mask", "scale")}, inputs)
        inputs["initial_state"] = start
    do = draw(H, T, seed=4)[2]
    o, pullback = hla.vjp(**inputs, **options)
    return inputs, options, do, o, pullback(do)


def as_library(lib, inputs):
    return {
        n: type(x)(*lib.arrays(*x)) if n == "initial_state" else lib.array(x, "float64")
        for n, x in inputs.items()
    }


def agree(found, want):
    """Gradients by input name against hla.vjp's; denominators that nothing reads may be None.

    S and Q are symmetric, so only the symmetric part of their gradients is anyone's.
    """
    for name, x in found.items():
        reference = getattr(want, "d" + name)
        if name != "initial_state":
            close(to_numpy(x), reference)
            continue
        for field, got, expected in zip(reference._fields, x, reference, strict=True):
            if got is None:
                assert not expected.any()
            else:
                close(symmetric(field, to_numpy(got)), symmetric(field, expected))


@pytest.mark.parametrize(("row", "gate"), gated(MOVABLE, library="torch"))
def test_torch_autograd_is_vjp(row: Row, gate):
    torch = installed("torch")
    inputs, options, do, o, want = with_reference(row, gate)
    mine = as_library(load("torch"), inputs)
    leaves = [
        x.requires_grad_()
        for given in mine.values()
        for x in (given if isinstance(given, tuple) else (given,))
    ]
    got = hla.scan(**mine, **options)
    close(to_numpy(got.detach()), o)
    flat = list(torch.autograd.grad(got, leaves, torch.as_tensor(do), allow_unused=True))
    found = {
        n: [flat.pop(0) for _ in x] if isinstance(x, tuple) else flat.pop(0)
        for n, x in mine.items()
    }
    agree(found, want)


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_gradients_go_only_where_asked(operator):
    torch = installed("torch")
    q, k, v = load("torch").arrays(*draw(H, T))
    assert not hla.scan(q, k, v, operator=operator).requires_grad
    want = hla.vjp(*draw(H, T), operator=operator)[1](np.ones((H, T, 3)))
    for i, name in enumerate(("dq", "dk", "dv")):
        arrays = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        o = hla.scan(*arrays, operator=operator)
        o.sum().backward(retain_graph=True)
        close(to_numpy(arrays[i].grad), getattr(want, name))
        o.sum().backward()
        close(to_numpy(arrays[i].grad), 2 * getattr(want, name))
        assert all(x.grad is None for j, x in enumerate(arrays) if j != i)
        with torch.no_grad():
            assert not hla.scan(*arrays, operator=operator).requires_grad


@pytest.mark.parametrize(
    ("row", "gate"), gated(["none", "per_head", "log_gate"], forms=("chunked",), library="torch")
)
def test_torch_gradcheck(row: Row, gate):
    torch = installed("torch")
    arrays = [*draw(H, 3, D=2, V=2)]  # a chunk and a short one
    if gate != "none":
        arrays.append(next(iter(movable(gate, H, T).values()))[..., :3])
    leaves = [x.requires_grad_() for x in load("torch").arrays(*arrays)]
    names = {"none": None, "per_head": "decay", "log_gate": "log_gate"}

    def f(q, k, v, g=None):
        options = {} if g is None else {names[gate]: g}
        return hla.scan(q, k, v, chunk_size=2, **row.options, **options)

    assert torch.autograd.gradcheck(
        f, leaves, nondet_tol=0.0, check_forward_ad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(f, leaves, nondet_tol=0.0, fast_mode=True)


JAX = [
    pytest.param(Row("array_api", "chunked", operator, mask), gate, id=f"{operator}-{mask}-{gate}")
    for operator, mask, gate in (
        ("hla2", "causal", "resets"),
        ("ahla", "causal", "per_head"),
        ("hla3", "prefix", "none"),
    )
]


@pytest.mark.parametrize(("row", "gate"), JAX)
def test_jax_grad_is_vjp(quick_jax, row: Row, gate):
    jax = quick_jax
    inputs, options, do, o, want = with_reference(row, gate)
    mine = as_library(load("jax"), inputs)

    @jax.jit
    def pull(arrays, do):
        o, back = jax.vjp(lambda arrays: hla.scan(**arrays, **options), arrays)
        return o, back(do)[0]

    got, found = pull(mine, load("jax").array(do, "float64"))
    close(to_numpy(got), o)
    agree(found, want)


@pytest.mark.aot
@pytest.mark.parametrize(("row", "gate"), JAX[:1])  # a decay: test_jax has its hessian at 0
def test_jax_first_and_second_derivatives(quick_jax, row: Row, gate):
    """check_grads forward; forward and reverse over reverse against differences of grad."""
    test_util = installed("jax.test_util")
    lib = load("jax")
    arrays = [*draw(H, 5, D=2, V=2)]
    reset = np.zeros((H, 5))
    reset[0, 3] = -np.inf  # this entry stays: what moves is added to it
    if gate != "none":
        arrays.append(next(iter(movable("log_gate" if gate == "resets" else gate, H, 5).values())))

    @quick_jax.jit
    def f(q, k, v, g=None):
        gates = {} if g is None else {"decay": g} if gate == "per_head" else {"log_gate": g + reset}
        return hla.scan(q, k, v, operator=row.operator, mask=row.mask, chunk_size=2, **gates)

    x = lib.arrays(*arrays)
    test_util.check_grads(f, x, order=1, modes=("fwd",), atol=1e-6, rtol=1e-6)
    rng = np.random.default_rng(3)
    d = lib.arrays(*(rng.standard_normal(y.shape) for y in arrays))
    jit, grad = quick_jax.jit, quick_jax.grad
    gradient = jit(grad(lambda x: (f(*x) ** 2).sum()))
    forward = jit(lambda x: quick_jax.jvp(gradient, (x,), (d,))[1])
    reverse = jit(grad(lambda x: sum((a * b).sum() for a, b in zip(gradient(x), d, strict=True))))
    h = 1e-4
    right, left = (gradient(tuple(a + s * b for a, b in zip(x, d, strict=True))) for s in (h, -h))
    for one, other, r, l in zip(forward(x), reverse(x), right, left, strict=True):
        close(to_numpy(one), to_numpy(other), 1e-10)
        close(to_numpy(one), to_numpy((r - l) / (2 * h)), 1e-5)


@pytest.mark.parametrize("name", ["array_api_strict", "torch", "jax"])
def test_vjp_takes_other_libraries(name):
    lib = load(name)
    inputs, options, do, o, want = with_reference(Row("", "chunked", "hla2", "causal"), "resets")
    got, pullback = hla.vjp(**as_library(lib, inputs), **options)
    gradients = pullback(lib.array(do, "float64"))
    assert isinstance(gradients.dq, lib.kind)
    close(to_numpy(got), o)
    assert gradients.ddecay is None
    agree({n: getattr(gradients, "d" + n) for n in inputs}, want)
