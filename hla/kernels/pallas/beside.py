"""A program's kernels compiled side by side, while the rest of it is lowered.

XLA compiles the kernels of a program one after the other, and each takes seconds. Mosaic keeps what
it has compiled for the process, by the hash of its text: so each kernel is compiled in a thread, as
a program that is never run, and XLA then finds it.
"""

from __future__ import annotations

import functools
from concurrent import futures
from typing import Any

import jax
from jaxlib.mlir import ir

NAME = "mosaic_gpu_v2"  # of a kernel's custom call
_begun: dict[bytes, futures.Future[None]] = {}


@functools.cache
def _pool() -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(8, "hla-compiles")


def begin(module: Any, device: Any) -> None:
    """Begin to compile the kernels of a module for a device.

    Parameters
    ----------
    module : ir.Module
        Lowered so far, but for the block that is being made.
    device : jax.Device
    """
    calls = []

    def look(op: Any) -> Any:
        kernel = op.name == "stablehlo.custom_call"
        if kernel and op.attributes["call_target_name"].value == NAME:
            config = op.attributes["mhlo.backend_config"]
            calls.append({x.name: getattr(x.attr, "value_bytes", None) or x.attr.value
                          for x in config})  # fmt: skip
        return ir.WalkResult.ADVANCE

    for op in (module.operation, *ir.InsertionPoint.current.block):
        op.operation.walk(look)
    for config in calls:
        if config["kernel_hash"] not in _begun:
            _begun[config["kernel_hash"]] = _pool().submit(_compile, config, device)


def finish() -> None:
    """Wait for all kernels; what cannot be compiled, XLA reports."""
    futures.wait(_begun.values())


def _compile(config: dict[str, Any], device: Any) -> None:
    """Compile a kernel in a program of nothing else: its arrays do not matter."""
    none = jax.ShapeDtypeStruct((), "float32")
    where = jax.sharding.SingleDeviceSharding(device)
    run = jax.jit(lambda: jax.ffi.ffi_call(NAME, none)(**config), out_shardings=where)
    run.trace().lower(lowering_platforms=("cuda",)).compile()
