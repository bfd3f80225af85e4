"""Types of states, packed states and segments, to load what was saved: ``HLA2State(**file)``."""

from .core.ahla import AHLAPrefixSegment, AHLAPrefixState, AHLASegment, AHLAState
from .core.hla2 import (
    HLA2PaperState,
    HLA2PrefixSegment,
    HLA2PrefixState,
    HLA2RidgeState,
    HLA2Segment,
    HLA2State,
)
from .core.hla3 import (
    HLA3PaperState,
    HLA3PrefixSegment,
    HLA3PrefixState,
    HLA3Segment,
    HLA3State,
)
from .core.linear import LinearSegment, LinearState
from .core.triangle import packed_type

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
