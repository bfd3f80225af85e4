"""Show what was measured: progress and tables in the terminal, and the plot of time against T."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .measure import Row, Skipped
from .peers import PEERS

TIMED = {
    "forward": "the output of hla.scan",
    "forward + backward": "the output and the gradients of q, k and v",
    "step": "one token; torch SDPA: one query over T cached keys",
}


def console() -> Console:
    """Return the terminal, or a file wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar; each call of what is yielded names the next piece of work."""
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def advance(description: str) -> None:
            nonlocal begun
            bar.update(task, description=description, completed=begun)
            begun += 1

        yield advance


def show(console: Console, result: dict[str, Any], rows: list[Row], skipped: list[Skipped]) -> None:
    """Print every table and what was left out."""
    machine, first = result["machine"], result["first"]
    what = _what(first)
    named = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    places = [f"{machine['processor']}, {machine['cores']} cores{load}", *machine["accelerators"]]
    console.print("; ".join(places))
    commit = result["commit"] or "unknown"
    console.print(f"{named}; commit {commit}; {result['date']}", soft_wrap=True)
    for workload, timed in TIMED.items():
        some = [r for r in rows if r.workload == workload and r.tokens == first["tokens"]]
        if some:
            console.print(f"\n{workload}, T = {first['tokens']}, {what}: {timed}", soft_wrap=True)
            console.print(_table(some))
            console.print(_caption(some), soft_wrap=True)
    lengths = sorted({r.tokens for r in rows})
    if len(lengths) > 1:
        grown = [r for r in rows if r.workload == "forward" and r.operator == first["operator"]]
        console.print(f"\nforward, {first['operator']}, {what}: ms by T", soft_wrap=True)
        console.print(_growth(grown, lengths))
    console.print(f"\nimport hla: {1e3 * result['import_seconds']:.0f} ms")
    for name, beyond in result["memory"].items():
        beyond /= 2**20
        console.print(f"{name}: {beyond:.0f} MiB beyond input and output, first forward call")
    for name, reason in dict.fromkeys((s.name, s.reason) for s in skipped):
        console.print(f"not timed: {name}: {reason}")


def _what(first: dict[str, Any]) -> str:
    gate = "" if first["gate"] == "none" else f", {first['gate']}"
    sizes = f"B = {first['batch']}, H = {first['heads']}, D = V = {first['width']}"
    return f"{sizes}, {first['dtype']}{gate}"


def _table(rows: list[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    peers = [p for p in PEERS if any(p in (r.name, *r.times_faster) for r in rows)]
    columns = {"ms": [f"{1e3 * r.seconds:.4g}" for r in rows]}
    if any(r.accelerator for r in rows):
        columns["host\nms"] = [f"{1e3 * r.host_seconds:.4g}" for r in rows]
    if any(r.floor is not None for r in rows):
        columns["share of\nthe floor"] = [_known(r.share_of_floor, ".0%") for r in rows]
    for p in peers:
        columns[p.replace(" ", "\n")] = [_known(r.times_faster.get(p), ".2f", "x") for r in rows]
    if any(r.beyond is not None for r in rows):
        columns["memory\n/ q"] = [_known(r.beyond, ".2f") for r in rows]
    columns["error"] = [f"{r.error:.0e}" for r in rows]
    table.add_column("operator", no_wrap=True)
    table.add_column("runs on", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", vertical="bottom")
    for row, after, *cells in zip(rows, [*rows[1:], None], *columns.values(), strict=True):
        last = after is None or after.operator != row.operator
        style = "dim" if row.peer else None
        table.add_row(row.operator, row.label, *cells, style=style, end_section=last)
    return table


def _known(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _caption(rows: list[Row]) -> str:
    lines = ["Medians. Under a peer's name: its time over this row's: above 1 this row is faster."]
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
            "On the gpu, ms: between device events where torch has the arrays, with caches cold;"
            " host ms: the host's clock, waiting for the result."
        )
    if any(r.beyond is not None for r in rows):
        lines.append("Memory / q: at the peak, beyond inputs and results, in tensors of q's size.")
    return "\n".join(lines)


def _growth(rows: list[Row], lengths: list[int]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("runs on", no_wrap=True)
    for tokens in lengths:
        table.add_column(str(tokens), justify="right")
    times = {(r.label, r.tokens): r.seconds for r in rows}
    for label in dict.fromkeys(r.label for r in rows):
        cells = (times.get((label, tokens)) for tokens in lengths)
        table.add_row(label, *("" if s is None else f"{1e3 * s:.4g}" for s in cells))
    return table


def plot(path: Path, result: dict[str, Any], rows: Iterable[Row]) -> None:
    """Draw the forward time of the first operator against T, with its peers and floor."""
    from matplotlib.figure import Figure

    first, machine = result["first"], result["machine"]
    some = [r for r in rows if (r.workload, r.operator) == ("forward", first["operator"])]
    some.sort(key=lambda r: r.tokens)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(r.label for r in some):
        line = [r for r in some if r.label == label]
        xs, ys = [r.tokens for r in line], [1e3 * r.seconds for r in line]
        axes.plot(xs, ys, "o--" if line[0].peer else "s-", label=label, alpha=0.8)
    for accelerator in sorted({r.accelerator for r in some}):
        floors = {r.tokens: r.floor for r in some if r.accelerator == accelerator and r.floor}
        label = "floor (gpu)" if accelerator else "floor (matmul rate)"
        axes.plot(list(floors), [1e3 * s for s in floors.values()], "k:", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({r.tokens for r in some})
    axes.set_xticks(lengths, labels=[str(tokens) for tokens in lengths])
    axes.set(xlabel="tokens T", ylabel="forward, ms (median)")
    places = [f"{machine['processor']}, {machine['cores']} cores", *machine["accelerators"]]
    axes.set_title(f"{first['operator']}, {_what(first)}\n{'; '.join(places)}", fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    if some:
        figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)
