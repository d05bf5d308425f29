"""Divergences of two rows of logits z_p and z_q: sums over the classes of a device, added up over all devices.

Symbols, per row: p, q = softmax(z / T), d = log(q / p). Where p and q are close, d comes from differences of logits,
less that of their maxima, so that a shift of all logits is gone before anything is rounded or divided. What is left of
the two normalizers is K, whose logarithm is small:

    u = ((z_q - z_p) - (m_q - m_p)) / T        d = u - log K        K = E_p exp(u)

So there are three sums after another: the normalizers, then K - 1, then the divergence L from the mean h = c p + b q
with b = beta, c = 1 - b:

    l_p = log(p / h) = -log1p(b expm1(d))       S_p = KL(p || h) = sum p l_p
    l_q = log(q / h) = -log1p(c expm1(-d))      S_q = KL(q || h) = sum q l_q      L = c S_p + b S_q

KL(q || p) is S_q at b = 0, where h = p and S_p = 0, and the limit of L / b; so S_q has the factor 1 there, and S_p
where c = 0. Each sum is plain code, the collectives between them too, and so is the second derivative. The first
derivative is a rule of its own, which is as accurate as the divergence: as dp_k/dz_j = p_k (1[k = j] - p_j) / T,

    dL/dz_p = c p (l_p - S_p) / T               where b = 0: (p - q) / T = q expm1(-d) / T
    dL/dz_q = b q (l_q - S_q) / T               where c = 0: (q - p) / T; with the factors of 1 here as well
    dL/db = S_q - S_p                           and 0 at the ends
    dL/dT = -sum (dL/dz_p log p + dL/dz_q log q)    as both logits are divided by T, and a gradient sums to 0
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._derivatives import Perturbed, slope_rule, varying_like, with_forward_mode, with_slope, zeros_like_any
from ._devices import largest
from ._divergence_terms import Mean, against_mean, expected, from_mean, kl
from ._logits import sources
from ._logits.explicit import on_each_device, split_of
from ._logits.linear import LinearLogits
from ._logits.row_blocks import Inputs
from ._numerics import (
    accumulation_dtype,
    divided,
    exp_difference,
    limit,
    over_rows,
    product_or_zero,
    subtraction_error,
)
from ._rows import AxisName, keep, keep_gradient

ARRAYS = 20  # of the size of a block of logits, that a divergence and its gradients need at a time


class Static(NamedTuple):
    """Numbers that are part of the program."""

    beta: float  # in [0, 1); 0 is KL(q || p)
    temperature: float


class Pair(NamedTuple):
    """Two rows of logits `[..., V]`, of all classes or of a slice of them."""

    p: Any  # an array or a LinearLogits
    q: Any
    class_mask: Array | None  # [V] or [..., V]
    counts: Array | None  # [...]
    temperature: Array | None = None  # [...], where it is a value and no part of the program
    beta: Array | None = None  # likewise

    @property
    def layers(self) -> tuple[LinearLogits, ...]:
        return tuple(z for z in (self.p, self.q) if isinstance(z, LinearLogits))


class Normalizer(NamedTuple):
    """Of one softmax, over all classes."""

    m: Array  # max_j z_j, before the temperature; NaN where there is no answer
    r: Array  # sum_j exp((z_j - m) / T) - 1


class Whole(NamedTuple):
    """What a class has to know of all the others."""

    p: Normalizer
    q: Normalizer
    ratio: Array | None = None  # K - 1, of the normalizers; -1 where most of q is far from p
    sums: tuple[Array, ...] = ()  # L; and S_p and S_q, if L is not S_q alone


def divergence(static: Static, pair: Pair, axis_name: AxisName = None) -> Array:
    """Divergences `[...]` of arrays; the gradient of a row that does not count is exactly 0."""
    pair = _hide(varying_like(pair, pair))
    # what is known of all classes is made anew for second derivatives; nothing of its making is kept for them
    whole = jax.checkpoint(functools.partial(_whole, _at_once, axis_name, static))(pair)
    return with_slope(whole.sums[0], _add(_slope(static, (pair, whole)), axis_name))


def divergence_of_layers(
    static: Static, pair: Pair, axis_name: AxisName = None, weights: Array | None = None
) -> Array:
    """Where one or both are linear: by blocks of rows. With `weights` `[...]` their weighted sum."""
    split, specs = split_of(*pair.layers), None
    if split is not None:
        axis_name = axis_name or split.classes
        p, q, mask = split.of_logits(pair.p), split.of_logits(pair.q), split.of_mask(pair.class_mask)
        specs = Pair(p, q, mask, *split.per_row(pair[3:])), split.per_row(weights)

    def here(pair: Pair, weights: Array | None) -> tuple[Any, Any]:
        if axis_name is None:
            found = _by_blocks(lambda static, pair, _: divergence(static, pair), static, pair, None, weights)
        else:
            found = _of_split_layers(static, pair, axis_name)
            found = found if weights is None else jnp.sum(weights * limit(weights, found))
        return ((), found) if weights is None else (found, ())

    total, losses = on_each_device(here, split, specs, (pair, weights))
    return losses if weights is None else total


def _of_split_layers(static: Static, pair: Pair, axis_name: AxisName) -> Array:
    pair = _hide(pair)
    whole = _whole(_by_blocks, axis_name, static, pair)
    return with_slope(whole.sums[0], _add(_slope_of_layers(static, (pair, whole)), axis_name))


def _hide(pair: Pair) -> Pair:
    """`pair`, whose rows that do not count have a derivative of 0; layers have that from `_by_blocks`."""
    p, q = (z if isinstance(z, LinearLogits) else keep_gradient(pair.counts, z) for z in (pair.p, pair.q))
    return pair._replace(p=p, q=q)


def _at_once(f: Callable[..., Any], static: Static, pair: Pair, whole: Whole | None) -> Any:
    return f(static, pair, whole)


def _by_blocks(
    f: Callable[..., Any], static: Static, pair: Pair, whole: Whole | None, weights: Array | None = None
) -> Any:
    """`f(static, pair, whole)` of blocks of rows, with arrays in place of layers."""
    mask = pair.class_mask
    of_rows, of_all = (None, mask) if mask is None or mask.ndim == 1 else (mask, None)
    p, q = (None if isinstance(z, LinearLogits) else z for z in (pair.p, pair.q))
    rows = pair._replace(p=p, q=q, class_mask=of_rows, counts=None), whole

    def of_block(logits: tuple[Array, ...], counts: Array | None, rows: Any, of_all: Any) -> Any:
        pair, whole = rows
        of_layers = iter(logits)
        p, q = (next(of_layers) if z is None else z for z in (pair.p, pair.q))
        mask = of_all if pair.class_mask is None else pair.class_mask
        return f(static, pair._replace(p=p, q=q, class_mask=mask, counts=counts), whole), ()

    inputs = Inputs(pair.layers, pair.counts, rows, of_all, mask)
    return sources.by_blocks_of_rows(of_block, ARRAYS, inputs, weights)[0]


def _add(tree: Any, axis_name: AxisName) -> Any:
    return tree if axis_name is None else lax.psum(tree, axis_name)


def _whole(sums: Callable[..., Any], axis_name: AxisName, static: Static, pair: Pair) -> Whole:
    """`sums(f, static, pair, whole)` is `f(static, pair, whole)` of all rows: sums over the classes of this device."""
    p, q = (_of_all_devices(static, pair, x, axis_name) for x in sums(_normalizers, static, pair, None))
    whole = Whole(p, q)
    change, far = _add(sums(_change_and_far, static, pair, whole), axis_name)
    is_near = lax.stop_gradient(far) < 0.5
    ratio = (change + far) / jnp.where(is_near, 1 - far, 1)
    is_near &= lax.stop_gradient(ratio) > -0.5
    whole = whole._replace(ratio=jnp.where(is_near, ratio, -1))
    return whole._replace(sums=_add(sums(_divergences, static, pair, whole), axis_name))


def _normalizers(static: Static, pair: Pair, _: None) -> tuple[Normalizer, ...]:
    z_p, z_q, temperature = _classes(static, pair)
    return _normalizer(z_p, temperature), _normalizer(z_q, temperature)


def _normalizer(z: Array, temperature: float | Array) -> Normalizer:
    """m, which is only a shift, and r of the classes here."""
    m = lax.stop_gradient(largest(z))
    e = exp_difference(z, jnp.where(m == -jnp.inf, 0, m)[..., None], temperature)
    top = z == m[..., None]
    others = jnp.where(top, e - lax.stop_gradient(e), e)  # without the largest, but with its derivative
    r = jnp.sum(others, -1) + (jnp.sum(top, -1, dtype=z.dtype) - 1)
    return Normalizer(m, jnp.where(m == -jnp.inf, -1, r))


def _of_all_devices(static: Static, pair: Pair, here: Normalizer, axis_name: AxisName) -> Normalizer:
    m, r = lax.stop_gradient(here.m), here.r
    if axis_name is not None:
        local_m, m = m, lax.pmax(m, axis_name)
        holds = local_m == m
        by = static.temperature if pair.temperature is None else pair.temperature.astype(m.dtype)
        r = jnp.where(holds, r, product_or_zero(exp_difference(local_m, m, by), 1 + r))
        r, holders = lax.psum((r, holds.astype(m.dtype)), axis_name)
        r += holders - 1
    return Normalizer(jnp.where(jnp.isfinite(m), m, jnp.nan), r)


def _change_and_far(static: Static, pair: Pair, whole: Whole) -> tuple[Array, Array]:
    """Of K - 1 = E_p exp(u) - 1: what near classes add; and how much of q is far. As p exp(u) = q K there, too."""
    z_p, z_q, temperature = _classes(static, pair)
    p, q = _softmax(z_p, temperature, whole.p)[0], _softmax(z_q, temperature, whole.q)[0]
    u, near = _near(z_p, z_q, temperature, whole)
    return jnp.sum(jnp.where(near, p * jnp.expm1(u), -p), -1), jnp.sum(jnp.where(near, 0, q), -1)


def _divergences(static: Static, pair: Pair, whole: Whole) -> tuple[Array, ...]:
    p, q, d, _, _ = _log_ratio(static, pair, whole)
    if static.beta == 0:
        return (jnp.sum(kl(p, q, d), -1),)
    mean = _mean(static, pair, d.dtype)
    l_p, l_q = against_mean(d, mean)
    kl_p, kl_q = from_mean(p, q, mean, (l_p, l_q))
    of_p, of_q = mean.shares
    return tuple(jnp.sum(x, -1) for x in (of_p * kl_p + of_q * kl_q, expected(p, l_p), expected(q, l_q)))


def _mean(static: Static, pair: Pair, dtype: Any) -> Mean:
    return Mean.of(static.beta if pair.beta is None else pair.beta[..., None], dtype)


def _classes(static: Static, pair: Pair) -> tuple[Array, Array, float | Array]:
    """Both logits, -inf where a class is out of force, and what divides them."""
    dtype = accumulation_dtype(pair.p.dtype, pair.q.dtype)
    z_p, z_q = pair.p.astype(dtype), pair.q.astype(dtype)
    if pair.class_mask is not None:
        mask = over_rows(pair.class_mask, z_p.ndim)
        z_p, z_q = (jnp.where(mask, z, -jnp.inf) for z in (z_p, z_q))
    return z_p, z_q, _temperature(static, pair, dtype)


def _temperature(static: Static, pair: Pair, dtype: Any) -> float | Array:
    return static.temperature if pair.temperature is None else pair.temperature.astype(dtype)[..., None]


def _softmax(z: Array, temperature: float | Array, of: Normalizer) -> tuple[Array, Array]:
    """p and log p, 0 where p is exactly 0; NaN rows where there is no answer."""
    m, r = of.m[..., None], of.r[..., None]
    least = float(jnp.finfo(z.dtype).min) / 4 * jnp.minimum(temperature, 1)
    log_e = divided(jnp.maximum(z - m, least), temperature)
    log_p = jnp.where(z == -jnp.inf, 0, log_e - jnp.log1p(r))
    return exp_difference(z, m, temperature) / (1 + r), log_p


def _near(z_p: Array, z_q: Array, temperature: float | Array, whole: Whole) -> tuple[Array, Array]:
    """u, and where it is small enough to be used; 0 elsewhere."""
    on = (z_p != -jnp.inf) & (z_q != -jnp.inf)
    z_p, z_q = jnp.where(on, z_p, 0), jnp.where(on, z_q, 0)
    difference, shift = z_q - z_p, whole.q.m - whole.p.m
    # both have rounding errors, which are the same where both largest logits are of one class
    lost = subtraction_error(z_q, z_p, difference) - subtraction_error(whole.q.m, whole.p.m, shift)[..., None]
    u = (difference - shift[..., None]) + lost
    near = on & (jnp.abs(u) < 30 * temperature)
    return divided(jnp.where(near, u, 0), temperature), near


def _log_ratio(static: Static, pair: Pair, whole: Whole) -> tuple[Array, ...]:
    """p, q, d = log(q / p), accurate also where p and q are nearly the same, log p and log q.

    Where they are far apart (or have not the same support) the difference of the two log-softmaxes is as good, and does
    not overflow.
    """
    z_p, z_q, temperature = _classes(static, pair)
    p, log_p = _softmax(z_p, temperature, whole.p)
    q, log_q = _softmax(z_q, temperature, whole.q)
    on_p, on_q = z_p != -jnp.inf, z_q != -jnp.inf
    far_d = jnp.where(on_p == on_q, log_q - log_p, jnp.where(on_q, jnp.inf, -jnp.inf))
    u, near = _near(z_p, z_q, temperature, whole)
    ratio = whole.ratio[..., None]
    near &= ratio > -1
    d = jnp.where(near, u - jnp.log1p(jnp.where(ratio > -1, ratio, 0)), far_d)
    no_answer = (whole.p.m + whole.q.m)[..., None]
    return p, q, jnp.where(jnp.isnan(no_answer), no_answer, d), log_p, log_q


# Functions that are 0 and have the slope of the divergence. The sums over all classes have no part in it; the formulas
# hold for them as they are.


def _gradient(static: Static, inputs: tuple[Pair, Whole], perturbed: Perturbed, g: Array) -> Any:
    pair, whole = inputs
    p, q, d, log_p, log_q = _log_ratio(static, pair, whole)
    is_perturbed, _ = perturbed.tree(inputs)
    sums = [x[..., None] for x in whole.sums]
    near = jnp.abs(d) < 1
    difference = jnp.where(near, q * jnp.expm1(-jnp.where(near, d, 0)), p - q)

    def centered(x: Array, log: Array, mean: Array) -> Array:
        # an infinite loss is so for all x near this one
        return product_or_zero(x, jnp.where(mean == jnp.inf, 0, log - mean))

    if static.beta == 0:
        bar_p, bar_q, bar_b = difference, centered(q, d, sums[0]), None
    else:
        mean = _mean(static, pair, d.dtype)
        l_p, l_q = against_mean(d, mean)
        of_p, of_q = mean.shares
        bar_p = jnp.where(mean.is_p, difference, of_p * centered(p, l_p, sums[1]))
        bar_q = jnp.where(mean.is_q, -difference, of_q * centered(q, l_q, sums[2]))
        # of the classes here, and of terms >= 0, which those of the sums are not
        kl_p, kl_q = from_mean(p, q, mean, (l_p, l_q))
        bar_b = jnp.sum(kl_q - kl_p, -1, keepdims=True)
        bar_b = jnp.where(mean.is_p | mean.is_q, 0, bar_b)
    bar_t = -jnp.sum(bar_p * log_p + bar_q * log_q, -1, keepdims=True)
    temperature = _temperature(static, pair, p.dtype)
    bars = *(x / temperature for x in (bar_p, bar_q)), None, None, bar_t / temperature, bar_b

    def of_perturbed(is_perturbed: Any, bar: Array, x: Array) -> Array | None:
        if not is_perturbed:
            return None
        found = keep(pair.counts, bar * g[..., None])
        return (found if x.ndim == found.ndim else found[..., 0]).astype(x.dtype)

    return Pair(*map(of_perturbed, is_perturbed, bars, pair)), None


def _gradient_of_layers(static: Static, inputs: tuple[Pair, Whole], perturbed: Perturbed, g: Array) -> Any:
    pair, whole = inputs
    leaves, treedef = jax.tree.flatten(pair)

    def slope(some: list[Any]) -> Array:
        full = [x if new is None else new for x, new in zip(leaves, some, strict=True)]
        of_block = lambda static, *inputs: _slope(static, inputs)  # noqa: E731
        return _by_blocks(of_block, static, jax.tree.unflatten(treedef, full), whole)

    some = [x if is_it else None for x, is_it in zip(leaves, perturbed.leaves, strict=False)]
    _, vjp = jax.vjp(slope, some)
    return jax.tree.unflatten(treedef, *vjp(g)), None


def _zeros(_: Static, inputs: tuple[Pair, Whole]) -> Array:
    return zeros_like_any(inputs, inputs[1].sums[0])


_slope = with_forward_mode(slope_rule(_zeros, _gradient))
_slope_of_layers = slope_rule(_zeros, _gradient_of_layers)
