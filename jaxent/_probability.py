"""Losses for outputs that are probabilities (or log-probabilities) already.

The gradients are autodiff's. Two habits make them right on hostile input: what 0 log 0 would touch is replaced before
the logarithm, and a bad row is multiplied by NaN, which poisons its gradient as well.
A probability up to 16 ulp above 1 is 1: sums of probabilities round to such numbers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from . import _contracts as contracts
from ._contracts import Values
from ._devices import ALL, lanes, split_as
from ._logits.explicit import sharding_of
from ._numerics import (
    accumulation_dtype,
    at_most_1,
    is_probability,
    limit,
    nan_unless,
    probability,
    widen,
)
from ._rows import Options, Rows, keep


@contracts.takes_arrays
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

        loss = -log p[label]           labels: class indices
        loss = -sum_j q_j log p_j      labels: a distribution q

    0 log 0 = 0. "mean" is sum(where w loss) / sum(where w) over rows.

    Args:
      probs: `[..., V]`, floating point in [0, 1]. That a row sums to 1 is not checked.
      labels: integers `[...]` in [0, V), or a float distribution `[..., V]`.
      axis: the class axis.
      where: bool `[...]`; False rows are gone, even if they hold NaN or a bad label.
      weights: real `[...]`; a row of weight 0 adds nothing, even if it holds NaN or a bad label.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 probs).

    Gradients:
      -1/p at the label, -q/p for a distribution, with respect to probs, in their dtype; -log p with respect to a
      distribution, 0 where p = q = 0; the loss with respect to a weight, also one of 0 (0 where the loss is not
      finite). All derivatives in both modes.

    Numerics:
      In float32 (float64 for float64). Probabilities are never clipped: p = 0 at the label gives a loss of +inf and a
      gradient of -inf, which is what a softmax that underflowed has lost and what `softmax_cross_entropy` on the
      logits still knows. Up to 16 ulp above 1 (1 + 16 eps of the dtype of probs: 1.000002 in float32, 1.125 in
      bfloat16) p is taken as 1, and the gradient is that at 1. A row with any other probability outside [0, 1], NaN,
      or a label out of range has NaN loss and NaN gradient; others are clean. Masked rows contribute exactly 0. A
      mean over nothing is 0.

    Cost:
      One pass over N x V; no one-hot array for integer labels.

    Raises:
      TypeError: integer probs; labels of a type or form that is neither of the two; a mask that is not bool.
      ValueError: shapes that differ (nothing is broadcast), NumPy labels out of range or a NumPy distribution that
        holds NaN. Those in a jax array raise under `checkify.checkify`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> probs = jnp.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
      >>> print(jaxent.categorical_cross_entropy(probs, jnp.array([0, 0])))
      [0.6931472       inf]

    Source:
      tf.keras.losses.CategoricalCrossentropy, which clips at 1e-7.
    """
    options = Options(axis, where, None, weights, reduction=reduction)
    rows, x, label, q = _prepare("categorical_cross_entropy", "probs", probs, labels, options)

    def loss(p: Array, q: Array | None) -> Array:
        if q is None:  # one probability of a row is read, all are looked at
            ok = is_probability(p).all(-1) & (label >= 0)
            return -jnp.log(at_most_1(_select(widen(p) * nan_unless(ok)[..., None], label)))
        p = probability(p, accumulation_dtype(p.dtype))
        q = q.astype(p.dtype)
        bad = (jnp.isnan(p) | jnp.isnan(q)).any(-1)
        p = p * nan_unless(~bad)[..., None]
        return jnp.sum(q * -jnp.log(jnp.where((q == 0) & (p == 0), 1, p)), -1)

    return _reduce(rows, loss, x, 1, q)


@contracts.takes_arrays
def binary_cross_entropy(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "none",
) -> Array:
    """Cross-entropy of independent yes/no classes from probabilities. Prefer logits: `sigmoid_cross_entropy`.

        loss = -y log p - (1 - y) log(1 - p)

    Elementwise; 0 log 0 = 0. "mean" is sum(where w loss) / sum(where w).

    Args:
      probs: `[...]`, floating point in [0, 1].
      labels: `[...]`, exactly the shape of probs; bool, 0/1 integers, or floats in [0, 1].
      where: bool `[...]`; like all that follow as in `categorical_cross_entropy`, of elements.
      weights: real `[...]`.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 probs).

    Gradients:
      -y/p + (1 - y)/(1 - p) with respect to probs, log(1 - p) - log p with respect to float labels; a term that is
      0 * inf is 0. Weights and modes as in `categorical_cross_entropy`.

    Numerics:
      As `categorical_cross_entropy`, for p and y of an element: p = 0 at y = 1 gives +inf. A p next to 1 has rounded
      1 - p away already, at worst all of it; `sigmoid_cross_entropy` on the logits has not.

    Cost:
      Elementwise; nothing of the size of probs beyond the result.

    Raises:
      As `categorical_cross_entropy`; TypeError: complex labels; ValueError: NumPy labels outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.binary_cross_entropy(jnp.array([0.5, 0.0, 0.0]), jnp.array([1, 0, 1])))
      [0.6931472 0.              inf]

    Source:
      torch.nn.BCELoss, which clamps the logarithms at -100.
    """
    function = "binary_cross_entropy"
    contracts.check_floating(function, "probs", probs, "Pass probabilities as floats.")
    x = jnp.asarray(probs)
    options = Options(where=where, weights=weights, reduction=reduction)
    rows = Rows.of(function, options, x.shape, sharding_of(x), "probs")
    given = rows.binary_labels(labels, "probs")

    def losses(counts: Array | None) -> Array:
        dtype = accumulation_dtype(x.dtype)
        p, y = probability(keep(counts, x, 0.5), dtype), probability(keep(counts, given), dtype)
        poison = nan_unless(~jnp.isnan(p + y))
        p, y = p * poison, y * poison
        yes = -jnp.log(jnp.where((y == 0) & (p == 0), 1, p))
        p = jnp.where((y == 1) & (p == 1), 0, p)
        # in parts: XLA's float64 log1p is off by 100 ulp around -0.4
        low = p < 0.25
        no = -jnp.where(low, jnp.log1p(-jnp.where(low, p, 0)), jnp.log(1 - jnp.where(low, 0, p)))
        return y * yes + (1 - y) * no

    return rows.reduce_finite(losses)


@contracts.takes_arrays
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

        loss = -cw[label] log_probs[label]       labels: class indices
        loss = -sum_j cw_j q_j log_probs_j       labels: a distribution q

    "mean" is sum(where w loss) / sum(where w cw[label]) over rows, for a distribution / sum(where w).

    Args:
      log_probs: `[..., V]`, floating point. Values above 0 (densities) are taken as they are.
      labels: integers `[...]` in [0, V), or a float distribution `[..., V]`.
      axis: the class axis.
      where: bool `[...]`; this and `weights` are as in `categorical_cross_entropy`.
      ignore_index: rows with this integer label are gone as well.
      weights: real `[...]`.
      class_weights: real `[V]`; a constant for differentiation. Rows with a label of weight 0 are gone as well.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 log_probs).

    Gradients:
      -cw at the label, -cw q for a distribution, in the dtype of log_probs; -cw log_probs with respect to a
      distribution, 0 where q = 0 meets -inf. Weights and modes as in `categorical_cross_entropy`.

    Numerics:
      In float32 (float64 for float64). -inf at the label gives a loss of +inf, and 0 * inf = 0 elsewhere. A label out
      of range, or NaN beside a distribution, has NaN loss and a NaN row of the gradient; others are clean. For an
      integer label only its own entry is read.

    Cost:
      That of `categorical_cross_entropy`; works on a class axis that is split over devices.

    Raises:
      As `categorical_cross_entropy`; TypeError: integer log_probs; ValueError: ignore_index beside a distribution.

    Example:
      >>> import jax, jax.numpy as jnp, jaxent
      >>> log_probs = jax.nn.log_softmax(jnp.zeros((2, 4)))
      >>> print(jaxent.nll_loss(log_probs, jnp.array([1, -1]), ignore_index=-1, reduction="mean"))
      1.3862944

    Source:
      torch.nn.functional.nll_loss, with its class-weighted mean.
    """
    options = Options(axis, where, ignore_index, weights, class_weights, reduction=reduction)
    rows, x, label, q = _prepare("nll_loss", "log_probs", log_probs, labels, options)
    factors = rows.class_weights(x.shape[-1])
    if factors is not None:
        factors = factors.astype(accumulation_dtype(x.dtype))
        if label is not None:
            rows = rows.weigh_labels(factors, label)
            rows = rows.only(rows.label_weight != 0)

    def loss(x: Array, q: Array | None) -> Array:
        x = widen(x)
        if q is None:
            loss = -_select(x * jnp.where(label < 0, jnp.nan, 1)[..., None], label)
            return loss if rows.label_weight is None else rows.label_weight * loss
        q = q.astype(x.dtype)
        bad = (jnp.isnan(x) | jnp.isnan(q)).any(-1)
        x = x * nan_unless(~bad)[..., None]
        q = q if factors is None else q * factors.reshape((1,) * (x.ndim - 1) + factors.shape)
        return jnp.sum(q * -limit(q, x), -1)

    return _reduce(rows, loss, x, 0, q)


@contracts.takes_arrays
def kl_divergence(
    log_probs: ArrayLike,
    target_probs: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    generalized: bool = False,
    reduction: str = "none",
) -> Array:
    """KL(target || model) from log-probabilities of the model. From logits: `softmax_kl_divergence`.

    With q = target_probs; generalized of measures, which need not sum to 1:

        loss = sum_j q_j (log q_j - log_probs_j)
        loss = sum_j q_j (log q_j - log_probs_j) - q_j + exp(log_probs_j)       generalized

    0 log 0 = 0. "mean" is sum(where w loss) / sum(where w) over rows, not over elements.

    Args:
      log_probs: `[..., V]`, floating point.
      target_probs: `[..., V]`, floating point in [0, 1]; if generalized, >= 0. That a row sums to 1 is not checked.
      axis: the class axis.
      where: bool `[...]`; this and `weights` are as in `categorical_cross_entropy`.
      weights: real `[...]`.
      generalized: of measures; never negative, and 0 only where both are the same.
      reduction: "none", "sum" or "mean".

    Returns:
      Divergences `[...]`, or a scalar, in nats; float32 (float64 for float64 log_probs).

    Gradients:
      -q with respect to log_probs, in their dtype; log q - log_probs + 1 with respect to target_probs; if generalized,
      p - q and log q - log_probs. Where q = 0 log q + 1, and an infinite log_probs, count as 0. Weights and modes
      as in `categorical_cross_entropy`.

    Numerics:
      Rounding leaves about 1e-7 |log p|, of either sign: near 0 use `softmax_kl_divergence`, which is accurate and
      never negative there. Generalized it is accurate as far as p = exp(log_probs) is: an error of 1e-7 in p - q,
      near 0 too. q > 0 where the model has -inf gives +inf. NaN and a q out of range, or up to 16 ulp above 1 (unless
      generalized), are as in `categorical_cross_entropy`.

    Cost:
      One pass over N x V.

    Raises:
      As `categorical_cross_entropy`; TypeError: integer target_probs; ValueError: NumPy targets out of range.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> log_probs = jnp.log(jnp.array([0.5, 0.5]))
      >>> print(jaxent.kl_divergence(log_probs, jnp.array([1.0, 0.0])))
      0.6931472

    Source:
      torch.nn.functional.kl_div, whose "batchmean" is "mean" here; optax.losses.generalized_kl_divergence.
    """
    function = "kl_divergence"
    contracts.check_floating(function, "target_probs", target_probs, "Pass probabilities as floats.")
    shape, remedy = np.shape(log_probs), "For class indices use `nll_loss`."
    contracts.check_shape(function, "target_probs", target_probs, shape, "the shape of `log_probs`", remedy)
    targets = MEASURE if generalized else PROBABILITIES
    options = Options(axis, where, None, weights, reduction=reduction)
    rows, x, _, q = _prepare(function, "log_probs", log_probs, target_probs, options, targets)

    def loss(x: Array, q: Array) -> Array:
        x = widen(x)
        poison = nan_unless(~(jnp.isnan(x) | ~targets.ok(q)).any(-1))[..., None]
        q = q.astype(x.dtype) if generalized else probability(q, x.dtype)
        x, q = x * poison, q * poison
        log_q = jnp.log(jnp.where(q == 0, 1, q))
        return jnp.sum(_generalized(q, log_q, x) if generalized else q * (log_q - limit(q, x)), -1)

    return _reduce(rows, loss, x, 0, q)


def _generalized(q: Array, log_q: Array, x: Array) -> Array:
    """q (log q - x) - q + p with p = exp(x), which is >= 0.

    Where p and q are close nothing is taken from anything: with s = (p - q) / (p + q), log(q / p) = -2 artanh(s) and
    the whole is s (p - q) - 2 q (s^3 / 3 + s^5 / 5 + ...). In units of the larger one, which is a constant: squares of
    small probabilities, which derivatives have, are nothing.
    """
    p = jnp.exp(x)
    near = jnp.abs(p - q) < (p + q) / 4
    unit = lax.stop_gradient(jnp.where(near, jnp.maximum(p, q), 1))
    a, b = jnp.where(near, p / unit, 1), jnp.where(near, q / unit, 1)
    s = (a - b) / (a + b)
    series = jnp.zeros_like(s)
    for n in range(27, 1, -2):
        series = series * s * s + 1 / n
    far = q * (log_q - limit(q, x)) + (p - q)
    return jnp.where(near, unit * (s * (a - b) - 2 * b * s**3 * series), far)


# What a distribution may hold. Cross-entropy is linear in it, whatever it sums to.
REMEDY = "Hide a row with `where=`."
NUMBERS = Values(lambda q: q == q, "a number", REMEDY)
PROBABILITIES = Values(is_probability, "in [0, 1]", REMEDY)
MEASURE = Values(lambda q: (q >= 0) & (q < math.inf), "finite and >= 0", REMEDY)


def _prepare(
    function: str, argument: str, values: Any, labels: Any, options: Options, targets: Values | None = None
) -> tuple[Rows, Array, Array | None, Array | None]:
    """Rows, values, label (a bad one is -1), distribution; class axis last. `targets`: what target_probs may hold."""
    axis = options.axis
    contracts.check_logits(function, values, axis, argument)
    has_index = contracts.check_labels(function, labels, values, axis)
    contracts.check_ignore_index(function, options.ignore_index, has_index)
    x = jnp.moveaxis(jnp.asarray(values), axis, -1)
    rows = Rows.of(function, options, x.shape[:-1], sharding_of(x), argument)
    if has_index:
        label, rows = rows.class_labels(labels, x.shape[-1])
        return rows, x, label, None
    name, targets = ("labels", NUMBERS) if targets is None else ("target_probs", targets)
    per_row = list(np.shape(labels))
    per_row[axis] = 1
    mask, seen = rows.host_mask, rows.seen
    mask = None if mask is None else np.reshape(mask, per_row)
    seen = None if seen is None else jnp.expand_dims(seen, axis)
    q = contracts.check_host_values(function, name, labels, targets, mask)
    q = split_as(rows.sharding, ALL, jnp.moveaxis(q, axis, -1))
    q = contracts.explained_values(function, name, jnp.moveaxis(q, -1, axis), targets, seen)
    return rows, x, None, jnp.moveaxis(q, axis, -1)


def _reduce(rows: Rows, loss: Callable[..., Array], x: Array, hidden: float, q: Array | None) -> Array:
    """`loss(x, q)`, where rows that do not count hold `hidden` and a distribution of 0."""
    return rows.reduce_finite(
        lambda counts: loss(keep(counts, x, hidden), q if q is None else keep(counts, q))
    )


def _select(x: Array, label: Array) -> Array:
    """x[..., label] without a gather, which a split class axis would not bear; a bad label takes class 0."""
    return jnp.sum(jnp.where(lanes(x) == jnp.maximum(label, 0)[..., None], x, 0), -1)
