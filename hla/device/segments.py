"""Few heads and long sequences: when, and in how many segments, a sequence is cut."""

from __future__ import annotations

import functools
import math

from ..core.passes import broadcast
from ..core.request import Request

WHOLE = 2048  # tokens up to which a head's bits do not depend on how many heads there are
LEAST = 512  # tokens of a segment: a state is written, carried and read as 200 tokens are


@functools.lru_cache(maxsize=1024)
def tokens(request: Request, slots: int, period: int, columns: int) -> int:
    """Return the tokens of a segment, 0 for the whole sequence as one; by shapes alone.

    A launch has a program a head and tile of values. Where they are few, every head is cut into as
    many segments as fill the device once: each reads k and v once more, for its state.

    Parameters
    ----------
    request : Request
        What is asked.
    slots : int
        Programs that the device runs at once.
    period : int
        What the tokens of a segment are a multiple of.
    columns : int
        Of values, in a tile.
    """
    T = request.tokens
    if T <= WHOLE or request.mask == "none":
        return 0
    batch = broadcast(*(x[:-2] for x in (request.q_shape, request.k_shape, request.v_shape)))
    programs = math.prod(batch) * -(-request.v_shape[-1] // columns)
    count = min(slots // max(1, programs), T // LEAST)
    n = -(-T // max(1, count) // period) * period
    return n if 0 < n < T else 0
