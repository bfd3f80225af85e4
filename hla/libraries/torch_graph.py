"""Functions as single nodes of torch's graph, which its compiler runs and does not read.

Imported when such a function finds itself being compiled: the compiler really imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import NODES


def _in_graph(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def node(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    node.__name__ = node.__qualname__ = name  # by which a graph shows it
    found: Callable[..., Any] = torch.compiler.allow_in_graph(node)
    return found


nodes = {name: _in_graph(name, function) for name, function in NODES.items()}
