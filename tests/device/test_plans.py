"""Plans on fake devices against torch's autograd through array_api, in float64.

Random requests on devices of every kind: written in place (poisoned, strided), of narrow launches,
fused, functional, in segments.
"""

import ast
import dataclasses
import itertools
import pathlib
import sys

import numpy as np
import pytest
from conftest import MASKS, OPERATORS, installed
from fakes import CUT, FUSED, functional, in_place, small

import hla
from hla.arguments import prepare
from hla.core.passes import Gate
from hla.device import plan as plans
from hla.device import scan
from hla.device.elementwise import gate_gradient
from hla.device.shapes import shapes
from hla.device.steps import Carry, Fused, GateGradient, GateSum, Launch, Limits, Ref, written

torch = installed("torch")
CHUNKS = Limits(chunk=2, period=4)
TIGHT = Limits(keys=3, tail=1, values=3, second=3, symmetric=(), tile=2, chunk=1, period=2)
DEVICES = {
    "in place": (in_place(CHUNKS), 0),
    "narrow": (in_place(TIGHT), 0),
    "fused": (FUSED, 0),
    "functional": (functional(np, CHUNKS), 0),
    "segments": (in_place(CHUNKS), 4),
    "fused segments": (CUT, 4),
    "narrow functional segments": (functional(np, TIGHT), 2),
}  # fmt: skip
KINDS = [
    (operator, mask, convention, gate)
    for operator, mask, convention, gate in itertools.product(
        OPERATORS, MASKS, ("exact", "paper"), (None, "decay", "log_gate")
    )
    if not (mask == "none" and gate)
]
LEADS = [(), (1,), (2,), (2, 1), (2, 3), (1, 3)]
CASES = 3  # of each kind
FIELDS = ("dq", "dk", "dv", "ddecay", "dlog_gate")


def batches(rng, gated):
    """Batch shapes of q, k, v and the gate that broadcast, the gate's within that of the others."""
    while True:
        found = [LEADS[i] for i in rng.integers(len(LEADS), size=3 + gated)]
        try:
            if np.broadcast_shapes(*found) == np.broadcast_shapes(*found[:3]):
                return (*found, ())[:4]
        except ValueError:
            continue


def draw(rng, kind):
    """Arguments of one call; denominators are away from 0."""
    operator, mask, convention, gate = kind
    T, D, V = rng.integers(0, 12), rng.integers(1, 8), rng.integers(1, 8)
    lq, lk, lv, lg = batches(rng, gate is not None)
    normalize = convention == "exact" and bool(rng.integers(2))
    sizes = zip("qkv", (lq, lk, lv), (D, D, V), strict=True)
    arrays = {n: rng.normal(size=(*lead, T, width)) for n, lead, width in sizes}
    if normalize:
        arrays |= {n: abs(arrays[n]) + 0.1 for n in "qk"}
    if gate == "decay":
        arrays["decay"] = rng.uniform(0.5, 1, size=lg)
    if gate == "log_gate":
        arrays["log_gate"] = -rng.uniform(0, 1, size=(*lg, T))
        arrays["log_gate"][rng.random((*lg, T)) < 0.2 * rng.integers(2)] = -np.inf
    options = {"operator": operator, "mask": mask, "convention": convention, "normalize": normalize}
    options |= {"scale": float(rng.choice([1.0, 0.7])), "return_state": False}
    if operator == "hla2":
        options["ridge"] = 0.3 * rng.integers(2)
    if mask != "none":
        options["return_state"] = bool(rng.integers(2))
        if rng.integers(2):
            _, state = hla.scan(**arrays, **options | {"return_state": True})
            state = type(state)(*(rng.normal(size=x.shape) * 0.3 + 0.3 for x in state))
            state = type(state)(*map(abs, state)) if normalize else state
            arrays["initial_state"] = state
    return arrays, options


def described(arrays, options):
    """Request and inputs as the public functions make them."""
    names = {"decay": None, "log_gate": None, "scale": 1.0} | arrays | options
    request, inputs, _ = prepare(**names, gradient=True)
    return request, inputs


def cotangents(rng, request, arrays, options):
    """Gradients of o, not always, and of every field of the state."""
    found = hla.scan(**arrays, **options)
    o, state = found if request.return_state else (found, None)
    do = rng.normal(size=o.shape)
    if state is None or rng.integers(4) == 0:
        return do, None
    dstate = type(state)(*(rng.normal(size=x.shape) for x in state))
    return (None if rng.integers(4) == 0 else do), dstate


def autograd(arrays, options, do, dstate):
    """Results and gradients by torch, by name."""
    leaf = lambda x: torch.tensor(x, requires_grad=True)  # noqa: E731
    mine = {
        n: type(x)(*map(leaf, x)) if n == "initial_state" else leaf(x) for n, x in arrays.items()
    }
    found = hla.scan(**mine, **options, backend="array_api")
    o, state = found if options["return_state"] else (found, ())
    loss = 0.0 if do is None else (o * torch.tensor(do)).sum()
    for x, y in zip(state, dstate or (), strict=False):
        loss = loss + (x * torch.tensor(y)).sum()
    names = {f"d{n}": x for n, x in mine.items() if n != "initial_state"}
    start = mine.get("initial_state")
    names |= {} if start is None else {f"d{n}@0": x for n, x in start._asdict().items()}
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    values = {"o": o} | {
        f"{n}@T": x for n, x in zip(getattr(state, "_fields", ()), state, strict=True)
    }
    found = {n: x.detach().numpy() for n, x in values.items()}
    for (n, x), g in zip(names.items(), grads, strict=True):
        found[n] = np.zeros(x.shape) if g is None else g.numpy()
    return found


def planned(device, tokens, request, inputs, do, dstate):
    """The same by a device."""
    o, state, saved = device.forward(request, inputs, tokens)
    grads = device.backward(request, inputs, saved, do, dstate, tokens)
    found = {"o": o} | {n: getattr(grads, n) for n in FIELDS if getattr(grads, n) is not None}
    found |= {} if state is None else {f"{n}@T": x for n, x in state._asdict().items()}
    start = grads.dinitial_state
    return found | ({} if start is None else {f"d{n}@0": x for n, x in start._asdict().items()})


def agree(got, want):
    assert got.keys() == want.keys()
    for name, y in want.items():
        x = np.asarray(got[name])
        assert x.shape == y.shape, name
        if y.size:
            assert np.isfinite(x).all(), name
            error = abs(x - y).max() / max(1.0, abs(y).max())
            assert error < 1e-10, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_requests(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(CASES):
        arrays, options = draw(rng, kind)
        request, inputs = described(arrays, options)
        do, dstate = cotangents(rng, request, arrays, options)
        want = autograd(arrays, options, do, dstate)
        for name, (device, tokens) in DEVICES.items():
            got = planned(device, tokens, request, inputs, do, dstate)
            try:
                agree(got, want)
            except AssertionError as error:
                raise AssertionError(
                    f"{name}: {error} {request} {do is None} {dstate is None}"
                ) from error


def some(operator="hla2", mask="causal", gate=None, T=11, D=4, V=3, seed=0, **options):
    """A request with everything, and the arrays of its call."""
    rng = np.random.default_rng(seed)
    arrays = {
        n: abs(rng.normal(size=(2, T, width))) for n, width in zip("qkv", (D, D, V), strict=True)
    }
    if gate == "decay":
        arrays["decay"] = np.array([0.7, 0.9])
    if gate == "log_gate":
        arrays["log_gate"] = -rng.random((2, T))
    options = {
        "operator": operator,
        "mask": mask,
        "normalize": True,
        "return_state": False,
    } | options
    request, inputs = described(arrays, options)
    return arrays, options, request, inputs, rng.normal(size=(2, T, V))


def launches(plan):
    return [x for x in plan.steps if isinstance(x, (Launch, Fused))]


def test_fused_rows_are_taken_where_they_fit():
    """The longest row that waits; its inner arrays have no buffer; explained by name."""
    request = some()[2]
    plan = plans.forward(request, Limits(), rows=small(request))
    assert [x.row for x in launches(plan)] == ["hla2 and denominators"]
    assert str(plan) == "hla2 and denominators (y, o, o|1, out)"
    back = plans.backward(request, Limits(), rows=small(request))
    assert [x.row for x in launches(back)] == [
        "hla2 and denominators: dk, dv, dy", "hla2 and denominators: dq"
    ]  # fmt: skip
    alone = some(normalize=False)[2]
    assert [x.row for x in launches(plans.forward(alone, Limits(), rows=small(alone)))] == ["hla2"]
    for other in (some(D=6), some(gate="decay"), some("hla3"), some(mask="prefix")):
        assert all(
            isinstance(x, Launch)
            for x in launches(plans.backward(other[2], Limits(), rows=small(other[2])))
        )


def test_no_tokens_need_no_fused_row():
    _, _, request, inputs, _ = some(T=0, normalize=False)
    assert FUSED.forward(request, inputs)[0].shape == (2, 0, 3)
    assert not launches(plans.forward(request, Limits(), rows=small(request)))


def test_what_only_a_fused_row_reads_has_no_buffer():
    arrays, options, request, inputs, do = some(normalize=False)
    request = dataclasses.replace(request, gradient=False)
    plan = plans.forward(request, Limits(), rows=small(request))
    (step,) = plan.steps
    assert step.inner == ("y",)
    assert set(plan.buffers) == {"o"}
    assert plan.given == ("k", "q", "v")
    assert plan.saved == ()
    agree({"o": FUSED.forward(request, inputs)[0]}, {"o": autograd(arrays, options, do, None)["o"]})


@pytest.mark.parametrize("gate", [None, "decay", "log_gate"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_forward_meets_any_backward(operator, gate):
    """Intermediates have the same names and shapes whatever ran the forward."""
    arrays, options, request, inputs, do = some(operator, gate=gate, ridge=0.0)
    want = autograd(arrays, options, do, None)
    found = {}
    for name, (device, tokens) in DEVICES.items():
        o, _, found[name] = device.forward(request, inputs, tokens)
        told = shapes(request)
        assert (o.shape, {}) == (told.o, told.state)
        assert [x.shape for x in found[name]] == list(told.saved.values())
    names = list(DEVICES)
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        device, tokens = DEVICES[one]
        grads = device.backward(request, inputs, found[other], do, None, tokens)
        for n in FIELDS:
            if getattr(grads, n) is not None:
                agree({n: getattr(grads, n)}, {n: want[n]})


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gate", [None, "decay", "log_gate"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_forward_foresees_the_plan_of_its_backward(operator, gate, normalize):
    """As it is then made; of no other call."""
    _, _, request, inputs, do = some(operator, gate=gate, normalize=normalize)
    known, tokens = DEVICES["fused segments" if normalize else "in place"]
    begun = []
    own = known.device._replace(
        begin=lambda ready, arrays, addresses, follows: begun.append((ready, follows)),
    )
    runner = scan.Runner(own)
    *_, saved = runner.forward(request, inputs, tokens)
    runner.backward(request, inputs, saved, do, None, tokens)
    (_, follows), (ready, nothing) = begun
    made = follows()
    assert made.plan == ready.plan
    assert made.layouts == ready.layouts
    assert made.dtypes == ready.dtypes
    scan.Runner(own).forward(dataclasses.replace(request, gradient=False), inputs, tokens)
    assert nothing is begun[2][1] is None


@pytest.mark.parametrize("wanted", ["", "q", "k", "v", "qk", "kv"])
def test_only_what_is_wanted_is_computed(wanted):
    arrays, options, request, inputs, do = some("hla3", normalize=False)
    device, _ = DEVICES["in place"]
    *_, saved = device.forward(request, inputs)
    plan = plans.backward(request, CHUNKS, wanted=frozenset(wanted))
    names = scan.Kind(True, False, do.dtype).names(request)
    given = [*scan.given(request, inputs), *saved, do]
    ready = scan.Ready(device.device, plan, request, dict(zip(names, given, strict=True)))
    found = ready(given, [None] * len(given), None)
    want = autograd(arrays, options, do, None)
    assert set(plan.results) == {f"d.{n}" for n in wanted}
    for n in wanted:
        agree({n: found[ready.results[f"d.{n}"]]}, {n: want[f"d{n}"]})
    assert len(launches(plan)) == {"": 0, "q": 5, "k": 4, "v": 2, "qk": 7, "kv": 5}[wanted]


@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_what_adds_has_something_to_add_to(operator):
    """Also where results are narrower than sums of parts, which go aside."""
    request = dataclasses.replace(some(operator, normalize=True)[2], dtype="bfloat16")
    plan = plans.backward(request, TIGHT._replace(keys=2, tail=-1))
    before = set(plan.given)
    assert any(x.add for x in launches(plan))
    for step in plan.steps:
        if isinstance(step, Launch) and step.add:
            assert {ref.name for ref in step.o} <= before
        before |= written(step)


def test_a_segment_is_a_batch_entry_with_a_first_state():
    """Each leaves its state, those are carried, and all run from what was carried."""
    _, _, request, _, _ = some("linear", normalize=False)
    plan = plans.forward(request, Limits(), tokens=4)
    states, carried, read = plan.steps
    assert (states.q, states.tokens, read.tokens) == ((), 4, 4)
    assert isinstance(carried, Carry)
    assert (carried.local.name, carried.fading) == (states.end[0].name, None)
    assert plan.buffers[carried.o.name].shape == (2, 3, 4, 3)
    assert read.start == (carried.o,)
    with pytest.raises(ValueError, match="5 tokens; expected a multiple of 4"):
        plans.backward(some(gate="decay")[2], CHUNKS, tokens=5)


def test_a_fused_row_in_segments_is_cut_level_by_level():
    """States of the keys, those of y from them, then all; of two transposes one is left."""
    request = some(normalize=False)[2]
    plan = plans.forward(request, Limits(), small(request), 4)
    S, carried, F, _, whole = plan.steps
    assert isinstance(S, Launch)
    assert (S.k, S.v, S.q, S.tokens) == ((Ref("k"),), (Ref("k"),), (), 4)
    assert isinstance(carried, Carry)
    y, state = F.launches
    assert (y.start, state.q, state.k) == ((carried.o,), (), y.o)
    assert F.inner == ("y",)
    assert [x.tokens for x in whole.launches] == [4, 4]
    assert [x.end for x in whole.launches] == [(None,), (None,)]
    back = plans.backward(request, Limits(), small(request), 4)
    kinds = [type(x).__name__ for x in back.steps]
    assert " ".join(kinds) == (
        "Launch Carry Fused Carry Fused Launch Launch Carry Carry Fused"  # dk, dv, dy; then dq
    )


def test_under_jit(quick_jax):
    """The functional device under jax.jit."""
    jax = quick_jax
    arrays, options, request, inputs, do = some("hla3", gate="log_gate", return_state=True)
    device = functional(jax.numpy, TIGHT)

    @jax.jit
    def both(inputs, do):
        o, _, saved = device.forward(request, inputs)
        return o, device.backward(request, inputs, saved, do, None)

    o, grads = both(inputs, do)
    want = autograd(arrays, options, do, None)
    agree({"o": o}, {"o": want["o"]})
    for n in ("dq", "dk", "dv", "dlog_gate"):
        agree({n: getattr(grads, n)}, {n: want[n]})


def test_a_plan_knows_no_array_library():
    """The modules import the standard library, themselves, the core and its states."""
    for path in pathlib.Path(plans.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {x.name.split(".")[0] for x in node.names} <= set(sys.stdlib_module_names)
            if isinstance(node, ast.ImportFrom):
                first = (node.module or "").split(".")[0]
                inside = node.level == 1 or (node.level == 2 and first in ("core", "states"))
                assert inside or first in sys.stdlib_module_names, path


@pytest.mark.parametrize("gate", ["decay", "log_gate"])
def test_a_gate_that_asks_for_no_gradient_costs_none(gate):
    request = some("hla3", gate=gate)[2]
    dotted = [x for x in launches(plans.backward(request, CHUNKS)) if x.dots]
    assert len(dotted) == 8  # dq of three passes, dv also of two denominators
    alone = dataclasses.replace(request, gate_given=False)
    steps = plans.backward(alone, CHUNKS).steps
    assert not any(x.dots or x.states for x in steps if isinstance(x, Launch))
    assert not any(isinstance(x, (GateGradient, GateSum)) for x in steps)


def test_what_a_period_misses_is_added_along_the_way():
    """Each token reads 1 of the first state, and all reads are too large by e."""
    T, e, gate = 16, 0.01, np.zeros((1, 16))
    arrays = {
        "o": gate, "reads": np.full((1, 1, T), 1 + e), "writes": np.zeros((1, 1, 2 * T)),
        "gate": gate, "border": np.array([16.0]), "S": np.full((1, 1, 1, 1), 8.0),
        "R": np.ones((1, 1, 1, 1)),
    }  # fmt: skip
    step = GateGradient(
        **{name: Ref(name) for name in arrays},
        power=1, strict=False, factor=1.0, ends=True, chunk=2, period=8,
    )  # fmt: skip
    ((_, G),) = gate_gradient(np, step, lambda ref: arrays[ref.name], Gate(log_gate=gate))
    assert abs(G[0] - np.arange(T, 0, -1)).max() < 2 * e  # carried on alone it were 7 e
