"""Spread independent heads over threads."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.passes import Gate, Shape

Array = np.ndarray[Any, Any]

SPREAD = 1 << 23  # multiply-adds below which a second thread costs more than it brings
RUNS = 2  # runs of heads a thread: more share the work better and make more calls


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


def _cores() -> int:
    """Cores that this process may use; OMP_NUM_THREADS, which limits BLAS, limits it too."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, max(1, int(limit))) if limit.isdecimal() else cores


def spread(job: Callable[[Part, dict[Any, Any]], None], batch: Shape, work: int) -> None:
    """Run ``job`` on all heads, on runs of them in as many threads as pay.

    A thread takes the next run when it is through with one, so that a busy core takes fewer, and
    hands all its jobs one dict for what they reuse. The threads are made for the call: a pool would
    have to survive forks, and they cost 0.1 ms. Where they are as many as the cores each has its
    own: a scheduler may leave threads that live for milliseconds on the core that made them.
    """
    axis = max(range(len(batch)), key=lambda i: batch[i], default=0)
    heads = batch[axis] if batch else 1
    count = min(heads, _cores())
    if count < 2 or work < SPREAD:
        job(Part(0, slice(None)), {})
        return
    runs = min(heads, RUNS * count)
    edges = [heads * i // runs for i in range(runs + 1)]
    todo = iter([Part(len(batch) - axis, slice(a, b)) for a, b in itertools.pairwise(edges)])
    taking = threading.Lock()
    errors: list[BaseException] = []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []

    def take(i: int) -> None:
        held: dict[Any, Any] = {}
        try:
            if count == len(cores):
                with contextlib.suppress(OSError):  # a sandbox may forbid it
                    os.sched_setaffinity(0, {cores[i]})  # of this thread alone
            while True:
                with taking:
                    part = next(todo, None)
                if part is None:
                    return
                job(part, held)
        except BaseException as error:
            errors.append(error)  # raised below, in the caller's thread

    threads = [threading.Thread(target=take, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
