"""The request that a call's arrays and options make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.namespace import Array
from ..core.passes import Gate
from ..core.request import Inputs, Request
from . import library_of


def describe(
    inputs: Inputs, others: Sequence[Array], *, state_type: type[Any] | None, **options: Any
) -> Request:
    """Describe a call: its options as given, the rest read off its arrays.

    Parameters
    ----------
    inputs : Inputs
        Checked arrays.
    others : sequence of array
        The gate and the fields of the state, as far as there are any.
    state_type : type or None
        Of the incoming state, or else of the outgoing one.
    **options
        The fields of Request that no array shows, ``axis`` also where it is of no use.
    """
    q, k, v, decay, log_gate, _ = inputs
    kinds = {"decay": decay, "log_gate": log_gate}
    library = library_of(q)
    found = library.facts(q)
    axis = options.pop("axis", -2)
    if library.strided or not found.traced:  # a transpose is done, or is none
        axis = -2
    return Request(
        q_shape=tuple(q.shape),
        k_shape=tuple(k.shape),
        v_shape=tuple(v.shape),
        gate=next((name for name, x in kinds.items() if x is not None), None),
        gate_batch=Gate(decay, log_gate).batch,
        state_type=state_type,
        library=found.library,
        device=found.device,
        dtype=found.dtype,
        accelerator=found.accelerator,
        axis=axis,
        traced=found.traced or any(library_of(x).traced(x) for x in (k, v, *others)),
        **{"tf32": found.tf32} | options,
    )
