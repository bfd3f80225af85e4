"""Join adjacent stretches of a sequence: the paper's associative operator, of any program.

What a later stretch makes after an earlier one differs from what it makes alone only by what the
earlier states add to its intermediates, y = y_B + g^t S_A q. So the join follows from the program
(`joins`): each state is r**power times the earlier one, plus the later one, plus products of
earlier matrices with sums over the later stretch. The segment of one token, and how a state is
read, follow too. Denominators (m, eta, ...) are not named: each is one more column of its matrix,
joined and read as the matrix is. `join` evaluates the data and `join_adjoint` is its transpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from operator import add
from typing import Any, NamedTuple

from ..states import SEGMENTS, STATES, HLA2Segment
from .namespace import Array, namespace
from .passes import Pass
from .programs import CAUSAL, DENOMINATOR, KEYS, PROGRAMS, C, G, Passes, fields_of, segment_program

Fields = Mapping[str, Array]
Parts = dict[str, list[Array]]  # each matrix and, where there is one, its denominator as a column


class Term(NamedTuple):
    """One product of a join: ``field += r**power * factors``.

    A factor is "A.x" or "B.x", the field x of the earlier or the later stretch.
    """

    field: str
    power: int
    factors: tuple[str, ...]


Join = tuple[Term, ...]


def joins(steps: Passes) -> Join:
    """Return the join of the states that passes leave.

    After an earlier stretch an intermediate is its own plus M' q, by then decayed, of the earlier
    state M of the pass that makes it. A sum of k v' is then its own plus, for each such part in it,
    the earlier matrices around a sum of what is left, which decays by what the parts leave of the
    pass's power: ahla's R not at all.
    """
    held = {(s.k, s.v): s.state[0] for s in steps}
    earlier: dict[str, list[tuple[tuple[str, ...], str, int]]] = {}  # of a name: M, q, power
    alone, crossing = list[Term](), list[Term]()
    for s in steps:
        M = s.state[0]
        alone += Term(M, s.power, (f"A.{M}",)), Term(M, 0, (f"B.{M}",))
        ways = ([*earlier.get(n, ()), ((), n, 0)] for n in (s.k, s.v))
        for (left, k, i), (right, v, j) in product(*ways):
            if left or right:
                crossing.append(Term(M, i + j, (*left, f"B.{held[k, v]}", *right)))
        earlier[s.out] = [((f"A.{M}",), s.q, s.power)]
    return (*alone, *crossing)


class Algebra(NamedTuple):
    """All there is to know of one operator under one mask."""

    segment: type[Any]
    state: type[Any]
    steps: Passes  # whose last states make up both
    segments: Join
    states: Join  # a state continued by a segment and by the state that this leads to

    def lift(self, q: Array, k: Array, v: Array, rho: Array) -> Any:
        """Segment of one token, whose passes give (q.k) v."""
        xp, fields = namespace(q), dict[str, Array]()
        s, made = xp.sum(q * k, axis=-1)[..., None], {"q": (q, 0), "k": (k, 0), "v": (v, 0)}
        for step in self.steps:  # made: (array, power of s)
            (k, i), (v, j) = made[step.k], made[step.v]
            x = s ** (i + j) * k if i + j else k
            fields |= zip(step.state, (x[..., :, None] * v[..., None, :], x), strict=False)
            made[step.out] = (v, i + j + 1)
        if self.segment is HLA2Segment:  # no pairs of tokens yet
            fields |= {"G": xp.zeros_like(fields["F"]), "h": xp.zeros_like(fields["eta"])}
        return self.segment(*(fields[x] for x in self.segment._fields[:-1]), rho)

    def moments(self, last: dict[str, Array]) -> dict[str, Array]:
        """Return a segment's fields but rho from last states: hla2's G = S C - F, h = S m - eta."""
        if self.segment is HLA2Segment:
            S, C, m = (last[x] for x in ("S", "C", "m"))
            h = (S @ m[..., None])[..., 0] - last["eta"]
            return {"S": S, "C": C, "m": m, "G": S @ C - last["F"], "h": h}
        return last

    def identity(self, like: Any) -> Any:
        """Segment of no tokens, shaped like ``like``: zeros and rho = 1."""
        xp = namespace(like.rho)
        zeros = [xp.zeros_like(x) for x in like[:-1]]
        return self.segment(*zeros, xp.ones_like(like.rho))

    def combine(self, left: Any, right: Any) -> Any:
        """Join two adjacent segments, earlier first."""
        joined = join(self.segments, left._asdict(), right._asdict(), right.rho)
        return self.segment(**joined, rho=left.rho * right.rho)

    def extend(self, state: Any, right: Any) -> Any:
        """Continue a state by a segment; the state keeps its type."""
        fields = right._asdict() | right.to_state()._asdict()
        return type(state)(**join(self.states, state._asdict(), fields, right.rho))

    def read(self, state: Any, q: Array, steps: Passes = ()) -> tuple[Array, Array]:
        """Return numerator and denominator; by ``steps`` where another program reads the state."""
        parts = _parts(state._asdict())

        def value(name: str) -> list[Array]:
            if name == "q":
                return [q[..., None, :]]
            rows = [
                [s.read * (value(s.q)[0] @ x) for x in parts[s.state[0]]]
                for s in steps or self.steps
                if s.out == name
            ]
            return [sum(x) for x in zip(*rows, strict=True)]

        num, den = value("o")
        return num[..., 0, :], den[..., 0, 0]

    def combine_adjoint(self, left: Any, right: Any, grad: Any) -> tuple[Any, Any]:
        """Return the gradients of (left, right) from that of ``combine(left, right)``."""
        dleft, dright, dr = join_adjoint(
            self.segments, left._asdict(), right._asdict(), right.rho, grad._asdict()
        )
        return (
            self.segment(**dleft, rho=grad.rho * right.rho),
            self.segment(**dright, rho=grad.rho * left.rho + dr),
        )


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


def join(terms: Join, left: Fields, right: Fields, r: Array) -> dict[str, Array]:
    """Join two stretches field by field; only the fields that ``left`` has."""
    a, b, out = _parts(left), _parts(right), Parts()
    for field, power, names in terms:
        parts = range(len(a.get(field, ())))
        found = [_scaled(r, power, _product(_factors(names, a, b, i))) for i in parts]
        out[field] = list(map(add, out[field], found)) if field in out else found
    return _fields({field: out[field] for field in a})


def join_adjoint(
    terms: Join, left: Fields, right: Fields, r: Array, grad: Fields
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Transpose of `join` at (left, right, r): gradients of the fields of both sides and of r.

    The fields and r share one batch shape: no sum over a broadcast is taken.
    """
    a, b, given = _parts(left), _parts(right), _parts(grad)
    found: dict[tuple[str, int], Array] = {}
    dr = namespace(r).zeros_like(r)
    for field, power, names in terms:
        for i, d in enumerate(given[field]):
            factors = _factors(names, a, b, i)
            if power:
                slope = namespace(r).sum(d * _product(factors), axis=(-2, -1))
                dr = dr + power * r ** (power - 1) * slope
            back = _scaled(r, power, d)  # (the factors before)' d
            for j, name in enumerate(names):
                rest = factors[j + 1 :]
                x, key = back @ _product(rest).mT if rest else back, (name, 0 if rest else i)
                found[key] = found[key] + x if key in found else x
                back = factors[j].mT @ back
    da, db = (
        _fields({f: [found[f"{side}.{f}", i] for i in range(len(x))] for f, x in a.items()})
        for side in "AB"
    )
    return da, db, dr


# The paper's G = sum k (k' C)', C of the tokens before, decayed by g^2 (derivations 3.1: by the
# paper's g the operator is not associative).
LETTERS = (KEYS, Pass("c", "k", "q", "v", C), Pass("", "", "k", "c", G, 2))


def algebra(operator: str, mask: str) -> Algebra:
    """Return the algebra of an operator under a mask."""
    state, steps = PROGRAMS[mask][operator], segment_program(operator, mask)
    own = LETTERS if (operator, mask) == ("hla2", "causal") else steps
    types = SEGMENTS[fields_of(own)], STATES[fields_of(state)]
    return Algebra(*types, steps, joins(own), joins(steps))


ALGEBRA = {(x, mask): algebra(x, mask) for x in CAUSAL for mask in ("causal", "prefix")}
