"""Statistics and losses of rows, wherever their logits come from."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from .._devices import is_known, spread
from .._statistics import INTEGER_STATISTICS, Block, SoftmaxStatistics
from . import class_blocks, dense, row_blocks, sharded
from .explicit import split_of
from .layout import Classes, Rows
from .linear import LinearLogits, of_rows, replace
from .plan import classes_of_a_block, plan, rows_of_a_block
from .row_blocks import BlockFunction, Inputs
from .sharded import AxisName

ROWS = 128  # at least so many are taken at a time where some do not count
ROWS_UNKNOWN = 1024  # what a plan takes for the number that a program is to be exported for


def statistics(
    names: tuple[str, ...], block: Block, counts: Array | None, class_axis_name: AxisName = None
) -> SoftmaxStatistics:
    """The statistics `names` of rows; the gradient of a row that does not count is exactly 0."""
    if not names:
        return SoftmaxStatistics()
    if isinstance(block.logits, LinearLogits) and 0 in block.logits.shape[:-1]:
        block = block._replace(logits=block.logits.dense())
    if not isinstance(block.logits, LinearLogits):
        if class_axis_name is not None:
            return sharded.statistics(names, block, counts, class_axis_name)
        return dense.statistics(names, block, counts)
    split = split_of(block.logits)
    if split is not None:

        def on_device(block: Block, counts: Array | None) -> SoftmaxStatistics:
            return statistics(names, block, counts, class_axis_name or split.classes)

        specs = (split.of_block(block), split.of_rows(counts))
        return split.on_each_device(on_device, specs, (block, counts), P(*split.rows))
    rows, classes, size, width = cut(block.logits, counts is not None)
    block, counts = _apart(rows, block), rows.apart(counts)
    if class_axis_name is not None:
        width = _classes_at_a_time(block.logits)
        found = sharded.statistics(names, block, counts, class_axis_name, classes, width)
    elif size is None:
        found = class_blocks.statistics(names, classes, width, block, counts)
    else:
        own, shared = _own_and_shared(block)

        def fn(logits: tuple[Array, ...], counts: Array | None, own: Any, shared: Any) -> tuple[Any, Any]:
            found = vars(dense.statistics(names, _join(logits[0], own, shared), counts))
            real = {name: found[name] for name in names if name not in INTEGER_STATISTICS}
            return real, {name: found[name] for name in names if name in INTEGER_STATISTICS}

        inputs = Inputs((block.logits,), counts, own, shared, block.class_mask)
        real, integers = row_blocks.map_rows(fn, size, inputs)
        found = SoftmaxStatistics(**real, **integers)
    return rows.together(found)


def weighted_sum(
    fn: Callable[[SoftmaxStatistics, Array | None, Any, Any], Array],
    layout: Rows,
    size: int,
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    needed: Array | None,
    weights: Array,
    rows: Any,
    shared: Any,
) -> Array:
    """sum_n weights_n fn(statistics, counts, rows, shared)_n of linear logits, `size` rows of each group at a time.

    `fn` sees `[size, *groups]` rows and must take each by itself; what it closes over is not differentiated. Rows that
    are not `needed` have a weight of 0.
    """
    block = _apart(layout, block)
    counts, needed, weights, rows = layout.apart((counts, needed, weights, rows))

    def of_block(logits: tuple[Array, ...], counts: Array | None, rows: Any, shared: Any) -> Any:
        found = dense.statistics(names, _join(logits[0], rows[0], shared[0]), counts)
        return fn(found, counts, rows[1], shared[1]), ()

    own, common = _own_and_shared(block)
    inputs = Inputs((block.logits,), counts, (own, rows), (common, shared), block.class_mask, needed)
    return row_blocks.sum_rows(of_block, size, inputs, weights)


def by_blocks_of_rows(
    fn: BlockFunction,
    arrays: int,
    layers: tuple[LinearLogits, ...],
    counts: Array | None,
    rows: Any,
    shared: Any,
    class_mask: Array | None,
    weights: Array | None = None,
) -> Array:
    """`fn` of several linear layers: its result per row, or their sum where `weights` are given.

    `arrays` is how many arrays of a block's size `fn` and its gradient need at a time.
    """
    devices = spread((layers, rows))
    layout = Rows.of(layers[0].shape[:-1], devices)
    block_bytes = devices.known * min(layer.block_bytes for layer in layers)
    itemsize = max(layer.dtype.itemsize for layer in layers)
    groups = math.prod(layout.groups)
    number = layout.number if is_known(layout.number) else ROWS_UNKNOWN
    size = rows_of_a_block(number, groups * layers[0].shape[-1], block_bytes, itemsize, arrays)
    counts, rows, weights = layout.apart((counts, rows, weights))
    layers = tuple(replace(x, layout.apart(of_rows(x))) for x in layers)
    mask = layout.apart(class_mask) if class_mask is not None and class_mask.ndim > 1 else class_mask
    inputs = Inputs(layers, counts, rows, shared, mask)
    if weights is not None:
        inputs = inputs._replace(needed=None if counts is None else counts & (weights != 0))
        return row_blocks.sum_rows(fn, size, inputs, weights)
    return layout.together(row_blocks.map_rows(fn, size, inputs)[0])


class Cut(NamedTuple):
    """Linear logits in blocks, of rows with all classes or of classes with all rows."""

    rows: Rows
    classes: Classes
    size: int | None  # how many rows of each group a block has; None where blocks of classes are better
    width: int  # how many classes a block has otherwise


def cut(logits: LinearLogits, masked: bool) -> Cut:
    """The plan for one device, of those that surely share the work; each has its part of every block.

    Masked rows are left out by whole blocks, so with a mask there should be some.
    """
    devices = spread(logits)
    rows, classes = Rows.of(logits.shape[:-1], devices), Classes.of(logits.shape[-1], devices)
    if not is_known(rows.number):
        return Cut(rows, classes, None, _classes_at_a_time(logits))
    platform, itemsize = jax.default_backend(), logits.dtype.itemsize
    share, features = -(-math.prod(rows.shape) // devices.known), logits.kernel.shape[0]
    best = plan(share, features, logits.shape[-1], logits.block_bytes, itemsize, platform)
    width = best.classes
    if width < logits.shape[-1]:
        return Cut(rows, classes, None, width)
    size = min(best.rows, max(-(-share // 8), ROWS)) if masked else best.rows
    return Cut(rows, classes, max(size * devices.known // math.prod(rows.groups), 1), width)


def _classes_at_a_time(logits: LinearLogits) -> int:
    *rows, features = logits.hidden.shape
    number, itemsize = math.prod(rows), logits.dtype.itemsize
    number = number if is_known(number) else ROWS_UNKNOWN
    return classes_of_a_block(number, features, logits.shape[-1], logits.block_bytes, itemsize)


def _apart(rows: Rows, block: Block) -> Block:
    logits, mask = block.logits, block.class_mask
    own, label, distribution = rows.apart((of_rows(logits), block.label, block.distribution))
    mask = rows.apart(mask) if mask is not None and mask.ndim > 1 else mask
    return Block(replace(logits, own), label, distribution, block.class_weights, mask)


def _own_and_shared(block: Block) -> tuple[Any, Any]:
    """Everything but the logits: what belongs to the rows, and what they have in common."""
    mask = block.class_mask
    of_rows, of_all = (None, mask) if mask is None or mask.ndim == 1 else (mask, None)
    return (block.label, block.distribution, of_rows), (block.class_weights, of_all)


def _join(logits: Array, own: Any, shared: Any) -> Block:
    label, distribution, of_rows = own
    class_weights, of_all = shared
    return Block(logits, label, distribution, class_weights, of_all if of_rows is None else of_rows)
