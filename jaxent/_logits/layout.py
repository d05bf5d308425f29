"""Rows and classes laid out so that a loop over blocks of them moves nothing between devices.

`jit` may split an axis over devices, each with a stretch of it. If a block were a stretch as well, it would be on one
device, and XLA would gather the axis. So an axis is taken apart into groups, each on one device however many share the
axis, and a block takes a piece of every group.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._devices import Spread


class RowLayout(NamedTuple):
    """Rows `[*shape]` as `[n, *groups]`: a loop takes blocks along the first axis.

    A group per axis, or none at all where `jit` cannot split the rows: then it is a plain list of them.
    """

    shape: tuple[int, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], spread: Spread) -> "RowLayout":
        groups = tuple(map(spread.groups, shape)) if math.prod(shape) else ()
        return cls(shape, groups if math.prod(groups) > 1 else ())

    @property
    def number(self) -> int:
        return math.prod(self.shape) // math.prod(self.groups)

    def grouped(self, tree: Any) -> Any:
        """`[*shape, ...]` as `[n, *groups, ...]`."""
        axes = range(len(self.groups))

        def of(x: Array) -> Array:
            rest = x.shape[len(self.shape) :]
            if not self.groups:
                return x.reshape(self.number, *rest)
            x = x.reshape(*self._split(), *rest)
            x = jnp.moveaxis(x, [2 * i + 1 for i in axes], list(axes))
            return x.reshape(self.number, *self.groups, *rest)

        return jax.tree.map(of, tree)

    def ungrouped(self, tree: Any) -> Any:
        """The inverse."""
        axes = range(len(self.groups))

        def of(x: Array) -> Array:
            rest = x.shape[1 + len(self.groups) :]
            if self.groups:
                x = x.reshape(*self._split()[1::2], *self.groups, *rest)
                x = jnp.moveaxis(x, list(axes), [2 * i + 1 for i in axes])
            return x.reshape(*self.shape, *rest)

        return jax.tree.map(of, tree)

    def _split(self) -> tuple[int, ...]:
        """Each axis as its groups and what a group has of it."""
        return sum(((n, size // n) for size, n in zip(self.shape, self.groups, strict=True)), ())


class ClassLayout(NamedTuple):
    """V classes as `[groups, n]`: a block takes `width` of each group, the last one fewer, from `start` on."""

    groups: int
    number: int  # of a group
    width: int

    @classmethod
    def of(cls, classes: int, block: int, spread: Spread) -> "ClassLayout":
        """In blocks of so many classes."""
        groups = spread.groups(classes)
        return cls(groups, classes // groups, max(block // groups, 1))

    def take(self, x: Array, start: Any, width: int, axis: int = -1) -> Array:
        """`[..., V]` -> `[..., groups * width]`, or likewise along another axis."""
        apart = jax.lax.dynamic_slice_in_dim(self._apart(x, axis), start, width, axis % x.ndim + 1)
        return apart.reshape(self._with(x, axis, self.groups * width))

    def put(self, x: Array, block: Array, start: Any, axis: int = -1) -> Array:
        """The inverse: `x` with the block in its place."""
        apart, block = self._apart(x, axis), self._apart(block, axis)
        return jax.lax.dynamic_update_slice_in_dim(apart, block, start, axis % x.ndim + 1).reshape(x.shape)

    def _apart(self, x: Array, axis: int) -> Array:
        return x.reshape(self._with(x, axis, self.groups, x.shape[axis] // self.groups))

    @staticmethod
    def _with(x: Array, axis: int, *sizes: int) -> tuple[int, ...]:
        """The shape of `x` with these in place of an axis."""
        axis %= x.ndim
        return (*x.shape[:axis], *sizes, *x.shape[axis + 1 :])

    def lane(self, label: Array, start: Any, width: int) -> Array:
        """Where a block has the class, -1 where it has not."""
        group, offset = label // self.number, label % self.number - start
        here = (label >= 0) & (group < self.groups) & (offset >= 0) & (offset < width)
        return jnp.where(here, group * width + offset, -1)

    def of_lane(self, lane: Array, start: Any, width: int) -> Array:
        """The inverse."""
        return lane // width * self.number + start + lane % width
