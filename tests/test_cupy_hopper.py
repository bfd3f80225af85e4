"""The CuPy backend's kernels of Hopper, their text run on the host, against core in float64."""

import importlib
import sys
import types

import numpy as np
import pytest
from conftest import installed
from devices import Device, inputs_of, state_of
from devices import check as within_the_budget

import hla
from hla import backends
from hla.kernels.cupy import hopper_backward, launch
from hla.kernels.cupy.launch import Card
from hla.libraries import exchange, rules

interpreter = importlib.import_module("cuda_interpreter")
ml_dtypes = installed("ml_dtypes")
CARD = Card(0, (9, 0), 4, 227 << 10)
OLDER = {x: Card(0, (8, 0), 4, x << 10) for x in (163, 99)}  # by the KB of shared memory
pytestmark = pytest.mark.skipif(interpreter.COMPILER is None, reason="there is no g++")


def some(cases, *chosen):
    """Cases of which those chosen run always, the others, as g++ compiles each, with -m aot."""
    return [x if i in chosen else pytest.param(x, marks=pytest.mark.aot)
            for i, x in enumerate(cases)]  # fmt: skip


@pytest.fixture
def hopper(monkeypatch):
    """A backend of that name, which records the kernels that it launches."""
    return backend(monkeypatch, CARD)


def backend(monkeypatch, card):
    module = types.ModuleType(f"hla_host_of_{card.shared}")
    calls = interpreter.hosted(card)
    for name in ("CAPABILITIES", "machine"):
        setattr(module, name, getattr(interpreter, name))
    for name in ("forward", "backward", "step"):
        setattr(module, name, getattr(calls, name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "TABLE", {"hopper": module.__name__, **backends.TABLE})
    for cached in (backends.load, exchange.loaded, rules.differentiable):
        cached.cache_clear()
    interpreter.LAUNCHES.clear()
    return interpreter.LAUNCHES


def check(launches, T, D, V, *, kernel="hopper.cu", gate="none", start=True, **options):
    """Compare a scan and its state with core's, which start from a state too."""
    rng = np.random.default_rng(T)
    given = [rng.standard_normal((2, T, w)) / w**0.5 for w in (D, D, V)]
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in given)
    exact = [x.astype(np.float64) for x in (q, k, v)]
    if gate == "decay":
        options["decay"] = np.asarray([0.9, 0.97], np.float32)
    if gate == "log_gate":
        a = -0.2 * rng.random((2, T)).astype(np.float32)
        a[1, T // 2] = -np.inf
        options["log_gate"] = a
    options |= {"return_state": True}
    state = None
    if start:
        before = [rng.standard_normal((2, 70, w)) / w**0.5 for w in (D, D, V)]
        plain = {n: x for n, x in options.items() if n != "log_gate"}
        state = hla.scan(*before, backend="array_api", **plain)[1]
        options["initial_state"] = type(state)(*(x.astype(np.float32) for x in state))
    o, end = hla.scan(q, k, v, backend="hopper", **options)
    assert kernel in {name for name, _ in launches}
    if start:
        options["initial_state"] = type(state)(
            *(x.astype(np.float64) for x in options["initial_state"])
        )
    wanted, last = hla.scan(*exact, backend="array_api", **options)
    for name, x, z in [("o", o, wanted), *zip(last._fields, end, last, strict=True)]:
        x, z = x.astype(np.float64), z.astype(np.float64)
        assert np.linalg.norm(x - z) < 6e-3 * np.linalg.norm(z), name


CASES = {
    "hla2, not whole chunks, columns nor 16 bytes": ("hla2", 130, 60, 36, {}),
    "hla2, a log gate, normalized": ("hla2", 70, 33, 65, {"gate": "log_gate", "normalize": True}),
    "ahla, a decay": ("ahla", 200, 128, 64, {"gate": "decay", "scale": 0.5}),
    "hla3, two blocks a head, a log gate": ("hla3", 130, 64, 72, {"gate": "log_gate"}),
}


@pytest.mark.parametrize("case", some(CASES, 1, 3))
def test_two_owners(hopper, case):
    operator, *sizes, options = CASES[case]
    if "normalize" in options:
        options = options | {"eps": 30.0}  # of either sign is what it divides by
    check(hopper, *sizes, operator=operator, **options)


ONE_BLOCK = {  # KB of shared memory, then as above
    "hla2, not whole chunks, columns nor 16 bytes": (163, "hla2", 70, 60, 36, {}),
    "ahla, chunks of 16, a log gate": (99, "ahla", 50, 33, 65, {"gate": "log_gate"}),
    "hla3, two blocks a head, a decay": (163, "hla3", 70, 128, 72, {"gate": "decay"}),
}


@pytest.mark.parametrize("case", some(ONE_BLOCK, 0))
def test_all_states_in_one_block(monkeypatch, case):
    shared, operator, *sizes, options = ONE_BLOCK[case]
    launches = backend(monkeypatch, OLDER[shared])
    check(launches, *sizes, operator=operator, kernel="fused.cu", **options)
    used = dict(launches)["fused.cu"]
    assert used["W"] == (16 if shared == 99 else 32)


HLA2 = {"hopper_reverse.cu", "hopper_queries.cu"}
ADJOINTS = {  # kernels, T, D, V, options
    "not whole chunks, columns nor 16 bytes": (HLA2, 130, 60, 36, {"scale": 0.5}),
    "a state, a decay, of 128 keys": (HLA2, 130, 128, 72, {"decay": 0.9, "start": True}),
    "ahla, a state": (
        {"hopper_ahla.cu", "hopper_queries.cu"}, 130, 128, 72,
        {"operator": "ahla", "start": True},
    ),
    "ahla, a decay": (HLA2, 130, 64, 36, {"operator": "ahla", "decay": 0.9}),
    "hla3, a state, a decay": (
        HLA2, 130, 64, 48, {"operator": "hla3", "decay": 0.9, "start": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", some(ADJOINTS, 2, 4))
def test_sweeps(hopper, case):
    kernels, *sizes, options = ADJOINTS[case]
    compare_gradients(*sizes, **options)
    others = {"sum.cu", "pass.cu", "hopper_states.cu"}
    assert kernels | {"hopper.cu"} == {name for name, _ in hopper} - others


def compare_gradients(T, D, V, *, start=False, **options):
    """Hold those of an output, and of a first state, against core's."""
    rng = np.random.default_rng(T)
    given = [rng.standard_normal((2, T, w)) / w**0.5 for w in (D, D, V, V)]
    narrow = [x.astype(ml_dtypes.bfloat16) for x in given]
    state = None
    if start:
        before = [rng.standard_normal((2, 70, w)) / w**0.5 for w in (D, D, V)]
        state = hla.scan(*before, backend="array_api", return_state=True, **options)[1]

    def gradients(backend, arrays, dtype):
        first = state and type(state)(*(x.astype(dtype) for x in state))
        *inputs, do = (x.astype(dtype) if dtype == np.float64 else x for x in arrays)
        return hla.vjp(*inputs, initial_state=first, backend=backend, **options)[1](do)

    found = gradients("hopper", narrow, np.float32)
    wanted = gradients("array_api", narrow, np.float64)
    pairs = [(n, getattr(found, n), getattr(wanted, n)) for n in ("dq", "dk", "dv")]
    if start:  # of fields that o does not depend on they are zeros
        fields = zip(found.dinitial_state, wanted.dinitial_state, strict=True)
        pairs += [(n, x, z) for n, (x, z) in zip(state._fields, fields, strict=True)]
    for name, x, z in pairs:
        x, z = x.astype(np.float64), z.astype(np.float64)
        assert np.linalg.norm(x - z) <= 6e-3 * np.linalg.norm(z), name


SEGMENTS = {  # sweeps of the adjoint that are not READ, then as above
    "hla2, of 128 keys": (1, 170, 128, 72, {"scale": 0.5}),
    "hla2, a state, a decay, not 16 bytes": (1, 170, 36, 60, {"decay": 0.9, "start": True}),
    "ahla": (1, 130, 128, 72, {"operator": "ahla"}),
    "ahla, a state": (2, 130, 64, 36, {"operator": "ahla", "start": True}),
    "ahla, a state, a decay": (0, 130, 64, 36, {"operator": "ahla", "decay": 0.9, "start": True}),
    "hla3, a state, a decay": (0, 130, 64, 48, {"operator": "hla3", "decay": 0.9, "start": True}),
}


@pytest.mark.parametrize("case", some(SEGMENTS, 0, 3))
def test_segments(monkeypatch, case):
    """Of 64 tokens, the last short: y, dy and du are made anew for the states of what follows.

    What nothing reads is not done: the last segment's states, of the adjoint those of the first.
    """
    monkeypatch.setattr(launch, "segments", lambda request, card: 64)
    count, *sizes, options = SEGMENTS[case]
    launches = backend(monkeypatch, CARD)
    compare_gradients(*sizes, **options)
    alone = [c for name, c in launches if name in ("hopper_reverse.cu", "hopper_ahla.cu")]
    assert [c["READ"] for c in alone].count(0) == count
    assert {"carry.cu", "hopper_states.cu", "hopper.cu"} <= {name for name, _ in launches}


@pytest.mark.parametrize("operator", some(["hla2", "hla3"], 0))
def test_gradients_of_a_last_state_in_segments(monkeypatch, operator):
    """They run by passes, of whose states some are symmetric."""
    monkeypatch.setattr(launch, "segments", lambda request, card: launch.PERIOD)
    launches = backend(monkeypatch, CARD)
    inputs = inputs_of(600, "per_head", "bfloat16", D=40, V=40)
    options = {"operator": operator, "scale": 0.25, "return_state": True}
    within_the_budget(Device("hopper", "numpy", "cpu", ("bfloat16",)), inputs, options, "bfloat16")
    assert {"carry.cu", "hopper_states.cu", "pass.cu"} <= {name for name, _ in launches}


GATED = {  # operator, gate, T, D, V, whether there is a first state
    "hla2, a log gate": ("hla2", "resets", 200, 72, 128, False),
    "hla2, a decay, a state": ("hla2", "per_head", 200, 100, 40, True),
    "ahla, a decay": ("ahla", "per_head", 130, 64, 36, False),
    "hla3, a log gate": ("hla3", "resets", 130, 24, 40, False),
    "hla3, a log gate, a state": ("hla3", "resets", 130, 72, 40, True),
}


@pytest.mark.parametrize("tokens", [0, 128])
@pytest.mark.parametrize("case", some(GATED, 0, 1))
def test_gradients_of_a_gate(monkeypatch, case, tokens):
    """Sweeps leave what they are made of, states before each period of one chunk too.

    A first S is not symmetric, which later ones are; gates are so mild that it lasts.
    """
    operator, gate, T, D, V, start = GATED[case]
    monkeypatch.setattr(hopper_backward, "PERIOD", 64)
    monkeypatch.setattr(launch, "segments", lambda request, card: tokens)
    launches = backend(monkeypatch, CARD)
    device = Device("hopper", "numpy", "cpu", ("bfloat16",))
    inputs = inputs_of(T, gate, "bfloat16", D=D, V=V)
    options = {"operator": operator, "scale": 0.25}
    if start:
        if gate == "resets":
            inputs["log_gate"] = inputs["log_gate"] / 16
        state = state_of(options, gate, D=D, V=V)
        S = np.random.default_rng(1).standard_normal(state.S.shape).astype(np.float32)
        inputs["initial_state"] = state._replace(S=S)
    within_the_budget(device, inputs, options, "bfloat16")
    names = {"hopper.cu", "hopper_reverse.cu", "hopper_queries.cu", "gate.cu", "sum.cu"}
    states = "pass.cu" if D < 33 else "hopper_states.cu"
    names |= {states, "carry.cu", "fading.cu"} if tokens or start else set()
    assert {name for name, _ in launches} == names


@pytest.mark.parametrize("operator", some(["ahla", "hla3"], 0))
def test_gradients_of_heads_that_share_keys(hopper, operator):
    """They are summed in float32, which the sweeps leave."""
    rng, heads, options = np.random.default_rng(1), (2, 1, 1), {"operator": operator, "scale": 0.25}
    options |= {"decay": 0.9} if operator == "ahla" else {}
    arrays = [rng.standard_normal((n, 66, 16)).astype(ml_dtypes.bfloat16) for n in heads]
    do = rng.standard_normal((2, 66, 16)).astype(ml_dtypes.bfloat16)
    found = hla.vjp(*arrays, backend="hopper", **options)[1](do)
    swept = {"ahla": 3, "hla3": 4}[operator]
    assert [n[:7] for n, _ in hopper].count("hopper_") == swept
    exact = [x.astype(np.float64) for x in (*arrays, do)]
    wanted = hla.vjp(*exact[:3], backend="array_api", **options)[1](exact[3])
    for name in ("dq", "dk", "dv"):
        x, z = getattr(found, name).astype(np.float64), getattr(wanted, name)
        assert np.linalg.norm(x - z) <= 6e-3 * np.linalg.norm(z), name


def aligned(x):
    """Return a copy without gaps that begins at whole 16 bytes."""
    strides = np.empty(x.shape, np.int8).strides
    found = interpreter.empty(x.shape, strides, x.dtype, None)
    found[...] = x
    return found


TOKENS = {  # operator, D, V, packed, in place
    "hla2, packed": ("hla2", 72, 36, True, True),
    "hla3, rows of more heads than blocks": ("hla3", 36, 64, False, False),
}


@pytest.mark.parametrize("case", TOKENS)
def test_states_in_bulk(monkeypatch, case):
    """To the bits of the other kernel of one token, where it may in the states' own memory."""
    operator, D, V, packed, donate = TOKENS[case]
    rng = np.random.default_rng(D)
    token = [rng.standard_normal((6, w)).astype(ml_dtypes.bfloat16) for w in (D, D, V)]
    before = [rng.standard_normal((6, 3, w)) for w in (D, D, V)]
    _, state = hla.scan(*before, operator=operator, return_state=True, backend="array_api")
    state = state.pack() if packed else state
    options = {"operator": operator, "decay": 0.9, "scale": 0.25, "donate": donate}
    found = []
    for card, kernel in ((CARD, "hopper_step.cu"), (OLDER[163], "step.cu")):
        own = type(state)(*(aligned(x.astype(np.float32)) for x in state))
        with monkeypatch.context() as patched:
            launches = backend(patched, card)
            o, new = hla.step(*token, own, backend="hopper", **options)
        assert {name for name, _ in launches} == {kernel}
        assert all((x is y) == donate for x, y in zip(new, own, strict=True))
        found.append((o, *new))
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)
