"""Put a kernel's source together: its constants, its .cu file, and what that includes.

CuPy's cache of compiled kernels goes by the text that it is given, which must hold every file.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Mapping


@functools.cache
def _text(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def source(name: str, constants: Mapping[str, object], instead: Mapping[str, str] = {}) -> str:
    """Return the text of a kernel as one file.

    Parameters
    ----------
    name : str
        Of the .cu file.
    constants : mapping
        Macros that it needs.
    instead : mapping
        Texts of included files by their names, in place of those here.
    """
    return defines(constants) + whole(_text(name), instead)


def defines(constants: Mapping[str, object]) -> str:
    """Return the text that defines macros."""
    return "".join(f"#define {key} {value}\n" for key, value in constants.items())


def whole(text: str, instead: Mapping[str, str] = {}) -> str:
    """Put the included files of a text, which lie here, in their places."""

    def included(found: re.Match[str]) -> str:
        return instead[found[1]] if found[1] in instead else _text(found[1])

    return re.sub(r'^#include "(.+)"$', included, text, flags=re.MULTILINE)
