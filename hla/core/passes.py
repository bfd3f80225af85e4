"""The causal pass, the one primitive: forward, reverse, strict and full (derivations 1).

    pass_g(q, k, v)_t = sum_{j<=t} g^(t-j) (q_t . k_j) v_j

Within a chunk of W tokens with the state S before it, for any weights of the decay,

    o = (L * (q k')) v + (a * q) S          S <- r S + (b * k)' v

where L (W, W) weighs pairs, a (W) carries the state to a query, b (W) carries a key to the chunk's
end and r carries the state over the chunk. The reverse pass is the same with L transposed, a and b
exchanged and the chunks taken last first. W = 1 is the recurrent form and W = T the dense one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .namespace import (
    Array,
    device,
    expand,
    fold,
    library_of,
    namespace,
    padded,
    powers,
    symbolic,
    triangle,
)

Shape = tuple[int, ...]
Fields = tuple[str, ...]

CHUNK = 64  # tokens in a chunk, the paper's w: balances W D against D^2 work at D = 64


class Pass(NamedTuple):
    """One step of a program, ``out = pass(q, k, v)``; its state has the fields named.

    What follows ``kind`` is for passes that stand by themselves (`programs.single_passes`):
    S <- S + write * k v', out <- out + read * q S.
    """

    out: str
    q: str  # "" asks for the state alone
    k: str
    v: str
    state: Fields  # (matrix,) or, where v carries the column of ones, (matrix, mass)
    power: int = 1  # exponent of the gate
    kind: str = "causal"  # pairs j <= t; "strict": j < t; "full": all, undecayed
    reverse: bool = False  # last token first: the transposed map
    read: float = 1.0
    write: float = 1.0
    start: str = ""  # name of the state that it begins from
    end: str = ""  # name of the state that it leaves
    turned: bool = False  # ``start`` holds the transpose
    dot: str = ""  # sum_v out * dot, token by token, is part of the gate's gradient
    step: int = 0  # number of the program's step that it belongs to

    @property
    def does(self) -> tuple[Any, ...]:
        """What it computes, without factors and states: the key of fused kernels."""
        return (*self[:4], self.power, self.kind, self.reverse)


class Gate(NamedTuple):
    """How the past fades: by ``decay`` (batch), by ``log_gate`` (batch, T), or not at all."""

    decay: Array | None = None
    log_gate: Array | None = None

    @property
    def batch(self) -> Shape:
        """Batch shape that the gate brings into every state."""
        if self.decay is not None:
            return tuple(self.decay.shape)
        return () if self.log_gate is None else tuple(self.log_gate.shape[:-1])

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What there is of the two, with two axes after the batch."""
        if self.decay is not None:
            return (self.decay[..., None, None],)
        return () if self.log_gate is None else (self.log_gate[..., None],)

    def of(self, arrays: Sequence[Array]) -> Gate:
        """Return a gate of the same kind from what `arrays` gave."""
        if self.decay is not None:
            return Gate(decay=arrays[0][..., 0, 0])
        return self if self.log_gate is None else Gate(log_gate=arrays[0][..., 0])


class Weights(NamedTuple):
    """What the gate does within a chunk, shaped to multiply (..., W, features)."""

    mask: Array  # [W, W] the legal pairs (query, key)
    pair: Array | None = None  # [..., W, W]
    query: Array | None = None  # [..., W, 1]
    key: Array | None = None  # [..., W, 1]
    total: Array | None = None  # [..., 1, 1]

    def reversed(self) -> Weights:
        """Weights of the reverse pass."""
        pair = None if self.pair is None else self.pair.mT
        return Weights(self.mask.mT, pair, self.key, self.query, self.total)


def broadcast(*shapes: Shape) -> Shape:
    """Return the common shape of ``shapes``, whose sizes a compiler may have made symbols."""
    try:
        return _broadcast(*shapes)
    except (TypeError, ValueError):  # symbols have no hash, or are not compared with others
        return _broadcast.__wrapped__(*shapes)


@functools.lru_cache(maxsize=1024)
def _broadcast(*shapes: Shape) -> Shape:
    common = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for i, n in enumerate(shape, len(common) - len(shape)):
            if common[i] == 1:
                common[i] = n
            elif n not in (1, common[i]):
                raise ValueError(f"shapes {shapes} do not broadcast")
    return tuple(common)


def weights(gate: Gate, power: int, kind: str, W: int, *, like: Array) -> Weights:
    """Weights of one chunk of W tokens; ``gate.log_gate`` is that of the chunk, (..., W).

    Sums of the log gate run over exactly the tokens between a pair: no difference of prefix sums
    that cancels, and -inf is absorbed instead of subtracted.
    """
    xp, strict = namespace(like), kind == "strict"
    t = xp.arange(W, dtype=like.dtype, device=device(like))
    span = t[:, None] - t[None, :] - (1 if strict else 0)  # [W, W] decays between query and key
    mask = span >= 0
    zero = xp.zeros((), dtype=like.dtype, device=device(like))
    if power and gate.decay is not None:
        g = gate.decay[..., None, None]
        return Weights(
            mask,
            powers(g, power * xp.where(mask, span, zero)),
            powers(g, (power * (t if strict else t + 1))[:, None]),
            powers(g, (power * (W - 1 - t))[:, None]),
            powers(g, zero + power * W),
        )
    if not power or gate.log_gate is None:
        return Weights(mask)
    a = power * gate.log_gate
    after = xp.where(t[:, None] > t[None, :], a[..., :, None], zero)
    between = xp.cumulative_sum(after, axis=-2)  # [..., W, W]: sum of a over key+1..query
    upto = xp.cumulative_sum(a, axis=-1)[..., None]  # [..., W, 1]
    key, total = xp.exp(xp.sum(after, axis=-2)), xp.exp(xp.sum(a, axis=-1))
    if strict:
        between, upto = (padded(x, -2, before=1)[..., :W, :] for x in (between, upto))
    pair = xp.exp(xp.where(mask, between, zero))
    return Weights(mask, pair, xp.exp(upto), key[..., None], total[..., None, None])


def slopes(
    gate: Gate, power: int, kind: str, W: int, *, like: Array, tokens: Any = None
) -> Weights | None:
    """Return the derivatives of `weights` by the decay, right at 0 too; None without a decay.

    ``tokens`` as in `cut_short`.
    """
    if gate.decay is None:
        return None
    xp, late = namespace(like), int(kind == "strict")
    t = xp.arange(W, dtype=like.dtype, device=device(like))
    span = t[:, None] - t[None, :] - late
    zero, g = xp.zeros((1, 1), dtype=t.dtype, device=device(t)), gate.decay[..., None, None]
    tokens = W if tokens is None else tokens

    def slope(n: Array) -> Array:
        n = power * xp.where(n > 0, n, xp.zeros_like(n))
        n = xp.reshape(n, (*(1,) * (g.ndim - 2), *n.shape))
        return n * powers(g, xp.where(n > 1, n - 1, xp.zeros_like(n)))

    counts = (span, (t + 1 - late)[:, None], (tokens - 1 - t)[:, None], zero + tokens)
    return Weights(span >= 0, *(slope(n) for n in counts))


def weights_adjoint(power: int, kind: str, w: Weights, slope: Weights | None, dw: Weights) -> Array:
    """Gradient of the gate within a chunk from those of its `weights`.

    Only products that cross a token add to its gradient and none is subtracted, so that it keeps
    its digits whatever the gate.

    Parameters
    ----------
    power, kind
        As given to `weights`.
    w : Weights
        What it returned.
    slope : Weights or None
        The `slopes` of a decay; None asks for the gradient of a log gate.
    dw : Weights
        Gradients of the arrays of ``w``, those of ``pair`` 0 where no pair is legal.

    Returns
    -------
    array, (..., 1, 1) for a decay, (..., W, 1) for a log gate
    """
    by: tuple[Any, ...] = (slope or w)[1:]
    parts = [x * d for x, d in zip(by, dw[1:], strict=True)]
    xp = namespace(parts[0])
    if slope is not None:
        return sum(xp.sum(x, axis=(-2, -1), keepdims=True) for x in parts)
    pair, query, key, total = parts
    ones = xp.ones(w.mask.shape, dtype=pair.dtype, device=device(pair))
    ones = xp.reshape(ones, (*(1,) * (pair.ndim - 2), *ones.shape))
    before, after = xp.tril(ones, k=-1), xp.triu(ones, k=int(kind == "strict"))
    pairs = xp.sum(triangle(after @ pair, k=-1, upper=False), axis=-1, keepdims=True)
    return power * (pairs + after @ query + before @ key + total)


def cut_short(w: Weights, gate: Gate, power: int, tokens: Array) -> Weights:
    """Weights of a chunk whose first ``tokens`` decay; zeros after them fill it up."""
    if w.key is None or gate.decay is None:
        return w
    xp, g = namespace(tokens), gate.decay[..., None, None]
    t = xp.arange(w.mask.shape[-1], dtype=tokens.dtype)
    after = xp.clip(tokens - 1 - t, min=0)[:, None]
    return w._replace(key=powers(g, power * after), total=powers(g, power * tokens))


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


def sweep(
    steps: Sequence[Pass],
    values: Mapping[str, Array],
    gate: Gate,
    states: Sequence[Array],
    *,
    chunk: int,
    outputs: Sequence[str],
    reverse: bool = False,
) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Run causal or strict steps together, chunk by chunk.

    Parameters
    ----------
    steps : sequence of Pass
        In order; later ones read the outputs of earlier ones.
    values : mapping
        The arrays that the steps read, (*batch, T, features), of the accumulation dtype.
    gate : Gate
        Decay of every step.
    states : sequence of array
        State that each step starts from, of its full shape.
    chunk : int
        Tokens in a chunk.
    outputs : sequence of str
        The step outputs to return.
    reverse : bool
        Exchange past and future: the transposed map; states then hold the future.

    Returns
    -------
    outs : dict of array, (*batch, T, features)
    states : tuple of array
    """
    carry, like, given = tuple(states), next(iter(values.values())), dict(values)
    T = like.shape[-2]
    if gate.log_gate is not None:
        given["gate"] = gate.log_gate[..., None]

    def weighed(gate: Gate, W: int) -> dict[tuple[int, str], Weights]:
        kinds = {(s.power, s.kind) for s in steps}
        return {key: weights(gate, *key, W, like=like) for key in kinds}

    cuts, ends = pieces(tuple(given.values()), chunk)
    parts: list[tuple[Array, ...]] = []
    for xs in reversed(cuts) if reverse else cuts:
        W = xs[0].shape[-2]
        fixed = weighed(gate, W) if gate.log_gate is None else None

        def body(
            carry: tuple[Array, ...], xs: tuple[Array, ...], W: int = W, fixed: Any = fixed
        ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            local = dict(zip(given, xs, strict=False))
            ws = fixed or weighed(Gate(log_gate=local["gate"][..., 0]), W)
            if ends is not None:
                ws = {key: cut_short(w, gate, key[0], xs[-1][0, 0]) for key, w in ws.items()}
            after = _chunk(steps, local, ws, carry, reverse)
            return after, tuple(local[name] for name in outputs)

        xs = xs if ends is None else (*xs, ends)
        axes = (-3,) * len(xs)
        carry, outs = fold(body, carry, xs, axes=axes, out_axis=-3, reverse=reverse)
        parts.append(outs)
    if reverse:
        parts.reverse()
    whole = (rows(x, T) for x in zip(*parts, strict=True))
    return dict(zip(outputs, whole, strict=True)), carry


def _chunk(
    steps: Sequence[Pass],
    local: dict[str, Array],
    ws: Mapping[tuple[int, str], Weights],
    carry: tuple[Array, ...],
    reverse: bool,
) -> tuple[Array, ...]:
    """Run every step over one chunk; write its outputs to ``local``; return the states after it."""
    pairs: dict[tuple[str, str, int, str], Array] = {}
    after = []
    for s, S in zip(steps, carry, strict=True):
        w, k, v = ws[s.power, s.kind], local[s.k], local[s.v]
        w = w.reversed() if reverse else w
        if s.q:
            q, key = local[s.q], (s.q, s.k, s.power, s.kind)
            if key not in pairs:
                pair = q @ k.mT  # [..., W, W]
                pair = pair if w.pair is None else pair * w.pair
                # not a product with the mask: an overflowing future would reach the past as 0 * inf
                strict = int(s.kind == "strict")
                pairs[key] = triangle(pair, strict if reverse else -strict, upper=reverse)
            local[s.out] = pairs[key] @ v + (q if w.query is None else q * w.query) @ S
        kv = (k if w.key is None else k * w.key).mT @ v
        after.append(kv + (S if w.total is None else S * w.total))
    return tuple(after)


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


def begun(state: Array | None, k: Array, v: Array, gate: Gate) -> Array:
    """Return the state that a pass of these keys and values starts from, of its full shape."""
    lead = broadcast(k.shape[:-2], v.shape[:-2], gate.batch)
    return started(state, (*lead, k.shape[-1], v.shape[-1]), (k, v), gate)


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
    step, begin = Pass("o", "q", "k", "v", ("S",), power, kind), [begun(state, k, v, gate)]
    values = {"q": q, "k": k, "v": v}
    outs, (end,) = sweep([step], values, gate, begin, chunk=chunk, outputs="o", reverse=reverse)
    return outs["o"], end


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
    before = after = begun(state, k, v, gate)
    if power and gate.decay is not None:
        after = before * (gate.decay**power)[..., None, None]
    elif power and gate.log_gate is not None:
        after = before * namespace(k).exp(power * gate.log_gate)[..., None]
    after = after + k.mT @ v
    return q @ (before if kind == "strict" else after), after
