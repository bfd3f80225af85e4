"""Which backend runs a request: the table, the choice, and the reasons."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import contract, libraries
from .contract import Info as Info
from .core import reference
from .core.associative import algebra_of
from .core.namespace import symbolic
from .core.request import Request
from .empty import Filled
from .errors import SlowPathWarning, Unsupported, kind_of

GROUP = "hla.backends"  # entry points: name = a module with what `Row` says a backend has
RESERVED = ("pallas", "cupy", "numba")  # known names, also before they are there
ANY = "any"


class Row(NamedTuple):
    """One backend: its module and the pairs (library, on an accelerator?) it is picked for.

    The module has ``supports(request) -> str | None`` (the reason for refusing), ``forward``,
    ``backward`` and ``step`` as `hla.backends.array_api` has them, ``summarize`` where it can,
    ``plan(request) -> str`` where it is not that of `plan`, and ``info() -> Info``.
    ``OPAQUE = True`` says that a library's autograd cannot see through it.
    """

    name: str
    module: str
    serves: tuple[tuple[str, bool], ...]


class Backend(NamedTuple):
    """One line of `hla.available`."""

    name: str
    available: bool
    reason: str
    device: str
    version: str
    operators: tuple[str, ...]
    dtypes: tuple[str, ...]
    gradients: bool


class Explanation(NamedTuple):
    """What would run, how, and why each other backend would not."""

    backend: str
    form: str
    plan: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"backend  {self.backend}", f"form     {self.form}", f"plan     {self.plan}"]
        return "\n".join(lines + [f"not {name}: {why}" for name, why in self.reasons.items()])


TABLE: tuple[Row, ...] = (
    Row("numpy", "hla.backends.numpy", (("numpy", False),)),
    Row("triton", "hla.backends.triton", (("torch", True),)),
    Row("array_api", "hla.backends.array_api", ((ANY, False), (ANY, True))),
)
_lock = threading.Lock()
_warned: set[str] = set()


class Plugins(NamedTuple):
    """Third parties' entry points by name and value, and why those under a taken name are none."""

    points: dict[str, dict[str, Any]]
    ignored: dict[str, str]


@functools.cache
def _plugins() -> Plugins:
    from importlib import metadata  # a tenth of hla's import, and needed only past the table

    points: dict[str, dict[str, Any]] = {}
    try:
        for point in metadata.entry_points(group=GROUP):
            points.setdefault(point.name, {})[point.value] = point
    except Exception as error:  # of any package at all
        _warn(f"no plugins: the entry points here are not readable ({error!r})")
    ignored = {}
    for name in sorted(points.keys() & {*(row.name for row in TABLE), *RESERVED}):
        values = ", ".join(points.pop(name))
        ignored[name] = f"hla has the name {name!r} itself; rename the entry point of {values}"
        _warn(f"a plugin is ignored: {ignored[name]}")
    return Plugins(dict(sorted(points.items())), ignored)


@functools.cache
def load(name: str) -> Any:
    """Import a backend; a real import error surfaces, but that of a plugin is its refusal."""
    for row in TABLE:
        if row.name == name:
            return importlib.import_module(row.module)
    points = _plugins().points[name]
    if len(points) > 1:
        return contract.refusing(name, f"{' and '.join(points)} have this name; uninstall one")
    return contract.checked(name, *(point.load for point in points.values()))


def names() -> tuple[str, ...]:
    """Every backend there is, in the order in which they are tried; array_api is last."""
    rows = [row.name for row in TABLE]
    return (*rows[:-1], *_plugins().points, rows[-1])


def _serves(name: str, request: Request) -> bool:
    """Whether ``backend=None`` may pick this backend for the request's library and device."""
    pairs = next((row.serves for row in TABLE if row.name == name), None)
    if pairs is None:
        pairs = load(name).serves
    return any(lib in (request.library, ANY) and acc == request.accelerator for lib, acc in pairs)


def choose(
    request: Request,
    backend: str | Sequence[str] | None,
    *,
    autograd: bool = False,
    summarize: bool = False,
    node: bool = False,
) -> Any:
    """Pick a backend (see `pick`) and load it; warn where it is the slow path.

    With ``autograd`` it is returned as the array library's own transforms can take it, with
    ``node`` as operators of the library whatever it is.
    """
    name, reasons = pick(request, backend, summarize=summarize)
    if backend is None and name == "array_api" and request.accelerator:
        _warn_slow(request, reasons)
    module = load(name)
    if autograd:
        module = libraries.seen_by(request.library, name, module, node)
    return Filled(module) if request.empty else module


def pick(
    request: Request, backend: str | Sequence[str] | None, *, summarize: bool = False
) -> tuple[str, dict[str, str]]:
    """Name the backend to run and say why each one tried before it would not do.

    Parameters
    ----------
    request : Request
        What is asked.
    backend : None, str or sequence of str
        Automatic, that one alone, or these in order.
    summarize : bool
        Only a backend that has this function will do.

    Raises
    ------
    Unsupported
        No backend asked for can do it; the message holds every reason.
    """
    reasons: dict[str, str] = {}
    if backend is None:
        tried = names()
    else:
        if not isinstance(backend, (str, Sequence)):
            raise TypeError(
                f"backend is {kind_of(backend)}; expected a name, names in a sequence, or None"
            )
        tried = (backend,) if isinstance(backend, str) else tuple(backend)
        if not tried:
            raise ValueError(
                "backend is an empty sequence; expected a name, names, or None for any"
            )
        for name in tried:
            if not isinstance(name, str) or name not in (*names(), *RESERVED):
                known = ", ".join(dict.fromkeys((*names(), *RESERVED)))
                raise ValueError(f"backend is {kind_of(name)}; expected one of {known}, or None")
    for name in tried:
        if backend is None and not _serves(name, request):
            continue
        why = refusal(name, request)
        if why is None and summarize and not hasattr(load(name), "summarize"):
            why = "it does not summarize; use backend='array_api'"
        if why is None:
            return name, reasons
        reasons[name] = why
    listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    raise Unsupported(f"no backend can do this request. {listed}")


def refusal(name: str, request: Request) -> str | None:
    """Why a backend cannot do a request, or None."""
    if name in RESERVED:
        why = f"this version of hla has no {name} backend; use backend=None or 'array_api'"
        return "; ".join([why, *filter(None, [_plugins().ignored.get(name)])])
    return _no_form(request) or load(name).supports(request)


def _no_form(request: Request) -> str | None:
    """Return why no backend can run the form asked for, or None."""
    if request.mask == "none" and request.form in ("recurrent", "associative"):
        return f"mask='none' sees every token at once and has no {request.form} form; use 'chunked'"
    if request.form == "associative" and symbolic(request.tokens):
        return "form='associative' is a tree that grows with T, here a symbol; use form='chunked'"
    if request.form == "associative" and algebra_of(request) is None:
        return (
            "convention='paper' is not an associative scan: its decayed hla2 operator is not "
            "associative and its hla3 recurrence is not the masked sum; use form='chunked'"
        )
    return None


def _warn(why: str) -> None:
    """Warn of plugins, once, also where warnings are errors."""
    if why not in _warned:
        _warned.add(why)
        warnings.warn(why, stacklevel=2)


def _warn_slow(request: Request, reasons: dict[str, str]) -> None:
    """Say once per reason that an accelerator runs the generic code."""
    why = "; ".join(f"{n}: {w}" for n, w in reasons.items())
    why = why or f"hla has no kernel backend for {request.library} arrays on {request.device}"
    with _lock:
        if why in _warned:
            return
        _warned.add(why)
    warnings.warn(
        f"running the generic array code ({why}); backend='array_api' asks for it silently",
        SlowPathWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """Return the ``stacklevel`` of the caller's own line, for a warning by the caller of this.

    Between the two lie this package and, where it has compiled or wrapped the call, torch.
    """
    level, frame = 0, sys._getframe(1)
    while frame is not None:
        level += 1
        module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if module.split(".")[0] not in ("hla", "torch") and not file.startswith("<eval_with_key>"):
            break
        frame = frame.f_back  # type: ignore[assignment]
    return level


def plan(request: Request) -> str:
    """Say in words how the request is computed."""
    if request.form == "associative":
        width = reference.width(request)
        return f"exclusive Blelloch scans within and across chunks of {width} tokens"
    if request.mask == "none":
        return f"{len(request.program.steps)} full passes"
    return f"{len(request.program.steps)} passes in chunks of {reference.width(request)} tokens"


def explain(request: Request, backend: str | Sequence[str] | None) -> Explanation:
    """Describe what would run, and for each other backend the reason why it would not."""
    chosen, reasons = pick(request, backend)
    for name in (*names(), *RESERVED):
        if name != chosen and name not in reasons:
            other = f"{chosen} comes first" if backend is None else "not asked for"
            reasons[name] = refusal(name, request) or other
    how = getattr(load(chosen), "plan", plan)(request)
    if request.tf32:
        how += "; float32 products in reduced precision, as the array library is set to"
    return Explanation(chosen, request.form or "chunked", how, reasons)


def available() -> tuple[Backend, ...]:
    """One line per backend: whether it can run on this machine, and why not."""
    lines = []
    for name in names():
        try:
            info = load(name).info()
        except Exception as error:  # a broken library is a line of the table, not the end of it
            info = contract.unavailable(f"{type(error).__name__}: {error}")
        lines.append(Backend(name, *info))
    for name, why in _plugins().ignored.items():
        lines.append(Backend(f"{name} (plugin)", *contract.unavailable(why)))
    return tuple(lines)
