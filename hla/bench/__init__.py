"""`hla bench`: time every backend on this machine beside its peers and the floor of the same run.

`workloads` says what is timed and checks it, `peers` what it is held against, `measure` how, and
`report` shows it. The asv suite times the same workloads by the same code.
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

from .measure import Row, Skipped, describe, import_seconds, measure_case, memories
from .workloads import DTYPES, OPERATORS, WORKLOADS, Case

__all__ = ["add_arguments", "run"]
SCHEMA = 1  # of bench.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hla bench` to a parser."""
    add = parser.add_argument
    names = ", ".join(OPERATORS)
    add("--operator", nargs="+", choices=OPERATORS, metavar="NAME",
        help=f"what to time: {names} (default: all; with --quick: hla2)")  # fmt: skip
    add("--tokens", nargs="+", type=_positive, metavar="T",
        help="lengths: the first for the tables, all for the growth of the first operator"
        " (default: 4096 256 1024 16384 65536; with --quick: 256 64)")  # fmt: skip
    add("--heads", type=_positive, metavar="H", help="default 8 (with --quick: 2)")
    add("--width", type=_positive, metavar="D", help="D = V; default 64 (with --quick: 16)")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
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
        0; 1 where a result was refused as wrong; 2 where something is missing to begin with.
    """
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        return _stop(f'hla bench needs {" and ".join(missing)}: pip install "hla[bench]"')
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
    result: dict[str, Any] = {"schema": SCHEMA, "quick": args.quick, **describe()}
    result["first"] = {"batch": 1, **first._asdict()}
    with report.progress(console, len(plan) + 2) as advance:
        advance("import hla")
        result["import_seconds"] = import_seconds(1 if args.quick else 5)
        for workload, case in plan:
            advance(f"{workload}, {case.operator}, T = {case.tokens}")
            timed, left_out = measure_case(workload, case, rows, quick=args.quick)
            rows += timed
            skipped += left_out
        advance("peak memory")
        result["memory"] = memories(first, ("numpy",)) if args.quick else memories(first)
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    result["skipped"] = [one._asdict() for one in skipped]
    (out / "bench.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    report.show(console, result, rows, skipped)
    report.plot(out / "bench.png", result, rows)
    console.print(f"Written: {out / 'bench.json'}, {out / 'bench.png'}")
    return 1 if any(one.wrong for one in skipped) else 0


def _stop(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def _plan(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Every workload and operator at the first length, then the first operator at the others."""
    operators = args.operator or (OPERATORS[:1] if args.quick else OPERATORS)
    first, *others = args.tokens or ((256, 64) if args.quick else (4096, 256, 1024, 16384, 65536))
    heads = args.heads or (2 if args.quick else 8)
    width = args.width or (16 if args.quick else 64)
    for workload in WORKLOADS:
        for operator in dict.fromkeys(operators):
            yield workload, Case(operator, first, heads, width, args.dtype)
    for tokens in sorted(set(others) - {first}):
        yield "forward", Case(operators[0], tokens, heads, width, args.dtype)
