"""Every field of hla.vjp against finite differences of hla.scan in float64."""

import numpy as np
import pytest
from conftest import (
    EXACT,
    MOVABLE,
    OPERATORS,
    Row,
    close,
    close_fields,
    draw,
    gated,
    movable,
    rows,
    states,
    symmetric,
)
from terms import Call, gate_terms, gates_within_budget

import hla

H, T = 2, 9
STREAMING = ("causal", "prefix")


def slopes(loss, inputs, directions, batch, h=2e-4):
    """Derivatives of a loss, by five points in each direction of one input; their rounding errors.

    All of the points are one call's: they lie along a new first axis of every input. `inputs` are
    pairs (array, axes that are not of the batch) by name, of a batch of so many axes.
    """
    steps, points = h * np.array([1, -1, 2, -2]), {}
    for name, (x, own) in inputs.items():
        x = x.reshape((1,) * (batch + own - x.ndim) + x.shape)
        points[name] = np.repeat(x[None], 4 * len(directions), axis=0)
    for i, (name, direction) in enumerate(directions.items()):
        x = points[name]
        x[4 * i : 4 * i + 4] += np.multiply.outer(steps, direction).reshape(4, *x.shape[1:])
    right, left, far_right, far_left = loss(points).reshape(-1, 4).T
    found = (8 * (right - left) - (far_right - far_left)) / (12 * h), 1e-14 * abs(right) / h
    return zip(*found, strict=True)


def check_gradients(loss, inputs, gradients, batch):
    """The slope at every input in a random direction; a -inf entry of one stays and must have 0."""
    directions = {}
    for seed, (name, gradient) in enumerate(gradients.items()):
        x, _ = inputs[name]
        assert gradient.shape == x.shape, name
        assert gradient.dtype == x.dtype
        fixed = np.isneginf(x)
        assert not gradient[fixed].any()
        direction = np.random.default_rng(seed).standard_normal(x.shape)
        directions[name] = symmetric(name, np.where(fixed, 0.0, direction))
    found = slopes(loss, inputs, directions, batch)
    for (name, direction), (want, rounding) in zip(directions.items(), found, strict=True):
        gradient = gradients[name]
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert size > 0, f"{name} has no gradient"
        assert abs(np.sum(gradient * direction) - want) <= 1e-7 * size + rounding, name


OWN_AXES = {"q": 2, "k": 2, "v": 2, "decay": 0, "log_gate": 1}


def check_vjp(inputs, options, start=None, dstate=None, do_seed=1):
    """Every field of hla.vjp's Gradients against finite differences of hla.scan."""
    o, _ = hla.vjp(**inputs, **options)
    do = np.random.default_rng(do_seed).standard_normal(o.shape)

    def loss(points):
        arrays = {n: points[n] for n in inputs}
        if start is not None:
            arrays["initial_state"] = type(start)(*(points[n] for n in start._fields))
        if dstate is None:
            terms = [do * hla.scan(**arrays, **options)]
        else:
            o, state = hla.scan(**arrays, return_state=True, **options)
            terms = [do * o, *(d * x for d, x in zip(dstate, state, strict=True))]
        return sum(x.reshape(len(x), -1).sum(-1) for x in terms)

    if dstate is None:
        got, pullback = hla.vjp(**inputs, initial_state=start, **options)
        gradients = pullback(do)
    else:
        (got, _), pullback = hla.vjp(**inputs, initial_state=start, return_state=True, **options)
        gradients = pullback(do, dstate)
    close(got, hla.scan(**inputs, initial_state=start, **options), 1e-13)
    assert gradients._fields == ("dq", "dk", "dv", "ddecay", "dlog_gate", "dinitial_state")
    *of_arrays, of_state = gradients
    moved = {n: (x, OWN_AXES[n]) for n, x in inputs.items()}
    checked = {}
    for name, gradient in zip(OWN_AXES, of_arrays, strict=True):
        assert (gradient is None) == (name not in inputs), name
        if name in inputs:
            checked[name] = gradient
    assert (of_state is None) == (start is None)
    if start is not None:
        assert of_state._fields == start._fields
    fields = () if start is None else zip(start._fields, start, of_state, strict=True)
    for name, x, gradient in fields:
        moved[name] = x, 1 if name.islower() else 2
        if name in ("eta", "m", "n", "h", "h1", "h2", "h3") and not gradient.any():
            assert dstate is None  # a denominator that nothing reads: none was asked for
            assert not options.get("normalize")
        else:
            checked[name] = gradient
    check_gradients(loss, moved, checked, do.ndim - 2)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(("row", "gate"), gated(MOVABLE, forms=("chunked",)))
def test_vjp(row: Row, gate, normalize):
    q, k, v = draw(H, T, positive=normalize)
    inputs = {"q": q, "k": k, "v": v} | movable(gate, H, T)
    options = row.options | {"normalize": normalize, "eps": 0.1, "scale": 0.8, "chunk_size": 4}
    check_vjp(inputs, options)
    if row.operator == "hla2":
        check_vjp(inputs, options | {"ridge": 0.6})


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(("row", "gate"), gated(MOVABLE, masks=STREAMING, forms=("chunked",)))
def test_vjp_through_states(row: Row, gate, normalize):
    q, k, v = draw(H, T, positive=normalize)
    inputs = {"q": q, "k": k, "v": v} | movable(gate, H, T)
    options = row.options | {"normalize": normalize, "eps": 0.1, "scale": 0.8, "chunk_size": 4}
    for ridge in (0.0, 0.6) if row.operator == "hla2" else (0.0,):
        options |= {"ridge": ridge}
        common = {n: options[n] for n in ("operator", "mask", "ridge", "scale")}
        start, dstate = states(H, common, inputs)
        start = type(start)(*(abs(x) if normalize else x for x in start))
        check_vjp(inputs, options, start, dstate)
        check_vjp(inputs, options, start)


CALLS = [
    *((operator, mask, "exact") for operator in OPERATORS for mask in STREAMING),
    *((operator, "causal", "paper") for operator in ("hla2", "hla3")),
]


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(("operator", "mask", "convention"), CALLS)
def test_a_gates_gradient_is_the_sum_of_its_terms(operator, mask, convention, normalize):
    q, k, v = draw(H, T, positive=normalize)
    options = {"operator": operator, "mask": mask, "convention": convention, "scale": 0.8}
    options |= {"ridge": 0.6} if operator == "hla2" else {}
    for gate in ("per_head", "log_gate"):
        inputs = {"q": q, "k": k[:1], "v": v} | movable(gate, H, T)
        start, dstate = states(H, options, inputs, gate_like(gate))
        more = {"normalize": normalize, "eps": 3e3, "return_state": True, "initial_state": start}
        given = draw(H, T, seed=4)[2], dstate
        want = hla.vjp(**inputs, **options, **more, backend="array_api")[1](*given)
        found = 0.0
        for read, write, inner in Call(inputs | more, options | more, given).all_terms():
            d = np.flip(np.cumsum(np.flip(read - write, -1), -1), -1) + inner[..., None]
            found += d.reshape(-1, H, T).sum(0)
        if gate == "log_gate":
            close(found, want.dlog_gate)
        else:
            close(found.sum(-1) / inputs["decay"], want.ddecay)


@pytest.mark.parametrize(
    ("operator", "dtype"), [*((o, "bfloat16") for o in OPERATORS), ("hla3", "float32")]
)
def test_the_budget_of_gates_sees_each_head_and_block(operator, dtype):
    """One of twelve heads without its gradient is refused, however much faster others forget."""
    heads, T, decay = 12, 130, np.linspace(0.05, 0.89, 12)
    inputs = {n: abs(x) for n, x in zip("qkv", draw(heads, T, positive=True), strict=True)}
    given, options = (abs(draw(heads, T, seed=4)[2]),), {"operator": operator}
    for gate in ({"decay": decay}, {"log_gate": np.log(decay)[:, None] + np.zeros((heads, T))}):
        gradients = hla.vjp(**inputs, **gate, **options, backend="array_api")[1](*given)
        want = gradients.ddecay if "decay" in gate else gradients.dlog_gate
        same = dtype, inputs | gate, options, given, operator
        terms = gate_terms(inputs | gate, options, given)
        gates_within_budget(want, want, *same)
        for head in range(heads):
            for part in ((),) if "decay" in gate else (slice(64), slice(64, None)):
                wrong = want.copy()
                wrong[(head, part) if part else head] = 0.0
                with pytest.raises(AssertionError, match=f"head {head} "):
                    gates_within_budget(wrong, want, *same, terms=terms)


def test_a_quotient_that_forgets_cancels_in_what_its_gates_gradient_is_added_from():
    """At a decay near 0 o is v: numerator and denominator pull y by what leaves nothing."""
    q, k, v = (x.astype("float32") for x in draw(2, 300, D=4, positive=True))
    inputs = {"q": q, "k": k, "v": v, "decay": np.array([1e-6, 0.5], "float32")}
    do = draw(2, 300, seed=4)[2].astype("float32")
    options = {"operator": "hla2", "normalize": True}
    got = hla.vjp(**inputs, **options)[1](do).ddecay
    inputs, do = {n: x.astype(float) for n, x in inputs.items()}, do.astype(float)
    want = hla.vjp(**inputs, **options)[1](do).ddecay
    gates_within_budget(got, want, "float32", inputs, options, (do,))


PAPER = {"operators": ("hla2", "hla3"), "masks": ("causal",), "forms": ("chunked",)}


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize(("row", "gate"), gated(MOVABLE, **PAPER))
def test_vjp_of_the_papers_convention(row: Row, gate, normalize):
    q, k, v = draw(H, T, positive=normalize)
    inputs = {"q": q, "k": k, "v": v} | movable(gate, H, T)
    for ridge in (0.0, 0.6) if row.operator == "hla2" else (0.0,):
        common = {"operator": row.operator, "ridge": ridge, "scale": 0.8, "convention": "paper"}
        options = row.options | common | {"normalize": normalize, "eps": 3e3, "chunk_size": 4}
        check_vjp(inputs, options)
        start, dstate = states(H, common, inputs, gate_like(gate))
        check_vjp(inputs, options, start, dstate)


def gate_like(gate):
    """A decay for the call that makes the first state: its type is that of a decayed call."""
    return {} if gate == "none" else {"decay": 0.9}


@pytest.mark.parametrize(("row", "gate"), gated(MOVABLE))
def test_every_form_has_the_gradients_of_the_chunked_one(row: Row, gate):
    q, k, v = draw(H, T)
    inputs = {"q": q, "k": k, "v": v} | movable(gate, H, T)
    common = {"operator": row.operator, "mask": row.mask, "scale": 0.8}
    if row.mask == "none":
        o, pullback = hla.vjp(**inputs, **common)
        do = draw(H, T, seed=4)[2]
        other, pull = hla.vjp(**inputs, **row.options, scale=0.8)
        close(other, o)
        close_fields(pull(do), pullback(do))
        return
    start, dstate = states(H, common, inputs)
    do = draw(H, T, seed=4)[2]
    common |= {"initial_state": start, "return_state": True}
    _, pullback = hla.vjp(**inputs, **common)
    _, pull = hla.vjp(**inputs, **common | row.options, chunk_size=4)
    got, want = pull(do, dstate), pullback(do, dstate)
    close_fields(got, want)
    if gate != "none":
        name = "ddecay" if gate == "per_head" else "dlog_gate"
        given = inputs | {"initial_state": start}, common, (do, dstate)
        gates_within_budget(getattr(got, name), getattr(want, name), "float64", *given, most=EXACT)


@pytest.mark.parametrize("row", rows(masks=STREAMING, forms=("chunked", "recurrent")))
def test_broadcast_inputs_get_gradients_of_their_own_shape(row: Row):
    """Shared keys, values without a batch, one gate for all heads, a state without heads."""
    q = draw(2, 3, T)[0]
    k = draw(2, 1, T, seed=1)[1]
    v = draw(T, seed=2)[2]
    options = row.options | {"chunk_size": 4}
    plain = {"operator": row.operator, "mask": row.mask}
    _, start = hla.scan(*draw(6, seed=3), return_state=True, **plain)
    for gate in ({"decay": np.array([[0.7], [0.9]])}, {"log_gate": -np.linspace(0.1, 0.5, T)}):
        check_vjp({"q": q, "k": k, "v": v} | gate, options, start)
    check_vjp({"q": q[:1, :1], "k": k[:1], "v": v, "decay": np.array(0.8)}, options)


@pytest.mark.parametrize("row", rows(masks=STREAMING, forms=("chunked",)))
def test_states_of_what_heads_share_are_shared(row: Row):
    """Values with heads, queries and keys without: as with copies, and one of what is equal."""
    inputs = {"q": draw(T)[0], "k": draw(T, seed=1)[1], "v": draw(3, T, seed=2)[2]}
    copies = {n: np.broadcast_to(x, (3, *x.shape[-2:])).copy() for n, x in inputs.items()}
    do, rng = draw(3, T, seed=4)[2], np.random.default_rng(5)
    options = row.options | {"decay": 0.8, "return_state": True}
    (o, state), pullback = hla.vjp(**inputs, **options)
    (want, full), pull = hla.vjp(**copies, **options)
    close(o, want)
    dstate, dfull = {}, {}
    for name, x in state._asdict().items():
        y = getattr(full, name)
        matrix = not name[0].islower()
        carries_v = matrix and x.shape[-1] == inputs["v"].shape[-1]
        assert x.shape == (y.shape if carries_v else y.shape[1:])
        close(np.broadcast_to(x, y.shape), y)
        dstate[name] = rng.standard_normal(x.shape)
        dfull[name] = np.broadcast_to(dstate[name] / (1 if carries_v else 3), y.shape).copy()
    found = pullback(do, type(state)(**dstate))
    for x, y in zip(found[:3], pull(do, type(full)(**dfull))[:3], strict=True):
        close(x, y if x.ndim == 3 else y.sum(0))


def test_gradients_go_to_arrays_only():
    q, k, v = draw(H, T)
    do = draw(H, T, seed=4)[2]
    for decay in ({}, {"decay": 0.9}):
        _, pullback = hla.vjp(q, k, v, **decay)
        assert pullback(do)[3:] == (None, None, None)
    _, pullback = hla.vjp(q, k, v, decay=np.array(0.9))
    assert pullback(do).ddecay.shape == ()
    first, second = pullback(do), pullback(do)  # a pullback may be called again
    for x, y in zip(first[:4], second[:4], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_cotangent_counts_as_zeros(operator):
    q, k, v = draw(H, T)
    (o, state), pullback = hla.vjp(q, k, v, operator=operator, return_state=True)
    do = draw(H, T, seed=4)[2]
    dstate = type(state)(*(np.ones(x.shape) for x in state))
    zeros = type(state)(*(np.zeros(x.shape) for x in state))
    close_fields(pullback(do, None), pullback(do, zeros), 1e-13)
    close_fields(pullback(None, dstate), pullback(np.zeros_like(o), dstate), 1e-13)


@pytest.mark.parametrize("row", rows(masks=STREAMING))
def test_gradients_of_no_tokens_are_zeros_and_the_state_passes_through(row: Row):
    q, k, v = draw(H, 0)
    _, start = hla.scan(*draw(H, 6), return_state=True, operator=row.operator, mask=row.mask)
    arrays = {"initial_state": start, "return_state": True, "decay": np.full(H, 0.5)}
    (o, state), pullback = hla.vjp(q, k, v, **arrays, **row.options)
    dstate = type(state)(*(np.full(x.shape, 2.0) for x in state))
    gradients = pullback(o, dstate)
    assert (gradients.dq.shape, gradients.dv.shape) == (q.shape, v.shape)
    assert not gradients.ddecay.any()
    close_fields(gradients.dinitial_state, dstate, 1e-15)


def test_strided_cotangents():
    q, k, v = draw(H, T)
    do = np.random.default_rng(4).standard_normal((H, 2 * T, 3))
    _, pullback = hla.vjp(q, k, v, decay=np.full(H, 0.9))
    for view in (do[:, ::2], do[:, ::2][:, ::-1], np.broadcast_to(do[0, 0], (H, T, 3))):
        close_fields(pullback(view), pullback(view.copy()), 1e-13)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_laid_out_like_their_inputs(operator):
    """With the token axis before the heads: [B, T, H, D], and gates [B, T, H] or [T, 1]."""
    q, k, v = draw(2, 3, T)
    do = draw(2, 3, T, seed=4)[2]
    a = -np.random.default_rng(5).random((2, 3, T))
    options = {"operator": operator, "chunk_size": 4, "scale": 0.8}
    wide, narrow = a, a[0, :1]
    for gate in (wide, narrow):
        want = hla.vjp(q, k, v, log_gate=gate, **options)[1](do)
        moved = [np.swapaxes(x, 1, 2) for x in (q, k, v)]
        own = np.swapaxes(gate, -1, -2)
        o, pullback = hla.vjp(*moved, log_gate=own, axis=-3, **options)
        got = pullback(np.swapaxes(do, 1, 2))
        assert o.shape == (2, T, 3, 3)
        for x, y in zip(got[:3], want[:3], strict=True):
            close(np.swapaxes(x, 1, 2), y)
        assert got.dlog_gate.shape == own.shape
        close(np.swapaxes(got.dlog_gate, -1, -2), want.dlog_gate)
