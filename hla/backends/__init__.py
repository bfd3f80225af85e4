"""The backends: thin adapters, each imported when first needed. To add one, see `docs/backends.md`.

A third party's is found by an entry point of the group "hla.backends" that names a module (or any
object) with the attributes of a row's module here.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any, NamedTuple

from .. import contract
from ..contract import Backend

TABLE = {  # in the order in which they are tried; plugins come before the last
    "numpy": "hla.backends.numpy",
    "triton": "hla.backends.triton",
    "pallas": "hla.backends.pallas",
    "cupy": "hla.backends.cupy",
    "numba": "hla.backends.numba",
    "array_api": "hla.backends.array_api",
}
GROUP = "hla.backends"
warned: set[str] = set()


class Plugins(NamedTuple):
    """Third parties' entry points by name and value, and why those under a taken name are none."""

    points: dict[str, dict[str, Any]]
    ignored: dict[str, str]


@functools.cache
def plugins() -> Plugins:
    """Find the entry points of third parties."""
    from importlib import metadata  # a tenth of hla's import, and needed only past the table

    points: dict[str, dict[str, Any]] = {}
    try:
        for point in metadata.entry_points(group=GROUP):
            points.setdefault(point.name, {})[point.value] = point
    except Exception as error:  # of any package at all
        _warn(f"no plugins: the entry points here are not readable ({error!r})")
    ignored = {}
    for name in sorted(points.keys() & {*TABLE}):
        values = ", ".join(points.pop(name))
        ignored[name] = f"hla has the name {name!r} itself; rename the entry point of {values}"
        _warn(f"a plugin is ignored: {ignored[name]}")
    return Plugins(dict(sorted(points.items())), ignored)


@functools.cache
def load(name: str) -> Backend:
    """Import a backend; a real import error surfaces, but that of a plugin is its refusal."""
    if name in TABLE:
        return contract.made(name, importlib.import_module(TABLE[name]))
    points = plugins().points[name]
    if len(points) > 1:
        return contract.refusing(name, f"{' and '.join(points)} have this name; uninstall one")
    return contract.checked(name, *(point.load for point in points.values()))


def names() -> tuple[str, ...]:
    """Every backend there is, in the order in which they are tried; array_api is last."""
    *first, last = TABLE
    return (*first, *plugins().points, last)


def _warn(why: str) -> None:
    """Warn of plugins, once, also where warnings are errors."""
    if why not in warned:
        warned.add(why)
        warnings.warn(why, stacklevel=2)
