"""One token through a program on an NVIDIA GPU: every state is read once and written once.

    S <- g^p S + k v'      m <- g^p m + k w      out = q' S      w of out = q' m

for each pass in turn, w of v being 1 (`hla.device.token`). A program of the grid has a batch entry
and goes through its states 64 rows at a time, from memory into registers and back. A warp has whole
rows: sums over columns stay within it. S of keys alone is symmetric, so that its rows times q are
what it hands on, and serve as rows of the next k; other passes hand on sums over all rows. Each
part of a state is read and written by one warp, which may so be in the same place.

Bytes a batch entry, D = V = 128: S and F in and out, 256 KB; at the 2.85 TB/s of an H100 that
multiplies in place 0.094 ms for 1024 entries. One H100 took 0.0994 (95%) in place, 0.0998 for new
arrays, hla3 0.146, a turn of a `lax.scan` in place 0.110; XLA takes 0.19.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...core.request import Inputs, Request
from ...device.token import Turn, turns
from .copies import Place, heads
from .sweep import varying
from .warpgroups import F32, WHOLE, leave

Array = Any
ROWS = 64  # of a state, at a time


def fits(request: Request) -> bool:
    """Whether the kernel does a request: each batch entry has all but the gate of its own."""
    plain = request.mask == "causal" and request.convention == "exact" and not request.ridged
    own = request.q_shape == request.k_shape == request.v_shape and request.q_shape[-1] in LAYOUTS
    return plain and own and request.return_state and not request.empty


LAYOUTS = {  # of rows of so many columns: four of these together, a warp has whole rows
    128: (fragments.Tiling(((4, 128), (4,))), (-3,), (-2,), -1),
    64: (fragments.Tiling(((8, 64), (2, 64), (4,))), (-5,), (-3, -2), -1),
}


class Block(NamedTuple):
    """Rows of a state in a pass."""

    turn: Turn
    rows: Any
    half: int


def step(request: Request, inputs: Inputs) -> tuple[Array, Any]:
    """Return (o, state) of one token."""
    batch, D = request.q_shape[:-2], request.q_shape[-1]
    n = math.prod(batch)
    gate = inputs.decay if inputs.log_gate is None else inputs.log_gate[..., 0]
    flat = {name: jnp.reshape(x, (n, D)) for name, x in zip("qkv", inputs, strict=False)}
    if gate is not None:
        flat["gate"] = jnp.reshape(gate, gate.shape or (1,))
    kind: Any = request.state_type
    fields, shapes = kind._fields, request.state_shapes()
    given = dict.fromkeys(fields, 0.0) if inputs.state is None else inputs.state._asdict()
    states = [jnp.broadcast_to(given[name], shapes[name]).astype(F32) for name in fields]
    states = [jnp.reshape(x, (n, *x.shape[len(batch) :])) for x in states]
    like = functools.partial(varying, given=[*flat.values(), *states])
    made = [like((n, D), inputs.v.dtype)]
    if request.donate:  # a reference is both: XLA has the new state where the old one lies
        states, after = [jax.new_ref(x) for x in states], fields
    else:
        made += [like(x.shape, F32) for x in states]
        after = tuple(f"new {name}" for name in fields)
    names = dict.fromkeys([*flat, *fields, "o", *after])

    def body(*refs: Any) -> None:
        _token(request, dict(zip(names, refs, strict=True)), dict(zip(fields, after, strict=True)))

    o, *new = pl.kernel(
        body, out_type=made,
        mesh=plgpu.Mesh(grid=(n,), grid_names=("head",), num_threads=1, thread_name="warpgroup"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*flat.values(), *states)  # fmt: skip
    new = [jax.freeze(x) for x in states] if request.donate else new
    found = (jnp.reshape(x, (*batch, *x.shape[1:])) for x in new)
    return jnp.reshape(o, inputs.v.shape), kind(*found)


def _token(request: Request, r: dict[str, Any], after: dict[str, str]) -> None:
    """Do a program of the grid, which leaves each state as the array that ``after`` names."""
    i, batch, D = lax.axis_index("head"), request.q_shape[:-2], request.q_shape[-1]
    layout = plgpu.Layout.TILED(*LAYOUTS[D])
    halves = [pl.ds(ROWS * h, ROWS) for h in range(D // ROWS)]
    g = None
    if request.gate is not None:
        g = r["gate"][Place(heads(batch, i), batch).entry(r["gate"], 0)]
        g = jnp.exp(g) if request.gate == "log_gate" else g

    def load(name: str, *at: Any, axis: int | None = None) -> Array:
        own = layout if axis is None else layout.reduce(axis)
        x = plgpu.load(r[name].at[(i, *at)], *WHOLE, layout=own, optimized=False).astype(F32)
        return x * request.scale if name == "q" and request.scale != 1 else x

    def spread(x: Array, axis: int) -> Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, D), (axis,)), layout)

    def updated(name: str, power: int, x: Array, *at: Any, old: Array) -> Array:
        """Return a state's part after the token, and leave it."""
        if power and g is not None:
            old = old * functools.reduce(jnp.multiply, [g] * power)
        x = old + x
        leave(r[after[name]].at[(i, *at)], x)
        return x

    cols = {name: load(name, axis=0) for name in "qkv"}
    rows = {name: [load(name, h, axis=1) for h in halves] for name in "qk"}
    weights: dict[str, Any] = {"v": None}  # of names whose denominator is not 1, as rows
    den: Array = None
    blocks = [Block(t, h, n) for t in turns(request) for n, h in enumerate(halves)]
    ahead = [load(b.turn.matrix, b.rows) for b in blocks[:1]]
    for number, (turn, at, n) in enumerate(blocks):
        ahead += [load(b.turn.matrix, b.rows) for b in blocks[number + 1 : number + 2]]
        k = rows[turn.k][n]
        new = spread(k, 0) * spread(cols[turn.v], 1)
        S = updated(turn.matrix, turn.power, new, at, old=ahead.pop(0))
        if turn.k == turn.v:  # symmetric
            x = jnp.sum(S * spread(cols["q"], 1), axis=1) * turn.factor
            rows.setdefault(turn.out, []).append(x)
        else:
            x = jnp.sum(S * spread(rows["q"][n], 0), axis=0) * turn.factor
            cols[turn.out] = cols[turn.out] + x if n else x
        if turn.vector is None:
            continue
        w = weights[turn.v]
        m = load(turn.vector, at, axis=1)
        m = updated(turn.vector, turn.power, k if w is None else k * w, at, old=m)
        if turn.weighs:
            x = jnp.sum(spread(m * rows["q"][n], 0), axis=0) * turn.factor  # in each column
            den = den + x if n else x
        if turn.weighs and n + 1 == len(halves) and turn.out != "o":
            weights[turn.out] = jnp.sum(spread(den, 1), axis=1) * (1 / D)
    o = cols["o"]
    if request.normalize:
        o = o / (den + request.eps)
    leave(r["o"].at[i], o.astype(r["o"].dtype))
