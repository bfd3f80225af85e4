"""Any array library of the standard: what a call asks of arrays before and around its work."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from ..contract import Capabilities
from ..core.namespace import Array, Library


def compiling() -> bool:
    """Whether torch.compile or a strict torch.export reads the code that is running."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


class Facts(NamedTuple):
    """What a request tells of an array beside its shape."""

    library: str
    device: str  # "traced" where a tracer has none
    dtype: str  # "float32", "bfloat16", "int64", ...
    accelerator: bool  # outside of the host's memory
    traced: bool  # its values are not there yet, or only its type knows where
    tf32: bool  # the library's own switch asks for float32 products in reduced precision


@functools.cache
def _dtype_name(kind: Any, dtype: Any) -> str:  # the kind first: dtypes of two libraries may warn
    return str(dtype).rsplit(".", 1)[-1]


class Generic(Library):
    """What holds for a library of which only the standard is known."""

    strided = True  # whether it takes arrays with strides by DLPack
    rule = ""  # module by which its transforms know any backend

    def facts(self, x: Array) -> Facts:
        """Return everything that a request tells of ``x`` beside its shape."""
        return Facts(
            self.name,
            self.device_name(x),
            self.dtype_name(x),
            self.on_accelerator(x),
            self.traced(x),
            self.tf32(),
        )

    def key(self, x: Array) -> Any:
        """Return what tells `facts` and shape of ``x`` from others', None if nothing.

        It is hashable but for the symbols of a compiler.
        """
        return None

    def dtype_name(self, x: Array) -> str:
        """Bare name of the dtype."""
        kind: Any = type(x.dtype)
        return _dtype_name(kind, x.dtype)

    def device_name(self, x: Array) -> str:
        """Device as text."""
        return str(self.device(x))

    def on_accelerator(self, x: Array) -> bool:
        """Whether ``x`` is outside of the host's memory."""
        return False

    def same_device(self, x: Array, y: Array) -> bool:
        """Whether two arrays are on one device, as far as can be told."""
        return bool(self.device(x) == self.device(y))

    def traced(self, x: Array) -> bool:
        """Whether ``x`` stands for values that are not there yet."""
        return False

    def transformed(self) -> bool:
        """Whether plain types and shapes may stand for something else now."""
        return False

    def tf32(self) -> bool:
        """Whether the library's switch asks for float32 products in reduced precision."""
        return False

    def irregular(self, x: Array) -> tuple[str, str] | None:
        """Tell what keeps ``x`` from being a plain array, and what makes it one; or None."""
        return None

    def plain(self, x: Array) -> Array:
        """Return ``x`` as its memory has it."""
        return x

    def operand(self, x: Array) -> Array:
        """Return ``x`` as the library would multiply it, whatever mode is on."""
        return x

    def concrete(self, number: Any) -> Any:
        """Return the number that a symbol of a compiler stands for, which it then holds fixed."""
        return number

    def number(self, value: float, dtype: Any, like: Array) -> Array:
        """Return a number as an array of no axes, on the device of ``like``."""
        return self.xp.full((), value, dtype=dtype, device=self.device(like))

    def host_values(self, x: Array) -> np.ndarray[Any, Any] | None:
        """Values of a host array as NumPy, or None where reading would wait or fail."""
        try:
            return np.from_dlpack(x)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            return None  # a library that does not share host memory: only shapes are checked

    def wraps(self, capabilities: Capabilities) -> bool:
        """Whether ``rule`` stands for such a backend, so that the library's transforms know it."""
        return False

    def on_memory(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Call a function that reads the memory of the arrays in ``trees``."""
        return function(*trees)

    def lend(self, x: Array, strided: bool) -> Array:
        """Return ``x`` as it can be handed over by DLPack, with or without strides."""
        return x

    def take(self, x: Array) -> Array:
        """Return an array of the memory of ``x``, which another library lends."""
        return self.xp.from_dlpack(x)

    def stream(self, x: Array) -> int | None:
        """Return the stream on which the caller uses ``x``; None where DLPack orders the work."""
        return None

    def on_stream(self, stream: int) -> AbstractContextManager[Any]:
        """Context in which this library works on a stream."""
        return nullcontext()

    def done(self, x: Array) -> Callable[[], bool]:
        """Return what tells whether the work queued until now on x's device is done."""
        return lambda: True

    def in_place(self, request: Any, inputs: Any) -> tuple[Array, Any] | None:
        """Take one token with the state updated in its own memory; None where that cannot be."""
        return None

    def underflow(self) -> AbstractContextManager[Any]:
        """Context in which a result too small for its dtype is 0, whatever np.errstate says."""
        return np.errstate(under="ignore")

    def exact_products(self, x: Array) -> AbstractContextManager[Any]:
        """Context in which float32 products are float32, unless the caller's switch says otherwise.

        In NumPy they may underflow to 0, which is then the right value.
        """
        return self.underflow()

    def run(self, function: Callable[..., Any], request: Any, inputs: Any, *args: Any) -> Any:
        """Call ``function(request, inputs, *args)``, products as exact as the caller asks for."""
        with self.exact_products(inputs.q):
            return function(request, inputs, *args)
