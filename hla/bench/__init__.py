"""`hla bench`: time every backend on this machine beside its peers and the floor of the same run.

`workloads` says what is timed and checks it, `peers` what it is held against, `libraries` and
`measure` how, `machine` on what, and `report` shows it. The asv suite times the same workloads by
the same code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .machine import describe
from .measure import DEVICES, LIBRARIES, Row, Skipped, import_seconds, measure_case, memories
from .workloads import DTYPES, GATES, OPERATORS, WORKLOADS, Case

__all__ = ["add_arguments", "run"]
SCHEMA = 2  # of bench.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hla bench` to a parser."""
    add = parser.add_argument
    parser.epilog = (
        "The defaults take about two minutes on two cores, more on a GPU. Backward and one token"
        " are then of hla2 only; name the operators for every table of each. Long runs name fewer"
        " libraries, or one device."
    )
    names = ", ".join(OPERATORS)
    add("--operator", nargs="+", choices=OPERATORS, metavar="NAME",
        help=f"what to time in every table: {names} (default: all of them forward, and hla2"
        " backward and one token; with --quick: hla2)")  # fmt: skip
    add("--tokens", nargs="+", type=_positive, metavar="T",
        help="lengths: the first for the tables, all for the growth of the first operator"
        " (default: 4096 1024 16384; with --quick: 256 64)")  # fmt: skip
    add("--batch", type=_positive, default=1, metavar="B", help="sequences; default 1")
    add("--heads", type=_positive, metavar="H", help="default 8 (with --quick: 2)")
    add("--width", type=_positive, metavar="D", help="D = V; default 64 (with --quick: 16)")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--gate", choices=GATES, default="none", help="default: none")
    add("--device", nargs="+", choices=DEVICES, default=DEVICES, metavar="NAME",
        help="where: cpu, gpu (default: both)")  # fmt: skip
    add("--library", nargs="+", choices=LIBRARIES, default=LIBRARIES, metavar="NAME",
        help=f"whose arrays and peers: {', '.join(LIBRARIES)} (default: all)")  # fmt: skip
    add("--commit", help="what to record as hla's commit (default: that of its git checkout)")
    add("--quick", action="store_true", help="a few seconds and small sizes, to see that it works")
    add("--out", type=Path, default=Path("hla-bench"), metavar="DIR",
        help="where bench.json and bench.png go (default: hla-bench)")  # fmt: skip


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Run `hla bench`; return its exit code.

    Parameters
    ----------
    args : argparse.Namespace
        What a parser with `add_arguments` returned.

    Returns
    -------
    int
        0; 1 where a result was refused as wrong; 2 where something is missing to begin with, or
        nothing could be timed.
    """
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        return _stop(f'{names} not installed; pip install ".[bench]" in a checkout of hla')
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").touch()
    except OSError as error:
        return _stop(f"cannot write to {out} ({error.strerror}); choose another --out")
    from . import report

    console = report.console()
    plan = list(_plan(args))
    first = plan[0][1]
    rows: list[Row] = []
    skipped: list[Skipped] = []
    result: dict[str, Any] = {"schema": SCHEMA, "quick": args.quick, **describe(args.commit)}
    result["first"] = first._asdict()
    where = {"devices": args.device, "libraries": args.library}
    with report.progress(console, len(plan) + 2) as advance:
        advance("import hla")
        result["import_seconds"] = import_seconds(1 if args.quick else 5)
        for workload, case in plan:
            advance(f"{workload}, {case.operator}, T = {case.tokens}")
            timed, left_out = measure_case(workload, case, rows, quick=args.quick, **where)
            rows += timed
            skipped += left_out
            _save(out, result, rows, skipped)  # a run that is cut short keeps what it has
        advance("peak memory")
        known = ("numpy",) if args.quick else args.library
        result["memory"] = memories(first, known) if "cpu" in args.device else {}
    _save(out, result, rows, skipped)
    report.show(console, result, rows, skipped)
    report.plot(out / "bench.png", result, rows)
    console.print(f"Written: {out / 'bench.json'}, {out / 'bench.png'}")
    if any(one.wrong for one in skipped):
        return 1
    return 0 if rows else 2


def _save(out: Path, result: dict[str, Any], rows: list[Row], skipped: list[Skipped]) -> None:
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    result["skipped"] = [one._asdict() for one in skipped]
    (out / "bench.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def _stop(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _plan(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Every workload and operator at the first length, then the first operator at the others."""
    operators = tuple(dict.fromkeys(args.operator or OPERATORS[: 1 if args.quick else None]))
    first, *others = args.tokens or ((256, 64) if args.quick else (4096, 1024, 16384))
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
