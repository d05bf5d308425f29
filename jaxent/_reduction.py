"""Which rows count, how much, and what is made of them: where, weights, the three reductions, the weighted mean."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from . import _contracts as contracts
from ._devices import ALL, explicit_sharding, split_as
from ._numerics import accumulation_dtype, widen


def row_weights(function: str, shape: tuple[int, ...], where, weights, argument_of_rows: str = "logits"):
    """(where, weights), checked: a bool array or None, a float array or None."""
    what = f"one per row of `{argument_of_rows}`"
    if where is not None:
        contracts.check_mask(function, "where", where)
        remedy = "A mask is never broadcast: use `jnp.broadcast_to(where, rows)` if you mean it."
        contracts.check_shape(function, "where", where, shape, what, remedy)
        where = jnp.asarray(where)
    if weights is None:
        return where, None
    contracts.check_real(function, "weights", weights)
    remedy = "Weights are never broadcast: use `jnp.broadcast_to(weights, rows)` if you mean it."
    contracts.check_shape(function, "weights", weights, shape, what, remedy)
    weights = jnp.asarray(weights)
    return where, weights.astype(accumulation_dtype(weights.dtype))


def elements(
    function: str, argument: str, x: Any, labels: Any, where: Any, weights: Any, sharding: Any
) -> tuple[Array, Array | None, Array | None]:
    """(labels, where, weights) of elements `x`, each a yes/no: checked, and split as they are."""
    shape = np.shape(x)
    contracts.check_binary_labels(function, labels, shape, argument)
    raw = where, weights
    where, weights = row_weights(function, shape, where, weights, argument)
    mask = contracts.host_mask(*raw)
    labels = contracts.check_host_values(function, "labels", labels, contracts.YES_NO, mask)
    labels, where, weights = (split_as(sharding, ALL, x) for x in (labels, where, weights))
    contracts.debug_check_values(function, "labels", labels, contracts.YES_NO, visible(where, weights))
    return labels, where, weights


def rows_that_count(
    where: Array | None, weights: Array | None, has_answer: Callable[[], Array]
) -> Array | None:
    """Rows of weight 0 count, for the derivative by the weight is their loss; but not without an answer."""
    return where if weights is None else both(where, (weights != 0) | has_answer())


def both(a: Array | None, b: Array | None) -> Array | None:
    """a and b, where None is True everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def keep(counts: Array | None, x: Array, other: float = 0) -> Array:
    """`x` where the row counts, `other` elsewhere: a select, so that NaN behind the mask stays there."""
    return x if counts is None else jnp.where(counts, x, jnp.full_like(x, other))


@jax.custom_jvp
def keep_gradient(counts: Array | None, x: Array) -> Array:
    """`x` `[..., V]` as it is, with a derivative of exactly 0 in rows that do not count.

    For second derivatives: there jax multiplies a cotangent of 0 with what a hidden row holds.
    """
    return x


@keep_gradient.defjvp
def _keep_gradient_jvp(primals, tangents):
    (counts, x), (_, dx) = primals, tangents
    # not x itself, which would come back without the mask where this is differentiated again
    return keep_gradient(counts, x), dx if counts is None else jnp.where(counts[..., None], dx, 0)


def reduce(
    losses: Array,
    counts: Array | None,
    weights: Array | None,
    reduction: str,
    label_weight: Array | None = None,
    batch_axis_name: Any = None,
) -> Array:
    """Weighted losses, reduced; rows that do not count contribute exactly 0, whatever they hold.

    `label_weight` is in `losses` already and counts in the denominator of the mean only.
    """
    losses = keep(counts, losses)
    if weights is not None:
        weights = keep(counts, weights.astype(losses.dtype))
        # what is not finite has no weight of 0; where it is, the derivative by the weight is the loss
        losses = weights * jnp.where((weights == 0) & ~jnp.isfinite(losses), 0, losses)
    if reduction == "none":
        return losses
    total = _sum_over(batch_axis_name, jnp.sum(losses))
    if reduction == "sum":
        return total
    weight = _total_weight(counts, weights, label_weight, losses.shape, losses.dtype, batch_axis_name)
    return divide_or_zero(total, weight)


def reduce_counting(
    losses: Callable[[Array | None], Array],
    where: Array | None,
    weights: Array | None,
    reduction: str,
    label_weight: Array | None = None,
) -> Array:
    """`reduce` of `losses(counts)`, elementwise; what has weight 0 counts if its loss is finite."""
    counts = rows_that_count(where, weights, lambda: jnp.isfinite(lax.stop_gradient(losses(where))))
    return reduce(losses(counts), counts, weights, reduction, label_weight)


def visible(where: Array | None, weights: Array | None) -> Array | None:
    """Rows whose labels are checked: neither hidden nor of weight 0."""
    return where if weights is None else both(where, weights != 0)


def scale_of_rows(
    counts: Array | None,
    weights: Array | None,
    reduction: str,
    label_weight: Array | None,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    batch_axis_name: Any = None,
) -> Array:
    """`[...]`: the factors with which `reduce` adds up losses, known before any of them."""
    if weights is not None:
        scale = keep(counts, weights.astype(dtype))
    else:
        scale = jnp.ones(shape, dtype) if counts is None else counts.astype(dtype)
    if reduction == "sum":
        return scale
    weight = _total_weight(counts, weights, label_weight, shape, scale.dtype, batch_axis_name)
    return divide_or_zero(scale, weight)


def _total_weight(
    counts: Array | None,
    weights: Array | None,
    label_weight: Array | None,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    batch_axis_name: Any,
) -> Array:
    """What a mean divides by, over all devices along `batch_axis_name`."""
    factors = [x.astype(dtype) for x in (weights, label_weight) if x is not None]
    if factors:
        total = jnp.sum(keep(counts, math.prod(factors[1:], start=factors[0])))
    elif counts is not None:  # not of ones: an array made from a shape is not split as the rows are
        total = jnp.sum(counts, dtype=dtype)
    else:
        total = jnp.asarray(math.prod(shape), dtype)
    return _sum_over(batch_axis_name, total)


def _sum_over(axis_name: Any, x: Array) -> Array:
    return x if axis_name is None else lax.psum(x, axis_name)


def divide_or_zero(total: Array, weight: Array) -> Array:
    """total / weight, 0 with a zero gradient where nothing counts."""
    empty = weight == 0
    return jnp.where(empty, 0, total / jnp.where(empty, 1, weight))


@contracts.takes_arrays
def mean(
    losses: Array, *, where: Array | None = None, weights: Array | None = None, axis_name: Any = None
) -> Array:
    """Weighted mean of losses: sum(w * l) / sum(w) over the rows that count.

    It is the mean that `reduction="mean"` of every loss in jaxent uses.

    Args:
      losses: `[...]`, floating point; or bools, of which it is the share (accuracy: `prediction == labels`).
      where: bool `[...]`; False rows are gone, even if they hold NaN. Default: all rows count.
      weights: real `[...]`; a row of weight 0 adds nothing, even if it holds NaN. Default: 1.
      axis_name: of a mapped axis (shard_map, pmap, vmap) along which the rows are split: the mean is that of all.

    Returns:
      A scalar, float32 (float64 for float64 losses). 0.0 where nothing counts: everything masked, a total
      weight of 0, or no rows.

    Gradients:
      w / sum(w) with respect to the losses, exactly 0 where a row does not count; (loss - mean) / sum(w) with respect
      to the weights, also to one of 0 (0 where its loss is not finite).

    Numerics:
      Accumulates in float32: neither 70,000 float16 losses overflow nor a million bfloat16 ones stall.

    Cost:
      One pass; no copy beyond the widened losses that XLA fuses into the sum.

    Raises:
      TypeError: integer losses, a mask that is not bool.
      ValueError: shapes that differ; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> losses = jnp.array([1.0, 2.0, jnp.nan])
      >>> print(jaxent.mean(losses, where=jnp.array([True, True, False])))
      1.5

    Source:
      The token-weighted mean of language model training (e.g. fairseq, MaxText); a mean of per-device means
      is not it when devices hold different counts.
    """
    contracts.check_array("mean", "losses", losses)
    if jnp.result_type(losses) == jnp.bool_:
        losses = jnp.asarray(losses, jnp.float32)
    remedy = "Losses are real numbers: `losses.astype(jnp.float32)`."
    contracts.check_floating("mean", "losses", losses, remedy)
    losses = widen(jnp.asarray(losses))
    where, weights = row_weights("mean", losses.shape, where, weights, "losses")
    where, weights = (split_as(explicit_sharding(losses), ALL, x) for x in (where, weights))
    counts = rows_that_count(where, weights, lambda: jnp.isfinite(losses))
    return reduce(losses, counts, weights, "mean", batch_axis_name=axis_name)
