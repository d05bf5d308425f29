"""Softmax losses: a few lines each on the row statistics."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _contracts as contracts
from ._block import Block, Phi
from ._contracts import Number, Range
from ._devices import CLASSES, split_as
from ._logits.linear import LinearLogits
from ._numerics import accumulation_dtype, limit, product_or_zero, widen
from ._objective import objective, prepare
from ._rows import AxisName, Options, Rows
from ._sparse import SparseDistribution
from ._statistics import SoftmaxStatistics


@contracts.takes_arrays
def softmax_cross_entropy(
    logits: Array | LinearLogits,
    labels: Array | SparseDistribution,
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
      labels: integers `[...]`, class indices in [0, V); or floats `[..., V]`, a distribution over the classes; or a
        `SparseDistribution` over a few of them.
      axis: the class axis.
      where: bool `[...]`; a False row is gone, even if it holds NaN or a bad label.
      ignore_index: rows with this integer label are gone as well.
      weights: real `[...]`, a factor per row; a row of weight 0 adds nothing, even if it holds NaN or a bad label.
      class_weights: real `[V]`, a constant factor per class, as in torch.nn.functional.cross_entropy.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of the softmax.
      label_smoothing: a in [0, 1]: how much of the label is spread evenly over the classes in force. Like `z_loss` a
        Python number, which is part of the program, or an array `[]`, which may be annealed or mapped over.
      z_loss: >= 0, a number or an array `[]`, the factor of the squared log-normalizer, against drift.
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
      Computed in float32 (float64 for float64), within 1e-6 relative down to losses of 1e-30, where
      log_softmax gives 0. A label outside [0, V), or on a class that is not in force, makes its row's loss and
      gradient NaN; labels known on the host raise at once; `checkify` shows bad ones in compiled code. A NaN or
      +inf logit makes its row NaN; -inf is probability 0. A distribution is used as it is, whatever its sum. An option
      that is an array and out of its range makes the loss NaN.

    Cost:
      Forward two passes over the logits, backward one; no array of N x V but the gradient. A distribution, a
      class mask or class weights with smoothing may add one. `LinearLogits`: 3 matmuls with gradients, 4 without
      a reduction, and no array of N x V at all.

    Raises:
      TypeError: logits that are not floating point; float class indices; one-hot integers; a mask not bool; an option
        that is no number.
      ValueError: a shape that does not match exactly; an option out of its range; a bad label on the host; one
        axis name for classes and rows.

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
    options = Options(axis, where, ignore_index, weights, class_weights, class_mask, None, reduction, *names)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    return _loss("softmax_cross_entropy", CROSS_ENTROPY, logits, labels, options, numbers)


@contracts.takes_arrays
def softmax_focal_loss(
    logits: Array | LinearLogits,
    labels: Array | SparseDistribution,
    *,
    gamma: Number = 2.0,
    alpha: Number | None = None,
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

        loss = alpha sum_j w_j t_j (1 - p_j)^gamma (-log p_j) + z_loss w_y lse^2,   t = (1 - a) q + a/V

    with q the label, one-hot or a distribution, spread by smoothing a, and class weights w as in
    `softmax_cross_entropy`. The mean divides as there.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      labels: integers `[...]` in [0, V), a distribution `[..., V]`, or a `SparseDistribution`.
      gamma: >= 0, a number or an array `[]`; 0 is the cross-entropy.
      alpha: >= 0, a factor of the loss: a number, an array `[]`, or `[V]`, one per class, constants. Unlike
        `class_weights` they are not what the mean divides by.
      axis: the class axis; this and all that follow are as in `softmax_cross_entropy`.
      where: bool `[...]`.
      ignore_index: an integer label to leave out.
      weights: real `[...]`.
      class_weights: real `[V]`.
      class_mask: bool `[V]` or the shape of `logits`.
      label_smoothing: in [0, 1], a number or an array `[]`.
      z_loss: >= 0, a number or an array `[]`.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Losses in nats, `[...]` or a scalar: float32, or float64 for float64 logits.

    Gradients:
      As `softmax_cross_entropy`, to `logits` in their dtype; also to gamma and an alpha that are arrays `[]`.

    Numerics:
      As `softmax_cross_entropy`, at gamma 2 within 2e-6 relative; 1 - p_j is -expm1(log p_j), exact where p_j
      rounds to 1.

    Cost:
      That of `softmax_cross_entropy`. A distribution, or smoothing, takes one more pass over the logits; `LinearLogits`
      in blocks of classes one more matmul.

    Raises:
      As `softmax_cross_entropy`; ValueError: a gamma that is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
      >>> print(jaxent.softmax_focal_loss(logits, jnp.array([0, 2])).round(4))
      [0.0041 0.4883]

    Source:
      Lin et al. 2017, "Focal loss for dense object detection", for softmax; of distributions, and with smoothing, as in
      keras.losses.CategoricalFocalCrossentropy, which divides the mean by the rows.
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, ignore_index, weights, class_weights, class_mask, None, reduction, *names)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, "gamma": gamma}
    numbers["alpha"] = 1.0 if alpha is None else alpha
    return _loss("softmax_focal_loss", FOCAL, logits, labels, options, numbers)


@contracts.takes_arrays
def softmax_poly_loss(
    logits: Array | LinearLogits,
    labels: Array | SparseDistribution,
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

        loss = sum_j w_j t_j (-log p_j + epsilon (1 - p_j)) + z_loss w_y lse^2,   t = (1 - a) q + a/V

    with q the label, one-hot or a distribution, spread by smoothing a, and class weights w as in
    `softmax_cross_entropy`. The mean divides as there.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      labels: integers `[...]` in [0, V), a distribution `[..., V]`, or a `SparseDistribution`.
      epsilon: >= -1, the factor of the first polynomial term, a number or an array `[]`; 0 is the cross-entropy.
      axis: the class axis; this and all that follow are as in `softmax_cross_entropy`.
      where: bool `[...]`.
      ignore_index: an integer label to leave out.
      weights: real `[...]`.
      class_weights: real `[V]`.
      class_mask: bool `[V]` or the shape of `logits`.
      label_smoothing: in [0, 1], a number or an array `[]`.
      z_loss: >= 0, a number or an array `[]`.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Losses in nats, `[...]` or a scalar: float32, or float64 for float64 logits.

    Gradients:
      As `softmax_cross_entropy`, to `logits` in their dtype; also to an epsilon that is an array.

    Numerics:
      As `softmax_cross_entropy`; 1 - p_j is -expm1(log p_j), exact where p_j rounds to 1.

    Cost:
      That of `softmax_cross_entropy`. A distribution, or smoothing, takes one more pass over the logits; `LinearLogits`
      in blocks of classes one more matmul.

    Raises:
      As `softmax_cross_entropy`; ValueError: an epsilon below -1 or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
      >>> print(jaxent.softmax_poly_loss(logits, jnp.array([0, 2])).round(4))
      [0.3261    1.7652999]

    Source:
      Leng et al. 2022, "PolyLoss"; of distributions as optax.losses.poly_loss_cross_entropy.
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, ignore_index, weights, class_weights, class_mask, None, reduction, *names)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, "epsilon": epsilon}
    return _loss("softmax_poly_loss", POLY, logits, labels, options, numbers)


RANGES = {
    "label_smoothing": Range(0, 1, "0 is none of it, 1 all of it; usual is 0.1."),
    "z_loss": Range(0, math.inf, "0 turns it off; usual is 1e-4."),
    "gamma": Range(0, math.inf, "0 is the cross-entropy; usual is 2."),
    "alpha": Range(0, math.inf, "A factor of the loss; one per class has shape [V]."),
    "epsilon": Range(-1, math.inf, "Below -1 a confident mistake would be rewarded; 0 is the cross-entropy."),
}


class _Kind(NamedTuple):
    """Of a loss: factor sum_j t_j (-log p_j) + phi_factor sum_j t_j phi(log p_j), t the label after smoothing."""

    factors: Callable[[dict[str, Number]], tuple[Number, Number]]  # from the numbers of the loss
    phi: Callable[[Array, Number], Array] | None = None  # of log p and a number
    number: str | None = None  # the name of that
    of_label: Callable[..., Array] | None = None  # (s, w_y, numbers): w_y phi(log p_y) of a class index


def _loss(
    function: str, kind: _Kind, logits: Any, labels: Any, options: Options, numbers: dict[str, Any]
) -> Array:
    """A loss of this kind plus z-loss, reduced."""
    if not isinstance(labels, SparseDistribution):
        contracts.check_array(function, "labels", labels)
    class_alpha = None
    if np.ndim(numbers.get("alpha", 1)):
        class_alpha = numbers["alpha"]
        numbers = numbers | {"alpha": 1.0}
    checked = {name: contracts.number(function, name, x, RANGES[name]) for name, x in numbers.items()}
    block, rows = prepare(function, logits, labels, options)
    if class_alpha is not None:
        block = _weighted_by_class(function, class_alpha, block, rows)
    return loss_of_block(kind, block, rows, checked)


def loss_of_block(kind: _Kind, block: Block, rows: Rows, checked: dict[str, Number]) -> Array:
    """Of checked arguments; `checked` are the numbers of the loss."""
    if rows.label_weight is not None and _is(0, checked["label_smoothing"]):
        rows = rows.only(rows.label_weight != 0)  # of which the loss is a multiple
    dtype = accumulation_dtype(block.logits.dtype)
    arrays = {name: x.astype(dtype) for name, x in checked.items() if not isinstance(x, float)}
    arrays = {name: rows.split(jnp.broadcast_to(x, rows.shape)) for name, x in arrays.items()}
    if kind.phi is not None:
        per_row = arrays.get(kind.number)
        number: Any = 0.0 if kind.number is None or per_row is not None else checked[kind.number]
        block = block._replace(phi=Phi(kind.phi, number, per_row))

    def fn(s: Any, weight: Any, arrays: dict[str, Array]) -> Any:
        numbers = checked | arrays
        a, z_loss = numbers["label_smoothing"], numbers["z_loss"]
        cross_entropy, phi = kind.factors(numbers)
        loss = 0.0 if _is(0, z_loss) else z_loss * weight * s.log_normalizer**2
        if not _is(0, cross_entropy):
            label, uniform = (lambda: -s.weighted_log_prob), (lambda: -s.mean_log_prob)
            loss += _times(cross_entropy, _smoothed(label, uniform, a))
        if not _is(0, phi):

            def label() -> Array:
                return s.weighted_phi if block.label is None else kind.of_label(s, weight, numbers)

            loss += _times(phi, _smoothed(label, lambda: s.mean_phi, a))
        return loss

    return objective(fn, block, rows, (arrays,))


def _weighted_by_class(function: str, alpha: Any, block: Block, rows: Rows) -> Block:
    """With a factor per class that no mean divides by: a constant, as class weights are."""
    classes = block.logits.shape[-1:]
    alpha = contracts.number(function, "alpha", alpha, RANGES["alpha"], others=(classes,))
    alpha = split_as(rows.sharding, CLASSES, lax.stop_gradient(widen(alpha)))
    weights = alpha if block.class_weights is None else alpha * block.class_weights
    return block._replace(class_weights=weights.astype(accumulation_dtype(block.logits.dtype)))


def _is(number: float, option: Number) -> bool:
    """Whether a number that is part of the program is this one."""
    return isinstance(option, float) and option == number


def _times(factor: Number, x: Array) -> Array:
    return x if _is(1, factor) else factor * (x if isinstance(factor, float) else limit(factor, x))


def _smoothed(label: Callable[[], Array], uniform: Callable[[], Array], a: Number) -> Array:
    """The part of the label and that of all classes evenly; what is not needed is not read."""
    if _is(0, a):
        return label()
    if _is(1, a):  # not 0 * inf
        return uniform()
    if isinstance(a, float):
        return (1 - a) * label() + a * uniform()
    return (1 - a) * limit(1 - a, label()) + a * limit(a, uniform())


def _focal_phi(log_p: Array, gamma: Number) -> Array:
    return product_or_zero(_focus(log_p, gamma), -log_p)


def _focal_of_label(s: SoftmaxStatistics, _: Any, numbers: dict[str, Number]) -> Array:
    return product_or_zero(_focus(s.log_prob, numbers["gamma"]), -s.weighted_log_prob)


def _poly_phi(log_p: Array, _: Number) -> Array:
    return -jnp.expm1(log_p)


def _poly_of_label(s: SoftmaxStatistics, weight: Any, _: dict[str, Number]) -> Array:
    return -weight * jnp.expm1(s.log_prob)


def _focus(log_p: Array, gamma: Number) -> Array:
    """(1 - p)^gamma, with slope 0 far below p = eps, also where log p = -inf meets a loss of +inf."""
    log_p = jnp.where(log_p > 0, 0, log_p)  # a rounding
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


CROSS_ENTROPY = _Kind(lambda _: (1.0, 0.0))
FOCAL = _Kind(
    lambda n: (n["alpha"], 0.0) if _is(0, n["gamma"]) else (0.0, n["alpha"]),
    _focal_phi,
    "gamma",
    _focal_of_label,
)
POLY = _Kind(lambda n: (1.0, n["epsilon"]), phi=_poly_phi, of_label=_poly_of_label)
