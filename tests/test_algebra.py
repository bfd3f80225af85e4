"""Laws of segments and states: associativity, identity, one step, continuation, packing."""

import functools
import itertools

import literal
import numpy as np
import pytest
from conftest import GATES, OPERATORS, close, close_fields, draw, gates, same_fields
from hypothesis import given, settings
from hypothesis import strategies as st

import hla

H, T = 2, 13
ALGEBRAS = [
    pytest.param(operator, mask, gate, id=f"{operator}-{mask}-{gate}")
    for operator, mask, gate in itertools.product(OPERATORS, ("causal", "prefix"), GATES)
]
SEGMENT = {
    ("linear", "causal"): "P m",
    ("linear", "prefix"): "P m",
    ("hla2", "causal"): "S C m G h",
    ("hla2", "prefix"): "S C m",
    ("ahla", "causal"): "R P m E n",
    ("ahla", "prefix"): "R P m",
    ("hla3", "causal"): "S P m Q X x Y F eta",
    ("hla3", "prefix"): "S Q P m",
}


class Sequence:
    """One random sequence with its gate, cut by token ranges."""

    def __init__(self, operator, mask, gate, **shape):
        self.qkv = draw(H, T, **shape)
        self.gate = gates(gate, H, T)
        self.options = {"operator": operator, "mask": mask, "scale": 0.7}

    def cut(self, start, stop):
        arrays = tuple(x[:, start:stop] for x in self.qkv)
        gate = {
            name: x[:, start:stop] if name == "log_gate" else x for name, x in self.gate.items()
        }
        return arrays, self.options | gate

    def segment(self, start, stop):
        arrays, options = self.cut(start, stop)
        return hla.summarize(*arrays, **options)

    def scan(self, start, stop, state=None, **more):
        arrays, options = self.cut(start, stop)
        return hla.scan(*arrays, initial_state=state, return_state=True, **options, **more)

    def step(self, t, state, **more):
        arrays, options = self.cut(t, t + 1)
        options = {n: x[:, 0] if n == "log_gate" else x for n, x in options.items()}
        return hla.step(*(x[:, 0] for x in arrays), state, **options, **more)


@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_segments_hold_their_literal_sums(operator, mask, gate):
    x = Sequence(operator, mask, gate)
    for start, stop in ((0, 1), (0, T), (3, 9)):
        arrays, options = x.cut(start, stop)
        want = literal.fields(*arrays, **options)
        for backend in (None, "array_api", "numpy"):
            got = hla.summarize(*arrays, backend=backend, **options)
            assert got._fields == (*SEGMENT[operator, mask].split(), "rho")
            for name, field in got._asdict().items():
                product = {"G": "C", "h": "m"}.get(name)  # F = S C - G: what G is rounded against
                size = product and abs(want["S"]).max() * abs(want[product]).max()
                close(np.broadcast_to(field, want[name].shape), want[name], size=size)


@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_combine_is_associative_and_joins(operator, mask, gate):
    x = Sequence(operator, mask, gate)
    A, B, C, whole = (x.segment(*r) for r in ((0, 4), (4, 9), (9, T), (0, T)))
    left = hla.combine(hla.combine(A, B), C)
    right = hla.combine(A, hla.combine(B, C))
    close_fields(left, right, 1e-12)
    close_fields(left, whole, 1e-12)


@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_empty_segment_is_the_identity(operator, mask, gate):
    x = Sequence(operator, mask, gate)
    A, empty = x.segment(0, 9), x.segment(9, 9)
    same_fields(hla.combine(A, empty), A)
    same_fields(hla.combine(empty, A), A)
    _, state = x.scan(0, 9)
    same_fields(hla.combine(state, empty), state)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data(), cuts=st.lists(st.integers(0, T), min_size=1, max_size=6))
@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_tree_over_any_cuts_is_the_whole(operator, mask, data, cuts):
    x = Sequence(operator, mask, "resets")
    cuts = [0, *sorted(cuts), T]
    parts = [x.segment(*r) for r in itertools.pairwise(cuts)]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [hla.combine(parts[i], parts[i + 1])]
    close_fields(parts[0], x.segment(0, T), 1e-11)


@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_state_with_segment_is_the_scan(operator, mask, gate):
    x = Sequence(operator, mask, gate)
    A, B = x.segment(5, 9), x.segment(9, T)
    for ridge in (0.0, 0.5) if operator == "hla2" else (0.0,):
        _, start = x.scan(0, 5, ridge=ridge)
        _, end = x.scan(0, T, ridge=ridge)
        one_by_one = hla.combine(hla.combine(start, A), B)
        close_fields(one_by_one, end, 1e-12)
        close_fields(hla.combine(start, hla.combine(A, B)), end, 1e-12)


@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_step_is_combine_with_one_token(operator, mask, gate):
    x = Sequence(operator, mask, gate)
    whole, want = x.scan(0, T)
    for backend in ("numpy", "array_api"):
        state = None
        for t in range(T):
            before = state
            o, state = x.step(t, before, backend=backend)
            close(o, whole[:, t], 1e-12)
            if before is not None:
                close_fields(hla.combine(before, x.segment(t, t + 1)), state, 1e-12)
        close_fields(state, want, 1e-12)


@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_a_segment_becomes_a_state_that_continues(operator, mask, gate):
    x = Sequence(operator, mask, gate)
    state = x.segment(0, 6).to_state()
    for ridge in (0.0, 0.5) if operator == "hla2" else (0.0,):
        whole, end = x.scan(0, T, ridge=ridge)
        o, last = x.scan(6, T, state, ridge=ridge)
        close(o, whole[:, 6:], 1e-12)
        o, after = x.step(6, state, ridge=ridge)
        close(o, whole[:, 6], 1e-12)
        assert type(last) is type(after) is type(state)
        for name in end._fields:
            close(getattr(last, name), getattr(end, name), 1e-12)
    if operator == "hla2" and mask == "causal":
        assert state._fields == ("S", "F", "eta", "C", "m")


@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_packed_states_are_flat_and_step_and_combine_alike(operator, mask, gate):
    x = Sequence(operator, mask, gate)
    state = None
    for t in range(7):  # stepped states are symmetric to the bit, so packing loses nothing
        _, state = x.step(t, state)
    packed = state.pack()
    assert packed._fields == state._fields
    assert {n: y.shape for n, y in packed._asdict().items()} == {
        n: (*y.shape[:-2], 5 * 6 // 2) if n == "S" else y.shape for n, y in state._asdict().items()
    }
    same_fields(packed.unpack(), state)
    joined = hla.combine(packed, x.segment(7, T))
    assert type(joined) is type(packed)
    close_fields(joined.unpack(), hla.combine(state, x.segment(7, T)), 1e-13)
    for t in range(7, T):
        o, state = x.step(t, state)
        packed_o, packed_after = x.step(t, packed)
        assert type(packed_after) is type(packed)
        packed = packed_after
        close(packed_o, o, 1e-13)
        close_fields(packed.unpack(), state, 1e-13)


def test_chunked_states_pack_to_rounding():
    _, state = Sequence("hla2", "causal", "decay").scan(0, T)
    close_fields(state.pack().unpack(), state, 1e-14)


N = 3  # as many stretches as heads: what is aligned wrongly still broadcasts
BATCHES = [((N,), (N,), (N,)), ((N, N), (N, N), (N, N)), ((N, N), (N,), (N, N)), ((N,), (), ())]


def stack(parts):
    return type(parts[0])(*(np.stack(x) for x in zip(*parts, strict=True)))


def uniform(state):
    """Whether all fields of a state have as many batch axes."""
    return len({x.ndim - 1 - name[0].isupper() for name, x in state._asdict().items()}) == 1


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize(("operator", "mask", "gate"), ALGEBRAS)
def test_stacked_stretches_are_joined_one_by_one(operator, mask, gate, batches):
    rng, whole = np.random.default_rng(4), np.broadcast_shapes(*batches)

    def stretch(call, **more):
        q, k, v = (rng.standard_normal((*b, 5, n)) for b, n in zip(batches, (4, 4, 2), strict=True))
        kind = gates(gate, *whole[-1:], 5)
        return call(q, k, v, operator=operator, mask=mask, **kind, **more)

    left, right = ([stretch(hla.summarize) for _ in range(N)] for _ in range(2))
    states = [stretch(hla.scan, return_state=True)[1] for _ in range(N)]
    joined = hla.combine(stack(left), stack(right))
    for i in range(N):
        close_fields(type(joined)(*(x[i] for x in joined)), hla.combine(left[i], right[i]), 1e-12)
        for x, y in zip(hla.combine(states[i], right[i]), states[i], strict=True):
            assert x.shape == y.shape
    if not uniform(states[0]):
        with pytest.raises(ValueError, match=r"left.*batch axes"):
            hla.combine(stack(states), stack(right))
        return
    joined = hla.combine(stack(states), stack(right))
    for i in range(N):
        close_fields(type(joined)(*(x[i] for x in joined)), hla.combine(states[i], right[i]), 1e-12)


def test_fields_that_cannot_be_aligned_are_refused():
    x = Sequence("hla2", "causal", "none")
    A, B = x.segment(0, 6), x.segment(6, T)
    for part, name in ((A, "left"), (B, "right")):
        twice = type(part)(*(np.stack([y, y]) for y in part))
        old = twice._replace(rho=np.ones(2))  # as rho would be without the axes of the heads
        with pytest.raises(ValueError, match=rf"{name}.rho.*\(2,\).*2 batch axes"):
            hla.combine(*((old, B) if name == "left" else (A, old)))
    close_fields(hla.combine(A, B._replace(rho=np.float64(1))), hla.combine(A, B), 1e-15)


def test_a_segment_of_shared_keys_becomes_a_state_that_continues():
    """Its fields have axes of size 1 in front that the state's own shape lacks."""
    q, (_, k, v) = draw(2, H, T)[0], draw(H, T, seed=1)
    state = hla.summarize(q[..., :6, :], k[..., :6, :], v[..., :6, :]).to_state()
    assert state.S.shape == (1, H, 5, 5)
    rest = [x[..., 6:, :] for x in (q, k, v)]
    want, before = hla.scan(q, k, v)[..., 6:, :], hla.scan(q, k, v, return_state=True)[1]
    for start in (state, state.pack()):
        (o, end), pullback = hla.vjp(*rest, initial_state=start, return_state=True)
        close(o, want, 1e-12)
        assert {n: x.shape for n, x in end._asdict().items() if n in "S F eta"} == {
            n: x.shape if n != "S" or start is state else (H, 15)
            for n, x in before._asdict().items()
        }
        for x, y in zip(pullback(o).dinitial_state, start, strict=True):
            assert x.shape == y.shape


# The three corrections of design section 3, computed here without the package's operators.


def fold(combine, parts):
    return functools.reduce(combine, parts)


def second_order(power):
    """The masked operator of Section 4.2 with G and h decaying by rho^power (the paper: 1)."""

    def combine(A, B):
        r = B["rho"]
        joined = {n: r * A[n] + B[n] for n in "SCm"}
        joined["G"] = r**power * A["G"] + B["G"] + B["S"] @ (r * A["C"])
        return joined | {"rho": r * A["rho"]}

    return combine


def asymmetric(power):
    """The operator of Section 6.2 with R decaying by rho^power (the paper: 1)."""

    def combine(A, B):
        r = B["rho"]
        joined = {n: r * A[n] + B[n] for n in "Pm"} | {"R": r**power * A["R"] + B["R"]}
        joined["E"] = r * A["E"] + B["E"] + B["R"] @ (r * A["P"])
        return joined | {"rho": r * A["rho"]}

    return combine


def tokens(operator, g):
    q, k, v = draw(9, D=4, V=3, seed=1)
    one = [
        literal.fields(q[t : t + 1], k[t : t + 1], v[t : t + 1], operator=operator, decay=g)
        for t in range(9)
    ]
    return q, k, v, one


@pytest.mark.parametrize(
    ("operator", "law", "field", "right", "wrong"),
    [("hla2", second_order, "G", 2, 1), ("ahla", asymmetric, "E", 0, 1)],
    ids=["hla2", "ahla"],
)
def test_the_papers_decayed_operators_are_not_associative(operator, law, field, right, wrong):
    q, k, v, one = tokens(operator, 0.8)
    whole = hla.summarize(q, k, v, operator=operator, decay=0.8)
    for power, associative in ((right, True), (wrong, False)):
        combine = law(power)
        left = fold(combine, one)
        tree = combine(fold(combine, one[:4]), combine(one[4], fold(combine, one[5:])))
        gap = abs(left[field] - tree[field]).max() / abs(left[field]).max()
        assert (gap < 1e-12) == associative
        assert associative or gap > 0.01
        of_ours = abs(tree[field] - getattr(whole, field)).max() / abs(tree[field]).max()
        assert (of_ours < 1e-12) == associative
        without = [dict(s, rho=1.0) for s in one]  # with g = 1 the paper's operator is right
        close(
            fold(combine, without)[field],
            getattr(hla.summarize(q, k, v, operator=operator), field),
            1e-12,
        )


def test_the_papers_decayed_recurrence_is_not_the_masked_sum():
    q, k, v, _ = tokens("hla2", 0.8)
    masked = literal.scan(q, k, v, operator="hla2", decay=0.8)
    serial, _ = literal.paper(q, k, v, operator="hla2", decay=0.8)
    assert abs(serial - masked).max() > 0.01 * abs(masked).max()
    close(hla.scan(q, k, v, decay=0.8), masked)
    close(hla.scan(q, k, v, decay=0.8, convention="paper"), serial)
    close(literal.paper(q, k, v, operator="hla2")[0], literal.scan(q, k, v, operator="hla2"))


def test_theorem_7_1_sums_only_triples_whose_largest_index_repeats():
    q, k, v, _ = tokens("hla3", 1.0)
    A = q @ k.T
    repeated = np.zeros((9, 3))
    for i, u, j in itertools.product(range(9), repeat=3):
        top = max(i, u, j)
        if (i, u, j).count(top) >= 2:
            for t in range(top, 9):
                repeated[t] += A[t, i] * A[u, i] * A[u, j] * v[j]
    theorem, _ = literal.paper(q, k, v, operator="hla3")
    close(theorem, repeated, 1e-12)
    masked = literal.scan(q, k, v, operator="hla3")
    close(theorem[0], masked[0])
    assert all(abs(theorem[t] - masked[t]).max() > 1e-3 * abs(masked[t]).max() for t in range(1, 9))
    close(hla.scan(q, k, v, operator="hla3", convention="paper"), theorem)
    close(hla.scan(q, k, v, operator="hla3"), masked)


def test_packed_states_hold_the_upper_triangle_row_by_row():
    """The order is a format: states are saved packed."""
    S = np.arange(16.0).reshape(4, 4)
    state = hla.states.HLA2State(S + S.T, np.ones((4, 2)), np.ones(4))
    np.testing.assert_array_equal(state.pack().S, (S + S.T)[np.triu_indices(4)])
    np.testing.assert_array_equal(state.pack().unpack().S, S + S.T)
