"""Fake devices, a pass a launch: NumPy written in place; any namespace, as new arrays; fused rows.

They show what a device must do, chunk by chunk as `hla.device.steps.Launch` tells it.
"""

import numpy as np

from hla.core.programs import adjoint, program, single_passes
from hla.device.elementwise import cut as part_of
from hla.device.elementwise import does, elementwise
from hla.device.scan import Device, Runner
from hla.device.steps import Fused, Launch, Limits, Row
from hla.device.tiles import Layout, whole


def weights(xp, gate, s, cut):
    """Decays of a chunk: between tokens [W, W], state to token, token to state [W, 1], whole."""
    W = cut.stop - cut.start
    a = xp.zeros(W)
    if s.power and gate.log_gate is not None:
        a = s.power * gate.log_gate[..., cut]
    elif s.power and gate.decay is not None:
        a = (s.power * xp.log(gate.decay))[..., None] + xp.zeros(W)
    t = np.arange(W)
    end = t - s.strict  # the last token whose gate a query meets

    def sums(among):  # of a over the last axis where it is among
        return xp.sum(
            xp.where(among, a.reshape(*a.shape[:-1], *(1,) * (among.ndim - 1), W), 0.0), axis=-1
        )

    among = (t > t[None, :, None]) & (t <= end[:, None, None])  # [query, key, token]
    L = xp.where(t <= end[:, None], xp.exp(sums(among)), 0.0)
    before, after = (xp.exp(sums(m))[..., None] for m in (t <= end[:, None], t > t[:, None]))
    whole = xp.exp(xp.sum(a, axis=-1))[..., None, None]
    return (
        (xp.swapaxes(L, -1, -2), after, before, whole) if s.reverse else (L, before, after, whole)
    )


def chunk(xp, s, gate, cut, q, k, v, S):
    """(o, state, what o reads from the state before, weighed pairs) of one chunk."""
    L, before, after, whole = weights(xp, gate, s, cut)
    state = s.write * (k * after).mT @ v + whole * S
    state = state + s.write * (v * after).mT @ k if s.symmetric else state
    if q is None:
        return None, state, None, None
    into, pairs = s.read * (q * before) @ S, s.read * s.write * (q @ k.mT) * L
    o = into + pairs @ v
    o = o + s.read * s.write * ((q @ v.mT) * L) @ k if s.symmetric else o
    return o, state, into, pairs


def dotted(xp, limits, reverse, x, v, into, pairs):
    """Parts of the gate's gradient: (tiles, W) thrice, the last two of a reverse launch alone."""
    found, apart = [], 1 - np.eye(x.shape[-2])
    for at in range(0, x.shape[-1], limits.tile):
        tile = slice(at, at + limits.tile)
        M = apart * pairs * (x[..., tile] @ v[..., tile].mT)
        found.append(
            [
                xp.sum(into[..., tile] * x[..., tile], axis=-1),
                xp.sum(M, axis=-2),
                xp.sum(M, axis=-1),
            ]
        )
    return [xp.stack(rows, axis=-2) for rows in zip(*found, strict=True)][: 3 if reverse else 1]


def sweep(xp, s, limits, gate, q, k, v, x, starts):
    """(o, last states, dots, kept states) of one value, chunk by chunk, segment by segment."""
    T, step = k.shape[-2], -1 if s.reverse else 1
    outs, ends, dots, kept = [], [], [], []
    for j, at in list(enumerate(range(0, T, s.tokens or T)))[::step]:
        last, S = min(T, at + (s.tokens or T)), starts[..., j, :, :] if s.tokens else starts
        for c in range(at, last, s.chunk or limits.period)[::step]:
            cut, before = slice(c, min(last, c + (s.chunk or limits.period))), S
            parts = (None if y is None else y[..., cut, :] for y in (q, k, v, x))
            qc, kc, vc, xc = parts
            o, S, into, pairs = chunk(xp, s, gate, cut, qc, kc, vc, S)
            outs.append(o)
            if x is not None:
                dots.append(dotted(xp, limits, s.reverse, xc, vc, into, pairs))
            if c and c % limits.period == 0:
                kept.append(S if s.reverse else before)
        ends.append(S)
    o = None if q is None else xp.concat(outs[::step], axis=-2)
    end = xp.stack(ends[::step], axis=-3) if s.tokens else ends[0]
    dots = [xp.concat(part[::step], axis=-1) for part in zip(*dots, strict=True)]
    return o, end, xp.concat(dots, axis=-1) if dots else None, kept[::step]


def beside(xp, parts):
    """Parts as one matrix."""
    if len(parts) < 2:
        return parts[0] if parts else None
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in parts))
    return xp.concat([xp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in parts], axis=-1)


def results(xp, s, limits, take, gate):
    """All that a launch leaves, by reference."""
    q, k = (beside(xp, [take(x) for x in parts]) for parts in (s.q, s.k))
    n, found = max(1, len(s.v) or len(s.o)), []
    for i in range(n):
        starts, v = s.start[i::n], take(s.v[i]) if s.v else None
        if k is None:  # reads one state for all tokens
            S = xp.concat([take(ref) for ref in starts], axis=-2)
            o = s.read * (q @ S)
            found.append((s.o[i], o + take(s.o[i]) if s.add else o))
            continue
        widths = [
            ref.columns[1] - ref.columns[0] if ref.columns else take(ref).shape[-1] for ref in s.k
        ]
        segments = (-(-k.shape[-2] // s.tokens),) if s.tokens else ()
        S = [xp.zeros((*s.held, *segments, w, v.shape[-1])) if ref is None
             else xp.broadcast_to(take(ref), (*s.held, *segments, w, v.shape[-1]))
             for ref, w in zip(starts, widths, strict=True)]  # fmt: skip
        x = take(s.x) if s.x else None
        o, end, dots, kept = sweep(xp, s, limits, gate, q, k, v, x, xp.concat(S, axis=-2))
        if s.o:
            found.append((s.o[i], o + take(s.o[i]) if s.add else o))
        if s.dots:
            found.append((s.dots, dots))
        if s.states:
            kept = [xp.broadcast_to(S.mT, (*s.batch, *S.mT.shape[-2:])) for S in kept]
            found.append((s.states, xp.stack(kept, axis=-3)))
        bounds = np.cumsum([0, *widths])
        cuts = zip(s.end[i::n], bounds, bounds[1:], strict=False)
        found += [(ref, end[..., lo:hi, :]) for ref, lo, hi in cuts if ref]
    return found


def device(xp, limits, put, rows=(), **memory):
    """A device that does a launch, and a fused row, at once."""

    def steps(call, step):
        if isinstance(step, Launch):
            return [does(call, lambda take, gate: results(xp, step, limits, take, gate), put)]
        if isinstance(step, Fused):
            return [does(call, lambda take, gate: fused(step, take, gate), put)]
        return [elementwise(xp, call, step, put)]

    return Runner(Device(steps, lambda request, where: limits, rows=rows, dtype=np.dtype, **memory))


# In place
def strided(shape, strides, dtype, where):
    """Poisoned memory that lies as it is told to."""
    size = (
        1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if np.prod(shape) else 0
    )
    return np.lib.stride_tricks.as_strided(np.full(size, np.nan), shape, [8 * s for s in strides])


def write(old, ref, x):
    part_of(old, ref)[...] = x
    return old


def in_place(limits=Limits(), rows=()):  # noqa: B008
    return device(
        np, limits, write, rows,
        empty=strided,
        layout=lambda x: Layout(x.shape, tuple(s // 8 for s in x.strides)),
        constant=lambda fill, shape, dtype, where: np.broadcast_to(np.float64(fill), shape),
        alike=lambda arrays, addresses: tuple(x.strides for x in arrays),
    )  # fmt: skip


# As new arrays
def functional(xp, limits=Limits()):  # noqa: B008
    """A device of a library without memory: what is made anew takes the buffer's place."""

    def put(old, ref, x):
        if ref.columns:
            rows = old if ref.rows is None else old[..., slice(*ref.rows), :]
            lo, hi = ref.columns
            x = xp.concat([rows[..., :lo], x, rows[..., hi:]], axis=-1)
        if ref.rows:
            lo, hi = ref.rows
            x = xp.concat([old[..., :lo, :], x, old[..., hi:, :]], axis=-2)
        return xp.broadcast_to(x, old.shape)

    return device(
        xp, limits, put,
        empty=lambda shape, strides, dtype, where: xp.zeros(shape),
        layout=lambda x: Layout(x.shape, whole(x.shape)),
        constant=lambda fill, shape, dtype, where: xp.full(shape, fill),
    )  # fmt: skip


# Fused rows
def fading(gate, power, t):
    """Decay at token t."""
    if gate.log_gate is not None:
        return np.exp(power * gate.log_gate[..., t])[..., None, None]
    return 1.0 if gate.decay is None else (gate.decay**power)[..., None, None]


def fused(s, take, gate):
    """Any row of passes that run one way: token by token, with the states of all at hand."""
    first = s.launches[0]
    T, reverse = take(first.k[0]).shape[-2], first.reverse
    S = [0.0 if x.start[0] is None else take(x.start[0]) for x in s.launches]
    for t in range(T)[:: -1 if reverse else 1]:
        made = {}  # one row of each inner name

        def row(ref, made=made, t=t):
            return made[ref.name] if ref.name in made else take(ref)[..., t : t + 1, :]

        for i, x in enumerate(s.launches):
            g = fading(gate, x.power, t)
            S[i] = (S[i] if reverse else g * S[i]) + x.write * row(x.k[0]).mT @ row(x.v[0])
            o = x.read * row(x.q[0]) @ S[i]
            S[i] = g * S[i] if reverse else S[i]
            if x.o[0].name in s.inner:
                made[x.o[0].name] = made.get(x.o[0].name, 0.0) + o
            else:
                row(x.o[0])[...] = row(x.o[0]) + o if x.add else o
    return [(x.end[0], end) for x, end in zip(s.launches, S, strict=True) if any(x.end)]


def small(request):
    """The reason of a kernel that holds its states in registers and leaves nothing for a gate."""
    if request.gate_given and request.gradient:
        return "it leaves no sums for a gate's gradient"
    return None if max(request.k_shape[-1], request.v_shape[-1]) <= 5 else "its states are too wide"


WHOLE = single_passes(program("hla2", "causal", "exact", False, None), 1.0)
HLA2 = tuple(s for s in WHOLE if "|" not in s.out)
NO_ONES = tuple(s for s in adjoint(WHOLE) if s.out != "d.v|1")
ROWS = (  # the longest that waits is taken
    Row("hla2 and denominators", WHOLE, small),
    Row("hla2", HLA2, small),
    Row("hla2 and denominators: dk, dv, dy", tuple(s for s in NO_ONES if s.reverse), small),
    Row("hla2: dk, dv, dy", tuple(s for s in adjoint(HLA2) if s.reverse), small),
    Row("hla2 and denominators: dq", tuple(s for s in NO_ONES if not s.reverse), small),
    Row("hla2: dq", tuple(s for s in adjoint(HLA2) if not s.reverse), small),
)
FUSED = in_place(rows=ROWS)
