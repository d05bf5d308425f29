"""Statistics and losses of rows, wherever their logits come from: the one place that chooses how they are cut.

tests/test_linear_compile.py counts what the choice costs; tests/devices/test_explicit.py and test_jit.py guard meshes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .._block import Block
from .._derivatives import varying_axes
from .._devices import Spread, is_known, platform, spread
from .._row_function import Arguments, RowFunction, hoist
from .._rows import AxisName, Rows, both, keep
from .._statistics import INTEGER_STATISTICS, SoftmaxStatistics, record
from . import dense, row_blocks, sharded
from .explicit import on_each_device, split_of
from .layout import ClassLayout, RowLayout
from .linear import LinearLogits, operand_dtype, per_row_fields, replace
from .plan import Plan, Sizes, plan, plan_by_classes, plan_by_rows
from .row_blocks import BlockFunction, Inputs, Static

ROWS = 128  # at least so many are taken at a time where some do not count
ROWS_UNKNOWN = 1024  # what a plan takes for the number that a program is to be exported for


def losses(f: RowFunction, block: Block, rows: Rows, arguments: Arguments) -> tuple[Array, Any]:
    """(`f` of all rows, reduced as they ask; aux per row)."""
    if _in_blocks(f, block, rows, arguments):
        split = split_of(block.logits)
        inputs = block, rows.counts, rows.scale(f.dtype), arguments
        specs = None if split is None else (split.of_block(block), *split.per_row(inputs[1:]))
        total, aux = on_each_device(functools.partial(_weighted_sum, f), split, specs, inputs)
        return rows.sum_over_batch(total), aux
    found = statistics(f.names, block, rows.counts, rows.options.class_axis_name)
    losses, aux = f.of_rows((), found, rows.counts, arguments, rows.shape)
    return rows.reduce(losses), aux


def _in_blocks(f: RowFunction, block: Block, rows: Rows, arguments: Arguments) -> bool:
    """Whether a sum can be taken without the statistics of all rows."""
    if not isinstance(block.logits, LinearLogits) or rows.options.reduction == "none":
        return False
    if rows.options.class_axis_name is not None or not f.names or 0 in rows.shape:
        return False
    split = split_of(block.logits)
    # what it closes over has a place on the mesh, and no other on each device
    return split is None or (split.classes is None and not hoist(f, block, rows.counts, arguments)[1])


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
    specs = None if split is None else (split.of_block(block), split.per_row(counts))
    name = class_axis_name if split is None else class_axis_name or split.classes

    def here(block: Block, counts: Array | None) -> tuple[tuple[()], SoftmaxStatistics]:
        return (), _statistics_of_layer(names, block, counts, name)

    return on_each_device(here, split, specs, (block, counts))[1]


def _statistics_of_layer(
    names: tuple[str, ...], block: Block, counts: Array | None, class_axis_name: AxisName
) -> SoftmaxStatistics:
    rows, classes, best = cut(block.logits, counts is not None, class_axis_name is not None)
    if best is None:
        block, counts = _grouped(rows, block), rows.grouped(counts)
        return rows.ungrouped(sharded.statistics(names, block, counts, class_axis_name, classes))

    def of_block(logits: Any, counts: Array | None, per_row: Any, shared: Any) -> tuple[Any, Any]:
        found = vars(dense.statistics(names, _joined(logits[0], per_row, shared), counts))
        real = {name: found[name] for name in names if name not in INTEGER_STATISTICS}
        return real, {name: found[name] for name in names if name in INTEGER_STATISTICS}

    inputs = Inputs((block.logits,), counts, *_rest_of(block), block.class_mask)
    real, integers = _by_rows(of_block, rows, best, inputs)
    return record(real | integers)


def _weighted_sum(
    f: RowFunction, block: Block, counts: Array | None, scale: Array, arguments: Arguments
) -> tuple[Array, Any]:
    """(sum_n scale_n f_n of linear logits with all classes in one place, aux per row)."""
    rows, _, best = cut(block.logits, counts is not None)
    hoisted, closed_over = hoist(f, block, (counts, scale), arguments)
    axes = varying_axes((block, counts, scale, arguments))
    # in a shard_map the trace says of each array over which axes it varies
    if best is None or any(varying_axes(x) != axes for x in closed_over):
        losses, aux = f.of_rows((), statistics(f.names, block, counts), counts, arguments, scale.shape)
        return jnp.sum(scale * keep(counts, losses)), aux

    def of_block(logits: Any, counts: Array | None, per_row: Any, shared: Any) -> tuple[Any, Any]:
        block = _joined(logits[0], per_row[0], shared[0])
        found = dense.statistics(hoisted.names, block, counts)
        return hoisted.of_rows(shared[1], found, counts, per_row[1], block.logits.shape[:-1])

    per_row, shared = _rest_of(block)
    skips = arguments.weightless is not None and not f.has_aux
    needed = both(counts, ~arguments.weightless) if skips else counts
    parts = (per_row, arguments), (shared, closed_over)
    inputs = Inputs((block.logits,), counts, *parts, block.class_mask, needed)
    return _by_rows(of_block, rows, best, inputs, scale)


def by_blocks_of_rows(
    fn: BlockFunction, arrays: int, inputs: Inputs, weights: Array | None = None
) -> tuple[Any, Any]:
    """`fn` of several linear layers: its results per row, or their sum where `weights` are given.

    `arrays` is how many arrays of a block's size `fn` and its gradient need at a time.
    """
    layers = inputs.layers
    devices = spread((layers, inputs.rows))
    rows = RowLayout.of(layers[0].shape[:-1], devices)
    given = [layer.block_bytes for layer in layers if layer.block_bytes is not None]
    sizes = [_sizes(layer, math.prod(rows.shape), devices) for layer in layers]
    gradient = sum(size.gradient for size in sizes)
    logits = max(arrays * max(layer.dtype.itemsize for layer in layers) - gradient, 1)
    features = sum(size.features for size in sizes)
    together = sizes[0]._replace(features=features, logits=logits, gradient=gradient)
    best = plan_by_rows(together, min(given, default=None), platform(layers))
    if weights is not None and inputs.counts is not None:
        inputs = inputs._replace(needed=inputs.counts & (weights != 0))
    return _by_rows(fn, rows, _in_groups(best, rows, devices), inputs, weights)


class Cut(NamedTuple):
    """Linear logits in blocks, of rows with all classes or of classes with all rows."""

    rows: RowLayout
    classes: ClassLayout
    by_rows: Plan | None  # rows of each group; None where blocks of classes are better


def cut(logits: LinearLogits, masked: bool, by_classes: bool = False) -> Cut:
    """The plan for one device, of those that surely share the work; each has its part of every block.

    Masked rows are left out by whole blocks, or pieces of one, so with a mask there should be some.
    """
    shape, classes = logits.hidden.shape[:-1], logits.shape[-1]
    devices, machine = spread(logits), platform(logits)
    rows = RowLayout.of(shape, devices)
    if by_classes or not is_known(rows.number):
        number = math.prod(shape) if is_known(rows.number) else ROWS_UNKNOWN
        width = plan_by_classes(_sizes(logits, number, Spread(1, 1)), logits.block_bytes, machine)
        return Cut(rows, ClassLayout.of(classes, width, devices), None)
    sizes = _sizes(logits, math.prod(shape), devices)
    best = plan(sizes, logits.block_bytes, machine)
    layout = ClassLayout.of(classes, best.classes, devices)
    if best.classes < classes:
        return Cut(rows, layout, None)
    if masked:
        piece = min(best.rows, max(-(-sizes.rows // 8), ROWS))
        best = best._replace(
            rows=piece, pieces=-(-best.rows * best.pieces // piece) if best.pieces > 1 else 1
        )
    return Cut(rows, layout, _in_groups(best, rows, devices))


def _sizes(layer: LinearLogits, rows: Any, devices: Spread) -> Sizes:
    """On one device. A CPU widens half precision."""
    rows = -(-rows // devices.known) if is_known(rows) else ROWS_UNKNOWN
    features, classes = layer.hidden.shape[-1], layer.shape[-1]
    logits = layer.dtype.itemsize
    if platform(layer) == "cpu":
        return Sizes(rows, features, classes, logits, logits, logits)
    return Sizes(rows, features, classes, layer.hidden.dtype.itemsize, logits, operand_dtype(layer).itemsize)


def _in_groups(best: Plan, rows: RowLayout, devices: Spread) -> Plan:
    """How many rows of each group a piece has."""
    return best._replace(rows=max(best.rows * devices.known // math.prod(rows.groups), 1))


def _by_rows(
    fn: BlockFunction, layout: RowLayout, best: Plan, inputs: Inputs, weights: Array | None = None
) -> Any:
    inputs, static = inputs.grouped(layout), Static(fn, best.rows, best.pieces, best.fused)
    if weights is None:
        return layout.ungrouped(row_blocks.map_rows(static, inputs))
    total, aux = row_blocks.sum_rows(static, inputs, layout.grouped(weights))
    return total, layout.ungrouped(aux)


def _rest_of(block: Block) -> tuple[Any, Any]:
    """Everything but the logits: what rows have of their own, and what they share."""
    mask = block.class_mask
    per_row, shared = (None, mask) if mask is None or mask.ndim == 1 else (mask, None)
    return (block.label, block.distribution, per_row, block.classes, block.phi), (block.class_weights, shared)


def _joined(logits: Any, per_row: Any, shared: Any) -> Block:
    label, distribution, mask, *of_row = per_row
    class_weights, mask_of_all = shared
    return Block(logits, label, distribution, class_weights, mask_of_all if mask is None else mask, *of_row)


def _grouped(layout: RowLayout, block: Block) -> Block:
    per_row, shared = _rest_of(block)
    logits = replace(block.logits, layout.grouped(per_row_fields(block.logits)))
    return _joined(logits, layout.grouped(per_row), shared)
