"""Types of states, packed states and segments, to load what was saved: ``HLA2State(**file)``.

A state has the fields of its program's passes (`hla.core.programs`), a segment also those that join
it to others, and rho.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.namespace import Array, library_of
from .packed import STATE_OF, pack, packed_type


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
        if library_of(self.S).borrowed:
            return library_of(self.S).lent(HLA2Segment.to_state, self)  # type: ignore[no-any-return]
        S, C, m, G, h, _ = self
        with library_of(S).underflow():
            eta = (S @ m[..., None])[..., 0] - h
            return HLA2RidgeState(S, S @ C - G, eta, C, m)


class HLA2PrefixSegment(NamedTuple):
    """The plain moments of a segment and its attenuation rho."""

    S: Array
    C: Array
    m: Array
    rho: Array

    def to_state(self) -> HLA2PrefixState:
        """Return the state after this segment, started empty."""
        return HLA2PrefixState(self.S, self.C, self.m)


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


AHLAPrefixPackedState = packed_type(AHLAPrefixState)
AHLAPackedState = packed_type(AHLAState)
HLA2PaperPackedState = packed_type(HLA2PaperState)
HLA2PrefixPackedState = packed_type(HLA2PrefixState)
HLA2RidgePackedState = packed_type(HLA2RidgeState)
HLA2PackedState = packed_type(HLA2State)
HLA3PaperPackedState = packed_type(HLA3PaperState)
HLA3PrefixPackedState = packed_type(HLA3PrefixState)
HLA3PackedState = packed_type(HLA3State)
LinearPackedState = packed_type(LinearState)

# By their fields, of a segment but rho: each program has its own.
STATES = {frozenset(kind._fields): kind for kind in STATE_OF.values()}
SEGMENTS = {
    frozenset(kind._fields[:-1]): kind
    for kind in (
        LinearSegment,
        HLA2Segment,
        HLA2PrefixSegment,
        AHLASegment,
        AHLAPrefixSegment,
        HLA3Segment,
        HLA3PrefixSegment,
    )
}

__all__ = [
    "AHLAPackedState",
    "AHLAPrefixPackedState",
    "AHLAPrefixSegment",
    "AHLAPrefixState",
    "AHLASegment",
    "AHLAState",
    "HLA2PackedState",
    "HLA2PaperPackedState",
    "HLA2PaperState",
    "HLA2PrefixPackedState",
    "HLA2PrefixSegment",
    "HLA2PrefixState",
    "HLA2RidgePackedState",
    "HLA2RidgeState",
    "HLA2Segment",
    "HLA2State",
    "HLA3PackedState",
    "HLA3PaperPackedState",
    "HLA3PaperState",
    "HLA3PrefixPackedState",
    "HLA3PrefixSegment",
    "HLA3PrefixState",
    "HLA3Segment",
    "HLA3State",
    "LinearPackedState",
    "LinearSegment",
    "LinearState",
]
