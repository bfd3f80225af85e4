"""Third order: o_t = sum_{i,j<=u<=t} g^(3t-i-u-j) (q_t.k_i)(q_u.k_i)(q_u.k_j) v_j (paper 7).

The paper's Theorem 7.1 does not compute this sum (derivations 3.3); F and eta here do, and their
associative operator needs O(D^2 + D V) memory where the paper's needs maps of O(D^3 V).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .algebra import Algebra, Cross, Join, inner, outer
from .namespace import Array
from .triangle import pack


class HLA3State(NamedTuple):
    """S = sum k k', P = sum k v', m = sum k, and F, eta with F_t = g^3 F + y (q'P), y = S q."""

    S: Array
    P: Array
    m: Array
    F: Array
    eta: Array

    def pack(self) -> Any:
        """Return flat named arrays, S as its upper triangle."""
        return pack(self)


class HLA3PrefixState(NamedTuple):
    """The plain moments S = sum k k', Q = sum q q', P = sum k v', m = sum k, decayed."""

    S: Array
    Q: Array
    P: Array
    m: Array

    def pack(self) -> Any:
        """Return flat named arrays, S as its upper triangle."""
        return pack(self)


class HLA3PaperState(NamedTuple):
    """The state of the paper's Algorithm 3."""

    S: Array
    Q: Array
    P: Array
    m: Array
    G1: Array
    G2: Array
    G3: Array
    h1: Array
    h2: Array
    h3: Array

    def pack(self) -> Any:
        """Return flat named arrays, S as its upper triangle."""
        return pack(self)


class HLA3Segment(NamedTuple):
    """Summary of a segment: the state, Q, X = sum q (q'P), Y = sum (S q) q', and rho."""

    S: Array
    P: Array
    m: Array
    Q: Array
    X: Array
    x: Array
    Y: Array
    F: Array
    eta: Array
    rho: Array

    def to_state(self) -> HLA3State:
        """Return the state after this segment, started empty."""
        return HLA3State(self.S, self.P, self.m, self.F, self.eta)


class HLA3PrefixSegment(NamedTuple):
    """The plain moments of a segment and its attenuation rho."""

    S: Array
    Q: Array
    P: Array
    m: Array
    rho: Array

    def to_state(self) -> HLA3PrefixState:
        """Return the state after this segment, started empty."""
        return HLA3PrefixState(self.S, self.Q, self.P, self.m)


def lift(q: Array, k: Array, v: Array, rho: Array) -> HLA3Segment:
    """Segment of one token; with s = q.k: X = s q v', Y = s k q', F = s^2 k v'."""
    s = inner(q, k)[..., None]
    x, eta = s * q, s * s * k
    S, Q, P, Y = outer(k, k), outer(q, q), outer(k, v), outer(s * k, q)
    return HLA3Segment(S, P, k, Q, outer(x, v), x, Y, outer(eta, v), eta, rho)


def lift_prefix(q: Array, k: Array, v: Array, rho: Array) -> HLA3PrefixSegment:
    """Segment of one token."""
    return HLA3PrefixSegment(outer(k, k), outer(q, q), outer(k, v), k, rho)


MASKED = Join(
    {"S": 1, "P": 1, "Q": 1, "X": 2, "Y": 2, "F": 3},
    (
        Cross("X", 1, ("B.Q", "A.P")),
        Cross("Y", 1, ("A.S", "B.Q")),
        Cross("F", 2, ("A.S", "B.Q", "A.P")),
        Cross("F", 1, ("A.S", "B.X")),
        Cross("F", 1, ("B.Y", "A.P")),
    ),
)
CAUSAL = Algebra(HLA3Segment, HLA3State, lift, ((1, ("F",)),), MASKED, MASKED)
JOIN = Join({"S": 1, "Q": 1, "P": 1})
READS = ((1, ("S", "Q", "P")),)
PREFIX = Algebra(HLA3PrefixSegment, HLA3PrefixState, lift_prefix, READS, JOIN, JOIN)
