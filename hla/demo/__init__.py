"""`hla demo`: small language models that differ in their operator only, trained on real text."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..command import at_least, prepare_files, save
from .corpus import Corpus
from .model import NO_MIXER, Config
from .training import Job, generate, train_all

ROWS = (NO_MIXER, "linear", "hla2", "ahla", "hla3")
STEPS, QUICK_STEPS, QUICK_BYTES = 1200, 10, 1 << 15
JSON, PLOT = "results.json", "curves.png"
PROMPT, SAMPLE, QUICK_SAMPLE = 120, 400, 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hla demo`."""
    parser.add_argument(
        "--operator",
        nargs="+",
        action="extend",
        choices=ROWS,
        metavar="NAME",
        help=f"train only these: {', '.join(ROWS)}; default: all five",
    )
    parser.add_argument(
        "--steps", type=at_least(1), metavar="N", help=f"training steps; default: {STEPS}"
    )
    parser.add_argument("--seed", type=at_least(0), metavar="N", default=0, help="default: 0")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="default: the topics of Python's own help"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("hla-demo"), metavar="DIR", help="default: hla-demo"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on 32 KiB: shows only that all of it runs"
    )


def run(args: argparse.Namespace) -> int:
    """Train, score, write a sample, save, then print all of it; return the exit code."""
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        return _stop(f'{names} not installed; pip install ".[demo]" in a checkout of hla')
    try:
        corpus = Corpus.read(args.text, *[QUICK_BYTES] * args.quick)
        prepare_files(args.out, PLOT, JSON)
    except ValueError as error:
        return _stop(str(error))

    from .. import tables
    from . import report

    console = tables.console()
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    operators = [name for name in ROWS if name in (args.operator or ROWS)]
    jobs = [Job(Config(operator), corpus, steps, args.seed) for operator in operators]
    report.introduce(console, jobs)
    if args.quick:
        console.print("--quick: too little to learn from, it shows that all of it runs.\n")
    with report.progress(console, jobs) as advance:
        try:
            models = train_all(jobs, advance)
        except RuntimeError as error:
            return _stop(str(error), 1)
    mixers = [model for model in models if model.config.operator != NO_MIXER]
    best = min(mixers or models, key=lambda model: model.bits)
    prompt = corpus.held[:PROMPT]
    sample = generate(best, prompt, QUICK_SAMPLE if args.quick else SAMPLE, args.seed)
    results = report.Results(jobs, models, report.baselines(corpus), sample)
    files = {JSON: report.write_json, PLOT: report.draw}
    saved = [n for n, write in files.items() if save(args.out / n, partial(write, results))]
    report.print_table(console, results)
    report.print_sample(console, results, best, prompt)
    for name in saved:
        console.print(f"Saved: {args.out / name}", soft_wrap=True)
    return int(len(saved) < len(files))


def _stop(reason: str, code: int = 2) -> int:
    print(f"hla demo: {reason}", file=sys.stderr)
    return code
