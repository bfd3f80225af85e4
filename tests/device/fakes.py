"""Fake devices, a pass a launch: NumPy written in place; any namespace, as new arrays; fused rows.

They show what a device must do, chunk by chunk as `hla.device.steps.Launch` tells it.
"""

import numpy as np

from hla.core.programs import adjoint, program, single_passes
from hla.device.elementwise import does, elementwise, part
from hla.device.scan import Device, Runner
from hla.device.steps import Fused, Launch, Limits, Row
from hla.device.tiles import Layout, whole


def weights(xp, gate, s, cut):
    """Decays of a chunk: between tokens [W, W], state to token, token to state [W, 1], whole."""
    t, g = np.arange(cut.stop - cut.start), 1.0
    if gate.log_gate is not None:
        g = xp.exp(gate.log_gate[..., cut])
    elif gate.decay is not None:
        g = gate.decay[..., None]
    g = g**s.power * xp.ones(len(t))
    end = t[:, None] - s.strict  # the last token whose gate a query meets
    between = (t > t[:, None]) & (t <= end[..., None])  # [query, key, token]
    pairs = xp.prod(xp.where(between, g[..., None, None, :], 1.0), axis=-1)
    L, each = xp.where(t <= end, pairs, 0.0), g[..., None, :]
    before = xp.prod(xp.where(t <= end, each, 1.0), axis=-1)[..., None]
    after = xp.prod(xp.where(t > t[:, None], each, 1.0), axis=-1)[..., None]
    past = L, before, after
    found = (xp.swapaxes(L, -1, -2), after, before) if s.reverse else past
    return *found, xp.prod(g, axis=-1)[..., None, None]


def chunk(xp, s, gate, cut, q, k, v, S):
    """(o, state, what o reads from the state before, weighed pairs) of one chunk."""
    L, before, after, whole = weights(xp, gate, s, cut)
    into, pairs = s.read * (q * before) @ S, s.read * s.write * (q @ k.mT) * L
    o, state = into + pairs @ v, s.write * (k * after).mT @ v + whole * S
    if s.symmetric:
        o = o + s.read * s.write * ((q @ v.mT) * L) @ k
        state = state + s.write * (v * after).mT @ k
    return o, state, into, pairs


def dotted(xp, s, tile, x, v, into, pairs):
    """Parts of the gate's gradient, (tiles, W) each: read, with pairs by query, and by key."""
    found, apart = [], pairs * (1 - np.eye(x.shape[-2]))
    for cut in (slice(at, at + tile) for at in range(0, x.shape[-1], tile)):
        reads, M = (into * x)[..., cut], apart * (x[..., cut] @ v[..., cut].mT)
        read = xp.sum(reads, axis=-1) * (0.5 if s.symmetric else 1.0)
        by_query, by_key = xp.sum(M, axis=-1), xp.sum(M, axis=-2)
        found.append((read + by_query, by_key) if s.reverse else (read,))
    return [xp.stack(rows, axis=-2) for rows in zip(*found, strict=True)]


def sweep(xp, s, limits, gate, q, k, v, x, starts):
    """(o, last states, dots, kept states) of one value, chunk by chunk, segment by segment."""
    T, step, outs, ends, dots, kept = k.shape[-2], -1 if s.reverse else 1, [], [], [], []
    for j, at in list(enumerate(range(0, T, s.tokens or T)))[::step]:
        last, S = min(T, at + (s.tokens or T)), starts[..., j, :, :] if s.tokens else starts
        for c in range(at, last, s.chunk or T)[::step]:
            cut, before = slice(c, min(last, c + (s.chunk or T))), S
            qc, kc, vc, xc = (y[..., cut, :] for y in (q, k, v, x))
            o, S, into, pairs = chunk(xp, s, gate, cut, qc, kc, vc, S)
            outs.append(o)
            dots.append(dotted(xp, s, limits.tile, xc, vc, into, pairs))
            if c and c % limits.period == 0:
                kept.append((S if s.reverse else before).mT)
        ends.append(S)
    if s.short:  # nothing reads it
        ends[-1] = ends[-1] + np.nan
    end = xp.stack(ends[::step], axis=-3) if s.tokens else ends[0]
    dots = [xp.concat(found[::step], axis=-1) for found in zip(*dots, strict=True)]
    return xp.concat(outs[::step], axis=-2), end, xp.concat(dots, axis=-1), kept[::step]


def beside(xp, parts):
    """Parts as one matrix."""
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in parts))
    return xp.concat([xp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in parts], axis=-1)


def results(xp, s, limits, take, gate):
    """All that a launch leaves, by reference."""
    n, found, k = len(s.v) or len(s.o), [], beside(xp, [take(x) for x in s.k or s.q])
    q = beside(xp, [take(x) for x in s.q]) if s.q else k
    for i, starts in enumerate(s.start[i::n] for i in range(n)):
        if s.k:
            v, widths = take(s.v[i]), [take(ref).shape[-1] for ref in s.k]
            lead = (*s.held, -(-k.shape[-2] // s.tokens)) if s.tokens else s.held
            S = [xp.zeros((*lead, w, v.shape[-1])) for w in widths]
            S = [z if ref is None else z + take(ref) for z, ref in zip(S, starts, strict=True)]
            x, S = take(s.x) if s.x else v, xp.concat(S, axis=-2)
            o, end, dots, kept = sweep(xp, s, limits, gate, q, k, v, x, S)
            bounds = np.cumsum([0, *widths])
            cuts = zip(s.end[i::n], bounds, bounds[1:], strict=False)
            found += [(ref, end[..., lo:hi, :]) for ref, lo, hi in cuts if ref]
            found += [(s.dots, dots)] if s.dots else []
            if s.states:
                kept = [xp.broadcast_to(S, (*s.batch, *S.shape[-2:])) for S in kept]
                found.append((s.states, xp.stack(kept, axis=-3)))
        else:  # reads one state for all tokens
            o = s.read * (q @ xp.concat([take(ref) for ref in starts], axis=-2))
        if s.o:
            found.append((s.o[i], o + take(s.o[i]) if s.add else o))
    return found


def device(xp, limits, put, rows=lambda request: (), **memory):
    """A device that does a launch, and a fused row, at once."""

    def steps(call, step):
        if isinstance(step, Launch):
            return [does(call, lambda take, gate: results(xp, step, limits, take, gate), put)]
        if isinstance(step, Fused):
            return [does(call, lambda take, gate: fused(step, take, gate), put)]
        return [elementwise(xp, call, step, put)]

    return Runner(
        Device(
            steps, lambda request, where: limits, dtype=np.dtype,
            rows=lambda request, where: rows(request), **memory,
        )
    )  # fmt: skip


# In place
def strided(shape, strides, dtype, where):
    """Poisoned memory that lies as it is told to."""
    size = max(1, 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    return np.lib.stride_tricks.as_strided(np.full(size, np.nan), shape, [8 * s for s in strides])


def write(old, ref, x):
    part(old, ref)[...] = x
    return old


def in_place(limits=Limits(), rows=lambda request: ()):  # noqa: B008
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
    T, n = take(s.launches[0].k[0]).shape[-2], s.launches[0].tokens
    if not n:
        starts = [0.0 if x.start[0] is None else take(x.start[0]) for x in s.launches]
        ends = run_fused(s, take, gate, range(T), starts)
        return [(x.end[0], end) for x, end in zip(s.launches, ends, strict=True) if any(x.end)]
    found = []
    for j, at in enumerate(range(0, T, n)):
        starts = [0.0 if x.start[0] is None else take(x.start[0])[..., j, :, :] for x in s.launches]
        found.append(run_fused(s, take, gate, range(at, min(T, at + n)), starts))
    if s.launches[0].short:
        left_out = 0 if s.launches[0].reverse else -1
        found[left_out] = [S + np.nan for S in found[left_out]]
    ends = (np.stack(states, axis=-3) for states in zip(*found, strict=True))
    return [(x.end[0], end) for x, end in zip(s.launches, ends, strict=True) if any(x.end)]


def run_fused(s, take, gate, tokens, S):
    """The last states of all launches."""
    S, reverse = list(S), s.launches[0].reverse
    for t in tokens[:: -1 if reverse else 1]:
        made = {}  # one row of each inner name

        def row(ref, made=made, t=t):
            return made[ref.name] if ref.name in made else take(ref)[..., t : t + 1, :]

        for i, x in enumerate(s.launches):
            g = fading(gate, x.power, t)
            S[i] = (S[i] if reverse else g * S[i]) + x.write * row(x.k[0]).mT @ row(x.v[0])
            o = x.read * row(x.q[0]) @ S[i] if x.q else 0.0
            S[i] = g * S[i] if reverse else S[i]
            if not x.o:
                continue
            if x.o[0].name in s.inner:
                made[x.o[0].name] = made.get(x.o[0].name, 0.0) + o
            else:
                row(x.o[0])[...] = row(x.o[0]) + o if x.add else o
        if s.divide:
            row(s.divide.o)[...] = row(s.divide.x) / (row(s.divide.den) + s.divide.eps)
    return S


WHOLE = single_passes(program("hla2", "causal", "exact", False, None), 1.0)
HLA2 = tuple(s for s in WHOLE if "|" not in s.out)
NO_ONES = tuple(s for s in adjoint(WHOLE) if s.out != "d.v|1")
ROWS = (  # the longest first
    Row("hla2 and denominators", WHOLE, True, divides=True),
    Row("hla2", HLA2, True),
    Row("hla2 and denominators: dk, dv, dy", tuple(s for s in NO_ONES if s.reverse), True),
    Row("hla2: dk, dv, dy", tuple(s for s in adjoint(HLA2) if s.reverse), True),
    Row("hla2 and denominators: dq", tuple(s for s in NO_ONES if not s.reverse), True),
    Row("hla2: dq", tuple(s for s in adjoint(HLA2) if not s.reverse), True),
)


def small(request):
    """The rows of a device that holds states in registers and leaves nothing for a gate."""
    gated = request.gate_given and request.gradient
    return () if gated or max(request.k_shape[-1], request.v_shape[-1]) > 5 else ROWS


FUSED = in_place(rows=small)
CUT = in_place(Limits(chunk=2, period=4), small)
