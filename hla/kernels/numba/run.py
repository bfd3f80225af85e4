"""The device of Numba's arrays: their memory, with the kernels in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.passes import Shape
from ..cupy.launch import Card, Constants, Function
from ..cupy.run import Library, Memory
from . import blocks, streams
from .array import Array, made
from .device import KERNELS
from .package import dtype_of
from .standard import xp

CONSTANTS = 256  # that are kept
_constants: dict[Any, Array] = {}


def load(name: str, constants: Constants, shared: int, card: Card) -> Function:
    """Return a kernel on a device, compiled once for its constants."""
    from . import driver

    return driver.load(name, constants, shared, card)


def empty(shape: Shape, strides: Shape, dtype: Any, card: Card) -> Array:
    """Allocate an array with strides, in elements, that leave no gaps."""
    return made(shape, dtype, card.device, tuple(n * dtype.itemsize for n in strides))


def view(x: Array, shape: Shape, strides: Shape) -> Array:
    """Return an array of the memory of x, of strides in elements."""
    return x.viewed(shape, tuple(n * x.dtype.itemsize for n in strides))


def constant(value: float, shape: Shape, dtype: Any, card: Card) -> Array:
    """Return a number, made once a stream, as an array."""
    key = value, dtype, card.device, streams.current()
    if key not in _constants:
        if len(_constants) >= CONSTANTS:
            _constants.clear()
        _constants[key] = xp.full((), value, dtype=dtype, device=card.device)
    return _constants[key].broadcast(shape)


def inside(card: Card, function: Callable[[], Any]) -> Any:
    """Call a function with a device as the current one."""
    return blocks.inside(card.device, function)


NUMBA = Library(
    Memory(
        xp, load, lambda x: blocks.card_of(x.device), empty, view, constant, dtype_of,
        lambda x: x.address, inside,
    ),
    KERNELS,
)  # fmt: skip
