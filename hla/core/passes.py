"""The causal pass, the one primitive, as data, and what its gate does in a chunk (derivations 1).

    pass_g(q, k, v)_t = sum_{j<=t} g^(t-j) (q_t . k_j) v_j

Within a chunk of W tokens with the state S before it, for any weights of the decay,

    o = (L * (q k')) v + (a * q) S          S <- r S + (b * k)' v

where L (W, W) weighs pairs, a (W) carries the state to a query, b (W) carries a key to the chunk's
end and r carries the state over the chunk. The reverse pass is the same with L transposed, a and b
exchanged and the chunks taken last first. W = 1 is the recurrent form and W = T the dense one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

from .namespace import Array, device, library_of, namespace, padded

Given = ParamSpec("Given")
Result = TypeVar("Result")

Shape = tuple[int, ...]
Fields = tuple[str, ...]

CHUNK = 64  # tokens in a chunk, the paper's w: balances W D against D^2 work at D = 64


class Pass(NamedTuple):
    """One step of a program, ``out = pass(q, k, v)``; its state has the fields named.

    S <- S + write * k v', out <- out + read * q S.
    """

    out: str  # "": the state alone
    q: str
    k: str
    v: str
    state: Fields  # (matrix,) or, where v carries the column of ones, (matrix, denominator)
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
    slope: Weights | None = None  # the derivatives by a decay, right at 0 too

    def reversed(self) -> Weights:
        """Weights of the reverse pass."""
        pair = None if self.pair is None else self.pair.mT
        return Weights(self.mask.mT, pair, self.key, self.query, self.total)


def remembered(f: Callable[Given, Result]) -> Callable[Given, Result]:
    """Keep what ``f`` returns by its arguments; of those without a hash (tracers) find it anew."""
    kept = functools.lru_cache(maxsize=1024)(f)

    @functools.wraps(f)
    def found(*args: Given.args, **options: Given.kwargs) -> Result:
        try:
            return kept(*args, **options)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # symbols have none, or are not compared with others
            return f(*args, **options)

    return found


@remembered
def broadcast(*shapes: Shape) -> Shape:
    """Return the common shape of ``shapes``, whose sizes a compiler may have made symbols."""
    common = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for i, n in enumerate(shape, len(common) - len(shape)):
            if common[i] == 1:
                common[i] = n
            elif n not in (1, common[i]):
                raise ValueError(f"shapes {shapes} do not broadcast")
    return tuple(common)


def counts(kind: str, W: int, tokens: Any, like: Array) -> tuple[Array, tuple[Array, ...]]:
    """Count the tokens whose gates a chunk's products cross.

    Parameters
    ----------
    kind : str
        Of the pass.
    W : int
        Width of the chunk.
    tokens : int or array
        Those of it that there are; zeros after them fill it up.
    like : array
        Of the dtype and device of the results.

    Returns
    -------
    mask : array, (W, W)
        The legal pairs (query, key).
    counts : tuple of array
        As whole numbers of ``like``'s dtype: for each pair, for the state to each query, for each
        key to the end, and for the state over the chunk, shaped as in `Weights`.
    """
    xp, late = namespace(like), int(kind == "strict")
    t = xp.arange(W, dtype=like.dtype, device=device(like))
    span, zero = t[:, None] - t[None, :] - late, xp.zeros((1, 1), dtype=t.dtype, device=device(t))
    each = (span, (t + 1 - late)[:, None], (tokens - 1 - t)[:, None], zero + tokens)
    return span >= 0, tuple(xp.where(n > 0, n, zero) for n in each)


def weights(
    gate: Gate, power: int, kind: str, W: int, like: Array, tokens: Any = None, slope: bool = False
) -> Weights:
    """Weights of one chunk of W tokens; ``gate.log_gate`` is that of the chunk, (..., W).

    Sums of the log gate run over exactly the tokens between a pair: no difference of prefix sums
    that cancels, and -inf is absorbed instead of subtracted. ``tokens`` as in `counts`; ``slope``
    asks for the derivatives by a decay.
    """
    xp, strict = namespace(like), kind == "strict"
    mask, each = counts(kind, W, W if tokens is None else tokens, like)
    if power and gate.decay is not None:
        g = gate.decay[..., None, None]
        found = Weights(mask, *(library_of(g).powers(g, power * n) for n in each))
        return found._replace(slope=slopes(g, power, mask, each)) if slope else found
    if not power or gate.log_gate is None:
        return Weights(mask)
    t, zero = xp.arange(W, device=device(like)), xp.zeros_like(each[-1])
    a = power * gate.log_gate
    after = xp.where(t[:, None] > t[None, :], a[..., :, None], zero)
    between = xp.cumulative_sum(after, axis=-2)  # [..., W, W]: sum of a over key+1..query
    upto = xp.cumulative_sum(a, axis=-1)[..., None]  # [..., W, 1]
    key, total = xp.exp(xp.sum(after, axis=-2)), xp.exp(xp.sum(a, axis=-1))
    if strict:
        between, upto = (padded(x, -2, before=1)[..., :W, :] for x in (between, upto))
    pair = xp.exp(xp.where(mask, between, zero))
    return Weights(mask, pair, xp.exp(upto), key[..., None], total[..., None, None])


def slopes(g: Array, power: int, mask: Array, counts: Sequence[Array]) -> Weights:
    """Return the derivatives of g**(power * n) by g for each of the `counts` n."""
    xp, found = namespace(g), []
    for n in counts:
        n = xp.reshape(power * n, (*(1,) * (g.ndim - 2), *n.shape))
        found.append(n * library_of(g).powers(g, xp.where(n > 1, n - 1, xp.zeros_like(n))))
    return Weights(mask, *found)


def weights_adjoint(power: int, kind: str, w: Weights, dw: Weights) -> Array:
    """Gradient of the gate within a chunk from those of its `weights`.

    Only products that cross a token add to its gradient and none is subtracted, so that it keeps
    its digits whatever the gate.

    Parameters
    ----------
    power, kind
        As given to `weights`.
    w : Weights
        What it returned, with slopes where the gate is a decay.
    dw : Weights
        Gradients of the arrays of ``w``, None for 0; there is one of ``query`` or of ``key``. That
        of ``pair`` is 0 where no pair is legal.

    Returns
    -------
    array, (..., 1, 1) for a decay, (..., W, 1) for a log gate
    """
    by = w.slope or w
    parts = [None if d is None else x * d for x, d in zip(by[1:5], dw[1:5], strict=True)]
    xp = namespace(w.mask)
    if w.slope is not None:
        return sum(xp.sum(x, axis=(-2, -1), keepdims=True) for x in parts if x is not None)
    pair, query, key, total = parts
    of = next(x for x in parts if x is not None)
    ones = xp.ones(w.mask.shape, dtype=of.dtype, device=device(of))
    ones = xp.reshape(ones, (*(1,) * (of.ndim - 2), *ones.shape))
    before, after = xp.tril(ones, k=-1), xp.triu(ones, k=int(kind == "strict"))
    found = [] if total is None else [total]
    if pair is not None:
        crossed = library_of(of).triangle(after @ pair, -1, False)
        found.append(xp.sum(crossed, axis=-1, keepdims=True))
    found += [] if query is None else [after @ query]
    found += [] if key is None else [before @ key]
    return power * sum(found)
