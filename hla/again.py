"""A call like an earlier one: what the checks, the choice and the plan found of it is kept.

A call that agrees with an earlier one in all that these depend on (types, shapes, strides and
alignment of its arrays, every option, no mode or transform that looks at it) is done by what the
backend gave to do it again: a short call on a GPU takes less time than its checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .arguments import SIMPLE
from .core.namespace import Array
from .core.request import Inputs
from .libraries import library_of
from .states.packed import PACKED_OF, STATE_OF

MOST, SEVERAL = 4096, 8  # calls by their options and the shape of q, and kinds of each
STATES = frozenset((*PACKED_OF, *STATE_OF))
Run = Callable[[list[Array], list[int]], Any]


class Seen(NamedTuple):
    """A call as given: its options and the shape of q; q, k, v, the gate and fields of the state.

    The gate is there if it is an array.
    """

    key: Any
    arrays: list[Array]


class Kept(NamedTuple):
    """What does calls with such arrays, of which ``alike`` gives the addresses, of others None."""

    alike: Callable[[list[Array]], list[int] | None]
    run: Run


_kept: dict[Any, list[Kept]] = {}


def seen(
    function: str, q: Array, k: Array, v: Array, state: Any, options: Mapping[str, Any]
) -> Seen | None:
    """Return what is compared of a call, None of one that is never kept."""
    shape = library_of(q).signature(q)
    if shape is None:
        return None
    key: list[Any] = [function, shape, type(state)]
    arrays = [q, k, v]
    for name, x in options.items():
        kind = type(x)
        if kind in SIMPLE:  # the type too: True is 1
            key += (name, kind, x)
        elif kind in STATES and state is None:
            state = x
            key += (name, kind)
        else:
            key.append(name)
            arrays.append(x)
    if state is not None:
        if type(state) not in STATES:
            return None
        arrays += state
    return Seen(tuple(key), arrays)


def take(call: Seen) -> Any:
    """Do a call like an earlier one; None of another."""
    for alike, run in _kept.get(call.key, ()):
        addresses = alike(call.arrays)
        if addresses is not None:
            return run(call.arrays, addresses)
    return None


def keep(
    call: Seen,
    inputs: Inputs,
    prepare: Callable[[], Run | None],
    decay: Any = None,
    log_gate: Any = None,
) -> bool:
    """Keep how a call is done, and return whether that could be.

    What ``prepare`` returns does it of the caller's arrays, a decay as an array after v. A gate
    whose values are checked, or that is brought to another dtype, is done so in every call.
    """
    number = type(decay) is float and inputs.decay is not None
    for given, made in ((decay, inputs.decay), (log_gate, inputs.log_gate)):
        if made is not None and not number:
            if not any(x is given for x in call.arrays) or made.dtype != given.dtype:
                return False
            if not library_of(made).on_accelerator(made):
                return False
    alike = library_of(inputs.q).alike(call.arrays)
    run = None if alike is None else prepare()
    if alike is None or run is None:
        return False
    if len(_kept) >= MOST:
        _kept.clear()
    several = _kept.setdefault(call.key, [])
    if len(several) >= SEVERAL:
        several.clear()
    if number:
        run = functools.partial(_with_number, run, decay, inputs.decay.dtype)  # type: ignore[union-attr]
    several.append(Kept(alike, run))
    return True


def _with_number(
    run: Run, decay: float, dtype: Any, arrays: list[Array], addresses: list[int]
) -> Any:
    library = library_of(arrays[0])
    x = library.number(decay, dtype, arrays[0])
    arrays.insert(3, x)
    if addresses:
        addresses.insert(3, library.address(x))
    return run(arrays, addresses)
