"""What a user's type checker and help() know of the public functions."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest
from conftest import installed

import hla
from hla import backends, options
from hla.core import programs, reference

ROOT = Path(hla.__file__).parents[1]
SCAN = {
    "operator": "hla2", "mask": "causal", "decay": None, "log_gate": None, "scale": 1.0,
    "normalize": False, "eps": 1e-6, "ridge": 0.0, "axis": -2, "initial_state": None,
    "return_state": False, "form": None, "chunk_size": None, "convention": "exact", "backend": None,
}  # fmt: skip
LATER = ("axis", "initial_state", "return_state", "form", "chunk_size")
STEP = {n: x for n, x in SCAN.items() if n not in LATER} | {"donate": False}
SEGMENT = ("operator", "mask", "decay", "log_gate", "scale", "axis", "backend")
PINNED = {  # positional, options
    "scan": (("q", "k", "v"), SCAN),
    "vjp": (("q", "k", "v"), SCAN),
    "explain": (("q", "k", "v"), SCAN),
    "step": (("q_t", "k_t", "v_t", "state"), STEP),
    "summarize": (("q", "k", "v"), {n: SCAN[n] for n in SEGMENT}),
    "combine": (("left", "right"), {}),
}


@pytest.mark.parametrize("name", PINNED)
def test_signatures_are_the_pinned_ones(name):
    positional, named = PINNED[name]
    found = inspect.signature(getattr(hla, name)).parameters
    assert list(found) == [*positional, *named]
    for parameter in found.values():
        if parameter.name in named:
            assert parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.default == named[parameter.name]
            assert type(parameter.default) is type(named[parameter.name])
        else:
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            assert parameter.default == (None if parameter.name == "state" else parameter.empty)


def test_names_in_types_are_those_that_there_are():
    assert get_args(options.Operator) == tuple(programs.CAUSAL) == tuple(programs.PREFIX)
    assert get_args(options.Form) == reference.FORMS
    assert {*get_args(options.BackendName)} == {*backends.TABLE}
    for name in (*options.MASKS, *options.CONVENTIONS, *options.FORMS):
        assert f'"{name}"' in hla.scan.__doc__


USER = """
    from collections.abc import Callable
    from typing import Any, assert_type
    import numpy as np
    from numpy.typing import NDArray
    import hla
    from hla.states import HLA2State

    Array = NDArray[np.float32]
    Pull = Callable[..., hla.Gradients]
    x: Array = np.ones((2, 4, 3), np.float32)
    state, flag = HLA2State(x, x, x), bool(x.sum())
    assert_type(hla.scan(x, x, x), Array)
    assert_type(hla.scan(x, x, x, operator="hla3", decay=0.9, return_state=False), Array)
    assert_type(hla.scan(x, x, x, return_state=True, backend=["numpy", "mine"]), tuple[Array, Any])
    assert_type(hla.scan(x, x, x, return_state=flag), Array | tuple[Array, Any])
    assert_type(hla.step(x, x, x), tuple[Array, Any])
    assert_type(hla.step(x, x, x, state, donate=True), tuple[Array, HLA2State])
    assert_type(hla.vjp(x, x, x, scale=2), tuple[Array, Pull])
    assert_type(hla.vjp(x, x, x, return_state=True), tuple[tuple[Array, Any], Pull])
    assert_type(hla.combine(state, hla.summarize(x, x, x)), HLA2State)
    assert_type(hla.explain(x, x, x, return_state=True).reasons, dict[str, str])
    assert_type(hla.available()[0].dtypes, tuple[str, ...])
    hla.scan(x, x, x, operator="hla4")  # wrong
    hla.scan(x, x, x, mask="full")  # wrong
    hla.step(x, x, x, convention="letter")  # wrong
    hla.vjp(x, x, x, form="fast")  # wrong
    hla.summarize(x, x, x, normalize=True)  # wrong
    hla.scan(x, x, x, decays=0.5)  # wrong
    hla.scan(x, x, x, backend=3)  # wrong
    assert_type(hla.scan(x, x, x), str)  # wrong
"""


CONFIG = """
    [mypy]
    follow_imports = silent
    [mypy-array_api_compat.*,jax.*,torch.*,triton.*]
    follow_imports = skip
"""  # no type of these is in a public signature, and to read torch takes 15 s


def test_a_users_type_checker_knows_results_and_names(tmp_path):
    """By mypy in strict mode, from the package's py.typed."""
    installed("mypy")
    user = textwrap.dedent(USER)
    (tmp_path / "user.py").write_text(user, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(textwrap.dedent(CONFIG), encoding="utf-8")
    path = {"MYPYPATH": str(ROOT)} if (ROOT / "pyproject.toml").exists() else {}  # or installed
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir=cache", "user.py"],
        cwd=tmp_path,
        env=os.environ | path,
        capture_output=True,
        text=True,
    )  # fmt: skip
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    want = {i for i, line in enumerate(user.splitlines(), 1) if line.endswith("# wrong")}
    assert found == want, done.stdout + done.stderr
