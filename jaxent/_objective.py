"""From logits and a function of one row's statistics to a reduced loss: the door of all softmax losses.

An option is checked here or in `_rows.py`, once for all of them. tests/test_errors.py and test_options.py guard it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _contracts as contracts
from ._block import Block
from ._chosen import take
from ._devices import ALL, CLASSES, lanes, split_as
from ._logits import sources
from ._logits.explicit import sharding_of
from ._logits.linear import LinearLogits, checked
from ._numerics import accumulation_dtype, over_rows
from ._row_function import Arguments, row_function
from ._rows import AxisName, Options, Rows, keep, take_class
from ._sparse import BAD, SparseDistribution, check_classes, check_sparse, prepare_classes, prepare_sparse


def objective(
    fn: Callable[..., Any], block: Block, rows: Rows, row_args: tuple[Any, ...] = (), has_aux: bool = False
) -> Any:
    """`fn(statistics, label_weight, *row_args)` of each row, reduced; with `has_aux` (that, aux per row).

    `label_weight` is class_weights[label] where labels are integers, else 1. It belongs to the row: `fn` applies it,
    the mean divides by it.
    """
    label_weight = None if rows.label_weight is None else keep(rows.counts, rows.label_weight, 1)
    rows = rows._replace(label_weight=label_weight)
    weightless = None if rows.weights is None else rows.weights == 0
    arguments = Arguments(label_weight, weightless, jax.tree.map(rows.split, row_args))
    f = row_function(fn, block, rows, arguments, has_aux)
    loss, aux = sources.losses(f, block, rows, arguments)
    return (loss, aux) if has_aux else loss


def prepare(
    function: str, logits: Any, labels: Any, options: Options, argument: str = "labels"
) -> tuple[Block, Rows]:
    """Checked arguments, with the class axis last. Labels count over all classes; a bad one is -1."""
    axis = options.axis
    check_logits(function, logits, axis)
    shape = np.shape(logits)
    classes = shape[axis]
    is_sparse = isinstance(labels, SparseDistribution)
    if is_sparse:
        check_sparse(function, argument, labels, shape, axis)
    has_index = (
        not is_sparse and labels is not None and contracts.check_labels(function, labels, logits, axis)
    )
    contracts.check_ignore_index(function, options.ignore_index, has_index)
    linear = isinstance(logits, LinearLogits)
    logits = checked(function, logits) if linear else jnp.moveaxis(jnp.asarray(logits), axis, -1)
    dtype = accumulation_dtype(logits.dtype)
    rows = Rows.of(function, options, tuple(np.delete(shape, axis).tolist()), sharding_of(logits))
    class_weights = rows.class_weights(classes)
    class_mask = prepare_class_mask(rows, shape)
    label = chosen = in_force = slots_in_force = None
    distribution: Any = None
    if class_mask is not None:
        in_force, slots_in_force = (
            functools.partial(_in_force, find, class_mask, options.class_axis_name)
            for find in (_of_label, take)
        )
    if has_index:
        label, rows = rows.class_labels(labels, rows.all_classes(classes), in_force)
    elif is_sparse:
        distribution = prepare_sparse(rows, argument, labels, rows.all_classes(classes), slots_in_force)
        distribution = dataclasses.replace(distribution, probs=distribution.probs.astype(dtype))
    elif labels is not None:
        distribution = split_as(rows.sharding, ALL, jnp.moveaxis(jnp.asarray(labels), axis, -1)).astype(dtype)
        if class_mask is not None:  # probability on a class that is out of force is a bad label
            ok = over_rows(class_mask, distribution.ndim) | (distribution == 0)
            distribution = jnp.where(ok, distribution, jnp.nan)
    if options.classes is not None:
        check_classes(function, "classes", options.classes, shape, axis)
        chosen = prepare_classes(rows, "classes", options.classes, rows.all_classes(classes), slots_in_force)
    if class_weights is not None:
        class_weights = class_weights.astype(dtype)
        if label is not None:
            rows = rows.weigh_labels(class_weights, label)
    block = Block(logits, label, distribution, class_weights, class_mask, chosen)
    return block, rows.with_answers(lambda: has_answer(block, options.class_axis_name))


def has_answer(block: Block, class_axis_name: AxisName) -> Array:
    """Rows whose statistics are no NaN, as far as can be seen without a matmul."""
    if isinstance(block.logits, LinearLogits):
        top = jnp.where(jnp.all(jnp.isfinite(block.logits.hidden), -1), 0, jnp.inf)
        if block.class_mask is not None:
            top = jnp.where(jnp.any(block.class_mask, -1), top, -jnp.inf)
    else:
        top = jnp.max(lax.stop_gradient(block.wide_logits()), -1)
        top = jnp.where(jnp.isnan(top), jnp.inf, top)
    q = block.distribution
    if q is not None:
        probs = q.probs if isinstance(q, SparseDistribution) else q
        top = jnp.where(jnp.any(jnp.isnan(probs), -1), jnp.inf, top)
    if block.classes is not None:
        top = jnp.where(jnp.any(block.classes == BAD, -1), jnp.inf, top)
    if class_axis_name is not None:
        top = lax.pmax(top, class_axis_name)
    ok = jnp.isfinite(top)
    return ok if block.label is None else ok & (block.label >= 0)


def check_logits(function: str, logits: Any, axis: int, argument: str = "logits") -> None:
    if isinstance(logits, LinearLogits):
        checked(function, logits, argument)
        remedy = "The classes of a LinearLogits come last; `class_axis` is that of its kernel."
        ok = axis in (-1, logits.ndim - 1)
        contracts.check_option(function, "axis", axis, ok, "the last axis", remedy)
    contracts.check_logits(function, logits, axis, argument)


def prepare_class_mask(rows: Rows, shape: tuple[int, ...]) -> Array | None:
    """bool `[V]` or, with the class axis last, `[..., V]`."""
    class_mask, axis = rows.options.class_mask, rows.options.axis
    if class_mask is None:
        return None
    contracts.check_mask(rows.function, "class_mask", class_mask)
    if contracts.has_shape(class_mask, (shape[axis],)):
        return split_as(rows.sharding, CLASSES, jnp.asarray(class_mask))
    what = f"or [{shape[axis]}], one per class"
    remedy = "True keeps a class in the softmax; nothing is broadcast."
    contracts.check_shape(rows.function, "class_mask", class_mask, shape, what, remedy)
    return split_as(rows.sharding, ALL, jnp.moveaxis(jnp.asarray(class_mask), axis, -1))


def _in_force(
    find: Callable[[Array, Array], Array], class_mask: Array, class_axis_name: AxisName, classes: Array
) -> Array:
    if class_axis_name is not None:
        classes = classes - lax.axis_index(class_axis_name) * class_mask.shape[-1]
    found = find(class_mask, classes)
    if class_axis_name is None:
        return found
    return lax.pmax(found.astype(jnp.int32), class_axis_name) > 0


def _of_label(class_mask: Array, label: Array) -> Array:
    if class_mask.ndim == 1:
        return take_class(class_mask, label)
    return jnp.any((lanes(class_mask) == label[..., None]) & class_mask, -1)
