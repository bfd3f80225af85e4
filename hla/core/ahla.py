"""Asymmetric second order: o_t = sum_{j<=i<=t} g^(t-j) (q_t.k_i)(q_i.k_j) v_j (paper section 6).

R of a masked segment never decays (derivations 3.2: decayed, the operator is not associative).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .algebra import Algebra, Cross, Join, inner, outer
from .namespace import Array
from .triangle import pack


class AHLAState(NamedTuple):
    """The state of the paper's Algorithm 2: P = sum k v', m = sum k, E and n, decayed."""

    P: Array
    m: Array
    E: Array
    n: Array

    def pack(self) -> Any:
        """Return the same fields as a packed state."""
        return pack(self)


class AHLAPrefixState(NamedTuple):
    """The plain moments R = sum k q' (D, D), P = sum k v', m = sum k, all decayed."""

    R: Array
    P: Array
    m: Array

    def pack(self) -> Any:
        """Return the same fields as a packed state."""
        return pack(self)


class AHLASegment(NamedTuple):
    """The paper's summary of a segment (Eq. 6.2), R undecayed, and its attenuation rho."""

    R: Array
    P: Array
    m: Array
    E: Array
    n: Array
    rho: Array

    def to_state(self) -> AHLAState:
        """Return the state after this segment, started empty."""
        return AHLAState(self.P, self.m, self.E, self.n)


class AHLAPrefixSegment(NamedTuple):
    """The plain moments of a segment and its attenuation rho."""

    R: Array
    P: Array
    m: Array
    rho: Array

    def to_state(self) -> AHLAPrefixState:
        """Return the state after this segment, started empty."""
        return AHLAPrefixState(self.R, self.P, self.m)


def lift(q: Array, k: Array, v: Array, rho: Array) -> AHLASegment:
    """Segment of one token: E = k (q.k) v', n = k (q.k)."""
    n = k * inner(q, k)[..., None]
    return AHLASegment(outer(k, q), outer(k, v), k, outer(n, v), n, rho)


def lift_prefix(q: Array, k: Array, v: Array, rho: Array) -> AHLAPrefixSegment:
    """Segment of one token."""
    return AHLAPrefixSegment(outer(k, q), outer(k, v), k, rho)


MASKED = Join({"R": 0, "P": 1, "E": 1}, (Cross("E", 1, ("B.R", "A.P")),))
CAUSAL = Algebra(AHLASegment, AHLAState, lift, ((1, ("E",)),), MASKED, MASKED)
JOIN = Join({"R": 1, "P": 1})
READS = ((1, ("R", "P")),)
PREFIX = Algebra(AHLAPrefixSegment, AHLAPrefixState, lift_prefix, READS, JOIN, JOIN)
