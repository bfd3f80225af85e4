"""NumPy's arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from array_api_compat import numpy as xp

from ..core.namespace import Array
from .generic import Facts, Generic


class NumPy(Generic):
    """NumPy."""

    def __init__(self) -> None:
        super().__init__("numpy", xp)
        self._facts: dict[Any, Facts] = {}

    def facts(self, x: Array) -> Facts:
        """Return what `Generic.facts` does, which depends on the dtype alone."""
        if x.dtype not in self._facts:
            self._facts[x.dtype] = super().facts(x)
        return self._facts[x.dtype]

    def key(self, x: Array) -> Any:
        """Return shape and dtype, as long as it is no subclass."""
        return (x.shape, x.dtype) if type(x) is np.ndarray else None

    signature = key

    def alike(self, arrays: Sequence[Array]) -> Callable[[list[Array]], list[int] | None] | None:
        """Return what gives no address of arrays laid out like these, and None of others."""
        if any(type(x) is not np.ndarray for x in arrays):
            return None
        kinds = [(x.dtype, x.shape, x.strides, x.flags.num) for x in arrays]

        def addresses(found: list[Array]) -> list[int] | None:
            for x, kind in zip(found, kinds, strict=True):
                if type(x) is not np.ndarray:
                    return None
                if (x.dtype, x.shape, x.strides, x.flags.num) != kind:
                    return None
            return []

        return addresses

    def number(self, value: float, dtype: Any, like: Array) -> Array:
        """Return a number as an array, which is kept and not to be written."""
        return _number(value, dtype)

    def device(self, x: Array) -> Any:
        """Return "cpu"."""
        return "cpu"

    def irregular(self, x: Array) -> tuple[str, str] | None:
        """Tell another byte order."""
        if x.dtype.kind != "f" or x.dtype.isnative:
            return None
        remedy = 'x.astype(x.dtype.newbyteorder("="))'
        return f"has dtype {x.dtype.str}, which is not in native byte order", remedy

    def plain(self, x: Array) -> Array:
        """Return an array of no subclass."""
        return np.asarray(x)

    def lend(self, x: Array, strided: bool) -> Array:
        """Copy what a library without strides cannot take."""
        return x if strided else np.ascontiguousarray(x)

    def host_values(self, x: Array) -> np.ndarray[Any, Any] | None:
        """Return it."""
        return np.asarray(x)


@functools.lru_cache(maxsize=256)
def _number(value: float, dtype: Any) -> Array:
    x = np.asarray(value, dtype)
    x.flags.writeable = False
    return x


NUMPY = NumPy()
