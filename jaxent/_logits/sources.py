"""Statistics and losses of rows, wherever their logits come from."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from .._statistics import INTEGER_STATISTICS, Block, SoftmaxStatistics
from . import class_blocks, dense, row_blocks, sharded
from .linear import LinearLogits
from .plan import Plan, classes_of_a_block, plan, rows_of_a_block
from .row_blocks import BlockFunction, Inputs
from .sharded import AxisName

ROWS = 128  # at least so many are taken at a time where some do not count


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
    rows = block.logits.shape[:-1]
    block, counts = _flat(block), flat_rows(counts, rows)
    if class_axis_name is not None:
        classes = _classes_at_a_time(block.logits)
        found = sharded.statistics(names, block, counts, class_axis_name, classes)
        return jax.tree.map(lambda x: x.reshape(rows), found)
    size = rows_at_a_time(block.logits, counts is not None)
    if size is None:
        found = class_blocks.statistics(names, _plan(block.logits).classes, block, counts)
    else:
        own, shared = _own_and_shared(block)

        def fn(logits: tuple[Array, ...], counts: Array | None, own: Any, shared: Any) -> tuple[Any, Any]:
            found = vars(dense.statistics(names, _join(logits[0], own, shared), counts))
            real = {name: found[name] for name in names if name not in INTEGER_STATISTICS}
            return real, {name: found[name] for name in names if name in INTEGER_STATISTICS}

        real, integers = row_blocks.map_rows(fn, size, Inputs((block.logits,), counts, own, shared))
        found = SoftmaxStatistics(**real, **integers)
    return jax.tree.map(lambda x: x.reshape(rows), found)


def weighted_sum(
    fn: Callable[[SoftmaxStatistics, Array | None, Any, Any], Array],
    size: int,
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    weights: Array,
    rows: Any,
    shared: Any,
) -> Array:
    """sum_n weights_n fn(statistics, counts, rows, shared)_n of linear logits, `size` rows at a time.

    `fn` sees `[size]` rows and must take each by itself; what it closes over is not differentiated.
    """
    leading = block.logits.shape[:-1]
    block = _flat(block)
    counts, weights, rows = flat_rows((counts, weights, rows), leading)

    def of_block(logits: tuple[Array, ...], counts: Array | None, rows: Any, shared: Any) -> Any:
        found = dense.statistics(names, _join(logits[0], rows[0], shared[0]), counts)
        return fn(found, counts, rows[1], shared[1]), ()

    own, common = _own_and_shared(block)
    inputs = Inputs((block.logits,), counts, (own, rows), (common, shared))
    return row_blocks.sum_rows(of_block, size, inputs, weights)


def by_blocks_of_rows(
    fn: BlockFunction,
    arrays: int,
    layers: tuple[LinearLogits, ...],
    counts: Array | None,
    rows: Any,
    shared: Any,
    weights: Array | None = None,
) -> Array:
    """`fn` of several linear layers: its result per row, or their sum where `weights` are given.

    `arrays` is how many arrays of a block's size `fn` and its gradient need at a time.
    """
    leading = layers[0].shape[:-1]
    counts, rows, weights = flat_rows((counts, rows, weights), leading)
    block_bytes = min(layer.block_bytes for layer in layers)
    itemsize = max(layer.dtype.itemsize for layer in layers)
    size = rows_of_a_block(math.prod(leading), layers[0].shape[-1], block_bytes, itemsize, arrays)
    layers = tuple(dataclasses.replace(x, hidden=flat_rows(x.hidden, leading)) for x in layers)
    inputs = Inputs(layers, counts, rows, shared)
    if weights is not None:
        return row_blocks.sum_rows(fn, size, inputs, weights)
    return row_blocks.map_rows(fn, size, inputs)[0].reshape(leading)


def rows_at_a_time(logits: LinearLogits, masked: bool) -> int | None:
    """How many rows a block has, with all classes; None where blocks of classes are better.

    Masked rows are left out by whole blocks, so with a mask there should be some.
    """
    best = _plan(logits)
    if best.classes < logits.shape[-1]:
        return None
    eighth = -(-math.prod(logits.shape[:-1]) // 8)
    return min(best.rows, max(eighth, ROWS)) if masked else best.rows


def _plan(logits: LinearLogits) -> Plan:
    *rows, features = logits.hidden.shape
    itemsize = logits.dtype.itemsize
    platform = jax.default_backend()
    return plan(math.prod(rows), features, logits.shape[-1], logits.block_bytes, itemsize, platform)


def _classes_at_a_time(logits: LinearLogits) -> int:
    rows, features = logits.hidden.shape
    return classes_of_a_block(rows, features, logits.shape[-1], logits.block_bytes, logits.dtype.itemsize)


def flat_rows(tree: Any, rows: tuple[int, ...]) -> Any:
    """Arrays `[*rows, ...]` as `[N, ...]`."""
    return jax.tree.map(lambda x: x.reshape(math.prod(rows), *x.shape[len(rows) :]), tree)


def some_rows(x: Array, rows: tuple[int, ...], index: Array) -> Array:
    """Some rows of `[*rows, ...]`, with as many axes: `[R, 1, ..., 1, ...]`."""
    return with_rank_of(flat_rows(x, rows)[index], len(rows))


def with_rank_of(tree: Any, axes: int) -> Any:
    """`[R, ...]` as `[R, 1, ..., 1, ...]`, with so many axes of rows: what counts axes finds them in their places."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], *(1,) * (axes - 1), *x.shape[1:]), tree)


def _flat(block: Block) -> Block:
    logits = block.logits
    rows = logits.shape[:-1]
    hidden, label, distribution = flat_rows((logits.hidden, block.label, block.distribution), rows)
    mask = block.class_mask
    mask = flat_rows(mask, rows) if mask is not None and mask.ndim > 1 else mask
    logits = dataclasses.replace(logits, hidden=hidden)
    return Block(logits, label, distribution, block.class_weights, mask)


def _own_and_shared(block: Block) -> tuple[Any, Any]:
    """Everything but the logits: what belongs to the rows, and what they have in common."""
    mask = block.class_mask
    of_rows, of_all = (None, mask) if mask is None or mask.ndim == 1 else (mask, None)
    return (block.label, block.distribution, of_rows), (block.class_weights, of_all)


def _join(logits: Array, own: Any, shared: Any) -> Block:
    label, distribution, of_rows = own
    class_weights, of_all = shared
    return Block(logits, label, distribution, class_weights, of_all if of_rows is None else of_rows)
