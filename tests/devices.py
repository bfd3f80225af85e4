"""Rows of devices: kernel backends on the arrays that they are picked for, and calls on them.

A device is an accelerator (its rows are marked gpu), or the host where a backend is interpreted
there. Truth is the core in float64 on the same rounded inputs.
"""

import functools
import importlib
import math
from typing import NamedTuple

import numpy as np
import pytest
from conftest import (
    MASKS,
    OPERATORS,
    budget,
    draw,
    errors,
    load,
    numpy_dtype,
    of_a_device,
    place,
    refusal,
    to_numpy,
    usable,
)
from terms import gates_within_budget, parts

import hla

W = 64  # the widest chunk of any launch table
H = 2
GATES = ("none", "per_head", "resets")
STREAMING = ("causal", "prefix")
CALLS = [(o, m, g) for o in OPERATORS for m in MASKS for g in GATES if g == "none" or m != "none"]


class Device(NamedTuple):
    """A kernel backend, the library whose arrays it is given here, and where they lie."""

    backend: str
    library: str
    place: str
    dtypes: tuple[str, ...]

    @property
    def interpreted(self) -> bool:
        """Whether no accelerator is under it."""
        return self.place == "cpu"

    @property
    def traces(self) -> bool:
        """Whether each class of calls is a program of its own, which takes seconds to compile."""
        return self.library == "jax"

    @property
    def compiles(self) -> bool:
        """Whether it is interpreted and yet compiles every call."""
        return self.interpreted and self.traces

    @property
    def costly(self) -> bool:
        """Whether it is an accelerator that takes tens of seconds to compile a class of calls."""
        return self.traces and not self.interpreted

    @property
    def dtype(self) -> str:
        """The dtype of what does not depend on it."""
        return "float32" if self.interpreted or "bfloat16" not in self.dtypes else "bfloat16"

    @property
    def widths(self) -> dict[str, int]:
        """D and V of what does not depend on them: little work, or few kernels to compile."""
        return {"D": 24, "V": 11} if self.interpreted else {"D": 64, "V": 64}

    @property
    def marks(self) -> list:
        return [] if self.interpreted else [pytest.mark.gpu]

    @property
    def kind(self) -> type:
        return load(self.library, self.place).kind

    def refuses(self, operator="linear", mask="causal", gate="none", dtype=None, **_) -> bool:
        """Whether a row of such a call is none of its own."""
        if (mask == "none" and gate != "none") or (dtype or self.dtype) not in self.dtypes:
            return True
        call = (self.backend, "chunked", operator, mask, dtype or self.dtype)
        return bool(refusal(*call, gate))

    def array(self, x, dtype="float32"):
        """An array of its library; each array of a NamedTuple."""
        lib = load(self.library, self.place)
        return each(lambda y: lib.array(np.asarray(y), dtype), x)

    def arrays(self, inputs, dtype=None):
        """The arrays of a call: q, k, v in the dtype, gates and states in float32."""
        dtype = dtype or self.dtype
        return {n: self.array(x, dtype if n in "qkv" else "float32") for n, x in inputs.items()}

    def inputs(self, T, gate="none", dtype=None, **size):
        """Float64 arrays of a call, of the device's own widths, that the dtype can hold."""
        return inputs_of(T, gate, dtype or self.dtype, **self.widths | size)

    def everything(self, arrays, do, **options):
        """Output, last state and gradients of a call."""
        call = {"backend": self.backend, "return_state": True} | options
        (o, state), pullback = hla.vjp(**arrays, **call)
        return o, state, *pullback(do, state)[:5]


def has_numba(entry) -> bool:
    """Whether it is Numba with a GPU: it does its other rows on the host."""
    return entry.name == "numba" and entry.device not in ("", "cpu")


def dtypes_of(entry) -> tuple[str, ...]:
    """What a device multiplies; Numba's float64 is of the host."""
    return tuple(x for x in entry.dtypes if x != "float64" or not has_numba(entry))


@functools.cache
def devices() -> tuple[Device, ...]:
    """Every kernel backend that runs here; one that is installed and broken fails."""
    found = tuple(
        Device(entry.name, library, place(entry.name, library), dtypes_of(entry))
        for entry in hla.available()
        for library in ("numba",) * has_numba(entry) or of_a_device(entry.name)
        if usable(entry)
    )
    if any(device.backend == "triton" and device.interpreted for device in found):
        importlib.import_module("triton_interpreter").hasten()
    return found


def per_device(names="", cases=((),), where=lambda device: True, sample=(), aot=()):
    """Parametrise a test by device, and by the cases of the other names (a list, or made of it).

    A case whose operator, mask, gate or dtype the backend does not take is none. Of a device that
    compiles every call all but those of a sample, which is the first case if none is given, are
    marked as such, or ``aot`` where they are among those. Of an accelerator cases of one kind of
    kernels follow each other: those that one test process runs it compiles once.
    """
    names, found = names.replace(",", " ").split(), []
    kinds = [names.index(x) for x in ("dtype", "gate", "kind") if x in names]
    for device in filter(where, devices()):
        chosen = [*sample]
        rows = cases(device) if callable(cases) else cases
        rows = [x if isinstance(x, tuple) else (x,) for x in rows]
        if not device.interpreted:
            rows.sort(key=lambda values: [str(values[i]) for i in kinds])
        for values in rows:
            if not device.refuses(**dict(zip(names, values, strict=True))):
                name = "-".join(map(str, (device.backend, *values)))
                chosen = chosen or [values]
                rest = device.compiles and values not in chosen
                mark = pytest.mark.aot if values in aot else pytest.mark.compiled
                marks = [*device.marks, *([mark] if rest else [])]
                found.append(pytest.param(device, *values, id=name, marks=marks))
    return pytest.mark.parametrize(("device", *names), found)


def either(interpreted, accelerated, costly=None):
    """Cases of a device that is interpreted, and of one that compiles a kernel for each class.

    Of one that takes tens of seconds to compile a class those whose kernels no other row has.
    """

    def cases(device):
        if device.interpreted:
            return interpreted
        return costly if device.costly and costly is not None else accelerated

    return cases


def rows_of(where=lambda device: True) -> list:
    """Parameters of a fixture that gives a device, for what needs no accelerator to be proved."""
    return [pytest.param(x, id=x.backend) for x in devices() if where(x)]


def accelerated(device) -> bool:
    return not device.interpreted


def of_torch(device) -> bool:
    return device.library == "torch"


def on_cuda(device) -> bool:
    return of_torch(device) and accelerated(device)


def each(f, x):
    """Apply f to an array or to every array of a NamedTuple."""
    if x is None:
        return None
    return type(x)(*(each(f, y) for y in x)) if hasattr(x, "_fields") else f(x)


def host(x):
    """The float64 values of an array of any library."""
    x = x.detach().double().cpu() if hasattr(x, "detach") else x
    return to_numpy(x.get() if hasattr(x, "get") else x)


def kind_of(x) -> str:
    """The name of an array's dtype."""
    return str(x.dtype).rpartition(".")[2]


def rounded(x, dtype="float32"):
    """Float64 values that the dtype can hold."""
    return each(lambda y: to_numpy(np.asarray(y).astype(numpy_dtype(dtype))), x)


def gate_of(kind, T, heads=H):
    """A gate by its name, in float64 that float32 can hold; resets within and at ends of chunks."""
    if kind == "none":
        return {}
    if kind == "per_head":
        return {"decay": rounded(np.linspace(0.6, 1.0, heads))}
    a = -np.random.default_rng([heads, T]).random((heads, T)) * 0.3
    a[0, [t for t in (0, 5, 6, W - 1, W, T - 1) if 0 <= t < T]] = -np.inf
    return {"log_gate": rounded(a)}


def inputs_of(T, gate="none", dtype="float32", *, D=24, V=11, positive=False, heads=H, seed=0):
    q, k, v = (rounded(x, dtype) for x in draw(heads, T, D=D, V=V, positive=positive, seed=seed))
    return {"q": q, "k": k, "v": v} | gate_of(gate, T, heads)


def state_of(options, gate, seed=7, **shape):
    """A state that calls with these options and such a gate can start from."""
    names = options | ({"decay": 0.9} if gate != "none" else {})  # it decides the paper's type
    start = inputs_of(9, seed=seed, **shape)
    return rounded(hla.scan(**start, backend="array_api", return_state=True, **names)[1])


def run(arrays, options, given, backend):
    """Output, states by field and, of cotangents that are given, every gradient by name."""
    found, pullback = hla.vjp(**arrays, backend=backend, **options)
    o, *state = found if options.get("return_state") else (found,)
    results = {"o": o}
    for x in state:
        results |= {f"state {n}": y for n, y in x._asdict().items()}
    if given is None:
        return results
    gradients = pullback(*given)._asdict()
    start = gradients.pop("dinitial_state")
    results |= {n: x for n, x in gradients.items() if x is not None}
    if start is not None:
        results |= {f"dstate {n}": y for n, y in start._asdict().items()}
    return results


def values(results):
    """Results in float64 on the host; of a symmetric field's gradient what is determined."""
    found = {name: host(x) for name, x in results.items()}
    for name in found.keys() & {"dstate S", "dstate Q"}:
        found[name] = found[name] + found[name].mT
    return found


def cotangents(inputs, options, dtype):
    """A random cotangent of the output and, where a state is asked, of the last state."""
    rng = np.random.default_rng(11)
    shape = np.broadcast_shapes(*(inputs[n].shape[:-1] for n in "qkv"))
    do = rounded(rng.standard_normal((*shape, inputs["v"].shape[-1])), dtype)
    if not options.get("return_state"):
        return (do,)
    few = {n: x[..., :1, :] if n in "qkv" else x for n, x in inputs.items()}
    if "log_gate" in few:
        few["log_gate"] = np.zeros((*few["log_gate"].shape[:-1], few["q"].shape[-2]))
    _, state = hla.scan(**few, backend="array_api", **options)
    return do, each(lambda x: rounded(rng.standard_normal(x.shape)), state)


def measured(got, want):
    """Errors of a result of any rank, whole and of the worst block; a vector is a column."""
    assert got.shape == want.shape
    lead = (1,) * (3 - want.ndim)
    return errors(got.reshape(*lead, *got.shape), want.reshape(*lead, *want.shape))


def check(device, inputs, options, dtype=None):
    """Assert output, state and every gradient of a call within the budget of its dtype.

    The budget is for sums that do not cancel. Of a quotient's gradients, and of the paper's
    recurrences, which are differences, errors are relative to the `parts` that are added.
    """
    dtype = dtype or device.dtype
    given = cotangents(inputs, options, dtype)
    own = (device.array(given[0], dtype), *map(device.array, given[1:]))
    found = run(device.arrays(inputs, dtype), options, own, device.backend)
    verify(device, found, inputs, options, given, dtype)


LEAST = 2.0**-126  # float32's: what is less may be 0


def verify(device, found, inputs, options, given, dtype):
    """Assert what `check` does of the results that were found."""
    want = values(run(inputs, options, given, "array_api"))
    assert found.keys() == want.keys()
    for name, x in found.items():
        assert isinstance(x, device.kind)
        assert device.place in hla.libraries.library_of(x).device_name(x).lower()
        assert kind_of(x) == (dtype if name in ("o", "dq", "dk", "dv") else "float32")
    got = values(found)
    size = {"D": max(inputs["q"].shape[-1], inputs["v"].shape[-1]), "T": inputs["q"].shape[-2]}
    size |= {"decay": inputs.get("decay"), "operator": options["operator"]}
    paper = options.get("convention") == "paper"
    sums = parts(inputs, options, given) if paper or options.get("normalize") else {}
    for name, y in want.items():
        x, y = (np.where(abs(z) < LEAST, 0.0, z) for z in (got[name], y))
        if name in ("ddecay", "dlog_gate"):
            gates_within_budget(x, y, dtype, inputs, options, given, options["operator"])
            continue
        if name in sums and (paper or name != "o"):
            x, y = sums[name] + x - y, sums[name]
        if name.split()[-1][0].islower() and " " in name:  # a denominator's state
            x, y = x[..., None], y[..., None]
        allowed = budget(dtype, gradient=name.startswith("d"), **size)
        for error, most in zip(measured(x, y), allowed, strict=True):
            assert error <= most, f"{name}: error {error:.2e}, allowed {most:.2e}"


def bits(got, want):
    """Assert equal bits of two arrays, or of each two of tuples, NaN where NaN is."""
    assert type(got).__name__ == type(want).__name__
    if isinstance(want, tuple):
        for x, y in zip(got, want, strict=True):
            bits(x, y)
    elif hasattr(want, "detach"):  # on their device: they may be large
        from torch.testing import assert_close

        assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    elif want is not None:
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_array_equal(host(got), host(want))


ALLOCATE = {"torch": ("empty", "empty_strided"), "cupy": ("empty", "empty_like")}


def poison_empty(monkeypatch, library):
    """Have what a library allocates hold NaN, so that what was never written shows in a result."""
    for name in ALLOCATE.get(library, ()):
        xp = __import__(library)
        allocate = getattr(xp, name)

        @functools.wraps(allocate)
        def poisoned(*args, allocate=allocate, **kwargs):
            x = allocate(*args, **kwargs)
            if "float" in str(x.dtype):
                getattr(x, "fill_", getattr(x, "fill", None))(math.nan)
            return x

        monkeypatch.setattr(xp, name, poisoned)


INTEGERS = [(64, 130, 0.03), (32, 67, 0.06)]  # D, T, density


def integers(D, T, density, V=9, most=4):
    """Sparse ternary q, k, do and small integer v: every sum is exact in any order."""
    rng = np.random.default_rng([D, T])
    p = [density / 2, 1 - density, density / 2]
    q, k = rng.choice([-1.0, 0.0, 1.0], (2, 2, T, D), p=p)
    do = rng.choice([-1.0, 0.0, 1.0], (2, T, V), p=p)
    v = rng.integers(-4, 5, (2, T, V)).astype(float)
    return {"q": q, "k": k, "v": np.clip(v, -most, most)}, do
