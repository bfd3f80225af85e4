"""Every operator of the paper as a short program of passes, and the interpreter that runs them.

A program is data: steps ``out = pass(q, k, v)`` with the exponent of the gate, and a signed sum of
their outputs. All programs are linear in v, so a denominator is one more column of v holding ones,
and the mass of a state (m, eta, n, h) is that column of its matrix (P or C, F, E, G).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
    return x if isinstance(coefficient, int) and coefficient == 1 else coefficient * x


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
