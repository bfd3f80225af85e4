"""Time of whole sequences: forward, forward + backward, under gates, and growth with T."""

from hla.bench.workloads import GATES

from . import OPERATORS, QUICK, TARGETS, prepare


class Forward:
    """`hla.scan`."""

    params = (tuple(TARGETS), OPERATORS)
    param_names = ("runs on", "operator")

    def setup(self, target, operator):
        self.run = prepare("forward", target, operator)

    def time_scan(self, target, operator):
        self.run()


class ForwardBackward:
    """`hla.scan` and the gradients of q, k and v, by the library's own autograd or `hla.vjp`."""

    params = (tuple(TARGETS), OPERATORS)
    param_names = ("runs on", "operator")

    def setup(self, target, operator):
        self.run = prepare("forward + backward", target, operator)

    def time_scan_and_gradients(self, target, operator):
        self.run()


class Gates:
    """`hla.scan` of hla2 with a decay, and with a gate for every token."""

    params = (tuple(TARGETS), GATES[1:])
    param_names = ("runs on", "gate")

    def setup(self, target, gate):
        self.run = prepare("forward", target, "hla2", gate=gate)

    def time_scan(self, target, gate):
        self.run()


class Growth:
    """`hla.scan` of hla2 with one head, up to a million tokens: time should grow as T does."""

    params = (tuple(TARGETS), (64, 256) if QUICK else tuple(4**n for n in range(4, 11)))
    param_names = ("runs on", "tokens")

    def setup(self, target, tokens):
        self.run = prepare("forward", target, "hla2", tokens=tokens, heads=1, batch=1)

    def time_scan(self, target, tokens):
        self.run()
