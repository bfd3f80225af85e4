"""The demo's output: progress, the table and the sample, and the files that it saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import tables
from ..kernels.numpy.threads import cores
from ..machine import source
from ..tables import Column
from . import composition
from .composition import Chains
from .corpus import BATCH, WINDOW, Bytes, Corpus, gzip_bits, order2_bits
from .model import NO_MIXER, SOFTMAX, TAPS, parameter_count
from .training import Job, Sample, Trained

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    NO_MIXER: "#777777",
    SOFTMAX: "#000000",
    "linear": "#0072B2",
    "hla2": "#D55E00",
    "ahla": "#009E73",
    "hla3": "#CC79A7",
}
GZIP, ORDER2 = "gzip -9", "order-2 byte counts"


def label(operator: str) -> str:
    """Return the name of a row."""
    return {NO_MIXER: "no mixer", SOFTMAX: "softmax attention"}.get(operator, operator)


def introduce(console: Console, jobs: Sequence[Job]) -> None:
    """Print the models to be trained, and what on."""
    for kind in dict.fromkeys(type(job.task) for job in jobs):
        some = [job for job in jobs if isinstance(job.task, kind)]
        task, config = some[0].task, some[0].config
        if isinstance(task, Corpus):
            about = (
                f"{task.name}: {len(task.train):,} bytes to train on, the last"
                f" {len(task.held):,} held out"
            )
            batch = f"{BATCH} x {WINDOW} bytes"
        else:
            about = f"Chained facts: {task.chains} chains of 3 out of {task.symbols} symbols"
            batch = f"{composition.BATCH} rows"
        console.print(
            f"{about}.\nEach model: {counted(config.blocks, 'block')} of"
            f" {counted(config.heads, 'head')}, width {config.width},"
            f" {parameter_count(config):,} parameters; {some[0].steps:,} steps of {batch}."
        )
    console.print(f"{min(cores(), len(jobs))} at a time.\n")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}{'s' * (number != 1)}"


@contextmanager
def progress(console: Console, jobs: Sequence[Job]) -> Iterator[Callable[[Job, int, float], None]]:
    """Show a bar for each operator of each task; yield the function that moves it."""
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(30),
        TextColumn("{task.completed:>5}/{task.total} steps"),
        TextColumn("{task.fields[bits]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    steps = dict.fromkeys(((_bar(job), job.seed) for job in jobs), 0)
    with Progress(*columns, console=console) as bars:
        tasks = {
            name: bars.add_task(
                name,
                total=sum(job.steps for job in jobs if _bar(job) == name),
                start=False,
                bits=" " * 9,
            )
            for name in reversed(dict.fromkeys(map(_bar, jobs)))
        }

        def advance(job: Job, step: int, bits: float) -> None:
            name = _bar(job)
            steps[name, job.seed] = step
            if not bars.tasks[tasks[name]].started:
                bars.start_task(tasks[name])
            done = sum(steps[n, seed] for n, seed in steps if n == name)
            bars.update(tasks[name], completed=done, bits=f"{bits:.2f} bits")

        yield advance


def _bar(job: Job) -> str:
    task = "text" if isinstance(job.task, Corpus) else "chains"
    return f"{task}, {label(job.config.operator)}"


class Results(NamedTuple):
    """All measurements; `baselines` are held-out bits a byte of methods without training.

    `about` is the command, and where and how long it ran.
    """

    texts: Sequence[Trained]
    composed: Sequence[Trained]
    baselines: dict[str, float]
    sample: Sample
    about: dict[str, Any]

    @property
    def bits(self) -> dict[str, float]:
        """Held-out bits a byte of every row."""
        return self.baselines | {label(m.config.operator): m.score for m in self.texts}

    @property
    def accuracies(self) -> dict[str, list[float]]:
        """Share of right answers of every seed, by operator."""
        found: dict[str, list[float]] = {}
        for model in self.composed:
            found.setdefault(label(model.config.operator), []).append(model.score)
        return found


def baselines(corpus: Corpus) -> dict[str, float]:
    """Score a compressor and a table of counts."""
    return {GZIP: gzip_bits(corpus), ORDER2: order2_bits(corpus)}


def print_text(console: Console, results: Results) -> None:
    """Print a row a model of text, below the baselines, and what they show."""
    rows = results.bits
    speeds = {label(m.config.operator): f"{m.tokens_per_second:,.0f}" for m in results.texts}
    job = results.texts[0].job
    size = f"{parameter_count(job.config):,}"
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
    console.print(text_shows(results) + "\n")
    known = job.config.blocks * (TAPS - 1) + 1
    console.print(
        "gzip: what the held-out text adds to the training text. Counts: of the training text, "
        f"Witten-Bell back-off. No mixer: o = v, so only the last {known} bytes are known, by the "
        "convolutions. tokens/s: of training, in one process with one BLAS thread.\n",
        style="dim",
    )


def text_shows(results: Results) -> str:
    """Say in two sentences what the table of the text shows."""
    job = results.texts[0].job
    assert isinstance(job.task, Corpus)
    share = job.steps * BATCH * WINDOW / len(job.task.train)
    seen = (
        f"gzip and the counts have all of the training text at hand; the models read {share:.1f}"
        " times its length and keep only their parameters."
    )
    bits = {m.config.operator: m.score for m in results.texts}
    higher = [name for name in ("hla2", "ahla", "hla3") if name in bits]
    if "linear" not in bits or not higher:
        return seen
    best = min(higher, key=lambda name: bits[name])
    named = [name for name in ("linear", best, NO_MIXER) if name in bits]
    scores = ", ".join(f"{label(name)} {bits[name]:.3f}" for name in named)
    ahead = "first order" if bits["linear"] <= bits[best] else best
    return f"{seen} Of the operators {ahead} is ahead, by one model of each ({scores})."


def print_composed(console: Console, results: Results) -> None:
    """Print a row an operator of the chained facts, and what they show."""
    if not results.composed:
        return
    rows = results.accuracies
    chains = results.composed[0].job.task
    assert isinstance(chains, Chains)
    console.print("Chained facts: told b -> c, then a -> b; asked a, wanted c", style="bold")
    tables.show(
        console,
        [Column("one layer of", list(rows), "left")],
        [
            Column("right answers", [", ".join(f"{x:.0%}" for x in row) for row in rows.values()]),
            Column(
                "models over 90%", [f"{sum(x > 0.9 for x in r)} of {len(r)}" for r in rows.values()]
            ),
        ],
        box=HEAVY_HEAD,
        styles=["bold" if max(row) > 0.9 else "" for row in rows.values()],
    )
    able = [name for name, row in rows.items() if max(row) > 0.9]
    console.print(
        f"A model that knows which symbols end a chain, and not which chain, is right in"
        f" {1 / chains.chains:.0%}. "
        + (
            f"{' and '.join(able)} composed the two facts in one layer, "
            if able
            else "No operator composed the two facts in one layer here, "
        )
        + "as ahla can: under a new key it stores what it has just read.\n"
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


def document(results: Results) -> dict[str, Any]:
    """All that was measured, as it is saved."""
    job = results.texts[0].job
    assert isinstance(job.task, Corpus)
    corpus = {"name": job.task.name, "train": len(job.task.train), "held": len(job.task.held)}
    models = {
        m.config.operator: {
            "bits_per_byte": m.score,
            "tokens_per_second": m.tokens_per_second,
            "parameters": parameter_count(m.config),
            "held_out": m.scores,
            "training": curve(m),
        }
        for m in results.texts
    }
    composed = [
        {
            "operator": m.config.operator,
            "seed": m.job.seed,
            "steps": m.job.steps,
            "accuracy": m.score,
            "held_out": m.scores,
            "training": curve(m),
            "sizes": asdict(m.config),
        }
        for m in results.composed
    ]
    return {
        **results.about,
        "corpus": corpus,
        "sizes": {k: v for k, v in asdict(job.config).items() if k != "operator"},
        "training": {"steps": job.steps, "seed": job.seed, "batch": BATCH, "window": WINDOW},
        "baselines": results.baselines,
        "models": models,
        "composition": composed,
        "sample": results.sample.text.decode(errors="replace"),
    }


def curve(model: Trained) -> list[float]:
    """Bits of every training batch, to a ten-thousandth."""
    return [round(bits, 4) for bits in model.losses]


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a `document`."""
    path.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a `document`: curves of the text, its held-out bits, answers over steps."""
    figure = Figure(figsize=(5.4, 11), layout="constrained")  # read at a phone's width too
    curves, bars, answers = figure.subplots(3, 1, height_ratios=(4, 3, 4))
    bits = dict(result["baselines"])
    for operator, model in result["models"].items():
        losses = np.array(model["training"])
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        steps = np.arange(len(smooth)) + (width + 1) / 2
        colour, name = COLOURS[operator], label(operator)
        curves.plot(steps, smooth, color=colour, alpha=0.35, linewidth=1)
        held_out = zip(*model["held_out"], strict=True)
        curves.plot(*held_out, "o-", color=colour, markersize=4, label=name)
        bits[name] = model["bits_per_byte"]
    for (name, baseline), dashes in zip(result["baselines"].items(), (":", "--"), strict=True):
        curves.axhline(baseline, color="black", linestyle=dashes, linewidth=1, label=name)
    curves.set(
        xlabel="training steps", ylabel="bits per byte", ylim=(min(bits.values()) - 0.2, None)
    )
    curves.set_title("Text: held-out (dots) and training (thin)", fontsize=10)
    curves.legend(frameon=False, fontsize=9)
    colours = {label(operator): colour for operator, colour in COLOURS.items()}
    drawn = bars.barh(
        list(bits), list(bits.values()), color=[colours.get(n, "#bbbbbb") for n in bits]
    )
    bars.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_title("Held-out bits per byte (less is better)", fontsize=10)
    named = set[str]()
    for row in result["composition"]:
        operator = row["operator"]
        shown = "_" * (operator in named) + label(operator)  # each name once in the legend
        named.add(operator)
        right = zip(*row["held_out"], strict=True)
        answers.plot(*right, "o-", color=COLOURS[operator], label=shown)
    answers.set(xlabel="training steps", ylabel="right answers", ylim=(0, 1.05))
    answers.set_title("Chained facts, one layer (more is better)", fontsize=10)
    if named:
        answers.legend(frameon=False, fontsize=9)
    for axes in (curves, bars, answers):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150, metadata={"Comment": source("demo", result)})
