"""Whole calls drawn at random: shapes that broadcast, layouts, subclasses, transforms, libraries.

Truth is the literal sum, or the core in float64 on arrays with everything written out for each
head. `pytest --hypothesis-profile=long tests/test_fuzz.py` draws a hundred times as many.
"""

import functools
from typing import Any, NamedTuple

import literal
import numpy as np
import pytest
from conftest import MASKS, OPERATORS, close, installed, load, symmetric, to_numpy
from devices import devices
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hla

KERNELS = [
    pytest.param(x.backend, marks=x.marks) for x in devices() if x.library == "torch"
]  # in float32, whose tensors lie where the kernels read them
PLACE = next((x.place for x in devices() if x.library == "torch"), "cpu")
BACKENDS = ["array_api", *KERNELS]

EXACT, SINGLE = 1e-9, 2e-4  # of the largest value; float32 sums of a few terms, which may cancel


def examples(n):
    """So many in the suite, and in a long run as many times more as its profile says."""
    return settings(max_examples=max(1, n * settings().max_examples // 100))


class Case(NamedTuple):
    """A call's arrays in float64, tokens at -2 (of a gate at -1), its options, and how to ask."""

    inputs: dict[str, Any]
    options: dict[str, Any]
    axis: int
    tail: dict[str, Any]  # of the call that is asked, not of the truth: form, chunk_size
    stateful: bool
    seed: int

    @property
    def batch(self):
        """The output's, which every other array's broadcasts to."""
        return np.broadcast_shapes(*(self.inputs[n].shape[:-2] for n in "qkv"))


@st.composite
def within(draw, batch, least=0):
    """A shape that broadcasts to a batch: axes missing in front, or of size 1."""
    start = draw(st.integers(0, max(0, len(batch) - least)))
    return tuple(n if draw(st.booleans()) else 1 for n in batch[start:])


@st.composite
def cases(draw, stateful=None, masks=MASKS):
    operator, mask = draw(st.sampled_from(OPERATORS)), draw(st.sampled_from(masks))
    ordered = mask != "none"
    convention = draw(st.sampled_from(["exact", "paper"])) if mask == "causal" else "exact"
    rng = np.random.default_rng(seed := draw(st.integers(0, 99)))
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    axis = draw(st.sampled_from([-2, -3])) if batch else -2
    T, D, V = (draw(st.integers(low, high)) for low, high in ((0, 9), (1, 5), (1, 5)))
    leads = [draw(within(batch, least=int(axis == -3))) for _ in "qkv"]
    batch = np.broadcast_shapes(*leads)
    normalize = draw(st.booleans())
    inputs = {
        n: rng.standard_normal((*lead, T, width))
        for n, lead, width in zip("qkv", leads, (D, D, V), strict=True)
    }
    if normalize:
        inputs |= {n: abs(inputs[n]) + 0.1 for n in "qk"}
    options = {"operator": operator, "mask": mask, "convention": convention}
    options |= {"normalize": normalize, "scale": draw(st.sampled_from([1.0, 0.5]))}
    options["eps"] = 50.0 if convention == "paper" else 0.1
    if operator == "hla2":
        options["ridge"] = draw(st.sampled_from([0.0, 0.3]))
    gate = draw(st.sampled_from(["none", "float", "decay", "log_gate"])) if ordered else "none"
    if gate == "float":
        options["decay"] = 0.8
    elif gate == "decay":
        inputs["decay"] = rng.uniform(0.3, 1.0, draw(within(batch)))
    elif gate == "log_gate":
        lead = draw(within(batch, least=int(axis == -3)))
        inputs["log_gate"] = -rng.uniform(0.05, 1.0, (*lead, draw(st.sampled_from([T, 1]))))
        if draw(st.booleans()):
            inputs["log_gate"][rng.random(inputs["log_gate"].shape) < 0.2] = -np.inf
    stateful = ordered and (draw(st.booleans()) if stateful is None else stateful)
    if stateful and draw(st.booleans()):
        _, own = hla.scan(**inputs, **options, return_state=True, backend="array_api")
        fields = {}
        for name, x in own._asdict().items():
            core = 1 if name[0].islower() else 2
            lead = draw(within(x.shape[: x.ndim - core]))
            y = rng.standard_normal((*lead, *x.shape[x.ndim - core :]))
            y = abs(y) if normalize else y
            fields[name] = symmetric(name, y) if name in ("S", "Q") else y
        inputs["initial_state"] = type(own)(**fields)
    forms = ["chunked", "dense"] + ["recurrent"] * ordered
    forms += ["associative"] * (ordered and convention == "exact")
    tail = {
        "form": draw(st.sampled_from(forms)),
        "chunk_size": draw(st.sampled_from([1, 2, 4, None])),
    }
    return Case(inputs, options, axis, tail, stateful, seed)


def written_out(case):
    """The inputs with everything of the whole batch."""
    batch, found = case.batch, dict(case.inputs)
    for n in "qkv":
        found[n] = np.broadcast_to(found[n], (*batch, *found[n].shape[-2:])).copy()
    if "decay" in found:
        found["decay"] = np.broadcast_to(found["decay"], batch).copy()
    if "log_gate" in found:
        found["log_gate"] = np.broadcast_to(
            found["log_gate"], (*batch, found["q"].shape[-2])
        ).copy()
    if state := found.get("initial_state"):
        found["initial_state"] = type(state)(*(
            np.broadcast_to(x, (*batch, *x.shape[-1 if n[0].islower() else -2 :])).copy()
            for n, x in state._asdict().items()
        ))  # fmt: skip
    return found


def core(case, call=hla.scan):
    options = case.options | ({"return_state": True} if case.stateful else {})
    form = "dense" if case.options["mask"] == "none" else "recurrent"
    return call(**written_out(case), **options, form=form, backend="array_api")


def truth(case):
    """Output, and the last state written out or None."""
    o, state = core(case) if case.stateful else (core(case), None)
    if "initial_state" in case.inputs:
        return o, state
    options, arrays = dict(case.options), written_out(case)
    operator = options["operator"]
    if options.pop("convention") == "paper" and operator in literal.PAPER:
        options.pop("mask")
        return literal.paper(**arrays, **options)[0], state
    return literal.scan(**arrays, **options), state


def summed(x, shape):
    """The gradient of what was broadcast to x's shape."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(i for i, n in enumerate(shape) if n == 1 != x.shape[i]), keepdims=True)


def true_gradients(case, do, dstate):
    """By name, `initial_state` as a dict of its fields; each in the shape of its input."""
    o, pullback = core(case, hla.vjp)
    if case.stateful:
        full = o[1]
        shared = (
            np.broadcast_to(x, y.shape) / (y.size / max(1, x.size))
            for x, y in zip(dstate, full, strict=True)
        )
        found = pullback(do, type(full)(*shared))
    else:
        found = pullback(do)
    want = {}
    for n, x in case.inputs.items():
        y = getattr(found, "d" + n)
        if n == "initial_state":
            want |= {f"state {m}": summed(getattr(y, m), z.shape) for m, z in x._asdict().items()}
        else:
            want[n] = summed(y, x.shape)
    return want


def moved(case, n, x):
    """An array from or to the layout that the case asks for: its own inverse."""
    if case.axis == -2 or n in ("decay", "initial_state") or n.startswith("state "):
        return x
    return np.swapaxes(x, -1, -2) if n == "log_gate" else np.swapaxes(x, -2, -3)


def cotangents(case, o, state):
    rng = np.random.default_rng(case.seed)
    do = rng.standard_normal(o.shape)
    if state is None:
        return do, None
    return do, type(state)(*(rng.standard_normal(x.shape) for x in state))


# How an array of a library can come


def numpy_layouts(x):
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), np.nan, x.dtype)
    strided = wide[..., 1::2]
    strided[...] = x
    turned = np.ascontiguousarray(np.flip(x))
    still = x.copy()
    still.flags.writeable = False
    return {"strided": strided, "reversed": np.flip(turned), "read-only": still,
            "Fortran": np.asfortranarray(x), "plain": x.copy()}  # fmt: skip


@functools.cache
def torch_kinds():
    torch = installed("torch")

    class Tagged(torch.Tensor):
        pass

    class TaggedParameter(torch.nn.Parameter):
        pass

    def strided(x):
        if not x.ndim:
            return x
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]

    return {
        "plain": lambda x: x,
        "strided": strided,
        "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
        "tagged": lambda x: x.as_subclass(Tagged),
        "parameter": torch.nn.Parameter,
        "tagged parameter": lambda x: TaggedParameter(x.clone()),
    }


def made(name, x, dtype):
    """An array of a library; what kernels multiply lies on their device."""
    return load(name, PLACE if (name, dtype) == ("torch", "float32") else "cpu").array(x, dtype)


def as_library(case, name, dtype="float64", kinds=None):
    """The call's arrays as a library's, in the layout that the case asks for."""
    rng = np.random.default_rng(case.seed)

    def convert(n, x):
        x = np.ascontiguousarray(moved(case, n, x)) if np.ndim(x) else np.asarray(x)
        if name == "numpy":
            found = numpy_layouts(x) if x.ndim else {"plain": x}
            return found[rng.choice(list(found))]
        y = made(name, x, dtype)
        return torch_kinds()[rng.choice(kinds)](y) if kinds else y

    return {
        n: type(x)(*(convert(n, y) for y in x)) if n == "initial_state" else convert(n, x)
        for n, x in case.inputs.items()
    }


def leaves(arrays):
    for x in arrays.values():
        yield from x if isinstance(x, tuple) else (x,)


def within_of(got, want, tol):
    """As `close`, of what may be zeros or broadcast to what is written out."""
    want = np.asarray(want)
    got = np.broadcast_to(got, want.shape) if np.ndim(got) == want.ndim else got
    if want.size:
        least = 1e-3 if tol == EXACT else 0.05  # what cancels leaves the rounding of its terms
        close(got, want, tol, size=max(float(abs(want).max()), least))
    else:
        assert np.shape(got) == want.shape


def check_call(case, name, tol=EXACT, dtype="float64", kinds=None, **more):
    """Value, last state and every gradient of a call; its inputs are as they were."""
    arrays = as_library(case, name, dtype, kinds)
    before = [values(name, x).copy() for x in leaves(arrays)]
    options = case.options | case.tail | more | {"axis": case.axis}
    options |= {"return_state": True} if case.stateful else {}
    found, pullback = hla.vjp(**arrays, **options)
    o, state = found if case.stateful else (found, None)
    want, last = truth(case)
    assert isinstance(o, load(name).kind)
    within_of(moved(case, "o", values(name, o)), want, tol)
    if case.stateful:
        for x, y in zip(state, last, strict=True):
            x = values(name, x)
            within_of(np.broadcast_to(x, y.shape), y, tol)
    again = hla.scan(**arrays, **options)
    within_of(values(name, again[0] if case.stateful else again), values(name, o), tol)
    fields = None
    if case.stateful:
        fields = type(state)(*(values(name, x) for x in state))
    do, dstate = cotangents(case, want, fields)
    given = [made(name, np.ascontiguousarray(moved(case, "o", do)), dtype)]
    if case.stateful:
        given.append(type(state)(*(made(name, x, dtype) for x in dstate)))
    gradients = pullback(*given)
    true = true_gradients(case, do, dstate)
    for n, x in case.inputs.items():
        got = getattr(gradients, "d" + n)
        if n == "initial_state":
            for m, y in got._asdict().items():
                y, z = values(name, y), true[f"state {m}"]
                within_of(symmetric(m, y), symmetric(m, z), tol)
        else:
            assert np.shape(got) == moved(case, n, x).shape
            within_of(moved(case, n, values(name, got)), true[n], tol)
    for x, y in zip(leaves(arrays), before, strict=True):
        np.testing.assert_array_equal(values(name, x), y)


def values(name, x):
    return np.asarray(load(name).numpy(x))


@examples(60)
@given(cases(), st.sampled_from(["numpy", "array_api"]))
def test_numpy(case, backend):
    """Both backends of NumPy's arrays; NumPy's own has chunks only."""
    if backend == "numpy":
        case = case._replace(tail=case.tail | {"form": "chunked"})
    check_call(case, "numpy", backend=backend)


@examples(15)
@given(cases())
def test_the_standard(case):
    check_call(case, "array_api_strict")


@examples(40)
@given(cases())
def test_torch(case):
    check_call(case, "torch", kinds=list(torch_kinds()))


@pytest.mark.parametrize("backend", KERNELS)
@examples(10)
@given(cases())
def test_torch_kernels(backend, case):
    """Interpreted where there is no GPU, in float32."""
    case = case._replace(tail={})
    check_call(case, "torch", SINGLE, "float32", list(torch_kinds()), backend=backend)


@examples(2)
@given(cases())
def test_jax(case):
    check_call(case, "jax")


@examples(25)
@given(cases(stateful=True, masks=("causal", "prefix")), st.integers(0, 9))
def test_a_call_in_two_parts(case, cut):
    """The second continues the first, on NumPy's arrays."""
    tokens = {n: case.inputs[n] for n in "qkv"}
    T = tokens["q"].shape[-2]
    cut = min(cut, T)
    rest = {n: x for n, x in case.inputs.items() if n not in "qkv"}
    options = case.options | case.tail | {"return_state": True}
    whole, last = hla.scan(**case.inputs, **options)
    for part in (slice(cut), slice(cut, None)):
        if rest.get("log_gate", np.ones(1)).shape[-1] > 1 or T == 1:
            gate = {n: x[..., part] for n, x in case.inputs.items() if n == "log_gate"}
        else:
            gate = {}
        arrays = {n: x[..., part, :] for n, x in tokens.items()}
        o, state = hla.scan(**rest | arrays | gate, **options)
        rest["initial_state"] = state
        within_of(o, whole[..., part, :], EXACT)
    for x, y in zip(state, last, strict=True):
        within_of(x, y, EXACT)


def differentiable(case, name, dtype="float64", kinds=None):
    """The call as a function of all its arrays, flat; and those."""
    arrays = as_library(case, name, dtype, kinds)
    names = [n for n in arrays if n != "initial_state"]
    fields = arrays.get("initial_state")
    flat = [arrays[n] for n in names] + list(fields or ())
    labels = names + ([f"state {m}" for m in fields._fields] if fields else [])

    def f(*given, **more):
        passed = dict(zip(names, given, strict=False))
        if fields:
            passed["initial_state"] = type(fields)(*given[len(names) :])
        options = case.options | case.tail | {"axis": case.axis} | more
        if not case.stateful:
            return (hla.scan(**passed, **options),)
        o, state = hla.scan(**passed, **options, return_state=True)
        return (o, *state)

    return f, flat, labels


def check_autograd(case, name, labels, outputs, gradients, given, tol=EXACT):
    """The library's own gradients, given the cotangents `given` of its outputs."""
    do, *dstate = (values(name, x) for x in given)
    do = moved(case, "o", do)
    true = true_gradients(case, do, dstate or None)
    within_of(moved(case, "o", values(name, outputs[0])), truth(case)[0], tol)
    for n, x in zip(labels, gradients, strict=True):
        y = true[n]
        x = np.zeros_like(y) if x is None else moved(case, n, values(name, x))
        field = n.removeprefix("state ")
        within_of(symmetric(field, x), symmetric(field, y), tol)


def random_like(name, outputs, seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    return [made(name, rng.standard_normal(x.shape), dtype) for x in outputs]


@pytest.mark.parametrize("backend", BACKENDS)
@examples(8)
@given(cases())
def test_torch_autograd(backend, case):
    """torch.autograd and torch.func.vjp to every array, of leaves of any kind."""
    torch = installed("torch")
    dtype, tol = ("float32", SINGLE) if backend != "array_api" else ("float64", EXACT)
    case = case._replace(tail={}) if backend != "array_api" else case
    kinds = ["plain", "parameter", "tagged parameter", "tagged"]
    f, flat, labels = differentiable(case, "torch", dtype, kinds)
    flat = [x.detach().requires_grad_() for x in flat]
    outputs = f(*flat, backend=backend)
    given_ = random_like("torch", outputs, case.seed, dtype)
    got = torch.autograd.grad(outputs, flat, given_, allow_unused=True)
    check_autograd(case, "torch", labels, outputs, got, given_, tol)
    plain = [x.detach().as_subclass(torch.Tensor) for x in flat]
    outputs, pullback = torch.func.vjp(lambda *x: f(*x, backend=backend), *plain)
    check_autograd(case, "torch", labels, outputs, pullback(tuple(given_)), given_, tol)


@pytest.mark.parametrize("backend", BACKENDS)
@examples(5)
@given(cases(), st.data())
def test_torch_vmap(backend, case, data):
    """Over some of the arrays, the others shared: the calls one by one; and of its gradient."""
    torch = installed("torch")
    dtype, tol = ("float32", SINGLE) if backend != "array_api" else ("float64", EXACT)
    case = case._replace(tail={}) if backend != "array_api" else case
    f, flat, _ = differentiable(case, "torch", dtype)
    mapped = [0 if data.draw(st.booleans()) else None for _ in flat]
    assume(0 in mapped)
    two = [x if d is None else torch.stack([x, x * 0.9]) for x, d in zip(flat, mapped, strict=True)]
    each = [
        f(*(x if d is None else x[i] for x, d in zip(two, mapped, strict=True)), backend=backend)
        for i in range(2)
    ]
    got = torch.func.vmap(lambda *x: f(*x, backend=backend), in_dims=tuple(mapped))(*two)
    for x, *y in zip(got, *each, strict=True):
        within_of(load("torch").numpy(x), load("torch").numpy(torch.stack(y)), tol)

    def loss(*given):
        outputs = f(*given, backend=backend)
        each = (torch.arange(x.numel(), device=x.device).reshape(x.shape) for x in outputs)
        return sum((x * torch.cos(n)).sum() for x, n in zip(outputs, each, strict=True))

    wanted = tuple(range(len(flat)))
    gradient = torch.func.grad(loss, argnums=wanted)
    got = torch.func.vmap(gradient, in_dims=tuple(mapped))(*two)
    for i in range(2):
        one = [x if d is None else x[i] for x, d in zip(two, mapped, strict=True)]
        for x, y in zip(got, gradient(*one), strict=True):
            within_of(load("torch").numpy(x[i]), load("torch").numpy(y), tol)


@examples(2)
@given(cases(), st.data())
def test_jax_transforms(case, data):
    """jit, vjp under jit, and vmap over some of the arrays."""
    load("jax")
    jax = installed("jax")
    f, flat, labels = differentiable(case, "jax")

    @jax.jit
    def both(given, flat):
        outputs, pullback = jax.vjp(f, *flat)
        return outputs, pullback(tuple(given))

    shapes = jax.eval_shape(f, *flat)
    given_ = random_like("jax", shapes, case.seed)
    outputs, got = both(given_, flat)
    check_autograd(case, "jax", labels, outputs, got, given_)
    mapped = [0 if data.draw(st.booleans()) else None for _ in flat]
    assume(0 in mapped)
    two = [
        x if d is None else jax.numpy.stack([x, x * 0.9]) for x, d in zip(flat, mapped, strict=True)
    ]
    got = jax.jit(jax.vmap(f, in_axes=tuple(mapped)))(*two)
    for i in range(2):
        one = f(*(x if d is None else x[i] for x, d in zip(two, mapped, strict=True)))
        for x, y in zip(got, one, strict=True):
            within_of(to_numpy(x[i]), to_numpy(y), EXACT)
