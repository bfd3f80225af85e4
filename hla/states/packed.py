"""Packed states: the fields of a state, S as its upper triangle, row by row (the paper's 5.2)."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import numpy as np

from ..core.namespace import Array, device, library_of, namespace

PACKED_OF: dict[type[Any], Any] = {}  # packed type by state type; `hla.states` names each
STATE_OF: dict[type[Any], Any] = {}  # and back


def packed_type(state_type: Any) -> Any:
    """Make the packed type of a state type: a NamedTuple of the same fields."""
    name, fields = state_type.__name__.removesuffix("State"), state_type._fields
    make: Any = namedtuple
    kind = make(f"{name}PackedState", fields, module="hla.states")
    S = "S is its upper triangle, (..., D (D + 1) / 2), row by row; " if "S" in fields else ""
    kind.__doc__ = f"`{name}State` packed: {S}`unpack` undoes it."
    kind.unpack = unpack
    PACKED_OF[state_type], STATE_OF[kind] = kind, state_type
    return kind


def pack(state: Any) -> Any:
    """Return a state as flat named arrays, S as its upper triangle, which halves its bytes."""
    library = library_of(state[0])
    if library.borrowed:
        return library.lent(pack, state)
    fields = state._asdict()
    if "S" in fields:
        S = fields["S"]
        D = int(S.shape[-1]) if S.ndim else 0
        if tuple(S.shape[-2:]) != (D, D):
            raise ValueError(f"S has shape {tuple(S.shape)}; expected (..., D, D) to be packed")
        fields["S"] = _take(_flat(S), D, "packed")
    return PACKED_OF[type(state)](**fields)


def unpack(self: Any) -> Any:
    """Return the state, S whole."""
    library = library_of(self[0])
    if library.borrowed:
        return library.lent(unpack, self)
    fields = self._asdict()
    if "S" in fields:
        upper = fields["S"]
        D = width(tuple(upper.shape))
        whole = _take(upper, D, "whole")
        fields["S"] = namespace(upper).reshape(whole, (*upper.shape[:-1], D, D))
    return STATE_OF[type(self)](**fields)


def pack_gradient(grad: Any) -> Any:
    """Gradient of a packed state from that of the state: a packed number stands for two entries."""
    fields = grad._asdict()
    if "S" in fields:
        flat, D = _with_zero(_flat(fields["S"])), int(fields["S"].shape[-1])
        fields["S"] = _take(flat, D, "packed") + _take(flat, D, "mirrored")
    return PACKED_OF[type(grad)](**fields)


def unpack_gradient(grad: Any) -> Any:
    """Gradient of a state from that of the packed one: what was not packed has none."""
    fields = grad._asdict()
    if "S" in fields:
        upper = fields["S"]
        D = width(tuple(upper.shape))
        whole = _take(_with_zero(upper), D, "above")
        fields["S"] = namespace(upper).reshape(whole, (*upper.shape[:-1], D, D))
    return STATE_OF[type(grad)](**fields)


def packed_shape(S: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of S packed from that of S."""
    D = S[-1]
    return (*S[:-2], D * (D + 1) // 2)


def width(shape: tuple[int, ...]) -> int:
    """Return D of a packed S."""
    packed = shape[-1] if shape else -1
    D = (math.isqrt(8 * max(packed, 0) + 1) - 1) // 2
    if packed != D * (D + 1) // 2:
        raise ValueError(f"S has shape {shape}; expected (..., D (D + 1) / 2), its upper triangle")
    return D


def _flat(S: Array) -> Array:
    return namespace(S).reshape(S, (*S.shape[:-2], S.shape[-2] * S.shape[-1]))


def _with_zero(x: Array) -> Array:
    """Append a zero, for what has no place in ``x``."""
    xp = namespace(x)
    zero = xp.zeros((*x.shape[:-1], 1), dtype=x.dtype, device=device(x))
    return xp.concat([x, zero], axis=-1)


def _take(x: Array, D: int, places: str) -> Array:
    index = library_of(x).constants(x, (D, places), lambda: _triangle(D)[places])
    return namespace(x).take(x, index, axis=-1)


def _triangle(D: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return places in the flat square and in the triangle, one past the end for none.

    In the square: "packed" of each number of the triangle, "mirrored" of its mirror image off the
    diagonal. In the triangle: "whole" of each entry of the square, "above" of each on or above the
    diagonal.
    """
    i, j = np.triu_indices(D)
    entry = np.zeros((D, D), dtype=np.int64)
    entry[i, j] = entry[j, i] = np.arange(i.size)
    return {
        "packed": i * D + j,
        "mirrored": np.where(i == j, D * D, j * D + i),
        "whole": entry.reshape(-1),
        "above": np.where(np.tri(D, dtype=bool).T, entry, i.size).reshape(-1),
    }
