"""One token like an earlier one: what the checks, the choice and the kernel found of it is kept.

A call that agrees with an earlier one in all that these depend on (types, shapes, strides and
alignment of its arrays, every option, no mode or transform that looks at it) is done by what the
backend gave to do it again: a token on a GPU takes less time than its checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .arguments import SIMPLE
from .core.namespace import Array
from .core.request import Inputs, Request
from .libraries import library_of
from .states.packed import PACKED_OF, STATE_OF

MOST = 4096  # kinds of calls


class Seen(NamedTuple):
    """What tells a call from others, its arrays, the decay's after v, and their addresses."""

    key: Any
    arrays: list[Array]
    addresses: list[int]


class Kept(NamedTuple):
    """What does calls of one kind; dtype of the array that a number's decay becomes, if any."""

    run: Callable[[list[Array], list[int]], tuple[Array, Any]]
    number: Any


_kept: dict[Any, Kept] = {}


def seen(q: Array, k: Array, v: Array, state: Any, options: Mapping[str, Any]) -> Seen | None:
    """Return what tells a call from others, None where more must be asked."""
    arrays, kind, decay = [q, k, v], type(state), options["decay"]
    if decay is not None and type(decay) is not float:
        if not library_of(decay).on_accelerator(decay):
            return None  # its values are checked
        arrays.append(decay)
        options = {**options, "decay": None}
    if kind in STATE_OF or kind in PACKED_OF:
        arrays += state
    elif state is not None:
        return None
    types = (*map(type, options.values()),)
    found = library_of(q).seen(arrays) if SIMPLE.issuperset(types) else None
    if found is None:
        return None
    return Seen((found[0], kind, types, *options.values()), arrays, found[1])


def take(call: Seen, decay: Any) -> tuple[Array, Any] | None:
    """Do a call; None of a kind that is not kept."""
    kept = _kept.get(call.key)
    if kept is None:
        return None
    arrays, addresses = call.arrays, call.addresses
    if kept.number is not None:
        x = library_of(arrays[0]).number(decay, kept.number, arrays[0])
        arrays.insert(3, x)
        addresses.insert(3, x.data_ptr())
    return kept.run(arrays, addresses)


def keep(
    call: Seen, decay: Any, chosen: Any, request: Request, inputs: Inputs, donate: bool
) -> None:
    """Keep how a call is done that was done, where its backend can do such a one again."""
    if chosen.again is None or request.empty or request.gate == "log_gate":
        return
    run = chosen.again(request, inputs, donate)
    if run is None or (type(decay) is not float and inputs.decay is not decay):
        return
    if len(_kept) >= MOST:
        _kept.clear()
    x = inputs.decay  # None of a decay of 1
    _kept[call.key] = Kept(run, x.dtype if type(decay) is float and x is not None else None)
