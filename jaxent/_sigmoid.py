"""Elementwise losses of independent yes/no classes, from logits: cross-entropy, focal, asymmetric.

All three are positive * yes(z) + negative * no(z), with the two halves of the label as factors. So one
gradient rule serves them, and what differs is the `_Form`.
"""

import math
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from . import _contracts as contracts
from ._derivatives import with_forward_mode
from ._numerics import limit, widen
from ._reduction import keep, reduce, row_weights


def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "none",
) -> Array:
    """Cross-entropy of independent yes/no classes, elementwise (multi-label, or one logit for two classes).

    loss = pos_weight y' (-log σ(z)) + (1 - y') (-log σ(-z)) with y' = (1 - a) y + a/2, a = label_smoothing;
    "mean" is sum(where w loss) / sum(where w) over all elements.

    Args:
      logits: `[...]`, floating point; any real number.
      labels: `[...]`, exactly the shape of the logits; bool, 0/1 integers, or floats in [0, 1].
      where: bool `[...]`; False elements are gone, even if they hold NaN or a bad label.
      weights: real `[...]`; an element of weight 0 is gone as well.
      pos_weight: weight of the positive half: a number >= 0, or an array of shape `[]` or `[V]`, the last
        axis.
      label_smoothing: a in [0, 1]; moves labels towards 1/2.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 logits).

    Gradients:
      (1 - y') σ(z) - pos_weight y' σ(-z) with respect to logits, in their dtype. Float labels, pos_weight and
      weights are differentiable as well (for labels it is -(1 - a) z without a pos_weight). Forward mode and
      second derivatives work. Where the loss takes 0 * inf as 0, at infinite logits, so does the gradient of
      the labels.

    Numerics:
      Computed in float32 at least. Loss within 4 ulp, gradient within 2e-6 relative to its two terms, also at
      losses of 1e-30. Exact at z = +-inf: 0 for the right label, inf for the wrong one. L(z, 1) == L(-z, 0)
      bit for bit. An element with NaN logit or a bad label has NaN loss and NaN gradient, the others are
      clean; masked elements contribute exactly 0 to both. A mean over nothing is 0.

    Cost:
      Elementwise; nothing of the logits' size beyond the result. The backward keeps logits and labels.

    Raises:
      TypeError: logits that are not floating point; complex labels; a mask that is not bool.
      ValueError: shapes that differ (nothing is broadcast), an option out of range, or labels outside [0, 1]
        in a NumPy array. Those in a jax array raise under `checkify.checkify`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> logits = jnp.array([0.0, 100.0, -jnp.inf])
      >>> print(jaxent.sigmoid_cross_entropy(logits, jnp.array([1, 0, 0])))
      [  0.6931472 100.          0.       ]

    Source:
      torch.nn.BCEWithLogitsLoss for pos_weight.
    """
    form = _Form(_smoothing("sigmoid_cross_entropy", label_smoothing))
    return _loss("sigmoid_cross_entropy", form, logits, labels, where, weights, pos_weight, reduction)


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "none",
) -> Array:
    """Focal loss of independent yes/no classes: easy elements are turned down by (1 - p)^gamma.

    loss = alpha pos_weight y' (1 - p)^gamma (-log p) + (1 - alpha) (1 - y') p^gamma (-log(1 - p)), p = σ(z),
    y' = (1 - a) y + a/2; without alpha both factors are 1. "mean" is sum(where w loss) / sum(where w).

    Args:
      logits: `[...]`, floating point.
      labels: `[...]`, exactly the shape of the logits; bool, 0/1 integers, or floats in [0, 1].
      gamma: focusing exponent >= 0; 0 is cross-entropy.
      alpha: balance of positives (alpha) against negatives (1 - alpha), in [0, 1].
      where: bool `[...]`; False elements are gone, even if they hold NaN or a bad label.
      weights: real `[...]`; an element of weight 0 is gone as well.
      pos_weight: a further weight of positives: a number >= 0, or an array of shape `[]` or `[V]`.
      label_smoothing: a in [0, 1]; moves labels towards 1/2.
      reduction: "none", "sum" or "mean"; the mean divides by the elements, not by the positives of a
        detector.

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 logits).

    Gradients:
      -(1 - p)^gamma (gamma p (-log p) + 1 - p) at y = 1, mirrored at y = 0, in the logits' dtype. Float
      labels, pos_weight and weights are differentiable. Forward mode and second derivatives work.

    Numerics:
      As `sigmoid_cross_entropy`; loss and gradient within 2e-6 relative for gamma up to 5, however large |z|,
      down to where float32 ends. L(z, 1) == L(-z, 0) bit for bit without alpha.

    Cost:
      Elementwise; nothing of the logits' size beyond the result. The backward keeps logits and labels.

    Raises:
      TypeError: logits that are not floating point; complex labels; a mask that is not bool.
      ValueError: shapes that differ, an option out of range, NumPy labels outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.sigmoid_focal_loss(jnp.array([0.0, 4.0]), jnp.array([True, True])))
      [1.732868e-01 5.871570e-06]

    Source:
      Lin et al., Focal Loss for Dense Object Detection, 2017. For labels strictly between 0 and 1 this is the
      mean of the loss over the two answers, as in `sigmoid_asymmetric_loss`; torchvision and optax put the
      label inside the power there.
    """
    function = "sigmoid_focal_loss"
    contracts.check_number(function, "gamma", gamma, 0, math.inf, "gamma=0 is `sigmoid_cross_entropy`.")
    if alpha is not None:
        contracts.check_number(function, "alpha", alpha, 0, 1, "alpha=None leaves the balance alone.")
    positive, negative = (1.0, 1.0) if alpha is None else (float(alpha), 1 - float(alpha))
    smoothing = _smoothing(function, label_smoothing)
    form = _Form(smoothing, positive, negative, gamma_positive=float(gamma), gamma_negative=float(gamma))
    return _loss(function, form, logits, labels, where, weights, pos_weight, reduction)


def sigmoid_asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "none",
) -> Array:
    """Asymmetric loss for multi-label problems with many negatives: easy negatives are turned down, then off.

    loss = pos_weight y' (1 - p)^gamma_positive (-log p) + (1 - y') u^gamma_negative (-log(1 - u)), p = σ(z),
    u = max(p - clip, 0), y' = (1 - a) y + a/2; "mean" is sum(where w loss) / sum(where w).

    Args:
      logits: `[...]`, floating point.
      labels: `[...]`, exactly the shape of the logits; bool, 0/1 integers, or floats in [0, 1].
      gamma_negative: focusing exponent of negatives, >= 0.
      gamma_positive: focusing exponent of positives, >= 0.
      clip: negatives with a probability below it are off, in [0, 1).
      where: bool `[...]`; False elements are gone, even if they hold NaN or a bad label.
      weights: real `[...]`; an element of weight 0 is gone as well.
      pos_weight: weight of positives: a number >= 0, or an array of shape `[]` or `[V]`, the last axis.
      label_smoothing: a in [0, 1]; moves labels towards 1/2.
      reduction: "none", "sum" or "mean".

    Returns:
      Losses `[...]`, or a scalar, in nats; float32 (float64 for float64 logits).

    Gradients:
      Through the powers as well (the authors' code can stop them), in the logits' dtype. Float labels,
      pos_weight and weights are differentiable. Forward mode and second derivatives work.

    Numerics:
      As `sigmoid_focal_loss`, within 4e-6 relative. p - clip is not formed by subtraction, so the loss of a
      negative just above the clip keeps its digits. With clip > 0 the loss of a negative is at most
      -log(clip), not infinite.

    Cost:
      Elementwise; nothing of the logits' size beyond the result. The backward keeps logits and labels.

    Raises:
      TypeError: logits that are not floating point; complex labels; a mask that is not bool.
      ValueError: shapes that differ, an option out of range, NumPy labels outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.sigmoid_asymmetric_loss(jnp.array([0.0, -4.0]), jnp.array([1, 0])))
      [0.3465736 0.       ]

    Source:
      Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2021.
    """
    function = "sigmoid_asymmetric_loss"
    remedy = "The paper has gamma_negative=4, gamma_positive=1."
    contracts.check_number(function, "gamma_negative", gamma_negative, 0, math.inf, remedy)
    contracts.check_number(function, "gamma_positive", gamma_positive, 0, math.inf, remedy)
    remedy = "It is a probability; 0 turns it off."
    contracts.check_number(function, "clip", clip, 0, 1, remedy)
    contracts.check_option(function, "clip", clip, clip < 1, "in [0, 1)", remedy)
    smoothing = _smoothing(function, label_smoothing)
    form = _Form(smoothing, 1.0, 1.0, float(gamma_positive), float(gamma_negative), float(clip))
    return _loss(function, form, logits, labels, where, weights, pos_weight, reduction)


class _Form(NamedTuple):
    label_smoothing: float
    positive: float = 1.0
    negative: float = 1.0
    gamma_positive: float = 0.0
    gamma_negative: float = 0.0
    clip: float = 0.0


def _smoothing(function: str, label_smoothing: float) -> float:
    remedy = "It moves labels towards 1/2."
    contracts.check_number(function, "label_smoothing", label_smoothing, 0, 1, remedy)
    return float(label_smoothing)


def _loss(
    function: str,
    form: _Form,
    logits: Any,
    labels: Any,
    where: Any,
    weights: Any,
    pos_weight: Any,
    reduction: str,
) -> Array:
    contracts.check_reduction(function, reduction)
    remedy = "Pass what the last layer gives, before any rounding: `logits.astype(jnp.float32)`."
    contracts.check_floating(function, "logits", logits, remedy)
    shape = np.shape(logits)
    contracts.check_binary_labels(function, labels, shape, "logits")
    counts, row_weight = row_weights(function, shape, where, weights)
    labels = contracts.check_host_binary_labels(function, labels, contracts.host_mask(where, weights))
    labels = keep(counts, labels, False)  # False takes any dtype
    contracts.debug_check_binary_labels(function, (labels >= 0) & (labels <= 1), labels)
    if pos_weight is not None:
        pos_weight = widen(_pos_weight(function, pos_weight, shape))
    losses = _elementwise(form, keep(counts, jnp.asarray(logits)), labels, pos_weight)
    return reduce(losses, counts, row_weight, reduction)


def _pos_weight(function: str, pos_weight: Any, shape: tuple[int, ...]) -> Array:
    remedy = "It multiplies the positive half of the loss; for weights of elements use `weights`."
    if isinstance(pos_weight, int | float):
        contracts.check_number(function, "pos_weight", pos_weight, 0, math.inf, remedy)
    contracts.check_real(function, "pos_weight", pos_weight)
    if not contracts.has_shape(pos_weight, ()):
        what = "the last axis of `logits`, or a number"
        contracts.check_shape(function, "pos_weight", pos_weight, shape[-1:], what, remedy)
    return jnp.asarray(pos_weight)


@jax.custom_jvp
def _sigmoids(z: Array) -> tuple[Array, Array, Array, Array]:
    """σ(z), σ(-z), -log σ(z), -log σ(-z), none of them by a difference."""
    e = jnp.exp(-jnp.abs(z))
    up = z >= 0
    large, small, tail = 1 / (1 + e), e / (1 + e), jnp.log1p(e)
    p, q = jnp.where(up, large, small), jnp.where(up, small, large)
    return p, q, tail + jnp.maximum(-z, 0), tail + jnp.maximum(z, 0)


@_sigmoids.defjvp
def _sigmoids_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    # autodiff would take |z| for flat at 0, and cancel in 1 - σ(z)
    p, q, a, b = _sigmoids(*primals)
    (dz,) = tangents
    return (p, q, a, b), (p * q * dz, -p * q * dz, -q * dz, p * dz)


def _clipped(form: _Form, z: Array, p: Array, q: Array, b: Array) -> tuple[Array, Array, Array, Array]:
    """u = max(p - clip, 0), -log(1 - u), and where u > 0 also p/u and p q/(1 - u).

    With c = log(clip / (1 - clip)): p - clip = p (1 - clip) (1 - exp(c - z)), where nothing cancels, because
    c = high + low. 1 - u = q + clip.
    """
    if not form.clip:
        return p, b, jnp.ones_like(p), p
    c = Decimal(form.clip).ln() - (1 - Decimal(form.clip)).ln()
    high = np.asarray(float(c), z.dtype)
    low = np.asarray(float(c - Decimal(float(high))), z.dtype)
    e = jnp.expm1(jnp.minimum(high - z, 1))
    u = p * (1 - form.clip) * jnp.maximum(-(e + low * (1 + e)), 0)  # XLA would fold (high - z) + low
    rest = q + form.clip
    off = u == 0
    return u, jnp.log1p(u / rest), p / jnp.where(off, 1, u), jnp.where(off, 0, p * q / rest)


def _power(x: Array, gamma: float) -> Array:
    if gamma.is_integer():
        return x ** int(gamma)
    zero = x == 0  # its derivative is a factor of something that is 0 there
    return jnp.where(zero, 0, jnp.where(zero, 1, x) ** gamma)


def _halves(form: _Form, z: Array) -> tuple[Array, Array]:
    """yes(z), no(z): the loss at the labels 1 and 0, unweighted."""
    p, q, a, b = _sigmoids(z)
    u, b, _, _ = _clipped(form, z, p, q, b)
    return _power(q, form.gamma_positive) * a, _power(u, form.gamma_negative) * b


def _slopes(form: _Form, z: Array) -> tuple[Array, Array]:
    """yes'(z), no'(z)."""
    p, q, a, b = _sigmoids(z)
    u, b, lead, no = _clipped(form, z, p, q, b)
    yes = q
    if form.gamma_positive:
        yes = yes + form.gamma_positive * p * limit(p, a)
    if form.gamma_negative:
        no = no + form.gamma_negative * q * limit(q, b) * lead
    return -_power(q, form.gamma_positive) * yes, _power(u, form.gamma_negative) * no


def _factors(form: _Form, labels: Array, pos_weight: Array | None, dtype: Any) -> tuple[Array, Array, Array]:
    """positive, negative (NaN where the label is outside [0, 1]), and y'."""
    y = labels.astype(dtype)
    y = jnp.where((y >= 0) & (y <= 1), y, jnp.nan)
    a = form.label_smoothing
    yes, no = ((1 - a) * y + a / 2, (1 - a) * (1 - y) + a / 2) if a else (y, 1 - y)
    weight = 1 if pos_weight is None else pos_weight.astype(dtype)
    return form.positive * weight * yes, form.negative * no, yes


def _primal(form: _Form, logits: Array, labels: Array, pos_weight: Array | None) -> Array:
    z = widen(logits)
    positive, negative, _ = _factors(form, labels, pos_weight, z.dtype)
    yes, no = _halves(form, z)
    return positive * limit(positive, yes) + negative * limit(negative, no)


def _forward(form: _Form, logits: Array, labels: Array, pos_weight: Array | None) -> Any:
    return _primal(form, logits, labels, pos_weight), (logits, labels, pos_weight)


# loss     = positive yes(z) + negative no(z)      positive = α w y',  negative = (1 - α) (1 - y')
# yes(z)   = q^γ+ a                                p = σ(z),  q = σ(-z),  a = -log p,  b = -log q
# no(z)    = u^γ- b_u                              u = max(p - clip, 0),  1 - u = q + clip,  b_u = -log(1 - u)
# p' = p q,  q' = -p q,  a' = -q,  u' = p q,  b_u' = p q / (1 - u)  (the latter two 0 where u = 0)
#
# yes'(z)  = -q^γ+ (γ+ p a + q)
# no'(z)   = u^γ- (γ- q b_u p/u + p q / (1 - u))   without clip p/u = 1 and p q / (1 - u) = p
# dloss/dy = (1 - smoothing) (α w yes(z) - (1 - α) no(z))
#            with γ = clip = 0, as a - b = -z:  (α w - (1 - α)) a - (1 - α) z  for z >= 0
#                                               (α w - (1 - α)) b - α w z      for z < 0
# dloss/dw = α y' yes(z)
def _backward(form: _Form, residuals: Any, g: Array) -> Any:
    logits, labels, pos_weight = residuals
    z = widen(logits)
    positive, negative, y = _factors(form, labels, pos_weight, z.dtype)
    yes, no = _halves(form, z)
    slope_yes, slope_no = _slopes(form, z)
    d_logits = (g * (positive * slope_yes + negative * slope_no)).astype(logits.dtype)

    d_labels = None
    if contracts.is_floating(labels):
        alpha_w = form.positive * (1 if pos_weight is None else pos_weight.astype(z.dtype))
        if form.gamma_positive or form.gamma_negative or form.clip:
            d = alpha_w * limit(positive, yes) - form.negative * limit(negative, no)
        else:
            up = z >= 0
            d = (alpha_w - form.negative) * jnp.where(up, yes, no)
            d = d - jnp.where(up, form.negative * limit(negative, z), alpha_w * limit(positive, z))
        poison = jnp.where(jnp.isnan(y), y, 1)
        d_labels = (g * ((1 - form.label_smoothing) * poison * d)).astype(labels.dtype)

    d_weight = None
    if pos_weight is not None:
        d_weight = g * (form.positive * y * limit(y, yes))
        d_weight = d_weight.sum(tuple(range(z.ndim - pos_weight.ndim))).astype(pos_weight.dtype)
    return d_logits, d_labels, d_weight


_rule = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward)
_elementwise = with_forward_mode(_rule)
