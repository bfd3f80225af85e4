"""Fused kernels in Pallas Mosaic GPU: values on the host, every way of lowering for a GPU."""

import numpy as np
import pytest
from conftest import installed
from mosaic_interpreter import interpreted

pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
jax = installed("jax")
if tuple(map(int, jax.__version__.split(".")[:3])) < (0, 10, 2):
    pytest.skip("Mosaic GPU of an older JAX", allow_module_level=True)
installed("absl")
from jax import numpy as jnp  # noqa: E402

from hla.arguments import prepare  # noqa: E402
from hla.kernels.pallas import hopper, hopper3, hopper_queries, hopper_reverse  # noqa: E402
from hla.kernels.pallas import hopper_reverse_ahla as ahla  # noqa: E402
from hla.kernels.pallas.rows import rows as rows_of  # noqa: E402

BF16 = np.dtype(jnp.bfloat16)
BATCH = 1, 2
ORDERS = {  # loads as early, and as late, as barriers let them; the first owner as far ahead
    None: (2, 0, 1), "decay": (1, 0, 2), "log_gate": (0, 2, 1),
}  # fmt: skip


def turned(x):
    return np.swapaxes(x, -1, -2)


def error(x, exact):
    return np.linalg.norm(np.asarray(x, np.float64) - exact) / np.linalg.norm(exact)


class Weights:
    """Weights of a pass by its gate, in float64."""

    def __init__(self, gate, kind, power, T):
        a = np.zeros((1, T))
        if kind == "decay":
            a = np.repeat(np.log(gate.astype(np.float64))[..., None], T, axis=-1)
        if kind == "log_gate":
            a = np.maximum(gate.astype(np.float64), -200.0)
        c = power * np.cumsum(a, axis=-1)
        self.pairs = np.tril(np.exp(np.minimum(c[..., :, None] - c[..., None, :], 0.0)))
        self.before, self.after = np.exp(c)[..., None], np.exp(c[..., -1:] - c)[..., None]
        self.total = np.exp(c[..., -1])[..., None, None]


def run(q, k, v, w, S):
    """Return (o, last state) of a causal pass."""
    o = ((q @ turned(k)) * w.pairs) @ v + (q * w.before) @ S
    return o, turned(k * w.after) @ v + w.total * S


def back(q, k, v, w, S):
    """Return the same of a reverse one."""
    o = ((q @ turned(k)) * turned(w.pairs)) @ v + (q * w.after) @ S
    return o, turned(k * w.before) @ v + w.total * S


def gate_of(kind, T, random):
    if kind == "decay":
        return random.uniform(0.8, 1.0, BATCH).astype(np.float32)
    if kind == "log_gate":
        found = -random.exponential(0.1, (*BATCH, T)).astype(np.float32)
        found[..., T // 3] = -np.inf
        return found
    return None


def rows(random, *shapes):
    return [(random.standard_normal(s) * s[-1] ** -0.25).astype(BF16) for s in shapes]


def wide(*arrays):
    return [x.astype(np.float64) for x in arrays]


def state(random, *shape):
    return random.standard_normal((*BATCH, *shape)).astype(np.float32)


def close(found, exact):
    """Whether all are within bfloat16's rounding of a few products."""
    errors = [error(x, y) for x, y in zip(found, exact, strict=True)]
    assert max(errors) < 6e-3, errors


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("operator", ["hla2", "ahla", "hla3"])
def test_forward(operator, kind, monkeypatch):
    """Outputs, what is kept and last states, of widths and lengths that tiles do not divide."""
    random, T, D, V, scale = np.random.default_rng(0), 400, 72, 40, 0.5
    q, k, v = rows(random, (*BATCH, T, D), (1, 1, T, D), (*BATCH, T, V))
    gate = gate_of(kind, T, random)
    S, P, F = state(random, D, D), state(random, D, V), state(random, D, V)
    third, powers = operator == "hla3", {"hla2": (1, 2), "ahla": (1, 1), "hla3": (1, 3)}[operator]
    ends = BATCH, BATCH
    with interpreted(monkeypatch, ORDERS[kind]):
        if third:
            p = hopper3.Triple(BATCH, kind, powers, (scale,) * 3, BATCH, False, BATCH, BATCH)
            found = hopper3.triple(p._replace(ends=(*ends, BATCH)), q, k, v, gate, S, P, F)
        else:
            p = hopper.Pair(operator == "ahla", BATCH, kind, powers, (scale,) * 2, BATCH)
            p = p._replace(y=BATCH, ends=ends, wide=kind == "decay", axis=-3)
            found = hopper.pair(p, q, k, v, gate, P if p.ahla else S, F)
    Q, K, X = wide(q, k, v)
    one, two = (Weights(gate, kind, n, T) for n in powers)
    y, S = run(Q, K, K, one, S)
    u, P = run(Q, K, X, one, P)
    y, u = scale * y, scale * u
    o, F = run(Q, K if operator == "ahla" else y, X if operator == "hla2" else u, two, F)
    exact = {"hla2": (y, S, F), "ahla": (u, P, F), "hla3": (y, u, S, P, F)}[operator]
    close(found, (scale * o, *exact))


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("operator", ["hla2", "ahla"])
def test_sweeps(operator, kind, monkeypatch):
    """Gradients of all but the gate, and the states' at the first token."""
    random, T, D, V, scale = np.random.default_rng(1), 232, 72, 128, 0.5
    q, k, v, do = rows(random, (*BATCH, T, D), (*BATCH, T, D), (*BATCH, T, V), (*BATCH, T, V))
    gate, second = gate_of(kind, T, random), operator == "ahla"
    R, Z = state(random, D, V), state(random, D, V if second else D)
    S, F = state(random, D, V if second else D), state(random, D, V)
    Q, K, X, G = wide(q, k, v, do)
    one, two = (Weights(gate, kind, n, T) for n in (1, 1 if second else 2))
    (y,) = rows(random, (*BATCH, T, V if second else D))
    (Y,) = wide(y)
    with interpreted(monkeypatch, ORDERS[kind]):
        if second:
            p = ahla.Reverse(BATCH, kind, scale, (True, True), axis=-3)
            found = ahla.reverse(p, q, k, v, do, y, gate, R, Z)
        else:
            p = hopper_reverse.Reverse(BATCH, kind, (1, 2), scale, end=True, half=True)
            found = hopper_reverse.reverse(p, q, k, v, do, y, gate, R, Z)
        powers = (1, 1) if second else (1, 2)
        p = hopper_queries.Queries(second, BATCH, kind, powers, scale)
        dq = hopper_queries.queries(p, k, v, do, y, found[0], gate, S, F)
    (dy,) = wide(found[0])
    if second:
        du, last = back(K, Q, G, one, R / scale)
        dv, end = back(K, Q, dy, one, Z / scale)
        dk = back(Y, G, Q, one, turned(R) / scale)[0] + back(X, dy, Q, one, turned(Z) / scale)[0]
        exact = du, dv, dk, last, end
        queries = run(G, Y, K, two, turned(F))[0] + run(dy, X, K, one, turned(S))[0]
    else:
        first, last = back(X, G, Q, two, turned(R) / scale)
        dv = back(Y, Q, G, two, R / scale)[0]
        (a, half), (b, rest) = (
            back(K, x, z, one, m / scale) for x, z, m in ((Q, dy, Z), (dy, Q, turned(Z)))
        )
        exact = first, dv, a + b, turned(last), (half + rest) / 2
        queries = run(G, X, Y, two, turned(F))[0] + run(dy, K, K, one, turned(S))[0]
    close([*found, dq], [scale * x for x in (*exact, queries)])


@pytest.mark.parametrize(("T", "operator", "count"), [
    (1, "hla2", 1), (64, "ahla", 1), (65, "hla2", 3), (65, "ahla", 3), (65, "hla3", 1),
])  # fmt: skip
def test_rows(T, operator, count):
    """Adjoints of more than a chunk are swept, but for hla3's; any forward of bfloat16 is fused."""
    q = jnp.ones((*BATCH, T, 24), jnp.bfloat16)
    options = {
        "operator": operator,
        "mask": "causal",
        "decay": None,
        "log_gate": None,
        "scale": 1.0,
    }
    request = prepare(q=q, k=q, v=q, **options, gradient=True)[0]
    assert len(rows_of(request)) == count
    wide = [x.astype(jnp.float32) for x in (q, q, q)]
    assert not rows_of(prepare(*wide, **options, gradient=True)[0])


def test_a_hang_is_found(monkeypatch):
    """A ring that nobody frees stops a kernel, and is reported."""
    (q,) = rows(np.random.default_rng(2), (*BATCH, 600, 64))
    monkeypatch.setattr(hopper, "rings", lambda p: (hopper.Ring(4, 9, 2), *rings(p)[1:]))
    with (
        interpreted(monkeypatch),
        pytest.raises(AssertionError, match="wait"),
    ):
        hopper.pair(hopper.Pair(False, BATCH, o=BATCH), q, q, q)


rings = hopper.rings


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hla2", None), ("hla2", "log_gate"), ("ahla", "decay"), ("hla3", "log_gate"),
     ("reverse", "log_gate"), ("reverse ahla", "decay"), ("queries", "log_gate")],
)  # fmt: skip
def test_lowering(name, kind):
    """Every kernel lowers for a GPU that is not there, with all it can be asked for."""
    T, n = 520, 128
    x = jax.ShapeDtypeStruct((*BATCH, T, n), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((*BATCH, n, n), jnp.float32)
    gate = kind and jax.ShapeDtypeStruct((*BATCH, *((T,) * (kind == "log_gate"))), jnp.float32)
    pair = {"batch": BATCH, "gate": kind, "o": BATCH, "y": BATCH, "axis": -3}
    pair["ends"] = BATCH, BATCH
    functions = {
        "hla2": (hopper.pair, hopper.Pair(False, **pair), 3, 2),
        "ahla": (hopper.pair, hopper.Pair(True, **pair, wide=True), 3, 2),
        "hla3": (
            hopper3.triple, hopper3.Triple(**pair | {"ends": (BATCH,) * 3}, u=BATCH), 3, 3,
        ),
        "reverse": (
            hopper_reverse.reverse, hopper_reverse.Reverse(BATCH, kind, end=True, half=True), 5, 2,
        ),
        "reverse ahla": (ahla.reverse, ahla.Reverse(BATCH, kind, ends=(True, True)), 5, 2),
        "queries": (hopper_queries.queries, hopper_queries.Queries(False, BATCH, kind), 5, 2),
    }  # fmt: skip
    function, p, arrays, states = functions[name]
    safe = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    lowered = jax.export.export(
        jax.jit(lambda *given: function(p, *given)), platforms=["cuda"], disabled_checks=safe
    )(*[x] * arrays, gate, *[state] * states)
    assert "mosaic_gpu" in lowered.mlir_module()
