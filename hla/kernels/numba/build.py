"""Compile a kernel in Python, with its instructions, to machine code: no GPU is needed.

Numba's own work, most of the seconds that a kernel takes, is Python behind one lock. So what is
asked for while this process compiles is compiled by others, as long as cores are idle.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.resources
import os
import pathlib
import subprocess
import sys
import threading
import types as python
from collections.abc import Iterator
from typing import Any

import numba
from cuda.bindings import nvjitlink, nvrtc
from numba import cuda, types

from ..numpy.threads import cores
from . import package
from .device import TEXTS
from .instructions import Constants, Instructions, Text, source

try:
    import fcntl
except ImportError:  # where there is none, processes may compile a kernel each
    fcntl = None  # type: ignore[assignment]

CHILD = "from hla.kernels.numba import build; build.answer()"
SECONDS = 300  # that another process may take
_here = threading.Lock()  # held while this process compiles
_others = threading.BoundedSemaphore(8)  # processes of some 300 MB


def signature(text: Text) -> Any:
    """Return the type of a kernel."""
    return types.void(*map(_type, text.arguments))


def _type(argument: Any) -> Any:
    if argument is int or argument is float:
        return types.int64 if argument is int else types.float64
    if isinstance(argument, int):
        return types.UniTuple(types.int64, argument)
    return types.NamedUniTuple(types.int64, len(argument._fields), argument)


def kept(name: str, constants: Constants, capability: tuple[int, int]) -> bytes:
    """Return a kernel of that name as a cubin, from the disk where it was compiled before.

    Files are in the folder of Numba's cache, or the
    user's; what cannot be read or written there is done without.
    """
    whole = [*sources(), name, repr(sorted(constants.items())), repr(capability), versions()]
    key = hashlib.sha256("\0".join(whole).encode()).hexdigest()
    file = folder() / f"{name}-{key[:32]}.cubin"
    with contextlib.suppress(OSError):
        return file.read_bytes()
    with alone(file.with_suffix(".lock")):
        with contextlib.suppress(OSError):  # another process has compiled it meanwhile
            return file.read_bytes()
        code = compiled(name, constants, capability)
        with contextlib.suppress(OSError):
            part = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            part.write_bytes(code)
            part.replace(file)
    return code


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
    """Context that one process at a time is in, where such a file can be locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            path.unlink()


def compiled(name: str, constants: Constants, capability: tuple[int, int]) -> bytes:
    """Compile a kernel here, in another process while this one compiles."""
    code = b""
    if not _here.acquire(blocking=False):
        with _others:
            if idle():
                code = asked(name, constants, capability)
        if code:
            return code
        _here.acquire()
    try:
        return machine_code(name, constants, capability)
    finally:
        _here.release()


def idle() -> bool:
    """Whether this process has cores that nothing runs on."""
    return os.getloadavg()[0] < cores() if hasattr(os, "getloadavg") else True


def asked(name: str, constants: Constants, capability: tuple[int, int]) -> bytes:
    """Compile a kernel by another process; return nothing where that cannot be."""
    path = os.pathsep.join(filter(None, sys.path))
    own = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "NUMBA_ENABLE_CUDASIM": "0"}
    text = repr((name, dict(constants), capability)).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD], input=text, capture_output=True, env=own, timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return b""
    return b"" if done.returncode else done.stdout


def answer() -> None:
    """Compile the kernel that is asked for, and write it: all that such a process does."""
    name, constants, capability = ast.literal_eval(sys.stdin.read())
    without_device(capability)
    sys.stdout.buffer.write(machine_code(name, constants, capability))


def without_device(capability: tuple[int, int]) -> None:
    """Let Numba compile device functions for such a GPU, with none here."""
    from numba.cuda import dispatcher

    card = python.SimpleNamespace(compute_capability=capability)
    dispatcher.get_current_device = lambda: card


def folder() -> pathlib.Path:
    """Return where compiled kernels are kept."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    user = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(given or user) / "hla-numba"


@functools.cache
def sources() -> tuple[str, ...]:
    """Return every text that a kernel is made of."""
    here = importlib.resources.files(__package__)
    names = (
        "backward", "between", "build", "causal", "chunks", "elements", "fused", "gate",
        "instructions", "step",
    )  # fmt: skip
    return (*(here.joinpath(f"{x}.py").read_text(encoding="utf-8") for x in names), source({}))


@functools.cache
def versions() -> str:
    """Return what compiles."""
    return f"numba {numba.__version__}, {package.version()}, NVRTC {nvrtc.nvrtcVersion()[1:]}"


def machine_code(
    name: str, constants: Constants, capability: tuple[int, int], *options: str
) -> bytes:
    """Return a kernel with such constants as a cubin."""
    text = TEXTS[name]
    macros, arch = text.macros(constants), "{}{}".format(*capability)
    kernel = text.make(constants, Instructions(macros))
    code, _ = cuda.compile(
        kernel, signature(text), device=False, cc=capability, output="ltoir", abi="numba"
    )
    parts = [code, instructions(source(macros), arch)]
    return linked(parts, arch, text.registers(constants), *options)


def instructions(text: str, arch: str) -> bytes:
    """Compile CUDA C++ for linking."""
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"instructions.cu", 0, [], [])
    options = [f"--gpu-architecture=compute_{arch}".encode(), b"-dlto", b"-rdc=true", b"-std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error.value:
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode())
    size = nvrtc.nvrtcGetLTOIRSize(program)[1]
    found = bytes(size)
    nvrtc.nvrtcGetLTOIR(program, found)
    nvrtc.nvrtcDestroyProgram(program)
    return found


def linked(parts: list[bytes], arch: str, registers: int, *options: str) -> bytes:
    """Link parts of a program, and optimise it as one."""
    given = [f"-arch=sm_{arch}", "-lto", "-O3", f"-maxrregcount={registers}", *options]
    linker = nvjitlink.create(len(given), given)
    try:
        for i, part in enumerate(parts):
            nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, part, len(part), f"part {i}")
        nvjitlink.complete(linker)
        if options:
            size = nvjitlink.get_info_log_size(linker)
            log = bytearray(size)
            nvjitlink.get_info_log(linker, log)
            print(log.decode())
        found = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, found)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(linker))
        nvjitlink.get_error_log(linker, log)
        raise RuntimeError(log.decode()) from error
    finally:
        nvjitlink.destroy(linker)
    return bytes(found)
