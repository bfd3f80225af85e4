"""Exclusive scans over any associative combine: serial, Blelloch's, and the reverse of 4.2.

A sequence of elements is one pytree (a NamedTuple) whose arrays hold the elements on axis 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .namespace import namespace

Combine = Callable[[Any, Any], Any]


def _map(f: Callable[..., Any], *trees: Any) -> Any:
    return type(trees[0])(*(f(*leaves) for leaves in zip(*trees, strict=True)))


def _length(xs: Any) -> int:
    return int(xs[0].shape[0])


def element(xs: Any, i: int | slice) -> Any:
    """Return element ``i`` (or a slice) of a sequence."""
    return _map(lambda x: x[i, ...], xs)


def single(x: Any) -> Any:
    """Make a sequence of one element."""
    return _map(lambda leaf: leaf[None, ...], x)


def stacked(elements: list[Any]) -> Any:
    """Make one sequence of single elements."""
    return _map(lambda *leaves: namespace(leaves[0]).stack(leaves, axis=0), *elements)


def serial(combine: Combine, xs: Any, identity: Any) -> Any:
    """Exclusive scan, left to right: out[t] = identity + xs[0] + ... + xs[t-1].

    Parameters
    ----------
    combine : callable
        Associative, earlier element first.
    xs : pytree of arrays, (N, ...)
        At least one element.
    identity : pytree of arrays
        What the scan starts from.
    """
    out = [identity]
    for i in range(_length(xs) - 1):
        out.append(combine(out[-1], element(xs, i)))
    return stacked(out)


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
    n = _length(xs)
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


def reverse(
    combine_adjoint: Callable[[Any, Any, Any], tuple[Any, Any]],
    before: Any,
    xs: Any,
    grads: Any,
) -> tuple[Any, Any]:
    """Gradient of a scan: the reverse scan of the paper's section 4.2.

    Parameters
    ----------
    combine_adjoint : callable
        (left, right, gradient of their join) to the gradients of left and right.
    before : pytree of arrays, (N, ...)
        The exclusive prefixes that the forward scan returned.
    xs : pytree of arrays, (N, ...)
        Its elements.
    grads : pytree of arrays, (N, ...)
        Gradients of the inclusive prefixes ``combine(before[t], xs[t])``.

    Returns
    -------
    dxs : pytree of arrays, (N, ...)
    didentity : pytree of arrays
        Gradient of what the scan started from.
    """
    carry, out = None, []
    for t in reversed(range(_length(xs))):
        g = element(grads, t)
        if carry is not None:
            g = _map(lambda a, b: a + b, g, carry)
        carry, dx = combine_adjoint(element(before, t), element(xs, t), g)
        out.append(dx)
    return stacked(out[::-1]), carry
