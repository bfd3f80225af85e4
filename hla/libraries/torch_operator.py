"""Operators of torch with their gradients, as the dispatcher and as torch.func take them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .torch_options import no_forward_mode
from .torch_tracing import transforming


class Rule(NamedTuple):
    """An operator with its gradient, as the dispatcher and as torch.func take it."""

    op: Any
    setup: Callable[[Any, Sequence[Any], Sequence[Tensor]], None]
    pull: Callable[[Any, Sequence[Tensor | None]], tuple[Any, ...]]

    def __call__(self, *args: Any) -> list[Tensor]:
        """Call the operator; torch.func cannot see its gradient, but that of a Function."""
        if not transforming():
            found: list[Tensor] = self.op(*args)
            return found
        flat, tree = tree_flatten(list(args), is_leaf=_plain_list)
        return list(_function(self).apply(tree, *flat))


@functools.cache
def _function(rule: Rule) -> Any:
    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(tree: Any, *flat: Any) -> tuple[Tensor, ...]:
            return tuple(rule.op(*tree_unflatten(flat, tree)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            rule.setup(ctx, tree_unflatten(inputs[1:], inputs[0]), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = rule.pull(ctx, grads)
            return (None, *tree_flatten(list(found), is_leaf=_plain_list)[0])

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise no_forward_mode(ctx.options.backend)

    return Function


def _plain_list(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(isinstance(y, int) for y in x)


def operator(
    name: str, schema: str, function: Any, fake: Any, setup: Any, pull: Any, vmap: Any, **other: Any
) -> Rule:
    """Define hla::name.

    Parameters
    ----------
    name, schema : str
        The operator's.
    function, fake : callable
        It on tensors, and on tensors that have shapes alone.
    setup, pull : callable
        What its gradient keeps, and that gradient.
    vmap : callable
        As `torch.library.register_vmap` takes it.
    **other
        ``backward``: the gradient where torch says which inputs need one.
    """
    op = torch.library.custom_op(f"hla::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(other.get("backward", pull), setup_context=setup)
    op.register_vmap(vmap)
    return Rule(op, setup, pull)
