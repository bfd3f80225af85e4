"""Measure one case in one process: every backend beside its peers and the floor, in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hla

from .peers import PEERS, Floor, floor, peer
from .workloads import Case, Target, Work, Wrong, checked, targets, work

ROOT = str(Path(hla.__file__).parents[1])
BATCH = 5e-3  # seconds: shorter calls are timed several at once
LONG = 1.0  # seconds: such a call needs no warm-up of its own
SLOW = 5.0  # seconds that one call may be expected to take; a longer one is left out
MEMORY = """
import sys
from hla.bench.measure import memory_beyond
from hla.bench.workloads import Case, Target
backend, library, operator, *sizes, dtype = sys.argv[1:]
case = Case(operator, *map(int, sizes), dtype)
print(memory_beyond(Target(backend, library), case))
"""
IMPORT = "import time; t = time.perf_counter(); import hla; print(time.perf_counter() - t)"


@dataclasses.dataclass
class Row:
    """One line of the result: median seconds; ``times_faster`` is a peer's time over this one."""

    workload: str
    operator: str
    tokens: int
    name: str
    peer: bool
    accelerator: bool
    seconds: float
    fastest: float
    samples: int
    error: float
    floor: float | None = None
    share_of_floor: float | None = None
    times_faster: dict[str, float] = dataclasses.field(default_factory=dict)

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
    workload: str, case: Case, before: Iterable[Row] = (), *, quick: bool = False
) -> tuple[list[Row], list[Skipped]]:
    """Check, then time everything that can run one case, in one process, one after the other.

    Parameters
    ----------
    workload : str
        One of `hla.bench.workloads.WORKLOADS`.
    case : Case
        Operator and size.
    before : iterable of Row
        Rows of other lengths, from which it is foreseen what would take too long.
    quick : bool
        One short round instead of three.

    Returns
    -------
    rows, skipped : lists
    """
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for accelerator in (False, True):
        here = {str(t): t for t in targets() if t.accelerator == accelerator}
        prepare = {name: functools.partial(work, t, workload, case) for name, t in here.items()}
        for name, other in PEERS.items():
            if other.can(workload, accelerator):
                prepare[name] = functools.partial(peer, name, workload, case, accelerator)
        ready: dict[str, tuple[Work, float]] = {}
        for name, one in prepare.items():
            if name in PEERS and not ready:
                break  # no backend runs here, so there is nothing to hold against it
            same = [r for r in before if (r.name, r.accelerator) == (name, accelerator)]
            try:
                _foresee(workload, case, same)
                made = one()
                ready[name] = made, checked(made)
            except (NotImplementedError, Wrong) as why:
                about = (workload, case.operator, case.tokens, name, str(why))
                skipped.append(Skipped(*about, isinstance(why, Wrong)))
        if ready:
            library = next(here[name].library for name in ready if name in here)
            rows += _time(workload, case, floor(case.dtype, library, accelerator), ready, quick)
    return rows, skipped


def _foresee(workload: str, case: Case, before: list[Row]) -> None:
    """Raise NotImplementedError where other lengths say that a call would take over `SLOW`."""
    what = workload, case.operator
    known = [(r.tokens, r.seconds) for r in before if (r.workload, r.operator) == what]
    if known:
        tokens, seconds = max(known)
        expected = seconds * (case.tokens / tokens) ** (2 if before[0].name == "torch SDPA" else 1)
        if expected > SLOW:
            raise NotImplementedError(f"T = {case.tokens} would take about {expected:.0f} s a call")


def _time(
    workload: str,
    case: Case,
    machine: Floor,
    ready: Mapping[str, tuple[Work, float]],
    quick: bool,
) -> list[Row]:
    calls: dict[str, Callable[[], Any]] = {"product": machine.product}
    if machine.copy is not None:
        calls["copy"] = machine.copy
    calls |= {name: one.run for name, (one, _) in ready.items()}
    taken = measure(calls, 0.05 if quick else 0.9, 1 if quick else 3)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    least = machine.seconds(workload, case, medians["product"], medians.get("copy", 0.0))
    rows = []
    for name, (_, error) in ready.items():
        row = Row(
            workload=workload,
            operator=case.operator,
            tokens=case.tokens,
            name=name,
            peer=name in PEERS,
            accelerator=machine.copy is not None,
            seconds=medians[name],
            fastest=min(taken[name]),
            samples=len(taken[name]),
            error=error,
            floor=least,
        )
        if least is not None and name != "torch SDPA":  # it computes something else
            row.share_of_floor = least / row.seconds
        row.times_faster = {p: medians[p] / row.seconds for p in PEERS if p in ready and p != name}
        rows.append(row)
    return rows


def measure(
    calls: Mapping[str, Callable[[], Any]], seconds: float, rounds: int = 3
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a drift of the machine meets them all.

    Parameters
    ----------
    calls : mapping
        What to time, by name; each waits for its own result.
    seconds : float
        For each call, all rounds together; at least one sample a round.
    rounds : int
        Turns. Each begins with a call that is not counted: the threads of the library before
        may still be spinning.

    Returns
    -------
    dict
        Seconds a call, every sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += _samples(call, seconds / rounds)
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


def import_seconds(repeats: int = 5) -> float:
    """Time `import hla` in fresh interpreters; the median."""
    return statistics.median(float(_child(IMPORT)) for _ in range(repeats))


def _child(code: str, *words: str) -> str:
    """Run code in a fresh interpreter that finds this very hla, installed or not."""
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    # glibc must give freed arrays back, or the next one would look free of charge
    settings = {"PYTHONPATH": os.pathsep.join(paths), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, *words]
    env = {**os.environ, **settings}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


def memory_beyond(target: Target, case: Case) -> int:
    """Bytes of resident memory that the first forward call takes beyond its inputs and output.

    To be called once in a fresh process, on Linux. Includes what JAX's compiler takes.
    """
    work(target, "forward", case._replace(tokens=1)).run()
    call = work(target, "forward", case).run
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    start = _status("VmRSS")
    out = call()
    return _status("VmHWM") - start - int(out[0].nbytes)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def memory_of(target: Target, case: Case) -> int:
    """`memory_beyond` in a process of its own; NotImplementedError where it cannot be told."""
    if target.accelerator or not os.access("/proc/self/clear_refs", os.W_OK):
        raise NotImplementedError("peak memory is read on Linux, of the host")
    words = (*target[:2], case.operator, case.tokens, case.heads, case.width, case.dtype)
    try:
        return int(_child(MEMORY, *map(str, words)))
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().rsplit("\n", 1)[-1]
        if why.startswith(("NotImplementedError", "hla.errors.Unsupported")):
            raise NotImplementedError(why) from None
        raise RuntimeError(f"memory of {target}: {why}") from error


def memories(case: Case, libraries: tuple[str, ...] = ("numpy", "torch", "jax")) -> dict[str, int]:
    """`memory_of` by target, for those that can be told."""
    found = {}
    for target in (t for t in targets() if t.library in libraries):
        with contextlib.suppress(NotImplementedError):
            found[str(target)] = memory_of(target, case)
    return found


def describe() -> dict[str, Any]:
    """Date, commit, versions and machine, so that a figure never stands alone."""
    versions = {"python": platform.python_version(), "hla": hla.__version__}
    for name in ("numpy", "torch", "jax", "cupy", "array-api-compat"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": _threads(),
        "devices": sorted({b.device for b in hla.available() if b.available and b.device}),
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "commit": _commit(), "versions": versions, "machine": machine}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _threads() -> list[dict[str, Any]]:
    """Thread pools of the loaded libraries, where threadpoolctl is installed."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return []
    import threadpoolctl

    keys = ("internal_api", "version", "num_threads")
    return [{key: pool.get(key) for key in keys} for pool in threadpoolctl.threadpool_info()]


def _commit() -> str | None:
    """Commit of the checkout that holds this file, with "-dirty" where it was changed."""
    place = str(Path(__file__).parent)
    try:
        for command in (
            ["git", "-C", place, "ls-files", "--error-unmatch", "__init__.py"],
            ["git", "-C", place, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
