"""Information measures of one or two softmax distributions, from logits."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _contracts as contracts
from ._derivatives import with_forward_mode
from ._logits import sources
from ._logits.linear import LinearLogits
from ._logits.sharded import AxisName
from ._numerics import accumulation_dtype, exp_difference, lowest, product_or_zero
from ._objective import check_class_mask, check_logits, objective
from ._reduction import keep_gradient, reduce, row_weights, scale_of_rows
from ._statistics import max_and_rest

ARRAYS = 20  # of the size of a block of logits, that a divergence and its gradients need at a time


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
      ValueError: a shape that does not match exactly; an unknown reduction.

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


def softmax_kl_divergence(
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits,
    *,
    temperature: float = 1.0,
    axis: int = -1,
    where: Array | None = None,
    weights: Array | None = None,
    class_mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """KL(target || model) of two softmax distributions, from logits: exact and never negative near zero.

        loss = sum_j q_j (log q_j - log p_j),   p = softmax(logits / T),   q = softmax(target_logits / T)

    For distillation multiply by T^2, which keeps the size of the gradient (Hinton et al. 2015).

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`: the model.
      target_logits: the shape of `logits`, or `LinearLogits`: the target. Stop its gradient where it is a teacher.
      temperature: T > 0, divides both.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      weights: real `[...]`, a factor per row.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of both.
      reduction: "none", "sum" or "mean" (sum(weights * loss) / sum(weights)).

    Returns:
      Divergences in nats, `[...]` or a scalar: float32, or float64 if one of the logits is.

    Gradients:
      (p - q) / T to `logits` and q_j (log(q_j / p_j) - loss) / T to `target_logits`, each in its own dtype; any
      order, forward mode too.

    Numerics:
      With d = log(q / p), taken from differences of logits, the loss is sum_j q_j (d_j + expm1(-d_j)), each term
      >= 0: about 1e-3 relative at a divergence of 4e-9, where the naive form is off by more than its value.
      A class with p = 0 < q gives +inf; q = 0 gives 0.

    Cost:
      Some passes over both logits with a few arrays of N x V; where one of them is `LinearLogits`, by blocks of rows.

    Raises:
      TypeError: logits that are not floating point; a mask that is not bool.
      ValueError: shapes that differ; a temperature that is not positive and finite.

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
        function, logits, target_logits, temperature, axis, where, weights, class_mask, reduction
    )


def softmax_js_divergence(
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits,
    *,
    temperature: float = 1.0,
    axis: int = -1,
    where: Array | None = None,
    weights: Array | None = None,
    class_mask: Array | None = None,
    reduction: str = "none",
) -> Array:
    """Jensen-Shannon divergence of two softmax distributions, from logits: symmetric, between 0 and log 2.

        loss = KL(p || h) / 2 + KL(q || h) / 2,   h = (p + q) / 2,   p, q = softmax(both / T)

    Args:
      logits: `[..., V]`, floating point, or `LinearLogits`.
      target_logits: the shape of `logits`, or `LinearLogits`.
      temperature: T > 0, divides both.
      axis: the class axis.
      where: bool `[...]`; a False row is gone.
      weights: real `[...]`, a factor per row.
      class_mask: bool `[V]` or the shape of `logits`; False takes a class out of both.
      reduction: "none", "sum" or "mean" (sum(weights * loss) / sum(weights)).

    Returns:
      Divergences in nats, `[...]` or a scalar: float32, or float64 if one of the logits is.

    Gradients:
      p_j (log(p_j / h_j) - KL(p || h)) / 2T to `logits`, with q for p to `target_logits`; any order, forward
      mode too.

    Numerics:
      With s = log(q / p) / 2 the loss is sum_j h_j (s_j tanh s_j - log cosh s_j), each term >= 0. Disjoint
      supports give log 2.

    Cost:
      Some passes over both logits with a few arrays of N x V; where one of them is `LinearLogits`, by blocks of rows.

    Raises:
      TypeError: logits that are not floating point; a mask that is not bool.
      ValueError: shapes that differ; a temperature that is not positive and finite.

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
        function, logits, target_logits, temperature, axis, where, weights, class_mask, reduction
    )


def _divergence(
    function: str,
    logits: Array | LinearLogits,
    target_logits: Array | LinearLogits,
    temperature: float,
    axis: int,
    where: Array | None,
    weights: Array | None,
    class_mask: Array | None,
    reduction: str,
) -> Array:
    contracts.check_reduction(function, reduction)
    check_logits(function, logits, axis)
    check_logits(function, target_logits, axis, "target_logits")
    shape = np.shape(logits)
    remedy = "Logits are never broadcast: use `jnp.broadcast_to` if you mean it."
    if np.shape(target_logits) != shape:
        expected = f"of shape {list(shape)} (that of `logits`)"
        contracts.fail(
            ValueError, function, "target_logits", expected, contracts.describe(target_logits), remedy
        )
    contracts.check_number(
        function, "temperature", temperature, 0, math.inf, "1 leaves the logits as they are."
    )
    remedy = "The limit at 0 is the argmax, which has no gradient."
    contracts.check_option(function, "temperature", temperature, temperature > 0, "positive", remedy)
    rows = tuple(np.delete(shape, axis).tolist())
    counts, weights = row_weights(function, rows, where, weights)
    if class_mask is not None:
        check_class_mask(function, class_mask, shape, shape[axis])
        class_mask = jnp.asarray(class_mask)
        class_mask = class_mask if class_mask.ndim == 1 else jnp.moveaxis(class_mask, axis, -1)
    both = tuple(
        jax.tree.map(jnp.asarray, z)
        if isinstance(z, LinearLogits) and z.hidden.size
        else jnp.moveaxis(_array(z), axis, -1)
        for z in (logits, target_logits)
    )
    static = ("kl" if function == "softmax_kl_divergence" else "js", float(temperature))
    if any(isinstance(z, LinearLogits) for z in both):
        return _by_blocks(static, both, class_mask, counts, weights, reduction)
    return reduce(_rows_divergence(static, *both, class_mask, counts), counts, weights, reduction)


def _array(z: Array | LinearLogits) -> Array:
    return z.dense() if isinstance(z, LinearLogits) else jnp.asarray(z)


def _by_blocks(
    static: "Static",
    both: tuple[Array | LinearLogits, ...],
    class_mask: Array | None,
    counts: Array | None,
    weights: Array | None,
    reduction: str,
) -> Array:
    """One or both of them linear: block by block of rows, with all classes."""
    is_linear = [isinstance(z, LinearLogits) for z in both]
    per_row = class_mask is not None and class_mask.ndim > 1
    dense = [z for z in both if not isinstance(z, LinearLogits)]

    def fn(logits: tuple[Array, ...], counts: Array | None, rows: Any, shared: Any) -> Any:
        from_layers, arrays = iter(logits), iter(rows[0])
        z_p, z_q = (next(from_layers if linear else arrays) for linear in is_linear)
        return _rows_divergence(static, z_p, z_q, rows[1] if per_row else shared, counts), ()

    layers = tuple(z for z in both if isinstance(z, LinearLogits))
    of_rows, of_all = (dense, class_mask if per_row else None), None if per_row else class_mask
    rows, dtype = layers[0].shape[:-1], accumulation_dtype(*(z.dtype for z in both))
    scale = None
    if reduction != "none":
        scale = scale_of_rows(counts, weights, reduction, None, rows, dtype)
    found = sources.by_blocks_of_rows(fn, ARRAYS, layers, counts, of_rows, of_all, scale)
    return found if scale is not None else reduce(found, counts, weights, "none")


Static = tuple[str, float]


def _primal(static: Static, z_p: Array, z_q: Array, class_mask: Array | None, counts: Array | None) -> Array:
    kind, temperature = static
    p, q, d = _log_ratio(z_p, z_q, class_mask, temperature)
    return _kl(p, q, d) if kind == "kl" else _js(p, q, d)


def _forward(static: Static, *arrays: Any) -> tuple[Array, Any]:
    return _primal(static, *_hide(*arrays)), arrays


def _hide(z_p: Array, z_q: Array, class_mask: Array | None, counts: Array | None) -> tuple[Any, ...]:
    return keep_gradient(counts, z_p), keep_gradient(counts, z_q), class_mask, counts


def _backward(static: Static, residuals: Any, g: Array) -> tuple[Array, Array, None, None]:
    """With d = log(q / p), s = d / 2 and h = (p + q) / 2, dp_k/dz_j = p_k (1[k = j] - p_j) / T gives

    dKL/dz_p = (p - q) / T               = q expm1(-d) / T
    dKL/dz_q = q (d - KL) / T
    dJS/dz_p = p (l_p - sum p l_p) / 2T,  l_p = log(p / h) = -s - log cosh s
    dJS/dz_q = q (l_q - sum q l_q) / 2T,  l_q = log(q / h) =  s - log cosh s
    """
    z_p, z_q, class_mask, counts = _hide(*residuals)
    kind, temperature = static
    p, q, d = _log_ratio(z_p, z_q, class_mask, temperature)
    if kind == "kl":
        near = jnp.abs(d) < 1
        bar_p = jnp.where(near, q * jnp.expm1(-jnp.where(near, d, 0)), p - q)
        bar_q = product_or_zero(q, d - _kl(p, q, d)[..., None])
    else:
        s, log_cosh = _half(d)
        bar_p, bar_q = (
            x * (log_x - jnp.sum(x * log_x, -1, keepdims=True)) / 2
            for x, log_x in ((p, -s - log_cosh), (q, s - log_cosh))
        )
    g = (g / temperature)[..., None]

    def of_counting_rows(x: Array, like: Array) -> Array:
        x = x * g
        x = x if counts is None else jnp.where(counts[..., None], x, 0)
        return x.astype(like.dtype)

    return of_counting_rows(bar_p, z_p), of_counting_rows(bar_q, z_q), None, None


_rule = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward)
_rows_divergence = with_forward_mode(_rule)


def _log_ratio(
    z_p: Array, z_q: Array, class_mask: Array | None, temperature: float
) -> tuple[Array, Array, Array]:
    """p, q and d = log(q / p), accurate also where p and q are nearly the same.

    With u = z_q - z_p and c = log E_p exp(u) = log of the ratio of the normalizers, d = u - c. u is shifted by
    its mean under q first, so that c is small where p and q are close. Where they are far apart (or have not the
    same support) the difference of the two log-softmaxes is as good, and does not overflow.
    """
    dtype = accumulation_dtype(z_p.dtype, z_q.dtype)
    z_p, z_q = z_p.astype(dtype), z_q.astype(dtype)
    if class_mask is not None:
        z_p, z_q = (jnp.where(class_mask, z, -jnp.inf) for z in (z_p, z_q))
    p, log_p = _softmax(z_p / temperature)
    q, log_q = _softmax(z_q / temperature)
    on_p, on_q = z_p != -jnp.inf, z_q != -jnp.inf
    on = on_p & on_q
    far_d = jnp.where(on, jnp.where(on, log_q, 0) - jnp.where(on, log_p, 0), 0)
    far_d = jnp.where(on_p == on_q, far_d, jnp.where(on_q, jnp.inf, -jnp.inf))

    u = (jnp.where(on, z_q, 0) - jnp.where(on, z_p, 0)) / temperature
    u = jnp.where(on, u - jnp.sum(q * u, -1, keepdims=True), 0)
    near = jnp.all((on_p == on_q) & (jnp.abs(u) < 30), -1, keepdims=True)
    u = jnp.where(near, u, 0)
    ratio = jnp.sum(p * jnp.expm1(u), -1, keepdims=True)  # of the normalizers, less 1: exp(-KL) - 1
    near &= ratio > -0.5
    near_d = jnp.where(on, u - jnp.log1p(jnp.where(near, ratio, 0)), 0)

    row = p[..., :1] + q[..., :1]  # NaN where either has no answer
    return p, q, jnp.where(jnp.isnan(row), row, jnp.where(near, near_d, far_d))


def _softmax(z: Array) -> tuple[Array, Array]:
    """p and log p; NaN rows where there is no finite maximum."""
    m, r = max_and_rest(z, None)
    m, r = jnp.where(jnp.isfinite(m), m, jnp.nan)[..., None], r[..., None]
    log_p = jnp.maximum(z - m, lowest(z.dtype) / 4) - jnp.log1p(r)  # finite where z is
    return exp_difference(z, m) / (1 + r), log_p


def _kl(p: Array, q: Array, d: Array) -> Array:
    """sum_j q_j phi(d_j), phi(d) = d + expm1(-d) >= 0; as q d + (p - q) that is KL, for sum(p - q) = 0."""
    near = jnp.abs(d) < 0.3
    x = jnp.where(near, d, 0)
    series = jnp.zeros_like(x)
    for n in range(15, 1, -1):  # phi(d) = sum_{n >= 2} (-d)^n / n!
        series = series * -x + 1 / math.factorial(n)
    up = jnp.where(near, 1, jnp.maximum(d, -1))  # q phi(d) where d is not far below 0
    down = jnp.where(d < -1, jnp.maximum(d, -200), -1)  # else p (1 + exp(d) (d - 1)), which does not overflow
    term = jnp.where(near, q * (x * x * series), product_or_zero(q, up + jnp.expm1(-up)))
    return jnp.sum(jnp.where(d < -1, p * (1 + jnp.exp(down) * (down - 1)), term), -1)


def _js(p: Array, q: Array, d: Array) -> Array:
    """sum_j h_j (s_j tanh s_j - log cosh s_j), s = d / 2."""
    s, log_cosh = _half(d)
    a = jnp.abs(s)
    shrunk = jnp.exp(-2 * a)
    large = math.log(2) - jnp.log1p(shrunk) - 2 * a * shrunk / (1 + shrunk)
    term = jnp.where(a < 1, s * jnp.tanh(s) - log_cosh, large)
    return jnp.sum((p + q) / 2 * term, -1)


def _half(d: Array) -> tuple[Array, Array]:
    """s = d / 2, within +-50, where exp(-2s) is nothing, and log cosh s."""
    s = jnp.clip(d / 2, -50, 50)
    a = jnp.abs(s)
    small = jnp.log1p(2 * jnp.sinh(jnp.where(a < 1, s, 0) / 2) ** 2)
    return s, jnp.where(a < 1, small, a - math.log(2) + jnp.log1p(jnp.exp(-2 * a)))
