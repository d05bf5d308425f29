"""Over how many devices `jit` may split an axis: what is known of it while a program is traced."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType


class Spread(NamedTuple):
    """Over how many devices an axis may be split, and how many surely share the work."""

    possible: int
    known: int

    def groups(self, size: int) -> int:
        """Of an axis: whatever number of devices divides both divides this."""
        return math.gcd(size, self.possible)


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


def _devices_of_jit(mesh: Any) -> int:
    """What shard_map and pmap have split is split for good."""
    types = zip(mesh.shape.values(), mesh.axis_types, strict=True)
    return math.prod(size for size, kind in types if kind != AxisType.Manual)
