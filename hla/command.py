"""What the commands share: the types of options, the standard streams, the files they leave."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


def at_least(least: int) -> Callable[[str], int]:
    """Return the argparse type of integers from `least` on."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")

    return parse


def spelled(
    name: str, add_arguments: Callable[[argparse.ArgumentParser], None], args: argparse.Namespace
) -> str:
    """Spell a command as a shell takes it: the options that differ from their defaults.

    Without those that say where results go, and of which commit they are.
    """
    parser, words = argparse.ArgumentParser(), ["hla", name]
    add_arguments(parser)
    for option, value in vars(args).items():
        if option in ("command", "commit", "out") or value == parser.get_default(option):
            continue
        words.append(f"--{option}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


class Stream:
    """A standard stream whose loss ends no command: what follows its first error is dropped.

    A character that its encoding lacks is written as a question mark. `error` is what broke it,
    where that was anything but a reader who has seen enough and closed the pipe.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream: Any = io.StringIO() if stream is None or stream.closed else stream
        self.broken, self.error = False, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write what can be written; return the number of characters given."""
        self._attempt(self._write, text)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        self._attempt(self.stream.flush)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            code = self.stream.encoding
            self.stream.write(text.encode(code, "replace").decode(code))

    def _attempt(self, action: Callable[..., Any], *args: str) -> None:
        if self.broken:
            return
        try:
            action(*args)
        except OSError as error:
            self.broken = True
            if not isinstance(error, BrokenPipeError):
                self.error = error.strerror or str(error)
            # What is buffered would fail again when the interpreter ends.
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


def prepare_files(folder: Path, *names: str) -> None:
    """Make the folder that files will be written to; ValueError gives the reason against it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (Path(folder, name).resolve() for name in names):
            if path.exists() and not path.is_file():
                raise ValueError(f"cannot write to {path}: not a regular file")
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error


def save(path: Path, write: Callable[[Path], object]) -> bool:
    """Put what `write` writes in the place of a file, whole or not at all.

    Returns
    -------
    bool
        False where it could not be written, which one line on the standard error reports.
    """
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        print(f"cannot write {path}: {error.strerror or error}", file=sys.stderr)
        return False
    finally:
        part.unlink(missing_ok=True)
    return True
