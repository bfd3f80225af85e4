"""The command `hla info | demo | bench`."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata

import hla

COMMANDS = {
    "info": "versions, devices, and which backends can run here",
    "demo": "train small language models on real text, one an operator, and compare them",
    "bench": "time the operators on this machine",
}
LIBRARIES = ("numpy", "array_api_compat", "ml_dtypes", "torch", "jax", "cupy", "triton", "numba")
HOST = ("numpy", "array_api")  # backends that bring no device of their own


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hla", description="Higher-order Linear Attention on any array library."
    )
    parser.add_argument("--version", action="version", version=f"hla {hla.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose}.".capitalize())
        # Only the command that was asked for is imported.
        if name != "info" and words[:1] == [name]:
            importlib.import_module(f"hla.{name}").add_arguments(command)
    args = parser.parse_args(words)
    try:
        if args.command == "info":
            return info()
        return int(importlib.import_module(f"hla.{args.command}").run(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def info() -> int:
    """Print versions, devices and the backend table; imports no array library."""
    backends = hla.available()
    _print("Versions", _versions())
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    others = {b.device: b.name for b in backends if b.available and b.name not in HOST}
    _print("Devices", [("cpu", cpu), *others.items()])
    _print(
        "Backends",
        [
            ("", "runs", "operators", "dtypes", "gradients", "device", "version or reason"),
            *(
                (
                    b.name,
                    "yes" if b.available else "no",
                    " ".join(b.operators),
                    " ".join(b.dtypes),
                    "yes" if b.gradients else "no",
                    b.device or "",
                    (b.version if b.available else b.reason) or "",
                )
                for b in backends
            ),
        ],
    )
    return 0


def _versions() -> list[tuple[str, str]]:
    """Versions of what is installed, from its metadata: importing torch takes seconds."""
    packages = metadata.packages_distributions()
    rows = [("hla", hla.__version__), ("python", platform.python_version())]
    for module in LIBRARIES:
        names = packages.get(module)
        rows.append((module, metadata.version(names[0]) if names else "not installed"))
    return rows


def _print(title: str, rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns as wide as their longest entry."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for row in rows:
        print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())
    print()
