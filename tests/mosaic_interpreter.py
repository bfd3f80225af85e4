"""Run kernels of warpgroups in Pallas Mosaic GPU on the host, in NumPy: values, hangs, bad orders.

Warpgroups are threads of which one runs at a time: the first, in an order that is given, that need
not wait. So a producer runs as far ahead as barriers let it, and a wait that is missing shows as a
wrong value; where all wait the kernel hangs, which is an error, as is a barrier that completes more
often than each of those that wait for it has waited. Stores to memory are done when they are waited
for, no earlier.
"""

import contextlib
import functools
import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

MODULES = (
    "chunk", "copies", "hopper", "hopper3", "hopper_queries", "hopper_reverse", "hopper_owners",
    "mosaic", "token", "warpgroups",
)  # fmt: skip


class Slice(NamedTuple):
    start: int
    size: int


def index(key):
    """Index of NumPy; what it has outside of an array is cut off."""
    key = key if isinstance(key, tuple) else (key,)
    return tuple(
        slice(int(k.start), int(k.start) + k.size) if isinstance(k, Slice)
        else k if k is Ellipsis or isinstance(k, slice) else int(k)
        for k in key
    )  # fmt: skip


class Ref:
    """An array in memory, or a part of one."""

    def __init__(self, x):
        self.x = x
        self.shape, self.dtype, self.at = x.shape, getattr(x, "dtype", None), At(self)

    def __getitem__(self, key):
        return np.array(self.x[index(key)])

    def __setitem__(self, key, value):
        self.x[index(key)] = value

    def transpose(self, axes):
        return Ref(self.x.transpose(axes))


class At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, key):
        x = self.ref.x
        return x[int(key)] if isinstance(x, Bars) else Ref(x[index(key)])


class Bars(list):
    """Barriers of a kernel."""

    shape = ()


class Bar:
    def __init__(self, arrivals):
        self.arrivals, self.count, self.done = arrivals, 0, 0
        self.waits = defaultdict(int)

    def arrive(self):
        self.count += 1
        if self.count == self.arrivals:
            self.count, self.done = 0, self.done + 1


class Acc:
    def __init__(self, shape, dtype=np.float32):
        self.value = np.zeros(shape, np.float32)

    def __getitem__(self, key):
        return self.value.copy()

    def __setitem__(self, key, value):
        self.value = np.array(value, np.float32)

    @classmethod
    def init(cls, x):
        acc = cls(x.shape)
        acc[...] = x
        return acc


class Machine:
    """One program: its warpgroups, which take turns, the first in ``order`` that can run."""

    def __init__(self, order, program):
        self.order, self.program = order, program
        self.turn = threading.Condition()
        self.waiting = {}  # the barrier of each warpgroup that waits
        self.left, self.now, self.error = set(order), order[0], None
        self.stores = defaultdict(list)
        self.bars, self.scratch = [], None

    def ready(self, who):
        bar = self.waiting.get(who)
        return bar is None or bar.done > bar.waits[who]

    def hand_on(self):
        """Let the first run that can."""
        able = [x for x in self.order if x in self.left and self.ready(x)]
        if self.left and not able and self.error is None:
            self.error = AssertionError(f"warpgroups {sorted(self.left)} wait for ever")
        self.now = able[0] if able else None
        self.turn.notify_all()

    def pause(self, who):
        self.hand_on()
        self.turn.wait_for(lambda: self.now == who or self.error)
        if self.error:
            raise self.error

    def wait(self, bar):
        who = LOCAL.who
        self.waiting[who] = bar
        self.pause(who)
        del self.waiting[who]
        bar.waits[who] += 1

    def arrive(self, bar):
        bar.arrive()
        self.pause(LOCAL.who)

    def store(self, source, to):
        self.stores[LOCAL.who].append((source, to))

    def finish(self, left):
        pending = self.stores[LOCAL.who]
        while len(pending) > left:
            source, to = pending.pop(0)
            to.x[...] = source.x[tuple(slice(n) for n in to.x.shape)]

    def run(self, body):
        def work(who):
            LOCAL.who, LOCAL.machine = who, self
            with self.turn:
                try:
                    self.turn.wait_for(lambda: self.now == who or self.error)
                    if self.error is None:
                        body()
                        assert not self.stores[who], "stores that nobody waits for"
                except BaseException as error:
                    self.error = self.error or error
                self.left.discard(who)
                self.hand_on()

        threads = [threading.Thread(target=work, args=(who,)) for who in self.order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        for bar in self.bars:
            assert bar.count == 0, "an arrival too many"
            assert all(n == bar.done for n in bar.waits.values()), "a completion unwaited for"


LOCAL = threading.local()


def kernel(order):
    def make(body, *, out_type, mesh=None, scratch_types=None, **more):
        mesh = mesh or SimpleNamespace(**more)
        if scratch_types:
            body = functools.partial(scoped, body, scratch_types)

        def call(*given):
            made = [np.full(x.shape, np.nan, np.dtype(x.dtype)) for x in out_type]
            refs = [x if isinstance(x, Ref) else Ref(np.asarray(x)) for x in (*given, *made)]
            for program in range(mesh.grid[0]):
                machine = Machine([x for x in order if x < mesh.num_threads], program)
                machine.run(functools.partial(body, *refs))
            return made

        return call

    return make


def memory(shape, dtype, transforms=()):
    return lambda machine: Ref(np.full(shape, np.nan, np.dtype(dtype)))


def barriers(num_arrivals=1, num_barriers=1):
    def allocate(machine):
        bars = Bars(Bar(num_arrivals) for _ in range(num_barriers))
        machine.bars += bars
        return Ref(bars)

    return allocate


def load(source, to, bar):
    to.x[...] = 0
    to.x[tuple(map(slice, source.x.shape))] = source.x
    LOCAL.machine.arrive(bar)


def wgmma(acc, a, b):
    a, b = (x.x if isinstance(x, Ref) else x for x in (a, b))
    acc.value = acc.value + a.astype(np.float32) @ b.astype(np.float32)


def iota(dtype, shape, axis, layout=None):
    return np.arange(*shape)


def when(condition):
    return lambda f: f() if condition else None


def run_state(f):
    def run(accs):
        f(accs)
        return tuple(x.value for x in accs)

    return run


def run_scoped(f, *types, collective_axes=None, **scratch):
    """Run with what is allocated: once for all warpgroups if it is theirs."""
    if collective_axes is None:
        return f(*types)
    machine = LOCAL.machine
    if machine.scratch is None:
        machine.scratch = {n: allocate(machine) for n, allocate in scratch.items()}
    return f(**machine.scratch)


def scoped(body, scratch, *refs):
    run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **scratch)


def fori_loop(first, last, body, carry):
    for i in range(int(first), int(last)):
        carry = body(np.int32(i), carry)
    return carry


def spread(x, shape, axes):
    return np.broadcast_to(np.expand_dims(x, tuple(i for i in (0, 1) if i not in axes)), shape)


def by_row(a, b, to=0.0):
    x = a.astype(np.float32) * b.astype(np.float32)
    return to + x.reshape(len(x), -1, 4, 2).sum((1, 3))


def by_column(a, b, to=None, factor=1.0):
    x = a.astype(np.float32) * b.astype(np.float32)
    x = x.reshape(4, 2, 8, -1).sum(1).reshape(32, -1)
    return x if to is None else to + factor * x


def of_pairs(a, b):
    b = np.where(np.eye(len(b), dtype=bool), 0.0, b.astype(np.float32))
    return by_row(a, b), by_column(a, b)


def halved(x):
    return x.reshape(len(x), 2, 2).sum(2).T


def with_halved(x, own):
    x, t = x.copy(), np.arange(len(x))
    for i in (0, 1):
        x[t, 2 * i + t // 8 % 2] += own[i]
    return x


def gathered(x):
    return x.reshape(4, 8, -1).sum(1)


def leave_columns(to, x):
    to.x[...] = x


def leave_rows(to, x):
    to.x[...] = x.T


@contextlib.contextmanager
def interpreted(monkeypatch, order=(0, 1, 2)):
    """Within, kernels run here; ``order`` is that of who goes first."""
    import importlib

    import jax

    nothing = lambda *_, **__: None  # noqa: E731
    names = {
        "pl": SimpleNamespace(
            when=when, ds=Slice, run_state=run_state, run_scoped=run_scoped, kernel=kernel(order),
        ),
        "jax": SimpleNamespace(
            ShapeDtypeStruct=jax.ShapeDtypeStruct, new_ref=lambda x: Ref(np.array(x)),
            freeze=lambda ref: ref.x,
        ),
        "lax": SimpleNamespace(
            axis_index=lambda n: LOCAL.who if n == "warpgroup" else LOCAL.machine.program,
            fori_loop=fori_loop, rem=lambda a, b: np.int32(a % b),
            div=lambda a, b: np.int32(a // b), bitwise_and=lambda a, b: a & b,
            broadcast_in_dim=spread,
            reduce_precision=lambda x, *_: x.astype("bfloat16").astype(np.float32),
        ),
        "jnp": np,
        "alone": lambda _, run, like: run,
        "varying": lambda shape, dtype, given: jax.ShapeDtypeStruct(shape, dtype),
        "ACC": Acc, "by_row": by_row, "by_column": by_column, "of_pairs": of_pairs,
        "gathered": gathered,
        "halved": halved, "with_halved": with_halved, "leave_columns": leave_columns,
        "leave_rows": leave_rows, "sums_of": lambda _: SimpleNamespace(layout=None),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for name in MODULES:
            module = importlib.import_module(f"hla.kernels.pallas.{name}")
            real = module.plgpu if hasattr(module, "plgpu") else None
            fake = real and SimpleNamespace(
                kernel=kernel(order), SMEM=memory, Barrier=barriers, ACC=Acc, wgmma=wgmma,
                wgmma_wait=nothing, wgmma_accumulator_load=lambda acc, wait_n=0: acc[...],
                layout_cast=lambda x, _: x, load=lambda ref, *_, **__: ref[...],
                broadcasted_iota=iota, set_max_registers=nothing, commit_smem=nothing,
                barrier_wait=lambda bar: LOCAL.machine.wait(bar),
                barrier_arrive=lambda bar: LOCAL.machine.arrive(bar),
                copy_gmem_to_smem=load,
                copy_smem_to_gmem=lambda source, to: LOCAL.machine.store(source, to),
                wait_smem_to_gmem=lambda n, wait_read_only=False: LOCAL.machine.finish(n),
                CompilerParams=real.CompilerParams, LoweringSemantics=real.LoweringSemantics,
                Layout=real.Layout, Mesh=SimpleNamespace,
            )  # fmt: skip
            for key, value in {"plgpu": fake, **names}.items():
                if hasattr(module, key):
                    patch.setattr(module, key, value)
        yield
