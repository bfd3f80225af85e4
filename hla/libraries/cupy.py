"""CuPy's arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import cupy
import numpy as np
from array_api_compat import cupy as xp

from ..core.namespace import Array
from .generic import Generic

NUMBERS = 256  # that are kept on a device


class _Lent:
    """A stream of another library, which it keeps alive while it is current there."""

    def __init__(self, stream: int) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version and the stream's address."""
        return 0, self.stream


class CuPy(Generic):
    """CuPy, whose arrays are on a GPU."""

    again = "hla.libraries.plain_again"

    def __init__(self) -> None:
        super().__init__("cupy", xp)
        self._numbers: dict[Any, Array] = {}

    def key(self, x: Array) -> Any:
        """Return shape, dtype and device, as long as it is no subclass."""
        return (x.shape, x.dtype, x.data.device_id) if type(x) is cupy.ndarray else None

    def signature(self, x: Array) -> Any:
        """Return shape and dtype, as long as it is no subclass."""
        return (x.shape, x.dtype) if type(x) is cupy.ndarray else None

    def alike(self, arrays: Sequence[Array]) -> Callable[[list[Array]], list[int] | None] | None:
        """Return what tells arrays like these: type, shape, strides, dtype, device, alignment."""
        if any(type(x) is not cupy.ndarray for x in arrays):
            return None
        kinds = [cupy.ndarray] * len(arrays)
        same = [(x.shape, x.strides, x.dtype) for x in arrays]
        places = [(x.data.device_id, x.data.ptr & 15) for x in arrays]

        def addresses(arrays: list[Array]) -> list[int] | None:
            if [*map(type, arrays)] != kinds:
                return None
            if [(x.shape, x.strides, x.dtype) for x in arrays] != same:
                return None
            memory = [x.data for x in arrays]
            found = [x.ptr for x in memory]
            there = [(x.device_id, p & 15) for x, p in zip(memory, found, strict=True)]
            return found if there == places else None

        return addresses

    def address(self, x: Array) -> int:
        """Return where its memory starts."""
        address: int = x.data.ptr
        return address

    def number(self, value: float, dtype: Any, like: Array) -> Array:
        """Return a number, kept on each stream: to write one takes as long as to launch a pass."""
        device, stream = like.data.device_id, cupy.cuda.get_current_stream()
        key = value, dtype, device, stream.ptr
        found = self._numbers.get(key)
        if found is None:
            with cupy.cuda.Device(device):
                found = cupy.full((), value, dtype)
                captured = stream.is_capturing()  # which has yet to write it
            if not captured:
                if len(self._numbers) >= NUMBERS:
                    self._numbers.clear()
                self._numbers[key] = found
        return found

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


CUPY = CuPy()
