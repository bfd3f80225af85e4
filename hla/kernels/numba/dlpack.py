"""Arrays handed over and taken by DLPack, in the structs of its C interface.

Numba reads DLPack without ordering streams; here each side waits for the other's.
"""

from __future__ import annotations

import ctypes
from typing import Any

from . import package, streams
from .package import dtype_of

CPU, CUDA = 1, 2
CODES = {"bool": 6, "int64": 0, "bfloat16": 4, "float16": 2, "float32": 2, "float64": 2}
NAMES = {(6, 8): "bool", (0, 64): "int64", (4, 16): "bfloat16", (2, 16): "float16",
         (2, 32): "float32", (2, 64): "float64"}  # fmt: skip
NAME = b"dltensor"  # of a capsule that nobody has taken


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


def _python(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_pointer = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_pointer_of = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_valid = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_lent: dict[int, tuple[Any, ...]] = {}  # what stays until its taker deletes it, by address


def _delete(managed: int) -> None:
    _lent.pop(managed, None)


def _drop(capsule: int) -> None:
    if _valid(capsule, NAME):  # not taken
        _lent.pop(_pointer_of(capsule, NAME), None)


_deleter, _destructor = map(ctypes.CFUNCTYPE(None, ctypes.c_void_p), (_delete, _drop))
for _function in (_deleter, _destructor):  # takers may outlive this module
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_function))


def device(x: Any) -> tuple[int, int]:
    """Return kind and number of x's device."""
    return (CPU if package.SIMULATED else CUDA), x.device


def capsule(x: Any) -> Any:
    """Return a capsule of x's memory."""
    kind, size = str(x.dtype), x.dtype.itemsize
    shape = (ctypes.c_int64 * max(x.ndim, 1))(*x.shape)
    strides = (ctypes.c_int64 * max(x.ndim, 1))(*(s // size for s in x.strides))
    found = Managed()
    t = found.tensor
    t.data, t.ndim, t.lanes = x.address, x.ndim, 1
    t.device[:] = device(x)
    t.code, t.bits = CODES[kind], 8 * size
    t.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    t.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
    found.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    at = ctypes.addressof(found)
    _lent[at] = found, shape, strides, x
    return _new(at, NAME, ctypes.cast(_destructor, ctypes.c_void_p))


def taken(x: Any) -> tuple[Any, int, Any, Any, Any, int]:
    """Return owner, address, shape, strides (None: in order), dtype and device of another's array.

    The current stream waits for work on it.
    """
    kind, number = x.__dlpack_device__()
    if int(kind) != (CPU if package.SIMULATED else CUDA):
        raise BufferError(f"an array on a device of DLPack's kind {int(kind)}; expected a GPU")
    found = x.__dlpack__() if package.SIMULATED else x.__dlpack__(stream=streams.current())
    t = Managed.from_address(_pointer(found, NAME)).tensor
    name = NAMES.get((t.code, t.bits))
    if name is None or t.lanes != 1:
        raise BufferError(f"elements of kind {t.code} with {t.bits} bits are not computed with")
    dtype, shape = dtype_of(name), tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] * dtype.itemsize for i in range(t.ndim)) if t.strides else None
    return found, (t.data or 0) + t.offset, shape, strides, dtype, number
