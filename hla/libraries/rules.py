"""Backends as a library's transforms can take them: as operators where they cannot see through."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

from . import named
from .exchange import loaded

CALLS = ("forward", "backward", "step", "summarize")


@functools.cache
def differentiable(name: str, library: str, node: bool) -> Any:
    """Return a backend for calls with arrays of a library, by its rule where that is needed.

    With ``node`` it is an operator wherever the library has them.
    """
    backend, own = loaded(name), named(library)
    opaque = own.wraps(backend.capabilities)
    if not own.rule and own.again and backend.again_forward:
        way = importlib.import_module(own.again)
        more = {f"again_{x}": functools.partial(getattr(way, x), name) for x in ("scan", "vjp")}
        return SimpleNamespace(**backend._asdict(), **more)
    if not own.rule or not (opaque or (node and backend.empty is not None)):
        return backend
    rule = importlib.import_module(own.rule)
    calls = {x: functools.partial(getattr(rule, x), name, node) for x in CALLS}
    again = own.again and functools.partial(importlib.import_module(own.again).scan, name)
    return SimpleNamespace(
        **calls,
        __name__=name,
        capabilities=backend.capabilities,
        again_step=backend.again_step,
        again_scan=again or None,
    )
