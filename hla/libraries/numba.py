"""Numba's device arrays: memory without a namespace, which no function of hla takes yet."""

from __future__ import annotations

from ..core.namespace import Array
from .generic import Generic


class Numba(Generic):
    """Numba, of whose device arrays other libraries make theirs of the same memory."""

    def irregular(self, x: Array) -> tuple[str, str]:
        """Tell that nothing computes with it."""
        what = "is a device array of Numba, for which this version of hla has no backend"
        return what, "cupy.asarray(x) or torch.as_tensor(x, device='cuda'), of the same memory"
