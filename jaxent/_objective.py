"""From logits and a function of their statistics to a reduced loss: contracts, row masks, reduction."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr
from jax.sharding import PartitionSpec as P

from . import _contracts as contracts
from ._derivatives import varying_axes, varying_like
from ._devices import ALL, CLASSES, ROWS, lanes, split_as
from ._logits import sources
from ._logits.explicit import sharding_of, split_of
from ._logits.linear import LinearLogits, checked
from ._logits.sharded import AxisName
from ._numerics import accumulation_dtype, over_rows
from ._reduction import both, keep, reduce, row_weights, rows_that_count, scale_of_rows
from ._statistics import Block, SoftmaxStatistics, keep_rows, take_class
from ._tracing import derivative, example, hoist, is_same_function, takes_rows_apart, used_statistics

StatisticsFunction = Callable[..., Array]


def objective(
    function: str,
    fn: StatisticsFunction,
    logits: Array | LinearLogits,
    labels: Array | None,
    *row_args: Any,
    axis: int,
    where: Array | None,
    ignore_index: int | None,
    weights: Array | None,
    class_weights: Array | None,
    class_mask: Array | None,
    reduction: str,
    class_axis_name: AxisName,
    batch_axis_name: AxisName,
    all_of_the_label: bool = True,
) -> Array:
    """`fn(statistics, label_weight, *row_args)` of every row, reduced.

    `label_weight` is class_weights[label] where labels are integers, else 1. It belongs to the row: `fn` applies
    it, the mean divides by it. A loss that is `all_of_the_label` is a multiple of it: where it is 0 the row is hidden.
    """
    contracts.check_reduction(function, reduction)
    contracts.check_axis_names(function, class_axis_name, batch_axis_name)
    block, counts, weights, rows = prepare(
        function,
        logits,
        labels,
        axis,
        where,
        ignore_index,
        weights,
        class_weights,
        class_mask,
        class_axis_name,
    )
    label_weight = None
    if block.class_weights is not None and block.label is not None:
        # the row of a bad label counts: its loss is NaN
        label_weight = _label_weight(block.class_weights, block.label, class_axis_name)
        counts = both(counts, label_weight != 0) if all_of_the_label else counts
        label_weight = keep(counts, label_weight, 1)

    names = used_statistics(function, fn, block, rows, row_args)
    of_rows, of_all, join = _split_arguments(row_args, rows)
    sharding = sharding_of(block.logits)
    of_rows = [split_as(sharding, ROWS, x) for x in of_rows]
    own = (label_weight, of_rows, None if weights is None else weights == 0)
    classes = block.logits.shape[-1] * (1 if class_axis_name is None else lax.axis_size(class_axis_name))
    keep_rows = functools.partial(_keep_rows, classes)

    def call(shape: tuple[int, ...], statistics: SoftmaxStatistics, own: Any, of_all: Any) -> Array:
        def losses(statistics: SoftmaxStatistics, own: Any) -> Array:
            label_weight, of_rows, _ = own
            found = fn(statistics, 1 if label_weight is None else label_weight, *join(of_rows, of_all))
            return _check_losses(function, found, shape)

        found = losses(statistics, own)
        weightless = own[-1]
        if weightless is None:
            return found
        # what is not finite is gone with a weight of 0, and must not be differentiated
        counts = ~weightless | jnp.isfinite(found)
        return keep(counts, losses(*keep_rows(counts, (statistics, own))))

    if reduction != "none" and isinstance(block.logits, LinearLogits) and class_axis_name is None:
        scale = functools.partial(
            scale_of_rows, counts, weights, reduction, label_weight, rows, batch_axis_name=batch_axis_name
        )
        total = _sum_of_rows(call, keep_rows, names, block, counts, scale, own, of_all)
        if total is not None:
            return total if batch_axis_name is None else lax.psum(total, batch_axis_name)

    # inside the mask as well as outside: fn may turn what a hidden row holds into a NaN gradient
    statistics = sources.statistics(names, block, counts, class_axis_name)
    statistics, own = keep_rows(counts, (statistics, own))
    losses = call(rows, statistics, own, of_all)
    return reduce(losses, counts, weights, reduction, label_weight, batch_axis_name)


def _label_weight(class_weights: Array, label: Array, class_axis_name: AxisName) -> Array:
    """w_y; 1 for a bad label, whose loss is NaN and whose row counts."""
    if class_axis_name is None:
        weight = take_class(class_weights, label)
    else:
        classes = class_weights.shape[0]
        here = label - lax.axis_index(class_axis_name) * classes
        weight = lax.psum(take_class(class_weights, here), class_axis_name)
    return jnp.where(label < 0, 1, weight)


def _sum_of_rows(
    call: Callable[..., Array],
    keep_rows: Callable[..., Any],
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    scale: Callable[[Any], Array],
    own: Any,
    of_all: Any,
) -> Array | None:
    """sum_n scale_n call(...)_n of linear logits with all classes in one place, without the statistics of all rows.

    None unless that is right and, with all rows in one place, best. `scale` makes the factors of rows in the dtype of
    the losses.
    """
    rows, split = block.logits.shape[:-1], split_of(block.logits)
    if not rows or 0 in rows or not names or (split is not None and split.classes is not None):
        return None
    if split is None and sources.cut(block.logits, counts is not None).size is None:
        return None
    call_of_all = functools.partial(call, rows)
    statistics = example(names, rows, block.logits.dtype)
    factors = scale(jax.eval_shape(call_of_all, statistics, own, of_all).dtype)
    inputs = (block, counts, factors, own, of_all)
    statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)
    arguments = varying_like(inputs, (statistics, own, of_all))
    everything = jax.make_jaxpr(call_of_all)(*arguments)
    *per_row, shared = [len(jax.tree.leaves(tree)) for tree in arguments]
    is_of_row = [True] * sum(per_row) + [False] * shared
    try:
        with_tangents, moves = derivative(call_of_all, arguments)
    except Exception:
        return None  # it has no forward mode
    tangents = [of_row for of_row, m in zip(is_of_row, moves, strict=True) if m]
    if not takes_rows_apart(with_tangents, rows, is_of_row + tangents):
        return None
    if split is None:
        return _sum_by_blocks(call, keep_rows, everything, names, block, counts, factors, own, of_all)
    if any(isinstance(x, jax.Array) for x in everything.consts):
        return None  # what it closes over has a place on the mesh

    def on_device(block: Block, counts: Array | None, factors: Array, own: Any, of_all: Any) -> Array:
        total = _sum_of_rows(call, keep_rows, names, block, counts, lambda _: factors, own, of_all)
        if total is None:
            statistics = sources.statistics(names, block, counts)
            statistics, own = keep_rows(counts, (statistics, own))
            losses = call(factors.shape, statistics, own, of_all)
            total = jnp.sum(factors * keep(counts, losses))
        return lax.psum(total, split.row_axes)

    specs = (split.of_block(block), *split.of_rows(inputs[1:4]), jax.tree.map(lambda _: P(), of_all))
    return split.on_each_device(on_device, specs, inputs, P())


def _sum_by_blocks(
    call: Callable[..., Array],
    keep_rows: Callable[..., Any],
    everything: ClosedJaxpr,
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    factors: Array,
    own: Any,
    of_all: Any,
) -> Array | None:
    """The sum by blocks of rows; None if `call`, for all rows `everything`, is another function of a block."""
    rows = block.logits.shape[:-1]
    layout, _, size, _ = sources.cut(block.logits, counts is not None)
    assert size is not None
    shape = layout.block_shape(size)
    inputs = (block, counts, factors, own, of_all)
    statistics = example(names, shape, block.logits.dtype)
    statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)
    own_of_block = layout.as_block(jax.tree.map(lambda x: x[jnp.zeros(size, int)], layout.apart(own)))
    arguments = varying_like(inputs, (statistics, own_of_block, of_all))
    try:
        of_block = jax.make_jaxpr(functools.partial(call, shape))(*arguments)
    except Exception:
        return None  # it is written for the shape of all rows
    if not is_same_function(everything, rows, of_block, shape):
        return None
    call_of_block, closed_over = hoist(of_block, arguments)
    if any(varying_axes(x) != varying_axes(inputs) for x in closed_over):
        return None  # a shard_map's jaxpr says of each array over which devices it differs

    def losses(statistics: Any, counts: Array | None, own: Any, shared: Any) -> Array:
        statistics, own = layout.as_block(keep_rows(counts, (statistics, own)))
        return layout.from_block(call_of_block(shared[0], statistics, own, shared[1]), size)

    shared = (closed_over, of_all)
    weightless = own[-1]
    needed = counts if weightless is None else both(counts, ~weightless)
    return sources.weighted_sum(losses, layout, size, names, block, counts, needed, factors, own, shared)


def _check_losses(function: str, losses: Any, shape: tuple[int, ...]) -> Array:
    if not isinstance(losses, jax.Array) or not contracts.has_shape(losses, shape):
        remedy = (
            "It maps statistics `[...]`, one value per row, to one loss per row; `reduction` does the rest."
        )
        is_array = isinstance(losses, jax.Array)
        got = contracts.describe(losses) if is_array else f"one to a {type(losses).__name__}"
        expected = f"a function to losses of shape {list(shape)}"
        contracts.fail(ValueError, function, "fn", expected, got, remedy)
    return losses.astype(accumulation_dtype(losses.dtype))


def prepare(
    function: str,
    logits: Array | LinearLogits,
    labels: Array | None,
    axis: int,
    where: Array | None,
    ignore_index: int | None,
    weights: Array | None,
    class_weights: Array | None,
    class_mask: Array | None,
    class_axis_name: AxisName,
) -> tuple[Block, Array | None, Array | None, tuple[int, ...]]:
    """Checked arguments as (block with the class axis last, which rows count, their weights, shape of rows).

    Labels count over all classes; a bad one is -1.
    """
    check_logits(function, logits, axis)
    shape = logits.shape if isinstance(logits, LinearLogits) else np.shape(logits)
    classes = shape[axis]
    rows = tuple(np.delete(shape, axis).tolist())
    has_index = labels is not None and contracts.check_labels(function, labels, logits, axis)
    contracts.check_ignore_index(function, ignore_index, has_index)
    mask = contracts.host_mask(where, weights)
    where, weights = row_weights(function, rows, where, weights)
    if isinstance(logits, LinearLogits):
        logits = checked(function, logits)
    else:
        logits = jnp.moveaxis(jnp.asarray(logits), axis, -1)
    sharding = sharding_of(logits)
    where, weights = (split_as(sharding, ROWS, x) for x in (where, weights))
    what = "one per class"
    if class_weights is not None:
        contracts.check_real(function, "class_weights", class_weights)
        remedy = "For weights of rows use `weights`."
        contracts.check_shape(function, "class_weights", class_weights, (classes,), what, remedy)
    if class_mask is not None:
        check_class_mask(function, class_mask, shape, classes)
        class_mask = jnp.asarray(class_mask)
        if class_mask.ndim == 1:
            class_mask = split_as(sharding, CLASSES, class_mask)
        else:
            class_mask = split_as(sharding, ALL, jnp.moveaxis(class_mask, axis, -1))

    label = distribution = None
    if has_index:
        if class_axis_name is not None:
            classes *= lax.axis_size(class_axis_name)
        labels, ignored = contracts.index_labels(function, labels, classes, mask, ignore_index)
        labels, ignored = (split_as(sharding, ROWS, x) for x in (labels, ignored))
        if ignored is not None:
            where = both(where, ~ignored)
        ok = jnp.logical_and(labels >= 0, labels < classes)
        label = jnp.where(ok, labels, 0).astype(jnp.int32)
        if class_mask is not None:
            ok &= _in_force(class_mask, label, class_axis_name)
        label = jnp.where(ok, label, -1)
        seen = where if weights is None else both(where, weights != 0)
        contracts.debug_check_labels(function, ok if seen is None else ok | ~seen, labels, classes)
    dtype = accumulation_dtype(logits.dtype)
    if labels is not None and not has_index:
        distribution = split_as(sharding, ALL, jnp.moveaxis(jnp.asarray(labels), axis, -1)).astype(dtype)
        if class_mask is not None:  # probability on a class that is out of force is a bad label
            ok = over_rows(class_mask, distribution.ndim) | (distribution == 0)
            distribution = jnp.where(ok, distribution, jnp.nan)
    if class_weights is not None:
        class_weights = lax.stop_gradient(jnp.asarray(class_weights)).astype(dtype)
        class_weights = split_as(sharding, CLASSES, class_weights)
    block = Block(logits, label, distribution, class_weights, class_mask)
    counts = rows_that_count(where, weights, lambda: has_answer(block, class_axis_name))
    return block, counts, weights, rows


def has_answer(block: Block, class_axis_name: AxisName) -> Array:
    """Rows whose statistics are no NaN, as far as can be seen without a matmul."""
    if isinstance(block.logits, LinearLogits):
        top = jnp.where(jnp.all(jnp.isfinite(block.logits.hidden), -1), 0, jnp.inf)
        if block.class_mask is not None:
            top = jnp.where(jnp.any(block.class_mask, -1), top, -jnp.inf)
    else:
        top = jnp.max(lax.stop_gradient(block.wide_logits()), -1)
        top = jnp.where(jnp.isnan(top), jnp.inf, top)
    if block.distribution is not None:
        top = jnp.where(jnp.any(jnp.isnan(block.distribution), -1), jnp.inf, top)
    if class_axis_name is not None:
        top = lax.pmax(top, class_axis_name)
    ok = jnp.isfinite(top)
    return ok if block.label is None else ok & (block.label >= 0)


def check_logits(function: str, logits: Array | LinearLogits, axis: int, argument: str = "logits") -> None:
    if isinstance(logits, LinearLogits):
        checked(function, logits, argument)
        remedy = "The classes of a LinearLogits are the columns of its kernel."
        ok = axis in (-1, logits.ndim - 1)
        contracts.check_option(function, "axis", axis, ok, "the last axis", remedy)
    contracts.check_logits(function, logits, axis, argument)


def check_class_mask(function: str, class_mask: Any, shape: tuple[int, ...], classes: int) -> None:
    contracts.check_mask(function, "class_mask", class_mask)
    if not contracts.has_shape(class_mask, (classes,)):
        remedy = "True keeps a class in the softmax; nothing is broadcast."
        what = f"or [{classes}], one per class"
        contracts.check_shape(function, "class_mask", class_mask, shape, what, remedy)


def _in_force(class_mask: Array, label: Array, class_axis_name: AxisName) -> Array:
    classes = class_mask.shape[-1]
    if class_axis_name is not None:
        label = label - lax.axis_index(class_axis_name) * classes
    if class_mask.ndim == 1:
        found = take_class(class_mask, label)
    else:
        found = jnp.any((lanes(class_mask) == label[..., None]) & class_mask, -1)
    if class_axis_name is None:
        return found
    return lax.pmax(found.astype(jnp.int32), class_axis_name) > 0


def _split_arguments(row_args: Any, rows: tuple[int, ...]) -> tuple[list[Any], list[Any], Callable[..., Any]]:
    """Row arguments `[..., *anything]`, the other ones, and a function that puts both back in their places."""
    leaves, treedef = jax.tree.flatten(row_args)
    is_of_row = [np.shape(x)[: len(rows)] == rows for x in leaves]
    of_rows = [jnp.asarray(x) for x, of_row in zip(leaves, is_of_row, strict=True) if of_row]
    of_all = [jnp.asarray(x) for x, of_row in zip(leaves, is_of_row, strict=True) if not of_row]

    def join(of_rows: list[Any], of_all: list[Any]) -> Any:
        some, others = iter(of_rows), iter(of_all)
        return jax.tree.unflatten(treedef, [next(some if of_row else others) for of_row in is_of_row])

    return of_rows, of_all, join


def _keep_rows(classes: int, counts: Array | None, statistics_and_own: Any) -> Any:
    """Something harmless in rows that do not count: statistics of a plain row, 0 for arrays `[..., *anything]`."""
    statistics, own = statistics_and_own

    def of(x: Array) -> Array:
        if counts is None or jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys hide nothing
            return x
        return keep(counts.reshape(counts.shape + (1,) * (x.ndim - counts.ndim)), x)

    return keep_rows(counts, statistics, classes), jax.tree.map(of, own)
