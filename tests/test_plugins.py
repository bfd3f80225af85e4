"""Backends of third parties, found by their entry points."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import hla
from hla import arrays, dispatch

PLUGIN = """
    from hla.backends import array_api
    from hla.backends.array_api import backward, forward, info, step, summarize

    serves = (("numpy", False), ("array_api_strict", False))

    def supports(request):
        return "it does hla2 only" if request.operator != "hla2" else None
"""


def in_a_process(tmp_path, plugin, code):
    """Run code where a distribution offers the backend "mine"."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(plugin))
    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info" / "entry_points.txt").write_text("[hla.backends]\nmine = mine\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", "import numpy as np, hla\nx = np.ones((3, 2))\n" + code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_a_plugin_runs_by_name_and_gives_its_reasons(tmp_path):
    code = "\n".join(
        [
            "names = [b.name for b in hla.available()]",
            "assert names[-2:] == ['mine', 'array_api']",  # after all that is built in
            "assert names.count('mine') == 1",
            "assert hla.explain(x, x, x, backend='mine').backend == 'mine'",
            "np.testing.assert_array_equal(hla.scan(x, x, x, backend='mine'), hla.scan(x, x, x))",
            "assert hla.explain(x, x, x).backend == 'numpy'",  # what is built in comes first
            "import array_api_strict as xp",
            "y = xp.asarray(x)",
            "assert hla.explain(y, y, y).backend == 'mine'",
            "try: hla.scan(x, x, x, operator='ahla', backend='mine')",
            "except hla.Unsupported as error: print(error)",
        ]
    )
    done = in_a_process(tmp_path, PLUGIN, code)
    assert done.returncode == 0, done.stderr
    assert "it does hla2 only" in done.stdout


def test_a_broken_plugin_breaks_nothing_but_itself(tmp_path):
    code = "\n".join(
        [
            "hla.scan(x, x, x)",
            "print([b.reason for b in hla.available() if b.name == 'mine'])",
            "print(hla.explain(x, x, x).reasons['mine'])",
            "try: hla.scan(x, x, x, backend='mine')",
            "except hla.Unsupported as error: print(error)",
        ]
    )
    done = in_a_process(tmp_path, "import nothing_there", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing_there") == 3


def test_the_slow_path_is_said_once_per_reason(monkeypatch):
    """As on an accelerator that no kernel serves."""
    x = np.ones((3, 2))
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(arrays, "on_accelerator", lambda x: True)
    with pytest.warns(hla.SlowPathWarning, match="no kernel backend for numpy"):
        hla.scan(x, x, x)
    hla.scan(x, x, x)  # a second warning would be an error here
    dispatch._warned.clear()
    hla.scan(x, x, x, backend="array_api")
