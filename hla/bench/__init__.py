"""`hla bench`: time every backend on this machine beside its peers and the floor of the same run.

`workloads` has the timed calls and checks them, `peers` what they are compared with, `libraries`
and `measure` time them, and `report` prints the results. The asv suite times the same workloads by
the same code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import backends
from ..command import at_least, prepare_files, save, spelled
from ..machine import accelerators, describe
from .measure import (
    DEVICES,
    LIBRARIES,
    Row,
    Skipped,
    import_seconds,
    measure_case,
    memories,
    quartiles,
)
from .workloads import CALL, COMPILED, DTYPES, GATES, HOST, OPERATORS, WORKLOADS, Case

__all__ = ["add_arguments", "run"]
SCHEMA = 2  # of bench.json
JSON, PLOT = "bench.json", "bench.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hla bench` to a parser."""
    add = parser.add_argument
    parser.epilog = (
        "The defaults take about two minutes on two cores, more on a GPU. Backward and one token"
        " are then of hla2 only; name the operators for every table of each. Long runs name fewer"
        " libraries, or one device."
    )
    names = ", ".join(OPERATORS)
    add("--operator", nargs="+", action="extend", choices=OPERATORS, metavar="NAME",
        help=f"what to time in every table: {names} (default: all of them forward, and hla2"
        " backward and one token; with --quick: hla2)")  # fmt: skip
    every = (*WORKLOADS, COMPILED, *HOST)
    add("--workload", nargs="+", action="extend", choices=every, metavar="NAME",
        help=f"the tables: {', '.join(map(repr, every))} (default: all)")  # fmt: skip
    add("--tokens", nargs="+", action="extend", type=at_least(1), metavar="T",
        help="lengths: the first for the tables, all for the growth of the first operator"
        " (default: 4096 64 1024 16384, where 64 is the time of a call rather than of its"
        " sums; with --quick: 256 64)")  # fmt: skip
    add("--batch", type=at_least(1), default=1, metavar="B", help="sequences; default 1")
    add("--heads", type=at_least(1), metavar="H", help="default 8 (with --quick: 2)")
    add("--width", type=at_least(1), metavar="D", help="D = V; default 64 (with --quick: 16)")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--gate", choices=GATES, default="none", help="default: none")
    add("--device", nargs="+", action="extend", choices=DEVICES, metavar="NAME",
        help="where: cpu, gpu (default: both)")  # fmt: skip
    add("--library", nargs="+", action="extend", choices=LIBRARIES, metavar="NAME",
        help=f"whose arrays and peers: {', '.join(LIBRARIES)} (default: all)")  # fmt: skip
    known = backends.names()
    add("--backend", nargs="+", action="extend", choices=known, metavar="NAME",
        help=f"whose code, beside the peers: {', '.join(known)} (default: all)")  # fmt: skip
    add("--commit", help="what to record as hla's commit (default: that of its git checkout)")
    add("--quick", action="store_true", help="a few seconds and small sizes, to see that it works")
    add("--out", type=Path, default=Path("hla-bench"), metavar="DIR",
        help=f"where {JSON} and {PLOT} go (default: hla-bench)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run `hla bench`; return its exit code.

    Parameters
    ----------
    args : argparse.Namespace
        What a parser with `add_arguments` returned.

    Returns
    -------
    int
        0; 1 where a result was refused as wrong or cannot be saved; 2 where something is missing
        to begin with, or nothing could be timed; 130 where it was interrupted, and what had been
        measured is saved.
    """
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        return _stop(f'{names} not installed; pip install ".[bench]" in a checkout of hla')
    out = Path(args.out)
    try:
        prepare_files(out, JSON, PLOT)
    except ValueError as error:
        return _stop(f"{error}; choose another --out")
    from .. import tables
    from . import report

    console = tables.console()
    plan = list(_plan(args))
    first = plan[0][1]
    rows: list[Row] = []
    skipped: list[Skipped] = []
    result: dict[str, Any] = {"schema": SCHEMA, "command": spelled("bench", add_arguments, args)}
    result |= {"quick": args.quick, **describe(args.commit)}
    result["machine"]["accelerators"] = accelerators()
    result |= {"first": first._asdict(), "memory": {}, "complete": False}
    libraries = tuple(args.library or LIBRARIES)
    where: dict[str, Any] = {"devices": dict.fromkeys(args.device or DEVICES)}
    where |= {"libraries": libraries, "backends": args.backend}
    report.introduce(console, result)

    def save_json() -> bool:
        result["rows"] = [dataclasses.asdict(row) for row in rows]
        result["skipped"] = [one._asdict() for one in skipped]
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        return save(out / JSON, lambda path: path.write_text(text))

    try:
        with report.progress(console, len(plan) + 2) as advance:
            advance("import hla")
            taken = import_seconds(1 if args.quick else 5)
            result["import_seconds"] = statistics.median(taken)
            result["import_quartiles"] = quartiles(taken)
            for workload, case in plan:
                advance(f"{workload}, {case.operator}, T = {case.tokens}")
                timed, left_out = measure_case(workload, case, rows, quick=args.quick, **where)
                rows += timed
                skipped += left_out
                if rows:
                    save_json()  # a run that is killed keeps what it has
            if rows and "cpu" in where["devices"]:
                advance("peak memory")
                some = ("numpy",) if args.quick else libraries
                result["memory"] = memories(first, some, args.backend)
        result["complete"] = True
    except KeyboardInterrupt:
        if not rows:
            raise
    wrong = any(one.wrong for one in skipped)
    saved = []
    if rows or wrong:  # else an earlier result stays as it was
        saved = [JSON] * save_json()
        saved += [PLOT] * save(out / PLOT, lambda path: report.plot(path, result, rows))
    report.show(console, result, rows, skipped)
    for name in saved:
        console.print(f"Written: {out / name}", soft_wrap=True)
    if not (rows or wrong):
        return _stop(f"hla bench: nothing could be timed, so nothing is written to {out}")
    if not result["complete"]:
        raise KeyboardInterrupt
    return int(wrong or len(saved) < 2)


def _stop(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _plan(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Those workloads that are asked for."""
    for workload, case in _every(args):
        if not args.workload or workload in args.workload:
            yield workload, case


def _every(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Every workload and operator at the first length, then the first operator at the others."""
    operators = tuple(dict.fromkeys(args.operator or OPERATORS[: 1 if args.quick else None]))
    first, *others = args.tokens or ((256, 64) if args.quick else (4096, 64, 1024, 16384))
    case = Case(
        tokens=first,
        heads=args.heads or (2 if args.quick else 8),
        width=args.width or (16 if args.quick else 64),
        dtype=args.dtype,
        gate=args.gate,
        batch=args.batch,
    )
    for workload in WORKLOADS:
        for operator in operators if args.operator or workload == "forward" else operators[:1]:
            yield workload, case._replace(operator=operator)
    for tokens in sorted(set(others) - {first}):
        yield "forward", case._replace(operator=operators[0], tokens=tokens)
    if not args.quick or args.workload:
        yield COMPILED, case._replace(operator=operators[0])
        for workload in HOST:
            yield workload, CALL._replace(operator=operators[0])
