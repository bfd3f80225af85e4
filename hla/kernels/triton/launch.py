"""Launches of the Triton pass: tiles, settings, strides, and kernels kept ready."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor

from ...core.passes import Gate, Shape, broadcast
from ...errors import Unsupported
from .causal import pass_kernel

PERIOD = 256  # tokens between the states that they keep for it
FEW = 16  # tokens that are multiplied exactly: their one or two terms can cancel to the roundings
WIDEST = 128  # a float32 state of 128 x 128 takes half of the registers of 8 warps


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
    tests/test_kernels.py looks for such loads. On Blackwell a scaled accumulator that another
    product reads is not safe with loads ahead either (10993).
    """
    if chunk:
        return config(D, V, V2, operand, gated, written, mirrored, major)._replace(W=chunk)
    large, shared = D * V >= 128 * 64, mirrored and (gated > 0 or written)
    warps = 8 if large and max(V, V2) > 64 else 4  # of 16 rows of the state each
    if major != 9:
        return Config(32, warps, 1 if major == 10 else 2)
    if operand == "float32":  # in three parts a product fills the registers
        return Config(32, 4, 2) if D * V <= 32 * 64 else Config(64, warps, 1)
    if operand == "tf32":
        return Config(64, warps, 2)
    if gated == 2 or V2 or shared or (gated and large):
        return Config(32, warps, 4)
    return Config(64, warps, 3)


def gate_chunk(D: int, V: int, narrow: bool, decay: bool, mirrored: bool, major: int = 9) -> int:
    """Tokens in a chunk of the launches that serve a gate's gradient, by the widths of k and v.

    As `config` has it for the passes of dq and dv alike; sums of pairs add registers to theirs.
    """
    small = tile(int(D)) * tile(int(V)) < 128 * 64  # a compiler's symbols are fixed
    return 64 if major == 9 and narrow and decay and small and not mirrored else 32


@functools.cache
def capability(device: torch.device) -> int:
    """Major compute capability of a device; the interpreter has Hopper's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


class Columns(NamedTuple):
    """One part of a pass's values: its tokens, where their results go, its columns of the state."""

    v: torch.Tensor  # (*batch, T, V)
    o: torch.Tensor | None = None  # (*batch, T, V)
    start: torch.Tensor | None = None  # float32, (*batch, D, V), may lack axes that only q has
    end: torch.Tensor | None = None  # the same, to be written

    @property
    def batch(self) -> Shape:
        """Batch shape of the results, which may lack axes that another part's results have."""
        assert self.o is not None
        return tuple(self.o.shape[:-2])


def widest(dtype: torch.dtype) -> int:
    """Return how many keys a tile holds: float32 operands are split in registers."""
    return WIDEST if dtype == torch.bfloat16 else WIDEST // 2


def further(dtype: torch.dtype) -> int:
    """Return how many columns of keys beyond a tile its launch takes along.

    None of float32, whose products leave no registers for theirs: ptxas 12.8 then took the stack's
    address for that of an operand (V = 257 with 65 keys and a log gate), a fault on the device.
    """
    return 16 if dtype == torch.bfloat16 else 0


@functools.cache
def tile(n: int) -> int:
    """Width of the tile that serves n keys or values."""
    return min(WIDEST, max(16, 1 << max(n - 1, 0).bit_length()))


def value_tiles(n: int) -> int:
    """Count the tiles that serve n values: programs a head, rows of ``dots``."""
    return -(-n // tile(n))


def between(T: int) -> int:
    """Count the states kept: those before each period but the first."""
    return max(0, T - 1) // PERIOD


def in_one(k: torch.Tensor, first: Columns, second: Columns) -> bool:
    """Whether one launch serves two parts of the values: of one batch, states fit the registers."""
    V, V2 = first.v.shape[-1], second.v.shape[-1]
    fit = 0 < V <= WIDEST and 0 < V2 <= (WIDEST if k.dtype == torch.bfloat16 else 16)
    return bool(fit and first.batch == second.batch)


def shapes_alone(written: torch.Tensor) -> bool:
    """Whether what a launch would write has no memory, so that there is nothing to launch."""
    return written.is_meta or isinstance(written, FakeTensor)


def addresses(operands: Sequence[torch.Tensor | None]) -> list[Any]:
    """Addresses of what a launch reads and writes; None of None.

    Raises
    ------
    Unsupported
        One has no memory, or a tracer is recording, which would see the memory and not the launch.
    """
    if torch.jit.is_tracing() or _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None:
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


NONE = (None,) * 4
LAUNCHES = 4096
# Compiled kernels, ready to launch, by all that they are specialized on. Triton's own look-up costs
# as long as a pass over a short sequence takes.
_launches: dict[Any, tuple[Any, tuple[int, int, int], tuple[Any, ...]]] = {}


def causal_pass(
    q: torch.Tensor | None,
    k: torch.Tensor,
    columns: Sequence[Columns],
    gate: Gate,
    *,
    batch: Shape,
    power: int = 1,
    strict: bool = False,
    reverse: bool = False,
    update: bool = True,
    read: float = 1.0,
    write: float = 1.0,
    add: bool = False,
    both: bool = False,
    x: torch.Tensor | None = None,
    qc: torch.Tensor | None = None,
    kc: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
    pairs: bool = False,
    states: torch.Tensor | None = None,
    chunk: int = 0,
    tf32: bool = False,
) -> None:
    """Launch one pass, which writes what its columns name.

    Parameters
    ----------
    q : tensor, (*batch, T, D), or None
        None asks for the state alone; D <= `widest`. Batch axes broadcast; any strides.
    k : tensor, (*batch, T, D)
        Keys; bfloat16, or float16 and float32, for which products are taken in float32.
    columns : sequence of Columns
        One part of the values, or two that are `in_one`.
    gate : Gate
        The decay, raised to ``power``.
    batch : tuple of int
        The common batch shape.
    power, strict, reverse
        As in `hla.core.passes.causal_pass`.
    update : bool
        False reads one state, where it starts, for all tokens.
    read, write : float
        Factors of what is read, and of k v before.
    add : bool
        Add to what ``o`` holds.
    both : bool
        Add the pass with k and v exchanged, which reads the same state; with one part, D = V.
    x, dots : tensor, (*batch, T, V), and (*batch, `value_tiles`, T or 3 T), optional
        With one part and a gate: write into ``dots``, contiguous, float32 or float64, the part of
        sum_v o x that the state gives, token by token, a row a tile.
    pairs : bool
        With ``reverse`` and ``dots`` of 3 T: write behind it, of q_t.k_j times v_t.x_j over the
        pairs of its chunk but those of a token with itself, each token's sum as t and then as j.
    states : tensor, (*batch, `between`, V, D), optional
        Of contiguous rows and batch axes: write the state before every `PERIOD` but the first.
    chunk : int
        Tokens in a chunk, with ``dots``.
    qc, kc : tensor, (*batch, T, C), optional
        More columns of q and k, as many as `further` says; with one part. The state has D + C rows.
    tf32 : bool
        Multiply float32 in TF32, which is exact for what came as float16; not of `FEW` tokens.
    """
    gated, weights = 0, None
    if power and gate.log_gate is not None:
        gated, weights = 2, gate.log_gate
    elif power and gate.decay is not None:
        gated, weights = 1, gate.decay
    first, second = columns[0], columns[1] if len(columns) > 1 else None
    tf32 = tf32 and k.shape[-2] > FEW
    written = first.end if q is None else first.o
    assert written is not None
    if shapes_alone(written):
        return
    operands = (q, k, *first, *(second or NONE), x, qc, kc, weights, dots, states)
    pointers = addresses(operands)
    seen = [
        None if y is None else (y.shape, y.stride(), y.dtype, p % 16)
        for y, p in zip(operands, pointers, strict=True)
    ]
    if first.start is None and first.end is None and states is None:  # the pass is linear in k v
        read, write = read * write, 1.0
    v_is_k = first.v is k and gated < 2  # weighed by tokens: slower than loading the same lines
    flags = (gated, strict, reverse, update, write != 1.0, add, both, tf32, v_is_k, pairs, chunk)
    key = (batch, k.device, flags, *seen)
    if key in _launches:
        kernel, grid, rest = _launches[key]
        with torch.cuda.device_of(k):
            kernel[grid](*pointers, read, write, power, *rest)
        return
    if 0 in batch and q is not None:  # nobody reads, and yet states of keys may be asked
        alone = [c._replace(o=None) for c in columns]
        held = [c.end.shape[:-2] for c in columns if c.end is not None]
        if held:
            causal_pass(
                None, k, alone, gate, batch=broadcast(*held), power=power, strict=strict,
                reverse=reverse, write=write, both=both, kc=kc, tf32=tf32,
            )  # fmt: skip
        return
    ranks = (*(2,) * 13, max(0, gated - 1))
    sizes, strides = _plan(batch, ranks, operands[:-2])
    if len(sizes) > 3:
        for i in range(batch[0]):
            q_i, k_i, *parts, x_i, qc_i, kc_i, gate_i = (
                _entry(y, i, r, len(batch)) for y, r in zip(operands, ranks, strict=False)
            )
            columns_i = [Columns(*parts[:4]), Columns(*parts[4:])][: len(columns)]
            causal_pass(
                q_i, k_i, columns_i, Gate(gate_i, None) if gated == 1 else Gate(None, gate_i),
                batch=batch[1:], power=power, strict=strict, reverse=reverse, update=update,
                read=read, write=write, add=add, both=both, x=x_i, qc=qc_i, kc=kc_i,
                dots=None if dots is None else dots[i], pairs=pairs,
                states=None if states is None else states[i], chunk=chunk, tf32=tf32,
            )  # fmt: skip
        return
    T, D, V = k.shape[-2], k.shape[-1], first.v.shape[-1]
    V2 = 0 if second is None else second.v.shape[-1]
    DC = 0 if kc is None else kc.shape[-1]
    BD, BC, BV, BV2 = tile(D), tile(DC) if DC else 0, tile(V), tile(V2)
    narrow = k.dtype == torch.bfloat16
    operand = "bf16" if narrow else "tf32" if tf32 else "float32"
    # The matrix unit drops the last bits of a sum after every 32 bytes of operands: products of
    # three bfloat16 parts take half as many such steps as those of two TF32 parts, and err half.
    exact = "bf16x6" if k.device.type == "cuda" else "ieee"  # which the interpreter has not
    weighed = gated, write != 1.0, both or v_is_k
    chosen = config(BD, BV, V2, operand, *weighed, capability(k.device), chunk)
    grid = (math.prod(sizes) * value_tiles(V), 1, 1)
    if not grid[0]:
        return
    step, row = (0, 0) if states is None else states.stride()[-3:-1]
    constants = {
        "READ": q is not None, "UPDATE": update, "STRICT": strict, "REVERSE": reverse,
        "GATE": gated, "WRITE": write != 1.0, "ADD": add,
        "START": first.start is not None, "END": first.end is not None,
        "TWO": second is not None, "BOTH": both, "DOT": dots is not None, "PAIRS": pairs,
        "EVERY": 0 if states is None else PERIOD // chosen.W, "ROW": row,
        "V_IS_K": v_is_k,
        "BD": BD, "BC": BC, "BV": BV, "BV2": BV2, "W": chosen.W,
        "WHOLE_D": D == BD, "WHOLE_V": V % BV == 0, "WHOLE_V2": V2 == BV2,
        "OPERAND": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "tf32" if tf32 else exact,
    }  # fmt: skip
    apart = (0, 0) if states is None else (states.shape[-3] * step, step)
    rest = (T, D, DC, V, V2, *(1, 1, *sizes)[-2:], *strides, *apart)
    with torch.cuda.device_of(k):
        kernel = pass_kernel[grid](
            *operands, read, write, power, *rest, **constants,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    if kernel is not None:  # not under the interpreter
        if len(_launches) >= LAUNCHES:
            _launches.clear()
        _launches[key] = kernel, grid, (*rest, *constants.values())


def _plan(
    batch: Shape, ranks: Shape, operands: Sequence[torch.Tensor | None]
) -> tuple[Shape, Shape]:
    """Batch sizes, with neighbouring axes made one where all operands allow, and all strides.

    An operand's last ``rank`` axes are its own; it has three batch strides before theirs. Along a
    batch axis that it lacks or is broadcast over its stride is 0. An axis of one entry keeps its
    stride where there is no other: what a kernel is compiled for then is that of many heads.
    """
    leads, own = [], []
    for rank, x in zip(ranks, operands, strict=True):
        shape, stride = ((1,) * rank, (0,) * rank) if x is None else (x.shape, x.stride())
        lead = len(shape) - rank
        given = zip(shape[:lead], batch[len(batch) - lead :], stride[:lead], strict=True)
        missing = (0,) * (len(batch) - lead)
        leads.append((*missing, *(0 if n < full else step for n, full, step in given)))
        own.append(stride[lead:])
    own[-1] = own[-1] or (0,)  # a decay has no tokens
    sizes: list[int] = []
    steps: list[Shape] = []
    for i, (n, step) in enumerate(zip(batch, zip(*leads, strict=True), strict=True)):
        if n == 1 and (steps or i < len(batch) - 1):
            continue
        if steps and all(a == b * n for a, b in zip(steps[-1], step, strict=True)):
            sizes[-1], steps[-1] = sizes[-1] * n, step
        else:
            sizes.append(n)
            steps.append(step)
    steps = [(0,) * len(leads)] * (3 - len(steps)) + steps
    each = zip(zip(*steps, strict=True), own, strict=True)
    return tuple(sizes), tuple(s for lead, rest in each for s in (*lead, *rest))


def _entry(x: torch.Tensor | None, i: int, rank: int, axes: int) -> torch.Tensor | None:
    """Entry ``i`` of the first of ``axes`` batch axes; all of x where it lacks that axis."""
    if x is None or x.ndim < axes + rank:
        return x
    return x.select(0, 0 if x.shape[0] == 1 else i)
