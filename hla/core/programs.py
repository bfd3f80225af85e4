"""Every operator of the paper as a short program of passes, and the adjoint of any program: data.

A program is steps ``out = pass(q, k, v)`` with the exponent of the gate; steps of one ``out`` are
summed, "o" is the output. All programs are linear in v, so a denominator is one more column of v
holding ones, and a state's denominator (m, eta, n, h) is that column of its matrix (P or C, F, E,
G). A state is "S@0" before the first token and "S@T" after the last, of its matrix S, and the
gradient of x is "d.x": nothing else distinguishes the two directions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from .. import states
from .passes import Pass, Shape, broadcast, remembered

Passes = tuple[Pass, ...]


class Program(NamedTuple):
    """Steps in order, and the type of the state that they keep."""

    steps: Passes
    state: type[Any] | None = None


# The denominator of each matrix that has one: the same sum with v = 1.
DENOMINATOR = {"P": "m", "C": "m", "E": "n", "F": "eta", "G": "h", "X": "x"}
S, Q, R, Y = ("S",), ("Q",), ("R",), ("Y",)
C, P, E, F, G, X = ((name, DENOMINATOR[name]) for name in "CPEFGX")
KEYS, VALUES = Pass("y", "q", "k", "k", S), Pass("u", "q", "k", "v", P)

CAUSAL: dict[str, Passes] = {
    "linear": (Pass("o", "q", "k", "v", P),),
    "hla2": (KEYS, Pass("o", "q", "y", "v", F, 2)),
    "ahla": (VALUES, Pass("o", "q", "k", "u", E)),
    "hla3": (KEYS, VALUES, Pass("o", "q", "y", "u", F, 3)),
}
READ = Pass("o", "z", "k", "v", P)
PREFIX: dict[str, Passes] = {
    "linear": CAUSAL["linear"],
    "hla2": (KEYS, Pass("o", "y", "q", "v", C)),
    "ahla": (Pass("z", "q", "k", "q", R), READ),
    "hla3": (KEYS, Pass("z", "y", "q", "q", Q), READ),
}
# The paper's serial recurrences, where they differ from the sums (derivations 3).
PAPER: dict[str, Passes] = {
    "hla2": (
        *PREFIX["hla2"],
        Pass("c", "k", "q", "v", C, 1, "strict"),
        Pass("o", "q", "k", "c", G, read=-1.0),
    ),
    "hla3": (
        *PREFIX["hla3"],
        Pass("b1", "k", "q", "q", Q, 1, "strict"),
        Pass("c1", "b1", "k", "v", P, 1, "strict"),
        Pass("o", "q", "k", "c1", ("G1", "h1"), read=-1.0),
        Pass("b2", "q", "k", "k", S, 1, "strict"),
        Pass("c2", "q", "k", "v", P, 1, "strict"),
        Pass("o", "q", "b2", "c2", ("G2", "h2"), read=-1.0),
        Pass("b3", "b1", "k", "k", S, 1, "strict"),
        Pass("o", "q", "b3", "v", ("G3", "h3"), read=-1.0),
    ),
}
# What a causal segment must know of its tokens beyond a state (derivations 2).
SEGMENT: dict[str, Passes] = {
    "linear": (),
    "hla2": (Pass("", "", "q", "v", C),),
    "ahla": (Pass("", "", "k", "q", R, 0),),
    "hla3": (Pass("", "", "q", "q", Q), Pass("", "", "q", "u", X, 2), Pass("", "", "y", "q", Y, 2)),
}
RIDGE = Pass("o", "q", "q", "v", C)
PROGRAMS = {"causal": CAUSAL, "prefix": PREFIX, "none": PREFIX, "paper": PAPER}


@remembered
def program(operator: str, mask: str, convention: str, ridge: Any, state: Any) -> Program:
    """Return the program of one request.

    Parameters
    ----------
    operator, mask, convention : str
        As in `hla.scan`.
    ridge : float
        Coefficient of the pass (q, q, v), hla2 only; 0.0 for none.
    state : type, optional
        Type of the incoming state; `HLA2RidgeState` keeps C and m going also where ridge is 0.
    """
    paper = convention == "paper" and mask == "causal" and operator in PAPER
    steps = PROGRAMS["paper" if paper else mask][operator]
    ridged = not isinstance(ridge, (int, float)) or ridge != 0  # a tracer stands for one
    if ridged or state is states.HLA2RidgeState:
        steps += (RIDGE._replace(read=ridge) if ridged else RIDGE._replace(out="ridge"),)
    if mask == "none":
        return Program(stateful(tuple(s._replace(kind="full") for s in steps)))
    return Program(stateful(steps), states.STATES[fields_of(steps)])


def fields_of(steps: Passes) -> frozenset[str]:
    """Return the fields of the states of passes, which name their type."""
    return frozenset(field for s in steps for field in s.state)


@remembered
def segment_program(operator: str, mask: str) -> Passes:
    """Return the passes whose last states make up a segment, of its state and what follows it."""
    return stateful(PROGRAMS[mask][operator] + (SEGMENT[operator] if mask == "causal" else ()))


def stateful(steps: Passes) -> Passes:
    """Return numbered steps with names of states; of those that share one, the last leaves it."""
    last = {s.state: i for i, s in enumerate(steps)}
    return tuple(
        s._replace(
            step=i, start=f"{s.state[0]}@0", end=f"{s.state[0]}@T" if last[s.state] == i else ""
        )
        for i, s in enumerate(steps)
    )


@remembered
def single_passes(program: Program, scale: float) -> Passes:
    """Return the passes of a program with its denominators and the scale of q as data.

    A denominator is the pass of "v|1", a single column of ones, into "o|1". The scale is in
    ``read`` and ``write`` and nowhere else.
    """
    found = []
    for s in program.steps:
        read = float(s.read) * (scale if s.q == "q" else 1.0)
        write = (scale if s.k == "q" else 1.0) * (scale if s.v == "q" else 1.0)
        for field, column in zip(s.state, ("", "|1"), strict=False):
            found.append(
                s._replace(
                    out=s.out + column, v=s.v + column, read=read, write=write,
                    start=f"{field}@0", end=s.end and f"{field}@T",
                )
            )  # fmt: skip
    return tuple(found)


def d(name: str) -> str:
    """Name of a gradient; of nothing, nothing."""
    return name and f"d.{name}"


def transposed(s: Pass) -> Passes:
    """Return the passes that give the gradients of a pass's q, k and v (and of its first state).

    The gate's gradient takes products of the first and the last with q and v (derivations 5).
    """
    do = d(s.out)
    back = s._replace(reverse=not s.reverse, read=s.write, write=s.read, start=d(s.end), end="")
    return (
        s._replace(out=d(s.q), q=do, k=s.v, v=s.k, end="", turned=True, dot=s.q),
        back._replace(out=d(s.k), q=s.v, k=do, v=s.q, turned=True),
        back._replace(out=d(s.v), q=s.k, k=s.q, v=do, end=d(s.start), dot=s.v),
    )


def adjoint(steps: Passes) -> Passes:
    """Return the program of the gradients: the last step first, each of its passes as three."""
    return tuple(t for s in sorted(steps, key=lambda s: -s.step) for t in transposed(s))


def prune(
    steps: Passes, given: Collection[str], wanted: Collection[str], *, gate: bool = False
) -> tuple[Passes, set[str]]:
    """Keep the passes that ``wanted`` depends on; also return every name that is not zero.

    What was neither given nor computed is zero: a pass of zero k or v only passes its first state
    on. A name that a kept pass need not leave becomes "".

    Parameters
    ----------
    steps : tuple of Pass
        A program.
    given, wanted : collection of str
        Names of arrays that are there, and that are requested.
    gate : bool
        Whether the products with ``dot`` are requested.
    """
    have, found, need, kept = set(given), [], set(wanted), []
    for s in steps:
        s = s._replace(start=s.start if s.start in have else "")
        fed, read = s.k in have and s.v in have, s.q in have
        if (fed or s.start) and (read or s.end in need):
            have |= {s.end, s.out} if read else {s.end}
            found.append(s if read else s._replace(out=""))
    for s in reversed(found):
        dot = s.dot if gate and s.q in have else ""
        s = s._replace(
            out=s.out if s.out in need else "", end=s.end if s.end in need else "", dot=dot
        )
        if s.out or s.end or s.dot:
            need |= {s.k, s.v, s.start, s.dot} | ({s.q} if s.out or s.dot else set())
            kept.append(s)
    return tuple(reversed(kept)), have


pruned = remembered(prune)


def sweeps(steps: Passes) -> tuple[Passes, ...]:
    """Cut a program into as few groups as can be whose passes run together, token by token."""
    return min((tuple(_alternating(steps, reverse)) for reverse in (False, True)), key=len)


def _alternating(steps: Passes, reverse: bool) -> Iterator[Passes]:
    """Yield groups of one direction in turn: all that read nothing of a pass that still waits."""
    while steps:
        group, left, waiting = list[Pass](), list[Pass](), set[str]()
        for s in steps:
            if s.reverse == reverse and not waiting & {s.q, s.k, s.v, s.start, s.dot}:
                group.append(s)
            else:
                left.append(s)
                waiting |= {s.out, s.end} - {""}
        if group:
            yield tuple(group)
        steps, reverse = tuple(left), not reverse


def all_shapes(
    steps: Passes, shapes: Mapping[str, Shape], gate: Shape
) -> tuple[dict[str, Shape], list[Shape]]:
    """Full shape of every named value, and of the state of each step.

    A state has the broadcast of just the inputs that it is made of; a gradient has the shape of
    what it is of.

    Parameters
    ----------
    steps : tuple of Pass
        Of a program or of its adjoint.
    shapes : mapping
        Of what is given, (*batch, T, features).
    gate : tuple of int
        Batch shape of the gate.
    """
    shapes, states = dict(shapes), []
    for s in steps:
        k, v = shapes[s.k], shapes[s.v]
        held = broadcast(k[:-2], v[:-2], gate)
        states.append((*held, k[-1], v[-1]))
        if s.out:
            others = shapes.get(s.out, (1, 1))[:-2]
            made = (*broadcast(others, held, shapes[s.q][:-2]), *k[-2:-1], v[-1])
            shapes[s.out] = (
                shapes.get(s.out.removeprefix("d."), made) if s.out[:2] == "d." else made
            )
    return shapes, states


def state_shapes(steps: Passes, q: Shape, k: Shape, v: Shape, gate: Shape) -> dict[str, Shape]:
    """Full shape of each state field; arguments are those of `all_shapes`."""
    given, shapes = {"q": q, "k": k, "v": v}, dict[str, Shape]()
    _, matrices = all_shapes(steps, given, gate)
    _, columns = all_shapes(steps, given | {"v": (*v[-2:-1], 1)}, gate)  # the column of ones
    for s, matrix, column in zip(steps, matrices, columns, strict=True):
        shapes |= zip(s.state, (matrix, column[:-1]), strict=False)
    return shapes
