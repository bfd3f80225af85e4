"""Higher-order Linear Attention (arXiv 2510.27258) on any array library."""

from . import states
from .api import available, combine, explain, scan, step, summarize, vjp
from .core.reference import Gradients
from .errors import SlowPathWarning, Unsupported

__version__ = "0.1.0"
__all__ = [
    "Gradients",
    "SlowPathWarning",
    "Unsupported",
    "available",
    "combine",
    "explain",
    "scan",
    "states",
    "step",
    "summarize",
    "vjp",
]
