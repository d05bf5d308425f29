"""Information measures of one or two softmax distributions, from logits."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _contracts as contracts
from ._devices import ALL, split_as
from ._log_ratio import Pair, Static, divergence, divergence_of_layers
from ._logits.explicit import sharding_of
from ._logits.linear import LinearLogits, checked
from ._numerics import accumulation_dtype
from ._objective import check_logits, has_answer, objective, prepare, prepare_class_mask
from ._rows import AxisName, Options, Rows, keep
from ._statistics import Block

REMEDY = "It divides both logits: small ones come near the argmax, which has no gradient."
TEMPERATURE = contracts.Range(0, math.inf, REMEDY, above=True)


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
      ValueError: a shape that does not match exactly; an unknown reduction; one axis name for classes and rows.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.softmax_entropy(jnp.array([[0.0, 0.0], [40.0, 0.0]])))
      [6.9314718e-01 1.7418252e-16]

    Source:
      Shannon 1948; as a bonus in policy gradients, Williams and Peng 1991.
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, None, weights, None, class_mask, reduction, *names)
    return objective(lambda s, _: s.entropy, *prepare("softmax_entropy", logits, None, options))


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
      ValueError: shapes that differ; a number for temperature outside of (0, inf); one axis name for classes and rows.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> print(jaxent.softmax_kl_divergence(student, teacher).round(4))
      [0.3278]

    Source:
      Kullback and Leibler 1951; Hinton et al. 2015, "Distilling the knowledge in a neural network".
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, None, weights, None, class_mask, reduction, *names)
    return _divergence("kl", logits, target_logits, temperature, options)


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
      temperature: T > 0, divides both; this and all that follow are as in `softmax_kl_divergence`.
      axis: the class axis.
      where: bool `[...]`.
      weights: real `[...]`.
      class_mask: bool `[V]` or the shape of `logits`.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes of both are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Divergences in nats, `[...]` or a scalar: float32, or float64 if one of the logits is.

    Gradients:
      p_j (log(p_j / h_j) - KL(p || h)) / 2T to `logits`, with q for p to `target_logits`; to a temperature that is
      an array; the loss to the weights, also to one of 0. Any order, forward mode too.

    Numerics:
      With s = log(q / p) / 2 the loss is sum_j h_j (s_j tanh s_j - log cosh s_j), each term >= 0, as accurate as
      `softmax_kl_divergence`. Disjoint supports give log 2.

    Cost:
      That of `softmax_kl_divergence`.

    Raises:
      As `softmax_kl_divergence`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> a, b = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> print(jaxent.softmax_js_divergence(a, b).round(4))
      [0.0895]

    Source:
      Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, None, weights, None, class_mask, reduction, *names)
    return _divergence("js", logits, target_logits, temperature, options)


def _divergence(kind: str, logits: Any, target_logits: Any, temperature: Any, options: Options) -> Array:
    function, axis, name = f"softmax_{kind}_divergence", options.axis, options.class_axis_name
    check_logits(function, logits, axis)
    check_logits(function, target_logits, axis, "target_logits")
    shape = np.shape(logits)
    if np.shape(target_logits) != shape:
        remedy = "Logits are never broadcast: use `jnp.broadcast_to` if you mean it."
        expected, got = f"of shape {list(shape)} (that of `logits`)", contracts.describe(target_logits)
        contracts.fail(ValueError, function, "target_logits", expected, got, remedy)
    of_rows = tuple(np.delete(shape, axis).tolist())
    temperature = contracts.number(function, "temperature", temperature, TEMPERATURE, rows=of_rows)

    def prepared(z: Any, argument: str) -> Any:
        if not isinstance(z, LinearLogits):
            return jnp.moveaxis(jnp.asarray(z), axis, -1)
        return checked(function, z, argument) if z.hidden.size else z.dense()

    z_p, z_q = prepared(logits, "logits"), prepared(target_logits, "target_logits")
    sharding = sharding_of(z_p, z_q)
    z_p, z_q = (z if isinstance(z, LinearLogits) else split_as(sharding, ALL, z) for z in (z_p, z_q))
    rows = Rows.of(function, options, of_rows, sharding)
    class_mask = prepare_class_mask(rows, shape)
    if isinstance(temperature, float):
        static, values = Static(kind, temperature), None
    else:
        static, values = Static(kind, 1.0), rows.split(jnp.broadcast_to(temperature, of_rows))

    def have_answers() -> Array:
        of_p, of_q = (rows.split(has_answer(Block(z, class_mask=class_mask), name)) for z in (z_p, z_q))
        return of_p & of_q if values is None else of_p & of_q & ~jnp.isnan(values)

    rows = rows.with_answers(have_answers)
    values = None if values is None else keep(rows.counts, values, 1)
    pair = Pair(z_p, z_q, class_mask, rows.counts, values)
    if pair.layers and options.reduction != "none":
        scale = rows.scale(accumulation_dtype(z_p.dtype, z_q.dtype))
        return rows.sum_over_batch(divergence_of_layers(static, pair, name, scale))
    f = divergence_of_layers if pair.layers else divergence
    losses = f(static, pair, name)
    return rows.with_answers(lambda: jnp.isfinite(losses)).reduce(losses)
