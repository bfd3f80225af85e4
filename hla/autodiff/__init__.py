"""Backends that an array library's own differentiation cannot see through, made one call of it."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

RULES = {"torch": "hla.autodiff.torch"}  # array library: how it differentiates any backend


def seen_by(library: str, name: str, backend: Any) -> Any:
    """Return a backend with ``forward`` and ``step`` as a library's autograd can take them."""
    if library not in RULES or not getattr(backend, "OPAQUE", False):
        return backend
    return _wrapped(library, name)


@functools.cache
def _wrapped(library: str, name: str) -> Any:
    rules = importlib.import_module(RULES[library])
    return SimpleNamespace(
        forward=functools.partial(rules.forward, name), step=functools.partial(rules.step, name)
    )
