"""First order, causal linear attention: o_t = sum_{j<=t} g^(t-j) (q_t . k_j) v_j."""

from __future__ import annotations

from typing import Any, NamedTuple

from .algebra import Algebra, Join, outer
from .namespace import Array
from .triangle import pack


class LinearState(NamedTuple):
    """P = sum k v' (D, V) and m = sum k (D), decayed."""

    P: Array
    m: Array

    def pack(self) -> Any:
        """Return the same fields as a packed state."""
        return pack(self)


class LinearSegment(NamedTuple):
    """A state and its attenuation rho."""

    P: Array
    m: Array
    rho: Array

    def to_state(self) -> LinearState:
        """Return the state after this segment, started empty."""
        return LinearState(self.P, self.m)


def lift(q: Array, k: Array, v: Array, rho: Array) -> LinearSegment:
    """Segment of one token."""
    return LinearSegment(outer(k, v), k, rho)


JOIN = Join({"P": 1})
READS = ((1, ("P",)),)
CAUSAL = PREFIX = Algebra(LinearSegment, LinearState, lift, READS, JOIN, JOIN)
