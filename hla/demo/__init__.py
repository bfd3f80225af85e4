"""`hla demo`: small models that differ in their operator only, on text and on chained facts."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ..command import at_least, prepare_files, save, spelled
from ..machine import describe
from .composition import Chains
from .corpus import Corpus
from .model import NO_MIXER, SOFTMAX, Config
from .training import Job, Trained, generate, train_all

ROWS = (NO_MIXER, "linear", "hla2", "ahla", "hla3")
COMPOSED = (SOFTMAX, "linear", "hla2", "ahla")
SEEDS = 3
STEPS, COMPOSED_STEPS, QUICK_STEPS, QUICK_BYTES = 1200, 1000, 10, 1 << 15
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
        help=f"train only these: {', '.join(ROWS)}; default: all five, and softmax attention on"
        " the chained facts",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        metavar="N",
        help=f"training steps; default: {STEPS} on the text, {COMPOSED_STEPS} on the chains",
    )
    parser.add_argument("--seed", type=at_least(0), metavar="N", default=0, help="default: 0")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="default: the topics of Python's own help"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("hla-demo"), metavar="DIR", help="default: hla-demo"
    )
    parser.add_argument(
        "--commit", help="what to record as hla's commit (default: that of its git checkout)"
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
    jobs = planned(args, corpus)
    about = {"command": spelled("demo", add_arguments, args), **describe(args.commit)}
    begun = time.perf_counter()
    report.introduce(console, jobs)
    if args.quick:
        console.print("--quick: too little to learn from, it shows that all of it runs.\n")
    with report.progress(console, jobs) as advance:
        try:
            models = train_all(jobs, advance)
        except RuntimeError as error:
            return _stop(str(error), 1)
    texts = [model for model in models if isinstance(model.job.task, Corpus)]
    prompt = corpus.held[:PROMPT]
    writer = chosen(texts)
    sample = generate(writer, prompt, QUICK_SAMPLE if args.quick else SAMPLE, args.seed)
    composed = [model for model in models if isinstance(model.job.task, Chains)]
    about["seconds"] = time.perf_counter() - begun
    results = report.Results(texts, composed, report.baselines(corpus), sample, about)
    files = {JSON: report.write_json, PLOT: report.draw}
    result = report.document(results)
    saved = [n for n, write in files.items() if save(args.out / n, partial(write, result))]
    report.print_text(console, results)
    report.print_composed(console, results)
    report.print_sample(console, results, writer, prompt)
    for name in saved:
        console.print(f"Saved: {args.out / name}", soft_wrap=True)
    return int(len(saved) < len(files))


def planned(args: argparse.Namespace, corpus: Corpus) -> list[Job]:
    """Return the models to train: the chains' first, which are short and are begun last."""
    asked = args.operator or (SOFTMAX, *ROWS)
    steps = [args.steps or (QUICK_STEPS if args.quick else n) for n in (COMPOSED_STEPS, STEPS)]
    chains = Chains()
    small = Config(NO_MIXER, 1, 1, 32, 64, symbols=chains.symbols + 1, decays=None, rate=1e-2)
    return [
        Job(replace(small, operator=operator), chains, steps[0], seed)
        for operator in COMPOSED
        if operator in asked
        for seed in range(args.seed, args.seed + (1 if args.quick else SEEDS))
    ] + [
        Job(Config(operator), corpus, steps[1], args.seed) for operator in ROWS if operator in asked
    ]


def chosen(models: list[Trained]) -> Trained:
    """Return the model that writes: the best of a higher order, or what there is."""
    higher = [model for model in models if model.config.operator in ("hla2", "ahla", "hla3")]
    return min(higher or models, key=lambda model: model.score)


def _stop(reason: str, code: int = 2) -> int:
    print(f"hla demo: {reason}", file=sys.stderr)
    return code
