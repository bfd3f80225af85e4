"""The instructions that Numba has no name for, as device functions in CUDA C++.

A kernel is written for an `Instructions`: that of a compiler here, or a twin that the simulator
calls. Functions on blocks take and give tuples, whose elements only these functions know.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from numba import cuda, types

from ..cupy.source import defines, whole

Constants = Mapping[str, Any]
f32, f64, i32, i64, u32 = types.float32, types.float64, types.int32, types.int64, types.uint32


class Text(NamedTuple):
    """A kernel in Python: what makes it, and the words of its arguments in their order.

    Arguments are a named tuple of integers each (its class), an ``int``, a ``float``, or so many
    integers as a tuple; all of 8 bytes. ``macros`` gives those of instructions.cu, ``registers``
    the most that a thread may have, which those of a block share.
    """

    make: Callable[[Constants, Any], Callable[..., None]]
    arguments: tuple[Any, ...]
    macros: Callable[[Constants], Constants] = lambda constants: {}
    registers: Callable[[Constants], int] = lambda constants: 255


DEFAULTS: Constants = {
    "NARROW": 0, "PARTS": 1, "ADD": 0, "TYPE_O": 2, "SUM_TYPE": "float", "PITCH_1": 8, "PITCH_2": 8,
    "PITCH_3": 8,
}  # fmt: skip


class Instructions:
    """The functions of instructions.cu, for the constants of one kernel."""

    f32, f64, i32, i64, u32 = f32, f64, i32, i64, u32
    device = staticmethod(functools.partial(cuda.jit, device=True))

    def __init__(self, constants: Constants) -> None:
        constants = {**DEFAULTS, **constants}
        dot = f32 if constants["SUM_TYPE"] == "float" else f64
        words = 4 if constants["NARROW"] else 8 * constants["PARTS"]
        block, sums = types.UniTuple(u32, words), types.UniTuple(f32, 8)
        at = block(i32, i32)
        for name, signature in {
            "load": at, "load_turned": at, "second": at, "second_turned": at,
            "multiply": sums(*[f32] * 8, *[u32] * (2 * words)), "block_of": block(*[f32] * 8),
            "weighed": block(*[f32] * 4, *[u32] * words), "power_of_2": f32(f32),
            "threads_sync": i32(i32, i32),
            "value": f32(i32), "put_value": i32(i32, f32), "put_pair": i32(i32, f32, f32),
            "number": f32(i32), "put_number": i32(i32, f32),
            "numbers": types.UniTuple(f32, 4)(i32), "put_numbers": i32(i32, f32, f32, f32, f32),
            "dot_at": dot(i32), "put_dot": i32(i32, dot),
            "copy16": i32(i32, i64, i32), "widen8": i32(i32, i64, i64, i32),
            "copies_commit": i32(), "copies_wait": i32(i32), "syncwarp": i32(),
            "put_out": i32(i32, f32, f32), "out": f32(i32), "leave16": i32(i64, i32),
            "get": f32(i64, i64, i64), "put": i32(i64, i64, i64, f64),
            "load4": types.UniTuple(f32, 4)(i64), "store4": i32(i64, f32, f32, f32, f32),
            "get64": f64(i64, i64, i64), "put64": i32(i64, i64, i64, f64),
            "get_block": sums(i64, i64, i64, i64, i32, i32),
            "put_block": i32(i64, i64, i64, i64, i32, i32, *[f32] * 8),
            "keep_block": i32(i64, i64, f32, *[f32] * 8), "meet_block": f32(i64, i64, *[f32] * 8),
            "up": f64(f64, i32), "of_lane": f64(f64, i32), "across": dot(dot, i32),
        }.items():  # fmt: skip
            setattr(self, name, cuda.declare_device(f"hla_{name}", signature))
        self.dot = dot


def source(constants: Constants) -> str:
    """Return the text of the functions, for the constants of one kernel."""
    text = importlib.resources.files(__package__).joinpath("instructions.cu")
    return defines({**DEFAULTS, **constants}) + whole(text.read_text(encoding="utf-8"))
