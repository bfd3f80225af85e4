"""Backends that read the memory of one library's arrays, called with those of any.

Arrays change hands by DLPack, without a copy, on the caller's current stream. A library that has
streams of its own (JAX) has each side wait for what it is handed; its inputs are kept until they
are read, since it may give the memory of a deleted array to a computation that does not wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..backends import load
from ..contract import Backend, Capabilities
from ..core.namespace import Array
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from . import library_of, named
from .generic import Generic

Convert = Callable[[Any], Any]
_in_use: list[tuple[Callable[[], bool], list[Array]]] = []  # what must stay until this is true


@functools.cache
def loaded(name: str) -> Backend:
    """Load a backend, as one that takes arrays of any library that lends it their memory."""
    backend = load(name)
    can = backend.capabilities
    if not can.native:
        return backend

    def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
        source = library_of(inputs.q)
        if not can.hands_over(source.name):
            return source.on_memory(functools.partial(backend.forward, request), inputs)  # type: ignore[no-any-return]
        own: list[Any] = []
        wrapped = library_of(inputs.q).wraps(can)

        def run(inputs: Inputs) -> tuple[Array, Any, Any]:
            o, state, saved = backend.forward(request, inputs)
            if wrapped:
                return o, state, saved  # kept as arrays of the library
            own.append(saved)
            return o, state, None

        o, state, saved = _on_native(can, run, inputs)
        return o, state, own[0] if own else saved

    def backward(request: Request, inputs: Inputs, *given: Any) -> Gradients:
        pull = functools.partial(backend.backward, request)
        found: Gradients = _on_native(can, pull, inputs, *given)
        return found

    def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
        found: tuple[Array, Any]
        found = _on_native(can, lambda inputs: backend.step(request, inputs, donate), inputs)
        return found

    return backend._replace(
        forward=forward,
        backward=backward,
        step=step,
        again_step=_of_its_own(can, backend.again_step),
        again_forward=_of_its_own(can, backend.again_forward),
        again_backward=_of_its_own(can, backend.again_backward),
    )


def _of_its_own(can: Capabilities, again: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return what does a call again if its arrays need not be handed over."""
    if again is None:
        return None

    def own(request: Request, inputs: Inputs, *more: Any) -> Any:
        handed = can.hands_over(library_of(inputs.q).name)
        return None if handed else again(request, inputs, *more)

    return own


def _on_native(can: Capabilities, function: Callable[..., Any], inputs: Inputs, *more: Any) -> Any:
    """Call a function of the native library's arrays with those of the library of ``inputs``."""
    source = library_of(inputs.q)
    if not can.hands_over(source.name):
        return source.on_memory(function, inputs, *more)

    def run(*trees: Any) -> Any:
        with _handed_over(source, named(can.native), trees[0].q) as (into, back):
            return back(function(*map(into, trees)))

    return source.on_memory(run, inputs, *more)


def _each(f: Callable[[Array], Array], tree: Any) -> Any:
    """Apply ``f`` to an array, or to each in tuples of arrays, None and tuples."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        found = (_each(f, x) for x in tree)
        return type(tree)(*found) if hasattr(tree, "_fields") else tuple(found)
    return f(tree)


@contextmanager
def _handed_over(
    source: Generic, native: Generic, like: Array
) -> Iterator[tuple[Convert, Convert]]:
    """Yield the ways from a caller's arrays to those of another library, and back."""
    taken: list[Array] = []

    def into(x: Array) -> Array:
        if library_of(x) is native:
            return x  # what a forward has saved
        taken.append(native.take(source.lend(x, native.strided)))
        return taken[-1]

    def back(x: Array) -> Array:
        return source.take(native.lend(x, source.strided))

    stream = source.stream(like)
    with nullcontext() if stream is None else native.on_stream(stream):
        yield (lambda tree: _each(into, tree)), (lambda tree: _each(back, tree))
    if stream is None and taken:
        _in_use[:] = [(done, kept) for done, kept in _in_use if not done()]
        done = native.done(taken[0])
        if not done():
            _in_use.append((done, taken))
