"""What the package costs beyond arithmetic: import time and memory."""

from hla.bench.measure import ROOT, memory_of
from hla.bench.workloads import work

from . import QUICK, TARGETS, case

LENGTHS = (64, 256) if QUICK else (4096, 65536)


class Import:
    """`import hla` in a fresh interpreter."""

    def timeraw_import_hla(self):
        return "import hla", f"import sys; sys.path.insert(0, {ROOT!r})"


class PeakMemory:
    """Peak memory of the process, the library and the inputs included, without any check."""

    params = (tuple(TARGETS), LENGTHS)
    param_names = ("target", "tokens")

    def setup(self, target, tokens):
        self.run = work(TARGETS[target], "forward", case("hla2", tokens=tokens)).run

    def peakmem_inputs(self, target, tokens):
        pass

    def peakmem_scan(self, target, tokens):
        self.run()


class MemoryBeyond:
    """Memory that a forward call takes beyond its inputs and output, in a process of its own."""

    params = (tuple(TARGETS), LENGTHS)
    param_names = ("target", "tokens")

    def setup(self, target, tokens):
        self.beyond = memory_of(TARGETS[target], case("hla2", tokens=tokens))

    def track_bytes_beyond(self, target, tokens):
        return self.beyond

    track_bytes_beyond.unit = "bytes"
