"""The causal pass of NumPy's arrays by the kernel of the host, heads over threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.passes import Gate, broadcast
from ...core.run import by_passes
from ..numpy.threads import Part, spread
from .host import causal_pass, compiled, room
from .memory import Array, flat, heads


def run_pass(
    q: Array,
    k: Array,
    v: Array,
    gate: Gate,
    *,
    power: int,
    kind: str,
    reverse: bool = False,
    state: Array | None = None,
    chunk: int = 0,
) -> tuple[Array, Array]:
    """Do what `core.run.causal_pass` does; the kernel has a chunk of its own."""
    (T, D), V, dtype = q.shape[-2:], v.shape[-1], q.dtype
    lead = broadcast(k.shape[:-2], v.shape[:-2], gate.batch)
    batch = broadcast(q.shape[:-2], lead)
    o, end = np.empty((*batch, T, V), dtype), np.empty((*lead, D, V), dtype)
    if not D:  # the kernel's products begin with their first number
        o[:] = 0
        return o, end
    start = np.zeros((D, V), dtype) if state is None else np.ascontiguousarray(state)
    arrays = [flat(x) for x in (q, k, v, _gates(gate, power, T), start, o, end)]
    table = heads(batch, *((x.shape[:-2], x.strides[:-2]) for x in arrays))
    steps = tuple(x.strides[-2] for x in arrays[:4])
    kernel = compiled(causal_pass, dtype)

    def job(part: Part, buffers: dict[Any, Any]) -> None:
        if "work" not in buffers:
            buffers["work"] = np.empty(room(D), dtype)
        memory = (*(x.memory for x in arrays), buffers["work"])
        kernel(*memory, part(table, 1), steps, D, V, T, kind == "strict", reverse)

    spread(job, (len(table),), 2 * o.size * D)
    return o, end


def _gates(gate: Gate, power: int, T: int) -> Array:
    """Return each token's factor in float64, (*batch, T, 1); a constant one lies there once."""
    if gate.log_gate is not None and power:
        return np.asarray(np.exp(power * gate.log_gate.astype(np.float64))[..., None])
    factor = np.asarray(1.0) if gate.decay is None else gate.decay.astype(np.float64) ** power
    return np.broadcast_to(factor[..., None, None], (*factor.shape, T, 1))


SWEEP = by_passes(run_pass)
