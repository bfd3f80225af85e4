"""The demo's output: progress, the table and the sample, and the files that it saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import hla

from .. import tables
from ..tables import Column
from .corpus import Bytes, Corpus, gzip_bits, order2_bits
from .model import NO_MIXER, parameter_count
from .training import BATCH, WINDOW, Job, Sample, Trained, cores

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    NO_MIXER: "#777777",
    "linear": "#0072B2",
    "hla2": "#D55E00",
    "ahla": "#009E73",
    "hla3": "#CC79A7",
}
GZIP, ORDER2 = "gzip -9", "order-2 byte counts"


def label(operator: str) -> str:
    """Return the name of a row."""
    return "no mixer" if operator == NO_MIXER else operator


def introduce(console: Console, jobs: Sequence[Job]) -> None:
    """Print the models to be trained, and the text."""
    corpus, config = jobs[0].corpus, jobs[0].config
    console.print(
        f"{corpus.name}: {len(corpus.train):,} bytes to train on, the last {len(corpus.held):,} "
        f"held out.\nEach model: {config.blocks} blocks of {config.heads} heads, width "
        f"{config.width}, {parameter_count(config):,} parameters; {jobs[0].steps:,} steps of "
        f"{BATCH} x {WINDOW} bytes, {min(cores(), len(jobs))} at a time.\n"
    )


@contextmanager
def progress(console: Console, jobs: Sequence[Job]) -> Iterator[Callable[[str, int, float], None]]:
    """Show a bar for each model; yield the function that moves it."""
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(40),
        TextColumn("{task.completed:>5}/{task.total} steps"),
        TextColumn("{task.fields[bits]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks = {
            job.config.operator: bars.add_task(
                label(job.config.operator), total=job.steps, start=False, bits=" " * 14
            )
            for job in jobs
        }

        def advance(operator: str, step: int, bits: float) -> None:
            task = tasks[operator]
            if not bars.tasks[task].started:
                bars.start_task(task)
            bars.update(task, completed=step, bits=f"{bits:.2f} bits/byte")

        yield advance


class Results(NamedTuple):
    """All measurements; `baselines` are held-out bits a byte of methods without training."""

    jobs: Sequence[Job]
    models: Sequence[Trained]
    baselines: dict[str, float]
    sample: Sample

    @property
    def bits(self) -> dict[str, float]:
        """Held-out bits a byte of every row."""
        return self.baselines | {label(m.config.operator): m.bits for m in self.models}


def baselines(corpus: Corpus) -> dict[str, float]:
    """Score a compressor and a table of counts."""
    return {GZIP: gzip_bits(corpus), ORDER2: order2_bits(corpus)}


def print_table(console: Console, results: Results) -> None:
    """Print a row a model, below the baselines."""
    rows = results.bits
    speeds = {label(m.config.operator): f"{m.tokens_per_second:,.0f}" for m in results.models}
    size = f"{parameter_count(results.jobs[0].config):,}"
    console.print("Held-out text", style="bold")
    tables.show(
        console,
        [Column("model", list(rows), "left")],
        [
            Column("bits/byte", [f"{bits:.3f}" for bits in rows.values()]),
            Column("tokens/s", [speeds.get(name, "") for name in rows]),
            Column("parameters", [size if name in speeds else "" for name in rows]),
        ],
        box=HEAVY_HEAD,
        styles=["bold" if bits == min(rows.values()) else "" for bits in rows.values()],
        sections=[len(results.baselines) - 1],
    )
    console.print(
        "gzip: what the held-out text adds to the training text. Counts: of the training text, "
        "Witten-Bell back-off. No mixer: o = v, so only the last byte is known. tokens/s: of "
        f"training, in one process with one BLAS thread, {min(cores(), len(results.jobs))} at a "
        "time.\n",
        style="dim",
    )


def print_sample(console: Console, results: Results, model: Trained, prompt: Bytes) -> None:
    """Print the prompt and what the model made of it."""
    sample = results.sample
    line = partial(console.rule, characters="-" if console.options.ascii_only else "─", style="dim")
    line("prompt, from the held-out text", align="left")
    console.print(_readable(prompt.tobytes()), style="dim", soft_wrap=True)
    line(f"{label(model.config.operator)} continues", align="left")
    console.print(_readable(sample.text), soft_wrap=True)
    line()
    console.print(
        "Written by hla.step from the state that one hla.scan of the prompt returned, at "
        f"{sample.tokens_per_second:,.0f} tokens/s. Its logits and one scan's over all of it"
        f" differ by {sample.difference:.0e} at most.\n",
        style="dim",
    )


def _readable(text: bytes) -> str:
    """Decode, with a dot for each control character."""
    shown = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "\u00b7" for c in shown)


def write_json(results: Results, path: Path) -> None:
    """Write all that was measured."""
    job = results.jobs[0]
    corpus = {"name": job.corpus.name, "train": len(job.corpus.train), "held": len(job.corpus.held)}
    models = {
        m.config.operator: {
            "bits_per_byte": m.bits,
            "tokens_per_second": m.tokens_per_second,
            "parameters": parameter_count(m.config),
            "held_out": m.scores,
            "training": m.losses,
        }
        for m in results.models
    }
    document = {
        "versions": {"hla": hla.__version__, "numpy": np.__version__},
        "corpus": corpus,
        "sizes": {k: v for k, v in asdict(job.config).items() if k != "operator"},
        "training": {"steps": job.steps, "seed": job.seed, "batch": BATCH, "window": WINDOW},
        "baselines": results.baselines,
        "models": models,
        "sample": results.sample.text.decode(errors="replace"),
    }
    text = json.dumps(document, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def draw(results: Results, path: Path) -> None:
    """Learning curves on the left, the held-out bits of every row on the right."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for model in results.models:
        operator = model.config.operator
        losses = np.array(model.losses)
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        steps = np.arange(len(smooth)) + (width + 1) / 2
        left.plot(steps, smooth, color=COLOURS[operator], alpha=0.35, linewidth=1)
        left.plot(
            *zip(*model.scores, strict=True),
            "o-",
            color=COLOURS[operator],
            markersize=4,
            label=label(operator),
        )
    for (name, bits), dashes in zip(results.baselines.items(), (":", "--"), strict=True):
        left.axhline(bits, color="black", linestyle=dashes, linewidth=1, label=name)
    low = min(results.bits.values())
    left.set(xlabel="training steps", ylabel="bits per byte", ylim=(low - 0.2, None))
    left.set_title("Learning curves: held-out (dots) and training (thin)", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    names = list(results.bits)
    colours = {label(operator): colour for operator, colour in COLOURS.items()}
    bars = right.barh(
        names, list(results.bits.values()), color=[colours.get(n, "#bbbbbb") for n in names]
    )
    right.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    right.invert_yaxis()
    right.set_title("Held-out bits per byte (less is better)", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.margins(x=0.15)
    figure.savefig(path, format="png", dpi=150)
