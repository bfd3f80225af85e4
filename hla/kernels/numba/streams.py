"""The stream of this thread, on which memory is allocated and kernels are launched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT = 1  # the legacy default stream, as the CUDA Array Interface numbers it: Numba's stream 0


class _Local(threading.local):
    stream = DEFAULT


_local = _Local()


def current() -> int:
    """Return the stream's address, or the number of a default one."""
    return _local.stream


@contextmanager
def on(stream: int) -> Iterator[None]:
    """Context in which a stream is the current one."""
    before, _local.stream = _local.stream, stream or DEFAULT
    try:
        yield
    finally:
        _local.stream = before
