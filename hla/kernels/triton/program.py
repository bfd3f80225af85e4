"""A program and its adjoint by launches of the Triton pass.

A value is its columns: a matrix (*batch, T, F) and, where masses are asked, a second part of one
column (*batch, T, 1). A pass over parts of keys is the sum over them, and over parts of values they
side by side; wide keys are parts of `widest` columns. Intermediates and gradients are stored in
bfloat16 for bfloat16 input and in float32 else (float16 would overflow); states in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...core.adjoint import Adjoint, shared_out, sum_to
from ...core.passes import Fields, Gate, Pass, Shape, broadcast
from ...core.programs import Program
from .causal import LEAST
from .gate import gate_gradient
from .launch import (
    PERIOD,
    Columns,
    between,
    capability,
    causal_pass,
    further,
    gate_chunk,
    in_one,
    shapes_alone,
    value_tiles,
    widest,
)

Value = tuple[torch.Tensor, ...]


class Call(NamedTuple):
    """What all passes of a call share: gate, q's factor, TF32, dtype of intermediates."""

    gate: Gate
    scale: float
    tf32: bool
    dtype: torch.dtype

    def factor(self, name: str) -> float:
        """Factor of a named value: q's scale, taken in the accumulator."""
        return self.scale if name == "q" else 1.0


def parts(
    value: Value, dtype: torch.dtype
) -> list[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Cut keys into parts that one launch takes, each with its rows of the state.

    A last part that is few enough goes along with the one before (`triton_launch.further`).
    """
    most = widest(dtype)
    cuts: list[torch.Tensor] = []
    for x in value:
        D = x.shape[-1]
        cuts += [x[..., i : i + most] for i in range(0, D, most)] if most < D else [x]
    last = cuts.pop() if len(cuts) > 1 and cuts[-1].shape[-1] <= further(dtype) else None
    found, row = [], 0
    for i, x in enumerate(cuts):
        along = last if i == len(cuts) - 1 else None
        end = row + x.shape[-1] + (0 if along is None else along.shape[-1])
        found.append((slice(row, end), x, along))
        row = end
    return found


def width(value: Value) -> int:
    """Columns of a value, all parts together."""
    return sum(x.shape[-1] for x in value)


@functools.lru_cache(maxsize=1024)
def _strides(shape: Shape, like: Shape, order: Shape) -> Shape:
    """Strides of a new array with its axes in memory in the order of another's strides."""
    missing = len(shape) - len(like)
    keys = [(0, 0)] * missing  # outermost, as axes of one entry
    keys += [(0 if n == 1 else 1, -s) for n, s in zip(like[:-1], order, strict=False)]
    axes = sorted(range(len(shape) - 1), key=lambda i: keys[i])
    strides, step = [1] * len(shape), shape[-1]
    for axis in reversed(axes):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)


def strides_like(x: torch.Tensor, shape: Shape) -> Shape:
    """Return the strides of a new array with rows in the order that x keeps them in."""
    try:
        return _strides(shape, x.shape, x.stride())
    except TypeError:  # a compiler's symbols have no hash
        return _strides.__wrapped__(shape, x.shape, x.stride())


def laid_out_like(x: torch.Tensor, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Return an empty array with rows in the order that x keeps them in."""
    return torch.empty_strided(shape, strides_like(x, shape), dtype=dtype, device=x.device)


def columns_of(
    call: Call,
    q: Value,
    k: Value,
    v: Value,
    *,
    kind: str,
    start: Value | None = None,
    keep_state: bool = True,
    dtypes: Sequence[torch.dtype],
    into: Value | None = None,
) -> list[Columns]:
    """Allocate what one pass writes, part by part.

    Parameters
    ----------
    call : Call
        Gives the gate.
    q, k, v : tuple of tensor
        Their parts.
    kind : str
        As in `hla.core.passes.causal_pass`.
    start : tuple of tensor, (*batch, D, V), optional
        State that the pass starts from, one for each part of v.
    keep_state : bool
        Whether the final state is asked.
    dtypes : sequence of torch.dtype
        Of the results, part by part.
    into : tuple of tensor, optional
        Results to add to instead.
    """
    T, gates = k[0].shape[-2], () if kind == "full" else call.gate.batch
    held = broadcast(k[0].shape[:-2], v[0].shape[:-2], gates)
    batch, found = broadcast(held, q[0].shape[:-2]), []
    for i, c in enumerate(v):
        F, first, end = c.shape[-1], None if start is None else start[i], None
        if keep_state or kind == "full":
            end = torch.empty((*held, width(k), F), dtype=torch.float32, device=c.device)
            if T == 0:
                end.copy_(torch.zeros_like(end) if first is None else first)
        o = into[i] if into else laid_out_like(q[0], (*batch, T, F), dtypes[i])
        found.append(Columns(c, o, first, end))
    return found


def run_pass(
    call: Call,
    q: Value,
    k: Value,
    columns: Sequence[Columns],
    *,
    power: int,
    kind: str,
    reverse: bool = False,
    read: float = 1.0,
    write: float = 1.0,
    add: bool = False,
    both: bool = False,
    x: Value | None = None,
    pairs: bool = False,
    states: torch.Tensor | None = None,
    chunk: int = 0,
) -> torch.Tensor | None:
    """Run one pass over all its parts.

    Parameters
    ----------
    call : Call
        Gate and precision.
    q, k : tuple of tensor
        Parts of queries and keys.
    columns : sequence of Columns
        Parts of the values, with the rows of the state for all parts of k.
    power, kind, reverse
        As in `hla.core.passes.causal_pass`.
    read, write : float
        Factors of what is read, and of k v.
    add : bool
        Add to what the columns' ``o`` hold.
    both : bool
        Add the pass with k and v exchanged; for one part of each that fits a tile.
    x : tuple of tensor, optional
        Ask for the sums of `triton_launch.causal_pass`, token by token.
    pairs, states, chunk
        As there, states with all columns and all rows.

    Returns
    -------
    tensor or None
        The sums with x, (*batch, T), or (*batch, 3 T) with pairs.
    """
    full = kind == "full"
    gate, device = Gate() if full else call.gate, k[0].device
    if k[0].shape[-2] == 0:
        return None if x is None else torch.zeros((*columns[0].batch, 0), device=device)
    options: dict[str, Any] = {
        "gate": gate, "power": power, "strict": kind == "strict", "reverse": reverse,
        "write": write, "tf32": call.tf32,
    }  # fmt: skip
    dots, first = None, not add
    keys = parts(k, call.dtype)
    sums = columns
    if len(keys) > 1:  # the sum of several launches is kept in float32
        sums = [_wide(c, add) for c in columns]
    for (rows, b, kc), (_, query, qc) in zip(keys, parts(q, call.dtype), strict=True):
        for i, here in _together(b, sums, alone=x is not None or kc is not None):
            if len(keys) > 1:
                here = [
                    c._replace(start=_rows(c.start, rows), end=_rows(c.end, rows)) for c in here
                ]
            batch = here[0].batch
            if full:  # sum all tokens first
                alone = [c._replace(o=None, start=None) for c in here]
                held = broadcast(b.shape[:-2], *(c.v.shape[:-2] for c in here))
                causal_pass(None, b, alone, batch=held, kc=kc, **options)
                here = [c._replace(start=c.end, end=None) for c in here]
            dot, xi, kept = None, None, None
            if x is not None:
                F = int(here[0].v.shape[-1])
                length = b.shape[-2] * (3 if pairs else 1)
                xi, shape = x[i], (*batch, value_tiles(F), length)
                exact = torch.float32 if call.dtype == torch.bfloat16 else torch.float64
                dot = torch.empty(shape, dtype=exact, device=device)
                if states is not None:
                    first_column = width(tuple(c.v for c in columns[:i]))
                    kept = states[..., first_column : first_column + F, rows]
            causal_pass(
                query, b, here, batch=batch, update=not full, read=read, x=xi, dots=dot,
                qc=qc, kc=kc, add=not first, both=both, pairs=pairs, states=kept,
                chunk=0 if dot is None else chunk, **options,
            )  # fmt: skip
            if dot is not None:
                dot = dot[..., 0, :] if dot.shape[-2] == 1 else dot.sum(-2)
                dots = dot if dots is None else dots + dot
        first = False
    if sums is not columns:
        for c, total in zip(columns, sums, strict=True):
            if c.o is not None and c.o is not total.o:
                c.o.copy_(total.o)
    return dots


def together(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Matrices side by side as one; None of none."""
    return torch.cat(list(parts), -1) if len(parts) > 1 else next(iter(parts), None)


def _wide(c: Columns, add: bool) -> Columns:
    """Return columns with a float32 place for the results, which holds what they are added to."""
    if c.o is None or c.o.dtype == torch.float32:
        return c
    return c._replace(o=c.o.float() if add else laid_out_like(c.o, c.o.shape, torch.float32))


def _rows(state: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if state is None else state[..., rows, :]


def _together(
    k: torch.Tensor, columns: Sequence[Columns], *, alone: bool
) -> list[tuple[int, Sequence[Columns]]]:
    """Cut columns into what one launch serves, with the place of the first."""
    found, i = [], 0
    while i < len(columns):
        two = not alone and i + 1 < len(columns) and in_one(k, columns[i], columns[i + 1])
        found.append((i, columns[i : i + 1 + two]))
        i += 1 + two
    return found


def run(
    call: Call,
    program: Program,
    values: Mapping[str, Value],
    initial: Mapping[Fields, Value],
    *,
    keep_states: bool,
    last: torch.dtype,
) -> tuple[dict[str, Value], list[Value]]:
    """Run a program; return every value by name, and each step's final state where asked.

    Parameters
    ----------
    call : Call
        Gate, factors, dtypes.
    program : Program
        What to run.
    values : mapping
        "q", "k" and "v".
    initial : mapping
        Incoming states by the fields they hold, a matrix for each.
    keep_states : bool
        Whether final states are asked.
    last : torch.dtype
        Of a value that is an output.
    """
    env: dict[str, Value] = dict(values)
    states: list[Value] = []
    outputs = {name for _, name in program.outputs}
    for steps in sharing(program.steps):
        s, columns = steps[0], []
        q, k = env[s.q], env[s.k]
        for one in steps:
            found = columns_of(
                call, q, k, env[one.v], kind=s.kind, start=initial.get(one.state),
                keep_state=keep_states,
                dtypes=(last if one.out in outputs else call.dtype, torch.float32),
            )  # fmt: skip
            columns += found
            states.append(tuple(c.end for c in found if c.end is not None))
            env[one.out] = tuple(c.o for c in found if c.o is not None)
        write = call.factor(s.k) * call.factor(s.v)
        run_pass(
            call, q, k, columns, power=s.power, kind=s.kind, read=call.factor(s.q), write=write
        )
    return env, states


def sharing(steps: Sequence[Pass]) -> Iterator[list[Pass]]:
    """Cut a program where a step does not share its pairs with the one before, or reads it."""
    group: list[Pass] = []
    for s in steps:
        first = group[0] if group else s
        same = (s.q, s.k, s.power, s.kind) == (first.q, first.k, first.power, first.kind)
        factor = (s.v == "q") == (first.v == "q")
        if group and not (same and factor and s.v not in [x.out for x in group]):
            yield group
            group = []
        group.append(s)
    yield group


def adjoint(
    call: Call,
    program: Program,
    values: Mapping[str, Value],
    initial: Mapping[Fields, torch.Tensor],
    dout: Value,
    dfinal: Mapping[Fields, torch.Tensor],
    *,
    with_gate: bool,
) -> Adjoint:
    """Run a program's adjoint, each pass as three; the counterpart of `hla.core.adjoint.adjoint`.

    The gate's gradient is taken from what the passes of dq and dv read from and write to states
    (see `gate_gradient`).

    Parameters
    ----------
    call, program
        As given to `run`.
    values
        As it returned them.
    initial : mapping
        Incoming states by the fields they hold, side by side.
    dout : tuple of tensor
        Gradient of the program's output.
    dfinal : mapping
        Gradients of final states by their fields.
    with_gate : bool
        Whether the gate's gradient is asked.
    """
    grads: dict[str, Value] = {}
    ours: set[str] = set()  # gradients that later ones may be added to in place
    dinitial: dict[Fields, torch.Tensor] = {}
    dgate, pending = None, dict(dfinal)

    def give(
        name: str, q: Value, k: Value, v: Value, *, reuse: bool = False, **options: Any
    ) -> Any:
        """Add what one pass returns to the gradient of a value; return its state and dots.

        With ``reuse`` v's memory may take the result: a chunk is read before it is written.
        """
        kind, start, keep_state = (options.pop(x) for x in ("kind", "start", "keep_state"))
        shapes = [x.shape for x in values[name][: len(v)]]
        before, gates = grads.get(name), () if kind == "full" else call.gate.batch
        whole = shapes[0][:-2] == broadcast(*(x[0].shape[:-2] for x in (q, k, v)), gates)
        into = before if whole and name in ours else None
        add = into is not None
        if reuse and whole and before is None and width(k) <= widest(call.dtype):
            into = v
        dtypes = (call.dtype if whole else torch.float32, torch.float32)
        if start is not None:
            start = start.split([x.shape[-1] for x in v], -1)
        columns = columns_of(
            call, q, k, v, kind=kind, start=start, keep_state=keep_state, dtypes=dtypes, into=into
        )
        dots = run_pass(call, q, k, columns, kind=kind, add=add, **options)
        out = tuple(c.o for c in columns if c.o is not None)
        if not whole:
            kinds = (call.dtype, torch.float32)
            out = tuple(sum_to(x, n).to(t) for x, n, t in zip(out, shapes, kinds, strict=False))
        if before is not None and not add:
            out = tuple(x + y for x, y in zip(before, out, strict=True))
        grads[name] = out
        ours.add(name)
        return together([c.end for c in columns if c.end is not None]), dots

    for c, name in program.outputs:
        each = dout if c == 1 else tuple(c * g for g in dout)
        grads[name] = tuple(  # a term may have fewer batch axes
            sum_to(g, x.shape) for g, x in zip(each, values[name], strict=False)
        )
    for s in reversed(program.steps):
        do, dstate = grads.pop(s.out, None), pending.pop(s.state, None)
        if do is None and dstate is None:
            continue
        if do is None:
            do = tuple(x.new_zeros(()).expand(x.shape) for x in values[s.out])
        q, k, v = values[s.q], values[s.k], values[s.v][: len(do)]
        start = initial[s.state][..., : width(v)].mT if s.state in initial else None
        end = shared_out(dstate, values[s.out][0].shape)
        one_q, one_kv = call.factor(s.q), call.factor(s.k) * call.factor(s.v)
        x_q, x_v, S, R = None, None, None, None
        chunk = 0 if shapes_alone(do[0]) else gate_chunk(
            width(k), width(v), call.dtype == torch.bfloat16, call.gate.decay is not None,
            s.k == s.v, capability(k[0].device),
        )  # fmt: skip
        once = functools.partial(give, power=s.power, kind=s.kind, chunk=chunk)
        back = functools.partial(once, reverse=True, read=one_kv, write=one_q, pairs=with_gate)
        if with_gate:
            x_q, x_v, n = q, v, between(k[0].shape[-2])
            heads, sizes = do[0].shape[:-2], (width(k), width(v))
            if n:
                S, R = (
                    torch.empty((*heads, n, *x), dtype=call.dtype, device=k[0].device)
                    for x in (sizes, sizes[::-1])
                )
        _, reads = once(
            s.q, do, v, k, start=start, read=one_q, write=one_kv, keep_state=False, x=x_q, states=S
        )
        mirrored = s.k == s.v and s.kind != "full" and s.state not in initial
        mirrored &= call.gate.log_gate is None  # there two launches are faster
        border, halved = None, False  # <state, its gradient> at the first token
        if mirrored and len(do) == 1 and width(q) <= widest(call.dtype):
            both = None if end is None else end + end.mT  # k and v: one gradient, one state
            _, writes = back(
                s.k, v, do, q, start=both, keep_state=False, both=True, x=x_v, states=R
            )
            halved = with_gate
        else:
            back_k = functools.partial(back, pairs=False)
            back_k(s.k, v, do, q, start=None if end is None else end.mT, keep_state=False)
            skips = s.v == "v" and s.state not in initial and not with_gate
            dv = do[:1] if skips else do  # the ones need no gradient
            dstate0, writes = back(
                s.v, k, q, dv, start=None if end is None else end[..., : width(dv)],
                keep_state=s.state in initial, x=x_v, states=R, reuse=s.out in ours,
            )  # fmt: skip
            if s.state in initial:
                g = sum_to(dstate0, initial[s.state].shape)
                dinitial[s.state] = g if s.state not in dinitial else dinitial[s.state] + g
                if start is not None and with_gate:
                    border = (start.mT * dstate0).sum((-2, -1), dtype=torch.float64)
        if with_gate:
            factor = 0.5 if halved else 1.0  # of what was written for k and v alike
            term = _gate_gradient(call, s, reads, writes, border, S, R, factor, end is None, chunk)
            dgate = term if dgate is None else dgate + term
    if dgate is not None and call.gate.decay is not None:
        dgate = dgate[..., 0] / call.gate.decay.clamp(min=LEAST.value)
    first = {name: grads[name][0] for name in "qkv"}
    return Adjoint(first, dinitial, dgate)


def _gate_gradient(
    call: Call,
    s: Pass,
    reads: torch.Tensor,
    writes: torch.Tensor,
    border: torch.Tensor | None,
    S: torch.Tensor | None,
    R: torch.Tensor | None,
    factor: float,
    ends: bool,
    chunk: int,
) -> torch.Tensor:
    """Gradient of the log gate by one pass, (*gate's batch, T), or of log(decay), (*batch, 1)."""
    gate, log = call.gate.decay, call.gate.log_gate is not None
    dlog = gate_gradient(
        reads, writes, call.gate.log_gate if log else gate, border, S, R, power=s.power,
        factor=factor, strict=s.kind == "strict", log=log, ends=ends, least=LEAST.value,
        period=PERIOD, chunk=chunk,
    )  # fmt: skip
    return sum_to(dlog, (*call.gate.batch, dlog.shape[-1]))
