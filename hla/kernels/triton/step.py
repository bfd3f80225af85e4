"""Launches of one token: the states in place or beside, and kernels kept ready."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch

from ...core.fields import rank
from ...core.passes import Shape, broadcast
from ...core.request import Inputs, Request
from ...device.scan import Place, heads
from ...device.tiles import Layout, strides_like, whole
from ...device.token import apart, dense, span, turns
from ...states import HLA2State
from ...states.packed import STATE_OF, packed_shape
from .launch import GATES, Kernel, addresses, empty_strided, follows, on_device, processors, tile
from .token import add_kernel, rows_kernel, token_kernel

WIDEST = 128  # keys or values of a tile
PASSES = 3
MOST = 4096  # calls that are kept ready
CACHED = 1 << 26  # bytes of states that a second-level cache may still hold at the next token


def fits(request: Request) -> bool:
    """Whether a kernel takes such a token: no strict pass, tiles that registers hold."""
    passes = turns(request)
    D, V = request.k_shape[-1], request.v_shape[-1]
    plain = all(turn.first and not turn.strict for turn in passes)
    return plain and len(passes) <= PASSES and 0 < D <= WIDEST and 0 < V <= WIDEST


def named(request: Request) -> str:
    """Name the kernels that take one token of such a sequence."""
    if not fits(request):
        return "the causal pass"
    if request.state_type is not HLA2State:
        return "token_kernel"
    return "rows_kernel from a state that is neither packed nor shared, else token_kernel"


class Ready(NamedTuple):
    """A call that only lacks its memory."""

    kernels: tuple[Kernel, ...]
    fresh: tuple[tuple[Shape, Shape, torch.dtype], ...]  # o, and the fields that are not in place
    fields: tuple[int, ...]  # which array each field of the new state is
    back: tuple[tuple[int, int], ...]  # arrays to copy, from and to


class Known(NamedTuple):
    """What is known of all calls whose arrays are laid out alike."""

    whole: bool  # the state could be updated in its own memory
    sizes: tuple[int, ...]  # bytes that each given array spans
    ready: dict[bool, Ready]  # whether in place


_known: dict[Any, Known] = {}


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Any, Any]:
    """Return (o, state) of one token; with ``donate`` in the memory of the given state.

    The state may be packed; then so is what is returned.
    """
    kind, arrays, first = _given(request, inputs)
    pointers = addresses(arrays)
    known = _known_of(request, kind, arrays, pointers, first)
    own = donate and request.library != "jax"  # whose arrays others may share
    own = own and _own(known, pointers, first) and not any(x.requires_grad for x in arrays[first:])
    ready = _ready(request, known, kind, arrays, first, own)
    return _take(ready, kind, arrays, pointers, first, own)


def again(request: Request, inputs: Inputs, donate: bool) -> Any:
    """Return what does such a `step` of other arrays, without a token axis, and their addresses."""
    if not fits(request):
        return None
    kind, arrays, first = _given(request, inputs)
    if any(x is not y for x, y in zip(arrays[first:], inputs.state or (), strict=True)):
        return None  # of a state that is shared
    if any(x.requires_grad for x in arrays):
        return None
    known = _known_of(request, kind, arrays, addresses(arrays), first)

    flat: dict[bool, Ready] = {}  # with o without a token axis

    def run(arrays: list[Any], pointers: list[Any]) -> tuple[Any, Any]:
        own = _own(known, pointers, first) if donate else False
        ready = flat.get(own)
        if ready is None:
            ready = _ready(request, known, kind, arrays, first, own)
            (shape, strides, dtype), *fresh = ready.fresh
            o = (*shape[:-2], shape[-1]), (*strides[:-2], strides[-1]), dtype
            ready = flat[own] = ready._replace(fresh=(o, *fresh))
        return _take(ready, kind, arrays, pointers, first, own)

    return run


def _given(request: Request, inputs: Inputs) -> tuple[Any, list[Any], int]:
    """Return the type of the state, all arrays, and how many come before the state's."""
    q, k, v, decay, log_gate, state = inputs
    gate = decay if log_gate is None else log_gate
    arrays = [q, k, v] if gate is None else [q, k, v, gate]
    first = len(arrays)
    if state is None:
        return request.state_type, arrays, first
    full = _shapes(request, cast("Any", type(state)))
    arrays += [x if x.shape == n else x.expand(n) for x, n in zip(state, full, strict=True)]
    return type(state), arrays, first


def _known_of(
    request: Request, kind: Any, arrays: Sequence[Any], pointers: Sequence[int], first: int
) -> Known:
    """Return what is known of calls with arrays like these."""
    strides, alignment = [x.stride() for x in arrays], [p & 15 for p in pointers]
    key = request, kind, arrays[0].device, *strides, *alignment
    known = _known.get(key)
    if known is None:
        if len(_known) >= MOST:
            _known.clear()
        owned = [dense(x.shape, x.stride()) for x in arrays[first:]]
        sizes = [span(x.shape, x.stride()) * x.element_size() for x in arrays]
        known = _known[key] = Known(len(arrays) > first and all(owned), tuple(sizes), {})
    return known


def _own(known: Known, pointers: Sequence[int], first: int) -> bool:
    """Whether the state can be updated where it lies."""
    return known.whole and apart(tuple(pointers), known.sizes, first)


def _ready(
    request: Request, known: Known, kind: Any, arrays: list[Any], first: int, own: bool
) -> Ready:
    ready = known.ready.get(own)
    if ready is None:
        tokens = arrays[:first]
        if arrays[0].ndim == len(request.q_shape) - 1:  # they lack the axis of tokens
            tokens = [x[..., None, :] for x in tokens[:3]]
            tokens += [x[..., None] if request.gate == "log_gate" else x for x in arrays[3:first]]
        ready = _prepare(request, [*tokens, *arrays[first:]], first, kind, own)
        known.ready[own] = ready
    return ready


def _take(
    ready: Ready, kind: Any, arrays: list[Any], pointers: list[Any], first: int, own: bool
) -> tuple[Any, Any]:
    """Allocate and launch; with ``own`` in the state's memory."""
    device, count = arrays[0].device, len(arrays)
    on_device(device, lambda stream: _launch(ready, arrays, pointers, device, stream))
    if own:
        torch.autograd.graph.increment_version(arrays[first:count])
    return arrays[count], kind(*[arrays[i] for i in ready.fields])


@functools.lru_cache(maxsize=1024)
def _shapes(request: Request, kind: Any) -> tuple[Shape, ...]:
    """Full shapes of the fields of a state, packed or not."""
    full = request.state_shapes()
    if kind in STATE_OF and "S" in full:
        full = full | {"S": packed_shape(full["S"])}
    return tuple(full[n] for n in kind._fields)


class Operand(NamedTuple):
    """Where an operand lies; how many axes are its own; of how many a kernel is told the stride."""

    place: Place | None
    rank: int
    told: int


def _prepare(
    request: Request, arrays: Sequence[torch.Tensor], first: int, kind: Any, own: bool
) -> Ready:
    """Lay out the results of a call and the launches that make them."""
    fields, packed = kind._fields, kind in STATE_OF
    given = [Place(i, Layout(tuple(x.shape), x.stride())) for i, x in enumerate(arrays)]
    batch = broadcast(*(x.shape[:-2] for x in arrays[:3]), request.gate_batch)
    o: Shape = (*batch, 1, request.v_shape[-1])
    fresh = [(o, strides_like(o, tuple(arrays[0].shape), arrays[0].stride()), arrays[2].dtype)]

    def allocated(shape: Shape) -> Place:
        fresh.append((shape, whole(shape), torch.float32))
        return Place(len(arrays) + len(fresh) - 1, Layout(shape, whole(shape)))

    old, new, back = dict(zip(fields, given[first:], strict=False)), {}, []
    ranks = {n: 1 if packed and n == "S" else rank(n) for n in fields}
    alone = True
    for name, shape in zip(fields, _shapes(request, kind), strict=True):
        shared = math.prod(shape[: len(shape) - ranks[name]]) < math.prod(batch)
        alone = alone and not shared
        new[name] = old[name] if own and not shared else allocated(shape)
        if own and shared:
            back.append((new[name].slot, old[name].slot))
    result = tuple((old if own else new)[name].slot for name in fields)
    gate = Operand(given[3] if first > 3 else None, int(request.gate == "log_gate"), 0)
    ends = [*(Operand(x, 2, 1) for x in given[:3]), gate]
    ends.append(Operand(Place(len(arrays), Layout(*fresh[0][:2])), 2, 1))
    device = arrays[0].device
    streamed = _streamed(request, batch, device)
    if kind is HLA2State and old and alone:
        states = [Operand(x[n], rank(n), rank(n)) for n in fields for x in (old, new)]
        split, size = _programs(request, batch, device), _parts(request, batch)
        streamed["FOLLOWS"] = streamed["FOLLOWS"] or (split > 1 and follows(device))
        parts = allocated((size,)) if split > 1 else None
        kernels = _by_rows(request, batch, [*ends, *states], parts, split, streamed)
    else:
        for turn in turns(request):
            for x in (old, new):
                ends.append(Operand(x[turn.matrix] if x else None, ranks[turn.matrix], 2))
                ends.append(Operand(x.get(turn.vector), 1, 1))
        ends += [Operand(None, n, n) for n in (2, 1, 2, 1)] * (PASSES - len(turns(request)))
        kernels = _by_passes(request, batch, ends, packed, streamed, start=bool(old))
    sizes = [x.element_size() for x in arrays] + [dtype.itemsize for _, _, dtype in fresh]
    made = tuple(kernel(sizes) for kernel in kernels)
    return Ready(made, tuple(fresh), result, tuple(back))


def _cut(
    batch: Shape, operands: Sequence[Operand]
) -> Iterator[tuple[Shape, list[Place | None], list[int]]]:
    """Cut a batch into launches: their axes, operands and all strides."""
    given, ranks = [x for x, _, _ in operands], [n for _, n, _ in operands]
    for counts, steps, places, each in heads(batch, given, ranks):
        strides: list[int] = []
        for (_, _, told), along, lie in zip(operands, steps, each, strict=True):
            own = (0, 0, *lie)  # none of packed rows
            strides += [*along, *own[len(own) - told :]]
        yield counts, places, strides


Make = Callable[[Sequence[int]], Kernel]  # of the bytes of an element of each array


def _kernel(
    function: Any, count: int, places: list[Place | None], scalars: Sequence[Any], **constants: Any
) -> Make:
    def make(sizes: Sequence[int]) -> Kernel:
        bytes_of = [0 if x is None else sizes[x.slot] for x in places]
        return Kernel(function, (count,), places, bytes_of, *scalars, **constants)

    return make


def _tiles(request: Request) -> tuple[int, int, int, int]:
    """Keys and values of a tile, rows of a state at a time, and warps."""
    BD, BV = tile(request.k_shape[-1]), tile(request.v_shape[-1])
    R = min(BD, 4096 // max(BD, BV))
    return BD, BV, R, max(1, R * max(BD, BV) // 1024)


def _programs(request: Request, batch: Shape, device: torch.device) -> int:
    """Programs of `rows_kernel` for each batch entry, as many as the device runs at once."""
    BD, _, R, _ = _tiles(request)
    most = processors(device) // max(1, math.prod(batch))
    return max(1, min(BD // R, 1 << most.bit_length() - 1 if most else 1))


def _streamed(request: Request, batch: Shape, device: torch.device) -> dict[str, Any]:
    """Return how states are taken of which no cache holds any at the next token."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    large = follows(device) and 4 * math.prod(batch) * D * (D + V) > CACHED
    return {"ONCE": "evict_first" if large else "", "FOLLOWS": large}


def _parts(request: Request, batch: Shape) -> int:
    """Numbers that the programs of `rows_kernel` leave."""
    BD, _, R, _ = _tiles(request)
    return math.prod(batch) * (BD // R) * (request.v_shape[-1] + 1)


def _by_rows(
    request: Request,
    batch: Shape,
    operands: Sequence[Operand],
    parts: Place | None,
    split: int,
    streamed: dict[str, Any],
) -> Iterator[Make]:
    D, V = request.k_shape[-1], request.v_shape[-1]
    BD, BV, R, warps = _tiles(request)
    left, done = parts, 0
    for counts, places, strides in _cut(batch, operands):
        count = math.prod(counts)
        if parts is not None:
            left = parts._replace(layout=parts.layout._replace(offset=done))
            done += count * (BD // R) * (V + 1)
        yield _kernel(
            rows_kernel, count * split, [*places, left],
            (request.scale, request.eps, D, V, *counts[-2:], split, *strides),
            GATE=GATES.index(request.gate), NORMALIZE=request.normalize, SPLIT=split > 1,
            WHOLE=D == BD and V == BV, **streamed, R=R, BD=BD, BV=BV, num_warps=warps,
        )  # fmt: skip
        if parts is not None:
            yield _kernel(
                add_kernel, count, [places[4], left],
                (request.eps, V, *counts[-2:], *strides[15:19]),
                NORMALIZE=request.normalize, FOLLOWS=streamed["FOLLOWS"], BLOCKS=BD // R, BV=BV,
                num_warps=1,
            )  # fmt: skip


def _by_passes(
    request: Request,
    batch: Shape,
    operands: Sequence[Operand],
    packed: bool,
    streamed: dict[str, Any],
    *,
    start: bool,
) -> Iterator[Make]:
    D, V = request.k_shape[-1], request.v_shape[-1]
    BD, BV, R, warps = _tiles(request)
    program = _program(request, packed)
    if program["PACKED"]:  # two blocks are loaded ahead: of the triangle, and of the next state
        R = max(1, R // 2)
    for counts, places, strides in _cut(batch, operands):
        yield _kernel(
            token_kernel, math.prod(counts), places,
            (request.scale, request.eps, request.ridge, D, V, *counts[-2:], *strides),
            **program, START=start, GATE=GATES.index(request.gate),
            NORMALIZE=request.normalize, WHOLE=D == BD and V == BV, **streamed, R=R, BD=BD, BV=BV,
            num_warps=warps,
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _program(request: Request, packed: bool) -> dict[str, Any]:
    """Return the passes of a request as the kernel's constants, and which of them make o."""
    passes = turns(request)
    wide = {"q": False, "k": False, "v": True}
    found: dict[str, Any] = {}
    for n in range(PASSES):
        turn = passes[n] if n < len(passes) else None
        names = list(wide)
        for x in "QKV":
            found[f"{x}{n + 1}"] = -1 if turn is None else names.index(getattr(turn, x.lower()))
        found |= {
            f"POWER{n + 1}": turn.power if turn else 0,
            f"WIDE{n + 1}": turn is not None and wide[turn.v],
            f"DEN{n + 1}": turn is not None and turn.vector is not None,
        }
        if turn is not None:
            wide[turn.out] = wide[turn.v]
    outs = [turn.out for turn in passes]
    packed = packed and passes[0].matrix == "S"
    return found | {"PACKED": packed, "RIDGE": outs.count("o") == 2, "OUT": outs.index("o") + 1}


def _launch(
    ready: Ready, arrays: list[Any], pointers: list[Any], device: torch.device, stream: int | None
) -> None:
    for shape, strides, dtype in ready.fresh:
        x = empty_strided(shape, strides, dtype, device)
        arrays.append(x)
        pointers.append(x.data_ptr())
    pointers.append(None)  # the last is that of nothing
    for kernel in ready.kernels:
        kernel(arrays, pointers, stream)
    for i, j in ready.back:
        arrays[j].copy_(arrays[i])
