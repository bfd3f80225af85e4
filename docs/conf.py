"""Sphinx settings; the tables come from the backends' data and the saved benchmarks."""

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parents[1]))

import hla
from hla import backends, contract, dispatch
from hla.arguments import prepare
from hla.bench.measure import SOFTMAX
from hla.bench.workloads import CALL, HOST, WORKLOADS

project = "hla"
author = "the hla authors"
ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
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


def table(*rows):
    """Rows of cells as a Markdown table, the first one its head."""
    head, *rest = ("| " + " | ".join(str(cell) or "-" for cell in row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


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


def spoken(library):
    return contract.NAMES.get(library, library)


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


def results(folder):
    """Every committed result of `hla bench`, by its file's name."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    return {path: json.loads(path.read_text("utf-8")) for path in paths}


def benchmarks(folder):
    """Every result of `hla bench`: its plot, what was measured where, and a table a workload."""
    shown = []
    for path, result in results(folder).items():
        first, machine, rows = result["first"], result["machine"], result["rows"]
        load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
        host = f"{machine['processor']}, {machine['cores']} cores{load}"
        places = [*machine["accelerators"], host]
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        shown.append(f"## {path.stem}")
        if path.with_suffix(".png").exists():
            shown.append(f"![Forward times of {path.stem}](benchmarks/{path.stem}.png)")
        shown.append(
            f"**{'; '.join(places)}**: {sizes(first)}. {result['date'][:10]},"
            f" commit {result['commit'] or 'unknown'}; {versions}."
            f" `import hla`: {1e3 * result['import_seconds']:.0f} ms."
        )
        for workload in dict.fromkeys(r["workload"] for r in rows):
            case = f" ({sizes(CALL._asdict())})" if workload in HOST else ""
            some = [r for r in rows if r["workload"] == workload]
            shown.append(f"{workload}{case}:\n\n{timings(some)}")
        shown += [
            f"{name}: {beyond / 2**20:.0f} MiB beyond input and output, first forward call."
            for name, beyond in result["memory"].items()
        ]
        left_out = dict.fromkeys((s["name"], s["reason"]) for s in result["skipped"])
        shown += [f"Not timed: {name}: {reason}" for name, reason in left_out]
    return "\n\n".join(shown) or "No result is committed yet."


def sizes(case):
    """The sizes of a case but its length, which is a column."""
    gate = "" if case["gate"] == "none" else f", {case['gate']}"
    b, h, d = case["batch"], case["heads"], case["width"]
    return f"B = {b}, H = {h}, D = V = {d}, {case['dtype']}{gate}"


def speed(folder):
    """The README's table: what hla's kernels take, and what the peers of their run take.

    A row stands once, from the first result that has it, beside those of the same sums; a result of
    several lengths is a plot.
    """
    peers = "FLA's time / hla's", "softmax attention's / hla's"
    rows = []
    seen = set()
    for result in results(folder).values():
        if grown(result):
            continue
        for r in result["rows"]:
            backend, library, *_ = [*r["name"].split("/"), ""]
            if r["peer"] or backend == "array_api" or r["workload"] not in WORKLOADS:
                continue
            line = r["workload"], r["operator"], r["name"]
            if r["operator"] == "linear" or line in seen:
                continue
            seen.add(line)
            ratio = r["times_faster"]
            softmax = min((ratio[name] for name in SOFTMAX if name in ratio), default=None)
            first = next((ratio[name] for name in ("FLA", "FLA recurrent") if name in ratio), None)
            rows.append(
                (
                    f"{r['operator']} {r['workload']}",
                    f"{library} ({backend})",
                    ms(r["seconds"]),
                    known(r["share_of_floor"], ".0%"),
                    known(first, ".1f", "x"),
                    known(softmax, ".1f", "x"),
                )
            )
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    return table(("what", "arrays (backend)", "ms", "floor / ms", *peers), *rows)


NEEDED = {
    "NumPy": "numpy",
    "array-api-compat": "array-api-compat",
    "torch": "torch",
    "Triton": "triton",
    "JAX": "jax",
    "CuPy": "cupy-cuda13x",
    "Numba": "numba",
    "numba-cuda": "numba-cuda",
}


def versions(folder):
    """What pyproject.toml allows, the oldest that .ci/run tests, and what made the results."""
    extras = (x for xs in SETTINGS["optional-dependencies"].values() for x in xs)
    asked = [Requirement(text) for text in (*SETTINGS["dependencies"], *extras)]
    pins = (ROOT / "constraints-floors.txt").read_text("utf-8").splitlines()
    pinned = {r.name: r for r in map(Requirement, (p for p in pins if not p.startswith("#")))}
    ran = [result["versions"] for result in results(folder).values()]
    rows = [("what", "releases", "oldest tested by CI", "GPU results by")]
    pythons = ", ".join(dict.fromkeys(v["python"] for v in ran))
    rows.append(("Python", SETTINGS["requires-python"], "", pythons))
    for name, package in NEEDED.items():
        bounds = dict.fromkeys(str(r.specifier) for r in asked if r.name == package and r.specifier)
        tested = str(pinned[package].specifier).removeprefix("==") if package in pinned else ""
        used = ", ".join(dict.fromkeys(v[package] for v in ran if package in v))
        rows.append((name, " or, for its kernels, ".join(bounds), tested, used))
    return table(*rows)


def lengths(folder):
    """The plots of the home page: of every result that has several lengths."""
    some = (p for p, result in results(folder).items() if grown(result))
    return "\n\n".join(
        f"![Forward time of hla2 and its peers against T](benchmarks/{p.stem}.png)" for p in some
    )


def grown(result):
    """Whether a result has several lengths."""
    return len({r["tokens"] for r in result["rows"]}) > 1


def timings(rows):
    """Rows of one workload of one result, with every column that `hla bench` prints."""
    peers = list(dict.fromkeys(name for r in rows for name in r["times_faster"]))
    columns = {
        "operator": [r["operator"] for r in rows],
        "T": [r["tokens"] for r in rows],
        "runs on": [r["name"] for r in rows],
        "ms": [ms(r["seconds"]) for r in rows],
        "quartiles": [ms(*r.get("quartiles") or ()) for r in rows],
        "host ms": [ms(r["host_seconds"]) for r in rows],
        "floor, ms": [ms(r["floor"]) for r in rows],
        "share": [known(r["share_of_floor"], ".0%") for r in rows],
        "memory": [known(r["beyond"], ".2f") for r in rows],
        "error": [known(r["error"], ".0e") for r in rows],
    }
    for peer in peers:
        columns[peer] = [known(r["times_faster"].get(peer), ".2f", "x") for r in rows]
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return table(tuple(columns), *zip(*columns.values(), strict=True))


def ms(*seconds):
    """Seconds in milliseconds."""
    return "-".join(f"{1e3 * one:.4g}" for one in seconds if one is not None)


def known(value, form, unit=""):
    """A value, or nothing."""
    return "" if value is None else f"{value:{form}}{unit}"


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
    for made in (benchmarks, speed, lengths, versions):
        myst_substitutions[made.__name__] = made(ROOT / "docs" / "benchmarks")
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))

    def escape(app, what, name, obj, options, lines):
        lines[:] = [line.replace("*batch", r"\*batch") for line in lines]

    app.connect("autodoc-process-docstring", escape, priority=400)  # before numpydoc
    app.connect("build-finished", history)
