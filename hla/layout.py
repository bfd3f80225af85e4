"""How the caller lays out arrays: the token axis, the gate and the state, in and out."""

from __future__ import annotations

from typing import Any, NamedTuple

from .core.namespace import Array, moveaxis, namespace, sum_to
from .core.passes import Shape
from .states.packed import STATE_OF, pack_gradient, unpack_gradient


class Layout(NamedTuple):
    """How the caller lays out arrays; takes canonical results back to it."""

    axis: int | None  # token axis of q, negative; None in `step`
    gate_shape: Shape | None  # the caller's log_gate; None where it has no gradient
    decay_shape: Shape | None
    packed: bool = False  # the incoming state, and so the outgoing one
    state_ranks: tuple[int, ...] = ()  # of the incoming state's fields

    @property
    def names(self) -> tuple[str, str, str]:
        """What the caller calls q, k and v."""
        return ("q", "k", "v") if self.axis is not None else ("q_t", "k_t", "v_t")

    def tokens_in(self, x: Array) -> Array:
        """Move the token axis to -2 (`step`: add one)."""
        if self.axis is None:
            return x[..., None, :]
        return x if self.axis == -2 else moveaxis(x, self.axis, -2)

    def tokens_out(self, x: Array) -> Array:
        """Undo `tokens_in`."""
        if self.axis is None:
            return x[..., 0, :]
        return x if self.axis == -2 else moveaxis(x, -2, self.axis)

    def gate_in(self, gate: Array, tokens: int) -> Array:
        """Move the gate's token axis to -1 and give it its full length."""
        xp = namespace(gate)
        if self.axis is None:
            return gate[..., None]
        missing = max(0, -self.axis - 1 - gate.ndim)
        gate = xp.reshape(gate, (1,) * missing + tuple(gate.shape))
        if self.axis != -2:
            gate = moveaxis(gate, self.axis + 1, -1)
        return xp.broadcast_to(gate, (*gate.shape[:-1], tokens))

    def gate_out(self, grad: Array) -> Array:
        """Gradient of the caller's log_gate from that of the canonical one."""
        assert self.gate_shape is not None
        if self.axis is None:
            return namespace(grad).reshape(grad[..., 0], self.gate_shape)
        if self.axis != -2:
            grad = moveaxis(grad, -1, self.axis + 1)
        if grad.shape == self.gate_shape:
            return grad
        lead = (1,) * (grad.ndim - len(self.gate_shape))
        return namespace(grad).reshape(sum_to(grad, (*lead, *self.gate_shape)), self.gate_shape)

    def state_out(self, state: Any) -> Any:
        """Return a state in the type in which the caller gave one."""
        packs = self.packed and state is not None and type(state) not in STATE_OF
        return state.pack() if packs else state

    def dstate_in(self, grad: Any) -> Any:
        """Gradient of the outgoing state from that of what `state_out` made of it."""
        return unpack_gradient(grad) if self.packed and grad is not None else grad

    def dstate_out(self, grad: Any) -> Any:
        """Gradient of the incoming state as the caller gave it."""
        if grad is None:
            return None
        grad = pack_gradient(grad) if self.packed else grad
        fields = (
            namespace(x).reshape(x, (*(1,) * (rank - x.ndim), *x.shape)) if rank > x.ndim else x
            for x, rank in zip(grad, self.state_ranks, strict=True)
        )
        return type(grad)(*fields)
