"""Scans over any combine; the reverse scan of the paper's 4.2 against the programs' adjoints."""

import numpy as np
import pytest
from conftest import OPERATORS, installed

import hla
from hla.core import scans
from hla.core.algebra import ALGEBRA

torch = installed("torch")
T, D, V = 7, 3, 2


def draw(seed=0, positive=False):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, T, D))
    q, k = (abs(q), abs(k)) if positive else (q, k)
    return q, k, rng.normal(size=(T, V)), rng.normal(size=(T, V)), rng.uniform(0.5, 0.9)


def stacked(elements):
    return type(elements[0])(*map(np.stack, zip(*elements, strict=True)))


def serial(combine, xs, identity):
    """Exclusive scan, left to right."""
    out = [identity]
    for i in range(len(xs[0]) - 1):
        out.append(combine(out[-1], scans.element(xs, i)))
    return stacked(out)


def reverse(combine_adjoint, before, xs, grads):
    """Gradients of the elements from those of the inclusive prefixes ``combine(before, xs)``."""
    carry, out = None, []
    for t in reversed(range(len(xs[0]))):
        g = scans.element(grads, t)
        g = g if carry is None else type(g)(*(a + b for a, b in zip(g, carry, strict=True)))
        carry, dx = combine_adjoint(scans.element(before, t), scans.element(xs, t), g)
        out.append(dx)
    return type(xs)(*(torch.stack(x) for x in zip(*out[::-1], strict=True)))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("key", ALGEBRA, ids="-".join)
def test_blelloch_is_the_serial_scan(key, length):
    algebra = ALGEBRA[key]
    q, k, v, _, g = draw()
    xs = algebra.lift(q[:length], k[:length], v[:length], np.full(length, g))
    one = algebra.identity(scans.element(xs, 0))
    both = serial(algebra.combine, xs, one), scans.blelloch(algebra.combine, xs, one)
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_reverse_scan_has_the_programs_gradients(operator, mask, normalize):
    """Reads and lifts are differentiated by torch; between them only `combine_adjoint` acts."""
    algebra = ALGEBRA[operator, mask]
    *host, do, g = draw(positive=normalize)
    q, k, v = (torch.tensor(x, requires_grad=True) for x in host)
    decay = torch.tensor(g, dtype=torch.float64, requires_grad=True)
    xs = algebra.lift(q, k, v, decay * torch.ones(T, dtype=torch.float64))
    fixed = type(xs)(*(x.detach() for x in xs))
    one = algebra.identity(scans.element(fixed, 0))
    before = scans.blelloch(algebra.combine, fixed, one)
    after = type(xs)(*(x.requires_grad_() for x in algebra.combine(before, fixed)))
    o, den = algebra.read(after.to_state(), q)
    o = o / (den[:, None] + 0.1) if normalize else o
    read = torch.autograd.grad((o * torch.tensor(do)).sum(), [*after, q], materialize_grads=True)
    grads = type(xs)(*read[:-1])
    dxs = reverse(algebra.combine_adjoint, before, fixed, grads)
    through = [(x, dx) for x, dx in zip(xs, dxs, strict=True) if x.requires_grad]  # not G = h = 0
    dq, dk, dv, ddecay = torch.autograd.grad(
        [x for x, _ in through],
        (q, k, v, decay),
        grad_outputs=[dx for _, dx in through],
        materialize_grads=True,
    )
    options = {"operator": operator, "mask": mask, "decay": np.array(g)}
    options |= {"normalize": normalize, "eps": 0.1}
    want = hla.vjp(*host, **options)[1](do)
    for got, expected in zip((dq + read[-1], dk, dv, ddecay), want, strict=False):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-9)
