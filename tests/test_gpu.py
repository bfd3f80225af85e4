"""CuPy, torch and JAX on a GPU: the same code, within the float32 budget of NumPy in float64."""

import numpy as np
import pytest
from conftest import OPERATORS

import hla

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::hla.SlowPathWarning")]
LIBRARIES = ("cupy", "torch", "jax")
SHAPE = (2, 3, 300, 24)
FLOAT32 = 4 * 2.0**-24 * (2 + 0.2 * 24**0.5 + 0.3 * (300 / 64) ** 0.5)  # the budget for T, D, W


def arrays(library, *xs):
    """NumPy arrays as arrays of a library on its GPU, and the way back; skips without one."""
    xp = pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "cupy":
        if not xp.is_available():
            pytest.skip("no CUDA device for cupy")
        return [xp.asarray(x) for x in xs], xp.asnumpy
    if library == "torch":
        if not xp.cuda.is_available():
            pytest.skip("no CUDA device for torch")
        return [xp.tensor(x, device="cuda") for x in xs], lambda x: x.cpu().numpy()
    if xp.default_backend() != "gpu":
        pytest.skip("no GPU for jax")
    return [xp.numpy.asarray(x) for x in xs], np.asarray


def draw():
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(4))
    gate = -rng.uniform(0, 0.1, size=SHAPE[:-1]).astype(np.float32)
    gate[..., 100] = -np.inf
    return q, k, v, do, gate


def off(got, want):
    """Largest relative RMS error of a head."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    axes = tuple(range(2, want.ndim))
    return (((got - want) ** 2).sum(axes) ** 0.5 / (want**2).sum(axes) ** 0.5).max()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_scan_and_gradient_within_the_budget(library, operator, mask, gated):
    host = draw()
    (q, k, v, do, gate), back = arrays(library, *host)
    options = {"operator": operator, "mask": mask, "return_state": True}
    (o, state), pullback = hla.vjp(q, k, v, log_gate=gate if gated else None, **options)
    grads = pullback(do)
    wide = [x.astype(np.float64) for x in host]
    (want, want_state), want_pullback = hla.vjp(
        *wide[:3], log_gate=wide[4] if gated else None, **options
    )
    want_grads = want_pullback(wide[3])
    assert type(o) is type(q)
    assert o.device == q.device
    assert off(back(o), want) < FLOAT32
    for x, y in zip(state, want_state, strict=True):
        assert off(back(x), y) < FLOAT32
    for name in ("dq", "dk", "dv"):
        assert off(back(getattr(grads, name)), getattr(want_grads, name)) < 1.5 * FLOAT32


@pytest.mark.parametrize("library", LIBRARIES)
def test_steps_continue_a_scan(library):
    host = draw()
    (q, k, v, *_), back = arrays(library, *host)
    whole = hla.scan(q, k, v, decay=0.9)
    first = (x[..., :-1, :] for x in (q, k, v))
    _, state = hla.scan(*first, decay=0.9, return_state=True)
    last, _ = hla.step(q[..., -1, :], k[..., -1, :], v[..., -1, :], state, decay=0.9)
    assert off(back(last)[..., None, :], back(whole)[..., -1:, :]) < 2 * FLOAT32


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_slow_path_is_said_once(library):
    (q, k, v), _ = arrays(library, *draw()[:3])
    hla.dispatch._warned.clear()
    with pytest.warns(hla.SlowPathWarning, match="no kernel backend"):
        hla.scan(q, k, v)
    hla.scan(q, k, v)
