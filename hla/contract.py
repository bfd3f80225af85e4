"""What a backend is: its capabilities as data, four functions, and what it reports of a machine.

Refusals, `hla.available`, the documentation's tables, and the rows of tests and benchmarks follow
from the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .options import CONVENTIONS, FORMS, MASKS, OPERATORS

if TYPE_CHECKING:
    from .core.request import Request

ANY = "any"
GATES = ("decay", "log_gate")
NAMES = {"numpy": "NumPy", "jax": "JAX", "cupy": "CuPy", "numba": "Numba"}  # where not as imported


class Capabilities(NamedTuple):
    """What a backend computes, the same on every machine that can run it.

    Attributes
    ----------
    dtypes : tuple of str
        Of q, k and v: "float16", "bfloat16", "float32", "float64".
    libraries : tuple of str
        Array libraries whose arrays it takes; ("any",) for every one.
    native : str
        The library whose arrays its functions are given: those of others but NumPy are handed over,
        without a copy, by DLPack. "" where they are given as they come.
    serves : tuple of (str, bool)
        Pairs (library, on an accelerator?) that ``backend=None`` picks it for; see also
        `Backend.automatic`.
    operators, masks, conventions, gates, forms : tuple of str
        As the arguments of `hla.scan` name them; a gate is "decay" or "log_gate".
    traced : tuple of str
        Libraries whose traced arrays it takes (jit, vmap, compile): those whose tracer sees through
        its arithmetic, and those that have it as one operator (torch).
    opaque : bool
        The library's autograd cannot see through its arithmetic: it is wrapped as one operator.
    gradients : bool
        Whether it has a ``backward``.
    packed : bool
        ``step`` takes packed states too, and then returns one; else they come unpacked.
    """

    dtypes: tuple[str, ...]
    libraries: tuple[str, ...] = (ANY,)
    native: str = ""
    serves: tuple[tuple[str, bool], ...] = ()
    operators: tuple[str, ...] = OPERATORS
    masks: tuple[str, ...] = MASKS
    conventions: tuple[str, ...] = CONVENTIONS
    gates: tuple[str, ...] = GATES
    forms: tuple[str, ...] = FORMS
    traced: tuple[str, ...] = (ANY,)
    opaque: bool = False
    gradients: bool = True
    packed: bool = False

    def hands_over(self, library: str) -> bool:
        """Whether arrays of a library become those of the native one."""
        return self.native not in ("", library) and library != "numpy"


class Machine(NamedTuple):
    """What a backend finds on this machine.

    Attributes
    ----------
    reason : str
        Why it cannot run here; "" where it can.
    device, version : str
        Name of the device, and of the software that drives it.
    dtypes : tuple of str, optional
        Those that run here, where these are fewer than the capabilities have.
    """

    reason: str = ""
    device: str = ""
    version: str = ""
    dtypes: tuple[str, ...] | None = None


class Backend(NamedTuple):
    """One backend, as `made` of what its module has.

    Attributes
    ----------
    refusal : callable
        (request) to the reason why it is not done here, or None.
    forward : callable
        (request, inputs) to (o, state or None, what ``backward`` needs).
    backward : callable, optional
        (request, inputs, saved, do, dstate) to `hla.Gradients`; do or dstate may be None.
    step : callable
        (request, inputs, donate) to (o, state) of one token.
    summarize : callable, optional
        (request, inputs) to a segment.
    machine : callable
        () to `Machine`.
    plan : callable, optional
        (request) to the plan that `hla.explain` reports, where the generic one is not true.
    empty : callable, optional
        As ``forward``, with nothing computed.
    automatic : callable
        (request) to whether ``backend=None`` may pick it for one that it serves; else not there.
    again_step, again_forward, again_backward : callable, optional
        Of what ``step``, ``forward`` or ``backward`` is given, and of the last two also the
        caller's token axis, to None, or to what does such a call of other arrays laid out alike,
        outside of every mode and transform. That takes, in a list each, the arrays as the caller
        laid them out (q, k, v, the gate and the fields of the state; then saved, do and the fields
        of dstate) and their addresses. It returns (o, state); a list of o, the fields of the state,
        and what ``backward`` needs; or a list of the gradients of q, k, v, the gate if it has one,
        and the fields of the state. The results are laid out as the caller's arrays, but a log
        gate's gradient, which is not.
    """

    name: str
    capabilities: Capabilities
    refusal: Callable[[Request], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    step: Callable[..., Any]
    summarize: Any
    machine: Callable[[], Machine]
    plan: Callable[[Request], str] | None
    empty: Callable[..., Any] | None
    automatic: Callable[[Request], bool]
    again_step: Callable[..., Any] | None
    again_forward: Callable[..., Any] | None
    again_backward: Callable[..., Any] | None


def refusal(capabilities: Capabilities, request: Request) -> str | None:
    """Why no machine lets a backend of these capabilities do a request, or None."""
    c, library = capabilities, request.library
    if not _among(library, c.libraries):
        return f"it runs on arrays of {spoken(c.libraries)}, these are arrays of {library}"
    if request.traced and not _among(library, c.traced):
        return (
            f"a traced {NAMES.get(library, library)} array (jit, grad, vmap) has no memory that"
            " another library could read; call it outside of the trace, with hla.vjp for gradients,"
            " or use backend='array_api'"
        )
    form = request.form or "chunked"
    for what, has, value in (
        ("operator", c.operators, request.operator),
        ("mask", c.masks, request.mask),
        ("convention", c.conventions, request.convention),
        ("form", c.forms, form),
    ):
        if value not in has:
            runs = listed([repr(x) for x in has], "or")
            return f"it runs {what}={runs}, not {value!r}; use backend='array_api'"
    if request.gate is not None and request.gate not in c.gates:
        return f"it has no {request.gate}; use backend='array_api'"
    if request.dtype not in c.dtypes:
        return f"it multiplies {', '.join(c.dtypes)}, not {request.dtype}; use backend='array_api'"
    if request.gradient and not c.gradients:
        return "it has no gradients; use backend='array_api'"
    return None


def serves(backend: Backend, request: Request) -> bool:
    """Whether ``backend=None`` may pick a backend for a request."""
    library, pairs = (request.library, ANY), backend.capabilities.serves
    there = any(x in library and y == request.accelerator for x, y in pairs)
    return there and backend.automatic(request)


def _always(request: Request) -> bool:
    return True


def _among(library: str, libraries: Sequence[str]) -> bool:
    return library in libraries or ANY in libraries


def listed(words: Sequence[str], last: str) -> str:
    """Join words as a sentence does."""
    *first, end = words or ["nothing"]
    return f"{', '.join(first)} {last} {end}" if first else end


def spoken(libraries: Sequence[str]) -> str:
    """Names of libraries in a sentence."""
    return listed([NAMES.get(x, x) for x in libraries], "and")


class Fault(Exception):
    """What is wrong with a third party's backend."""


CALLS = ("forward", "backward", "step", "summarize", "unable", "machine", "plan", "empty",
         "automatic", "again_step", "again_forward", "again_backward")  # fmt: skip
KNOWN = {
    "dtypes": ("float16", "bfloat16", "float32", "float64"),
    "operators": OPERATORS,
    "masks": MASKS,
    "conventions": CONVENTIONS,
    "gates": GATES,
    "forms": FORMS,
}


def made(name: str, module: Any, *, guarded: bool = False) -> Backend:
    """Return the backend that a module, or any object with its attributes, describes.

    It has ``CAPABILITIES``, ``forward``, and ``backward`` unless its capabilities have no
    gradients. The rest may be left out: ``step`` is then `forward` of one token, ``unable`` and
    ``machine`` refuse nothing, and it does not ``summarize``.

    Parameters
    ----------
    name : str
        Of the backend.
    module : object
        What has the attributes.
    guarded : bool
        Take what fails in ``unable``, ``plan`` and ``machine``, or is of another type, as a reason.

    Raises
    ------
    Fault
        An attribute is missing or is not what it must be.
    """
    capabilities = _call("CAPABILITIES", getattr, module, "CAPABILITIES", None)
    _check_capabilities(module, capabilities)
    has = {n: _call(n, getattr, module, n, None) for n in CALLS}
    missing = [n for n in CALLS[: 1 + capabilities.gradients] if not callable(has[n])]
    if missing:
        raise Fault(f"its plugin lacks functions that a backend must have: {', '.join(missing)}")
    for n, function in has.items():
        if function is not None and not callable(function):
            raise Fault(f"its plugin's {n} is {function!r}; expected a function, or none")
    has["step"] = has["step"] or functools.partial(_step, has["forward"])
    has["machine"] = has["machine"] or Machine
    has["automatic"] = has["automatic"] or _always
    unable = has.pop("unable")
    if guarded:
        _machine(has["machine"])
        unable = unable and functools.partial(_guarded_unable, unable)
        has["plan"] = has["plan"] and functools.partial(_guarded_plan, has["plan"])
        has["machine"] = functools.partial(_guarded_machine, has["machine"])

    def refused(request: Request) -> str | None:
        why = refusal(capabilities, request) or has["machine"]().reason
        return why or (unable and unable(request)) or None

    return Backend(name, capabilities, refused, **has)


def checked(name: str, find: Callable[[], Any]) -> Backend:
    """Return a third party's backend, or one that refuses every request with its fault."""
    try:
        return made(name, _call("import", find), guarded=True)
    except Fault as fault:
        return refusing(name, str(fault))


def refusing(name: str, reason: str) -> Backend:
    """Return a backend that refuses every request with this reason."""

    def never(*args: Any) -> Any:
        raise Fault(reason)

    return Backend(
        name,
        Capabilities((), operators=(), gradients=False),
        refusal=lambda request: reason,
        forward=never,
        backward=never,
        step=never,
        summarize=never,
        machine=lambda: Machine(reason),
        plan=None,
        empty=None,
        automatic=_always,
        again_step=None,
        again_forward=None,
        again_backward=None,
    )


def _step(forward: Callable[..., Any], request: Request, inputs: Any, donate: bool) -> Any:
    o, state, _ = forward(request, inputs)
    return o, state


def _check_capabilities(module: Any, found: Any) -> None:
    if not isinstance(found, Capabilities):
        earlier = any(_call(n, getattr, module, n, None) for n in ("supports", "info"))
        hint = " (supports, info, serves and OPAQUE are now parts of it)" if earlier else ""
        raise Fault(
            f"its plugin's CAPABILITIES is {found!r}; expected hla.contract.Capabilities{hint}"
        )
    for field, value in found._asdict().items():
        if field in ("opaque", "gradients", "packed"):
            good, expected = isinstance(value, bool), "True or False"
        elif field == "native":
            good, expected = isinstance(value, str), "the name of a library"
        elif field == "serves":
            good = _pairs(value)
            expected = 'pairs (library, on an accelerator?) such as (("numpy", False),)'
        else:
            known = KNOWN.get(field)
            good = _words(value) and set(value) <= set(known or value)
            expected = f"a tuple of {', '.join(known) if known else 'str'}"
        if not good:
            raise Fault(f"its plugin's CAPABILITIES has {field} {value!r}; expected {expected}")
    if found.opaque and not found.gradients:
        raise Fault("its plugin is opaque and has no gradients; expected a backward for autograd")


def _words(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, str) for x in value)


def _pairs(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and [*map(type, pair)] == [str, bool] for pair in value
    )


def _call(what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        raise Fault(f"its plugin's {what} failed: {type(error).__name__}: {error}") from error


def _guarded_unable(unable: Callable[[Any], Any], request: Request) -> str | None:
    try:
        why = _call("unable", unable, request)
    except Fault as fault:
        return str(fault)
    if why is None or (isinstance(why, str) and why):
        return why
    return f"its plugin's unable returned {why!r}; expected None or the reason for refusing"


def _guarded_plan(plan: Callable[[Any], Any], request: Request) -> str:
    try:
        how = _call("plan", plan, request)
    except Fault as fault:
        return f"not known: {fault}"
    return how if isinstance(how, str) else f"not known: its plugin's plan returned {how!r}"


def _machine(machine: Callable[[], Any]) -> Machine:
    found = _call("machine", machine)
    if not isinstance(found, Machine):
        raise Fault(f"its plugin's machine returned {found!r}; expected hla.contract.Machine")
    for field, value in found._asdict().items():
        words = field == "dtypes"
        if not (value is None or _words(value) if words else isinstance(value, str)):
            expected = "a tuple of str or None" if words else "a str"
            raise Fault(f"its plugin's machine has {field} {value!r}; expected {expected}")
    return found


def _guarded_machine(machine: Callable[[], Any]) -> Machine:
    try:
        return _machine(machine)
    except Fault as fault:
        return Machine(str(fault))
