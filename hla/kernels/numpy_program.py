"""A whole program and its adjoint in NumPy: one sweep over the sequence, heads over threads.

For each group of chunks every step of the program runs while its operands are in the cache, with
L the weights of pairs, a and b those of queries and keys (core.passes):

    o = (L * (q k')) v + (a * q) S            S <- r S + (b * k)' v

and in the adjoint, last group first, with R the gradient of the state after the chunk,

    dA = L * (do v')       dq = dA k + (a * do) S'
    dk = dA' q + (b * v) R'                    dv = (L * (q k'))' do + (b * k) R
    R <- r R + (a * q)' do                     9 products where three passes take 12

The states S before each chunk are kept by the forward sweep where a gradient may follow (T / W of
them a step, the size of v at D = W). Steps that share q and k share their pairs.

A group is 2048 tokens of a thread's heads (at 4 heads 8 chunks of W = 64), in six buffers that are
reused (0.5 MB each at D = V = 64): fresh pages cost more than the sums, and smaller groups mean
more calls, for which two threads wait on one interpreter. It changes no bits. Operands are
transposed once by a copy: a 64 x 64 product on a transposed view takes twice as long. Products stay
at 64^3, up to which OpenBLAS starts no threads of its own. Work a token and head:
2 (W D + W V + 2 D V) operations a pass.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.adjoint import Adjoint, gate_total, shared_out, sum_to
from ..core.passes import CHUNK, Fields, Gate, Pass, Shape, Weights, broadcast, weights
from ..core.programs import Program, Trace
from .numpy_threads import Part, spread

Array = np.ndarray[Any, Any]
GROUP = 2048  # tokens of all heads that share one call


def run(
    program: Program,
    values: Mapping[str, Array],
    gate: Gate,
    initial: Mapping[Fields, Array],
    *,
    chunk: int = CHUNK,
    keep: bool = False,
) -> tuple[Array, Trace]:
    """Run a program as `core.programs.run` does; ``keep`` what `adjoint` needs."""
    env, states, kept = dict(values), [], []
    T, dtype = values["k"].shape[-2], values["k"].dtype
    for s in program.steps:
        batch = broadcast(env[s.k].shape[:-2], env[s.v].shape[:-2], gate.batch)
        S = np.zeros((*batch, env[s.k].shape[-1], env[s.v].shape[-1]), dtype=dtype)
        if s.state in initial:
            S[...] = initial[s.state]
        states.append(S)
        # without a gradient to follow, intermediates and states live in buffers of one group
        kept.append(np.empty((*batch, -(-T // chunk) if keep else 0, *S.shape[-2:]), dtype=dtype))
        shape = (*broadcast(batch, env[s.q].shape[:-2]), T if keep else 0, S.shape[-1])
        env[s.out] = np.empty(shape, dtype=dtype)
    full = broadcast(*(x.shape[:-2] for x in env.values()))
    o = np.empty((*full, T, values["v"].shape[-1]), dtype=dtype)
    if len(program.outputs) == 1:
        env[program.outputs[0][1]] = o

    ends: list[list[tuple[Array, Array]]] = []  # written when no thread reads its start any more

    def job(part: Part) -> None:
        arrays = {name: part(values[name], 2) for name in "qkv"}
        for step in program.steps:  # where heads share an intermediate, each thread makes its own
            arrays[step.out] = part.output(env[step.out], 2)
        out, held = part(o, 2), [part.output(x, 3) for x in kept]
        sweep = _Sweep(program, part.gate(gate), T, chunk, math.prod(out.shape[:-2]), dtype)
        after = sweep.forward(arrays, [part(S, 2).copy() for S in states], held, out)
        ends.append([(part.output(S, 2), end) for S, end in zip(states, after, strict=True)])

    spread(job, full, 4 * len(program.steps) * o.size * chunk)
    for S, end in itertools.chain.from_iterable(ends):
        S[...] = end
    return o, Trace(env, tuple(states), tuple(kept))


def adjoint(
    program: Program,
    trace: Trace,
    gate: Gate,
    initial: Mapping[Fields, Array],
    do: Array,
    dfinal: Mapping[Fields, Array],
    *,
    with_gate: bool,
    chunk: int = CHUNK,
) -> Adjoint:
    """Run a program's adjoint as `core.programs.adjoint` does, in one sweep."""
    full, T, dtype = do.shape[:-2], do.shape[-2], do.dtype
    pending, ends = dict(dfinal), []
    for s in reversed(program.steps):
        ends.append(pending.pop(s.state, None))
    ends.reverse()
    R = [np.zeros((*full, *S.shape[-2:]), dtype=dtype) for S in trace.states]
    for r, end in zip(R, ends, strict=True):
        if end is not None:
            r[...] = shared_out(end, r.shape)
    active = [end is not None for end in ends]
    grads = {x: np.zeros((*full, T, trace.values[x].shape[-1]), dtype=dtype) for x in "qkv"}
    # entry t + 1 sums do.o - v.dv of token t; a strict pass's do.o counts one token later
    change = np.zeros((*full, T + 1), dtype=dtype) if with_gate else None

    def job(part: Part) -> None:
        dout = part(do, 2)
        sweep = _Sweep(program, part.gate(gate), T, chunk, math.prod(dout.shape[:-2]), dtype)
        arrays = {name: part(x, 2) for name, x in trace.values.items()}
        out = {name: part(x, 2) for name, x in grads.items()}
        sums = None if change is None else part(change, 1)
        sweep.backward(
            arrays,
            [part(x, 3) for x in trace.kept],
            part(do, 2),
            [part(r, 2) for r in R],
            active,
            out,
            sums,
        )

    spread(job, full, 12 * len(program.steps) * do.size * chunk)
    dinitial: dict[Fields, Array] = {}
    for s, r in zip(program.steps, R, strict=True):
        if s.state in initial:
            g = sum_to(r, initial[s.state].shape)
            dinitial[s.state] = dinitial[s.state] + g if s.state in dinitial else g
    dgate = None
    if change is not None:
        dgate = gate_total(sum_to(change[..., 1:], (*gate.batch, T)))
        for s, end, S in zip(program.steps, ends, trace.states, strict=True):
            if end is not None:
                dgate = dgate + s.power * sum_to((end * S).sum((-2, -1)), gate.batch)[..., None]
    return Adjoint({x: sum_to(g, trace.values[x].shape) for x, g in grads.items()}, dinitial, dgate)


class _Turn(NamedTuple):
    """One group of chunks: its rows, its chunks, and the weights by (power, kind)."""

    rows: slice
    chunks: slice
    shape: Shape  # (G, W)
    weights: dict[tuple[int, str], Weights]  # each mask as bits to keep

    def view(self, x: Array) -> Array:
        """Return these rows of (..., T, F) as (..., G, W, F)."""
        part = x[..., self.rows, :]
        return part.reshape((*part.shape[:-2], *self.shape, part.shape[-1]), copy=False)


def _pieces(T: int, chunk: int, group: int) -> list[tuple[int, int, int, int]]:
    """Cut T tokens into whole groups, whole chunks and a rest: (start, stop, chunks, chunk)."""
    groups, chunks = T - T % (group * chunk), T - T % chunk
    cuts = [
        (0, groups, group, chunk),
        (groups, chunks, (chunks - groups) // chunk, chunk),
        (chunks, T, 1, T - chunks),
    ]
    return [cut for cut in cuts if cut[1] > cut[0]]


class _Sweep:
    """The loops over one thread's heads, and the buffers that they reuse."""

    def __init__(
        self, program: Program, gate: Gate, T: int, chunk: int, heads: int, dtype: Any
    ) -> None:
        self.program, self.gate, self.T = program, gate, T
        self.chunk, self.group, self.dtype = chunk, max(1, GROUP // max(1, heads * chunk)), dtype
        self.held: dict[str, Array] = {}
        self.uses = Counter((s.q, s.k, s.power, s.kind) for s in program.steps)

    def turns(self, *, reverse: bool) -> Iterator[_Turn]:
        """Yield the groups of chunks, last first where ``reverse``."""
        like, kinds = np.empty(0, self.dtype), {(s.power, s.kind) for s in self.program.steps}

        bits = f"u{like.itemsize}"
        each = Gate(None if self.gate.decay is None else self.gate.decay[..., None])

        def weigh(gate: Gate, W: int) -> dict[tuple[int, str], Weights]:
            found = {key: weights(gate, *key, W, like=like) for key in kinds}
            return {key: w._replace(mask=-w.mask.astype(bits)) for key, w in found.items()}

        for start, stop, G, W in _pieces(self.T, self.chunk, self.group)[:: -1 if reverse else 1]:
            a = self.gate.log_gate
            fixed = weigh(each, W) if a is None else {}
            firsts = range(start, stop, G * W)
            for first in reversed(firsts) if reverse else firsts:
                rows = slice(first, first + G * W)
                chunks = slice(first // self.chunk, first // self.chunk + G)
                if a is not None:
                    fixed = weigh(Gate(log_gate=a[..., rows].reshape((*a.shape[:-1], G, W))), W)
                yield _Turn(rows, chunks, (G, W), fixed)

    def buffer(self, name: str, *shape: int) -> Array:
        """Return the reused array of this name, its contents undefined."""
        if name not in self.held or self.held[name].shape != shape:
            self.held[name] = np.empty(shape, dtype=self.dtype)
        return self.held[name]

    def transposed(self, name: str, x: Array) -> Array:
        """Return x' as a copy."""
        out = self.buffer(name, *x.shape[:-2], x.shape[-1], x.shape[-2])
        np.copyto(out, x.mT)
        return out

    def weighed(self, name: str, x: Array, weight: Array | None) -> Array:
        """Return x times its weights, x itself where there are none."""
        if weight is None:
            return x
        out = self.buffer(name, *broadcast(x.shape[:-2], weight.shape[:-2]), *x.shape[-2:])
        return np.multiply(x, weight, out=out)

    def product(self, name: str, a: Array, b: Array) -> Array:
        """Return a @ b."""
        batch = broadcast(a.shape[:-2], b.shape[:-2])
        return np.matmul(a, b, out=self.buffer(name, *batch, a.shape[-2], b.shape[-1]))

    def pairs(self, name: str, q: Array, kt: Array, pair: Array | None, mask: Array) -> Array:
        """Return the weighed legal pairs; others are cleared, not multiplied: inf * 0 is NaN."""
        batch = broadcast(q.shape[:-2], kt.shape[:-2], () if pair is None else pair.shape[:-2])
        out = self.buffer(name, *batch, q.shape[-2], kt.shape[-1])
        np.matmul(q, kt, out=out)
        if pair is not None:
            np.multiply(out, pair, out=out)
        bits = out.view(mask.dtype)
        np.bitwise_and(bits, mask, out=bits)
        return out

    def forward(
        self,
        arrays: dict[str, Array],
        states: list[Array],
        kept: list[Array],
        o: Array,
    ) -> list[Array]:
        """Write o and, where kept, intermediates and states; return the final states."""
        for turn in self.turns(reverse=False):
            local = {name: turn.view(arrays[name]) for name in "qkv"}
            shared: dict[tuple[str, str, int, str], tuple[Array, Array]] = {}  # k' and pairs
            for i, s in enumerate(self.program.steps):
                w, key = turn.weights[s.power, s.kind], (s.q, s.k, s.power, s.kind)
                q, k, v = local[s.q], local[s.k], local[s.v]
                name = f"{key}" if self.uses[key] > 1 else ""
                if key not in shared:
                    kt = self.transposed(f"kt{name}", k)
                    shared[key] = kt, self.pairs(f"pair{name}", q, kt, w.pair, w.mask)
                (kt, pair), S = shared[key], states[i]
                if arrays[s.out].shape[-2]:
                    out = turn.view(arrays[s.out])
                else:
                    shape = broadcast(q.shape[:-3], S.shape[:-2])
                    out = self.buffer(f"out{s.out}", *shape, *turn.shape, v.shape[-1])
                before = kept[i][..., turn.chunks, :, :]
                if not kept[i].shape[-3]:
                    before = self.buffer("before", *S.shape[:-2], turn.shape[0], *S.shape[-2:])
                added = self.product("added", self.weighed("b", kt, _turned(w.key)), v)
                _advance(added, w.total, S, before, reverse=False)
                np.matmul(pair, v, out=out)
                out += self.product("carried", self.weighed("a", q, w.query), before)
                local[s.out] = out
            if len(self.program.outputs) > 1:
                view, terms = turn.view(o), self.program.outputs
                np.multiply(local[terms[0][1]], terms[0][0], out=view)
                for coefficient, name in terms[1:]:
                    view += coefficient * local[name]
        return states

    def backward(
        self,
        arrays: dict[str, Array],
        kept: list[Array],
        do: Array,
        R: list[Array],
        active: list[bool],
        grads: dict[str, Array],
        sums: Array | None,
    ) -> None:
        """Write the gradients of q, k, v and the gate's sums; leave those of the states in R."""
        steps = list(enumerate(self.program.steps))
        for turn in self.turns(reverse=True):
            local = {name: turn.view(x) for name, x in arrays.items()}
            into = _Into(self, {name: turn.view(x) for name, x in grads.items()})
            for coefficient, name in self.program.outputs:
                dout = turn.view(do)
                into.grads[name] = dout if coefficient == 1 else coefficient * dout
            for i, s in reversed(steps):
                if s.out not in into.grads:
                    if not active[i]:
                        continue
                    into.grads[s.out] = np.zeros_like(turn.view(do)[..., : R[i].shape[-1]])
                self._step_back(turn, s, local, kept[i][..., turn.chunks, :, :], R[i], into, sums)

    def _step_back(
        self,
        turn: _Turn,
        s: Pass,
        local: dict[str, Array],
        before: Array,
        R: Array,
        into: _Into,
        sums: Array | None,
    ) -> None:
        """Take one step's adjoint over one group of chunks."""
        w, dout = turn.weights[s.power, s.kind], into.grads[s.out]
        q, k, v = local[s.q], local[s.k], local[s.v]
        qt = self.transposed("qt", q)
        added = self.product("added", self.weighed("aq", qt, _turned(w.query)), dout)
        after = self.buffer("after", *R.shape[:-2], turn.shape[0], *R.shape[-2:])
        _advance(added, w.total, R, after, reverse=True)
        pair = self.pairs("pair", dout, self.transposed("vt", v), w.pair, w.mask)
        into.add(s.q, pair, k)
        into.add(s.q, self.weighed("ado", dout, w.query), self.transposed("before", before))
        into.add(s.k, self.transposed("turned", pair), q)
        into.add(s.k, self.weighed("bv", v, w.key), self.transposed("later", after))
        pair = self.pairs("pair", k, qt, _turned(w.pair), w.mask.T)
        weighed = self.weighed("bk", k, w.key)
        if sums is None:
            into.add(s.v, pair, dout)
            into.add(s.v, weighed, after)
            return
        dv = pair @ dout + weighed @ after
        into.accumulate(s.v, dv)
        late = slice(turn.rows.start + 1, turn.rows.stop + 1)
        flat = (*sums.shape[:-1], turn.rows.stop - turn.rows.start)
        received = (dout * local[s.out]).sum(-1).reshape(flat)
        sums[..., turn.rows if s.kind == "strict" else late] += s.power * received
        sums[..., late] -= s.power * (v * dv).sum(-1).reshape(flat)


class _Into:
    """Gradients of one group's arrays: the first sum is written, later ones are added."""

    def __init__(self, sweep: _Sweep, targets: dict[str, Array]) -> None:
        self.sweep, self.targets = sweep, targets
        self.grads: dict[str, Array] = {}

    def _target(self, name: str, shape: Shape) -> Array:
        if name not in self.targets:
            self.targets[name] = self.sweep.buffer(f"d{name}", *shape)
        return self.targets[name]

    def add(self, name: str, a: Array, b: Array) -> None:
        """Add a @ b."""
        if name in self.grads:
            self.grads[name] += self.sweep.product("sum", a, b)
            return
        batch = broadcast(a.shape[:-2], b.shape[:-2])
        out = self._target(name, (*batch, a.shape[-2], b.shape[-1]))
        self.grads[name] = np.matmul(a, b, out=out)

    def accumulate(self, name: str, x: Array) -> None:
        """Add x."""
        if name in self.grads:
            self.grads[name] += x
        else:
            self.grads[name] = self._target(name, x.shape)
            self.grads[name][...] = x


def _advance(
    added: Array, total: Array | None, state: Array, before: Array, *, reverse: bool
) -> None:
    """Write the state before each chunk of a group; leave the one after it in ``state``."""
    chunks = range(added.shape[-3])
    order = list(reversed(chunks) if reverse else chunks)
    before[..., order[0], :, :] = state
    for i, following in zip(order, [*order[1:], None], strict=True):
        here = before[..., i, :, :]
        there = state if following is None else before[..., following, :, :]
        if total is not None:
            here = np.multiply(here, total[..., min(i, total.shape[-3] - 1), :, :], out=there)
        np.add(here, added[..., i, :, :], out=there)


def _turned(weight: Array | None) -> Array | None:
    return None if weight is None else weight.mT
