"""Over how many devices `jit` may split an axis: what is known of it while a program is traced."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class Spread(NamedTuple):
    """Over how many devices an axis may be split, and how many surely share the work."""

    possible: int
    known: int

    def groups(self, size: int) -> int:
        """Of an axis: whatever number of devices divides both divides this."""
        return math.gcd(size, self.possible) if is_known(size) else 1


def is_known(size: Any) -> bool:
    """Not where a program is exported for any number of rows."""
    return isinstance(size, int)


def spread(tree: Any) -> Spread:
    """Of arrays: a mesh that they, or the context, have; without one it may be any of jax's devices.

    How an axis is split over an auto mesh is not known: XLA decides after the program was traced.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
    meshes = [mesh for mesh in (*meshes, jax.sharding.get_abstract_mesh()) if not mesh.empty]
    if not meshes:
        return Spread(jax.device_count(), 1)
    devices = max(map(_devices_of_jit, meshes))
    return Spread(devices, devices)


def platform(tree: Any) -> str:
    """What the program is for: the devices of the mesh that arrays have, or of the arrays, else what jax would take."""
    for mesh in (
        *(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)),
        jax.sharding.get_abstract_mesh(),
    ):
        if not mesh.empty and mesh.abstract_device is not None:
            return str(mesh.abstract_device.platform)
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return str(next(iter(x.devices())).platform)
    return jax.default_backend()


def row_major(x: Array) -> Array:
    """`x`, made in the layout that arrays have in memory: a TPU's compiler would transpose it at the end.

    Arrays that have no whole number of lanes lie transposed themselves.
    """
    if platform(x) != "tpu" or x.shape[-1] % 128:
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def made_once(tree: Any) -> Any:
    """On accelerators XLA would make it as a part of each matmul that reads it, once for each tile of the result."""
    return tree if platform(tree) == "cpu" else jax.lax.optimization_barrier(tree)


def largest(z: Array) -> Array:
    """The maximum over the last axis; NaN if there is one.

    The select changes nothing, but a TPU's compiler makes a fusion of it: 2.7 times as fast as a maximum alone.
    """
    if platform(z) == "tpu":
        z = jnp.where(z == -jnp.inf, -jnp.inf, z)
    return jnp.max(z, -1)


def _devices_of_jit(mesh: Any) -> int:
    """What shard_map and pmap have split is split for good."""
    types = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    return math.prod(size for size, kind in types if kind != AxisType.Manual)


def explicit_sharding(*arrays: Any) -> Any:
    """How the first array that is split is split on an explicit mesh, where types say so; None elsewhere."""
    found = [jax.typeof(x).sharding for x in arrays]
    found = [x for x in found if AxisType.Explicit in x.mesh.axis_types]
    return next((x for x in found if any(x.spec)), found[0] if found else None)


def classes_on_one_device(x: Array) -> bool:
    """Whether the last axis surely is."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return spread(x).possible == 1
    types = zip(sharding.mesh.shape.values(), sharding.mesh.axis_types, strict=True)
    is_auto = any(size > 1 and kind == AxisType.Auto for size, kind in types)
    return not is_auto and (*sharding.spec, *[None] * x.ndim)[x.ndim - 1] is None


def axis_names(entry: Any) -> tuple[Any, ...]:
    """Of an entry of a PartitionSpec, or of an option that is a name or several."""
    return () if entry is None else tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def split_as(sharding: Any, axes: slice, x: Any) -> Any:
    """`x`, whose first axes are those `axes` of logits, split as these are on an explicit mesh.

    Elsewhere (`sharding` is None) `x` itself. Its derivative comes back in the split that `x` had.
    """
    if x is None or sharding is None:
        return x
    first, old = tuple(sharding.spec)[axes], (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[: x.ndim]
    spec = (*first, *old[len(first) :])
    if spec == old:
        return x
    try:
        return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*spec)))
    except ValueError:
        return x  # on one device, and neither in `jit` nor in `jax.set_mesh`: jax cannot


def lanes(x: Array, dtype: Any = jnp.int32) -> Array:
    """0, 1, ... along the last axis of `x`, of its rank: `[1, ..., 1, V]`."""
    return jax.lax.broadcasted_iota(dtype, (1,) * (x.ndim - 1) + x.shape[-1:], x.ndim - 1)


CLASSES, ALL = slice(-1, None), slice(None)  # axes of logits [..., V]
