"""Odd but valid input: memory layouts, empty axes, huge and tiny values, long sequences."""

import functools
import itertools

import literal
import numpy as np
import pytest
from conftest import (
    EXACT,
    FORMS,
    OPERATORS,
    Row,
    budget,
    close,
    draw,
    installed,
    load,
    numpy_dtype,
    rms,
    rows,
    same,
    to_numpy,
    within_budget,
)

import hla

H, T, D, V = 2, 7, 5, 3


def layouts(x):
    """The same values as read-only, strided, reversed, transposed and offset arrays."""
    frozen = x.copy()
    frozen.flags.writeable = False
    wide = np.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 2), np.nan)
    wide[..., ::2, 1:-1] = x
    return {
        "read-only": frozen,
        "buffer": np.frombuffer(x.tobytes()).reshape(x.shape),
        "strided": wide[..., ::2, 1:-1],
        "reversed": x[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
        "transposed": np.asfortranarray(x),
        "moved": np.moveaxis(np.moveaxis(x, 1, 0).copy(), 0, 1),
    }


@pytest.mark.parametrize("row", rows())
def test_layouts_of_memory_give_the_same_and_nothing_is_written(row: Row):
    q, k, v = draw(H, 70)
    want = hla.scan(q, k, v, **row.options)
    forms = [layouts(x) for x in (q, k, v)]
    for name in forms[0]:
        given = [f[name] for f in forms]
        o = hla.scan(*given, **row.options)
        (same if row.backend == "numpy" else functools.partial(close, tol=1e-12))(o, want)
        for x, y in zip(given, (q, k, v), strict=True):
            np.testing.assert_array_equal(x, y)
    close(hla.scan(q, q, q, **row.options), hla.scan(q, q.copy(), q.copy(), **row.options), 1e-12)


@pytest.mark.parametrize("row", rows())
def test_zero_strides_are_read_as_written_out(row: Row):
    q, k, v = draw(H, 9)
    for name in "qkv":
        given = {"q": q, "k": k, "v": v}
        for view in (
            np.broadcast_to(given[name][:1], given[name].shape),
            np.broadcast_to(given[name][:, :1], given[name].shape),
            np.broadcast_to(given[name][..., :1], given[name].shape),
        ):
            o = hla.scan(**given | {name: view}, **row.options)
            close(o, hla.scan(**given | {name: view.copy()}, **row.options), 1e-12)


@pytest.mark.parametrize("row", rows())
def test_empty_axes(row: Row):
    """No tokens, no batch, no values: empty. No features: zeros."""
    o = hla.scan(np.ones((H, 0, D)), np.ones((H, 0, D)), np.ones((H, 0, V)), **row.options)
    assert o.shape == (H, 0, V)
    o = hla.scan(np.ones((0, T, D)), np.ones((0, T, D)), np.ones((0, T, V)), **row.options)
    assert o.shape == (0, T, V)
    o = hla.scan(np.ones((H, T, D)), np.ones((H, T, D)), np.ones((H, T, 0)), **row.options)
    assert o.shape == (H, T, 0)
    q, k, v = np.ones((H, T, 0)), np.ones((H, T, 0)), np.ones((H, T, V))
    for normalize in (False, True):
        o = hla.scan(q, k, v, normalize=normalize, **row.options)
        np.testing.assert_array_equal(o, np.zeros((H, T, V)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_axes_of_step_and_gradients(operator):
    o, after = hla.step(np.ones((0, D)), np.ones((0, D)), np.ones((0, V)), operator=operator)
    assert o.shape == (0, V)
    assert all(len(x) == 0 for x in after)
    for shape in ((0, T, D, V), (H, T, 0, V), (H, T, D, 0), (H, 0, D, V)):
        B, tokens, width, values = shape
        q, k, v = (np.ones((B, tokens, n)) for n in (width, width, values))
        o, pullback = hla.vjp(q, k, v, operator=operator)
        gradients = pullback(np.ones_like(o))
        for got, x in zip(gradients[:3], (q, k, v), strict=True):
            assert got.shape == x.shape
            assert not got.any()


@pytest.mark.parametrize("name", ["array_api_strict", "torch"])
@pytest.mark.parametrize(
    ("operator", "convention"),
    [*((x, "exact") for x in OPERATORS), ("hla2", "paper"), ("hla3", "paper")],
)
def test_no_tokens_leave_the_state_as_it_was(name, operator, convention):
    """In every form and library; of the state alone come gradients, of torch's own too."""
    library = load(name)
    shared = {"operator": operator, "convention": convention, "return_state": True}
    gates = {"decay": np.array(0.5)}, {"decay": np.array([0.5])}, {"log_gate": np.zeros((1, 0))}
    none = library.arrays(*draw(2, 0))
    for gate, form in itertools.product(gates, FORMS):
        if form == "associative" and convention == "paper":
            continue
        options = shared | {"form": form}
        options |= {n: library.array(x, "float64") for n, x in gate.items()}
        start = hla.scan(*library.arrays(*draw(2, T)), **options | {"log_gate": None})[1]
        for state in (None, start):
            (o, last), pullback = hla.vjp(*none, initial_state=state, **options)
            assert o.shape == (2, 0, 3)
            grads = pullback(o, last)
            for n in gate:
                assert not to_numpy(library.numpy(getattr(grads, "d" + n))).any()
            if state is not None:
                for x, y, z in zip(start, last, grads.dinitial_state, strict=True):
                    close(library.numpy(y), library.numpy(x))
                    close(library.numpy(z), library.numpy(x))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("form", FORMS)
def test_torch_follows_calls_of_no_tokens(operator, form):
    torch = installed("torch")
    q, k, v = (x.requires_grad_() for x in load("torch").arrays(*draw(2, 0)))
    o, state = hla.scan(q, k, v, operator=operator, form=form, return_state=True)
    for x, y in zip(
        (q, k, v), torch.autograd.grad(o.sum() + state[-1].sum(), (q, k, v)), strict=True
    ):
        assert x.shape == y.shape


@pytest.mark.parametrize("row", rows(masks=("causal", "prefix")))
@pytest.mark.parametrize("split", ["q", "k", "v", "kv", "qkv"])
def test_what_no_batch_entries_share_is_what_one_does(row: Row, split):
    """States and the gradients that come from them, of one entry and of none."""
    rng = np.random.default_rng(0)
    one = {n: x if n in split else x[0] for n, x in zip("qkv", draw(1, T), strict=True)}
    none = {n: x[:0] if n in split else x for n, x in one.items()}
    gate = {"decay": np.asarray(0.8)} if len(split) % 2 else {"log_gate": -rng.random(T)}
    options = row.options | gate | {"return_state": True, "normalize": True, "eps": 0.0}
    kept = [x.shape for x in hla.scan(**none, **options)[1]]

    def cut(state):
        fields = zip(state, kept, strict=True)
        return type(state)(*(x[tuple(map(slice, shape))] for x, shape in fields))

    like = hla.scan(**one, **options)[1]
    start, dstate = (type(like)(*(rng.standard_normal(x.shape) for x in like)) for _ in range(2))
    within = type(like)(*(0 not in shape for shape in kept))
    dstate = type(like)(*(x * here for x, here in zip(dstate, within, strict=True)))
    (o, want), pullback = hla.vjp(**one, initial_state=start, **options)
    wanted = pullback(None, dstate)
    (o, got), pullback = hla.vjp(**none, initial_state=cut(start), **options)
    assert o.shape == (0, T, o.shape[-1])
    found = pullback(o, cut(dstate))
    for x, y in zip(got, cut(want), strict=True):
        close(x, y, EXACT)
    for n, x, y in zip(("q", "k", "v"), found, wanted, strict=False):
        close(x, y[:0] if n in split else y, EXACT)
    for name in gate:
        close(getattr(found, "d" + name), getattr(wanted, "d" + name), EXACT)
    for x, y in zip(found.dinitial_state, cut(wanted.dinitial_state), strict=True):
        close(x, y, EXACT)


@pytest.mark.parametrize("operator", OPERATORS)
def test_steps_and_segments_of_no_batch_entries(operator):
    q, k, v = draw(1, T)
    none = q[:0], k[0], v
    segment = hla.summarize(*none, operator=operator, decay=0.8)
    whole = hla.summarize(q, k[0], v, operator=operator, decay=0.8)
    for x, y in zip(segment, whole, strict=True):
        assert x.ndim == y.ndim
        close(x, y[tuple(map(slice, x.shape))], EXACT)
    tokens = [x[..., 0, :] for x in (q, k[0], v)]
    _, want = hla.step(*tokens, operator=operator)
    o, got = hla.step(tokens[0][:0], *tokens[1:], operator=operator)
    assert o.shape == (0, v.shape[-1])
    for x, y in zip(got, want, strict=True):
        close(x, y[tuple(map(slice, x.shape))], EXACT)


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_reaches_what_an_empty_batch_shares(operator):
    """Through its own derivatives; the gradient of what is empty is empty."""
    torch = installed("torch")
    q, k, v = (x.requires_grad_() for x in load("torch").arrays(*draw(1, T)))
    found = []
    for queries in (q, q[:0].detach().requires_grad_()):
        o, state = hla.scan(queries, k, v, operator=operator, return_state=True)
        outputs = [o, *(x for x, n in zip(state, state._fields, strict=True) if n in "SPm")]
        dq, *rest = torch.autograd.grad(
            sum(x.sin().sum() for x in outputs[1:]) + 0 * o.sum(),
            (queries, k, v),
            allow_unused=True,
        )
        found.append([x for x in rest if x is not None])
    assert dq.shape == (0, T, q.shape[-1])
    assert found[1]
    for x, y in zip(*found, strict=True):
        close(to_numpy(y), to_numpy(x))


@pytest.mark.parametrize("row", rows(masks=("causal", "prefix")))
def test_huge_and_tiny_values_stay_finite_or_overflow_where_they_must(row: Row):
    power = {"linear": 3, "hla2": 5, "ahla": 5, "hla3": 7}[row.operator]
    q, k, v = draw(H, 40)
    for size in (1e-30, 1e30):
        got = hla.scan(size * q, size * k, v, **row.options)
        close(got / size ** (power - 1), hla.scan(q, k, v, **row.options), 1e-10)
    narrow = [x.astype(np.float16) for x in (60 * q, 60 * k, v)]
    with np.errstate(over="ignore"):
        o, last = hla.scan(*narrow, return_state=True, **row.options)
    wide = hla.scan(*(x.astype(np.float64) for x in narrow), **row.options)
    beyond = abs(wide) > 66000
    assert np.isinf(o[beyond]).all()
    np.testing.assert_array_equal(np.sign(o[beyond]), np.sign(wide[beyond]))
    assert np.isfinite(o[abs(wide) < 65000]).all()
    assert all(np.isfinite(x).all() for x in last)


FADING = {
    "none": {},
    "decay": {"decay": 1e-30},
    "decays": {"decay": np.array([1e-30, 0.5, 1e-37])},
    "constant": {"log_gate": -1e300},
} | {
    f"{value:.0e}": {"log_gate": np.where(np.arange(14) % 5 < 2, value, -0.3).astype(dtype)}
    for dtype, values in {
        "float32": (-np.inf, np.finfo(np.float32).min, -9e3, -90.0),
        "float64": (np.finfo(np.float64).min, -1e30, -1e-310),
    }.items()
    for value in values
}


@functools.cache
def fading_case(operator, mask, gate):
    """Three heads, a tenth of their values below float32's normal range, and the literal sums."""
    q, k, v = draw(3, 14)
    for i, x in enumerate((q, k, v)):
        x[np.random.default_rng(i).random(x.shape) < 0.1] *= 1e-41
    with np.errstate(over="ignore"):
        return q, k, v, literal.scan(q, k, v, operator=operator, mask=mask, **FADING[gate])


@pytest.mark.parametrize("gate", FADING)
@pytest.mark.parametrize(
    ("name", "operator"), [*(("numpy", x) for x in OPERATORS), ("array_api_strict", "hla2")]
)
def test_underflow_is_silent_and_right(name, operator, gate):
    """Of gates, states, products and casts, in every function; and sums of gates that overflow."""
    lib, mask = load(name), "prefix" if gate == "decays" else "causal"
    *given, want = fading_case(operator, mask, gate)
    kinds = {n: str(x.dtype) for n, x in FADING[gate].items() if isinstance(x, np.ndarray)}
    arrays = {n: lib.array(FADING[gate][n], dtype) for n, dtype in kinds.items()}
    names: dict = {"operator": operator, "mask": mask} | FADING[gate] | arrays
    first = names | {n: x[0] for n, x in arrays.items() if n == "log_gate"}
    forms = [{"backend": "array_api", "form": form} for form in ("chunked", "associative")]
    for dtype, tol in (("float32", 1e-5), ("float64", EXACT)):
        q, k, v = (lib.array(x, dtype) for x in given)
        for form in [{"backend": name}, *forms] if name == "numpy" else forms[:1]:
            with np.errstate(all="raise"):
                options = names | form | {"chunk_size": 5, "return_state": True}
                (o, last), pullback = hla.vjp(q, k, v, **options)
                gradients = pullback(v, last)
            close(lib.numpy(o), want, tol)
            assert all(np.isfinite(lib.numpy(x)).all() for x in (*gradients[:3], *last))
        with np.errstate(all="raise"):
            part = hla.summarize(q, k, v, **names)
            last = hla.combine(part.to_state(), hla.combine(part, part))
            token = (x[:, 0, :] for x in (q, k, v))
            _, last = hla.step(*token, last, **first)
        assert all(np.isfinite(lib.numpy(x)).all() for x in last)


LAST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize(
    ("name", "values"), [("decay", [1e-37, 1.0]), ("log_gate", [LAST, -0.0, -np.inf, -1.0, LAST])]
)
def test_jax_meets_no_nan_on_the_way_from_finite_input(name, values):
    """By its own check of every value, compiled, through the gradients."""
    lib = load("jax")
    jax = installed("jax")
    given = lib.arrays(*draw(2, 5), np.array(values), dtype="float32")

    def loss(q, k, v, gate):
        return (hla.scan(q, k, v, operator="hla3", **{name: gate}) ** 2).sum()

    with jax.debug_nans(True):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*given)
    assert all(np.isfinite(lib.numpy(x)).all() for x in (value, *gradients))


@pytest.mark.parametrize("row", rows())
def test_zero_queries_normalize_to_zero(row: Row):
    q, k, v = draw(H, T, positive=True)
    np.testing.assert_array_equal(hla.scan(0 * q, k, v, normalize=True, **row.options), 0 * v)
    if row.form == "chunked":
        gradients = hla.vjp(0 * q, k, v, normalize=True, **row.options)[1](v)
        assert all(np.isfinite(x).all() for x in gradients[:3])


@functools.cache
def long_case(operator, gate, dtype):
    """Rounded inputs over many tokens, gates that remember about a thousand, float64 on them."""
    q, k, v = (to_numpy(x.astype(numpy_dtype(dtype))) for x in draw(1, 4096, D=16, V=16))
    a = np.float32(-2e-3) * np.random.default_rng(0).random((1, 4096), np.float32)
    if gate == "resets":
        a[0, ::1500] = -np.inf
    options = {"none": {}, "decay": {"decay": 0.9993}}.get(gate, {"log_gate": a})
    # A decay is rounded to float32 once; float64 sees the rounded one.
    wide = {n: np.asarray(x, np.float32).astype(float) for n, x in options.items()}
    want = hla.scan(q, k, v, backend="array_api", operator=operator, scale=0.25, **wide)
    return q, k, v, options, want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["none", "decay", "log_gate", "resets"])
@pytest.mark.parametrize("row", rows(masks=("causal",), forms=("chunked",)))
def test_long_sequences_stay_within_budget(row: Row, gate, dtype):
    q, k, v, options, want = long_case(row.operator, gate, dtype)
    q, k, v = (x.astype(numpy_dtype(dtype)) for x in (q, k, v))
    o = hla.scan(q, k, v, scale=0.25, **options, **row.options)
    within_budget(to_numpy(o), want, dtype, D=16, decay=options.get("decay"))


@pytest.mark.parametrize("row", rows(("linear",), ("causal",), ("chunked",)))
def test_sums_of_gates_stay_local(row: Row):
    """A running float32 sum of gates over the whole sequence would be off by 1e-3 at its end."""
    T = 2**16
    q, k, v = (x.astype(np.float32) for x in draw(T, D=8, V=4))
    a = -np.random.default_rng(0).random(T, np.float32)
    want = hla.scan(
        *(x.astype(float) for x in (q, k, v)), operator="linear", log_gate=a.astype(float)
    )
    o = hla.scan(q, k, v, log_gate=a, **row.options)
    within_budget(to_numpy(o), want, "float32", D=8)


@functools.cache
def constant_gate(gate):
    """Positive tokens with a gate of which float32 rounds g^64 by half of its last digit."""
    T, D, g = 2**14, 2, np.float32(1 - 2.0**-18)
    q, k, v, do = (abs(x).astype(np.float32) for x in (*draw(T, D=D, V=D), draw(T, V=D)[2]))
    given = np.asarray(g if gate == "decay" else np.full(T, np.log(float(g)), np.float32))
    inputs = {"q": q, "k": k, "v": v, gate: given}
    wide = {n: x.astype(float) for n, x in inputs.items()}
    o, pullback = hla.vjp(**wide, operator="linear", backend="array_api")
    return inputs, do, o, getattr(pullback(do.astype(float)), f"d{gate}")


CORE = [("numpy", "numpy"), *((x, "array_api") for x in ("numpy", "torch", "jax"))]


@pytest.mark.parametrize("gate", ["decay", "log_gate"])
@pytest.mark.parametrize(("name", "backend"), [*CORE, ("numpy", "numba")])
def test_a_constant_gates_rounding_does_not_add_up(name, backend, gate):
    inputs, do, want, grad = constant_gate(gate)
    lib, size = load(name), {"D": 2, "decay": 1 - 2.0**-18}
    arrays = {n: lib.array(x, "float32") for n, x in inputs.items()}
    o, pullback = hla.vjp(**arrays, operator="linear", backend=backend)
    within_budget(lib.numpy(o), want, "float32", **size)
    found = lib.numpy(getattr(pullback(lib.array(do, "float32")), f"d{gate}"))
    most = 3 * budget("float32", T=len(do), **size)[1]  # of the true value: nothing cancels
    for x, y in zip(*(np.reshape(x, (-1, min(x.size, 64))) for x in (found, grad)), strict=True):
        assert rms(x - y) <= most * rms(y)
