"""A whole program and its adjoint in NumPy: one sweep over the sequence, heads over threads.

For each group of chunks every step of the program runs while its operands are in the cache, with
L the weights of pairs, a and b those of queries and keys (core.passes), as two products:

    o = [a * q | L * (q k')] [S; v]           S <- r S + (b * k)' v

The adjoint, last group first, with R the gradient of the state after the chunk and dA = do v', is

    dq = [a * do | L * dA] [S'; k]            dk = [b * v | (L * dA)'] [R'; q]
    dv = [b * k | (L * (q k'))'] [do; R]      R <- r R + (a * q)' do

The left factors are held transposed, so that q' is copied once, where its product with k wants it.
The states S before each chunk are kept by the forward sweep where a gradient may follow (T / W of
them a step, the size of v at D = W). Steps that share q and k share their pairs. Where the gate's
gradient is requested, dq and dv are two products each, whose state parts q and v then multiply.

A group is 2048 tokens of a thread's heads (at 2 heads 16 chunks of W = 64), in buffers that are
reused (0.5 to 1 MB each at D = V = 64): fresh pages cost more than the sums, and smaller groups
mean more calls, for which two threads wait on one interpreter. It changes no bits. Products are cut
in blocks of rows, to leave out half of what the mask clears and to stay below the size where
OpenBLAS starts threads of its own, which wait for ours. Work a token and head, of
2 (W D + W V + 2 D V) operations a pass counted: 7/8 at D = V = W = 64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...core.namespace import library_of, sum_to
from ...core.passes import CHUNK, Gate, Pass, Shape, Weights, broadcast, weights
from ...core.programs import Passes, d
from ...core.run import GATE, add, begun
from .threads import Part, spread

Array = np.ndarray[Any, Any]
Buffers = dict[tuple[str, Shape], Array]
Weighed = dict[tuple[int, str], tuple[Weights, Weights]]
GROUP = 2048  # tokens of all heads that share one call
BLOCK = 32  # rows of a chunk in one product: what the mask clears beside them is left out
KEPT = 1 << 16  # numbers in weights that are kept from call to call
ONE_THREAD = 2 * 64**3  # multiply-adds of a product for which OpenBLAS starts threads of its own


def run(
    steps: Passes,
    values: Mapping[str, Array],
    gate: Gate,
    *,
    chunk: int = CHUNK,
    keep: bool = False,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Run a program as `core.run.run` does, q times ``scale``.

    ``keep`` what `pull` needs, states under "kept".
    """
    env: dict[str, Any] = dict(values)
    states, kept = list[Array](), list[Array]()
    T, dtype = values["k"].shape[-2], values["k"].dtype
    for s in steps:
        batch = broadcast(env[s.k].shape[:-2], env[s.v].shape[:-2], gate.batch)
        S = np.zeros((*batch, env[s.k].shape[-1], env[s.v].shape[-1]), dtype=dtype)
        if s.start:
            S[...] = values[s.start]
        states.append(S)
        # without a gradient to follow, intermediates and states live in buffers of one group
        kept.append(np.empty((*batch, -(-T // chunk) if keep else 0, *S.shape[-2:]), dtype=dtype))
        shape = (*broadcast(batch, env[s.q].shape[:-2]), T if keep else 0, S.shape[-1])
        if s.out not in ("o", ""):
            env[s.out] = np.empty(shape, dtype=dtype)
    full = broadcast(*(x.shape[:-2] for x in env.values()), *(S.shape[:-2] for S in states))
    o = env["o"] = np.empty((*full, T, values["v"].shape[-1]), dtype=dtype)
    ends: list[list[tuple[Array, Array]]] = []  # written when no thread reads its start any more

    def job(part: Part, buffers: Buffers) -> None:
        arrays = {name: part(values[name], 2) for name in "qkv"}
        for s in steps:  # where heads share an intermediate, each thread makes its own
            if s.out and s.out not in arrays:
                arrays[s.out] = part.output(env[s.out], 2)
        held = [part.output(x, 3) for x in kept]
        heads = math.prod(arrays["o"].shape[:-2])
        sweep = _Sweep(steps, part.gate(gate), T, chunk, heads, dtype, scale, buffers)
        after = sweep.forward(arrays, [part(S, 2).copy() for S in states], held)
        ends.append([(part.output(S, 2), end) for S, end in zip(states, after, strict=True)])

    spread(job, full, _work(steps, values, chunk, o.size))
    for S, end in itertools.chain.from_iterable(ends):
        S[...] = end
    env |= {s.end: S for s, S in zip(steps, states, strict=True) if s.end}
    return env | {"kept": kept}


def pull(
    steps: Passes,
    values: Mapping[str, Any],
    gate: Gate,
    *,
    with_gate: bool,
    chunk: int = CHUNK,
    scale: float = 1.0,
) -> dict[str, Array]:
    """Run a program's adjoint as `core.run.pull` does, q times ``scale``, in one sweep."""
    T, dtype = values["k"].shape[-2], values["k"].dtype
    shapes = [(*x.shape[:-3], *x.shape[-2:]) for x in values["kept"]]
    full = broadcast(*(values[x].shape[:-2] for x in "qkv"), *(x[:-2] for x in shapes))
    do = values.get("d.o")
    do = np.zeros((*full, T, values["v"].shape[-1]), dtype) if do is None else do
    R = [np.zeros((*full, *shape[-2:]), dtype) for shape in shapes]
    active = [d(s.end) in values for s in steps]
    for s, r in zip(steps, R, strict=True):
        if d(s.end) in values:
            r[...] = begun(s._replace(start=d(s.end)), values, full)
    grads = {x: np.zeros((*full, T, values[x].shape[-1]), dtype) for x in "qkv"}
    dlog = np.zeros((*full, T), dtype) if with_gate else None  # of the gate's logarithm

    def job(part: Part, buffers: Buffers) -> None:
        dout = part(do, 2)
        heads = math.prod(dout.shape[:-2])
        sweep = _Sweep(steps, part.gate(gate), T, chunk, heads, dtype, scale, buffers)
        names = {name for s in steps for name in (s.q, s.k, s.v)}
        sweep.backward(
            {name: part(values[name], 2) for name in names},
            [part(x, 3) for x in values["kept"]],
            dout,
            [part(r, 2) for r in R],
            active,
            {name: part(x, 2) for name, x in grads.items()},
            None if dlog is None else part(dlog, 1),
        )

    spread(job, full, _work(steps, {x: values[x] for x in "qkv"}, chunk, 3 * do.size))
    found: dict[str, Array] = {}
    for s, r in zip(steps, R, strict=True):
        add(found, d(s.start), r, values)
    for name, x in grads.items():
        add(found, d(name), x, values)
    if dlog is not None:
        grad = sum_to(dlog, (*gate.batch, T))
        found[GATE] = grad if gate.decay is None else grad.sum(-1) / gate.decay
    return found


class _Turn(NamedTuple):
    """One group of chunks: its rows, its chunks, and the weights by (power, kind)."""

    rows: slice
    chunks: slice
    shape: Shape  # (G, W)
    weights: dict[tuple[int, str], tuple[Weights, Weights]]  # forward and reversed, see `_laid`

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


def _laid(w: Weights, like: Array) -> Weights:
    """Lay weights out as `_Sweep.left` needs them: (key, query), the mask as bits to keep."""
    bits = -np.ascontiguousarray(w.mask.mT).astype(f"u{like.itemsize}")
    pair = None if w.pair is None else np.ascontiguousarray(w.pair.mT)
    return w._replace(mask=bits, pair=pair, query=None if w.query is None else w.query.mT)


def _weighed(gate: Gate, kinds: frozenset[tuple[int, str]], W: int, dtype: Any) -> Weighed:
    """Return the weights of a chunk by power and kind, laid out, and those of the reversed map."""
    like = np.empty(0, dtype)
    found = {key: weights(gate, *key, W, like=like) for key in kinds}
    return {key: (_laid(w, like), _laid(w.reversed(), like)) for key, w in found.items()}


@functools.lru_cache(maxsize=16)
def _constant(
    kinds: frozenset[tuple[int, str]], W: int, dtype: Any, shape: Shape, values: bytes | None
) -> Weighed:
    """Return the weights of a constant decay or of none; making them can take longer than sums."""
    g = None if values is None else np.frombuffer(values, dtype).reshape(shape)
    return _weighed(Gate(g), kinds, W, dtype)


@functools.lru_cache(maxsize=16)
def _constant_totals(
    powers: frozenset[int], W: int, chunks: int, dtype: Any, shape: Shape, values: bytes
) -> dict[str, Array]:
    """Return the totals of the chunks of a constant decay."""
    x, g = np.empty((chunks, W, 0), dtype), np.frombuffer(values, dtype).reshape(shape)
    found: dict[str, Array] = library_of(x).chunk_totals(Gate(g), powers, x)
    return found


def _rows(work: int, most: int) -> int:
    """Return the rows, of ``work`` multiply-adds each, for which BLAS needs no threads of its own.

    0 where they would be less than 4.
    """
    few = (ONE_THREAD - 1) // max(1, work)
    return min(most, 1 << few.bit_length() - 1) if few >= 4 else 0


def _blocks(rows: int, work: int, most: int = BLOCK) -> Iterator[slice]:
    """Cut the rows of a product, all of them in one piece where BLAS takes its own threads."""
    size = _rows(work, most) or max(1, rows)
    return (slice(a, min(a + size, rows)) for a in range(0, rows, size))


def _work(steps: Passes, values: Mapping[str, Array], chunk: int, size: int) -> int:
    """Return the multiply-adds to spread over threads: none where BLAS takes its own."""
    width, W = max(x.shape[-1] for x in values.values()), min(chunk, values["k"].shape[-2])
    return 4 * len(steps) * size * chunk if _rows((width + W) * width, BLOCK) else 0


class _Sweep:
    """The loops over some heads, and the buffers that they reuse."""

    def __init__(
        self,
        steps: Passes,
        gate: Gate,
        T: int,
        chunk: int,
        heads: int,
        dtype: Any,
        scale: float,
        buffers: Buffers,
    ) -> None:
        self.steps, self.gate, self.T, self.scale = steps, gate, T, scale
        self.chunk, self.group, self.dtype = chunk, max(1, GROUP // max(1, heads * chunk)), dtype
        self.buffers = buffers

    def turns(self, *, reverse: bool) -> Iterator[_Turn]:
        """Yield the groups of chunks, last first where ``reverse``."""
        kinds = frozenset((s.power, s.kind) for s in self.steps)
        each = Gate(None if self.gate.decay is None else self.gate.decay[..., None])

        def weigh(gate: Gate, W: int) -> Weighed:
            g = gate.decay
            if gate.log_gate is not None or W * W * (1 if g is None else g.size) > KEPT:
                return _weighed(gate, kinds, W, self.dtype)
            known = ((), None) if g is None else (g.shape, g.tobytes())
            return _constant(kinds, W, self.dtype, *known)

        a, whole = self.gate.log_gate, self.totals()
        for start, stop, G, W in _pieces(self.T, self.chunk, self.group)[:: -1 if reverse else 1]:
            fixed = weigh(each, W) if a is None else {}
            firsts = range(start, stop, G * W)
            for first in reversed(firsts) if reverse else firsts:
                rows = slice(first, first + G * W)
                chunks = slice(first // self.chunk, first // self.chunk + G)
                if a is not None:
                    fixed = weigh(Gate(log_gate=a[..., rows].reshape((*a.shape[:-1], G, W))), W)
                here = whole if stop <= self.T - self.T % self.chunk else {}  # not of the rest
                found = dict[tuple[int, str], tuple[Weights, Weights]]()
                for key, (left, right) in fixed.items():
                    if (total := here.get(f"total@{key[0]}")) is not None:
                        total = total[..., chunks, :, :]
                        left, right = (w._replace(total=total) for w in (left, right))
                    found[key] = left, right
                yield _Turn(rows, chunks, (G, W), found)

    def totals(self) -> dict[str, Array]:
        """Return the totals of whole chunks, however they are grouped; one has its weights'."""
        chunks, g, a = self.T // self.chunk, self.gate.decay, self.gate.log_gate
        powers = frozenset(s.power for s in self.steps)
        if g is not None:
            return _constant_totals(powers, self.chunk, chunks, self.dtype, g.shape, g.tobytes())
        if a is None:
            return {}
        a = a[..., : chunks * self.chunk].reshape((*a.shape[:-1], chunks, self.chunk))
        found: dict[str, Array] = library_of(a).chunk_totals(self.gate, powers, a[..., None])
        return found

    def buffer(self, name: str, *shape: int) -> Array:
        """Return the reused array of this name and shape, its contents undefined."""
        if (name, shape) not in self.buffers:
            self.buffers[name, shape] = np.empty(shape, dtype=self.dtype)
        return self.buffers[name, shape]

    def inputs(self, turn: _Turn, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return a group's rows of the arrays, q scaled."""
        local = {name: turn.view(x) for name, x in arrays.items()}
        if self.scale != 1 and "q" in local:  # here, in a thread's cache, rather than all before
            q = local["q"]
            local["q"] = np.multiply(q, self.scale, out=self.buffer("q", *q.shape))
        return local

    def left(
        self,
        name: str,
        q: Array,
        k: Array,
        w: Weights,
        *,
        reverse: bool = False,
        pairs: Array | None = None,
    ) -> Array:
        """Return [(a * q)'; (L * q k')'], (..., D + W, W); multiply ``pairs`` by (q k')'."""
        D, W = q.shape[-1], q.shape[-2]
        batch = broadcast(q.shape[:-2], k.shape[:-2], () if w.pair is None else w.pair.shape[:-2])
        out = self.buffer(f"left {name}", *batch, D + W, W)
        features, tokens = _halves(D, W, reverse)
        qt, pair = out[..., features, :], out[..., tokens, :]
        np.copyto(qt, q.mT)
        for rows in _blocks(W, D * W):
            seen = slice(rows.stop) if reverse else slice(rows.start, None)
            np.matmul(k[..., rows, :], qt[..., seen], out=pair[..., rows, seen])
        # what no query may see is cleared, not multiplied: inf * 0 is NaN
        bits = pair.view(w.mask.dtype)
        np.bitwise_and(bits, w.mask, out=bits)
        if pairs is not None:
            np.multiply(pairs, pair, out=pairs)
        if w.pair is not None:
            np.multiply(pair, w.pair, out=pair)
        if w.query is not None:
            np.multiply(qt, w.query, out=qt)
        return out

    def turned(self, left: Array, k: Array, w: Weights) -> Array:
        """Return what `left` gives of (k, q), reversed, from what it gave of (q, k)."""
        D, W = k.shape[-1], k.shape[-2]
        pair = left[..., left.shape[-2] - W :, :]
        out = self.buffer("turned", *broadcast(k.shape[:-2], pair.shape[:-2]), W + D, W)
        np.copyto(out[..., :W, :], pair.mT)
        if w.query is None:
            np.copyto(out[..., W:, :], k.mT)
        else:
            np.multiply(k.mT, w.query, out=out[..., W:, :])
        return out

    def right(self, S: Array, v: Array, *, reverse: bool = False) -> Array:
        """Return [S; v], (..., D + W, V)."""
        (D, V), W = S.shape[-2:], v.shape[-2]
        batch = broadcast(S.shape[:-2], v.shape[:-2])
        out = self.buffer("right", *batch, D + W, V)
        features, tokens = _halves(D, W, reverse)
        np.copyto(out[..., features, :], S)
        np.copyto(out[..., tokens, :], v)
        return out

    def advanced(
        self, state: Array, k: Array, v: Array, w: Weights, *, reverse: bool = False
    ) -> Array:
        """Return [S; v], S the state before each chunk; leave the one after all in ``state``."""
        (D, V), (G, W) = state.shape[-2:], v.shape[-3:-1]
        out = self.buffer("states", *state.shape[:-2], G + 1, D + W, V)
        features, tokens = _halves(D, W, reverse)
        states = out[..., features, :]
        before, after = slice(-1), slice(1, None)
        if reverse:
            before, after = after, before
        np.copyto(out[..., before, tokens, :], v)
        if w.key is not None:
            batch = broadcast(k.shape[:-2], w.key.shape[:-2])
            k = np.multiply(k, w.key, out=self.buffer("weighed", *batch, W, D))
        for rows in _blocks(D, W * V, 64):
            np.matmul(k[..., rows].mT, v, out=states[..., after, rows, :])
        order = range(G, -1, -1) if reverse else range(G + 1)
        states[..., order[0], :, :] = state
        for i, j in itertools.pairwise(order):
            here, there = states[..., i, :, :], states[..., j, :, :]
            if w.total is not None:
                here = here * w.total[..., i - reverse, :, :]
            np.add(there, here, out=there)
        state[...] = states[..., order[-1], :, :]
        return out[..., before, :, :]

    def forward(
        self,
        arrays: dict[str, Array],
        states: list[Array],
        kept: list[Array],
    ) -> list[Array]:
        """Write o and, where kept, intermediates and states; return the final states."""
        for turn in self.turns(reverse=False):
            local = self.inputs(turn, {name: arrays[name] for name in "qkv"})
            lefts: dict[str, tuple[tuple[str, int, str], Array]] = {}
            for i, s in enumerate(self.steps):
                w, key = turn.weights[s.power, s.kind][0], (s.k, s.power, s.kind)
                q, k, v = local[s.q], local[s.k], local[s.v]
                if s.q not in lefts or lefts[s.q][0] != key:
                    lefts[s.q] = key, self.left(s.q, q, k, w)
                left, right = lefts[s.q][1], self.advanced(states[i], k, v, w)
                if kept[i].shape[-3]:
                    kept[i][..., turn.chunks, :, :] = right[..., : k.shape[-1], :]
                if not s.out:
                    continue
                if arrays[s.out].shape[-2] and s.out not in local:
                    out = turn.view(arrays[s.out])
                else:
                    shape = broadcast(left.shape[:-2], right.shape[:-2])
                    out = self.buffer(f"out {s.out}", *shape, left.shape[-1], v.shape[-1])
                out = _read(left, right, out)
                if s.read != 1:
                    out *= s.read
                if s.out in local:
                    local[s.out] += out
                else:
                    local[s.out] = out
        return states

    def backward(
        self,
        arrays: dict[str, Array],
        kept: list[Array],
        do: Array,
        R: list[Array],
        active: list[bool],
        grads: dict[str, Array],
        dlog: Array | None,
    ) -> None:
        """Write the gradients of q, k, v and the log gate; leave those of the states in R."""
        steps = list(enumerate(self.steps))
        for turn in self.turns(reverse=True):
            local = self.inputs(turn, arrays)
            into = _Into(self, {name: turn.view(x) for name, x in grads.items()})
            into.grads["o"] = turn.view(do)
            for i, s in reversed(steps):
                if s.out not in into.grads:
                    if not active[i]:
                        continue
                    into.grads[s.out] = np.zeros_like(turn.view(do)[..., : R[i].shape[-1]])
                self._step_back(turn, s, local, kept[i][..., turn.chunks, :, :], R[i], into, dlog)
            if self.scale != 1:
                into.targets["q"] *= self.scale

    def _step_back(
        self,
        turn: _Turn,
        s: Pass,
        local: dict[str, Array],
        before: Array,
        R: Array,
        into: _Into,
        dlog: Array | None,
    ) -> None:
        """Take one step's adjoint over one group of chunks: a pass and two reversed."""
        (w, back), dout = turn.weights[s.power, s.kind], into.grads[s.out]
        dout = dout if s.read == 1 else s.read * dout
        q, k, v = local[s.q], local[s.k], local[s.v]
        later = self.advanced(R, q, dout, back, reverse=True)
        after = later[..., q.shape[-2] :, :]
        left = self.left("", dout, v, w)
        if dlog is None:
            into.add(s.q, left, self.right(before.mT, k))
        else:
            crossing = into.add_parts(s.q, left, before.mT, k)
            query = np.einsum("...td,...td->...t", q, crossing)
        left = self.turned(left, v, back)
        into.add(s.k, left, self.right(after.mT, q, reverse=True), reverse=True)
        if dlog is None:
            into.add(s.v, self.left("", k, q, back, reverse=True), later, reverse=True)
            return
        pairs = left[..., : q.shape[-2], :]  # L * (do v'); in `left` it is multiplied by q k'
        left = self.left("", k, q, back, reverse=True, pairs=pairs)
        crossing = into.add_parts(s.v, left, after, dout, reverse=True)
        key = np.einsum("...td,...td->...t", v, crossing)
        total = np.einsum("...dv,...dv->...", before, after)[..., None]
        late, W = int(s.kind == "strict"), q.shape[-2]
        first = np.tri(W, k=-1, dtype=self.dtype)  # of the tokens before, as rows
        latter = np.ascontiguousarray(np.tri(W, k=-late, dtype=self.dtype).mT)
        found = np.einsum("...tj,tj->...t", latter @ pairs, first)
        found += query @ latter.mT + key @ first.mT
        found += total if w.total is None else total * w.total[..., 0]
        dlog[..., turn.rows] += s.power * found.reshape((*found.shape[:-2], -1))


class _Into:
    """Gradients of one group's arrays: the first sum is written, later ones are added."""

    def __init__(self, sweep: _Sweep, targets: dict[str, Array]) -> None:
        self.sweep, self.targets = sweep, targets
        self.grads: dict[str, Array] = {}

    def _target(self, name: str, shape: Shape) -> Array:
        if name not in self.targets:
            self.targets[name] = self.sweep.buffer(f"d{name}", *shape)
        return self.targets[name]

    def value(self, left: Array, right: Array, *, reverse: bool = False) -> Array:
        """Return what `_read` gives."""
        shape = broadcast(left.shape[:-2], right.shape[:-2])
        out = self.sweep.buffer("sum", *shape, left.shape[-1], right.shape[-1])
        return _read(left, right, out, reverse=reverse)

    def add(self, name: str, left: Array, right: Array, *, reverse: bool = False) -> None:
        """Add what `_read` gives."""
        if name in self.grads:
            self.grads[name] += self.value(left, right, reverse=reverse)
            return
        shape = broadcast(left.shape[:-2], right.shape[:-2])
        out = self._target(name, (*shape, left.shape[-1], right.shape[-1]))
        self.grads[name] = _read(left, right, out, reverse=reverse)

    def add_parts(
        self, name: str, left: Array, S: Array, v: Array, *, reverse: bool = False
    ) -> Array:
        """Add what `_read` gives of [S; v]; return what it gives of S alone."""
        features, tokens = _halves(S.shape[-2], v.shape[-2], reverse)
        rows = left[..., features, :].mT
        shape = broadcast(rows.shape[:-2], S.shape[:-2])
        crossing = self.sweep.buffer("crossing", *shape, rows.shape[-2], S.shape[-1])
        for block in _blocks(rows.shape[-2], S.shape[-2] * S.shape[-1]):
            np.matmul(rows[..., block, :], S, out=crossing[..., block, :])
        self.add(name, left[..., tokens, :], v, reverse=reverse)
        self.accumulate(name, crossing)
        return crossing

    def accumulate(self, name: str, x: Array) -> None:
        """Add x."""
        if name in self.grads:
            self.grads[name] += x
        else:
            self.grads[name] = self._target(name, x.shape)
            self.grads[name][...] = x


def _read(left: Array, right: Array, out: Array, *, reverse: bool = False) -> Array:
    """Write left' right, (..., W, V), of the rows that a query may see."""
    K, W = left.shape[-2:]
    for rows in _blocks(W, K * right.shape[-1]):
        seen = slice(rows.start, None) if reverse else slice(K - W + rows.stop)
        np.matmul(left[..., seen, rows].mT, right[..., seen, :], out=out[..., rows, :])
    return out


def _halves(D: int, W: int, reverse: bool) -> tuple[slice, slice]:
    """Return where features and tokens lie, such that what a query sees is one run of rows."""
    return (slice(W, None), slice(W)) if reverse else (slice(D), slice(D, None))
