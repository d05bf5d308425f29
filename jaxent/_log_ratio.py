"""Divergences of two rows of logits z_p and z_q: sums over the classes of a device, added up over all devices.

Symbols, per row: p, q = softmax(z / T), u = (z_q - z_p) / T, d = log(q / p) = u - log E_p exp(u). u is shifted by its
mean under q first, so that the logarithm is small where p and q are close:

    d = u' - log1p(E_p expm1(u'))        u' = u - E_q u

So there are three sums after another: the normalizers and E_q u, then E_p expm1(u'), then the divergence. Each is plain
code, the collectives between them too, and so is the second derivative. The first derivative is a rule of its own,
which is as accurate as the divergence: with h = (p + q) / 2, s = d / 2, l_p = log(p / h) = -s - log cosh s and
l_q = log(q / h) = s - log cosh s, and because dp_k/dz_j = p_k (1[k = j] - p_j) / T,

    dKL/dz_p = (p - q) / T = q expm1(-d) / T        dJS/dz_p = p (l_p - sum p l_p) / 2T
    dKL/dz_q = q (d - KL) / T                       dJS/dz_q = q (l_q - sum q l_q) / 2T
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from ._derivatives import instantiate, values_and_moving, varying_like, with_forward_mode
from ._logits import sources
from ._logits.explicit import split_of
from ._logits.linear import LinearLogits
from ._logits.sharded import AxisName
from ._numerics import accumulation_dtype, exp_difference, lowest, product_or_zero
from ._reduction import keep_gradient
from ._statistics import max_and_rest

ARRAYS = 20  # of the size of a block of logits, that a divergence and its gradients need at a time


class Static(NamedTuple):
    kind: str  # "kl" or "js"
    temperature: float


class Pair(NamedTuple):
    """Two rows of logits `[..., V]`, of all classes or of a slice of them."""

    p: Any  # an array or a LinearLogits
    q: Any
    class_mask: Array | None  # [V] or [..., V]
    counts: Array | None  # [...]

    @property
    def layers(self) -> tuple[LinearLogits, ...]:
        return tuple(z for z in (self.p, self.q) if isinstance(z, LinearLogits))


class Normalizer(NamedTuple):
    """Of one softmax, over all classes: m, NaN where there is no answer, and r = sum_j exp(z_j - m) - 1."""

    max: Array
    rest: Array


class Whole(NamedTuple):
    """What a class has to know of all the others."""

    p: Normalizer
    q: Normalizer
    mean: Array  # E_q u
    ratio: Array  # of the normalizers, less 1: E_p expm1(u') = exp(-KL) - 1
    near: Array  # 1 where no class is far from the other distribution
    sums: tuple[Array, ...]  # the divergence, and what else its gradient needs


def divergence(static: Static, pair: Pair, axis_name: AxisName = None) -> Array:
    """Divergences `[...]` of arrays; the gradient of a row that does not count is exactly 0."""
    pair = pair._replace(p=keep_gradient(pair.counts, pair.p), q=keep_gradient(pair.counts, pair.q))
    # what is known of all classes is made anew for second derivatives; nothing of its making is kept for them
    whole = jax.checkpoint(functools.partial(_whole, static, axis_name=axis_name))(pair)
    return lax.stop_gradient(whole.sums[0]) + _add(_slope(static, pair, whole), axis_name)


def divergence_of_layers(
    static: Static, pair: Pair, axis_name: AxisName = None, weights: Array | None = None
) -> Array:
    """Where one or both are linear: by blocks of rows. With `weights` `[...]` their weighted sum."""
    split = split_of(*pair.layers)
    if split is not None:

        def on_device(pair: Pair, weights: Array | None) -> Array:
            found = divergence_of_layers(static, pair, axis_name or split.classes, weights)
            return found if weights is None else lax.psum(found, split.row_axes)

        both = split.of_logits(pair.p), split.of_logits(pair.q)
        specs = Pair(*both, split.of_mask(pair.class_mask), split.of_rows(pair.counts))
        out_specs = P(*split.rows) if weights is None else P()
        return split.on_each_device(on_device, (specs, split.of_rows(weights)), (pair, weights), out_specs)
    if axis_name is None:
        return _by_blocks(lambda pair, _: divergence(static, pair), pair, None, weights)
    pair = pair._replace(
        p=pair.p if isinstance(pair.p, LinearLogits) else keep_gradient(pair.counts, pair.p),
        q=pair.q if isinstance(pair.q, LinearLogits) else keep_gradient(pair.counts, pair.q),
    )

    def sums(f: Callable[..., Any], whole: Whole | None) -> Any:
        return _by_blocks(functools.partial(f, static), pair, whole)

    whole = _first(sums(lambda static, pair, _: _first_sums(static, pair), None), axis_name)
    whole = _second(whole, sums(_second_sums, whole), axis_name)
    whole = whole._replace(sums=_add(sums(_third_sums, whole), axis_name))
    losses = lax.stop_gradient(whole.sums[0]) + _add(_slope_of_layers(static, pair, whole), axis_name)
    return losses if weights is None else jnp.sum(weights * losses)


def _by_blocks(
    f: Callable[[Pair, Whole], Any], pair: Pair, whole: Whole | None, weights: Array | None = None
) -> Any:
    """`f` of blocks of rows, with arrays in place of layers."""
    is_linear = [isinstance(z, LinearLogits) for z in (pair.p, pair.q)]
    mask = pair.class_mask
    per_row = mask is not None and mask.ndim > 1
    arrays = [z for z in (pair.p, pair.q) if not isinstance(z, LinearLogits)]

    def of_block(logits: tuple[Array, ...], counts: Array | None, rows: Any, shared: Any) -> Any:
        from_layers, from_arrays = iter(logits), iter(rows[0])
        p, q = (next(from_layers if linear else from_arrays) for linear in is_linear)
        return f(Pair(p, q, rows[1] if per_row else shared, counts), rows[2]), ()

    rows, shared = (arrays, mask if per_row else None, whole), None if per_row else mask
    return sources.by_blocks_of_rows(of_block, ARRAYS, pair.layers, pair.counts, rows, shared, weights)


def _add(tree: Any, axis_name: AxisName) -> Any:
    return tree if axis_name is None else lax.psum(tree, axis_name)


def _whole(static: Static, pair: Pair, axis_name: AxisName) -> Whole:
    whole = _first(_first_sums(static, pair), axis_name)
    whole = _second(whole, _second_sums(static, pair, whole), axis_name)
    return whole._replace(sums=_add(_third_sums(static, pair, whole), axis_name))


def _first_sums(static: Static, pair: Pair) -> Any:
    """m, r and, for q, sum_j exp(z_j - m) u_j."""
    z_p, z_q, u, _, _ = _classes(static, pair)
    of_p, of_q = Normalizer(*max_and_rest(z_p, None)), Normalizer(*max_and_rest(z_q, None))
    finite_m = jnp.where(of_q.max == -jnp.inf, 0, of_q.max)[..., None]
    return of_p, of_q, jnp.sum(exp_difference(z_q, finite_m) * u, -1)


def _first(sums: Any, axis_name: AxisName) -> Whole:
    of_p, of_q, moment = sums
    p, _ = _normalizer(of_p, axis_name)
    q, scale = _normalizer(of_q, axis_name)
    mean = _add(product_or_zero(scale, moment), axis_name) / (1 + q.rest)
    return Whole(p, q, mean, None, None, ())


def _normalizer(here: Normalizer, axis_name: AxisName) -> tuple[Normalizer, Array]:
    """Of all devices; and what sums that are shifted by the maximum of this one are to be multiplied with."""
    m, rest, scale = here.max, here.rest, jnp.ones((), here.max.dtype)
    if axis_name is not None:
        own = lax.stop_gradient(here.max)
        m = lax.pmax(own, axis_name)
        holds = own == m
        scale = exp_difference(own, m)
        total = jnp.where(holds, rest, product_or_zero(scale, 1 + rest))
        total, holders = lax.psum((total, holds.astype(m.dtype)), axis_name)
        rest = total + (holders - 1)
    return Normalizer(jnp.where(jnp.isfinite(m), m, jnp.nan), rest), scale


def _second_sums(static: Static, pair: Pair, whole: Whole) -> Any:
    z_p, _, u, on_p, on_q = _classes(static, pair)
    u = jnp.where(on_p & on_q, u - whole.mean[..., None], 0)
    near = (on_p == on_q) & (jnp.abs(u) < 30)
    p, _ = _softmax(z_p, whole.p)
    ratio = jnp.sum(p * jnp.expm1(jnp.where(near, u, 0)), -1)
    return ratio, jnp.all(near, -1).astype(u.dtype)


def _second(whole: Whole, sums: Any, axis_name: AxisName) -> Whole:
    ratio, near = sums
    near = lax.stop_gradient(near)
    if axis_name is not None:
        ratio, near = lax.psum(ratio, axis_name), lax.pmin(near, axis_name)
    near = jnp.where(ratio > -0.5, near, 0)
    return whole._replace(ratio=ratio, near=near)


def _third_sums(static: Static, pair: Pair, whole: Whole) -> tuple[Array, ...]:
    """The divergence; for JS also sum p l_p and sum q l_q."""
    p, q, d = _log_ratio(static, pair, whole)
    if static.kind == "kl":
        return (_kl(p, q, d),)
    s, log_cosh = _half(d)
    return _js(p, q, d), jnp.sum(p * (-s - log_cosh), -1), jnp.sum(q * (s - log_cosh), -1)


def _classes(static: Static, pair: Pair) -> tuple[Array, ...]:
    """Both logits over the temperature, u (0 where one of them is out), and where each is in."""
    dtype = accumulation_dtype(pair.p.dtype, pair.q.dtype)
    z_p, z_q = pair.p.astype(dtype), pair.q.astype(dtype)
    if pair.class_mask is not None:
        z_p, z_q = (jnp.where(pair.class_mask, z, -jnp.inf) for z in (z_p, z_q))
    on_p, on_q = z_p != -jnp.inf, z_q != -jnp.inf
    on = on_p & on_q
    u = (jnp.where(on, z_q, 0) - jnp.where(on, z_p, 0)) / static.temperature
    return z_p / static.temperature, z_q / static.temperature, u, on_p, on_q


def _softmax(z: Array, of: Normalizer) -> tuple[Array, Array]:
    """p and log p, which is finite where z is; NaN rows where there is no answer."""
    m, rest = of.max[..., None], of.rest[..., None]
    log_p = jnp.maximum(z - m, lowest(z.dtype) / 4) - jnp.log1p(rest)
    return exp_difference(z, m) / (1 + rest), log_p


def _log_ratio(static: Static, pair: Pair, whole: Whole) -> tuple[Array, Array, Array]:
    """p, q and d = log(q / p), accurate also where p and q are nearly the same.

    Where they are far apart (or have not the same support) the difference of the two log-softmaxes is as good, and does
    not overflow.
    """
    z_p, z_q, u, on_p, on_q = _classes(static, pair)
    on = on_p & on_q
    p, log_p = _softmax(z_p, whole.p)
    q, log_q = _softmax(z_q, whole.q)
    far_d = jnp.where(on, jnp.where(on, log_q, 0) - jnp.where(on, log_p, 0), 0)
    far_d = jnp.where(on_p == on_q, far_d, jnp.where(on_q, jnp.inf, -jnp.inf))
    near = whole.near[..., None] > 0
    u = jnp.where(on & near, u - whole.mean[..., None], 0)
    near_d = jnp.where(on, u - jnp.log1p(jnp.where(near, whole.ratio[..., None], 0)), 0)
    no_answer = (whole.p.max + whole.q.max)[..., None]
    return p, q, jnp.where(jnp.isnan(no_answer), no_answer, jnp.where(near, near_d, far_d))


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


# The first derivative: a function that is 0 and has the slope of the divergence. The sums over all classes have no part
# in it; the formulas hold for them as they are.


def _slope_primal(static: Static, pair: Pair, whole: Whole) -> Array:
    rows = pair.p.shape[:-1]
    return varying_like((pair, whole), jnp.zeros(rows, whole.mean.dtype))


def _slope_forward(static: Static, pair: Pair, whole: Whole) -> tuple[Array, Any]:
    return _slope_primal(static, pair, whole), (pair, whole)


def _slope_backward(static: Static, residuals: Any, g: Array) -> tuple[Pair, None]:
    pair, whole = residuals
    p, q, d = _log_ratio(static, pair, whole)
    sums = [x[..., None] for x in whole.sums]
    if static.kind == "kl":
        near = jnp.abs(d) < 1
        bar_p = jnp.where(near, q * jnp.expm1(-jnp.where(near, d, 0)), p - q)
        bar_q = product_or_zero(q, d - sums[0])
    else:
        s, log_cosh = _half(d)
        bar_p, bar_q = p * ((-s - log_cosh) - sums[1]) / 2, q * ((s - log_cosh) - sums[2]) / 2
    g = (g / static.temperature)[..., None]

    def of_counting_rows(x: Array, like: Array) -> Array:
        x = x * g
        x = x if pair.counts is None else jnp.where(pair.counts[..., None], x, 0)
        return x.astype(like.dtype)

    return Pair(of_counting_rows(bar_p, pair.p), of_counting_rows(bar_q, pair.q), None, None), None


_rule = jax.custom_vjp(_slope_primal, nondiff_argnums=(0,))
_rule.defvjp(_slope_forward, _slope_backward)
_slope = with_forward_mode(_rule)


def _layers_primal(static: Static, pair: Pair, whole: Whole) -> Array:
    return varying_like((pair, whole), jnp.zeros_like(whole.mean))


def _layers_forward(static: Static, pair: Any, whole: Any) -> tuple[Array, Any]:
    pair, moving = values_and_moving(pair)
    whole, _ = values_and_moving(whole)
    return _layers_primal(static, pair, whole), (pair, whole, moving)


def _layers_backward(static: Static, residuals: Any, g: Any) -> tuple[Any, None]:
    pair, whole, moving = residuals
    leaves, treedef = jax.tree.flatten(pair)
    moved = [i for i, moves in enumerate(moving.leaves) if moves]

    def of_moving(some: list[Array]) -> Array:
        full = dict(enumerate(leaves)) | dict(zip(moved, some, strict=True))
        return _by_blocks(
            functools.partial(_slope, static), jax.tree.unflatten(treedef, list(full.values())), whole
        )

    _, vjp = jax.vjp(of_moving, [leaves[i] for i in moved])
    gradients = dict(zip(moved, *vjp(instantiate(g)), strict=True))
    return jax.tree.unflatten(treedef, [gradients.get(i) for i in range(len(leaves))]), None


_slope_of_layers = jax.custom_vjp(_layers_primal, nondiff_argnums=(0,))
_slope_of_layers.defvjp(_layers_forward, _layers_backward, symbolic_zeros=True)
