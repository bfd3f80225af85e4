"""The documentation is true: code runs, links lead somewhere, tables are the program's."""

import re
import runpy
from pathlib import Path

import pytest

import hla
from hla.core import programs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    monkeypatch.setenv("PYTHONPATH", str(Path(hla.__file__).parents[1]))
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
        want = [(s.out, str(s.power), s.q, s.k, s.v) for s in table[row[0]].steps]
        assert [(out, power or "1", *rest) for out, power, *rest in steps] == want
        assert table[row[0]].outputs == ((1, "o"),)


def test_readme_has_the_two_commands():
    commands = [code.strip() for language, _, code in blocks(README) if language == "bash"]
    assert commands == [
        'pip install ".[demo]" && hla demo',
        'pip install -c constraints.txt ".[test]" && pytest',
    ]


def test_capability_tables_name_every_backend():
    tables = runpy.run_path(str(ROOT / "docs" / "conf.py"))["myst_substitutions"]
    for entry in hla.available():
        assert f"`{entry.name}`" in tables["backends"]
        assert (f"`{entry.name}`" in tables["requests"]) == entry.available
