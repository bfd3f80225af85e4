"""The calls that `hla bench` and the asv suite time: backends, data, and the right results.

A library is imported when a workload first uses it. `peers` has what the backends are compared
with.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import hla

from .. import backends
from ..contract import ANY
from .libraries import Array, Arrays, Call, Host, Library, load, to_host

OPERATORS = ("hla2", "ahla", "hla3", "linear")
WORKLOADS = ("forward", "forward + backward", "step")
COMPILED = "compiled step"  # one step, under a compiler that is not the library's only way
HOST = ("host forward", "host forward + backward", "host step")  # until the call has returned
DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2}  # float16 overflows without decay
GATES = ("none", "decay", "log_gate")
BLOCK, VALUES = 64, 1024  # an error is that of the worst block of so many tokens and values
PIECE = 8192  # tokens of truth computed at a time, so that its memory does not grow with T
KEPT = 1 << 25  # numbers of truth that are kept for the next row
LARGE = 1 << 23  # numbers in q above which truth is computed of two heads only
DECAY = 1 - 2.0**-6  # exact in float32, so that truth has the same decay


class Case(NamedTuple):
    """The size of one workload: D = V = width; q is scaled by 1 / sqrt(D)."""

    operator: str = "hla2"
    tokens: int = 4096
    heads: int = 8
    width: int = 64
    dtype: str = "float32"
    gate: str = "none"
    batch: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of q: (B, H, T, D)."""
        return self.batch, self.heads, self.tokens, self.width

    @property
    def bytes(self) -> int:
        """Those of q."""
        return DTYPES[self.dtype] * math.prod(self.shape)

    @property
    def scale(self) -> float:
        """What q is multiplied by."""
        return float(self.width**-0.5)


CALL = Case(tokens=64, heads=1, dtype="bfloat16")  # whose work is less than that to start it


class Target(NamedTuple):
    """One backend with the arrays of one library, on the host or on an accelerator."""

    backend: str
    library: str
    accelerator: bool = False

    def __str__(self) -> str:
        return f"{self.backend}/{self.library}/{'gpu' if self.accelerator else 'cpu'}"


class Work(NamedTuple):
    """One thing to time, and the error of what it returns."""

    run: Call
    error: Callable[[Arrays], float]
    limit: float


class Wrong(ArithmeticError):
    """A result is further from the float64 truth than its dtype allows."""


def targets() -> tuple[Target, ...]:
    """Return every pair that a backend is picked for, whether or not this machine can run it.

    One that is taken by name alone is timed on an accelerator, with the arrays of its own library.
    """
    homes = [(name, False) for name in ("numpy", "torch", "jax")]
    homes += [(name, True) for name in ("torch", "jax", "cupy", "numba")]
    found = []
    for name in backends.names():
        backend = backends.load(name).capabilities
        own = ((backend.native, True),) if backend.native else ()
        for library, accelerator in backend.serves or own:
            some = [h for h in homes if library in (h[0], ANY) and h[1] == accelerator]
            found += [Target(name, *home) for home in some or [(library, accelerator)]]
    return tuple(found)


@functools.lru_cache(maxsize=2)
def draw(shape: tuple[int, ...], dtype: str) -> tuple[Host, ...]:
    """Draw q, k, v and do, (B, H, T, D), and the log gate, (B, H, T); all exact in dtype."""
    if math.prod(shape) > sys.maxsize // 8:
        raise MemoryError(f"no memory holds an array of shape {shape}")
    rng, wide = np.random.default_rng(0), np.float64 if dtype == "float64" else np.float32
    xs = [rng.standard_normal(shape, dtype=wide) for _ in range(4)]
    xs.append(-rng.random(shape[:3], dtype=wide) / 32)
    if dtype == "bfloat16":
        for x in xs:
            bits = x.view(np.uint32)
            bits &= 0xFFFF0000
    return tuple(xs)


def inputs(case: Case) -> tuple[Host, ...]:
    """Return q, k, v, do and the log gate of a case."""
    return draw(case.shape, case.dtype)


def sample(x: Array, case: Case) -> Host:
    """Bring an array (B, H, ...) to NumPy in float64; of a large case the first and last head.

    No head depends on another, so their truth needs no other; the two come as (2, 1, ...).
    """
    if case.batch * case.heads <= 2 or math.prod(case.shape) <= LARGE:
        return to_host(x)
    return np.stack([to_host(x[0, :1]), to_host(x[-1, -1:])])


def _options(case: Case, gate: Array) -> dict[str, Any]:
    options: dict[str, Any] = {"operator": case.operator, "scale": case.scale}
    if case.gate == "decay":
        options["decay"] = DECAY
    elif case.gate == "log_gate":
        options["log_gate"] = gate
    return options


def work(target: Target, workload: str, case: Case) -> Work:
    """Prepare a call of hla.

    Parameters
    ----------
    target : Target
        Which backend, on which arrays.
    workload : {"forward", "forward + backward", "step"}, `COMPILED` or one of `HOST`
        `hla.scan`; the same and the gradients of q, k and v (torch.autograd, jax.vjp, `hla.vjp`);
        or one `hla.step` from the state after T - 1 tokens. JAX is timed under one jax.jit.
    case : Case
        Operator and size.

    Raises
    ------
    NotImplementedError
        The library or the hardware is missing, or the backend refuses (`hla.Unsupported`).
    """
    lib = awaited(load(target.library, target.accelerator), workload)
    workload = workload.removeprefix("host ")
    *qkv, do, gate = inputs(case)
    if workload in ("step", COMPILED):
        return _step(compiler(lib, workload), lib, case, target.backend)
    q, k, v = (lib.array(x, case.dtype) for x in qkv)
    log_gate = lib.array(gate, case.dtype) if case.gate == "log_gate" else None
    options = {**_options(case, log_gate), "backend": target.backend}

    def function(q: Array, k: Array, v: Array) -> Array:
        return hla.scan(q, k, v, **options)

    def host_vjp(q: Array, k: Array, v: Array, do: Array) -> Arrays:
        o, pullback = hla.vjp(q, k, v, **options)
        return (o, *pullback(do)[:3])

    if workload == "forward":
        timed = lib.compile(lambda q, k, v: (function(q, k, v),))
        arrays: Arrays = (q, k, v)
    else:
        timed = lib.compile(lib.vjp(function) if lib.vjp else host_vjp)
        arrays = (q, k, v, lib.array(do, case.dtype))
    error = against_truth(workload, case)
    return Work(Call(lambda: timed(*arrays), lib), error, _limit(workload, case))


def awaited(lib: Library, workload: str) -> Library:
    """Return a library as it is timed: for the host's time nothing is awaited, nor metered."""
    return lib._replace(wait=lambda out: out, meter=None) if workload in HOST else lib


def compiler(lib: Library, workload: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what compiles one step; NotImplementedError where none does beside the library's."""
    if workload != COMPILED:
        return lib.compile
    if lib.fuse is None:
        raise NotImplementedError("no compiler but its own, if any")
    return lib.fuse


def _step(compiled: Callable[..., Any], lib: Library, case: Case, backend: str) -> Work:
    *qkv, _, gate = inputs(case)

    def of(tokens: Any) -> tuple[Arrays, dict[str, Any]]:
        """Take tokens on the host: not every library's arrays have NumPy's indices."""
        q, k, v = (lib.array(x[:, :, tokens], case.dtype) for x in qkv)
        log_gate = lib.array(gate[:, :, tokens], case.dtype) if case.gate == "log_gate" else None
        return (q, k, v), {**_options(case, log_gate), "backend": backend}

    (past, before), (token, now) = of(slice(None, -1)), of(-1)
    _, state = hla.scan(*past, return_state=True, **before)
    timed = compiled(lambda q, k, v, state: hla.step(q, k, v, state, **now))
    error = against_truth("step", case)
    return Work(Call(lambda: timed(*token, state), lib), error, _limit("step", case))


def _truth(workload: str, case: Case) -> Iterator[tuple[int, Arrays]]:
    """Yield (first token, results from there on) in float64, piece by piece."""
    if workload == "forward + backward":
        *qkv, do, gate = (sample(x, case) for x in inputs(case))
        o, pullback = hla.vjp(*qkv, backend="array_api", **_options(case, gate))
        yield 0, (o, *pullback(do)[:3])
        return
    state = None
    for start in range(0, case.tokens, PIECE):
        piece = (sample(x[:, :, start : start + PIECE], case) for x in inputs(case))
        q, k, v, _, gate = piece
        options = {**_options(case, gate), "backend": "array_api"}
        o, state = hla.scan(q, k, v, initial_state=state, return_state=True, **options)
        if workload == "forward":
            yield start, (o,)
    if workload == "step":
        yield 0, (o[..., -1:, :],)


@functools.lru_cache(maxsize=1)
def _kept(workload: str, case: Case) -> tuple[tuple[int, Arrays], ...]:
    """Keep the truth of the last case, which every backend and peer is held against in turn."""
    return tuple(_truth(workload, case))


def against_truth(workload: str, case: Case) -> Callable[[Arrays], float]:
    """Return the function that gives the error of a workload's results (see `sample`)."""

    def error(got: Arrays) -> float:
        found = [sample(x, case) for x in (got[:1] if workload == "step" else got)]
        if workload == "step":
            found = [x[..., None, :] for x in found]
        worst = 0.0
        for start, want in (_kept if found[0].size <= KEPT else _truth)(workload, case):
            for x, y in zip(found, want, strict=True):
                worst = max(worst, block_error(x[..., start : start + y.shape[-2], :], y))
        return worst

    return error


def block_error(got: Host, want: Host) -> float:
    """Relative RMS error of the worst block of one head; of (..., T, V) arrays."""
    size = max(BLOCK, math.ceil(VALUES / want.shape[-1]))
    starts = range(0, max(1, want.shape[-2] - size // 2), size)
    worst = 0.0
    for start in starts:
        part = np.s_[..., start : None if start == starts[-1] else start + size, :]
        missed = np.square(got[part] - want[part]).sum(axis=(-1, -2))
        ratio = np.sqrt(missed / np.square(want[part]).sum(axis=(-1, -2)))
        worst = max(worst, math.inf if np.isnan(ratio).any() else float(ratio.max()))
    return worst


def _limit(workload: str, case: Case) -> float:
    """Largest error that counts as right; the formulas are those of the numerics page."""
    back = workload == "forward + backward"
    if case.dtype == "bfloat16":
        rounded = {"linear": 2.0, "hla2": 3.0, "ahla": 3.0, "hla3": 3.5}[case.operator]
        return 2 * 1.66e-3 * (rounded + 0.5 * back)
    unit = 2.0**-53 if case.dtype == "float64" else 2.0**-24
    growth = 2 + 0.2 * math.sqrt(case.width) + 0.3 * math.sqrt(case.tokens / BLOCK)
    return 4 * unit * growth * (1.5 if back else 1)


def checked(one: Work) -> float:
    """Run once, which also warms up, and return the error; raise `Wrong` where it is too large."""
    error = one.error(one.run())
    if not error <= one.limit:
        raise Wrong(f"its error is {error:.1e}, allowed {one.limit:.1e}")
    return error
