"""Checks of the two stretches that `hla.combine` joins."""

from __future__ import annotations

from typing import Any

from ..core.algebra import ALGEBRA, Algebra
from ..core.fields import batch_rank
from ..core.namespace import namespace
from ..core.passes import Shape, broadcast
from ..errors import Unsupported, kind_of
from ..states.packed import STATE_OF, packed_shape
from .arrays import array, floating
from .state import kinds


def stretches(left: Any, right: Any) -> Algebra:
    """Check the arguments of `hla.combine`; return the algebra that joins them."""
    algebra = next((a for a in ALGEBRA.values() if a.segment is type(right)), None)
    if algebra is None:
        raise TypeError(
            f"right is {kind_of(right)}; expected a segment of the later stretch. Make one by"
            " hla.summarize"
        )
    left_type = STATE_OF.get(type(left), type(left))
    if left_type.__name__.endswith("PaperState"):
        raise Unsupported(
            "left is a state of convention='paper', whose decayed recurrences are not associative;"
            " continue it with hla.scan or hla.step"
        )
    if left_type not in (algebra.segment, *kinds(algebra.state)):
        raise TypeError(
            f"left is {kind_of(left)}; expected {algebra.segment.__name__} or"
            f" {algebra.state.__name__} like right. Pass the operator and mask that right was made"
            " with"
        )
    _arrays({"left": left, "right": right}, right)
    widths = _widths(right)
    batches = [_batch(side, x, widths) for side, x in (("left", left), ("right", right))]
    _aligned("right", right)
    if type(left) is algebra.segment:
        _aligned("left", left)
    try:
        broadcast(*batches)
    except ValueError:
        raise ValueError(
            f"right has batch axes {batches[1]}; expected axes that broadcast with {batches[0]} of"
            " left. Summarize the same heads"
        ) from None
    return algebra


def as_before(state: Any, before: Any) -> Any:
    """Return a continued state, each field with its own number of batch axes.

    Where fields differ in it, a stacked state does not show which axis is which: what comes out in
    another shape than it went in is refused.
    """
    ranks = {name: batch_rank(name, x) for name, x in before._asdict().items()}
    fields = state._asdict()
    if len(set(ranks.values())) == 1:
        return state
    for name, x in fields.items():
        own = tuple(getattr(before, name).shape)
        extra = len(x.shape) - len(own)
        if tuple(x.shape) != (*(1,) * extra, *own):
            raise ValueError(
                f"left.{name} has shape {own}, joined {tuple(x.shape)}; expected the same, as the"
                f" fields of left have {ranks} batch axes. Reshape them to {max(ranks.values())},"
                " with size 1 for what is missing"
            )
        fields[name] = namespace(x).reshape(x, own)
    return type(state)(**fields)


def _arrays(sides: dict[str, Any], right: Any) -> None:
    """Check that all fields are floating arrays of one library, device and dtype."""
    like = floating("right.rho", array("right.rho", right.rho))
    for side, stretch in sides.items():
        for name, x in stretch._asdict().items():
            label = f"{side}.{name}"
            floating(label, array(label, x, like, "right.rho"))
            if x.dtype != like.dtype:
                raise TypeError(
                    f"{label} has dtype {x.dtype}; expected {like.dtype} like right.rho. Cast it"
                )


def _widths(right: Any) -> tuple[int, int]:
    """D and V, from the vector m and the matrix C or P of a segment."""
    name = "C" if hasattr(right, "C") else "P"
    matrix = getattr(right, name)
    if right.m.ndim < 1 or matrix.ndim < 2:
        raise ValueError(
            f"right has m of shape {tuple(right.m.shape)} and {name} of shape"
            f" {tuple(matrix.shape)}; expected (..., D) and (..., D, V)"
        )
    return right.m.shape[-1], matrix.shape[-1]


def _batch(side: str, stretch: Any, widths: tuple[int, int]) -> Shape:
    """Check the own axes of each field; return the batch shape of all."""
    D, V = widths
    batches = {}
    for name, x in stretch._asdict().items():
        own: Shape = (D,) if name[0].islower() else (D, D) if name in "SQRY" else (D, V)
        if name == "rho":
            own = ()
        elif name == "S" and type(stretch) in STATE_OF:
            own = packed_shape(own)
        shape = tuple(x.shape)
        batch = shape[: len(shape) - len(own)]
        if len(shape) < len(own) or shape[len(batch) :] != own:
            expected = "".join(f", {n}" for n in own)
            raise ValueError(
                f"{side}.{name} has shape {shape}; expected (...{expected}), as right has D = {D},"
                f" V = {V}. Join stretches of the same widths"
            )
        batches[name] = batch
        try:
            whole = broadcast(*batches.values())
        except ValueError:
            raise ValueError(
                f"{side}.{name} has shape {shape}; expected batch axes that broadcast with those of"
                f" {side}'s other fields. Take all fields from one stretch"
            ) from None
    return whole


def _aligned(side: str, segment: Any) -> None:
    """Check that each field has all batch axes or none, so that they broadcast as they stand."""
    ranks = {name: batch_rank(name, x) for name, x in segment._asdict().items()}
    most = max(ranks, key=lambda name: ranks[name])
    for name, rank in ranks.items():
        if rank not in (0, ranks[most]):
            raise ValueError(
                f"{side}.{name} has shape {tuple(getattr(segment, name).shape)}; expected"
                f" {ranks[most]} batch axes before its own, like {side}.{most}. Reshape it, with"
                " size 1 for what is missing"
            )
