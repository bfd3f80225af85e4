"""Which backend runs and why; light imports that no framework can break."""

import pathlib
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from conftest import FLOATS, OPERATORS, draw, environment, installed, load, refusal, same

import hla

H, T = 2, 7
ROOT = pathlib.Path(hla.__file__).parent.parent


def arrays():
    return dict(zip("qkv", draw(H, T), strict=True))


def token():
    return dict(zip(("q_t", "k_t", "v_t"), (x[:, 0] for x in draw(H, T)), strict=True))


@pytest.mark.parametrize("name", ["triton", "pallas", "cupy"])
def test_backends_of_devices_say_why_not_on_numpy_arrays(name):
    for call in (hla.scan, hla.vjp, hla.summarize):
        with pytest.raises(hla.Unsupported, match=rf"(?s){name}.{{10,}}"):
            call(**arrays(), backend=name)
    with pytest.raises(hla.Unsupported, match=name):
        hla.step(**token(), backend=name)
    want = hla.scan(**arrays(), backend="numpy")
    same(hla.scan(**arrays(), backend=[name, "numpy"]), want)
    same(hla.scan(**arrays(), backend=(name, "numpy")), want)
    with pytest.raises(hla.Unsupported, match=name):
        hla.scan(**arrays(), backend=[name])


def test_named_backends_and_forms_run_or_refuse():
    with pytest.raises(hla.Unsupported, match="numpy"):
        hla.scan(**arrays(), backend="numpy", form="associative")
    for form in ("recurrent", "associative"):
        with pytest.raises(hla.Unsupported, match=f"(?s){form}.*none|none.*{form}"):
            hla.scan(**arrays(), mask="none", form=form)
    for options in ({"operator": "hla3"}, {"decay": 0.9}, {"log_gate": np.zeros((H, T))}):
        with pytest.raises(hla.Unsupported, match=r"(?s)associative"):
            hla.scan(**arrays(), form="associative", convention="paper", **options)
    assert issubclass(hla.Unsupported, NotImplementedError)
    assert issubclass(hla.SlowPathWarning, Warning)
    assert hla.explain(**arrays()).backend == "numpy"
    assert hla.explain(**arrays(), backend=["array_api", "numpy"]).backend == "array_api"
    assert hla.explain(**arrays(), form="associative").backend == "array_api"
    assert hla.explain(**arrays(), mask="none").backend in ("numpy", "array_api")
    assert "numpy" in str(hla.explain(**arrays()))


def test_no_slow_path_warning_without_an_accelerator():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("numpy", "torch", "array_api_strict"):
            hla.scan(*load(name).arrays(*draw(H, T)))


def test_available_and_explain_account_for_every_backend():
    table = {row.name: row for row in hla.available()}
    assert {"numpy", "array_api"} <= set(table)
    fields = (
        "name",
        "available",
        "reason",
        "device",
        "version",
        "operators",
        "dtypes",
        "gradients",
    )
    for row in table.values():
        assert row._fields == fields
        assert row.available or row.reason
        if row.available:
            assert set(row.operators) == set(OPERATORS)
    plan = hla.explain(**arrays(), decay=0.9)
    assert plan._fields == ("backend", "form", "plan", "reasons")
    assert (plan.backend, plan.form) == ("numpy", "chunked")
    others = (set(table) | {"triton", "pallas", "cupy", "numba"}) - {"numpy"}
    assert others <= set(plan.reasons)
    assert all(plan.reasons.values())
    assert all(name in str(plan) for name in others)
    for options in ({"backend": "numpy", "form": "associative"}, {"backend": "triton"}):
        with pytest.raises(hla.Unsupported, match=options["backend"]):
            hla.explain(**arrays(), **options)


@pytest.mark.parametrize("name", [row.name for row in hla.available() if row.available])
def test_the_dtypes_that_a_backend_claims_are_those_that_it_runs(name):
    entry = next(row for row in hla.available() if row.name == name)
    refused = {d: refusal(name, None, "hla2", "causal", d) for d in FLOATS}
    if any("these arrays are on cpu" in why for why in refused.values()):
        pytest.skip(refused["float32"])
    assert {d for d, why in refused.items() if not why} == set(entry.dtypes)
    assert all(d in why for d, why in refused.items() if why)  # the reason names the dtype


def run(code, *folders):
    """A fresh interpreter in the source tree's parent, the tree itself on its path."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(*folders),
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_import_is_light_and_loads_no_framework():
    """Beside NumPy only the package, array-api-compat and a few modules of Python's own."""
    out = run("""
        import sys, numpy
        before = set(sys.modules)
        import hla
        loaded = set(sys.modules) - before
        print(len(loaded), *{name.partition(".")[0] for name in loaded} - sys.stdlib_module_names)
    """)
    count, *loaded = out.split()
    assert set(loaded) == {"hla", "array_api_compat"}
    assert int(count) < 100  # a framework is a thousand


def test_using_numpy_loads_no_framework():
    out = run("""
        import sys, numpy as np, hla
        x = np.ones((2, 8, 4))
        hla.scan(x, x, x); hla.vjp(x, x, x)[1](x); hla.explain(x, x, x)
        print(*sorted({"torch", "jax", "cupy", "numba"} & set(sys.modules)))
    """)
    assert out.split() == []


def test_runs_uninstalled_from_the_source_tree(tmp_path):
    """A copy of the package folder alone, with no metadata of an installation beside it."""
    (tmp_path / "hla").symlink_to(ROOT / "hla")
    out = run(
        """
        import sys, types, importlib.metadata as metadata
        def distribution(name, real=metadata.distribution):
            if name == "hla":
                raise metadata.PackageNotFoundError(name)
            return real(name)
        metadata.distribution = distribution
        import numpy as np, hla
        print(hla.__file__, hla.scan(np.ones((3, 2)), np.ones((3, 2)), np.ones((3, 1)))[-1, 0])
        """,
        tmp_path,
    )
    file, value = out.split()
    assert file.startswith(str(tmp_path))
    assert float(value) == 2 * 2 * 6


def test_broken_frameworks_do_no_harm(tmp_path):
    for name in ("torch", "jax", "cupy", "numba", "triton"):
        (tmp_path / f"{name}.py").write_text("raise OSError('libcuda is broken')\n")
    out = run(
        """
        import numpy as np, hla
        x = np.ones((3, 2))
        print(len(hla.available()), hla.scan(x, x, x).sum())
        """,
        tmp_path,
    )
    assert int(out.split()[0]) >= 2


def test_a_broken_library_of_a_backend_is_its_reason(tmp_path):
    """Also where the arrays are of another library that the backend takes."""
    installed("jax")
    for name in ("torch", "triton"):
        (tmp_path / f"{name}.py").write_text("raise OSError('libcuda is broken')\n")
    run(
        """
        import jax.numpy as jnp, hla
        x = jnp.ones((3, 2))
        assert "libcuda is broken" in hla.explain(x, x, x).reasons["triton"]
        assert any("libcuda is broken" in b.reason for b in hla.available() if b.name == "triton")
        try:
            hla.scan(x, x, x, backend="triton")
        except hla.Unsupported as error:
            assert "libcuda is broken" in str(error)
        else:
            raise AssertionError
        """,
        tmp_path,
    )
