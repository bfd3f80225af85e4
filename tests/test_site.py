"""The built pages as a browser has them: Chromium, where it is installed, finds nothing wrong."""

import collections
import contextlib
import functools
import glob
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urldefrag

import pytest
from conftest import environment, installed

from hla.bench.workloads import WORKLOADS

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))
WIDTHS = (1280, 390)
# The views of asv's page beside its first; "multiples", by its own style, is wider than 390 pixels.
TABS = ("explore", "heatmap", "grid", "compare", "regressions", "inventory")
VIEWS = [f"asv/index.html#view={tab}" for tab in TABS]
# Whether there is a font with the measures of formulas, which Debian's fonts-dejavu-extra has.
MATHEMATICS = bool(glob.glob("/usr/share/fonts/**/DejaVuMathTeXGyre.ttf", recursive=True))
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"  # no other host is reached
SEEN = """() => {
    const wide = [], all = selector => [...document.querySelectorAll(selector)];
    for (let e = document.querySelector("h1") ?? document.body; e; e = e.parentElement) {
        const shown = e !== document.documentElement && getComputedStyle(e).overflowX === "visible";
        if (!shown && e.scrollWidth > e.clientWidth + 1) wide.push(e.className || e.tagName);
    }
    return {
        wide: wide.join(", "),
        ids: all("[id]").map(e => e.id),
        links: all("a[href]").map(e => String(e.href)),
        level: all("math msub").filter(e => {
            const [base, index] = [...e.children].map(part => part.getBoundingClientRect().bottom);
            return index <= base + 1;
        }).map(e => e.textContent),
        raw: all("math").map(e => e.textContent).filter(text => text.includes("\\\\")),
    };
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files; the icon that every browser asks for is nobody's fault."""

    def do_GET(self):
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def served(folder):
    """Serve a folder on a port of this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def faults(folder, pictures, views=()):
    """Open every page and view of a folder at each width; return what is wrong, by page.

    A picture of each at each width is left in another folder.
    """
    driver = installed("playwright.sync_api").sync_playwright
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the pages were built, and none was opened")
    pages = {path.relative_to(folder).as_posix() for path in folder.rglob("*.html")}
    names = sorted(pages.union(views))
    with served(folder) as home, driver() as run:
        browser = run.chromium.launch(executable_path=chromium, args=[ALONE])
        found, seen = {}, {}
        for name in names:
            found[name] = []
            seen[name] = visit(browser, home, name, pictures, found[name].append)
        browser.close()
    for name in names:
        for link in sorted({x for x in seen[name]["links"] if x.startswith(home)}):
            target = link.removeprefix(home)
            page, anchor = urldefrag(target)
            if page not in pages and not (folder / page).is_file():
                found[name].append(f"{target} leads nowhere")
            elif anchor and target not in views and anchor not in seen[page]["ids"]:
                found[name].append(f"{target}: there is no such anchor")
    return {name: wrong for name, wrong in found.items() if wrong}


def visit(browser, home, name, pictures, report):
    """Open one page and leave its pictures; return its anchors and links."""
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    page.set_default_timeout(300_000)  # on a busy machine
    page.on("pageerror", lambda error: report(f"error: {error}"))
    page.on("console", lambda line: line.type == "error" and report(f"error: {line.text}"))
    page.on("response", lambda got: got.status < 400 or report(f"{got.status}: {got.url}"))
    own = home, "data:", "blob:"
    page.on("request", lambda r: r.url.startswith(own) or report(f"leaves the host: {r.url}"))
    page.goto(home + name, wait_until="networkidle")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(100)  # what scripts draw anew
        seen = page.evaluate(SEEN)
        if seen["wide"]:
            report(f"wider than {width} pixels: {seen['wide']}")
        picture = re.sub(r"\W+", "-", name.replace(".html", "")) + f"-{width}.png"
        page.screenshot(path=pictures / picture, full_page=True)
    for formula in seen["raw"]:
        report(f"not typeset: {formula}")
    if MATHEMATICS:
        for formula in seen["level"]:
            report(f"an index on the line: {formula}")
    page.close()
    return seen


FAULTS = {
    "link": ('<a href="nowhere.html">there</a>', "nowhere.html leads nowhere"),
    "anchor": ('<a href="link.html#nothing">there</a>', "nothing: there is no such anchor"),
    "console": ("<script>console.error('oh no')</script>", "error: oh no"),
    "exception": ("<script>throw new Error('oh no')</script>", "error: oh no"),
    "image": ('<img src="nothing.png">', "404: "),
    "request": ('<img src="http://elsewhere.example/a.png">', "leaves the host: http://elsewhere"),
    "wide": ('<p style="width: 600px">wide</p>', "wider than 390 pixels"),
    "cut": (
        '<style>html { overflow: hidden }</style><pre style="width: 600px">wide',
        "wider than 390",
    ),
    "formula": (r"<math><mi>\alpha</mi></math>", r"not typeset: \alpha"),
    "index": (
        "<math style='font-family: DejaVu Serif'><msub><mi>o</mi><mi>t</mi></msub></math>",
        "an index on the line: ot",
    ),
}
FINE = """
<h1 id="top">Fine</h1> <a href="#top">up</a> <a href="https://elsewhere.example">not opened</a>
<div style="overflow-x: auto"><table style="width: 600px"><tr><td>wide</td></tr></table></div>
"""


def test_each_fault_is_found(tmp_path):
    """One a page, and nothing on a page that has none."""
    for name, (fault, _) in (FAULTS | {"fine": ("", "")}).items():
        page = f"<!doctype html><meta charset=utf-8><body>{FINE}{fault}"
        (tmp_path / f"{name}.html").write_text(page, encoding="utf-8")
    found = faults(tmp_path, tmp_path)
    told = {name: fault for name, fault in FAULTS.items() if MATHEMATICS or name != "index"}
    assert found.keys() == {f"{name}.html" for name in told}
    for name, (_, want) in told.items():
        assert any(want in one for one in found[f"{name}.html"]), found
    assert len([*tmp_path.glob("*.png")]) == len(WIDTHS) * (len(FAULTS) + 1)


def test_the_site(tmp_path):
    """The documentation is built without a warning, and nothing is wrong with its pages.

    Nor with asv's, which have the figures of the committed results. HLA_SCREENSHOTS names the
    folder of the pictures.
    """
    installed("sphinx")
    installed("asv_tachyon")
    if not (ROOT / ".git").exists():
        pytest.skip("asv reads the history, and there is none here")
    html = tmp_path / "html"
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(html)]
    subprocess.run(build, check=True, cwd=ROOT, env=environment())
    runs = collections.defaultdict(list)  # of one commit, by what they measured
    for result in suite_sized():
        for row in result["rows"]:
            if row["workload"] in WORKLOADS:
                measured = result["commit"], row["workload"], row["operator"], row["name"]
                runs[measured].append(1e3 * row["seconds"])
    graphs = (html / "asv" / "graphs").rglob("machine-*/*, *.json")
    points = [json.loads(path.read_text("utf-8")) for path in graphs]
    means = {sum(times) / len(times) for times in runs.values()}
    assert means <= {one for point in points for _, one in point}
    pictures = Path(os.environ.get("HLA_SCREENSHOTS") or tmp_path / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    assert faults(html, pictures, VIEWS) == {}


def suite_sized():
    """Return the committed results of the size that asv follows: of B = 1 there is a plot."""
    every = [json.loads(path.read_text("utf-8")) for path in RESULTS]
    found = [r for r in every if (r["first"]["batch"], r["first"]["tokens"]) == (8, 4096)]
    assert found
    return found


@pytest.fixture
def repository(tmp_path):
    """A new repository: what runs git in it, and what runs a line of asv's publisher on it."""

    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        command = ["git", *name, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def publisher(line, *words):
        code = f"import publish, sys; publish.ROOT = sys.argv.pop(1)\nprint({line})"
        command = [sys.executable, "-c", code, str(tmp_path), *words]
        path = environment(ROOT / "asv_benchmarks")
        return subprocess.run(command, env=path, check=True, capture_output=True, text=True).stdout

    git("init")
    return git, publisher


def test_a_result_of_a_branch_enters_at_its_merge(repository):
    """Asv knows the first parents of HEAD alone."""
    git, publisher = repository

    def commit(name):
        git("commit", "--allow-empty", "-m", name)
        return git("rev-parse", "HEAD")

    first = commit("first")
    git("checkout", "-b", "side")
    side = commit("side")
    git("checkout", "main")
    git("merge", "--no-ff", "side", "-m", "merge")
    merge = git("rev-parse", "HEAD")
    commit("last")
    found = publisher("*map(publish.on_the_branch, sys.argv[1:])", first, side, side[:7])
    assert found.split() == [first, merge, merge]


def test_a_result_with_more_beside_its_figures_enters_once(repository, tmp_path):
    """Twice it would be a mean of itself; the newest text of it counts."""
    git, publisher = repository
    folder = tmp_path / "docs" / "benchmarks"
    folder.mkdir(parents=True)
    for name, beside in ("first", {"date": 1}), ("other", {"date": 2}), ("first", {"command": "x"}):
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {"commit": "a"}
        path.write_text(json.dumps(before | beside))
        git("add", ".")
        git("commit", "-m", name)
    found = json.loads(publisher("publish.json.dumps(publish.committed())"))
    assert found == [{"commit": "a", "date": 2}, {"commit": "a", "date": 1, "command": "x"}]
