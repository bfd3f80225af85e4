"""Symmetric S stored as its upper triangle, D (D + 1) / 2 numbers (the paper's section 5.2)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .namespace import Array, device, namespace


class PackedState(NamedTuple):
    """A state whose S is its upper triangle, row by row; ``rest`` holds the other fields.

    ``operator`` of the packed state is that of ``rest``, which is the state with S of no rows.
    """

    upper: Array
    rest: Any

    def unpack(self) -> Any:
        """Return the state with S whole."""
        xp, D = namespace(self.upper), _width(self.upper.shape[-1])
        take = xp.asarray(_rows(D)[1], device=device(self.upper))
        flat = xp.take(self.upper, take, axis=-1)
        return self.rest._replace(S=xp.reshape(flat, (*self.upper.shape[:-1], D, D)))


def pack(state: Any) -> PackedState:
    """Store S as its upper triangle, which halves its bytes; `PackedState.unpack` undoes it."""
    xp, S = namespace(state.S), state.S
    take = xp.asarray(_rows(S.shape[-1])[0], device=device(S))
    flat = xp.reshape(S, (*S.shape[:-2], S.shape[-1] ** 2))
    return PackedState(xp.take(flat, take, axis=-1), state._replace(S=S[..., :0, :]))


def _width(packed: int) -> int:
    return (int(np.sqrt(8 * packed + 1)) - 1) // 2


@functools.lru_cache(maxsize=16)
def _rows(D: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where the triangle lies in the flat square, and where each of the square in the triangle."""
    i, j = np.triu_indices(D)
    place = np.zeros((D, D), dtype=np.int64)
    place[i, j] = place[j, i] = np.arange(i.size)
    return i * D + j, place.reshape(-1)
