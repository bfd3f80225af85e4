"""How `hla bench` makes, awaits, differentiates and meters the arrays of each library.

A library is imported when its adapter is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any
Host = np.ndarray[Any, Any]
Arrays = tuple[Array, ...]

COLD = 1 << 28  # bytes written before a timed call: more than any second-level cache holds
MOST = 1000  # calls in one queue
QUEUES = 4  # that a library without events is timed by


class Meter(NamedTuple):
    """An accelerator's own measurements of a call: seconds, and the peak of bytes in use."""

    seconds: Callable[[Callable[[], Arrays], float], list[float]]
    bytes_beyond: Callable[[Callable[[], Arrays]], int] | None = None


class Library(NamedTuple):
    """How to make, await, compile, differentiate with and meter the arrays of one library."""

    array: Callable[[Host, str], Array]
    wait: Callable[[Arrays], Arrays]
    compile: Callable[[Callable[..., Any]], Callable[..., Any]]
    vjp: Callable[[Callable[..., Array]], Callable[..., Arrays]] | None = None
    meter: Meter | None = None
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None  # a compiler by choice


@dataclasses.dataclass(frozen=True)
class Call:
    """One thing to time: `start` may return before the work is done, a call of this waits."""

    start: Callable[[], Arrays]
    lib: Library

    def __call__(self) -> Arrays:
        """Return the results once they are there."""
        return self.lib.wait(self.start())


@functools.cache
def load(name: str, accelerator: bool) -> Library:
    """Return the adapter of one library; NotImplementedError says why there is none here."""
    if name not in ADAPTERS or importlib.util.find_spec(name) is None:
        raise NotImplementedError(f"{name} is not installed")
    return ADAPTERS[name](accelerator)


def _numpy(accelerator: bool) -> Library:
    def array(x: Host, dtype: str) -> Array:
        if dtype != "bfloat16":
            return np.ascontiguousarray(x, dtype)
        if importlib.util.find_spec("ml_dtypes") is None:
            raise NotImplementedError("bfloat16 for NumPy needs ml_dtypes")
        return x.astype(importlib.import_module("ml_dtypes").bfloat16)

    return Library(array, lambda out: out, lambda f: f)


def _torch(accelerator: bool) -> Library:
    import torch

    if accelerator and not torch.cuda.is_available():
        raise NotImplementedError("torch sees no accelerator")
    device = "cuda" if accelerator else "cpu"

    def wait(out: Arrays) -> Arrays:
        if accelerator:
            torch.cuda.synchronize()
        return out

    def vjp(f: Callable[..., Array]) -> Callable[..., Arrays]:
        def run(q: Array, k: Array, v: Array, do: Array) -> Arrays:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            o = f(*leaves)
            return (o, *torch.autograd.grad(o, leaves, do))

        return run

    def array(x: Host, dtype: str) -> Array:
        return torch.from_numpy(x).to(device, getattr(torch, dtype))

    def fuse(f: Callable[..., Any]) -> Callable[..., Any]:
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise NotImplementedError("torch.compile needs a C++ compiler")
        compiled: Callable[..., Any] = torch.compile(f, fullgraph=True)
        return compiled

    meter = Meter(event_seconds, bytes_beyond) if accelerator else None
    return Library(array, wait, lambda f: f, vjp, meter, fuse)


def event_seconds(start: Callable[[], Arrays], seconds: float) -> list[float]:
    """Time calls between two events of torch's current stream (see `between_events`)."""
    import torch

    cold = torch.empty(COLD, dtype=torch.uint8, device="cuda")

    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)

    def passed(before: Any, after: Any) -> float:
        return float(before.elapsed_time(after))

    return between_events(start, seconds, cold.zero_, event, passed, torch.cuda.synchronize)


def between_events(
    start: Callable[[], Arrays],
    seconds: float,
    write: Callable[[], Any],
    event: Callable[[], Any],
    passed: Callable[[Any, Any], float],
    wait: Callable[[], Any],
) -> list[float]:
    """Time calls between two events each, with caches cold before each.

    As `triton.testing.do_bench` does: the calls are queued, so that the device waits for Python
    only where Python is the slower of the two, and then the events say so.

    Parameters
    ----------
    start : callable
        Starts the work; need not wait for it.
    seconds : float
        Of calls that count, about; at least one.
    write : callable
        Writes more than the caches hold.
    event, passed, wait : callable
        Make an event, give the milliseconds between two, wait for the device.

    Returns
    -------
    list of float
        Seconds of every call.
    """

    def queue(calls: int) -> list[float]:
        pairs = [(event(), event()) for _ in range(calls)]
        for before, after in pairs:
            write()
            before.record()
            start()
            after.record()
        wait()
        return [1e-3 * passed(*pair) for pair in pairs]

    queue(1)  # the call that nothing is warm for
    begun = time.perf_counter()
    queue(2)
    each = (time.perf_counter() - begun) / 2
    return queue(max(1, min(MOST, int(seconds / each))))


def bytes_beyond(start: Callable[[], Arrays]) -> int:
    """Bytes that a call takes of torch's device memory at its peak, beyond what it returns."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = start()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results))


def _jax(accelerator: bool) -> Library:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need room too
    import jax

    if accelerator and jax.default_backend() == "cpu":
        raise NotImplementedError("JAX sees no accelerator")
    place = jax.devices(None if accelerator else "cpu")[0]

    def vjp(f: Callable[..., Array]) -> Callable[..., Arrays]:
        def run(q: Array, k: Array, v: Array, do: Array) -> Arrays:
            o, pullback = jax.vjp(f, q, k, v)
            return (o, *pullback(do))

        return run

    def array(x: Host, dtype: str) -> Array:
        if dtype == "float64" and not jax.config.jax_enable_x64:
            raise NotImplementedError("JAX has no float64 here; set JAX_ENABLE_X64=1")
        return jax.device_put(x.astype(jax.numpy.dtype(dtype)), place)

    write = jax.jit(lambda x: x + 1, donate_argnums=0)
    meter = Meter(functools.partial(queued_seconds, write)) if accelerator else None
    return Library(array, jax.block_until_ready, jax.jit, vjp, meter)


def queued_seconds(
    write: Callable[[Array], Array], start: Callable[[], Arrays], seconds: float
) -> list[float]:
    """Time calls of JAX, which has no events, in queues, with caches cold before each call.

    As `event_seconds` does, but by the host's clock: each sample is the time of a queue less the
    least of as long queues of the writes that empty the caches, divided by its calls. The least,
    since the host may see the end of any queue late, by milliseconds where others use its cores,
    and none early: less its own queue of writes a sample could be shorter than the work.

    Parameters
    ----------
    write : callable
        Writes an array anew where it lies.
    start : callable
        Starts the work; need not wait for it.
    seconds : float
        Of queues that count, about; at least one call in each.

    Returns
    -------
    list of float
        Seconds a call, of every queue.
    """
    import jax

    cold = write(jax.numpy.zeros(COLD, "uint8"))

    def queue(calls: int, start: Callable[[], Arrays]) -> float:
        nonlocal cold
        begun, out = time.perf_counter(), ()
        for _ in range(calls):
            cold = write(cold)
            out = start()
        jax.block_until_ready((out, cold))
        return time.perf_counter() - begun

    queue(1, start)  # the call that nothing is warm for
    each = queue(2, start) / 2
    calls = max(1, min(MOST, int(seconds / each / QUEUES)))
    both = [(queue(calls, start), queue(calls, tuple)) for _ in range(QUEUES)]
    writes = min(alone for _, alone in both)
    return [(whole - writes) / calls for whole, _ in both]


def _cupy(accelerator: bool) -> Library:
    cupy = importlib.import_module("cupy")

    def array(x: Host, dtype: str) -> Array:
        if dtype == "bfloat16":
            return cupy.asarray(_numpy(False).array(x, dtype))
        return cupy.asarray(x, dtype)

    def wait(out: Arrays) -> Arrays:
        cupy.cuda.get_current_stream().synchronize()
        return out

    return Library(array, wait, lambda f: f, meter=Meter(_cupy_seconds, _cupy_beyond))


def _cupy_seconds(start: Callable[[], Arrays], seconds: float) -> list[float]:
    """Time calls between two events of CuPy's current stream (see `between_events`)."""
    cuda = importlib.import_module("cupy").cuda
    cold = importlib.import_module("cupy").empty(COLD, "uint8")
    wait = cuda.get_current_stream().synchronize
    return between_events(
        start, seconds, lambda: cold.fill(0), cuda.Event, cuda.get_elapsed_time, wait
    )


def _cupy_beyond(start: Callable[[], Arrays]) -> int:
    """Bytes that a call takes of CuPy's memory pool at its peak, beyond what it returns."""
    cupy = importlib.import_module("cupy")

    class Peak(cupy.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        """Count the bytes that are taken from the pool and not given back."""

        name = "peak"
        used = most = 0

        def malloc_postprocess(self, *, mem_size: int, **about: Any) -> None:
            self.used += mem_size
            self.most = max(self.most, self.used)

        def free_postprocess(self, *, mem_size: int, **about: Any) -> None:
            self.used -= mem_size

    with Peak() as peak:
        results = start()
    return int(peak.most - sum(x.nbytes for x in results))


def _numba(accelerator: bool) -> Library:
    from ..kernels.numba import package

    if not package.installed() or package.SIMULATED or not package.cuda.is_available():
        raise NotImplementedError("Numba sees no accelerator")
    cuda = package.cuda

    def array(x: Host, dtype: str) -> Array:
        found = np.ascontiguousarray(_numpy(False).array(x, dtype))
        bits = found.view(f"u{found.itemsize}")  # Numba copies no array of bfloat16
        return cuda.to_device(bits).view(found.dtype)

    def wait(out: Arrays) -> Arrays:
        cuda.synchronize()
        return out

    return Library(array, wait, lambda f: f, meter=Meter(_numba_seconds))


def _numba_seconds(start: Callable[[], Arrays], seconds: float) -> list[float]:
    """Time calls between two events of Numba's default stream (see `between_events`)."""
    from ..kernels.numba import package

    cuda = package.cuda
    cold, other = (cuda.device_array(COLD, np.uint8) for _ in range(2))
    event = functools.partial(cuda.event, timing=True)
    return between_events(
        start,
        seconds,
        lambda: cold.copy_to_device(other),
        event,
        cuda.event_elapsed_time,
        cuda.synchronize,
    )


ADAPTERS: dict[str, Callable[[bool], Library]] = {
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
    "numba": _numba,
}


def to_host(x: Array) -> Host:
    """Bring any library's array to NumPy in float64."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double()
    elif hasattr(x, "copy_to_host"):
        bits = x.view(f"u{x.dtype.itemsize}")  # Numba copies no array of bfloat16
        x = bits.copy_to_host().view(x.dtype)
    elif hasattr(x, "get"):
        x = x.get()
    return np.asarray(x).astype(np.float64)
