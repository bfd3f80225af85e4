"""CuPy's arrays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import cupy
import numpy as np
from array_api_compat import cupy as xp

from ..core.namespace import Array
from .generic import Generic


class _Lent:
    """A stream of another library, which it keeps alive while it is current there."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version and the stream's address."""
        return 0, self.stream


class CuPy(Generic):
    """CuPy, whose arrays are on a GPU."""

    def key(self, x: Array) -> Any:
        """Return shape, dtype and device, as long as it is no subclass."""
        return (x.shape, x.dtype, x.data.device_id) if type(x) is cupy.ndarray else None

    def on_accelerator(self, x: Array) -> bool:
        """Return True."""
        return True

    def host_values(self, x: Array) -> np.ndarray[Any, Any] | None:
        """Return None: reading would wait for the device."""
        return None

    def lend(self, x: Array, strided: bool) -> Array:
        """Copy what has a negative stride, which would end the process of `torch.from_dlpack`."""
        if any(stride < 0 for stride in x.strides):
            return x.copy()
        return x if strided else self.xp.ascontiguousarray(x)

    def stream(self, x: Array) -> int | None:
        """Return the current stream."""
        stream: int = cupy.cuda.get_current_stream().ptr
        return stream

    def on_stream(self, stream: int) -> AbstractContextManager[Any]:
        """Context in which CuPy works on a stream."""
        context: AbstractContextManager[Any]
        if hasattr(cupy.cuda.Stream, "from_external"):
            context = cupy.cuda.Stream.from_external(_Lent(stream))
        else:  # before CuPy 14
            context = cupy.cuda.ExternalStream(stream)
        return context

    def done(self, x: Array) -> Callable[[], bool]:
        """Return what tells whether the work queued until now is done."""
        event = cupy.cuda.get_current_stream().record()
        return lambda: bool(event.done)

    def underflow(self) -> AbstractContextManager[Any]:
        """Return no context: a GPU reports no underflow."""
        return nullcontext()


CUPY = CuPy("cupy", xp)
