"""Compile a kernel in Python, with its instructions, to machine code: no GPU is needed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import os
import pathlib
import threading
from typing import Any

import numba
from cuda.bindings import nvjitlink, nvrtc
from numba import cuda, types

from .instructions import Constants, Instructions, Text, source


def signature(text: Text) -> Any:
    """Return the type of a kernel."""
    return types.void(*map(_type, text.arguments))


def _type(argument: Any) -> Any:
    if argument is int or argument is float:
        return types.int64 if argument is int else types.float64
    if isinstance(argument, int):
        return types.UniTuple(types.int64, argument)
    return types.NamedUniTuple(types.int64, len(argument._fields), argument)


def kept(name: str, text: Text, constants: Constants, capability: tuple[int, int]) -> bytes:
    """Return a kernel of that name as a cubin, from the disk where it was compiled before.

    Files are in the folder of Numba's cache, or the
    user's; what cannot be read or written there is done without.
    """
    whole = [*sources(), name, repr(sorted(constants.items())), repr(capability), versions()]
    key = hashlib.sha256("\0".join(whole).encode()).hexdigest()
    file = folder() / f"{name}-{key[:32]}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        code = machine_code(text, constants, capability)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        part.write_bytes(code)
        part.replace(file)
    return code


def folder() -> pathlib.Path:
    """Return where compiled kernels are kept."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    user = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(given or user) / "hla-numba"


@functools.cache
def sources() -> tuple[str, ...]:
    """Return every text that a kernel is made of."""
    here = importlib.resources.files(__package__)
    names = ("between", "causal", "elements", "fused", "gate", "instructions", "build", "step")
    return (*(here.joinpath(f"{x}.py").read_text(encoding="utf-8") for x in names), source({}))


@functools.cache
def versions() -> str:
    """Return what compiles."""
    return f"numba {numba.__version__}, NVRTC {nvrtc.nvrtcVersion()[1:]}"


def machine_code(
    text: Text, constants: Constants, capability: tuple[int, int], *options: str
) -> bytes:
    """Return a kernel with such constants as a cubin."""
    macros, arch = text.macros(constants), "{}{}".format(*capability)
    kernel = text.make(constants, Instructions(macros))
    code, _ = cuda.compile(
        kernel, signature(text), device=False, cc=capability, output="ltoir", abi="numba"
    )
    parts = [code, instructions(source(macros), arch)]
    return linked(parts, arch, text.registers, *options)


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
