"""Times over a peer's and over the floor, both measured in one process, in turns."""

from hla.bench.peers import BOTH_WAYS, floor

from . import OPERATORS, PEERS, TARGETS, case, prepare, prepare_peer, seconds


class OverPeer:
    """A time over the peer's: below 1 hla is faster."""

    params = (tuple(TARGETS), OPERATORS, PEERS)
    param_names = ("runs on", "operator", "peer")
    workload = "forward"

    def setup(self, target, operator, peer):
        self.other = prepare_peer(peer, self.workload, target, operator)
        self.run = prepare(self.workload, target, operator)

    def track_time_over_peer(self, target, operator, peer):
        taken = seconds(this=self.run, peer=self.other)
        return taken["this"] / taken["peer"]

    track_time_over_peer.unit = "of the peer's time"


class BackwardOverPeer(OverPeer):
    """The same, forward + backward."""

    params = (tuple(TARGETS), OPERATORS, ("torch SDPA", "FLA", "jax SDPA", "jnp chunks"))
    workload = "forward + backward"


class StepOverPeer(OverPeer):
    """The same, one token; softmax has T cached keys and values, lines are bare array code."""

    params = (tuple(TARGETS), OPERATORS, ("torch SDPA", "NumPy lines", "jnp lines", "torch lines"))
    workload = "step"


class OverFloor:
    """The time over the least that the machine's own matrix rate allows: at least 1."""

    params = (tuple(TARGETS), OPERATORS, BOTH_WAYS)
    param_names = ("runs on", "operator", "workload")

    def setup(self, target, operator, workload):
        self.run = prepare(workload, target, operator)
        place = TARGETS[target]
        self.floor = floor(case(target, operator).dtype, place.library, place.accelerator)

    def track_time_over_floor(self, target, operator, workload):
        calls = {"this": self.run, "product": self.floor.product}
        if self.floor.copy is not None:
            calls["copy"] = self.floor.copy
        taken = seconds(**calls)
        rates = taken["product"], taken.get("copy", 0.0)
        return taken["this"] / self.floor.seconds(workload, case(target, operator), *rates)

    track_time_over_floor.unit = "of the floor's time"
