"""The documentation is true: code runs, links lead somewhere, tables are the program's."""

import argparse
import itertools
import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import environment, installed

import hla.states
from hla import backends, bench, contract
from hla.bench.peers import PEERS
from hla.bench.workloads import COMPILED, HOST, WORKLOADS
from hla.contract import Machine
from hla.core import programs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MEASURED = runpy.run_path(str(ROOT / "docs" / "measured.py"))
RESULTS = ROOT / "docs" / "benchmarks"
TEXTS = "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"
PAGES = [README, *(ROOT / x for x in TEXTS), *ROOT.glob("docs/*.md")]
PAGES.sort()
FENCE = re.compile(r"^```(.*)\n(?::caption: (.*)\n\n)?((?:.*\n)*?)```$", re.MULTILINE)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page):
    """Fenced blocks of one page: (language, caption, code padded to its own line numbers)."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        language, caption, code = found.groups()
        yield language, caption, "\n" * text[: found.start(3)].count("\n") + code


@pages
def test_code_runs(page, tmp_path, monkeypatch):
    """Python blocks run in order in one namespace; a captioned block is a file beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    namespace = {"__name__": page.stem}
    for language, caption, code in blocks(page):
        if caption:
            Path(caption).write_text(code.lstrip("\n"), encoding="utf-8")
        elif language == "python":
            exec(compile(code, str(page), "exec"), namespace)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pages
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(
        r"\]\(([^)#]*)#?([^)]*)\)", re.sub(FENCE, "", page.read_text("utf-8"))
    ):
        if target.startswith("https://"):
            continue
        other = (page.parent / target) if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


@pytest.mark.parametrize(
    ("page", "column", "table"),
    [
        (README, 2, programs.CAUSAL),
        (ROOT / "docs" / "derivations.md", 2, programs.CAUSAL),
        (ROOT / "docs" / "derivations.md", 3, programs.PREFIX),
    ],
    ids=["readme", "causal", "prefix"],
)
def test_operator_table_is_the_programs(page, column, table):
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("| `") and "pass_g(" in line
    ]
    assert [row[0] for row in rows] == list(table)
    for row in rows:
        steps = re.findall(r"(\w) = pass_g\^?(\d?)\((\w), (\w), (\w)\)", row[column])
        want = [(s.out, str(s.power), s.q, s.k, s.v) for s in table[row[0]]]
        assert [(out, power or "1", *rest) for out, power, *rest in steps] == want
        assert steps[-1][0] == "o"


def torch_mixer():
    """Return the layer of the docs."""
    code = next(c for _, _, c in blocks(ROOT / "docs" / "layer.md") if "class Mixer" in c)
    namespace = {}
    exec(compile(code, "layer", "exec"), namespace)
    return namespace["Mixer"]


@pytest.mark.parametrize("operator", contract.OPERATORS)
def test_the_layer_of_the_docs_survives_casts(operator):
    """As a whole or token by token; torch.func takes it as it comes."""
    torch = installed("torch")
    torch.manual_seed(0)
    layer, x = torch_mixer()(48, 12, operator), torch.randn(2, 6, 48)
    want, _ = layer(x)
    parameters = dict(layer.named_parameters())
    state = None
    for t in range(6):
        o, state = layer(x[:, t : t + 1], state)
        torch.testing.assert_close(o[:, 0], want[:, t], rtol=1e-4, atol=1e-5)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    found = torch.func.grad(loss)(parameters)
    slopes = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(slopes))
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        narrow = layer.to(dtype)
        o, (_, memory) = narrow(x.to(dtype))
        assert o.dtype == dtype
        assert {m.dtype for m in memory} <= {torch.float32, torch.float64}
        assert (o.float() - want).norm() < 0.1 * want.norm()


def test_the_layer_of_the_docs_is_exported_for_every_size():
    """One program for any batch and length, from the start and from a state."""
    torch = installed("torch")
    layer, x = torch_mixer()(8, 2, "hla2"), torch.randn(3, 8, 8)
    batch, tokens = (torch.export.Dim(name, min=2) for name in ("batch", "tokens"))
    _, state = layer(x)
    of_state = torch.utils._pytree.tree_map(lambda _: {0: batch}, state)
    for start, sizes in ((), ()), ((state,), (of_state,)):
        shapes = ({0: batch, 1: tokens}, *sizes)
        program = torch.export.export(layer, (x, *start), dynamic_shapes=shapes)
        for given in (torch.randn(2, 70, 8), torch.randn(5, 3, 8)):
            before = (layer(given)[1],) if start else ()
            found, want = program.module()(given, *before), layer(given, *before)
            torch.testing.assert_close(found, want)


def test_readme_has_the_two_commands():
    commands = [code.strip() for language, _, code in blocks(README) if language == "bash"]
    assert commands == [
        'pip install ".[demo]" && hla demo',
        'pip install -c constraints.txt ".[test]" && pytest',
    ]


def test_capability_tables_are_the_backends_data(monkeypatch):
    """Whatever this machine has: of a backend that cannot run here they are the same."""
    conf = str(ROOT / "docs" / "conf.py")
    tables = runpy.run_path(conf)["myst_substitutions"]
    for name in backends.TABLE:
        assert f"| `{name}` | " in tables["backends"]
        assert f"| `{name}` |" in tables["requests"].splitlines()[0]
    for dtypes in (x.capabilities.dtypes for x in map(backends.load, backends.TABLE)):
        assert f"| {', '.join(dtypes)} |" in tables["backends"]
    wide = next(x for x in tables["requests"].splitlines() if x.startswith("| float64 |"))
    assert "it multiplies float16, bfloat16, float32, not float64" in wide

    def dead(name):
        return load(name)._replace(machine=lambda: Machine("no such device"))

    load = backends.load
    monkeypatch.setattr(backends, "load", dead)
    assert runpy.run_path(conf)["myst_substitutions"] == tables


def planned(command):
    """What a command of `hla bench` times, and its options."""
    words = shlex.split(command)
    assert words[:2] == ["hla", "bench"]
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(words[2:])
    return list(bench._plan(args)), args


def test_committed_benchmarks_are_those_of_their_commands():
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        plan, args = planned(result["command"])
        assert result["first"] == plan[0][1]._asdict()
        tried = [*result["rows"], *result["skipped"]]
        wanted = {(workload, case.operator, case.tokens) for workload, case in plan}
        assert {(r["workload"], r["operator"], r["tokens"]) for r in tried} == wanted
        assert result["quick"] == args.quick
        for row in result["rows"]:
            backend, library, device = (*row["name"].split("/"), "", "")[:3]
            assert (PEERS[backend].library if row["peer"] else library) in args.library
            assert row["peer"] or [device] == args.device
            assert row["peer"] or not args.backend or backend in args.backend


def test_the_commands_to_add_results_time_every_kernel():
    """The runs that the README shows are theirs, where they are of all those libraries."""
    page = ROOT / "docs" / "benchmarks.md"
    runs, copies = (code for language, _, code in blocks(page) if language == "sh")
    commands = runs.replace("\\\n", "").strip().splitlines()
    for several, command in zip((False, True), commands, strict=True):
        plan, args = planned(command)
        libraries = {"torch", "jax", "cupy", "numba"}
        assert set(args.library) == libraries
        native = {name: backends.load(name).capabilities.native for name in backends.TABLE}
        assert set(args.backend) == {name for name in native if native[name] in libraries}
        assert f"cp {args.out}/bench.json docs/benchmarks/" in copies
        _, shown = MEASURED["widest"](RESULTS, several)
        theirs, of = planned(shown["command"])
        assert theirs == plan or set(of.library) != libraries
    assert "python docs/measured.py" in copies


def test_the_readme_is_written_of_the_committed_results():
    text = README.read_text("utf-8")
    assert MEASURED["written"](text) == text
    with pytest.raises(AssertionError, match="0 places for 'fast'"):
        MEASURED["written"](text.replace("<!-- fast -->", ""))


def test_the_table_of_speed_is_one_run():
    """Every row is one of its result's, and every row of a kernel of higher order is there."""
    _, result = MEASURED["widest"](RESULTS, several=False)
    assert result["commit"][:7] in README.read_text("utf-8")
    assert MEASURED["card"](result) in README.read_text("utf-8")
    lines = (x.strip("| ").split(" | ") for x in README.read_text("utf-8").splitlines())
    head, *rows = (x for x in lines if len(x) == 8 and x[0][-4:] in ("ms", "ward", "step"))
    shown = {(x[0], name): x[i] for x in rows for i, name in enumerate(head) if i}
    for r in result["rows"]:
        backend, library, *_ = [*r["name"].split("/"), ""]
        if r["peer"] or backend == "array_api" or r["operator"] == "linear":
            continue
        what, peers = f"{r['operator']} {r['workload']}", r["times_faster"]
        time = float(shown.pop((what, f"{contract.NAMES.get(library, library)} ({backend})")))
        assert time == pytest.approx(1e3 * r["seconds"], rel=5e-4)
        fla = peers["FLA recurrent" if r["workload"] == "step" else "FLA"]
        softmax = min(peers[p] for p in peers if "SDPA" in p)
        for peer, ratio in (("FLA", fla), ("softmax attention", softmax)):
            assert float(shown[what, peer]) == pytest.approx(time * ratio, rel=2e-3)
        if r["floor"] is None:
            assert shown[what, "floor"] == "-"
        else:
            assert float(shown[what, "floor"]) == pytest.approx(1e3 * r["floor"], rel=5e-4)
    assert {name for _, name in shown} == {"FLA", "softmax attention", "floor"}


def test_the_sentences_on_speed_are_of_their_rows():
    """Ranges over the rows of a library; at which lengths a peer is faster than which kernels."""

    def row(tokens, name, **ratios):
        return {"tokens": tokens, "name": name, "peer": False, "times_faster": ratios}

    rows = [
        *(
            row(1, n, FLA=x, **{"jax SDPA": y})
            for n, x, y in (("a/b/gpu", 2, 0.5), ("c/d/gpu", 3, 2))
        ),
        *(row(2, n, FLA=x, **{"jax SDPA": 3}) for n, x in (("a/b/gpu", 2), ("c/d/gpu", 0.9))),
        *(row(4, n, FLA=0.9, **{"jax SDPA": 3}) for n in ("a/b/gpu", "c/d/gpu", "array_api/b/gpu")),
    ]
    rows[-1]["times_faster"] = {"FLA": 9, "jax SDPA": 0.1}
    rows.append({**row(4, "FLA"), "peer": True})
    said = MEASURED["faster"]({"rows": rows}, ("jax SDPA", "torch SDPA"))
    assert said == "faster than some at T = 1 and slower than each at T = 2 and 4"
    said = MEASURED["faster"]({"rows": rows}, ("FLA",))
    assert said == (
        "slower than each at T = 1, faster than some at T = 2 and faster than each at T = 4"
    )
    assert MEASURED["faster"]({"rows": rows[:2]}, ("FLA",)) == "slower than each at every length"
    assert MEASURED["between"]([3.04, 2.0, 2.5]) == "2.0 to 3.0 times"
    assert MEASURED["between"]([2.0, 2.04]) == "2.0 times"


def test_generic_code_is_slower_than_the_peers_as_the_home_page_says():
    found = [
        r
        for path in RESULTS.glob("*.json")
        for r in json.loads(path.read_text("utf-8"))["rows"]
        if r["name"].startswith("array_api/") and r["workload"] != "step"
    ]
    assert found
    for r in found:
        peers = {name: x for name, x in r["times_faster"].items() if name != "jnp chunks"}
        assert {"FLA", "torch SDPA"} <= set(peers)
        assert max(peers.values()) < 1


def test_what_the_pages_say_of_quality_is_measured():
    """The judgement round the figures; the figures are those of the committed result."""
    folder = ROOT / "docs" / "demo"
    result = json.loads((folder / "results.json").read_text("utf-8"))
    assert result["command"] == "hla demo"
    assert re.fullmatch("[0-9a-f]{40}", result["commit"])
    bits = {name: m["bits_per_byte"] for name, m in result["models"].items()}
    assert min(bits.values()) > bits["linear"] - 0.05  # little or nothing
    for row in result["composition"]:
        assert row["accuracy"] > 0.9 if row["operator"] == "ahla" else row["accuracy"] < 0.5
    said, shown = MEASURED["helps"](folder).replace("\n", " "), MEASURED["demo"](folder)
    for name, x in bits.items():
        assert (f"{x:.3f} without" if name == "none" else f"{name} {x:.3f}") in said
        assert re.search(rf"\| {MEASURED['titled'](name)} \|.*\| {x:.3f} \|$", shown, re.MULTILINE)
    for operator in dict.fromkeys(row["operator"] for row in result["composition"]):
        right = [r["accuracy"] for r in result["composition"] if r["operator"] == operator]
        cells = MEASURED["titled"](operator), *(f"{x:.1%}" for x in right)
        assert f"| {' | '.join(cells)} |" in shown
        assert f"{cells[0]} {min(right):.0%}" in said
    assert MEASURED["shows"](folder / "curves.png", "demo", result)


def test_benchmarks_page_shows_every_figure_of_its_results():
    shown = MEASURED["benchmarks"](RESULTS).splitlines()
    cells = [line.strip("| ").split(" | ") for line in shown if line.startswith("| ")]
    starts = [i for i, row in enumerate(cells) if row[0] == "operator"]
    found = [
        {name: cell for name, cell in zip(cells[start], row, strict=True) if cell != "-"}
        for start, stop in itertools.pairwise([*starts, len(cells)])
        for row in cells[start + 1 : stop]
    ]
    rows = [
        row
        for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem)
        for workload in (*WORKLOADS, COMPILED, *HOST)
        for row in json.loads(path.read_text("utf-8"))["rows"]
        if row["workload"] == workload
    ]
    for row, r in zip(found, rows, strict=True):
        assert row.pop("operator") == r["operator"]
        assert row.pop("T") == str(r["tokens"])
        assert row.pop("runs on") == r["name"]
        quartiles = row.pop("quartiles", "").split("-") if r.get("quartiles") else []
        figures = {
            "ms": (1e3, r["seconds"]),
            "host ms": (1e3, r["host_seconds"]),
            "floor, ms": (1e3, r["floor"]),
            "share": (100, r["share_of_floor"]),
            "memory": (1, r["beyond"]),
            "error": (1, r["error"]),
            **{name: (1, ratio) for name, ratio in r["times_faster"].items()},
        }
        want = {name: unit * x for name, (unit, x) in figures.items() if x is not None}
        assert row.keys() == want.keys()
        for name, figure in want.items():
            digits = {"rel": 0.5} if name == "error" else {"rel": 5e-4, "abs": 0.0051}
            digits = {"abs": 0.51} if name == "share" else digits
            assert float(row[name].rstrip("%x")) == pytest.approx(figure, **digits)
        assert [float(x) for x in quartiles] == pytest.approx(
            [1e3 * x for x in r.get("quartiles") or ()], rel=5e-4
        )


def test_the_plots_are_of_the_committed_results():
    """A plot names the result that it shows, in its own file, and can be read."""
    image = installed("matplotlib.image")
    plots = sorted(RESULTS.glob("*.png"), key=lambda path: path.stem)
    for plot in plots:
        result = json.loads(plot.with_suffix(".json").read_text("utf-8"))
        assert MEASURED["shows"](plot, "bench", result)
        assert image.imread(plot).shape[-1] == 4
    assert {p.with_suffix(".json") for p in plots} == set(RESULTS.glob("*.json"))
    shown = MEASURED["benchmarks"](RESULTS)
    assert re.findall(r"benchmarks/(.*)\.png", shown) == [p.stem for p in plots]
    assert not MEASURED["shows"](plots[0], "bench", result | {"date": "another"})
    drawn = [MEASURED["widest"](RESULTS, several)[0].stem for several in (False, True)]
    assert re.findall(r"benchmarks/(.*)\.png", README.read_text("utf-8")) == drawn


def test_supported_versions_are_those_of_the_metadata():
    lines = MEASURED["versions"](RESULTS).splitlines()
    rows = {c[1].strip(): c[2:-1] for c in (line.split("|") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert rows["Python"][0].strip() == project["requires-python"]
    extras = project["optional-dependencies"]
    for name, package in MEASURED["NEEDED"].items():
        asked = [*project["dependencies"], *itertools.chain(*extras.values())]
        found = re.findall(rf"^{package}(?:\[\w+\])?(>=[\d.]+)", "\n".join(asked), re.MULTILINE)
        assert rows[name][0].strip().split(" or, for its kernels, ") == list(dict.fromkeys(found))
    floors = (ROOT / "constraints-floors.txt").read_text("utf-8")
    for name, pin in re.findall(r"^([\w-]+)==(.*)$", floors, re.MULTILINE):
        (row,) = (rows[n] for n, package in MEASURED["NEEDED"].items() if package == name)
        assert row[1].strip() == pin


def test_reports_are_asked_for_what_says_where_they_ran():
    forms = {p.stem: p.read_text("utf-8") for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"config", "fault", "speed", "wish"}
    for name in ("fault", "speed"):
        required = re.findall(
            r"label: (.*)\n(?:      .*\n)*    validations:\n      required: true", forms[name]
        )
        assert any("hla info" in x for x in required)
        assert any("hla.explain" in x for x in required)
    assert all("hla info" in forms[name] for name in ("fault", "speed", "wish"))


def test_the_project_has_no_address_yet_and_one_place_for_it():
    """Its pages take the address from pyproject.toml, which has none."""
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    assert conf["ADDRESS"] is None
    assert conf["html_theme_options"] == {}
    texts = [*PAGES, ROOT / "CITATION.cff", *ROOT.glob(".github/**/*.yml")]
    named = {
        x
        for p in texts
        for x in re.findall(r"(?:github|gitlab)\.com/[^\s)]*", p.read_text("utf-8"))
    }
    assert named == set()


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    told = set(re.findall(r"auto\w+:: (\S+)", page))
    assert set(hla.__all__) - {"states"} <= told
    types = {name for name in vars(hla.states) if re.fullmatch(r"\w+(State|Segment)", name)}
    assert types == {x.removeprefix("hla.states.") for x in told if x.startswith("hla.states.")}
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    tables = "".join(conf["myst_substitutions"][name] for name in ("states", "segments"))
    assert set(re.findall(r"`(\w+)`", tables)) == {x for x in types if "Packed" not in x}
