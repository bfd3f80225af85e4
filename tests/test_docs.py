"""The documentation is true: code runs, links lead somewhere, tables are the program's."""

import argparse
import itertools
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from conftest import environment, installed

import hla
from hla import backends, bench
from hla.bench.peers import PEERS
from hla.bench.workloads import COMPILED, HOST, WORKLOADS
from hla.contract import Machine
from hla.core import programs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / x for x in ("CHANGELOG.md", "CONTRIBUTING.md")), *ROOT.glob("docs/*.md")]
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


def test_the_layer_of_the_tour_survives_casts():
    """No cast of the layer touches its decays; torch.func takes it as it comes."""
    torch = installed("torch")
    code = next(c for _, _, c in blocks(ROOT / "docs" / "tour.md") if "class Mixer" in c)
    namespace = {"torch": torch, "hla": hla}
    exec(compile(code, "tour", "exec"), namespace)
    layer, x = namespace["Mixer"](48, 12), torch.randn(2, 6, 48)
    want, decay = layer(x), layer.options(x)["decay"]
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    slopes = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(slopes))
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        narrow = layer.to(dtype)
        assert (narrow.options(x)["decay"] == decay).all()
        o = narrow(x.to(dtype))
        assert o.dtype == narrow.step(x[:, 0].to(dtype))[0].dtype == dtype
        assert (o.float() - want).norm() < 0.1 * want.norm()


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
    for command, copy in zip(lines[::2], lines[1::2], strict=True):
        assert command[:2] == ["hla", "bench"]
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        args = parser.parse_args(command[2:])
        assert copy == ["cp", f"{args.out}/bench.json", copy[-1]]
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
        for path in sorted(folder.glob("*.json"))
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
