"""The CuPy backend without a GPU: its kernels compiled by NVRTC, and their text run on the host."""

import subprocess
import sys
import threading

import cuda_interpreter
import numpy as np
import pytest
from conftest import OPERATORS, close, environment, installed, numpy_dtype, to_numpy
from cuda_interpreter import CARD, HOSTED, NAME
from devices import Device, check, inputs_of, state_of
from nvrtc import compiled

import hla
from hla import backends
from hla.arguments import prepare
from hla.kernels.cupy import launch, run
from hla.kernels.cupy.source import source
from hla.libraries import exchange, rules

HOST = Device(NAME, "numpy", "cpu", cuda_interpreter.CAPABILITIES.dtypes)
needs_compiler = pytest.mark.skipif(not cuda_interpreter.COMPILER, reason="there is no g++")


@pytest.fixture
def hosted(monkeypatch):
    """The kernels as a backend of NumPy arrays."""
    caches = backends.load, exchange.loaded, rules.differentiable
    monkeypatch.setattr(backends, "TABLE", {NAME: "cuda_interpreter", **backends.TABLE})
    yield
    for cached in caches:
        cached.cache_clear()


def kernels(dtype, T=300, D=128, card=CARD, **options):
    """Files and constants of the launches of a call and of its gradients."""
    return list(loads(dtype, T, D, card, **options))


def loads(dtype, T, D, card, **options):
    """The same, and of each whether it is loaded by the caller's thread, as often as it is."""
    found = {}

    def load(name, constants, shared, card):
        assert shared <= card.shared
        here = threading.current_thread() is threading.main_thread()
        found.setdefault((name, tuple(constants.items())), []).append(here)
        return lambda *args, **kwargs: None

    memory = HOSTED.memory._replace(load=load, card=lambda x: card)
    library = run.Library(memory)
    q, k, v, do = np.zeros((4, 2, T, D), numpy_dtype(dtype))
    given = {"decay": None, "log_gate": None, "scale": 1.0} | options
    request, inputs, _ = prepare(q, k, v, **given, gradient=True)
    _, _, saved = library.forward(request, inputs)
    with np.errstate(all="ignore"):
        library.backward(request, inputs, saved, do, None)
    return found


def test_a_plans_kernels_are_loaded_side_by_side():
    """As they then are when they run."""
    card = CARD._replace(capability=(9, 0))
    found = loads("bfloat16", 300, 128, card, operator="hla3")
    sweeps = [here for (name, _), here in found.items() if name != "hopper.cu"]
    assert len(sweeps) == 4
    assert all(here[0] is False and here[1:] for here in sweeps)


GATE = {"log_gate": np.zeros((2, 300), np.float32)}
CALLS = [("bfloat16", {}), ("bfloat16", GATE), ("float32", GATE)]


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_kernels_fit_the_shared_memory_of_a_card(shared):
    """Of every architecture, in KB; `kernels` asserts it."""
    for dtype, gate in (*CALLS, ("float32", {})):
        for D in (16, 64, 128, 200):
            card = CARD._replace(shared=shared << 10)
            assert kernels(dtype, D=D, card=card, operator="hla2", **gate)


def test_small_temporaries_are_one_allocation():
    """Of a gate's gradient; dy, whose memory dq takes, dk, dv and the gate's are arrays."""
    made, memory, card = [], HOSTED.memory, CARD._replace(capability=(9, 0))
    names = {n: lambda x, *rest, n=n: made.append(n) or getattr(memory, n)(x, *rest)
             for n in ("empty", "room")}  # fmt: skip
    names |= {"card": lambda x: card, "load": lambda *args: lambda *args, **shared: None}
    library = run.Library(memory._replace(**names))
    q, k, v, do = np.zeros((4, 2, 300, 128), numpy_dtype("bfloat16"))
    request, inputs, _ = prepare(
        q, k, v, **GATE, decay=None, operator="hla2", scale=1.0, gradient=True
    )
    _, _, saved = library.forward(request, inputs)
    made.clear()
    library.backward(request, inputs, saved, do, None)
    assert sorted(made) == ["empty"] * 4 + ["room"]


def test_explain_says_where_kernels_were_not_timed():
    assert not launch.untimed(CARD._replace(capability=(9, 0)))
    assert launch.untimed(CARD).endswith("not timed, for compute capability 8.0")


ALONE = """
import sys, hla
from hla.kernels.cupy import driver  # imports CuPy
from hla.kernels.cupy.source import source
from cupy.cuda import compiler
(found,) = [x for x in hla.available() if x.name == "cupy"]
assert found.available or found.reason == "CuPy sees no NVIDIA GPU", found
program = compiler._NVRTCProgram(source("hopper.cu", {constants}), "kernel.cu", method="cubin")
options = ("-std=c++17", *driver.options("hopper.cu"), "-ftz=true", "-arch=sm_90")
image, _ = program.compile((*options, "--device-as-default-execution-space"))
assert image.startswith(b"\\x7fELF")
print(*sorted({"torch", "jax", "triton", "cupy"} & set(sys.modules)))
"""


@pytest.mark.aot
def test_cupy_alone():
    """CuPy's own compiler takes a kernel; neither torch nor JAX is imported."""
    installed("cupy")
    card = CARD._replace(capability=(9, 0))
    (constants, *_) = (dict(c) for name, c in kernels("bfloat16", card=card, operator="ahla")
                       if name == "hopper.cu")  # fmt: skip
    code = ALONE.replace("{constants}", repr(constants))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, ["cupy"]), done.stderr


LOG, DECAY = {"log_gate": -0.1}, {"decay": 0.9}  # numbers, which have no gradient
HOPPER = [  # operator, gate, tokens of a segment
    ("hla2", {}, 0), ("hla2", GATE, 0), ("ahla", {}, 0), ("ahla", DECAY, 0), ("hla3", GATE, 0),
    ("hla2", GATE, 128), ("ahla", {}, 128),
]  # fmt: skip
SPILLS = {"hopper.cu": 0, "hopper_states.cu": 0, "hopper_ahla.cu": 136}  # bytes; of others below
ONE_BLOCK = {  # architecture, KB of shared memory, operator, gate; bytes of spills
    "hla2": ("sm_80", 163, "hla2", {}, 16),
    "hla3, a log gate": ("sm_90", 227, "hla3", LOG, 48),
    "ahla, chunks of 16": ("sm_120", 99, "ahla", DECAY, 48),
}
PASSES = {  # architecture, KB of shared memory, dtype, operator, gate, constants; bytes of spills
    "forward and back": ("sm_80", 163, "bfloat16", "hla2", {}, {}, 0),
    "pairs and a gate's gradient": (
        "sm_80", 163, "bfloat16", "hla3", GATE, {"BOTH": 1, "DOTS": 2}, 0
    ),
    "float32": ("sm_80", 163, "float32", "hla2", {}, {"ADD": 1, "V_IS_K": 1}, 0),
    "forward, Hopper": ("sm_90", 227, "bfloat16", "hla2", {}, {"ADD": 0, "REVERSE": 0}, 0),
    "float32, Hopper": ("sm_90", 227, "float32", "hla2", {}, {"BOTH": 1}, 256),
}  # fmt: skip


def built(name, constants, arch):
    return compiled(source(name, dict(constants)), f"-arch={arch}")


@pytest.mark.aot
@pytest.mark.parametrize(
    "row", HOPPER, ids=lambda row: f"{row[0]}-{[*row[1], 'plain'][0]}-{row[2] or 'whole'}"
)
def test_kernels_of_hopper_compile(row, monkeypatch):
    """Products are all there, and none is awaited alone; few registers are spilled."""
    operator, gate, tokens = row
    monkeypatch.setattr(launch, "segments", lambda request, card: tokens)
    card = CARD._replace(capability=(9, 0))
    found = [x for x in kernels("bfloat16", card=card, operator=operator, **gate)
             if x[0].startswith("hopper")]  # fmt: skip
    assert "hopper.cu" in {name for name, _ in found}
    for name, constants in ((name, dict(x)) for name, x in found):
        one = built(name, constants, "sm_90a")
        most = (120 if tokens else 108) if constants.get("DOTS") else 96 if gate else 32
        most = SPILLS.get(name, most) if constants.get("READ", 1) else 0
        assert one.spills <= most, name
        assert not {*one.remarks} - {"C7517", "C7519"}, name
        threads = 384 if constants.get("Z", 1) else 256
        assert one.registers <= (65536 // threads) // 8 * 8, name  # of which owners then take more
        assert one.dropped <= 0, name


@pytest.mark.aot
@pytest.mark.parametrize("row", ONE_BLOCK)
def test_all_states_in_one_block_compile(row):
    """A warp takes all registers that there are."""
    arch, shared, operator, gate, spills = ONE_BLOCK[row]
    card = CARD._replace(shared=shared << 10)
    found = kernels("bfloat16", card=card, operator=operator, **gate)
    (constants,) = (c for name, c in found if name == "fused.cu")
    assert built("fused.cu", constants, arch).spills <= spills


@pytest.mark.aot
@pytest.mark.parametrize("row", PASSES)
def test_passes_compile(row):
    arch, shared, dtype, operator, gate, wanted, spills = PASSES[row]
    card = CARD._replace(shared=shared << 10)
    found = [(name, c) for name, c in kernels(dtype, card=card, operator=operator, **gate)
             if name == "pass.cu" and wanted.items() <= dict(c).items()]  # fmt: skip
    assert found
    for name, constants in found:
        one = built(name, constants, arch)
        assert one.spills <= spills, constants
        assert one.registers <= (255 if dtype == "float32" or gate else 176)


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_other_kernels_compile(arch):
    """One token, two blocks a multiprocessor; what goes on between passes."""
    if arch == "sm_90":
        fixed = {"WIDTH": 128, "SLOTS": 6, "BLOCKS": 2}
        assert built("hopper_step.cu", fixed, "sm_90a").spills == 0
    for packed in (0, 1):
        one = built("step.cu", {"WIDTH": 128, "WHOLE": 1, "PACKED": packed}, arch)
        assert one.spills <= 40 * packed
        assert one.registers <= 128
    fixed = {"TOTAL": "double", "GATE_KIND": 1, "W": 64, "PERIOD": 1024}
    for name in ("sum", "divide", "fading", "carry", "gate"):
        assert built(f"{name}.cu", fixed, arch).spills == 0, name


CASES = [  # operator, dtype, gate, T, D, V
    ("linear", "bfloat16", "resets", 70, 24, 11),
    ("linear", "float32", "per_head", 67, 20, 16),
    ("hla2", "bfloat16", "none", 130, 16, 16),
]


@needs_compiler
@pytest.mark.parametrize(("operator", "dtype", "gate", "T", "D", "V"), CASES)
def test_values_on_the_host(hosted, operator, dtype, gate, T, D, V):
    """Output, state, every gradient: several chunks, a short last one, a first state, two tiles."""
    options = {"operator": operator, "scale": 0.25}
    inputs = inputs_of(T, gate, dtype, D=D, V=V)
    inputs["initial_state"] = state_of(options, gate, D=D, V=V)
    check(HOST, inputs, options | {"return_state": True}, dtype)


@needs_compiler
def test_segments_on_the_host(hosted, monkeypatch):
    """A sequence in three segments: states carried by a kernel, and a gate's gradient."""
    monkeypatch.setattr(launch, "segments", lambda request, card: 256)
    library = run.Library(HOSTED.memory)
    for name in ("forward", "backward"):
        monkeypatch.setattr(cuda_interpreter, name, getattr(library, name))
    check(HOST, inputs_of(600, "per_head", D=16, V=16), {"operator": "linear"}, "float32")


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_one_token_on_the_host(hosted, operator, packed):
    """In the state's own memory, where it is donated."""
    options = {"operator": operator, "scale": 0.25, "normalize": True}
    size = {"D": 37 if packed else 16, "V": 12, "heads": 3, "positive": True}
    tokens = [x[:, 0] for x in inputs_of(1, **size).values()]
    state = state_of(options, "per_head", **size)
    gate = np.array([-0.5, -1.0, -np.inf], np.float32)
    want, expected = hla.step(*tokens, state, log_gate=gate.astype(float), **options)
    given = type(state)(*map(np.ascontiguousarray, HOST.array(state)))
    given = given.pack() if packed else given
    o, new = hla.step(
        *map(HOST.array, tokens), given, log_gate=gate, backend=NAME, donate=True, **options
    )
    assert all(x is y for x, y in zip(new, given, strict=True))
    new = new.unpack() if packed else new
    for x, y in zip((o, *new), (want, *expected), strict=True):
        close(to_numpy(x), to_numpy(y), 2e-6)


class Alike:
    """What CuPy's arrays say of calls like an earlier one, of NumPy's."""

    again = "hla.libraries.plain_again"

    def signature(self, x):
        return x.shape, x.dtype

    def address(self, x):
        return x.ctypes.data

    def alike(self, arrays):
        def looks(arrays):
            return [(x.shape, x.strides, x.dtype, x.ctypes.data & 15) for x in arrays]

        same = looks(arrays)
        return lambda arrays: [x.ctypes.data for x in arrays] if looks(arrays) == same else None


@pytest.fixture
def kept(hosted, monkeypatch):
    """What is kept, nothing at first, of NumPy's arrays as of CuPy's."""
    library = type(installed("hla.libraries.numpy").NUMPY)
    for name in ("again", "signature", "address", "alike"):
        monkeypatch.setattr(library, name, getattr(Alike, name))
    monkeypatch.setattr(library, "on_accelerator", lambda self, x: True)
    monkeypatch.setattr(hla.again, "_kept", {})
    return hla.again._kept


def flat(found):
    return [y for x in found if x is not None for y in (flat(x) if isinstance(x, tuple) else (x,))]


@needs_compiler
@pytest.mark.parametrize(
    ("operator", "gate", "axis"), [("hla2", "number", -2), ("linear", "resets", -3)]
)
def test_calls_like_an_earlier_one(kept, monkeypatch, operator, gate, axis):
    """To the bit, and laid out as, what a first call gives; states are given and returned."""
    inputs = inputs_of(20, gate if gate != "number" else "none", "float32", D=16, V=16)
    options = {"operator": operator, "axis": axis, "backend": NAME, "return_state": True}
    given = {n: HOST.array(x) for n, x in inputs.items()}
    if axis == -3:
        for n in given.keys() & {"q", "k", "v", "log_gate"}:
            given[n] = np.ascontiguousarray(np.moveaxis(given[n], 1, 0))
    options |= {"decay": 0.5} if gate == "number" else {}
    q, k, v = (given.pop(n) for n in "qkv")
    options |= given
    _, options["initial_state"] = hla.scan(q, k, v, **options)

    def call():
        (o, state), pull = hla.vjp(q, k, v, **options)
        return flat([*hla.scan(q, k, v, **options), o, state, pull(v, state), pull(v)])

    with monkeypatch.context() as first:
        first.setattr(hla.again, "seen", lambda *args: None)
        want = call()
    kept.clear()
    for _ in range(2):
        for x, y in zip(call(), want, strict=True):
            assert x.strides == y.strides
            np.testing.assert_array_equal(x, y)
    assert len(kept) == 2


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_like_an_earlier_one(kept, packed):
    token = [HOST.array(x[:, 0]) for x in inputs_of(1, D=16, V=12, heads=3).values()]
    state = HOST.array(state_of({"operator": "hla2"}, "none", D=16, V=12, heads=3))
    first = state.pack() if packed else state
    want = hla.step(*token, first, decay=0.5, backend=NAME)
    assert len(kept) == 1
    for donate in (False, True, True):
        own = type(first)(*(x.copy() for x in first))
        got = hla.step(*token, own, decay=0.5, donate=donate, backend=NAME)
        assert all((x is y) == donate for x, y in zip(got[1], own, strict=True))
        for x, y in zip(flat(got), flat(want), strict=True):
            np.testing.assert_array_equal(x, y)
