"""The asv suite: one class a workload, driven by the dispatch table, so a new backend joins alone.

Every result is checked against the float64 truth in ``setup``; what this machine lacks and what a
backend refuses raises NotImplementedError there, which asv shows as skipped. HLA_BENCH_QUICK=1
takes one operator at a small size on the host, to see that the suite runs.
"""

import os
import statistics

from hla.bench import measure, peers, workloads

QUICK = os.environ.get("HLA_BENCH_QUICK", "0") != "0"
SIZE = {"tokens": 256, "heads": 2, "width": 16} if QUICK else {}
OPERATORS = workloads.OPERATORS[: 1 if QUICK else None]
TARGETS = {str(t): t for t in workloads.targets() if not (QUICK and t.accelerator)}
PEERS = tuple(peers.PEERS)


def case(operator, **changes):
    """Return the case of an operator: one sequence, 8 heads, T = 4096, D = V = 64, float32."""
    return workloads.Case(operator, **{**SIZE, **changes})


def prepare(workload, target, operator, **changes):
    """Return the checked, warm call of one backend."""
    one = workloads.work(TARGETS[target], workload, case(operator, **changes))
    workloads.checked(one)
    return one.run


def prepare_peer(name, workload, target, operator):
    """Return the checked, warm call of a peer on the same kind of device."""
    one = peers.peer(name, workload, case(operator), TARGETS[target].accelerator)
    workloads.checked(one)
    return one.run


def seconds(**calls):
    """Return median seconds of several calls in this process, one after the other, in turns."""
    budget, rounds = (0.01, 1) if QUICK else (1.0, 3)
    taken = measure.measure(calls, budget, rounds)
    return {name: statistics.median(times) for name, times in taken.items()}
