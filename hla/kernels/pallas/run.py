"""The device of JAX arrays and Pallas kernels: how a plan's steps are done, as functions.

A step takes arrays and puts new ones in their places; all of it is traced under jax.jit, where
nothing that is not read is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from ...core.passes import Gate, Shape
from ...core.reference import Gradients
from ...core.request import Inputs, Request
from ...device import segments as rule
from ...device.elementwise import ELEMENTWISE, Made, Take, does
from ...device.scan import Call, Device, Do, Runner
from ...device.steps import Fused, Launch, Limits, Ref, Row, Step
from ...device.tiles import Layout, whole
from . import rows, sweep, weights
from .chunk import W, Work
from .ordered import ordered
from .sweep import Found, Operands

Array = Any
PERIOD = 256  # tokens between the states that are kept for a gate's gradient
COLUMNS = 128  # values of a program, at most
WIDE = 1 << 30


@functools.cache
def sweeps(where: str) -> Callable[[Work, Shape, Operands], Found]:
    """Return what does a launch on a platform; a compiler is imported when first needed.

    Launches alike are one function of the program, whose kernel is lowered and compiled once.
    """
    if where == "cuda":  # whose kernels are such functions
        from . import mosaic

        return mosaic.cuda
    if where == "plain":
        run = sweep.plain
    else:
        from . import tpu

        run = tpu.interpreted if where == "host" else tpu.tpu
    made: Callable[[Work, Shape, Operands], Found] = jax.jit(run, static_argnums=(0, 1))
    return made


def steps(call: Call, step: Step) -> list[Do]:
    """Return what does a step."""
    if isinstance(step, Launch):
        make: Any = functools.partial(launched, call, step)
    elif isinstance(step, Fused):
        make = rows.KERNELS[step.row](call, step)
    else:
        make = functools.partial(between, step)
    rest = rows.after(step) if isinstance(step, Fused) else ()
    makes = [make, *(functools.partial(launched, call, s) for s in rest)]
    return [does(call, x, put) for x in makes]


def put(old: Array, ref: Ref, x: Array) -> Array:
    """Return an array with a part, or all, of it made anew."""
    if ref.rows is None and ref.columns is None:
        return jnp.broadcast_to(x, old.shape).astype(old.dtype)
    rows, columns = (slice(*(cut or (None,))) for cut in (ref.rows, ref.columns))
    return old.at[..., rows, columns].set(x.astype(old.dtype))


def between(step: Step, take: Take, gate: Gate) -> Made:
    """Do a step between launches in float32 or more."""

    def wide(ref: Ref) -> Array:
        x = take(ref)
        return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x

    return ELEMENTWISE[type(step)](ordered, step, wide, gate)


def launched(call: Call, launch: Launch, take: Take, gate: Gate) -> Made:
    """Do one launch."""
    if (s := launch.nonempty()) is None or not (s.q or any(s.end)):
        return []
    (o,) = s.o or (None,)
    ((start,), (end,)) = s.start, s.end
    if not s.k:
        assert start is not None
        assert o is not None
        S = take(start)
        return [(o, added(s, take, s.read * product(take(s.q[0]), S)))]
    if 0 in (take(s.k[0]).shape[-1], take(s.v[0]).shape[-1]):
        outs = *(s.o if not s.add else ()), end, s.dots, s.states
        return [(ref, jnp.zeros_like(take(ref))) for ref in outs if ref is not None]
    read, write = s.read, s.write
    if start is None and end is None and s.states is None:  # the pass is linear in k v
        read, write = read * write, 1.0
    given, batch, cut = operands(call, s._replace(read=read, write=write), take, gate)
    if given.gate is not None:  # of states its weights have them
        read, write = 1.0, read * write
    dtype = call.dtypes[s.o[0].name] if s.o else np.dtype("float32")
    p = Work(
        given.k.shape[-1], given.v.shape[-1], bool(s.q), s.strict, s.reverse,
        given.gate is not None, read, write, s.dots is not None,
        PERIOD // W if s.states else 0, start is not None, end is not None,
        multiplied(call.request, given),
        "bfloat16" if dtype == jnp.bfloat16 and not s.add else "float32",
    )  # fmt: skip
    found: Any = sweeps(call.where)(p, batch, given)
    made: Made = []
    T = call.request.tokens
    if o is not None:
        made.append((o, added(s, take, joined(found.o, cut)[..., :T, :])))
    if end is not None:
        made.append((end, shared(found.end.mT, s.held, 2 + cut)))
    if s.dots is not None:
        sums = found.sums  # (*batch, [segments,] tiles, sums, tokens)
        sums = jnp.moveaxis(sums, -4, -2) if cut else sums[..., None, :]
        sums = jnp.reshape(sums, (*sums.shape[:-2], -1))[..., :T]
        made.append((s.dots, jnp.reshape(sums, (*sums.shape[:-2], -1))))
    if s.states is not None:
        kept = joined(found.kept, cut, 3)
        made.append((s.states, kept[..., 1 : 1 + (T - 1) // PERIOD, :, :]))
    return made


def multiplied(request: Request, given: Operands) -> str:
    """Return the dtype of what is multiplied.

    With float16 an intermediate keeps its digits, as a sum of products with it may cancel: it has
    more planes. With bfloat16 it does if it is what is kept in the state.
    """
    kept = (given.k,) if request.dtype == "bfloat16" else (given.q, given.k, given.v)
    narrow = all(x is None or x.dtype == request.dtype for x in kept)
    return request.dtype if narrow else "float32"


def added(s: Launch, take: Take, o: Array) -> Array:
    """Add what o holds where the launch does."""
    return take(s.o[0]).astype(jnp.float32) + o if s.add else o


def product(q: Array, S: Array) -> Array:
    """Return q S of float32 states, multiplied as q is."""
    S = S.astype(jnp.bfloat16) if q.dtype == jnp.bfloat16 else S
    precision = None if q.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    q = q.astype(S.dtype)
    return jnp.matmul(q, S, precision=precision, preferred_element_type=jnp.float32)


def shared(x: Array, held: Shape, own: int) -> Array:
    """Return a state of each entry as one of those that share it."""
    lead = x.ndim - own
    missing = lead - len(held)
    index = (0,) * missing + tuple(slice(None) if n > 1 else slice(1) for n in held)
    return x[index] if lead else x


def operands(call: Call, s: Launch, take: Take, gate: Gate) -> tuple[Operands, Shape, bool]:
    """Return the operands of a launch in whole chunks, its batch, and whether it has segments.

    A segment is one more entry of the batch, its last axis.
    """
    T = call.request.tokens
    tokens = s.tokens or -(-T // W) * W
    count = -(-T // tokens)

    def cut(x: Array, axis: int) -> Array:
        axis += x.ndim
        if count * tokens != T:
            widths = [(0, count * tokens - T if i == axis else 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths)
        if not s.tokens:
            return x
        return jnp.reshape(x, (*x.shape[:axis], count, tokens, *x.shape[axis + 1 :]))

    q, k, v, x = (None if ref is None else cut(take(ref), -2)
                  for ref in ((s.q or (None,))[0], s.k[0], s.v[0], s.x))  # fmt: skip
    factors = None
    if s.power and call.request.gate is not None:
        log = gate.log_gate
        if log is None and not s.tokens and T > 2 * W:
            log = weights.of_decay(gate.decay, W + (T % W or W), 2 * W)  # of two kinds of chunks
        else:
            log = cut(weights.of_decay(gate.decay, T, T) if log is None else log, -1)
        log = jnp.reshape(log, (*log.shape[:-1], log.shape[-1] // W, W))
        factors = weights.vectors(
            log, s.power, strict=s.strict, reverse=s.reverse, read=s.read, write=s.write
        )
    start = None if s.start[0] is None else take(s.start[0]).mT
    batch = (*s.batch, count) if s.tokens else s.batch
    return Operands(q, k, v, x, factors, start), batch, bool(s.tokens)


def joined(x: Array, cut: bool, own: int = 2) -> Array:
    """Put segments, one behind the other, back on the axis behind that of theirs."""
    if not cut:
        return x
    at = x.ndim - own - 1
    return jnp.reshape(x, (*x.shape[:at], -1, *x.shape[at + 2 :]))


def limits(request: Request, where: str) -> Limits:
    """Return what one launch takes: one part of keys, one value, one state."""
    if where != "cuda":
        return Limits(WIDE, -1, 0, 0, symmetric=(), tile=WIDE, chunk=W, period=PERIOD)
    keys = 128 if request.dtype == "bfloat16" else 64  # of which there are several planes
    return Limits(keys, -1, 0, 0, symmetric=(), tile=64, chunk=W, period=PERIOD)


@functools.cache
def processors() -> int:
    """Multiprocessors of the GPU here; those of an H100 where there is none."""
    found = [x for x in jax.devices() if x.platform == "gpu"]
    return int(found[0].core_count) if found else 132


def segments(request: Request, where: str) -> int:
    """Return the tokens of a segment, 0 for the whole sequence as one."""
    if where != "cuda":
        return 0
    return rule.tokens(request, processors(), PERIOD, COLUMNS)


def fitting(request: Request, where: str) -> tuple[Row, ...]:
    """Return the fused kernels of a request."""
    return rows.rows(request) if where == "cuda" else ()


def forward(where: str, request: Request, inputs: Inputs) -> tuple[Array, Any, tuple[Array, ...]]:
    """Return (o, state, the arrays that `backward` needs), on a platform."""
    return runner(where, request.axis).forward(request, inputs)


def backward(
    where: str, request: Request, inputs: Inputs, saved: Any, do: Any, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`, on a platform."""
    if do is not None and request.dtype == "bfloat16":
        do = do.astype(jnp.bfloat16)
    return runner(where, request.axis).backward(request, inputs, saved, do, dstate)


def strides(shape: Shape, axis: int) -> Shape:
    """Return strides of an array of tokens whose token axis was -2 or -3 when it was given."""
    if axis != -3 or len(shape) < 3:
        return whole(shape)
    *lead, heads, T, D = shape
    *most, t, h, d = whole((*lead, T, heads, D))
    return (*most, h, t, d)


def device(where: str, axis: int) -> Device:
    """Return the device of a platform, for arrays with tokens along an axis in memory."""
    return Device(
        steps=steps,
        limits=limits,
        layout=lambda x: Layout(tuple(x.shape), strides(tuple(x.shape), axis)),
        empty=lambda shape, strides, dtype, _: jnp.zeros(shape, dtype),
        constant=lambda fill, shape, dtype, _: jnp.full(shape, fill, dtype),
        dtype=lambda name: jax.dtypes.canonicalize_dtype(jnp.dtype(name)),
        where=lambda x: where,
        alike=lambda arrays, _: (jax.config.jax_enable_x64,),
        rows=fitting,
        segments=segments,
    )


@functools.cache
def runner(where: str, axis: int = -2) -> Runner:
    """Return what runs plans on a platform: "cuda", "tpu", "host" (interpreted) or "plain"."""
    return Runner(device(where, axis))
