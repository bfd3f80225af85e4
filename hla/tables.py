"""Tables in a terminal of any width, by rich: every figure is shown whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

USUAL, NARROWEST = 80, 20


class Column(NamedTuple):
    """A heading and the cells below it."""

    heading: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"


def console() -> Console:
    """Return the standard output; its width is that of COLUMNS, the terminal, or 80."""
    made = Console(highlight=False, markup=False, emoji=False)
    made.width = max(made.width or USUAL, NARROWEST)
    return made


def show(
    console: Console,
    keys: Sequence[Column],
    *groups: Sequence[Column],
    box: Box = SIMPLE_HEAD,
    styles: Sequence[str] = (),
    sections: Sequence[int] = (),
) -> None:
    """Print columns as one table where that fits, else as more that all begin with the keys.

    Parameters
    ----------
    keys : sequence of Column
        What tells the rows apart.
    groups : sequences of Column
        Columns that belong together: a table is broken between two groups first.
    styles : sequence of str
        One a row.
    sections : sequence of int
        Rows that a line follows.
    """
    dense = box is SIMPLE_HEAD

    def table(columns: Sequence[Column]) -> Table:
        made = Table(box=box, show_edge=not dense, collapse_padding=dense)
        for column in (*keys, *columns):
            made.add_column(column.heading, justify=column.justify, vertical="bottom", no_wrap=True)
        for i, cells in enumerate(zip(*(c.cells for c in (*keys, *columns)), strict=True)):
            made.add_row(*cells, style=styles[i] if styles else None, end_section=i in sections)
        return made

    def width(columns: Sequence[Column]) -> int:
        unlimited = console.options.update(max_width=1 << 16)
        return Measurement.get(console, unlimited, table(columns)).maximum

    together = [column for group in groups for column in group]
    parts = [together]
    if width(together) > console.width:
        parts = []
        for group in groups:
            for i, column in enumerate(group):
                if i and width([*parts[-1], column]) <= console.width:
                    parts[-1].append(column)
                else:
                    parts.append([column])
    usual = console.width
    for i, part in enumerate(parts):
        if i:
            console.print()
        console.width = max(usual, width(part))  # a terminal breaks the line: nothing is left out
        console.print(table(part))
    console.width = usual
