"""NumPy on the host: the programs over `kernels.numpy_program`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..contract import Capabilities, Machine
from ..core import reference
from ..core.namespace import Array, library_of
from ..core.reference import Gradients
from ..core.request import FLOATS, Inputs, Request
from ..core.run import CORE, Engine
from ..kernels.numpy import program, token

SWEEP = Engine(program.run, program.pull, scales=True)
CAPABILITIES = Capabilities(
    FLOATS,
    libraries=("numpy",),
    serves=(("numpy", False),),
    forms=("chunked", "recurrent", "dense"),  # associative runs no passes
)


def _engine(request: Request) -> Engine:
    if request.mask == "none":
        return CORE  # whole products, with nothing to sweep over
    return SWEEP


def _readable(inputs: Inputs) -> Inputs:
    return inputs._replace(q=_rows(inputs.q), k=_rows(inputs.k), v=_rows(inputs.v))


def _rows(x: Array) -> Array:
    """Copy ``x`` unless BLAS can read it: else its products take another path, to other bits."""
    row, item = x.strides[-2:]
    readable = item == x.itemsize and row >= x.shape[-1] * item and row % item == 0
    return x if readable else np.ascontiguousarray(x)


def forward(request: Request, inputs: Inputs) -> tuple[Array, Any, Any]:
    """Return (o, state, what `backward` needs)."""
    o, state, env = library_of(inputs.q).run(
        reference.forward, request, _readable(inputs), _engine(request)
    )
    return o, state, env


def backward(
    request: Request, inputs: Inputs, saved: Any, do: Array | None, dstate: Any
) -> Gradients:
    """Return the gradients of `forward`."""
    do = None if do is None else _rows(do)
    given = (_readable(inputs), saved, do, dstate, _engine(request))
    grads: Gradients = library_of(inputs.q).run(reference.backward, request, *given)
    return grads


def step(request: Request, inputs: Inputs, donate: bool) -> tuple[Array, Any]:
    """Return (o, state) of one token, with ``donate`` in the given state's memory where it can."""
    found: tuple[Array, Any] = library_of(inputs.q).run(token.step, request, inputs, donate)
    return found


def again_step(request: Request, inputs: Inputs, donate: bool) -> Any:
    """Return what takes a token like this one without its checks."""
    return token.again(step, request, inputs, donate)


def summarize(request: Request, inputs: Inputs) -> Any:
    """Return the segment of a whole sequence."""
    return library_of(inputs.q).run(reference.summarize, request, inputs)


def machine() -> Machine:
    """Describe what it finds here."""
    return Machine(device="cpu", version=f"numpy {np.__version__}")
