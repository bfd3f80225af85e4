"""Arrays of one library as those of another, without a copy, on the caller's stream."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from .core.namespace import Array, library

Convert = Callable[[Any], Any]
_in_use: list[tuple[Any, list[Array]]] = []  # events, and what must stay until they are reached


def each(f: Callable[[Array], Array], tree: Any) -> Any:
    """Apply ``f`` to an array, or to each in a NamedTuple of arrays, None and NamedTuples."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        return type(tree)(*(each(f, x) for x in tree))
    return f(tree)


@contextlib.contextmanager
def torch_for(name: str) -> Iterator[tuple[Convert, Convert]]:
    """Yield the ways from a library's arrays to torch tensors of the same memory, and back.

    Within the context torch works on CuPy's current stream. JAX has streams of its own: DLPack has
    each side wait for what it is handed, and inputs are kept until torch has read them, since JAX
    may give the memory of a deleted array to a computation that does not wait.
    """
    import torch

    taken: list[Array] = []

    def into(x: Array) -> Array:
        taken.append(to_torch(x))
        return taken[-1]

    with contextlib.ExitStack() as stack:
        if name == "cupy":
            stream = importlib.import_module("cupy").cuda.get_current_stream().ptr
            stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(stream)))
        yield (lambda tree: each(into, tree)), (lambda tree: each(_back_to(name), tree))
    if name == "jax" and any(x.is_cuda for x in taken):
        _in_use[:] = [(event, kept) for event, kept in _in_use if not event.query()]
        _in_use.append((torch.cuda.current_stream(taken[0].device).record_event(), taken))


def to_torch(x: Array) -> Array:
    """Return a torch tensor of x's memory (of a copy where a stride is negative)."""
    import torch

    if library(x) == "cupy" and any(stride < 0 for stride in x.strides):
        x = x.copy()  # torch.from_dlpack would end the process
    return torch.from_dlpack(x)


def _back_to(name: str) -> Callable[[Array], Array]:
    if name == "cupy":
        return lambda x: importlib.import_module("cupy").from_dlpack(x)
    return lambda x: importlib.import_module("jax.numpy").from_dlpack(x.contiguous())
