"""Second order: o_t = sum_{i<=j<=t} g^(2t-i-j) (q_t.k_i)(q_j.k_i) v_j (the paper's section 3).

A segment carries the paper's S, C, m, G, h, with G and h decayed by rho^2 (derivations 3.1: with
the paper's rho the operator is not associative). A state carries F = S C - G and eta = S m - h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .algebra import Algebra, Cross, Join, dot, outer
from .namespace import Array, library_of, namespace
from .triangle import pack


class HLA2State(NamedTuple):
    """S = sum k k' (D, D), F (D, V) and eta (D), the corrected moments, decayed."""

    S: Array
    F: Array
    eta: Array

    def pack(self) -> Any:
        """Return flat named arrays, S as its upper triangle."""
        return pack(self)


class HLA2RidgeState(NamedTuple):
    """The causal state with C = sum q v' (D, V) and m = sum q (D), which a ridge reads."""

    S: Array
    F: Array
    eta: Array
    C: Array
    m: Array

    def pack(self) -> Any:
        """Return flat named arrays, S as its upper triangle."""
        return pack(self)


class HLA2PrefixState(NamedTuple):
    """The plain moments S = sum k k', C = sum q v', m = sum q, decayed."""

    S: Array
    C: Array
    m: Array

    def pack(self) -> Any:
        """Return flat named arrays, S as its upper triangle."""
        return pack(self)


class HLA2PaperState(NamedTuple):
    """The state of the paper's Algorithm 1."""

    S: Array
    C: Array
    m: Array
    G: Array
    h: Array

    def pack(self) -> Any:
        """Return flat named arrays, S as its upper triangle."""
        return pack(self)


class HLA2Segment(NamedTuple):
    """The paper's masked summary of a segment and its attenuation rho."""

    S: Array
    C: Array
    m: Array
    G: Array
    h: Array
    rho: Array

    def to_state(self) -> HLA2RidgeState:
        """Return the state after this segment, started empty; it serves any ridge."""
        with library_of(self.S).underflow():
            return HLA2RidgeState(**{x: view(self)[x] for x in HLA2RidgeState._fields})


class HLA2PrefixSegment(NamedTuple):
    """The plain moments of a segment and its attenuation rho."""

    S: Array
    C: Array
    m: Array
    rho: Array

    def to_state(self) -> HLA2PrefixState:
        """Return the state after this segment, started empty."""
        return HLA2PrefixState(self.S, self.C, self.m)


def lift(q: Array, k: Array, v: Array, rho: Array) -> HLA2Segment:
    """Segment of one token: G = h = 0, so F = (k k')(q v') falls to `view`."""
    C, zeros = outer(q, v), namespace(q).zeros_like
    return HLA2Segment(outer(k, k), C, q, zeros(C), zeros(q), rho)


def lift_prefix(q: Array, k: Array, v: Array, rho: Array) -> HLA2PrefixSegment:
    """Segment of one token."""
    return HLA2PrefixSegment(outer(k, k), outer(q, v), q, rho)


def view(segment: HLA2Segment) -> dict[str, Array]:
    """Return the segment with F = S C - G and eta = S m - h, by which a state is continued."""
    S, C, m, G, h, _ = segment
    return {**segment._asdict(), "F": S @ C - G, "eta": dot(S, m) - h}


def moments(final: dict[str, Array]) -> dict[str, Array]:
    """Return the paper's G and h from final states: G = S C - F and h = S m - eta."""
    S, C, m, F, eta = (final[x] for x in ("S", "C", "m", "F", "eta"))
    return {"S": S, "C": C, "m": m, "G": S @ C - F, "h": dot(S, m) - eta}


MASKED = Join({"S": 1, "C": 1, "G": 2}, (Cross("G", 1, ("B.S", "A.C")),))
STATE = Join({"S": 1, "C": 1, "F": 2}, (Cross("F", 1, ("A.S", "B.C")),))
CAUSAL = Algebra(HLA2Segment, HLA2State, lift, ((1, ("F",)),), MASKED, STATE, view, moments)
PLAIN = (1, ("S", "C"))
READS = (PLAIN, (-1, ("G",)))
PAPER = Algebra(HLA2Segment, HLA2PaperState, lift, READS, MASKED, MASKED)  # undecayed only
JOIN = Join({"S": 1, "C": 1})
PREFIX = Algebra(HLA2PrefixSegment, HLA2PrefixState, lift_prefix, (PLAIN,), JOIN, JOIN)
