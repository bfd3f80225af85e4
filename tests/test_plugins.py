"""Backends of third parties, found by their entry points."""

import re
import runpy
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from conftest import close_fields, environment, installed
from test_docs import ROOT, blocks

import hla
from hla import arguments, backends, dispatch
from hla.bench import workloads
from hla.libraries import library_of
from hla.libraries.generic import Generic

PLUGIN = """
    from hla.backends import array_api
    from hla.backends.array_api import backward, forward, machine, step, summarize
    from hla.contract import Capabilities

    CAPABILITIES = Capabilities(
        ("float32", "float64"),
        serves=(("numpy", False), ("array_api_strict", False)),
        operators=("hla2",),
    )
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
    assert "mine: it runs operator='hla2', not 'ahla'" in done.stdout


@pytest.fixture
def forgotten():
    """Return a function that forgets which backends there are, called once more at the end."""

    def forget():
        for found in (backends.plugins, backends.load, dispatch._pick):
            found.cache_clear()
        for name in ("mine", "hla_toy"):
            sys.modules.pop(name, None)

    yield forget
    forget()


@pytest.fixture
def offer(tmp_path, monkeypatch, forgotten):
    """Return a function that installs a plugin in this process, until the end of the test."""

    def offer(plugin, *points, name="mine"):
        (tmp_path / "mine.py").write_text(textwrap.dedent(plugin))
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "entry_points.txt").write_text(
            "\n".join(["[hla.backends]", *(points or ["mine = mine"])])
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(backends, "warned", set())
        forgotten()

    return offer


STRICT = """
    from hla.backends.array_api import backward, forward, machine, step, summarize
    from hla.contract import Capabilities

    CAPABILITIES = Capabilities(("float32", "float64"), serves=(("array_api_strict", False),))
    replace, given = CAPABILITIES._replace, machine()
"""
BROKEN = {  # what a plugin does: what is reported of it
    "import nothing_there": "import failed: ModuleNotFoundError.*nothing_there",
    "raise SystemExit('no device')": "import failed: SystemExit: no device",
    "forward = None; del backward": "lacks functions .*: forward, backward$",
    "del backward": "lacks functions .*: backward$",
    "forward = 3": "lacks functions .*: forward$",
    "step = 3": "step is 3; expected a function",
    "del CAPABILITIES": "CAPABILITIES is None; expected hla.contract.Capabilities$",
    "CAPABILITIES = None; supports = info = len": r"CAPABILITIES is None.* \(supports, info",
    "CAPABILITIES = replace(dtypes=None)": "dtypes None; expected a tuple of float16, ",
    "CAPABILITIES = replace(dtypes=('int8',))": "dtypes .*int8.*; expected a tuple of float16",
    "CAPABILITIES = replace(operators='hla2')": "operators 'hla2'; expected a tuple of linear",
    "CAPABILITIES = replace(forms=('fast',))": "forms .*fast.*; expected a tuple of chunked, ",
    "CAPABILITIES = replace(libraries=(float,))": "libraries .*; expected a tuple of str",
    "CAPABILITIES = replace(opaque=1)": "opaque 1; expected True or False",
    "CAPABILITIES = replace(opaque=True, gradients=False)": "is opaque and has no gradients",
    "summarize = 3": "summarize is 3; expected a function",
    "plan = 'passes'": "plan is 'passes'; expected a function",
    "machine = lambda: 1 / 0": "machine failed: ZeroDivisionError",
    "machine = lambda: None": "machine returned None; expected hla.contract.Machine",
    "machine = lambda: {}": "machine returned {}; expected hla.contract.Machine",
    "machine = lambda: given._replace(reason=None)": "machine has reason None; expected a str",
    "machine = lambda: given._replace(dtypes=(float,))": "dtypes .*; expected a tuple of str",
    "CAPABILITIES = replace(serves=('array_api_strict', False))": "serves .*; expected pairs",
    "CAPABILITIES = replace(serves=('numpy', 'torch'))": "serves .*; expected pairs",
    "CAPABILITIES = replace(serves=(('array_api_strict', 0),))": "serves .*; expected pairs",
    "CAPABILITIES = replace(serves=None)": "serves None; expected pairs",
}
REFUSING = {
    "unable = lambda request: 1 / 0": "unable failed: ZeroDivisionError",
    "def unable(request): raise SystemExit": "unable failed: SystemExit",
    "unable = lambda: None": "unable failed: TypeError",
    "unable = lambda request: True": "unable returned True; expected None",
    "unable = lambda request: ''": "unable returned ''; expected None",
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
        from hla.contract import Capabilities

        names = {"forward": array_api.forward, "backward": array_api.backward}
        dtypes, serves = ("float32", "float64"), (("array_api_strict", False),)
        least = SimpleNamespace(**names, CAPABILITIES=Capabilities(dtypes))
        some = SimpleNamespace(**names, CAPABILITIES=Capabilities(dtypes, serves=serves), plan=None)
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
        token = x[0], x[0], x[0]
        (o, state), (want, last) = hla.step(*token, backend=name), hla.step(*token)
        np.testing.assert_allclose(o, want)
        close_fields(state, last)
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
    assert [b.name for b in rows].count(name) == 1


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
    assert "mine" not in backends.names()
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


def test_the_toy_of_the_documentation_as_a_row_of_the_table(tmp_path, monkeypatch, forgotten):
    """One file and one row: what reports, refuses, tests and times backends then has it."""
    code = next(c for _, caption, c in blocks(ROOT / "docs" / "backends.md") if caption)
    (tmp_path / "hla_toy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "TABLE", {"toy": "hla_toy", **backends.TABLE})
    forgotten()
    x = np.ones((4, 2))
    assert hla.available()[0][:4] == ("toy", True, "", "cpu")
    assert hla.explain(x, x, x).backend == "toy"
    assert "it has no decay" in hla.explain(x, x, x, decay=0.9).reasons["toy"]
    assert "it has no empty sequences" in hla.explain(x[:0], x[:0], x[:0]).reasons["toy"]
    np.testing.assert_allclose(hla.scan(x, x, x), hla.scan(x, x, x, backend="numpy"))
    hla.step(x, x, x)
    assert workloads.targets()[0] == workloads.Target("toy", "numpy")
    tables = runpy.run_path(str(ROOT / "docs" / "conf.py"))["myst_substitutions"]
    assert "| `toy` | numpy on the host | NumPy | " in tables["backends"]
    assert "it has no log_gate" in tables["requests"]


def as_on_accelerator(monkeypatch):
    monkeypatch.setattr(arguments, "_known", {})
    real = Generic.facts
    monkeypatch.setattr(Generic, "facts", lambda *x: real(*x)._replace(accelerator=True))
    monkeypatch.setattr(library_of(np.ones(1)), "_facts", {})


def test_the_slow_path_is_said_once_per_reason(monkeypatch):
    """As on an accelerator that no kernel serves."""
    x = np.ones((3, 2))
    monkeypatch.setattr(dispatch, "_warned", set())
    as_on_accelerator(monkeypatch)
    with pytest.warns(hla.SlowPathWarning, match="no kernel backend for numpy"):
        hla.scan(x, x, x)
    hla.scan(x, x, x)  # a second warning would be an error here
    dispatch._warned.clear()
    hla.scan(x, x, x, backend="array_api")


def test_the_slow_path_warning_points_at_the_callers_line(monkeypatch):
    as_on_accelerator(monkeypatch)
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
    as_on_accelerator(monkeypatch)
    monkeypatch.setattr(dispatch, "_warned", set())
    compiled = torch.compile(lambda x: hla.scan(x, x, x), backend="eager")
    with pytest.warns(hla.SlowPathWarning) as found:
        compiled(torch.ones(3, 2, dtype=torch.float64))  # which no kernel takes
    assert [w.filename for w in found if w.category is hla.SlowPathWarning] == [__file__]
