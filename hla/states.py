"""Types of states and segments, for loading what was saved: ``HLA2State(**numpy.load(path))``."""

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
from .core.packing import PackedState

__all__ = [
    "AHLAPrefixSegment",
    "AHLAPrefixState",
    "AHLASegment",
    "AHLAState",
    "HLA2PaperState",
    "HLA2PrefixSegment",
    "HLA2PrefixState",
    "HLA2RidgeState",
    "HLA2Segment",
    "HLA2State",
    "HLA3PaperState",
    "HLA3PrefixSegment",
    "HLA3PrefixState",
    "HLA3Segment",
    "HLA3State",
    "LinearSegment",
    "LinearState",
    "PackedState",
]
