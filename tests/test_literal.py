"""Every operator, mask, decay, form and convention equals its literal index sum in float64."""

import functools
import itertools
import math

import literal
import numpy as np
import pytest
from conftest import (
    FORMS,
    GATES,
    MASKS,
    OPERATORS,
    Row,
    close,
    draw,
    gated,
    gates,
    rows,
    within_budget,
)

import hla

W, H = 4, 2
SIZES = (0, 1, W - 1, W, W + 1, 13)
STREAMING = ("causal", "prefix")


@functools.cache
def long_case(operator, mask, gate):
    """Grouped heads over 300 tokens, and the token-by-token output."""
    q, k, v = draw(2, 3, 300, D=6)
    k = k[:, :1]
    options = gates(gate, 3, 300)
    oracle = {"backend": "array_api", "form": "recurrent", "operator": operator, "mask": mask}
    return q, k, v, options, hla.scan(q, k, v, **oracle, **options)


@functools.cache
def case(operator, mask, gate, T, normalize):
    """Inputs, gates and the literal output; features are positive where a denominator divides."""
    q, k, v = draw(H, T, seed=OPERATORS.index(operator), positive=normalize)
    options = gates(gate, H, T)
    want = literal.scan(q, k, v, operator=operator, mask=mask, normalize=normalize, **options)
    return q, k, v, options, want


def test_literal_sums_are_plain_loops():
    """The oracle itself: its einsums against nested loops over the index sets of the design."""
    T = 6
    q, k, v = draw(T)
    a = np.array([-0.3, -0.1, -np.inf, -0.7, 0.0, -0.2])
    A = q @ k.T
    w = [[math.exp(sum(a[j + 1 : t + 1])) for j in range(t + 1)] for t in range(T)]
    want = {key: np.zeros((T, 3)) for key in itertools.product(OPERATORS, ("causal", "prefix"))}
    for t in range(T):
        for j in range(t + 1):
            want["linear", "causal"][t] += w[t][j] * A[t, j] * v[j]
            want["linear", "prefix"][t] += w[t][j] * A[t, j] * v[j]
            for i in range(t + 1):
                both = w[t][i] * w[t][j]
                want["hla2", "prefix"][t] += both * A[t, i] * A[j, i] * v[j]
                want["ahla", "prefix"][t] += both * A[t, i] * A[i, j] * v[j]
                if i <= j:
                    want["hla2", "causal"][t] += both * A[t, i] * A[j, i] * v[j]
                if j <= i:
                    want["ahla", "causal"][t] += w[t][j] * A[t, i] * A[i, j] * v[j]
                for u in range(t + 1):
                    term = both * w[t][u] * A[t, i] * A[u, i] * A[u, j] * v[j]
                    want["hla3", "prefix"][t] += term
                    if i <= u and j <= u:
                        want["hla3", "causal"][t] += term
    for (operator, mask), o in want.items():
        close(literal.scan(q, k, v, operator=operator, mask=mask, log_gate=a), o, 1e-13)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(("row", "gate"), gated(GATES))
def test_scan_is_the_literal_sum(row: Row, gate, normalize):
    for T in SIZES:
        q, k, v, options, want = case(row.operator, row.mask, gate, T, normalize)
        options = row.options | options | {"normalize": normalize, "chunk_size": W}
        o = hla.scan(q, k, v, **options)
        assert o.dtype == np.float64
        close(o, want)
        plan = hla.explain(q, k, v, **options)
        assert plan.backend == row.backend
        assert plan.form == row.form


@pytest.mark.parametrize(("row", "gate"), gated(["none", "decay", "resets"]))
def test_scale_enters_once_per_query(row: Row, gate):
    q, k, v = draw(H, 9)
    options = gates(gate, H, 9)
    o = hla.scan(q, k, v, scale=0.3, chunk_size=W, **row.options, **options)
    close(o, literal.scan(0.3 * q, k, v, operator=row.operator, mask=row.mask, **options))
    power = {"linear": 1, "hla2": 2, "ahla": 2, "hla3": 3}[row.operator]
    close(o, 0.3**power * hla.scan(q, k, v, **row.options, **options))


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(("row", "gate"), gated(GATES, operators=("hla2",)))
def test_ridge_adds_to_the_metric(row: Row, gate, normalize):
    q, k, v = draw(H, 13, positive=normalize)
    same = {"scale": 0.7, "ridge": 0.9, "normalize": normalize, "eps": 0.01} | gates(gate, H, 13)
    o = hla.scan(q, k, v, chunk_size=W, **row.options, **same)
    close(o, literal.scan(q, k, v, operator="hla2", mask=row.mask, **same))


PAPER = [row for row in rows(("hla2", "ahla", "hla3"), ("causal",)) if "associative" not in row.id]


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("row", PAPER)
def test_paper_convention_is_the_papers_recurrence(row: Row, gate, normalize):
    ridges = (0.0, 0.9) if row.operator == "hla2" else (0.0,)
    for T, ridge in itertools.product((0, 1, W + 1, 13), ridges):
        q, k, v = draw(H, T, positive=normalize)
        same = {"ridge": ridge, "normalize": normalize, "scale": 0.6} | gates(gate, H, T)
        o = hla.scan(q, k, v, convention="paper", chunk_size=W, **row.options, **same)
        want, _ = literal.paper(q, k, v, operator=row.operator, **same)
        close(o, want)


@pytest.mark.parametrize("ridge", [0.0, 0.9])
def test_the_papers_recurrence_is_an_associative_scan_without_decay(ridge):
    q, k, v = draw(H, 13, positive=True)
    same = {"ridge": ridge, "normalize": True, "eps": 0.01}
    options = same | {"form": "associative", "convention": "paper", "chunk_size": W}
    want, sums = literal.paper(q, k, v, operator="hla2", **same)
    _, start = hla.scan(*(x[:, :6] for x in (q, k, v)), return_state=True, **options)
    o, state = hla.scan(
        *(x[:, 6:] for x in (q, k, v)), initial_state=start, return_state=True, **options
    )
    assert state._fields == ("S", "C", "m", "G", "h")
    close(o, want[:, 6:])
    for name, got in state._asdict().items():
        close(got, sums[name])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_conventions_differ_only_where_the_design_says(operator, mask):
    q, k, v = draw(H, 13)
    for gate in GATES if mask != "none" else ("none",):
        options = gates(gate, H, 13) | {"operator": operator, "mask": mask}
        exact, paper = (hla.scan(q, k, v, convention=c, **options) for c in ("exact", "paper"))
        parts = mask == "causal" and (operator == "hla3" or (operator == "hla2" and gate != "none"))
        assert (abs(exact - paper).max() > 1e-3 * abs(exact).max()) == parts


FIELDS = {
    ("linear", "causal"): ("P", "m"),
    ("linear", "prefix"): ("P", "m"),
    ("hla2", "causal"): ("S", "F", "eta"),
    ("hla2", "prefix"): ("S", "C", "m"),
    ("ahla", "causal"): ("P", "m", "E", "n"),
    ("ahla", "prefix"): ("R", "P", "m"),
    ("hla3", "causal"): ("S", "P", "m", "F", "eta"),
    ("hla3", "prefix"): ("S", "Q", "P", "m"),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("row", rows(masks=STREAMING, forms=FORMS[:3]))
def test_state_is_the_literal_statistics(row: Row, gate):
    ridges = (0.0, 0.5) if row.operator == "hla2" else (0.0,)
    for T, ridge in itertools.product((1, W, 13), ridges):
        q, k, v = draw(H, T)
        options = gates(gate, H, T) | {"scale": 0.7}
        _, state = hla.scan(
            q, k, v, return_state=True, ridge=ridge, chunk_size=W, **row.options, **options
        )
        ridged = ("C", "m") if ridge and row.mask == "causal" else ()
        assert state._fields == FIELDS[row.operator, row.mask] + ridged
        want = literal.fields(q, k, v, operator=row.operator, mask=row.mask, **options)
        for name, got in state._asdict().items():
            close(np.broadcast_to(got, want[name].shape), want[name])


@pytest.mark.parametrize(
    ("operator", "names", "gate"),
    [("hla3", "S Q P m G1 G2 G3 h1 h2 h3", gate) for gate in GATES]
    + [("hla2", "S C m G h", gate) for gate in GATES[1:]],  # without decay hla2 has one convention
)
def test_paper_state_is_the_papers_state(operator, names, gate):
    q, k, v = draw(H, 13)
    options = gates(gate, H, 13) | {"operator": operator, "scale": 0.7}
    _, want = literal.paper(q, k, v, **options)
    for form in ("chunked", "recurrent"):
        _, state = hla.scan(
            q, k, v, return_state=True, form=form, chunk_size=W, convention="paper", **options
        )
        assert state._fields == tuple(names.split())
        for name, got in state._asdict().items():
            close(np.broadcast_to(got, want[name].shape), want[name])


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_identity_metric_is_linear_attention_on_queries(mask, normalize):
    """Section 3 of the paper: S = I gives linear attention on (q, q, v)."""
    q, k, v = draw(H, 13, positive=normalize)
    nothing = np.zeros_like(k)
    same = {"normalize": normalize, "chunk_size": W}
    linear = hla.scan(q, q, v, operator="linear", **same)
    _, empty = hla.scan(q[:, :0], nothing[:, :0], v[:, :0], mask=mask, return_state=True)
    metric = empty._replace(S=np.eye(5))
    close(hla.scan(q, nothing, v, mask=mask, initial_state=metric, **same), linear)
    close(hla.scan(q, nothing, v, mask=mask, ridge=1.0, **same), linear)
    decayed = hla.scan(q, q, v, operator="linear", decay=0.7, **same)
    close(hla.scan(q, nothing, v, mask=mask, ridge=1.0, decay=0.7, **same), decayed)


@pytest.mark.parametrize("mask", ["prefix", "none"])
def test_tied_queries_and_keys_make_the_two_second_orders_one(mask):
    """With q = k the affinity A is symmetric, so A A' V = A A V wherever no mask separates them."""
    q, _, v = draw(H, 13)
    decay = {"decay": 0.8} if mask == "prefix" else {}
    one, other = (hla.scan(q, q, v, operator=x, mask=mask, **decay) for x in ("hla2", "ahla"))
    close(one, other)


@pytest.mark.parametrize("row", rows(masks=STREAMING))
def test_gates_that_say_the_same_give_the_same(row: Row):
    q, k, v = draw(H, 13)
    options = row.options | {"chunk_size": W}
    plain = hla.scan(q, k, v, **options)
    np.testing.assert_array_equal(hla.scan(q, k, v, decay=1.0, **options), plain)
    np.testing.assert_array_equal(hla.scan(q, k, v, decay=np.ones(H), **options), plain)
    close(hla.scan(q, k, v, log_gate=np.zeros((H, 13)), **options), plain)
    decayed = hla.scan(q, k, v, decay=0.8, **options)
    close(hla.scan(q, k, v, decay=np.full(H, 0.8), **options), decayed)
    close(hla.scan(q, k, v, log_gate=np.full(13, math.log(0.8)), **options), decayed)


@pytest.mark.parametrize("row", rows(masks=STREAMING, forms=("chunked",)))
@pytest.mark.parametrize("gate", ["none", "decay", "resets"])
def test_default_chunks_at_their_edges(row: Row, gate):
    """T around one chunk and around several, with the chunk width the package chooses."""
    for T in (63, 64, 65, 129) if row.operator == "hla2" else (65,):
        q, k, v, options, want = case(row.operator, row.mask, gate, T, False)
        close(hla.scan(q, k, v, **row.options, **options), want)


@pytest.mark.parametrize("gate", ["none", "per_head", "resets"])
@pytest.mark.parametrize("row", rows(masks=STREAMING, forms=("chunked", "associative")))
def test_forms_agree_on_long_sequences(row: Row, gate):
    """Past several super-chunks, with grouped heads: against the token-by-token recurrence."""
    q, k, v, options, want = long_case(row.operator, row.mask, gate)
    close(hla.scan(q, k, v, **row.options, **options), want)
    close(hla.scan(q, k, v, chunk_size=33, **row.options, **options), want)


@pytest.mark.parametrize("D", [1, 24, 60, 100, 128])
@pytest.mark.parametrize("row", rows(masks=("causal",), forms=("chunked", "recurrent")))
def test_widths(row: Row, D):
    q, k, v = draw(2, 70, D=D, V=D // 2 + 7)
    want = hla.scan(q, k, v, form="dense", operator=row.operator, decay=0.95)
    o = hla.scan(q, k, v, decay=0.95, **row.options)
    within_budget(o, want, "float64", D=D, decay=0.95, W=1)


@pytest.mark.parametrize("row", rows(masks=STREAMING, forms=("chunked", "recurrent")))
def test_small_decay_underflows_to_zero_without_nan(row: Row):
    q, k, v = draw(70)
    for options in ({"decay": 1e-3}, {"log_gate": np.full(70, -300.0)}):
        with np.errstate(all="raise"):
            o = hla.scan(q, k, v, chunk_size=64, **row.options, **options)
        close(o, literal.scan(q, k, v, operator=row.operator, mask=row.mask, **options))
