"""Join adjacent stretches of a sequence: the paper's associative operator, for any operator's data.

An operator gives its join as data: the power of r = rho(right) that scales each earlier matrix, and
the products that cross the border; and what is read as products after q'. Denominators (m, eta,
...) are not named: each is one more column of its matrix, joined and read as the matrix is.
``join`` evaluates the data and ``join_adjoint`` is its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .namespace import Array, namespace

Fields = Mapping[str, Array]
Parts = dict[str, list[Array]]  # each matrix and, where there is one, its denominator as a column
DENOMINATOR = {"P": "m", "C": "m", "E": "n", "F": "eta", "G": "h", "X": "x"}


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
    reads: tuple[tuple[int, tuple[str, ...]], ...]  # signed products of a state's matrices after q'
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

    def read(self, state: Any, q: Array, ridge: float | None = None) -> tuple[Array, Array]:
        """Return numerator and denominator; a ridge adds ridge (q'C, q'm)."""
        parts = _parts(fields_of(state))
        num: Array = 0.0
        den: Array = 0.0
        for sign, names in (*self.reads, *(() if ridge is None else ((ridge, ("C",)),))):
            row, last = q[..., None, :], parts[names[-1]]
            for name in names[:-1]:
                row = row @ parts[name][0]
            num, den = num + sign * (row @ last[0]), den + sign * (row @ last[1])
        return num[..., 0, :], den[..., 0, 0]

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


def _parts(fields: Fields) -> Parts:
    found = {}
    for name, x in fields.items():
        if name in DENOMINATOR:
            found[name] = [x, fields[DENOMINATOR[name]][..., None]]
        elif name[0].isupper():
            found[name] = [x]
    return found


def _fields(parts: Parts) -> dict[str, Array]:
    dens = {DENOMINATOR[name]: x[1][..., 0] for name, x in parts.items() if name in DENOMINATOR}
    return {name: x[0] for name, x in parts.items()} | dens


def _scaled(r: Array, power: int, x: Array) -> Array:
    """``r**power * x`` with r's batch shape."""
    if not power:
        return x
    missing = (None,) * (x.ndim - 2 - r.ndim)  # axes that the broadcast would add
    return (r**power)[(*missing, ..., None, None)] * x


def _product(factors: Sequence[Array]) -> Array:
    """Matrix product, from the right: the last factor may be a column."""
    *matrices, out = factors
    for matrix in reversed(matrices):
        out = matrix @ out
    return out


def _factors(names: tuple[str, ...], left: Parts, right: Parts, part: int) -> list[Array]:
    """Matrices by their names, of the last one the given part."""
    found = [(left if name[0] == "A" else right)[name[2:]] for name in names]
    return [*(x[0] for x in found[:-1]), found[-1][part]]


def join(rule: Join, left: Fields, right: Fields, r: Array) -> dict[str, Array]:
    """Join two stretches field by field; only the fields that ``left`` has."""
    a, b, out = _parts(left), _parts(right), {}
    for field, power in rule.powers.items():
        if field in a:
            pairs = zip(a[field], b[field], strict=True)
            out[field] = [_scaled(r, power, x) + y for x, y in pairs]
    for field, power, names in rule.cross:
        for i, x in enumerate(out.get(field, ())):
            out[field][i] = x + _scaled(r, power, _product(_factors(names, a, b, i)))
    return _fields(out)


def join_adjoint(
    rule: Join, left: Fields, right: Fields, r: Array, grad: Fields
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Transpose of `join` at (left, right, r): gradients of the fields of both sides and of r.

    The fields and r share one batch shape: no sum over a broadcast is taken.
    """
    a, b, given = _parts(left), _parts(right), _parts(grad)
    da: Parts = {}
    db = {field: list(d) for field, d in given.items()}
    dr = namespace(r).zeros_like(r)

    def through_r(power: int, d: Array, x: Array) -> Array:
        return power * r ** max(power - 1, 0) * namespace(r).sum(d * x, axis=(-2, -1))

    for field, power in rule.powers.items():
        da[field] = [_scaled(r, power, d) for d in given[field]]
        for d, x in zip(given[field], a[field], strict=True):
            dr = dr + through_r(power, d, x)
    for field, power, names in rule.cross:
        for i, d in enumerate(given[field]):
            factors = _factors(names, a, b, i)
            dr = dr + through_r(power, d, _product(factors))
            back = _scaled(r, power, d)  # (the factors before)' d
            for j, name in enumerate(names):
                rest = factors[j + 1 :]
                part, target = (0 if rest else i), (da if name[0] == "A" else db)[name[2:]]
                target[part] = target[part] + (back @ _product(rest).mT if rest else back)
                back = factors[j].mT @ back
    return _fields(da), _fields(db), dr
