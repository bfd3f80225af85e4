"""Few heads and long sequences: when a sequence is cut into segments, and a fused row with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..core.passes import broadcast
from ..core.request import Request
from .steps import UNDOTTED, Fused, Launch, Row, Step, names

if TYPE_CHECKING:
    from .plan import Builder

WHOLE = 2048  # tokens up to which a head's bits do not depend on how many heads there are
LEAST = 256  # tokens of a segment: then its states cost what its tokens do
FEWEST = 3  # segments: two gain nothing, as all is read twice


@functools.lru_cache(maxsize=1024)
def tokens(request: Request, slots: int, period: int, columns: int) -> int:
    """Return the tokens of a segment, 0 for the whole sequence as one; by shapes alone.

    A launch has a program a head and tile of values. Where they are few, every head is cut into as
    many segments as fill the device once: each reads k and v once more, for its state.

    Parameters
    ----------
    request : Request
        The call.
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
    if count < FEWEST:
        return 0
    n = -(-T // count // period) * period
    return n if 0 < n < T else 0


def levels(b: Builder, row: Row, launches: list[Launch], inner: tuple[str, ...]) -> Iterator[Step]:
    """Cut a fused row into segments: states level by level, then all from what was carried.

    The states of a level depend on results of those below, which the row makes once more. Of hla2:
    S of k alone; F of y and v, which the row leaves from S, with y made and forgotten; then o: 256
    + 768 + 1024 bytes a token and head at D = V = 128, bfloat16, the first two of all segments but
    the last: of 8 0.67 ms for B = 1, T = 65536, H = 16 at 3.0 TB/s. One H100 took 0.762 (88%),
    0.94 by passes alone (2560 bytes), 4.2 whole; of T = 8192 0.129 in a CUDA graph (floor 0.084).
    """
    of: dict[str, int] = {}  # level of a result
    depths: list[int] = []  # and of a state
    for x in launches:
        depths.append(1 + max(of.get(n, 0) for n in names((x.k, x.v))))
        depth = max(depths[-1], *(of.get(n, 0) for n in names(x.q)))
        of |= {n: max(depth, of.get(n, 0)) for n in names(x.o)}
    late = [
        x for x, depth in zip(launches, depths, strict=True) if depth > 1 and halved(x, launches)
    ]
    launches = [x._replace(end=(None,)) if x in late else x for x in launches]
    alone, carried, reads = _apart(b, launches)
    for now in range(1, max(depths) + 1):
        mine = [i for i, depth in enumerate(depths) if depth == now]
        states = [state for i in mine if (state := alone[i])]
        needs = names(tuple((x.k, x.v) for x in states))
        makers: list[Launch] = []
        for x, depth in zip(reads[::-1], depths[::-1], strict=True):
            if depth < now and names(x.o) & needs:
                makers.insert(0, x._replace(**UNDOTTED))
                needs |= names((x.q, x.k, x.v))
        if makers:
            short = all(x.short for x in states)
            makers, states = ([x._replace(short=short) for x in xs] for xs in (makers, states))
            made = tuple(dict.fromkeys(o.name for x in makers for o in x.o))
            yield Fused(row.name, (*makers, *states), made)
        else:
            yield from _pairs(b, states)
        yield from (step for i in mine for step in carried[i])
    yield Fused(row.name, tuple(reads), inner)
    for x in late:
        size = b.width(x.k[0].name), b.width(x.v[0].name)
        yield from b.two(x._replace(q=(), o=()), [size], b.tokens)


def halved(x: Launch, launches: list[Launch]) -> bool:
    """Whether a last state is requested of one of two that a row may leave as half sums."""
    return any(x.end) and any((x.k, x.v) == (y.v, y.k) and y.o == x.o for y in launches if y != x)


def _apart(
    b: Builder, launches: list[Launch]
) -> tuple[list[Launch | None], list[list[Step]], list[Launch]]:
    """Return of each launch its states alone, what carries them, and what reads them."""
    alone: list[Launch | None] = []
    carried: list[list[Step]] = []
    reads: list[Launch] = []
    for x in launches:
        size = b.width(x.k[0].name), b.width(x.v[0].name)
        *steps, last = b.two(x, [size], b.tokens)
        first = steps[0] if steps else None  # none where the states are there
        assert first is None or isinstance(first, Launch)
        assert isinstance(last, Launch)
        alone.append(first)
        carried.append(steps[1:])
        reads.append(last)
    return alone, carried, reads


def _pairs(b: Builder, states: list[Launch]) -> Iterator[Launch]:
    """Launch states alone, of two values that share their keys at once."""
    waiting = list(states)
    while waiting:
        x, *waiting = waiting
        for y in waiting:
            alike = y._replace(v=x.v, end=x.end, read=x.read) == x
            first, second = (b.width(z.v[0].name) for z in (x, y))
            if alike and first <= b.limits.values and second <= b.limits.second:
                waiting.remove(y)
                x = x._replace(v=x.v + y.v, start=x.start + y.start, end=x.end + y.end)
                break
        yield x
