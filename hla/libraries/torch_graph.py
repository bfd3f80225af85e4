"""The public functions as single nodes of torch's graph, which its compiler runs and does not read.

Imported by `hla.api` when it finds itself being compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import api


def _in_graph(function: Callable[..., Any]) -> Any:
    return torch.compiler.allow_in_graph(function)


@_in_graph
def scan(*args: Any, **options: Any) -> Any:
    """Return what `hla.scan` does, by an operator."""
    return api._scan(*args, node=True, **options)


@_in_graph
def step(*args: Any, **options: Any) -> Any:
    """Return what `hla.step` does, by an operator."""
    return api._step(*args, node=True, **options)


@_in_graph
def summarize(*args: Any, **options: Any) -> Any:
    """Return what `hla.summarize` does, by an operator."""
    return api._summarize(*args, node=True, **options)


@_in_graph
def combine(left: Any, right: Any) -> Any:
    """Return what `hla.combine` does: a few products, whatever the lengths."""
    return api._combine(left, right)


@_in_graph
def forward(*args: Any, **options: Any) -> Any:
    """Return what `hla.vjp` computes of a call, and what `backward` needs."""
    return api._forward(api._prepared(*args, node=True, **options))


@_in_graph
def backward(q: Any, k: Any, v: Any, backend: Any, *given: Any, **options: Any) -> Any:
    """Return the gradients that the pullback of `hla.vjp` gives."""
    return api._pull(api._prepared(q, k, v, backend, node=True, **options), *given)
