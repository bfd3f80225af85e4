"""Blelloch's exclusive scan over any associative combine.

A sequence of elements is one pytree (a NamedTuple) whose arrays hold the elements on axis 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .namespace import namespace

Combine = Callable[[Any, Any], Any]


def _map(f: Callable[..., Any], *trees: Any) -> Any:
    return type(trees[0])(*(f(*leaves) for leaves in zip(*trees, strict=True)))


def element(xs: Any, i: int | slice) -> Any:
    """Return element ``i`` (or a slice) of a sequence."""
    return _map(lambda x: x[i, ...], xs)


def single(x: Any) -> Any:
    """Make a sequence of one element."""
    return _map(lambda leaf: leaf[None, ...], x)


def blelloch(combine: Combine, xs: Any, identity: Any) -> Any:
    """Exclusive scan as a balanced tree (Blelloch 1990): O(N) work, O(log N) depth and graph.

    Parameters
    ----------
    combine : callable
        Associative, earlier element first, and elementwise over axis 0.
    xs : pytree of arrays, (N, ...)
        At least one element.
    identity : pytree of arrays
        Neutral element of combine, shaped as one element.
    """
    n = xs[0].shape[0]
    if n == 1:
        return single(identity)
    if n % 2:
        xs = _map(_append, xs, identity)
    even, odd = element(xs, slice(0, None, 2)), element(xs, slice(1, None, 2))
    before = blelloch(combine, combine(even, odd), identity)
    return element(_map(_interleave, before, combine(before, even)), slice(0, n))


def _append(x: Any, last: Any) -> Any:
    return namespace(x).concat([x, last[None, ...]], axis=0)


def _interleave(a: Any, b: Any) -> Any:
    xp = namespace(a)
    return xp.reshape(xp.stack([a, b], axis=1), (2 * a.shape[0], *a.shape[1:]))
