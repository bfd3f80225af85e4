"""Numba's kernels without a GPU: their text in Numba's simulator, and compiled ahead of time."""

import dataclasses
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import close, environment, installed, numpy_dtype, within_budget
from devices import Device, check, host, inputs_of, rounded, state_of
from numba import cuda

import hla
from hla import backends
from hla.arguments import prepare
from hla.kernels.cupy import fused as cupy_fused
from hla.kernels.cupy import launch, run
from hla.libraries import exchange, rules

installed("numba")
simulator = importlib.import_module("numba_simulator")
device = sys.modules["hla.kernels.numba.device"]
between = sys.modules["hla.kernels.numba.between"]
adjoint = sys.modules["hla.kernels.numba.adjoint"]
HOST = Device(simulator.NAME, "numpy", "cpu", simulator.CAPABILITIES.dtypes)


@pytest.fixture
def simulated(monkeypatch):
    """The kernels as a backend of NumPy arrays."""
    caches = backends.load, exchange.loaded, rules.differentiable
    monkeypatch.setattr(backends, "TABLE", {simulator.NAME: "numba_simulator", **backends.TABLE})
    simulator.LAUNCHES.clear()
    yield
    assert simulator.LAUNCHES
    for cached in caches:
        cached.cache_clear()


def test_simulated_threads_wait():
    """For their warp, for what is left of their block, for so many; never for what does not come.

    One that did not wait would read what is not there yet.
    """
    twin, found = simulator.Twin({}), np.zeros(64, int)

    def kernel(found, threads):
        x = cuda.threadIdx.x
        found[x] = twin.across(x, 1)
        if x >= 32:
            return
        cuda.syncthreads()
        other = found[31 - x]
        twin.threads_sync(1, threads)
        found[x] = other

    cuda.jit(kernel)[1, 64](found, 32)
    turned = np.arange(64) ^ 1
    np.testing.assert_array_equal(found, [*turned[31::-1], *turned[32:]])
    with pytest.raises(AssertionError, match=r"wait for ever: \[\(1, 33\)\]"):
        cuda.jit(kernel)[1, 64](found, 33)


@pytest.mark.parametrize(
    ("operator", "gate", "T"), [("ahla", "per_head", 40), ("hla3", "resets", 34)]
)
def test_fused_forward(simulated, operator, gate, T):
    """Output and states by one kernel: two chunks, rows that are no whole 16 bytes."""
    options = {"operator": operator, "scale": 0.25}
    inputs = inputs_of(T, gate, "bfloat16", D=18, V=13)
    inputs["initial_state"] = state_of(options, gate, D=18, V=13)
    options["return_state"] = True
    want, expected = hla.scan(**inputs, backend="array_api", **options)
    arrays = HOST.arrays(inputs, "bfloat16")
    o, state = hla.scan(**arrays, backend=simulator.NAME, **options)
    assert "fused.cu" in {name for name, _ in simulator.LAUNCHES}
    for x, y in zip((o, *state), (want, *expected), strict=True):
        x, y = (z if z.ndim > 2 else z[..., None] for z in (host(x), y))  # of a denominator
        within_budget(x, y, "bfloat16", D=18, T=T, operator=operator)


def test_segments(simulated, monkeypatch):
    """Three segments, the last one short: their gates are summed, and their states carried."""
    monkeypatch.setattr(launch, "segments", lambda request, card: 32)
    monkeypatch.setattr(
        simulator, "forward", run.Library(simulator.SIMULATED.memory, device.KERNELS).forward
    )
    inputs = inputs_of(70, "per_head", D=12, V=9)
    want = hla.scan(**inputs, operator="linear", backend="array_api")
    o = hla.scan(**HOST.arrays(inputs, "float32"), operator="linear", backend=simulator.NAME)
    assert {"fading.cu", "carry.cu"} <= {name for name, _ in simulator.LAUNCHES}
    within_budget(host(o), want, "float32", D=12)


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("ends", [False, True])
def test_carry_reads_no_state_that_nobody_makes(reverse, ends):
    """That of the last segment, unless the last state is requested."""
    local, o, end = np.ones((3, 3, 2, 2), np.float32)
    seen = set()

    class Reads(simulator.Twin):
        def get64(self, address, at, kind):
            seen.add(int(at) // 4)
            return super().get64(address, at, kind)

    twin = Reads({})
    kernel = device.TEXTS["carry.cu"].make({}, twin)
    twin.module = sys.modules[kernel.__module__]
    at = local.ctypes.data, o.ctypes.data, 0, end.ctypes.data * ends, 0
    walk, fade = between.Walk(0, 0, 0, 2, 1), between.Fade(0, 0, 0, 0)
    sizes = between.Segments(3, 2, 2, 1, 1, reverse, 1)
    cuda.jit(kernel)[1, 4](at, walk, walk, fade, sizes, 1.0)
    order = [2, 1, 0] if reverse else [0, 1, 2]
    assert seen == {*order[: 2 + ends]}
    assert [o[n, 1, 1] for n in order] == [0, 1, 2]
    assert end[0, 1, 1] == (3 if ends else 1)


@pytest.mark.aot
def test_segments_of_more_chunks_than_are_copied_ahead(simulated, monkeypatch):
    """Fused: states alone of each segment, then its output from what is carried."""
    monkeypatch.setattr(cupy_fused, "SIZES", cupy_fused.SIZES[-1:])  # 16 tokens, 2 chunks ahead
    monkeypatch.setattr(launch, "segments", lambda request, card: 64)
    library = run.Library(simulator.SIMULATED.memory, device.KERNELS)
    monkeypatch.setattr(simulator, "forward", library.forward)
    inputs = inputs_of(66, "per_head", "bfloat16", D=16, V=16, heads=1)
    want = hla.scan(**inputs, operator="ahla", backend="array_api")
    o = hla.scan(**HOST.arrays(inputs, "bfloat16"), operator="ahla", backend=simulator.NAME)
    fused = [dict(x)["READ"] for name, x in simulator.LAUNCHES if name == "fused.cu"]
    assert fused == [0, 1]
    within_budget(host(o), want, "bfloat16", D=16, T=66, operator="ahla")


CASES = [  # operator, dtype, gate, T, D, V
    ("linear", "float32", "per_head", 34, 12, 9),
    ("hla2", "bfloat16", "resets", 34, 16, 16),
]


@pytest.mark.parametrize(("operator", "dtype", "gate", "T", "D", "V"), CASES)
def test_values(simulated, operator, dtype, gate, T, D, V):
    """Output, state, every gradient: several chunks, a short last one, a first state."""
    options = {"operator": operator, "scale": 0.25}
    inputs = inputs_of(T, gate, dtype, D=D, V=V)
    inputs["initial_state"] = state_of(options, gate, D=D, V=V)
    check(HOST, inputs, options | {"return_state": True}, dtype)


def launched():
    """What was launched of two passes: of each the numbers of its operands, and tokens a chunk."""
    found = [dict(x) for name, x in simulator.LAUNCHES if name == "backward"]
    return [(x["FIRST"], x["SECOND"], x["W"]) for x in found]


ADJOINTS = {  # queries, keys, values and what a result is added to, of both passes
    "hla2": [
        ((0, 1, 2, -1), (3, 2, 1, -1)), ((0, 1, 2, -1), (0, 2, 1, -1)),
        ((0, 1, 2, -1), (3, 4, 4, -1)),
    ],
    "ahla": [
        ((0, 1, 2, -1), (3, 2, 1, -1)), ((0, 1, 2, 3), (4, 2, 1, -1)),
        ((0, 1, 2, -1), (3, 4, 2, -1)),
    ],
    "hla3": [
        ((0, 1, 2, -1), (3, 2, 1, -1)), ((0, 1, 2, -1), (3, 2, 1, -1)),
        ((0, 1, 2, -1), (0, 2, 1, 3)), ((0, 1, 2, -1), (3, 2, 2, -1)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "T", "D", "V", "W", "decay"),
    [
        ("hla2", 34, 16, 16, 32, 0.9),
        ("ahla", 67, 13, 18, 16, 0.9),  # of as many chunks as there are weights, and two more
        pytest.param("hla2", 34, 100, 90, 16, None, marks=pytest.mark.aot),
        pytest.param("hla3", 34, 18, 16, 16, None, marks=pytest.mark.aot),
    ],
)
def test_adjoint_by_two_passes_a_launch(simulated, monkeypatch, operator, T, D, V, W, decay):
    """Every gradient: several chunks, a short one; rows of whole 16 bytes and others."""
    monkeypatch.setattr(adjoint, "SIZES", tuple(x for x in adjoint.SIZES if x[0] == W))
    inputs = inputs_of(T, dtype="bfloat16", D=D, V=V, heads=1)
    check(HOST, inputs, {"operator": operator, "scale": 0.25, "decay": decay}, "bfloat16")
    assert launched() == [(*x, W) for x in ADJOINTS[operator]]


@pytest.mark.aot
@pytest.mark.parametrize("operator", ["hla2", "ahla"])
def test_adjoint_from_states(simulated, operator):
    """First and last states, their gradients, whose factors are those of tokens."""
    options = {"operator": operator, "scale": 0.25, "decay": 0.9}
    inputs = inputs_of(34, dtype="bfloat16", D=18, V=13, heads=1)
    inputs["initial_state"] = state_of(options, "none", D=18, V=13, heads=1)
    check(HOST, inputs, options | {"return_state": True}, "bfloat16")
    assert launched()


@pytest.mark.aot
@pytest.mark.parametrize(("operator", "shared"), [("hla2", "k"), ("hla2", "qk"), ("ahla", "kv")])
def test_adjoint_of_shared_heads(simulated, operator, shared):
    """Gradients that heads share are left in float32; of fewer heads than dF's dq is by passes."""
    size = {"dtype": "bfloat16", "D": 16, "V": 16}
    inputs, few = inputs_of(34, heads=2, **size), inputs_of(34, heads=1, **size)
    inputs |= {n: few[n] for n in shared}
    check(HOST, inputs, {"operator": operator, "scale": 0.25}, "bfloat16")
    assert len(launched()) == (2 if shared == "qk" else 3)
    assert any(any(dict(x)["WIDE"]) for name, x in simulator.LAUNCHES if name == "backward")


@pytest.mark.aot
@pytest.mark.parametrize("operator", ["hla2", "ahla"])
def test_adjoint_in_segments(simulated, monkeypatch, operator):
    """Of several chunks each, the last one short, from states that were carried."""
    monkeypatch.setattr(adjoint, "SIZES", adjoint.SIZES[-1:])
    monkeypatch.setattr(launch, "segments", lambda request, card: 32)
    library = run.Library(simulator.SIMULATED.memory, device.KERNELS)
    monkeypatch.setattr(simulator, "forward", library.forward)
    monkeypatch.setattr(simulator, "backward", library.backward)
    inputs = inputs_of(66, dtype="bfloat16", D=16, V=16, heads=1)
    check(HOST, inputs, {"operator": operator, "scale": 0.25, "decay": 0.9}, "bfloat16")
    assert len(launched()) == 3


@pytest.mark.aot
@pytest.mark.parametrize(
    ("operator", "gate", "T", "period", "segment", "start"),
    [
        ("hla2", "resets", 98, 64, 0, False),
        ("ahla", "per_head", 98, 64, 0, False),
        ("hla3", "resets", 66, 32, 0, False),
        ("hla2", "resets", 130, 64, 64, False),
        ("hla2", "per_head", 70, 32, 0, True),
    ],
)
def test_adjoint_and_the_gate(simulated, monkeypatch, operator, gate, T, period, segment, start):
    """Sums by token, and products of states at the starts of several periods; resets there too.

    A first S is not symmetric, which later ones are; the gate is so mild that it lasts.
    """
    monkeypatch.setattr(adjoint, "PERIOD", period)
    monkeypatch.setattr(launch, "segments", lambda request, card: segment)
    library = run.Library(simulator.SIMULATED.memory, device.KERNELS)
    monkeypatch.setattr(simulator, "forward", library.forward)
    monkeypatch.setattr(simulator, "backward", library.backward)
    inputs = inputs_of(T, gate, "bfloat16", D=18, V=13, heads=1)
    if start:
        inputs["decay"] = rounded(np.array([0.999]))
        state = state_of({"operator": operator}, gate, D=18, V=13, heads=1)
        S = rounded(np.random.default_rng(4).standard_normal(state.S.shape))
        inputs["initial_state"] = state._replace(S=S)
    check(HOST, inputs, {"operator": operator, "scale": 0.25}, "bfloat16")
    assert len(launched()) == 3
    assert all(dict(x)["DOTS"] for name, x in simulator.LAUNCHES if name == "backward")


@pytest.mark.aot
@pytest.mark.parametrize("operator", ["hla2", "ahla"])
def test_adjoint_with_a_gate_that_has_no_gradient(simulated, operator):
    """Resets within and at ends of chunks: all gradients but the gate's, of three chunks."""
    inputs = inputs_of(66, "resets", "bfloat16", D=16, V=16, heads=1)
    options = {"operator": operator, "scale": 0.25}
    do = rounded(np.random.default_rng(3).standard_normal((1, 66, 16)), "bfloat16")
    _, pull = hla.vjp(**inputs, backend="array_api", **options)
    want = pull(do)
    request, given, _ = prepare(
        **HOST.arrays(inputs, "bfloat16"), decay=None, gradient=True, **options
    )
    request = dataclasses.replace(request, gate_given=False)
    _, _, saved = simulator.forward(request, given)
    found = simulator.backward(request, given, saved, HOST.array(do, "bfloat16"), None)
    for x, y in zip(found[:3], want[:3], strict=True):
        size = {"D": 16, "operator": operator, "gradient": True}
        within_budget(host(x), y, "bfloat16", **size)
    assert len(launched()) == 3


def test_quotients_of_shared_heads(simulated):
    """Keys that heads share, in rows that are no whole 16 bytes, and an output divided."""
    size = {"D": 17, "V": 9, "positive": True}
    inputs = inputs_of(3, **size) | {"k": inputs_of(3, heads=1, **size)["k"]}
    check(HOST, inputs, {"operator": "linear", "normalize": True, "eps": 1e3}, "float32")


@pytest.mark.parametrize(
    ("operator", "convention", "D"),
    [("hla2", "exact", 12), ("ahla", "exact", 5), ("hla3", "exact", 8), ("hla2", "paper", 8)],
)
def test_one_token(simulated, operator, convention, D):
    """Denominators too; in the state's own memory, where it is donated and no pass reads it before.

    Rows of whole 16 bytes and others, and a state without memory.
    """
    options = {"operator": operator, "scale": 0.25, "normalize": True, "convention": convention}
    size = {"D": D, "V": 8, "heads": 1, "positive": True}
    tokens = [x[:1, 0] for x in inputs_of(1, **size).values()]
    gate = np.array([-0.5], np.float32)
    calls = {"log_gate": gate, "backend": simulator.NAME, **options}
    given, state = None, None
    for donate in (False, True):
        want, state = hla.step(*tokens, state, log_gate=gate.astype(float), **options)
        o, new = hla.step(*map(HOST.array, tokens), given, donate=donate, **calls)
        own = donate and convention != "paper"
        assert all((x is y) == own for x, y in zip(new, given or new, strict=True)) or not donate
        given = new
        for x, y in zip((o, *new), (want, *state), strict=True):
            close(host(x), y, 2e-6)
    assert {name for name, _ in simulator.LAUNCHES} == {"step.cu"}


RESULTS = """
import contextlib, weakref
import ml_dtypes, numpy as np
from numba.cuda import api
from numba.cuda.cudadrv import devices
from hla.kernels.numba import array, blocks
from hla.libraries import numba as library
devices.get_context = api.current_context = lambda: None  # nothing of a driver is called
devices._runtime.ensure_context = contextlib.nullcontext
blocks.inside = lambda device, function: function()
class Owner: pass
bf16, found = np.dtype(ml_dtypes.bfloat16), []
for i in range(3):
    owner = Owner()
    x = array.Array(owner, 4096 * (i + 1), (2, 3), (6, 2), bf16, 0)
    found.append((library.made(x, None), weakref.ref(owner)))
    del owner, x
for i, (x, owner) in enumerate(found):
    assert x.dtype == bf16 and x.shape == (2, 3) and x.strides == (6, 2)
    stream, y = library.read(x)
    assert (stream, y.address, y.shape, y.strides, y.dtype) == (
        None, 4096 * (i + 1), (2, 3), (6, 2), bf16)
    assert x.__cuda_array_interface__["data"][0] == y.address and owner() is not None
    del y
owners = [owner for _, owner in found]
del found, x, owner
assert [owner() for owner in owners] == [None] * 3
"""


@pytest.mark.aot
def test_results_like_earlier_ones_have_memory_of_their_own():
    """Of an array each, kept alive as long as its result, the first too."""
    for needed in ("numba_cuda", "cuda.bindings"):
        installed(needed)
    given = environment(NUMBA_ENABLE_CUDASIM="0")
    done = subprocess.run(
        [sys.executable, "-c", RESULTS], capture_output=True, text=True, env=given
    )
    assert not done.returncode, done.stderr


SIDE_BY_SIDE = """
import sys, threading
from hla.kernels.numba import build
build.without_device((9, 0))
started, done = threading.Event(), threading.Event()
codes, here, asked = {}, build.machine_code, build.asked
def slow(*given):  # this process compiles until the other one has
    started.set()
    done.wait()
    return codes.setdefault("here", here(*given))
build.machine_code, build.idle = slow, lambda: True
build.asked = lambda *given: codes.setdefault("other", asked(*given))
kernels = ("fading.cu", {}, (9, 0)), ("picked", {}, (9, 0))
first, second = (threading.Thread(target=build.kept, args=x) for x in kernels)
first.start(); started.wait(); second.start(); second.join(); done.set(); first.join()
assert sorted(codes) == ["here", "other"]
assert all(code[:4] == bytes([127]) + b"ELF" for code in codes.values())
if sys.argv[1] == "True":
    build.compiled = None
    assert [build.kept(*x) for x in kernels] == [codes["here"], codes["other"]]
"""


@pytest.mark.aot
@pytest.mark.parametrize("writable", [True, False])
def test_kernels_compile_side_by_side(tmp_path, writable):
    """One by this process, one by another, both kept; nothing is raised where they cannot be."""
    for needed in ("numba_cuda", "cuda.bindings"):
        installed(needed)
    folder = tmp_path / "folder"
    if not writable:
        folder.touch()
    given = environment(NUMBA_ENABLE_CUDASIM="0", NUMBA_CACHE_DIR=str(folder))
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(writable)]
    done = subprocess.run(command, capture_output=True, text=True, env=given)
    assert not done.returncode, done.stderr
    assert [x.suffix for x in folder.rglob("*.*")] == [".cubin"] * 2 * writable


@pytest.mark.aot
def test_others_compile_on_cores_of_this_process(monkeypatch):
    """Where a process may use some of a machine's cores, a load of so many leaves none idle."""
    for needed in ("numba_cuda", "cuda.bindings"):
        installed(needed)
    from hla.kernels.numba import build

    monkeypatch.setattr(build.os, "getloadavg", lambda: (3.0, 3.0, 3.0))
    for count, idle in ((2, False), (4, True)):
        monkeypatch.setattr(build, "cores", lambda count=count: count)
        assert build.idle() is idle


COMPILE = """
import sys
from hla.kernels.numba import build
name, constants, arch = eval(sys.argv[1])
build.without_device(arch)
code = build.machine_code(name, dict(constants), arch, "-Xptxas=-v")
"""


def built(name, constants, arch):
    """Registers and bytes of spills of a kernel, compiled in a process without the simulator."""
    for needed in ("numba_cuda", "cuda.bindings"):
        installed(needed)
    command = [sys.executable, "-c", COMPILE, repr((name, constants, arch))]
    given = environment(NUMBA_ENABLE_CUDASIM="0")
    done = subprocess.run(command, capture_output=True, text=True, env=given)
    assert not done.returncode, done.stderr
    kernel = done.stdout.split("Compiling entry function")[-1]
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill stores", kernel)]
    return int(re.search(r"Used (\d+) registers", kernel)[1]), max(spills, default=0)


def kernels(dtype, **options):
    """Names and constants of the launches of a call and of its gradients."""
    found = {}

    def load(name, constants, shared, card):
        assert shared <= card.shared
        found[name, tuple(constants.items())] = None
        return lambda *args, **kwargs: None

    library = run.Library(simulator.SIMULATED.memory._replace(load=load), device.KERNELS)
    q, k, v, do = np.zeros((4, 2, 300, 128), numpy_dtype(dtype))
    given = {"decay": None, "log_gate": None, "scale": 1.0} | options
    request, inputs, _ = prepare(q, k, v, **given, gradient=True)
    _, _, saved = library.forward(request, inputs)
    with np.errstate(all="ignore"):
        library.backward(request, inputs, saved, do, None)
    return list(found)


GATE = {"log_gate": np.zeros((2, 300), np.float32)}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("operator", "arch", "most"),
    [("hla2", (8, 0), 16), ("ahla", (9, 0), 16), ("hla3", (9, 0), 148)],
)
def test_fused_kernels_compile(operator, arch, most):
    """Two rows of a state's blocks a warp, all of 128 columns: little else is spilled."""
    found = kernels("bfloat16", operator=operator, **GATE)
    (constants,) = [x for name, x in found if name == "fused.cu"]
    registers, spills = built("fused.cu", constants, arch)
    assert registers <= 255
    assert spills <= most


@pytest.mark.aot
@pytest.mark.parametrize(
    ("operator", "gate", "arch", "most"),
    [("hla2", {}, (9, 0), 32), ("ahla", {}, (8, 0), 48), ("hla2", GATE, (9, 0), 352)],
)
def test_two_passes_compile(operator, gate, arch, most):
    """As those of the forward; what a gate's gradient spills is made before the loop."""
    for name, constants in kernels("bfloat16", operator=operator, **gate):
        if name not in ("backward", "gate.cu"):
            continue
        registers, spills = built(name, constants, arch)
        threads = dict(constants)["PERIOD"] if name == "gate.cu" else 256
        assert registers * threads <= 65536
        assert spills <= (most if name == "backward" else 0)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("dtype", "gate", "arch", "spilled"),
    [("bfloat16", GATE, (9, 0), 40), ("float32", {}, (8, 0), 40)],
)
def test_passes_compile(dtype, gate, arch, spilled):
    """States are held in registers, of 128 columns; the pass with most to do of each direction."""
    found = [dict(x) for name, x in kernels(dtype, operator="linear", **gate) if name == "pass.cu"]
    for back in (0, 1):
        most = max((x for x in found if x["REVERSE"] == back), key=lambda x: x["DOTS"])
        registers, spills = built("pass.cu", most, arch)
        assert registers <= 255
        assert spills <= spilled


@pytest.mark.aot
def test_one_token_compiles():
    """Two blocks of threads fit a multiprocessor; of sixteen rows at a time little is spilled."""
    found = []

    def load(*given):
        found.append(given[:2])
        return lambda *args, **kwargs: None

    library = run.Library(simulator.SIMULATED.memory._replace(load=load), device.KERNELS)
    tokens = np.zeros((3, 2, 128), numpy_dtype("bfloat16"))
    options = {"one_token": True, "return_state": True, "decay": None, "log_gate": None}
    request, inputs, _ = prepare(*tokens, scale=1.0, normalize=True, **options)
    library.step(request, inputs, False)
    ((name, constants),) = found
    registers, spills = built(name, tuple(constants.items()), (9, 0))
    assert name == "step.cu"
    assert registers <= 128
    assert spills <= 56
