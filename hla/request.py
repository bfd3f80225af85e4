"""The door: every argument of the public functions is checked here, before any work is done."""

from __future__ import annotations

import math
import numbers
import operator as operators
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from . import arrays
from .core.adjoint import sum_to
from .core.forms import FORMS
from .core.hla2 import HLA2RidgeState, HLA2State
from .core.namespace import Array, device, library, namespace
from .core.packing import (
    PACKED_OF,
    STATE_OF,
    pack_gradient,
    packed_shape,
    unpack_gradient,
)
from .core.passes import Gate, Shape, broadcast
from .core.programs import CAUSAL, program
from .core.request import Inputs, Request

CHOICES: dict[str, tuple[str, ...]] = {
    "operator": tuple(CAUSAL),
    "mask": ("causal", "prefix", "none"),
    "convention": ("exact", "paper"),
    "form": FORMS,
}


class Layout(NamedTuple):
    """How the caller lays out arrays; takes canonical results back to it."""

    axis: int | None  # token axis of q, negative; None in `step`
    gate_shape: Shape | None  # the caller's log_gate; None where it has no gradient
    decay_shape: Shape | None
    packed: bool = False  # the incoming state, and so the outgoing one
    state_ranks: tuple[int, ...] = ()  # of the incoming state's fields

    def tokens_in(self, x: Array) -> Array:
        """Move the token axis to -2 (`step`: add one)."""
        if self.axis is None:
            return x[..., None, :]
        return x if self.axis == -2 else namespace(x).moveaxis(x, self.axis, -2)

    def tokens_out(self, x: Array) -> Array:
        """Undo `tokens_in`."""
        if self.axis is None:
            return x[..., 0, :]
        return x if self.axis == -2 else namespace(x).moveaxis(x, -2, self.axis)

    def gate_in(self, gate: Array, tokens: int) -> Array:
        """Move the gate's token axis to -1 and give it its full length."""
        xp = namespace(gate)
        if self.axis is None:
            return gate[..., None]
        missing = max(0, -self.axis - 1 - gate.ndim)
        gate = xp.reshape(gate, (1,) * missing + tuple(gate.shape))
        if self.axis != -2:
            gate = xp.moveaxis(gate, self.axis + 1, -1)
        return xp.broadcast_to(gate, (*gate.shape[:-1], tokens))

    def gate_out(self, grad: Array) -> Array:
        """Gradient of the caller's log_gate from that of the canonical one."""
        assert self.gate_shape is not None
        if self.axis is None:
            return namespace(grad).reshape(grad[..., 0], self.gate_shape)
        if self.axis != -2:
            grad = namespace(grad).moveaxis(grad, -1, self.axis + 1)
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
    axis : int or None
        Token axis; None where there is none (`hla.step`).
    initial_state, return_state, form, chunk_size, convention
        As given to `hla.scan`.
    gradient : bool
        Whether the gradient will be asked, so that a backend keeps what it needs.

    Returns
    -------
    request : Request, inputs : Inputs, layout : Layout
    """
    scale, eps, ridge = (arrays.concrete(x) for x in (scale, eps, ridge))
    q, k, v = (arrays.autocast(x) for x in (q, k, v))
    options = (operator, mask, convention, form, scale, eps, ridge, normalize, return_state)
    key = _key((q, k, v), (*options, axis, chunk_size, gradient))
    known = _known.get(key)
    if known is None:
        _options(*options)
        labels = ("q", "k", "v") if axis is not None else ("q_t", "k_t", "v_t")
        given = dict(zip(labels, (q, k, v), strict=True))
        q, k, v, axis = _arrays(given, axis)
        layout, chunk_size = Layout(axis, None, None), _chunk(chunk_size)
        default = None if mask == "none" else program(operator, mask, convention, ridge, None).state
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
    decay, log_gate, layout = _gate(q, batch, decay, log_gate, layout)
    layout = layout._replace(packed=type(initial_state) in STATE_OF)
    inputs = Inputs(q, k, v, decay, log_gate, None)
    state_name = "state" if axis is None else "initial_state"
    kind = default
    if initial_state is not None:
        kind = _state_type(state_name, initial_state, default, float(ridge))
    given_gate = layout.decay_shape is not None or layout.gate_shape is not None
    gates = (*(None if x is None else x.shape for x in (decay, log_gate)), given_gate)
    tf32 = arrays.tf32_allowed(q)
    whole = None if key is None or arrays.transformed(q) else (key, gates, kind, tf32)
    request = _requests.get(whole)
    if request is None:
        request = describe(
            inputs,
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


def describe(inputs: Inputs, *, state_type: type[Any] | None, **options: Any) -> Request:
    """Describe a call: its options as given, the rest read off its arrays.

    Parameters
    ----------
    inputs : Inputs
        Checked arrays.
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
        device=arrays.device_name(q),
        dtype=arrays.dtype_name(q),
        accelerator=arrays.on_accelerator(q),
        traced=any(arrays.traced(x) for x in (q, k, v)),
        **options,
    )


MOST = 4096
# What the checks of a call found, and its request, by all that they look at except values.
_known: dict[Any, tuple[Layout, Shape, int | None, type[Any] | None]] = {}
_requests: dict[Any, Request] = {}


def _key(given: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Return what the checks see of a call; None for arrays whose device is no plain attribute.

    Types too: as a key True is 1, and here it is no number.
    """
    if any(library(x) != "torch" and type(x) is not np.ndarray for x in given):
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
            raise ValueError(f"{name} is {value}; expected a number >= 0")
    if ridge and operator != "hla2":
        raise ValueError(f"ridge is {ridge} with operator={operator!r}; only 'hla2' has a ridge")
    for name, flag in (("normalize", normalize), ("return_state", return_state)):
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name} is {kind_of(flag)}; expected True or False")
    if return_state and mask == "none":
        raise ValueError("return_state=True with mask='none', which has no state; pass False")


def _choice(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in CHOICES[name]:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(CHOICES[name])}")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _number(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} is {kind_of(value)}; expected a Python number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number")


def _chunk(value: Any) -> int | None:
    if value is None:
        return None
    try:
        size = operators.index(value)
    except TypeError:
        raise TypeError(
            f"chunk_size is {kind_of(value)}; expected an integer >= 1 or None"
        ) from None
    if isinstance(value, bool) or size < 1:
        raise ValueError(f"chunk_size is {value}; expected an integer >= 1 or None")
    return size


def kind_of(value: Any) -> str:
    """Describe what came in place of an array or a number."""
    return (
        f"{value!r} ({type(value).__name__})"
        if np.isscalar(value) or value is None
        else f"a {type(value).__module__}.{type(value).__name__}"
    )


def array(name: str, x: Any, like: Array | None = None, like_name: str = "q") -> Array:
    """Check that ``x`` is an array of one library and device with ``like``."""
    found = library(x)
    if found is None:
        raise TypeError(
            f"{name} is {kind_of(x)}; expected an array of NumPy, torch, JAX, CuPy or another"
            " library of the Array API standard. Dask and masked arrays: compute or fill them first"
        )
    if like is not None:
        expected = library(like)
        if found != expected:
            raise TypeError(
                f"{name} is an array of {found}; expected {expected} like {like_name}. Convert it"
            )
        if not arrays.same_device(x, like):
            raise ValueError(
                f"{name} is on device {arrays.device_name(x)}; expected"
                f" {arrays.device_name(like)} like {like_name}. Move it first"
            )
    return np.asarray(x) if found == "numpy" else x


def _arrays(given: dict[str, Any], axis: int | None) -> tuple[Array, Array, Array, int | None]:
    """Check kind, dtype, device and the token axis of q, k and v."""
    first, *_ = given
    for name, x in given.items():
        given[name] = array(name, x, None if name == first else given[first], first)
    for name, x in given.items():
        if arrays.dtype_name(x) not in arrays.FLOATS:
            raise TypeError(
                f"{name} has dtype {x.dtype}; expected one of {', '.join(arrays.FLOATS)}."
                " Cast it first"
            )
        expected = given[first].dtype
        if x.dtype != expected:
            raise TypeError(
                f"{name} has dtype {x.dtype}; expected {expected} like {first}. Cast it"
            )
    q, k, v = given.values()
    lowest = 1
    if axis is not None:
        try:
            axis = operators.index(axis)
        except TypeError:
            raise TypeError(f"axis is {kind_of(axis)}; expected an integer") from None
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
    batches = {}
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
        batches[name] = tuple(n for i, n in enumerate(shape) if i - len(shape) not in places)
        try:
            batch = broadcast(*batches.values())
        except ValueError:
            raise ValueError(
                f"{name} has shape {shape}; expected batch axes that broadcast with those of"
                f" {first} of shape {tuple(q.shape)}{hint}"
            ) from None
    return batch


def _gate(
    q: Array, batch: Shape, decay: Any, log_gate: Any, layout: Layout
) -> tuple[Array | None, Array | None, Layout]:
    """Check the decay or the log gate and bring it to the accumulation dtype."""
    if decay is not None and log_gate is not None:
        raise ValueError("decay and log_gate were both given; expected one (log_gate = log(decay))")
    decay, log_gate = arrays.concrete(decay), arrays.concrete(log_gate)
    xp, like = namespace(q), {"device": device(q)}
    dtype = xp.float64 if arrays.dtype_name(q) == "float64" else xp.float32
    if decay is not None:
        if _is_number(decay):
            if not 0 < decay <= 1:
                raise ValueError(f"decay is {decay}; expected a number in (0, 1]")
            constant = None if decay == 1 else xp.full((), float(decay), dtype=dtype, **like)
            return constant, None, layout
        decay = array("decay", decay, q)
        if arrays.dtype_name(decay) not in ("float32", "float64"):
            raise TypeError(
                f"decay has dtype {decay.dtype}; expected float32 or float64 (bfloat16(0.999) is 1)"
            )
        _broadcasts("decay", decay.shape, batch, "the batch shape of q, k and v")
        values = arrays.host_values(decay)
        if values is not None and not ((values > 0) & (values <= 1)).all():
            wrong = values[~((values > 0) & (values <= 1))].flat[0]
            raise ValueError(f"decay holds {wrong}; expected values in (0, 1]")
        layout = layout._replace(decay_shape=tuple(decay.shape))
        return xp.astype(decay, dtype, copy=False), None, layout
    if log_gate is None:
        return None, None, layout
    tokens = q.shape[-2]
    if _is_number(log_gate):
        if not log_gate <= 0:
            raise ValueError(f"log_gate is {log_gate}; expected a number <= 0 (-inf forgets)")
        gate = xp.full((), float(log_gate), dtype=dtype, **like)
        return None, layout.gate_in(gate, tokens), layout
    log_gate = array("log_gate", log_gate, q)
    if arrays.dtype_name(log_gate) not in arrays.FLOATS:
        raise TypeError(f"log_gate has dtype {log_gate.dtype}; expected a floating dtype. Cast it")
    full = batch if layout.axis is None else _with_tokens(batch, tokens, layout.axis)
    _broadcasts("log_gate", log_gate.shape, full, "q without its feature axis")
    values = arrays.host_values(log_gate)
    if values is not None and not (values <= 0).all():
        raise ValueError(
            f"log_gate holds {values[~(values <= 0)].flat[0]}; expected values <= 0 (-inf forgets)"
        )
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


def _state_type(name: str, state: Any, default: type[Any] | None, ridge: float) -> type[Any]:
    """Check that a state, packed or not, is of the request's kind; return its type unpacked."""
    assert default is not None
    accepted = (HLA2State, HLA2RidgeState) if default in (HLA2State, HLA2RidgeState) else (default,)
    if not hasattr(state, "_fields"):
        raise TypeError(
            f"{name} is {kind_of(state)}; expected {default.__name__}, packed or not, or None. Of"
            f" saved arrays make one: hla.states.{default.__name__}(**fields)"
        )
    kind: type[Any] = STATE_OF.get(type(state), type(state))
    if kind not in accepted:
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
            x = array(label, x, q)
        except TypeError as error:
            raise ValueError(str(error)) from None
        kind = arrays.dtype_name(x)
        if kind not in arrays.FLOATS:
            raise TypeError(f"{label} has dtype {x.dtype}; expected {request.accumulate}. Cast it")
        if kind == "float64" and request.accumulate != "float64":
            raise ValueError(
                f"{label} has dtype {x.dtype}; expected {request.accumulate} or lower. Cast it"
            )
        full = packed_shape(shape) if packed and field == "S" else shape
        extra = max(0, x.ndim - len(full))
        if all(n == 1 for n in x.shape[:extra]):  # as a segment's field has them
            x = xp.reshape(x, x.shape[extra:]) if extra else x
        _broadcasts(label, x.shape, full, "its shape in this call")
        fields[field] = xp.astype(x, dtype, copy=False)
    given = type(state)(**fields)
    return given.unpack() if packed else given


def cotangents(
    request: Request, inputs: Inputs, layout: Layout, shape: Shape, do: Any, dstate: Any
) -> tuple[Array | None, Any]:
    """Check the gradients of o, of the given shape, and of the state; return them canonical."""
    q = inputs.q
    if do is not None:
        do = layout.tokens_in(_cotangent("do", do, q, tuple(shape), "o"))
    if dstate is None:
        return do, None
    if not request.return_state or request.state_type is None:
        raise ValueError(
            "dstate was given, but no state was returned; pass None, or hla.vjp return_state=True"
        )
    kind = request.state_type
    expected = PACKED_OF[kind] if layout.packed else kind
    if type(dstate) is not expected:
        raise (ValueError if hasattr(dstate, "_fields") else TypeError)(
            f"dstate is {kind_of(dstate)}; expected {expected.__name__} like the returned state."
            " A field without a gradient may be None"
        )
    xp, fields = namespace(q), {}
    dtype = getattr(xp, request.accumulate)
    for field, full in request.state_shapes().items():
        if layout.packed and field == "S":
            full = packed_shape(full)
        x = getattr(dstate, field)
        if x is None:
            fields[field] = xp.zeros(full, dtype=dtype, device=device(q))
        else:
            x = _cotangent(f"dstate.{field}", x, q, full, f"state.{field}")
            fields[field] = xp.astype(x, dtype, copy=False)
    given = any(x is not None for x in dstate)
    return do, layout.dstate_in(expected(**fields)) if given else None


def _cotangent(name: str, x: Any, q: Array, shape: Shape, like: str) -> Array:
    """Check that ``x`` can be the gradient of an output."""
    x = array(name, x, q)
    if arrays.dtype_name(x) not in arrays.FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected a floating dtype like {like}. Cast it"
        )
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected {shape} like {like}. Broadcast or sum it"
        )
    return x
