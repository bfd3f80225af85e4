"""The gradient of the gate in a plan: what the launches of a pass's dq and dv leave for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..core.passes import Pass, Shape
from ..core.programs import Passes
from .steps import (
    UNDOTTED,
    Border,
    Carry,
    GateGradient,
    Launch,
    Limits,
    Parts,
    Ref,
    Skew,
    Step,
    Sum,
)

if TYPE_CHECKING:
    from .plan import Builder

Key = tuple[int, Shape]  # step of the program, batch of its output


class Term:
    """One step of the program: its matrix and, of the same batch, its denominator."""

    def __init__(self, power: int, strict: bool) -> None:
        self.power, self.strict, self.factor = power, strict, 1.0
        self.waiting: set[Pass] = set()
        self.widths = {False: [0, 0], True: [0, 0]}  # of S and of R, by direction: columns, rows
        self.dots: dict[bool, list[Ref]] = {False: [], True: []}
        self.border: list[tuple[Ref, Ref]] = []
        self.states: dict[bool, Ref | None] = {False: None, True: None}
        self.parts: Parts | None = None  # of the fused rows that do its launches
        self.period = 0  # and tokens between the states that they keep
        self.met: Ref | None = None
        self.carried: Carry | None = None  # R, where the first S need not be symmetric
        self.one = False  # whether its k is its v
        self.ends = True

    def chunk(self, limits: Limits, gate: str | None) -> int:
        """Tokens by which all its launches count."""
        if self.parts:
            return self.parts.chunk
        V, D = self.widths[False]
        return limits.chunk if isinstance(limits.chunk, int) else limits.chunk(D, V, gate, self.one)


class GateTerms:
    """What each step of a program contributes."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.terms: dict[Key, Term] = {}
        self.offset: dict[Pass, int] = {}  # of a pass's columns in S, of its rows in R
        self.found: list[Ref] = []
        self.gate: dict[Shape, Ref] = {}  # in the batch of terms

    def key(self, s: Pass) -> Key:
        """Which term a pass belongs to."""
        return s.step, self.builder.lead(s)[0]

    def expect(self, steps: Passes) -> None:
        """Note the passes that will leave dots: dq runs as the program does, dv in reverse."""
        width = self.builder.width
        for s in steps:
            if not s.dot:
                continue
            term = self.terms.setdefault(self.key(s), Term(s.power, s.kind == "strict"))
            term.waiting.add(s)
            columns, rows = term.widths[s.reverse]
            term.one |= not s.reverse and s.k == s.v
            term.ends &= not (s.reverse and s.start)
            if s.reverse:
                self.offset[s], rows, columns = rows, rows + width(s.v), width(s.k)
            else:
                self.offset[s], columns, rows = columns, columns + width(s.k), width(s.v)
            term.widths[s.reverse] = [columns, rows]

    def asked(
        self,
        s: Pass,
        batch: Shape,
        pack: list[tuple[Pass, int, int]],
        parts: Parts | None,
        *,
        symmetric: bool,
    ) -> dict[str, Any]:
        """Return what a launch leaves: its fields; ``parts`` is that of a fused row."""
        if not s.dot:
            return {}
        b, term = self.builder, self.terms[s.step, batch]
        T, limits, width = b.request.tokens, b.limits, b.width(s.v)
        period, tiles = limits.period, -(-width // limits.tile)
        if parts:
            term.period = math.gcd(b.tokens, parts.period)
            period, tiles = term.period, parts.writes if s.reverse else parts.reads
        dtype = "float32" if b.request.dtype == "bfloat16" else "float64"
        shape = (*batch, tiles, T * (2 if s.reverse else 1))
        dots = b.temporary("dots", shape, dtype=dtype, like="")
        term.dots[s.reverse].append(dots)
        term.factor = 0.5 if symmetric else term.factor  # of a state for k and v alike
        term.parts = parts
        found = {"x": Ref(s.dot), "dots": dots, "chunk": term.chunk(limits, b.request.gate)}
        if b.tokens % period:
            raise ValueError(
                f"segments have {b.tokens} tokens; expected a multiple of {period}, the"
                " period of the states that a gate's gradient reads"
            )
        n = max(0, T - 1) // period
        if n and parts:
            kept = term.states[True] or b.temporary(
                "kept", (*batch, n, parts.side, parts.side), dtype=b.narrow, like=""
            )
            term.states[True] = kept
            if s.reverse:
                return found | {"states": kept}
            term.met = b.temporary("met", (*batch, n, parts.met), dtype=b.wide, like="")
            return found | {"kept": kept, "met": term.met}
        if n:
            columns, rows = term.widths[s.reverse]
            states = term.states[s.reverse] or b.temporary(
                "kept", (*batch, n, rows, columns), dtype=b.narrow, like=""
            )
            term.states[s.reverse] = states
            (first, lo, _), (last, _, hi) = pack[0], pack[-1]
            begin = self.offset.get(s, 0) if s.reverse else 0
            lo, hi = (
                x + (0 if s.reverse else self.offset[p]) for x, p in ((lo, first), (hi, last))
            )
            found["states"] = states._replace(rows=(begin, begin + width), columns=(lo, hi))
        return found

    def border(self, s: Pass, batch: Shape, ends: dict[Pass, Ref]) -> None:
        """Note the gradients of first states beside what they are gradients of."""
        if s.dot and s.reverse:
            found = [(Ref(p.end.removeprefix("d.")), end) for p, end in ends.items() if p.end]
            self.terms[s.step, batch].border += found

    def first(self, x: Launch) -> list[Step]:
        """Return what makes the gradient of a first S by periods, of a launch that leaves R + R'.

        That is in segments, which are more programs than the whole would be.
        """
        b = self.builder
        size = b.width(x.k[0].name), b.width(x.v[0].name)
        term = next(t for t in self.terms.values() if t.states[True] == x.states)
        steps = list(b.two(x._replace(q=(), o=(), **UNDOTTED), [size], term.period))
        term.carried = next(s for s in steps if isinstance(s, Carry))
        return steps

    def skew(self, term: Term) -> list[Step]:
        """Return what adds to a term's products what is of a first S alone."""
        s, met = term.carried, term.met
        if s is None or met is None or s.fading is None or term.parts is None:
            return []
        S = next(S for S, end in term.border if end == s.end)
        part = met._replace(columns=(0, 1))
        return [Skew(part, S, s.o, s.fading, s.power, term.parts.block)]

    def finished(self, pending: list[Pass]) -> list[Step]:
        """Return the steps for which nothing is waited."""
        steps: list[Step] = []
        for (step, batch), term in list(self.terms.items()):
            if not any(s in pending for s in term.waiting):
                del self.terms[step, batch]
                steps += self.steps(batch, term) if self.builder.request.tokens else []
        return steps

    def steps(self, batch: Shape, term: Term) -> list[Step]:
        """Return the steps of one term."""
        b, steps = self.builder, list[Step]()
        T, log = b.request.tokens, b.request.gate == "log_gate"
        period = term.period or b.limits.period
        shape = (*batch, T if log else -(-T // period))
        o = b.temporary("d.gate", shape, dtype=b.wide if log else "float64")
        self.found.append(o)

        def one(name: str, shape: Shape, dtype: str, refs: list[Ref]) -> Ref:
            """Add up to one array of a shape."""
            if len(refs) == 1 and (b.of(refs[0].name) == shape or term.parts):
                return refs[0]
            total = b.temporary(name, shape, dtype=dtype)
            steps.append(Sum(total, tuple((1.0, ref) for ref in refs)))
            return total

        dots = term.dots
        exact = b.buffers[dots[False][0].name].dtype
        reads = one("dots", (*batch, 1, T), exact, dots[False])
        writes = one("dots", (*batch, 1, 2 * T), exact, dots[True])
        b.shape["gate"] = (*b.request.gate_batch, *((T,) if log else ()))
        given = (*batch, *((T,) if log else ()))
        if math.prod(given) == math.prod(b.shape["gate"]):  # as many are the same, in their order
            self.gate[given] = Ref("gate")
        elif given not in self.gate:
            self.gate[given] = b.temporary("gate", given, dtype=b.wide)
            steps.append(Sum(self.gate[given], ((1.0, Ref("gate")),)))
        gate = self.gate[given]
        border = None
        if term.border:
            border = b.temporary("border", batch, dtype="float64")
            steps.append(Border(border, tuple(term.border)))
        S, R = (None, None) if term.parts else (term.states[False], term.states[True])
        refs = reads, writes, gate, border, S, R
        options = (
            term.power,
            term.strict,
            term.factor,
            term.ends,
            term.chunk(b.limits, b.request.gate),
            period,
        )
        return [*steps, *self.skew(term), GateGradient(o, *refs, *options, met=term.met)]
