"""Linear logits on an explicit mesh: the types of arrays say how axes are split, so each device does its own part.

What `jit` does with an auto mesh by propagation is a `shard_map` here: nothing is communicated inside a loop.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .._block import Block
from .._devices import axis_names, explicit_sharding
from .._sparse import SparseDistribution
from .linear import LinearLogits, per_row_fields, replace, shared_fields


class Split(NamedTuple):
    """Over which axes of the mesh rows and classes are split."""

    mesh: Any
    rows: tuple[Any, ...]  # for each axis of rows
    classes: Any

    @property
    def row_axes(self) -> tuple[str, ...]:
        return tuple(name for entry in self.rows for name in axis_names(entry))

    @property
    def sharding(self) -> NamedSharding | None:
        """Of rows on an explicit mesh, where types have it."""
        return NamedSharding(self.mesh, P(*self.rows)) if AxisType.Explicit in self.mesh.axis_types else None

    @property
    def devices(self) -> int:
        """That have different rows."""
        return math.prod(self.mesh.shape[name] for name in self.row_axes)

    def per_row(self, tree: Any) -> Any:
        """Specs of arrays `[*rows, ...]`."""
        return jax.tree.map(lambda _: P(*self.rows), tree)

    def of_block(self, block: Block) -> Any:
        """Specs of a block of linear logits."""
        q, of_row = block.distribution, P(*self.rows)
        q = self.per_row(q) if isinstance(q, SparseDistribution) else self.of_logits(q)
        specs = {
            "logits": self.of_logits(block.logits),
            "label": of_row,
            "distribution": q,
            "classes": of_row,
        }
        specs |= {"class_weights": P(self.classes), "class_mask": self.of_mask(block.class_mask)}
        specs |= {"phi": self.per_row(block.phi)}
        return Block(**{name: spec for name, spec in specs.items() if getattr(block, name) is not None})

    def of_logits(self, z: Any) -> Any:
        if not isinstance(z, LinearLogits):
            return P(*self.rows, self.classes)
        specs: dict[str, Any] = {name: P() for name in shared_fields(z)}
        specs |= {name: P(*self.rows) for name in per_row_fields(z)}
        kernel = P(None, self.classes) if z.class_axis else P(self.classes, None)
        specs |= {"kernel": kernel, "bias": P(self.classes)}
        return replace(z, {name: spec for name, spec in specs.items() if getattr(z, name) is not None})

    def of_mask(self, class_mask: Any) -> Any:
        if class_mask is None:
            return None
        return P(self.classes) if class_mask.ndim == 1 else self.of_logits(class_mask)


def on_each_device(
    f: Callable[..., tuple[Any, Any]], split: Split | None, specs: Any, arguments: Any
) -> tuple[Any, Any]:
    """(sums, results per row) = `f(*arguments)` of what each device has; the sums of all devices are added up.

    What is split otherwise than `specs` say is moved first. On an auto mesh the rows are split as asked. Without a
    split, `f` as it is.
    """
    if split is None:
        return f(*arguments)
    types = zip(split.mesh.axis_names, split.mesh.axis_types, strict=True)
    explicit = {name for name, kind in types if kind == AxisType.Explicit}

    def local(*arguments: Any) -> tuple[Any, Any]:
        sums, per_row = f(*arguments)
        return jax.tree.map(lambda x: x[None], sums), per_row

    def move(x: Any, spec: P) -> Any:
        if not explicit:
            return x
        return jax.sharding.reshard(x, NamedSharding(split.mesh, spec))

    @jax.jit
    def everywhere(*arguments: Any) -> tuple[Any, Any]:
        out_specs = P(split.row_axes or None), P(*split.rows)
        how = {
            "mesh": split.mesh,
            "in_specs": specs,
            "out_specs": out_specs,
            "axis_names": explicit or {*split.row_axes},
        }
        mapped = jax.shard_map(local, **how)
        sums, per_row = mapped(*jax.tree.map(move, arguments, specs))
        return jax.tree.map(lambda x: jnp.sum(x, 0), sums), per_row

    return everywhere(*arguments)


def split_of(*layers: LinearLogits) -> Split | None:
    """How rows and classes of layers are split; None where no mesh says so. The first layer that is split decides.

    Where features, or classes beside the rows, are split over an axis, as in fully sharded data parallel training, the
    device gathers them.
    """
    types = [jax.typeof(x) for x in jax.tree.leaves(layers)]
    meshes = [t.sharding.mesh for t in types if AxisType.Explicit in t.sharding.mesh.axis_types]
    if not meshes:
        return None
    splits = [tuple(jax.typeof(layer.hidden).sharding.spec)[:-1] for layer in layers]
    rows = next(filter(any, splits), splits[0])
    taken = {name for entry in rows for name in axis_names(entry)}
    of_classes = [axis_names(jax.typeof(layer.kernel).sharding.spec[layer.class_axis]) for layer in layers]
    free = [tuple(name for name in names if name not in taken) for names in of_classes]
    return Split(meshes[0], rows, next(filter(any, free), None))


def sharding_of(*logits: Any) -> NamedSharding | None:
    """How rows and classes of logits are split on an explicit mesh; None elsewhere. The first that is split decides."""
    layers = [z for z in logits if isinstance(z, LinearLogits)]
    if layers:
        split = split_of(*layers)
        return None if split is None else NamedSharding(split.mesh, P(*split.rows, split.classes))
    return explicit_sharding(*logits)
