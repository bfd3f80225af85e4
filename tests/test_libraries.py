"""Every array library: its types and devices, its error budget, the same values as NumPy."""

import functools

import numpy as np
import pytest
from conftest import (
    DTYPES,
    GATES,
    LIBRARIES,
    OPERATORS,
    Row,
    budget,
    close,
    draw,
    errors,
    gated,
    gates,
    installed,
    load,
    of_a_device,
    place,
    rows,
    to_numpy,
    within_budget,
)
from terms import gates_within_budget

import hla


def test_the_comparison_fails_on_wrong_results():
    """Each perturbation of a good result is refused, also where one number per array would pass."""
    rng = np.random.default_rng(0)
    want = rng.standard_normal((4, 1024, 16)) * np.linspace(0, 1, 1024)[:, None] ** 2.5
    size = {"D": 64}
    good = want * (1 + 1e-8 * rng.standard_normal(want.shape))
    within_budget(good, want, "float32", **size)

    def perturbed(change):
        bad = good.copy()
        change(bad)
        return bad

    wrong = {
        "one block lost": perturbed(lambda x: x[1, :64].fill(0)),
        "one block rounded": perturbed(lambda x: np.multiply(x[2, 64:128], 1.001, x[2, 64:128])),
        "last token lost": perturbed(lambda x: x[:, -1].fill(0)),
        "heads swapped": good[::-1],
        "shifted by a token": np.roll(good, 1, axis=1),
        "a nan": perturbed(lambda x: x[3, 7:8].fill(np.nan)),
        "an inf": perturbed(lambda x: x[3, 7:8].fill(np.inf)),
        "too rough": want * (1 + 1e-5 * rng.standard_normal(want.shape)),
        "another shape": good[..., :-1],
    }
    for name, bad in wrong.items():
        for dtype in (
            ("float32",) if name in ("too rough", "one block rounded") else ("float32", "bfloat16")
        ):
            with pytest.raises(AssertionError):
                within_budget(bad, want, dtype, **size)
    lost = perturbed(lambda x: x[1, :64].fill(0))
    assert errors(lost, want)[0] < budget("bfloat16", D=64, T=1024)[0]  # the whole alone would pass
    with pytest.raises(AssertionError):
        close(good * (1 + 1e-8), want)


def test_empty_allocations_are_poisoned():
    assert np.isnan(np.empty(3)).all()
    assert np.isnan(np.empty_like(np.ones((2, 2), np.float32))).all()
    assert np.empty(2, int).dtype == int


DEVICE = [("hla2", "float16"), ("hla2", "bfloat16")]


def cases():
    """Each library's rows with each of its dtypes; JAX compiles: chunked form only.

    Of a device's kernels, which have rows of their own in test_kernel_backend, one operator.
    """
    found = []
    for name, dtype in ((library, dtype) for library in LIBRARIES for dtype in DTYPES[library]):
        forms = ("chunked",) if name in ("jax", "cupy") else ("chunked", "recurrent")
        for row in rows(masks=("causal",), forms=forms, library=name, dtype=dtype):
            backend, operator = row.values[0].backend, row.values[0].operator
            if of_a_device(backend) and (operator, dtype) not in DEVICE:
                continue
            if name != "jax" or operator == "hla2" or (operator, dtype) == ("hla3", "float32"):
                found.append(
                    pytest.param(
                        name, *row.values, dtype, id=f"{name}-{row.id}-{dtype}", marks=row.marks
                    )
                )
    return found


@functools.cache
def reference(operator, dtype, scale, gradient=False):
    """Rounded inputs and the float64 oracle on them: the dense form, or its vjp."""
    numpy = load("numpy")
    q, k, v = (to_numpy(numpy.array(x, dtype)) for x in draw(2, 3, 130, D=24, V=8))
    decay = to_numpy(np.array([0.5, 0.95, 1.0], np.float64 if dtype == "float64" else np.float32))
    options = {"operator": operator, "decay": decay, "scale": scale}
    o, pullback = hla.vjp(q, k, v, form="dense", backend="array_api", **options)
    if not gradient:
        return (q, k, v), options, o
    do = to_numpy(numpy.array(draw(2, 3, 130, D=24, V=8, seed=2)[2], dtype))
    return (q, k, v), options, do, pullback(do)


@functools.cache
def last_state(operator, dtype, scale):
    """The oracle's state after the same inputs."""
    inputs, options, _ = reference(operator, dtype, scale)
    return hla.scan(*inputs, return_state=True, form="recurrent", **options)[1]


@pytest.mark.parametrize(("name", "row", "dtype"), cases())
def test_output_is_of_the_inputs_library_and_within_budget(name, row: Row, dtype):
    lib = load(name, place(row.backend, name))
    inputs, options, want = reference(row.operator, dtype, 24**-0.5)
    q, k, v = lib.arrays(*inputs, dtype=dtype)
    wide = "float64" if dtype == "float64" else "float32"
    o, state = hla.scan(
        q,
        k,
        v,
        return_state=True,
        backend=row.backend,
        form=row.form,
        **options | {"decay": lib.array(options["decay"], wide)},
    )
    assert isinstance(o, lib.kind)
    assert o.dtype == v.dtype
    assert getattr(o, "device", None) == getattr(v, "device", None)
    width = 64 if row.form == "chunked" else 1
    rounds = row.operator if of_a_device(row.backend) else None  # others round the output alone
    within_budget(lib.numpy(o), want, dtype, D=24, W=width, operator=rounds)
    for x, y in zip(state, last_state(row.operator, dtype, 24**-0.5), strict=True):
        assert isinstance(x, lib.kind)
        assert x.dtype == lib.array(np.zeros(1), wide).dtype
        if y.ndim == 4:  # narrow kernels round what they weigh before it enters a state
            kind = dtype if rounds else wide
            within_budget(lib.numpy(x), y, kind, D=24, W=1, operator=rounds)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_gradients_within_budget(name, operator, dtype):
    lib = load(name)
    inputs, options, do, want = reference(operator, dtype, 24**-0.5, gradient=True)
    wide = dict(zip("qkv", inputs, strict=True)) | {"decay": options["decay"]}
    options = options | {"decay": lib.array(options["decay"], "float32")}
    _, pullback = hla.vjp(*lib.arrays(*inputs, dtype=dtype), **options)
    got = pullback(lib.array(do, dtype))
    for x, y in zip(got[:3], want[:3], strict=True):
        assert x.dtype == lib.array(do, dtype).dtype
        within_budget(lib.numpy(x), y, dtype, D=24, gradient=True)
    # what a gate's gradient is summed from stays in float32
    gates_within_budget(lib.numpy(got.ddecay), want.ddecay, "float32", wide, options, (do,))


@pytest.mark.parametrize(("row", "gate"), gated(GATES, library="torch"))
@pytest.mark.parametrize("name", ["torch", "array_api_strict"])
def test_libraries_compute_what_numpy_computes(name, row: Row, gate):
    lib = load(name)
    q, k, v = draw(2, 13)
    options = row.options | {"chunk_size": 4}
    given = gates(gate, 2, 13)
    want = hla.scan(q, k, v, **options, **given)
    own = {n: lib.array(x, "float64") if np.ndim(x) else x for n, x in given.items()}
    close(lib.numpy(hla.scan(*lib.arrays(q, k, v), **options, **own)), want)
    assert hla.explain(*lib.arrays(q, k, v), **options, **own).backend == "array_api"


def test_states_and_segments_cross_libraries():
    """A state survives a change of library: its fields are plain arrays."""
    q, k, v = draw(2, 9)
    whole = hla.scan(q, k, v, decay=0.9)
    _, state = hla.scan(q[:, :5], k[:, :5], v[:, :5], decay=0.9, return_state=True)
    for name in ("torch", "jax", "array_api_strict"):
        lib = load(name)
        moved = type(state)(*lib.arrays(*state))
        arrays = [x[:, 5:] for x in (q, k, v)]
        o, end = hla.scan(*lib.arrays(*arrays), initial_state=moved, return_state=True, decay=0.9)
        close(lib.numpy(o), whole[:, 5:])
        tail = hla.summarize(*lib.arrays(*arrays), decay=0.9)
        for x, y in zip(hla.combine(moved, tail), end, strict=True):
            assert isinstance(x, lib.kind)
            close(lib.numpy(x), lib.numpy(y))
        o, _ = hla.step(*(x[:, 0, :] for x in lib.arrays(*arrays)), moved, decay=0.9)
        close(lib.numpy(o), whole[:, 5])


def test_strict_device():
    """Arrays on another device stay there; arrays on two devices are refused by name."""
    xp = installed("array_api_strict")
    other = xp.Device("device1")
    q, k, v = (xp.asarray(x, device=other) for x in draw(2, 9))
    o, state = hla.scan(q, k, v, decay=0.9, return_state=True)
    assert o.device == other
    assert all(x.device == other for x in state)
    a = xp.asarray(gates("resets", 2, 9)["log_gate"], device=other)
    o, pullback = hla.vjp(q, k, v, log_gate=a, initial_state=state)
    assert all(x.device == other for x in (o, *pullback(v)[:3]))
    o, state = hla.step(q[:, 0, :], k[:, 0, :], v[:, 0, :], state)
    assert o.device == other
    here = xp.asarray(draw(2, 9)[1])
    with pytest.raises(ValueError, match=r"(?s)\bk\b.*device"):
        hla.scan(q, here, v)
    with pytest.raises(ValueError, match=r"(?s)log_gate.*device"):
        hla.scan(q, k, v, log_gate=xp.asarray(np.zeros((2, 9))))
