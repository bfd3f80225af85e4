"""Sphinx settings; the capability tables are made from the dispatch table at each build."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import hla
from hla import dispatch

project = "hla"
author = "the hla authors"
release = version = hla.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hla {release}"
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
smartquotes = False  # x' is a transpose
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

REQUESTS = {
    "plain": {},
    "`mask='prefix'`": {"mask": "prefix"},
    "`mask='none'`": {"mask": "none"},
    "`decay`": {"decay": 0.9},
    "`log_gate`": {"log_gate": -0.1},
    "`normalize`": {"normalize": True},
    "`ridge`": {"ridge": 0.1},
    "`return_state`": {"return_state": True},
    "`convention='paper'`, `decay`": {"convention": "paper", "decay": 0.9},
    "`form='recurrent'`": {"form": "recurrent"},
    "`form='associative'`": {"form": "associative"},
    "`form='associative'`, `convention='paper'`, `decay`": {
        "form": "associative",
        "convention": "paper",
        "decay": 0.9,
    },
    "`form='associative'`, `mask='none'`": {"form": "associative", "mask": "none"},
    "`form='dense'`": {"form": "dense"},
    "D = 256": {"width": 256},
    "T = 0": {"tokens": 0},
    "float16": {"dtype": "float16"},
    "float64": {"dtype": "float64"},
}


def table(*rows):
    """Rows of cells as a Markdown table, the first one its head."""
    head, *rest = ("| " + " | ".join(str(cell) or "-" for cell in row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def backends():
    """What each backend says of itself."""
    serves = {row.name: row.serves for row in dispatch.TABLE}
    rows = [("backend", "picked for", "here", "version", "dtypes", "gradients")]
    for entry in hla.available():
        pairs = serves.get(entry.name, ())
        picked = (f"{lib} on {'an accelerator' if acc else 'the host'}" for lib, acc in pairs)
        here = "yes" if entry.available else f"no: {entry.reason}"
        gradients = "yes" if entry.gradients else "no"
        name, dtypes = f"`{entry.name}`", ", ".join(entry.dtypes)
        rows.append((name, ", ".join(picked), here, entry.version, dtypes, gradients))
    return table(*rows)


def answer(name, operators, *, width=8, tokens=8, dtype="float32", **options):
    """Which operators a backend runs on one kind of request, and why not the others."""
    x = np.zeros((tokens, width), dtype)
    can, cannot = [], {}
    for operator in operators if "ridge" not in options else ["hla2"]:
        try:
            hla.explain(x, x, x, operator=operator, backend=name, **options)
            can.append(operator)
        except hla.Unsupported as error:
            why = str(error).removeprefix(f"no backend can do this request. {name}: ")
            cannot.setdefault(why, []).append(operator)
    said = [", ".join(can)] if can else []
    return "; ".join(said + [f"not {', '.join(names)}: {why}" for why, names in cannot.items()])


def requests():
    """What each backend answers to each kind of request, on host arrays of NumPy."""
    entries = [entry for entry in hla.available() if entry.available]
    rows = [("request", *(f"`{entry.name}`" for entry in entries))]
    for label, options in REQUESTS.items():
        rows.append((label, *(answer(e.name, e.operators, **options) for e in entries)))
    return table(*rows)


myst_substitutions = {"backends": backends(), "requests": requests()}


def setup(app):
    """Keep the star of (*batch, T, D) from opening an emphasis."""

    def escape(app, what, name, obj, options, lines):
        lines[:] = [line.replace("*batch", r"\*batch") for line in lines]

    app.connect("autodoc-process-docstring", escape, priority=400)  # before numpydoc
