"""What a call must know of its arrays beyond the Array API standard, library by library.

Where they lie, whether they are there yet, and what the switches of their library ask for.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import array_api_compat as compat
import numpy as np

from ..core.namespace import Array, device, is_jax, library, symbolic, underflow

FLOATS = ("float16", "bfloat16", "float32", "float64")


def device_name(x: Array) -> str:
    """Device of ``x`` as text, "traced" for a tracer."""
    if is_jax(x):
        if traced(x):
            return "traced"
        return ",".join(sorted(str(d) for d in x.devices()))
    return str(device(x))


def same_device(x: Array, y: Array) -> bool:
    """Whether two arrays of one library are on one device, as far as can be told."""
    if not is_jax(x):
        return bool(device(x) == device(y))
    free = any(traced(a) or not a.committed for a in (x, y))  # JAX moves what no one has placed
    return free or device_name(x) == device_name(y)


def on_accelerator(x: Array) -> bool:
    """Whether ``x`` lives outside the host's memory (for a JAX tracer: the default platform)."""
    if is_jax(x):
        jax = sys.modules["jax"]
        return (
            bool(jax.default_backend() != "cpu")
            if traced(x)
            else any(device.platform != "cpu" for device in x.devices())
        )
    if library(x) == "torch":
        return bool(x.device.type not in ("cpu", "meta"))
    return bool(compat.is_cupy_array(x))


def traced(x: Array) -> bool:
    """Whether ``x`` stands for values that are not there yet (jit, vmap, compile, fake tensors).

    Of torch also a type that dispatches its own operations: where its values are, only it knows.
    A subclass without that is memory like any tensor's.
    """
    if is_jax(x):
        return isinstance(x, sys.modules["jax"].core.Tracer)
    if library(x) == "torch":
        torch = sys.modules["torch"]
        return bool(
            x.device.type == "meta"
            or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
            or torch._C._functorch.is_functorch_wrapped_tensor(x)
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
        )
    return False


def transformed(x: Array) -> bool:
    """Whether plain types and shapes of ``x``'s library may stand for something else now."""
    if library(x) == "torch":
        torch = sys.modules["torch"]
        return bool(
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
        )
    return False


def compiling() -> bool:
    """Whether torch.compile or a strict torch.export reads the code that is running."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def irregular(x: Array) -> tuple[str, str] | None:
    """Say what keeps ``x`` from being a plain array in memory, and what makes it one; or None."""
    if library(x) == "numpy":
        if x.dtype.kind != "f" or x.dtype.isnative:
            return None
        remedy = 'x.astype(x.dtype.newbyteorder("="))'
        return f"has dtype {x.dtype.str}, which is not in native byte order", remedy
    if library(x) != "torch":
        return None
    torch = sys.modules["torch"]
    if x.is_nested:
        return "is a nested tensor", "torch.nested.to_padded_tensor(x, 0.0)"
    if x.is_quantized:
        return "is quantized", "x.dequantize()"
    if x.layout is not torch.strided:
        return f"has layout {x.layout}", "x.to_dense()"
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return None
    kinds = {  # imported where there is one
        ("torch.distributed.tensor", "DTensor"): "x.full_tensor(), or x.to_local() for its part",
        ("torch.masked", "MaskedTensor"): "x.to_tensor(0.0)",
    }
    for (module, name), remedy in kinds.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(x, kind):
            return f"is a {name}", remedy
    return None


def concrete(x: Any) -> Any:
    """Return the number that a symbol of torch's compiler stands for, which it then holds fixed."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.SymFloat):
        return float(x)
    return x


def host_values(x: Array) -> np.ndarray[Any, Any] | None:
    """Values of a number or host array as NumPy, or None where reading would wait or fail."""
    if library(x) == "numpy":
        return np.asarray(x)
    if traced(x) or on_accelerator(x):
        return None
    if library(x) == "torch":
        with _untransformed():
            x = x.detach().resolve_neg()
            return np.asarray(x.double() if dtype_name(x) == "bfloat16" else x)
    if is_jax(x):
        return np.asarray(x)
    try:
        return np.from_dlpack(x)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
        return None  # a library that does not share host memory: only shapes are checked


@contextmanager
def _untransformed() -> Iterator[None]:
    """Context in which torch reads a tensor as itself, whatever transform or mode is active."""
    torch = sys.modules["torch"]
    functorch = torch._C._are_functorch_transforms_active()
    if not functorch and not torch._C._len_torch_dispatch_stack():
        yield
        return
    with torch._C._DisableFuncTorch(), torch.utils._python_dispatch._disable_current_modes():
        yield


def dtype_name(x: Array) -> str:
    """Bare dtype name of ``x``: "float32", "bfloat16", "int64", ..."""
    kind: Any = type(x.dtype)
    return _dtype_name(kind, x.dtype)


@functools.cache
def _dtype_name(kind: Any, dtype: Any) -> str:  # the kind first: dtypes of two libraries may warn
    return str(dtype).rsplit(".", 1)[-1]


def tf32_allowed(x: Array) -> bool:
    """Whether the caller's own library switch asks for reduced-precision float32 products."""
    if library(x) == "torch":
        return bool(sys.modules["torch"].backends.cuda.matmul.allow_tf32)
    if is_jax(x):
        chosen = sys.modules["jax"].config.jax_default_matmul_precision
        return chosen not in (None, "highest", "float32")
    return False


def in_memory(x: Array) -> Array:
    """Return ``x`` as its memory has it: torch negates the imaginary part of a conjugate lazily."""
    return x.resolve_neg() if library(x) == "torch" and not compiling() and x.is_neg() else x


def autocast(x: Array) -> Array:
    """Cast ``x`` as torch.autocast, where it is on, casts the operands of a product."""
    if library(x) == "torch":
        torch, kind = sys.modules["torch"], x.device.type
        if _autocast_is_on(x) and dtype_name(x) in FLOATS[:-1]:
            return x.to(torch.get_autocast_dtype(kind))
    return x


def _autocast_is_on(x: Array) -> bool:
    torch, kind = sys.modules["torch"], x.device.type  # some kinds, meta among them, have none
    return bool(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))


def exact_products(x: Array) -> AbstractContextManager[Any]:
    """Context in which float32 products are float32, unless the caller's switch says otherwise.

    In NumPy they may underflow to 0, which is then the right value.
    """
    if library(x) == "torch" and _autocast_is_on(x):
        off: AbstractContextManager[None] = sys.modules["torch"].autocast(
            x.device.type, enabled=False
        )
        return off
    jax = sys.modules.get("jax")
    if jax is not None and is_jax(x) and jax.config.jax_default_matmul_precision is None:
        highest: AbstractContextManager[None] = jax.default_matmul_precision("highest")
        return highest
    return underflow(x)


@functools.cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(request: Any, numbers: dict[str, Any], *args: Any) -> Any:
        return function(dataclasses.replace(request, **numbers), *args)

    jitted: Callable[..., Any] = sys.modules["jax"].jit(run, static_argnums=0)
    return jitted


@functools.lru_cache(maxsize=1024)
def _without_numbers(request: Any) -> tuple[Any, dict[str, float]]:
    """Split a request into what a program hangs on, and the numbers that it may be run with."""
    numbers = {"eps": request.eps}
    if request.scaled:
        numbers["scale"] = request.scale
    if request.ridged:
        numbers["ridge"] = request.ridge
    return dataclasses.replace(request, **dict.fromkeys(numbers)), numbers


def call(function: Callable[..., Any], request: Any, x: Array, *args: Any) -> Any:
    """Run ``function(request, *args)``; under JAX as one compiled call, ``request`` static.

    Its numbers are operands of the call: another scale compiles nothing.
    """
    with exact_products(x):
        if not is_jax(x):
            return function(request, *args)
        if any(symbolic(n) for n in (*request.q_shape, *request.k_shape, *request.v_shape)):
            return function(request, *args)  # part of a larger program; symbols are no keys
        static, numbers = _without_numbers(request)
        return _jitted(function)(static, numbers, *args)
