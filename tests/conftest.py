"""Array libraries, the rows of the parametrised tests, and the comparison with its error budget.

Rows follow from the table of backends: a new one, a plugin's too, has rows in every suite.
"""

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not any(
    os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl", "dxg")
):  # no GPU: interpreters stand in; they are chosen by what is set at their first import
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("HLA_PALLAS_INTERPRET", "1")
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs run a few times
    found = importlib.util.find_spec("jaxlib") and importlib.metadata.version("jaxlib")
    if found and (0, 7) <= tuple(map(int, found.split(".")[:2])) <= (0, 10):
        # a third less to compile; XLA ends a process that gives a flag which it does not know
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
elif "PYTEST_XDIST_WORKER" in os.environ:  # each compiles in one thread, and tries no variants
    flags = "--xla_gpu_force_compilation_parallelism=1 --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    # no call stacks in the text of JAX's kernels, which took a seventh of lowering them
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX leaves the GPU some memory
if "PYTEST_XDIST_WORKER" in os.environ:  # the test processes share the cores: no threads that spin
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import hla
from hla import backends
from hla.contract import ANY
from hla.libraries import library_of

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
SUITE = {"deadline": None, "suppress_health_check": SLOW}  # no verdict by the clock
settings.register_profile("suite", derandomize=True, database=None, **SUITE)
settings.register_profile("long", max_examples=10_000, print_blob=True, **SUITE)
settings.load_profile("suite")

OPERATORS = ("linear", "hla2", "ahla", "hla3")
MASKS = ("causal", "prefix", "none")
FORMS = ("chunked", "recurrent", "associative", "dense")
SERIAL = ("recurrent", "associative")  # what mask none does not have
LIBRARIES = ("numpy", "torch", "jax", "array_api_strict", "cupy")
FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = dict.fromkeys(LIBRARIES, FLOATS) | {"array_api_strict": FLOATS[2:]}
ACCELERATORS = {"torch": "cuda", "jax": "cuda", "cupy": "cuda", "numba": "cuda"}  # by library
BUILT_IN = [*backends.TABLE]
INTERPRETERS = {  # backend: what is 1 where it needs no device
    "triton": "TRITON_INTERPRET",
    "pallas": "HLA_PALLAS_INTERPRET",
}

# Error budget: unit roundoff of the wide types, RMS of one rounding of the narrow ones; the same on
# every machine. The core keeps intermediates in float32, so only the output is rounded (1.2).
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}
ROUNDING = {"bfloat16": 1.66e-3, "float16": 2.1e-4}
# Kernels of the narrow types round intermediates too: so many roundings by operator.
ROUNDINGS = {"linear": 2.0, "hla2": 3.0, "ahla": 3.0, "hla3": 3.5}
EXACT = 1e-9  # float64 against the literal sums


def pytest_configure(config):
    """Set filters of warnings that name hla: in pyproject they would import NumPy before this."""
    config.addinivalue_line("filterwarnings", "error::hla.SlowPathWarning")
    # A JAX tracer has no device: where JAX has a GPU, it counts as there, also for host arrays.
    traced = "ignore:running the generic array code .pallas:hla.SlowPathWarning"
    config.addinivalue_line("filterwarnings", traced)
    if cache := getattr(config, "cache", None):  # test processes and later runs share what g++ made
        os.environ.setdefault("HLA_CUDA_HOST_CACHE", str(cache.mkdir("cuda-host")))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage among modules and tests, which stay: that took a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)  # a twelfth of what Triton's interpreter takes
        gc.enable()


def installed(name):
    """Import a library; skips where it is not installed, fails where it is and is broken."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return importlib.import_module(name)


def environment(*folders, **variables) -> dict[str, str]:
    """Environment of a child process: the caller's, these folders and hla's before its own path."""
    kept = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = [*folders, pathlib.Path(hla.__file__).parents[1], *map(os.path.abspath, kept)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables


@functools.cache
def serves(name) -> tuple[tuple[str, bool], ...]:
    """Pairs (library, on an accelerator?) that a backend is picked for; () of what is none."""
    return backends.load(name).capabilities.serves if name in backends.names() else ()


def homes(name) -> tuple[str, ...]:
    """Libraries whose arrays a backend is picked for."""
    found = dict(serves(name))
    return LIBRARIES if ANY in found else tuple(found) or (native(name),)


def of_a_device(name) -> tuple[str, ...]:
    """Libraries of the accelerators that a backend has kernels for.

    Kernels have their own chunks, and round what they hand on to a narrow dtype. A backend that has
    rows on the host too does not have its own library's rows there.
    """
    host = any(x != ANY and not accelerated for x, accelerated in serves(name))
    found = tuple(x for x, accelerated in serves(name) if accelerated and x != ANY)
    found = tuple(x for x in found if not host or x != name)
    return found if found or host else tuple(filter(None, [native(name)]))


@functools.cache
def native(name) -> str:
    """The library of the arrays that a backend's kernels are given."""
    return backends.load(name).capabilities.native if name in backends.names() else ""


def usable(entry) -> bool:
    """Whether a backend can be tested here; fails where what it needs is there and is broken."""
    needs = (*homes(entry.name)[:1], entry.name)
    if entry.available or not all(importlib.util.find_spec(name) for name in needs):
        return entry.available
    for name in needs:
        importlib.import_module(name)
    if os.environ.get(INTERPRETERS.get(entry.name, "")) == "1":  # needs no device
        raise RuntimeError(f"{entry.name} is installed and does not run: {entry.reason}")
    return False


class Row(NamedTuple):
    backend: str
    form: str
    operator: str
    mask: str

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of hla.scan."""
        return self._asdict()


def refused(arrays, **options) -> str:
    """Why a named backend does not do a call; "" where it does."""
    try:
        hla.explain(*arrays, **options)
    except hla.Unsupported as error:
        return str(error)
    return ""


@functools.cache
def place(name, library=None) -> str:
    """Where a backend's arrays of a library lie: on the host if it takes them there."""
    library = library or homes(name)[0]
    if not {(library, False), (ANY, False)}.isdisjoint(serves(name)):
        return "cpu"
    host = load(library).arrays(*draw(2), dtype="float32")  # which an interpreter takes too
    away = library_of(host[0]).on_accelerator(host[0])  # of a library that has no others
    return ACCELERATORS[library] if away or refused(host, backend=name) else "cpu"


@functools.cache
def refusal(backend, form, operator, mask, dtype="float64", gate="none") -> str:
    """Why a backend does not run such a call on arrays of its own library; "" where it does."""
    library = load(homes(backend)[0], place(backend))
    given = {n: library.array(x, "float32") for n, x in gates(gate, 1, 2).items() if np.ndim(x)}
    return refused(
        library.arrays(*draw(1, 2), dtype=dtype),
        **gates(gate, 1, 2) | given, backend=backend, form=form, operator=operator, mask=mask,
    )  # fmt: skip


def rows(
    operators=OPERATORS, masks=MASKS, forms=FORMS, library="numpy", dtype="float64", backends=None
) -> list:
    """Every backend x form x operator x mask that runs here on one library's arrays.

    Those on an accelerator are marked gpu.
    """
    found = []
    for entry in hla.available():
        if backends is not None and entry.name not in backends:
            continue
        if library not in homes(entry.name) or not usable(entry) or dtype not in entry.dtypes:
            continue
        marks = [pytest.mark.gpu] if place(entry.name, library) != "cpu" else []
        for operator, mask, form in itertools.product(operators, masks, forms):
            row = Row(entry.name, form, operator, mask)
            if not refusal(*row, dtype):
                found.append(pytest.param(row, id="-".join(row), marks=marks))
            elif entry.name in BUILT_IN:  # none of these may refuse what all must do
                assert operator in entry.operators
                assert mask == "none" or form in ("associative", "dense", "recurrent")
                assert entry.name != "array_api" or (mask == "none" and form in SERIAL)
    assert found or backends, f"no backend takes {library} arrays"
    return found


def gated(kinds, **selection) -> list:
    """Every row with every kind of gate that its mask and backend allow."""
    return [
        pytest.param(*row.values, kind, id=f"{row.id}-{kind}", marks=row.marks)
        for row in rows(**selection)
        for kind in kinds
        if kind == "none" or row.values[0].mask != "none"
        if row.values[0].backend in BUILT_IN
        or not refusal(*row.values[0], selection.get("dtype", "float64"), kind)
    ]


class Library(NamedTuple):
    name: str
    array: Callable  # (NumPy array, dtype name) -> its array
    numpy: Callable  # its array -> float64 NumPy array
    kind: type  # of its arrays

    def arrays(self, *xs, dtype="float64"):
        return tuple(self.array(x, dtype) for x in xs)


def numpy_dtype(name):
    if name in ("bfloat16", "float8_e4m3fn"):
        return np.dtype(getattr(installed("ml_dtypes"), name))
    return np.dtype(name)


def to_numpy(x):
    return np.asarray(x).astype(np.float64)


@functools.cache
def load(name, place="cpu") -> Library:
    """The adapter of one array library at a place; skips with the reason where it is missing."""
    xp = installed(name)
    if name == "numpy":
        return Library(name, lambda x, d: np.asarray(x, numpy_dtype(d)), to_numpy, np.ndarray)
    if name == "torch":
        return Library(
            name,
            lambda x, d: xp.tensor(np.asarray(x), dtype=getattr(xp, d), device=place),
            lambda x: x.detach().to(xp.float64).cpu().numpy(),
            xp.Tensor,
        )
    if name == "jax":
        xp.config.update("jax_enable_x64", True)
        host = xp.devices(place)[0]
        return Library(  # jnp.asarray would compile two programs for each shape
            name, lambda x, d: xp.device_put(np.array(x, numpy_dtype(d)), host), to_numpy, xp.Array
        )
    if name == "array_api_strict":
        strict = type(xp.asarray(0.0))
        return Library(
            name, lambda x, d: xp.asarray(np.asarray(x), dtype=getattr(xp, d)), to_numpy, strict
        )
    if name == "numba":  # the arrays that its device arrays become in a call
        own = importlib.import_module("hla.kernels.numba.standard")
        return Library(
            name,
            lambda x, d: own.asarray(np.asarray(x, numpy_dtype(d))),
            lambda x: x.get().astype(float),
            own.Array,
        )
    return Library(
        name, lambda x, d: xp.asarray(x, dtype=d), lambda x: xp.asnumpy(x).astype(float), xp.ndarray
    )


def poisoned(empty):
    @functools.wraps(empty)
    def allocate(*args, **kwargs):
        x = empty(*args, **kwargs)
        if x.dtype.kind == "f":
            x[...] = math.nan
        return x

    return allocate


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """What `ahead` reports of a case: it compiles in a process of its own, not interpreted."""
    folder = tmp_path_factory.mktemp("triton")
    python, variables = sys.executable, environment(TRITON_CACHE_DIR=str(folder))
    if other := os.environ.get("HLA_TRITON_PYTHON"):  # which has its own hla
        python = other
        del variables["PYTHONPATH"]
    command, log = [python, pathlib.Path(__file__).with_name("ahead.py")], folder / "errors"
    pipe, processes, reports = subprocess.PIPE, [], {}

    def begin():
        with log.open("w") as file:
            return subprocess.Popen(
                command, env=variables, stdin=pipe, stdout=pipe, stderr=file, text=True
            )

    def compiled(case):
        line = json.dumps(case)
        if line not in reports:
            if not processes or processes[-1].poll() is not None:
                processes.append(begin())
            print(line, file=processes[-1].stdin, flush=True)
            answer = processes[-1].stdout.readline()
            if not answer:
                processes[-1].wait()
            assert answer, log.read_text()
            reports[line] = json.loads(answer)
        return reports[line]

    yield compiled
    for process in processes:
        process.communicate()


@pytest.fixture
def quick_jax():
    """JAX that spends less on compiling what runs a few times."""
    load("jax")
    jax = installed("jax")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield jax
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Empty allocations hold NaN, so that nothing that was never written reaches a result."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, poisoned(getattr(np, name)))


def draw(*shape, seed=0, D=5, V=3, positive=False):
    """Random q, k (*shape, D) and v (*shape, V) in float64."""
    rng = np.random.default_rng([seed, *shape, D, V])
    q, k = rng.standard_normal((2, *shape, D))
    if positive:
        q, k = abs(q) + 0.1, abs(k) + 0.1
    return q, k, rng.standard_normal((*shape, V))


def gates(name, H, T):
    """The gate arguments of one kind (GATES) for H heads."""
    if name == "none":
        return {}
    if name == "decay":
        return {"decay": 0.8}
    if name == "per_head":
        return {"decay": np.linspace(0.6, 1.0, H)}
    a = -np.random.default_rng([H, T]).random((H, T))
    if name == "resets":  # one at the first token, two in one chunk, a head without any
        a[0, [t for t in (0, 5, 6, 12, 100) if t < T]] = -np.inf
    return {"log_gate": a}


GATES = ("none", "decay", "per_head", "log_gate", "resets")


MOVABLE = ("none", "per_head", "resets")


def movable(kind, H, T):
    """Gates away from the edge of their range, so that finite differences can move them."""
    if kind == "none":
        return {}
    if kind == "per_head":
        return {"decay": np.linspace(0.6, 0.9, H)}
    a = gates("log_gate", H, T)["log_gate"] - 0.1
    if kind == "resets":
        a[0, 5] = -np.inf
    return {"log_gate": a}


def states(H, options, inputs, first=None, seed=0):
    """A state the inputs can start from, and a random cotangent of their last one.

    `first` are options of the call that makes the state, on which its type can depend (a decay).
    """
    rng = np.random.default_rng(seed)
    names = {n: x for n, x in options.items() if n not in ("form", "chunk_size", "backend")}
    _, start = hla.scan(*draw(H, 6, seed=seed + 7), return_state=True, **names | (first or {}))
    _, last = hla.scan(return_state=True, **inputs, **options)
    cotangent = type(last)(*(rng.standard_normal(x.shape) for x in last))
    return start, cotangent


def symmetric(name, x):
    """Twice the symmetric part of what belongs to a symmetric field; others as they are."""
    return x + np.swapaxes(x, -1, -2) if name in ("S", "Q") else x


def close(got, want, tol=EXACT, size=None):
    """Assert that float64 arrays agree: shape, finite, largest error against largest value."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.isfinite(want).all()
    assert np.isfinite(got).all()
    if want.size:
        error, size = abs(got - want).max(), size or abs(want).max()
        assert error <= tol * size, f"error {error:.2e} of {size:.2e}, allowed {tol:.0e} relative"


def close_fields(got, want, tol=EXACT):
    """Assert that two states, segments or gradients agree field by field, None with None."""
    assert type(got).__name__ == type(want).__name__
    assert got._fields == want._fields
    for x, y in zip(got, want, strict=True):
        if y is None or x is None:
            assert x is y
        elif hasattr(y, "_fields"):
            close_fields(x, y, tol)
        else:
            close(to_numpy(x), to_numpy(y), tol)


def same(got, want):
    """Assert equal bits (of values; 0.0 is -0.0), NaN where NaN is."""
    np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


def same_fields(got, want):
    assert got._fields == want._fields
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        same(x, y)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def errors(got, want, tokens=64, least=1024):
    """Relative RMS error of the whole and of the worst block.

    Arrays are (..., T, V). A block is one head and 64 consecutive tokens; heads are merged until a
    block has 1024 elements, because with few values a cancellation is not an error.
    """
    assert got.shape == want.shape
    assert np.isfinite(want).all()
    assert np.isfinite(got).all(), "not finite"
    if not want.size:
        return 0.0, 0.0
    T, V = want.shape[-2:]
    got, want = got.reshape(-1, T, V), want.reshape(-1, T, V)
    starts = range(0, max(T - tokens // 2, 1), tokens)  # a short tail belongs to the block before
    worst = 0.0
    for start in starts:
        part = slice(start, None if start == starts[-1] else start + tokens)
        group = math.ceil(least / want[0, part].size)
        for h in range(0, max(len(want) - group // 2, 1), group):
            head = slice(h, h + group if h + group + group // 2 < len(want) else None)
            block = want[head, part]
            worst = max(worst, rms(got[head, part] - block) / (rms(block) or 1e-300))
    return rms(got - want) / (rms(want) or 1e-300), worst


def budget(dtype, *, D, T, decay=None, W=64, gradient=False, operator=None):
    """Allowed relative RMS error (whole, worst block) against float64 on the same rounded input.

    With an operator: of a kernel that rounds this operator's intermediates to the narrow type.
    """
    if dtype in UNIT:
        N = T if decay is None or np.max(decay) == 1 else min(T, 1 / (1 - float(np.max(decay))))
        bound = 4 * UNIT[dtype] * (2 + 0.2 * math.sqrt(D) + 0.3 * math.sqrt(N / W))
        return (1.5 if gradient else 1) * bound, (1.5 if gradient else 1) * bound
    roundings = ROUNDINGS.get(operator, 1.2) + (0.5 if gradient else 0.0)
    bound = roundings * ROUNDING[dtype]
    return bound, 2 * bound


def within_budget(got, want, dtype, **size):
    """Assert the error budget; returns nothing, so that no caller can drop a verdict."""
    whole, worst = errors(got, want)
    most_whole, most_worst = budget(dtype, **{"T": want.shape[-2]} | size)
    assert whole <= most_whole, f"{dtype}: error {whole:.2e} of the whole, allowed {most_whole:.2e}"
    assert worst <= most_worst, f"{dtype}: error {worst:.2e} of a block, allowed {most_worst:.2e}"
