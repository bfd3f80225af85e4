"""The command `hla info | demo | bench`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from typing import TextIO, cast

import hla

from . import backends
from .command import Stream

COMMANDS = {
    "info": "versions, devices, and which backends can run here",
    "demo": "train small language models on real text, one an operator, and compare them",
    "bench": "time the operators on this machine",
}
LIBRARIES = ("numpy", "array_api_compat", "ml_dtypes", "torch", "jax", "cupy", "triton", "numba")
INTERRUPTED = 130  # by the terminal: 128 + SIGINT
NARROWEST = 20  # characters that a text is wrapped to, whatever the terminal's width


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    with (
        contextlib.redirect_stdout(cast(TextIO, out)),
        contextlib.redirect_stderr(cast(TextIO, err)),
    ):
        try:
            code = _run(words)
        except KeyboardInterrupt:
            print("interrupted", file=err)
            code = INTERRUPTED
        except SystemExit:  # argparse has printed its help or what is wrong
            out.flush()
            if not out.error:
                raise
            code = 1
        out.flush()
        if out.error:
            print(f"hla: cannot write to the standard output: {out.error}", file=err)
        return code or int(bool(out.error))


def _run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hla",
        description="Higher-order Linear Attention on any array library.",
        epilog="Exit codes: 0 done, 1 failed, 2 refused: bad options, or something is missing;"
        f" {INTERRUPTED} interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"hla {hla.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose}.".capitalize())
        # Only the requested command is imported.
        if name != "info" and words[:1] == [name]:
            importlib.import_module(f"hla.{name}").add_arguments(command)
    args = parser.parse_args(words)
    if args.command == "info":
        return info()
    return int(importlib.import_module(f"hla.{args.command}").run(args))


def info() -> int:
    """Print versions, devices and the backends; imports no array library."""
    print("Versions")
    _print(_versions())
    lines = hla.available()
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    others = {b.device: b.name for b in lines if b.available and _on_accelerators(b.name)}
    print("\nDevices")
    _print([("cpu", cpu), *others.items()])
    print("\nBackends")
    wide = max((len(b.name) for b in lines), default=0)
    for b in lines:
        runs, why = ("yes", b.version) if b.available else ("no", b.reason)
        _print([(f"{b.name:{wide}}  {runs:3}", why or "")])
        about = {
            "operators": " ".join(b.operators),
            "dtypes": " ".join(b.dtypes),
            "gradients": "yes" if b.gradients else "no",
            "device": b.device or "",
        }
        _print([(f"  {name:9}", text) for name, text in about.items() if text])
    return 0


def _on_accelerators(name: str) -> bool:
    """Whether a backend is picked for arrays on accelerators alone: it then names a device."""
    pairs = backends.load(name).capabilities.serves if name in backends.names() else ()
    return bool(pairs) and all(accelerator for _, accelerator in pairs)


def _versions() -> list[tuple[str, str]]:
    """Versions of what is installed, from its metadata: importing torch takes seconds."""
    packages = metadata.packages_distributions()
    rows = [("hla", hla.__version__), ("python", platform.python_version())]
    for module in LIBRARIES:
        names = packages.get(module)
        rows.append((module, metadata.version(names[0]) if names else "not installed"))
    return rows


def _print(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and texts, the texts in a column wrapped at the width of the terminal, if any."""
    wide = max(len(name) for name, _ in rows)
    width = shutil.get_terminal_size((sys.maxsize, 0)).columns
    for name, text in rows:
        start = f"  {name:{wide}}  "
        wrapped = textwrap.wrap(text, max(width - len(start), NARROWEST), break_on_hyphens=False)
        print(f"\n{' ' * len(start)}".join([start + "".join(wrapped[:1]), *wrapped[1:]]).rstrip())
