"""Functions of memory, called as torch calls its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import _C, Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_flatten, tree_unflatten

Result = TypeVar("Result")
PLAIN = frozenset((Tensor, nn.Parameter))


def on_memory(function: Callable[..., Result], *trees: Any) -> Result:
    """Call a function of torch tensors that reads their memory, as torch calls its own functions.

    A subclass's ``__torch_function__`` is called, which decides the type of the results. The
    function itself sees memory that holds the values: no sign that is pending, no implied zeros.

    Parameters
    ----------
    function : callable
        Of ``trees``; returns a tree.
    *trees
        Tensors, None and tuples of them.
    """
    if _are_memory(trees):
        return function(*trees)
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


def _are_memory(trees: Any) -> bool:
    for x in trees:
        if type(x) in PLAIN:
            if x.is_neg() or x._is_zerotensor():
                return False
        elif x is not None and not (isinstance(x, tuple) and _are_memory(x)):
            return False
    return True


def _values(x: Tensor) -> Tensor:
    return x.clone() if x._is_zerotensor() else x.resolve_neg()
