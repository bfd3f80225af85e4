"""Fused kernels in Pallas Mosaic GPU: values on the host, every way of lowering for a GPU."""

import dataclasses

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
from terms import gates_within_budget  # noqa: E402

import hla  # noqa: E402
from hla.arguments import prepare  # noqa: E402
from hla.device.scan import Runner  # noqa: E402
from hla.kernels.pallas import hopper, hopper3, hopper_queries, hopper_reverse, token  # noqa: E402
from hla.kernels.pallas import rows as table  # noqa: E402
from hla.kernels.pallas import run as plans  # noqa: E402
from hla.states import HLA2State  # noqa: E402

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
        powers, sweeps = (1, 1) if second else (1, 2), hopper_reverse
        sweep, axis = (sweeps.AHLA, -3) if second else (sweeps.HLA2, -2)
        p = sweeps.Reverse(sweep, BATCH, kind, powers, scale, (True, True), axis=axis)
        found = [*(made := sweeps.reverse(p, (q, k, v, do, y), gate, R, Z)).rows, *made[1:3]]
        p = hopper_queries.Queries(operator, BATCH, kind, powers, scale, over=not second)
        dq = hopper_queries.queries(p, (k, v, do, y, found[0]), gate, S, F).dq
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


@pytest.mark.parametrize("kind", ORDERS)
def test_sweeps_of_hla3(kind, monkeypatch):
    """The same of hla3: its last pass, the other two, and what is added to what is there."""
    random, T, D, V, scale = np.random.default_rng(1), 232, 72, 128, 0.5
    shapes = [(*BATCH, T, n) for n in (D, D, V, V, D, V)]
    q, k, v, do, y, u = rows(random, *shapes)
    gate = gate_of(kind, T, random)
    R, P, Z = state(random, D, V), state(random, D, V), state(random, D, D)
    S, F = state(random, D, D), state(random, D, V)
    powers, sweeps = (1, 3), hopper_reverse
    with interpreted(monkeypatch, ORDERS[kind]):
        p = sweeps.Reverse(sweeps.ONE, BATCH, kind, (3, 3), scale, (True, False))
        (dy, du), last, *_ = sweeps.reverse(p, (q, u, do, y), gate, R)
        p = sweeps.Reverse(sweeps.SUM, BATCH, kind, (1, 1), scale, (True, True))
        (dk, dv), end, half, *_ = sweeps.reverse(p, (q, k, v, du, dy), gate, P, Z)
        p = hopper_queries.Queries("keys", BATCH, kind, (1, 1), scale, over=kind is not None)
        dq = hopper_queries.queries(p, (k, v, du, dy), gate, S, P).dq
        p = hopper_queries.Queries("one", BATCH, kind, (3, 3), scale, adds=True, over=True)
        dq = hopper_queries.queries(p, (u, do, y, dq), gate, None, F).dq
    Q, K, X, G, Y, U, E, H = wide(q, k, v, do, y, u, np.asarray(dy), np.asarray(du))
    one, three = (Weights(gate, kind, n, T) for n in powers)
    exact = [back(U, G, Q, three, turned(R) / scale)[0]]
    x, r = back(Y, Q, G, three, R / scale)
    exact += [x, r]
    x, s = back(K, Q, H, one, P / scale)
    (a, left), (b, rest) = (
        back(K, i, j, one, m / scale) for i, j, m in ((Q, E, Z), (E, Q, turned(Z)))
    )
    exact += [back(X, H, Q, one, turned(P) / scale)[0] + a + b, x, s, (left + rest) / 2]
    exact += [run(H, X, K, one, turned(P))[0] + run(E, K, K, one, turned(S))[0]]
    exact[-1] += run(G, U, Y, three, turned(F))[0]
    close([dy, du, last, dk, dv, end, half, dq], [scale * x for x in exact])


@pytest.mark.parametrize(("operator", "kind", "tokens", "D", "start"), [
    ("hla2", "log_gate", 0, 64, False), ("hla2", "decay", 0, 100, True),
    ("ahla", "log_gate", 128, 64, False), ("hla3", "log_gate", 0, 64, False),
])  # fmt: skip
def test_gates(operator, kind, tokens, D, start, monkeypatch):
    """The gradient of a gate, by sweeps: whole and in segments, states kept every 128 tokens.

    A first S is not symmetric, which later ones are; the gate is so mild that it lasts.
    """
    random, T, V, scale = np.random.default_rng(3), 300, 72, 0.5
    q, k, v, do = rows(random, *((*BATCH, T, n) for n in (D, D, V, V)))
    arrays = dict(zip("qkv", wide(q, k, v), strict=True)) | {kind: gate_of(kind, T, random)}
    options = {"operator": operator, "scale": scale}
    narrow = {n: jnp.asarray(x, jnp.bfloat16) for n, x in zip("qkv", (q, k, v), strict=True)}
    given = {kind: arrays[kind]}
    if start:
        given[kind] **= 0.05
        sizes = (D, D), (D, V), (D,)
        first = rows(random, *((*BATCH, *n) for n in sizes))
        given["initial_state"] = HLA2State(*(x.astype(np.float32) for x in first))
        arrays["initial_state"] = HLA2State(*wide(*given["initial_state"]))
    made = jax.tree.map(jnp.asarray, given)
    request, inputs, _ = prepare(**narrow, **options, **made, gradient=True)
    plain = plans.sweeps
    monkeypatch.setattr(plans, "sweeps", lambda where: plain("plain"))
    monkeypatch.setattr(table, "PERIOD", 128)
    monkeypatch.setattr(plans, "PERIOD", 64)
    monkeypatch.setattr(plans, "segments", lambda request, where: tokens)
    device = plans.device("cuda", -2)._replace(segments=plans.segments)
    runner, exact = Runner(device), hla.vjp(**arrays, **options, backend="array_api")[1]
    with interpreted(monkeypatch, ORDERS[kind]):
        *_, saved = runner.forward(request, inputs)
        got = runner.backward(request, inputs, saved, jnp.asarray(do), None)
    want = exact(wide(do)[0])
    first = ((x.dinitial_state or ())[:2] for x in (got, want))
    close(*([x.dq, x.dk, x.dv, *y] for x, y in zip((got, want), first, strict=True)))
    name = "dlog_gate" if kind == "log_gate" else "ddecay"
    gates_within_budget(
        np.asarray(getattr(got, name), np.float64), getattr(want, name), "bfloat16", arrays,
        options, wide(do), operator=operator,
    )  # fmt: skip


@pytest.mark.parametrize(("T", "operator", "count"), [
    (1, "hla2", 3), (64, "ahla", 3), (65, "hla3", 5),
])  # fmt: skip
def test_rows(T, operator, count):
    """Adjoints are swept, and forwards fused, of bfloat16 and any length."""
    q = jnp.ones((*BATCH, T, 24), jnp.bfloat16)
    options = {
        "operator": operator,
        "mask": "causal",
        "decay": None,
        "log_gate": None,
        "scale": 1.0,
    }
    request = prepare(q=q, k=q, v=q, **options, gradient=True)[0]
    assert len(table.rows(request)) == count
    wide = [x.astype(jnp.float32) for x in (q, q, q)]
    assert not table.rows(prepare(*wide, **options, gradient=True)[0])


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
     ("HLA2", "log_gate"), ("AHLA", "decay"), ("SUM", None), ("queries", "log_gate")],
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
        "queries": (
            hopper_queries.queries,
            hopper_queries.Queries("hla2", BATCH, kind, dots=True, every=4), 6, 2,
        ),
    }  # fmt: skip
    if name not in functions:
        sweep, dots = getattr(hopper_reverse, name), kind is not None
        p = hopper_reverse.Reverse(sweep, BATCH, kind, ends=(True, True), dots=dots, every=4 * dots)
        functions[name] = hopper_reverse.reverse, p, 5, 2
    function, p, arrays, states = functions[name]
    listed = function in (hopper_reverse.reverse, hopper_queries.queries)
    kept = [[jax.ShapeDtypeStruct((*BATCH, 2, n, n), jnp.bfloat16)] * 2] * (name == "queries")
    safe = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    lowered = jax.export.export(
        jax.jit(lambda *given: function(p, *given)), platforms=["cuda"], disabled_checks=safe
    )(*([[x] * arrays] if listed else [x] * arrays), gate, *[state] * states, *kept)
    assert "mosaic_gpu" in lowered.mlir_module()


@pytest.mark.parametrize(("operator", "gate", "normalize", "D", "donate"), [
    ("hla2", "decay", False, 128, True), ("ahla", None, True, 64, False),
    ("hla3", "log_gate", True, 64, True),
])  # fmt: skip
def test_a_token(operator, gate, normalize, D, donate, monkeypatch):
    """Against the core in float64; states of parts of the denominator too."""
    random = np.random.default_rng(0)
    q, k, v = (np.abs(random.standard_normal((*BATCH, D))) for _ in "qkv")
    start = hla.scan(*(random.standard_normal((*BATCH, 9, D)) for _ in "qkv"), operator=operator,
                     return_state=True)[1]  # fmt: skip
    gates = {}
    if gate is not None:
        g = np.broadcast_to(np.float32([0.9, 0.7]), BATCH)
        gates = {gate: np.log(g) if gate == "log_gate" else g}
    options = {"operator": operator, "normalize": normalize, "scale": 0.3}
    narrow = [x.astype(BF16) for x in (q, k, v)]
    state = type(start)(*(x.astype(np.float32) for x in start))
    given = jax.tree.map(jnp.asarray, (narrow, {"initial_state": state} | gates))
    more = {"return_state": True, "gradient": False} | options
    request, inputs, _ = prepare(*given[0], one_token=True, **given[1], **more)
    request = dataclasses.replace(request, donate=donate)
    inputs = jax.tree.map(np.asarray, inputs)
    assert token.fits(request)
    with interpreted(monkeypatch, (0,)):
        o, found = token.step(request, inputs)
    state, gates = type(start)(*wide(*state)), dict(zip(gates, wide(*gates.values()), strict=True))
    want, after = hla.step(*wide(*narrow), state, **gates, **options)
    assert error(o[..., 0, :], want) < 4e-3
    for x, y in zip(found, after, strict=True):
        assert error(x, y) < 2e-6
