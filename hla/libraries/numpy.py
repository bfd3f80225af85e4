"""NumPy's arrays."""

from __future__ import annotations

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


NUMPY = NumPy()
