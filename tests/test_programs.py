"""The adjoint of a program is a program: both run by one interpreter, against differences."""

import itertools

import numpy as np
import pytest
from conftest import MASKS, OPERATORS, close

import hla
from hla.core.passes import Gate, broadcast
from hla.core.programs import adjoint, d, program, prune, single_passes, sweeps
from hla.core.run import by_passes, causal_pass, pull
from hla.core.run import run as interpret
from hla.states import HLA2RidgeState

T, D, V = 7, 3, 2
# of order 8: what a program returns is a polynomial of degree 7 at most in q, k, v and its states
CENTRAL = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
PROGRAMS = [
    (operator, mask, convention, ridge)
    for operator, mask, convention in itertools.product(OPERATORS, MASKS, ("exact", "paper"))
    for ridge in ((0.0, 0.5) if operator == "hla2" else (0.0,))
    if convention == "exact" or (mask == "causal" and operator in ("hla2", "hla3"))
]


def passes(operator, mask, convention, ridge=0.0, scale=0.7, single=True):
    kind = HLA2RidgeState if ridge and mask == "causal" and convention == "exact" else None
    found = program(operator, mask, convention, ridge, kind)
    return single_passes(found, scale) if single else found.steps


def gate_of(mask, kind):
    a = -np.random.default_rng(3).random((2, T))
    a[0, 3] = -np.inf
    gates = {"none": Gate(), "decay": Gate(np.array([0.7, 0.9])), "log_gate": Gate(log_gate=a)}
    return gates["none" if mask == "none" else kind]


def values_of(steps, gate, started):
    """Inputs of a program, k shared by two heads, and the states that its passes start from."""
    rng = np.random.default_rng(5)
    found = {"q": rng.normal(size=(2, T, D)), "k": rng.normal(size=(T, D))}
    found |= {"v": rng.normal(size=(2, T, V))}
    found |= {"v|1": np.ones((T, 1))} if any(s.v == "v|1" for s in steps) else {}
    shapes = {name: x.shape for name, x in found.items()}
    for s in steps:
        k, v = shapes[s.k], shapes[s.v]
        held = broadcast(k[:-2], v[:-2], gate.batch)
        shapes[s.out] = (*broadcast(held, shapes[s.q][:-2]), T, v[-1])
        if started:
            found[s.start] = rng.normal(size=(*held, k[-1], v[-1]))
    return found


def run(steps, values, gate, wanted):
    steps, _ = prune(steps, set(values), wanted)
    return interpret(steps, values, gate, chunk=3, keep=True)


@pytest.mark.parametrize("kind", ["none", "decay", "log_gate"])
@pytest.mark.parametrize("single", [False, True], ids=["joined", "single"])
@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_the_adjoint_is_a_program(case, single, kind):
    """Along lines of q, k, v and every first state; of o, its denominator, the last states."""
    steps, mask = passes(*case, single=single), case[1]
    gate, ordered = gate_of(mask, kind), mask != "none"
    values, rng = values_of(steps, gate, ordered), np.random.default_rng(6)
    ends = {s.end for s in steps if s.end} if ordered else set()
    wanted = {"o", *(["o|1"] if single else []), *ends}
    found = run(steps, values, gate, wanted)
    cotangents = {n: rng.normal(size=found[n].shape) for n in sorted(wanted)}

    def loss(values):
        got = run(steps, values, gate, set(cotangents))
        return sum((got[n] * x).sum() for n, x in cotangents.items())

    moved = [n for n in values if n != "v|1"]
    given = found | {d(n): x for n, x in cotangents.items()}
    steps, _ = prune(steps, set(values), wanted)
    grads = pull(steps, given, gate, with_gate=False, chunk=3)
    for name in moved:
        line, h = rng.normal(size=values[name].shape), 0.2
        along = lambda t, n=name, x=line: loss(values | {n: values[n] + t * x})  # noqa: E731
        want = sum(c * (along(i * h) - along(-i * h)) for i, c in CENTRAL.items()) / h
        got = (grads[d(name)] * line).sum() if d(name) in grads else 0.0
        assert abs(got - want) < 1e-8 * max(1.0, abs(want)), (name, got, want)


@pytest.mark.parametrize("kind", ["decay", "log_gate"])
@pytest.mark.parametrize("case", [c for c in PROGRAMS if c[1] != "none"], ids=str)
def test_every_way_has_the_gates_gradient(case, kind):
    """In sweeps, pass by pass, of single passes: one derivation, and differences of a decay."""
    gate, rng = gate_of("causal", kind), np.random.default_rng(7)
    found, cotangents, same = [], {}, {}
    for single in (False, True):
        steps = passes(*case, scale=1.0, single=single)
        values = values_of(steps, gate, True) | same
        same, start = values, rng.normal(size=(2, T, V))
        cotangents.setdefault("d.o", start)
        steps, _ = prune(steps, set(values), {"o"})
        given = interpret(steps, values, gate, chunk=3, keep=True) | cotangents
        for engine in (pull, by_passes(causal_pass).pull):
            found.append(engine(steps, given, gate, with_gate=True, chunk=3)["d.gate"])
        if kind == "decay" and not single:

            def loss(g, steps=steps, values=values):
                return (interpret(steps, values, Gate(g), chunk=3)["o"] * cotangents["d.o"]).sum()

            h = 1e-6
            for i, step in enumerate(np.eye(2) * h):
                slope = (loss(gate.decay + step) - loss(gate.decay - step)) / (2 * h)
                assert abs(found[0][i] - slope) < 1e-7 * max(1.0, abs(slope))
    for other in found[1:]:
        close(other, found[0], 1e-12)


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_an_adjoint_is_two_sweeps(case):
    """Of the paper's recurrences three, where what a strict pass makes is read both ways."""
    found = sweeps(adjoint(passes(*case)))
    assert len(found) == (3 if case[2] == "paper" else 2)
    assert sorted(s for group in found for s in group) == sorted(adjoint(passes(*case)))


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_single_passes_are_the_operator(case):
    """Denominators apart, factors as data: what `hla.scan` computes."""
    operator, mask, convention, ridge = case
    steps = passes(*case)
    values = values_of(steps, Gate(), False)
    q, k, v = (values[n] for n in "qkv")
    options = {"operator": operator, "mask": mask, "convention": convention, "ridge": ridge}
    found = run(steps, values, Gate(), {"o", "o|1"})
    close(found["o"], hla.scan(q, k, v, scale=0.7, **options))
    want = hla.scan(q, k, v, scale=0.7, normalize=True, eps=0.5, **options)
    close(found["o"] / (found["o|1"] + 0.5), want)


def test_what_is_zero_is_not_computed():
    """Without a gradient of o or of a state no pass is left; unread names are dropped."""
    steps = passes("hla3", "causal", "exact")
    given = {"q", "k", "v", "v|1", "y", "u", "u|1"}
    assert prune(adjoint(steps), given, {"d.q"})[0] == ()
    one, have = prune(steps, given - {"v"}, {"o", "o|1"})
    assert {s.v for s in one} == {"k", "u|1", "v|1", "u"}
    assert "o" in have
    alone, _ = prune(steps, {"q", "k", "v"}, {"S@T"})
    assert [(s.out, s.end) for s in alone] == [("", "S@T")]
