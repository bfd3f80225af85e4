"""Request -> Plan: buffers and steps as data, in both directions. Shapes and names only.

`Builder` packs the passes that a requested result depends on into launches: fused rows, shared
queries and keys, shared values, parts of wide keys, segments of the sequence.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..core.passes import Pass, Shape, broadcast
from ..core.programs import Passes, adjoint, d, prune
from ..core.request import Request
from .gates import GateTerms
from .segments import halved, levels
from .shapes import alive, named, saved
from .steps import (
    UNDOTTED,
    Buffer,
    Carry,
    Divide,
    Fading,
    Fused,
    GateSum,
    Launch,
    Limits,
    Plan,
    Ref,
    Row,
    Step,
    Sum,
    names,
    written,
)

Sums = list[tuple[str, Ref]]  # what is then added to which name
Pack = list[tuple[Pass, int, int]]  # parts of keys of one launch: pass, first and last column


class Group(NamedTuple):
    """Passes of one launch: several share their values (``keys``) or queries and keys."""

    keys: Passes
    values: Passes
    symmetric: bool = False  # the second of two ``values`` is the first with k and v exchanged

    @property
    def passes(self) -> Passes:
        """All of them."""
        return tuple(dict.fromkeys(self.keys + self.values))


def dtype_of(request: Request, name: str) -> str:
    """Intermediates and gradients as they are multiplied, all else as it is accumulated."""
    narrow = request.dtype == "bfloat16" and name != "o" and not any(c in name for c in "@#|")
    return "bfloat16" if narrow else request.accumulate


# What the states of a launch do not depend on
WHATEVER: dict[str, Any] = UNDOTTED | {
    "q": (), "o": (), "end": (), "read": 1.0, "add": False, "batch": (), "tokens": 0,
}  # fmt: skip


class Builder:
    """Collects buffers and steps."""

    def __init__(
        self, request: Request, limits: Limits, rows: Iterable[Row], tokens: int, *, forward: bool
    ):
        whole = tokens == 0 or tokens >= request.tokens
        self.request, self.limits, self.forward = request, limits, forward
        self.tokens = 0 if whole else tokens
        self.rows = tuple(r for r in rows if request.tokens and (whole or r.segments))
        self.shape = named(request)
        self.wide = request.accumulate
        self.narrow = "bfloat16" if request.dtype == "bfloat16" else self.wide  # of products
        self.count = itertools.count()
        self.buffers: dict[str, Buffer] = {}
        self.steps: list[Step] = []
        self.given: set[str] = set()  # names that come from outside
        self.written: set[str] = set()
        self.gates = GateTerms(self)
        self.states: dict[Launch, tuple[Ref, ...]] = {}  # before segments, of launches
        self.buffer("v|1", fill=1.0)

    def of(self, name: str) -> Shape:
        """Shape of an array; a gradient has that of its primal."""
        return self.shape[name] if name in self.shape else self.shape[name.removeprefix("d.")]

    def width(self, name: str) -> int:
        """Columns of an array."""
        return self.of(name)[-1]

    def dtype(self, name: str) -> str:
        """Dtype of a new array."""
        return dtype_of(self.request, name)

    def buffer(self, name: str, shape: Shape | None = None, dtype: str = "", **options: Any) -> Ref:
        """Return a reference to a buffer, new where it is not there yet."""
        if name not in self.buffers:
            self.shape[name] = self.of(name) if shape is None else shape
            self.buffers[name] = Buffer(self.shape[name], dtype or self.dtype(name), **options)
        return Ref(name)

    def temporary(self, name: str, shape: Shape, **options: Any) -> Ref:
        """Return a reference to a new buffer."""
        return self.buffer(f"{name}#{next(self.count)}", shape, **options)

    def total(self, name: str, *terms: tuple[float, Ref], **options: Any) -> None:
        """Set or add to a named array."""
        o = self.buffer(name, **options)
        self.steps.append(Sum(o, (((1.0, o),) if name in self.written else ()) + terms))
        self.written.add(name)

    def operand(self, name: str) -> str:
        """Name of an array; of zeros where none was given or computed."""
        if name in self.given or name in self.written or name == "v|1":
            return name
        return self.buffer(f"0:{name}", self.of(name), self.narrow, fill=0.0).name

    def lead(self, s: Pass) -> tuple[Shape, Shape]:
        """Batch of a pass and of its state."""
        gate = self.request.gate_batch if s.kind != "full" else ()
        held = broadcast(self.of(s.k)[:-2], self.of(s.v)[:-2], gate)
        return broadcast(self.of(s.q)[:-2], held) if s.out or s.dot else held, held

    def adds(self, s: Pass) -> bool:
        """Whether a launch of this pass adds to what is there."""
        return s.out in self.written and self.lead(s)[0] == self.of(s.out)[:-2]

    def run(self, steps: Passes, given: Collection[str], keep: Collection[str]) -> None:
        """Emit all passes: a fused row where one waits, else the first and its company."""
        self.given |= set(given)
        self.gates.expect(steps)
        self.rows = self.able(steps)
        theirs = {s.out for r in self.rows if r.parts for s in r.steps}
        pending = sorted(steps, key=lambda s: s.out in theirs)  # what adds to it goes after
        while pending:
            rows = ((r, self.waiting(r, pending)) for r in self.rows)
            row, passes = next(((r, g) for r, g in rows if g), (None, ()))
            if row is None:
                group = self.together(pending)
                passes = group.passes
                before, launches, after = self.launches(group, pending)
            else:
                before, launches, after = self.fused(row, passes, pending, keep)
            self.steps += [*before, *launches]
            for name, ref in after:
                self.total(name, (1.0, ref))
            pending = [s for s in pending if s not in passes]
            self.steps += self.gates.finished(pending)

    def able(self, steps: Passes) -> tuple[Row, ...]:
        """Return the rows that are used: for a gate's gradient by a step's passes all or none."""
        if not any(s.dot for s in steps):
            return self.rows
        gated = [r for r in self.rows if r.parts]
        theirs = {s.step for r in gated for s in r.steps}
        pending = [s for s in steps if s.step in theirs]
        while found := next((g for r in gated if (g := self.waiting(r, pending))), None):
            pending = [s for s in pending if s not in found]
        if any(s.dot for s in pending):
            gated = []
        return tuple(r for r in self.rows if r in gated or not any(s.dot for s in r.steps))

    def fused(
        self, row: Row, passes: Passes, pending: list[Pass], keep: Collection[str]
    ) -> tuple[list[Sum], list[Step], Sums]:
        """Return a fused row's launches as one step; what only they read has no buffer."""
        others = [s for s in pending if s not in passes]
        used = {n for s in others for n in (s.q, s.k, s.v, s.dot)} | self.written | {*keep}
        inner = tuple(n for n in dict.fromkeys(s.out for s in passes) if n and n not in used)
        before: list[Sum] = []
        found: list[Launch] = []
        after: dict[str, Ref] = {}
        for s in passes:
            sums, launches, rest = self.launches(Group((s,), (s,)), pending, row)
            before += sums
            own = [x for x in launches if isinstance(x, Launch)]
            for name, aside in rest:  # what is added to one name goes aside together
                if (first := after.setdefault(name, aside)) != aside:
                    del self.buffers[aside.name]
                    own = [x._replace(o=(first,), add=True) for x in own]
            found += own
        self.buffers = {n: x for n, x in self.buffers.items() if n not in inner}
        halves = row.parts and row.parts.block
        later = [x for x in found if halves and x.states and halved(x, found)]
        found = [x._replace(end=(None,)) if x in later else x for x in found]
        steps: list[Step] = [Fused(row.name, tuple(found), inner)]
        if self.tokens:
            steps = list(levels(self, row, found, inner))
        for x in later:
            steps += self.gates.first(x)
        return before, steps, list(after.items())

    @staticmethod
    def ready(s: Pass, pending: Iterable[Pass], group: Collection[Pass] = ()) -> bool:
        """Whether no pass that waits, but those of a group, still writes what this one reads."""
        reads = (s.q, s.k, s.v, s.start, s.dot)
        return not any(t.out and t.out in reads for t in pending if t not in group)

    def waiting(self, row: Row, pending: list[Pass]) -> Passes:
        """Return the passes of a fused row, where all of them wait and can run now."""
        does = {s.does: s for s in pending}
        unread = {s.does[1:]: s for s in pending if not s.out}
        group = [s for t in row.steps if (s := does.get(t.does) or unread.get(t.does[1:]))]
        inner = {n for s in group for n in (s.q, s.k, s.v)}  # not to be summed on the way
        able = all(
            self.ready(s, pending, group)
            and (s.out not in inner or self.lead(s)[0] == self.of(s.out)[:-2])
            and (not self.tokens or (s.out and s.out not in inner & self.written))
            and (row.adds or not self.adds(s))
            for s in group
        )
        return tuple(group) if able and len(group) == len(row.steps) else ()

    def mirrored(self, s: Pass, t: Pass) -> bool:
        """Whether one launch adds both: they have each other's k and v."""
        able = self.request.gate in self.limits.symmetric
        fits = able and self.width(s.q) <= self.limits.keys
        one = s.out == t.out and not (s.end or t.end) and s.kind != "full" and s is not t
        return fits and one and (s.q, s.k, s.v) == (t.q, t.v, t.k)

    def together(self, pending: list[Pass]) -> Group:
        """First pass that waits, and at most one more that shares a launch with it.

        Of a program that is the next, of its adjoint another one of the same step.
        """
        s, most = pending[0], self.limits
        same = "power", "kind", "reverse", "read", "write"
        others = pending[1:2] if self.forward else [t for t in pending[1:] if t.step == s.step]
        for t in others:
            alike = all(getattr(s, x) == getattr(t, x) for x in same)
            batches = {self.lead(x)[0] for x in (s, t) if x.out or x.dot}
            alike = alike and len(batches) < 2 and self.lead(s)[1] == self.lead(t)[1]
            if not alike or not self.ready(t, pending):
                continue
            if self.mirrored(s, t):
                return Group((s,), (s, t), symmetric=True)
            one = s.out == t.out and s.v == t.v and not (s.end or t.end)
            if one and not self.forward:  # a denominator's keys are more columns of the matrix's
                return Group((s, t), (s,))
            fits = 0 < self.width(s.v) <= most.values and 0 < self.width(t.v) <= most.second
            adds = s.out and t.out and (s.out == t.out or self.adds(s) != self.adds(t))
            better = any(self.mirrored(x, u) for x in (s, t) for u in pending)
            if (s.q, s.k) == (t.q, t.k) and fits and not (s.dot or t.dot or adds or better):
                return Group((s,), (s, t))
        return Group((s,), (s,))

    def launches(
        self, group: Group, pending: Iterable[Pass], row: Row | None = None
    ) -> tuple[list[Sum], list[Step], Sums]:
        """Return what goes before, the launches, and what is then added to which name."""
        keys, values, whole = group.keys, group.values, row is not None
        parts = row.parts if row else None
        if group.symmetric:
            dk, dv = sorted(values, key=lambda s: not s.turned)
            keys = values = (dk._replace(dot=dv.dot),)
        s, T = values[0], self.request.tokens
        batch, held = self.lead(next((t for t in values if t.out or t.dot), s))
        packs = self.packs(keys, 1 << 30 if whole else self.limits.keys, tails=len(values) == 1)
        read = any(t.out or t.dot for t in values)
        before: list[Sum] = []
        after: Sums = []
        free = len(packs) == 1 or all(self.dtype(t.out) == self.wide for t in values)
        add = free and any(map(self.adds, values))  # what goes aside begins anew
        outs = tuple(
            self.place(t.out, (*batch, T, self.width(t.v)), free, after, like=self.like(t))
            for t in values
            if read
        )
        pairs = keys if len(keys) > 1 else values
        starts = {p: self.start(p, batch, group.symmetric, before) for p in pairs}
        ends = {p: self.end(p, held, pending, after) for p in pairs if any(p.end for p in pairs)}
        self.gates.border(s, batch, ends)
        if T == 0:
            ready = (Sum(e, ((1.0, x),) if (x := starts[p]) else ()) for p, e in ends.items())
            return before, [*ready, *(Sum(o, ()) for o in outs)], after
        found: list[Step] = []
        for i, pack in enumerate(packs):
            cuts = [
                (p, None if (lo, hi) == (0, self.width(p.k)) else (lo, hi)) for p, lo, hi in pack
            ]
            each = [(p if len(values) == 1 else t, cut) for p, cut in cuts for t in values]
            start, end = (
                tuple((ref := of.get(p)) and ref._replace(rows=cut) for p, cut in each)
                for of in (starts, ends)
            )
            q, k = (
                tuple(Ref(self.operand(getattr(p, n)), columns=cut) for p, cut in cuts)
                for n in (("q", "k") if read else ("k", "k"))
            )
            one = Launch(
                q if read else (), k, tuple(Ref(self.operand(t.v)) for t in values), outs,
                start, end, s.power if s.kind != "full" else 0, s.kind == "strict", s.reverse,
                s.read, s.write, read and (add or i > 0), group.symmetric, None, None, None, batch,
                held,
            )  # fmt: skip
            asked = self.gates.asked(s, batch, pack, parts, symmetric=group.symmetric)
            one = one._replace(**asked)
            sizes: list[Shape] = [(hi - lo, self.width(t.v)) for _, lo, hi in pack for t in values]
            tokens = self.tokens if s.kind != "full" and not whole else 0
            found += self.two(one, sizes, tokens) if s.kind == "full" or tokens else [one]
        return before, found, after

    def like(self, s: Pass) -> str:
        """Array that results are laid out like: a gradient like its primal."""
        name = s.out.removeprefix("d.")
        return name if name in ("q", "k", "v") else "q"

    def place(self, name: str, shape: Shape, free: bool, after: Sums, **options: Any) -> Ref:
        """Where a result goes: to its name, or aside to be added; aside where nothing reads it."""
        if name and free and shape == self.of(name):
            self.written.add(name)
            return self.buffer(name, **options)
        aside = self.temporary(name or "unread", shape, **options)
        if name:
            after.append((name, aside))
        return aside

    def end(self, p: Pass, held: Shape, pending: Iterable[Pass], after: Sums) -> Ref:
        """Where a last state goes; of two values both leave theirs."""
        alone = sum(s.end == p.end for s in pending) == 1 and p.end not in self.written
        return self.place(p.end, (*held, self.width(p.k), self.width(p.v)), alone, after)

    def start(self, p: Pass, batch: Shape, symmetric: bool, before: list[Sum]) -> Ref | None:
        """Return a first state; of a gradient, its share where several batch entries share one."""
        if not p.start:
            return None
        *lead, D, V = self.of(p.start)
        copies = math.prod(batch) // max(1, math.prod(lead)) if p.start[:2] == "d." else 1
        if copies <= 1 and not symmetric:
            return Ref(p.start, turned=p.turned)
        total = self.temporary(p.start, (*lead, V, D) if p.turned else (*lead, D, V))
        turns = (False, True) if symmetric else (p.turned,)
        before.append(Sum(total, tuple((1 / copies, Ref(p.start, turned=x)) for x in turns)))
        return total

    def packs(self, keys: Passes, most: int, *, tails: bool) -> list[Pack]:
        """Parts of keys, launch by launch; few columns go along with the part before."""
        packs: list[Pack] = []
        for p in keys:
            D = self.width(p.k)
            packs += [[(p, i, min(i + most, D))] for i in range(0, max(D, 1), most)]
        ((_, lo, hi),) = packs[-1]
        if tails and len(packs) > 1 and hi - lo <= self.limits.tail:
            packs[-2:] = [packs[-2] + packs[-1]]
        return packs

    def two(self, x: Launch, sizes: list[Shape], n: int) -> Iterator[Step]:
        """Cut a launch in two: the states alone, then what reads them.

        A full pass sums all tokens first. A segment is a batch entry with a first state: each
        leaves its own state, those are carried over segments, and all run from what was carried.
        """
        none = (None,) * len(sizes)
        if n and x.q and (begin := self.begun(x)):
            yield x._replace(start=begin, tokens=n)
            return
        axis = (-(-self.request.tokens // n),) if n else ()
        sizes = [(*x.held, *axis, *size) for size in sizes]
        local, begin = (tuple(self.temporary("state", z) for z in sizes) for _ in "ab")
        alone = x._replace(q=(), o=(), start=none, end=local, add=False, batch=x.held)
        yield alone._replace(**UNDOTTED, tokens=n, short=bool(n) and not any(x.end))
        if n:
            fading = self.fading(n) if x.power and self.request.gate else None
            for o, end, mine, start in zip(begin, x.end, local, x.start, strict=True):
                yield Carry(o, end, mine, start, fading, x.power, x.reverse)
        if n == self.tokens:
            self.states[x._replace(**WHATEVER)] = begin
        if x.q and n:
            yield x._replace(start=begin, end=none, tokens=n)
        elif x.q:
            yield x._replace(k=(), v=(), start=local)

    def begun(self, x: Launch) -> tuple[Ref, ...] | None:
        """Return first states of segments that are there, or are the transposes of those."""
        if any(x.end):
            return None
        key = x._replace(**WHATEVER)
        if key in self.states or len(x.k) > 1 or len(x.v) > 1:
            return self.states.get(key)
        turned = tuple(ref and ref._replace(turned=not ref.turned) for ref in x.start)
        found = self.states.get(key._replace(k=x.v, v=x.k, start=turned), ())
        return tuple(ref._replace(turned=True) for ref in found) or None

    def divide(self, s: Divide, keep: Collection[str]) -> None:
        """Divide: in the fused row that alone makes both terms, where it does so, else at last."""
        made = {s.x.name, s.den.name}
        makers = [x for x in self.steps if made & written(x)]
        last = self.steps[-1] if makers == self.steps[-1:] else None
        if isinstance(last, Fused) and any(r.divides and r.name == last.row for r in self.rows):
            inner = last.inner + tuple(sorted(made - {*keep}))
            self.steps[-1] = last._replace(inner=inner, divide=s)
        else:
            self.steps.append(s)

    def fading(self, n: int) -> Ref:
        """Return the sums of the log gate over segments."""
        T, name = self.request.tokens, f"fading#{n}"
        shape = (*self.request.gate_batch, -(-T // n))
        o = self.buffer(name, shape, "float64")
        if name not in self.written:
            self.steps.append(Fading(o, Ref("gate"), n, T))
            self.written.add(name)
        return o


def _replaced(step: Step, rows: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what is read before a result is written over it, chunk by chunk, and the result."""
    if isinstance(step, Fused) and step.row in rows:
        yield from ((x.q[0].name, x.o[0].name) for x in step.launches if x.q and x.o)
    elif isinstance(step, Launch) and len(step.q) == len(step.k) == len(step.v) == 1:
        v, o = step.v[0].name, step.o[0].name
        yield from [(v, o)] if v not in names((step.q, step.k, step.x)) else ()


def finished(b: Builder, results: Mapping[str, str], kept: tuple[str, ...] = ()) -> Plan:
    """Order allocations: before the first step that names a buffer, until after the last."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, step in enumerate(b.steps):
        for name in sorted(names(step)):
            first.setdefault(name, i)
            last[name] = i
    own = {n: x for n, x in b.buffers.items() if n in first}
    outs = {*results.values(), *kept, "gate"}  # which launches read without naming it
    for i, step in enumerate(b.steps):
        for x, o in _replaced(step, {r.name for r in b.rows if r.in_place}):
            idle = x in own and last[x] == i == first.get(o) and own[x].fill is None
            if idle and x not in outs and not own[o].reuses and own[x][:2] == own[o][:2]:
                own[o] = own[o]._replace(reuses=x)
    fresh = [tuple(n for n in own if first[n] == i) for i in range(len(b.steps))]
    dead = [tuple(n for n in last if last[n] == i and n not in outs) for i in range(len(b.steps))]
    given = tuple(n for n in first if n not in own)
    return Plan(own, tuple(b.steps), tuple(fresh), tuple(dead), given, dict(results), kept)


@functools.lru_cache(maxsize=1024)
def forward(
    request: Request,
    limits: Limits,
    rows: tuple[Row, ...] = (),
    tokens: int = 0,
    *,
    start: bool = False,
) -> Plan:
    """Plan o, the final state and what `backward` reads.

    Parameters
    ----------
    request : Request
        The call.
    limits, rows
        What the device has for it: the first row whose passes wait is taken.
    tokens : int
        Of a segment; 0 for the whole sequence as one.
    start : bool
        Whether there is an initial state.
    """
    steps, kept = alive(request, start), saved(request)
    b = Builder(request, limits, rows, tokens, forward=True)
    D = request.k_shape[-1]
    once = sum(s.out == "o" for s in steps) == 1 and limits.keys >= D
    direct = once and not request.normalize  # else o is rounded after the last sum
    b.buffer("o", dtype=request.dtype if direct else b.wide, like="q")
    given = {"q", "k", "v"} | {s.start for s in steps} - {""}
    b.run(steps, given, {*kept, "o", "o|1"})
    out = Ref("o") if direct else b.buffer("out", b.of("o"), request.dtype, like="q")
    if request.normalize:
        b.divide(Divide(out, Ref("o"), Ref("o|1"), request.eps), kept)
    elif not direct:
        b.total("out", (1.0, Ref("o")))
    return finished(b, {"o": out.name} | {s.end: s.end for s in steps if s.end}, kept)


ALL = frozenset("qkv")


@functools.lru_cache(maxsize=1024)
def backward(
    request: Request,
    limits: Limits,
    rows: tuple[Row, ...] = (),
    tokens: int = 0,
    *,
    start: bool = False,
    do: bool = True,
    dstate: bool = False,
    wanted: frozenset[str] = ALL,
) -> Plan:
    """Plan the gradients of q, k and v, of a gate that was given, and of an initial state.

    Parameters
    ----------
    request, limits, rows, tokens, start
        As given to `forward`.
    do : bool
        Whether there is a gradient of o, "d.o" (of a quotient "d.out").
    dstate : bool
        Whether there are gradients of the final state, "d.S@T".
    wanted : frozenset of str
        Which of q, k and v.
    """
    b = Builder(request, limits, rows, tokens, forward=False)
    program = request.passes
    gate = request.gate_given and request.gate is not None
    given = {"q", "k", "v", *saved(request)}
    given |= {d(s.end) for s in request.passes if dstate and s.end}
    given |= {s.start for s in program if start}
    have = given | {"v|1"} | ({d("o")} if do else set())
    if do and request.normalize:
        dden = b.temporary("d.o|1", (*b.of("o")[:-1], 1), like="o")  # den may have fewer axes
        o = b.buffer("d.o", like="o")
        b.steps.append(Divide(o, Ref("d.out"), Ref("o|1"), request.eps, Ref("o"), dden))
        b.written.add("d.o")
        b.total("d.o|1", (1.0, dden), like="o|1")
        have.add("d.o|1")
    elif do:
        given.add("d.o")
    if gate:  # of a state's gradient alone: the states are needed all the same
        have |= {d(s.out) for s in program if d(s.end) in given}
    states = tuple(dict.fromkeys(s.start for s in request.passes if start))
    ends = [d(x) for x in "qkv" if x in wanted] + [d(x) for x in states]
    steps, _ = prune(adjoint(program), have, ends, gate=gate)
    b.run(steps, given, ends)
    results = {}
    for name in ends:
        if name not in b.written:
            b.total(name, like=name[2:] if "@" not in name else "")
        results[name] = name
        if "@" not in name and b.buffers[name].dtype != request.dtype:
            b.buffer(f"{name}'", b.of(name), request.dtype, like=name)
            b.total(f"{name}'", (1.0, Ref(name)))
            results[name] = f"{name}'"
    if gate:
        tokens_of = (request.tokens,) if request.gate == "log_gate" else ()
        o = b.buffer("d.gate", (*request.gate_batch, *tokens_of), b.wide, like="")
        b.steps.append(GateSum(o, Ref("gate"), tuple(b.gates.found)))
        results["d.gate"] = "d.gate"
    return finished(b, results)
