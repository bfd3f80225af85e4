"""An axis that torch.func.vmap adds to a call of `hla::scan` or of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.fields import rank
from ..core.reference import shapes
from .torch_options import Options, inputs_of, moved, request_of


def mapped(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[list[Tensor], list[int]]:
    """Take a mapped axis as one more batch axis, in front of all."""
    ranks = [x.ndim - (d is not None) for x, d in zip(args[:3], in_dims[:3], strict=True)]
    back = len(args) - 9 == len(Options._fields)
    options = Options(*(args[9:] if back else args[6:-1]))
    fields = [rank(name) for name in options.kind._fields] if options.kind else []

    def front(x: Tensor | None, dim: int | None, own: int) -> Tensor | None:
        """Move the mapped axis to the front; behind it come all batch axes, then its own."""
        if x is None:
            return None
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        missing = max(ranks) - 2 + own - (x.ndim - 1)
        return x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:])

    def fronts(i: int, ranks: Sequence[int]) -> list[Tensor | None]:
        return [front(x, d, own) for x, d, own in zip(args[i], in_dims[i], ranks, strict=True)]

    given = [front(args[i], in_dims[i], own) for i, own in enumerate((2, 2, 2, 0, 1))]
    state, rest = fronts(5, fields if args[5] else []), []
    if back:
        do, ends = front(args[7], in_dims[7], 2), fields if args[8] else []
        rest = [fronts(6, [2] * len(args[6])), do, fronts(8, ends)]
    out = (torch.ops.hla.scan_backward if back else torch.ops.hla.scan)(
        *given, state, *rest, *args[6 + len(rest) :]
    )
    # of one entry: without the batch axes that only the others have
    inputs = [
        x if x is None or d is None else x.select(d, 0)
        for x, d in zip((*args[:5], *args[5]), (*in_dims[:5], *in_dims[5]), strict=True)
    ]
    if back:
        one = [inputs[i].shape for i in moved(inputs, options)]
    else:
        o, full, _ = shapes(request_of(inputs_of(options, inputs), options, False))
        one = [o, *full]
    out = [x.reshape(x.shape[0], *one[i]) if i < len(one) else x for i, x in enumerate(out)]
    return out, [0] * len(out)
