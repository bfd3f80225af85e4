"""Backends as single operators of an array library, for what cannot see through them."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

RULES = {"torch": "hla.libraries.torch_rule"}  # array library: how it differentiates any backend
CALLS = ("forward", "backward", "step", "summarize")


def seen_by(library: str, name: str, backend: Any, node: bool) -> Any:
    """Return a backend as a library's transforms can take it; with ``node`` always as operators."""
    opaque = backend.capabilities.opaque
    if library not in RULES or not (opaque or (node and backend.empty is not None)):
        return backend
    return _wrapped(library, name, node)


@functools.cache
def _wrapped(library: str, name: str, node: bool) -> Any:
    rules = importlib.import_module(RULES[library])
    calls = {x: functools.partial(getattr(rules, x), name, node) for x in CALLS}
    return SimpleNamespace(**calls, __name__=name)
