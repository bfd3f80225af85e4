"""Spread independent heads over threads, as many as BLAS may have."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np

from ...core.passes import Gate, Shape

Array = np.ndarray[Any, Any]

SPREAD = 1 << 23  # multiply-adds below which a second thread costs more than it brings
RUNS = 2  # runs of heads a thread: more share the work better and make more calls
LIMITS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

_lock = threading.Lock()
_working = 0  # threads of all calls under way


class Part:
    """A run of heads on one batch axis, counted from the last, which is 1; 0 takes all heads."""

    def __init__(self, axis: int, heads: slice) -> None:
        self.axis, self.heads, self.first = axis, heads, not heads.start

    def __call__(self, x: Array, features: int) -> Array:
        """Return these heads of ``x``, which has ``features`` axes beyond the batch."""
        place = x.ndim - features - self.axis
        if self.axis == 0 or place < 0 or x.shape[place] == 1:
            return x
        return x[(slice(None),) * place + (self.heads,)]

    def output(self, x: Array, features: int) -> Array:
        """Return these heads of an array to write: a private one where threads would share it."""
        part = self(x, features)
        return part if self.first or part is not x else np.empty_like(x)

    def gate(self, gate: Gate) -> Gate:
        """Return the gate of these heads."""
        return Gate(
            None if gate.decay is None else self(gate.decay, 0),
            None if gate.log_gate is None else self(gate.log_gate, 1),
        )


def _most() -> int:
    """Threads that BLAS may have: the least of this process's cores and of every limit set."""
    limits = [cores()]
    for name in LIMITS:  # as BLAS reads them: "4,2" is 4; what is no number above 0 is no limit
        found = re.match(r"\s*\+?(\d+)", os.environ.get(name, ""), re.ASCII)
        limits.append(int(found[1]) if found else 0)
    controller = _controller()
    if controller is not None:  # as threadpoolctl, or BLAS's own switch, has it now
        limits += [pool["num_threads"] for pool in controller.info()]
    return min(limit for limit in limits if limit)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _controller() -> Any:
    """Return threadpoolctl's view of the loaded BLAS, NumPy's among them; None without it."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    import threadpoolctl

    controller = getattr(threadpoolctl, "ThreadpoolController", None)  # from its version 3
    return controller and controller().select(user_api="blas")


@contextlib.contextmanager
def _share(wanted: int) -> Iterator[int]:
    """Yield how many threads a call has: those of calls that run at one time share the limit."""
    global _working
    limit = _most()
    with _lock:
        count = max(1, min(wanted, limit - _working))
        _working += count
    try:
        yield count
    finally:
        with _lock:
            _working -= count


def _forked() -> None:
    """Forget the threads that a child process does not have."""
    global _lock, _working
    _lock, _working = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def spread(job: Callable[[Part, dict[Any, Any]], None], batch: Shape, work: int) -> None:
    """Run ``job`` on all heads, on runs of them in as many threads as pay; the caller's is one.

    A thread takes the next run when it is through with one, so that a busy core takes fewer, and
    hands all its jobs one dict for what they reuse. It sees the caller's context (np.errstate). The
    threads are made for the call: a pool would have to survive forks, and they cost 0.1 ms.
    """
    axis = max(range(len(batch)), key=lambda i: batch[i], default=0)
    heads = batch[axis] if batch else 1
    if heads < 2 or work < SPREAD:
        job(Part(0, slice(None)), {})
        return
    with _share(heads) as count:
        if count < 2:
            job(Part(0, slice(None)), {})
            return
        runs = min(heads, RUNS * count)
        edges = [heads * i // runs for i in range(runs + 1)]
        parts = [Part(len(batch) - axis, slice(a, b)) for a, b in itertools.pairwise(edges)]
        ends = [None] * count  # each thread takes one of these last
        todo: deque[Part | None] = deque([*parts, *ends])

        def take() -> None:
            held: dict[Any, Any] = {}
            try:
                for part in iter(todo.popleft, None):
                    job(part, held)
            except BaseException:
                todo.extendleft(ends)  # nobody needs the rest
                raise

        others: list[Future[None]] = []
        with ThreadPoolExecutor(count - 1, "hla") as pool:
            with contextlib.suppress(RuntimeError):  # no thread to be had, as at Python's exit
                for _ in range(count - 1):
                    others.append(pool.submit(copy_context().run, take))
            take()
            pool.shutdown(cancel_futures=True)
        for other in others:
            if not other.cancelled():
                other.result()
