"""Checks of the decay and the log gate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..core.namespace import Array, device, namespace
from ..core.passes import Shape
from ..layout import Layout
from ..libraries import library_of
from ..options import is_number
from .arrays import array, broadcasts, floating

# A log gate below is as -inf: its exponential is 0 in every dtype, and sums of it could overflow.
FORGETS = -1e4
VANISHES = (
    "which is 0 in float32, the dtype of sums here; expected values in (0, 1] there. A log_gate"
    " of -inf forgets every token before; float64 arrays keep float64"
)


def checked(
    q: Array, batch: Shape, decay: Any, log_gate: Any, layout: Layout
) -> tuple[Any, Any, Layout]:
    """Check everything of the decay or the log gate but its values."""
    if decay is not None and log_gate is not None:
        raise ValueError("decay and log_gate were both given; expected one (log_gate = log(decay))")
    first = layout.names[0]
    if isinstance(decay, np.float16):
        _of_enough_digits(decay, "float16")
    if decay is not None and not is_number(decay):
        decay = array("decay", decay, q, first, number="a number in (0, 1] or ")
        _of_enough_digits(decay, library_of(decay).dtype_name(decay))
        what = f"the batch shape of {', '.join(layout.names)}. A decay of each token is a log_gate"
        broadcasts("decay", decay.shape, batch, what)
        layout = layout._replace(decay_shape=tuple(decay.shape))
    if log_gate is not None and not is_number(log_gate):
        log_gate = array("log_gate", log_gate, q, first, number="a number <= 0 or ")
        floating("log_gate", log_gate)
        full = batch
        if layout.axis is not None:
            place = len(batch) + layout.axis + 2
            full = (*batch[:place], q.shape[layout.axis], *batch[place:])
        what = f"{first} without its features. It has one number for all of them"
        broadcasts("log_gate", log_gate.shape, full, what)
        layout = layout._replace(gate_shape=tuple(log_gate.shape))
    return decay, log_gate, layout


def _of_enough_digits(decay: Any, dtype: str) -> None:
    """Refuse a decay in whose dtype what is near 1 is 1."""
    if dtype not in ("float32", "float64"):
        raise TypeError(
            f"decay has dtype {decay.dtype}; expected float32 or float64, made so and not cast"
            " from less (bfloat16(0.999) is 1)"
        )


def brought(
    q: Array, decay: Any, log_gate: Any, layout: Layout
) -> tuple[Array | None, Array | None]:
    """Check the values of the decay or the log gate; bring it to the accumulation dtype.

    q is as the caller gave it.
    """
    if decay is None and log_gate is None:
        return None, None
    library, xp, like = library_of(q), namespace(q), {"device": device(q)}
    wide = library.dtype_name(q) == "float64"
    dtype, least = (xp.float64, 0.0) if wide else (xp.float32, 2.0**-150)  # rounded to 0 by float32
    with library.underflow():
        if decay is not None:
            if is_number(decay):
                if not 0 < decay <= 1:
                    raise ValueError(
                        f"decay is {decay}; expected a number in (0, 1]. None is no decay"
                    )
                if decay <= least:
                    raise ValueError(f"decay is {decay}, {VANISHES}")
                return None if decay == 1 else library.number(float(decay), dtype, q), None
            values = library.host_values(decay)
            if values is not None and not ((values > least) & (values <= 1)).all():
                wrong = values[~((values > least) & (values <= 1))].flat[0]
                if 0 < wrong <= least:
                    raise ValueError(f"decay holds {wrong}, {VANISHES}")
                raise ValueError(f"decay holds {wrong}; expected values in (0, 1]. Clip it")
            return xp.astype(decay, dtype, copy=False), None
        tokens = 1 if layout.axis is None else q.shape[layout.axis]
        if is_number(log_gate):
            if not log_gate <= 0:
                raise ValueError(
                    f"log_gate is {log_gate}; expected a number <= 0 (-inf forgets). It is"
                    " log(decay)"
                )
            value = float(log_gate) if log_gate >= FORGETS else -math.inf
            return None, layout.gate_in(library.number(value, dtype, q), tokens)
        values = library.host_values(log_gate)
        if values is not None and not (values <= 0).all():
            raise ValueError(
                f"log_gate holds {values[~(values <= 0)].flat[0]}; expected values <= 0 (-inf"
                " forgets). They are logarithms of decays: -softplus(x), not sigmoid(x)"
            )
        if values is not None and ((values < FORGETS) & (values > -math.inf)).any():
            forgets = xp.full((), -math.inf, dtype=log_gate.dtype, **like)
            log_gate = xp.where(log_gate < FORGETS, forgets, log_gate)
        return None, layout.gate_in(xp.astype(log_gate, dtype, copy=False), tokens)
