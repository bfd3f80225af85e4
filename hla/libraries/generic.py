"""Any array library of the standard: facts about arrays, and operations that the standard lacks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from ..contract import Capabilities
from ..core.namespace import Array, Namespace


def compiling() -> bool:
    """Whether torch.compile or a strict torch.export reads the code that is running."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def recording() -> bool:
    """Whether torch reads or records the calls that are made: also by torch.jit.trace."""
    torch = sys.modules.get("torch")
    return compiling() or (torch is not None and bool(torch._C._is_tracing()))


class Facts(NamedTuple):
    """Facts of a request about an array beside its shape."""

    library: str
    device: str  # "traced" where a tracer has none
    dtype: str  # "float32", "bfloat16", "int64", ...
    accelerator: bool  # outside of the host's memory
    traced: bool  # its values are not there yet, or only its type knows where
    tf32: bool  # the library's own switch asks for float32 products in reduced precision


@functools.cache
def _dtype_name(kind: Any, dtype: Any) -> str:  # the kind first: dtypes of two libraries may warn
    return str(dtype).rsplit(".", 1)[-1]


class Generic:
    """What holds for a library of which only the standard is known.

    Parameters
    ----------
    name : str
        Of the library; "" for what is no array that is computed with.
    xp : module or None
        Its Array API namespace.
    """

    strided = True  # whether it takes arrays with strides by DLPack
    rule = ""  # module by which its transforms know any backend
    again = ""  # module that does calls like earlier ones
    meshes = False  # whether an array's type may hold its layout on a mesh of devices

    def __init__(self, name: str, xp: Namespace) -> None:
        self.name, self.xp = name, xp
        self._kept: dict[Any, np.ndarray[Any, Any]] = {}

    @property
    def borrowed(self) -> bool:
        """Whether another library computes with its arrays."""
        return False

    def device(self, x: Array) -> Any:
        """Device on which to make arrays beside ``x``; None where they follow it by themselves."""
        return compat.device(x)

    def moveaxis(self, x: Array, source: int, destination: int) -> Array:
        """Move one axis."""
        return self.xp.moveaxis(x, source, destination)

    def unstack(self, x: Array, axis: int) -> tuple[Array, ...]:
        """Split along one axis; not by indexing, which has a whole array as gradient a slice."""
        return tuple(self.xp.unstack(x, axis=axis))

    def symbolic(self, size: Any) -> bool:
        """Whether a size is a symbol, of which no comparison is known."""
        return False

    def padded(self, x: Array, axis: int, before: int, after: int, fill: float) -> Array:
        """See `core.namespace.padded`."""
        xp, parts = self.xp, [x]
        for count, place in ((before, 0), (after, 2)):
            if count:
                shape = (*x.shape[:axis], count, *x.shape[len(x.shape) + axis + 1 :])
                parts.insert(place, xp.full(shape, fill, dtype=x.dtype, device=self.device(x)))
        return xp.concat(parts, axis=axis)

    def powers(self, x: Array, n: Array) -> Array:
        """Raise ``x`` to whole powers n >= 0, with its derivatives also where x is 0."""
        return x**n

    def chunk_totals(
        self, gate: Any, powers: Set[int], x: Array, ends: Array | None = None
    ) -> dict[str, Array]:
        """Return what each chunk leaves of a state, (..., chunks, 1, 1), as "total@" and a power.

        A constant decay's rounding, the same in every chunk, would add up. So each is rounded up
        or down such that the product of any that follow one another is right to its last digits.
        Nothing for one chunk, whose total is its weights'.

        Parameters
        ----------
        gate : Gate
            The call's.
        powers : set of int
            Exponents of the gate.
        x : array, (..., chunks, W, features)
            Of the dtype and device of the results; the log gate, if the gate is one.
        ends : array, (chunks, 1, 1), or None
            The tokens of each chunk, where they are not W.
        """
        xp, (chunks, W) = self.xp, x.shape[-3:-1]
        found, g = dict[str, Array](), gate.decay
        if not gate.arrays or (type(chunks) is int and chunks == 1):
            return found
        for power in sorted(powers - {0}):
            if g is None:
                log = power * xp.sum(x[..., 0], axis=-1)
                total = xp.exp(log)
            else:
                n = xp.zeros((chunks,), dtype=x.dtype, device=self.device(x))
                n = power * (n + (W if ends is None else ends[:, 0, 0]))
                n = xp.reshape(n, (1,) * g.ndim + (chunks,))
                read = xp.where(g > 0.5, g, xp.ones_like(g))  # what `_joint` reads, and no other
                log = n * xp.log(read)[..., None]
                total = self.powers(g[..., None], n)
            found[f"total@{power}"] = self._joint(total, log)[..., None, None]
        return found

    def _joint(self, total: Array, log: Array) -> Array:
        """Round exp(log), which total nearly is, so that products along its axis are right."""
        xp, near, zero = self.xp, total > 0.5, self.xp.zeros_like(total)
        step = 2.0**-24 if total.dtype == xp.float32 else 2.0**-53  # of numbers from 0.5 to 1
        log, found = xp.where(near, log, zero), xp.where(near, total, zero + 1)
        lost = xp.cumulative_sum(found * (log - xp.log(found)) / step, axis=-1)
        steps = self.padded(xp.floor(lost + 0.5), -1, 1, 0, 0.0)
        return total + step * (steps[..., 1:] - steps[..., :-1])

    def triangle(self, x: Array, k: int, upper: bool) -> Array:
        """Clear ``x`` below (else above) the diagonal k of its last two axes."""
        return (self.xp.triu if upper else self.xp.tril)(x, k=k)

    def constants(
        self, like: Array, key: tuple[Any, ...], make: Callable[[], np.ndarray[Any, Any]]
    ) -> Array:
        """Return the constants that ``make`` gives and ``key`` names, on the device of ``like``."""
        if key not in self._kept:
            self._kept[key] = make()
        return self.xp.asarray(self._kept[key], device=self.device(like))

    def fold(
        self, body: Any, carry: Any, xs: Any, axes: tuple[int, ...], out_axis: int, reverse: bool
    ) -> Any:
        """Loop ``carry, ys = body(carry, slices)`` over an axis of each x; stack the ys on one.

        Parameters
        ----------
        body : callable
            Takes the carry and a tuple with one slice of each x; returns the carry and a tuple.
        carry : pytree
            Keeps its shapes and dtypes from turn to turn.
        xs : tuple of arrays
            Sliced along ``axes[i]`` (negative), all of one length there, at least 1.
        axes : tuple of int
            The sliced axis of each x.
        out_axis : int
            Axis of the results that counts the turns, negative or 0.
        reverse : bool
            Last slice first; the ys stay at their slice's place.

        Returns
        -------
        carry, ys
            A plain loop for eager libraries; a compiled one where the graph must not grow.
        """
        out = []
        slices = (self.unstack(x, axis) for x, axis in zip(xs, axes, strict=True))
        turns = list(zip(*slices, strict=True))
        for turn in reversed(turns) if reverse else turns:
            carry, ys = body(carry, turn)
            out.append(ys)
        if reverse:
            out.reverse()
        return carry, tuple(self.xp.stack(y, axis=out_axis) for y in zip(*out, strict=True))

    def explicit(self, x: Array) -> bool:
        """Whether the type of ``x`` names the axes along which it is split among devices."""
        return False

    def aligned(self, xs: Sequence[Array], axes: int) -> list[Array]:
        """Give arrays so many axes, and on a mesh one split of those that all share."""
        return list(xs)

    def laid(self, x: Array, like: Sequence[Array]) -> Array:
        """Lay ``x`` on a mesh as all of ``like`` together; arrays (*batch, X, Y)."""
        return x

    def laid_back(self, grad: Array, x: Array) -> Array:
        """Return the gradient of x from that of x as `laid`."""
        return grad

    def facts(self, x: Array) -> Facts:
        """Return the facts of a request about ``x`` beside its shape."""
        return Facts(
            self.name,
            self.device_name(x),
            self.dtype_name(x),
            self.on_accelerator(x),
            self.traced(x),
            self.tf32(),
        )

    def key(self, x: Array) -> Any:
        """Return what tells `facts` and shape of ``x`` from others', None if nothing.

        It is hashable but for the symbols of a compiler.
        """
        return None

    def signature(self, x: Array) -> Any:
        """Return shape and dtype of an array that `alike` may take; None of another."""
        return None

    def alike(self, arrays: Sequence[Array]) -> Callable[[list[Array]], list[int] | None] | None:
        """Return what gives the addresses of arrays like these, and None of others.

        Alike are arrays for which every check and choice and every kernel is the same. None where
        more must be asked.
        """
        return None

    def address(self, x: Array) -> int:
        """Return where the memory of an array that `alike` takes starts."""
        raise NotImplementedError(f"{self.name} does not tell addresses")

    def dtype_name(self, x: Array) -> str:
        """Bare name of the dtype."""
        kind: Any = type(x.dtype)
        return _dtype_name(kind, x.dtype)

    def device_name(self, x: Array) -> str:
        """Device as text."""
        return str(self.device(x))

    def on_accelerator(self, x: Array) -> bool:
        """Whether ``x`` is outside of the host's memory."""
        return False

    def same_device(self, x: Array, y: Array) -> bool:
        """Whether two arrays are on one device, as far as can be known."""
        return bool(self.device(x) == self.device(y))

    def traced(self, x: Array) -> bool:
        """Whether ``x`` stands for values that are not there yet."""
        return False

    def transformed(self) -> bool:
        """Whether plain types and shapes may stand for something else now."""
        return False

    def tf32(self) -> bool:
        """Whether the library's switch asks for float32 products in reduced precision."""
        return False

    def irregular(self, x: Array) -> tuple[str, str] | None:
        """Tell what keeps ``x`` from being a plain array, and what makes it one; or None."""
        return None

    def plain(self, x: Array) -> Array:
        """Return ``x`` as its memory has it."""
        return x

    def operand(self, x: Array) -> Array:
        """Return ``x`` as the library would multiply it, whatever mode is on."""
        return x

    def concrete(self, number: Any) -> Any:
        """Return the number that a symbol of a compiler stands for, which it then holds fixed."""
        return number

    def number(self, value: float, dtype: Any, like: Array) -> Array:
        """Return a number as an array of no axes, on the device of ``like``."""
        return self.xp.full((), value, dtype=dtype, device=self.device(like))

    def host_values(self, x: Array) -> np.ndarray[Any, Any] | None:
        """Values of a host array as NumPy, or None where reading would wait or fail."""
        try:
            return np.from_dlpack(x)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            return None  # a library that does not share host memory: only shapes are checked

    def wraps(self, capabilities: Capabilities) -> bool:
        """Whether ``rule`` stands for such a backend, so that the library's transforms know it."""
        return False

    def on_memory(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Call a function that reads the memory of the arrays in ``trees``."""
        return function(*trees)

    def lend(self, x: Array, strided: bool) -> Array:
        """Return ``x`` as it can be handed over by DLPack, with or without strides."""
        return x

    def take(self, x: Array) -> Array:
        """Return an array of the memory of ``x``, which another library lends."""
        return self.xp.from_dlpack(x)

    def lent(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function with arrays of the library that computes with those of this one."""
        return function(*args, **options)

    def stream(self, x: Array) -> int | None:
        """Return the stream on which the caller uses ``x``; None where DLPack orders the work."""
        return None

    def on_stream(self, stream: int) -> AbstractContextManager[Any]:
        """Context in which this library works on a stream."""
        return nullcontext()

    def done(self, x: Array) -> Callable[[], bool]:
        """Return what tells whether the work queued until now on x's device is done."""
        return lambda: True

    def in_place(self, request: Any, inputs: Any) -> tuple[Array, Any] | None:
        """Take one token with the state updated in its own memory; None where that cannot be."""
        return None

    def underflow(self) -> AbstractContextManager[Any]:
        """Context in which a result too small for its dtype is 0, whatever np.errstate says."""
        return np.errstate(under="ignore")

    def exact_products(self, x: Array) -> AbstractContextManager[Any]:
        """Context in which float32 products are float32, unless the caller's switch says otherwise.

        In NumPy they may underflow to 0, which is then the right value.
        """
        return self.underflow()

    def run(self, function: Callable[..., Any], request: Any, inputs: Any, *args: Any) -> Any:
        """Call ``function(request, inputs, *args)``, products as exact as the caller asks for."""
        with self.exact_products(inputs.q):
            return function(request, inputs, *args)
