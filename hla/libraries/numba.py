"""Device arrays of Numba, and of whatever has the CUDA Array Interface: memory, no namespace.

CuPy computes with them, or torch where there is no CuPy: with arrays of the same memory, on the
stream that the interface names. Results are Numba's device arrays, of the memory that was made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..core import namespace
from ..core.namespace import Array
from .generic import Generic


class Borrower(NamedTuple):
    """A library that computes with arrays of others, and what makes its array of their memory."""

    library: Generic
    read: Callable[[Any], Array]


class Interface:
    """The memory of an array, which it keeps alive, on a stream."""

    def __init__(self, array: Array, stream: int | None) -> None:
        self.array = array
        given = array.__cuda_array_interface__
        self.__cuda_array_interface__ = {**given, "version": 3, "stream": stream}


class Numba(Generic):
    """Numba, of whose device arrays other libraries make theirs of the same memory."""

    @property
    def borrowed(self) -> bool:
        """Whether a library computes with them here."""
        return self.borrower() is not None

    def borrower(self) -> Borrower | None:
        """Return the library that computes with them, None where there is none."""
        return _borrower()

    def irregular(self, x: Array) -> tuple[str, str]:
        """Tell that nothing computes with it."""
        what = (
            "is a device array of Numba, which CuPy or torch computes with, here without a GPU or"
            " beside arrays of another library"
        )
        return what, "cupy.asarray(x) or torch.as_tensor(x, device='cuda'), of the same memory"

    def lent(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function with arrays of the library that borrows; return device arrays.

        Work is put on the stream of the first array that names one; those of others are waited for.
        """
        borrower = self.borrower()
        assert borrower is not None
        library, streams = borrower.library, list[int | None]()

        def stream_of(x: Array) -> Array:
            streams.append(x.__cuda_array_interface__.get("stream"))
            return x

        _each(self, stream_of, (args, tuple(options.values())))
        used = [s for s in dict.fromkeys(streams) if s is not None]
        stream = used[0] if used else None
        for other in used[1:]:
            self.finish(other)

        def into(x: Array) -> Array:
            return borrower.read(Interface(x, None))

        def back(x: Array) -> Array:
            return self.made(x, stream)

        with nullcontext() if stream is None else library.on_stream(stream):
            given = _each(self, into, args), _each(self, into, tuple(options.values()))
            found = function(*given[0], **dict(zip(options, given[1], strict=True)))
            return _each(library, back, found, functools.partial(functools.partial, self.lent))

    def made(self, x: Array, stream: int | None) -> Array:
        """Return a device array of x's memory."""
        from numba import cuda

        return cuda.as_cuda_array(Interface(x, stream), sync=False)

    def finish(self, stream: int) -> None:
        """Wait for a stream."""
        from numba import cuda

        cuda.external_stream(stream).synchronize()


def _each(
    library: Generic, f: Callable[[Array], Any], tree: Any, call: Callable[[Any], Any] | None = None
) -> Any:
    """Apply ``f`` to every array of a library in tuples of tuples, ``call`` to every function."""
    if isinstance(tree, tuple):
        found = (_each(library, f, x, call) for x in tree)
        return type(tree)(*found) if hasattr(tree, "_fields") else tuple(found)
    if call is not None and callable(tree):
        return call(tree)
    return f(tree) if namespace.library_of(tree) is library else tree


@functools.cache
def _borrower() -> Borrower | None:
    """Find CuPy with a GPU, else torch with one."""
    if find_spec("cupy"):
        cupy = importlib.import_module("cupy")
        if cupy.is_available():
            return Borrower(namespace.adapter("cupy", None), cupy.asarray)
    if find_spec("torch"):
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            read = functools.partial(torch.as_tensor, device="cuda")
            return Borrower(namespace.adapter("torch", None), read)
    return None


NUMBA = Numba("numba", None)
