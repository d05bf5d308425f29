"""Logits of all pairs of two lists of rows, which exist a tile at a time, on one device or on a ring of them.

    z_ij = scale x_i . y_j,   row i and column i are a pair

On a ring each device has some rows of both lists. Those of y go round, with what is known of their columns, and come
home; what a device sends at a step is a list of its own length. tests/test_contrastive.py and its namesake for devices
guard it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._derivatives import varying_like
from ._devices import lanes, made_once, platform
from ._logits import linear
from ._logits.linear import LinearLogits
from ._rows import AxisName

BLOCK_BYTES = {"cpu": 2**20}  # of which its cache has several
BLOCK_BYTES_ON_ACCELERATORS = 128 * 2**20
MOST_ROWS = 2048  # of more, a TPU's compiler transposes a tile for sums over its columns


class Side(NamedTuple):
    """Rows of x, or of y, which are the columns of the logits. All fields are `[n, ...]`."""

    features: Array  # [n, D]
    number: Array  # int32, consecutive: row i of a pair is column i
    ids: Any  # pytree of int: rows that have the same are no negatives of each other; None: all are
    counts: Array | None  # bool; False: neither a row nor a negative of others
    paired: Array | None = None  # bool: the columns that have a loss; None: all of them


class Grid(NamedTuple):
    """How pairs are cut, all static."""

    rows: int  # of a tile
    columns: int
    axis_name: AxisName  # of the ring; None: no ring


# tile(x, y, of rows, of columns) -> (of rows, of columns)
Tile = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def grid_of(rows: int, columns: int, block_bytes: int | None, axis_name: AxisName, like: Any) -> Grid:
    """Tiles as square as can be, for what is read and written for one goes with its edges; but not too high."""
    if block_bytes is None:
        block_bytes = BLOCK_BYTES.get(platform(like), BLOCK_BYTES_ON_ACCELERATORS)
    numbers = max(block_bytes // 8, 1)  # logits and their gradient, in float32
    height = _even(rows, min(math.isqrt(numbers), MOST_ROWS))
    return Grid(height, _even(columns, max(numbers // height, 1)), axis_name)


def _even(size: int, most: int) -> int:
    """At most so many at a time: of the same number each, if that does not take many more blocks."""
    fewest = max(-(-size // most), 1)
    blocks = next((n for n in range(fewest, 2 * fewest) if size % n == 0), fewest)
    return max(-(-size // blocks), 1)


def for_all_pairs(grid: Grid, tile: Tile, x: Any, y: Any, of_rows: Any, of_columns: Any) -> tuple[Any, Any]:
    """`of_rows` and `of_columns`, updated tile by tile: `[n, ...]` like `x` and `y`, of n a multiple of the tile's."""
    # of what is made here nothing is kept for a second derivative
    tile = jax.checkpoint(tile)
    rows, columns = jax.tree.leaves(x)[0].shape[0], jax.tree.leaves(y)[0].shape[0]

    def visit(y: Any, of_rows: Any, of_columns: Any) -> tuple[Any, Any]:
        def of_column_block(j: Any, carry: Any) -> Any:
            of_rows, of_columns = carry
            ys, these = (_take(tree, j, grid.columns) for tree in (y, of_columns))

            def of_tile(i: Any, carry: Any) -> Any:
                of_rows, these = carry
                here, these = tile(_take(x, i, grid.rows), ys, _take(of_rows, i, grid.rows), these)
                return _put(of_rows, here, i), these

            of_rows, these = lax.fori_loop(0, rows // grid.rows, of_tile, (of_rows, these))
            return of_rows, _put(of_columns, these, j)

        return lax.fori_loop(0, columns // grid.columns, of_column_block, (of_rows, of_columns))

    of_rows, of_columns = varying_like((x, y), (of_rows, of_columns))
    if grid.axis_name is None:
        return visit(y, of_rows, of_columns)
    devices = lax.axis_size(grid.axis_name)
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def step(_: int, carry: Any) -> Any:
        y, of_rows, of_columns = carry
        coming = lax.ppermute(y, grid.axis_name, ring)  # while this device works
        of_rows, of_columns = visit(y, of_rows, of_columns)
        return coming, of_rows, lax.ppermute(of_columns, grid.axis_name, ring)

    return lax.fori_loop(0, devices, step, (y, of_rows, of_columns))[1:]


def _take(tree: Any, i: Any, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size), tree)


def _put(tree: Any, block: Any, i: Any) -> Any:
    def put(x: Array, part: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, part, i * part.shape[0], 0)

    return jax.tree.map(put, tree, block)


# One tile.


def products(x: Side, y: Side) -> Array:
    """x_i . y_j, summed in the accumulation dtype."""
    return linear.product(_layer(x, y))


def add_gradients(x: Side, y: Side, d_products: Array, dx: Array, dy: Array) -> tuple[Array, Array]:
    layer = _layer(x, y)
    operand = made_once(linear.operand(layer, d_products))
    return dx + linear.hidden_gradient(layer, operand), dy + linear.kernel_gradient(layer, operand)


def _layer(x: Side, y: Side) -> LinearLogits:
    """Rows of x in front of a kernel that is y."""
    return LinearLogits(x.features, y.features, class_axis=0)


def partner(x: Side, y: Side) -> Array:
    """int32 `[n]`: at which column of the tile, or at none."""
    return x.number - y.number[0]


def negatives(x: Side, y: Side) -> Array | None:
    """bool `[n, m]`: pairs, and those that have not the same ids; None: all."""
    if x.ids is None:
        return None
    same = [
        a[:, None] == b[None, :] for a, b in zip(jax.tree.leaves(x.ids), jax.tree.leaves(y.ids), strict=True)
    ]
    return ~functools.reduce(jnp.logical_and, same) | (lanes(same[0]) == partner(x, y)[:, None])
