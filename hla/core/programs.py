"""Every operator of the paper as a short program of passes, and the interpreter that runs them.

A program is data: steps ``out = pass(q, k, v)`` with the exponent of the gate, and a signed sum of
their outputs. All programs are linear in v, so a denominator is one more column of v holding ones,
and the mass of a state (m, eta, n, h) is that column of its matrix (P or C, F, E, G).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from . import ahla, hla2, hla3, linear
from .algebra import MASS
from .namespace import Array, padded
from .passes import (
    CHUNK,
    Fields,
    Gate,
    Pass,
    Shape,
    broadcast,
    causal_pass,
    started,
    sweep,
)

RunPass = Callable[..., tuple[Array, Array]]
Passes = tuple[Pass, ...]


class Program(NamedTuple):
    """Steps in order, the state's type, and the signed sum that is the output."""

    steps: tuple[Pass, ...]
    state: type[Any] | None = None
    outputs: tuple[tuple[float, str], ...] = ((1, "o"),)


S, Q, R, Y = ("S",), ("Q",), ("R",), ("Y",)
C, P, E, F, G, X = ((name, MASS[name]) for name in "CPEFGX")
KEYS, VALUES = Pass("y", "q", "k", "k", S), Pass("u", "q", "k", "v", P)

CAUSAL: dict[str, Program] = {
    "linear": Program((Pass("o", "q", "k", "v", P),), linear.LinearState),
    "hla2": Program((KEYS, Pass("o", "q", "y", "v", F, 2)), hla2.HLA2State),
    "ahla": Program((VALUES, Pass("o", "q", "k", "u", E)), ahla.AHLAState),
    "hla3": Program((KEYS, VALUES, Pass("o", "q", "y", "u", F, 3)), hla3.HLA3State),
}
READ = Pass("o", "z", "k", "v", P)
PREFIX: dict[str, Program] = {
    "linear": CAUSAL["linear"],
    "hla2": Program((KEYS, Pass("o", "y", "q", "v", C)), hla2.HLA2PrefixState),
    "ahla": Program((Pass("z", "q", "k", "q", R), READ), ahla.AHLAPrefixState),
    "hla3": Program((KEYS, Pass("z", "y", "q", "q", Q), READ), hla3.HLA3PrefixState),
}
# The paper's serial recurrences letter by letter, where they differ from the sums (derivations 3).
PAPER: dict[str, Program] = {
    "hla2": Program(
        (
            *PREFIX["hla2"].steps,
            Pass("c", "k", "q", "v", C, 1, "strict"),
            Pass("g", "q", "k", "c", G),
        ),
        hla2.HLA2PaperState,
        ((1, "o"), (-1, "g")),
    ),
    "hla3": Program(
        (
            *PREFIX["hla3"].steps,
            Pass("b1", "k", "q", "q", Q, 1, "strict"),
            Pass("c1", "b1", "k", "v", P, 1, "strict"),
            Pass("g1", "q", "k", "c1", ("G1", "h1")),
            Pass("b2", "q", "k", "k", S, 1, "strict"),
            Pass("c2", "q", "k", "v", P, 1, "strict"),
            Pass("g2", "q", "b2", "c2", ("G2", "h2")),
            Pass("b3", "b1", "k", "k", S, 1, "strict"),
            Pass("g3", "q", "b3", "v", ("G3", "h3")),
        ),
        hla3.HLA3PaperState,
        ((1, "o"), (-1, "g1"), (-1, "g2"), (-1, "g3")),
    ),
}
# What `summarize` needs beyond a causal state; its fields are then renamed by the operator.
SEGMENT: dict[str, tuple[Pass, ...]] = {
    "linear": (),
    "hla2": (Pass("", "", "q", "v", C),),
    "ahla": (Pass("", "", "k", "q", R, 0),),
    "hla3": (Pass("", "", "q", "q", Q), Pass("", "", "q", "u", X, 2), Pass("", "", "y", "q", Y, 2)),
}
RIDGE = Pass("ridge", "q", "q", "v", C)


@functools.cache
def program(operator: str, mask: str, convention: str, ridge: bool, state: Any) -> Program:
    """Return the program of one request, that of the ridge with the coefficient 1.

    Parameters
    ----------
    operator, mask, convention : str
        As in `hla.scan`.
    ridge : bool
        Whether there is the pass (q, q, v); hla2 only.
    state : type, optional
        Type of the incoming state; `HLA2RidgeState` keeps C and m going also where ridge is 0.
    """
    if mask == "causal":
        table = PAPER if convention == "paper" and operator in PAPER else CAUSAL
    else:
        table = PREFIX
    chosen = table[operator]
    if ridge or state is hla2.HLA2RidgeState:
        keeps = hla2.HLA2RidgeState if chosen.state is hla2.HLA2State else chosen.state
        outputs = (*chosen.outputs, (1, "ridge")) if ridge else chosen.outputs
        chosen = Program((*chosen.steps, RIDGE), keeps, outputs)
    if mask == "none":
        steps = tuple(step._replace(kind="full") for step in chosen.steps)
        chosen = Program(steps, None, chosen.outputs)
    return chosen


def segment_program(operator: str, mask: str) -> Program:
    """Return the program whose final states make up a segment (derivations 2)."""
    if mask == "prefix":
        return PREFIX[operator]._replace(outputs=())
    return Program((*CAUSAL[operator].steps, *SEGMENT[operator]), outputs=())


@functools.lru_cache(maxsize=1024)
def single_passes(program: Program, scale: float) -> Passes:
    """Return the passes of a program with its denominators and factors as data.

    A denominator is the pass of "v|1", a single column of ones, into "o|1". Passes of one ``out``
    are summed. A state is "S@0" before the first token and "S@T" after the last; of the passes that
    share one, the last leaves it. The scale of q is in ``read`` and ``write`` and nowhere else.
    """
    factors = {name: float(factor) for factor, name in program.outputs}
    last, found = {s.state: i for i, s in enumerate(program.steps)}, []
    for i, s in enumerate(program.steps):
        out = "o" if s.out in factors else s.out
        read = factors.get(s.out, 1.0) * (scale if s.q == "q" else 1.0)
        write = (scale if s.k == "q" else 1.0) * (scale if s.v == "q" else 1.0)
        for field, column in zip(s.state, ("", "|1"), strict=False):
            one = s._replace(out=out + column, v=s.v + column, read=read, write=write, step=i)
            end = f"{field}@T" if last[s.state] == i else ""
            found.append(one._replace(start=f"{field}@0", end=end))
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
        Names of arrays that are there, and that are asked for.
    gate : bool
        Whether the products with ``dot`` are asked for.
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


class Trace(NamedTuple):
    """What a run leaves behind: every named array, each step's final state, what it kept."""

    values: dict[str, Array]
    states: tuple[Array, ...]
    kept: tuple[Array, ...] = ()


def run(
    program: Program,
    values: Mapping[str, Array],
    gate: Gate,
    initial: Mapping[Fields, Array],
    *,
    chunk: int = CHUNK,
    keep: bool = False,
) -> tuple[Array | None, Trace]:
    """Run a program forward, all its steps in one sweep.

    Parameters
    ----------
    program : Program
        What to run.
    values : mapping
        "q", "k", "v" in the accumulation dtype, v with its column of ones where masses are asked.
    gate : Gate
        Decay of every step.
    initial : mapping
        Incoming states by the fields they hold.
    chunk : int
        Tokens in a chunk.
    keep : bool
        Keep every intermediate, for `adjoint`.

    Returns
    -------
    o : array or None, trace : Trace
    """
    if any(s.kind == "full" for s in program.steps):
        return run_passes(program, values, gate, initial, chunk=chunk)
    env = dict(values)
    needed = [s.out for s in program.steps if s.out] if keep else [x for _, x in program.outputs]
    shapes = step_states(program, {n: tuple(x.shape) for n, x in values.items()}, gate.batch)
    begin, given = [], dict[Any, Array](values) | dict(initial)
    for s, shape, names in zip(program.steps, shapes, _ingredients(program.steps), strict=True):
        made_of = [given[name] for name in names if name in given]
        begin.append(started(initial.get(s.state), shape, made_of, gate))
    outs, ends = sweep(program.steps, values, gate, begin, chunk=chunk, outputs=needed)
    env.update(outs)
    return summed(program, env), Trace(env, ends)


def run_passes(
    program: Program,
    values: Mapping[str, Array],
    gate: Gate,
    initial: Mapping[Fields, Array],
    *,
    chunk: int = CHUNK,
    keep: bool = True,
    run_pass: RunPass = causal_pass,
) -> tuple[Array | None, Trace]:
    """Run a program pass by pass, each over the whole sequence; as `run`."""
    env, states = dict(values), []
    for s in program.steps:
        options = {"power": s.power, "kind": s.kind, "state": initial.get(s.state), "chunk": chunk}
        env[s.out], state = run_pass(env[s.q], env[s.k], env[s.v], gate, **options)
        states.append(state)
    return summed(program, env), Trace(env, tuple(states))


def run_single(
    steps: Passes,
    values: Mapping[str, Array],
    gate: Gate,
    *,
    chunk: int = CHUNK,
    run_pass: RunPass = causal_pass,
) -> dict[str, Array]:
    """Run passes that stand by themselves, of a program or of its adjoint, one after the other.

    Parameters
    ----------
    steps : tuple of Pass
        As `prune` leaves them.
    values : mapping
        Arrays by name, "v|1" among them, states (*batch, D, V).
    gate, chunk, run_pass
        As given to `run_passes`.

    Returns
    -------
    dict
        Every array by name.
    """
    env = dict(values)
    for s in steps:
        q, k, v = (env[name] for name in (s.q, s.k, s.v))
        start = env[s.start] if s.start else None
        start = start.mT if s.turned and start is not None else start
        options = {"power": s.power, "kind": s.kind, "reverse": s.reverse, "chunk": chunk}
        out, end = run_pass(q, weighted(s.write, k), v, gate, state=start, **options)
        for name, x in ((s.out, weighted(s.read, out)), (s.end, end)):
            if name:
                env[name] = env[name] + x if name in env else x
    return env


def step_states(program: Program, shapes: Mapping[str, Shape], gate: Shape) -> list[Shape]:
    """Full shape of the state of each step, the broadcast of just the inputs it is made of."""
    return all_shapes(program, shapes, gate)[1]


def all_shapes(
    program: Program, shapes: Mapping[str, Shape], gate: Shape
) -> tuple[dict[str, Shape], list[Shape]]:
    """Full shape of every named value, and of the state of each step.

    Parameters
    ----------
    program : Program
        Any.
    shapes : mapping
        Of "q", "k" and "v", (*batch, T, features).
    gate : tuple of int
        Batch shape of the gate.
    """
    shapes, found = dict(shapes), []
    for s in program.steps:
        k, v = shapes[s.k], shapes[s.v]
        held = broadcast(k[:-2], v[:-2], gate)
        found.append((*held, k[-1], v[-1]))
        if s.q:
            shapes[s.out] = (*broadcast(held, shapes[s.q][:-2]), *k[-2:-1], v[-1])
    return shapes, found


@functools.lru_cache(maxsize=1024)
def _ingredients(steps: tuple[Pass, ...]) -> tuple[tuple[str | Fields, ...], ...]:
    """Names of the inputs and of the incoming states that the state of each step is made of."""
    found: list[dict[str | Fields, None]] = []  # dicts, which unlike sets have an order
    of: dict[str, dict[str | Fields, None]] = {x: {x: None} for x in "qkv"}
    for s in steps:
        found.append({**of[s.k], **of[s.v], s.state: None})
        if s.q:
            of[s.out] = {**of[s.q], **found[-1]}
    return tuple(map(tuple, found))


def summed(program: Program, env: Mapping[str, Array]) -> Array | None:
    """Return the signed sum of a program's outputs."""
    o = None
    for coefficient, name in program.outputs:
        term = weighted(coefficient, env[name])
        o = term if o is None else o + term
    return o


def weighted(coefficient: float, x: Array) -> Array:
    """Multiply ``x`` by a program's coefficient, which a tracer may stand for."""
    return x if isinstance(coefficient, (int, float)) and coefficient == 1 else coefficient * x


def final_states(program: Program, trace: Trace) -> dict[Fields, Array]:
    """Return final states by their fields; steps that share fields end with the same state."""
    return {s.state: x for s, x in zip(program.steps, trace.states, strict=True)}


def with_ones(v: Array) -> Array:
    """Append the column of ones that carries every mass: [v | 1]."""
    return padded(v, -1, after=1, fill=1.0)


def state_shapes(program: Program, q: Shape, k: Shape, v: Shape, gate: Shape) -> dict[str, Shape]:
    """Full shape of each state field; arguments are those of `step_states`."""
    given = {"q": q, "k": k, "v": v}
    matrices = step_states(program, given, gate)
    masses = step_states(program, given | {"v": (*v[-2:-1], 1)}, gate)  # the column of ones
    shapes: dict[str, Shape] = {}
    for s, matrix, mass in zip(program.steps, matrices, masses, strict=True):
        shapes |= zip(s.state, (matrix, mass[:-1]), strict=False)
    return shapes
