"""torch's tensors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from array_api_compat import torch as xp
from torch import Tensor

from ..contract import Capabilities
from ..core.namespace import Array
from ..core.request import Inputs, Request
from . import torch_tracing as tracing
from .generic import Generic, compiling
from .torch_alike import alike
from .torch_memory import PLAIN, on_memory

NUMBERS = 256  # that are kept on a device
HALF = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts
_precision: Any = torch._C._get_fp32_precision_getter  # what torch.backends.cuda.matmul asks
WRAPPERS = {  # each imported where there is one; what makes it plain
    ("torch.distributed.tensor", "DTensor"): "x.full_tensor(), or x.to_local() for its part",
    ("torch.masked", "MaskedTensor"): "x.to_tensor(0.0)",
}


class Torch(Generic):
    """PyTorch."""

    rule = "hla.libraries.torch_rule"
    again = "hla.libraries.torch_again"

    def __init__(self) -> None:
        super().__init__("torch", xp)
        self._placed: dict[Any, Tensor] = {}
        self._numbers: dict[Any, Tensor] = {}

    def key(self, x: Array) -> Any:
        """Return type, shape, dtype and device, as long as it is plain memory."""
        if x.layout is not torch.strided or x.is_nested or x.is_neg():
            return None
        if type(x) not in PLAIN and _wrapper(x):
            return None
        return type(x), x.shape, x.dtype, x.device

    def signature(self, x: Array) -> Any:
        """Return shape and dtype of what may be plain memory."""
        if type(x) not in PLAIN or x.is_nested or torch._C._is_tracing():
            return None
        return x.shape, x.dtype

    def alike(self, arrays: Sequence[Array]) -> Callable[[list[Array]], list[int] | None] | None:
        """Return what tells tensors like these, by one question to torch: see `torch_alike`."""
        return alike(arrays)

    def address(self, x: Array) -> int:
        """Return where its memory starts."""
        address: int = x.data_ptr()
        return address

    def device(self, x: Array) -> Any:
        """Return its device."""
        return x.device

    def on_accelerator(self, x: Array) -> bool:
        """Whether it is neither on the CPU nor without memory."""
        return x.device.type not in ("cpu", "meta")

    traced = staticmethod(tracing.traced)
    transformed = staticmethod(tracing.transformed)

    def tf32(self) -> bool:
        """Whether torch.backends.cuda.matmul asks for it, however it was set."""
        return bool(_precision("cuda", "matmul") == "tf32")

    def irregular(self, x: Array) -> tuple[str, str] | None:
        """Tell nested, quantized and sparse tensors, and wrappers of several."""
        if x.is_nested:
            return "is a nested tensor", "torch.nested.to_padded_tensor(x, 0.0)"
        if x.is_quantized:
            return "is quantized", "x.dequantize()"
        if x.layout is not torch.strided:
            return f"has layout {x.layout}", "x.to_dense()"
        return _wrapper(x)

    def plain(self, x: Array) -> Array:
        """Return its values, where torch has yet to negate them: a conjugate's imaginary part."""
        return x.resolve_neg() if x.is_neg() and not compiling() else x

    def operand(self, x: Array) -> Array:
        """Cast as torch.autocast, where it is on, casts the operands of a product."""
        x = self.plain(x) if x.is_neg() else x
        if torch._C._is_any_autocast_enabled() and _autocast_is_on(x) and x.dtype in HALF:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def wraps(self, capabilities: Capabilities) -> bool:
        """Whether its operator stands for a backend: for any that autograd cannot see through."""
        return capabilities.opaque

    def concrete(self, number: Any) -> Any:
        """Return the number that a symbol of torch's compiler stands for."""
        return float(number) if isinstance(number, torch.SymFloat) else number

    def number(self, value: float, dtype: Any, like: Array) -> Array:
        """Return a number, kept on each stream: to write one takes as long as to launch a pass."""
        if not like.is_cuda or type(like) not in (Tensor, torch.nn.Parameter) or compiling():
            return super().number(value, dtype, like)
        stream = torch._C._cuda_getCurrentRawStream(like.device.index)
        key = value, dtype, like.device, stream
        if key not in self._numbers:
            with torch.inference_mode(False):
                made = torch.full((), value, dtype=dtype, device=like.device)
            captured = torch.cuda.is_current_stream_capturing()  # which has yet to write it
            if captured or type(made) is not Tensor or tracing.wrapped(made):
                return made
            if len(self._numbers) >= NUMBERS:
                self._numbers.clear()
            self._numbers[key] = made
        return self._numbers[key]

    def host_values(self, x: Array) -> np.ndarray[Any, Any] | None:
        """Read a tensor on the CPU that is there."""
        if self.traced(x) or self.on_accelerator(x):
            return None
        with tracing.untransformed():
            x = x.detach().resolve_neg()
            return np.asarray(x.double() if x.dtype is torch.bfloat16 else x)

    on_memory = staticmethod(on_memory)

    def lend(self, x: Array, strided: bool) -> Array:
        """Return it without its history."""
        x = x.detach()
        return x if strided else x.contiguous()

    def take(self, x: Array) -> Array:
        """Return a tensor of x's memory."""
        return torch.from_dlpack(x)

    def stream(self, x: Array) -> int | None:
        """Return the current CUDA stream of its device."""
        return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None

    def on_stream(self, stream: int) -> AbstractContextManager[Any]:
        """Context in which torch works on a CUDA stream."""
        context: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.ExternalStream(stream))
        return context

    def done(self, x: Array) -> Callable[[], bool]:
        """Return what tells whether the work queued until now is done."""
        if not x.is_cuda:
            return super().done(x)
        done: Callable[[], bool] = torch.cuda.current_stream(x.device).record_event().query
        return done

    def in_place(self, request: Request, inputs: Inputs) -> tuple[Array, Any] | None:
        """Take one token with the state updated in its own memory; None where that cannot be."""
        from .torch_token import step

        with self.exact_products(inputs.q):
            return step(request, inputs)

    def underflow(self) -> AbstractContextManager[Any]:
        """Return no context: torch reports no underflow."""
        return nullcontext()

    def exact_products(self, x: Array) -> AbstractContextManager[Any]:
        """Context without torch.autocast."""
        if _autocast_is_on(x):
            off: AbstractContextManager[None] = torch.autocast(x.device.type, enabled=False)
            return off
        return nullcontext()

    def moveaxis(self, x: Array, source: int, destination: int) -> Array:
        """Move one axis; `torch.func.vmap` knows no moveaxis."""
        return x.movedim(source, destination)

    def unstack(self, x: Array, axis: int) -> tuple[Array, ...]:
        """Split along one axis; the namespace's unstack is made of moveaxis."""
        return tuple(x.unbind(axis))

    def powers(self, x: Array, n: Array) -> Array:
        """Multiply near 0, where torch differentiates: its own derivative of x^0 is 0 / x."""
        if not tracing.followed(x):
            return x**n
        where, near = self.xp.where, x < 1e-3
        found, square, left = where(near, 1.0, x) ** n, where(near, x, 0.0), n.clip(max=31)
        product = self.xp.ones_like(found)  # up to a power that is 0 there
        for i in range(5):
            product = where(left // 2**i % 2 == 1, product * square, product)
            square = square * square
        return where(near, product, found)

    def constants(
        self, like: Array, key: tuple[Any, ...], make: Callable[[], np.ndarray[Any, Any]]
    ) -> Array:
        """Return constants, kept on each device: a CUDA graph copies none from the host."""
        if compiling():
            return self.xp.asarray(make(), device=like.device)
        if type(like) is not Tensor:
            return super().constants(like, key, make)
        placed = (*key, like.device)
        if placed not in self._placed:
            with torch.inference_mode(False):
                made = super().constants(like, key, make)
            if type(made) is not Tensor or tracing.wrapped(made):
                return made  # a trace or a transform will be over
            self._placed[placed] = made
        return self._placed[placed]


TORCH = Torch()


def _wrapper(x: Array) -> tuple[str, str] | None:
    if type(x) in PLAIN:
        return None
    for (module, name), remedy in WRAPPERS.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(x, kind):
            return f"is a {name}", remedy
    return None


def _autocast_is_on(x: Array) -> bool:
    kind = _autocast_kind(x.device)
    return kind is not None and bool(torch.is_autocast_enabled(kind))


@functools.cache
def _autocast_kind(device: Any) -> str | None:
    kind: str = device.type  # some kinds, meta among them, have no autocast
    return kind if torch.amp.is_autocast_available(kind) else None
