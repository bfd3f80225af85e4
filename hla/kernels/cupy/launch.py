"""Launches of CUDA C++ kernels: constants, arguments, and functions kept ready.

Nothing here knows CuPy: what compiles a kernel and what launches it is given (`driver`).
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ...core.passes import Shape
from ...core.request import Request
from ...device import segments as rule
from ...device.scan import Call, Place, heads, left_out
from ...device.steps import GateSum, Launch, Limits, Ref, Sum
from ...device.tiles import Layout
from ...errors import Unsupported

LARGE = 200 << 10  # bytes of shared memory from which the widest float32 tiles fit
CHUNK = 32  # tokens; of 64 hla2 took 0.63 ms instead of 0.54 (B8 T4096 H16 D128 on one H100)
FEW = 16  # tokens that are multiplied exactly: their one or two terms can cancel to the roundings
PERIOD = 256  # tokens between the states that are kept for a gate's gradient
WIDEST = 128  # columns of a state
TIMED = (9, 0)  # the compute capability on which kernels were timed
PAD = 8  # elements behind a row in shared memory, as in block.cuh
TYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3}  # as block.cuh counts them
Constants = Mapping[str, Any]
Function = Callable[..., Any]  # (grid, block, arguments, shared_mem=)
Load = Callable[[str, Constants, int, Any], Function]  # file, constants, shared memory, where


class Card(NamedTuple):
    """A GPU, as far as launches depend on it."""

    device: int
    capability: tuple[int, int]
    processors: int
    shared: int  # bytes of shared memory that a block can have


class Kernel:
    """A kernel with all but the memory of its operands.

    Its one argument is a struct: addresses, then what does not change. The first call loads it, as
    ``constants`` has it of the operands' addresses: those of later calls are aligned alike.
    """

    def __init__(
        self,
        load: Load,
        where: Any,
        name: str,
        grid: int,
        threads: int,
        operands: Sequence[Place | None],
        sizes: Sequence[int],
        rest: bytes,
        constants: Callable[[Sequence[int]], tuple[Constants, int]],
    ) -> None:
        self.load, self.where, self.name, self.constants = load, where, name, constants
        self.grid, self.block, self.rest = (grid,), (threads,), rest
        self.places = [  # slot and bytes from its address; the last address is none
            (-1, 0) if x is None else (x.slot, x.layout.offset * size)
            for x, size in zip(operands, sizes, strict=True)
        ]
        self.pack = struct.Struct(f"<{len(operands)}Q").pack
        self.kind = np.dtype((np.void, 8 * len(operands) + len(rest)))
        self.function: Function | None = None
        self.shared = 0

    def given(self, addresses: Sequence[Any]) -> list[int]:
        """Return where its operands lie."""
        return [(addresses[slot] or 0) + offset for slot, offset in self.places]

    def __call__(self, arrays: list[Any], addresses: list[Any], stream: Any) -> None:
        """Launch it on arrays whose addresses are known."""
        given = self.given(addresses)
        if self.function is None:
            constants, self.shared = self.constants(given)
            self.function = self.load(self.name, constants, self.shared, self.where)
        argument = np.frombuffer(self.pack(*given) + self.rest, dtype=self.kind)
        self.function(self.grid, self.block, (argument,), shared_mem=self.shared)


def load_all(kernels: Iterable[Kernel], addresses: Sequence[Any]) -> None:
    """Load kernels, those that are to be compiled side by side."""
    found = {}
    for x in kernels:
        constants, shared = x.constants(x.given(addresses))
        found[x.name, *constants.items(), shared] = x.load, (x.name, constants, shared, x.where)
    if len(found) > 1:
        with ThreadPoolExecutor(len(found)) as pool:
            for done in [pool.submit(load, *text) for load, text in found.values()]:
                done.result()


def operand(strides: Sequence[int], dtype: Any) -> bytes:
    """Return a struct Operand: strides of three batch axes, segment, row, column; and its type."""
    return struct.pack("<7q", *strides, 0 if dtype is None else TYPES[str(dtype)])


@functools.lru_cache(maxsize=1024)
def limits(request: Request, card: Card) -> Limits:
    """Return what one launch takes: one part of keys, one value, one state."""
    narrow, half = request.dtype == "bfloat16", card.shared >= LARGE // 2
    keys = WIDEST if narrow or half else WIDEST // 2
    values = WIDEST if card.shared >= (LARGE // 2 if narrow else LARGE) else WIDEST // 2
    able = (narrow or half) and max(request.k_shape[-1], request.v_shape[-1]) <= values
    both = (None, "decay", "log_gate") if able else ()  # of one tile of values alone
    return Limits(keys, -1, 0, 0, symmetric=both, tile=values, chunk=CHUNK, period=PERIOD)


def untimed(card: Card) -> str:
    """Say that kernels were compiled for such a GPU and not timed on it, or ""."""
    at = ".".join(map(str, card.capability))
    return "" if card.capability == TIMED else f"; compiled, not timed, for compute capability {at}"


def segments(request: Request, card: Card) -> int:
    """Return the tokens of a segment, 0 for the whole sequence as one."""
    wide = max(request.k_shape[-1], request.v_shape[-1]) > 64  # one block a multiprocessor
    return rule.tokens(request, card.processors * (1 if wide else 2), PERIOD, WIDEST)


@functools.cache
def tile(n: int, most: int) -> int:
    """Width of the tile that serves n keys or values."""
    return min(most, max(16, 1 << max(n - 1, 0).bit_length()))


def located(
    call: Call, refs: Iterable[Ref | None]
) -> tuple[list[Place | None], list[Any], list[int]]:
    """Return where arrays lie, their dtypes, and the bytes of an element of each."""
    refs = list(refs)
    places = [None if x is None else call.place(x) for x in refs]
    dtypes = [None if x is None else call.dtypes[x.name] for x in refs]
    return places, dtypes, [0 if x is None else x.itemsize for x in dtypes]


OWN = {"rows": 2, "state": 2, "gate": 1, "decay": 0, "dots": 2, "kept": 3}  # axes by kind


def passes(load: Load, call: Call, launch: Launch) -> Iterator[Kernel]:
    """Return the kernels of one launch: one, or more where the batch has axes that are not one."""
    if (s := launch.nonempty()) is None:
        return
    k, v = s.k or s.q, s.v or s.o  # what is not read stands for what has its shape
    gate = Ref("gate") if s.power and call.request.gate is not None else None
    log = gate is not None and call.request.gate == "log_gate"
    refs = [(s.q or (None,))[0], k[0], v[0], (s.o or (None,))[0], s.x, s.start[0], s.end[0], gate]
    refs += [s.dots, s.states]
    places, dtypes, sizes = located(call, refs)
    kinds = [*["rows"] * 5, *["state"] * 2, "gate" if log else "decay", "dots", "kept"]
    places = [left_out(s, x, kind) for x, kind in zip(places, kinds, strict=True)]
    most = limits(call.request, call.where)
    D, V = (x.layout.shape[-1] for x in (places[1], places[2]) if x)
    BD, BV = tile(D, most.keys), tile(V, most.tile)
    fixed, threads = settings(call, s, BD, BV, dtypes, gated=gate is not None)
    tiles, T = -(-V // BV), s.length(call.request.tokens)
    parts = -(-T // s.tokens) if s.tokens else 1
    for counts, strides, first, _ in heads(s.batch, places, own_axes(kinds, s)):
        if not tiles * math.prod(counts):
            continue
        every = walks(kinds, strides, first, s)
        words = b"".join(map(operand, every, dtypes))
        words += struct.pack("<3d", s.read, fixed["write"], s.power)
        words += struct.pack("<10q", T, s.tokens, D, V, *counts[-2:], s.strict, log, tiles, PERIOD)
        yield Kernel(
            load, call.where, "pass.cu", math.prod(counts) * parts * tiles, threads, first, sizes,
            words, functools.partial(constants, fixed, every, sizes, (D, D, V, V, V), call.where),
        )  # fmt: skip


def own_axes(kinds: Sequence[str], s: Launch) -> list[int]:
    """Return how many axes are each operand's own; a state has one of segments."""
    return [OWN[kind] + (kind == "state" and s.tokens > 0) for kind in kinds]


def walks(
    kinds: Sequence[str], strides: Sequence[Shape], places: Sequence[Place | None], s: Launch
) -> list[Shape]:
    """Return each operand's strides: of three batch axes, of segment, row and column."""
    found = []
    for kind, lead, x in zip(kinds, strides, places, strict=True):
        own = (0, 0, 0) if x is None else x.layout.strides
        if x is None or kind == "kept":
            pass
        elif kind == "state":  # (D, V), whose rows are there its columns
            own = (own[0] if s.tokens else 0, own[-1], own[-2])
        elif kind == "dots":
            own = (own[0], own[1], 0)
        elif kind == "rows":
            own = (0, *own)
        else:
            own = (0, own[0] if own else 0, 0)
        found.append((*lead, *own))
    return found


def settings(
    call: Call, s: Launch, BD: int, BV: int, dtypes: Sequence[Any], *, gated: bool
) -> tuple[dict[str, Any], int]:
    """Return the constants of a pass but those that alignment decides, and threads of a block."""
    narrow = call.request.dtype == "bfloat16"
    rough = call.request.tf32 or call.request.dtype == "float16"
    rough &= call.request.tokens > FEW
    dots = 0 if s.dots is None else 2 if s.reverse else 1
    fixed = {
        "NARROW": int(narrow), "BD": BD, "BV": BV, "W": CHUNK,
        "READ": int(bool(s.q)), "UPDATE": int(bool(s.k)), "GATED": int(gated),
        "V_IS_K": int(s.k[:1] == s.v[:1] != ()), "WRITE": int(s.write != 1), "ADD": int(s.add),
        "REVERSE": int(s.reverse), "BOTH": int(s.symmetric), "DOTS": dots,
        "KEEP": int(s.states is not None), "PARTS": 1 if rough else 2,
        "TYPE_O": 2 if dtypes[3] is None else TYPES[str(dtypes[3])],
        "SUM_TYPE": "float" if narrow else "double", "write": s.write,
    }  # fmt: skip
    return fixed, 32 * (BV // 16 if BV > 64 else 4)


def constants(
    fixed: Mapping[str, Any],
    strides: Sequence[Shape],
    sizes: Sequence[int],
    columns: Sequence[int],
    card: Card,
    addresses: Sequence[int],
) -> tuple[Constants, int]:
    """Return all constants of a pass and the bytes of shared memory that it takes."""
    found = dict(fixed)
    del found["write"]
    element = 2 if found["NARROW"] else 4
    for i, (name, n) in enumerate(zip("QKVOX", columns, strict=True)):
        size = (2, 2, 4)[found["TYPE_O"]] if name == "O" else element
        kind = 1 if sizes[i] == size else 2 if sizes[i] == 2 and name != "O" else 0
        moves = (addresses[i], n * sizes[i], *(x * sizes[i] for x in strides[i][:-1]))
        whole = kind and strides[i][-1] == 1 and not any(x % 16 for x in moves)
        found[f"ASYNC_{name}"] = kind if whole else 0
    for found["STAGES"] in (4, 3, 2):
        shared = memory(found)
        if shared <= card.shared:
            break
    return found, shared


def memory(c: Constants) -> int:
    """Bytes of shared memory of a pass with such constants, as pass.cu lays them out."""
    W, element = c["W"], 2 if c["NARROW"] else 4
    wide, tall = W * (c["BD"] + PAD), W * (c["BV"] + PAD)
    read, update = bool(c["READ"]), bool(c["UPDATE"])
    stage = wide * (read + update) + tall * ((update and not c["V_IS_K"]) + bool(c["DOTS"]))
    total = c["STAGES"] * stage * element
    total += (2 + 2 * c["BOTH"]) * W * (W + PAD) * element if read and update else 0
    total += tall * (4 if c["ADD"] or c["TYPE_O"] == 2 else 2) if read else 0
    total += 3 * (6 * W + 4) * 4 if c["GATED"] else 0
    warps = c["BV"] // 16 if c["BV"] > 64 else 4
    rows = (0, 2 * warps, 2 * warps + 6 * W // 16)[c["DOTS"]]
    return int(total + rows * W * (4 if c["SUM_TYPE"] == "float" else 8))


AXES, TERMS, SUMMED = 8, 4, 2  # of a sum, as in sum.cu


def total(load: Load, call: Call, s: Sum) -> Iterator[Kernel]:
    """Return the kernels of a Sum; of many terms each adds to what the one before made."""
    o = call.place(s.o)
    terms = [(factor, call.place(x), call.dtypes[x.name]) for factor, x in s.terms]
    while True:
        some, terms = terms[:TERMS], terms[TERMS:]
        if math.prod(o.layout.shape):
            yield _sum(load, call, o, call.dtypes[s.o.name], some)
        if not terms:
            return
        terms.insert(0, (1.0, o, call.dtypes[s.o.name]))


def _sum(
    load: Load,
    call: Call,
    o: Place,
    dtype: Any,
    terms: Sequence[tuple[float, Place, Any]],
    gate: tuple[int, Place, Any] | None = None,
) -> Kernel:
    """Return the kernel of a sum; of gradients of a gate with its number, place and dtype."""
    shape, strides, _ = o.layout
    lists, sums = [strides], []
    for _, x, _ in terms:
        walked, summed = axes_of(x, shape)
        lists.append(walked)
        sums.append(merged(summed))
    number, place, kind = gate or (0, None, None)
    lists.append((0,) * len(shape) if place is None else place.layout.strides)
    axes = merged([(n, *steps) for n, *steps in zip(shape, *lists, strict=True)], AXES)
    found = padded(axes, len(lists))
    words = b""
    for i in range(TERMS):
        there = i < len(terms)
        reduced = [*(sums[i] if there else []), (1, 0), (1, 0)][:2]
        words += struct.pack(
            f"<{AXES + 5}qd", *(found[2 + i] if there else [0] * AXES),
            *(n for n, _ in reduced), *(step for _, step in reduced),
            TYPES[str(terms[i][2])] if there else 0, terms[i][0] if there else 0.0,
        )  # fmt: skip
    count = math.prod(shape)
    words += struct.pack(
        f"<{3 * AXES + 4}q", *found[0], *found[1], *found[-1], TYPES[str(dtype)],
        0 if kind is None else TYPES[str(kind)], count, len(terms),
    )  # fmt: skip
    places = [*(x for _, x, _ in terms), *[None] * (TERMS - len(terms)), place, o]
    sizes = [*(d.itemsize for *_, d in terms), *[0] * (TERMS - len(terms))]
    sizes += [0 if kind is None else kind.itemsize, dtype.itemsize]
    exact = str(dtype) == "float64" or number == 1  # a decay's terms are
    constants = {"TOTAL": "double" if exact else "float", "GATE_KIND": number}
    return Kernel(
        load, call.where, "sum.cu", -(-count // 256), 256, places, sizes, words,
        lambda addresses: (constants, 0),
    )  # fmt: skip


def axes_of(x: Place, shape: Shape) -> tuple[Shape, list[tuple[int, ...]]]:
    """Return how a term is walked by the axes of a sum, and what of its own is summed."""
    of, steps, _ = x.layout
    extra = max(0, len(of) - len(shape))
    missing = (0,) * (len(shape) - len(of))
    pairs = list(zip(of, steps, strict=True))
    summed: list[tuple[int, ...]] = [pair for pair in pairs[:extra] if pair[0] != 1]
    walked = []
    for (n, step), size in zip(pairs[extra:], shape[len(missing) :], strict=True):
        walked.append(0 if n == 1 else step if n == size else 0)
        summed += [(n, step)] if n != size and n != 1 else []
    return (*missing, *walked), summed


def gate_sum(load: Load, call: Call, s: GateSum) -> Iterator[Kernel]:
    """Return the kernel of a GateSum: that of a sum, to a decay's shape of the last axis too."""
    log = call.request.gate == "log_gate"
    o, gate = (x if log else unsqueezed(x) for x in (call.place(s.o), call.place(s.gate)))
    terms = [(1.0, call.place(x), call.dtypes[x.name]) for x in s.terms]
    if math.prod(o.layout.shape):
        yield _sum(
            load, call, o, call.dtypes[s.o.name], terms,
            (2 if log else 1, gate, call.dtypes[s.gate.name]),
        )  # fmt: skip


def unsqueezed(x: Place) -> Place:
    """Return an array with one more axis behind."""
    shape, strides, offset = x.layout
    return x._replace(layout=Layout((*shape, 1), (*strides, 0), offset))


def summable(call: Call, s: GateSum) -> bool:
    """Whether one kernel does a GateSum."""
    shape = call.place(s.o).layout.shape
    shape = shape if call.request.gate == "log_gate" else (*shape, 1)
    axes = (merged(axes_of(call.place(x), shape)[1], AXES) for x in s.terms)
    return len(s.terms) <= TERMS and all(len(x) <= SUMMED for x in axes)


def merged(axes: Sequence[tuple[int, ...]], most: int = SUMMED) -> list[tuple[int, ...]]:
    """Make neighbouring axes, each its size and strides, one where all strides allow."""
    found: list[tuple[int, ...]] = []
    for n, *steps in axes:
        if n == 1:
            continue
        if found and all(a == b * n for a, b in zip(found[-1][1:], steps, strict=True)):
            found[-1] = (found[-1][0] * n, *steps)
        else:
            found.append((n, *steps))
    if len(found) > most:
        raise Unsupported(
            f"backend cupy adds arrays of at most {most} axes that are not one in memory, here are"
            f" {len(found)}; use backend='array_api'"
        )
    return found


def padded(axes: Sequence[tuple[int, ...]], operands: int) -> list[tuple[int, ...]]:
    """Return sizes and each operand's strides of as many axes as a kernel counts."""
    return list(zip(*axes, *[(1, *(0,) * operands)] * (AXES - len(axes)), strict=True))
