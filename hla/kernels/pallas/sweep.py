"""The causal pass over whole sequences: what a launch reads and leaves, and the pass as plain jnp.

It is `chunk` in a lax.scan over the chunks of all heads at once.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from ...core.passes import Shape
from .chunk import TOTAL, Chunk, W, Work, chunk, known

Array = Any


class Operands(NamedTuple):
    """Arrays of a launch, each (*own batch, ...); what there is not is None. T is C chunks."""

    q: Array | None  # (T, D)
    k: Array  # (T, D)
    v: Array  # (T, V)
    x: Array | None  # (T, V)
    gate: Array | None  # (C, ROWS, W); or (2, ROWS, W), of a decay: every chunk's and the last's
    start: Array | None  # (V, D)


class Found(NamedTuple):
    """What a launch leaves, each (*batch, ...)."""

    o: Array | None  # (T, V)
    sums: Array | None  # (tiles, sums, T)
    kept: Array | None  # (periods, V, D): before each, of a reverse pass behind its first token
    end: Array | None  # (V, D)


OWN = Operands(2, 2, 2, 2, 3, 2)  # axes that are an operand's own


class Plain:
    """Tiles as jnp has them, of one chunk."""

    def __init__(self, p: Work, gate: Array | None) -> None:
        self.read, self.write, self.apart = p.read, p.write, int(bool(p.strict))
        self.dtype = jnp.bfloat16 if p.dtype == "bfloat16" else jnp.float32
        self.precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        self.gate = gate

    def operand(self, x: Array) -> Array:
        """Cast to what is multiplied."""
        return x.astype(self.dtype)

    def _dot(self, a: Array, b: Array, axis: int, other: int) -> Array:
        dims = (((axis,), (other,)), ((), ()))
        return lax.dot_general(
            a, b, dims, precision=self.precision, preferred_element_type=jnp.float32
        )

    def product(self, a: Array, b: Array) -> Array:
        """Return a b'."""
        return self._dot(a, b, 1, 1)

    def outer(self, a: Array, b: Array, to: Array, left: Any = 1.0) -> Array:
        """Return ``to`` + (left * a') b."""
        a = a.T if known(left) else self.operand(self.values(a) * left)
        return to + self._dot(a, b, 1, 0)

    def state(self, S: Array) -> Array:
        """Return a state as an operand."""
        return self.operand(S)

    def stored(self, x: Array) -> Array:
        """Return a tile of pairs as an operand."""
        return self.operand(x)

    def values(self, x: Array) -> Array:
        """Return the transpose of an operand's values."""
        return x.astype(jnp.float32).T

    def weights(self, row: int, axis: int, shape: tuple[int, int]) -> Array:
        """Return a row of the gate's weights along one axis of a tile."""
        assert self.gate is not None
        x = self.gate[row : row + 1, :]
        return jnp.broadcast_to(x, shape) if axis else jnp.broadcast_to(x, shape[::-1]).T

    def total(self) -> Array:
        """Return what the gate leaves of the state over the chunk."""
        assert self.gate is not None
        return self.gate[TOTAL, 0]

    def exp(self, x: Array) -> Array:
        """Return powers of e."""
        return jnp.exp(x)

    def places(self) -> tuple[Array, Array]:
        """Return the places of tokens along the rows and the columns of a W x W tile."""
        rows, columns = (lax.broadcasted_iota(jnp.int32, (W, W), i) for i in (0, 1))
        return rows, columns

    def columns(self, a: Array, b: Array, to: Array | None) -> Array:
        """Return the sums of the columns of a * b, added to others."""
        found = jnp.sum(a * b, axis=0)
        return found if to is None else to + found

    def of_pairs(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return sums of the rows and of the columns of a * b but its diagonal."""
        row, column = self.places()
        x = jnp.where(row != column, a * b, 0.0)
        return jnp.sum(x, axis=1), jnp.sum(x, axis=0)


def weights_of(count: int, C: int, c: Any) -> Any:
    """Return which of so many weights a chunk has."""
    if count == C:
        return c
    return int(c == C - 1) if isinstance(c, int) else (c == C - 1).astype(jnp.int32)


def nothing(given: Sequence[Array | None]) -> Array:
    """Return a zero that varies over a mesh as all operands together (`jax.shard_map`)."""
    zeros = (jnp.zeros_like(x, jnp.float32, shape=()) for x in given if x is not None)
    return functools.reduce(operator.add, zeros)


def varying(shape: Shape, dtype: Any, given: Sequence[Array | None]) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result, which varies over a mesh as all its operands do."""
    axes = getattr(jax.typeof(nothing(given)), "manual_axis_type", None)
    more = {} if axes is None else {"manual_axis_type": axes}
    return jax.ShapeDtypeStruct(shape, dtype, **more)


def plain(p: Work, batch: Shape, given: Operands) -> Found:
    """Do a launch as plain jnp."""
    n = math.prod(batch)

    def flat(x: Array | None, own: int) -> Array | None:
        if x is None:
            return None
        shape = x.shape[x.ndim - own :]
        return jnp.reshape(jnp.broadcast_to(x, (*batch, *shape)), (n, *shape))

    q, k, v, x, gate, start = map(flat, given, OWN)
    C = k.shape[1] // W  # type: ignore[union-attr]

    def chunks(x: Array | None) -> Array | None:
        return None if x is None else jnp.moveaxis(jnp.reshape(x, (n, C, W, x.shape[-1])), 1, 0)

    if gate is not None:
        gate = jnp.moveaxis(gate, 1, 0)
        gate = gate[jnp.asarray([weights_of(gate.shape[0], C, c) for c in range(C)])]
    turns = *map(chunks, (q, k, v, x)), gate

    def one(S: Array, q: Array, k: Array, v: Array, x: Array, gate: Array) -> Chunk:
        m = Plain(p, gate)
        q, k, v, x = (None if y is None else m.operand(y) for y in (q, k, v, x))
        return chunk(m, p, q, k, v, x, S)

    def turn(S: Array, given: Any) -> Any:
        found = jax.vmap(one)(S, *given)
        return found.S, (found.o, found.sums, found.S if p.reverse else S)

    if start is None:
        start = jnp.zeros((n, p.V, p.D), jnp.float32)
    start = start + nothing(given)
    end, (o, sums, states) = lax.scan(turn, start, turns, reverse=p.reverse)
    found = Found(None, None, None, jnp.reshape(end, (*batch, p.V, p.D)) if p.end else None)
    if p.reads:
        o = jnp.transpose(o, (1, 0, 3, 2)).astype(p.out)
        found = found._replace(o=jnp.reshape(o, (*batch, C * W, p.V)))
    if p.sums:
        each = jnp.moveaxis(jnp.stack(sums), 1, 2)  # (sums, n, C, W)
        each = jnp.moveaxis(jnp.reshape(each, (p.sums, n, C * W)), 0, 1)
        found = found._replace(sums=jnp.reshape(each, (*batch, 1, p.sums, C * W)))
    if p.period:
        kept = jnp.moveaxis(states[:: p.period], 0, 1)
        found = found._replace(kept=jnp.reshape(kept, (*batch, *kept.shape[1:])))
    return found


class Entry(NamedTuple):
    """Which of an operand's own entries an entry of a batch has, both flat."""

    terms: tuple[tuple[int, int, int], ...]  # entries behind an axis, its size, of the operand

    def __call__(self, i: Any) -> Any:
        """Return the operand's entry."""
        found = jnp.int32(0)
        for behind, n, stride in self.terms:
            found += lax.rem(lax.div(i, jnp.int32(behind)), jnp.int32(n)) * jnp.int32(stride)
        return found


def entry(batch: Shape, own: Shape) -> Entry:
    """Return the entries of an operand that has fewer axes, or 1 along some."""
    own = (1,) * (len(batch) - len(own)) + own
    terms: list[tuple[int, int, int]] = []
    behind, step = 1, 1
    for n, mine in zip(reversed(batch), reversed(own), strict=True):
        stride = step if mine != 1 else 0
        if n == 1:
            pass
        elif terms and terms[-1][2] * terms[-1][1] == stride:
            first, size, least = terms[-1]
            terms[-1] = first, size * n, least
        else:
            terms.append((behind, n, stride))
        behind, step = behind * n, step * mine
    return Entry(tuple(x for x in terms if x[-1]))
