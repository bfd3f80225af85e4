"""Write asv's pages of every result of `hla bench` that was committed: python publish.py FOLDER."""

import inspect
import itertools
import json
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from benchmarks import LARGE, medians  # noqa: E402

from hla.bench.workloads import Case  # noqa: E402

KINDS = {kind.workload: kind for kind in (medians.Forward, medians.ForwardBackward, medians.Step)}


def publish(html):
    """Publish each result under its card's name, at the commit that it measured."""
    results = [result for result in committed() if large(result)]
    rows = [row for result in results for row in large(result)]
    benchmarks = {title(row): described(row) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "results")
        write(found / "benchmarks.json", benchmarks, version=2)
        for i, result in enumerate(results):
            card = result["machine"]["accelerators"][0]
            machine = {"machine": card, "cpu": result["machine"]["processor"]}
            write(found / card / "machine.json", machine, version=1)
            write(found / card / f"{i}.json", entry(result, card), version=2)
        conf = {"project": "hla", "repo": str(ROOT), "branches": ["HEAD"], "results_dir": "results"}
        write(Path(folder, "asv.conf.json"), conf, version=1)
        words = "publish", "--no-pull", "--html-dir", str(html)
        run("asv", "--config", f"{folder}/asv.conf.json", *words)
    run("asv_tachyon", "install", "--no-backup", str(html))  # asv's own page needs the network
    (html / "error.html").unlink()  # asv's own page shows it, where there is no network
    graphs = html / "graphs" / "branch-HEAD"
    names = {path.name for path in graphs.glob("machine-*/*.json")}
    for name, card in itertools.product(names, graphs.glob("machine-*")):
        if not (card / name).exists():  # the page asks for every benchmark of every card
            (card / name).write_text("[]", encoding="utf-8")
    commits = [on_the_branch(result["commit"]) for result in results]
    subjects = {commit: git("show", "-s", "--format=%s", commit)[0] for commit in commits}
    write(html / "commits.json", subjects)
    for name in ("profiles", "regressions-ignore"):  # the page asks for them, and has none
        write(html / f"{name}.json", {})


def committed():
    """Return every complete result that stood in docs/benchmarks at some commit, the latest first.

    Once, whatever was written beside its figures later: a result is known by its commit and date.
    """
    log = "log", "--raw", "--no-abbrev", "--format=", "--diff-filter=AM"
    lines = git(*log, "--", "docs/benchmarks/*.json")
    blobs = dict.fromkeys(line.split()[3] for line in lines)
    results = [json.loads("\n".join(git("cat-file", "blob", blob))) for blob in blobs]
    once = {(result["commit"], result["date"]): result for result in reversed(results)}
    return [result for result in reversed(once.values()) if result.get("complete", True)]


def large(result):
    """Return the rows of a result that are of the suite's size on a GPU, and of its workloads."""
    size = Case(result["first"]["operator"], **LARGE)
    same = result["first"] == size._asdict()
    rows = [r for r in result["rows"] if same and r["tokens"] == size.tokens]
    return [row for row in rows if row["workload"] in KINDS]


def title(row):
    return f"{row['operator']} {row['workload']}, {row['name']}"


def described(row):
    """Describe a row as asv does a benchmark; over parameters its overview would average."""
    kind = KINDS[row["workload"]]
    return {
        "name": title(row),
        "type": "track",
        "less_is_better": True,
        "unit": kind.track_median.unit,
        "code": inspect.getsource(kind),
        "version": None,
        "param_names": [],
        "params": [],
    }


def entry(result, card):
    """Return a result as a file of asv's results."""
    return {
        "commit_hash": on_the_branch(result["commit"]),
        "date": int(1e3 * datetime.fromisoformat(result["date"]).timestamp()),
        "env_name": "hla bench",
        "params": {"machine": card},
        "python": result["versions"]["python"],
        "requirements": result["versions"],
        "result_columns": ["result", "params"],
        "results": {title(row): [[1e3 * row["seconds"]], []] for row in large(result)},
    }


def on_the_branch(commit):
    """Return a commit if HEAD's first parents have it, else the merge that brought it there."""
    (commit,) = git("rev-parse", commit)
    line = git("rev-list", "--first-parent", "HEAD")
    since = {commit, *git("rev-list", "--ancestry-path", f"{commit}..HEAD")}
    return next(one for one in reversed(line) if one in since)


def git(*words):
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def run(module, *words):
    subprocess.run([sys.executable, "-m", module, *words], check=True, stdout=subprocess.DEVNULL)


def write(path, content, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **more}), encoding="utf-8")


if __name__ == "__main__":
    publish(Path(sys.argv[1]).resolve())
