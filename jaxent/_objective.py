"""From logits and a function of their statistics to a reduced loss: contracts, row masks, reduction."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _contracts as contracts
from ._logits import dense
from ._numerics import accumulation_dtype
from ._reduction import keep, reduce, row_weights
from ._statistics import INTEGER_STATISTICS, STATISTICS, Block, SoftmaxStatistics, take_class

StatisticsFunction = Callable[..., Array]


def objective(
    function: str,
    fn: StatisticsFunction,
    logits: Array,
    labels: Array | None,
    *row_args: Any,
    axis: int,
    where: Array | None,
    ignore_index: int | None,
    weights: Array | None,
    class_weights: Array | None,
    class_mask: Array | None,
    reduction: str,
) -> Array:
    """`fn(statistics, label_weight, *row_args)` of every row, reduced.

    `label_weight` is class_weights[label] where labels are integers, else 1. It belongs to the row: `fn` applies
    it, the mean divides by it.
    """
    contracts.check_reduction(function, reduction)
    block, counts, weights, rows = prepare(
        function, logits, labels, axis, where, ignore_index, weights, class_weights, class_mask
    )
    label_weight = None
    if block.class_weights is not None and block.label is not None:
        # the row of a bad label counts: its loss is NaN
        label_weight = jnp.where(block.label < 0, 1, take_class(block.class_weights, block.label))
        counts = both(counts, label_weight != 0)

    names = used_statistics(function, fn, block, rows, row_args)
    statistics = dense.statistics(names, block, counts)
    # inside the mask as well as outside: fn may turn what a hidden row holds into a NaN gradient
    statistics = jax.tree.map(lambda x: keep(counts, x), statistics)
    row_args = jax.tree.map(lambda x: _keep_rows(counts, x, rows), row_args)
    losses: Any = fn(statistics, 1 if label_weight is None else keep(counts, label_weight, 1), *row_args)
    if not isinstance(losses, jax.Array) or not contracts.has_shape(losses, rows):
        remedy = (
            "It maps statistics `[...]`, one value per row, to one loss per row; `reduction` does the rest."
        )
        is_array = isinstance(losses, jax.Array)
        got = contracts.describe(losses) if is_array else f"one to a {type(losses).__name__}"
        contracts.fail(ValueError, function, "fn", f"a function to losses of shape {list(rows)}", got, remedy)
    losses = losses.astype(accumulation_dtype(losses.dtype))
    return reduce(losses, counts, weights, reduction, label_weight)


def prepare(
    function: str,
    logits: Array,
    labels: Array | None,
    axis: int,
    where: Array | None,
    ignore_index: int | None,
    weights: Array | None,
    class_weights: Array | None,
    class_mask: Array | None,
) -> tuple[Block, Array | None, Array | None, tuple[int, ...]]:
    """Checked arguments as (block with the class axis last, which rows count, their weights, shape of rows)."""
    contracts.check_logits(function, logits, axis)
    shape = np.shape(logits)
    classes = shape[axis]
    rows = tuple(np.delete(shape, axis).tolist())
    has_index = labels is not None and contracts.check_labels(function, labels, logits, axis)
    if ignore_index is not None:
        remedy = "It hides rows by their label; hide rows of a distribution with `where=`."
        usable = has_index and isinstance(ignore_index, int | np.integer)
        expected = "an int beside integer labels"
        contracts.check_option(function, "ignore_index", ignore_index, usable, expected, remedy)
    raw_weights = weights
    counts, weights = row_weights(function, rows, where, weights)
    what = "one per class"
    if class_weights is not None:
        contracts.check_real(function, "class_weights", class_weights)
        remedy = "For weights of rows use `weights`."
        contracts.check_shape(function, "class_weights", class_weights, (classes,), what, remedy)
    if class_mask is not None:
        check_class_mask(function, class_mask, shape, classes)
        class_mask = jnp.asarray(class_mask)
        class_mask = class_mask if class_mask.ndim == 1 else jnp.moveaxis(class_mask, axis, -1)

    label = distribution = None
    if has_index:
        mask = contracts.host_mask(where, raw_weights)
        labels, ignored = contracts.index_labels(function, labels, classes, mask, ignore_index)
        if ignored is not None:
            counts = both(counts, ~ignored)
        ok = jnp.logical_and(labels >= 0, labels < classes)
        label = jnp.where(ok, labels, 0).astype(jnp.int32)
        if class_mask is not None:
            ok &= _in_force(class_mask, label)
        label = jnp.where(ok, label, -1)
        contracts.debug_check_labels(function, ok if counts is None else ok | ~counts, labels, classes)
    logits = jnp.moveaxis(jnp.asarray(logits), axis, -1)
    dtype = accumulation_dtype(logits.dtype)
    if labels is not None and not has_index:
        distribution = jnp.moveaxis(jnp.asarray(labels), axis, -1).astype(dtype)
        if class_mask is not None:  # probability on a class that is out of force is a bad label
            distribution = jnp.where(class_mask | (distribution == 0), distribution, jnp.nan)
    if class_weights is not None:
        class_weights = lax.stop_gradient(jnp.asarray(class_weights)).astype(dtype)
    return Block(logits, label, distribution, class_weights, class_mask), counts, weights, rows


def check_class_mask(function: str, class_mask: Any, shape: tuple[int, ...], classes: int) -> None:
    contracts.check_mask(function, "class_mask", class_mask)
    if not contracts.has_shape(class_mask, (classes,)):
        remedy = "True keeps a class in the softmax; nothing is broadcast."
        what = f"or [{classes}], one per class"
        contracts.check_shape(function, "class_mask", class_mask, shape, what, remedy)


class _Recorder(SoftmaxStatistics):
    """Statistics that remember which of them were read. As a pytree (fn may be jitted) all of them are."""

    def __getattribute__(self, name: str) -> Any:
        if name in STATISTICS:
            object.__getattribute__(self, "on_read")(name)
        return object.__getattribute__(self, name)


jax.tree_util.register_pytree_node(
    _Recorder,
    lambda s: (tuple(getattr(s, name) for name in STATISTICS), None),
    lambda _, fields: cast(_Recorder, SoftmaxStatistics(*fields)),
)


def used_statistics(
    function: str, fn: StatisticsFunction, block: Block, rows: tuple[int, ...], row_args: Any
) -> tuple[str, ...]:
    """Which statistics `fn` reads, found by tracing it once: what it does not read is never computed."""
    available = available_statistics(block)
    dtype = accumulation_dtype(block.logits.dtype)
    used: set[str] = set()

    def trace(statistics: dict[str, Array], row_args: Any) -> Any:
        recorder = _Recorder(**statistics)
        object.__setattr__(recorder, "on_read", used.add)
        return fn(recorder, jnp.ones(rows, dtype), *row_args)

    shapes = {
        name: jax.ShapeDtypeStruct(rows, jnp.int32 if name in INTEGER_STATISTICS else dtype)
        for name in available
    }
    try:
        jax.eval_shape(trace, shapes, row_args)
    except TypeError as error:
        missing = sorted(used.difference(available))
        if not missing:
            raise
        remedy = "Pass class indices; `rank` needs them, `log_prob` a distribution at least."
        got = "None" if block.distribution is None else "a distribution"
        expected = f"given for `fn` to read `{missing[0]}`"
        raise contracts.error(TypeError, function, "labels", expected, got, remedy) from error
    return tuple(name for name in available if name in used)


def available_statistics(block: Block) -> tuple[str, ...]:
    missing = {"rank"} if block.label is None else set()
    if block.label is None and block.distribution is None:
        missing |= {"log_prob", "weighted_log_prob"}
    return tuple(name for name in STATISTICS if name not in missing)


def both(a: Array | None, b: Array | None) -> Array | None:
    """a and b, where None is True everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _in_force(class_mask: Array, label: Array) -> Array:
    if class_mask.ndim == 1:
        return class_mask[label]
    hit = jnp.arange(class_mask.shape[-1]) == label[..., None]
    return jnp.any(hit & class_mask, -1)


def _keep_rows(counts: Array | None, x: Any, rows: tuple[int, ...]) -> Any:
    """Row arguments `[..., *anything]`: 0 in rows that do not count; other arguments as they are."""
    shape = np.shape(x)
    if counts is None or shape[: len(rows)] != rows:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys hide nothing
        return x
    return keep(counts.reshape(rows + (1,) * (len(shape) - len(rows))), jnp.asarray(x))
