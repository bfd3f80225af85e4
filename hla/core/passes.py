"""The causal pass, the one primitive: forward, reverse, strict and full (derivations 1).

    pass_g(q, k, v)_t = sum_{j<=t} g^(t-j) (q_t . k_j) v_j

Within a chunk of W tokens with the state S before it, for any weights of the decay,

    o = (L * (q k')) v + (a * q) S          S <- r S + (b * k)' v

where L (W, W) weighs pairs, a (W) carries the state to a query, b (W) carries a key to the chunk's
end and r carries the state over the chunk. The reverse pass is the same with L transposed, a and b
exchanged and the chunks taken last first. W = 1 is the recurrent form and W = T the dense one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .namespace import Array, Namespace, device, fold, namespace, unstack

Shape = tuple[int, ...]

CHUNK = 64  # tokens in a chunk, the paper's w: balances W D against D^2 work at D = 64
GROUP = 4  # chunks that share one set of products; only their states are joined one by one


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


class Weights(NamedTuple):
    """What the gate does within a chunk, shaped to multiply (..., chunk, W, features)."""

    mask: Array  # [W, W] the legal pairs (query, key)
    pair: Array | None = None  # [..., chunk, W, W]
    query: Array | None = None  # [..., chunk, W, 1]
    key: Array | None = None  # [..., chunk, W, 1]
    total: Array | None = None  # [..., chunk, 1, 1]

    def reversed(self) -> Weights:
        """Weights of the reverse pass."""
        return Weights(self.mask.T, _transpose(self.pair), self.key, self.query, self.total)


def broadcast(*shapes: Shape) -> Shape:
    """Return the common shape of ``shapes``."""
    return tuple(np.broadcast_shapes(*shapes))


def causal_pass(
    q: Array | None,
    k: Array,
    v: Array,
    gate: Gate,
    *,
    power: int = 1,
    kind: str = "causal",
    reverse: bool = False,
    state: Array | None = None,
    chunk: int = CHUNK,
    group: int = GROUP,
) -> tuple[Array | None, Array]:
    """First-order causal linear attention over a sequence (derivations 1).

    Parameters
    ----------
    q, k : array, (*batch, T, D)
        Queries and keys; batch axes broadcast. ``q=None`` asks for the state alone.
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
    chunk, group : int
        Tokens in a chunk; chunks in one product.

    Returns
    -------
    o : array, (*batch, T, V), or None
    state : array, (*broadcast of k, v and gate, D, V)
    """
    if kind == "full":
        total = k.mT @ v
        return (None if q is None else q @ total), total
    xp, T = namespace(k), k.shape[-2]
    if power == 0:
        gate = Gate()
    shape = (*broadcast(k.shape[:-2], v.shape[:-2], gate.batch), k.shape[-1], v.shape[-1])
    if state is None:
        state = xp.zeros(shape, dtype=k.dtype, device=device(k))
    state = xp.broadcast_to(state, shape)
    cuts = pieces(T, chunk, group)
    outs = []
    for cut in reversed(cuts) if reverse else cuts:
        o, state = _piece(q, k, v, gate, power, kind == "strict", reverse, state, *cut)
        outs.append(o)
    if q is None:
        return None, state
    if not outs:
        batch = broadcast(q.shape[:-2], shape[:-2])
        return xp.zeros((*batch, 0, v.shape[-1]), dtype=k.dtype, device=device(k)), state
    return xp.concat(outs[::-1] if reverse else outs, axis=-2), state


def token_pass(
    q: Array | None,
    k: Array,
    v: Array,
    gate: Gate,
    *,
    power: int = 1,
    kind: str = "causal",
    state: Array | None = None,
    chunk: int = 1,
    group: int = 1,
) -> tuple[Array | None, Array]:
    """`causal_pass` over a single token: update the state, then read it (strict: read it first)."""
    before, after = state, k.mT @ v
    full = broadcast(after.shape[:-2], gate.batch)
    after = namespace(k).broadcast_to(after, (*full, *after.shape[-2:]))
    if before is not None:
        if power and gate.decay is not None:
            state = before * (gate.decay**power)[..., None, None]
        elif power and gate.log_gate is not None:
            state = before * namespace(k).exp(power * gate.log_gate)[..., None]
        after = state + after
    read = after
    if kind == "strict":
        read = namespace(after).zeros_like(after) if before is None else before
    return None if q is None else q @ read, after


def pieces(T: int, chunk: int, group: int) -> list[tuple[int, int, int, int]]:
    """Cut T tokens into whole groups, whole chunks and a rest: (start, stop, group, chunk)."""
    groups, chunks = T - T % (group * chunk), T - T % chunk
    cuts = [
        (0, groups, group, chunk),
        (groups, chunks, (chunks - groups) // chunk, chunk),
        (chunks, T, 1, T - chunks),
    ]
    return [cut for cut in cuts if cut[1] > cut[0]]


def _piece(
    q: Array | None,
    k: Array,
    v: Array,
    gate: Gate,
    power: int,
    strict: bool,
    reverse: bool,
    state: Array,
    start: int,
    stop: int,
    G: int,
    W: int,
) -> tuple[Array | None, Array]:
    """Run the pass over tokens start..stop, which are whole groups of G chunks of W tokens."""
    xp = namespace(k)
    turns = (stop - start) // (G * W)

    def grouped(x: Array, features: int) -> Array:  # [..., T, *] -> [..., turns, G, W, *]
        rows = x[(..., slice(start, stop)) + (slice(None),) * features]
        lead, last = rows.shape[: rows.ndim - 1 - features], rows.shape[rows.ndim - features :]
        return xp.reshape(rows, (*lead, turns, G, W, *last))

    xs = [grouped(x, 1) for x in (k, v)] if q is None else [grouped(x, 1) for x in (q, k, v)]
    axes = [-4] * len(xs)
    fixed = None
    if gate.log_gate is None:
        fixed = weights(xp, gate, power, strict, W, like=k)
    else:
        xs.append(grouped(gate.log_gate, 0))
        axes.append(-3)

    def body(S: Array, x: tuple[Array, ...]) -> tuple[Array, Array | None]:
        w = fixed
        if w is None:
            *x, a = x  # type: ignore[assignment]
            w = weights(xp, Gate(log_gate=a), power, strict, W, like=k)
        if reverse:
            w = w.reversed()
        return _group(None if q is None else x[0], x[-2], x[-1], w, S, reverse)

    if turns == 1:
        places = zip(xs, axes, strict=True)
        slices = tuple(x[(..., 0) + (slice(None),) * (-axis - 1)] for x, axis in places)
        state, o = body(state, slices)
    else:
        state, o = fold(body, state, tuple(xs), axes=tuple(axes), out_axis=-4, reverse=reverse)
    if o is not None:
        lead = o.shape[: o.ndim - (3 if turns == 1 else 4)]
        o = xp.reshape(o, (*lead, stop - start, o.shape[-1]))
    return o, state


def _group(
    q: Array | None, k: Array, v: Array, w: Weights, S: Array, reverse: bool
) -> tuple[Array, Array | None]:
    """One group of chunks: q, k [..., G, W, D], v [..., G, W, V], S [..., D, V] -> (S, o)."""
    xp = namespace(k)
    kv = (k if w.key is None else k * w.key).mT @ v  # [..., G, D, V]
    totals: tuple[Array | None, ...] = (None,) * kv.shape[-3]
    if w.total is not None:
        each = (*w.total.shape[:-3], kv.shape[-3], 1, 1)
        totals = unstack(xp.broadcast_to(w.total, each), -3)
    turns = list(zip(unstack(kv, -3), totals, strict=True))
    before = []
    for added, total in reversed(turns) if reverse else turns:
        before.append(S)
        S = added + (S if total is None else S * total)
    if reverse:
        before.reverse()
    if q is None:
        return S, None
    pair = q @ k.mT  # [..., G, W, W]
    if w.pair is not None:
        pair = pair * w.pair
    # where, not a product with the mask: a future that overflows must not reach the past as 0 * inf
    pair = xp.where(w.mask, pair, xp.zeros((), dtype=k.dtype, device=device(k)))
    carried = q if w.query is None else q * w.query
    return S, pair @ v + carried @ xp.stack(before, axis=-3)


def weights(xp: Namespace, gate: Gate, power: int, strict: bool, W: int, *, like: Array) -> Weights:
    """Weights of one chunk of W tokens (``gate.log_gate``: (..., G, W), of each chunk).

    Sums of the log gate run over exactly the tokens between a pair: no difference of prefix sums
    that cancels, and -inf is absorbed instead of subtracted.
    """
    t = xp.arange(W, dtype=like.dtype, device=device(like))
    span = t[:, None] - t[None, :] - (1 if strict else 0)  # [W, W] decays between query and key
    mask = span >= 0
    if gate.decay is not None:
        g = gate.decay[..., None, None, None]
        zero = xp.zeros_like(span)
        return Weights(
            mask,
            g ** (power * xp.where(mask, span, zero)),
            g ** (power * (t if strict else t + 1))[:, None],
            g ** (power * (W - 1 - t))[:, None],
            g ** xp.asarray(power * W, dtype=like.dtype, device=device(like)),
        )
    if gate.log_gate is None:
        return Weights(mask)
    a = power * gate.log_gate  # [..., G, W]
    zero = xp.zeros((), dtype=like.dtype, device=device(like))
    after = xp.where(t[:, None] > t[None, :], a[..., :, None], zero)
    between = xp.cumulative_sum(after, axis=-2)  # [..., G, W, W]: sum of a over key+1..query
    upto = xp.cumulative_sum(a, axis=-1)[..., None]  # [..., G, W, 1]
    key, total = xp.exp(between[..., -1, :])[..., None], xp.exp(upto[..., -1:, :])
    if strict:
        between = xp.concat([xp.zeros_like(between[..., :1, :]), between[..., :-1, :]], axis=-2)
        upto = xp.concat([xp.zeros_like(upto[..., :1, :]), upto[..., :-1, :]], axis=-2)
    return Weights(mask, xp.exp(xp.where(mask, between, zero)), xp.exp(upto), key, total)


def _transpose(x: Array | None) -> Array | None:
    return None if x is None else x.mT
