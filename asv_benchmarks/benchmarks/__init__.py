"""The asv suite: one class a workload, driven by the dispatch table, so a new backend joins alone.

Every result is checked against the float64 truth in ``setup``; what this machine lacks and what a
backend refuses raises NotImplementedError there, which asv shows as skipped. HLA_BENCH_QUICK=1
takes one operator at a small size on the host, to see that the suite runs. Of every value less is
better: asv reports each rise as a regression.
"""

import os
import statistics

from hla.bench import measure, peers, workloads

QUICK = os.environ.get("HLA_BENCH_QUICK", "0") != "0"
SMALL = {"tokens": 256, "heads": 2, "width": 16}
LARGE = {"batch": 8, "heads": 16, "width": 128, "dtype": "bfloat16"}
OPERATORS = workloads.OPERATORS[: 1 if QUICK else None]
TARGETS = {str(t): t for t in workloads.targets() if not (QUICK and t.accelerator)}
PEERS = tuple(peers.PEERS)


def case(target, operator, **changes):
    """Return the case of an operator, T = 4096.

    On the host one sequence, 8 heads, D = V = 64, float32; on an accelerator `LARGE`.
    """
    size = SMALL if QUICK else LARGE if TARGETS[target].accelerator else {}
    return workloads.Case(operator, **{**size, **changes})


def prepare(workload, target, operator, **changes):
    """Return the checked, warm call of one backend."""
    one = workloads.work(TARGETS[target], workload, case(target, operator, **changes))
    workloads.checked(one)
    return one.run


def prepare_peer(name, workload, target, operator):
    """Return the checked, warm call of a peer on the same kind of device."""
    one = peers.peer(name, workload, case(target, operator), TARGETS[target].accelerator)
    workloads.checked(one)
    return one.run


def seconds(**calls):
    """Return median seconds of several calls in this process, one after the other, in turns.

    By their libraries' meters where all of them have one, else by the host's clock.
    """
    budget, rounds = (0.01, 1) if QUICK else (1.0, 3)
    events = all(call.lib.meter for call in calls.values())
    taken = measure.measure(calls, budget, rounds, events=events)
    return {name: statistics.median(times) for name, times in taken.items()}
