"""Time of one token, and of the calls whose work is less than that to start it."""

from hla.bench.workloads import CALL, HOST, checked, work

from . import OPERATORS, TARGETS, prepare


class Step:
    """`hla.step` from the state that a scan left; the state is not donated."""

    params = (tuple(TARGETS), OPERATORS)
    param_names = ("runs on", "operator")

    def setup(self, target, operator):
        self.run = prepare("step", target, operator)

    def time_step(self, target, operator):
        self.run()


class HostTime:
    """Python's time of a short call: until it has returned, not until the work is done."""

    params = (tuple(TARGETS), OPERATORS, HOST)
    param_names = ("runs on", "operator", "workload")

    def setup(self, target, operator, workload):
        one = work(TARGETS[target], workload, CALL._replace(operator=operator))
        checked(one)
        self.run = one.run

    def time_call(self, target, operator, workload):
        self.run()
