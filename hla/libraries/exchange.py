"""Arrays of one library as those of another, without a copy, on the caller's stream."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..core.namespace import Array, library

Result = TypeVar("Result")
Convert = Callable[[Any], Any]
_in_use: list[tuple[Any, list[Array]]] = []  # events, and what must stay until they are reached


def each(f: Callable[[Array], Array], tree: Any) -> Any:
    """Apply ``f`` to an array, or to each in a NamedTuple of arrays, None and NamedTuples."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        return type(tree)(*(each(f, x) for x in tree))
    return f(tree)


def on_memory(function: Callable[..., Result], *trees: Any) -> Result:
    """Call a function of torch tensors that reads their memory, as torch calls its own functions.

    A subclass is asked by its ``__torch_function__``, which says what type the results have. The
    function itself sees memory that holds the values: no sign that is pending, no implied zeros.

    Parameters
    ----------
    function : callable
        Of ``trees``; returns a tree.
    *trees
        Tensors, None and tuples of them.
    """
    if all(_is_memory(tree) for tree in trees):
        return function(*trees)
    from torch import _C, Tensor
    from torch.overrides import handle_torch_function, has_torch_function
    from torch.utils._pytree import tree_flatten, tree_unflatten

    flat, spec = tree_flatten(trees)
    specs: list[Any] = []

    def run(*flat: Any) -> Any:
        with _C.DisableTorchFunctionSubclass():
            there = [_values(x) if isinstance(x, Tensor) else x for x in flat]
            found, after = tree_flatten(function(*tree_unflatten(there, spec)))
        specs.append(after)
        return found

    asked = has_torch_function(flat)
    found = handle_torch_function(run, flat, *flat) if asked else run(*flat)
    result: Result = tree_unflatten(found, specs[-1])
    return result


def _is_memory(tree: Any) -> bool:
    if tree is None:
        return True
    if isinstance(tree, tuple):
        return all(_is_memory(x) for x in tree)
    torch = sys.modules["torch"]
    plain = type(tree) in (torch.Tensor, torch.nn.Parameter)
    return plain and not tree.is_neg() and not tree._is_zerotensor()


def _values(x: Array) -> Array:
    return x.clone() if x._is_zerotensor() else x.resolve_neg()


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
