"""Sphinx settings; the tables come from the backends' data and the saved benchmarks."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from measured import (
    BENCHMARKS,
    DEMO,
    SETTINGS,
    benchmarks,
    cards,
    demo,
    fast,
    helps,
    spoken,
    table,
    versions,
)

import hla
from hla import backends, contract, dispatch
from hla.arguments import prepare

project = "hla"
author = "the hla authors"
ADDRESS = SETTINGS.get("urls", {}).get("Repository")  # of the project, once it has one
release = version = hla.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hla {release}"
html_show_copyright = html_use_index = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
myst_enable_extensions = ["dollarmath", "substitution"]
html_math_renderer = "mathml"  # typeset at build time: no script
myst_heading_anchors = 3
smartquotes = False  # x' is a transpose
html_theme_options = {"source_repository": ADDRESS} if ADDRESS else {}
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the signature by name, not the overloads; types are in the text

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


def built_in():
    """Backends of the table, whatever this machine has."""
    return [backends.load(name) for name in backends.TABLE]


def capabilities():
    """What each backend computes, as its data has it."""
    head = (
        "backend",
        "picked for (the first that can)",
        "libraries",
        "traced arrays of",
        "dtypes",
        "forms",
        "gradients",
    )
    rows = [head]
    for backend in built_in():
        c = backend.capabilities
        picked = (f"{lib} on {'an accelerator' if acc else 'the host'}" for lib, acc in c.serves)
        words = (picked, *(map(spoken, x) for x in (c.libraries, c.traced)), c.dtypes, c.forms)
        gradients = "yes" if c.gradients else "no"
        rows.append((f"`{backend.name}`", *map(", ".join, words), gradients))
    return table(*rows)


def answer(backend, *, width=8, tokens=8, dtype="float32", **options):
    """Which operators a backend runs on one kind of request, and why not the others."""
    x, can, cannot = np.zeros((tokens, width), dtype), [], {}
    library = next(iter(backend.capabilities.libraries))
    for operator in contract.OPERATORS if "ridge" not in options else ["hla2"]:
        request, _, _ = prepare(x, x, x, operator=operator, **options)
        request = dataclasses.replace(request, library=library)
        why = dispatch.formless(request) or contract.refusal(backend.capabilities, request)
        if why is None:
            can.append(operator)
        else:
            cannot.setdefault(why, []).append(operator)
    runs = [", ".join(can)] if can else []
    return "; ".join(runs + [f"not {', '.join(names)}: {why}" for why, names in cannot.items()])


def requests():
    """What each backend answers to each kind of request, on arrays of a library that it takes."""
    rows = [("request", *(f"`{backend.name}`" for backend in built_in()))]
    for label, options in REQUESTS.items():
        rows.append((label, *(answer(backend, **options) for backend in built_in())))
    return table(*rows)


def fields(parts):
    """Names and sizes of a state's fields, by D = 3 and V = 2, as text."""
    axes = {3: "D", 2: "V"}
    shapes = ((n, ", ".join(axes[size] for size in x.shape)) for n, x in parts._asdict().items())
    return ", ".join(f"{name} ({shape})" if shape else name for name, shape in shapes)


def states():
    """What `hla.scan` returns as a state for each operator and mask: a type and its fields."""
    q, v = np.ones((4, 3)), np.ones((4, 2))
    asked = [{"operator": o, "mask": m} for o in contract.OPERATORS for m in ("causal", "prefix")]
    asked += [{"operator": "hla2", "ridge": 0.1}]
    asked += [{"operator": o, "decay": 0.9, "convention": "paper"} for o in ("hla2", "hla3")]
    rows = [("state", "of", "fields")]
    for options in asked:
        _, state = hla.scan(q, q, v, return_state=True, **options)
        of = [options["operator"], options.get("mask")]
        of += [name for name in ("ridge", "convention") if name in options]
        named = ", ".join(filter(None, of)).replace("convention", 'convention="paper"')
        rows.append((f"`{type(state).__name__}`", named, fields(state)))
    return table(*rows)


def segments():
    """What `hla.summarize` returns for each operator and mask."""
    q, v = np.ones((4, 3)), np.ones((4, 2))
    rows = [("segment", "of", "fields")]
    for operator in contract.OPERATORS:
        for mask in ("causal", "prefix"):
            segment = hla.summarize(q, q, v, operator=operator, mask=mask)
            rows.append((f"`{type(segment).__name__}`", f"{operator}, {mask}", fields(segment)))
    return table(*rows)


myst_substitutions = {"backends": capabilities(), "requests": requests()}
myst_substitutions |= {"states": states(), "segments": segments()}


def mathml(display):
    """Return how the HTML writer shows a formula: MathML, which browsers typeset by themselves."""

    from docutils import nodes  # the tests read this file where Sphinx is not installed
    from latex2mathml.converter import convert

    def visit(writer, node):
        writer.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit, None


def history(app, error):
    """Add asv's pages of the committed results, which it finds by git."""

    from sphinx.util import logging

    if error is None and app.builder.format == "html":
        script = Path(app.srcdir).parent / "asv_benchmarks" / "publish.py"
        command = [sys.executable, script, Path(app.outdir, "asv")]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            logging.getLogger(__name__).warning("no pages of asv: %s", done.stderr)


def setup(app):
    """Add the benchmarks and their history; keep (*batch, T, D) from opening an emphasis."""
    for made in (benchmarks, fast, cards, versions):
        myst_substitutions[made.__name__] = made(BENCHMARKS)
    for made in (demo, helps):
        myst_substitutions[made.__name__] = made(DEMO)
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))

    def escape(app, what, name, obj, options, lines):
        lines[:] = [line.replace("*batch", r"\*batch") for line in lines]

    app.connect("autodoc-process-docstring", escape, priority=400)  # before numpydoc
    app.connect("build-finished", history)
