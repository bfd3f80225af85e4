"""The suite itself: what is skipped is skipped for a reason that another machine has not."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import environment, installed, rows, usable

import hla


def test_every_collected_row_runs_on_some_machine(request):
    """A row that is skipped without a condition is not generated."""
    items = request.session.items
    assert not [item.nodeid for item in items if item.get_closest_marker("skip")]


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
