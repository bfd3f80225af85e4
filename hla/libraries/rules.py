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
    lent = backend.capabilities.hands_over(library)  # in every call
    if not own.rule and own.again and backend.again_forward and not lent:
        way = importlib.import_module(own.again)
        more = {f"again_{x}": functools.partial(getattr(way, x), name) for x in ("scan", "vjp")}
        return SimpleNamespace(**backend._asdict(), **more)
    if not own.rule or not (opaque or (node and backend.empty is not None)):
        return backend
    rule = importlib.import_module(own.rule)
    calls = {x: functools.partial(getattr(rule, x), name, node) for x in CALLS}
    again = None if lent or not own.again else importlib.import_module(own.again).scan
    return SimpleNamespace(
        **calls,
        __name__=name,
        capabilities=backend.capabilities,
        again_step=None if lent else backend.again_step,
        again_scan=again and functools.partial(again, name),
    )
