"""The public functions: each checks its arguments once and hands one request to a backend."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, Unpack, overload

from . import again, dispatch
from .arguments import prepare
from .arguments.cotangents import cotangents
from .arguments.segments import as_before, stretches
from .core.namespace import Array
from .core.reference import Gradients
from .core.request import Inputs, Request
from .device.token import unpacked
from .dispatch import Explanation, Info
from .errors import Unsupported
from .layout import Layout
from .libraries import NODES, library_of, recording
from .options import (
    DEFAULTS,
    OPTIONS,
    AllScanOptions,
    Backends,
    ScanOptions,
    SegmentOptions,
    StepOptions,
    defaults,
    filled,
    ordered,
    signed,
)
from .states.packed import STATE_OF

A = TypeVar("A")  # an array of any library
S = TypeVar("S")  # a state or segment

STEP, SEGMENT = defaults(StepOptions), defaults(SegmentOptions)


@overload
def scan(
    q: A, k: A, v: A, *, return_state: Literal[False] = ..., **options: Unpack[ScanOptions]
) -> A: ...
@overload
def scan(
    q: A, k: A, v: A, *, return_state: Literal[True], **options: Unpack[ScanOptions]
) -> tuple[A, Any]: ...
@overload
def scan(
    q: A, k: A, v: A, *, return_state: bool, **options: Unpack[ScanOptions]
) -> A | tuple[A, Any]: ...
@signed(AllScanOptions)
def scan(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Higher-order linear attention over a whole sequence.

    Parameters
    ----------
    q, k : array, (*batch, T, D), floating
        Queries and keys, of one library, dtype and device; any strides. Batch axes broadcast: k of
        one head serves every head of q.
    v : array, (*batch, T, V)
        Values.
    operator : {"hla2", "linear", "ahla", "hla3"}
        Which sum (the paper's sections 3, 2.2, 6 and 7).
    mask : {"causal", "prefix", "none"}
        The paper's masked operator, its unmasked streaming form (Eq. 3.1), or bidirectional.
    decay : float or array in (0, 1], optional
        Factor a token on the past; an array broadcasts to batch (per head). float32 or float64.
    log_gate : float or array <= 0, optional
        Instead of decay, its logarithm token by token: (*batch, T) in q's axis order. -inf forgets
        every token before.
    scale : float
        q is multiplied by it in the accumulator; 1/sqrt(D) is usual, 1 is the paper's.
    normalize : bool
        Divide by the same sum with v = 1, plus eps. Meant for non-negative q and k.
    eps : float
        Added to the denominator.
    ridge : float
        The paper's lambda, hla2 only: S + lambda I in place of S.
    axis : int
        Token axis; -3 takes (B, T, H, D).
    initial_state : state, optional
        Continue from a state that `scan`, `step` or ``Segment.to_state()`` returned, packed or not.
    return_state : bool
        Return (o, state).
    form : {None, "chunked", "recurrent", "associative", "dense"}
        How it is computed; all agree to rounding. None is chunked.
    chunk_size : int, optional
        Tokens in a chunk (the paper's w); a hint that changes neither value nor backend.
    convention : {"exact", "paper"}
        "paper" runs the paper's own recurrences where they part from its sums.
    backend : None, str or sequence of str
        None picks by q's library and device; a name runs or raises; names are tried in order.

    Returns
    -------
    o : array, (*batch, T, V)
        In q's layout, library and device and v's dtype; products accumulate in at least float32.
    state : NamedTuple of arrays
        With return_state=True only; float32, or float64 for float64 input. Packed where the given
        one was.

    Raises
    ------
    ValueError
        Shapes, devices or values are wrong.
    TypeError
        Libraries are mixed, or a dtype or kind of argument is wrong.
    Unsupported
        A named backend or form cannot do this request.

    Examples
    --------
    >>> import numpy as np, hla
    >>> q = k = v = np.ones((3, 1))
    >>> hla.scan(q, k, v)[:, 0]
    array([1., 3., 6.])
    """
    if recording():
        return _node("scan")(q, k, v, **filled("scan", DEFAULTS, options))
    call = again.seen("scan", q, k, v, None, options)
    found = call and again.take(call)
    if found is not None:
        return found
    if library_of(q).borrowed:
        return library_of(q).lent(scan, q, k, v, **options)
    return _scan(q, k, v, call=call, **filled("scan", DEFAULTS, options))


def _node(name: str) -> Any:
    # torch's compiler really imports it, and so finds the nodes made
    from .libraries import torch_graph

    return torch_graph.nodes[name]


def _scan(
    q: Array,
    k: Array,
    v: Array,
    backend: Backends,
    *,
    node: bool = False,
    call: again.Seen | None = None,
    **options: Any,
) -> Any:
    request, inputs, layout = prepare(q, k, v, **options)
    chosen = dispatch.choose(request, backend, autograd=True, node=node)
    prepared = getattr(chosen, "again_scan", None)
    if call is not None and prepared is not None and not request.empty:
        way = functools.partial(prepared, request, inputs, layout, call.arrays)
        if again.keep(call, inputs, way, options["decay"], options["log_gate"]):
            return again.take(call)  # the first one too: autograd sees the same in all
    o, state, _ = chosen.forward(request, inputs)
    o = layout.tokens_out(o)
    return (o, layout.state_out(state)) if request.return_state else o


@overload
def step(
    q_t: A, k_t: A, v_t: A, state: None = ..., **options: Unpack[StepOptions]
) -> tuple[A, Any]: ...
@overload
def step(q_t: A, k_t: A, v_t: A, state: S, **options: Unpack[StepOptions]) -> tuple[A, S]: ...
@signed(StepOptions)
def step(q_t: Any, k_t: Any, v_t: Any, state: Any = None, **options: Any) -> Any:
    """Take one token: update the state, then read it.

    Parameters
    ----------
    q_t, k_t : array, (*batch, D)
        One token's query and key.
    v_t : array, (*batch, V)
        Its value.
    state : state, optional
        From `scan`, `step` or ``Segment.to_state()``, packed or not; None starts empty.
    operator, mask, decay, scale, normalize, eps, ridge, convention, backend
        As in `scan`; mask "none" has no steps.
    log_gate : float or array <= 0, optional
        This token's log decay, broadcasts to batch.
    donate : bool
        Let the backend update ``state`` in place; it must then not be used again. NumPy, Numba,
        torch, Triton and CuPy do where every field is whole, of the state's own dtype, and shares
        no memory; for NumPy, Numba and CuPy it must also be contiguous, for NumPy and Numba
        writable, for torch need no gradient. Triton and CuPy take packed states too. Pallas does
        under a trace, if the traced program may: of a carry of ``lax.scan``, or with
        ``donate_argnums`` of ``jax.jit``. Elsewhere it changes nothing, nor where
        ``convention="paper"`` reads the state before the token (hla2, hla3).

    Returns
    -------
    o_t : array, (*batch, V)
    state : NamedTuple of arrays
        Packed where the given one was.

    Raises
    ------
    ValueError, TypeError, Unsupported
        As in `scan`.
    """
    if recording():
        return _node("step")(q_t, k_t, v_t, state, **filled("step", STEP, options))
    call = again.seen("step", q_t, k_t, v_t, state, options)
    found = call and again.take(call)
    if found is not None:
        return found
    if library_of(q_t).borrowed:
        return library_of(q_t).lent(step, q_t, k_t, v_t, state, **options)
    return _step(q_t, k_t, v_t, state, call=call, **filled("step", STEP, options))


def _step(
    q: Array,
    k: Array,
    v: Array,
    state: Any,
    backend: Backends,
    donate: bool,
    call: again.Seen | None = None,
    **options: Any,
) -> tuple[Array, Any]:
    ordered(options["mask"], "steps")
    donate = OPTIONS["donate"].check("donate", donate)
    request, inputs, layout = prepare(
        q, k, v, one_token=True, initial_state=state, return_state=True, **options
    )
    chosen = dispatch.choose(request, backend, autograd=True)
    if layout.packed and not chosen.capabilities.packed:
        inputs = inputs._replace(state=unpacked(inputs.state))
    donate = donate and inputs.state is state  # not a copy
    o, new = chosen.step(request, inputs, donate)
    prepared = getattr(chosen, "again_step", None)
    if call is not None and prepared is not None and inputs.state is state and not request.empty:
        way = functools.partial(prepared, request, inputs, donate)
        again.keep(call, inputs, way, options["decay"], options["log_gate"])
    return layout.tokens_out(o), layout.state_out(new)


@signed(SegmentOptions)
def summarize(q: Any, k: Any, v: Any, **options: Unpack[SegmentOptions]) -> Any:
    """Summarize a stretch of a sequence as one segment, for `combine`.

    Parameters
    ----------
    q, k, v, operator, mask, decay, log_gate, scale, axis, backend
        As in `scan`; mask "none" has no segments.

    Returns
    -------
    segment : NamedTuple of arrays
        The paper's summary (its sections 4 and 6.2, repaired) and its attenuation rho.

    Raises
    ------
    ValueError, TypeError, Unsupported
        As in `scan`.
    """
    if library_of(q).borrowed:
        return library_of(q).lent(summarize, q, k, v, **options)
    given = filled("summarize", SEGMENT, options)
    ordered(given["mask"], "segments")
    run = _node("summarize") if recording() else _summarize
    return run(q, k, v, **given)


def _summarize(
    q: Array, k: Array, v: Array, backend: Backends, *, node: bool = False, **options: Any
) -> Any:
    request, inputs, _ = prepare(q, k, v, return_state=True, **options)
    chosen = dispatch.choose(request, backend, autograd=node, node=node, summarize=True)
    return chosen.summarize(request, inputs)


def combine(left: S, right: Any) -> S:
    """Join two adjacent stretches, earlier first: the paper's associative operator.

    Stretches stacked along new leading axes are joined one by one.

    Parameters
    ----------
    left : Segment or State
        The earlier one; a state may be packed.
    right : Segment
        The later one, of the same operator, mask and sizes.

    Returns
    -------
    Segment or State
        What ``left`` is.

    Raises
    ------
    TypeError
        The two are not of one operator and mask, or ``right`` is no segment.
    ValueError
        Their sizes or devices disagree, or the batch axes of their fields cannot be told apart.
    Unsupported
        ``left`` is a state of the paper's own recurrences, which no segment continues.
    """
    library = library_of(getattr(right, "rho", None))
    if library.borrowed:
        return library.lent(combine, left, right)  # type: ignore[no-any-return]
    run = _node("combine") if recording() else _combine
    joined: S = run(left, right)
    return joined


def _combine(left: Any, right: Any) -> Any:
    algebra = stretches(left, right)
    with library_of(right.rho).exact_products(right.rho):
        if type(left) is algebra.segment:
            return algebra.combine(left, right)
        packed = type(left) in STATE_OF
        state = left.unpack() if packed else left
        joined = as_before(algebra.extend(state, right), state)
    return joined.pack() if packed else joined


@overload
def vjp(
    q: A, k: A, v: A, *, return_state: Literal[False] = ..., **options: Unpack[ScanOptions]
) -> tuple[A, Callable[..., Gradients]]: ...
@overload
def vjp(
    q: A, k: A, v: A, *, return_state: Literal[True], **options: Unpack[ScanOptions]
) -> tuple[tuple[A, Any], Callable[..., Gradients]]: ...
@overload
def vjp(
    q: A, k: A, v: A, *, return_state: bool, **options: Unpack[ScanOptions]
) -> tuple[A | tuple[A, Any], Callable[..., Gradients]]: ...
@signed(AllScanOptions)
def vjp(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Return `scan`'s result and the function that pulls a gradient back through it.

    Parameters
    ----------
    q, k, v, operator, mask, decay, log_gate, scale, normalize, eps, ridge, axis, initial_state, \
return_state, form, chunk_size, convention, backend
        As in `scan`.

    Returns
    -------
    out : array, or (array, state)
        What `scan` returns.
    pullback : callable
        ``pullback(do)``, or ``pullback(do, dstate)`` with return_state=True, gives `Gradients` (dq,
        dk, dv, ddecay, dlog_gate, dinitial_state), None where an input was not given as an array.
        Either argument, and any field of dstate, may be None; it can be called again. dstate is of
        the returned state's type, dinitial_state of the given one's: of a packed S each number off
        the diagonal has the gradient of both entries that it stands for.

    Raises
    ------
    ValueError, TypeError, Unsupported
        As in `scan`.
    """
    earlier = None if recording() else again.seen("vjp", q, k, v, None, options)
    found = earlier and again.take(earlier)
    if found is not None:
        return found
    if library_of(q).borrowed:
        return library_of(q).lent(vjp, q, k, v, **options)
    options = filled("vjp", DEFAULTS, options)
    backend = options.pop("backend")
    if recording():
        o, state, saved = _node("forward")(q, k, v, backend, **options)
        pull = functools.partial(_node("backward"), q, k, v, backend, **options)
    else:
        call = _prepared(q, k, v, backend, **options)
        if earlier and _kept(earlier, call, options):
            return again.take(earlier)
        o, state, saved = _forward(call)
        pull = functools.partial(_pull, call)

    def pullback(do: Array | None, dstate: Any = None) -> Gradients:
        """Gradients of every array input from those of the outputs."""
        found: Gradients = pull(o, saved, do, dstate)
        return found

    return ((o, state) if options["return_state"] else o), pullback


class _Call(NamedTuple):
    """A checked call and what runs it."""

    chosen: Any
    request: Request
    inputs: Inputs
    layout: Layout


def _prepared(
    q: Array, k: Array, v: Array, backend: Backends, *, node: bool = False, **options: Any
) -> _Call:
    request, inputs, layout = prepare(q, k, v, gradient=True, **options)
    chosen = dispatch.choose(request, backend, autograd=True, node=node)
    return _Call(chosen, request, inputs, layout)


def _kept(earlier: again.Seen, call: _Call, options: dict[str, Any]) -> bool:
    """Keep how such a call of `vjp` is done, and return whether that could be."""
    chosen, request, inputs, layout = call
    way = getattr(chosen, "again_vjp", None)
    if way is None or request.empty:
        return False

    def pull(inputs: Inputs, *given: Any) -> Gradients:
        return _pull(_Call(chosen, request, inputs, layout), *given)

    prepare = functools.partial(way, request, inputs, layout, earlier.arrays, pull)
    return again.keep(earlier, inputs, prepare, options["decay"], options["log_gate"])


def _forward(call: _Call) -> tuple[Array, Any, Any]:
    o, state, saved = call.chosen.forward(call.request, call.inputs)
    return call.layout.tokens_out(o), call.layout.state_out(state), saved


def _pull(call: _Call, o: Array, saved: Any, do: Array | None, dstate: Any) -> Gradients:
    chosen, request, inputs, layout = call
    do, dstate = cotangents(request, inputs, layout, tuple(o.shape), do, dstate)
    _not_traced(chosen, request, (do, *(dstate or ())))
    grads: Gradients = chosen.backward(request, inputs, saved, do, dstate)
    ddecay, dlog_gate = grads.ddecay, grads.dlog_gate
    return Gradients(
        layout.tokens_out(grads.dq),
        layout.tokens_out(grads.dk),
        layout.tokens_out(grads.dv),
        ddecay,
        None if dlog_gate is None else layout.gate_out(dlog_gate),
        layout.dstate_out(grads.dinitial_state),
    )


def _forward_anew(*args: Any, **options: Any) -> tuple[Array, Any, Any]:
    return _forward(_prepared(*args, node=True, **options))


def _pull_anew(
    q: Array, k: Array, v: Array, backend: Backends, *given: Any, **options: Any
) -> Gradients:
    return _pull(_prepared(q, k, v, backend, node=True, **options), *given)


NODES |= {
    "scan": functools.partial(_scan, node=True),
    "step": _step,  # a few operations, which a compiler fuses with those around
    "summarize": functools.partial(_summarize, node=True),
    "combine": _combine,
    "forward": _forward_anew,
    "backward": _pull_anew,
}


def _not_traced(chosen: Any, request: Request, given: Sequence[Array | None]) -> None:
    """Refuse gradients that are traced where the backend, called outside of it, refuses a trace."""
    if not request.traced and any(x is not None and library_of(x).traced(x) for x in given):
        refusal = getattr(chosen, "refusal", None)  # torch's operators take them
        why = refusal and refusal(dataclasses.replace(request, traced=True))
        if why:
            raise Unsupported(f"the gradient given to the pullback cannot be pulled back: {why}")


def available() -> tuple[Info, ...]:
    """List the backends and whether each can run on this machine.

    Returns
    -------
    tuple of NamedTuple
        One per backend: name, available, reason, device, version, operators, dtypes, gradients.
    """
    return dispatch.available()


@signed(AllScanOptions)
def explain(q: Any, k: Any, v: Any, **options: Unpack[AllScanOptions]) -> Explanation:
    """Say what `scan` would run on these arguments, and why nothing else.

    The plan of a backend that has kernels of its own for one token names those of `step` too.

    Parameters
    ----------
    q, k, v, operator, mask, decay, log_gate, scale, normalize, eps, ridge, axis, initial_state, \
return_state, form, chunk_size, convention, backend
        As in `scan`.

    Returns
    -------
    NamedTuple
        backend, form, plan, and reasons by the name of each backend that would not run.

    Raises
    ------
    ValueError, TypeError, Unsupported
        As in `scan`.
    """
    if library_of(q).borrowed:
        return library_of(q).lent(explain, q, k, v, **options)  # type: ignore[no-any-return]
    given = filled("explain", DEFAULTS, options)
    backend = given.pop("backend")
    request, _, _ = prepare(q, k, v, **given)
    return dispatch.explain(request, backend)
