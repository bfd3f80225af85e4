"""Hand-over of states, shared and grouped heads, axes, packed sequences, saved states."""

import itertools
import pickle

import literal
import numpy as np
import pytest
from conftest import (
    OPERATORS,
    Row,
    close,
    close_fields,
    draw,
    gates,
    installed,
    rows,
    same,
    same_fields,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import hla

STREAMING = [
    pytest.param(operator, mask, convention, id=f"{operator}-{mask}-{convention}")
    for operator, mask, convention in itertools.product(
        OPERATORS, ("causal", "prefix"), ("exact", "paper")
    )
    if convention == "exact" or (mask == "causal" and operator in ("hla2", "hla3"))
]
H, T = 2, 23


def cut(options, start, stop):
    """The options with per-token gates cut to a range."""
    if "log_gate" not in options:
        return options
    return options | {"log_gate": options["log_gate"][..., start:stop]}


def at(options, t):
    if "log_gate" not in options:
        return options
    return options | {"log_gate": options["log_gate"][..., t]}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    cuts=st.tuples(st.integers(0, T), st.integers(0, T)),
    gate=st.sampled_from(["none", "per_head", "resets"]),
    normalize=st.booleans(),
    forms=st.tuples(*[st.sampled_from(["chunked", "recurrent"])] * 2),
)
@pytest.mark.parametrize(("operator", "mask", "convention"), STREAMING)
def test_split_anywhere_and_continue(operator, mask, convention, cuts, gate, normalize, forms):
    """Scan, scan, then step to the end: the outputs and the last state of one whole scan."""
    first, second = sorted(cuts)
    q, k, v = draw(H, T, positive=normalize)
    options = gates(gate, H, T) | {"operator": operator, "mask": mask, "convention": convention}
    options |= {"normalize": normalize, "eps": 0.1, "scale": 0.8}
    if operator == "hla2":
        options["ridge"] = 0.3
    whole, last = hla.scan(q, k, v, return_state=True, chunk_size=4, **options)
    state, parts = None, []
    for (start, stop), form in zip(((0, first), (first, second)), forms, strict=True):
        arrays = (x[:, start:stop] for x in (q, k, v))
        o, state = hla.scan(
            *arrays,
            initial_state=state,
            return_state=True,
            form=form,
            chunk_size=4,
            **cut(options, start, stop),
        )
        parts.append(o)
    for t in range(second, T):
        o, state = hla.step(q[:, t], k[:, t], v[:, t], state, **at(options, t))
        parts.append(o[:, None])
    close(np.concatenate(parts, axis=1), whole, 1e-11)
    close_fields(state, last, 1e-11)


@pytest.mark.parametrize("row", rows(masks=("causal", "prefix"), forms=("chunked", "recurrent")))
def test_no_tokens_return_the_state_as_it_was(row: Row):
    q, k, v = draw(H, T)
    _, state = hla.scan(q, k, v, return_state=True, decay=0.9, **row.options)
    o, after = hla.scan(
        q[:, :0], k[:, :0], v[:, :0], initial_state=state, return_state=True, **row.options
    )
    assert o.shape == (H, 0, 3)
    same_fields(after, state)
    o, empty = hla.scan(q[:, :0], k[:, :0], v[:, :0], return_state=True, **row.options)
    assert o.shape == (H, 0, 3)
    assert all(not x.any() for x in empty)
    close(hla.scan(q, k, v, initial_state=empty, **row.options), hla.scan(q, k, v, **row.options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("row", rows(masks=("causal", "prefix"), forms=("chunked", "recurrent")))
def test_state_dtype_and_lower_precision_states(row: Row, dtype):
    ml_dtypes = installed("ml_dtypes")
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    q, k, v = (x.astype(kind) for x in draw(H, 8))
    o, state = hla.scan(q, k, v, return_state=True, **row.options)
    wide = np.float64 if dtype == "float64" else np.float32
    assert o.dtype == kind
    assert {x.dtype for x in state} == {np.dtype(wide)}
    low = state._replace(**{n: x.astype(np.float16, order="C") for n, x in state._asdict().items()})
    high = low._replace(**{n: x.astype(wide) for n, x in low._asdict().items()})
    got, after = hla.scan(q, k, v, initial_state=low, return_state=True, **row.options)
    want, _ = hla.scan(q, k, v, initial_state=high, return_state=True, **row.options)
    same(got, want)
    assert {x.dtype for x in after} == {np.dtype(wide)}
    o, after = hla.step(q[:, 0], k[:, 0], v[:, 0], low, operator=row.operator, mask=row.mask)
    assert o.dtype == kind
    assert {x.dtype for x in after} == {np.dtype(wide)}


@pytest.mark.parametrize("row", rows(masks=("causal", "prefix")))
def test_multi_query_equals_repeated_keys_and_keeps_shared_moments_once(row: Row):
    B, G = 2, 3
    q, _, _ = draw(B, G, T)
    _, k, v = draw(B, 1, T, seed=1)
    options = row.options | {"decay": 0.9, "chunk_size": 8, "return_state": True}
    o, state = hla.scan(q, k, v, **options)
    want, full = hla.scan(q, np.repeat(k, G, 1), np.repeat(v, G, 1), **options)
    close(o, want)
    shared = {"S", "P"} | ({"m"} if row.operator != "hla2" else set())
    for name in state._fields:
        heads = 1 if name in shared else G
        assert getattr(state, name).shape == (B, heads, *getattr(full, name).shape[2:]), name
        close(np.broadcast_to(getattr(state, name), getattr(full, name).shape), getattr(full, name))
    o, after = hla.scan(q, k, v, initial_state=state, **options)
    again, _ = hla.scan(q, np.repeat(k, G, 1), np.repeat(v, G, 1), initial_state=full, **options)
    close(o, again)
    assert [x.shape for x in after] == [x.shape for x in state]
    per_head = options | {"decay": np.array([0.5, 0.7, 0.9])}
    _, state = hla.scan(q, k, v, **per_head)
    assert all(x.shape[1] == G for x in state)  # every moment decays, each head at its own rate


@pytest.mark.parametrize("row", rows(masks=("causal", "none"), forms=("chunked", "dense")))
def test_grouped_queries_and_shared_values(row: Row):
    Hkv, G = 2, 3
    q, _, _ = draw(Hkv, G, T)
    _, k, v = draw(Hkv, 1, T, seed=1)
    want = np.stack([[hla.scan(q[h, g], k[h, 0], v[h, 0], **row.options) for g in range(G)]
                     for h in range(Hkv)])  # fmt: skip
    close(hla.scan(q, k, v, **row.options), want)
    close(hla.scan(q, k, v[:1], **row.options)[0], want[0])
    no_batch = hla.scan(q, k[0, 0], v[0, 0], **row.options)
    close(no_batch[0], want[0])


@pytest.mark.parametrize("row", rows(masks=("causal", "prefix")))
def test_token_axis_before_heads(row: Row):
    """axis=-3 takes [B, T, H, D] and gates [B, T, H], and lays the output out like q."""
    q, k, v = draw(2, 3, T)
    a = gates("resets", 3, T)["log_gate"]
    want, state = hla.scan(q, k, v, log_gate=a, return_state=True, **row.options)
    moved = [np.moveaxis(x, 1, 2) for x in (q, k, v)]
    options = row.options | {"axis": -3, "return_state": True}
    o, other = hla.scan(*moved, log_gate=a.T, **options)
    assert o.shape == (2, T, 3, 3)
    close(o, np.moveaxis(want, 1, 2))
    close_fields(other, state)
    o, _ = hla.scan(*moved, log_gate=a.T, **options | {"axis": 1})
    close(o, np.moveaxis(want, 1, 2))
    decays = np.array([0.5, 0.7, 0.9])
    o, _ = hla.scan(*moved, decay=decays, **options)
    close(o, np.moveaxis(hla.scan(q, k, v, decay=decays, **row.options), 1, 2))


def test_segments_take_the_token_axis():
    q, k, v = draw(2, T, 3)
    moved = [np.moveaxis(x, 1, 2) for x in (q, k, v)]
    decays = np.array([0.5, 0.7, 0.9])
    close_fields(hla.summarize(q, k, v, decay=decays, axis=-3), hla.summarize(*moved, decay=decays))


@pytest.mark.parametrize("row", rows(masks=("causal", "prefix")))
def test_incoming_states_broadcast_and_outgoing_ones_are_full(row: Row):
    q, k, v = draw(2, 3, T)
    _, one = hla.scan(
        q[0, 0], k[0, 0], v[0, 0], return_state=True, operator=row.operator, mask=row.mask
    )
    assert [x.ndim for x in one] == [1 if x.shape[-1:] == x.shape else 2 for x in one]
    full = one._replace(
        **{n: np.broadcast_to(x, (2, 3, *x.shape)).copy() for n, x in one._asdict().items()}
    )
    options = row.options | {"return_state": True, "decay": 0.9, "chunk_size": 8}
    want, state = hla.scan(q, k, v, initial_state=full, **options)
    o, after = hla.scan(q, k, v, initial_state=one, **options)
    close(o, want)
    close_fields(after, state)
    o, after = hla.step(q[..., 0, :], k[..., 0, :], v[..., 0, :], one, operator=row.operator,
                        mask=row.mask, decay=0.9)  # fmt: skip
    close(o, want[..., 0, :])
    assert all(x.shape[:2] == (2, 3) for x in after)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("row", rows(masks=("causal", "prefix")))
def test_packed_sequences_equal_separate_calls(row: Row, normalize):
    """log_gate = -inf at each start: several sequences through one call, other gates kept."""
    q, k, v = draw(H, T, positive=normalize)
    starts = [0, 5, 6, 14, T]
    a = -0.3 * np.random.default_rng(5).random((H, T))
    packed = a.copy()
    packed[:, starts[:-1]] = -np.inf
    options = row.options | {"normalize": normalize, "chunk_size": 8, "return_state": True}
    o, state = hla.scan(q, k, v, log_gate=packed, **options)
    for start, stop in itertools.pairwise(starts):
        part = [x[:, start:stop] for x in (q, k, v)]
        alone, end = hla.scan(*part, log_gate=a[:, start:stop], **options)
        close(o[:, start:stop], alone)
    close_fields(state, end)
    _, carried = hla.scan(*draw(H, 9, seed=3), **options | {"normalize": False})
    again, _ = hla.scan(q, k, v, log_gate=packed, initial_state=carried, **options)
    close(again, o)  # a reset at the first token forgets the state


@pytest.mark.parametrize("row", rows(masks=("causal", "prefix"), forms=("chunked",)))
def test_scan_of_a_state_saved_and_loaded(row: Row, tmp_path):
    safetensors = installed("safetensors.numpy")
    q, k, v = draw(H, T)
    options = {"operator": row.operator, "mask": row.mask}
    _, whole = hla.scan(q, k, v, return_state=True, **options)
    for state in (whole, whole.pack()):
        kind = getattr(hla.states, type(state).__name__)
        np.savez(tmp_path / "state.npz", **state._asdict())
        safetensors.save_file(state._asdict(), tmp_path / "state.safetensors")
        with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
            unpickled = kind(**file)
        loaded = kind(**safetensors.load_file(tmp_path / "state.safetensors"))
        same_fields(unpickled, state)
        same_fields(loaded, state)
        same_fields(pickle.loads(pickle.dumps(state)), state)
        want = hla.scan(q, k, v, initial_state=state, **row.options)
        same(hla.scan(q, k, v, initial_state=loaded, **row.options), want)


def triangle(S):
    return S[(..., *np.triu_indices(S.shape[-1]))]


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("gate", ["none", "per_head", "resets"])
@pytest.mark.parametrize(("operator", "mask", "convention"), STREAMING)
def test_packed_states_in_scans_and_gradients(operator, mask, convention, gate, ridge):
    """Packed in, packed out; a number of a packed S has the gradients of both its entries."""
    if ridge and operator != "hla2":
        return
    q, _, _ = draw(2, H, T)
    _, k, v = draw(2, 1, T, seed=1)  # S is kept once
    options = gates(gate, H, T) | {"operator": operator, "mask": mask, "convention": convention}
    options |= {"ridge": ridge, "scale": 0.6, "return_state": True, "chunk_size": 8}
    _, start = hla.scan(q, k, v, **options)
    packed = start.pack()
    rng = np.random.default_rng(2)
    for backend in ("numpy", "array_api"):
        (o, end), pullback = hla.vjp(q, k, v, initial_state=packed, backend=backend, **options)
        want, whole = hla.scan(q, k, v, initial_state=start, backend=backend, **options)
        close(o, want, 1e-12)
        assert type(end) is type(packed)
        close_fields(end.unpack(), whole, 1e-12)
        do = rng.standard_normal(o.shape)
        dstate = type(end)(*(rng.standard_normal(x.shape) for x in end))
        upper = dict(dstate._asdict())
        if "S" in upper:  # what is packed is the upper triangle
            upper["S"] = np.zeros(whole.S.shape)
            upper["S"][(..., *np.triu_indices(5))] = dstate.S
        _, of_whole = hla.vjp(q, k, v, initial_state=start, backend=backend, **options)
        expected = of_whole(do, type(start)(**upper))
        given = expected.dinitial_state._asdict()
        if "S" in given:
            both = given["S"] + given["S"].mT
            given["S"] = triangle(np.where(np.eye(5, dtype=bool), given["S"], both))
        got = pullback(do, dstate)
        close_fields(got, expected._replace(dinitial_state=type(packed)(**given)), 1e-10)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_a_packed_state_are_differences(operator):
    q, k, v = draw(H, 6)
    _, state = hla.scan(q, k, v, operator=operator, return_state=True)
    packed, rng = state.pack(), np.random.default_rng(3)
    do, way = rng.standard_normal((H, 6, 3)), [rng.standard_normal(x.shape) for x in packed]

    def loss(t):
        moved = type(packed)(*(x + t * y for x, y in zip(packed, way, strict=True)))
        return (do * hla.scan(q, k, v, operator=operator, initial_state=moved)).sum()

    grad = hla.vjp(q, k, v, operator=operator, initial_state=packed)[1](do).dinitial_state
    slope = sum((x * y).sum() for x, y in zip(grad, way, strict=True))
    close(np.array((loss(1.0) - loss(-1.0)) / 2), np.array(slope), 1e-10)  # at most quadratic in it


def test_fields_of_a_state_without_a_gradient_may_be_none():
    q, k, v = draw(H, T)
    (o, state), pullback = hla.vjp(q, k, v, return_state=True)
    zeros = type(state)(*(np.zeros_like(x) for x in state))
    for name, x in state._asdict().items():
        some = type(state)(**dict.fromkeys(state._fields) | {name: x})
        close_fields(pullback(o, some), pullback(o, zeros._replace(**{name: x})))
    close_fields(pullback(o, type(state)(None, None, None)), pullback(o))


@pytest.mark.parametrize("operator", OPERATORS)
def test_gates_broadcast(operator):
    """Gates of fewer axes or of size 1 stand for all heads, batches or tokens; in step, a float."""
    q, k, v = draw(2, 3, T)
    a = -np.random.default_rng(5).random((2, 3, T))
    for gate in (a[0, 0], a[0, :1], a[:, :1], a[..., :1], a[0, 0, :1]):
        full = np.broadcast_to(gate, a.shape).copy()
        o = hla.scan(q, k, v, operator=operator, log_gate=gate, chunk_size=8)
        close(o, hla.scan(q, k, v, operator=operator, log_gate=full, chunk_size=8))
    for decay in (np.full((2, 1), 0.5), np.linspace(0.5, 1, 3), np.array(0.7)):
        full = np.broadcast_to(decay, (2, 3)).copy()
        o = hla.scan(q, k, v, operator=operator, decay=decay, chunk_size=8)
        close(o, hla.scan(q, k, v, operator=operator, decay=full, chunk_size=8))
    token = [x[..., 0, :] for x in (q, k, v)]
    _, state = hla.scan(q, k, v, operator=operator, return_state=True)
    full = np.full((2, 3), -0.3)
    want, end = hla.step(*token, state, operator=operator, log_gate=full)
    for gate in ({"log_gate": -0.3}, {"log_gate": full[0]}, {"decay": np.exp(-0.3)}):
        o, after = hla.step(*token, state, operator=operator, **gate)
        close(o, want)
        close_fields(after, end)


def test_states_are_new_and_reusable():
    """Two calls from one state agree; a kept state of step does not change later."""
    q, k, v = draw(H, T)
    _, state = hla.scan(q, k, v, return_state=True)
    kept = type(state)(*(x.copy() for x in state))
    first, one = hla.scan(q, k, v, initial_state=state, return_state=True)
    second, two = hla.scan(q, k, v, initial_state=state, return_state=True)
    np.testing.assert_array_equal(first, second)
    same_fields(one, two)
    o, after = hla.step(q[:, 0], k[:, 0], v[:, 0], state)
    mine = type(after)(*(x.copy() for x in after))
    hla.step(q[:, 1], k[:, 1], v[:, 1], after)
    same_fields(after, mine)
    same_fields(state, kept)
    assert not any(np.shares_memory(x, y) for x, y in itertools.product(state, after))
    donated = type(state)(*(x.copy() for x in state))
    other, moved = hla.step(q[:, 0], k[:, 0], v[:, 0], donated, donate=True)
    np.testing.assert_array_equal(other, o)
    same_fields(moved, mine)


@pytest.mark.parametrize("gate", ["none", "per_head", "log_gate"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_donated_state_is_updated_in_its_own_memory(operator, mask, normalize, gate):
    """NumPy's; with the bits of the same steps without donating, token by token."""
    q, k, v = draw(H, T, positive=True)
    options = {"operator": operator, "mask": mask, "normalize": normalize}
    options |= {"ridge": 0.3} if operator == "hla2" else {}
    _, state = hla.scan(*draw(H, 3), return_state=True, **options)
    mine = memory = type(state)(*(x.copy() for x in state))
    for t in range(T):
        token, now = [x[:, t] for x in (q, k, v)], gates(gate, H, T)
        now = {n: x[:, t] if n == "log_gate" else x for n, x in now.items()}
        want, state = hla.step(*token, state, **options, **now)
        o, mine = hla.step(*token, mine, donate=True, **options, **now)
        same(o, want)
        same_fields(mine, state)
    for x, y in zip(mine, memory, strict=True):
        assert x is y


def shared(x):
    return np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:]), writeable=True)


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


KEPT = {  # what makes of a state one that cannot be updated where it lies
    "read-only": lambda state, q: type(state)(*map(frozen, state)),
    "broadcast": lambda state, q: state._replace(S=np.broadcast_to(state.S[:1], state.S.shape)),
    "shared": lambda state, q: state._replace(S=shared(state.S.copy())),
    "fewer axes": lambda state, q: state._replace(S=state.S[0].copy(), F=state.F[:1].copy()),
    "another dtype": lambda state, q: type(state)(*(x.astype(np.float32) for x in state)),
    "another dtype of one field": lambda state, q: state._replace(F=state.F.astype(np.float32)),
    "an axis more": lambda state, q: state._replace(S=state.S[None]),
    "not contiguous": lambda state, q: state._replace(F=np.asfortranarray(state.F)),
    "one memory for two fields": lambda state, q: state._replace(F=state.S),
    "memory of q": lambda state, q: state._replace(eta=q),
    "packed": lambda state, q: state.pack(),
}


@pytest.mark.parametrize("kind", KEPT)
def test_donating_what_cannot_be_updated_changes_nothing(kind):
    q, k, v = (x[:, 0].copy() for x in draw(H, 1, V=5))
    _, state = hla.scan(*draw(H, 3, V=5), return_state=True)
    given = KEPT[kind](state, q)
    before = [x.copy() for x in (*given, q, k, v)]
    want, last = hla.step(q, k, v, given, decay=0.9)
    o, after = hla.step(q, k, v, given, decay=0.9, donate=True)
    same(o, want)
    same_fields(after, last)
    for x, y in zip((*given, q, k, v), before, strict=True):
        same(x, y)


@pytest.mark.parametrize("operator", ["hla2", "hla3"])
def test_a_donated_state_of_the_paper_is_read_before_it_is_updated(operator):
    q, k, v = (x[:, 0] for x in draw(H, 1))
    options = {"operator": operator, "convention": "paper", "decay": 0.9}
    _, state = hla.scan(*draw(H, 3), return_state=True, **options)
    want, last = hla.step(q, k, v, state, **options)
    o, after = hla.step(q, k, v, state, donate=True, **options)
    same(o, want)
    same_fields(after, last)


@pytest.mark.parametrize("row", rows(forms=("chunked", "associative")))
def test_a_padded_token_is_none(row: Row):
    """Zero q, k and v with a gate of 0, wherever they stand: the literal sums without them.

    The last state and the gradients too, whatever the gradient of a padded token's output.
    """
    at = np.array([2, 3, 4, 9, 10, 15, 16])  # left, right and between
    tokens, rng = len(at), np.random.default_rng(0)
    q, k, v = draw(H, tokens, positive=True)
    a = gates("log_gate", H, tokens)["log_gate"]
    a[0, 3] = -np.inf

    def padded(x):
        full = np.zeros((H, 20, *x.shape[2:]))
        full[:, at] = x
        return full

    given, gate = tuple(map(padded, (q, k, v))), {"log_gate": padded(a)}
    extras: list[dict] = [{}, {"normalize": True}]
    extras += [{"normalize": True, "ridge": 0.3}] * (row.operator == "hla2")
    paper = row.mask == "causal" and row.operator in literal.PAPER and row.form == "chunked"
    for extra, convention in itertools.product(extras, ("exact", "paper")[: 1 + paper]):
        names = row.options | extra | {"chunk_size": 4, "convention": convention}
        plain = extra | {"operator": row.operator}
        if row.mask == "none":
            o = hla.scan(*given, **names)
            close(o[:, at], literal.scan(q, k, v, mask="none", **plain))
            continue
        if convention == "paper":
            want, _ = literal.paper(q, k, v, log_gate=a, **plain)
        else:
            want = literal.scan(q, k, v, mask=row.mask, log_gate=a, **plain)
        close(hla.scan(*given, **gate, **names)[:, at], want)
        _, start = hla.scan(*draw(H, 3), return_state=True, **names)
        names |= {"initial_state": start, "return_state": True}
        (o, last), pullback = hla.vjp(q, k, v, log_gate=a, **names)
        (_, kept), padded_pullback = hla.vjp(*given, **gate, **names)
        close_fields(kept, last)
        do, dout = rng.standard_normal(o.shape), rng.standard_normal((H, 20, o.shape[-1]))
        dout[:, at] = do
        got, expected = padded_pullback(dout, last), pullback(do, last)
        close_fields(got.dinitial_state, expected.dinitial_state)
        for name in ("dq", "dk", "dv", "dlog_gate"):
            close(getattr(got, name)[:, at], getattr(expected, name))
