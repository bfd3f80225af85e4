"""The NumPy backend's threads: as many as BLAS may have, in the caller's context, gone after it."""

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from conftest import environment, installed

import hla
from hla.kernels.numpy import threads as numpy_threads
from hla.kernels.numpy.threads import SPREAD, spread

HEADS, CORES = 24, 8
controller = numpy_threads._controller


@pytest.fixture(autouse=True)
def unlimited(monkeypatch):
    """Eight cores, and no limit but what a test sets."""
    monkeypatch.setattr(numpy_threads, "cores", lambda: CORES)
    monkeypatch.setattr(numpy_threads, "_controller", lambda: None)
    for name in numpy_threads.LIMITS:
        monkeypatch.delenv(name, raising=False)


def threads(expected):
    """Run jobs in threads that wait for one another; return those that took one."""
    found, heads, together = set(), [], threading.Barrier(expected)

    def job(part, held):
        found.add(held.setdefault("mine", threading.current_thread()))
        assert held["mine"] is threading.current_thread()
        heads.extend(part(np.arange(HEADS), 0))
        together.wait(timeout=20)  # none takes its second before each has its first

    spread(job, (HEADS,), SPREAD)
    assert sorted(heads) == list(range(HEADS))
    assert len(found) == expected
    return found


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, CORES),
        *(({name: "1"}, 1) for name in numpy_threads.LIMITS),
        ({"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "5"}, 2),
        ({"MKL_NUM_THREADS": "6", "OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": " 2 "}, 2),
        ({"OMP_NUM_THREADS": "1000"}, CORES),
        *(({"OPENBLAS_NUM_THREADS": bad}, CORES) for bad in ("", "0", "-1", "abc", "٣")),
    ],
)
def test_the_least_variable_limits_the_threads(limits, expected, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    before = threading.active_count()
    assert threading.current_thread() in threads(expected)
    assert threading.active_count() == before


def test_threadpoolctl_limits_the_threads_while_it_limits_blas(monkeypatch):
    threadpoolctl = installed("threadpoolctl")
    monkeypatch.setattr(numpy_threads, "_controller", controller)
    for most in (3, 1, 2):
        with threadpoolctl.threadpool_limits(most, user_api="blas"):
            threads(most)


def test_calls_at_one_time_share_the_limit(monkeypatch):
    """Of two callers the second finds the limit taken and works alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    at_work, done = threading.Barrier(4), threading.Event()

    def job(part, held):
        if not held:
            held["begun"] = True
            at_work.wait(timeout=20)
            assert done.wait(timeout=20)

    first = threading.Thread(target=spread, args=(job, (HEADS,), SPREAD))
    first.start()
    at_work.wait(timeout=20)
    assert threads(1) == {threading.current_thread()}
    done.set()
    first.join()
    threads(3)


def test_threads_have_the_callers_errstate_and_cores():
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = []

    def job(part, held):
        found.append((np.geterr()["over"], cores and os.sched_getaffinity(0)))

    with np.errstate(over="raise"):
        spread(job, (HEADS,), SPREAD)
    assert found == [("raise", cores)] * len(found)
    huge = np.full((2, 4, 600, 16), 1e200)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        hla.scan(*huge, huge[0])


@pytest.mark.parametrize("where", ["caller", "other"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_ends_the_call_and_reaches_the_caller(error, where):
    together = threading.Barrier(CORES)

    def job(part, held):
        if not held:
            held["begun"] = True
            together.wait(timeout=20)
        if (threading.current_thread() is threading.main_thread()) == (where == "caller"):
            raise error

    before = threading.active_count()
    with pytest.raises(error):
        spread(job, (HEADS,), SPREAD)
    assert threading.active_count() == before
    threads(CORES)


def script(body):
    """Run a script in a process of its own."""
    begin = """
        import atexit, os, sys, threading
        import numpy as np
        import hla
        from hla.kernels.numpy import threads as numpy_threads
        numpy_threads.cores, numpy_threads._controller = lambda: 3, lambda: None
        q, k, v = np.random.default_rng(0).standard_normal((3, 6, 200, 32))
        want = hla.scan(q, k, v)
    """
    code = textwrap.dedent(begin) + textwrap.dedent(body)
    clean = {n: x for n, x in environment().items() if n not in numpy_threads.LIMITS}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_all_threads_though_its_parent_was_using_them():
    out = script("""
        begun, done = threading.Barrier(4), threading.Event()
        def job(part, held):
            if not held:
                held["begun"] = True
                begun.wait(20)
                done.wait(20)
        busy = threading.Thread(target=numpy_threads.spread, args=(job, (6,), numpy_threads.SPREAD))
        busy.start()
        begun.wait(20)
        child = os.fork()
        if child == 0:
            np.testing.assert_array_equal(hla.scan(q, k, v), want)
            with numpy_threads._share(6) as count:
                print(count, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        done.set()
        busy.join()
    """)
    assert out.split() == ["3"]


def test_a_scan_at_the_exit_of_python_is_right():
    """No thread can be started there any more."""
    out = script("""
        def last():
            np.testing.assert_array_equal(hla.scan(q, k, v), want)
            print("right")
        atexit.register(last)
    """)
    assert out.split() == ["right"]


def test_calls_too_small_to_spread_look_nothing_up(monkeypatch):
    monkeypatch.setattr(numpy_threads, "_most", lambda: pytest.fail("looked up"))
    small = np.ones((2, 10, 4))
    hla.scan(small, small, small)
