"""Spread independent heads over threads."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.passes import Gate, Shape

Array = np.ndarray[Any, Any]

SPREAD = 1 << 23  # multiply-adds below which a second thread costs more than it brings


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


def spread(job: Callable[[Part], None], batch: Shape, work: int) -> None:
    """Run ``job`` on all heads, on runs of them in as many threads as pay.

    The threads are made for the call: a pool would have to survive forks, and they cost 0.1 ms.
    """
    axis = max(range(len(batch)), key=lambda i: batch[i], default=0)
    heads = batch[axis] if batch else 1
    count = min(heads, _cores())
    if count < 2 or work < SPREAD:
        job(Part(0, slice(None)))
        return
    edges = [heads * i // count for i in range(count + 1)]
    parts = [Part(len(batch) - axis, slice(a, b)) for a, b in itertools.pairwise(edges)]
    errors: list[BaseException] = []

    def guarded(part: Part) -> None:
        try:
            job(part)
        except BaseException as error:
            errors.append(error)  # raised below, in the caller's thread

    threads = [threading.Thread(target=guarded, args=(part,)) for part in parts[1:]]
    for thread in threads:
        thread.start()
    guarded(parts[0])
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
