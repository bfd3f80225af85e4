"""What a plan is made of: buffers, launches and the steps between them, as data.

A name is an array: "q", "y", "d.q"; a state is "S@0" before the first token and "S@T" after the
last; "|1" marks what belongs to a denominator and "#" a temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..core.passes import Shape
from ..core.programs import Passes

# By the widths of k and v, the gate, and whether they are one array.
Chunks = int | Callable[[int, int, str | None, bool], int]


class Limits(NamedTuple):
    """What one launch of a device takes."""

    keys: int = 128  # columns of keys
    tail: int = 16  # further columns of keys that go along
    values: int = 128  # columns of values where a second value goes along
    second: int = 128  # and of that one
    symmetric: tuple[str | None, ...] = (None, "decay")  # gates with which `Launch.symmetric` is
    tile: int = 128  # columns of values to a row of dots
    chunk: Chunks = 32  # tokens, by which launches with dots count
    period: int = 256  # tokens between the states that they keep; of whole chunks


class Buffer(NamedTuple):
    """An array to allocate."""

    shape: Shape
    dtype: str
    like: str = ""  # rows in memory in the order of that array's; "" for one after the other
    fill: float | None = None  # a constant, which needs no memory
    reuses: str = ""  # takes over the memory of a dead buffer


class Ref(NamedTuple):
    """A named array, transposed where ``turned``, then cut to parts of its last axes."""

    name: str
    rows: tuple[int, int] | None = None  # of the axis -2
    columns: tuple[int, int] | None = None  # of the axis -1
    turned: bool = False


class Launch(NamedTuple):
    """One pass. Key parts add up, each value has its own result, each pair of them a state.

    S <- S + write * k v', o <- o + read * q S, token by token. Without q it leaves states alone;
    without k and v it reads ``start``, the same for all tokens. What it reads it writes: every
    value of a launch with q has its o.

    With ``x`` there is one value, and the launch also leaves the parts of the gate's gradient
    (derivations 5), in chunks of ``chunk`` tokens. ``dots`` (*batch, tiles, T) is sum_v o x
    of what o reads from the state before its chunk, read * a_t q_t S; its tiles count as their sum.
    A reverse launch has (*batch, tiles, 2 T): of read * write * L (q_t.k_j) (v_j.x_t) over the
    pairs of a chunk but those of a token with itself it adds each token's sum as t, and behind are
    those as j (a symmetric launch: half of what o reads, which is of both its operands, and pairs
    of its own two, not of the exchanged ones). ``states`` (*batch, N, V, D) takes the transposed
    states before every period of tokens but the first. In a fused row with `Parts` states are as
    its kernels have them; its forward launches take <S, R> (*batch, N, parts) of them and the
    states, which sum up, to ``met`` instead.
    """

    q: tuple[Ref, ...]  # a part, or two (the second of few columns)
    k: tuple[Ref, ...]
    v: tuple[Ref, ...]  # a value, or two
    o: tuple[Ref, ...]  # (*batch, T, V)
    start: tuple[Ref | None, ...]  # (*held, D, V), key parts by values
    end: tuple[Ref | None, ...]
    power: int  # of the gate; 0: none
    strict: bool
    reverse: bool
    read: float
    write: float
    add: bool  # to what o holds
    symmetric: bool  # add the pass with k and v exchanged, of the same state
    x: Ref | None
    dots: Ref | None
    states: Ref | None
    batch: Shape
    held: Shape  # of the states: batch without the axes that only q has
    tokens: int = 0  # of a segment, one more batch axis of states (-3); 0: the whole
    chunk: int = 0  # tokens by which dots count
    kept: Ref | None = None  # what a reverse launch left as its ``states``
    met: Ref | None = None
    short: bool = False  # nothing reads what the last segment in its direction would leave

    def length(self, T: int) -> int:
        """Return the tokens to go through, of T."""
        if not self.short:
            return T
        return T - self.tokens if self.reverse else (T - 1) // self.tokens * self.tokens

    def states_alone(self) -> Launch:
        """Return what makes the last states and nothing else."""
        return self._replace(q=(), o=(), add=False, batch=self.held, **UNDOTTED)

    def nonempty(self) -> Launch | None:
        """Return what there is to do: in an empty batch at most states of keys, which it shares."""
        if 0 not in self.batch:
            return self
        alone = self.states_alone() if self.q else self
        return alone if any(alone.end) and 0 not in alone.batch else None


# Fields of a launch that leaves nothing for a gate's gradient
UNDOTTED: dict[str, Any] = dict.fromkeys(("x", "dots", "states", "kept", "met")) | {"chunk": 0}


class Sum(NamedTuple):
    """o = sum of factor * term, each summed or broadcast to o's shape; of no terms zeros."""

    o: Ref
    terms: tuple[tuple[float, Ref], ...]


class Divide(NamedTuple):
    """o = x / (den + eps); with num, the adjoint, also dden = -(o . num) / (den + eps)."""

    o: Ref
    x: Ref
    den: Ref
    eps: float
    num: Ref | None = None
    dden: Ref | None = None


class Border(NamedTuple):
    """o (*batch) = sum of <S, dS>, states and their gradients at the first token."""

    o: Ref
    pairs: tuple[tuple[Ref, Ref], ...]


class GateGradient(NamedTuple):
    """Gradient of the log gate by one pass (*batch, T), of a decay its sum over each period.

    From what the launches of dq and dv leave: ``reads`` (*batch, tiles, T) and ``writes`` (*batch,
    tiles, 2 T) are their dots, S and R the states and their gradients before the later periods or
    ``met`` their products, ``border`` <S, R> at the first token. ``factor`` is that of R; with
    ``ends`` no gradient comes from after the last token.
    """

    o: Ref
    reads: Ref
    writes: Ref
    gate: Ref  # (*batch, T) or, a decay, (*batch)
    border: Ref | None
    S: Ref | None  # (*batch, N, D, V)
    R: Ref | None  # (*batch, N, V, D)
    power: int
    strict: bool
    factor: float
    ends: bool
    chunk: int
    period: int
    met: Ref | None = None  # (*batch, N, parts)


class Skew(NamedTuple):
    """Add to <S, R> at later periods, (*batch, N, 1), what is not of the symmetric part of S.

    A fused row that makes R + R' alone has <S, R + R'> / 2, with blocks above the diagonal for
    those below (`Parts`): the whole but for a first state S, which decays as it is.
    """

    met: Ref
    S: Ref  # the first
    R: Ref  # (*batch, 1 + N, D, D), behind each period; what is behind the last is not read
    fading: Ref  # (*gate batch, 1 + N)
    power: int
    block: int


class GateSum(NamedTuple):
    """Gradient of the gate from those of its logarithm by each pass, which are summed to its shape.

    A decay's is divided by it; a log gate's is 0 where the gate is -inf.
    """

    o: Ref
    gate: Ref
    terms: tuple[Ref, ...]


class Fading(NamedTuple):
    """Sum of the log gate over each segment, (*gate batch, segments), of a decay times its length.

    A segment has ``tokens``, the last of the ``total`` what is left.
    """

    o: Ref
    gate: Ref
    tokens: int
    total: int


class Carry(NamedTuple):
    """States over segments: o_n = state before segment n, of what each adds; end = the last.

    Across machines this is the step that communicates.
    """

    o: Ref  # (*held, segments, D, V)
    end: Ref | None
    local: Ref
    start: Ref | None
    fading: Ref | None  # sums of the log gate; None without a gate
    power: int
    reverse: bool


class Fused(NamedTuple):
    """Launches that one kernel does, in their order: what a later one reads an earlier one made."""

    row: str
    launches: tuple[Launch, ...]
    inner: tuple[str, ...]  # names that only they use: there is no such buffer
    divide: Divide | None = None  # of what they make, at last


Step = Launch | Sum | Divide | Border | GateGradient | Skew | GateSum | Fading | Carry | Fused


class Parts(NamedTuple):
    """How a fused row leaves the parts of a gate's gradient: see `Launch`."""

    chunk: int  # tokens, by which dots count
    period: int  # tokens between the states that are kept; less where a segment is no multiple
    reads: int  # tiles of the dots of forward launches
    writes: int  # and of reverse ones
    side: int  # of the square in which a state is kept
    met: int  # parts of <S, R>
    block: int = 0  # columns of blocks of S and R: those above the diagonal count for those below


class Row(NamedTuple):
    """A fused kernel: the passes it does, in their order and by what `Pass.does` tells of them.

    It takes them whatever their factors and states are, and also where a result is not requested.
    """

    name: str
    steps: Passes
    segments: bool = False  # also some of the passes from states, and the states of others alone
    parts: Parts | None = None  # None: it leaves nothing for a gate's gradient
    in_place: bool = False  # reads a chunk of all queries before it writes results there
    adds: bool = False  # also to what results hold
    divides: bool = False  # also o by its denominator, where both are made by it alone


class Plan(NamedTuple):
    """Everything about a call but its arrays."""

    buffers: Mapping[str, Buffer]
    steps: tuple[Step, ...]
    fresh: tuple[tuple[str, ...], ...]  # buffers to allocate before each step
    dead: tuple[tuple[str, ...], ...]  # names that nothing reads after it
    given: tuple[str, ...]  # names that come from outside
    results: Mapping[str, str]  # public name -> name here
    saved: tuple[str, ...]  # intermediates that the other direction reads

    def __str__(self) -> str:
        return "; ".join(filter(None, map(text, self.steps)))

    def summary(self, tokens: int) -> str:
        """Say how it runs, in segments of so many tokens (0: whole), by which launches."""
        fused = sum(isinstance(step, Fused) for step in self.steps)
        count = sum(isinstance(step, Launch) for step in self.steps)
        kinds = [f"{fused} fused"] if fused else []
        kinds += [f"{count} of the causal pass"] if count or not fused else []
        cut = f"segments of {tokens} tokens" if tokens else "whole"
        return f"{cut}, launches: {' and '.join(kinds)}: {self}"


def text(step: Step) -> str:
    """Say what a step computes."""
    if isinstance(step, Fused):
        outs = [x.name for launch in step.launches for x in launch.o if x.name not in step.inner]
        outs += [step.divide.o.name] if step.divide else []
        return f"{step.row} ({', '.join(dict.fromkeys(outs))})"
    if isinstance(step, Launch):
        made = step.o or tuple(x for x in step.end if x)
        return " and ".join(dict.fromkeys(x.name for x in made))
    return ""


WRITES = {"o", "end", "dots", "states", "met", "dden"}


def names(x: Any) -> set[str]:
    """Names of all arrays that a step, or a part of one, refers to."""
    if isinstance(x, Ref):
        return {x.name}
    if isinstance(x, Fused):
        return (names(x.launches) | names(x.divide)) - {*x.inner}
    return set().union(*map(names, x)) if isinstance(x, tuple) else set()


def written(step: Step) -> set[str]:
    """Names of the arrays that a step writes."""
    if isinstance(step, Fused):
        own = written(step.divide) if step.divide else set[str]()
        return own.union(*map(written, step.launches))
    return set().union(*(names(x) for field, x in step._asdict().items() if field in WRITES))
