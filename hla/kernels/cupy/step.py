"""Launches of one token: the states in place or beside."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...core.fields import rank
from ...core.passes import Shape, broadcast
from ...core.request import Inputs, Request
from ...device.scan import Place, heads
from ...device.tiles import Layout, strides_like, whole
from ...device.token import Turn, apart, span, turns, updates
from ...states.packed import STATE_OF, packed_shape
from .launch import TYPES, Kernel

Array = Any
MATRICES, VECTORS, TURNS, NAMES = 6, 4, 12, 8  # as in step.cu
WIDEST = 512  # keys or values
BULK = 128  # keys or values of states that are copied in bulk
ROWS, PLACES = 32, 192 << 10  # rows of a piece of them; bytes of a multiprocessor for pieces
MOST_PLACES = 64
STATES = slice(5, 5 + 2 * MATRICES)  # among a kernel's operands
MOST = 4096  # calls that are kept ready
Program = tuple[tuple[Any, ...], ...]  # passes: what `Turn` of step.cuh begins with, and the factor
Chosen = Callable[[Sequence[int]], tuple[dict[str, Any], int]]  # constants and shared memory


class Ready(NamedTuple):
    """A call that only lacks its memory."""

    kernels: tuple[Kernel, ...]
    card: Any
    o: tuple[Shape, Shape]  # shape and strides
    kind: Any  # of the state
    fields: tuple[tuple[Shape, Shape], ...]
    wide: Any  # their dtype
    sizes: tuple[int, ...]  # bytes that each given array spans
    owned: bool  # whether the fields could be updated where they lie


def _names(passes: Sequence[Turn]) -> list[str]:
    """Vectors by their numbers."""
    return list(dict.fromkeys(["q", "k", "v", "o", *(turn.out for turn in passes)]))


def fits(request: Request) -> bool:
    """Whether a kernel takes such a token."""
    passes = turns(request)
    matrices = {turn.matrix for turn in passes}
    vectors = {turn.vector for turn in passes} - {None}
    few = len(matrices) <= MATRICES and len(vectors) <= VECTORS and len(passes) <= TURNS
    few = few and len(_names(passes)) <= NAMES
    return few and min(request.k_shape[-1], request.v_shape[-1]) > 0 and _width(request) <= WIDEST


def named(request: Request) -> str:
    """Name the kernels that take one token of such a sequence."""
    if not fits(request):
        return "the causal pass"
    return "hopper_step_kernel on Hopper from a state that is whole, else step_kernel"


def _width(request: Request) -> int:
    return -(-max(request.k_shape[-1], request.v_shape[-1]) // 4) * 4


class Steps:
    """Tokens on one library's arrays."""

    bulk = packs = True  # whether kernels copy whole states at once, and take packed ones

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.known: dict[Any, Ready] = {}

    def takes(self, request: Request, state: Any) -> bool:
        """Whether a kernel takes a token behind such a state."""
        return fits(request) and (self.packs or type(state) not in STATE_OF)

    def constants(self, width: int, able: bool, packed: bool, program: Program) -> Chosen:
        """Return what gives the constants of the kernel in step.cu, which is told the program."""
        return functools.partial(_constants, width, able, packed)

    def step(self, request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
        """Return (o, state) of one token, with ``donate`` in the memory of the given state.

        The state may be packed; then so is what is returned.
        """
        kind, arrays, first = _given(request, inputs)
        addresses = [self.memory.address(x) for x in arrays]
        ready = self._found(request, kind, arrays, addresses, gated=first > 3)
        return self._take(ready, arrays, addresses, first, donate)

    def again(self, request: Request, inputs: Inputs, donate: bool) -> Any:
        """Return what does such a `step` of other arrays, without a token axis."""
        if not self.takes(request, inputs.state):
            return None
        kind, arrays, first = _given(request, inputs)
        addresses = [self.memory.address(x) for x in arrays]
        ready = self._found(request, kind, arrays, addresses, gated=first > 3)
        shape, strides = ready.o
        flat = (*shape[:-2], shape[-1]), (*strides[:-2], strides[-1])
        ready = ready._replace(o=flat)

        def run(arrays: list[Array], addresses: list[Any]) -> tuple[Array, Any]:
            return self._take(ready, arrays, addresses, first, donate)

        return run

    def _found(
        self, request: Request, kind: Any, arrays: list[Array], addresses: list[int], *, gated: bool
    ) -> Ready:
        """Return what does such a call, with a token axis."""
        card = self.memory.card(arrays[0])
        key = request, kind, card, *[x.strides for x in arrays], *[x.shape for x in arrays[3:]]
        key += tuple([p & 15 for p in addresses])
        ready = self.known.get(key)
        if ready is None:
            if len(self.known) >= MOST:
                self.known.clear()
            aligned = not any(p % 16 for p in addresses[3 + gated :])
            ready = self._ready(request, kind, arrays, gated, card, aligned)
            self.known[key] = ready
        return ready

    def _take(
        self, ready: Ready, arrays: list[Array], addresses: list[Any], first: int, donate: bool
    ) -> tuple[Array, Any]:
        """Allocate and launch; with ``donate``, where it can be, in the state's memory."""
        memory, card = self.memory, ready.card
        state = arrays[first:]
        inside = donate and ready.owned and apart(tuple(addresses), ready.sizes, first)
        o = memory.empty(*ready.o, arrays[2].dtype, card)
        fields = state if inside else [memory.empty(*x, ready.wide, card) for x in ready.fields]
        arrays += (o, *fields)
        addresses += [memory.address(o)]
        addresses += addresses[first:-1] if inside else map(memory.address, fields)
        addresses.append(None)
        memory.inside(card, functools.partial(_launch, ready.kernels, arrays, addresses))
        return o, ready.kind(*fields)

    def _ready(
        self, request: Request, kind: Any, given: list[Array], gated: bool, card: Any, aligned: bool
    ) -> Ready:
        passes, shapes = turns(request), request.state_shapes()
        packed = kind in STATE_OF and "S" in shapes
        if packed:
            shapes = shapes | {"S": packed_shape(shapes["S"])}
        layouts = [_layout(x) for x in given]
        first, starts = 3 + gated, len(given) > 3 + gated
        batch = broadcast(request.q_shape[:-2], request.k_shape[:-2], request.v_shape[:-2])
        names = list(shapes)
        o = (*batch, 1, request.v_shape[-1])
        lie = strides_like(o, *layouts[0][:2])
        places: list[Place | None] = [Place(i, x) for i, x in enumerate(layouts[:first])]
        places += [] if gated else [None]
        places.append(Place(len(given), Layout(o, lie)))
        ranks = [2, 2, 2, int(request.gate == "log_gate"), 2]
        matrices = list(dict.fromkeys(turn.matrix for turn in passes))
        vectors = list(dict.fromkeys(turn.vector for turn in passes if turn.vector))

        def field(name: str, old: bool) -> Place | None:
            i = names.index(name)
            if not old:
                return Place(len(given) + 1 + i, Layout(shapes[name], whole(shapes[name])))
            return Place(first + i, _expanded(layouts[first + i], shapes[name])) if starts else None

        own = {name: 1 if packed and name == "S" else rank(name) for name in names}
        for found, most in ((matrices, MATRICES), (vectors, VECTORS)):
            for old in (True, False):
                places += [*(field(name, old) for name in found), *[None] * (most - len(found))]
                ranks += [*(own[name] for name in found), *[1] * (most - len(found))]
        kinds = [str(x.dtype) for x in given] + [str(given[2].dtype)]
        types = [
            0 if x is None else TYPES[kinds[x.slot]] if x.slot < len(kinds) else TYPES["float32"]
            for x in places
        ]
        sizes = [2 if kind < 2 else 4 for kind in types]
        program = _program(passes, matrices, vectors)
        words = b"".join(
            struct.pack(
                "<13if", *one[:-1], *turn.shape[-2:], packed and turn.matrix == "S", one[-1]
            )
            for one, turn in zip(program, passes, strict=True)
        )
        words += bytes(struct.calcsize("<13if") * (TURNS - len(passes)))
        alone = math.prod(batch)  # a state that heads share is read by all and written by one
        owned = starts and updates(request)
        for n, x, at in zip(names, given[first:], layouts[first:], strict=False):
            each = math.prod(shapes[n][: -own[n]]) == alone
            owned &= each and tuple(x.shape) == shapes[n] and at.strides == whole(x.shape)
        width, kernels = _width(request), []
        bulk = self.bulk and owned and aligned and card.capability == (9, 0)
        bulk = bulk and _in_bulk(request, passes, packed)
        each_has = 2 if packed or width <= 64 else 1  # blocks of a multiprocessor
        for counts, strides, heads_of, mine in heads(batch, places, ranks):
            head = b"".join(
                struct.pack("<6q", *lead, *_walked(x), kind)
                for lead, x, kind in zip(strides, mine, types, strict=True)
            )
            count = math.prod(counts)
            blocks = min(count, each_has * card.processors) if bulk else count
            rest = struct.pack(
                "<10q2d", len(passes), request.k_shape[-1], request.v_shape[-1], count,
                blocks, *counts[-2:],
                request.gate == "log_gate", gated, request.normalize,
                request.scale if request.scaled else 1.0, request.eps,
            )  # fmt: skip
            flat = [
                m + lead[:3]
                for m, lead in zip(mine[STATES], strides[STATES], strict=True)
                if len(m) == 2
            ]
            whole_rows = all(m[0] == 1 for m in mine[STATES] if len(m) == 1)
            whole_rows &= all(m[1] == 1 and not any(x % 4 for x in (m[0], *m[2:])) for m in flat)
            whole_rows &= max(request.k_shape[-1], request.v_shape[-1]) % 4 == 0
            whole_rows &= min(request.k_shape[-1], request.v_shape[-1]) % 4 == 0

            constants = self.constants(width, whole_rows, packed, program)
            if bulk:
                constants = functools.partial(_places, width, each_has)
            if count:
                kernels.append(
                    Kernel(
                        self.memory.load, card, "hopper_step.cu" if bulk else "step.cu", blocks,
                        288 if bulk else 256, heads_of, sizes,
                        head + words + rest, constants,
                    )
                )  # fmt: skip
        spans = tuple(
            span(x.shape, x.strides) * given[i].dtype.itemsize for i, x in enumerate(layouts)
        )
        fields = tuple((shape, whole(shape)) for shape in shapes.values())
        return Ready(
            tuple(kernels), card, (o, lie), kind, fields,
            self.memory.dtype("float32"), spans, owned,
        )  # fmt: skip


def _program(passes: Sequence[Turn], matrices: list[str], vectors: list[str]) -> Program:
    """Return the passes with vectors and states by their numbers."""
    number = _names(passes).index
    return tuple(
        (
            number(x.q), number(x.k), number(x.v), number(x.out), matrices.index(x.matrix),
            vectors.index(x.vector) if x.vector else -1, x.power, int(x.strict), int(x.first),
            int(x.weighs), x.factor,
        )
        for x in passes
    )  # fmt: skip


def _given(request: Request, inputs: Inputs) -> tuple[Any, list[Array], int]:
    """Return the type of the state, all arrays, and how many come before the state's."""
    q, k, v, decay, log_gate, state = inputs
    gate = decay if log_gate is None else log_gate
    arrays = [q, k, v] if gate is None else [q, k, v, gate]
    kind = request.state_type if state is None else type(state)
    return kind, [*arrays, *(state or ())], len(arrays)


def _launch(kernels: Sequence[Kernel], arrays: list[Array], addresses: list[Any]) -> None:
    for kernel in kernels:
        kernel(arrays, addresses, None)


def _constants(
    width: int, able: bool, packed: bool, at: Sequence[int]
) -> tuple[dict[str, Any], int]:
    """Return macros, rows read four at a time where all are aligned, and bytes of shared memory."""
    able = able and not any(x % 16 for x in at[STATES])
    fixed = {"WIDTH": width, "WHOLE": int(able), "PACKED": int(packed)}
    return fixed, 4 * ((NAMES + 8) * width + NAMES + 8)


def _in_bulk(request: Request, passes: Sequence[Turn], packed: bool) -> bool:
    """Whether pieces of all states, where these are whole, begin and end at whole 16 bytes."""
    D, V = request.k_shape[-1], request.v_shape[-1]
    plain = all(turn.first and not turn.strict for turn in passes)
    return plain and max(D, V) <= BULK and not (D % (8 if packed else 4) or V % 4)


def _places(width: int, blocks: int, at: Sequence[int]) -> tuple[dict[str, Any], int]:
    """Return macros and bytes of shared memory where states are copied in bulk."""
    each = ROWS * width * 4
    places = min(MOST_PLACES, PLACES // blocks // each)
    room = 4 * ((NAMES + 8) * width + NAMES + 8)
    return {"WIDTH": width, "SLOTS": places, "BLOCKS": blocks}, places * (each + 16) + room


def _walked(own: Shape) -> Shape:
    """Return strides of rows and columns, of a vector of its elements as rows."""
    if len(own) == 2:
        return own
    return (own[0], 0) if own else (0, 0)


def _layout(x: Array) -> Layout:
    size = x.dtype.itemsize
    return Layout(tuple(x.shape), tuple(n // size for n in x.strides))


def _expanded(x: Layout, shape: Shape) -> Layout:
    """Return the layout of an array broadcast to a shape."""
    missing = len(shape) - len(x.shape)
    strides = (0 if n == 1 else step for n, step in zip(x.shape, x.strides, strict=True))
    return Layout(shape, ((0,) * missing + tuple(strides)))
