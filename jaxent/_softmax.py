"""Softmax losses: a few lines each on the row statistics."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from . import _contracts as contracts
from ._contracts import Number, Range
from ._logits.linear import LinearLogits
from ._numerics import accumulation_dtype, limit, product_or_zero
from ._objective import objective, prepare
from ._rows import AxisName, Options
from ._statistics import SoftmaxStatistics


@contracts.takes_arrays
def softmax_cross_entropy(
    logits: Array | LinearLogits,
    labels: Array,
    *,
    axis: int = -1,
    where: Array | None = None,
    ignore_index: int | None = None,
    weights: Array | None = None,
    class_weights: Array | None = None,
    class_mask: Array | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Cross-entropy of mutually exclusive classes, from logits: the negative log-likelihood of the label.

    With log p = log_softmax(logits) over the V classes in force, class weights w and smoothing a:

        loss = -(1 - a) w_y log p_y - a/V sum_j w_j log p_j + z_loss w_y lse^2          labels: class indices
        loss = -(1 - a) sum_j w_j q_j log p_j - a/V sum_j w_j log p_j + z_loss lse^2    labels: a distribution q

    `reduction="mean"` is sum(weights * loss) / sum(weights * w_y) over the rows that count; for distributions w_y
    is 1 there. A row with w_y = 0 is gone without smoothing; with it the other classes' part is left.

    Args:
      logits: `[..., V]`, floating point: any real numbers. The softmax happens inside. Or `LinearLogits`.
      labels: integers `[...]`, class indices in [0, V); or floats `[..., V]`, a distribution over the classes.
      axis: the class axis.
      where: bool `[...]`; a False row is gone, even if it holds NaN or a bad label.
      ignore_index: rows with this integer label are gone as well.
      weights: real `[...]`, a factor per row; a row of weight 0 adds nothing, even if it holds NaN or a bad label.
      class_weights: real `[V]`, a constant factor per class, as in torch.nn.functional.cross_entropy.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of the softmax.
      label_smoothing: a in [0, 1]: how much of the label is spread evenly over the classes in force. Like `z_loss` a
        Python number, which is part of the program, or an array `[]`, which may be annealed or mapped over.
      z_loss: >= 0, the factor of the squared log-normalizer, which keeps logits from drifting.
      reduction: "none" (one loss per row), "sum" or "mean".
      class_axis_name: of a mapped axis (shard_map, pmap, vmap) along which the classes are split: each device has
        its slice of `logits`, `class_weights` and `class_mask`; labels count over all classes.
      batch_axis_name: of a mapped axis along which the rows are split: "sum" and "mean" are those of all rows.

    Returns:
      Losses in nats, `[...]` or a scalar: float32, or float64 for float64 logits.

    Gradients:
      p - onehot(labels) times the row's weight, for the plain loss, in the dtype of `logits`. A distribution gets
      -log p, 0 where it is 0 and log p = -inf. `weights` get the loss of their row, or (loss - mean) / sum(weights),
      also where they are 0 (0 without an answer). Options that are arrays are differentiated; `class_weights` are
      constants. Forward mode and higher orders work too (`LinearLogits` has its limits).

    Numerics:
      Computed in float32 (float64 for float64), accurate to a few ulp down to losses of 1e-30, where
      log_softmax gives 0. A label outside [0, V), or on a class that is not in force, makes its row's loss and
      gradient NaN; labels known on the host raise at once; `checkify` shows bad ones in compiled code. A NaN or
      +inf logit makes its row NaN; -inf is probability 0. A distribution is used as it is, whatever its sum. An option
      that is an array and out of its range makes the loss NaN.

    Cost:
      Forward two passes over the logits, backward one; no array of N x V but the gradient. A distribution, a
      class mask or class weights with smoothing may add one. `LinearLogits`: 3 matmuls with gradients, 4 without
      a reduction, and no array of N x V at all.

    Raises:
      TypeError: logits that are not floating point; float class indices; one-hot integers; a mask not bool.
      ValueError: a shape that does not match exactly; an option out of its range; a bad label on the host.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
      >>> print(jaxent.softmax_cross_entropy(logits, jnp.array([0, 2])).round(4))
      [0.1698 1.0986]

    Source:
      Label smoothing: Szegedy et al. 2016. z-loss: PaLM, Chowdhery et al. 2022. Class weights with smoothing:
      torch.nn.functional.cross_entropy.
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, ignore_index, weights, class_weights, class_mask, reduction, *names)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return _loss("softmax_cross_entropy", _cross_entropy, logits, labels, options, numbers)


@contracts.takes_arrays
def softmax_focal_loss(
    logits: Array | LinearLogits,
    labels: Array,
    *,
    gamma: Number = 2.0,
    axis: int = -1,
    where: Array | None = None,
    ignore_index: int | None = None,
    weights: Array | None = None,
    class_weights: Array | None = None,
    class_mask: Array | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Focal loss over mutually exclusive classes: cross-entropy that turns down easy rows.

        loss = (1 - p_y)^gamma * cross_entropy + z_loss w_y lse^2

    with `cross_entropy` as in `softmax_cross_entropy`, smoothed and class-weighted. For a distribution q,
    p_y = exp(sum_j q_j log p_j). The mean divides as there.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      labels: integers `[...]` in [0, V), or a distribution `[..., V]`.
      gamma: >= 0, a number or an array `[]`; 0 is the cross-entropy.
      axis: as in `softmax_cross_entropy`, like all that follow.
      where: bool `[...]`.
      ignore_index: an integer label to leave out.
      weights: real `[...]`.
      class_weights: real `[V]`.
      class_mask: bool `[V]` or the shape of `logits`.
      label_smoothing: in [0, 1].
      z_loss: >= 0.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Losses in nats, `[...]` or a scalar: float32, or float64 for float64 logits.

    Gradients:
      With respect to `logits` (and a distribution), to any order and in forward mode.

    Numerics:
      As `softmax_cross_entropy`; 1 - p_y is -expm1(log p_y), exact where p_y rounds to 1.

    Cost:
      That of `softmax_cross_entropy`.

    Raises:
      As `softmax_cross_entropy`; ValueError: a gamma that is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
      >>> print(jaxent.softmax_focal_loss(logits, jnp.array([0, 2])).round(4))
      [0.0041 0.4883]

    Source:
      Lin et al. 2017, "Focal loss for dense object detection", for softmax.
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, ignore_index, weights, class_weights, class_mask, reduction, *names)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, "gamma": gamma}
    return _loss("softmax_focal_loss", _focal, logits, labels, options, numbers)


@contracts.takes_arrays
def softmax_poly_loss(
    logits: Array | LinearLogits,
    labels: Array,
    *,
    epsilon: Number = 1.0,
    axis: int = -1,
    where: Array | None = None,
    ignore_index: int | None = None,
    weights: Array | None = None,
    class_weights: Array | None = None,
    class_mask: Array | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Poly-1 loss over mutually exclusive classes: cross-entropy plus epsilon (1 - p_y).

        loss = cross_entropy + epsilon w_y (1 - p_y) + z_loss w_y lse^2

    with `cross_entropy` as in `softmax_cross_entropy`, smoothed and class-weighted. For a distribution q,
    p_y = exp(sum_j q_j log p_j) and w_y = 1. The mean divides as there.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      labels: integers `[...]` in [0, V), or a distribution `[..., V]`.
      epsilon: >= -1, the factor of the first polynomial term, a number or an array `[]`; 0 is the cross-entropy.
      axis: as in `softmax_cross_entropy`, like all that follow.
      where: bool `[...]`.
      ignore_index: an integer label to leave out.
      weights: real `[...]`.
      class_weights: real `[V]`.
      class_mask: bool `[V]` or the shape of `logits`.
      label_smoothing: in [0, 1].
      z_loss: >= 0.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Losses in nats, `[...]` or a scalar: float32, or float64 for float64 logits.

    Gradients:
      With respect to `logits` (and a distribution), to any order and in forward mode.

    Numerics:
      As `softmax_cross_entropy`; 1 - p_y is -expm1(log p_y), exact where p_y rounds to 1.

    Cost:
      That of `softmax_cross_entropy`.

    Raises:
      As `softmax_cross_entropy`; ValueError: an epsilon below -1 or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
      >>> print(jaxent.softmax_poly_loss(logits, jnp.array([0, 2])).round(4))
      [0.3261    1.7652999]

    Source:
      Leng et al. 2022, "PolyLoss".
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, ignore_index, weights, class_weights, class_mask, reduction, *names)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, "epsilon": epsilon}
    return _loss("softmax_poly_loss", _poly, logits, labels, options, numbers)


RANGES = {
    "label_smoothing": Range(0, 1, "0 is none of it, 1 all of it; usual is 0.1."),
    "z_loss": Range(0, math.inf, "0 turns it off; usual is 1e-4."),
    "gamma": Range(0, math.inf, "0 is the cross-entropy; usual is 2."),
    "epsilon": Range(-1, math.inf, "Below -1 a confident mistake would be rewarded; 0 is the cross-entropy."),
}


def _loss(
    function: str, of_row: Any, logits: Any, labels: Any, options: Options, numbers: dict[str, Any]
) -> Array:
    """`of_row(statistics, label_weight, **numbers)`, reduced."""
    contracts.check_array(function, "labels", labels)
    checked = {name: contracts.number(function, name, x, RANGES[name]) for name, x in numbers.items()}
    block, rows = prepare(function, logits, labels, options)
    if rows.label_weight is not None and _is(0, checked.get("label_smoothing", 0.0)):
        rows = rows.only(rows.label_weight != 0)  # of which the loss is a multiple
    dtype = accumulation_dtype(block.logits.dtype)
    arrays = {name: x.astype(dtype) for name, x in checked.items() if not isinstance(x, float)}
    arrays = {name: jnp.broadcast_to(x, rows.shape) for name, x in arrays.items()}

    def fn(s: SoftmaxStatistics, weight: Any, arrays: dict[str, Array]) -> Array:
        return of_row(s, weight, **checked | arrays)

    return objective(fn, block, rows, (arrays,))


def _is(number: float, option: Number) -> bool:
    """Whether a number that is part of the program is this one."""
    return isinstance(option, float) and option == number


def _cross_entropy(s: SoftmaxStatistics, weight: Any, label_smoothing: Number, z_loss: Number) -> Array:
    return _smoothed(s, label_smoothing) + _z(s, weight, z_loss)


def _focal(
    s: SoftmaxStatistics, weight: Any, gamma: Number, label_smoothing: Number, z_loss: Number
) -> Array:
    loss = product_or_zero(_focus(s.log_prob, gamma), _smoothed(s, label_smoothing))
    return loss + _z(s, weight, z_loss)


def _poly(
    s: SoftmaxStatistics, weight: Any, epsilon: Number, label_smoothing: Number, z_loss: Number
) -> Array:
    first = -epsilon * weight * jnp.expm1(s.log_prob)
    return _smoothed(s, label_smoothing) + first + _z(s, weight, z_loss)


def _smoothed(s: SoftmaxStatistics, a: Number) -> Array:
    """Cross-entropy with smoothing a."""
    if _is(0, a):
        return -s.weighted_log_prob
    if _is(1, a):  # not 0 * -inf
        return -s.mean_log_prob
    label, uniform = s.weighted_log_prob, s.mean_log_prob
    if not isinstance(a, float):
        label, uniform = limit(1 - a, label), limit(a, uniform)
    return -((1 - a) * label + a * uniform)


def _z(s: SoftmaxStatistics, weight: Any, z_loss: Number) -> Array | float:
    return 0.0 if _is(0, z_loss) else z_loss * weight * s.log_normalizer**2


def _focus(log_p: Array, gamma: Number) -> Array:
    """(1 - p)^gamma, with slope 0 far below p = eps, also where log p = -inf meets a loss of +inf."""
    log_p = jnp.where(log_p > 0, 0, log_p)  # a distribution that sums to less than 1
    hopeless = log_p < -200
    not_p = -jnp.expm1(jnp.where(hopeless, -1, log_p))
    certain = not_p < jnp.finfo(not_p.dtype).tiny
    if not isinstance(gamma, float):
        power = jnp.where(hopeless | certain, 1, not_p) ** gamma
        return jnp.where(certain & (gamma > 0), 0, power)
    flat = hopeless
    if gamma < 2 and not gamma.is_integer():  # a first or second derivative at p = 1 is infinite
        flat |= certain
    exponent = int(gamma) if gamma.is_integer() else gamma  # in derivatives 0.0 ** 0.0 turns up
    return jnp.where(flat, hopeless.astype(not_p.dtype), jnp.where(flat, 1, not_p) ** exponent)
