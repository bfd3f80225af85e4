"""One call: the validated, hashable Request and the arrays that go with it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from .namespace import Array
from .passes import Shape
from .programs import (
    Passes,
    Program,
    program,
    pruned,
    segment_program,
    single_passes,
    state_shapes,
)

FLOATS = ("float16", "bfloat16", "float32", "float64")  # dtypes that are computed with


class Inputs(NamedTuple):
    """Arrays of one call; token axis at -2 (for the gate at -1), dtypes as the caller gave them."""

    q: Array  # (*batch, T, D)
    k: Array
    v: Array  # (*batch, T, V)
    decay: Array | None  # broadcasts to batch; accumulation dtype
    log_gate: Array | None  # (*batch or 1, T); accumulation dtype
    state: Any  # NamedTuple of the operator, or None; accumulation dtype


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything about a call but its arrays; hashable, so a compiler can hold it static."""

    operator: str
    mask: str
    convention: str
    normalize: bool
    eps: float
    scale: float
    ridge: float
    return_state: bool
    gradient: bool  # whether `backward` may follow
    q_shape: Shape
    k_shape: Shape
    v_shape: Shape
    gate: str | None  # None, "decay" or "log_gate"
    gate_given: bool  # as an array, so that it has a gradient
    gate_batch: Shape
    state_type: type[Any] | None
    library: str
    device: str
    dtype: str
    accelerator: bool
    traced: bool
    form: str | None = None
    chunk_size: int | None = None
    tf32: bool = False
    donate: bool = False  # under a trace, of one token: the given state may be overwritten
    axis: int = -2  # the caller's token axis, where no strides tell the order in memory

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in FIELDS))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}  # a hash is of this process

    @property
    def tokens(self) -> int:
        """Length of the sequence, T."""
        return self.k_shape[-2]

    @property
    def accumulate(self) -> str:
        """Name of the dtype that states and sums have."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def ones(self) -> bool:
        """Whether v has a column of ones, for denominators or their part of the state."""
        return self.normalize or self.return_state

    @property
    def program(self) -> Program:
        """The passes that compute this request."""
        return program(self.operator, self.mask, self.convention, self.ridge, self.state_type)

    @functools.cached_property
    def passes(self) -> Passes:
        """The same with denominators as passes of their own, in names and factors."""
        return single_passes(self.program, self.scale)

    def alive(self, steps: Passes, start: bool) -> Passes:
        """Return those of the program's passes that a forward runs, from an initial state or not.

        They are `program`'s steps, with denominators as columns, or `passes`.
        """
        given = {"q", "k", "v", "v|1"} | {s.start for s in steps if start}
        wanted = {"o"} | ({"o|1"} if self.normalize else set())
        wanted |= {s.end for s in steps} if self.return_state else set()
        return pruned(steps, frozenset(given), frozenset(wanted))[0]

    def saved(self, steps: Passes) -> tuple[str, ...]:
        """Name what the gradient reads beside the inputs, whatever ran the forward.

        These are the intermediates that later passes read and, of a quotient, both of its terms.
        """
        if not self.gradient:
            return ()
        steps = self.alive(steps, False)
        read = {*(("o", "o|1") if self.normalize else ())}.union(*((s.q, s.k, s.v) for s in steps))
        return tuple(dict.fromkeys(s.out for s in steps if s.out in read))

    @property
    def ridged(self) -> bool:
        """Whether there is a ridge; one that a tracer stands for is not 0."""
        return not isinstance(self.ridge, float) or self.ridge != 0.0

    @property
    def scaled(self) -> bool:
        """Whether q is scaled; a scale that a tracer stands for is not 1."""
        return not isinstance(self.scale, float) or self.scale != 1.0

    @functools.cached_property
    def empty(self) -> bool:
        """Whether there are no batch entries, as far as sizes are no symbols."""
        sizes = (*self.q_shape[:-2], *self.k_shape[:-2], *self.v_shape[:-2])
        return any(isinstance(n, int) and n == 0 for n in sizes)

    def state_shapes(self, *, segment: bool = False) -> dict[str, Shape]:
        """Full shape of each field of the state or segment."""
        return self._shapes(segment_program(self.operator, self.mask)) if segment else self._own

    @functools.cached_property
    def _own(self) -> dict[str, Shape]:
        return self._shapes(self.program.steps)

    def _shapes(self, steps: Passes) -> dict[str, Shape]:
        return state_shapes(steps, self.q_shape, self.k_shape, self.v_shape, self.gate_batch)


FIELDS = tuple(x.name for x in dataclasses.fields(Request))
