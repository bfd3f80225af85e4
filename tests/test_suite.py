"""The suite itself: what is skipped is skipped for a reason that another machine has not."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import environment, installed, rows, usable

import hla


def test_every_collected_row_runs_on_some_machine(request):
    """A row that is skipped without a condition is not generated."""
    skips = {x.nodeid: x.get_closest_marker("skip") for x in request.session.items}
    given = {name: mark.kwargs["reason"] for name, mark in skips.items() if mark}
    assert not [x for x in given.values() if not x.startswith("got empty parameter set")]


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all cores")
def test_processes_that_share_the_cores_have_one_thread_of_blas_each():
    """Its threads spin; how many there are is read when NumPy is imported, once."""
    pools = installed("threadpoolctl").threadpool_info()
    assert {x["num_threads"] for x in pools} == {1}


def test_a_child_process_has_its_callers_environment(tmp_path, monkeypatch):
    """And the hla that is tested before any other on its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["theirs", ""]))
    monkeypatch.setenv("THEIRS", "kept")
    for folder, value in (("theirs", 1), ("ours", 2)):
        pathlib.Path(folder).mkdir()
        pathlib.Path(folder, "same.py").write_text(f"value = {value}")
    pathlib.Path("theirs", "only.py").touch()
    code = "import os, only, same, hla; print(same.value, os.environ['THEIRS'], hla.__file__)"
    for folders, value in (((), "1"), ((tmp_path / "ours",), "2")):
        out = subprocess.check_output(
            [sys.executable, "-c", code], env=environment(*folders), cwd="/", text=True
        )
        assert out.split(maxsplit=2) == [value, "kept", hla.__file__ + "\n"]


def test_no_test_replaces_the_path_of_a_child_process():
    for path in pathlib.Path(__file__).parent.glob("test_*.py"):
        if path.name != pathlib.Path(__file__).name:
            assert not re.search(r"""["']PYTHONPATH["']:|PYTHONPATH=""", path.read_text()), (
                path.name
            )


@pytest.mark.parametrize(
    "error", ["ImportError()", "ModuleNotFoundError('nested')", "OSError('no libcuda')"]
)
def test_a_library_that_is_installed_and_broken_fails(error, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ImportError, OSError)):
        installed("broken")
    assert "broken" not in sys.modules
    with pytest.raises(pytest.skip.Exception, match="nowhere_to_be_found is not installed"):
        installed("nowhere_to_be_found")


def test_a_backend_that_is_installed_and_broken_fails(tmp_path, monkeypatch):
    """Also where its rows are asked for; NumPy's rows do not depend on it."""
    triton = next(entry for entry in hla.available() if entry.name == "triton")
    dead = triton._replace(available=False, reason="it does not import")
    for name in ("torch", "triton"):
        installed(name)
    monkeypatch.setattr(hla, "available", lambda: (dead,))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for ask in (lambda: usable(dead), lambda: rows(library="torch", backends=("triton",))):
        with pytest.raises(RuntimeError, match="it does not import"):
            ask()
    assert rows(backends=("triton",)) == []
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ImportError):
        usable(dead)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not usable(dead)


NEW = """
from hla.backends.array_api import backward, forward, step, summarize
from hla.contract import Capabilities

CAPABILITIES = Capabilities(
    dtypes=("float16", "bfloat16", "float32", "float64"),
    serves=(("numpy", False), ("torch", True)),
    forms=("chunked",),
    opaque=True,
)
"""


def test_a_new_backend_has_rows_in_every_suite(tmp_path):
    """Of arrays on the host and of a device, here interpreted; and no line of a test names it."""
    installed("torch")
    (tmp_path / "new.py").write_text(NEW)
    (tmp_path / "new-1.dist-info").mkdir()
    (tmp_path / "new-1.dist-info" / "entry_points.txt").write_text("[hla.backends]\nnew = new\n")
    suites = ("literal", "streaming", "gradients", "isolation", "kernel_backend", "torch")
    here = pathlib.Path(__file__).parent

    files = [str(here / f"test_{name}.py") for name in suites]
    listing = ["--collect-only", "-k", "new- or -new or [new", *files]
    some = "new and (test_a_state_is_the_literal or test_zero_queries)"
    running = ["-k", some, *(f for f in files if "literal" in f or "kernel" in f)]
    code = """
        import json, pytest, sys
        listing, running = (["-n0", "-q", *x] for x in json.loads(sys.argv[1]))
        pytest.main(listing)
        print("listed", flush=True)
        sys.exit(pytest.main(running))
    """  # one process, which imports the libraries once
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps([listing, running])],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    listed, _, ran = done.stdout.partition("\nlisted\n")
    for name in suites:
        assert listed.count(f"test_{name}.py::") > 20, listed
    assert " passed" in ran, ran
    assert done.returncode == 0, ran
