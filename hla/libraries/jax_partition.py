"""An opaque backend's call on a mesh of devices: each does its own part of the batch.

JAX's partitioner is told that every array may be split along the batch's axes, and along no other;
the gradient of what devices share is summed over them. On one device, and where `jax.shard_map`
has split the arrays, the call is as it was.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from .jax import JAX

Shape = tuple[int, ...]
Own = Sequence[int]  # of each array, how many axes lie behind those of the batch


class Split:
    """A function of trees of arrays that a mesh may split along the batch's axes.

    Parameters
    ----------
    run : callable
        What each device runs, of arrays of any batch that broadcasts.
    batch : tuple of int
        The batch of all arrays together.
    given : tree of int
        Axes behind the batch of each array that is given.
    found : callable
        Of a result to those of its arrays.
    sums : bool
        A device's result without a split axis is its part of a sum.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        batch: Shape,
        given: Any,
        found: Callable[[Any], Any],
        *,
        sums: bool,
    ) -> None:
        self.run, self.batch, self.found, self.sums = run, batch, found, sums
        self.given: Own = jax.tree.leaves(given)
        self.made: Own = ()

    def __call__(self, *given: Any) -> Any:
        """Run, split as the partitioner finds or as types tell; of one device, as it is."""
        if any(map(JAX.explicit, jax.tree.leaves(given))):
            return self.explicit(*given)
        if jax.device_count() == 1:
            return self.run(*given)
        function = custom_partitioning(self.whole)
        function.def_partition(self.partition, self.infer, sharding_rule=self.rule)
        return function(*given)

    def whole(self, *given: Any) -> Any:
        """Run, and learn what results there are."""
        result = jax.jit(self.run)(*given)  # constants are none that JAX 0.11 refuses
        self.made = jax.tree.leaves(self.found(result))
        return result

    def rule(self, mesh: Any, given: Any, made: Any) -> tuple[str, dict[str, Any]]:
        """Return names of axes: those of the batch have one each, others are not split."""
        fresh = (f"x{i}" for i in itertools.count())
        sides, rest = [], []
        for side, own in ((given, self.given), (made, self.made)):
            words = []
            for x, n in zip(side, own, strict=True):
                names = {i: f"b{j}" for i, j in self.axes(tuple(x.shape), n)}
                word = [names.get(i) or next(fresh) for i in range(len(x.shape))]
                rest += [name for name in word if name.startswith("x")]
                words.append(" ".join(word))
            sides.append(", ".join(words))
        return " -> ".join(sides), {"need_replication_factors": tuple(rest)}

    def axes(self, shape: Shape, own: int) -> Iterator[tuple[int, int]]:
        """Yield the axes of an array that have the batch's length, and which those are of it."""
        missing = len(self.batch) - (len(shape) - own)
        for j in range(missing, len(self.batch)):
            if shape[j - missing] == self.batch[j] > 1:
                yield j - missing, j

    def places(self, mesh: Any, given: Any, made: Any) -> tuple[Any, Any, list[Any]]:
        """Return how given and made arrays are split, and what splits each axis of the batch."""
        split: list[Any] = [None] * len(self.batch)
        for x, n in zip(jax.tree.leaves(given), self.given, strict=True):
            spec = dict(enumerate(x.sharding.spec))
            for i, j in self.axes(x.shape, n):
                parts = math.prod(mesh.shape[name] for name in names(spec.get(i)))
                split[j] = split[j] or (None if self.batch[j] % parts else spec.get(i))
        sides = []
        for tree, own in ((given, self.given), (made, self.made)):
            flat, shape = jax.tree.flatten(tree)
            specs = []
            for x, n in zip(flat, own, strict=True):
                by = {i: split[j] for i, j in self.axes(x.shape, n)}
                specs.append(PartitionSpec(*map(by.get, range(len(x.shape)))))
            sides.append(jax.tree.unflatten(shape, specs))
        return sides[0], sides[1], split

    def part(self, split: list[Any], made: Any, *given: Any) -> Any:
        """Run a device's part, of which all have ``made``."""
        flat, tree = jax.tree.flatten(self.run(*given))
        for at, (x, n) in enumerate(zip(jax.tree.leaves(made), self.made, strict=True)):
            own = {j for _, j in self.axes(x.shape, n)}
            over = [name for j, s in enumerate(split) if j not in own for name in names(s)]
            if self.sums and over:
                flat[at] = jax.lax.psum(flat[at], tuple(over))
        return jax.tree.unflatten(tree, flat)

    def partition(self, mesh: Any, given: Any, made: Any) -> Any:
        """Return what the partitioner asks for."""
        inputs, outputs, split = self.places(mesh, given, made)
        laid = functools.partial(NamedSharding, mesh)
        inputs, outputs = (jax.tree.map(laid, x) for x in (inputs, outputs))
        return mesh, functools.partial(self.part, split, made), outputs, inputs

    def infer(self, mesh: Any, given: Any, made: Any) -> Any:
        """Return how results lie, for the partitioner before Shardy."""
        return self.partition(mesh, given, made)[2]

    def explicit(self, *given: Any) -> Any:
        """Run where the types of arrays tell how they are split."""
        types = jax.tree.map(jax.typeof, given)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), types)
        meshes = (x.sharding.mesh for x in jax.tree.leaves(types))
        mesh = next(x for x in meshes if not x.empty)
        made = jax.eval_shape(self.whole, *shapes)
        inputs, outputs, split = self.places(mesh, types, made)
        run = functools.partial(self.part, split, made)
        places = jax.tree.map(functools.partial(NamedSharding, mesh), inputs)
        given = jax.tree.map(jax.sharding.reshard, given, places)
        specs = {"in_specs": inputs, "out_specs": outputs}
        return jax.shard_map(run, mesh=mesh, check_vma=False, **specs)(*given)


def laid(x: Any, sharding: Any) -> Any:
    """Return an array with this split, where types tell it."""
    known = JAX.explicit(x) and not sharding.mesh.empty
    return jax.sharding.reshard(x, sharding) if known else x


def names(spec: Any) -> tuple[str, ...]:
    """Return the axes of a mesh that split an axis."""
    return () if spec is None else (spec,) if isinstance(spec, str) else tuple(spec)
