"""Progress and tables of results in the terminal, and the plot of time against T."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import tables
from ..machine import source
from ..tables import Column
from .measure import Row, Skipped
from .peers import PEERS
from .workloads import CALL, COMPILED, HOST

TIMED = {
    "forward": "the output of hla.scan",
    "forward + backward": "the output and the gradients of q, k and v",
    "step": "one token; torch SDPA: one query over T cached keys; FLA: a recurrent pass a step;"
    " lines: the same by bare array lines, jnp's under jax.jit",
    COMPILED: "the same, torch under torch.compile",
    **dict.fromkeys(HOST, "until the call has returned; FLA: one call of it"),
}


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar; each call of what is yielded names the next piece of work."""
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def advance(description: str) -> None:
            nonlocal begun
            bar.update(task, description=description, completed=begun)
            begun += 1

        yield advance


def introduce(console: Console, result: dict[str, Any]) -> None:
    """Print the machine, and a warning where other work disturbs it."""
    machine = result["machine"]
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    places = [f"{machine['processor']}, {machine['cores']} cores{load}", *machine["accelerators"]]
    console.print("; ".join(places))
    named = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(f"{named}; commit {result['commit'] or 'unknown'}; {result['date']}")
    if machine["load"] is not None and machine["load"] > machine["cores"]:
        console.print(
            f"Warning: the load of {machine['load']:.1f} exceeds the {machine['cores']} cores:"
            " other work makes these times longer and less certain."
        )


def show(console: Console, result: dict[str, Any], rows: list[Row], skipped: list[Skipped]) -> None:
    """Print every table and what was left out."""
    first = result["first"]
    what = _what(first)
    for workload, timed in TIMED.items():
        case = CALL._asdict() if workload in HOST else first
        some = [r for r in rows if r.workload == workload and r.tokens == case["tokens"]]
        if some:
            console.print(f"\n{workload}, T = {case['tokens']}, {_what(case)}: {timed}")
            show_times(console, some)
    grown = [r for r in rows if (r.workload, r.operator) == ("forward", first["operator"])]
    lengths = sorted({r.tokens for r in grown})
    if len(lengths) > 1:
        console.print(f"\nforward, {first['operator']}, {what}: ms (quartiles) by T")
        _show_growth(console, grown, lengths)
    if rows:
        imported = _milliseconds(result["import_seconds"], result["import_quartiles"])
        console.print(f"\nimport hla: {imported} ms")
    for name, beyond in result["memory"].items():
        beyond /= 2**20
        console.print(f"{name}: {beyond:.0f} MiB beyond input and output, first forward call")
    for name, reason in dict.fromkeys((s.name, s.reason) for s in skipped):
        console.print(f"not timed: {name}: {reason}", soft_wrap=True)


def _what(first: dict[str, Any]) -> str:
    gate = "" if first["gate"] == "none" else f", {first['gate']}"
    sizes = f"B = {first['batch']}, H = {first['heads']}, D = V = {first['width']}"
    return f"{sizes}, {first['dtype']}{gate}"


def show_times(console: Console, rows: list[Row]) -> None:
    """Print the rows of one workload, and what their columns mean."""
    keys = [
        Column("operator", [r.operator for r in rows], "left"),
        Column("runs on", [r.label for r in rows], "left"),
    ]
    times = [
        Column("ms", [f"{1e3 * r.seconds:.4g}" for r in rows]),
        Column("quartiles", [_between(r.quartiles) for r in rows]),
    ]
    if any(r.accelerator for r in rows):
        times.append(Column("host\nms", [f"{1e3 * r.host_seconds:.4g}" for r in rows]))
    if any(r.floor is not None for r in rows):
        shares = [_known(r.share_of_floor, ".0%") for r in rows]
        times.append(Column("share of\nthe floor", shares))
    if any(r.beyond is not None for r in rows):
        times.append(Column("memory\n/ q", [_known(r.beyond, ".2f") for r in rows]))
    times.append(Column("error", [f"{r.error:.0e}" for r in rows]))
    peers = [
        Column(p.replace(" ", "\n"), [_known(r.times_faster.get(p), ".2f", "x") for r in rows])
        for p in PEERS
        if any(p in (r.name, *r.times_faster) for r in rows)
    ]
    styles = ["dim" if r.peer else "" for r in rows]
    lines = [i for i, (r, after) in enumerate(pairwise(rows)) if after.operator != r.operator]
    tables.show(console, keys, times, peers, styles=styles, sections=lines)
    console.print(_caption(rows))


def _milliseconds(seconds: float, quartiles: tuple[float, float] | None) -> str:
    return f"{1e3 * seconds:.4g}" + (f" ({_between(quartiles)})" if quartiles else "")


def _between(quartiles: tuple[float, float] | None) -> str:
    return "-".join(f"{1e3 * one:.4g}" for one in quartiles or ())


def _known(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _caption(rows: list[Row]) -> str:
    lines = [
        "ms: the median; half of the calls took a time between the quartiles. Under a peer's name:"
        " its time over this row's: above 1 this row is faster."
    ]
    for accelerator in sorted({r.accelerator for r in rows}):
        some = [r for r in rows if r.accelerator == accelerator]
        floors = {r.operator: r.floor for r in some if r.floor is not None}
        if not floors:
            continue
        what = "operations / NumPy's 2048^3 matmul rate in this run"
        if accelerator:
            rates = {unit: rate / 1e12 for unit, rate in some[0].rates.items()}
            what = (
                f"the larger of operations / {rates['operations']:.0f} TFLOP/s"
                f" and bytes / {rates['bytes']:.2f} TB/s, both measured in this run"
            )
        listed = ", ".join(f"{name} {1e3 * least:.3g} ms" for name, least in floors.items())
        lines.append(f"Floor on the {'gpu' if accelerator else 'cpu'} ({what}): {listed}.")
    if any(r.accelerator for r in rows):
        lines.append(
            "On the gpu, ms: by queues of calls where JAX has the arrays, else between device"
            " events, with caches cold; host ms: the host's clock, which waits."
        )
    if any(r.beyond is not None for r in rows):
        lines.append("Memory / q: at the peak, beyond inputs and results, in tensors of q's size.")
    return "\n".join(lines)


def _show_growth(console: Console, rows: list[Row], lengths: list[int]) -> None:
    times = {(r.label, r.tokens): _milliseconds(r.seconds, r.quartiles) for r in rows}
    labels = list(dict.fromkeys(r.label for r in rows))
    columns = [Column(str(n), [times.get((label, n), "") for label in labels]) for n in lengths]
    tables.show(console, [Column("runs on", labels, "left")], columns)


def plot(path: Path, result: dict[str, Any], rows: Iterable[Row]) -> None:
    """Draw the first operator's forward time, its peers and floor: against T, or of one T."""
    from matplotlib.figure import Figure

    first, machine = result["first"], result["machine"]
    some = [r for r in rows if (r.workload, r.operator) == ("forward", first["operator"])]
    some.sort(key=lambda r: r.tokens)
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")  # read at a phone's width too
    axes = figure.subplots()
    lengths = sorted({r.tokens for r in some})
    if len(lengths) == 1:
        _bars(axes, some)
    elif some:
        _lines(axes, some, lengths)
        figure.legend(loc="outside lower center", ncols=2, fontsize="medium")
    places = [f"{machine['processor']}, {machine['cores']} cores", *machine["accelerators"]]
    about = f", T = {lengths[0]}" if len(lengths) == 1 else ""
    what = f"{first['operator']} forward, {_what(first)}{about}"
    figure.suptitle("\n".join([what, *places]), fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    axes.set_axisbelow(True)
    figure.savefig(path, format="png", dpi=150, metadata={"Comment": source("bench", result)})


def _named(row: Row) -> str:
    """Name a row for who knows no backend."""
    if row.peer:
        return row.label
    backend, library, place = row.name.split("/")
    return f"hla, {library} ({'generic code' if backend == 'array_api' else backend}, {place})"


def _lines(axes: Any, rows: list[Row], lengths: list[int]) -> None:
    for label in dict.fromkeys(map(_named, rows)):
        line = [r for r in rows if _named(r) == label]
        xs, ys = [r.tokens for r in line], [1e3 * r.seconds for r in line]
        axes.plot(xs, ys, "o--" if line[0].peer else "s-", label=label, alpha=0.8)
    for accelerator in sorted({r.accelerator for r in rows}):
        floors = {r.tokens: r.floor for r in rows if r.accelerator == accelerator and r.floor}
        label = "floor (gpu)" if accelerator else "floor (matmul rate)"
        axes.plot(list(floors), [1e3 * s for s in floors.values()], "k:", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, labels=[str(tokens) for tokens in lengths])
    _mark(axes.yaxis)
    axes.set(xlabel="tokens T", ylabel="ms (median)")


def _bars(axes: Any, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda r: r.seconds)
    times = [1e3 * r.seconds for r in rows]
    colours = ["#999999" if r.peer else "#0072B2" for r in rows]
    bars = axes.barh([_named(r) for r in rows], times, color=colours)
    axes.bar_label(bars, [f"{ms:.3g}" for ms in times], padding=3)
    for floor in {r.floor for r in rows if r.floor}:
        axes.axvline(1e3 * floor, color="black", linestyle=":")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=3 * max(times))  # room for its label
    _mark(axes.xaxis)
    axes.set(xlabel="ms (median); dotted: the floor")


def _mark(axis: Any) -> None:
    """Mark a logarithmic axis at 1, 2 and 5 of each decade, of which it may have less than one."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
