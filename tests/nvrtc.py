"""Compile CUDA C++ by NVRTC, without a GPU and without CuPy."""

import ctypes
import functools
import re
from importlib import metadata
from typing import NamedTuple

import pytest


class Compiled(NamedTuple):
    log: str
    cubin: bytes

    @property
    def registers(self) -> int:
        return int(re.search(r"Used (\d+) registers", self.log)[1])

    @property
    def spills(self) -> int:
        """Bytes that are stored."""
        return int(re.search(r"(\d+) bytes spill stores", self.log)[1])

    @property
    def remarks(self) -> list[str]:
        """Remarks of the assembler about wgmma: C7510, serialised; C7519, a wait injected."""
        return re.findall(r"C75\d\d", self.log)


@functools.cache
def library():
    """NVRTC as pip installs it; skips where it is not."""
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    found = {x.name: x.locate() for x in files if ".so" in x.name and ".alt." not in x.name}
    for _, path in sorted(found.items()):  # builtins first, which the other one looks for
        last = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return last


def compiled(text, *options) -> Compiled:
    """What comes of a source with the options that CuPy gives; fails with the compiler's log."""
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    assert not nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None
    )
    given = ["-std=c++17", *options, "-ftz=true", "--device-as-default-execution-space"]
    given = [x.encode() for x in (*given, "--ptxas-options=-v")]
    array = (ctypes.c_char_p * len(given))(*given)
    failed = nvrtc.nvrtcCompileProgram(program, len(given), array)

    def read(kind):
        assert not getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        assert not getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw

    log = read("ProgramLog").decode().rstrip("\0")
    assert not failed, log
    made = Compiled(log, read("CUBIN"))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return made
