"""Fake devices, a pass a launch: NumPy written in place; any namespace, as new arrays; fused rows.

They show what a device must do, chunk by chunk as `hla.device.steps.Launch` tells it.
"""

import numpy as np

from hla.core.programs import adjoint, program, single_passes
from hla.device.elementwise import take
from hla.device.scan import Device
from hla.device.steps import Limits, Row


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
        for c in range(at, last, limits.chunk)[::step]:
            cut, before = slice(c, min(last, c + limits.chunk)), S
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


def results(xp, s, limits, env, gate):
    """All that a launch leaves, by reference."""
    q, k = (beside(xp, [take(env, x) for x in parts]) for parts in (s.q, s.k))
    n, found = max(1, len(s.v) or len(s.o)), []
    for i in range(n):
        starts, v = s.start[i::n], take(env, s.v[i]) if s.v else None
        if k is None:  # reads one state for all tokens
            S = xp.concat([take(env, ref) for ref in starts], axis=-2)
            o = s.read * (q @ S)
            found.append((s.o[i], o + take(env, s.o[i]) if s.add else o))
            continue
        widths = [
            ref.columns[1] - ref.columns[0] if ref.columns else take(env, ref).shape[-1]
            for ref in s.k
        ]
        segments = (-(-k.shape[-2] // s.tokens),) if s.tokens else ()
        S = [xp.zeros((*s.held, *segments, w, v.shape[-1])) if ref is None
             else xp.broadcast_to(take(env, ref), (*s.held, *segments, w, v.shape[-1]))
             for ref, w in zip(starts, widths, strict=True)]  # fmt: skip
        x = take(env, s.x) if s.x else None
        o, end, dots, kept = sweep(xp, s, limits, gate, q, k, v, x, xp.concat(S, axis=-2))
        if s.o:
            found.append((s.o[i], o + take(env, s.o[i]) if s.add else o))
        if s.dots:
            found.append((s.dots, dots))
        if s.states:
            kept = [xp.broadcast_to(S.mT, (*s.batch, *S.mT.shape[-2:])) for S in kept]
            found.append((s.states, xp.stack(kept, axis=-3)))
        bounds = np.cumsum([0, *widths])
        cuts = zip(s.end[i::n], bounds, bounds[1:], strict=False)
        found += [(ref, end[..., lo:hi, :]) for ref, lo, hi in cuts if ref]
    return found


# In place
def strided(b, env):
    """Memory in an order of its own (tokens outermost), poisoned; constants without memory."""
    if b.fill is not None:
        return np.broadcast_to(np.float64(b.fill), b.shape)
    axes = sorted(range(len(b.shape)), key=lambda i: (i != len(b.shape) - 2, i))
    return np.full([b.shape[i] for i in axes], np.nan).transpose(np.argsort(axes))


def write(env, ref, x):
    take(env, ref)[...] = x
    return env[ref.name]


def in_place(limits=Limits(), **options):  # noqa: B008
    def launch(s, env, gate):
        for ref, x in results(np, s, limits, env, gate):
            write(env, ref, x)
        return {}

    return Device(np, strided, write, launch, lambda request: limits, **options)


# As new arrays
def functional(xp, limits=Limits()):  # noqa: B008
    """A device of a library without memory: what is made anew takes the buffer's place."""

    def empty(b, env):
        return xp.full(b.shape, 0.0 if b.fill is None else b.fill)

    def put(env, ref, x):
        old = env[ref.name]
        for axis, part in ((-1, ref.columns), (-2, ref.rows)):
            if part and axis == -1:
                rows = old if ref.rows is None else old[..., slice(*ref.rows), :]
                x = xp.concat([rows[..., : part[0]], x, rows[..., part[1] :]], axis=-1)
            elif part:
                x = xp.concat([old[..., : part[0], :], x, old[..., part[1] :, :]], axis=-2)
        return xp.broadcast_to(x, old.shape)

    def launch(s, env, gate):
        made = {}
        for ref, x in results(xp, s, limits, env, gate):
            made[ref.name] = put({**env, **made}, ref, x)
        return made

    return Device(xp, empty, put, launch, lambda request: limits)


# Fused rows
def fading(gate, power, t):
    """Decay at token t."""
    if gate.log_gate is not None:
        return np.exp(power * gate.log_gate[..., t])[..., None, None]
    return 1.0 if gate.decay is None else (gate.decay**power)[..., None, None]


def fused(s, env, gate):
    """Any row of passes that run one way: token by token, with the states of all at hand."""
    first = s.launches[0]
    T, reverse = take(env, first.k[0]).shape[-2], first.reverse
    S = [0.0 if x.start[0] is None else take(env, x.start[0]) for x in s.launches]
    for t in range(T)[:: -1 if reverse else 1]:
        made = {}  # one row of each inner name

        def row(ref, made=made, t=t):
            return made[ref.name] if ref.name in made else take(env, ref)[..., t : t + 1, :]

        for i, x in enumerate(s.launches):
            g = fading(gate, x.power, t)
            S[i] = (S[i] if reverse else g * S[i]) + x.write * row(x.k[0]).mT @ row(x.v[0])
            o = x.read * row(x.q[0]) @ S[i]
            S[i] = g * S[i] if reverse else S[i]
            if x.o[0].name in s.inner:
                made[x.o[0].name] = made.get(x.o[0].name, 0.0) + o
            else:
                row(x.o[0])[...] = row(x.o[0]) + o if x.add else o
    for x, end in zip(s.launches, S, strict=True):
        if x.end[0]:
            write(env, x.end[0], end)
    return {}


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
FUSED = in_place(rows=ROWS, fused={row.name: fused for row in ROWS})
