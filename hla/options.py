"""Every option of the public functions, declared once: its name, type, default and check."""

from __future__ import annotations

import inspect
import math
import numbers
import operator as operators
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    TypeGuard,
    TypeVar,
    get_args,
    get_type_hints,
)

import numpy as np

from .errors import kind_of

Operator = Literal["linear", "hla2", "ahla", "hla3"]
Mask = Literal["causal", "prefix", "none"]
Convention = Literal["exact", "paper"]
Form = Literal["chunked", "recurrent", "associative", "dense"]
BackendName = Literal["numpy", "triton", "array_api", "pallas", "cupy", "numba"]
Backends = BackendName | str | Sequence[BackendName | str] | None  # str: those of third parties

OPERATORS: tuple[str, ...] = get_args(Operator)
MASKS: tuple[str, ...] = get_args(Mask)
CONVENTIONS: tuple[str, ...] = get_args(Convention)
FORMS: tuple[str, ...] = get_args(Form)

Check = Callable[[str, Any], Any]


def _elsewhere(name: str, value: Any) -> Any:
    return value


class Option(NamedTuple):
    """The default of an option, and the check that returns its value in one type."""

    default: Any
    check: Check = _elsewhere


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number and no array and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def integer(value: Any) -> int | None:
    """Return a value as an int; None where it is none."""
    try:
        return None if isinstance(value, (bool, np.bool_)) else operators.index(value)
    except TypeError:
        return None


def flag(name: str, value: Any) -> bool:
    """Check that an argument is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {kind_of(value)}; expected True or False")
    return bool(value)


def one_of(choices: Sequence[str]) -> Check:
    """Return the check of an option that has names for values."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} is {kind_of(value)}; expected one of {', '.join(choices)}")
        return value

    return check


def _number(usual: str, *, negative: bool) -> Check:
    def check(name: str, value: Any) -> float:
        if not is_number(value):
            raise TypeError(f"{name} is {kind_of(value)}; expected a Python number. {usual}")
        if not _finite(value):
            raise ValueError(f"{name} is {value}; expected a finite number. {usual}")
        if value < 0 and not negative:
            raise ValueError(f"{name} is {value}; expected a number >= 0. {usual}")
        return float(value)

    return check


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number or fraction beyond every float
        return False


def _axis(name: str, value: Any) -> int:
    whole = integer(value)
    if whole is None:
        raise TypeError(f"{name} is {kind_of(value)}; expected an integer, such as -2 or -3")
    return whole


def _size(name: str, value: Any) -> int | None:
    if value is None:
        return None
    size = integer(value)
    if size is None and not isinstance(value, bool):
        raise TypeError(f"{name} is {kind_of(value)}; expected an integer >= 1 or None")
    if size is None or size < 1:
        raise ValueError(f"{name} is {value}; expected an integer >= 1 or None")
    return size


def _form(name: str, value: Any) -> str | None:
    return None if value is None else one_of(FORMS)(name, value)


class _Sums(TypedDict, total=False):
    operator: Annotated[Operator, Option("hla2", one_of(OPERATORS))]
    mask: Annotated[Mask, Option("causal", one_of(MASKS))]
    decay: Annotated[Any, Option(None)]  # with the arrays
    log_gate: Annotated[Any, Option(None)]  # with the arrays
    scale: Annotated[
        float,
        Option(
            1.0,
            _number(
                "1.0 is the paper's, q.shape[-1] ** -0.5 usual; multiply q itself by an array",
                negative=True,
            ),
        ),
    ]


class _Reading(TypedDict, total=False):
    normalize: Annotated[bool, Option(False, flag)]
    eps: Annotated[
        float, Option(1e-6, _number("1e-6 is the default, 0.0 adds nothing", negative=False))
    ]
    ridge: Annotated[float, Option(0.0, _number("0.0 is none", negative=False))]


class _Axis(TypedDict, total=False):
    axis: Annotated[int, Option(-2, _axis)]


class _Start(TypedDict, total=False):
    initial_state: Annotated[Any, Option(None)]  # with the arrays


class _End(TypedDict, total=False):
    return_state: Annotated[bool, Option(False, flag)]


class _Form(TypedDict, total=False):
    form: Annotated[Form | None, Option(None, _form)]
    chunk_size: Annotated[int | None, Option(None, _size)]


class _Convention(TypedDict, total=False):
    convention: Annotated[Convention, Option("exact", one_of(CONVENTIONS))]


class _Backend(TypedDict, total=False):
    backend: Annotated[Backends, Option(None)]  # in dispatch


class _Donate(TypedDict, total=False):
    donate: Annotated[bool, Option(False, flag)]


class ScanOptions(_Sums, _Reading, _Axis, _Start, _Form, _Convention, _Backend, total=False):
    """Options of `hla.scan` and `hla.vjp`, but for return_state, on which their types depend."""


class AllScanOptions(
    _Sums, _Reading, _Axis, _Start, _End, _Form, _Convention, _Backend, total=False
):
    """Options of `hla.scan`, `hla.vjp` and `hla.explain`, in the order of their signature."""


class StepOptions(_Sums, _Reading, _Convention, _Backend, _Donate, total=False):
    """Options of `hla.step`."""


class SegmentOptions(_Sums, _Axis, _Backend, total=False):
    """Options of `hla.summarize`."""


def declared(kind: Any) -> dict[str, Option]:
    """Return the options of a TypedDict in its order."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a TypedDict's options."""
    return {name: option.default for name, option in declared(kind).items()}


OPTIONS = declared(AllScanOptions) | declared(StepOptions)
DEFAULTS = defaults(AllScanOptions)


def filled(function: str, defaults: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a call, in the order of the defaults."""
    options = {**defaults, **given}
    if len(options) != len(defaults):
        name = next(name for name in given if name not in defaults)
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return options


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options that are no arrays, each by itself and together; return their values."""
    found = {name: OPTIONS[name].check(name, value) for name, value in options.items()}
    ridge, operator = found.get("ridge"), found["operator"]
    if ridge and operator != "hla2":
        raise ValueError(
            f"ridge is {ridge} with operator={operator!r}; only 'hla2' has a ridge. Pass 0"
        )
    if found.get("return_state") and found["mask"] == "none":
        raise ValueError("return_state=True with mask='none', which has no state; pass False")
    return found


def ordered(mask: Any, what: str) -> None:
    """Check that a mask has what only an order of tokens gives."""
    if isinstance(mask, str) and mask == "none":
        raise ValueError(f"mask is 'none', which has no {what}; expected 'causal' or 'prefix'")


F = TypeVar("F", bound=Callable[..., Any])


def signed(kind: Any) -> Callable[[F], F]:
    """Give a function of ``**options`` the signature that they have by name."""
    hints, options = get_type_hints(kind), declared(kind)

    def sign(function: F) -> F:
        own = inspect.signature(function)
        *given, _ = own.parameters.values()
        named = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=hints[name],
            )
            for name, option in options.items()
        ]
        function.__signature__ = own.replace(parameters=[*given, *named])  # type: ignore[attr-defined]
        return function

    return sign
