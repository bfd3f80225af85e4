"""Run a Plan on a Device; the arrays of a request by the plan's names, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..core.adjoint import sum_to
from ..core.fields import rank
from ..core.namespace import expand
from ..core.passes import Gate
from ..core.reference import Gradients
from ..core.request import Inputs, Request
from ..core.shapes import saved as saved_names
from . import plan as plans
from .elementwise import ELEMENTWISE, Array, Env
from .steps import Buffer, Fused, Launch, Limits, Plan, Ref, Row


class Device(NamedTuple):
    """A backend, as this package sees it.

    ``launch`` and ``fused[name]`` do one step and return the arrays that they made anew; what they
    wrote in place they need not name. ``put`` returns the whole buffer with a result in its place.
    """

    xp: Any  # array namespace of the few elementwise steps
    empty: Callable[[Buffer, Env], Array]
    put: Callable[[Env, Ref, Array], Array]
    launch: Callable[[Launch, Env, Gate], Env]
    limits: Callable[[Request], Limits] = lambda request: Limits()
    rows: tuple[Row, ...] = ()  # the longest that waits is taken
    fused: Mapping[str, Callable[[Fused, Env, Gate], Env]] = {}


def run(device: Device, plan: Plan, env: Env, gate: Gate) -> Env:
    """Run all steps; ``env`` holds what the plan is given by name. Return its results by name."""
    env = dict(env)
    for step, fresh, dead in zip(plan.steps, plan.fresh, plan.dead, strict=True):
        for name in fresh:
            b = plan.buffers[name]
            env[name] = env[b.reuses] if b.reuses else device.empty(b, env)
        if isinstance(step, Launch):
            env |= device.launch(step, env, gate)
        elif isinstance(step, Fused):
            env |= device.fused[step.row](step, env, gate)
        else:
            for ref, x in ELEMENTWISE[type(step)](device.xp, step, env, gate):
                env[ref.name] = device.put(env, ref, x)
        for name in dead:
            env.pop(name, None)
    return env


def forward(
    device: Device, request: Request, inputs: Inputs, tokens: int = 0
) -> tuple[Array, Any, tuple[Array, ...]]:
    """Return (o, state, the arrays that `backward` reads).

    Parameters
    ----------
    device : Device
        What runs it.
    request, inputs
        What is asked, and its arrays.
    tokens : int
        Of a segment; 0 for the whole sequence as one.
    """
    start = inputs.state is not None
    plan = plans.forward(request, device.limits(request), device.rows, tokens, start=start)
    found = run(device, plan, given(request, inputs), gate_of(inputs))
    saved = tuple(found[name] for name in plan.saved)
    return found[plan.results["o"]], final_state(request, plan, found), saved


def backward(
    device: Device,
    request: Request,
    inputs: Inputs,
    saved: tuple[Array, ...],
    do: Array | None,
    dstate: Any,
    tokens: int = 0,
) -> Gradients:
    """Return the gradients of `forward`.

    Parameters
    ----------
    device, request, inputs, tokens
        As given to `forward`.
    saved : tuple of array
        As any backend's forward returned them.
    do : array or None, dstate : NamedTuple or None
        Gradients of its other results.
    """
    plan = plans.backward(
        request, device.limits(request), device.rows, tokens, start=inputs.state is not None,
        do=do is not None, dstate=dstate is not None,
    )  # fmt: skip
    env = given(request, inputs, saved, do, dstate)
    found = run(device, plan, env, gate_of(inputs))
    return gradients(request, inputs, {n: found[own] for n, own in plan.results.items()})


def gate_of(inputs: Inputs) -> Gate:
    """Return the gate of a call."""
    return Gate(inputs.decay, inputs.log_gate)


def given(
    request: Request,
    inputs: Inputs,
    saved: tuple[Array, ...] = (),
    do: Array | None = None,
    dstate: Any = None,
) -> Env:
    """Return the arrays of a call by the names of its plan; states in their full shape."""
    env = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    env |= zip(saved_names(request), saved, strict=True) if saved else ()
    if do is not None:
        env["d.out" if request.normalize else "d.o"] = do
    for prefix, suffix, state in (("", "@0", inputs.state), ("d.", "@T", dstate)):
        for field, x in () if state is None else zip(state._fields, state, strict=True):
            x = expand(x, request.state_shapes()[field])
            env[f"{prefix}{field}{suffix}"] = x if rank(field) == 2 else x[..., None]
    return env


def final_state(request: Request, plan: Plan, found: Mapping[str, Array]) -> Any:
    """Return the final state where it was asked."""
    kind: Any = request.state_type
    if not request.return_state:
        return None
    fields = ((x, found[plan.results[f"{x}@T"]]) for x in kind._fields)
    return kind(*(x if rank(field) == 2 else x[..., 0] for field, x in fields))


def gradients(request: Request, inputs: Inputs, found: Mapping[str, Array]) -> Gradients:
    """Return the gradients of a call, that of the state in the shapes in which it came."""
    state, gate = inputs.state, found.get("d.gate")
    if state is not None:
        fields = ((x, field, found[f"d.{field}@0"]) for field, x in state._asdict().items())
        state = type(state)(
            *(sum_to(g if rank(field) == 2 else g[..., 0], x.shape) for x, field, g in fields)
        )
    log = request.gate == "log_gate"
    dq, dk, dv = (found[f"d.{name}"] for name in "qkv")
    return Gradients(dq, dk, dv, None if log else gate, gate if log else None, state)
