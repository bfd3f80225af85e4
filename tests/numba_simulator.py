"""The Numba backend's kernels on the host, for NumPy arrays: their text, in Numba's simulator.

This module is a backend: `pytest` fixtures put it into the table of backends by its name. What the
kernels call of instructions.cu has a twin here. What a warp does together waits for its lanes.
"""

import collections
import contextvars
import ctypes
import sys
import threading

import array_api_compat.numpy as xp
import numpy as np
from conftest import installed
from cuda_interpreter import CARD, dtype, empty, view
from numba import cuda, types
from numba.cuda.simulator import kernel as simulator

from hla.contract import Capabilities, Machine
from hla.kernels.cupy.run import Library, Memory
from hla.kernels.numba import chunks
from hla.kernels.numba.device import KERNELS, TEXTS

NAME = "numba simulated"
greenlet = installed("greenlet")
CAPABILITIES = Capabilities(
    ("float16", "bfloat16", "float32"), libraries=("numpy",), forms=("chunked",), packed=True
)
KINDS = [dtype("bfloat16"), *map(np.dtype, ("f2", "f4", "f8", "?", "i8"))]
LANES, ROWS = np.arange(32), np.arange(8)
ROW = LANES[:, None] // 4 + ROWS // 2 % 2 * 8  # of a lane's eight elements of a block
COLUMN = 2 * (LANES[:, None] % 4) + ROWS % 2 + ROWS // 4 * 8
BLOCK = "block", None  # the threads of it that have not ended


def wait(group=BLOCK, function=None, given=None):
    """Wait for the threads of a group (its name, their number); return this one's of the results.

    The function is given what every thread gave, in order, and finds a result for each.
    """
    return greenlet.getcurrent().parent.switch(group, function, given)


class Block(simulator.BlockManager):
    """The threads of a block, which take turns: each runs until it waits, the last come first.

    So each is ahead of the others or behind them, wherever it does not wait. Numba's own are
    threads of the system, which it asks again and again whether they wait.
    """

    def run(self, grid_point, *args):
        system = threading.current_thread()  # whose indices are those of the thread that runs
        system.blockIdx, system.syncthreads = simulator.Dim3(*grid_point), wait
        ready, waiting = [], collections.defaultdict(list)
        for point in np.ndindex(*self._block_dim):
            thread = greenlet.greenlet(self._f)
            thread.gr_context, thread.index = contextvars.copy_context(), simulator.Dim3(*point)
            ready.append((thread, args))
        left = len(ready)
        while ready:
            thread, given = ready.pop()
            system.threadIdx = thread.index
            group, *posted = thread.switch(*given) or (BLOCK,)
            if thread.dead:
                left -= 1
            else:
                waiting[group].append((thread, *posted))
            if group in waiting and len(waiting[group]) == (group[1] or left):
                ready += _results(waiting.pop(group))
        assert not waiting, f"some threads wait for ever: {list(waiting)}"


def _results(posted):
    """Pairs (thread, arguments of its next turn) of those of a group, in the order they came."""
    (function,) = {id(function): function for _, function, _ in posted}.values()
    if function is None:
        return [(thread, (None,)) for thread, *_ in posted]
    order = sorted(posted, key=lambda x: x[0].index.x)
    found = function([given for *_, given in order])
    results = {thread: x for (thread, *_), x in zip(order, found, strict=True)}
    return [(thread, (results[thread],)) for thread, *_ in posted]


simulator.BlockManager = Block


class Running:
    """Numba's module as the kernel that runs has it, for functions of other files."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module.cuda, name)


class Twin:
    """The functions of instructions.cu for threads of the simulator."""

    f32, f64, i32, i64 = types.float32, types.float64, int, int

    def __init__(self, macros):
        narrow = macros.get("NARROW", 0)
        self.kind = KINDS[0 if narrow else 2]
        self.add, self.type_o = macros.get("ADD", 0), macros.get("TYPE_O", 2)
        self.out_kind = KINDS[2] if self.add else KINDS[self.type_o]
        double = macros.get("SUM_TYPE") == "double"
        self.dot, self.dot_kind = (self.f64, "f8") if double else (self.f32, "f4")
        self.pitches = {n for name, n in macros.items() if name.startswith("PITCH")}
        self.module = None

    @staticmethod
    def device(function):
        return function

    def shared(self, kind, at=0, count=1):
        """Shared memory from some byte on; a count of -1 means all of it."""
        memory = self.module.cuda.shared.array(0, types.uint8)
        return np.frombuffer(memory, kind, count, at)

    @staticmethod
    def lane():
        return threading.current_thread().threadIdx.x % 32

    def together(self, function, given):
        x = threading.current_thread().threadIdx.x
        return wait((f"warp {x // 32}", 32), function, given)

    # Blocks: eight elements a lane

    def _elements(self, rows, columns, at, pitch):
        assert pitch in self.pitches
        lane, tile = self.lane(), self.shared(self.kind, count=-1)
        return tuple(tile[at + rows[lane] * pitch + columns[lane]].astype(np.float32))

    def load(self, at, pitch):
        return self._elements(ROW, COLUMN, at, pitch)

    def load_turned(self, at, pitch):
        return self._elements(COLUMN, ROW, at, pitch)

    second, second_turned = load, load_turned

    def multiply(self, *given):
        return self.together(_product, given)

    def _rounded(self, x):
        return tuple(np.asarray(x, np.float32).astype(self.kind).astype(np.float32))

    def block_of(self, *x):
        return self._rounded(x)

    def weighed(self, *given):
        weights, x = np.array(given[:4], np.float32), np.array(given[4:], np.float32)
        return self._rounded(x * weights[ROWS // 4 * 2 + ROWS % 2])

    @staticmethod
    def power_of_2(x):
        with np.errstate(over="ignore"):
            return np.exp2(np.float32(x))

    def threads_sync(self, name, threads):
        wait((name, threads))

    def value(self, at):
        return self.shared(self.kind, at * self.kind.itemsize)[0].astype(np.float32)

    def put_value(self, at, x):
        self.shared(self.kind, at * self.kind.itemsize)[0] = x

    def put_pair(self, at, x, y):
        self.shared(self.kind, at * self.kind.itemsize, 2)[:] = x, y

    def _number(self, kind, at):
        kind = np.dtype(kind)
        return self.shared(kind, at * kind.itemsize)

    def number(self, at):
        return self._number("f4", at)[0]

    def put_number(self, at, x):
        self._number("f4", at)[0] = x

    def numbers(self, at):
        assert at % 4 == 0
        return tuple(self.shared(np.dtype("f4"), 4 * at, 4))

    def put_numbers(self, at, *x):
        assert at % 4 == 0
        self.shared(np.dtype("f4"), 4 * at, 4)[:] = x

    def dot_at(self, at):
        return self._number(self.dot_kind, at)[0]

    def put_dot(self, at, x):
        self._number(self.dot_kind, at)[0] = x

    # Copies

    def copy16(self, at, address, size):
        to = self.shared(np.dtype(np.uint8), at * self.kind.itemsize, 16)
        to[:] = 0
        if size:
            assert address % 16 == 0
            to[:] = np.frombuffer((ctypes.c_uint8 * 16).from_address(int(address)), np.uint8)

    def widen8(self, at, address, kind, there):
        for i in range(8):
            self.put_value(at + i, self.get(address, i, kind) if there else 0)

    def copies_commit(self):
        pass

    def copies_wait(self, n):
        pass

    def syncwarp(self):
        self.together(None, None)

    # Results

    def put_out(self, at, x, y):
        self.shared(self.out_kind, at, 2)[:] = x, y

    def out(self, at):
        return self.shared(self.out_kind, at)[0].astype(np.float32)

    def leave16(self, address, at):
        for i, x in enumerate(self.shared(self.out_kind, at, 16 // self.out_kind.itemsize)):
            old = self.get(address, i, self.type_o) if self.add else np.float32(0)
            self.put(address, i, self.type_o, old + np.float32(x))

    # Elements by address

    @staticmethod
    def _at(address, at, kind):
        kind = KINDS[kind]
        assert address
        place = int(address) + int(at) * kind.itemsize
        return np.frombuffer((ctypes.c_char * kind.itemsize).from_address(place), kind)

    def load4(self, address):
        assert address % 16 == 0
        return tuple(self.get(address, i, 2) for i in range(4))

    def store4(self, address, *x):
        assert address % 16 == 0
        for i, one in enumerate(x):
            self.put(address, i, 2, one)

    def get64(self, address, at, kind):
        return self._at(address, at, kind)[0].astype(np.float64)

    def get(self, address, at, kind):
        return self._at(address, at, kind)[0].astype(np.float32)

    def put64(self, address, at, kind, x):
        self._at(address, at, kind)[0] = x

    put = put64

    def _each(self, row_step, column_step, rows, columns):
        lane = self.lane()
        for i, (row, column) in enumerate(zip(ROW[lane], COLUMN[lane], strict=True)):
            if row < rows and column < columns:
                yield i, row * row_step + column * column_step

    def get_block(self, address, row, column, kind, rows, columns):
        found = [np.float32(0)] * 8
        for i, at in self._each(row, column, rows, columns):
            found[i] = self.get(address, at, kind)
        return tuple(found)

    def put_block(self, *given):
        (address, row, column, kind, rows, columns), x = given[:6], given[6:]
        for i, at in self._each(row, column, rows, columns):
            self.put(address, at, kind, x[i])

    def keep_block(self, address, pitch, factor, *x):
        for i, at in self._each(pitch, 1, 16, 16):
            self.put(address, at, 0, x[i] * factor)

    def meet_block(self, address, pitch, *x):
        return sum(x[i] * self.get(address, at, 0) for i, at in self._each(1, pitch, 16, 16))

    # Values of other lanes

    def up(self, x, n):
        return self.together(_up, (x, n))

    def of_lane(self, x, n):
        return self.together(_of_lane, (x, n))

    def across(self, x, n):
        return self.together(_across, (x, n))


def _product(given):
    c, a, b = np.array(given, np.float32).reshape(32, 3, 8).transpose(1, 0, 2)
    left, right = np.zeros((2, 16, 16))
    left[ROW, COLUMN], right[ROW, COLUMN] = a, b
    found = c + (left @ right.T)[ROW, COLUMN]
    return [tuple(x) for x in found.astype(np.float32)]


def _up(given):
    n = given[0][1]
    return [given[max(i - n, 0)][0] for i in range(32)]


def _of_lane(given):
    return [given[n][0] for _, n in given]


def _across(given):
    return [given[i ^ n][0] for i, (_, n) in enumerate(given)]


def unpacked(text, argument):
    """The arguments of a kernel, of the struct that a launch gives."""
    words, found = argument.view(np.int64), []
    for kind in text.arguments:
        if kind is float:
            found.append(float(words[:1].view(np.float64)[0]))
        elif kind is int:
            found.append(int(words[0]))
        else:
            n = kind if isinstance(kind, int) else len(kind._fields)
            given = map(int, words[:n])
            found.append(tuple(given) if isinstance(kind, int) else kind(*given))
        words = words[len(found[-1]) if isinstance(found[-1], tuple) else 1 :]
    assert not len(words)
    return found


LAUNCHES = []  # constants of each


def load(name, constants, shared, card):
    """A kernel as the launcher calls it."""
    text = TEXTS[name]
    twin = Twin(text.macros(constants))
    kernel = text.make(constants, twin)
    twin.module = sys.modules[kernel.__module__]

    def run(grid, block, arguments, shared_mem):
        LAUNCHES.append((name, constants))
        chunks.cuda = Running(twin.module)
        with np.errstate(all="ignore"):
            cuda.jit(kernel)[grid, block, 0, shared_mem](*unpacked(text, *arguments))

    return run


SIMULATED = Library(
    Memory(
        xp, load, lambda x: CARD, empty, view,
        lambda value, shape, dtype, card: np.broadcast_to(np.asarray(value, dtype), shape),
        dtype, lambda x: x.ctypes.data, lambda card, function: function(),
    ),
    KERNELS,
)  # fmt: skip
forward, backward, step = SIMULATED.forward, SIMULATED.backward, SIMULATED.step
again_forward, again_backward = SIMULATED.again_forward, SIMULATED.again_backward


def machine():
    return Machine()
