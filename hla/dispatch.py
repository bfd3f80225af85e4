"""Which backend runs a request, and the reasons."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import backends, contract
from .backends import load, names
from .contract import Machine
from .core import reference
from .core.associative import algebra_of
from .core.namespace import symbolic
from .core.request import Request
from .errors import SlowPathWarning, Unsupported, kind_of
from .libraries import rules
from .libraries.empty import Filled

_lock = threading.Lock()
_warned: set[str] = set()


class Info(NamedTuple):
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
    chosen = rules.differentiable(name, request.library, node) if autograd else load(name)
    return Filled(chosen) if request.empty else chosen


def pick(
    request: Request, backend: str | Sequence[str] | None, *, summarize: bool = False
) -> tuple[str, dict[str, str]]:
    """Name the backend to run, and the reason against each one tried before it.

    Parameters
    ----------
    request : Request
        The call.
    backend : None, str or sequence of str
        Automatic, that one alone, or these in order.
    summarize : bool
        Only a backend that has this function will do.

    Raises
    ------
    Unsupported
        No requested backend can do it; the message holds every reason.
    """
    if not (backend is None or isinstance(backend, str)):
        backend = _sequence(backend)
    find = _pick.__wrapped__ if request.traced else _pick  # symbols of a trace are no keys
    name, reasons = find(request, backend, summarize)
    if name is None:
        listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise Unsupported(f"no backend can do this request. {listed}")
    return name, dict(reasons)


def _sequence(backend: Any) -> tuple[str, ...]:
    if not isinstance(backend, Sequence):
        raise TypeError(
            f"backend is {kind_of(backend)}; expected a name, names in a sequence, or None"
        )
    if not backend:
        raise ValueError("backend is an empty sequence; expected a name, names, or None for any")
    for name in backend:
        _known(name)
    return tuple(backend)


def _known(name: Any) -> None:
    if not isinstance(name, str) or name not in names():
        known = ", ".join(names())
        raise ValueError(f"backend is {kind_of(name)}; expected one of {known}, or None")


@functools.lru_cache(maxsize=4096)
def _pick(
    request: Request, backend: str | tuple[str, ...] | None, summarize: bool
) -> tuple[str | None, dict[str, str]]:
    """Return what `pick` does, None for a name where no backend can do the request."""
    reasons: dict[str, str] = {}
    if isinstance(backend, str):
        _known(backend)
        backend = (backend,)
    for name in names() if backend is None else backend:
        if backend is None and not contract.serves(load(name), request):
            continue
        why = refusal(name, request)
        if why is None and summarize and load(name).summarize is None:
            why = "it does not summarize; use backend='array_api'"
        if why is None:
            return name, reasons
        reasons[name] = why
    return None, reasons


def refusal(name: str, request: Request) -> str | None:
    """Why a backend cannot do a request, or None."""
    return formless(request) or load(name).refusal(request)


def formless(request: Request) -> str | None:
    """Why no backend can run the requested form, or None."""
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
    """Describe in words how the generic code computes a request."""
    if request.form == "associative":
        width = reference.width(request)
        return f"exclusive Blelloch scans within and across chunks of {width} tokens"
    if request.mask == "none":
        return f"{len(request.program.steps)} full passes"
    return f"{len(request.program.steps)} passes in chunks of {reference.width(request)} tokens"


def explain(request: Request, backend: str | Sequence[str] | None) -> Explanation:
    """Describe what would run, and for each other backend the reason why it would not."""
    chosen, reasons = pick(request, backend)
    for name in names():
        if name != chosen and name not in reasons:
            other = f"{chosen} comes first" if backend is None else "not asked for"
            reasons[name] = refusal(name, request) or other
    how = (load(chosen).plan or plan)(request)
    if request.tf32:
        how += "; float32 products in reduced precision, as the array library is set to"
    return Explanation(chosen, request.form or "chunked", how, reasons)


def available() -> tuple[Info, ...]:
    """One line per backend: whether it can run on this machine, and why not."""
    lines = []
    for name in names():
        c, here = load(name).capabilities, _machine(name)
        dtypes = c.dtypes if here.dtypes is None else here.dtypes
        lines.append(Info(name, not here.reason, *here[:3], c.operators, dtypes, c.gradients))
    for name, why in backends.plugins().ignored.items():
        lines.append(Info(f"{name} (plugin)", False, why, "", "", (), (), False))
    return tuple(lines)


def _machine(name: str) -> Machine:
    try:
        return load(name).machine()
    except Exception as error:  # a broken library is a line of the table, not the end of it
        return Machine(f"{type(error).__name__}: {error}")
