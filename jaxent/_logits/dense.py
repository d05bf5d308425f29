"""Logits that are an array `[..., V]`, with all classes in one place."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import varying_like, with_forward_mode, zeros_like_any
from .._devices import lanes, spread
from .._numerics import exp_difference
from .._rows import keep_gradient
from .._statistics import (
    INTEGER_STATISTICS,
    Block,
    LabelLane,
    Partial,
    SoftmaxStatistics,
    detached_max,
    distribution_gradient,
    finish,
    logits_gradient,
    max_and_rest,
    partial_statistics,
    poison,
    select_label,
)


def statistics(names: tuple[str, ...], block: Block, counts: Array | None) -> SoftmaxStatistics:
    """The statistics `names` of rows; the gradient of a row that does not count is exactly 0."""
    real = tuple(name for name in names if name not in INTEGER_STATISTICS)
    found: dict[str, Array] = {}
    if real:
        found |= _real_statistics(real, varying_like((block, counts), block), counts)
    z = lax.stop_gradient(block.wide_logits())
    z_y = select_label(z, block.hit()) if "rank" in names else None
    found |= _integers(names, z, z_y)
    if "rank" in names:
        found["rank"] = jnp.where(block.label >= 0, found["rank"], z.shape[-1])
    return SoftmaxStatistics(**found)


def _integers(names: tuple[str, ...], z: Array, z_y: Array | None) -> dict[str, Array]:
    found = {}
    if "prediction" in names:
        found["prediction"] = jnp.argmax(z, -1).astype(jnp.int32)
    if "rank" in names:
        # "not below" is true of NaN: a row without an answer has the worst rank, V, not the best, 0
        found["rank"] = jnp.sum(~(z <= z_y[..., None]), -1, dtype=jnp.int32)
    return found


def partials(
    names: tuple[str, ...], block: Block, counts: Array | None, label_logit: Array | None = None
) -> tuple[Partial, dict[str, Array]]:
    """As `class_blocks.partials`, of classes that are an array."""
    # made anew where a gradient is differentiated; nothing is kept for that
    partial = jax.checkpoint(functools.partial(partial_statistics, names))(hide(block, counts))
    return partial, _integers(names, lax.stop_gradient(block.wide_logits()), label_logit)


def slope(names: tuple[str, ...], block: Block, counts: Array | None, whole: Partial) -> dict[str, Array]:
    """As `class_blocks.slope`."""
    inputs = block, counts, whole
    return _slope(names, *varying_like(inputs, inputs))


def _primal(names: tuple[str, ...], block: Block, counts: Array | None) -> dict[str, Array]:
    return finish(names, _whole(names, block))


def _whole(names: tuple[str, ...], block: Block) -> Partial:
    return poison(partial_statistics(names, block, platform_max_and_rest, platform_select_label), block.label)


def _forward(names: tuple[str, ...], block: Block, counts: Array | None) -> tuple[dict[str, Array], Any]:
    whole = _whole(names, hide(block, counts))
    return finish(names, whole), (block, counts, whole)


def _backward(names: tuple[str, ...], residuals: Any, g: dict[str, Array]) -> tuple[Any, None]:
    block, counts, whole = residuals
    block = hide(block, counts)

    def of_counting_rows(x: Array, like: Array) -> Array:
        # a select, so that NaN in a row that does not count stays there
        x = x if counts is None else jnp.where(counts[..., None], x, 0)
        return x.astype(like.dtype)

    q = block.distribution
    d_q = None if q is None else of_counting_rows(distribution_gradient(block, whole, g), q)
    d_z = of_counting_rows(logits_gradient(block, whole, g), block.logits)
    d_weights = None if block.class_weights is None else jnp.zeros_like(block.class_weights)
    return Block(d_z, None, d_q, d_weights, None), None


def hide(block: Block, counts: Array | None) -> Block:
    """`block`, whose rows that do not count have a derivative of 0."""
    q = block.distribution
    q = None if q is None else keep_gradient(counts, q)
    return block._replace(logits=keep_gradient(counts, block.logits), distribution=q)


_rule = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward)
_real_statistics = with_forward_mode(_rule)


def _zeros(names: tuple[str, ...], *inputs: Any) -> dict[str, Array]:
    return {name: zeros_like_any(inputs, inputs[-1].m) for name in names}


# without symbolic zeros, which an eager shard_map does not take
_slope_rule = jax.custom_vjp(_zeros, nondiff_argnums=(0,))
_slope_rule.defvjp(lambda names, *x: (_zeros(names, *x), x), lambda *x: (*_backward(*x), None))
_slope = with_forward_mode(_slope_rule)


# On one CPU, XLA hands a reduction to its fast library only where everything in it is plain float arithmetic: a
# select or comparison in front makes it write out an N x V array. So there m and r come from sums over groups of
# classes, and only the group that holds the maximum is looked at lane by lane. Elsewhere one fused pass is best, and
# a group or gather along a class axis that is split would move the logits.


@detached_max
def platform_max_and_rest(z: Array, lane: LabelLane) -> tuple[Array, Array]:
    if spread(z).possible > 1:
        return max_and_rest(z, lane)
    return lax.platform_dependent(z, lane, cpu=_max_and_rest_on_cpu, default=max_and_rest)


def platform_select_label(z: Array, block: Block) -> Array:
    if spread((z, block.label)).possible > 1:
        return select_label(z, block.hit())

    def gather(z: Array, label: Array) -> Array:
        lane = jnp.clip(label, 0, z.shape[-1] - 1)
        found = jnp.take_along_axis(z, lane[..., None], -1, mode="promise_in_bounds")[..., 0]
        return jnp.where(label == lane, found, -jnp.inf)

    def select(z: Array, label: Array) -> Array:
        return select_label(z, Block(z, label).hit())

    return lax.platform_dependent(z, block.label, cpu=gather, default=select)


def _max_and_rest_on_cpu(z: Array, _: LabelLane) -> tuple[Array, Array]:
    size = _group_size(z.shape[-1])
    if size is None:
        m = jnp.max(z, -1)
        r = _rest(z, m[..., None])
    else:
        m, r = _max_and_rest_by_groups(size, z)
    return m, jnp.where(m == -jnp.inf, -1, r)


@functools.cache
def _group_size(classes: int) -> int | None:
    """The divisor of `classes` nearest to sqrt(classes); None where there is none, or too few classes."""
    if classes < 256:
        return None
    divisors = [d for d in range(16, classes // 8 + 1) if classes % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d * d / classes)), default=None)


def _max_and_rest_by_groups(size: int, z: Array) -> tuple[Array, Array]:
    """m and r of `[..., V]`, the group of the maximum apart from all the other groups of `size` classes.

    With m' the maximum of the others, their sum is exp(m' - m) sum_j exp(z_j - m'). The terms that matter have a
    small z_j - m', whose rounding is harmless, and m' - m is compensated.
    """
    groups = z.reshape(*z.shape[:-1], z.shape[-1] // size, size)
    tops = jnp.max(groups, -1)  # [..., G]
    g = jnp.argmax(tops, -1)[..., None]
    m = jnp.take_along_axis(tops, g, -1)  # the maximum of maxima XLA would take from the logits once more
    other = lanes(tops, g.dtype) != g
    m_other = jnp.max(jnp.where(other, tops, jnp.finfo(z.dtype).min), -1, keepdims=True)
    sums = jnp.sum(jnp.exp(groups - m_other[..., None]), -1)  # of the group of m it may be inf
    others = jnp.sum(jnp.where(other, sums, 0), -1) * exp_difference(m_other, m)[..., 0]
    top = jnp.take_along_axis(groups, g[..., None], -2)[..., 0, :]
    return m[..., 0], others + _rest(top, m)


def _rest(z: Array, m: Array) -> Array:
    """sum_j exp(z_j - m) - 1 in one reduction, which reads z as it is made: no temporary.

    Two reductions that share the comparison with m would have it written out. XLA adds the terms up one after the
    other, so the rounding errors are added up beside them.
    """
    top = z == m
    e = jnp.where(top, 0, exp_difference(z, m))
    zero = jnp.zeros((), z.dtype)

    def add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        total = a[0] + b[0]
        virtual = total - a[0]
        lost = (a[0] - (total - virtual)) + (b[0] - virtual)
        return total, a[1] + b[1] + lost, a[2] + b[2]

    terms = (e, jnp.zeros_like(e), top.astype(z.dtype))
    total, lost, ties = lax.reduce(terms, (zero, zero, zero), add, (z.ndim - 1,))
    return (total + lost) + (ties - 1)
