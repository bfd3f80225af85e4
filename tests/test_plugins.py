"""Backends of third parties, found by their entry points."""

import re
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from conftest import environment, installed
from test_docs import ROOT, blocks

import hla
from hla import dispatch
from hla.bench import workloads
from hla.libraries import facts

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
    return subprocess.run(
        [sys.executable, "-c", "import numpy as np, hla\nx = np.ones((3, 2))\n" + code],
        env=environment(tmp_path),
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


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Return a function that installs a plugin in this process, until the end of the test."""

    def forget():
        dispatch._plugins.cache_clear()
        dispatch.load.cache_clear()
        sys.modules.pop("mine", None)

    def offer(plugin, *points, name="mine"):
        (tmp_path / "mine.py").write_text(textwrap.dedent(plugin))
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "entry_points.txt").write_text(
            "\n".join(["[hla.backends]", *(points or ["mine = mine"])])
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(dispatch, "_warned", set())
        forget()

    yield offer
    forget()


STRICT = """
    from hla.backends.array_api import backward, forward, info, step, summarize, supports

    given = info()
    serves = (("array_api_strict", False),)
"""
BROKEN = {  # what a plugin does: what is reported of it
    "import nothing_there": "import failed: ModuleNotFoundError.*nothing_there",
    "raise SystemExit('no device')": "import failed: SystemExit: no device",
    "del supports": "lacks functions .*: supports$",
    "forward = None; del step": "lacks functions .*: forward, step$",
    "del backward": "lacks functions .*: backward$",
    "del info": "lacks functions .*: info$",
    "summarize = 3": "summarize is 3; expected a function",
    "plan = 'passes'": "plan is 'passes'; expected a function",
    "info = lambda: 1 / 0": "info failed: ZeroDivisionError",
    "info = lambda: None": "info returned None; expected an hla.dispatch.Info",
    "info = lambda: {}": "info returned {}; expected an hla.dispatch.Info",
    "info = lambda: given._replace(reason=None)": "info has reason None; expected a str",
    "info = lambda: given._replace(operators='hla2')": "operators 'hla2'; expected a tuple of str",
    "info = lambda: given._replace(dtypes=(float,))": "dtypes .*; expected a tuple of str",
    "serves = ('array_api_strict', False)": "serves is .*; expected pairs",
    "serves = ('numpy', 'torch')": "serves is .*; expected pairs",
    "serves = (('array_api_strict', 0),)": "serves is .*; expected pairs",
    "serves = None": "serves is None; expected pairs",
}
REFUSING = {
    "supports = lambda request: 1 / 0": "supports failed: ZeroDivisionError",
    "def supports(request): raise SystemExit": "supports failed: SystemExit",
    "supports = lambda: None": "supports failed: TypeError",
    "supports = lambda request: True": "supports returned True; expected None",
    "supports = lambda request: ''": "supports returned ''; expected None",
}


@pytest.mark.parametrize("fault", [*BROKEN, *REFUSING])
def test_a_broken_plugin_breaks_nothing_but_itself(fault, offer):
    why = (BROKEN | REFUSING)[fault]
    x = np.ones((4, 2))
    y = installed("array_api_strict").asarray(x)
    offer(f"{STRICT}\n    {fault}")
    (row,) = [b for b in hla.available() if b.name == "mine"]
    assert row.available == (fault in REFUSING)
    assert row.available or re.search(why, row.reason)
    assert hla.explain(x, x, x).backend == "numpy"
    for backend in (None, ("mine", "array_api")):
        found = hla.explain(y, y, y, backend=backend)
        assert found.backend == "array_api"
        assert re.search(why, found.reasons["mine"])
        hla.scan(y, y, y, backend=backend)
        hla.summarize(y, y, y, backend=backend)
    for call in (hla.scan, hla.vjp, hla.explain, hla.summarize):
        with pytest.raises(hla.Unsupported, match=f"mine: .*{why}"):
            call(y, y, y, backend="mine")
    with pytest.raises(hla.Unsupported, match=f"mine: .*{why}"):
        hla.step(y[0, :], y[0, :], y[0, :], backend="mine")
    assert {t.backend for t in workloads.targets()} >= {"numpy", "triton", "array_api"}


@pytest.mark.parametrize("plan", ["lambda request: 1 / 0", "lambda: ''", "lambda request: None"])
def test_a_plan_that_fails_is_not_known(plan, offer):
    """The request itself does not need it."""
    offer(f"{STRICT}\n    plan = {plan}")
    x = np.ones((4, 2))
    found = hla.explain(x, x, x, backend="mine")
    assert found.backend == "mine"
    assert found.plan.startswith("not known: its plugin's plan ")
    np.testing.assert_array_equal(hla.scan(x, x, x, backend="mine"), hla.scan(x, x, x))


def test_a_plugin_may_lack_what_can_be_left_out(offer):
    """Any object that has the required functions; what it cannot do others do."""
    offer(
        """
        from types import SimpleNamespace
        from hla.backends import array_api

        names = ("supports", "forward", "backward", "step", "info")
        least = SimpleNamespace(**{name: getattr(array_api, name) for name in names})
        some = SimpleNamespace(**vars(least), serves=[["array_api_strict", False]], plan=None)
        """,
        "mine = mine:least",
        "other = mine:some",
    )
    x = np.ones((4, 2))
    y = installed("array_api_strict").asarray(x)
    assert hla.explain(y, y, y).backend == "other"
    for name in ("mine", "other"):
        np.testing.assert_array_equal(hla.scan(x, x, x, backend=name), hla.scan(x, x, x))
        assert hla.explain(x, x, x, backend=name).plan == hla.explain(x, x, x).plan
        with pytest.raises(hla.Unsupported, match=f"{name}: it does not summarize"):
            hla.summarize(x, x, x, backend=name)
        hla.summarize(x, x, x, backend=[name, "numpy"])
    hla.summarize(y, y, y)


@pytest.mark.parametrize("name", ["numpy", "triton", "array_api", "cupy", "pallas", "numba"])
def test_a_plugin_under_a_name_of_hla_is_reported(name, offer):
    offer("raise SystemExit", f"{name} = mine")
    x = np.ones((4, 2))
    with pytest.warns(UserWarning, match=f"hla has the name '{name}' itself; .* of mine$"):
        assert hla.explain(x, x, x).backend == "numpy"
    with warnings.catch_warnings(action="error"):
        rows = hla.available()
        hla.scan(x, x, x)
    (row,) = [b for b in rows if b.name == f"{name} (plugin)"]
    assert not row.available
    assert "rename the entry point of mine" in row.reason
    assert [b.name for b in rows].count(name) == (name not in dispatch.RESERVED)
    if name in dispatch.RESERVED:
        with pytest.raises(hla.Unsupported, match="rename the entry point of mine"):
            hla.scan(x, x, x, backend=name)


def test_two_plugins_of_one_name_are_both_refused(offer):
    """Which one is found first depends on the path; the same one twice is one."""
    offer(STRICT, "mine = mine", "same = mine")
    offer(STRICT, "mine = hla.backends.array_api", "same = mine", name="other")
    x = np.ones((4, 2))
    rows = {b.name: b for b in hla.available()}
    assert rows["same"].available
    assert not rows["mine"].available
    with pytest.raises(hla.Unsupported, match=r"mine: (mine|hla\.\S*) and \S+ have this name"):
        hla.scan(x, x, x, backend="mine")


def test_entry_points_that_cannot_be_read_are_reported(offer):
    offer(STRICT, "mine = mine", "no value")
    x = np.ones((4, 2))
    with pytest.warns(UserWarning, match="not readable"):
        hla.scan(x, x, x)
    assert "mine" not in dispatch.names()
    hla.scan(x, x, x)


def test_the_package_of_the_documentation_installs(tmp_path):
    """Laid out as docs/backends.md shows it, by pip, and then run as there."""
    for module in ("pip", "hatchling"):
        installed(module)
    page = ROOT / "docs" / "backends.md"
    for _, caption, code in blocks(page):
        if caption:
            (tmp_path / caption).write_text(code.lstrip("\n"), encoding="utf-8")
    site = tmp_path / "site"
    pip = "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"
    for command in ((*pip, "--target", site, "."), ("try_it.py",)):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment(site),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "'cumsum', 'array_api'" in done.stdout
    assert {path.name for path in site.iterdir() if path.suffix == ".py"} == {"hla_cumsum.py"}


def test_the_slow_path_is_said_once_per_reason(monkeypatch):
    """As on an accelerator that no kernel serves."""
    x = np.ones((3, 2))
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(facts, "on_accelerator", lambda x: True)
    with pytest.warns(hla.SlowPathWarning, match="no kernel backend for numpy"):
        hla.scan(x, x, x)
    hla.scan(x, x, x)  # a second warning would be an error here
    dispatch._warned.clear()
    hla.scan(x, x, x, backend="array_api")


def test_the_slow_path_warning_points_at_the_callers_line(monkeypatch):
    monkeypatch.setattr(facts, "on_accelerator", lambda x: True)
    x, first = np.ones((3, 2)), sys._getframe().f_lineno
    calls = (
        lambda: hla.scan(x, x, x),
        lambda: hla.step(x, x, x),
        lambda: hla.vjp(x, x, x),
        lambda: hla.summarize(x, x, x),
    )
    for line, call in enumerate(calls, first + 2):
        monkeypatch.setattr(dispatch, "_warned", set())
        with pytest.warns(hla.SlowPathWarning) as found:
            call()
        assert [(w.filename, w.lineno) for w in found] == [(__file__, line)]


def test_the_slow_path_warning_of_a_compiled_call_is_the_users(monkeypatch):
    torch = installed("torch")
    monkeypatch.setattr(facts, "on_accelerator", lambda x: True)
    monkeypatch.setattr(dispatch, "_warned", set())
    compiled = torch.compile(lambda x: hla.scan(x, x, x), backend="eager")
    with pytest.warns(hla.SlowPathWarning) as found:
        compiled(torch.ones(3, 2, dtype=torch.float64))  # which no kernel takes
    assert [w.filename for w in found if w.category is hla.SlowPathWarning] == [__file__]
