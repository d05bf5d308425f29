"""Elementwise losses of independent yes/no classes, from logits: cross-entropy, focal, asymmetric.

All three are one rule (`_yes_no.py`) in another `Form`: here are their options, and what these may be.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from . import _contracts as contracts
from ._contracts import Number, Range, check_number, number
from ._derivatives import varying_like
from ._devices import split_as
from ._logits.explicit import sharding_of
from ._numerics import accumulation_dtype, as_dtype, widen
from ._rows import Options, Rows, keep
from ._yes_no import Form, elementwise, product


@contracts.takes_arrays
def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    reduction: str = "none",
) -> Array:
    """Cross-entropy of independent yes/no classes, elementwise (multi-label, or one logit for two classes).

    With y' = (1 - a) y + a/2, a = label_smoothing:

        loss = pos_weight y' (-log σ(z)) + (1 - y') (-log σ(-z))

    "mean" is sum(where w loss) / sum(where w) over all elements.

    Args:
      logits: `[...]`, floating point; any real number.
      labels: `[...]`, exactly the shape of the logits; bool, 0/1 integers, or floats in [0, 1].
      axis: the class axis, of options `[V]` (1 for images `[N, V, H, W]`); nothing else reads it.
      where: bool `[...]`; False elements are gone, even if they hold NaN or a bad label.
      ignore_index: elements with this integer label are gone as well (255: unknown, in many data sets);
        beside float labels write `where=labels != 255`.
      weights: real `[...]`; an element of weight 0 adds nothing, even if it holds NaN or a bad label.
      pos_weight: weight of the positive half, >= 0: a number, or an array `[]`, `[V]` (one per class) or
        `[...]` (one per element).
      label_smoothing: a in [0, 1]; moves labels towards 1/2. A number, or an array `[]`.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 logits).

    Gradients:
      (1 - y') σ(z) - pos_weight y' σ(-z) with respect to logits, in their dtype. Float labels, weights and options that
      are arrays are differentiable as well (for labels it is -(1 - a) z without a pos_weight; the derivative along a
      weight of 0 is the loss, 0 if that is not finite). Forward mode and second derivatives work. Where the loss takes
      0 * inf as 0, at infinite logits, so do the gradients of labels and options.

    Numerics:
      Computed in float32 at least. Loss within 4 ulp, gradient within 1e-6 relative to its two terms, also at losses
      of 1e-30. Exact at z = +-inf: 0 for the right label, inf for the wrong one. L(z, 1) == L(-z, 0) bit for bit. An
      element with NaN logit or a bad label has NaN loss and NaN gradient, the others are clean; masked elements
      contribute exactly 0 to both. A mean over nothing is 0. A float label up to 16 ulp above 1, as sums of
      probabilities are, is taken as 1. An option that is a jax array makes the loss NaN where it is out of
      range (of its class or element, if it is one per class or element).

    Cost:
      Elementwise; nothing of the logits' size beyond the result. The backward keeps logits, labels and
      options per element. An option that is a Python number is part of the program; an array may change
      without compiling again.

    Raises:
      TypeError: logits that are not floating point; complex labels; a mask that is not bool.
      ValueError: shapes that differ (nothing is broadcast), an option out of range (a number or a NumPy array),
        or labels outside [0, 1] in a NumPy array. Those in a jax array raise under `checkify.checkify`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([0.0, 100.0, -jnp.inf])
      >>> print(jaxent.sigmoid_cross_entropy(logits, jnp.array([1, 0, 0])))
      [  0.6931472 100.          0.       ]

    Source:
      torch.nn.BCEWithLogitsLoss for pos_weight, which it broadcasts.
    """
    options = Options(axis, where, ignore_index, weights, reduction=reduction)
    factors = {"pos_weight": pos_weight}
    return _loss("sigmoid_cross_entropy", logits, labels, options, factors, Form(label_smoothing))


@contracts.takes_arrays
def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    reduction: str = "none",
) -> Array:
    """Focal loss of independent yes/no classes: easy elements are turned down by (1 - p)^gamma.

    With p = σ(z), y' = (1 - a) y + a/2, a = label_smoothing:

        loss = alpha pos_weight y' (1 - p)^gamma (-log p) + (1 - alpha) (1 - y') p^gamma (-log(1 - p))

    Without alpha both its factors are 1. "mean" is sum(where w loss) / sum(where w).

    Args:
      logits: `[...]`, floating point.
      labels: `[...]`, exactly the shape of the logits; bool, 0/1 integers, or floats in [0, 1].
      gamma: focusing exponent >= 0; 0 is cross-entropy. A number, or an array `[]`.
      alpha: balance of positives (alpha) against negatives (1 - alpha), in [0, 1]: a number, or an array
        `[]`, `[V]` (one per class) or `[...]` (one per element).
      axis: the class axis, of options `[V]`; like all that follow as in `sigmoid_cross_entropy`.
      where: bool `[...]`.
      ignore_index: an integer label to leave out.
      weights: real `[...]`.
      pos_weight: a further weight of positives, >= 0: a number, or an array `[]`, `[V]` or `[...]`.
      label_smoothing: a in [0, 1], a number or an array `[]`.
      reduction: "none", "sum" or "mean"; the mean divides by the elements, not by the positives of a detector.

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 logits).

    Gradients:
      -(1 - p)^gamma (gamma p (-log p) + 1 - p) at y = 1, mirrored at y = 0; else as `sigmoid_cross_entropy`.

    Numerics:
      As `sigmoid_cross_entropy`; loss and gradient within 2e-6 relative for gamma up to 5, however large |z|, down to
      where float32 ends. L(z, 1) == L(-z, 0) bit for bit without alpha.

    Cost:
      That of `sigmoid_cross_entropy`.

    Raises:
      As `sigmoid_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.sigmoid_focal_loss(jnp.array([0.0, 4.0]), jnp.array([True, True])))
      [1.732868e-01 5.871570e-06]

    Source:
      Lin et al., Focal Loss for Dense Object Detection, 2017. For labels strictly between 0 and 1 this is the mean of
      the loss over the two answers, as in `sigmoid_asymmetric_loss`; torchvision and optax put the label inside the
      power there.
    """
    function = "sigmoid_focal_loss"
    gamma = number(function, "gamma", gamma, Range(0, math.inf, "gamma=0 is `sigmoid_cross_entropy`."))
    form = Form(label_smoothing, gamma_positive=gamma, gamma_negative=gamma)
    options = Options(axis, where, ignore_index, weights, reduction=reduction)
    factors = {"pos_weight": pos_weight, "alpha": alpha}
    return _loss(function, logits, labels, options, factors, form)


@contracts.takes_arrays
def sigmoid_asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_negative: ArrayLike = 4.0,
    gamma_positive: ArrayLike = 1.0,
    clip: float = 0.05,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    reduction: str = "none",
) -> Array:
    """Asymmetric loss for multi-label problems with many negatives: easy negatives are turned down, then off.

    With p = σ(z), u = max(p - clip, 0), y' = (1 - a) y + a/2, a = label_smoothing:

        loss = pos_weight y' (1 - p)^gamma_positive (-log p) + (1 - y') u^gamma_negative (-log(1 - u))

    "mean" is sum(where w loss) / sum(where w).

    Args:
      logits: `[...]`, floating point.
      labels: `[...]`, exactly the shape of the logits; bool, 0/1 integers, or floats in [0, 1].
      gamma_negative: focusing exponent of negatives, >= 0. A number, or an array `[]`.
      gamma_positive: focusing exponent of positives, >= 0. A number, or an array `[]`.
      clip: negatives with a probability below it are off, in [0, 1). A Python number.
      axis: the class axis, of options `[V]`; like all that follow as in `sigmoid_cross_entropy`.
      where: bool `[...]`.
      ignore_index: an integer label to leave out.
      weights: real `[...]`.
      pos_weight: weight of positives, >= 0: a number, or an array `[]`, `[V]` or `[...]`.
      label_smoothing: a in [0, 1], a number or an array `[]`.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 logits).

    Gradients:
      Through the powers as well (the authors' code can stop them); else as `sigmoid_cross_entropy`.

    Numerics:
      As `sigmoid_focal_loss`, within 4e-6 relative. p - clip is not formed by subtraction, so the loss of a negative
      just above the clip keeps its digits. With clip > 0 the loss of a negative is at most -log(clip), not infinite.

    Cost:
      That of `sigmoid_cross_entropy`.

    Raises:
      As `sigmoid_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.sigmoid_asymmetric_loss(jnp.array([0.0, -4.0]), jnp.array([1, 0])))
      [0.3465736 0.       ]

    Source:
      Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2021.
    """
    function = "sigmoid_asymmetric_loss"
    exponent = Range(0, math.inf, "The paper has gamma_negative=4, gamma_positive=1.")
    gamma_negative = number(function, "gamma_negative", gamma_negative, exponent)
    gamma_positive = number(function, "gamma_positive", gamma_positive, exponent)
    remedy = "It is a probability, and part of the program: pass `float(clip)` outside jit; 0 turns it off."
    check_number(function, "clip", clip, Range(0, 1, remedy))
    contracts.check_option(function, "clip", clip, clip < 1, "in [0, 1)", remedy)
    form = Form(label_smoothing, 1.0, 1.0, gamma_positive, gamma_negative, float(clip))
    options = Options(axis, where, ignore_index, weights, reduction=reduction)
    return _loss(function, logits, labels, options, {"pos_weight": pos_weight}, form)


_FACTORS = {
    "pos_weight": Range(
        0, math.inf, "It multiplies the positive half of the loss; one per class is `[V]` along `axis`."
    ),
    "alpha": Range(0, 1, "Positives weigh alpha, negatives 1 - alpha; one per class is `[V]` along `axis`."),
}


def _loss(
    function: str, logits: Any, labels: Any, options: Options, factors: dict[str, Any], form: Form
) -> Array:
    """`factors` and `label_smoothing` as they came; all else in `form` is checked."""
    remedy = "Pass what the last layer gives, before any rounding: `logits.astype(jnp.float32)`."
    contracts.check_floating(function, "logits", logits, remedy)
    contracts.check_axis(function, options.axis, logits)
    z = jnp.asarray(logits)
    axis = int(options.axis) % max(z.ndim, 1)
    rows = Rows.of(function, options, z.shape, sharding_of(z)).without_ignored(labels, "logits")
    y = rows.binary_labels(labels, "logits")

    dtype = accumulation_dtype(z.dtype)
    for name, x in factors.items():
        if x is not None:
            rows, x = _factor(rows, name, x, axis)
            positive = product(axis, form.positive, as_dtype(x, dtype))
            form = form._replace(positive=positive, negative=1 - x if name == "alpha" else form.negative)
    allowed = Range(0, 1, "It moves labels towards 1/2.")
    smoothing = number(function, "label_smoothing", form.label_smoothing, allowed)
    form = form._replace(label_smoothing=smoothing, axis=axis)
    values = {name: x.astype(dtype) for name, x in form._asdict().items() if not isinstance(x, int | float)}
    static = form._replace(**dict.fromkeys(values))
    z, y, values = varying_like((z, y, values, rows.counts, rows.weights), (z, y, values))
    return rows.reduce_finite(lambda counts: elementwise(static, keep(counts, z), keep(counts, y), values))


def _factor(rows: Rows, name: str, x: Any, axis: int) -> tuple[Rows, Number]:
    """(the rows that count, `x` checked and split as the logits); one per element goes with its element."""
    shape, allowed = rows.shape, _FACTORS[name]
    if isinstance(x, jax.Array) and x.shape == shape:
        x = given = rows.split(x)
        rows = rows.with_answers(lambda: allowed.contains(widen(given)))
        x = keep(rows.counts, x, 1)
    classes = slice(axis, axis + 1)
    x = number(rows.function, name, x, allowed, others=(shape[classes], shape))
    if np.ndim(x):
        x = rows.split(x) if np.shape(x) == shape else split_as(rows.sharding, classes, x)
    return rows, x
