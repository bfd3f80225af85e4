"""Device arrays of Numba, and of whatever has the CUDA Array Interface and no library of its own.

A call is made of `kernels.numba.array.Array`s of their memory, which have the operators that
Numba's lack, on the stream that the interface names. Results are device arrays of Numba.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import namespace
from ..core.namespace import Array
from ..kernels.numba import blocks, package, streams
from .generic import Generic

if TYPE_CHECKING:
    from ..kernels.numba import array

NUMBERS = 256  # that are kept on a device
PLAIN = frozenset((type(None), bool, int, float, str))
KINDS = 1024  # of results, of each of which one is kept without memory


class Interface:
    """What has the memory of an array, which it keeps alive, as NumPy and Numba read it."""

    def __init__(self, x: array.Array, stream: int | None) -> None:
        self.array = x
        typestr = f"<u{x.dtype.itemsize}" if x.dtype.kind == "V" else x.dtype.str
        found: dict[str, Any] = {"shape": x.shape, "strides": x.strides, "data": (x.address, False)}
        found |= {"typestr": typestr, "version": 3}
        if package.SIMULATED:
            self.__array_interface__ = found
        else:
            self.__cuda_array_interface__ = found | {"stream": stream}


class Numba(Generic):
    """Memory on a device, with no namespace: calls are made of `Arrays` of it."""

    @property
    def borrowed(self) -> bool:
        """Whether Numba is here to compute with it."""
        return bool(package.installed())

    def irregular(self, x: Array) -> tuple[str, str]:
        """Tell that nothing computes with it."""
        what = (
            "has memory of a GPU, which hla computes with where numba-cuda is installed, and beside"
            " arrays of that kind alone"
        )
        return what, 'pip install ".[numba]" in a checkout of hla; or cupy.asarray(x)'

    def lent(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function with arrays that are computed with; return device arrays.

        Work is put on the stream of the first array that names one, which waits for those of
        others.
        """
        own = namespace.adapter("numba", None)  # which makes the arrays' namespace known
        found = list[int]()

        def into(x: Array) -> Array:
            stream, x = read(x)
            if stream and stream not in found:
                found.append(stream)
            return x

        given = _each(self, into, args), _each(self, into, tuple(options.values()))
        stream = found[0] if found else streams.DEFAULT
        for other in found[1:]:
            blocks.wait(stream, other)
        with streams.on(stream):
            back = functools.partial(made, stream=found[0] if found else None)
            result = function(*given[0], **dict(zip(options, given[1], strict=True)))
            return _each(own, back, result, functools.partial(functools.partial, self.lent))


def read(x: Array) -> tuple[int | None, array.Array]:
    """Return the stream that an array names, and an array of its memory."""
    Array = _arrays().Array
    if package.SIMULATED:
        values = x._ary
        return None, Array(x, values.ctypes.data, values.shape, values.strides, values.dtype, 0)
    if type(x) is _device_array() and type(x.stream) is int:  # 0: its interface names none
        return None, Array(x, x.device_ctypes_pointer.value or 0, x.shape, x.strides, x.dtype)
    given = x.__cuda_array_interface__
    if given.get("mask") is not None:
        raise TypeError("an array has a mask; expected none. Fill what is masked")
    dtype, own = np.dtype(given["typestr"]), getattr(x, "dtype", None)
    if dtype.kind == "V" and isinstance(own, np.dtype):  # bfloat16 has no letter there
        dtype = own
    shape, strides = tuple(given["shape"]), given.get("strides")
    strides = _arrays().whole(shape, dtype.itemsize) if strides is None else tuple(strides)
    return given.get("stream"), Array(x, given["data"][0] or 0, shape, strides, dtype)


@functools.cache
def _arrays() -> Any:
    from ..kernels.numba import array

    return array


@functools.cache
def _device_array() -> Any:
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    return DeviceNDArray


def made(x: array.Array, stream: int | None) -> Array:
    """Return a device array of Numba, of x's memory; of a copy where x repeats an element.

    One like an earlier one is a copy of it with other memory: to make one anew takes ten times as
    long.
    """
    key = x.shape, x.strides, x.dtype, x.device, stream
    like = _kinds.get(key)
    if like is None:
        if any(n > 1 and s == 0 for n, s in zip(x.shape, x.strides, strict=True)):
            x = _arrays().mapped("copy", x)
        if package.SIMULATED:
            from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

            return FakeCUDAArray(np.asarray(Interface(x, None)).view(x.dtype))
        if len(_kinds) >= KINDS:
            _kinds.clear()
        key = x.shape, x.strides, x.dtype, x.device, stream
        like = _kinds[key] = blocks.inside(x.device, lambda: _kind(x, stream))
    memory, found = like.gpu_data, object.__new__(type(like))
    found.__dict__.update(like.__dict__)
    pointer = type(memory.device_pointer)(x.address)
    found.gpu_data = type(memory)(memory.context, pointer, memory.size, owner=x)
    return found


_kinds: dict[Any, Array] = {}


def _kind(x: array.Array, stream: int | None) -> Array:
    """Return a device array like x, which keeps no memory alive."""
    found = package.cuda.as_cuda_array(Interface(x, stream), sync=False)
    found = found if found.dtype == x.dtype else found.view(x.dtype)
    memory = found.gpu_data
    found.gpu_data = type(memory)(memory.context, memory.device_pointer, memory.size)
    return found


def _each(
    library: Generic, f: Callable[[Array], Any], tree: Any, call: Callable[[Any], Any] | None = None
) -> Any:
    """Apply ``f`` to every array of a library in tuples of tuples, ``call`` to every function."""
    if type(tree) in PLAIN:
        return tree
    if isinstance(tree, tuple):
        found = (_each(library, f, x, call) for x in tree)
        return type(tree)(*found) if hasattr(tree, "_fields") else tuple(found)
    if call is not None and callable(tree):
        return call(tree)
    return f(tree) if namespace.library_of(tree) is library else tree


class Arrays(Generic):
    """Arrays of memory on a device, computed with by Numba's kernels."""

    again = "hla.libraries.plain_again"

    def __init__(self) -> None:
        from ..kernels.numba.standard import xp

        super().__init__("numba", xp)
        self._numbers: dict[Any, Array] = {}

    def key(self, x: Array) -> Any:
        """Return shape, dtype and device."""
        return x.shape, x.dtype, x.device

    def signature(self, x: Array) -> Any:
        """Return shape and dtype."""
        return x.shape, x.dtype

    def alike(self, arrays: Sequence[Array]) -> Callable[[list[Array]], list[int] | None] | None:
        """Return what tells arrays like these: shape, strides, dtype, alignment, device."""
        kind = type(arrays[0])
        if any(type(x) is not kind for x in arrays):
            return None
        same = [(x.shape, x.strides, x.dtype, x.address & 15) for x in arrays]
        device = arrays[0].device

        def addresses(arrays: list[Array]) -> list[int] | None:
            if any(type(x) is not kind for x in arrays):
                return None
            if [(x.shape, x.strides, x.dtype, x.address & 15) for x in arrays] != same:
                return None
            if any(x.device != device for x in arrays):
                return None
            return [x.address for x in arrays]

        return addresses

    def address(self, x: Array) -> int:
        """Return where its memory starts."""
        address: int = x.address
        return address

    def device_name(self, x: Array) -> str:
        """Return the device as torch and JAX name it."""
        return "Numba's simulator" if package.SIMULATED else f"cuda:{x.device}"

    def number(self, value: float, dtype: Any, like: Array) -> Array:
        """Return a number, kept on each stream."""
        key = value, dtype, like.device, self.stream(like)
        if key not in self._numbers:
            if len(self._numbers) >= NUMBERS:
                self._numbers.clear()
            self._numbers[key] = super().number(value, dtype, like)
        return self._numbers[key]

    def on_accelerator(self, x: Array) -> bool:
        """Return True but in the simulator."""
        return not package.SIMULATED

    def host_values(self, x: Array) -> np.ndarray[Any, Any] | None:
        """Return None: reading would wait for the device."""
        return None

    def irregular(self, x: Array) -> tuple[str, str] | None:
        """Tell elements that do not lie at multiples of their size."""
        if not any(n % x.dtype.itemsize for n in (x.address, *x.strides)):
            return None
        return f"has strides {x.strides} in bytes, no multiples of an element's", "x.copy_to_host()"

    def lend(self, x: Array, strided: bool) -> Array:
        """Copy what has a negative stride, which would end the process of `torch.from_dlpack`."""
        if any(s < 0 for s in x.strides):
            return _arrays().mapped("copy", x)
        return x if strided else _arrays().ordered(x)

    def stream(self, x: Array) -> int | None:
        """Return the current stream, as other libraries number it."""
        return 0 if streams.current() == streams.DEFAULT else streams.current()

    def on_stream(self, stream: int) -> AbstractContextManager[Any]:
        """Context in which a stream is the current one."""
        return streams.on(stream)

    def done(self, x: Array) -> Callable[[], bool]:
        """Return what tells whether the work queued until now is done."""
        return blocks.recorded(streams.current())

    def underflow(self) -> AbstractContextManager[Any]:
        """Return no context: a GPU reports no underflow."""
        return nullcontext()


NUMBA = Numba("numba", None)
