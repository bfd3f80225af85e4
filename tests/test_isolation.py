"""What a token and a head may touch: nothing earlier and no other head, to the bit."""

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import OPERATORS, Row, draw, environment, rows

import hla

PAPER = rows(("hla2", "hla3"), ("causal",), ("chunked", "recurrent", "dense"))


@pytest.mark.parametrize(
    ("row", "convention"),
    [pytest.param(*row.values, "exact", id=row.id) for row in rows(masks=("causal", "prefix"))]
    + [pytest.param(*row.values, "paper", id=f"{row.id}-paper") for row in PAPER],
)
def test_the_future_changes_no_earlier_bit(row: Row, convention):
    q, k, v = draw(2, 50)
    rng = np.random.default_rng(9)
    a = -rng.random((2, 50))
    options = row.options | {"chunk_size": 16, "convention": convention}
    for t, gate in itertools.product((0, 15, 16, 37), (False, True)):
        q2, k2, v2, a2 = q.copy(), k.copy(), v.copy(), a.copy()
        for x in (q2, k2, v2):
            x[:, t:] = 100 * rng.standard_normal(x[:, t:].shape)
        a2[:, t:] = -rng.random(a2[:, t:].shape)
        a2[0, t] = -np.inf
        extra = ({"log_gate": a}, {"log_gate": a2}) if gate else ({}, {})
        o = hla.scan(q, k, v, **options, **extra[0])
        other = hla.scan(q2, k2, v2, **options, **extra[1])
        np.testing.assert_array_equal(o[:, :t], other[:, :t])
        assert (o[:, t:] != other[:, t:]).any()


@pytest.mark.parametrize("row", rows())
def test_heads_are_independent_to_the_bit(row: Row):
    """Bits of a head do not depend on the other heads' values, on NaN there, or on their number."""
    q, k, v = (x.astype(np.float32) for x in draw(6, 70, D=16, V=8))
    decay = {} if row.mask == "none" else {"decay": np.linspace(0.5, 1, 6)}
    o = hla.scan(q, k, v, **decay, **row.options)
    for value in (np.nan, np.inf, 1e30):
        for name in "qkv":
            arrays = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
            arrays[name][2, 30] = value
            with np.errstate(all="ignore"):
                other = hla.scan(**arrays, **decay, **row.options)
            np.testing.assert_array_equal(np.delete(other, 2, 0), np.delete(o, 2, 0))
    for heads in (slice(0, 1), slice(5, 6), slice(1, 4)):
        part = {} if row.mask == "none" else {"decay": decay["decay"][heads]}
        alone = hla.scan(q[heads], k[heads], v[heads], **part, **row.options)
        np.testing.assert_array_equal(alone, o[heads])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", rows(masks=("causal", "prefix")))
def test_nan_reaches_back_no_further_than_its_chunk(row: Row, value):
    """Recurrent: nothing before the token. Other forms: nothing before the token's chunk."""
    q, k, v = draw(2, 150)
    clean = hla.scan(q, k, v, chunk_size=64, **row.options)
    for t in (0, 63, 64, 149):
        before = t if row.form == "recurrent" else t // 64 * 64
        for which in range(3):
            spoilt = [q.copy(), k.copy(), v.copy()]
            spoilt[which][0, t] = value
            with np.errstate(all="ignore"):
                o = hla.scan(*spoilt, chunk_size=64, **row.options)
            if row.form != "dense":  # one T x T matrix is one chunk
                np.testing.assert_array_equal(o[0, :before], clean[0, :before])
            np.testing.assert_array_equal(o[1], clean[1])
            assert not np.isfinite(o[0, t]).all()


@pytest.mark.parametrize("convention", ["exact", "paper"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_step_keeps_nan_from_earlier_tokens_and_other_heads(operator, convention):
    q, k, v = draw(2, 6)
    k[0, 3, 0] = np.nan
    state = None
    for t in range(6):
        with np.errstate(all="ignore"):
            o, state = hla.step(
                q[:, t], k[:, t], v[:, t], state, operator=operator, convention=convention
            )
        assert np.isfinite(o[1]).all()
        assert np.isfinite(o[0]).all() == (t < 3)
    assert all(np.isfinite(x[1]).all() for x in state)


def test_bits_hold_with_threads_in_blas():
    """With the library's own thread settings: repeatable, and the same bits for fewer heads."""
    code = """
        import numpy as np, hla
        rng = np.random.default_rng(0)
        q, k, v = rng.standard_normal((3, 6, 500, 96), np.float32)
        for operator in ("hla2", "hla3"):
            runs = []
            for heads in (slice(None), slice(None), slice(2, 3)):
                o, pull = hla.vjp(q[heads], k[heads], v[heads], operator=operator, decay=0.99)
                runs.append((o, *pull(v[heads])[:3]))
            for whole, again, one in zip(*runs, strict=True):
                np.testing.assert_array_equal(again, whole)
                np.testing.assert_array_equal(one, whole[2:3])
    """
    free = {n: x for n, x in environment().items() if not n.endswith("_NUM_THREADS")}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=free,
        check=True,
    )
