"""Segments: the summary of a stretch, and the two-level exclusive scan over them (paper 4, 7.3)."""

from __future__ import annotations

from typing import Any

from . import programs, scans
from .algebra import ALGEBRA, Algebra
from .fields import batch_rank, own, split
from .namespace import (
    Array,
    device,
    expand,
    library_of,
    moveaxis,
    namespace,
    padded,
)
from .passes import Gate, broadcast
from .programs import PAPER, pruned
from .request import Request
from .run import run


def algebra_of(request: Request) -> Algebra | None:
    """Return the algebra of a request, None where the paper's own recurrences have none."""
    if request.convention == "exact" or request.mask != "causal" or request.operator not in PAPER:
        return ALGEBRA[request.operator, request.mask]
    if request.operator != "hla2" or request.gate is not None:
        return None
    found = ALGEBRA["hla2", "causal"]  # a state has the fields of a segment
    return found._replace(states=found.segments)


def segment(request: Request, values: dict[str, Array], gate: Gate, *, chunk: int) -> Any:
    """Summarize a sequence by the operator's segment program.

    Parameters
    ----------
    request : Request
        Names the operator and mask.
    values : dict
        "q", "k" and "v" with its column of ones, (*batch, T, features).
    gate, chunk
        As in `run.causal_pass`.
    """
    algebra = ALGEBRA[request.operator, request.mask]
    steps = programs.segment_program(request.operator, request.mask)
    ends = frozenset(s.end for s in steps)
    env = run(pruned(steps, frozenset(values), ends)[0], values, gate, chunk=chunk)
    fields = split({s.state: env[s.end] for s in steps}, request.state_shapes(segment=True))
    rho = _attenuation(values["k"], gate)
    rho = namespace(rho).reshape(rho, request.gate_batch)  # without axes that were added
    fields = algebra.moments(fields) | {"rho": rho}
    return algebra.segment(**_aligned(fields))


def _aligned(fields: dict[str, Array]) -> dict[str, Array]:
    """Give each field as many batch axes as any has, of size 1 where it has none.

    So they stay aligned when segments are stacked along a new axis.
    """
    most = max(batch_rank(field, x) for field, x in fields.items())
    return {
        field: namespace(x).reshape(x, (*(1,) * (most - batch_rank(field, x)), *x.shape))
        for field, x in fields.items()
    }


def _attenuation(k: Array, gate: Gate) -> Array:
    """Rho of a whole sequence, of the gate's batch shape."""
    xp = namespace(k)
    if gate.log_gate is not None:
        return xp.exp(xp.sum(gate.log_gate, axis=-1))
    one = xp.ones((), dtype=k.dtype, device=device(k))
    return one if gate.decay is None else library_of(k).powers(gate.decay, one * k.shape[-2])


def scan(
    request: Request, values: dict[str, Array], gate: Gate, state: Any, width: int
) -> tuple[Array, Any]:
    """Chunk summaries, an exclusive scan across them, and one within each chunk.

    Tokens are padded at the front, where a token of zeros with rho = 1 changes nothing.

    Parameters
    ----------
    request : Request
        Names the operator; its `algebra_of` is not None.
    values : dict
        "q", "k" and v without a column of ones, in the accumulation dtype.
    gate : Gate
        The decay.
    state : NamedTuple or None
        What the scan continues.
    width : int
        Tokens in a chunk, the paper's w.

    Returns
    -------
    out : array, (*batch, T, V + 1)
        Numerators and, last, the denominator.
    state : NamedTuple
    """
    algebra = algebra_of(request)
    assert algebra is not None
    q, k, v = (values[x] for x in "qkv")
    xp, T, V = namespace(q), request.tokens, v.shape[-1]
    batch = broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2], gate.batch)
    everything = (q, k, v, *gate.arrays)
    w = max(1, min(width, T))
    given = [(q, 0.0), (k, 0.0), (v, 0.0), (_token_rho(q, gate), 1.0)]
    laid = library_of(q).laid
    whole = [(laid(expand(x, (*batch, T, x.shape[-1])), everything), fill) for x, fill in given]
    xs = tuple(_chunked(x, w, fill) for x, fill in whole)

    def exclusive(segments: Any) -> Any:
        one = algebra.identity(scans.element(segments, 0))
        return scans.blelloch(algebra.combine, segments, one)

    def inside(xs: tuple[Array, ...]) -> tuple[Array, Any, Any]:
        """Return queries, and the segments before and at each token of a chunk; tokens first."""
        q, k, v, rho = (moveaxis(x, -2, 0) for x in xs)
        token = algebra.lift(q, k, v, rho[..., 0])
        return q, exclusive(token), token

    def summary_of(_: None, xs: tuple[Array, ...]) -> tuple[None, tuple[Array, ...]]:
        last = (scans.element(x, -1) for x in inside(xs)[1:])
        return None, tuple(algebra.combine(*last))

    def output_of(_: None, xs: tuple[Array, ...]) -> tuple[None, tuple[Array]]:
        q, prefix, token = inside(xs[:4])
        carried = scans.single(type(start)(*xs[4:]))
        states = algebra.extend(algebra.extend(carried, prefix), token)
        num, den = algebra.read(states, q, request.program.steps)
        return None, (moveaxis(xp.concat([num, den[..., None]], axis=-1), 0, -2),)

    loop = library_of(q).fold
    _, summaries = loop(summary_of, None, xs, tuple(-x.ndim for x in xs), 0, False)
    summary = algebra.segment(*summaries)
    start = _started(algebra.identity(scans.element(summary, 0)), request.state_type, state)
    carries = algebra.extend(scans.single(start), exclusive(summary))
    final = algebra.extend(scans.element(carries, -1), scans.element(summary, -1))
    xs = (*xs, *carries)
    _, (out,) = loop(output_of, None, xs, tuple(-x.ndim for x in xs), -3, False)
    rows = xs[0].shape[0] * w
    return xp.reshape(out, (*batch, rows, V + 1))[..., rows - T :, :], _owned(final, request)


def _chunked(x: Array, w: int, fill: float) -> Array:
    """[*batch, T, F] -> [chunks, *batch, w, F], padded at the front."""
    xp, (*batch, T, F) = namespace(x), x.shape
    pad = -T % w if T else w  # of no tokens there is one chunk too
    x = padded(x, -2, before=pad, fill=fill) if pad else x
    return moveaxis(xp.reshape(x, (*batch, (T + pad) // w, w, F)), -3, 0)


def _token_rho(q: Array, gate: Gate) -> Array:
    """Attenuation of each token, (*gate's batch, T or 1, 1)."""
    if gate.log_gate is not None:
        return namespace(q).exp(gate.log_gate)[..., None]
    return (*gate.arrays, namespace(q).ones((1, 1), dtype=q.dtype, device=device(q)))[0]


def _started(empty: Any, kind: Any, state: Any) -> Any:
    """Incoming state, or zeros, of the shape that an empty segment leads to, and on its mesh."""
    zeros = empty._asdict() | empty.to_state()._asdict()
    xp, meshes = namespace(empty.rho), library_of(empty.rho).meshes
    zero = xp.zeros((), dtype=empty.rho.dtype, device=device(empty.rho))
    given = dict.fromkeys(kind._fields, zero) if state is None else state._asdict()
    fields = {f: expand(x, zeros[f].shape) for f, x in given.items()}
    return kind(**{f: x + zeros[f] if meshes else x for f, x in fields.items()})


def _owned(state: Any, request: Request) -> Any:
    """Each field as a new array of its own shape."""
    shapes = request.state_shapes()
    return type(state)(**{f: own(x, shapes[f]) for f, x in state._asdict().items()})
