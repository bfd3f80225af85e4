"""The CuPy backend's kernels on the host, for NumPy arrays: their text, compiled by g++.

This module is a backend: `pytest` fixtures put it into the table of backends by its name.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading

import array_api_compat.numpy as xp
import numpy as np

from hla.contract import Capabilities, Machine
from hla.kernels.cupy.launch import Card
from hla.kernels.cupy.run import Library, Memory
from hla.kernels.cupy.source import source

NAME = "cuda on the host"
CARD = Card(0, (8, 0), 4, 227 << 10)
CAPABILITIES = Capabilities(
    ("float16", "bfloat16", "float32"), libraries=("numpy",), forms=("chunked",), packed=True
)
COMPILER = shutil.which("g++")
HEADERS = threading.Lock()
TWINS = {"ptx.cuh": "cuda_host.cuh", "warpgroup.cuh": "hopper_host.cuh"}  # of included files


COMMAND = ["-std=c++17", "-O0", "-w", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]


@functools.cache
def _folder():
    """Where what g++ made is kept, for other processes too: each file is there when it is whole."""
    given = os.environ.get("HLA_CUDA_HOST_CACHE")
    return pathlib.Path(given or tempfile.mkdtemp(prefix="hla-cuda-host"))


@functools.cache
def _version():
    return subprocess.check_output([COMPILER, "--version"], text=True)


def compiled(text, end, *arguments):
    """The file that g++ makes of a text, once for a text and a g++."""
    key = "\n".join((_version(), *COMMAND, *map(str, arguments), text))
    at = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{end}"
    if not at.exists():
        with tempfile.TemporaryDirectory(dir=at.parent) as own:  # kernels are loaded side by side
            given, made = (pathlib.Path(own, x) for x in ("kernel.h", "made"))
            given.write_text(text)
            command = [COMPILER, *COMMAND, *arguments, given, "-o", made]
            subprocess.run(command, check=True)
            made.replace(at)
    return at


@functools.cache
def _headers():
    """What the twins include, compiled once: a third of a kernel's time."""
    texts = [pathlib.Path(__file__).with_name(x).read_text() for x in TWINS.values()]
    text = "\n".join(re.findall("#include <.*>", "\n".join(texts))) + "\n"
    made = compiled(text, ".h.gch", "-x", "c++-header")
    return made.with_suffix("")  # by which g++ finds it


@functools.cache
def _library(name, constants, card):
    """The C function (grid, threads, argument) of a kernel."""
    here = pathlib.Path(__file__).parent
    text = source(name, dict(constants), {n: (here / x).read_text() for n, x in TWINS.items()})
    kind = re.search(r"\w+_kernel\(const __grid_constant__ (\w+) p\)", text)[1]
    kernel = f"{name.removesuffix('.cu')}_kernel"
    text += f"""
static {kind} argument;
static void call() {{ {kernel}(argument); }}
extern "C" void launch(unsigned grid, unsigned threads, const void* p) {{
    memcpy(&argument, p, sizeof(argument));
    for (unsigned i = 0; i < grid; i++) run_block(i, threads, call);
}}
extern "C" int size() {{ return sizeof(argument); }}
"""
    with HEADERS:
        headers = _headers()
    built = compiled(text, ".so", "-shared", "-include", headers, "-x", "c++")
    return ctypes.CDLL(str(built))


LAUNCHES = []  # constants of each


def load(name, constants, shared, card):
    """A kernel as the launcher calls it."""
    assert shared <= card.shared
    library = _library(name, tuple(constants.items()), card)

    def run(grid, block, arguments, shared_mem):
        (argument,) = arguments
        assert argument.nbytes == library.size()
        LAUNCHES.append((name, constants))
        library.launch(grid[0], block[0], argument.ctypes.data_as(ctypes.c_void_p))

    return run


def empty(shape, strides, dtype, card):
    """Poisoned memory that lies as it is told to."""
    size = max(1, 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    aligned = np.full(size * dtype.itemsize + 64, 0xFF, np.uint8)
    at = -aligned.ctypes.data % 64
    whole = aligned[at : at + size * dtype.itemsize].view(dtype)
    steps = [dtype.itemsize * s for s in strides]
    return np.lib.stride_tricks.as_strided(whole, shape, steps)


def room(size, card):
    found = empty((size,), (1,), np.dtype(np.uint8), card)
    return found, found.ctypes.data


def view(x, shape, strides):
    steps = [x.itemsize * s for s in strides]
    return np.lib.stride_tricks.as_strided(x, shape, steps)


def dtype(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def hosted(card):
    """Return the calls of the backend, of a GPU of such a kind."""
    return Library(
        Memory(
            xp, load, lambda x: card, empty, view,
            lambda value, shape, dtype, card: np.broadcast_to(np.asarray(value, dtype), shape),
            dtype, lambda x: x.ctypes.data,
            lambda card, function: function(), room,
        )
    )  # fmt: skip


HOSTED = hosted(CARD)
forward, backward, step = HOSTED.forward, HOSTED.backward, HOSTED.step
again_forward, again_backward = HOSTED.again_forward, HOSTED.again_backward
again_step = HOSTED.steps.again


def machine():
    return Machine("" if COMPILER else "there is no g++")
