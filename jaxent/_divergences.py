"""Information measures of one or two softmax distributions, from logits."""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _contracts as contracts
from ._block import Block
from ._devices import ALL, split_as
from ._log_ratio import Pair, Static, divergence, divergence_of_layers
from ._logits.explicit import sharding_of
from ._logits.linear import LinearLogits, checked
from ._numerics import accumulation_dtype
from ._objective import check_logits, has_answer, objective, prepare, prepare_class_mask
from ._rows import AxisName, Options, Rows, keep
from ._sparse import SparseDistribution
from ._sparse_divergence import divergence_from_few

DIVIDES = "It divides both logits: small ones come near the argmax, which has no gradient."
IN_THE_MEAN = "It is the share of the target in the mean; 0 is KL(target || model), 1 is KL(model || target)."
RANGES = {
    "temperature": contracts.Range(0, math.inf, DIVIDES, above=True),
    "beta": contracts.Range(0, 1, IN_THE_MEAN),
}
ORDINARY = {"temperature": 1.0, "beta": 0.5}  # in place of what is a value, or hidden


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
    """Entropy of softmax(logits).

        entropy = -sum_j p_j log p_j        over the classes in force

    "mean" is sum(weights entropy) / sum(weights) over the rows that count.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      weights: real `[...]`, a factor per row.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of the softmax.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Entropy in nats, in [0, log V], `[...]` or a scalar: float32, or float64 for float64 logits.

    Gradients:
      -p_j (log p_j + entropy), in the dtype of `logits`; to the weights the entropy; any order, forward mode too.

    Numerics:
      In float32 (float64 for float64), as log1p(r) + sum_j e_j (m - z_j) / T, a sum of terms >= 0, with m the largest
      logit, e_j = exp(z_j - m) and T = 1 + r their sum: accurate for rows that are nearly certain.
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
    options = Options(axis, where, None, weights, None, class_mask, None, reduction, *names)
    return objective(lambda s, _: s.entropy, *prepare("softmax_entropy", logits, None, options))


@contracts.takes_arrays
def softmax_kl_divergence(
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits | SparseDistribution,
    *,
    temperature: contracts.Number = 1.0,
    rest: str = "bucket",
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

    "mean" is sum(weights loss) / sum(weights) over the rows that count.

    The target may be a `SparseDistribution`: the top k classes of a teacher, with the probabilities of its whole
    softmax at the same temperature, which then divides `logits` alone. All classes that it does not name are one more,
    with the mass that is missing to 1: a difference, which float32 probabilities have to about 1e-7, and 0 if they sum
    to more than 1. That is a lower bound of the divergence from the whole teacher, and 0 only if all K + 1 are right.

    For distillation multiply by T^2, which keeps the size of the gradient (Hinton et al. 2015).

    Reverse KL, KL(model || target), is `softmax_kl_divergence(teacher_logits, student_logits)`: with the arguments
    swapped the student's gradient is that of `target_logits`. `softmax_js_divergence(..., beta=1.0)` is the same,
    with no argument in another's place.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`: the model.
      target_logits: the shape of `logits`, floating point, or `LinearLogits`: the target. Stop its gradient where it
        is a teacher. Or a `SparseDistribution`, of probabilities.
      temperature: T > 0, divides both: a Python number, or an array `[]` or `[...]`, one per row, which is a value: it
        may be traced, and be another one each time without a new compilation.
      rest: of a `SparseDistribution`: "bucket" as above; "ignore" adds up the K classes alone, which is no divergence
        and may be negative.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      weights: real `[...]`, a factor per row; of weight 0 a row adds nothing, even if it holds NaN.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of both, even if it holds NaN.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes of both are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Divergences in nats, `[...]` or a scalar: float32, or float64 if one of the logits is.

    Gradients:
      (p - q) / T to `logits` and q_j (log(q_j / p_j) - loss) / T to `target_logits`, each in its own dtype; to the
      probabilities of a `SparseDistribution` log(q_j / p_j), less that of the rest; to a temperature that is an array;
      the loss to the weights, also to one of 0. Any order, forward mode too. A row whose loss is +inf has a gradient of
      0 to `target_logits`: it is as infinite for all targets near this one.

    Numerics:
      In float32 (float64 for float64). With d = log(q / p), taken from differences of logits, the loss is sum_j q_j
      (d_j + expm1(-d_j)), each term >= 0: within 2e-6 relative down to a divergence of 4e-9, where the naive form is
      off by more than its value; also where all logits of one of both are shifted. A class with p = 0 < q gives +inf;
      q = 0 gives 0. A temperature in an array that is not positive and finite gives NaN.

    Cost:
      Some passes over both logits with a few arrays of N x V; where one of them is `LinearLogits`, by blocks of rows.
      With a split class axis a layer is multiplied three times, once more for gradients. A `SparseDistribution` takes
      two passes over the logits and one for their gradient, in which each is compared with K classes, and no array of
      N x V but the gradient (a CPU may hold one: for few classes, half precision, or where `jit` may split them); for
      K > 32 two; `LinearLogits` 3 matmuls, 4 without a reduction, and none.

    Raises:
      TypeError: logits that are not floating point; a mask that is not bool; a temperature that is no number.
      ValueError: shapes that differ; a number for temperature outside of (0, inf); an unknown rest or reduction; one
        axis name for classes and rows.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> print(jaxent.softmax_kl_divergence(student, teacher).round(4))
      [0.3278]

    Source:
      Kullback and Leibler 1951; Hinton et al. 2015, "Distilling the knowledge in a neural network".
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, None, weights, None, class_mask, None, reduction, *names)
    numbers = {"temperature": temperature, "beta": 0.0}
    return _divergence("softmax_kl_divergence", (logits, target_logits), numbers, rest, options)


@contracts.takes_arrays
def softmax_js_divergence(
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits | SparseDistribution,
    *,
    temperature: contracts.Number = 1.0,
    beta: contracts.Number = 0.5,
    rest: str = "bucket",
    axis: int = -1,
    where: Array | None = None,
    weights: Array | None = None,
    class_mask: Array | None = None,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Generalized Jensen-Shannon divergence of two softmax distributions, from logits; symmetric for a beta of 0.5.

        loss = beta KL(q || h) + (1 - beta) KL(p || h),   h = beta q + (1 - beta) p       for 0 < beta < 1
        loss = KL(q || p) for beta = 0,   KL(p || q) for beta = 1

    with p = softmax(logits / T), the model, and q = softmax(target_logits / T), the target. The ends are not the limits
    of the loss, which goes to 0 there: they are those of loss / beta (forward KL) and loss / (1 - beta) (reverse KL),
    as in on-policy distillation. So the loss of a beta of 0.001 is about a thousandth of that of 0.

    "mean" is sum(weights loss) / sum(weights) over the rows that count.

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`: the model.
      target_logits: the shape of `logits`, floating point, or `LinearLogits`, or a `SparseDistribution`: the target.
        Stop its gradient where it is a teacher.
      temperature: T > 0, divides both: a number, or an array `[]` or `[...]`, one per row.
      beta: in [0, 1], the share of the target in the mean; 0.5 is the Jensen-Shannon divergence. A Python number, or an
        array `[]` or `[...]`, one per row, which is a value: it may be traced, and be differentiated.
      rest: of a `SparseDistribution`: "bucket" or "ignore". Reverse KL to one that sums to 1 is infinite in the bucket.
      axis: the class axis; this and all that follow are as in `softmax_kl_divergence`.
      where: bool `[...]`.
      weights: real `[...]`.
      class_mask: bool `[V]` or the shape of `logits`.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes of both are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Divergences in nats, `[...]` or a scalar: float32, or float64 if one of the logits is. At most log 2, but for a
      beta of 0 or 1.

    Gradients:
      (1 - beta) p_j (log(p_j / h_j) - KL(p || h)) / T to `logits`, beta q_j (log(q_j / h_j) - KL(q || h)) / T to
      `target_logits`, each in its own dtype, those of the KL at the ends; to a temperature that is an array; KL(q ||
      h) - KL(p || h) to such a beta, and 0 at the ends; the loss to the weights, also to one of 0. Any order, forward
      mode too.

    Numerics:
      Both KLs are sums of terms >= 0, of log(p / h) and log(q / h) that come from differences of logits and of beta
      from both ends: as accurate as `softmax_kl_divergence`, and so are loss / beta and loss / (1 - beta) next to the
      ends, while it is a normal number. Disjoint supports give the entropy of beta, log 2 at 0.5. A beta in an array
      that is outside of [0, 1] gives NaN.

    Cost:
      That of `softmax_kl_divergence`, up to half as much again; at 0 and 1, as numbers, just that.

    Raises:
      As `softmax_kl_divergence`.
      ValueError: a number for beta outside of [0, 1].

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]])
      >>> print(jaxent.softmax_js_divergence(student, teacher).round(4))
      [0.0895]
      >>> [reverse_kl] = jaxent.softmax_js_divergence(student, teacher, beta=1.0)
      >>> print(f"{reverse_kl:.4f}")
      0.4338

    Source:
      Lin 1991, "Divergence measures based on the Shannon entropy"; Agarwal et al. 2024, "On-policy distillation of
      language models", whose beta and ends these are.
    """
    names = class_axis_name, batch_axis_name
    options = Options(axis, where, None, weights, None, class_mask, None, reduction, *names)
    numbers = {"temperature": temperature, "beta": beta}
    return _divergence("softmax_js_divergence", (logits, target_logits), numbers, rest, options)


def _divergence(
    function: str, pair: tuple[Any, Any], numbers: dict[str, Any], rest: str, options: Options
) -> Array:
    logits, target_logits = pair
    axis, name = options.axis, options.class_axis_name
    check_logits(function, logits, axis)
    shape = np.shape(logits)
    of_rows = tuple(np.delete(shape, axis).tolist())
    numbers = {
        argument: contracts.number(function, argument, x, RANGES[argument], rows=of_rows)
        for argument, x in numbers.items()
    }
    remedy = "'bucket' makes one class of all that a sparse target does not name, 'ignore' leaves them out."
    contracts.check_option(
        function, "rest", rest, rest in ("bucket", "ignore"), "'bucket' or 'ignore'", remedy
    )
    if isinstance(target_logits, SparseDistribution):
        return divergence_from_few(function, (logits, target_logits), numbers, rest, options)
    check_logits(function, target_logits, axis, "target_logits")
    if np.shape(target_logits) != shape:
        remedy = "Logits are never broadcast: use `jnp.broadcast_to` if you mean it."
        expected, got = f"of shape {list(shape)} (that of `logits`)", contracts.describe(target_logits)
        contracts.fail(ValueError, function, "target_logits", expected, got, remedy)

    def prepared(z: Any, argument: str) -> Any:
        if not isinstance(z, LinearLogits):
            return jnp.moveaxis(jnp.asarray(z), axis, -1)
        return checked(function, z, argument) if z.hidden.size else z.dense()

    z_p, z_q = prepared(logits, "logits"), prepared(target_logits, "target_logits")
    sharding = sharding_of(z_p, z_q)
    z_p, z_q = (z if isinstance(z, LinearLogits) else split_as(sharding, ALL, z) for z in (z_p, z_q))
    rows = Rows.of(function, options, of_rows, sharding)
    class_mask = prepare_class_mask(rows, shape)
    values = {
        argument: rows.split(jnp.broadcast_to(x, of_rows))
        for argument, x in numbers.items()
        if not isinstance(x, float)
    }
    static = Static(**(ORDINARY | {argument: x for argument, x in numbers.items() if argument not in values}))
    if static.beta == 1:
        static, z_p, z_q = static._replace(beta=0.0), z_q, z_p

    def have_answers() -> Array:
        answers = (rows.split(has_answer(Block(z, class_mask=class_mask), name)) for z in (z_p, z_q))
        return functools.reduce(operator.and_, (*answers, *(~jnp.isnan(x) for x in values.values())))

    rows = rows.with_answers(have_answers)
    values = {argument: keep(rows.counts, x, ORDINARY[argument]) for argument, x in values.items()}
    both = Pair(z_p, z_q, class_mask, rows.counts, **values)
    if both.layers and options.reduction != "none":
        scale = rows.scale(accumulation_dtype(z_p.dtype, z_q.dtype))
        return rows.sum_over_batch(divergence_of_layers(static, both, name, scale))
    f = divergence_of_layers if both.layers else divergence
    losses = f(static, both, name)
    return rows.with_answers(lambda: jnp.isfinite(losses)).reduce(losses)
