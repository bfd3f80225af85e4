"""Every backend of an accelerator, in its dtypes: values, gradients, states, laws of bits.

Truth is the core in float64 on the same rounded inputs. Rows are those of `devices`: a backend is
interpreted on the host where there is no accelerator.
"""

import math
import sys

import numpy as np
import pytest
from array_api_compat import array_namespace
from conftest import (
    OPERATORS,
    ROUNDING,
    budget,
    close,
    draw,
    same,
    serves,
)
from devices import (
    CALLS,
    GATES,
    INTEGERS,
    STREAMING,
    Device,
    H,
    W,
    accelerated,
    bits,
    check,
    cotangents,
    devices,
    each,
    either,
    gate_of,
    host,
    inputs_of,
    integers,
    kind_of,
    measured,
    per_device,
    poison_empty,
    rounded,
    run,
    state_of,
    values,
    verify,
)

import hla
from hla import backends

CALLS_IN_ORDER = [x for x in CALLS if x[1] != "none"]
PROGRAMS = [(o, m) for o in OPERATORS for m in (*STREAMING, "none")]
ORDERED = [x for x in PROGRAMS if x[1] != "none"]
ON_DEMAND = (None,)  # no sample of a device that compiles every call
KINDS = [(o, "causal") for o in OPERATORS] + [("hla3", "prefix")]  # of every pass and state


@pytest.fixture(autouse=True)
def compile_quickly(request):
    """Have JAX spend less on compiling what an interpreter runs once."""
    device = getattr(request.node, "callspec", None) and request.node.callspec.params["device"]
    if device and device.compiles:
        request.getfixturevalue("quick_jax")
    yield
    if device and device.compiles:  # programs that are kept use up the mappings of a process
        sys.modules["jax"].clear_caches()


@pytest.fixture(autouse=True)
def poison_libraries(monkeypatch):
    for library in {device.library for device in devices()}:
        poison_empty(monkeypatch, library)


def cotangent(device, *shape, dtype=None):
    """A random gradient of an output."""
    return device.array(draw(*shape[:-1], V=shape[-1], seed=4)[2], dtype or device.dtype)


def programs():
    """Causal calls plain, with a state and as a quotient; of the others each with one of these."""
    kinds = {"none": "normalize", "per_head": "stateful", "resets": "normalize"}
    paper = [x for x in CALLS if x[0] in ("hla2", "hla3") and x[1] == "causal"]
    for convention, cases in (("exact", CALLS), ("paper", paper)):
        for operator, mask, gate in cases:
            chosen = (kinds[gate],) if mask != "none" else ("plain", "normalize")
            if (mask, convention) == ("causal", "exact"):
                chosen = ("plain", "stateful", "normalize")
            for kind in chosen:
                yield operator, mask, gate, convention, kind


PROGRAM_ROWS = list(programs())
CAUSAL = [(o, "causal", g, "exact", "plain") for o in OPERATORS for g in GATES]
SAMPLE = [  # each operator, gate, convention and kind; the paper's hla2 has a strict pass
    ("linear", "causal", "resets", "exact", "normalize"),
    ("hla2", "causal", "none", "exact", "plain"),
    ("ahla", "causal", "resets", "exact", "stateful"),
    ("hla3", "causal", "per_head", "exact", "plain"),
    ("hla2", "causal", "per_head", "paper", "stateful"),
]


COMPILED_ROWS = [x for x in PROGRAM_ROWS if x[2:4] != ("none", "paper")]
COVERED = ("none", "stateful"), ("per_head", "normalize")  # gates and kinds, by other gates' rows
COSTLY_ROWS = [x for x in COMPILED_ROWS if x[1] != "causal" or (x[2], x[4]) not in COVERED]


@per_device(
    "operator, mask, gate, convention, kind",
    either(PROGRAM_ROWS, COMPILED_ROWS, COSTLY_ROWS),
    sample=SAMPLE,
    aot=CAUSAL,
)
def test_every_program_within_the_budget(device, operator, mask, gate, convention, kind):
    """Output, states and all gradients, over several chunks of which the last is short."""
    options = {"operator": operator, "mask": mask, "scale": 0.25, "convention": convention}
    if operator == "hla2":
        options["ridge"] = 0.5
    positive = kind == "normalize"
    inputs = device.inputs(W + 3 if device.interpreted else 301, gate, positive=positive)
    if mask != "none" and kind != "plain":
        state = state_of(options, gate, positive=positive, **device.widths)
        inputs["initial_state"] = state
        options["return_state"] = kind == "stateful"
    if kind == "normalize":
        eps = {"linear": 1e3, "hla2": 1e4, "ahla": 1e4, "hla3": 1e6}  # about a denominator
        if convention == "paper":  # of hla3 a difference a hundred times less than its terms
            eps["hla3"] = 1e10
        options |= {"normalize": True, "eps": eps[operator]}
    check(device, inputs, options)


def in_other_dtypes(device):
    """Causal calls; on an accelerator those that have most kinds of passes."""
    calls = [x for x in CALLS if x[1] == "causal"]
    few = ("hla3",) if device.costly else ("hla2", "hla3")
    kept = {"float16": [x for x in calls if x[2] == "resets"]}
    kept["float32"] = [x for x in calls if x[0] in few or x[2] == "resets"]
    return [
        (dtype, *call)
        for dtype in device.dtypes
        for call in (calls if device.interpreted else kept.get(dtype, calls))
        if dtype != device.dtype
    ]


@per_device("dtype, operator, mask, gate", in_other_dtypes)
def test_other_dtypes_within_the_budget(device, dtype, operator, mask, gate):
    """Intermediates beyond float16's range too: they and the states are wider."""
    D = device.widths["D"]
    options = {"operator": operator, "mask": mask, "return_state": mask != "none"}
    options["scale"] = 0.25 if device.interpreted else D**-0.75  # hla3 stays in float16
    inputs = device.inputs(W + 41 if device.interpreted else 301, gate, dtype)
    if mask != "none":
        start = {"operator": operator, "mask": mask, "scale": options["scale"]}
        inputs["initial_state"] = state_of(start, gate, **device.widths)
    check(device, inputs, options, dtype)


# T around chunks of 32 and 64, D and V around tiles and beyond what one tile holds
SHAPES = [
    (0, 24, 15, "linear"), (1, 15, 24, "hla2"), (1, 129, 1, "ahla"), (31, 60, 24, "hla3"),
    (33, 1, 60, "hla2"), (63, 24, 65, "hla2"), (63, 100, 129, "linear"), (64, 65, 100, "ahla"),
    (64, 15, 257, "hla2"), (65, 1, 65, "hla3"), (65, 100, 15, "hla2"), (65, 257, 60, "linear"),
    (131, 60, 1, "ahla"), (66, 129, 24, "hla2"), (131, 24, 100, "hla3"), (0, 1, 129, "hla3"),
]  # fmt: skip
# On an accelerator each row compiles a dozen kernels: what no row above it has.
COMPILED = {
    "bfloat16": [
        (67, 257, 15, "ahla"), (130, 100, 129, "hla2"), (63, 1, 257, "hla2"), (1, 24, 66, "hla2"),
        (66, 129, 24, "hla3"),
    ],
    "float32": [(67, 257, 15, "hla2"), (130, 66, 257, "linear")],
    "float16": [(67, 100, 129, "hla2"), (1, 24, 66, "ahla")],
}  # fmt: skip


def widths(device):
    if device.interpreted:
        return [(device.dtype, *shape) for shape in SHAPES]
    return [(dtype, *shape) for dtype in device.dtypes for shape in COMPILED.get(dtype, ())]


@per_device("dtype, T, D, V, operator", widths)
def test_widths_and_lengths(device, dtype, T, D, V, operator):
    """Short last chunks, partial tiles, keys and values in several parts; gated, with states."""
    gate = GATES[(D + V) % 3]
    heads = H if device.interpreted else 48  # enough for a block's thousand numbers
    size = {"D": D, "V": V, "heads": heads, "positive": T == 1}  # of one token q.k is all there is
    options = {"operator": operator, "scale": D**-0.5}
    inputs = inputs_of(T, gate, dtype, **size)
    inputs["initial_state"] = state_of(options, gate, **size)
    check(device, inputs, options | {"return_state": True}, dtype)


@per_device("operator, gate, convention", [
    (o, g, c) for o in OPERATORS for g in GATES for c in ("exact", "paper")
])  # fmt: skip
def test_no_tokens(device, operator, gate, convention):
    """The state passes through to the bit, its gradient too; the others are zeros."""
    options = {"operator": operator, "convention": convention}
    inputs = device.inputs(0, gate)
    inputs["initial_state"] = state_of(options, gate, **device.widths)
    arrays = device.arrays(inputs)
    options |= {"return_state": True, "backend": device.backend}
    (o, after), pullback = hla.vjp(**arrays, **options)
    assert o.shape == (H, 0, device.widths["V"])
    for x, y in zip(after, inputs["initial_state"], strict=True):
        same(host(x), np.broadcast_to(y, x.shape))
    gradients = pullback(o, after)
    assert [x.shape for x in gradients[:3]] == [arrays[n].shape for n in "qkv"]
    for x, y in zip(gradients.dinitial_state, after, strict=True):
        close(host(x), host(y), 1e-6)


def layouts(device, x, dtype):
    """Float64 values as arrays: strided, transposed, offset, and tokens before heads."""
    wide = np.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 2), math.nan)
    wide[..., ::2, 1:-1] = x
    slow = np.full((*x.shape, 3), math.nan)
    slow[..., 1] = x
    turned = device.array(np.ascontiguousarray(x.mT), dtype)
    moved = device.array(np.ascontiguousarray(np.moveaxis(x, -2, 0)), dtype)
    xp = array_namespace(turned)
    return {
        "strided": device.array(wide, dtype)[..., ::2, 1:-1],
        "transposed": xp.matrix_transpose(turned),
        "every third": device.array(slow, dtype)[..., 1],
        "tokens first": xp.moveaxis(moved, 0, -2),
    }


@per_device(
    "operator, normalize",
    either([(o, False) for o in OPERATORS] + [("hla2", True)], [("hla2", False)]),
    sample=ON_DEMAND,
)
def test_layouts_of_memory_give_the_same_bits_and_nothing_is_written(device, operator, normalize):
    """Inputs, cotangents and states of any strides, their surroundings NaN."""
    T, options = W + 2, {"operator": operator, "scale": 0.25, "normalize": normalize, "eps": 1e4}
    inputs = device.inputs(T, "resets")
    inputs["initial_state"] = state_of({"operator": operator}, "resets", **device.widths)
    arrays = device.arrays(inputs)
    do = rounded(draw(H, T, V=device.widths["V"], seed=4)[2], device.dtype)
    own = device.array(do, device.dtype)
    want = device.everything(arrays, own, **options)

    def laid(x, name, dtype="float32"):
        if x.ndim == 3:
            return layouts(device, x, dtype)[name]
        return layouts(device, x[..., None], dtype)[name][..., 0]

    for name in layouts(device, do, device.dtype):
        given = {n: laid(inputs[n], name, device.dtype) for n in "qkv"}
        given["log_gate"] = laid(inputs["log_gate"], name)
        given["initial_state"] = each(lambda x, n=name: laid(x, n), inputs["initial_state"])
        # what is divided lies in memory as q does, where its cotangent need not
        cotangent = own if normalize else laid(do, name, device.dtype)
        bits(device.everything(given, cotangent, **options), want)
        for n, x in given.items():
            bits(x, arrays[n])
        bits(cotangent, own)
    for n, x in inputs.items():
        bits(each(host, arrays[n]), each(np.asarray, x))


def contiguous(x):
    """Whether an array is laid out as its axes are, where its library lets one ask."""
    if hasattr(x, "is_contiguous"):
        return x.is_contiguous()
    return getattr(getattr(x, "flags", None), "c_contiguous", True)


@per_device("operator", either(OPERATORS, ["hla2", "hla3"]), sample=ON_DEMAND)
def test_tokens_before_heads(device, operator):
    """axis=-3 reads [B, T, H, D] where it lies, and lays the output out like q: the same bits."""
    q, k, v = draw(2, 2, 70, **device.widths)
    a = -np.random.default_rng(0).random((2, 2, 70))
    do = draw(2, 2, 70, V=device.widths["V"], seed=4)[2]
    given = {"q": q, "k": k, "v": v, "log_gate": a}
    want = device.everything(
        device.arrays(given), device.array(do, device.dtype), operator=operator
    )
    moved = {n: np.ascontiguousarray(np.swapaxes(x, 1, 2)) for n, x in given.items()}
    late = device.array(np.ascontiguousarray(np.swapaxes(do, 1, 2)), device.dtype)
    o, state, *gradients = device.everything(device.arrays(moved), late, operator=operator, axis=-3)
    assert contiguous(o)
    bits(state, want[1])
    for x, y in zip((o, *gradients[:3], gradients[4]), (want[0], *want[2:5], want[6]), strict=True):
        same(np.swapaxes(host(x), 1, 2), host(y))


@per_device(
    "operator, axis",
    either([(o, n) for o in ("hla2", "ahla") for n in range(3)], [("hla2", n) for n in range(3)]),
    sample=ON_DEMAND,
)
def test_zero_strides_are_read_as_written_out(device, operator, axis):
    T = W + 2
    inputs = device.inputs(T, "resets")
    arrays = device.arrays(inputs) | {"do": cotangent(device, H, T, device.widths["V"])}
    xp = array_namespace(arrays["q"])
    views = {
        n: xp.broadcast_to(x[(slice(None),) * axis + (slice(1),)], x.shape)
        for n, x in arrays.items()
        if x.ndim > axis
    }
    written = {n: device.array(host(x), kind_of(x)) for n, x in views.items()}
    do = views.pop("do"), written.pop("do")
    del arrays["do"]
    got = device.everything(arrays | views, do[0], operator=operator)
    bits(got, device.everything(arrays | written, do[1], operator=operator))


GROUPED = [(*x, g) for x in ORDERED for g in ("none", "resets") if x[1] == "causal" or g == "none"]
GROUPED += [("hla2", "causal", "per_head")]


@per_device(
    "operator, mask, gate",
    either(GROUPED, [x for x in GROUPED if x[0] in ("hla2", "hla3")]),
    sample=ON_DEMAND,
)
def test_grouped_queries_share_keys_values_and_states(device, operator, mask, gate):
    """The bits of repeated keys; moments of shared ones are kept once; gradients are sums."""
    kv, G, T = 2, 2, W + 2
    size, dtype = device.widths, device.dtype
    q = rounded(draw(kv, G, T, D=size["D"])[0], dtype)
    _, k, v = (rounded(x, dtype) for x in draw(kv, 1, T, seed=1, **size))
    shared = {"q": q, "k": k, "v": v}
    if gate == "per_head":
        shared["decay"] = rounded(np.linspace(0.6, 1.0, kv))[:, None]  # one for a group
    elif gate == "resets":
        shared["log_gate"] = gate_of(gate, T, kv)["log_gate"][:, None]
    options = {"operator": operator, "mask": mask, "scale": 0.25, "return_state": True}
    check(device, shared, options)
    options["backend"] = device.backend
    mine = device.arrays(shared)
    written = {n: np.broadcast_to(x, (kv, G, *x.shape[2:])) for n, x in shared.items()}
    written = device.arrays(written)
    o, state = hla.scan(**mine, **options)
    whole, full = hla.scan(**written, **options)
    bits(o, whole)
    for name, x, y in zip(state._fields, state, full, strict=True):
        same(np.broadcast_to(host(x), y.shape), host(y))
        if name in ("S", "P") and mask == "causal":
            assert x.shape == (kv, 1, *y.shape[2:])
    options["return_state"] = False
    again = hla.scan(**mine, initial_state=state, **options)
    bits(again, hla.scan(**written, initial_state=full, **options))


# batch, T, D, V; an empty axis is run as one entry, so that the first two have kernels in common
EMPTY = [((0, 2), 70, 5, 3), ((2,), 70, 5, 0), ((2,), 70, 0, 3), ((2,), 1, 0, 0)]


@per_device("operator, sizes", [(o, x) for x in EMPTY for o in OPERATORS], sample=ON_DEMAND)
def test_empty_axes(device, operator, sizes):
    """No batch and no values: empty. No features: zeros. Their gradients too."""
    batch, T, D, V = sizes
    inputs = {n: np.ones((*batch, T, m)) for n, m in zip("qkv", (D, D, V), strict=True)}
    inputs["decay"] = np.full(batch, 0.5)
    arrays = device.arrays(inputs, "float32")
    for mask in STREAMING:
        options = {"operator": operator, "mask": mask, "return_state": True}
        (o, state), pullback = hla.vjp(**arrays, backend=device.backend, **options)
        assert o.shape == arrays["v"].shape
        assert not host(o).any()
        want = hla.scan(**inputs, **options)[1]
        for x, y in zip(state, want, strict=True):
            close(host(x), y, 1e-6)
        for x, y in zip(pullback(o, state)[:4], arrays.values(), strict=True):
            assert x.shape == y.shape
            assert np.isfinite(host(x)).all()
    del arrays["decay"]
    o = hla.scan(**arrays, operator=operator, normalize=True, backend=device.backend)
    assert not host(o).any()


@per_device("gate", either(GATES, ["resets"]), sample=ON_DEMAND)
def test_batch_axes_that_cannot_become_one(device, gate):
    """Five of them, alternately shared and not; several outputs a launch, states in and out."""
    shape = (2, 1, 2, 2, 2)
    rng = np.random.default_rng(5)

    def some(*axes, tail):
        lead = tuple(n if i in axes else 1 for i, n in enumerate(shape))
        return rounded(rng.standard_normal((*lead, *tail)))

    inputs = {"q": some(0, 2, 3, 4, tail=(9, 4)), "k": some(2, 4, tail=(9, 4))}
    inputs["v"] = some(0, 3, tail=(9, 3))
    if gate == "per_head":
        inputs["decay"] = rounded(rng.uniform(0.5, 1, (2, 1, 1, 2, 1)))
    if gate == "resets":
        inputs["log_gate"] = rounded(-rng.random((1, 1, 2, 2, 1, 9)))
    options = {"operator": "hla3", "return_state": True}
    _, state = hla.scan(**inputs, **options)
    check(device, inputs | {"initial_state": rounded(state)}, options, "float32")


SHARED = [((2,), (1,), (2,)), ((2, 2), (1, 2), (2, 1))]


SHARING = [(o, x) for o in OPERATORS for x in SHARED]


@per_device("operator, shapes", either(SHARING, SHARING, SHARING[1::2]))
def test_moments_shared_by_some_heads_only(device, operator, shapes):
    """Of keys shared and values not: each state is of its own shape, and every head's is there."""
    rng, (D, V) = np.random.default_rng(1), device.widths.values()
    given = zip("qkv", shapes, (D, D, V), strict=True)
    inputs = {n: rounded(rng.standard_normal((*x, W + 2, m)), device.dtype) for n, x, m in given}
    check(device, inputs, {"operator": operator, "scale": 0.25, "return_state": True})


AXES = [  # of q, k, v and the gate
    ((1,), (1,), (2,), ()), ((), (), (2,), None), ((), (1, 2), (2, 1), (2, 1)),
]  # fmt: skip
PAPER = [(o, "causal", "paper") for o in ("hla2", "hla3")]
LACKING = [(*x, "exact") for x in PROGRAMS] + PAPER


@per_device(
    "operator, mask, convention, shapes",
    either(
        [(*x, s) for x in LACKING for s in AXES if s is AXES[1] or x[1:] == ("causal", "exact")],
        [("hla2", "causal", "exact", AXES[1]), ("hla3", "causal", "paper", AXES[1])],
    ),
)
def test_batch_axes_that_some_inputs_lack(device, operator, mask, convention, shapes):
    """Passes that share queries and keys need not share the batch; outputs, states, gradients."""
    rng, T = np.random.default_rng(2), 5
    given = zip("qkv", shapes, (16, 16, 3), strict=False)  # a denominator of fewer cancels
    inputs = {n: rounded(rng.standard_normal((*x, T, m))) for n, x, m in given}
    options = {"operator": operator, "mask": mask, "scale": 0.25, "convention": convention}
    if mask != "none":
        options["return_state"] = True
        if shapes[3] is not None:
            inputs["decay"] = rounded(rng.uniform(0.5, 0.9, shapes[3]))
        inputs["initial_state"] = rounded(hla.scan(**inputs, **options)[1])
    check(device, inputs, options, "float32")


@per_device("operator, mask, axes", [(*x, a) for x in ORDERED for a in ((0,), (3, 0, 1, 2, 1))])
def test_states_of_keys_that_no_query_reads(device, operator, mask, axes):
    """A batch without queries; the moments of keys that it shares are there all the same."""
    q, k, v = np.ones((*axes, 5, 4)), *draw(5, D=4, V=3)[1:]
    options = {"operator": operator, "mask": mask, "return_state": True}
    _, want = hla.scan(q, k, v, **options)
    arrays = (device.array(x) for x in (q, k, v))
    _, state = hla.scan(*arrays, backend=device.backend, **options)
    assert sum(x.size for x in want) > 0
    for x, y in zip(state, want, strict=True):
        close(host(x), y, 1e-6)


@per_device("operator, mask", [*KINDS, ("hla2", "none")], sample=ON_DEMAND)
def test_heads_are_independent_to_the_bit(device, operator, mask):
    """Whatever another head holds, and however many there are; gradients and states too."""
    heads, T = 3, W + 2
    inputs = device.inputs(T, "none" if mask == "none" else "per_head", heads=heads)
    do = rounded(draw(heads, T, V=device.widths["V"], seed=4)[2], device.dtype)
    options = {"operator": operator, "mask": mask, "backend": device.backend}
    options |= {"return_state": mask != "none"}

    def results(which=slice(None), **changed):
        given = {n: x[which] for n, x in (inputs | changed).items()}
        found, pullback = hla.vjp(**device.arrays(given), **options)
        o, state = found if options["return_state"] else (found, ())
        gradients = pullback(device.array(do[which], device.dtype))[:4]
        return (o, *state, *(x for x in gradients if x is not None))

    want = results()
    spoilt = {n: inputs[n].copy() for n in "qkv"}
    for x, value in zip(spoilt.values(), (math.nan, math.inf, 1e30), strict=True):
        x[1, 30] = value
    got = results(**spoilt)
    for x, y in zip(got, want, strict=True):
        same(host(x)[[0, 2]], host(y)[[0, 2]])
    assert np.isnan(host(got[0])[1]).any()
    for which in (slice(0, 1), slice(1, 3))[device.costly :]:
        for x, y in zip(results(which), want, strict=True):
            same(host(x), host(y)[which])


@per_device(
    "operator, mask, gate",
    lambda device: [
        (*x, g) for x in (KINDS if device.traces else ORDERED) for g in ("none", "log_gate")
    ],
)
def test_the_future_changes_no_earlier_bit(device, operator, mask, gate):
    T = W + 9
    inputs = device.inputs(T)
    rng = np.random.default_rng(9)
    if gate == "log_gate":
        inputs["log_gate"] = -rng.random((H, T))
    options = {"operator": operator, "mask": mask, "backend": device.backend}
    want = host(hla.scan(**device.arrays(inputs), **options))
    for t in (0, 1, 31, W - 1, W, T - 1):
        changed = {n: x.copy() for n, x in inputs.items()}
        for n in "qkv":
            changed[n][:, t:] = 100 * rng.standard_normal(changed[n][:, t:].shape)
        if gate == "log_gate":
            changed["log_gate"][0, t] = -math.inf
        got = host(hla.scan(**device.arrays(changed), **options))
        same(got[:, :t], want[:, :t])
        assert (got[:, t:] != want[:, t:]).any()


@per_device("operator", ["linear", "hla2"])
def test_pairs_that_overflow_do_not_reach_the_past(device, operator):
    """A masked pair is dropped, not multiplied by 0: with infinite ones that would be NaN."""
    inputs = device.inputs(W)
    options = {"operator": operator, "backend": device.backend}
    want = host(hla.scan(**device.arrays(inputs), **options))
    inputs["k"][:, 40:] = 3e38
    got = host(hla.scan(**device.arrays(inputs), **options))
    same(got[:, :40], want[:, :40])
    assert not np.isfinite(got[:, 40:]).all()


@per_device("operator, mask, value", [(*x, y) for x in KINDS for y in (math.nan, math.inf)])
def test_nan_reaches_back_no_further_than_its_chunk(device, operator, mask, value):
    inputs = device.inputs(2 * W + 3)
    options = {"operator": operator, "mask": mask, "backend": device.backend}
    want = host(hla.scan(**device.arrays(inputs), **options))
    for t, name in ((0, "q"), (W - 1, "k"), (W, "v"), (W, "k"), (2 * W + 1, "q"), (2 * W + 1, "v")):
        changed = inputs | {name: inputs[name].copy()}
        changed[name][0, t] = value
        got = host(hla.scan(**device.arrays(changed), **options))
        before = t // W * W
        same(got[0, :before], want[0, :before])
        same(got[1], want[1])
        assert not np.isfinite(got[0, t]).all()


def exact(device):
    """dtype, D, T, density, V: on an accelerator what has been compiled for other rows."""
    (D, T, density), (few, short, dense) = INTEGERS
    if device.interpreted:
        rows = [("float32", D, T, density, 9), ("float16", few, short, dense, 9)]
        return [(*x, *row) for row in rows for x in PROGRAMS]
    rows = [("bfloat16", D, T, density, D), ("bfloat16", 128, T, 0.02, 128)]
    rows += [("float32", D, T, density, D), ("float16", few, short, dense, few)]
    few = [("hla2", "causal"), ("hla3", "causal")]
    return [(*x, *row) for row in rows for x in (ORDERED if row[0] == "bfloat16" else few)]


@per_device("operator, mask, dtype, D, T, density, V", exact)
def test_exact_integers(device, operator, mask, dtype, D, T, density, V):
    """Outputs, states and gradients, cut and continued: the bits of the oracle.

    Of bfloat16, exact to 256, no gradients: it rounds what a step hands on.
    """
    narrow = dtype == "bfloat16"
    inputs, do = integers(D, T, density, V, most=1 if dtype == "bfloat16" else 4)
    options = {"operator": operator, "mask": mask, "return_state": mask != "none"}
    arrays = device.arrays(inputs, dtype)
    want = run(inputs, options, None if narrow else (do,), "array_api")
    own = None if narrow else (device.array(do, dtype),)
    got = run(arrays, options, own, device.backend)
    assert got.keys() == want.keys()
    for name, y in want.items():
        assert abs(y).max() < 2**24
        bits(got[name], device.array(y, dtype if name in ("o", "dq", "dk", "dv") else "float32"))
    assert np.mean(want["o"] != 0) > 0.2
    for t in () if mask == "none" or narrow else (1, W + 1):
        state, parts = None, []
        for part in (slice(t), slice(t, None)):
            some = device.arrays({n: x[:, part] for n, x in inputs.items()}, dtype)
            o, state = hla.scan(**some, initial_state=state, backend=device.backend, **options)
            parts.append(host(o))
        same(np.concatenate(parts, 1), host(got["o"]))
        for name, x in state._asdict().items():
            bits(x, got[f"state {name}"])


@per_device(
    "operator, mask, gate, dtype",
    lambda device: [
        (*x, dtype)
        for dtype in (device.dtypes if device.interpreted else [device.dtype])
        for x in CALLS_IN_ORDER
        if x[1] == "causal" or (dtype == device.dtype and not device.traces)
    ],
)
def test_split_anywhere_and_continue(device, operator, mask, gate, dtype):
    """scan, scan, step by step, packed and not: the whole call's output within the budget."""
    T, cuts = W + 6, (5, W + 3)
    inputs = device.inputs(T, gate, dtype)
    options = {"operator": operator, "mask": mask, "scale": 0.25}
    want, last = hla.scan(**inputs, backend="array_api", return_state=True, **options)
    options |= {"backend": device.backend}

    def part(which):
        sliced = {n: x if n == "decay" else x[:, which] for n, x in inputs.items()}
        return device.arrays(sliced, dtype)

    state, parts = None, []
    for which in (slice(cuts[0]), slice(*cuts)):
        o, state = hla.scan(**part(which), initial_state=state, return_state=True, **options)
        parts.append(host(o))
    for t in range(cuts[1], T):
        token = part(t)
        qkv = (token.pop(n) for n in "qkv")
        o, state = hla.step(*qkv, state.pack(), **token, **options)
        state = state.unpack()
        parts.append(host(o)[:, None])
    size = {"D": device.widths["D"], "T": T, "decay": inputs.get("decay"), "operator": operator}
    results = {"o": (np.concatenate(parts, 1), want)}
    results |= {n: (host(x), getattr(last, n)) for n, x in state._asdict().items()}
    for name, (x, y) in results.items():
        if x.ndim < 3:
            x, y = x[..., None], y[..., None]
        for error, most in zip(measured(x, y), budget(dtype, **size), strict=True):
            assert error <= most, f"{name}: error {error:.2e}, allowed {most:.2e}"


@per_device("operator, mask", either(KINDS, [("hla2", "causal")]), sample=ON_DEMAND)
def test_gates_that_mean_the_same_give_the_same_bits(device, operator, mask):
    """A decay of 1 is none; a gate of zeros is one; -inf is a fresh start.

    On sums that are exact: NumPy, which interpreters multiply with, has its own way for K'K.
    """
    D, T, V = (16, W + 9, 5) if device.interpreted else (64, 130, 64)
    inputs, do = integers(D, T, 2 / D, V)
    inputs, do = {n: x[:1] for n, x in inputs.items()}, do[:1]
    options = {"operator": operator, "mask": mask}

    def everything(tokens=slice(None), **gate):
        given = {n: x[:, tokens] for n, x in inputs.items()} | gate
        given = device.arrays(given, "float32")
        return device.everything(given, device.array(do[:, tokens]), **options)

    plain = everything()
    bits(everything(decay=np.ones(1))[:5], plain[:5])
    gate = np.zeros((1, T))
    bits(everything(log_gate=gate)[:5], plain[:5])
    arrays = device.arrays(inputs, "float32")
    bits(device.everything(arrays, device.array(do), decay=1.0, **options), plain)
    for t in (W, W + 5)[device.costly :]:
        gate[:, t] = -math.inf
        o, state, *gradients = everything(log_gate=gate)
        same(host(o)[:, :W], host(plain[0])[:, :W])
        fresh = everything(slice(t, None))
        bits(state, fresh[1])
        for x, y in zip((o, *gradients[:3]), (fresh[0], *fresh[2:5]), strict=True):
            same(host(x)[:, t:], host(y))
        gate[:, t] = 0.0


SMALL = float(np.float32(1e-3))
STEEP = {"decay": SMALL, "log_gate": -1e30}


@per_device(
    "operator, mask, gate",
    either(
        [(*x, g) for x in KINDS for g in STEEP],
        [(o, "causal", g) for o in ("hla2", "hla3") for g in STEEP],
        [("hla3", "causal", g) for g in STEEP],
    ),
    sample=ON_DEMAND,
)
def test_tiny_decay_and_steep_gates(device, operator, mask, gate):
    """Powers up to the third of 1e-3 over a chunk underflow to 0, and nothing divides by them."""
    inputs = device.inputs(W + 9, "none", "float32")
    options = {"operator": operator, "mask": mask}
    check(device, inputs, options | {gate: STEEP[gate], "return_state": True}, "float32")
    arrays = device.arrays(inputs, "float32")
    do = cotangent(device, H, W + 9, device.widths["V"], dtype="float32")
    given = np.full(H, SMALL)
    if gate == "log_gate":
        given = np.full((H, W + 9), -300.0)
        given[:, 3] = -1e30
    found = device.everything(arrays | device.arrays({gate: given}), do, **options)
    assert np.isfinite(host(found[-1 if gate == "log_gate" else -2])).all()


@per_device("operator, mask", either(ORDERED, ORDERED, [("hla2", "causal"), ("hla3", "prefix")]))
def test_zero_queries_normalize_to_zero(device, operator, mask):
    inputs = device.inputs(W + 2, positive=True)
    inputs["q"][:] = 0
    options = {"operator": operator, "mask": mask, "backend": device.backend}
    o, pullback = hla.vjp(**device.arrays(inputs), normalize=True, **options)
    assert not host(o).any()
    ones = device.array(np.ones(o.shape), device.dtype)
    assert all(np.isfinite(host(x)).all() for x in pullback(ones)[:3])


FEW_TOKENS = [("float16", o, T) for o in OPERATORS for T in (1, 3)]


@per_device("dtype, operator, T", either(FEW_TOKENS, FEW_TOKENS, FEW_TOKENS[2:4] + FEW_TOKENS[7:]))
def test_float16_of_few_tokens_rounds_its_results_alone(device, dtype, operator, T):
    """A head's one sum can cancel to the roundings of its factors: q.y of one token is (q.k)^2.

    Each head by itself, the worst of them: twice the RMS error of one rounding (of the smallest
    float16 its absolute one).
    """
    q, k, v = (rounded(x, dtype) for x in draw(200, T, D=16, V=16))
    least = np.argsort(abs((q * k).sum(-1)).max(-1))[:3]
    q, k, v = (x[least] for x in (q, k, v))
    do = rounded(draw(3, T, V=16, seed=4)[2], dtype)
    inputs, options = {"q": q, "k": k, "v": v}, {"operator": operator, "scale": 0.25}
    want = values(run(inputs, options, (do,), "array_api"))
    own = device.array(do, dtype)
    got = values(run(device.arrays(inputs, dtype), options, (own,), device.backend))
    for name, y in want.items():
        size = np.sqrt((y**2).mean((1, 2))) + 2.0**-24 / ROUNDING[dtype]
        worst = (np.sqrt(((got[name] - y) ** 2).mean((1, 2))) / size).max()
        assert worst <= 2 * ROUNDING[dtype], f"{name}: error {worst:.2e} of a head"


@per_device("dtype, operator, size, tiny", [
    ("float16", "hla2", 60, 1e-6), ("float16", "hla3", 16, 1e-7)
])  # fmt: skip
def test_float16_intermediates_do_not_overflow(device, dtype, operator, size, tiny):
    """y = (q k') k is beyond float16 where the output is not."""
    given = zip("qkv", draw(H, 40, D=24, V=11), (size, size, tiny), strict=True)
    inputs = {n: rounded(factor * x, dtype) for n, x, factor in given}
    y = np.tril(inputs["q"] @ inputs["k"].mT) @ inputs["k"]
    assert (abs(y).max((1, 2)) > 1e5).all()
    want = hla.scan(**inputs, operator=operator, backend="array_api")
    o = hla.scan(**device.arrays(inputs, dtype), operator=operator, backend=device.backend)
    fits = abs(want) < 60000
    assert fits[:, 20:].mean() > 0.2
    assert np.isfinite(host(o)[fits]).all()


@per_device()
def test_refusals_say_why(device):
    inputs = device.inputs(9)
    arrays = device.arrays(inputs)
    calls = {
        "recurrent": (arrays, {"form": "recurrent"}, "form='chunked'"),
        "dense": (arrays, {"form": "dense"}, "form='chunked'"),
    }
    if "numpy" not in backends.load(device.backend).capabilities.libraries:
        calls["numpy"] = (inputs, {}, "arrays of numpy")
    for dtype in {"bfloat16", "float64"} - {*device.dtypes}:
        calls[dtype] = (device.arrays(inputs, dtype), {}, dtype)
    for given, options, reason in calls.values():
        for call in (hla.scan, hla.vjp, hla.explain):
            with pytest.raises(hla.Unsupported, match=f"{device.backend}: .*{reason}"):
                call(**given, backend=device.backend, **options)
        either = [device.backend, "array_api"]
        assert hla.explain(**given, backend=either, **options).reasons[device.backend]
    with pytest.raises(ValueError, match="chunk_size"):
        hla.scan(**arrays, backend=device.backend, chunk_size=0)
    want = hla.scan(**arrays, backend=device.backend)
    for size in (1, 16, 100):
        bits(hla.scan(**arrays, backend=device.backend, chunk_size=size), want)


FULL = [
    (*x, D, state) for x in CALLS_IN_ORDER for D, state in ((64, False), (128, False), (128, True))
]
# Of a causal call every sweep; of other passes those of one gate, which has most to read.
COSTLY_FULL = [x for x in FULL if x[2] == "resets" and (x[4] or x[1] == "causal")]
COSTLY_FULL += [x for x in FULL if x[1] == "causal" and x[2] != "resets" and x[3:] == (128, False)]


@per_device("operator, mask, gate, D, state", either([], FULL, COSTLY_FULL), where=accelerated)
def test_within_the_budget_where_the_device_is_full(device, operator, mask, gate, D, state):
    """More heads than multiprocessors: loads and products of many chunks overlap.

    Copies of three heads: one of each within the budget, the others its bits.
    """
    copies = 50
    options = {"operator": operator, "mask": mask, "scale": D**-0.75, "return_state": state}
    inputs = inputs_of(700, gate, device.dtype, D=D, V=D, heads=3)
    given = cotangents(inputs, options, device.dtype)

    def tiled(x):
        return each(lambda y: np.tile(y, (copies, *(1,) * (y.ndim - 1))), x)

    arrays = device.arrays({n: tiled(x) for n, x in inputs.items()})
    own = (
        device.array(tiled(given[0]), device.dtype),
        *(device.array(tiled(x)) for x in given[1:]),
    )
    found = {}
    for name, x in run(arrays, options, own, device.backend).items():
        xp = array_namespace(x)
        apart = xp.reshape(x, (copies, 3, *x.shape[1:]))
        bits(apart, xp.broadcast_to(apart[:1, ...], apart.shape))
        found[name] = x[:3, ...]
    verify(device, found, inputs, options, given, device.dtype)


def large(device):
    """dtype, D of what is compiled for many calls."""
    wide = (128,) if device.costly else (64, 128)
    return [(x, D) for x in device.dtypes for D in (wide if x == device.dtype else (64,))]


@per_device(
    "operator, dtype, D",
    lambda x: [(o, *y) for o in OPERATORS for y in large(x)],
    where=accelerated,
)
def test_within_the_budget_over_many_tokens(device, operator, dtype, D):
    inputs = inputs_of(4090, "none", dtype, D=D, V=D)
    decay = (0.9, 0.99) if dtype == "float16" else (0.999, 1.0)  # float16 has not hla3's range
    inputs["decay"] = np.array(decay, np.float32).astype(np.float64)
    check(device, inputs, {"operator": operator, "scale": D**-0.75, "return_state": True}, dtype)


@per_device("operator, gate", [("hla2", "resets"), ("hla3", "per_head")], where=accelerated)
def test_the_gradient_of_a_gate_from_a_first_state(device, operator, gate):
    """Whose S is not symmetric, over three periods of which a gate leaves much."""
    options = {"operator": operator, "scale": 0.05}
    inputs = inputs_of(2200, gate, device.dtype, D=64, V=64)
    if gate == "resets":
        inputs["log_gate"] = rounded(inputs["log_gate"] / 512)
    else:
        inputs["decay"] = np.array((0.999, 1.0), np.float32).astype(np.float64)
    state = state_of(options, gate, D=64, V=64)
    S = rounded(np.random.default_rng(3).standard_normal(state.S.shape))
    check(device, inputs | {"initial_state": state._replace(S=S)}, options, device.dtype)


DIVIDED = [(o, g, "bfloat16", 128) for o in OPERATORS for g in ("none", "resets")]
DIVIDED += [(o, "resets", "float32", 64) for o in ("hla2", "ahla")]


@per_device("operator, gate, dtype, D", either([], DIVIDED, DIVIDED[1::2]), where=accelerated)
def test_denominators_within_the_budget(device, operator, gate, dtype, D):
    """Beside the values, and beside the keys in the adjoint."""
    options = {"operator": operator, "scale": D**-0.75, "normalize": True}
    inputs = inputs_of(301, gate, dtype, D=D, V=D, heads=3, positive=True)
    check(device, inputs, options, dtype)


def surrounded(device, x, dtype):
    """An array within an allocation that holds NaN on every side of it."""
    inside = tuple(slice(2, -2) for _ in x.shape)
    wide = np.full([n + 4 for n in x.shape], math.nan)
    wide[inside] = x
    return device.array(wide, dtype)[inside]


@per_device(
    "dtype, operator",
    [("bfloat16", "hla2"), ("bfloat16", "hla3"), ("float32", "ahla")],
    where=accelerated,
)
def test_nothing_outside_is_read_or_written(device, dtype, operator):
    """NaN around the inputs and in what is allocated; memory beside the outputs stays."""
    inputs = inputs_of(131, "resets", dtype, D=60, V=33)
    do = rounded(np.random.default_rng(0).standard_normal((H, 131, 33)), dtype)
    arrays = device.arrays(inputs, dtype)
    want = device.everything(arrays, device.array(do, dtype), operator=operator)
    given = {n: surrounded(device, x, kind_of(arrays[n])) for n, x in inputs.items()}
    bits(device.everything(given, surrounded(device, do, dtype), operator=operator), want)


@per_device(
    "operator, dtype, D",
    [(o, *x) for o in OPERATORS for x in (("bfloat16", 128), ("float32", 64))],
    where=accelerated,
)
def test_calls_repeat_to_the_bit(device, operator, dtype, D):
    arrays = device.arrays(inputs_of(1000, "resets", dtype, D=D, V=D, heads=8), dtype)
    do = device.array(np.random.default_rng(0).standard_normal((8, 1000, D)), dtype)
    want = device.everything(arrays, do, operator=operator)
    for _ in range(100):
        bits(device.everything(arrays, do, operator=operator), want)


@per_device(
    "operator, dtype",
    [(o, x) for o in ("hla2", "hla3") for x in ("bfloat16", "float32")],
    where=accelerated,
)
def test_bits_depend_on_no_other_head(device, operator, dtype):
    """From one head to forty, alone or with others."""
    arrays = device.arrays(inputs_of(500, "per_head", dtype, D=64, V=64, heads=40), dtype)
    do = device.array(np.random.default_rng(0).standard_normal((40, 500, 64)), dtype)
    o, state, *gradients = device.everything(arrays, do, operator=operator)
    for part in (slice(0, 1), slice(39, 40), *[slice(7, 20)][device.costly :]):
        some = {n: x[part] for n, x in arrays.items()}
        one, end, *found = device.everything(some, do[part], operator=operator)
        bits(one, o[part])
        bits(end, type(state)(*(x[part] for x in state)))
        bits(tuple(found[:4]), tuple(x[part] for x in gradients[:4]))


@per_device("dtype", lambda device: device.dtypes, where=accelerated)
def test_steps_continue_a_scan(device, dtype):
    """Steps are the scan of a token."""
    arrays = device.arrays(inputs_of(70, "per_head", dtype, D=64, V=64), dtype)
    options = {"decay": arrays.pop("decay"), "backend": device.backend}
    first = {n: x[:, :-1] for n, x in arrays.items()}
    _, state = hla.scan(**first, return_state=True, **options)
    last = {n: x[:, -1:] for n, x in arrays.items()}
    want = hla.scan(**last, initial_state=state, return_state=True, **options)
    o, end = hla.step(*(x[:, 0] for x in last.values()), state, **options)
    bits((o[:, None], end), want)


@per_device(where=accelerated)
def test_a_nan_in_the_gate_shows(device):
    """On a device no value is checked: from its token on in its head, and nowhere else."""
    inputs = device.inputs(140, "resets")
    options = {"backend": device.backend}
    want = host(hla.scan(**device.arrays(inputs), **options))
    inputs["log_gate"][0, 70] = math.nan
    got = host(hla.scan(**device.arrays(inputs), **options))
    same(got[1], want[1])
    same(got[0, :64], want[0, :64])
    assert np.isnan(got[0, 70:]).all()


def picked(device):
    """Whether it is an accelerator whose arrays the backend takes without a name."""
    return accelerated(device) and (device.library, True) in serves(device.backend)


@per_device(where=picked)
def test_without_a_name_the_device_takes_its_own_arrays(device):
    inputs = device.inputs(9)
    assert hla.explain(**device.arrays(inputs)).backend == device.backend
    elsewhere = Device(device.backend, device.library, "cpu", device.dtypes).arrays(inputs)
    if device.library not in ("cupy", "numba"):  # which have no other place
        assert hla.explain(**elsewhere).backend == "array_api"
        with pytest.raises(hla.Unsupported, match=f"{device.backend}: .*these arrays are on cpu"):
            hla.scan(**elsewhere, backend=device.backend)


@per_device(where=lambda device: device.interpreted)
def test_without_a_name_arrays_of_the_host_take_the_generic_code(device):
    assert hla.explain(**device.arrays(device.inputs(9))).backend == "array_api"
