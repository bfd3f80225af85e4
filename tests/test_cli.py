"""The command line: what it prints, what it imports, and its exit codes."""

from __future__ import annotations

import io
import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import environment
from rich.box import HEAVY_HEAD, SIMPLE_HEAD

import hla
from hla import tables
from hla.cli import COMMANDS, main
from hla.command import prepare_files, save


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=environment(), capture_output=True, text=True, check=False
    )


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return python("-c", code)


def test_info_prints_versions_and_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no reason is folded
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


@pytest.mark.parametrize("width", [80, 40])
def test_info_fits_a_terminal_and_leaves_nothing_out(width, capsys, monkeypatch):
    why = "no such device here, whatever was tried; " * 5 + "see the page of backends"
    row = hla.available()[0]._replace(name="other", available=False, reason=why)
    monkeypatch.setattr(hla, "available", lambda: (row,))
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    for text in (why, " ".join(row.operators), " ".join(row.dtypes)):
        assert text in " ".join(out.split())


def test_info_loads_no_framework_but_those_of_kernels():
    """Which GPUs torch and JAX can use only they know."""
    done = run_python(
        "import sys; from hla.cli import main; code = main(['info']);"
        "heavy = {'cupy', 'rich', 'matplotlib'} & set(sys.modules);"
        "sys.exit(code if not heavy else str(heavy))"
    )
    assert done.returncode == 0, done.stderr


def test_runs_as_a_module():
    done = python("-m", "hla", "--version")
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


@pytest.mark.parametrize("command", ["demo", "bench"])
@pytest.mark.parametrize("word", ["x", "0", "-1", "1.5", "1e3", ""])
def test_a_number_is_refused_by_what_was_expected(command, word, capsys):
    option = "--steps" if command == "demo" else "--tokens"
    with pytest.raises(SystemExit) as stop:
        main([command, f"{option}={word}"])
    assert stop.value.code == 2
    assert f"{option}: {word!r} is not an integer of at least 1\n" in capsys.readouterr().err


# The standard streams


def closed_pipe():
    """The end of a pipe whose reader has gone, as `hla info | head -1` soon has it."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_closed_pipe_ends_no_command_and_says_nothing(monkeypatch, capsys):
    with closed_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"]])
def test_nothing_is_said_of_a_closed_pipe_when_the_interpreter_ends(words):
    with closed_pipe() as pipe:
        command, env = [sys.executable, "-m", "hla", *words], environment()
        done = subprocess.run(command, env=env, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("words", [["info"], ["--help"]])
def test_a_full_disk_is_a_failure_in_one_line(words, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(words) == 1
    message = "hla: cannot write to the standard output: No space left on device\n"
    assert capsys.readouterr().err == message


def test_without_a_standard_output_nothing_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info"]) == 0


def test_a_narrow_encoding_has_a_question_mark_for_what_it_lacks(monkeypatch):
    row = hla.available()[0]._replace(name="other", available=False, reason="caf\u00e9 \ud800")
    monkeypatch.setattr(hla, "available", lambda: (row,))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["info"]) == 0
    assert b"caf? ?\n" in out.buffer.getvalue()


# Files


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_replaced_whole_or_not_at_all(error, tmp_path, capsys):
    path = tmp_path / "file"
    assert save(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("ne")
        raise error

    if isinstance(error, OSError):
        assert not save(path, fail)
        assert capsys.readouterr().err == f"cannot write {path}: No space left on device\n"
    else:
        with pytest.raises(KeyboardInterrupt):
            save(path, fail)
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_link_stays_one_and_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "folder").mkdir()
    prepare_files(tmp_path, "new", "link", "real")
    with pytest.raises(ValueError, match="folder: not a regular file"):
        prepare_files(tmp_path, "folder")
    save(tmp_path / "link", lambda part: part.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


# Tables


@pytest.mark.parametrize("box", [SIMPLE_HEAD, HEAVY_HEAD])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [1, 40, 80, 200])
def test_no_figure_is_cut_at_any_width(width, encoding, box, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    keys = [tables.Column("runs on", ["array_api/numpy/cpu", "a name"], "left")]
    groups = [
        [tables.Column(f"c{g}{i}", [f"{g}.{i}0{10**12}", f"{g}.{i}1%"]) for i in range(3)]
        for g in range(2)
    ]
    console = tables.console()
    tables.show(console, keys, *groups, box=box, sections=[0])
    out.flush()
    lines = out.buffer.getvalue().decode(encoding).splitlines()
    words = re.findall(r"[\w./%]+", " ".join(lines))
    for column in (column for group in groups for column in group):
        assert {column.heading, *column.cells} <= set(words)
    assert (words.count("array_api/numpy/cpu") == 1) == (width == 200)
    assert max(map(len, lines)) <= max(width, 50)
    assert console.width == max(width, 20)


def test_columns_of_zero_mean_that_the_width_is_not_known(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert tables.console().width == 80


def test_interrupt_exits_with_130_and_no_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hla.demo.run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
