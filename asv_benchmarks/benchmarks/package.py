"""What the package costs beyond arithmetic: import time and memory."""

from hla.bench.measure import ROOT, memory_of
from hla.bench.peers import BOTH_WAYS
from hla.bench.workloads import checked, work

from . import OPERATORS, QUICK, TARGETS, case

LENGTHS = (64, 256) if QUICK else (4096, 65536)


def sequence(target, tokens):
    """Return the case of one sequence."""
    return case(target, "hla2", tokens=tokens, batch=1)


class Import:
    """`import hla` in a fresh interpreter."""

    def timeraw_import_hla(self):
        return "import hla", f"import sys; sys.path.insert(0, {ROOT!r})"


class PeakMemory:
    """Peak memory of the process, the library and the inputs included, without any check."""

    params = (tuple(TARGETS), LENGTHS)
    param_names = ("runs on", "tokens")

    def setup(self, target, tokens):
        self.run = work(TARGETS[target], "forward", sequence(target, tokens)).run

    def peakmem_inputs(self, target, tokens):
        pass

    def peakmem_scan(self, target, tokens):
        self.run()


class MemoryBeyond:
    """Host memory that a forward call takes beyond inputs and output, in a process of its own."""

    params = (tuple(TARGETS), LENGTHS)
    param_names = ("runs on", "tokens")

    def setup(self, target, tokens):
        self.beyond = memory_of(TARGETS[target], sequence(target, tokens))

    def track_bytes_beyond(self, target, tokens):
        return self.beyond

    track_bytes_beyond.unit = "bytes"


class DeviceMemoryBeyond:
    """Device memory that a call takes at its peak beyond inputs, outputs and gradients."""

    params = (tuple(TARGETS), OPERATORS, BOTH_WAYS)
    param_names = ("runs on", "operator", "workload")

    def setup(self, target, operator, workload):
        size = case(target, operator)
        one = work(TARGETS[target], workload, size)
        if one.run.lib.meter is None:
            raise NotImplementedError("only torch on a GPU tells its peak memory")
        checked(one)
        self.beyond = one.run.lib.meter.bytes_beyond(one.run.start) / size.bytes

    def track_tensors_beyond(self, target, operator, workload):
        return self.beyond

    track_tensors_beyond.unit = "tensors of q's size"
