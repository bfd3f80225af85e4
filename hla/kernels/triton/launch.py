"""Launches of the Triton pass: tiles, settings, and kernels kept ready."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import FakeTensor

from ...core.passes import Shape
from ...core.request import Request
from ...device import scan
from ...device import segments as rule
from ...device.scan import Call, Place
from ...device.steps import Launch, Limits, Ref
from ...errors import Unsupported
from .causal import pass_kernel

Result = TypeVar("Result")
PERIOD = 256  # tokens between the states that they keep for it
GATES = (None, "decay", "log_gate")  # by their numbers in a kernel
FEW = 16  # tokens that are multiplied exactly: their one or two terms can cancel to the roundings
WIDEST = 128  # a float32 state of 128 x 128 takes half of the registers of 8 warps
# TF32 operands, of twice the bytes: a tile holds fewer keys, and none go along with it, whose
# products would leave no registers (ptxas 12.8 then took the stack's address for that of an
# operand, a fault on the device: V = 257 with 65 keys and a log gate). float32 operands in parts of
# 16 bits have the same limits, but for the keys on Hopper.
WIDE = Limits(WIDEST // 2, 0, WIDEST, 16, tile=WIDEST, chunk=32, period=PERIOD)


class Config(NamedTuple):
    """Tokens in a chunk, warps, and chunks loaded ahead plus one."""

    W: int
    warps: int
    stages: int


def config(
    D: int,
    V: int,
    V2: int,
    operand: str,
    gated: int,
    written: bool,
    mirrored: bool,
    major: int = 9,
    chunk: int = 0,
    *,
    read: bool = True,
) -> Config:
    """Launch settings by tiles, what is multiplied, the weights of k v, and architecture.

    They fix the order of every sum, so they depend on nothing that varies from call to call. What a
    gate's gradient is made of counts by the same ``chunk`` in all its launches. Timed on an H100;
    for other architectures what compiles and spills least, not timed.

    On Hopper Triton lets a chunk's last product run on into the next chunk. Of an operand that is
    also read from registers, for a product of 32 tokens or to be weighed, it then holds one copy
    too few (triton-lang/triton 6691, 7110): the next load lands on what the product still reads. So
    the last product must be one that the next chunk awaits at once: S2 is updated before S, and
    where k and v are read in each other's place (``mirrored``) and weighed a chunk has 32 tokens.
    Without queries nothing awaits it: the kernel then tests the state in registers, always true.
    tests/test_kernels.py looks for such loads. On Blackwell a scaled accumulator that another
    product reads is not safe with loads ahead either (10993).
    """
    if chunk:
        found = config(D, V, V2, operand, gated, written, mirrored, major, read=read)
        return found._replace(W=chunk)
    large, shared = D * V >= 128 * 64, mirrored and (gated > 0 or written)
    warps = 8 if large and max(V, V2) > 64 else 4  # of 16 rows of the state each
    if major != 9:
        return Config(32, warps, 1 if major == 10 else 2)
    if operand == "float32":
        return Config(32 if large and (V2 or mirrored) else 64, warps, 2)
    if operand == "tf32":
        return Config(64, warps, 2)
    if gated == 2 and not read and not V2:  # a chunk's chain of weights binds: few chunks
        return Config(64, warps, 3)
    if gated == 2 or V2 or shared or (gated and large):
        return Config(32, warps, 4)
    return Config(64, warps, 3)


def gate_chunk(D: int, V: int, gate: str | None, one: bool, major: int = 9) -> int:
    """Tokens in a chunk of the launches of bfloat16 that serve a gate's gradient.

    By the widths of k and v and whether they are one array, as `config` has it for the passes of dq
    and dv alike; sums of pairs add registers to theirs.
    """
    small = tile(D) * tile(V) < 128 * 64
    return 64 if major == 9 and gate == "decay" and small and not one else 32


@functools.cache
def narrow(major: int) -> Limits:
    """Return what one launch of bfloat16 takes."""
    chunk = functools.partial(gate_chunk, major=major)
    return WIDE._replace(keys=WIDEST, tail=16, second=WIDEST, chunk=chunk)


@functools.cache
def capability(device: torch.device) -> int:
    """Major compute capability of a device; the interpreter has Hopper's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def follows(device: torch.device) -> bool:
    """Whether kernels can begin before the one before has ended, waiting before they touch memory.

    Those of carried states and of warpgroups do, whose programs then fill what is freed first. A
    pass lets the next one begin, no more: its programs may be few and small, and would gather on
    the multiprocessors that the kernel before left idle.
    """
    return device.type == "cuda" and capability(device) >= 9


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter has Hopper's."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else 132


def segments(request: Request, where: torch.device) -> int:
    """Return the tokens of a segment, 0 for the whole sequence as one."""
    wide = max(request.k_shape[-1], request.v_shape[-1]) > 64  # one program a multiprocessor
    return rule.tokens(request, processors(where) * (1 if wide else 2), PERIOD, WIDEST)


def limits(request: Request, where: torch.device) -> Limits:
    """Return what one launch takes."""
    if request.dtype == "bfloat16":
        return narrow(capability(where))
    whole = capability(where) == 9 and multiplied(request, where, narrow=False)[0] == "float32"
    return WIDE._replace(keys=WIDEST) if whole else WIDE


@functools.cache
def tile(n: int) -> int:
    """Width of the tile that serves n keys or values."""
    return min(WIDEST, max(16, 1 << max(n - 1, 0).bit_length()))


def value_tiles(n: int) -> int:
    """Count the tiles that serve n values: programs a head, rows of ``dots``."""
    return -(-n // tile(n))


def shapes_alone(x: torch.Tensor) -> bool:
    """Whether a tensor has no memory and never will, so that there is nothing to launch."""
    return x.is_meta or isinstance(x, FakeTensor)


def addresses(operands: Sequence[torch.Tensor | None]) -> list[Any]:
    """Addresses of what a launch reads and writes; None of None.

    Raises
    ------
    Unsupported
        One has no memory, or a tracer is recording, which would see the memory and not the launch.
    """
    if torch._C._is_tracing() or _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:
        raise Unsupported(
            "backend triton launches kernels that torch's tracers do not see; trace hla.scan, which"
            " is one operator, or use backend='array_api'"
        )
    try:
        found = [None if x is None else x.data_ptr() for x in operands]
    except RuntimeError:  # under torch.func
        found = [0] * len(operands)
    if 0 in found:
        for x, address in zip(operands, found, strict=True):
            if address == 0 and x is not None and x.numel() > 0:
                raise Unsupported(
                    f"backend triton reads memory, and a {type(x).__name__} without any came (a"
                    " wrapper, or one of torch.func); call hla.scan, which is one operator of"
                    " torch, or use backend='array_api'"
                )
    return found


class Kernel:
    """A kernel with all but the memory of its operands.

    The first call compiles it, by Triton's own look-up, which costs as long as a pass over a short
    sequence takes; later ones launch what that found by addresses alone.
    """

    def __init__(
        self,
        function: Any,
        grid: tuple[int, ...],
        operands: Sequence[Place | None],
        sizes: Sequence[int],
        *scalars: Any,
        **constants: Any,
    ) -> None:
        self.function, self.grid, self.operands = function, (*grid, 1, 1)[:3], operands
        self.scalars, self.constants = scalars, constants
        options: dict[str, Any] = {
            n: constants.pop(n) for n in ("num_warps", "num_stages", "launch_pdl") if n in constants
        }
        if constants.get("FOLLOWS"):
            options["launch_pdl"] = True
        self.options, self.compiled = options, None
        absent = (x is None for x in (*operands, *scalars))
        known = *constants.values(), *options.values()
        self.key = (function, *absent, *sizes, *known)  # what it is compiled for
        self.start: Any = None
        self.head: tuple[Any, ...] = ()
        self.rest = (*scalars, *constants.values())
        slots = [-1 if x is None else x.slot for x in operands]  # the last address is none
        self.slots: Callable[[list[Any]], tuple[Any, ...]] = itemgetter(*slots)
        self.offsets = [
            0 if x is None else x.layout.offset * size
            for x, size in zip(operands, sizes, strict=True)
        ]
        self.moved = any(self.offsets)

    def compile(self, arrays: list[Any], dtypes: Mapping[int, torch.dtype]) -> None:
        """Compile it as the first call would; arrays that are yet to be have a dtype alone."""
        views = [
            dtypes[x.slot] if x and x.slot >= len(arrays) else view(arrays, x)
            for x in self.operands
        ]
        self.function.warmup(
            *views, *self.scalars, grid=self.grid, **self.constants, **self.options
        )

    def __call__(self, arrays: list[Any], addresses: list[Any], stream: int | None) -> None:
        """Launch it on arrays, whose addresses are known; of no stream by Triton's own way."""
        if self.compiled is None:
            views = [view(arrays, x) for x in self.operands]
            self.compiled = self.function[self.grid](
                *views, *self.scalars, **self.constants, **self.options
            )
            return
        given = self.slots(addresses)
        if self.moved:
            given = tuple(
                p if p is None else p + n for p, n in zip(given, self.offsets, strict=True)
            )
        if stream is None:
            self.compiled[self.grid](*given, *self.rest)
            return
        if self.start is None:
            self.start, self.head = starter(self.compiled)
        self.start(*self.grid, stream, *self.head, *given, *self.rest)


def version() -> tuple[int, ...]:
    """Return the first two numbers of Triton's version."""
    return tuple(int(x) for x in triton.__version__.split(".")[:2])


def starter(kernel: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what launches a compiled kernel without hooks, and what it takes after the stream.

    What Triton 3.6 does first, in Python, is to allocate what few kernels use: it takes a third of
    a launch. Without that, and in other versions, it is Triton's own.
    """
    run, metadata = kernel.run, (kernel.packed_metadata, None, None, None)
    if version() == (3, 6) and not (run.global_scratch_size or run.profile_scratch_size):
        modes = run.launch_cooperative_grid, run.launch_pdl
        return run.launch, (kernel.function, *modes, None, None, *metadata)
    return run, (kernel.function, *metadata)


class Aligned:
    """Of two kernels that do the same, the first where all rows begin at whole 16 bytes.

    Memory is aligned alike in all calls of one plan, so the first call chooses.
    """

    def __init__(self, aligned: Kernel, other: Kernel, rows: int) -> None:
        self.aligned, self.other, self.rows = aligned, other, rows
        self.chosen: Kernel | None = None

    def __call__(self, arrays: list[Any], addresses: list[Any], stream: int | None) -> None:
        """Launch one of them."""
        if self.chosen is None:
            self.chosen = self.choice(addresses)
        self.chosen(arrays, addresses, stream)

    def choice(self, addresses: list[Any]) -> Kernel:
        """Return the one for these addresses."""
        starts = zip(self.aligned.slots(addresses), self.aligned.offsets, strict=True)
        apart = [p and (p + n) % 16 for p, n in itertools.islice(starts, self.rows)]
        return self.other if any(apart) else self.aligned


_begun: dict[tuple[Any, ...], Future[None]] = {}  # by what kernels are compiled for
_turn = threading.Lock()  # of the compiler's Python


@functools.cache
def prepare_compiler() -> tuple[Future[Any], ...]:
    """Begin what Triton does before its first kernel: .4 s each, which need no Python.

    A C compiler makes its driver, unless that is on disk, and Triton hashes its own files, 430 MB.
    What fails, the first kernel raises.
    """
    threads = ThreadPoolExecutor(2, "hla-compiles")
    driver = threads.submit(lambda: triton.runtime.driver.active)
    hashed = threads.submit(lambda: triton.runtime.cache.triton_key())
    threads.shutdown(wait=False)
    return driver, hashed


def compile_together(
    kernels: Sequence[Kernel],
    arrays: list[Any],
    dtypes: Mapping[int, torch.dtype],
    where: torch.device,
) -> list[Future[None]]:
    """Begin to compile kernels, each in a thread; what fails, its first call raises.

    They are translated in order, behind those that were begun before.

    Parameters
    ----------
    kernels : sequence of Kernel
        Those that others were alike are left to their first call, which finds those.
    arrays, dtypes
        As `Kernel.compile` takes them.
    where : torch.device
        The kernels'.

    Returns
    -------
    list of Future
        What to wait for: also those that were begun before.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        return []
    new = {x.key: x for x in kernels if x.key not in _begun}
    if new:
        asked: Future[None] = Future()
        thread = ThreadPoolExecutor(1, "hla-compiles")
        begun = thread.submit(_compile, list(new.values()), arrays, dtypes, where, asked)
        thread.shutdown(wait=False)  # it ends with its work, for which Python waits at exit
        _begun.update(dict.fromkeys(new, begun))
        wait((asked, begun), return_when=FIRST_COMPLETED)
    return [_begun[x.key] for x in kernels]


def is_begun(kernel: Kernel) -> bool:
    """Whether a kernel is being compiled or was, or is left to its first call."""
    return kernel.key in _begun or not hasattr(triton, "AsyncCompileMode")


def _compile(
    kernels: list[Kernel],
    arrays: list[Any],
    dtypes: Mapping[int, torch.dtype],
    where: torch.device,
    asked: Future[None],
) -> None:
    """Compile kernels at once, but for what Python does, in which threads would only hinder it."""
    wait(prepare_compiler(), timeout=60)  # of a process that forked meanwhile they never end

    def all_of_them(_: Any) -> None:
        with (
            ThreadPoolExecutor(len(kernels), "hla-compiles") as threads,
            triton.AsyncCompileMode(_Building(threads), ignore_errors=True),
        ):
            for kernel in kernels:
                with _turn:
                    _take_turns(kernel.function)
                    kernel.compile(arrays, dtypes)
            asked.set_result(None)

    on_device(where, all_of_them)  # each thread has a device of its own


def _take_turns(function: Any) -> None:
    """Let a kernel be translated while no other is: that sets filters of all threads' warnings."""
    function.device_caches[triton.runtime.driver.active.get_current_device()]  # makes ASTSource
    function.ASTSource = _one_by_one(function.ASTSource)


@functools.cache
def _one_by_one(source: Any) -> Any:
    """Return a class of kernels' texts that are translated one at a time.

    Meanwhile a C compiler makes what launches a kernel, up to Triton 3.6: .6 s each. Triton keeps
    it on disk, and no part of it depends on what the kernel becomes.
    """
    if hasattr(source, "turn"):
        return source

    class OneByOne(source):  # type: ignore[misc]
        turn = _turn

        def make_ir(self, *given: Any, **options: Any) -> Any:
            with ThreadPoolExecutor(1, "hla-compiles") as meanwhile:
                with contextlib.suppress(RuntimeError):  # no new thread while Python ends
                    if version() <= (3, 6):
                        meanwhile.submit(_launcher, self, _Unknown())
                with self.turn:
                    return super().make_ir(*given, **options)

    return OneByOne


def _launcher(source: Any, metadata: Any) -> None:
    """Make what launches a kernel, which stays on disk."""
    triton.runtime.driver.active.launcher_cls(source, metadata)


class _Unknown:
    """What is known of a kernel before it is compiled."""

    def __getattr__(self, name: str) -> None:
        return None


class _Building(NamedTuple):
    """Threads that also make what launches a kernel.

    A kernel is loaded when it is called: that is nothing to do beside a user's work.
    """

    threads: Executor

    def submit(self, compiled: Callable[[], Any]) -> Future[Any]:
        return self.threads.submit(self.built, compiled)

    @staticmethod
    def built(compiled: Callable[[], Any]) -> Any:
        kernel = compiled()
        _launcher(kernel.src, kernel.metadata)
        return kernel


def stream_of(device: torch.device) -> int | None:
    """Return the current stream; None where Triton must call its hooks at each launch."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        return None
    found: int = torch._C._cuda_getCurrentRawStream(device.index)
    return found


def on_device(device: torch.device, launch: Callable[[int | None], Result]) -> Result:
    """Launch on torch's stream of a device, which is the current one meanwhile."""
    if device.type != "cuda":
        return launch(None)
    if torch._C._cuda_getDevice() == device.index:
        return launch(stream_of(device))
    with torch.cuda.device(device):
        return launch(stream_of(device))


def empty_strided(
    shape: Shape, strides: Shape, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Allocate a tensor on the current device."""
    if device.type == "cuda":  # as code of torch's compiler does, in less than half of the time
        return _empty_strided_cuda(shape, strides, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def view(arrays: list[Any], x: Place | None) -> torch.Tensor | None:
    """Return the tensor that an operand means."""
    if x is None:
        return None
    whole, (shape, strides, offset) = arrays[x.slot], x.layout
    return whole.as_strided(shape, strides, whole.storage_offset() + offset)


def passes(call: Call, launch: Launch) -> Iterator[Kernel]:
    """Return the kernels of one launch: one, or more where the batch has axes that are not one."""
    if (s := launch.nonempty()) is None:
        return
    refs, gated = operands(s, call.request), 0
    if s.power and call.request.gate is not None:
        gated, refs["gate"] = GATES.index(call.request.gate), Ref("gate")
    places, sizes = placed(call, refs, s)
    parts = -(-s.length(call.request.tokens) // s.tokens) if s.tokens else 1
    constants, chosen, scalars = settings(call, s, places, gated)
    tiles = value_tiles(width(places["v"]))
    for counts, first, strides in heads(s.batch, places, gated == 2, cut=s.tokens > 0):
        if not tiles * math.prod(counts):
            continue
        every = listed(NAMES[: GATE + 1], strides, cut=s.tokens > 0)
        yield Kernel(
            pass_kernel, (math.prod(counts) * parts * tiles,), first, sizes,
            *scalars[:9], *counts[-2:], *every, *scalars[9:],
            **constants, num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip


def placed(
    call: Call, refs: Mapping[str, Ref | None], s: Launch
) -> tuple[dict[str, Place | None], list[int]]:
    """Return where operands of a launch lie, by name, and the bytes of an element of each.

    Without what its first segment has where that is left out.
    """
    places = {name: None if ref is None else call.place(ref) for name, ref in refs.items()}
    gate = "gate" if call.request.gate == "log_gate" else "decay"
    kinds = dict.fromkeys(STATES, "state") | {"gate": gate}
    places = {name: scan.left_out(s, x, kinds.get(name, "rows")) for name, x in places.items()}
    return places, [0 if ref is None else call.dtypes[ref.name].itemsize for ref in refs.values()]


def heads(
    batch: Shape, places: Mapping[str, Place | None], log: bool, *, cut: bool = False
) -> Iterator[tuple[Shape, list[Place | None], list[Shape]]]:
    """Yield the grids of a kernel that does one head at a time, of at most three batch axes each.

    Parameters
    ----------
    batch : tuple of int
        Of the kernel; an operand may lack its axes or be broadcast over them.
    places : mapping
        Operands by name; `RANKS` has how many axes are their own.
    log : bool
        Whether the gate has tokens.
    cut : bool
        Whether there are segments, one more axis of the states (-3).

    Yields
    ------
    counts : tuple of int
        Sizes of the axes.
    first : list of Place or None
        What the first head has of each operand.
    strides : list of tuple of int
        Of each operand, along those axes and its own; 0 for what it lacks.
    """
    ranks = [1 if name == "gate" and log else RANKS.get(name, 2) for name in places]
    ranks = [n + (cut and name in STATES) for n, name in zip(ranks, places, strict=True)]
    for counts, strides, first, own in scan.heads(batch, list(places.values()), ranks):
        # a decay has no tokens
        every = zip(strides, own, ranks, strict=True)
        yield counts, first, [(*a, *(b or (0,) * max(n, 1))) for a, b, n in every]


def listed(names: Iterable[str], strides: Iterable[Shape], *, cut: bool) -> list[int | None]:
    """Return strides of operands one after the other; None of segments where there are none."""
    found: list[int | None] = []
    for name, own in zip(names, strides, strict=False):
        found += own if cut or name not in STATES else (*own[:3], None, *own[3:])
    return found


NAMES = ("q", "k", "v", "o", "start", "end", "v2", "o2", "start2", "end2", "x", "qc", "kc", "gate",
         "dots", "states")  # fmt: skip
# the axes that are an operand's own; others have two
RANKS = {"gate": 0, "states": 3, "kept1": 3, "kept2": 3}
# and these one more, of segments
STATES = {f"{when}{i}" for when in ("start", "end") for i in ("", 1, 2, 3)}
STATES |= {"S", "F", "R", "Z", "end", "left"}  # of the adjoint's sweeps
STATES |= {"m", "me", "n", "ne"}  # of denominators
GATE = NAMES.index("gate")


def operands(s: Launch, request: Request) -> dict[str, Ref | None]:
    """Return the kernel's operands by name. What is not read stands for what has its shape."""
    k, v = s.k or s.q, s.v or s.o
    found: dict[str, Ref | None] = dict.fromkeys(NAMES)
    for name, refs in (
        ("q", s.q), ("k", k), ("v", v), ("o", s.o), ("start", s.start), ("end", s.end),
    ):  # fmt: skip
        second = name + ("c" if name in "qk" else "2")
        found |= dict(zip((name, second), refs, strict=False))
    return found | {"x": s.x, "dots": s.dots, "states": s.states}


def multiplied(request: Request, where: torch.device, *, narrow: bool) -> tuple[str, Any, str]:
    """Return how products are taken, ``narrow`` of bfloat16: name, operands' dtype, precision."""
    if narrow:
        return "bf16", tl.bfloat16, "ieee"
    if (request.tf32 or request.dtype == "float16") and request.tokens > FEW:
        return "tf32", tl.float32, "tf32"
    # Two float16 parts: products of three bfloat16 ones are six, whose conversions, one at a time
    # at a sixteenth of the rate, took most of the time (hla2, D = 128: 3.28 ms).
    exact = "fp16x3" if where.type == "cuda" else "ieee"  # of the interpreter the fastest
    return "float32", tl.float32, exact


def width(x: Place | None) -> int:
    """Columns of an operand."""
    return 0 if x is None else x.layout.shape[-1]


def settings(
    call: Call, s: Launch, places: Mapping[str, Place | None], gated: int
) -> tuple[dict[str, Any], Config, tuple[Any, ...]]:
    """Return a pass's constants, its launch settings, and its numbers (the last two of states)."""
    T, (D, V, V2, DC) = (
        s.length(call.request.tokens),
        (width(places[n]) for n in ("k", "v", "v2", "kc")),
    )
    read, write = s.read, s.write
    states = places["states"]
    if not any(s.start) and not any(s.end) and states is None:  # the pass is linear in k v
        read, write = read * write, 1.0
    narrow = call.dtypes[(s.k or s.q)[0].name] == torch.bfloat16
    operand, dtype, precision = multiplied(call.request, call.where, narrow=narrow)
    v_is_k = s.k[:1] == s.v[:1] != () and (gated < 2 or not s.q)  # else loading again is faster
    BD, BC, BV, BV2 = tile(D), tile(DC) if DC else 0, tile(V), tile(V2)
    parts = operand == "float32" and not gated  # of k: they are made once, and not weighed
    mirrored = s.symmetric or (v_is_k and not parts)
    weighed = gated, write != 1.0, mirrored
    dotted = s.dots is not None
    chosen = config(BD, BV, V2, operand, *weighed, capability(call.where), s.chunk, read=bool(s.q))
    row, step, apart = 0, 0, 0
    if states is not None:
        step, row = states.layout.strides[-3:-1]
        apart = states.layout.shape[-3] * step
    constants = {
        "READ": bool(s.q), "UPDATE": bool(s.k), "STRICT": s.strict, "REVERSE": s.reverse,
        "GATE": gated, "WRITE": write != 1.0, "ADD": s.add,
        "START": any(s.start), "END": any(s.end),
        "TWO": places["v2"] is not None, "BOTH": s.symmetric, "DOT": dotted,
        "PAIRS": dotted and s.reverse,
        "EVERY": 0 if states is None else PERIOD // chosen.W, "ROW": row,
        "V_IS_K": v_is_k,
        "BD": BD, "BC": BC, "BV": BV, "BV2": BV2, "W": chosen.W,
        "WHOLE_D": D == BD, "WHOLE_V": V % BV == 0, "WHOLE_V2": V2 == BV2,
        "OPERAND": dtype,
        "PRECISION": precision,
        "LEADS": follows(call.where),
    }  # fmt: skip
    numbers = read, write, s.power, T, s.tokens or None, D, DC, V, V2, apart, step
    return constants, chosen, numbers
