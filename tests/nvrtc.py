"""Compile CUDA C++ by NVRTC, without a GPU and without CuPy."""

import ctypes
import functools
import pathlib
import re
import subprocess
import tempfile
from importlib import metadata
from typing import NamedTuple

import pytest
from conftest import installed


class Compiled(NamedTuple):
    log: str
    cubin: bytes
    ptx: str

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

    @property
    def dropped(self) -> int:
        """Products of warpgroups that the assembler has left out."""
        code = disassembled(self.cubin)
        return self.ptx.count("wgmma.mma_async") - len(re.findall(r"HGMMA\.\S+ R\d", code))


def disassembled(cubin) -> str:
    """What the disassembler in Triton's wheel prints of a kernel; skips where there is none."""
    triton = installed("triton")
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True).stdout


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
    made = Compiled(log, read("CUBIN"), read("PTX").decode())
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return made
