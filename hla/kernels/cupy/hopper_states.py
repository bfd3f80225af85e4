"""Launches of a pass of which states alone are requested: by a kernel of Hopper where it can."""

from __future__ import annotations

from collections.abc import Iterator

from ...device.scan import Call
from ...device.steps import Launch, Ref
from . import launch
from .hopper import GATES, HALF, SHARED, sweeps
from .launch import WIDEST, Kernel, Load


def passes(load: Load, call: Call, s: Launch) -> Iterator[Kernel]:
    """Return the kernels of one launch."""
    found = s.nonempty()
    if found is None or not able(call, found):
        yield from launch.passes(load, call, s)
        return
    s, (D, V) = found, widths(call, found)
    gate = call.request.gate if s.power else None
    B = HALF if max(D, V) <= HALF else WIDEST
    refs: dict[str, Ref | None] = {
        "k": s.k[0], "v": s.v[0], "gate": Ref("gate") if gate else None,
        "start": s.start[0], "end": s.end[0],
    }  # fmt: skip
    fixed = {
        "B": B, "ONE": int(s.k == s.v), "REVERSE": int(s.reverse), "S_POWER": max(1, s.power),
        "GATE": GATES.index(gate), "WHOLE": int(D == V == B), "SHARED": SHARED, "WIDE": 0,
    }  # fmt: skip
    yield from sweeps(
        load, call, "hopper_states.cu", s.batch, refs, D, V, (s.write, 1 / s.write), s, fixed,
        threads=2 * B + 128,
    )  # fmt: skip


def widths(call: Call, s: Launch) -> tuple[int, int]:
    """Return the columns of keys and of values."""
    D, V = (call.place(x).layout.shape[-1] for x in (s.k[0], s.v[0]))
    return D, V


def able(call: Call, s: Launch) -> bool:
    """Whether the kernel does it: of few columns most of what it multiplies would be zeros.

    A symmetric state is v k' + k v', of which it has the first alone.
    """
    if call.where.capability != (9, 0) or s.q or s.symmetric or not s.write:
        return False
    if not len(s.k) == len(s.v) == len(s.end) == 1 or s.end[0] is None:
        return False
    narrow = all(str(call.dtypes[x.name]) == "bfloat16" for x in (*s.k, *s.v))
    D, V = widths(call, s)
    return narrow and HALF // 2 < min(D, V) <= max(D, V) <= WIDEST
