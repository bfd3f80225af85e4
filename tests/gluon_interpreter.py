"""An interpreter of the part of Gluon that our kernels use: NumPy on the host, no GPU.

`run` calls the Python function behind a Gluon kernel with Gluon's names replaced by those below.
The partitions of `warp_specialize` take turns; a seeded random choice says whose it is at every
access to shared memory, copy, product, barrier and wait. Asynchronous copies and products take
effect at random moments between their issue and the wait that covers them.

What would be a hang, an unfenced access or a race on the device is a `Fault` here, with the line.
Races are found whatever the order was: every partition has a clock that its arrivals advance and
pass on (vector clocks), and an element of shared memory the times of its last write and reads.

Not modelled: layouts, what the compiler does with registers, and threads inside a partition (the
compiler places barriers between a partition's own accesses to shared memory).
"""

import functools
import operator
import re
import sys
import types
from collections import deque
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from conftest import installed
from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

greenlet = installed("greenlet")
UNWRITTEN, COPYING = 1 << 15, 1 << 14  # flags of an element; below: partitions not fenced from it
PARTITIONS, NEVER = 8, 2**31 - 1
RANK = ("int1", "int8", "int16", "int32", "int64", "bf16", "fp16", "fp32", "fp64")
STORAGE = {"fp32": np.float32, "fp64": np.float64, "bf16": np.float32, "fp16": np.float16}


class Fault(AssertionError):
    """What the device would get wrong, or what Gluon would refuse."""


def check(condition, message):
    if not condition:
        raise Fault(f"{message} ({machine.blame or here()})")


def here():
    """Partition and line of kernel code that runs."""
    return f"{machine.partition.name}, {line(kernel_frame())}"


def kernel_frame():
    """Innermost frame of kernel code."""
    frame = sys._getframe()
    while frame and "__kernel__" not in frame.f_globals:
        frame = frame.f_back
    return frame


def line(frame):
    return f"{frame.f_code.co_name}:{frame.f_lineno}" if frame else "?"


def host_dtype(array) -> tl.dtype:
    name = array.dtype.name
    if machine.exact and name == "float64":
        name = "float32"
    return getattr(gl, "int1" if name == "bool" else name)


class Tensor:
    """Values in registers: an array and the type that they are declared with."""

    def __init__(self, a, dtype):
        a = np.asarray(a)
        if dtype.name not in STORAGE:  # integers are kept wide, to see an overflow
            bits = dtype.primitive_bitwidth
            a = a.astype(bool if bits == 1 else np.int64)
            check(bits in (1, 64) or (abs(a) < 2 ** (bits - 1)).all(), f"{dtype} overflows")
        elif machine.exact:
            a = a.astype(np.float64)
        else:
            a = a.astype(ml_dtypes.bfloat16) if dtype.name == "bf16" else a
            a = a.astype(STORAGE[dtype.name])
        self.a, self.dtype = a, dtype

    shape = property(lambda self: list(self.a.shape))
    T = property(lambda self: Tensor(self.a.T, self.dtype))
    type = property(lambda self: types.SimpleNamespace(
        element_ty=self.dtype, shape=self.shape, layout=None
    ))  # fmt: skip

    def to(self, dtype, bitcast=False):
        check(not bitcast, "bitcast is not interpreted")
        integers = dtype.name not in STORAGE and self.dtype.name in STORAGE
        return Tensor(np.trunc(self.a) if integers else self.a, dtype)

    def __getitem__(self, key):
        return Tensor(self.a[key], self.dtype)

    def __bool__(self):
        check(self.a.ndim == 0, "a tensor has no single truth")
        return bool(self.a)

    def __index__(self):
        return int(self.a)

    __int__ = __index__

    def __float__(self):
        return float(self.a)

    def reshape(self, *shape):
        shape = shape[0] if isinstance(shape[0], (list, tuple)) else shape
        return Tensor(self.a.reshape([int(n) for n in shape]), self.dtype)

    def permute(self, *order):
        order = order[0] if isinstance(order[0], (list, tuple)) else order
        return Tensor(self.a.transpose(order), self.dtype)

    def trans(self, *order):
        return self.permute(order or (1, 0))

    __neg__ = lambda self: Tensor(-self.a, self.dtype)  # noqa: E731
    __invert__ = lambda self: Tensor(~self.a, self.dtype)  # noqa: E731


class Pointer:
    """Elements of a flat buffer."""

    def __init__(self, buffer, offset, element):
        self.buffer, self.offset, self.element = buffer, np.asarray(offset, np.int64), element

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.element))
    shape = property(lambda self: list(self.offset.shape))

    def __add__(self, other):
        offset = self.offset + (other.a if isinstance(other, Tensor) else other)
        return Pointer(self.buffer, offset, self.element)

    __radd__ = __add__

    def __sub__(self, other):
        return self + -other

    def __getitem__(self, key):
        return Pointer(self.buffer, self.offset[key], self.element)

    def access(self, mask):
        """Offsets, and which of them are asked for; all of those must be there."""
        asked = np.broadcast_to(True if mask is None else value(mask), self.offset.shape)
        inside = (self.offset >= 0) & (self.offset < self.buffer.size)
        check((inside | ~asked).all(), "an access outside its array")
        check(not machine.early, "an access before the kernel before has ended")
        return np.where(asked, self.offset, 0), asked


class At(NamedTuple):
    """An argument of `run` that points at an element of a flat array."""

    buffer: np.ndarray
    offset: int


def pointer(x) -> Pointer:
    """Return a pointer to the first element of a NumPy array, which may be a view."""
    if isinstance(x, At):
        return Pointer(*x, host_dtype(x.buffer))
    root = x
    while root.base is not None:
        root = root.base
    check(isinstance(root, np.ndarray) and root.flags.c_contiguous, "expected a NumPy array's view")
    first = (x.ctypes.data - root.ctypes.data) // x.itemsize if x.size else 0
    return Pointer(root.reshape(-1), first, host_dtype(x))


def value(x):
    return x.a if isinstance(x, (Tensor, Accumulator)) else x


def kind(dtype):
    return RANK.index(dtype.name)


def common(*xs):
    """Type of the result of what takes these; Python's numbers have none of their own."""
    declared = [x.dtype for x in xs if isinstance(x, Tensor)]
    best = max(declared, key=kind, default=gl.int32)
    numbers = [x for x in xs if not isinstance(x, Tensor)]
    if best.name not in STORAGE and any(isinstance(x, float) for x in numbers):
        return gl.float32
    return gl.int32 if best.name == "int1" and any(type(x) is int for x in numbers) else best


def ranks(*xs):
    n = {np.ndim(value(x)) for x in xs} - {0}
    check(len(n) < 2, f"tensors of ranks {sorted(n)} in one operation")


def binary(function, *, compares=False, divides=False):
    def forward(self, other):
        if isinstance(other, (Pointer, Accumulator)):
            return NotImplemented
        ranks(self, other)
        dtype = common(self, other)
        with np.errstate(all="ignore"):
            if divides and dtype.name not in STORAGE:
                dtype = gl.float32
            a = function(*(Tensor(value(x), dtype).a for x in (self, other)))
        return Tensor(a, gl.int1 if compares else dtype)

    return forward, lambda self, other: forward(scalar(other), self)


def truncated(a, b):
    """Integer quotient as C has it."""
    return np.trunc(a / b).astype(np.int64) if np.size(a) else a


for name, function in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "lshift": operator.lshift, "rshift": operator.rshift,
    "floordiv": truncated, "mod": np.fmod,
}.items():  # fmt: skip
    forward, backward = binary(function)
    setattr(Tensor, f"__{name}__", forward)
    setattr(Tensor, f"__r{name}__", backward)
Tensor.__truediv__, Tensor.__rtruediv__ = binary(operator.truediv, divides=True)
for name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{name}__", binary(getattr(operator, name), compares=True)[0])
Tensor.__hash__ = None


def scalar(x, dtype=None):
    """Return a number as the kernel sees it."""
    if isinstance(x, (Tensor, Pointer)):
        return x
    wide = gl.int32 if -(2**31) <= x < 2**31 else gl.int64
    return Tensor(x, dtype or (gl.float32 if isinstance(x, float) else wide))


class Shared:
    """A view of shared memory: values, and what is known of each element.

    ``flags``, ``pending`` reads that have not happened, ``writer`` and ``wrote`` (its clock then),
    and of each partition the clock of its last ``reads``.
    """

    def __init__(self, dtype, planes):
        self.dtype, self.planes = dtype, planes
        self.a, self.flags, self.pending, self.writer, self.wrote, *self.reads = planes

    shape = property(lambda self: list(self.a.shape))
    rank = property(lambda self: self.a.ndim)

    def view(self, function):
        return Shared(self.dtype, [function(x) for x in self.planes])

    def index(self, i):
        check(0 <= int(i) < self.a.shape[0], f"index {int(i)} of {self.shape}")
        return self.view(lambda x: x[int(i)])

    def slice(self, start, length, dim=0):
        check(int(start) + length <= self.a.shape[dim], f"slice {int(start)}+{length}")
        cut = (slice(None),) * dim + (slice(int(start), int(start) + length),)
        return self.view(lambda x: x[cut])

    def permute(self, order):
        return self.view(lambda x: x.transpose([int(i) for i in order]))

    def reshape(self, shape):
        return self.view(lambda x: x.reshape([int(n) for n in shape]))

    def reinterpret(self, dtype, shape, layout):
        """The same memory as wider numbers: values of its own, which spoil those that were here."""
        many = dtype.primitive_bitwidth // self.dtype.primitive_bitwidth
        check(self.a.size == many * np.prod(shape), f"{shape} of {self.shape}")
        _, *known = (x.reshape(*shape[:-1], -1)[..., ::many] for x in self.planes)
        self.a[...] = np.nan
        return Shared(dtype, [np.full(shape, np.nan, self.a.dtype), *known])

    _reinterpret = reinterpret

    def ordered(self, who):
        """Check that the last writes happened before what this partition does now."""
        check(not (self.flags & COPYING).any(), f"{who} where a copy is in flight")
        known = np.array(machine.clock)
        late = self.wrote > known[self.writer]
        check(not late.any(), f"{who} unordered with a write")

    def write(self, who, flags):
        """Note a write, after all earlier reads and writes."""
        self.ordered(f"{who} writes")
        check(not self.pending.any(), f"{who} writes what is still read")
        for number, (reads, known) in enumerate(zip(self.reads, machine.clock, strict=True)):
            check(reads.max() <= known, f"{who} writes what partition {number} may still read")
        self.flags[...] = flags
        self.writer[...] = me = machine.partition.number
        self.wrote[...] = machine.clock[me]

    def read(self, who, fenced=False):
        """Check that there is something to read."""
        self.ordered(f"{who} reads")
        check(not (self.flags & UNWRITTEN).any(), f"{who} reads what was never written")
        mine = self.flags & (1 << machine.partition.number)
        check(not fenced or not mine.any(), f"{who} reads what was written and not fenced")

    def note(self, time=None):
        """Note a read by this partition, now or, in flight, never to end."""
        me = machine.partition.number
        self.reads[me][...] = machine.clock[me] if time is None else time

    def store(self, x):
        machine.pause()
        check(x.shape == self.shape, f"a store of {x.shape} into {self.shape}")
        check(x.dtype == self.dtype or machine.exact, f"a store of {x.dtype} into {self.dtype}")
        self.write("a store", flags=0xFF)
        self.a[...] = x.a

    def load(self, layout=None):
        machine.pause()
        self.read("a load")
        self.note()
        return Tensor(self.a.copy(), self.dtype)


class Accumulator:
    """The result of a product in flight, or of a wait that does not cover it."""

    def __init__(self, product, shape):
        self.product, self.shape, self.dtype = product, shape, gl.float32

    def __getattr__(self, name):
        raise Fault(f"a product is read before a wait covers it ({here()})")

    a = property(lambda self: self.__getattr__("a"))


class Late:
    """Something asynchronous, who issued it, and the shared memory that it reads."""

    def __init__(self, action, reads=()):
        self.action, self.issued, self.reads = action, here(), reads
        for x in reads:
            x.read("a product or bulk store", fenced=True)
            x.pending += 1
            x.note(NEVER)

    def __call__(self):
        machine.blame = f"issued by {self.issued}"
        for x in self.reads:
            x.pending -= 1
        self.action()
        machine.blame = ""


class Product:
    """An asynchronous product, and when it has run its value."""

    def __init__(self, a, b, acc):
        self.operands, self.acc, self.value = (a, b), acc, None

    def __call__(self):
        a, b = (x.a for x in self.operands)
        acc = self.acc.product.value if isinstance(self.acc, Accumulator) else self.acc
        self.value = a @ b if acc is None else acc + a @ b


class Line:
    """What a partition has issued, in order: what is yet to happen, and to be waited for."""

    def __init__(self):
        self.queue, self.open = deque(), deque()

    def issue(self, late):
        self.queue.append(late)
        self.open.append(late)

    def wait(self, left):
        """Let all but the last ones happen."""
        while len(self.queue) > left:
            self.queue.popleft()()
        while len(self.open) > left:
            for x in self.open.popleft().reads:
                x.note()
        for late in self.open:
            for x in late.reads:
                x.note(NEVER)


class Barrier:
    def __init__(self, count):
        self.count = self.left = count
        self.bytes = self.done = 0
        self.given = self.passed = [0] * PARTITIONS  # clocks of arrivals, of a whole phase
        self.seen: dict[int, int] = {}  # the last phase that a partition waited for
        self.used = False

    def arrive(self, n, clock):
        self.left -= n
        self.given = [max(x) for x in zip(self.given, clock, strict=True)]
        check(self.left >= 0, f"more arrivals than the barrier's {self.count}")
        self.turn()

    def turn(self):
        if self.left == 0 and self.bytes == 0:
            self.left, self.done, self.passed = self.count, self.done + 1, self.given


class Partition(NamedTuple):
    name: str
    number: int
    warps: int
    weight: float
    products: Line
    copies: Line
    stores: Line
    clock: list  # of each partition, when last heard of


class Worker(greenlet.greenlet):
    """A partition on its way, and what it waits for."""

    def __init__(self, partition, function, args):
        super().__init__(lambda: function(*args))
        self.partition = partition
        self.until = self.frame = self.reason = None


class Machine:
    """What one program of a grid runs on."""

    def __init__(
        self, warps=4, seed=0, exact=False, copies=True, program=(0, 0, 0), grid=(1, 1, 1)
    ):
        self.random = np.random.default_rng([seed, *program])
        self.exact, self.program, self.grid = exact, program, grid
        self.copies = copies  # whether cp.async counts as a write that is to be fenced
        self.lazy = self.random.choice([0.02, 0.3, 3])  # weight of what is asynchronous
        self.memory: list[Shared] = []
        self.barriers: dict[int, Barrier] = {}
        self.queues: list[deque] = []  # in each, one after the other
        self.loose: list[deque] = []  # the same, of one action
        self.blame = ""
        self.early = False  # a later kernel may begin, and this one has not waited for the last
        self.workers: list[Worker] = []
        self.worker = None
        self.partition = self.whole = self.part("whole", 0, warps)

    def part(self, name, number, warps):
        weight = float(np.exp(self.random.normal(0, 1.5)))
        clock = [1] * PARTITIONS
        part = Partition(name, number, warps, weight, Line(), Line(), Line(), clock)
        self.queues += [part.products.queue, part.copies.queue, part.stores.queue]
        return part

    def background(self):
        """Queues with something that can happen."""
        self.loose = [q for q in self.loose if q]
        return [q for q in self.queues if q] + self.loose

    def pause(self, until=None, reason=""):
        """Let others run; return once ``until`` holds."""
        if self.worker is not None:
            worker = self.worker
            worker.until, worker.reason = until, reason
            worker.frame = kernel_frame()
            worker.parent.switch()
            return
        while (queues := self.background()) and (
            (until and not until()) or self.random.random() < 0.3
        ):
            queues[self.random.integers(len(queues))].popleft()()
        check(until is None or until(), f"deadlock: {reason}")

    clock = property(lambda self: self.partition.clock)

    def released(self):
        """Return this partition's clock and advance it."""
        clock, me = list(self.clock), self.partition.number
        self.clock[me] += 1
        return clock

    def acquired(self, clock):
        self.clock[:] = [max(x) for x in zip(self.clock, clock, strict=True)]

    def specialize(self, functions, warps):
        """Run partitions until all have returned."""
        outer, clock = self.partition, self.released()
        for i, ((function, args), n) in enumerate(zip(functions, warps, strict=True)):
            name = f"{function.__name__}"
            self.workers.append(Worker(self.part(name, i, n), function, args))
            self.workers[-1].partition.clock[:] = [max(2, c + 1) for c in clock]
        try:
            while live := [w for w in self.workers if not w.dead]:
                self.turn(live)
        finally:
            for worker in self.workers:
                if not worker.dead:
                    worker.throw()  # ends it where it stands
            self.partition, self.worker = outer, None
            for worker in self.workers:
                self.acquired(worker.partition.clock)
            self.workers = []

    def turn(self, live):
        """Let one partition go on to its next pause, or something asynchronous happen."""
        able = [w for w in live if w.until is None or w.until()]
        queues = self.background()
        if not able and not queues:
            lines = [f"{w.partition.name} at {line(w.frame)} waits for {w.reason()}" for w in live]
            raise Fault("deadlock: " + "; ".join(lines))
        weights = np.array([w.partition.weight for w in able] + [self.lazy] * len(queues))
        i = self.random.choice(len(weights), p=weights / weights.sum())
        if i >= len(able):
            return queues[i - len(able)].popleft()()
        self.worker = worker = able[i]
        self.partition = worker.partition
        return worker.switch()


machine = Machine()


def barrier_of(bar) -> Barrier:
    place = bar.a.ctypes.data
    check(place in machine.barriers and bar.a.size == 1, "this is no initialised barrier")
    machine.barriers[place].used = True
    return machine.barriers[place]


def unused():
    """Find arrays of barriers that were initialised and that nobody used.

    The compiler gives their memory away, and what is then read there is not defined.
    """
    used = {place: x.used for place, x in machine.barriers.items()}
    if not any(used.values()):  # of no tokens
        return []
    arrays = [x.a for x in machine.memory if x.a.ctypes.data in used]
    places = [range(a.ctypes.data, a.ctypes.data + a.nbytes, a.itemsize) for a in arrays]
    return [a.shape for a, x in zip(arrays, places, strict=True) if not any(map(used.get, x))]


def named(frame, bar):
    """What a partition calls a barrier."""
    for name, x in frame.f_locals.items() if frame else ():
        if isinstance(x, Shared) and np.may_share_memory(x.a, bar.a):
            return f"{name}[{(bar.a.ctypes.data - x.a.ctypes.data) // 8}]"
    return "a barrier"


def mbarrier_init(bar, count):
    check(bar.dtype == gl.int64 and bar.a.size == 1, "a barrier is one int64")
    machine.barriers[bar.a.ctypes.data] = Barrier(int(count))


def mbarrier_wait(bar, phase, pred=True, deps=()):
    if not pred:
        return
    b, frame, me = barrier_of(bar), kernel_frame(), machine.partition.number
    check(int(phase) in (0, 1), f"phase {int(phase)}")
    last = b.seen.get(me)
    turn = -(int(phase) & 1) if last is None else last + 1
    check((turn & 1) == int(phase), f"{named(frame, bar)}: waits again for the phase it has seen")
    b.seen[me] = turn
    what = lambda: f"phase {turn} of {named(frame, bar)}, {b.left} of {b.count} to arrive"  # noqa
    machine.pause(lambda: b.done > turn, what)
    check(b.done == turn + 1, f"{named(frame, bar)} is a whole phase ahead of who waits")
    machine.acquired(b.passed)


def mbarrier_arrive(bar, count=1, pred=True):
    machine.pause()
    if pred:
        barrier_of(bar).arrive(int(count), machine.released())


def mbarrier_expect(bar, bytes, pred=True):
    machine.pause()
    if pred:
        b = barrier_of(bar)
        b.bytes += int(bytes)
        b.arrive(1, machine.released())


def copied(smem, values, flags):
    """Start a copy into shared memory; return what ends it."""
    smem.write("a copy", flags=COPYING)
    smem.a[...] = np.nan

    def end():
        smem.a[...] = values()
        smem.flags[...] = flags

    return end


def async_copy(smem, p, mask=None, **_):
    machine.pause()
    check(smem.shape == p.shape, f"a copy of {p.shape} into {smem.shape}")
    check(smem.dtype == p.element or machine.exact, f"a copy of {p.element} into {smem.dtype}")
    offset, asked = p.access(mask)
    values = lambda: np.where(asked, p.buffer[offset].astype(smem.a.dtype), 0)  # noqa: E731
    machine.partition.copies.issue(Late(copied(smem, values, 0xFF * machine.copies)))


def async_arrive(bar, increment_count=True):
    machine.pause()
    b, threads = barrier_of(bar), 32 * machine.partition.warps
    if increment_count:
        b.left += threads
    machine.partition.copies.issue(Late(functools.partial(b.arrive, threads, machine.released())))


def commit_group():
    machine.partition.copies.issue(Late(GROUP))


def GROUP():
    """End a group of copies."""


def wait_group(left=0):
    queue = machine.partition.copies.queue
    ends = [i for i, x in enumerate(queue) if x.action is GROUP]
    whole = len(ends) - int(left)
    machine.partition.copies.wait(len(queue) - (ends[whole - 1] + 1 if whole > 0 else 0))
    machine.pause()


class Descriptor(NamedTuple):
    """A tensor map: an array (a view), and the block that one copy moves."""

    array: Any
    block_shape: list
    dtype: tl.dtype
    layout: Any = None

    def part(self, coord):
        """Slices of the block in the array and in the block."""
        cut, own = [], []
        for c, n, size in zip(map(int, coord), self.block_shape, self.array.shape, strict=True):
            low, high = max(c, 0), max(min(c + n, size), 0)
            cut.append(slice(low, max(low, high)))
            own.append(slice(low - c, max(low, high) - c))
        return tuple(cut), tuple(own)


def descriptor(array, block_shape, layout=None) -> Descriptor:
    """Return the tensor map of an array."""
    check(array.strides[-1] == array.itemsize, "the last axis of a tensor map has stride 1")
    check(all(s % 16 == 0 for s in array.strides[:-1]), "strides of a tensor map are 16 bytes")
    return Descriptor(array, list(block_shape), host_dtype(array), layout)


def tma_load(desc, coord, bar, smem, pred=True, **_):
    machine.pause()
    if not pred:
        return
    check(smem.shape == list(desc.block_shape), f"a copy of {desc.block_shape} to {smem.shape}")
    cut, own = desc.part(coord)
    b, size = barrier_of(bar), smem.a.size * smem.dtype.primitive_bitwidth // 8

    def values():
        x = np.zeros(smem.a.shape, smem.a.dtype)
        x[own] = desc.array[cut]
        return x

    end, clock = copied(smem, values, 0), machine.released()

    def arrive():
        end()
        b.bytes -= size
        b.arrive(0, clock)

    machine.loose.append(deque([Late(arrive)]))


def tma_store(desc, coord, smem, **_):
    machine.pause()
    check(smem.shape == list(desc.block_shape), f"a copy of {smem.shape} to {desc.block_shape}")
    cut, own = desc.part(coord)

    def end():
        desc.array[cut] = smem.a[own].astype(desc.array.dtype)

    machine.partition.stores.issue(Late(end, [smem]))


def store_wait(pendings, **_):
    machine.partition.stores.wait(int(pendings))
    machine.pause()


def warpgroup_mma(a, b, acc, *, use_acc=True, precision=None, is_async=False, **_):
    machine.pause()
    (M, K), (K2, N) = a.shape, b.shape
    check(K == K2 and acc.shape == [M, N], f"a product {a.shape} {b.shape} into {acc.shape}")
    check(M % 64 == 0 and N % 8 == 0 and N <= 256 and K % 16 == 0, f"a product {M} {N} {K}")
    check(a.dtype == b.dtype and isinstance(b, Shared), "operands of a product")
    check(acc.dtype == gl.float32, "an accumulator is float32")
    before = None if not use_acc else acc if isinstance(acc, Accumulator) else acc.a
    product = Product(a, b, before)
    shared = [x for x in (a, b) if isinstance(x, Shared)]
    machine.partition.products.issue(Late(product, shared))
    result = Accumulator(product, [M, N])
    return result if is_async else warpgroup_mma_wait(0, deps=[result])


def warpgroup_mma_wait(num_outstanding=0, deps=None):
    check(bool(deps), "deps must be given")
    machine.partition.products.wait(int(num_outstanding))
    queue = machine.partition.products.open
    found = []
    for x in deps:
        open_ = isinstance(x, Accumulator) and any(p.action is x.product for p in queue)
        done = isinstance(x, Accumulator) and not open_
        found.append(Tensor(x.product.value, gl.float32) if done else x)
    machine.pause()
    return found[0] if len(found) == 1 else tuple(found)


def fence_async_shared(cluster=False):
    """Own writes are then fenced for all, those that happened before for this partition."""
    machine.pause()
    me, known = machine.partition.number, np.array(machine.clock)
    for x in machine.memory:
        seen = np.where(x.wrote <= known[x.writer], 0xFFFF ^ (1 << me), 0xFFFF)
        x.flags &= np.where(x.writer == me, 0xFF00, seen).astype(np.uint16)


def allocate_shared_memory(dtype, shape, layout, initial=None):
    shape = [int(n) for n in shape]
    wide = np.float64 if machine.exact else STORAGE.get(dtype.name)
    a = np.full(shape, np.nan, wide) if dtype.name in STORAGE else np.zeros(shape, np.int64)
    planes = [np.full(shape, UNWRITTEN, np.uint16), *(np.zeros(shape, np.int8) for _ in "pw")]
    planes += [np.zeros(shape, np.int32) for _ in range(1 + PARTITIONS)]
    found = Shared(dtype, [a, *planes])
    machine.memory.append(found)
    if initial is not None:
        found.store(initial)
    return found


def load(p, mask=None, other=None, **_):
    offset, asked = p.access(mask)
    found = p.buffer[offset] if p.buffer.size else np.zeros(offset.shape, p.buffer.dtype)
    fill = np.nan if p.element.name in STORAGE else 0
    fill = np.broadcast_to(fill if other is None else value(other), offset.shape)
    wide = np.float64 if p.element.name in STORAGE else np.int64
    return Tensor(np.where(asked, found.astype(wide), fill), p.element)


def store(p, x, mask=None, **_):
    offset, asked = p.access(mask)
    x = np.broadcast_to(value(x), offset.shape)
    p.buffer[offset[asked]] = x[asked].astype(p.buffer.dtype)


def arange(start, end, layout=None):
    check((end - start) & (end - start - 1) == 0, f"arange of {end - start}: no power of 2")
    return Tensor(np.arange(start, end), gl.int32)


def full(shape, x, dtype, layout=None):
    return Tensor(np.full([int(n) for n in shape], value(x)), dtype)


def where(condition, x, y):
    ranks(condition, x, y)
    return Tensor(np.where(*map(value, (condition, x, y))), common(x, y))


def elementwise(function):
    def call(*xs, **_):
        xs = [scalar(x) for x in xs]
        ranks(*xs)
        with np.errstate(all="ignore"):
            return Tensor(function(*(x.a for x in xs)), common(*xs))

    return call


def associative_scan(x, axis, combine, reverse=False):
    a = np.flip(x.a, axis) if reverse else x.a
    parts = [Tensor(y, x.dtype) for y in np.moveaxis(a, axis, 0)]
    found = [parts[0]]
    for y in parts[1:]:
        found.append(combine(found[-1], y))
    a = np.moveaxis(np.stack([y.a for y in found]), 0, axis)
    return Tensor(np.flip(a, axis) if reverse else a, x.dtype)


def reduced(function):
    def call(x, axis=None, keep_dims=False, **_):
        return Tensor(function(x.a, axis=axis, keepdims=keep_dims), x.dtype)

    return call


def warp_specialize(functions, worker_num_warps, worker_num_regs=None):
    warps = [machine.whole.warps, *worker_num_warps]
    machine.specialize([(f, tuple(args)) for f, args in functions], warps)


def range_(*bounds, **_):
    return map(scalar, range(*map(int, bounds)))


def launch_dependents():
    machine.early = True


def wait_for_the_kernel_before():
    machine.early = False


def split(x):
    return tuple(Tensor(x.a[..., i], x.dtype) for i in (0, 1))


def assembled(text, constraints, args, dtype, **_):
    """Multiplications and sums of packed bfloat16, each rounded once; no other assembly."""
    found = {f"${i}": np.asarray(x.a, np.float64) for i, x in enumerate(args, 1)}
    for line in re.findall(r"[a-z]+\.[^;]+", text):
        if line.startswith("reg"):
            continue
        how = re.fullmatch(r"(?:mul|fma)\.rn\.bf16x2 (\S+), (\S+), (\S+?)(?:, (\S+))?", line)
        check(how is not None, f"{line} is not interpreted")
        a, b, c = (found[name] if name else 0.0 for name in how.groups()[1:])
        found[how[1]] = np.asarray(Tensor(a * b + c, dtype).a, np.float64)
    return Tensor(found["$0"], dtype)


GLUON = {
    "mbarrier.init": mbarrier_init, "mbarrier.wait": mbarrier_wait,
    "mbarrier.arrive": mbarrier_arrive, "mbarrier.expect": mbarrier_expect,
    "mbarrier.invalidate": lambda bar: machine.barriers.pop(bar.a.ctypes.data),
    "async_copy.async_copy_global_to_shared": async_copy, "async_copy.async_load": async_copy,
    "async_copy.mbarrier_arrive": async_arrive, "async_copy.commit_group": commit_group,
    "async_copy.wait_group": wait_group, "tma.async_copy_global_to_shared": tma_load,
    "tma.async_load": tma_load, "tma.async_copy_shared_to_global": tma_store,
    "tma.async_store": tma_store, "tma.store_wait": store_wait,
    "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
    "warpgroup_mma_init": lambda x: x, "fence_async_shared": fence_async_shared,
    "allocate_shared_memory": allocate_shared_memory, "load": load, "store": store,
    "arange": arange, "full": full, "where": where, "inline_asm_elementwise": assembled,
    "zeros": lambda shape, dtype, layout=None: full(shape, 0, dtype),
    "program_id": lambda axis: scalar(machine.program[int(axis)]),
    "num_programs": lambda axis: scalar(machine.grid[int(axis)]),
    "convert_layout": lambda x, layout, **_: x, "set_auto_layout": lambda x, layout: x,
    "barrier": lambda **_: machine.pause(), "thread_barrier": lambda: machine.pause(),
    "warp_specialize": warp_specialize, "associative_scan": associative_scan,
    "gdc_launch_dependents": launch_dependents, "gdc_wait": wait_for_the_kernel_before,
    "sum": reduced(np.sum), "max": reduced(np.max), "min": reduced(np.min),
    "exp": elementwise(np.exp), "exp2": elementwise(np.exp2), "log": elementwise(np.log),
    "log2": elementwise(np.log2), "sqrt": elementwise(np.sqrt), "abs": elementwise(np.abs),
    "minimum": elementwise(np.minimum), "maximum": elementwise(np.maximum),
    "fma": elementwise(lambda x, y, z: x * y + z), "cdiv": lambda a, b: (a + b - 1) // b,
    "reshape": lambda x, *shape: x.reshape(*shape), "permute": lambda x, *o: x.permute(*o),
    "expand_dims": lambda x, axis: Tensor(np.expand_dims(x.a, axis), x.dtype), "split": split,
    "join": lambda x, y: Tensor(np.stack([x.a, y.a], -1), x.dtype),
    "static_range": range, "static_assert": lambda x, message="": check(x, message),
    "device_assert": lambda x, *_: check(np.all(value(x)), "device_assert"),
    "assume": lambda x: check(bool(x), "an assumption does not hold"), "static_print": print,
    "multiple_of": lambda x, n: x, "max_contiguous": lambda x, n: x, "constexpr": lambda x: x,
    "to_tensor": scalar, "cast": lambda x, dtype: x.to(dtype), "num_warps": lambda: machine.whole,
}  # fmt: skip


class Names:
    """A module of Gluon as kernels see it."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return replaced(getattr(self.module, name))


kernels: dict[int, dict[str, Any]] = {}  # globals of a kernel's module, replaced, by their identity


class Interpreted:
    """A function of a kernel; its globals are replaced when it is first called."""

    def __init__(self, function):
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args, **kwargs):
        f, g = self.function, self.function.__globals__
        if id(g) not in kernels:
            kernels[id(g)] = {name: replaced(x) for name, x in g.items()}
            kernels[id(g)] |= {"range": range_, "__kernel__": True}
        new = types.FunctionType(f.__code__, kernels[id(g)], f.__name__)
        new.__defaults__, new.__kwdefaults__ = f.__defaults__, f.__kwdefaults__
        return new(*args, **kwargs)


def replaced(x):
    """Return what stands for a global of a kernel."""
    if isinstance(x, tl.constexpr):
        return x.value
    if isinstance(x, types.ModuleType):
        return Names(x) if x.__name__.startswith("triton.") else x
    if x is tl.constexpr or x is gl.static_range:
        return GLUON[x.__name__]
    home, name = getattr(x, "__module__", None) or "", getattr(x, "__name__", "")
    if home.startswith("triton.") and (isinstance(x, JITFunction) or not isinstance(x, type)):
        place = home.rpartition(".")[2]
        found = GLUON.get(f"{place}.{name}") or GLUON.get(name)
        if found is None and callable(x):
            raise NotImplementedError(f"{home}.{name} is not interpreted")
        return x if found is None else found
    return Interpreted(x.fn) if isinstance(x, JITFunction) else x


def run(
    kernel,
    grid,
    *args,
    num_warps=4,
    launch_pdl=False,
    seed=0,
    exact=False,
    copies=True,
    spare=(),
    **constants,
):
    """Run a kernel on NumPy arrays, which it writes.

    Parameters
    ----------
    kernel : gluon.jit function
    grid : tuple of int
    args : NumPy arrays (a view is its first element and on), `At`, `Descriptor`, numbers; in order
    num_warps : int
        Of the whole kernel, and of the first partition.
    launch_pdl : bool
        Whether it may begin early; that it waits is looked at anyway.
    seed : int
        Of the order in which partitions run and asynchronous work ends.
    exact : bool
        Every float is a float64: what is then wrong is not rounding.
    copies : bool
        Whether products that read what cp.async has written need a fence, as PTX has it; on an
        H100 they were never seen to.
    spare : sequence of tuple of int
        Shapes of arrays of barriers that a kernel has for other values than these.
    constants : what the kernel has as ``gl.constexpr``
    """
    global machine
    kernels.clear()
    grid = (*grid, 1, 1)[:3]
    for program in np.ndindex(*grid):
        machine = Machine(num_warps, seed, exact, copies, program, grid)
        given = [pointer(x) if isinstance(x, (np.ndarray, At)) else x for x in args]
        given = [scalar(x) if type(x) in (int, float) else x for x in given]
        Interpreted(kernel.fn)(*given, **constants)
        part = machine.whole
        check(not part.products.open, "the kernel ends with a product in flight")
        idle = unused()
        check(idle == [*spare], f"initialised barriers of {idle} that nobody uses")
        while queues := machine.background():
            queues[0].popleft()()
