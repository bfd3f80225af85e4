"""What the documentation and the README show of committed results of `hla bench` and `hla demo`.

python docs/measured.py draws the plots that are missing or of other results, and writes the
README's parts.
"""

import json
import re
import sys
import textwrap
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parents[1]))

from hla import contract
from hla.bench.measure import SOFTMAX
from hla.bench.workloads import CALL, HOST, WORKLOADS
from hla.machine import source

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = ROOT / "README.md"
BENCHMARKS, DEMO = ROOT / "docs" / "benchmarks", ROOT / "docs" / "demo"


def results(folder):
    """Every committed result of `hla bench`, by its file's name."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    return {path: json.loads(path.read_text("utf-8")) for path in paths}


def benchmarks(folder):
    """Every result of `hla bench`: its plot, what was measured where, and a table a workload."""
    shown = []
    for path, result in results(folder).items():
        first, machine, rows = result["first"], result["machine"], result["rows"]
        places = [*machine["accelerators"], host(machine)]
        shown.append(f"## {path.stem}\n\n```sh\n{result['command']}\n```")
        if path.with_suffix(".png").exists():
            shown.append(f"![Forward times of {path.stem}](benchmarks/{path.stem}.png)")
        shown.append(
            f"**{'; '.join(places)}**: {sizes(first)}. {made_by(result)}."
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


def host(machine):
    """The processor of a result, and how busy it was."""
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    return f"{machine['processor']}, {machine['cores']} cores{load}"


def made_by(result):
    """Date, commit and versions of a result."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    settings = "".join(f"; {name}={value}" for name, value in result.get("settings", {}).items())
    return f"{result['date'][:10]}, commit {result['commit'] or 'unknown'}; {versions}{settings}"


def sizes(case):
    """The sizes of a case but its length, which is a column."""
    gate = "" if case["gate"] == "none" else f", {case['gate']}"
    b, h, d = case["batch"], case["heads"], case["width"]
    return f"B = {b}, H = {h}, D = V = {d}, {case['dtype']}{gate}"


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


def kernels(result):
    """The rows of hla's kernels, by the library of their arrays: (library, row)."""
    ours = (r for r in result["rows"] if not r["peer"] and not r["name"].startswith("array_api/"))
    return [(r["name"].split("/")[1], r) for r in ours]


def widest(folder, several):
    """Of the results of one length, or of several, that of most libraries, of those the newest."""
    some = {path: r for path, r in results(folder).items() if grown(r) == several}
    return max(some.items(), key=lambda p: (len({n for n, _ in kernels(p[1])}), p[1]["date"]))


def grown(result):
    """Whether a result has several lengths."""
    return len({r["tokens"] for r in result["rows"]}) > 1


def fast(folder):
    """What the README and the home page say of speed: one run, and one of several lengths."""
    path, result = widest(folder, several=False)
    growing, longer = widest(folder, several=True)
    sums = [(library, r) for library, r in kernels(result) if r["floor"] and not_linear(r)]
    each = [
        f"{between(r['times_faster']['FLA'] for name, r in sums if name == library)} as long as"
        f" those for {spoken(library)}"
        for library in dict.fromkeys(name for name, _ in sums)
    ]
    each[0] = each[0].replace("those", "the kernels")
    softmax = between(attention(r) for _, r in sums)
    first = result["first"]
    text = (
        f"On one {card(result)} ({sizes(first)}, T = {first['tokens']}; commit"
        f" {result['commit'][:7]}), flash-linear-attention (FLA) takes {listed(each)} for the sums"
        f" of the table; softmax attention, which computes another function, takes {softmax} as"
        " long as they. All of it is one run ([every row](benchmarks.md), with the commands)."
    )
    also = (
        f"One sequence that grows (B = {longer['first']['batch']}; {card(longer)}, commit"
        f" {longer['commit'][:7]}), in a run of its own, by the kernels for"
        f" {listed(list(dict.fromkeys(spoken(n) for n, _ in kernels(longer))))}: softmax attention"
        f" is {faster(longer, SOFTMAX)}; FLA is {faster(longer, ('FLA',))}."
    )
    columns = (
        "The floor is the least time that the card's measured matrix rate and bandwidth allow."
        " Softmax attention is torch's (SDPA) or JAX's (cuDNN), whichever is faster. Where an eager"
        " call's Python takes longer than its kernels, as in a step of Numba, the time is Python's."
    )
    return "\n\n".join(
        [
            wrapped(text),
            speed(result),
            wrapped(columns),
            f"![Forward time of hla2 beside its peers](benchmarks/{path.stem}.png)",
            wrapped(also),
            f"![Forward time of hla2 and its peers against T](benchmarks/{growing.stem}.png)",
        ]
    )


def speed(result):
    """The table of a result: what each sum takes by hla's kernels, and by its peers."""
    sums = {}
    for r in result["rows"]:
        if r["workload"] in WORKLOADS and not_linear(r):
            sums.setdefault((r["operator"], r["workload"]), {})[r["name"]] = r
    backends = {
        r["name"]: f"{spoken(library)} ({r['name'].split('/')[0]})"
        for library, r in kernels(result)
    }
    rows = []
    for what, found in sums.items():
        took = {name: r["seconds"] for name, r in found.items()}
        rows.append(
            (
                " ".join(what),
                *(ms(took.get(name)) for name in backends),
                ms(took.get("FLA", took.get("FLA recurrent"))),
                ms(min((took[name] for name in SOFTMAX if name in took), default=None)),
                ms(next(iter(found.values()))["floor"]),
            )
        )
    return table(("ms", *backends.values(), "FLA", "softmax attention", "floor"), *rows)


def not_linear(row):
    """Whether a row is of an operator of higher order."""
    return row["operator"] != "linear"


def attention(row):
    """The time of the faster softmax attention over the row's."""
    return min((x for name, x in row["times_faster"].items() if name in SOFTMAX), default=None)


def faster(result, peers):
    """At which lengths these peers are faster than all of hla's kernels, than some, than none."""
    found = {}
    for tokens in sorted({r["tokens"] for r in result["rows"]}):
        ratios = [
            min(x for name, x in r["times_faster"].items() if name in peers)
            for _, r in kernels(result)
            if r["tokens"] == tokens
        ]
        ahead = sum(x < 1 for x in ratios)
        than = "faster than" if ahead else "slower than"
        how = f"{than} {'some' if 0 < ahead < len(ratios) else 'each'}"
        found.setdefault(how, []).append(str(tokens))
    if len(found) == 1:
        return f"{next(iter(found))} at every length"
    return listed([f"{how} at T = {listed(lengths)}" for how, lengths in found.items()])


def between(numbers):
    """The least and the largest of several ratios."""
    ends = sorted(numbers)
    least, most = f"{ends[0]:.1f}", f"{ends[-1]:.1f}"
    return f"{least} times" if least == most else f"{least} to {most} times"


def card(result):
    """The accelerator of a result."""
    return result["machine"]["accelerators"][0]


def cards(folder):
    """Every accelerator that has a committed result."""
    return listed(list(dict.fromkeys(map(card, results(folder).values()))))


def trained(folder):
    """The committed result of `hla demo`, and its right answers by operator, seed by seed."""
    result = json.loads((folder / "results.json").read_text("utf-8"))
    answers = {}
    for row in result["composition"]:
        answers.setdefault(row["operator"], []).append(row["accuracy"])
    return result, answers


def helps(folder):
    """What the README and the home page say of quality."""
    result, answers = trained(folder)
    bits = {name: f"{m['bits_per_byte']:.3f}" for name, m in result["models"].items()}
    without = bits.pop("none")
    shares = [
        f"{titled(name)} {' to '.join(dict.fromkeys(f'{x:.0%}' for x in (min(xs), max(xs))))}"
        for name, xs in answers.items()
    ]
    seeds = {len(xs) for xs in answers.values()}
    advice = (
        'For a model, begin with first order, `operator="linear"` with a `log_gate`: its program is'
        " the shortest and its state the smallest, and on text the higher orders gained little or"
        " nothing in our demo. `ahla` is worth trying where facts must be chained, which one layer"
        " of linear, hla2 or softmax attention did not learn there. hla2 and hla3 are here to be"
        " studied. What larger models would show is not measured here."
    )
    found = (
        "`hla demo` trains small models that differ in their operator alone"
        f" ([results](demo.md), commit {result['commit'][:7]}). Bits a byte of held-out text, one"
        f" model each: {listed([f'{name} {x}' for name, x in bits.items()])}; {without} without an"
        " operator. Right answers where a leads to b, b to c, and c is asked of a, one layer,"
        f" {' or '.join(map(str, sorted(seeds)))} models each: {listed(shares)}; a third by"
        " guessing among the ends."
    )
    return f"{wrapped(advice)}\n\n{wrapped(found)}"


def demo(folder):
    """The tables of the committed result of `hla demo`."""
    result, answers = trained(folder)
    corpus, steps, sizes = (result[name] for name in ("corpus", "training", "sizes"))
    small = result["composition"][0]["sizes"]
    scored = [step for step, _ in next(iter(result["models"].values()))["held_out"]]
    rows = [
        (name, *[""] * (len(scored) - 1), f"{x:.3f}") for name, x in result["baselines"].items()
    ]
    rows += [
        (titled(name), *(f"{bits:.3f}" for _, bits in m["held_out"]))
        for name, m in result["models"].items()
    ]
    parameters = dict.fromkeys(f"{m['parameters']:,}" for m in result["models"].values())
    seeds = dict.fromkeys(row["seed"] for row in result["composition"])
    chained = [(titled(name), *(f"{x:.1%}" for x in xs)) for name, xs in answers.items()]
    return "\n\n".join(
        [
            f"```sh\n{result['command']}\n```",
            f"**{host(result['machine'])}**: {result['seconds']:.0f} s. {made_by(result)}.",
            "![Losses, scores and right answers](demo/curves.png)",
            f"Text: {corpus['name']}, {corpus['train']:,} bytes, and {corpus['held']:,} held out."
            f" {sizes['blocks']} blocks of {sizes['heads']} heads, width {sizes['width']},"
            f" {listed(list(parameters))} parameters;"
            f" {steps['steps']:,} steps of {steps['batch']} x {steps['window']} bytes, seed"
            f" {steps['seed']}. Bits a byte of what was held out, by steps:",
            table(("model", *scored), *rows),
            f"Chained facts: told b -> c, then a -> b; asked a, wanted c. One layer of"
            f" {small['heads']} head, width {small['width']},"
            f" {result['composition'][0]['steps']:,} steps; the share of right answers.",
            table(("one layer of", *(f"seed {seed}" for seed in seeds)), *chained),
        ]
    )


def titled(operator):
    """An operator of the demo as its tables name it."""
    return {"none": "no operator", "softmax": "softmax attention"}.get(operator, operator)


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


def table(*rows):
    """Rows of cells as a Markdown table, the first one its head."""
    head, *rest = ("| " + " | ".join(str(cell) or "-" for cell in row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def ms(*seconds):
    """Seconds in milliseconds."""
    return "-".join(f"{1e3 * one:.4g}" for one in seconds if one is not None)


def known(value, form, unit=""):
    """A value, or nothing."""
    return "" if value is None else f"{value:{form}}{unit}"


def spoken(library):
    return contract.NAMES.get(library, library)


def listed(words):
    """Words as a sentence lists them."""
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def wrapped(text):
    """A paragraph in lines that the README may have."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def written(text):
    """The README's text with its parts made anew of the results."""
    for name, part in {"fast": fast(BENCHMARKS), "helps": helps(DEMO)}.items():
        part = re.sub(r"\]\((?!https?:)", "](docs/", part)
        between = re.compile(f"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)
        text, found = between.subn(lambda _, part=part: part, text)
        assert found == 1, f"README.md has {found} places for {name!r}; expected 1"
    return text


def draw():
    """Draw the plot of every result that has none of its own."""
    from hla.bench import measure, report
    from hla.demo.report import draw

    for path, result in results(BENCHMARKS).items():
        plot = path.with_suffix(".png")
        if not shows(plot, "bench", result):
            report.plot(plot, result, [measure.Row(**row) for row in result["rows"]])
    result, _ = trained(DEMO)
    if not shows(DEMO / "curves.png", "demo", result):
        draw(result, DEMO / "curves.png")


def shows(plot, program, result):
    """Whether a plot is of this result, and was not broken on its way."""
    found = plot.read_bytes() if plot.exists() else b""
    return found.startswith(b"\x89PNG\r\n") and source(program, result).encode() in found


if __name__ == "__main__":
    draw()
    README.write_text(written(README.read_text("utf-8")), encoding="utf-8")
