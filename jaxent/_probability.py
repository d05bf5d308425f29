"""Losses for outputs that are probabilities (or log-probabilities) already.

The gradients are autodiff's. Two habits make them right on hostile input: what 0 log 0 would touch is
replaced before the logarithm, and a bad row is multiplied by NaN, which poisons its gradient as well.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from . import _contracts as contracts
from ._numerics import limit, widen
from ._reduction import keep, reduce, row_weights
from ._statistics import take_class


def categorical_cross_entropy(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "none",
) -> Array:
    """Cross-entropy of mutually exclusive classes from probabilities. Prefer logits: `softmax_cross_entropy`.

    loss = -log p[label], or -sum_j q_j log p_j for a distribution q; 0 log 0 = 0; "mean" is
    sum(where w loss) / sum(where w) over rows.

    Args:
      probs: `[..., V]`, floating point in [0, 1]. That a row sums to 1 is not checked.
      labels: integers `[...]` in [0, V), or a float distribution `[..., V]`.
      axis: the class axis.
      where: bool `[...]`; False rows are gone, even if they hold NaN or a bad label.
      weights: real `[...]`; a row of weight 0 is gone as well.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 probs).

    Gradients:
      -1/p at the label, -q/p for a distribution, with respect to probs; -log p with respect to a
      distribution, 0 where p = q = 0. All derivatives in both modes.

    Numerics:
      Probabilities are never clipped: p = 0 at the label gives a loss of +inf and a gradient of -inf, which
      is what a softmax that underflowed has lost and what `softmax_cross_entropy` on the logits still knows.
      A row with a probability outside [0, 1], NaN, or a label out of range has NaN loss and NaN gradient;
      others are clean. Masked rows contribute exactly 0. A mean over nothing is 0.

    Cost:
      One pass over N x V; no one-hot array for integer labels.

    Raises:
      TypeError: integer probs; labels of a type or form that is neither of the two.
      ValueError: shapes that differ (nothing is broadcast), NumPy labels out of range. Labels in a jax array
        raise under `checkify.checkify`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> probs = jnp.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
      >>> print(jaxent.categorical_cross_entropy(probs, jnp.array([0, 0])))
      [0.6931472       inf]

    Source:
      tf.keras.losses.CategoricalCrossentropy, which clips at 1e-7.
    """
    function = "categorical_cross_entropy"
    p, label, q, counts, weights = _rows(
        function, "probs", probs, labels, axis, where, None, weights, reduction, hidden=1
    )
    ok = jnp.all(_is_probability(p), -1)
    p = p * _nan_unless(ok)[..., None]
    if label is not None:
        loss = -jnp.log(_select(p, label))
    else:
        loss = jnp.sum(q * -jnp.log(jnp.where((q == 0) & (p == 0), 1, p)), -1)
    return reduce(loss, counts, weights, reduction)


def binary_cross_entropy(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "none",
) -> Array:
    """Cross-entropy of independent yes/no classes from probabilities. Prefer logits: `sigmoid_cross_entropy`.

    loss = -y log p - (1 - y) log(1 - p), elementwise; 0 log 0 = 0; "mean" is
    sum(where w loss) / sum(where w).

    Args:
      probs: `[...]`, floating point in [0, 1].
      labels: `[...]`, exactly the shape of probs; bool, 0/1 integers, or floats in [0, 1].
      where: bool `[...]`; False elements are gone, even if they hold NaN or a bad label.
      weights: real `[...]`; an element of weight 0 is gone as well.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 probs).

    Gradients:
      -y/p + (1 - y)/(1 - p) with respect to probs, log(1 - p) - log p with respect to float labels; a term
      that is 0 * inf is 0. All derivatives in both modes.

    Numerics:
      Probabilities are never clipped: p = 0 at y = 1 gives +inf. A p next to 1 has rounded 1 - p away
      already, at worst all of it; `sigmoid_cross_entropy` on the logits has not. An element with p or y
      outside [0, 1] has NaN loss and NaN gradient; others are clean. Masked elements contribute exactly 0.

    Cost:
      Elementwise; nothing of the size of probs beyond the result.

    Raises:
      TypeError: integer probs; complex labels; a mask that is not bool.
      ValueError: shapes that differ (nothing is broadcast), NumPy labels outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.binary_cross_entropy(jnp.array([0.5, 0.0, 0.0]), jnp.array([1, 0, 1])))
      [0.6931472 0.              inf]

    Source:
      torch.nn.BCELoss, which clamps the logarithms at -100.
    """
    function = "binary_cross_entropy"
    contracts.check_reduction(function, reduction)
    contracts.check_floating(function, "probs", probs, "Pass probabilities as floats.")
    shape = np.shape(probs)
    contracts.check_binary_labels(function, labels, shape, "probs")
    counts, row_weight = row_weights(function, shape, where, weights, "probs")
    labels = contracts.check_host_binary_labels(function, labels, contracts.host_mask(where, weights))
    labels = keep(counts, labels, False)
    contracts.debug_check_binary_labels(function, _is_probability(labels), labels)
    p = widen(keep(counts, jnp.asarray(probs), 0.5))
    y = labels.astype(p.dtype)
    poison = _nan_unless(_is_probability(p) & _is_probability(y))
    p, y = p * poison, y * poison
    yes = -jnp.log(jnp.where((y == 0) & (p == 0), 1, p))
    p = jnp.where((y == 1) & (p == 1), 0, p)
    # in parts: XLA's float64 log1p is off by 100 ulp around -0.4
    low = p < 0.25
    no = -jnp.where(low, jnp.log1p(-jnp.where(low, p, 0)), jnp.log(1 - jnp.where(low, 0, p)))
    return reduce(y * yes + (1 - y) * no, counts, row_weight, reduction)


def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    reduction: str = "none",
) -> Array:
    """Negative log-likelihood from log-probabilities (a `log_softmax`, a CRF, a flow).

    loss = -cw[label] log_probs[label], or -sum_j cw_j q_j log_probs_j for a distribution q; "mean" divides
    the sum of where w loss by the sum of where w cw[label] (of where w for a distribution).

    Args:
      log_probs: `[..., V]`, floating point. Values above 0 (densities) are taken as they are.
      labels: integers `[...]` in [0, V), or a float distribution `[..., V]`.
      axis: the class axis.
      where: bool `[...]`; False rows are gone, even if they hold NaN or a bad label.
      ignore_index: rows with this integer label are gone as well.
      weights: real `[...]`; a row of weight 0 is gone as well.
      class_weights: real `[V]`; a constant for differentiation. A class of weight 0 is gone as well.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 log_probs).

    Gradients:
      -cw at the label, -cw q for a distribution, in the dtype of log_probs; -cw log_probs with respect to a
      distribution, 0 where q = 0 meets -inf. All derivatives in both modes.

    Numerics:
      -inf at the label gives a loss of +inf, and 0 * inf = 0 elsewhere. A label out of range has NaN loss and
      a NaN row of the gradient; others are clean. For an integer label only its own entry is read.

    Cost:
      One pass over N x V; no one-hot array for integer labels; works on a class axis that is split over
      devices.

    Raises:
      TypeError: integer log_probs; labels of a type or form that is neither of the two.
      ValueError: shapes that differ (nothing is broadcast), NumPy labels out of range, ignore_index beside a
        distribution. Labels in a jax array raise under `checkify.checkify`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxent
      >>> log_probs = jax.nn.log_softmax(jnp.zeros((2, 4)))
      >>> print(jaxent.nll_loss(log_probs, jnp.array([1, -1]), ignore_index=-1, reduction="mean"))
      1.3862944

    Source:
      torch.nn.functional.nll_loss, with its class-weighted mean.
    """
    function = "nll_loss"
    x, label, q, counts, weights = _rows(
        function, "log_probs", log_probs, labels, axis, where, ignore_index, weights, reduction, hidden=0
    )
    if class_weights is not None:
        contracts.check_real(function, "class_weights", class_weights)
        remedy = "For weights of rows use `weights`."
        shape = x.shape[-1:]
        contracts.check_shape(function, "class_weights", class_weights, shape, "one per class", remedy)
        class_weights = lax.stop_gradient(jnp.asarray(class_weights)).astype(x.dtype)
    if label is None:
        q = q if class_weights is None else q * class_weights
        return reduce(jnp.sum(q * -limit(q, x), -1), counts, weights, reduction)
    loss, label_weight = -_select(x, label), None
    if class_weights is not None:
        label_weight = jnp.where(label < 0, 1, take_class(class_weights, label))  # a bad label counts
        nonzero = label_weight != 0
        counts = nonzero if counts is None else counts & nonzero
        loss = label_weight * loss
    return reduce(loss, counts, weights, reduction, label_weight)


def kl_divergence(
    log_probs: ArrayLike,
    target_probs: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "none",
) -> Array:
    """KL(target || model) from log-probabilities of the model. From logits: `softmax_kl_divergence`.

    loss = sum_j q_j (log q_j - log_probs_j) with q = target_probs; 0 log 0 = 0; "mean" is
    sum(where w loss) / sum(where w) over rows, not over elements.

    Args:
      log_probs: `[..., V]`, floating point.
      target_probs: `[..., V]`, floating point in [0, 1]. That a row sums to 1 is not checked.
      axis: the class axis.
      where: bool `[...]`; False rows are gone, even if they hold NaN.
      weights: real `[...]`; a row of weight 0 is gone as well.
      reduction: "none", "sum" or "mean".

    Returns:
      Divergences `[...]`, or a scalar, in nats; float32 (float64 for float64 log_probs).

    Gradients:
      -q with respect to log_probs, in their dtype; log q - log_probs + 1 with respect to target_probs. Where
      q = 0 the latter's log q + 1, and an infinite log_probs, count as 0. All derivatives in both modes.

    Numerics:
      Rounding leaves about 1e-7 |log p|, of either sign: near 0 use `softmax_kl_divergence`, which is
      accurate and never negative there. q > 0 where the model has -inf gives +inf. A row with q outside [0,
      1] or a NaN has NaN loss and NaN gradient, others are clean. Masked rows contribute exactly 0.

    Cost:
      One pass over N x V.

    Raises:
      TypeError: integer log_probs or target_probs; a mask that is not bool.
      ValueError: shapes that differ; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> log_probs = jnp.log(jnp.array([0.5, 0.5]))
      >>> print(jaxent.kl_divergence(log_probs, jnp.array([1.0, 0.0])))
      0.6931472

    Source:
      torch.nn.functional.kl_div, whose "batchmean" is "mean" here.
    """
    function = "kl_divergence"
    if np.shape(target_probs) != np.shape(log_probs) or not contracts.is_floating(target_probs):
        contracts.check_floating(function, "target_probs", target_probs, "Pass probabilities as floats.")
        remedy = "For class indices use `nll_loss`."
        what = "the shape of `log_probs`"
        contracts.check_shape(function, "target_probs", target_probs, np.shape(log_probs), what, remedy)
    x, _, q, counts, weights = _rows(
        function, "log_probs", log_probs, target_probs, axis, where, None, weights, reduction, hidden=0
    )
    poison = _nan_unless(jnp.all(_is_probability(q), -1))[..., None]
    x, q = x * poison, q * poison
    loss = jnp.sum(q * (jnp.log(jnp.where(q == 0, 1, q)) - limit(q, x)), -1)
    return reduce(loss, counts, weights, reduction)


def _rows(
    function: str,
    argument: str,
    values: Any,
    labels: Any,
    axis: int,
    where: Any,
    ignore_index: int | None,
    weights: Any,
    reduction: str,
    hidden: float,
) -> tuple[Array, Array | None, Array | None, Array | None, Array | None]:
    """Checked arguments as (values, label, distribution, counts, weights), class axis last.

    A row that does not count holds `hidden` and label 0; a row with a bad label holds NaN and label -1.
    """
    contracts.check_reduction(function, reduction)
    contracts.check_logits(function, values, axis, argument)
    has_index = contracts.check_labels(function, labels, values, axis)
    if ignore_index is not None:
        remedy = "It hides rows by their label; hide rows of a distribution with `where=`."
        ok = has_index and isinstance(ignore_index, int | np.integer)
        expected = "an int beside integer labels"
        contracts.check_option(function, "ignore_index", ignore_index, ok, expected, remedy)
    x = widen(jnp.moveaxis(jnp.asarray(values), axis, -1))
    counts, weights_in_force = row_weights(function, x.shape[:-1], where, weights, argument)
    if not has_index:
        q = jnp.moveaxis(jnp.asarray(labels), axis, -1).astype(x.dtype)
        return _keep_rows(counts, x, hidden), None, _keep_rows(counts, q, 0), counts, weights_in_force

    mask = contracts.host_mask(where, weights)
    labels, ignored = contracts.index_labels(function, labels, x.shape[-1], mask, ignore_index)
    if ignored is not None:
        counts = ~ignored if counts is None else counts & ~ignored
    labels = keep(counts, labels)
    ok = (labels >= 0) & (labels < x.shape[-1])
    contracts.debug_check_labels(function, ok, labels, x.shape[-1])
    x = _keep_rows(counts, x, hidden) * _nan_unless(ok)[..., None]
    return x, jnp.where(ok, labels, -1).astype(jnp.int32), None, counts, weights_in_force


def _keep_rows(counts: Array | None, x: Array, hidden: float) -> Array:
    return x if counts is None else keep(counts[..., None], x, hidden)


def _select(x: Array, label: Array) -> Array:
    """x[..., label] without a gather, which a split class axis would not bear; a bad label takes class 0."""
    label = jnp.maximum(label, 0)
    return jnp.sum(jnp.where(jnp.arange(x.shape[-1]) == label[..., None], x, 0), -1)


def _is_probability(x: Array) -> Array:
    return (x >= 0) & (x <= 1)


def _nan_unless(ok: Array) -> Array:
    """A factor: NaN poisons the value and, by the product rule, the gradient."""
    return jnp.where(ok, 1, jnp.nan)
