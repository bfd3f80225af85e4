"""The command line: what it prints, what it imports, and its exit codes."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

import hla
from hla.cli import COMMANDS, main


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_info_prints_versions_and_every_backend(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for version in (hla.__version__, platform.python_version(), np.__version__):
        assert version in out
    lines = {
        line.split()[0]: line for line in out.split("Backends")[1].splitlines() if line.strip()
    }
    for backend in hla.available():
        line = lines[backend.name]
        assert line.split()[1] == ("yes" if backend.available else "no")
        assert (backend.version if backend.available else backend.reason) in line


def test_info_gives_the_reason_of_what_cannot_run(capsys, monkeypatch):
    row = hla.available()[0]._replace(name="other", available=False, reason="no such device here")
    monkeypatch.setattr(hla, "available", lambda: (row,))
    assert main(["info"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["other"])
    assert "no such device here" in line


def test_info_loads_no_framework_but_torch():
    """Which GPUs torch can use only torch knows."""
    done = run_python(
        "import sys; from hla.cli import main; code = main(['info']);"
        "heavy = {'jax', 'cupy', 'rich', 'matplotlib'} & set(sys.modules);"
        "sys.exit(code if not heavy else str(heavy))"
    )
    assert done.returncode == 0, done.stderr


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hla", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"hla {hla.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: hla {name}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["info", "--nonsense"]])
def test_bad_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: hla" in capsys.readouterr().err


def test_interrupt_exits_with_130_and_no_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hla.demo.run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
