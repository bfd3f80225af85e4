"""Time of one token."""

from . import OPERATORS, TARGETS, prepare


class Step:
    """`hla.step` from the state that a scan left; the state is not donated."""

    params = (tuple(TARGETS), OPERATORS)
    param_names = ("target", "operator")

    def setup(self, target, operator):
        self.run = prepare("step", target, operator)

    def time_step(self, target, operator):
        self.run()
