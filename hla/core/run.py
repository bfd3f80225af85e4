"""Run passes, of a program or of its adjoint: the one interpreter.

Passes of one direction that need nothing of the others run together, chunk by chunk (`sweep`), with
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

from .namespace import (
    Array,
    device,
    expand,
    fold,
    library_of,
    namespace,
    padded,
    sum_to,
    symbolic,
    triangle,
)
from .passes import (
    CHUNK,
    Gate,
    Pass,
    Shape,
    Weights,
    broadcast,
    remembered,
    slopes,
    weights,
    weights_adjoint,
)
from .programs import Passes, adjoint, all_shapes, d, pruned, sweeps

RunPass = Callable[..., tuple[Array, Array]]
Env = dict[str, Array]
Kept = dict[int, list[Array]]  # states before every chunk, by the program's step
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
            one, turned = held(s)
            if one[:2] not in totals:
                totals[one[:2]] = env[one.k].mT @ env[one.v]
            out = env[s.q] @ (totals[one[:2]].mT if turned else totals[one[:2]])
            add(env, s.out, scaled(s.read, scaled(s.write, out)), env)
        else:
            later = {n for other in groups[i + 1 :] for t in other for n in (t.q, t.k, t.v, t.dot)}
            sweep(group, env, gate, kept, chunk=chunk, later=None if keep else later)
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
    """What runs programs: `run` and `pull`, or a backend's own with the same signatures."""

    run: Callable[..., Env]
    pull: Callable[..., Env]


CORE = Engine(run, pull)


def by_passes(run_pass: RunPass) -> Engine:
    """Return the engine of a backend whose only kernel is the pass."""
    return Engine(*(functools.partial(f, run_pass=run_pass) for f in CORE))


class Held(NamedTuple):
    """A state in a sweep, a sum of k v', which several passes may read, transposed or not."""

    k: str
    v: str
    power: int
    kind: str
    start: str
    turned: bool  # ``start`` is the transpose
    write: Any

    def same(self, other: Held) -> bool:
        """Whether two are one; factors that tracers stand for are not compared."""
        return self[:-1] == other[:-1] and (self.write is other.write or self.write == other.write)


def held(s: Pass) -> tuple[Held, bool]:
    """Return the state of a pass with its arrays in order, and whether the pass has the other."""
    other = s.k > s.v
    k, v = (s.v, s.k) if other else (s.k, s.v)
    return Held(k, v, s.power, s.kind, s.start, s.start != "" and s.turned != other, s.write), other


class Sweep:
    """Passes that run together, chunk by chunk.

    Parameters
    ----------
    steps : tuple of Pass
        Of one direction, causal or strict; later ones read what earlier ones make.
    gate : Gate
        Decay of every step.
    like : array
        Of the dtype and device of all.
    """

    def __init__(self, steps: Passes, gate: Gate, like: Array) -> None:
        self.steps, self.gate, self.like, self.reverse = steps, gate, like, steps[0].reverse
        self.states: list[Held] = []  # without repetitions
        self.places: list[tuple[int, bool]] = []  # of each step: its state, whether transposed
        for s in steps:
            one, turned = held(s)
            i = next((i for i, x in enumerate(self.states) if x.same(one)), len(self.states))
            self.states += [one] if i == len(self.states) else []
            self.places.append((i, turned))
        self.dots = [(s, *x) for s, x in zip(steps, self.places, strict=True) if s.dot and s.power]

    def weigh(self, gate: Gate, W: int, tokens: Any = None) -> dict[tuple[int, str], Any]:
        """Return weights and slopes of a chunk by power and kind."""
        given: Any = {"like": self.like, "tokens": tokens}
        dotted = {(s.power, s.kind) for s, *_ in self.dots}
        return {
            x: (
                weights(gate, *x, W, **given),
                slopes(gate, *x, W, **given) if x in dotted else None,
            )
            for x in {(s.power, s.kind) for s in self.steps}
        }

    def begin(self, env: Env) -> tuple[Array, ...]:
        """Return the states that the passes start from, of their full shapes."""
        shapes = {name: tuple(x.shape) for name, x in env.items()}
        _, full = all_shapes(self.steps, shapes, self.gate.batch)
        of: dict[str, dict[str, None]] = {}  # given arrays that a result is made of, in order
        found: dict[int, Array] = {}

        def given(*names: str) -> dict[str, None]:
            return {x: None for n in names if n for x in of.get(n, {n: None})}

        for s, (i, turned), shape in zip(self.steps, self.places, full, strict=True):
            made = given(s.k, s.v, s.start)
            of[s.out] = given(s.out) | made | given(s.q) if s.out in of else made | given(s.q)
            if i not in found:
                state = begun(s, env, shape[:-2])
                state = started(state, shape, [env[n] for n in made], self.gate)
                found[i] = state.mT if turned else state
        return tuple(found.values())

    def chunk(
        self, local: Env, ws: Mapping[tuple[int, str], Any], carry: Sequence[Array]
    ) -> tuple[Array, ...]:
        """Run every step over one chunk, results to ``local``; return the states after it."""
        pairs, products = dict[Any, Array](), Products(local, reverse=self.reverse)
        dots = {id(s) for s, *_ in self.dots}
        for s, (i, turned) in zip(self.steps, self.places, strict=True):
            if not (s.out or s.dot):
                continue
            own, slope = ws[s.power, s.kind]
            w, S = own.reversed() if self.reverse else own, carry[i].mT if turned else carry[i]
            read = local[s.q] @ S
            if s.out:
                key = (s.q, s.k, s.power, s.kind)
                if key not in pairs:
                    pairs[key] = products.legal(times(products(s.q, s.k), w.pair), s)
                out = pairs[key] @ scaled(s.write, local[s.v]) + times(read, w.query)
                add(local, s.out, scaled(s.read, out), local)
            if id(s) in dots:
                dw = self.crossing(s, own, local, products, scaled(s.read, read), S)
                grad = weights_adjoint(s.power, s.kind, own, slope, dw)
                grad = sum_to(grad, (*self.gate.batch, *grad.shape[-2:]))
                local[GATE] = local[GATE] + grad if GATE in local else grad
        after = []
        for one, S in zip(self.states, carry, strict=True):
            w = ws[one.power, one.kind][0]
            w = w.reversed() if self.reverse else w
            kv = times(local[one.k], w.key).mT @ scaled(one.write, local[one.v])
            after.append(kv + times(S, w.total))
        return tuple(after)

    def crossing(
        self, s: Pass, w: Weights, local: Env, products: Products, read: Array, S: Array
    ) -> Weights:
        """Return the gradients of the weights of a chunk that one pass with a ``dot`` makes."""
        xp, other, pair = namespace(read), local.get(f"kept@{s.step}"), None
        if self.reverse:
            both = products.legal(products(s.q, s.k) * products(s.dot, s.v), s)
            pair = scaled(s.read, scaled(s.write, both)).mT
        one = xp.sum(local[s.dot] * read, axis=-1, keepdims=True)
        query, key = (None, one) if self.reverse else (one, None)
        total = None if other is None else xp.sum(other * S.mT, axis=(-2, -1), keepdims=True)
        return Weights(w.mask, pair, query, key, total)


class Products:
    """Products a b' of a chunk's arrays, [..., W, W], each made once."""

    def __init__(self, local: Env, *, reverse: bool) -> None:
        self.local, self.reverse, self.made = local, reverse, dict[tuple[str, str], Array]()

    def __call__(self, a: str, b: str) -> Array:
        """Return that of two names."""
        if (b, a) in self.made:
            return self.made[b, a].mT
        if (a, b) not in self.made:
            self.made[a, b] = self.local[a] @ self.local[b].mT
        return self.made[a, b]

    def legal(self, x: Array, s: Pass) -> Array:
        """Clear the pairs that a pass does not have.

        Not a product with the mask: an overflowing future would reach the past as 0 * inf.
        """
        strict = int(s.kind == "strict")
        return triangle(x, strict if self.reverse else -strict, upper=self.reverse)


def sweep(
    steps: Passes, env: Env, gate: Gate, kept: Kept, *, chunk: int, later: set[str] | None
) -> None:
    """Run passes together; add what they make to ``env`` and ``kept``.

    Parameters
    ----------
    steps, gate
        As in `Sweep`.
    env : dict
        All arrays by name.
    kept : dict
        States that the passes of an earlier sweep kept.
    chunk : int
        Tokens in a chunk.
    later : set of str or None
        Names that are read elsewhere; None: all are.
    """
    reads = dict.fromkeys(n for s in steps for n in (s.q, s.k, s.v, s.dot) if n)
    outs = dict.fromkeys(s.out for s in steps if s.out)
    made = [n for n in outs if later is None or n in later or n not in reads]
    needed = dict.fromkeys((*reads, *outs, *(n.removeprefix("d.") for n in outs)))
    given = {n: env[n] for n in needed if n in env}
    like = next(iter(given.values()))
    one, T = Sweep(steps, gate, like), like.shape[-2]
    others = [s.step for s, *_ in one.dots if s.step in kept]
    keeps = [(s.step, *place) for s, *place in one.dots if s.step not in kept]
    if gate.log_gate is not None:
        given["gate"] = gate.log_gate[..., None]
    names = (*given, *(f"kept@{i}" for i in others))
    cuts, ends = pieces(tuple(given.values()), chunk)
    carry, parts = one.begin(env), list[tuple[Array, ...]]()
    for i in reversed(range(len(cuts))) if one.reverse else range(len(cuts)):
        W, once = cuts[i][0].shape[-2], gate.log_gate is None and ends is None
        fixed = one.weigh(gate, W) if once else None

        def body(
            carry: tuple[Array, ...], xs: tuple[Array, ...], W: int = W, fixed: Any = fixed
        ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            local = dict(zip(names, xs, strict=False))
            here = gate if gate.log_gate is None else Gate(log_gate=local["gate"][..., 0])
            ws = fixed or one.weigh(here, W, None if ends is None else xs[-1][0, 0])
            after = one.chunk(local, ws, carry)
            states = (carry[i].mT if turned else carry[i] for _, i, turned in keeps)
            return after, (*(local[n] for n in made), *states, *([local[GATE]] if one.dots else ()))

        xs = (*cuts[i], *(kept[n][i] for n in others), *(() if ends is None else (ends,)))
        axes = (-3,) * len(xs)
        carry, found = fold(body, carry, xs, axes=axes, out_axis=-3, reverse=one.reverse)
        parts.append(found)
    whole = list(zip(*(reversed(parts) if one.reverse else parts), strict=True))
    if one.dots:
        grad = rows(whole.pop())  # of a decay one of each chunk
        log = gate.decay is None
        add(env, GATE, grad[..., :T, 0] if log else namespace(grad).sum(grad, axis=(-2, -1)), env)
    env |= {n: rows(x, T) for n, x in zip(made, whole, strict=False)}
    kept |= {n: list(x) for (n, *_), x in zip(keeps, whole[len(made) :], strict=True)}
    for s, (i, turned) in zip(steps, one.places, strict=True):
        add(env, s.end, carry[i].mT if turned else carry[i], env)


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
    if kind == "full":
        total = k.mT @ v
        return q @ total, total
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
