"""Medians as `hla bench` takes them: its committed results enter here (../publish.py)."""

from hla.bench.peers import GPU, PEERS, peer
from hla.bench.workloads import Case, checked

from . import LARGE, OPERATORS, QUICK, TARGETS, prepare, seconds

BESIDE = () if QUICK else tuple(name for name in PEERS if GPU in PEERS[name].places)


class Forward:
    """`hla.scan`, or a peer: on a GPU between device events, of JAX's arrays in a queue of calls.

    On the host by its clock; peers are timed on a GPU alone.
    """

    params = (*TARGETS, *BESIDE), OPERATORS
    param_names = ("runs on", "operator")
    workload = "forward"

    def setup(self, name, operator):
        if name in TARGETS:
            self.run = prepare(self.workload, name, operator)
        else:
            one = peer(name, self.workload, Case(operator, **LARGE), GPU)
            checked(one)
            self.run = one.run

    def track_median(self, name, operator):
        return 1e3 * seconds(this=self.run)["this"]

    track_median.unit = "ms"


class ForwardBackward(Forward):
    """The same, forward + backward."""

    workload = "forward + backward"


class Step(Forward):
    """The same, one token; softmax attention has T cached keys and values."""

    workload = "step"
