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


def test_committed_benchmarks_are_those_of_the_commands_beside_them():
    (code,) = (c for language, _, c in blocks(ROOT / "docs" / "benchmarks.md") if language == "sh")
    lines = [shlex.split(line) for line in code.replace("\\\n", "").strip().splitlines()]
    copied = set()
    for command, copy, plot in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        assert command[:2] == ["hla", "bench"]
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        args = parser.parse_args(command[2:])
        assert copy == ["cp", f"{args.out}/bench.json", copy[-1]]
        assert plot == [x.replace(".json", ".png") for x in copy]
        copied.add(ROOT / copy[-1])
        result = json.loads((ROOT / copy[-1]).read_text("utf-8"))
        plan = list(bench._plan(args))
        assert result["first"] == plan[0][1]._asdict()
        tried = [*result["rows"], *result["skipped"]]
        planned = {(workload, case.operator, case.tokens) for workload, case in plan}
        assert {(r["workload"], r["operator"], r["tokens"]) for r in tried} == planned
        assert result["quick"] == args.quick
        for row in result["rows"]:
            backend, library, device = (*row["name"].split("/"), "", "")[:3]
            assert (PEERS[backend].library if row["peer"] else library) in args.library
            assert row["peer"] or [device] == args.device
            assert row["peer"] or not args.backend or backend in args.backend
    assert copied == set((ROOT / "docs" / "benchmarks").glob("*.json"))


def test_the_readme_has_the_committed_speeds():
    """What it measured stands in the table as it is; the sentences round it name no figure."""
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    assert conf["speed"](ROOT / "docs" / "benchmarks") in README.read_text("utf-8")


def test_benchmarks_page_shows_every_figure_of_its_results():
    folder = ROOT / "docs" / "benchmarks"
    shown = runpy.run_path(str(ROOT / "docs" / "conf.py"))["benchmarks"](folder).splitlines()
    cells = [line.strip("| ").split(" | ") for line in shown if line.startswith("| ")]
    starts = [i for i, row in enumerate(cells) if row[0] == "operator"]
    found = [
        {name: cell for name, cell in zip(cells[start], row, strict=True) if cell != "-"}
        for start, stop in itertools.pairwise([*starts, len(cells)])
        for row in cells[start + 1 : stop]
    ]
    rows = [
        row
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)
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
    """A plot names the result that it shows, in its own file."""
    from hla.bench.report import source

    plots = sorted((ROOT / "docs" / "benchmarks").glob("*.png"), key=lambda path: path.stem)
    for plot in plots:
        result = json.loads(plot.with_suffix(".json").read_text("utf-8"))
        assert source(result).encode() in plot.read_bytes()
    assert {p.with_suffix(".json") for p in plots} == set(plots[0].parent.glob("*.json"))
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    shown = conf["benchmarks"](plots[0].parent)
    assert re.findall(r"benchmarks/(.*)\.png", shown) == [p.stem for p in plots]
    against = re.findall(r"benchmarks/(.*)\.png", conf["lengths"](plots[0].parent))
    for page in (README, ROOT / "docs" / "index.md"):
        text = page.read_text("utf-8").replace("{{ lengths }}", conf["lengths"](plots[0].parent))
        assert sorted(re.findall(r"benchmarks/(.*)\.png", text)) == sorted(["h100", *against])


def test_supported_versions_are_those_of_the_metadata():
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    lines = conf["versions"](ROOT / "docs" / "benchmarks").splitlines()
    rows = {c[1].strip(): c[2:-1] for c in (line.split("|") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert rows["Python"][0].strip() == project["requires-python"]
    extras = project["optional-dependencies"]
    for name, package in conf["NEEDED"].items():
        asked = [*project["dependencies"], *itertools.chain(*extras.values())]
        found = re.findall(rf"^{package}(?:\[\w+\])?(>=[\d.]+)", "\n".join(asked), re.MULTILINE)
        assert rows[name][0].strip().split(" or, for its kernels, ") == list(dict.fromkeys(found))
    floors = (ROOT / "constraints-floors.txt").read_text("utf-8")
    for name, pin in re.findall(r"^([\w-]+)==(.*)$", floors, re.MULTILINE):
        (row,) = (rows[n] for n, package in conf["NEEDED"].items() if package == name)
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


def test_what_the_pages_say_of_lengths_is_measured():
    """Softmax attention is faster at 1024 tokens, and neither it nor FLA from 4096 on."""
    found = json.loads((ROOT / "docs" / "benchmarks" / "h100-lengths.json").read_text("utf-8"))
    ours = [r for r in found["rows"] if not r["peer"]]
    assert {r["tokens"] for r in ours} == {1024, 4096, 16384, 65536}
    for r in ours:
        faster = {name for name, ratio in r["times_faster"].items() if ratio < 1}
        assert faster == ({"torch SDPA", "jax SDPA"} if r["tokens"] == 1024 else set())
