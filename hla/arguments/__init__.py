"""Every argument of the public functions is checked here, before any work is done.

What the checks found of a call is remembered by what they look at: types, shapes, dtypes, devices
and options. A call alike then costs a look-up and the checks of values.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from ..core.namespace import Array
from ..core.programs import program
from ..core.request import Inputs, Request
from ..layout import Layout
from ..libraries import library_of
from ..libraries.describe import describe
from ..options import DEFAULTS, checked
from ..states.packed import PACKED_OF, STATE_OF
from . import gate, state
from .arrays import operands, shapes

ARRAYS = ("decay", "log_gate", "initial_state")
PLAIN = tuple(name for name in DEFAULTS if name not in (*ARRAYS, "backend"))
_arrays, _plain = itemgetter(*ARRAYS), itemgetter(*PLAIN)


class Checked(NamedTuple):
    """What the checks of a call found, beside values."""

    request: Request
    layout: Layout
    whole: bool  # the state is taken as it comes


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    one_token: bool = False,
    gradient: bool = False,
    **given: Any,
) -> tuple[Request, Inputs, Layout]:
    """Check every argument and describe the call.

    Parameters
    ----------
    q, k, v
        As given to `hla.scan` or, without a token axis, to `hla.step`.
    one_token : bool
        Whether there is no token axis.
    gradient : bool
        Whether the gradient will be requested, so that a backend keeps what it needs.
    **given
        Options of `hla.scan`, without the backend.

    Returns
    -------
    request : Request, inputs : Inputs, layout : Layout
    """
    options = DEFAULTS | given
    decay, log_gate, start = _arrays(options)
    q, k, v = [library_of(x).operand(x) for x in (q, k, v)]
    key = _key((q, k, v), decay, log_gate, start, (*_plain(options), one_token, gradient))
    try:
        known = None if key is None else _known.get(key)
    except TypeError:  # a compiler's symbols have no hash
        key = known = None
    if known is None:
        known, inputs = _check(q, k, v, options, one_token, gradient)
        if key is not None:
            if len(_known) >= MOST:
                _known.clear()
                _requests.clear()
            request = _requests.setdefault(known.request, known.request)
            known = _known[key] = known._replace(request=request)
        return known.request, inputs, known.layout
    request, layout, whole = known
    decay, log_gate = gate.brought(q, decay, log_gate, layout)
    if not whole:
        start = _brought(one_token, request, q, start)
    tokens_in = layout.tokens_in
    inputs = Inputs(tokens_in(q), tokens_in(k), tokens_in(v), decay, log_gate, start)
    return request, inputs, layout


MOST = 4096
_known: dict[Any, Checked] = {}
_requests: dict[Request, Request] = {}  # one object for all that are equal: a cache finds it sooner
NUMBERS = frozenset((float, int, np.float64, np.float32))
SIMPLE = NUMBERS | {bool, np.bool_, np.int64, str, type(None)}


def _key(
    given: tuple[Any, ...], decay: Any, log_gate: Any, start: Any, options: tuple[Any, ...]
) -> Any:
    """Return what the checks see of a call beside values; None where that may not be all.

    Types too: as a key True is 1, and here it is no number.
    """
    seen: list[Any] = [*map(_seen, given), options, *map(type, options)]
    if not SIMPLE.issuperset(seen[4:]):
        return None
    for x in (decay, log_gate):
        if type(x) in NUMBERS:
            seen.append((type(x), x == 1))
        elif x is not None:
            seen.append(_seen(x))
            if seen[-1] is None:
                return None
        else:
            seen.append(0)
    if start is not None:
        kind = type(start)
        if kind not in PACKED_OF and kind not in STATE_OF:
            return None
        seen += (kind, *map(_seen, start))
    library = library_of(given[0])
    seen.append(library.tf32())
    return None if None in seen or library.transformed() else tuple(seen)


def _seen(x: Any) -> Any:
    return library_of(x).key(x)


def _state_name(one_token: bool) -> str:
    return "state" if one_token else "initial_state"


def _brought(one_token: bool, request: Request, q: Array, start: Any) -> Any:
    """Check and bring the incoming state; a packed one stays so for one token."""
    found = state.brought(_state_name(one_token), request, q, start)
    return found if one_token or type(found) not in STATE_OF else found.unpack()


def _check(
    q: Array, k: Array, v: Array, options: dict[str, Any], one_token: bool, gradient: bool
) -> tuple[Checked, Inputs]:
    decay, log_gate, start = _arrays(options)
    concrete = library_of(q).concrete
    decay, log_gate = concrete(decay), concrete(log_gate)
    found = checked({name: concrete(options[name]) for name in PLAIN})
    axis = found.pop("axis")
    layout = Layout(None if one_token else axis, None, None)
    given = dict(zip(layout.names, (q, k, v), strict=True))
    q, k, v, axis = operands(given, layout.axis)
    layout = layout._replace(axis=axis, packed=type(start) in STATE_OF)
    batch = shapes(given, layout)
    mask, ridge = found["mask"], found["ridge"]
    if mask == "none":
        for name, x in zip(ARRAYS, (decay, log_gate, start), strict=True):
            if x is not None:
                raise ValueError(
                    f"{name} was given with mask='none', which has no order; pass None"
                )
    decay, log_gate, layout = gate.checked(q, batch, decay, log_gate, layout)
    decay, log_gate = gate.brought(q, decay, log_gate, layout)
    kind = None
    if mask != "none":
        kind = program(found["operator"], mask, found["convention"], bool(ridge), None).state
    if start is not None:
        kind = state.state_type(_state_name(one_token), start, kind, ridge)
    q_in, k_in, v_in = map(layout.tokens_in, (q, k, v))
    inputs = Inputs(q_in, k_in, v_in, decay, log_gate, None)
    request = describe(
        inputs,
        [x for x in (decay, log_gate, *(start or ())) if library_of(x).name],
        state_type=kind,
        gradient=gradient,
        gate_given=layout.decay_shape is not None or layout.gate_shape is not None,
        axis=layout.axis or -2,
        **found,
    )
    whole = True
    if start is not None:
        found_state = _brought(one_token, request, q, start)
        layout = layout._replace(state_ranks=tuple(x.ndim for x in start))
        whole = type(found_state) is type(start)
        whole = whole and all(x is y for x, y in zip(found_state, start, strict=True))
        inputs = inputs._replace(state=start if whole else found_state)
    return Checked(request, layout, whole), inputs
