"""What a backend has, and a third party's backend held to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, get_origin, get_type_hints

REQUIRED = ("supports", "forward", "backward", "step", "info")
OPTIONAL = ("summarize", "plan")


class Info(NamedTuple):
    """What a backend says of itself on this machine."""

    available: bool
    reason: str
    device: str
    version: str
    operators: tuple[str, ...]
    dtypes: tuple[str, ...]
    gradients: bool


class Fault(Exception):
    """What is wrong with a third party's backend."""


def checked(name: str, find: Callable[[], Any]) -> Any:
    """Return the backend that ``find`` imports, or one that refuses every request with its fault.

    Its ``supports``, ``plan`` and ``info`` then neither raise nor return anything of another type.
    """
    try:
        return _checked(name, _call("import", find))
    except Fault as fault:
        return refusing(name, str(fault))


def refusing(name: str, reason: str) -> Any:
    """Return a backend that refuses every request with this reason."""
    return SimpleNamespace(
        __name__=name,
        serves=(),
        supports=lambda request: reason,
        info=lambda: unavailable(reason),
    )


def _checked(name: str, plugin: Any) -> Any:
    has = {n: _call(n, getattr, plugin, n, None) for n in (*REQUIRED, *OPTIONAL)}
    missing = [n for n in REQUIRED if not callable(has[n])]
    if missing:
        raise Fault(f"its plugin lacks functions that a backend must have: {', '.join(missing)}")
    has = {n: function for n, function in has.items() if function is not None}
    for n, function in has.items():
        if not callable(function):
            raise Fault(f"its plugin's {n} is {function!r}; expected a function, or none")
    _info(has["info"])
    guards: dict[str, Callable[..., Any]]
    guards = {"supports": _supports, "plan": _plan, "info": _guarded_info}
    has |= {n: functools.partial(guards[n], has[n]) for n in guards if n in has}
    opaque = bool(_call("OPAQUE", getattr, plugin, "OPAQUE", False))
    return SimpleNamespace(__name__=name, OPAQUE=opaque, serves=_serves(plugin), **has)


def _call(what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        raise Fault(f"its plugin's {what} failed: {type(error).__name__}: {error}") from error


def _serves(plugin: Any) -> tuple[tuple[str, bool], ...]:
    given = _call("serves", getattr, plugin, "serves", ())
    try:
        pairs = tuple((library, accelerator) for library, accelerator in given)
        good = all(isinstance(x, str) and isinstance(y, bool) for x, y in pairs)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise Fault(
            f"its plugin's serves is {given!r}; expected pairs (library, on an accelerator?) such "
            'as (("numpy", False),)'
        )
    return pairs


def _supports(supports: Callable[[Any], Any], request: Any) -> str | None:
    try:
        why = _call("supports", supports, request)
    except Fault as fault:
        return str(fault)
    if why is None or (isinstance(why, str) and why):
        return why
    return f"its plugin's supports returned {why!r}; expected None or the reason for refusing"


def _plan(plan: Callable[[Any], Any], request: Any) -> str:
    try:
        how = _call("plan", plan, request)
    except Fault as fault:
        return f"not known: {fault}"
    return how if isinstance(how, str) else f"not known: its plugin's plan returned {how!r}"


def _info(info: Callable[[], Any]) -> Info:
    found = _call("info", info)
    if not isinstance(found, Info):
        raise Fault(f"its plugin's info returned {found!r}; expected an hla.dispatch.Info")
    for (field, hint), x in zip(get_type_hints(Info).items(), found, strict=True):
        kind = get_origin(hint) or hint
        words = x if isinstance(x, tuple) else ()
        if not isinstance(x, kind) or not all(isinstance(word, str) for word in words):
            of = " of str" if kind is tuple else ""
            raise Fault(f"its plugin's info has {field} {x!r}; expected a {kind.__name__}{of}")
    return found


def _guarded_info(info: Callable[[], Any]) -> Info:
    try:
        return _info(info)
    except Fault as fault:
        return unavailable(str(fault))


def unavailable(reason: str) -> Info:
    """Return the description of a backend that cannot run here."""
    return Info(False, reason, "", "", (), (), False)
