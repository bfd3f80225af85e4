"""Every argument of the public functions is checked here, before any work is done."""

from __future__ import annotations

import math
import numbers
import operator as operators
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from .core.adjoint import sum_to
from .core.hla2 import HLA2RidgeState, HLA2State
from .core.namespace import Array, device, library, moveaxis, namespace, underflow
from .core.passes import Gate, Shape, broadcast
from .core.programs import CAUSAL, program
from .core.reference import FORMS
from .core.request import Inputs, Request
from .core.triangle import STATE_OF, pack_gradient, packed_shape, unpack_gradient
from .errors import kind_of
from .libraries import facts

CHOICES: dict[str, tuple[str, ...]] = {
    "operator": tuple(CAUSAL),
    "mask": ("causal", "prefix", "none"),
    "convention": ("exact", "paper"),
    "form": FORMS,
}


# A log gate below is as -inf: its exponential is 0 in every dtype, and sums of it could overflow.
FORGETS = -1e4


VANISHES = (
    "which is 0 in float32, the dtype of sums here; expected values in (0, 1] there. A log_gate"
    " of -inf forgets every token before; float64 arrays keep float64"
)


class Layout(NamedTuple):
    """How the caller lays out arrays; takes canonical results back to it."""

    axis: int | None  # token axis of q, negative; None in `step`
    gate_shape: Shape | None  # the caller's log_gate; None where it has no gradient
    decay_shape: Shape | None
    packed: bool = False  # the incoming state, and so the outgoing one
    state_ranks: tuple[int, ...] = ()  # of the incoming state's fields

    @property
    def names(self) -> tuple[str, str, str]:
        """What the caller calls q, k and v."""
        return ("q", "k", "v") if self.axis is not None else ("q_t", "k_t", "v_t")

    def tokens_in(self, x: Array) -> Array:
        """Move the token axis to -2 (`step`: add one)."""
        if self.axis is None:
            return x[..., None, :]
        return x if self.axis == -2 else moveaxis(x, self.axis, -2)

    def tokens_out(self, x: Array) -> Array:
        """Undo `tokens_in`."""
        if self.axis is None:
            return x[..., 0, :]
        return x if self.axis == -2 else moveaxis(x, -2, self.axis)

    def gate_in(self, gate: Array, tokens: int) -> Array:
        """Move the gate's token axis to -1 and give it its full length."""
        xp = namespace(gate)
        if self.axis is None:
            return gate[..., None]
        missing = max(0, -self.axis - 1 - gate.ndim)
        gate = xp.reshape(gate, (1,) * missing + tuple(gate.shape))
        if self.axis != -2:
            gate = moveaxis(gate, self.axis + 1, -1)
        return xp.broadcast_to(gate, (*gate.shape[:-1], tokens))

    def gate_out(self, grad: Array) -> Array:
        """Gradient of the caller's log_gate from that of the canonical one."""
        assert self.gate_shape is not None
        if self.axis is None:
            return namespace(grad).reshape(grad[..., 0], self.gate_shape)
        if self.axis != -2:
            grad = moveaxis(grad, -1, self.axis + 1)
        lead = (1,) * (grad.ndim - len(self.gate_shape))
        return namespace(grad).reshape(sum_to(grad, (*lead, *self.gate_shape)), self.gate_shape)

    def state_out(self, state: Any) -> Any:
        """Return a state in the type in which the caller gave one."""
        return state.pack() if self.packed and state is not None else state

    def dstate_in(self, grad: Any) -> Any:
        """Gradient of the outgoing state from that of what `state_out` made of it."""
        return unpack_gradient(grad) if self.packed and grad is not None else grad

    def dstate_out(self, grad: Any) -> Any:
        """Gradient of the incoming state as the caller gave it."""
        if grad is None:
            return None
        grad = pack_gradient(grad) if self.packed else grad
        fields = (
            namespace(x).reshape(x, (*(1,) * (rank - x.ndim), *x.shape)) if rank > x.ndim else x
            for x, rank in zip(grad, self.state_ranks, strict=True)
        )
        return type(grad)(*fields)


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    operator: str,
    mask: str,
    decay: Any,
    log_gate: Any,
    scale: float,
    normalize: bool = False,
    eps: float = 1e-6,
    ridge: float = 0.0,
    axis: int | None = -2,
    one_token: bool = False,
    initial_state: Any = None,
    return_state: bool = False,
    form: str | None = None,
    chunk_size: int | None = None,
    convention: str = "exact",
    gradient: bool = False,
) -> tuple[Request, Inputs, Layout]:
    """Check every argument and describe the call.

    Parameters
    ----------
    q, k, v, operator, mask, decay, log_gate, scale, normalize, eps, ridge
        As given to `hla.scan`.
    axis : int
        Token axis.
    one_token : bool
        Whether there is no token axis (`hla.step`).
    initial_state, return_state, form, chunk_size, convention
        As given to `hla.scan`.
    gradient : bool
        Whether the gradient will be asked, so that a backend keeps what it needs.

    Returns
    -------
    request : Request, inputs : Inputs, layout : Layout
    """
    if axis is None:
        raise TypeError("axis is None; expected an integer, such as -2 or -3")
    axis = None if one_token else axis
    scale, eps, ridge = (facts.concrete(x) for x in (scale, eps, ridge))
    q, k, v = (facts.autocast(facts.in_memory(x)) for x in (q, k, v))
    options = (operator, mask, convention, form, scale, eps, ridge, normalize, return_state)
    key = _key((q, k, v), (*options, axis, chunk_size, gradient))
    known = _known.get(key)
    if known is None:
        _options(*options)
        given = dict(zip(Layout(axis, None, None).names, (q, k, v), strict=True))
        q, k, v, axis = _arrays(given, axis)
        layout, chunk_size = Layout(axis, None, None), _chunk(chunk_size)
        default = (
            None if mask == "none" else program(operator, mask, convention, bool(ridge), None).state
        )
        known = _remember(_known, key, (layout, _shapes(given, layout), chunk_size, default))
    layout, batch, chunk_size, default = known
    if mask == "none":
        ordered = {"decay": decay, "log_gate": log_gate, "initial_state": initial_state}
        for name, x in ordered.items():
            if x is not None:
                raise ValueError(
                    f"{name} was given with mask='none', which has no order; pass None"
                )
    q, k, v = (layout.tokens_in(x) for x in (q, k, v))
    with underflow(q):
        decay, log_gate, layout = _gate(q, batch, decay, log_gate, layout)
    layout = layout._replace(packed=type(initial_state) in STATE_OF)
    inputs = Inputs(q, k, v, decay, log_gate, None)
    state_name = "state" if axis is None else "initial_state"
    kind = default
    if initial_state is not None:
        kind = _state_type(state_name, initial_state, default, float(ridge))
    given_gate = layout.decay_shape is not None or layout.gate_shape is not None
    gates = (*(None if x is None else x.shape for x in (decay, log_gate)), given_gate)
    others = [x for x in (decay, log_gate, *(initial_state or ())) if library(x)]
    tf32 = facts.tf32_allowed(q)
    types = tuple(map(type, others))
    whole = None if key is None or facts.transformed(q) else (key, gates, kind, types, tf32)
    request = _requests.get(whole)
    if request is None:
        request = describe(
            inputs,
            others,
            operator=operator,
            mask=mask,
            convention=convention,
            normalize=bool(normalize),
            eps=float(eps),
            scale=float(scale),
            ridge=float(ridge),
            return_state=bool(return_state),
            gradient=gradient,
            form=form,
            chunk_size=chunk_size,
            gate_given=given_gate,
            state_type=kind,
            tf32=tf32,
        )
        _remember(_requests, whole, request)
    if initial_state is not None:
        state = _state(state_name, request, q, initial_state)
        layout = layout._replace(state_ranks=tuple(x.ndim for x in initial_state))
        inputs = inputs._replace(state=state)
    return request, inputs, layout


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
        The fields of Request that no array shows.
    """
    q, k, v, decay, log_gate, _ = inputs
    kinds = {"decay": decay, "log_gate": log_gate}
    return Request(
        q_shape=tuple(q.shape),
        k_shape=tuple(k.shape),
        v_shape=tuple(v.shape),
        gate=next((name for name, x in kinds.items() if x is not None), None),
        gate_batch=Gate(decay, log_gate).batch,
        state_type=state_type,
        library=library(q) or "",
        device=facts.device_name(q),
        dtype=facts.dtype_name(q),
        accelerator=facts.on_accelerator(q),
        traced=any(facts.traced(x) for x in (q, k, v, *others)),
        **options,
    )


USUAL = {
    "scale": "1.0 is the paper's, q.shape[-1] ** -0.5 usual; multiply q itself by an array",
    "eps": "1e-6 is the default, 0.0 adds nothing",
    "ridge": "0.0 is none",
}

MOST = 4096
# What the checks of a call found, and its request, by all that they look at except values.
_known: dict[Any, tuple[Layout, Shape, int | None, type[Any] | None]] = {}
_requests: dict[Any, Request] = {}


def _key(given: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Return what the checks see of a call; None for arrays whose device is no plain attribute.

    Types too: as a key True is 1, and here it is no number.
    """
    if any(
        (library(x) != "torch" and type(x) is not np.ndarray) or facts.irregular(x) for x in given
    ):
        return None
    key = (
        *((type(x), x.shape, x.dtype, x.device) for x in given),
        options,
        tuple(map(type, options)),
    )
    try:
        hash(key)
    except TypeError:  # a symbol of torch's compiler, or an argument that is refused below
        return None
    return key


def _remember(table: dict[Any, Any], key: Any, value: Any) -> Any:
    if key is not None:
        if len(table) >= MOST:
            table.clear()
        table[key] = value
    return value


def _options(
    operator: Any,
    mask: Any,
    convention: Any,
    form: Any,
    scale: Any,
    eps: Any,
    ridge: Any,
    normalize: Any,
    return_state: Any,
) -> None:
    """Check the arguments that are no arrays."""
    for name, choice in (("operator", operator), ("mask", mask), ("convention", convention)):
        _choice(name, choice)
    if form is not None:
        _choice("form", form)
    for name, value in (("scale", scale), ("eps", eps), ("ridge", ridge)):
        _number(name, value)
        if value < 0 and name != "scale":
            raise ValueError(f"{name} is {value}; expected a number >= 0. {USUAL[name]}")
    if ridge and operator != "hla2":
        raise ValueError(
            f"ridge is {ridge} with operator={operator!r}; only 'hla2' has a ridge. Pass 0"
        )
    for name, value in (("normalize", normalize), ("return_state", return_state)):
        flag(name, value)
    if return_state and mask == "none":
        raise ValueError("return_state=True with mask='none', which has no state; pass False")


def flag(name: str, value: Any) -> None:
    """Check that an argument is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {kind_of(value)}; expected True or False")


def ordered(mask: Any, what: str) -> None:
    """Check that a mask has what only an order of tokens gives."""
    if isinstance(mask, str) and mask == "none":
        raise ValueError(f"mask is 'none', which has no {what}; expected 'causal' or 'prefix'")


def _choice(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in CHOICES[name]:
        raise ValueError(f"{name} is {kind_of(value)}; expected one of {', '.join(CHOICES[name])}")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _number(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} is {kind_of(value)}; expected a Python number. {USUAL[name]}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number. {USUAL[name]}")


def _chunk(value: Any) -> int | None:
    if value is None:
        return None
    size = _integer(value)
    if size is None and not isinstance(value, bool):
        raise TypeError(f"chunk_size is {kind_of(value)}; expected an integer >= 1 or None")
    if size is None or size < 1:
        raise ValueError(f"chunk_size is {value}; expected an integer >= 1 or None")
    return size


def _integer(value: Any) -> int | None:
    """Return ``value`` as an int; None where it is none."""
    try:
        return None if isinstance(value, (bool, np.bool_)) else operators.index(value)
    except TypeError:
        return None


def array(
    name: str, x: Any, like: Array | None = None, like_name: str = "q", *, number: str = ""
) -> Array:
    """Check that ``x`` is an array of one library and device with ``like``, plain in memory.

    ``number`` says what else would have done.
    """
    found = library(x)
    if found is None:
        raise TypeError(
            f"{name} is {kind_of(x)}; expected {number}an array of NumPy, torch, JAX, CuPy or"
            " another library of the Array API standard. Convert lists; compute Dask arrays, make"
            " sparse ones dense, fill masked ones"
        )
    irregular = facts.irregular(x)
    if irregular is not None:
        what, remedy = irregular
        raise TypeError(f"{name} {what}; expected a plain array. Convert it: {remedy}")
    if like is not None:
        expected = library(like)
        if found != expected:
            raise TypeError(
                f"{name} is an array of {found}; expected {expected} like {like_name}. Convert it"
            )
        if not facts.same_device(x, like):
            raise ValueError(
                f"{name} is on device {facts.device_name(x)}; expected"
                f" {facts.device_name(like)} like {like_name}. Move it first"
            )
    return np.asarray(x) if found == "numpy" else facts.in_memory(x)


def floating(name: str, x: Array) -> Array:
    """Check that an array has a dtype that is computed with."""
    if facts.dtype_name(x) not in facts.FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected one of {', '.join(facts.FLOATS)}. Cast it"
        )
    return x


def _arrays(given: dict[str, Any], axis: int | None) -> tuple[Array, Array, Array, int | None]:
    """Check kind, dtype, device and the token axis of q, k and v."""
    first, *_ = given
    for name, x in given.items():
        given[name] = array(name, x, None if name == first else given[first], first)
    for name, x in given.items():
        floating(name, x)
        expected = given[first].dtype
        if x.dtype != expected:
            raise TypeError(
                f"{name} has dtype {x.dtype}; expected {expected} like {first}. Cast it"
            )
    q, k, v = given.values()
    lowest = 1
    if axis is not None:
        whole = _integer(axis)
        if whole is None:
            raise TypeError(f"axis is {kind_of(axis)}; expected an integer, such as -2 or -3")
        axis = whole
        negative = axis if axis < 0 else axis - q.ndim
        if q.ndim >= 2 and not -q.ndim <= negative <= -2:
            raise ValueError(
                f"axis is {axis} for q of shape {tuple(q.shape)}; expected the token axis, from"
                f" {-q.ndim} to -2 (the feature axis is last)"
            )
        axis, lowest = negative, max(2, -negative)
    for name, x in given.items():
        if x.ndim < lowest:
            layout = "(*batch, D)" if axis is None else "(*batch, T, D)"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected at least {lowest} axes, {layout}"
            )
    return q, k, v, axis


def _shapes(given: dict[str, Array], layout: Layout) -> Shape:
    """Check widths, lengths and batch axes as the caller sees them; return the batch shape."""
    axis, (first, second, _) = layout.axis, given
    q = given[first]
    hint = "" if axis is None else f". Is the token axis {axis}? Pass axis="
    places = {-1, axis} - {None}
    batches: dict[str, Shape] = {}
    batch: Shape = ()
    for name, x in given.items():
        shape = tuple(x.shape)
        wrong = name == second and shape[-1] != q.shape[-1]
        if wrong or (axis is not None and shape[axis] != q.shape[axis]):
            expected = list(shape)
            if axis is not None:
                expected[axis] = q.shape[axis]
            if name == second:
                expected[-1] = q.shape[-1]
            raise ValueError(
                f"{name} has shape {shape}; expected {tuple(expected)} to go with {first} of shape"
                f" {tuple(q.shape)}{hint}"
            )
        others = " and ".join(batches)
        batches[name] = tuple(n for i, n in enumerate(shape) if i - len(shape) not in places)
        try:
            batch = broadcast(*batches.values())
        except ValueError:
            heads = _grouped(given, name, axis)
            raise ValueError(
                f"{name} has shape {shape}; expected batch axes that broadcast (equal sizes or 1)"
                f" with {batch} of {others}{heads or hint}"
            ) from None
    return batch


def _grouped(given: dict[str, Array], name: str, axis: int | None) -> str:
    """Tell how groups of heads are laid out, where two numbers of heads call for it; or ""."""
    first, second, third = given
    q, x = tuple(given[first].shape), tuple(given[name].shape)
    places = [i for i in range(-min(len(q), len(x)), -1) if i != axis]
    unequal = [i for i in places if q[i] != x[i] and 1 not in (q[i], x[i])]
    if len(unequal) != 1:
        return ""
    (i,) = unequal
    few, many = sorted((q[i], x[i]))
    if few == 0 or many % few:
        return ""

    def split(shape: Shape) -> Shape:
        place = len(shape) + i
        return (*shape[:place], few, shape[place] // few, *shape[place + 1 :])

    alike = f" ({third} alike)" if name == second else ""
    moved = "" if axis is None or i < axis else f", and axis={axis - 1}"
    return f". For groups of heads give {first} as {split(q)}, {name} as {split(x)}{alike}{moved}"


def _gate(
    q: Array, batch: Shape, decay: Any, log_gate: Any, layout: Layout
) -> tuple[Array | None, Array | None, Layout]:
    """Check the decay or the log gate and bring it to the accumulation dtype."""
    if decay is not None and log_gate is not None:
        raise ValueError("decay and log_gate were both given; expected one (log_gate = log(decay))")
    decay, log_gate = facts.concrete(decay), facts.concrete(log_gate)
    xp, like = namespace(q), {"device": device(q)}
    wide = facts.dtype_name(q) == "float64"
    dtype, least = (xp.float64, 0.0) if wide else (xp.float32, 2.0**-150)  # rounded to 0 by float32
    if decay is not None:
        if _is_number(decay):
            if not 0 < decay <= 1:
                raise ValueError(f"decay is {decay}; expected a number in (0, 1]. None is no decay")
            if decay <= least:
                raise ValueError(f"decay is {decay}, {VANISHES}")
            constant = None if decay == 1 else xp.full((), float(decay), dtype=dtype, **like)
            return constant, None, layout
        decay = array("decay", decay, q, layout.names[0], number="a number in (0, 1] or ")
        if facts.dtype_name(decay) not in ("float32", "float64"):
            raise TypeError(
                f"decay has dtype {decay.dtype}; expected float32 or float64, made so and not cast"
                " from less (bfloat16(0.999) is 1)"
            )
        what = f"the batch shape of {', '.join(layout.names)}. A decay of each token is a log_gate"
        _broadcasts("decay", decay.shape, batch, what)
        values = facts.host_values(decay)
        if values is not None and not ((values > 0) & (values <= 1)).all():
            wrong = values[~((values > 0) & (values <= 1))].flat[0]
            raise ValueError(f"decay holds {wrong}; expected values in (0, 1]. Clip it")
        if values is not None and (values <= least).any():
            raise ValueError(f"decay holds {values[values <= least].flat[0]}, {VANISHES}")
        layout = layout._replace(decay_shape=tuple(decay.shape))
        return xp.astype(decay, dtype, copy=False), None, layout
    if log_gate is None:
        return None, None, layout
    tokens = q.shape[-2]
    if _is_number(log_gate):
        if not log_gate <= 0:
            raise ValueError(
                f"log_gate is {log_gate}; expected a number <= 0 (-inf forgets). It is log(decay)"
            )
        value = float(log_gate) if log_gate >= FORGETS else -math.inf
        gate = xp.full((), value, dtype=dtype, **like)
        return None, layout.gate_in(gate, tokens), layout
    log_gate = array("log_gate", log_gate, q, layout.names[0], number="a number <= 0 or ")
    floating("log_gate", log_gate)
    full = batch if layout.axis is None else _with_tokens(batch, tokens, layout.axis)
    what = f"{layout.names[0]} without its features. It has one number for all of them"
    _broadcasts("log_gate", log_gate.shape, full, what)
    values = facts.host_values(log_gate)
    if values is not None and not (values <= 0).all():
        raise ValueError(
            f"log_gate holds {values[~(values <= 0)].flat[0]}; expected values <= 0 (-inf forgets)."
            " They are logarithms of decays: -softplus(x), not sigmoid(x)"
        )
    if values is not None and ((values < FORGETS) & (values > -math.inf)).any():
        forgets = xp.full((), -math.inf, dtype=log_gate.dtype, **like)
        log_gate = xp.where(log_gate < FORGETS, forgets, log_gate)
    gate = layout.gate_in(xp.astype(log_gate, dtype, copy=False), tokens)
    return None, gate, layout._replace(gate_shape=tuple(log_gate.shape))


def _with_tokens(batch: Shape, tokens: int, axis: int) -> Shape:
    place = len(batch) + axis + 2
    return (*batch[:place], tokens, *batch[place:])


def _broadcasts(name: str, shape: Shape, to: Shape, what: str) -> None:
    try:
        if broadcast(tuple(shape), to) == to:
            return
    except ValueError:
        pass
    raise ValueError(
        f"{name} has shape {tuple(shape)}; expected a shape that broadcasts to {tuple(to)}, {what}"
    )


def kinds(state_type: type[Any]) -> tuple[type[Any], ...]:
    """Return the types of state that do for one: a ridge reads more of the same state."""
    ridge = (HLA2State, HLA2RidgeState)
    return ridge if state_type in ridge else (state_type,)


def _state_type(name: str, state: Any, default: type[Any] | None, ridge: float) -> type[Any]:
    """Check that a state, packed or not, is of the request's kind; return its type unpacked."""
    assert default is not None
    if not hasattr(state, "_fields"):
        raise TypeError(
            f"{name} is {kind_of(state)}; expected {default.__name__}, packed or not, or None. Of"
            f" saved arrays make one: hla.states.{default.__name__}(**fields)"
        )
    kind: type[Any] = STATE_OF.get(type(state), type(state))
    if kind not in kinds(default):
        raise ValueError(
            f"{name} is {kind_of(state)}; expected {default.__name__}, packed or not, the state of"
            " this operator, mask and convention. Pass those that it was made with"
        )
    if ridge and kind is HLA2State:
        raise ValueError(
            f"{name} is {type(state).__name__}, which lacks the C and m that ridge > 0 reads; start"
            " from a state made with ridge > 0 or from Segment.to_state()"
        )
    return kind


def _state(name: str, request: Request, q: Array, state: Any) -> Any:
    """Check each field of the incoming state, bring it to the accumulation dtype and unpack it."""
    xp, fields, packed = namespace(q), {}, type(state) in STATE_OF
    dtype = getattr(xp, request.accumulate)
    for field, shape in request.state_shapes().items():
        label, x = f"{name}.{field}", getattr(state, field)
        try:
            x = array(label, x, q, "q_t" if name == "state" else "q")
        except TypeError as error:
            raise ValueError(str(error)) from None
        floating(label, x)
        if facts.dtype_name(x) == "float64" and request.accumulate != "float64":
            raise ValueError(
                f"{label} has dtype {x.dtype}; expected {request.accumulate} or lower. Cast it"
            )
        full = packed_shape(shape) if packed and field == "S" else shape
        extra = max(0, x.ndim - len(full))
        if all(n == 1 for n in x.shape[:extra]):  # as a segment's field has them
            x = xp.reshape(x, x.shape[extra:]) if extra else x
        _broadcasts(label, x.shape, full, "its shape here. Keep the heads and widths of its call")
        fields[field] = xp.astype(x, dtype, copy=False)
    given = type(state)(**fields)
    return given.unpack() if packed else given
