"""`hla demo`: small language models that differ in their operator only, trained on real text."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from .corpus import Corpus
from .model import NO_MIXER, Config
from .training import Job, generate, train_all

ROWS = (NO_MIXER, "linear", "hla2", "ahla", "hla3")
STEPS, QUICK_STEPS, QUICK_BYTES = 1200, 10, 1 << 15
PROMPT, SAMPLE, QUICK_SAMPLE = 120, 400, 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hla demo`."""
    parser.add_argument(
        "--operator",
        action="append",
        choices=ROWS,
        help="train only this one (may be repeated); default: all five",
    )
    parser.add_argument("--steps", type=_positive, help=f"training steps; default: {STEPS}")
    parser.add_argument("--seed", type=_natural, default=0, help="default: 0")
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
    """Train, score, write a sample, and save curves.png and results.json; return the exit code."""
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        return _refuse(f'{names} not installed; pip install ".[demo]" in a checkout of hla')
    try:
        corpus = Corpus.read(args.text, *[QUICK_BYTES] * args.quick)
        _make_writable(args.out)
    except ValueError as error:
        return _refuse(str(error))

    from . import report

    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    operators = [name for name in ROWS if name in (args.operator or ROWS)]
    jobs = [Job(Config(operator), corpus, steps, args.seed) for operator in operators]
    report.introduce(jobs)
    if args.quick:
        report.console.print("--quick: too little to learn from, it shows that all of it runs.\n")
    with report.progress(jobs) as advance:
        models = train_all(jobs, advance)
    mixers = [model for model in models if model.config.operator != NO_MIXER]
    best = min(mixers or models, key=lambda model: model.bits)
    prompt = corpus.held[:PROMPT]
    sample = generate(best, prompt, QUICK_SAMPLE if args.quick else SAMPLE, args.seed)
    results = report.Results(jobs, models, report.baselines(corpus), sample)
    report.print_table(results)
    report.print_sample(results, best, prompt)
    report.save(results, args.out)
    return 0


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error


def _refuse(reason: str) -> int:
    print(f"hla demo: {reason}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value
