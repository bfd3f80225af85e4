"""Measure one case in one process: every backend beside its peers and the floor, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hla

from .libraries import Call
from .peers import PEERS, SOFTMAX, Floor, floor, peer
from .workloads import COMPILED, HOST, Case, Target, Work, Wrong, checked, targets, work

ROOT = str(Path(hla.__file__).parents[1])
BATCH = 5e-3  # seconds: shorter calls are timed several at once
LONG = 1.0  # seconds: such a call needs no warm-up of its own
SPIN = 0.2  # seconds after which BLAS's idle threads have let go of their cores
SLOW = 5.0  # seconds that one call may be expected to take; a longer one is left out
DEVICES = ("cpu", "gpu")
LIBRARIES = ("numpy", "torch", "jax", "cupy", "numba")
MEMORY = """
import json, sys
from hla.bench.measure import memory_beyond
from hla.bench.workloads import Case, Target
backend, library, case = sys.argv[1:]
print(memory_beyond(Target(backend, library), Case(*json.loads(case))))
"""
IMPORT = "import time; t = time.perf_counter(); import hla; print(time.perf_counter() - t)"


@dataclasses.dataclass
class Row:
    """One line of the result.

    ``seconds`` is the median by the library's meter where it has one (on a GPU: JAX's by queues,
    the others' by events), else of the host's clock, and ``host_seconds`` always that of the
    host's clock, which waits for the result; ``quartiles`` are the first and third of what
    ``seconds`` is the median of. ``times_faster`` is a peer's time over this one, by meters where
    both have one, else by the clock. ``rates`` are those of the floor in this run, operations and
    bytes a second, and ``beyond`` is the device memory at the peak beyond inputs and results, in
    tensors of q's size.
    """

    workload: str
    operator: str
    tokens: int
    name: str
    peer: bool
    accelerator: bool
    seconds: float
    host_seconds: float
    fastest: float
    samples: int
    error: float
    floor: float | None = None
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    share_of_floor: float | None = None
    times_faster: dict[str, float] = dataclasses.field(default_factory=dict)
    beyond: float | None = None
    quartiles: tuple[float, float] | None = None

    @property
    def label(self) -> str:
        """Name, with the place of a peer that is not on the host."""
        return f"{self.name} (gpu)" if self.peer and self.accelerator else self.name


class Skipped(NamedTuple):
    """A row that was not timed, and why."""

    workload: str
    operator: str
    tokens: int
    name: str
    reason: str
    wrong: bool = False


def measure_case(
    workload: str,
    case: Case,
    before: Iterable[Row] = (),
    *,
    quick: bool = False,
    devices: Iterable[str] = DEVICES,
    libraries: Iterable[str] = LIBRARIES,
    backends: Iterable[str] | None = None,
) -> tuple[list[Row], list[Skipped]]:
    """Check, then time everything that can run one case, in one process, one after the other.

    Parameters
    ----------
    workload : str
        One of `hla.bench.workloads.WORKLOADS`, or another that its `work` takes.
    case : Case
        Operator and size.
    before : iterable of Row
        Rows of other lengths, from which the time of a longer call is predicted.
    quick : bool
        One short round instead of three.
    devices, libraries : iterable of str
        Where, and with whose arrays, of backends and peers alike.
    backends : iterable of str, optional
        Which; default all.

    Returns
    -------
    rows, skipped : lists
    """
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for device in devices:
        accelerator = device == "gpu"
        if workload in HOST and not accelerator:
            continue  # there a call's own time is the host's
        some = (t for t in chosen(libraries, backends) if t.accelerator == accelerator)
        here = {str(t): t for t in some}
        prepare = {name: functools.partial(work, t, workload, case) for name, t in here.items()}
        for name, other in PEERS.items():
            if other.library in libraries and other.can(workload, accelerator):
                prepare[name] = functools.partial(peer, name, workload, case, accelerator)
        ready: dict[str, tuple[Work, float]] = {}
        for name, one in prepare.items():
            if name in PEERS and not ready:
                break  # no backend runs here, so there is nothing to compare it with
            same = [r for r in before if (r.name, r.accelerator) == (name, accelerator)]
            try:
                _foresee(workload, case, same)
                made = one()
                ready[name] = made, checked(made)
            except Exception as why:
                if not (_foreseen(why) or name in PEERS):  # a broken peer stops no other row
                    raise
                about = (workload, case.operator, case.tokens, name, _reason(why))
                skipped.append(Skipped(*about, isinstance(why, Wrong)))
        if ready:
            library = next(here[name].library for name in ready if name in here)
            rows += _time(workload, case, floor(case.dtype, library, accelerator), ready, quick)
    return rows, skipped


def chosen(libraries: Iterable[str], backends: Iterable[str] | None = None) -> list[Target]:
    """Return the targets of these libraries and backends; None: of every backend."""
    some = [t for t in targets() if t.library in libraries]
    return [t for t in some if backends is None or t.backend in backends]


def _foresee(workload: str, case: Case, before: list[Row]) -> None:
    """Raise NotImplementedError where other lengths say that a call would take over `SLOW`."""
    what = workload, case.operator
    known = [(r.tokens, r.seconds) for r in before if (r.workload, r.operator) == what]
    if known:
        tokens, seconds = max(known)
        expected = seconds * (case.tokens / tokens) ** (2 if before[0].name in SOFTMAX else 1)
        if expected > SLOW:
            raise NotImplementedError(f"T = {case.tokens} would take about {expected:.0f} s a call")


def _foreseen(error: Exception) -> bool:
    """Whether a row is rightly left out: refused, wrong, or too large for the memory there is."""
    if isinstance(error, (NotImplementedError, Wrong, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def _reason(error: Exception) -> str:
    """First line of a message, with the error's type where it is not one of those raised here."""
    text = str(error).split("\n")[0]
    named = isinstance(error, (NotImplementedError, Wrong))
    return text if named else f"{type(error).__name__}: {text}"


def _time(
    workload: str,
    case: Case,
    machine: Floor,
    ready: Mapping[str, tuple[Work, float]],
    quick: bool,
) -> list[Row]:
    calls = {"product": machine.product}
    if machine.copy is not None:
        calls["copy"] = machine.copy
    calls |= {name: one.run for name, (one, _) in ready.items()}
    metered = {name: call for name, call in calls.items() if call.lib.meter}
    effort = (0.05, 1) if quick else (0.4 if metered else 0.6, 3)
    by_clock = measure(calls, *effort)
    by_events = measure(metered, *effort, events=True)
    clock = {name: statistics.median(times) for name, times in by_clock.items()}
    medians = clock | {name: statistics.median(times) for name, times in by_events.items()}
    least = machine.seconds(workload, case, medians["product"], medians.get("copy", 0.0))
    rates = {"operations": machine.product_operations / medians["product"]}
    if "copy" in medians:
        rates["bytes"] = machine.copied_bytes / medians["copy"]
    rows = []
    for name, (one, error) in ready.items():
        samples = by_events.get(name, by_clock[name])
        row = Row(
            workload=workload,
            operator=case.operator,
            tokens=case.tokens,
            name=name,
            peer=name in PEERS,
            accelerator=machine.copy is not None,
            seconds=medians[name],
            host_seconds=clock[name],
            fastest=min(samples),
            samples=len(samples),
            error=error,
            floor=least,
            rates=rates,
            quartiles=quartiles(samples),
        )
        if least is not None and name not in SOFTMAX:  # they compute something else
            row.share_of_floor = least / row.seconds
        for other in (p for p in PEERS if p in ready and p != name):
            both = medians if name in by_events and other in by_events else clock
            row.times_faster[other] = both[other] / both[name]
        meter = one.run.lib.meter
        if meter and meter.bytes_beyond and workload not in ("step", COMPILED):
            row.beyond = meter.bytes_beyond(one.run.start) / case.bytes
        rows.append(row)
    return rows


def measure(
    calls: Mapping[str, Call], seconds: float, rounds: int = 3, *, events: bool = False
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a drift of the machine meets them all.

    Parameters
    ----------
    calls : mapping
        What to time, by name.
    seconds : float
        For each call, all rounds together; at least one sample a round.
    rounds : int
        Turns. Each begins with a call that is not counted: the threads of the library before
        may still be spinning.
    events : bool
        By the library's meter where it has one, with the device's caches cold, not by the host's
        clock, which waits for each result.

    Returns
    -------
    dict
        Seconds a call, every sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if events and call.lib.meter:
                samples[name] += call.lib.meter.seconds(call.start, seconds / rounds)
            else:
                samples[name] += _samples(call, seconds / rounds)
            if name == "product" and not call.lib.meter:
                time.sleep(SPIN)
    return samples


def _samples(call: Callable[[], Any], seconds: float) -> list[float]:
    clock = time.perf_counter
    start = clock()
    call()
    warmed = clock() - start
    if warmed > LONG:
        return [warmed]
    number = max(1, round(BATCH / max(warmed, 1e-7)))
    times: list[float] = []
    end = clock() + seconds
    while not times or clock() < end:
        start = clock()
        for _ in range(number):
            call()
        times.append((clock() - start) / number)
    return times


def quartiles(samples: list[float]) -> tuple[float, float] | None:
    """First and third quartile, between which half of the samples lies; None of a single one."""
    if len(samples) < 2:
        return None
    first, third = np.quantile(samples, (0.25, 0.75)).tolist()
    return first, third


def import_seconds(repeats: int = 5) -> list[float]:
    """Time `import hla` in fresh interpreters; every sample."""
    return [float(_child(IMPORT)) for _ in range(repeats)]


def _child(code: str, *words: str) -> str:
    """Run code in a fresh interpreter that finds this very hla, installed or not."""
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    # glibc must return freed memory, or the next array would not be counted
    settings = {"PYTHONPATH": os.pathsep.join(paths), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, *words]
    env = {**os.environ, **settings}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


def memory_beyond(target: Target, case: Case) -> int:
    """Bytes of resident memory that the first forward call takes beyond its inputs and output.

    To be called once in a fresh process, on Linux. Includes what JAX's compiler takes. The kernel
    counts resident pages on each core apart and adds them up late: 0 where it counts fewer.
    """
    work(target, "forward", case._replace(tokens=1)).run()
    call = work(target, "forward", case).run
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    start = _status("VmRSS")
    out = call()
    return max(0, _status("VmHWM") - start - int(out[0].nbytes))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def memory_of(target: Target, case: Case) -> int:
    """`memory_beyond` in a process of its own; NotImplementedError where it cannot be measured."""
    if target.accelerator or not os.access("/proc/self/clear_refs", os.W_OK):
        raise NotImplementedError("peak memory is read on Linux, of the host")
    try:
        return int(_child(MEMORY, *target[:2], json.dumps(case)))
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().rsplit("\n", 1)[-1]
        if why.startswith(("NotImplementedError", "hla.errors.Unsupported")):
            raise NotImplementedError(why) from None
        raise RuntimeError(f"memory of {target}: {why}") from error


def memories(
    case: Case,
    libraries: Iterable[str] = LIBRARIES,
    backends: Iterable[str] | None = None,
) -> dict[str, int]:
    """`memory_of` by target, for those that can be measured."""
    found = {}
    for target in chosen(libraries, backends):
        with contextlib.suppress(NotImplementedError):
            found[str(target)] = memory_of(target, case)
    return found
