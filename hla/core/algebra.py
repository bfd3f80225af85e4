"""Join adjacent stretches of a sequence: the paper's associative operator, for any operator's data.

An operator gives its join as data: the power of r = rho(right) that scales each earlier field, and
the products that cross the border. ``join`` evaluates it and ``join_adjoint`` is its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .namespace import Array, namespace

Fields = Mapping[str, Array]


class Cross(NamedTuple):
    """One product across the border: ``field += r**power * factors``.

    A factor is "A.x" or "B.x", the field x of the earlier or the later stretch.
    """

    field: str
    power: int
    factors: tuple[str, ...]


class Join(NamedTuple):
    """``field = r**powers[field] * left.field + right.field`` plus the crossing products."""

    powers: dict[str, int]
    cross: tuple[Cross, ...] = ()


def fields_of(x: Any) -> dict[str, Array]:
    """Return a state or segment as a dict."""
    return dict(x._asdict())


class Algebra(NamedTuple):
    """All there is to know of one operator under one mask."""

    segment: type[Any]
    state: type[Any]
    lift: Callable[..., Any]  # (q, k, v, rho) of one token -> segment
    read: Callable[..., tuple[Array, Array]]  # (state, q) -> numerator, denominator
    segments: Join
    states: Join  # a state continued by the fields `view` gives of a segment
    view: Callable[[Any], dict[str, Array]] = fields_of
    moments: Callable[[dict[str, Array]], dict[str, Array]] = dict  # final states -> segment fields

    def identity(self, like: Any) -> Any:
        """Segment of no tokens, shaped like ``like``: zeros and rho = 1."""
        xp = namespace(like.rho)
        zeros = [xp.zeros_like(x) for x in like[:-1]]
        return self.segment(*zeros, xp.ones_like(like.rho))

    def combine(self, left: Any, right: Any) -> Any:
        """Join two adjacent segments, earlier first."""
        joined = join(self.segments, fields_of(left), fields_of(right), right.rho)
        return self.segment(**joined, rho=left.rho * right.rho)

    def extend(self, state: Any, right: Any) -> Any:
        """Continue a state by a segment; the state keeps its type."""
        return type(state)(**join(self.states, fields_of(state), self.view(right), right.rho))

    def combine_adjoint(self, left: Any, right: Any, grad: Any) -> tuple[Any, Any]:
        """Return the gradients of (left, right) from that of ``combine(left, right)``."""
        dleft, dright, dr = join_adjoint(
            self.segments, fields_of(left), fields_of(right), right.rho, fields_of(grad)
        )
        return (
            self.segment(**dleft, rho=grad.rho * right.rho),
            self.segment(**dright, rho=grad.rho * left.rho + dr),
        )


def outer(a: Array, b: Array) -> Array:
    """Outer product over the last axis, (..., D) x (..., V) -> (..., D, V)."""
    return a[..., :, None] * b[..., None, :]


def dot(matrix: Array, vector: Array) -> Array:
    """Matrix times vector with batch axes, (..., V, D) x (..., D) -> (..., V)."""
    return (matrix @ vector[..., None])[..., 0]


def inner(a: Array, b: Array) -> Array:
    """Inner product over the last axis."""
    return namespace(a).sum(a * b, axis=-1)


def _scaled(r: Array, power: int, x: Array, vector: bool) -> Array:
    """``r**power * x`` with r's batch shape."""
    if power == 0:
        return x
    return (r**power)[(..., None) if vector else (..., None, None)] * x


def _product(factors: list[Array], vector: bool) -> Array:
    """Matrix product, from the right; the last factor is a vector where ``vector``."""
    *matrices, out = factors
    out = out[..., None] if vector else out
    for matrix in reversed(matrices):
        out = matrix @ out
    return out[..., 0] if vector else out


def _is_vector(field: str) -> bool:
    """Masses are the lower-case fields (m, h, n, x, eta); matrices the upper-case ones."""
    return field[0].islower()


def _factor(name: str, left: Fields, right: Fields) -> Array:
    side, field = name.split(".")
    return (left if side == "A" else right)[field]


def join(rule: Join, left: Fields, right: Fields, r: Array) -> dict[str, Array]:
    """Join two stretches field by field; only the fields that ``left`` has."""
    out = {}
    for field, power in rule.powers.items():
        if field in left:
            out[field] = _scaled(r, power, left[field], _is_vector(field)) + right[field]
    for field, power, names in rule.cross:
        if field in out:
            vector = _is_vector(field)
            product = _product([_factor(name, left, right) for name in names], vector)
            out[field] = out[field] + _scaled(r, power, product, vector)
    return out


def join_adjoint(
    rule: Join, left: Fields, right: Fields, r: Array, grad: Fields
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Transpose of `join` at (left, right, r): gradients of the fields of both sides and of r.

    The fields and r share one batch shape: no sum over a broadcast is taken.
    """
    xp = namespace(r)
    dleft: dict[str, Array] = {}
    dright: dict[str, Array] = {}
    dr = xp.zeros_like(r)

    def through_r(d: Array, power: int, factor: Array, vector: bool) -> Array:
        if power == 0:
            return xp.zeros_like(r)
        product = inner(d, factor)
        return power * r ** (power - 1) * (product if vector else xp.sum(product, axis=-1))

    for field, power in rule.powers.items():
        d, vector = grad[field], _is_vector(field)
        dleft[field], dright[field] = _scaled(r, power, d, vector), d
        dr = dr + through_r(d, power, left[field], vector)
    for field, power, names in rule.cross:
        d, vector = grad[field], _is_vector(field)
        factors = [_factor(name, left, right) for name in names]
        dr = dr + through_r(d, power, _product(factors, vector), vector)
        back = _scaled(r, power, d, vector)
        for i, name in enumerate(names):  # back = (product of the factors before)' d
            rest = factors[i + 1 :]
            if not rest:
                g = back
            elif vector:
                g = outer(back, _product(rest, vector))
            else:
                g = back @ _product(rest, vector).mT
            side, key = name.split(".")
            target = dleft if side == "A" else dright
            target[key] = target[key] + g
            back = (
                dot(factors[i].mT, back)
                if vector and rest
                else factors[i].mT @ back
                if rest
                else back
            )
    return dleft, dright, dr
