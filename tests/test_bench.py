"""`hla bench` and the asv suite: they run, what they time is right, and their arithmetic holds."""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import environment, installed, serves

import hla
from hla import backends, bench, dispatch
from hla.bench import libraries, measure, peers, workloads
from hla.bench.libraries import Call, Meter
from hla.bench.workloads import OPERATORS, WORKLOADS, Case, Target
from hla.cli import main
from hla.contract import ANY
from hla.machine import describe

SMALL = Case(tokens=130, heads=2, width=24)
NUMPY = Target("array_api", "numpy")
SUITE = Path(__file__).parents[1] / "asv_benchmarks"


def needs(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


# The command


@pytest.fixture(scope="module", autouse=True)
def small_product():
    """A run's own product of 2048, which a test below looks at, takes longer than what it times."""
    lib = libraries.load("numpy", False)
    x = lib.array(np.ones((64, 64), np.float32), "float32")
    product = peers.Floor(Call(lambda: (x @ x,), lib), 2.0 * 64**3, None, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "floor", lambda *args: product)
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory, small_product):
    for library in ("rich", "matplotlib"):
        needs(library)
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    size = ["--operator", "linear", "--tokens", "70", "20", "--heads", "1", "--width", "8"]
    size += ["--library", "numpy", "torch"]  # JAX compiles, and runs in tests of its own
    assert main(["bench", "--quick", *size, "--out", str(out)]) == 0
    return out


def test_quick_run_saves_every_row(quick):
    result = json.loads((quick / "bench.json").read_text())
    assert result["schema"] == bench.SCHEMA
    assert result["quick"] is result["complete"] is True
    options = "--operator linear --tokens 70 20 --heads 1 --width 8 --library numpy torch --quick"
    assert result["command"] == f"hla bench {options}"
    assert {"date", "commit", "import_seconds", "memory", "skipped"} <= set(result)
    assert {"python", "hla", "numpy"} <= set(result["versions"])
    machine = {"system", "processor", "cores", "load", "threads", "accelerators"}
    assert machine <= set(result["machine"])
    assert result["first"] == Case("linear", 70, 1, 8)._asdict()
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
            assert 0 < r["fastest"] <= r["seconds"] == r["host_seconds"]
            assert (r["quartiles"] is None) == (r["samples"] == 1)
            first, third = r["quartiles"] or [r["seconds"]] * 2
            assert r["fastest"] <= first <= r["seconds"] <= third
            assert 0 <= r["error"] < 1e-5
            assert r["peer"] == (r["name"] in peers.PEERS)
            for name, ratio in r["times_faster"].items():
                assert ratio == pytest.approx(times[name] / r["seconds"])
            if line[0] == "step":
                assert r["floor"] is r["share_of_floor"] is None
            elif r["name"] not in peers.SOFTMAX:
                assert r["share_of_floor"] == pytest.approx(r["floor"] / r["seconds"])


def test_quick_run_draws_a_plot(quick):
    assert (quick / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_little_difference_is_marked_by_few_numbers():
    """Of times within one decade matplotlib's own marks lie on one another."""
    installed("matplotlib")
    from matplotlib.figure import Figure

    from hla.bench import report

    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    ours, peer = some_rows()
    ours = dataclasses.replace(ours, seconds=0.205e-3, floor=0.18e-3)
    report._bars(axes, [ours, dataclasses.replace(peer, seconds=1.6e-3)])
    figure.draw_without_rendering()
    shown = [x for x in axes.get_xticklabels(which="both") if x.get_text()]
    where = [x.get_window_extent() for x in shown]
    where = sorted((x.x0, x.x1) for x in where if axes.bbox.x0 <= (x.x0 + x.x1) / 2 <= axes.bbox.x1)
    assert len(where) > 1
    assert all(a[1] < b[0] for a, b in itertools.pairwise(where))


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


def test_the_defaults_name_few_rows_and_named_operators_are_in_every_table():
    plan = list(bench._plan(parsed()))
    assert [c.operator for w, c in plan if w == "forward" and c.tokens == 4096] == list(OPERATORS)
    assert [(w, c.operator) for w, c in plan if w != "forward"] == [
        ("forward + backward", "hla2"),
        ("step", "hla2"),
        ("compiled step", "hla2"),
        *((w, "hla2") for w in workloads.HOST),
    ]
    assert [c.tokens for _, c in plan[-7:-4]] == [64, 1024, 16384]
    assert {c for w, c in plan if w in workloads.HOST} == {Case("hla2", 64, 1, 64, "bfloat16")}
    words = "--operator hla3 ahla --operator hla3 --tokens 9"
    named = list(bench._plan(parsed(*words.split())))
    assert [(w, c.operator) for w, c in named] == list(
        itertools.product(WORKLOADS, ["hla3", "ahla"])
    ) + [(w, "hla3") for w in ("compiled step", *workloads.HOST)]


def test_the_reference_size_can_be_asked_for():
    words = "--batch 8 --heads 16 --width 128 --tokens 4096 --dtype bfloat16 --gate decay"
    _, case = next(bench._plan(parsed(*words.split())))
    assert case == Case("hla2", 4096, 16, 128, "bfloat16", "decay", batch=8)
    assert case.shape == (8, 16, 4096, 128)


def test_device_and_library_choose_the_rows(tmp_path, monkeypatch):
    needs("rich")
    needs("matplotlib")
    monkeypatch.setattr(bench, "import_seconds", lambda repeats: [0.1])
    words = ("--quick", "--tokens", "20", "--commit", "abc", "--out", str(tmp_path))
    assert bench.run(parsed(*words, "--device", "cpu", "--library", "numpy")) == 0
    names = {r["name"] for r in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    here = [b.name for b in hla.available() if b.available]
    taking = {f"{b}/numpy/cpu" for b in here if {("numpy", False), (ANY, False)} & {*serves(b)}}
    assert {"numpy/numpy/cpu", "array_api/numpy/cpu"} <= taking
    assert names == taking | {"NumPy chunks", "NumPy tokens", "NumPy lines"}


def test_backend_chooses_the_rows_and_leaves_the_peers(tmp_path, monkeypatch):
    needs("rich")
    needs("matplotlib")
    monkeypatch.setattr(bench, "import_seconds", lambda repeats: [0.1])
    asked = []

    def memories(case, libraries, backends):
        asked.append(measure.chosen(libraries, backends))
        return {}

    monkeypatch.setattr(bench, "memories", memories)
    words = ("--quick", "--tokens", "20", "--device", "cpu", "--library", "numpy")
    assert bench.run(parsed(*words, "--backend", "numpy", "--out", str(tmp_path))) == 0
    names = {r["name"] for r in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert names == {"numpy/numpy/cpu", "NumPy chunks", "NumPy tokens", "NumPy lines"}
    assert asked == [[Target("numpy", "numpy")]]
    assert set(backends.TABLE) <= set(parsed("--backend", *backends.names()).backend)


def test_memory_beyond_is_never_negative(monkeypatch):
    counted = {"VmRSS": 1 << 20, "VmHWM": 1 << 20}  # the kernel's counters are late: no growth yet
    monkeypatch.setattr(measure, "_status", counted.get)
    monkeypatch.setattr(Path, "write_text", lambda self, text: len(text))
    assert measure.memory_beyond(NUMPY, SMALL) == 0
    counted["VmHWM"] += SMALL.bytes + 4096
    assert measure.memory_beyond(NUMPY, SMALL) == 4096


def test_a_run_that_times_nothing_says_so_and_leaves_what_is_there(tmp_path, monkeypatch, capsys):
    needs("rich")
    needs("matplotlib")

    def refuse(*args):
        raise NotImplementedError("nothing [here]")

    monkeypatch.setattr(measure, "work", refuse)
    (tmp_path / "bench.json").write_text("mine")
    assert bench.run(parsed("--quick", "--device", "gpu", "--out", str(tmp_path))) == 2
    out, err = capsys.readouterr()
    assert "not timed: array_api/torch/gpu: nothing [here]\n" in out
    assert err == f"hla bench: nothing could be timed, so nothing is written to {tmp_path}\n"
    assert [x.name for x in tmp_path.iterdir()] == ["bench.json"]
    assert (tmp_path / "bench.json").read_text() == "mine"


def test_a_size_that_no_memory_holds_is_nothing_to_time(tmp_path, capsys):
    needs("rich")
    needs("matplotlib")
    words = ("--quick", "--library", "numpy", "--tokens", str(10**30), "--out", str(tmp_path))
    assert bench.run(parsed(*words)) == 2
    assert "MemoryError: no memory holds" in capsys.readouterr().out


def some_rows():
    """Two rows of one case, the second a peer of one sample."""
    common = ("forward", "hla2", 4096)
    ours = measure.Row(*common, "numpy/numpy/cpu", False, False, 2e-3, 2e-3, 1e-3, 9, 1e-7)
    ours.quartiles, ours.times_faster = (1.5e-3, 2.25e-3), {"NumPy tokens": 8.0}
    ours.floor, ours.rates, ours.share_of_floor = 1e-3, {"operations": 1e9}, 0.5
    peer = measure.Row(*common, "NumPy tokens", True, False, 16e-3, 16e-3, 16e-3, 1, 1e-7)
    return [ours, peer]


@pytest.mark.parametrize("measured", [0, 1])
def test_an_interrupted_run_keeps_what_was_measured(measured, tmp_path, monkeypatch, capsys):
    needs("rich")
    needs("matplotlib")
    answers = iter([(some_rows(), [])] * measured)

    def measure_case(*args, **where):
        for answer in answers:
            return answer
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_case", measure_case)
    monkeypatch.setattr(bench, "import_seconds", lambda repeats: [0.1])
    (tmp_path / "bench.json").write_text("mine")
    assert main(["bench", "--out", str(tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert err == "interrupted\n"
    if not measured:
        assert [x.name for x in tmp_path.iterdir()] == ["bench.json"]
        assert (tmp_path / "bench.json").read_text() == "mine"
        return
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [r["name"] for r in result["rows"]] == ["numpy/numpy/cpu", "NumPy tokens"]
    assert result["complete"] is False
    assert "1.5-2.25" in out
    assert sorted(x.name for x in tmp_path.iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.parametrize("load", [None, 2.0, 2.5])
def test_a_load_above_the_cores_is_a_warning(load, capsys):
    needs("rich")
    from hla import tables
    from hla.bench import report

    machine = {"processor": "one", "cores": 2, "load": load, "accelerators": []}
    report.introduce(
        tables.console(), {"machine": machine, "versions": {}, "commit": None, "date": "now"}
    )
    warned = "Warning: the load of 2.5 exceeds the 2 cores" in capsys.readouterr().out
    assert warned == (load == 2.5)


@pytest.mark.parametrize("width", [40, 80])
def test_the_tables_fit_a_terminal(width, monkeypatch, capsys):
    needs("rich")
    from hla import tables
    from hla.bench import report

    monkeypatch.setenv("COLUMNS", str(width))
    rows = some_rows()
    rows[0].times_faster = dict.fromkeys(peers.PEERS, 1234.56)
    first = Case()._asdict()
    result = {"first": first, "memory": {}, "import_seconds": 0.1, "import_quartiles": None}
    longer = [dataclasses.replace(row, tokens=1 << 20) for row in rows]
    report.show(tables.console(), result, rows + longer, [])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(width, 48)  # the names and one column
    assert out.count("1234.56x") == len(peers.PEERS)
    assert "\u2026" not in out
    assert "2 (1.5-2.25)" in out


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
    assert 'pip install ".[bench]"' in output.err
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
    command, env = [sys.executable, "-c", code], environment()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_that_change_the_speed_are_recorded(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--some=1")
    monkeypatch.setenv("OMP_NUM_THREADS", " ")
    found = describe("abc")
    assert found["commit"] == "abc"
    assert found["settings"]["XLA_FLAGS"] == "--some=1"
    assert "OMP_NUM_THREADS" not in found["settings"]


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


def test_the_floor_of_the_reference_size_is_0_18_ms():
    """Its bytes at 3.0 TB/s take 0.179 ms, its operations at 790 TFLOP/s 0.130 ms."""
    case = Case("hla2", 4096, 16, 128, "bfloat16", batch=8)
    machine = peers.Floor(lambda: None, 790e12, lambda: None, 3.0e12)
    assert machine.seconds("forward", case, 1.0, 1.0) == pytest.approx(0.179e-3, rel=1e-3)
    assert machine.seconds("forward", case, 1.0, 1e-9) == pytest.approx(0.130e-3, rel=5e-3)
    bytes_a_token = 2816  # of a whole step: 11 arrays
    whole = bytes_a_token * 8 * 4096 * 16
    assert peers.compulsory_bytes("forward + backward", case) == whole


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
    assert peers.floor("float32") is machine  # its operands are not drawn for every row


@pytest.mark.parametrize("here", [("torch", "jax"), ("jax",), ()])
def test_numba_which_multiplies_no_matrices_has_the_floor_of_another_library(here, monkeypatch):
    asked = []

    def load(name, accelerator):
        asked.append(name)
        if name in here:
            return fake_device(1.0)._replace(array=lambda x, dtype: x[:8, :8])
        raise NotImplementedError

    monkeypatch.setattr(peers, "load", load)
    floor = peers.floor.__wrapped__
    if here:
        (product,) = floor("bfloat16", "numba", True).product()
        assert product.shape == (8, 8)
        assert asked[-1] == here[0]
    else:
        with pytest.raises(NotImplementedError, match="install one of cupy, torch, jax"):
            floor("bfloat16", "numba", True)


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


def test_a_step_is_compiled_beside_its_lines(monkeypatch):
    needs("torch")
    fused = []
    monkeypatch.setattr("torch.compile", lambda f, **options: fused.append(f) or f)
    for one in (
        workloads.work(Target("array_api", "torch"), "compiled step", SMALL),
        peers.peer("torch lines", "compiled step", SMALL),
    ):
        assert workloads.checked(one) < 1e-6
    assert len(fused) == 2
    with pytest.raises(NotImplementedError, match="no compiler but its own"):
        workloads.work(NUMPY, "compiled step", SMALL)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"needs a C\+\+ compiler"):
        peers.peer("torch lines", "compiled step", SMALL)


def test_the_host_s_time_awaits_nothing():
    needs("torch")
    target = Target("array_api", "torch")
    for workload in workloads.HOST:
        one = workloads.work(target, workload, workloads.CALL)
        assert 0 <= workloads.checked(one) <= one.limit
        assert one.run.lib.meter is None
        assert one.run.lib.wait is not libraries.load("torch", False).wait
    assert measure.measure_case(workload, workloads.CALL, devices=["cpu"]) == ([], [])


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_sequence_of_a_batch_is_timed_and_checked(workload):
    case = SMALL._replace(batch=3)
    one = workloads.work(NUMPY, workload, case)
    assert workloads.checked(one) < 1e-6
    out = [np.array(x) for x in (one.run()[:1] if workload == "step" else one.run())]
    assert out[0].shape[:2] == (3, 2)
    out[0][1, 0] *= 1.001
    with pytest.raises(workloads.Wrong):
        workloads.checked(one._replace(run=lambda: tuple(out)))
    assert peers.operations("forward", case) == 3 * peers.operations("forward", SMALL)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_large_case_is_checked_by_its_first_and_last_head(workload, monkeypatch):
    monkeypatch.setattr(workloads, "LARGE", 1000)
    case = SMALL._replace(batch=2, gate="log_gate")
    one = workloads.work(NUMPY, workload, case)
    assert workloads.checked(one) < 1e-6
    assert all(x.shape[:2] == (2, 1) for _, want in workloads._kept(workload, case) for x in want)
    for head, wrong in {(0, 0): True, (0, 1): False, (1, 0): False, (1, 1): True}.items():
        out = [np.array(x) for x in (one.run()[:1] if workload == "step" else one.run())]
        out[-1][head] *= 1.001
        spoiled = one._replace(run=lambda out=out: tuple(out))
        if wrong:
            with pytest.raises(workloads.Wrong):
                workloads.checked(spoiled)
        else:
            workloads.checked(spoiled)
    workloads._kept.cache_clear()


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


FLA = """
import torch


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
    "Its documented contract: [B, T, H, D], per-head log decay, (output, final state)."
    assert all(x.is_contiguous() for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    age = torch.arange(q.shape[2])
    age = (age[:, None] - age).tril()
    weights = (scale * q @ k.mT).tril()
    if g_gamma is not None:
        weights = weights * torch.exp(g_gamma[:, None, None] * age)
    return (weights @ v).transpose(1, 2).contiguous(), None


fused_chunk_simple_gla = chunk_simple_gla


def fused_recurrent_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False
):
    "Its documented contract: states [B, H, D, V] in float32."
    B, T, H, D = q.shape
    S = initial_state
    S = torch.zeros(B, H, D, v.shape[-1]) if S is None else S
    out = []
    for t in range(T):
        S = S if g_gamma is None else S * torch.exp(g_gamma)[:, None, None]
        S = S + k[:, t, :, :, None].float() * v[:, t, :, None, :].float()
        out.append((scale * q[:, t, :, None, :].float() @ S)[:, :, 0].to(v.dtype))
    return torch.stack(out, 1), S if output_final_state else None
"""


@pytest.fixture
def fake_fla(tmp_path, monkeypatch):
    """A stand-in for FLA's kernels in torch, and the host where FLA has its GPU."""
    needs("torch")
    (tmp_path / "fla" / "ops").mkdir(parents=True)
    (tmp_path / "fla" / "__init__.py").write_text("")
    (tmp_path / "fla" / "ops" / "__init__.py").write_text("")
    (tmp_path / "fla" / "ops" / "simple_gla.py").write_text(FLA)
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    host = libraries.load("torch", False)
    monkeypatch.setattr(peers, "load", lambda name, accelerator: host)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        del sys.modules[name]


@pytest.mark.parametrize("gate", ["none", "decay"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.usefixtures("fake_fla")
def test_fla_chained_is_the_operator(operator, gate):
    case = SMALL._replace(operator=operator, gate=gate, batch=2)
    for name in ("FLA", "FLA fused", "FLA recurrent"):
        for workload in peers.PEERS[name].workloads:
            one = peers.peer(name, workload, case, True)
            assert workloads.checked(one) < 2e-6
            out = one.run()
            step = workload.endswith("step")
            assert out[0].shape == ((2, 2, 24) if step else (2, 130, 2, 24))
            with pytest.raises(workloads.Wrong):
                workloads.checked(one._replace(run=lambda out=out: [1.05 * x for x in out]))
    with pytest.raises(NotImplementedError, match="not set up for the gate 'log_gate'"):
        peers.peer("FLA", "forward", case._replace(gate="log_gate"), True)


@pytest.mark.usefixtures("fake_fla")
def test_a_run_on_a_gpu_has_the_peers_the_floor_and_the_memory(tmp_path, monkeypatch, capsys):
    """The whole command, with the host in the place of the device."""
    needs("rich")
    needs("matplotlib")
    torch = libraries.load("torch", False)
    one = torch.array(np.ones((8, 8), np.float32), "float32")
    call = Call(
        lambda: (one,), torch._replace(meter=Meter(lambda start, s: [0.1], lambda start: 0))
    )
    device = torch._replace(meter=Meter(lambda start, s: [0.2], lambda start: 130 * 2 * 4))
    for module in (peers, workloads):
        monkeypatch.setattr(module, "load", lambda name, accelerator: device)
    monkeypatch.setattr(measure, "floor", lambda *args: peers.Floor(call, 1e6, call, 1e6))
    words = "--quick --device gpu --library torch --tokens 130 --heads 2 --width 8 --batch 2"
    assert bench.run(parsed(*words.split(), "--dtype", "bfloat16", "--out", str(tmp_path))) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = {(r["workload"], r["name"]): r for r in result["rows"]}
    assert {row for row in rows if not row[1].startswith("triton")} == {
        *itertools.product(WORKLOADS[:2], ["array_api/torch/gpu", "torch SDPA", "FLA"]),
        ("forward", "FLA fused"),
        ("step", "array_api/torch/gpu"),
        ("step", "torch SDPA"),
        ("step", "FLA recurrent"),
    }
    both = rows["forward + backward", "array_api/torch/gpu"]
    assert both["seconds"] == 0.2 != both["host_seconds"]
    assert both["times_faster"] == {"torch SDPA": 1.0, "FLA": 1.0}
    assert both["rates"] == {"operations": 1e7, "bytes": 1e7}
    assert both["beyond"] == 130 * 2 * 4 / (2 * 2 * 130 * 8 * 2)
    out = capsys.readouterr().out
    assert "FLA fused (gpu)" in out
    assert "Floor on the gpu" in out
    shutil.copy(tmp_path / "bench.json", tmp_path / "gpu.json")
    conf = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "measured.py"))
    assert "| FLA fused | 200 |" in conf["benchmarks"](tmp_path)


def test_fla_is_there_only_with_a_device_and_the_package(monkeypatch):
    needs("torch")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    libraries.load.cache_clear()
    with pytest.raises(NotImplementedError, match="torch sees no accelerator"):
        peers.peer("FLA", "forward", SMALL, True)
    host, find = libraries.load("torch", False), importlib.util.find_spec
    monkeypatch.setattr(peers, "load", lambda name, accelerator: host)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "fla" else find(name, *a)
    )
    with pytest.raises(NotImplementedError, match="fla-core is not installed"):
        peers.peer("FLA", "forward", SMALL, True)


def test_truth_in_pieces_is_the_truth(monkeypatch):
    one = workloads.work(NUMPY, "forward", SMALL)
    step = workloads.work(NUMPY, "step", SMALL)
    monkeypatch.setattr(workloads, "PIECE", 50)
    for kept in (1 << 25, 0):
        monkeypatch.setattr(workloads, "KEPT", kept)
        for work in (one, step):
            workloads._kept.cache_clear()
            assert workloads.checked(work) < 1e-6
            assert workloads._kept.cache_info().currsize == bool(kept)


class Strict:
    """An array that has of NumPy's what Numba's on a device have: no ellipsis, no new axis."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.size = x, x.shape, x.dtype, x.size

    def __getitem__(self, item):
        items = item if isinstance(item, tuple) else (item,)
        assert {type(one) for one in items} <= {int, slice}
        return Strict(self.x[item])

    def view(self, dtype):
        return Strict(self.x.view(dtype))

    def copy_to_host(self):
        assert self.dtype.kind in "fu"
        return self.x


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_no_index_is_asked_of_a_library_s_arrays_that_numba_s_lack(workload, large, monkeypatch):
    ml_dtypes = installed("ml_dtypes")
    if large:
        monkeypatch.setattr(workloads, "LARGE", 1000)
    case = SMALL._replace(batch=2, dtype="bfloat16", gate="log_gate")

    def unwrapped(function):
        def call(*args, **options):
            args = [x.x if isinstance(x, Strict) else x for x in args]
            options["log_gate"] = options["log_gate"].x
            found = function(*args, **options)
            if function is not hla.vjp:
                return (Strict(found[0]), found[1]) if isinstance(found, tuple) else Strict(found)
            o, pullback = found
            return Strict(o), lambda do: [x if x is None else Strict(x) for x in pullback(do.x)]

        return call

    lib = libraries.load("numpy", False)
    strict = lib._replace(array=lambda x, dtype: Strict(lib.array(x, dtype)))
    monkeypatch.setattr(workloads, "load", lambda *names: strict)
    functions = SimpleNamespace(**{n: unwrapped(getattr(hla, n)) for n in ("scan", "step", "vjp")})
    truth = tuple(workloads._truth(workload, case))
    monkeypatch.setattr(workloads, "hla", functions)
    monkeypatch.setattr(workloads, "_kept", lambda *names: truth)
    one = workloads.work(NUMPY, workload, case)
    assert one.run()[0].dtype == ml_dtypes.bfloat16
    assert 0 < workloads.checked(one) <= one.limit


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
    lib = libraries.load(library, False)
    for x in workloads.draw((1, 1, 64, 8), "bfloat16"):
        np.testing.assert_array_equal(libraries.to_host(lib.array(x, "bfloat16")), x)
        assert x.std() > 0


def test_targets_are_those_of_the_dispatch_table(monkeypatch):
    assert [t.backend for t in workloads.targets()] == sorted(
        (t.backend for t in workloads.targets()), key=backends.names().index
    )
    assert {t.backend for t in workloads.targets()} == set(backends.names())
    monkeypatch.setattr(backends, "TABLE", {"new": "hla.backends.triton", **backends.TABLE})
    assert workloads.targets()[0] == Target("new", "torch", True)
    assert str(workloads.targets()[0]) == "new/torch/gpu"


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_triton_refuses_arrays_on_the_host(library):
    needs(library)
    if library == "torch" and "TRITON_INTERPRET" in os.environ:
        pytest.skip("Triton's interpreter takes torch's arrays on the host")
    with pytest.raises(hla.Unsupported, match="triton"):
        workloads.checked(workloads.work(Target("triton", library), "forward", SMALL))


def test_what_is_missing_is_not_implemented():
    with pytest.raises(NotImplementedError, match="is not installed"):
        libraries.load("no_such_library", False)
    with pytest.raises(NotImplementedError, match="not set up for the gate 'decay'"):
        peers.peer("NumPy tokens", "forward", SMALL._replace(gate="decay"))


def test_a_row_without_room_is_left_out_and_other_errors_surface(monkeypatch):
    def fail(error):
        def work(*args):
            raise error

        monkeypatch.setattr(measure, "work", work)
        return measure.measure_case("forward", SMALL, devices=["cpu"], libraries=["numpy"])

    rows, skipped = fail(RuntimeError("CUDA out of memory. Tried\nand more"))
    assert rows == []
    assert {s.reason for s in skipped} == {"RuntimeError: CUDA out of memory. Tried"}
    assert not any(s.wrong for s in skipped)
    assert fail(MemoryError())[0] == []
    with pytest.raises(RuntimeError, match="illegal access"):
        fail(RuntimeError("illegal access"))


def test_a_peer_that_breaks_stops_nobody_else(monkeypatch):
    def broken(*args):
        raise ValueError("no such kernel")

    monkeypatch.setitem(
        peers.PEERS, "NumPy chunks", peers.Peer("numpy", WORKLOADS, (False,), broken)
    )
    where = {"devices": ["cpu"], "libraries": ["numpy"]}
    rows, skipped = measure.measure_case("forward", SMALL, quick=True, **where)
    assert {"array_api/numpy/cpu", "NumPy tokens"} <= {row.name for row in rows}
    assert [(s.name, s.reason, s.wrong) for s in skipped] == [
        ("NumPy chunks", "ValueError: no such kernel", False)
    ]


def fake_device(seconds, beyond=0):
    """NumPy's library as on an accelerator whose events say so many seconds."""
    meter = Meter(lambda start, budget: [seconds, seconds, 9 * seconds], lambda start: beyond)
    return libraries.load("numpy", False)._replace(meter=meter)


def test_device_events_come_first_and_ratios_compare_like_with_like():
    q = np.ones(3)

    def ready(lib):
        return workloads.Work(Call(lambda: (q,), lib), lambda got: 0.0, 1.0), 0.0

    machine = peers.Floor(
        Call(lambda: (q,), fake_device(0.5)), 395e12, Call(lambda: (q,), fake_device(2.0)), 6e12
    )
    case = Case("hla2", 4096, 16, 128, "bfloat16", batch=8)
    works = {
        "triton/torch/gpu": ready(fake_device(0.25e-3, 3 * case.bytes)),
        "array_api/jax/gpu": ready(libraries.load("numpy", False)),
        "FLA": ready(fake_device(1e-3)),
    }
    ours, jax, fla = rows = measure._time("forward", case, machine, works, quick=True)
    assert (ours.seconds, ours.fastest, fla.seconds) == (0.25e-3, 0.25e-3, 1e-3)
    assert ours.times_faster == {"FLA": 4.0}
    assert 0 < ours.host_seconds != ours.seconds
    assert jax.seconds == jax.host_seconds
    assert jax.times_faster == {"FLA": fla.host_seconds / jax.host_seconds}
    assert ours.rates == {"operations": 790e12, "bytes": 3e12}
    assert ours.floor == pytest.approx(0.179e-3, rel=1e-3)
    assert ours.share_of_floor == pytest.approx(0.716, rel=1e-3)
    assert (ours.beyond, jax.beyond, fla.beyond) == (3.0, None, 0.0)
    for workload in ("step", workloads.COMPILED):  # their results are states, which have no size
        again = measure._time(workload, case, machine, works, quick=True)
        assert {row.beyond for row in again} == {None}
    assert all(row.accelerator for row in rows)
    needs("rich")
    from hla.bench import report

    console = report.Console(width=120, record=True, file=io.StringIO())
    report.show_times(console, rows)
    text = console.export_text()
    assert "790 TFLOP/s and bytes / 3.00 TB/s" in " ".join(text.split())
    assert "hla2 0.179 ms" in " ".join(text.split())
    (line,) = (line.split() for line in text.splitlines() if "triton/torch/gpu" in line)
    assert line[2:4] == ["0.25", "0.25-1.25"]
    assert line[5:] == ["72%", "3.00", "0e+00", "4.00x"]


def test_calls_without_a_meter_are_timed_by_the_clock():
    calls = {
        "device": Call(tuple, fake_device(7.0)),
        "host": Call(tuple, libraries.load("numpy", False)),
    }
    samples = measure.measure(calls, 0.0, 1, events=True)
    assert samples["device"] == [7.0, 7.0, 63.0]
    assert 7.0 not in samples["host"]


class Event:
    """Torch's event, on a clock that only the work moves."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_the_meter_without_a_gpu(monkeypatch):
    """What the device would do is played by the host; `test_the_meter_on_a_gpu` has the device."""
    torch = installed("torch")
    empty, waited = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: empty(8, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(time, "perf_counter", lambda: Event.now)

    def work():
        Event.now += 2e-3

    assert libraries.event_seconds(work, 0.041) == pytest.approx([2e-3] * 20)
    assert len(waited) == 3  # cold, to see how long a call takes, and the calls that count
    assert libraries.event_seconds(work, 0.0) == pytest.approx([2e-3])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 160)
    assert libraries.bytes_beyond(lambda: (torch.ones(2), torch.ones(3))) == 60 - 20


def test_the_meter_of_numba_without_a_gpu(monkeypatch):
    needs("numba")
    from hla.kernels.numba import package

    waited, written = [], []

    class Device:
        def copy_to_device(self, other):
            assert other is not self
            written.append(1)

    cuda = SimpleNamespace(
        device_array=lambda size, dtype: Device(),
        event=lambda timing: Event(timing),
        event_elapsed_time=Event.elapsed_time,
        synchronize=lambda: waited.append(1),
    )
    monkeypatch.setattr(package, "cuda", cuda, raising=False)
    monkeypatch.setattr(time, "perf_counter", lambda: Event.now)

    def work():
        Event.now += 2e-3

    assert libraries._numba_seconds(work, 0.041) == pytest.approx([2e-3] * 20)
    assert len(waited) == 3
    assert len(written) == 1 + 2 + 20  # caches are cold before each call


@pytest.mark.parametrize("late", [(), *zip(range(8)), (1, 3, 5), (3, 5, 7), (0, 1, 2, 3)], ids=str)
def test_queues_of_calls_less_their_writes(late, monkeypatch):
    """JAX's meter: the clock is moved by the calls, and by the writes that come before them.

    Where the host sees the end of some of the queues late, no sample is shorter than the work.
    """
    jax = installed("jax")
    Event.now, calls, waits = 0.0, [], []
    monkeypatch.setattr(libraries, "COLD", 8)
    monkeypatch.setattr(time, "perf_counter", lambda: Event.now)

    def write(x):
        Event.now += 1e-3
        return x

    def work():
        Event.now += 2e-3
        calls.append(1)
        return ()

    def wait(out):
        Event.now += 5e-3 * (len(waits) - 2 in late)  # two queues come before those that count
        waits.append(out)

    monkeypatch.setattr(jax, "block_until_ready", wait)
    want = [
        2e-3 + 5e-4 * (2 * i in late) for i in range(4)
    ]  # queues of calls and of writes by turns
    assert libraries.queued_seconds(write, work, 0.12) == pytest.approx(want)
    assert len(waits) == 2 + 2 * 4
    assert len(calls) == 1 + 2 + 4 * 10  # cold, to see how long a call takes, and what counts
    assert libraries.queued_seconds(write, work, 0.0) == pytest.approx([2e-3] * 4)


def test_the_writes_of_jax_s_meter_are_compiled_once(monkeypatch):
    """A function of each call's own would be compiled in every round of every row."""
    jax = installed("jax")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # whatever it runs on
    monkeypatch.setattr(libraries, "COLD", 8)
    compile, compiled = jax.jit, []

    def jit(f, **options):
        compiled.append(f)
        return compile(f, **options)

    monkeypatch.setattr(jax, "jit", jit)
    meter = libraries._jax(True).meter
    for _ in range(2):
        meter.seconds(lambda: (), 0.0)
    assert len(compiled) == 1


@pytest.mark.gpu
def test_the_meter_on_a_gpu():
    """Bytes, and times no less than the work takes: a card that others use may take any longer."""
    torch = installed("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device for torch")
    meter = libraries.load("torch", True).meter
    x = torch.ones(1 << 28, device="cuda")
    assert meter.bytes_beyond(lambda: ((x + 1) * 2,)) == x.nbytes
    assert meter.bytes_beyond(lambda: (x + 1,)) == 0
    times = meter.seconds(lambda: (x + 1,), 0.1)  # how many depends on who else uses the card
    assert 2 * x.nbytes / min(times) < 2e13  # which no memory does
    assert min(meter.seconds(lambda: torch.cuda._sleep(10**7), 0.1)) > 1e-3


@pytest.mark.gpu
def test_the_meter_of_cupy_on_a_gpu():
    """As torch's: bytes that the call gives back before it ends count, results do not."""
    cupy = installed("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device for CuPy")
    meter = libraries.load("cupy", True).meter
    x = cupy.ones(1 << 28, "float32")
    assert meter.bytes_beyond(lambda: ((x + 1) * 2,)) == x.nbytes
    assert meter.bytes_beyond(lambda: (x + 1,)) == 0
    assert 2 * x.nbytes / min(meter.seconds(lambda: (x + 1,), 0.1)) < 2e13  # which no memory does


@pytest.mark.gpu
def test_the_meter_of_numba_on_a_gpu():
    from hla.kernels.numba import package

    if not package.installed() or package.SIMULATED or not package.cuda.is_available():
        pytest.skip("no CUDA device for Numba")
    lib = libraries.load("numba", True)
    x = lib.array(np.ones(1 << 26, np.float32), "float32")
    y = lib.array(np.zeros(1 << 26, np.float32), "float32")
    times = lib.meter.seconds(lambda: (y.copy_to_device(x),), 0.1)
    assert 0 < 2 * x.nbytes / min(times) < 2e13  # which no memory does


@pytest.mark.gpu
@pytest.mark.parametrize("workload", [*WORKLOADS, workloads.COMPILED])
def test_a_gpu_has_its_rows_and_peers(workload):
    torch = installed("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device for torch")
    case = Case("hla2", 300, 4, 64, "bfloat16", batch=2)
    found = measure.measure_case(workload, case, quick=True, devices=["gpu"], libraries=["torch"])
    names = {row.name for row in found[0]}
    whole = workload in ("forward", "forward + backward")
    assert {"array_api/torch/gpu", *["torch SDPA"] * (workload != workloads.COMPILED)} <= names
    assert ("FLA" in names) == (whole and importlib.util.find_spec("fla") is not None)
    assert not any(one.wrong for one in found[1])
    assert all((row.beyond is not None) == whole for row in found[0])


def test_calls_are_timed_in_turns_and_none_is_counted_cold(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, 1e-6).__next__)
    seen = []
    calls = {name: functools.partial(seen.append, name) for name in ("a", "b")}
    samples = measure.measure(calls, 0.0, rounds=2)
    assert [name for name, _ in itertools.groupby(seen)] == ["a", "b", "a", "b"]
    assert set(samples) == {"a", "b"}
    assert all(len(times) == 2 and min(times) >= 0 for times in samples.values())
    assert len(seen) > 4


def test_what_would_take_too_long_is_left_out():
    done = measure.Row("forward", "hla2", 4096, "torch SDPA", True, False, 1.0, 1.0, 1.0, 3, 0.0)
    with pytest.raises(NotImplementedError, match="about 16 s"):
        measure._foresee("forward", Case(tokens=16384), [done])
    done.name = "NumPy tokens"
    measure._foresee("forward", Case(tokens=16384), [done])
    measure._foresee("step", Case(tokens=1 << 20), [done])


# The page


def test_the_page_shows_every_committed_result(quick, tmp_path):
    conf = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "measured.py"))
    assert conf["benchmarks"](tmp_path) == "No result is committed yet."
    result = json.loads((quick / "bench.json").read_text())
    result["settings"] = {"XLA_FLAGS": "--some=1"}
    (tmp_path / "this.json").write_text(json.dumps(result))
    shown = conf["benchmarks"](tmp_path)
    assert "; XLA_FLAGS=--some=1." in shown
    assert f"commit {result['commit'] or 'unknown'}" in shown
    assert f"{result['machine']['processor']}, {result['machine']['cores']} cores" in shown
    lines = [line.split(" | ") for line in shown.splitlines() if line.startswith("| linear")]
    rows = sorted(result["rows"], key=lambda r: WORKLOADS.index(r["workload"]))
    assert [line[2] for line in lines] == [r["name"] for r in rows]
    assert [line[3] for line in lines] == [f"{1e3 * r['seconds']:.4g}" for r in rows]
    assert len({len(line) for line in lines}) > 1  # each workload has its own peers


def test_committed_results_say_where_they_come_from():
    for path in (Path(__file__).parents[1] / "docs" / "benchmarks").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["schema"] == bench.SCHEMA
        assert result["commit"]
        assert not result["commit"].endswith("-dirty")
        assert result.get("complete", True)
        assert result["rows"]


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


@pytest.mark.aot
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
            assert re.search("not installed|peak memory|no accelerator|no workload", str(why))  # noqa: PT017
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
    assert promised | {"OverPeer", "OverFloor"} <= names


def tracked(kind):
    return [name for name in dir(kind) if name.startswith("track_")]


@pytest.mark.parametrize("kind", [p for p in classes() if tracked(*p.values)])
def test_of_every_tracked_value_less_is_better(kind, monkeypatch):
    """Where this package takes twice the time or memory, and nothing else changes, it rises."""
    (method,) = tracked(kind)
    one, values = kind(), []
    one.run, one.other, one.floor = None, None, peers.floor("float32")
    params = ("array_api/numpy/cpu", *(axis[0] for axis in kind.params[1:]))

    def seconds(this, **others):
        return {"this": one.beyond, **dict.fromkeys(others, 1.0)}

    monkeypatch.setattr(sys.modules[kind.__module__], "seconds", seconds, raising=False)
    for one.beyond in (1.0, 2.0):
        values.append(getattr(one, method)(*params))
    assert values[1] == 2 * values[0] > 0


def test_the_configuration_builds_any_commit_with_numpy_alone():
    lines = (SUITE / "asv.conf.json").read_text().splitlines()
    conf = json.loads("\n".join(line for line in lines if not line.strip().startswith("//")))
    assert (SUITE / conf["benchmark_dir"] / "__init__.py").is_file()
    assert (SUITE / conf["repo"]).resolve() == Path(__file__).parents[1]
    assert conf["branches"] == ["HEAD"]
    assert "matrix" not in conf
    (build,) = conf["build_command"]
    assert "--no-deps" in build.split()  # else asv finds several wheels
