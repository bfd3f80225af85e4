"""`hla bench` and the asv suite: they run, what they time is right, and their arithmetic holds."""

import argparse
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hla import bench, dispatch
from hla.bench import measure, peers, workloads
from hla.bench.workloads import OPERATORS, WORKLOADS, Case, Target
from hla.cli import main

SMALL = Case(tokens=130, heads=2, width=24)
NUMPY = Target("array_api", "numpy")
SUITE = Path(__file__).parents[1] / "asv_benchmarks"


def needs(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


# The command


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    for library in ("rich", "matplotlib"):
        needs(library)
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    size = ["--operator", "linear", "--tokens", "70", "20", "--heads", "1", "--width", "8"]
    assert main(["bench", "--quick", *size, "--out", str(out)]) == 0
    return out


def test_quick_run_saves_every_row(quick):
    result = json.loads((quick / "bench.json").read_text())
    assert result["schema"] == bench.SCHEMA
    assert result["quick"] is True
    assert {"date", "commit", "import_seconds", "memory", "skipped"} <= set(result)
    assert {"python", "hla", "numpy"} <= set(result["versions"])
    assert {"system", "processor", "cores", "load", "threads"} <= set(result["machine"])
    assert result["first"] == {"batch": 1, **Case("linear", 70, 1, 8)._asdict()}
    rows = result["rows"]
    lines = {(r["workload"], r["operator"], r["tokens"]) for r in rows}
    assert lines == {*itertools.product(WORKLOADS, ["linear"], [70]), ("forward", "linear", 20)}
    hosts = [b.name for b in dispatch.available() if b.available]
    for line in lines:
        here = [r for r in rows if (r["workload"], r["operator"], r["tokens"]) == line]
        names = [r["name"] for r in here]
        assert len(names) == len(set(names))
        assert {name.split("/")[0] for name in names if name not in peers.PEERS} <= set(hosts)
        assert "array_api/numpy/cpu" in names
        times = {r["name"]: r["seconds"] for r in here}
        for r in here:
            assert 0 < r["fastest"] <= r["seconds"]
            assert 0 <= r["error"] < 1e-5
            assert r["peer"] == (r["name"] in peers.PEERS)
            for name, ratio in r["times_faster"].items():
                assert ratio == pytest.approx(times[name] / r["seconds"])
            if line[0] == "step":
                assert r["floor"] is r["share_of_floor"] is None
            elif r["name"] != "torch SDPA":
                assert r["share_of_floor"] == pytest.approx(r["floor"] / r["seconds"])


def test_quick_run_draws_a_plot(quick):
    assert (quick / "bench.png").read_bytes().startswith(b"\x89PNG")


def parsed(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def test_a_wrong_result_is_refused_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    needs("rich")
    needs("matplotlib")
    monkeypatch.setattr(workloads, "_limit", lambda workload, case: 0.0)
    words = ("--quick", "--operator", "linear", "--tokens", "8", "--out", str(tmp_path))
    assert bench.run(parsed(*words)) == 1
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["rows"] == []
    assert any(s["wrong"] and "allowed" in s["reason"] for s in result["skipped"])
    assert "not timed: array_api/numpy/cpu: its error is" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_without_rich_or_matplotlib_one_line_names_the_extra(
    missing, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a)
    )
    assert bench.run(parsed("--quick", "--out", str(tmp_path / "out"))) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert 'pip install "hla[bench]"' in output.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    needs("rich")
    needs("matplotlib")
    (tmp_path / "file").write_text("")
    assert bench.run(parsed("--quick", "--out", str(tmp_path / "file"))) == 2
    assert capsys.readouterr().err.startswith(f"cannot write to {tmp_path / 'file'}")


@pytest.mark.parametrize("words", [("--tokens", "0"), ("--heads", "x"), ("--operator", "hla4")])
def test_bad_options_stop_the_parser(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words)
    assert stopped.value.code == 2
    assert words[1] in capsys.readouterr().err


def test_the_import_loads_no_library():
    lazy = {"torch", "jax", "cupy", "rich", "matplotlib"}
    code = f"import sys, hla.bench; print(sorted({lazy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The floor


@pytest.mark.parametrize(
    ("operator", "passes"), [("linear", 1), ("hla2", 2), ("ahla", 2), ("hla3", 3)]
)
def test_a_pass_costs_two_small_and_two_large_products(operator, passes):
    D, W, H, T = 128, 64, 8, 4096
    expected = passes * (2 * W * D + 2 * D * D) * 2 * H * T
    assert peers.operations("forward", Case(operator, T, H, D)) == expected
    assert peers.operations("forward + backward", Case(operator, T, H, D)) == 4 * expected


def test_the_floor_of_the_issue_size_is_2_15_gflop():
    assert peers.operations("forward", Case()) == 8 * 64 * 64 * 2 * 8 * 4096
    assert round(peers.operations("forward", Case()) / 1e9, 2) == 2.15


def test_the_floor_is_the_larger_of_operations_and_bytes():
    case = Case(dtype="bfloat16")
    host = peers.Floor(lambda: None, 1e9, None, 0.0)
    assert host.seconds("forward", case, 0.01, 0.0) == pytest.approx(2.147483648 / 100)
    assert host.seconds("step", case, 0.01, 0.0) is None
    device = host._replace(copy=lambda: None, copied_bytes=1e9)
    moved = 4 * 2 * 8 * 4096 * 64
    assert device.seconds("forward", case, 1e-9, 0.1) == pytest.approx(moved / 1e10)
    assert device.seconds("forward", case, 0.01, 1e-9) == pytest.approx(2.147483648 / 100)
    assert peers.compulsory_bytes("forward + backward", case) == 11 / 4 * moved


def test_the_rate_is_that_of_one_product_of_2048():
    machine = peers.floor("float32")
    assert machine.product_operations == 2 * 2048**3
    (product,) = machine.product()
    assert product.shape == (2048, 2048)
    assert product.dtype == np.float32


# What is timed


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_work_is_right_on_every_library(library, workload):
    needs(library)
    everything = list(itertools.product(OPERATORS, workloads.GATES))
    for operator, gate in everything if library == "numpy" else [("hla2", "log_gate")]:
        case = SMALL._replace(operator=operator, gate=gate)
        one = workloads.work(Target("array_api", library), workload, case)
        assert 0 <= workloads.checked(one) <= one.limit < 1e-4


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_peers_compute_what_they_say(name, workload, operator):
    needs(peers.PEERS[name].library)
    case = SMALL._replace(operator=operator)
    if peers.PEERS[name].can(workload, False):
        assert workloads.checked(peers.peer(name, workload, case)) < 2e-6
    else:
        with pytest.raises(NotImplementedError, match="has no workload"):
            peers.peer(name, workload, case)


def test_truth_in_pieces_is_the_truth(monkeypatch):
    one = workloads.work(NUMPY, "forward", SMALL)
    step = workloads.work(NUMPY, "step", SMALL)
    monkeypatch.setattr(workloads, "PIECE", 50)
    assert workloads.checked(one) < 1e-6
    workloads._kept.cache_clear()
    assert workloads.checked(step) < 1e-6


@pytest.mark.parametrize("workload", WORKLOADS)
def test_one_spoiled_block_is_wrong(workload):
    one = workloads.work(NUMPY, workload, SMALL)
    outputs = one.run()[:1] if workload == "step" else one.run()  # no state
    for i in range(len(outputs)):
        out = [x.copy() for x in outputs]
        out[i][0, 1, ..., -1] *= 1.001
        with pytest.raises(workloads.Wrong, match="its error is"):
            workloads.checked(one._replace(run=lambda out=out: tuple(out)))
        out[i][0, 0, ..., 0] = math.nan
        with pytest.raises(workloads.Wrong, match="inf"):
            workloads.checked(one._replace(run=lambda out=out: tuple(out)))


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_inputs_are_exact_in_their_dtype(library):
    needs(library)
    if library == "numpy":
        needs("ml_dtypes")
    lib = workloads.load(library, False)
    for x in workloads.draw(64, 1, 8, "bfloat16"):
        np.testing.assert_array_equal(workloads.to_host(lib.array(x, "bfloat16")), x)
        assert x.std() > 0


def test_targets_are_those_of_the_dispatch_table(monkeypatch):
    assert [t.backend for t in workloads.targets()] == sorted(
        (t.backend for t in workloads.targets()), key=dispatch.names().index
    )
    assert {t.backend for t in workloads.targets()} == set(dispatch.names())
    row = dispatch.Row("new", "hla.backends.array_api", (("torch", True),))
    monkeypatch.setattr(dispatch, "TABLE", (row, *dispatch.TABLE))
    assert workloads.targets()[0] == Target("new", "torch", True)
    assert str(workloads.targets()[0]) == "new/torch/gpu"


def test_what_is_missing_is_not_implemented():
    with pytest.raises(NotImplementedError, match="is not installed"):
        workloads.load("no_such_library", False)
    with pytest.raises(NotImplementedError, match="no triton backend"):
        workloads.checked(workloads.work(Target("triton", "numpy"), "forward", SMALL))
    with pytest.raises(NotImplementedError, match="has no gate"):
        peers.peer("NumPy tokens", "forward", SMALL._replace(gate="decay"))


def test_calls_are_timed_in_turns_and_none_is_counted_cold():
    seen = []
    calls = {name: functools.partial(seen.append, name) for name in ("a", "b")}
    samples = measure.measure(calls, 0.0, rounds=2)
    assert [name for name, _ in itertools.groupby(seen)] == ["a", "b", "a", "b"]
    assert set(samples) == {"a", "b"}
    assert all(len(times) == 2 and min(times) >= 0 for times in samples.values())
    assert len(seen) > 4


def test_what_would_take_too_long_is_left_out():
    done = measure.Row("forward", "hla2", 4096, "torch SDPA", True, False, 1.0, 1.0, 3, 0.0)
    with pytest.raises(NotImplementedError, match="about 16 s"):
        measure._foresee("forward", Case(tokens=16384), [done])
    done.name = "NumPy tokens"
    measure._foresee("forward", Case(tokens=16384), [done])
    measure._foresee("step", Case(tokens=1 << 20), [done])


# The asv suite


@functools.cache
def suite():
    """Its modules at the small size."""
    before = os.environ.get("HLA_BENCH_QUICK")
    os.environ["HLA_BENCH_QUICK"] = "1"
    sys.path.insert(0, str(SUITE))
    try:
        names = sorted(path.stem for path in (SUITE / "benchmarks").glob("[a-z]*.py"))
        return {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    finally:
        sys.path.remove(str(SUITE))
        if before is None:
            del os.environ["HLA_BENCH_QUICK"]
        else:
            os.environ["HLA_BENCH_QUICK"] = before


def classes():
    for name, module in suite().items():
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                yield pytest.param(kind, id=f"{name}.{kind.__name__}")


KINDS = ("time_", "timeraw_", "peakmem_", "track_")


@pytest.mark.parametrize("kind", list(classes()))
def test_every_benchmark_runs(kind):
    """As `asv check` and one run would; only what is not installed may refuse."""
    methods = [name for name in dir(kind) if name.startswith(KINDS)]
    assert methods
    axes = getattr(kind, "params", ())
    assert len(axes) == len(getattr(kind, "param_names", ()))
    targets = axes[0] if axes else [None]
    if kind.__name__ == "MemoryBeyond":  # a process for each
        targets = [target for target in targets if "numpy" in target.split("/")[1]]
    ran = 0
    for target, method in itertools.product(targets, methods):
        params = () if target is None else (target, *(axis[0] for axis in axes[1:]))
        one = kind()
        try:
            getattr(one, "setup", lambda *params: None)(*params)
        except NotImplementedError as why:
            assert "not installed" in str(why) or "peak memory" in str(why)  # noqa: PT017
            continue
        result = getattr(one, method)(*params)
        ran += 1
        if method.startswith("track_"):
            assert getattr(kind, method).unit
            assert result >= 0
            assert math.isfinite(result)
    assert ran or "Beyond" in kind.__name__


def test_the_suite_holds_every_promised_class():
    names = {p.values[0].__name__ for p in classes()}
    promised = {"Forward", "ForwardBackward", "Step", "Growth", "Import", "PeakMemory"}
    assert promised | {"OverPeer", "OverFloor", "BackwardOverForward"} <= names


def test_the_configuration_names_the_suite():
    lines = (SUITE / "asv.conf.json").read_text().splitlines()
    conf = json.loads("\n".join(line for line in lines if not line.strip().startswith("//")))
    assert (SUITE / conf["benchmark_dir"] / "__init__.py").is_file()
    assert (SUITE / conf["repo"]).resolve() == Path(__file__).parents[1]
