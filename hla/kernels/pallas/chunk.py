"""The causal pass over one chunk, in any arithmetic that multiplies tiles.

    o_t = read * (a_t q_t S + sum_j write * L[j, t] (q_t . k_j) v_j)     S <- r S + write * (b k)' v

The state is held transposed, S' (V, D), so that every product on it has the state's V rows: then
Hopper's wgmma takes it from registers. All operands are q, k, v as they are stored:

    A' = L' * (K Q')  [W, W]    O' = a * (S' Q') + V' A'  [V, W]    S' = r S' + (b * V') K  [V, D]

The same text runs as plain jnp, as a TPU kernel and as a Mosaic GPU kernel: each has its `Tiles`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jax import numpy as jnp

Array = Any
W = 64  # tokens in a chunk
# Rows of the gate's weights of a chunk. The first four are the exponents of L' by (row, axis of
# A'), two sums of two.
SPAN = (0, 1), (1, 0), (2, 1), (3, 0)
INTO, OUT, TOTAL, ROWS = 4, 5, 6, 8


class Work(NamedTuple):
    """What a launch does, the same in all its chunks."""

    D: int
    V: int
    reads: bool  # outputs are asked, not the state alone
    strict: bool | None  # None: a kernel is told when it runs
    reverse: bool
    gated: bool
    read: float | None  # of o; None: a kernel is given the number when it runs
    write: float | None  # of pairs, and of what is kept of values that have no gate's weights
    dots: bool
    period: int  # chunks between the states that are kept; 0: none are
    start: bool
    end: bool
    dtype: str  # of what is multiplied
    out: str  # of o

    @property
    def sums(self) -> int:
        """Sums a token that the gate's gradient is made of."""
        return (2 if self.reverse else 1) if self.dots else 0


class Tiles(Protocol):
    """Arithmetic of tiles. An operand is what products take; arrays are float32.

    Factors, and the tokens by which a pair must be apart, are numbers of Python or scalars.
    """

    read: Any
    write: Any
    apart: Any

    def product(self, a: Any, b: Any) -> Array:
        """Return a b'."""

    def outer(self, a: Any, b: Any, to: Array, left: Any = 1.0) -> Array:
        """Return ``to`` + (left * a') b."""

    def state(self, S: Array) -> Any:
        """Return a state as an operand."""

    def stored(self, x: Array) -> Any:
        """Return a tile of pairs as an operand."""

    def values(self, x: Any) -> Array:
        """Return the transpose of an operand's values."""

    def weights(self, row: int, axis: int, shape: tuple[int, int]) -> Array:
        """Return a row of the gate's weights along one axis of a tile, the same along the other."""

    def total(self) -> Array:
        """Return what the gate leaves of the state over the chunk."""

    def exp(self, x: Array) -> Array:
        """Return powers of e, which become inf or 0."""

    def places(self) -> tuple[Array, Array]:
        """Return the places of tokens along the rows and the columns of a W x W tile."""

    def columns(self, a: Array, b: Array, to: Any) -> Any:
        """Return the sums of the columns of a * b, added to others or None."""

    def of_pairs(self, a: Array, b: Array) -> tuple[Any, Any]:
        """Return sums of the rows and of the columns of a * b but its diagonal."""


class Chunk(NamedTuple):
    """What a chunk leaves, turned: o' (V, W), and sums of its tokens."""

    o: Array | None
    sums: tuple[Array, ...]
    S: Array


def known(factor: Any) -> bool:
    """Whether a factor is a 1 that is known."""
    return isinstance(factor, float) and factor == 1


def times(x: Array, factor: Any) -> Array:
    """Return a product, of a 1 that is known no work."""
    return x if known(factor) else x * factor


def chunk(m: Tiles, p: Work, q: Any, k: Any, v: Any, x: Any, S: Array) -> Chunk:
    """Do one chunk: operands q, k, v (and x where dots are asked) as they are stored, S (V, D)."""
    o: Array | None = None
    sums: tuple[Array, ...] = ()
    if p.reads:
        A = m.product(k, q)
        if p.gated:
            each = (m.weights(i, axis, (W, W)) for i, axis in SPAN)
            span, rest = (next(each) + next(each) for _ in "ab")
            A = A * m.exp(span + rest)
        A = times(A, m.write)
        key, query = m.places()
        legal = query <= key - m.apart if p.reverse else key + m.apart <= query
        A = jnp.where(legal, A, 0.0)  # a product with the mask would let inf through
        by_key, by_query = m.of_pairs(A, m.product(v, x)) if p.sums > 1 else (None, None)
        pairs = m.stored(A)
        into = m.product(m.state(S), q)
        if p.gated:
            into = into * m.weights(INTO, 1, (p.V, W))
        if p.dots:
            sums = m.columns(into, m.values(x), by_query), by_key
        o = m.outer(v, pairs, into)
        o = times(o, m.read)
    left = m.weights(OUT, 1, (p.V, W)) if p.gated else m.write
    S = S * m.total() if p.gated else S
    return Chunk(o, sums[: p.sums], m.outer(v, k, S, left))
