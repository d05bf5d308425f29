"""Information measures of one or two softmax distributions, from logits."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _contracts as contracts
from ._devices import ALL, CLASSES, ROWS, split_as
from ._log_ratio import Pair, Static, divergence, divergence_of_layers
from ._logits.explicit import sharding_of
from ._logits.linear import LinearLogits, checked
from ._logits.sharded import AxisName
from ._numerics import accumulation_dtype
from ._objective import check_class_mask, check_logits, has_answer, objective
from ._reduction import keep, reduce, row_weights, rows_that_count, scale_of_rows
from ._statistics import Block


@contracts.takes_arrays
def softmax_entropy(
    logits: Array | LinearLogits,
    *,
    axis: int = -1,
    where: Array | None = None,
    weights: Array | None = None,
    class_mask: Array | None = None,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Entropy of softmax(logits): -sum_j p_j log p_j over the classes in force.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      weights: real `[...]`, a factor per row.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of the softmax.
      reduction: "none", "sum" or "mean" (sum(weights * entropy) / sum(weights)).
      class_axis_name: of a mapped axis along which the classes are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Entropy in nats, in [0, log V], `[...]` or a scalar: float32, or float64 for float64 logits.

    Gradients:
      -p_j (log p_j + entropy), in the dtype of `logits`; any order, forward mode too.

    Numerics:
      log1p(r) + sum_j e_j (m - z_j) / T, a sum of terms >= 0: accurate for rows that are nearly certain.
      A NaN or +inf logit makes its row NaN; -inf is probability 0.

    Cost:
      Three passes over the logits, no array of N x V but the gradient.

    Raises:
      TypeError: logits that are not floating point; a mask that is not bool.
      ValueError: a shape that does not match exactly; an unknown reduction; an axis that is `class_axis_name` and
        `batch_axis_name`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.softmax_entropy(jnp.array([[0.0, 0.0], [40.0, 0.0]])))
      [6.9314718e-01 1.7418252e-16]

    Source:
      Shannon 1948; as a bonus in policy gradients, Williams and Peng 1991.
    """
    return objective(
        "softmax_entropy",
        lambda s, _: s.entropy,
        logits,
        None,
        axis=axis,
        where=where,
        ignore_index=None,
        weights=weights,
        class_weights=None,
        class_mask=class_mask,
        reduction=reduction,
        class_axis_name=class_axis_name,
        batch_axis_name=batch_axis_name,
    )


@contracts.takes_arrays
def softmax_kl_divergence(
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits,
    *,
    temperature: contracts.Number = 1.0,
    axis: int = -1,
    where: Array | None = None,
    weights: Array | None = None,
    class_mask: Array | None = None,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """KL(target || model) of two softmax distributions, from logits: exact and never negative near zero.

        loss = sum_j q_j (log q_j - log p_j),   p = softmax(logits / T),   q = softmax(target_logits / T)

    For distillation multiply by T^2, which keeps the size of the gradient (Hinton et al. 2015).

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`: the model.
      target_logits: the shape of `logits`, or `LinearLogits`: the target. Stop its gradient where it is a teacher.
      temperature: T > 0, divides both: a Python number, or an array `[]` or `[...]`, one per row, which is a value: it
        may be traced, and be another one each time without a new compilation.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      weights: real `[...]`, a factor per row; of weight 0 a row adds nothing, even if it holds NaN.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of both, even if it holds NaN.
      reduction: "none", "sum" or "mean" (sum(weights * loss) / sum(weights)).
      class_axis_name: of a mapped axis along which the classes of both are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Divergences in nats, `[...]` or a scalar: float32, or float64 if one of the logits is.

    Gradients:
      (p - q) / T to `logits` and q_j (log(q_j / p_j) - loss) / T to `target_logits`, each in its own dtype; to a
      temperature that is an array; the loss to the weights, also to one of 0. Any order, forward mode too. A row whose
      loss is +inf has a gradient of 0 to `target_logits`: it is as infinite for all targets near this one.

    Numerics:
      With d = log(q / p), taken from differences of logits, the loss is sum_j q_j (d_j + expm1(-d_j)), each term
      >= 0: about 1e-6 relative down to a divergence of 4e-9, where the naive form is off by more than its value; also
      where all logits of one of both are shifted. A class with p = 0 < q gives +inf; q = 0 gives 0. A temperature
      in an array that is not positive and finite gives NaN.

    Cost:
      Some passes over both logits with a few arrays of N x V; where one of them is `LinearLogits`, by blocks of rows.
      With a split class axis a layer is multiplied three times, once more for gradients.

    Raises:
      TypeError: logits that are not floating point; a mask that is not bool.
      ValueError: shapes that differ; a temperature known as a number that is not positive and finite; an axis that is
        `class_axis_name` and `batch_axis_name`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> print(jaxent.softmax_kl_divergence(student, teacher).round(4))
      [0.3278]

    Source:
      Kullback and Leibler 1951; Hinton et al. 2015, "Distilling the knowledge in a neural network".
    """
    function = "softmax_kl_divergence"
    return _divergence(
        function,
        logits,
        target_logits,
        temperature,
        axis,
        where,
        weights,
        class_mask,
        reduction,
        class_axis_name,
        batch_axis_name,
    )


@contracts.takes_arrays
def softmax_js_divergence(
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits,
    *,
    temperature: contracts.Number = 1.0,
    axis: int = -1,
    where: Array | None = None,
    weights: Array | None = None,
    class_mask: Array | None = None,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Jensen-Shannon divergence of two softmax distributions, from logits: symmetric, between 0 and log 2.

        loss = KL(p || h) / 2 + KL(q || h) / 2,   h = (p + q) / 2,   p, q = softmax(both / T)

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      target_logits: the shape of `logits`, or `LinearLogits`.
      temperature: T > 0, divides both: a Python number, or an array `[]` or `[...]`, one per row, which is a value: it
        may be traced, and be another one each time without a new compilation.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      weights: real `[...]`, a factor per row; of weight 0 a row adds nothing, even if it holds NaN.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of both, even if it holds NaN.
      reduction: "none", "sum" or "mean" (sum(weights * loss) / sum(weights)).
      class_axis_name: of a mapped axis along which the classes of both are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Divergences in nats, `[...]` or a scalar: float32, or float64 if one of the logits is.

    Gradients:
      p_j (log(p_j / h_j) - KL(p || h)) / 2T to `logits`, with q for p to `target_logits`; to a temperature that is
      an array; the loss to the weights, also to one of 0. Any order, forward mode too.

    Numerics:
      With s = log(q / p) / 2 the loss is sum_j h_j (s_j tanh s_j - log cosh s_j), each term >= 0, as accurate as
      `softmax_kl_divergence`. Disjoint supports give log 2. A temperature in an array that is not positive and finite
      gives NaN.

    Cost:
      Some passes over both logits with a few arrays of N x V; where one of them is `LinearLogits`, by blocks of rows.
      With a split class axis a layer is multiplied three times, once more for gradients.

    Raises:
      TypeError: logits that are not floating point; a mask that is not bool.
      ValueError: shapes that differ; a temperature known as a number that is not positive and finite; an axis that is
        `class_axis_name` and `batch_axis_name`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> a, b = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> print(jaxent.softmax_js_divergence(a, b).round(4))
      [0.0895]

    Source:
      Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    function = "softmax_js_divergence"
    return _divergence(
        function,
        logits,
        target_logits,
        temperature,
        axis,
        where,
        weights,
        class_mask,
        reduction,
        class_axis_name,
        batch_axis_name,
    )


def _divergence(
    function: str,
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits,
    temperature: contracts.Number,
    axis: int,
    where: Array | None,
    weights: Array | None,
    class_mask: Array | None,
    reduction: str,
    class_axis_name: AxisName,
    batch_axis_name: AxisName,
) -> Array:
    contracts.check_reduction(function, reduction)
    contracts.check_axis_names(function, class_axis_name, batch_axis_name)
    check_logits(function, logits, axis)
    check_logits(function, target_logits, axis, "target_logits")
    shape = np.shape(logits)
    remedy = "Logits are never broadcast: use `jnp.broadcast_to` if you mean it."
    if np.shape(target_logits) != shape:
        expected = f"of shape {list(shape)} (that of `logits`)"
        contracts.fail(
            ValueError, function, "target_logits", expected, contracts.describe(target_logits), remedy
        )
    rows = tuple(np.delete(shape, axis).tolist())
    remedy = "It divides both logits: small ones come near the argmax, which has no gradient."
    temperature = contracts.number(
        function, "temperature", temperature, 0, math.inf, remedy, above=True, rows=rows
    )
    where, weights = row_weights(function, rows, where, weights)
    if class_mask is not None:
        check_class_mask(function, class_mask, shape, shape[axis])
        class_mask = jnp.asarray(class_mask)
        class_mask = class_mask if class_mask.ndim == 1 else jnp.moveaxis(class_mask, axis, -1)
    z_p, z_q = (
        checked(function, z, argument)
        if isinstance(z, LinearLogits) and z.hidden.size
        else jnp.moveaxis(_array(z), axis, -1)
        for z, argument in ((logits, "logits"), (target_logits, "target_logits"))
    )
    sharding = sharding_of(z_p, z_q)
    z_p, z_q = (z if isinstance(z, LinearLogits) else split_as(sharding, ALL, z) for z in (z_p, z_q))
    where, weights = (split_as(sharding, ROWS, x) for x in (where, weights))
    if class_mask is not None:
        class_mask = split_as(sharding, CLASSES if class_mask.ndim == 1 else ALL, class_mask)
    static = Static("kl" if function == "softmax_kl_divergence" else "js", 1.0)
    of_rows = None
    if isinstance(temperature, float):
        static = static._replace(temperature=temperature)
    else:
        of_rows = split_as(sharding, ROWS, jnp.broadcast_to(temperature, rows))

    def have_answers() -> Array:
        blocks = (Block(z, class_mask=class_mask) for z in (z_p, z_q))
        of_p, of_q = (split_as(sharding, ROWS, has_answer(block, class_axis_name)) for block in blocks)
        return of_p & of_q if of_rows is None else of_p & of_q & ~jnp.isnan(of_rows)

    counts = rows_that_count(where, weights, have_answers)
    of_rows = None if of_rows is None else keep(counts, of_rows, 1)
    pair = Pair(z_p, z_q, class_mask, counts, of_rows)
    if not pair.layers:
        losses = divergence(static, pair, class_axis_name)
    elif reduction == "none":
        losses = divergence_of_layers(static, pair, class_axis_name)
    else:
        dtype = accumulation_dtype(z_p.dtype, z_q.dtype)
        scale = scale_of_rows(counts, weights, reduction, None, rows, dtype, batch_axis_name)
        total = divergence_of_layers(static, pair, class_axis_name, scale)
        return total if batch_axis_name is None else lax.psum(total, batch_axis_name)
    counts = rows_that_count(counts, weights, lambda: jnp.isfinite(losses))
    return reduce(losses, counts, weights, reduction, batch_axis_name=batch_axis_name)


def _array(z: Array | LinearLogits) -> Array:
    return z.dense() if isinstance(z, LinearLogits) else jnp.asarray(z)
