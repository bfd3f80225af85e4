"""Run passes, of a program or of its adjoint: the one interpreter.

Passes of one direction that need nothing of the others run together, chunk by chunk (`Sweep`), with
the products of `passes`. What several of them share is computed once: a pair of arrays multiplied
token by token, a state. The adjoint of a causal program is two such sweeps.

The gate's gradient. With S the state before a chunk, R the gradient of the state after it, A = q k'
and dA = do v', the gradients of the weights L, a, b and r are A * dA, q.(S do), k.(R v) and <S, R>
(derivations 5). The passes of dq and dv make them: each leaves what it has and keeps its states,
with which that one of the two which runs later makes <S, R>.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .namespace import Array, device, expand, library_of, namespace, padded, sum_to, symbolic
from .passes import (
    CHUNK,
    Gate,
    Pass,
    Shape,
    Weights,
    broadcast,
    remembered,
    weights,
    weights_adjoint,
)
from .programs import Passes, adjoint, all_shapes, d, pruned, sweeps

RunPass = Callable[..., tuple[Array, Array]]
Env = dict[str, Array]
Kept = dict[int, list[Array]]  # states before every chunk, by the program's step
Weighed = dict[tuple[int, str], tuple[Weights, Weights]]
GATE = "d.gate"
grouped, transpose = remembered(sweeps), remembered(adjoint)


def run(
    steps: Passes,
    values: Mapping[str, Array],
    gate: Gate,
    *,
    chunk: int = CHUNK,
    keep: bool = False,
    run_pass: RunPass | None = None,
) -> Env:
    """Run passes and return every array by name.

    Parameters
    ----------
    steps : tuple of Pass
        As `prune` leaves them.
    values : mapping
        Arrays by name: (*batch, T, features) in the accumulation dtype, states (*batch, D, V).
    gate : Gate
        Decay of every step.
    chunk : int
        Tokens in a chunk.
    keep : bool
        Return also what is read only by the sweep that made it.
    run_pass : callable, optional
        With the signature of `causal_pass`: runs each pass by itself, but for those with a ``dot``.

    Returns
    -------
    dict
        With "d.gate" where passes have a ``dot``.
    """
    env, kept, totals, groups = Env(values), Kept(), dict[Any, Array](), grouped(steps)
    if run_pass or any(s.kind == "full" for s in steps):
        groups = tuple((s,) for s in steps)
    for i, group in enumerate(groups):
        s = group[0]
        if run_pass and not s.dot:
            q, k, v = (env[name] for name in (s.q, s.k, s.v))
            start = begun(s, env, broadcast(k.shape[:-2], v.shape[:-2], gate.batch))
            options = {"power": s.power, "kind": s.kind, "reverse": s.reverse, "chunk": chunk}
            out, end = run_pass(q, k, scaled(s.write, v), gate, state=start, **options)
            add(env, s.out, scaled(s.read, out), env)
            add(env, s.end, end, env)
        elif s.kind == "full":
            (k, v, *_), turned = held(s)
            if (k, v) not in totals:
                totals[k, v] = env[k].mT @ env[v]
            total = facing(totals[k, v], turned)
            add(env, s.out, scaled(s.read, scaled(s.write, env[s.q] @ total)), env)
            add(env, s.end, total, env)
        else:
            later = {n for other in groups[i + 1 :] for t in other for n in (t.q, t.k, t.v, t.dot)}
            Sweep(group, env, gate).run(kept, chunk, None if keep else later)
    return env


def pull(
    steps: Passes,
    values: Mapping[str, Array],
    gate: Gate,
    *,
    with_gate: bool,
    chunk: int = CHUNK,
    run_pass: RunPass | None = None,
) -> Env:
    """Run the adjoint of a program: gradients by name, "d.q", "d.k", "d.v", "d.S@0", "d.gate".

    Parameters
    ----------
    steps : tuple of Pass
        The program's own.
    values : mapping
        What `run` was given and, with ``keep``, returned; "d.o" and "d.S@T" as far as they are not
        zero.
    with_gate : bool
        Whether the gate's gradient is requested.
    gate, chunk, run_pass
        As given to `run`.
    """
    values, T = Env(values), values["k"].shape[-2]
    steps = tuple(s if s.out else s._replace(out=f"unread@{s.step}") for s in steps)
    moved = {s.out for s in steps if d(s.out) in values}
    for s in reversed(steps):
        if s.out not in moved and d(s.end) in values:  # of a step that nothing reads but its state
            end, lead = values[d(s.end)], values[s.q].shape[:-2]
            shape = (*broadcast(end.shape[:-2], lead), T, end.shape[-1])
            values[d(s.out)] = namespace(end).zeros(shape, dtype=end.dtype, device=device(end))
            moved.add(s.out)
        moved |= {s.q, s.k, s.v} if s.out in moved else set()
    wanted = frozenset(map(d, ("q", "k", "v", *(s.start for s in steps if s.start in values))))
    back, _ = pruned(transpose(steps), frozenset(values), wanted, gate=with_gate)
    return run(back, values, gate, chunk=chunk, run_pass=run_pass)


class Engine(NamedTuple):
    """What runs programs: `run` and `pull`, or a backend's own with the same signatures.

    One that ``scales`` is given q as it is and multiplies it by its argument ``scale``.
    """

    run: Callable[..., Env]
    pull: Callable[..., Env]
    scales: bool = False


CORE = Engine(run, pull)


def by_passes(run_pass: RunPass) -> Engine:
    """Return the engine of a backend whose only kernel is the pass."""
    f, back = (functools.partial(x, run_pass=run_pass) for x in (run, pull))
    return Engine(f, back)


def held(s: Pass) -> tuple[tuple[Any, ...], bool]:
    """Return what tells the state of a pass from others, and whether the pass has its transpose.

    A state is a sum of k v' with its two arrays in order; several passes may read it.
    """
    other = s.k > s.v
    write = s.write if isinstance(s.write, (int, float)) else id(s.write)  # tracers have no hash
    start = s.start, s.start != "" and s.turned != other
    return (*sorted((s.k, s.v)), s.power, s.kind, *start, write), other


class Sweep:
    """Passes of one direction that run together, chunk by chunk.

    Parameters
    ----------
    steps : tuple of Pass
        Causal or strict; later ones read what earlier ones make.
    env : dict
        All arrays by name.
    gate : Gate
        Decay of every step.
    """

    def __init__(self, steps: Passes, env: Env, gate: Gate) -> None:
        self.env, self.gate, self.reverse = env, gate, steps[0].reverse
        self.passes = list[tuple[Pass, int, bool]]()  # its state's number, and if transposed
        self.states = dict[tuple[Any, ...], Pass]()  # a pass that has each, by what tells it
        for s in steps:
            key, turned = held(s)
            self.states.setdefault(key, s._replace(k=key[0], v=key[1]))
            self.passes.append((s, [*self.states].index(key), turned))
        self.dots = [x for x in self.passes if x[0].dot and x[0].power]
        self.reads = dict.fromkeys(n for s in steps for n in (s.q, s.k, s.v, s.dot) if n)
        self.makes = dict.fromkeys(s.out for s in steps if s.out)
        of = (n.removeprefix("d.") for n in self.makes)  # whose shapes gradients have
        needed = dict.fromkeys((*self.reads, *self.makes, *of))
        self.given = {n: env[n] for n in needed if n in env}
        self.like = next(iter(self.given.values()))

    def run(self, kept: Kept, chunk: int, later: set[str] | None) -> None:
        """Add what the passes make to ``env``, and the states that a later sweep needs to ``kept``.

        What only this sweep reads is not returned: of ``later`` it has nothing; None: all is read.
        """
        env, log, T = self.env, self.gate.log_gate, self.like.shape[-2]
        known = {f"kept@{s.step}": kept[s.step] for s, *_ in self.dots if s.step in kept}
        keeps = [(s.step, i, turned) for s, i, turned in self.dots if s.step not in kept]
        made = [n for n in self.makes if later is None or n in later or n not in self.reads]
        given = self.given | ({} if log is None else {"gate": log[..., None]})
        cuts, ends = pieces(tuple(given.values()), chunk)
        make, powers = library_of(self.like).chunk_totals, {s.power for s, *_ in self.passes}
        tokens = {} if ends is None else {"tokens": ends}
        each = [make(self.gate, powers, cut[-1], ends) | tokens for cut in cuts]
        carry, parts, loop = self.begin(), list[tuple[Array, ...]](), library_of(self.like).fold
        for c in reversed(range(len(cuts))) if self.reverse else range(len(cuts)):
            fixed = self.weigh(cuts[c][0].shape[-2], {}) if log is None and ends is None else None

            def body(
                carry: tuple[Array, ...], xs: tuple[Array, ...], c: int = c, fixed: Any = fixed
            ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
                local = dict(zip((*given, *known, *each[c]), xs, strict=True))
                weights = fixed or self.weigh(cuts[c][0].shape[-2], local)
                after = self.chunk(local, weights, carry)
                before = (facing(carry[i], turned) for _, i, turned in keeps)
                out = [*made, *([GATE] if self.dots else [])]
                return after, (*before, *(local[n] for n in out))

            xs = (*cuts[c], *(x[c] for x in known.values()), *each[c].values())
            carry, found = loop(body, carry, xs, (-3,) * len(xs), -3, self.reverse)
            parts.append(found)
        whole = list(zip(*(reversed(parts) if self.reverse else parts), strict=True))
        if self.dots:
            grad = rows(whole.pop())  # of a decay one of each chunk
            grad = namespace(grad).sum(grad, axis=(-2, -1)) if log is None else grad[..., :T, 0]
            add(env, GATE, grad, env)
        kept |= {step: list(x) for (step, *_), x in zip(keeps, whole, strict=False)}
        env |= {n: rows(x, T) for n, x in zip(made, whole[len(keeps) :], strict=True)}
        for s, i, turned in self.passes:
            add(env, s.end, facing(carry[i], turned), env)

    def begin(self) -> tuple[Array, ...]:
        """Return the states that the passes start from, of their full shapes."""
        shapes = {name: tuple(x.shape) for name, x in self.env.items()}
        _, full = all_shapes(tuple(s for s, *_ in self.passes), shapes, self.gate.batch)
        of: dict[str, dict[str, None]] = {}  # given arrays that a result is made of, in order
        found: dict[int, Array] = {}

        def given(*names: str) -> dict[str, None]:
            return {x: None for n in names if n for x in of.get(n, {n: None})}

        for (s, i, turned), shape in zip(self.passes, full, strict=True):
            made = given(s.k, s.v, s.start)
            of[s.out] = given(s.out) | made | given(s.q) if s.out in of else made | given(s.q)
            if i not in found:
                state = begun(s, self.env, shape[:-2])
                state = started(state, shape, [self.env[n] for n in made], self.gate)
                found[i] = facing(state, turned)
        return tuple(found.values())

    def weigh(self, W: int, local: Env) -> Weighed:
        """Return the weights of a chunk by power and kind, and those of this direction."""
        gate = Gate(log_gate=local["gate"][..., 0]) if "gate" in local else self.gate
        tokens = local["tokens"][0, 0] if "tokens" in local else None
        dotted, found = {(s.power, s.kind) for s, *_ in self.dots}, Weighed()
        for x in {(s.power, s.kind) for s, *_ in self.passes}:
            w = weights(gate, *x, W, self.like, tokens, slope=x in dotted)
            found[x] = w, w.reversed() if self.reverse else w
        return found

    def chunk(self, local: Env, ws: Weighed, carry: Sequence[Array]) -> tuple[Array, ...]:
        """Run every step over one chunk, results to ``local``; return the states after it."""
        pairs, products = dict[Any, Array](), Products(local)
        for s, i, turned in self.passes:
            if not (s.out or s.dot):
                continue
            (own, w), S = ws[s.power, s.kind], facing(carry[i], turned)
            read = local[s.q] @ S
            if s.out:
                key = (s.q, s.k, s.power, s.kind)
                if key not in pairs:
                    pairs[key] = legal(times(products[s.q, s.k], w.pair), s)
                out = pairs[key] @ scaled(s.write, local[s.v]) + times(read, w.query)
                add(local, s.out, scaled(s.read, out), local)
            if s.dot and s.power:
                dw = self.crossing(s, own, local, products, scaled(s.read, read), S)
                grad = weights_adjoint(s.power, s.kind, own, dw)
                grad = sum_to(grad, (*self.gate.batch, *grad.shape[-2:]))
                local[GATE] = local[GATE] + grad if GATE in local else grad
        after = []
        for one, S in zip(self.states.values(), carry, strict=True):
            _, w = ws[one.power, one.kind]
            kv = times(local[one.k], w.key).mT @ scaled(one.write, local[one.v])
            after.append(kv + times(S, local.get(f"total@{one.power}", w.total)))
        return tuple(after)

    def crossing(
        self, s: Pass, w: Weights, local: Env, products: Products, read: Array, S: Array
    ) -> Weights:
        """Return the gradients of the weights of a chunk that one pass with a ``dot`` makes."""
        xp, other, pair = namespace(read), local.get(f"kept@{s.step}"), None
        if self.reverse:
            both = legal(products[s.q, s.k] * products[s.dot, s.v], s)
            pair = scaled(s.read, scaled(s.write, both)).mT
        one = xp.sum(local[s.dot] * read, axis=-1, keepdims=True)
        query, key = (None, one) if self.reverse else (one, None)
        total = None if other is None else xp.sum(other * S.mT, axis=(-2, -1), keepdims=True)
        return Weights(w.mask, pair, query, key, total)


class Products(dict[tuple[str, str], Array]):
    """Products a b' of a chunk's arrays, [..., W, W], each made once."""

    def __init__(self, local: Env) -> None:
        super().__init__()
        self.local = local

    def __missing__(self, names: tuple[str, str]) -> Array:
        a, b = names
        self[names] = self[b, a].mT if (b, a) in self else self.local[a] @ self.local[b].mT
        return self[names]


def facing(state: Array, turned: bool) -> Array:
    """Return a state as a pass reads it."""
    return state.mT if turned else state


def legal(x: Array, s: Pass) -> Array:
    """Clear the pairs that a pass does not have.

    Not a product with the mask: an overflowing future would reach the past as 0 * inf.
    """
    strict = int(s.kind == "strict")
    cleared: Array = library_of(x).triangle(x, strict if s.reverse else -strict, s.reverse)
    return cleared


def add(env: Env, name: str, x: Array, shapes: Mapping[str, Array]) -> None:
    """Add to a named array, a gradient in the shape of what it is of; to no name nothing."""
    of = name.removeprefix("d.")
    if name and of != name and of in shapes:
        x = sum_to(x, shapes[of].shape)
    if name:
        env[name] = env[name] + x if name in env else x


def scaled(factor: float, x: Array) -> Array:
    """Multiply ``x`` by a factor, which a tracer may stand for."""
    return x if isinstance(factor, (int, float)) and factor == 1 else factor * x


def times(x: Array, weight: Array | None) -> Array:
    """Multiply ``x`` by the weights of a chunk, None for none."""
    return x if weight is None else x * weight


def begun(s: Pass, env: Mapping[str, Array], lead: Shape) -> Array | None:
    """State that a pass starts from, (*batch, D, V); None for zeros.

    A gradient's is shared out among the batch entries ``lead`` that the state was broadcast to.
    """
    if not s.start:
        return None
    state = env[s.start].mT if s.turned else env[s.start]
    copies = math.prod(lead) // (math.prod(state.shape[:-2]) or 1) if s.start[:2] == "d." else 1
    return state / copies if copies > 1 else state


def pieces(xs: Sequence[Array], chunk: int) -> tuple[list[tuple[Array, ...]], Array | None]:
    """Cut arrays into whole chunks and a rest.

    Parameters
    ----------
    xs : sequence of array, (..., T, features)
        Of one length T.
    chunk : int
        Tokens in a chunk.

    Returns
    -------
    pieces : list of tuple of array, (..., chunks, W, features)
        Chunks of one width; of no tokens there is one chunk of none.
    ends : array, (chunks, 1, 1), or None
        Where T is a symbol, and zeros fill the last chunk: the tokens in each.
    """
    xp, T = namespace(xs[0]), xs[0].shape[-2]
    turns, rest = T // chunk, T % chunk

    def blocks(x: Array, turns: int, W: int) -> Array:
        return xp.reshape(x, (*x.shape[:-2], turns, W, x.shape[-1]))

    if symbolic(T):  # any part may be empty, and a loop needs a chunk
        filled = [padded(x, -2, after=(turns + 1) * chunk - T) for x in xs]
        left = xp.clip(T - chunk * xp.arange(turns + 1), max=chunk)
        ends = xp.astype(left, xs[0].dtype)[:, None, None]
        return [tuple(blocks(x, turns + 1, chunk) for x in filled)], ends
    cuts = []
    if turns:
        cuts.append(tuple(blocks(x[..., : turns * chunk, :], turns, chunk) for x in xs))
    if rest or T == 0:
        cuts.append(tuple(blocks(x[..., turns * chunk :, :], 1, rest) for x in xs))
    return cuts, None


def rows(parts: Sequence[Array], T: int | None = None) -> Array:
    """Undo `pieces` of one array, of T tokens where that is a symbol."""
    xp = namespace(parts[0])
    flat = [xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])) for x in parts]
    whole = flat[0] if len(flat) == 1 else xp.concat(flat, axis=-2)
    return whole[..., :T, :] if symbolic(T) else whole


def started(state: Array | None, shape: Shape, made_of: Sequence[Array], gate: Gate) -> Array:
    """Return the state that a pass starts from, of its full shape: as given, or zeros.

    On a mesh it lies as what will be added to it does: the type of a loop's carry must not change.
    """
    like, xp = made_of[0], namespace(made_of[0])
    if state is None:
        state = xp.zeros((), dtype=like.dtype, device=device(like))
    state = expand(state, shape)
    library = library_of(like)
    return library.laid(state, (*made_of, *gate.arrays)) if library.meshes else state


def causal_pass(
    q: Array,
    k: Array,
    v: Array,
    gate: Gate,
    *,
    power: int = 1,
    kind: str = "causal",
    reverse: bool = False,
    state: Array | None = None,
    chunk: int = CHUNK,
) -> tuple[Array, Array]:
    """First-order causal linear attention over a sequence, by itself.

    Parameters
    ----------
    q, k : array, (*batch, T, D)
        Queries and keys; batch axes broadcast.
    v : array, (*batch, T, V)
        Values.
    gate : Gate
        The decay, raised to ``power``.
    power : int
        Exponent of the gate, 0 to 3.
    kind : {"causal", "strict", "full"}
        Pairs j <= t, pairs j < t (state read before token t's decay), or all pairs undecayed.
    reverse : bool
        Exchange past and future: the transposed map, which the adjoint needs.
    state : array, (*batch, D, V), optional
        State that the pass starts from (when reversed: at the end).
    chunk : int
        Tokens in a chunk.

    Returns
    -------
    o : array, (*batch, T, V)
    state : array, (*broadcast of k, v and gate, D, V)
    """
    start = {} if state is None else {"S@0": state}
    one = Pass("o", "q", "k", "v", (), power, kind, reverse, start="".join(start), end="S@T")
    found = run((one,), {"q": q, "k": k, "v": v} | start, gate, chunk=chunk)
    return found["o"], found["S@T"]


def token_pass(
    q: Array,
    k: Array,
    v: Array,
    gate: Gate,
    *,
    power: int = 1,
    kind: str = "causal",
    state: Array | None = None,
    **_: Any,
) -> tuple[Array, Array]:
    """`causal_pass` of one token: update the state, then read it (strict: read it first)."""
    lead = broadcast(k.shape[:-2], v.shape[:-2], gate.batch)
    before = after = started(state, (*lead, k.shape[-1], v.shape[-1]), (k, v), gate)
    if power and gate.decay is not None:
        after = before * (gate.decay**power)[..., None, None]
    elif power and gate.log_gate is not None:
        after = before * namespace(k).exp(power * gate.log_gate)[..., None]
    after = after + k.mT @ v
    return q @ (before if kind == "strict" else after), after


ONE_TOKEN = by_passes(token_pass)
