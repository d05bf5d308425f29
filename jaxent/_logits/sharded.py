"""A class axis that is split over devices: each sums over its own classes; collectives of a few numbers per row add
up the sums.

Symbols as in `_statistics`. Which device holds the largest logit, the term that is left out of r, would have to be
agreed on: several may. The label, though, is on one device. So with integer labels its term is left out instead,

    S = sum_{j != y} e_j      c = z_y - m      T = S + exp(c)      log p_y = c - log T

with log T = log1p(S) where c = 0. Nothing is subtracted, so a loss of 1e-30 keeps its digits; and
d log p_y / dc = S / T, never 1 - p. Without integer labels, and for the entropy, it is counted how many devices hold
the largest logit: r = sum of all terms but one of each such device, plus how many they are, less 1.

Rules of differentiation are those of the sums of one device. The collectives stay outside of them, where jax knows
what their transposes are in each kind of mapping.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import with_forward_mode
from .._numerics import exp_difference, limit, product_or_zero
from .._rows import AxisName
from .._statistics import (
    INTEGER_STATISTICS,
    Block,
    Moments,
    Partial,
    SoftmaxStatistics,
    partial_distribution_gradient,
    partial_gradient,
    partial_statistics,
    select_label,
    with_others,
)
from . import class_blocks, dense
from .layout import ClassLayout
from .linear import LinearLogits


def statistics(
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    axis_name: AxisName,
    layout: ClassLayout | None = None,
) -> SoftmaxStatistics:
    """The statistics `names` of rows over the classes of all devices along `axis_name`.

    `block` has this device's classes, but the label counts over all of them. Linear logits are cut
    into blocks of classes.
    """
    here = block.logits.shape[-1]
    first = lax.axis_index(axis_name) * here
    bad = None if block.label is None else block.label < 0
    if block.label is not None:
        block = block._replace(label=jnp.where(bad, -1, block.label - first))
    real = tuple(name for name in names if name not in INTEGER_STATISTICS)
    partial, found = _local(class_blocks.first_pass(names), block, counts, None, layout)
    if "rank" in names:
        z_y = lax.pmax(lax.stop_gradient(found.pop("label_logit")), axis_name)
        found |= _local(("rank",), lax.stop_gradient(block), counts, z_y, layout)[1]
    m = lax.pmax(lax.stop_gradient(partial.m), axis_name)
    # a NaN is the largest, as in argmax; over devices a maximum may lose it
    top = jnp.where(jnp.isnan(partial.m), jnp.inf, partial.m)
    holds = top == lax.pmax(lax.stop_gradient(top), axis_name) if "prediction" in names else None
    found = {name: _whole_integer(name, x, holds, first, axis_name) for name, x in found.items()}
    if "rank" in names:
        found["rank"] = jnp.where(bad, here * lax.axis_size(axis_name), found["rank"])
    ok = jnp.isfinite(m) if bad is None else jnp.isfinite(m) & ~bad
    found |= _finish(real, partial, jnp.where(ok, m, jnp.nan), block, axis_name)
    return SoftmaxStatistics(**found)


def _whole_integer(name: str, x: Array, holds: Array | None, first: Array, axis_name: AxisName) -> Array:
    if name == "rank":
        return lax.psum(x, axis_name)
    return lax.pmin(jnp.where(holds, x + first, jnp.iinfo(jnp.int32).max), axis_name)


def _finish(
    names: tuple[str, ...], partial: Partial, m: Array, block: Block, axis_name: AxisName
) -> dict[str, Array]:
    """Plain code: one collective after the maximum, of all sums together."""
    scale = exp_difference(lax.stop_gradient(partial.m), m)
    moved = product_or_zero  # 0 * inf = 0: a device with no class in force
    behind = m - lax.stop_gradient(partial.m)

    def moments(x: Moments | None) -> Moments | None:
        # a device may have none of the mass, and yet its mass has a derivative
        return None if x is None else Moments(x.deviation + x.mass * limit(x.mass, behind), x.mass)

    sums: dict[str, Any] = {
        name: moments(getattr(partial, name)) for name in ("distribution", "weighted", "uniform")
    }
    sums |= {"classes": partial.classes, "label_weight": partial.label_weight}
    if partial.others is not None:
        label_here = (block.label >= 0) & (block.label < block.logits.shape[-1])
        sums["c"] = jnp.where(label_here, partial.label_logit - m, 0)
        sums["others"] = moved(scale, partial.others)
    # the entropy is small where a row is sure of any class, not just of its label
    if partial.others is None or "entropy" in names:
        holds = partial.m == m
        sums["rest"] = jnp.where(holds, partial.r, moved(scale, 1 + partial.r))
        sums["holders"] = holds.astype(m.dtype)
    if partial.spread is not None:
        sums["spread"] = moved(scale, partial.spread + moved(1 + partial.r, behind))
    sums = lax.psum({name: x for name, x in sums.items() if x is not None}, axis_name)

    label_log_prob = r = log_t = None
    if partial.others is not None:
        log_t = _log_total(sums["others"], sums["c"])
        label_log_prob = _log_prob(sums["others"], sums["c"])
    if "rest" in sums:
        r = sums["rest"] + (sums["holders"] - 1)
        log_t = jnp.log1p(r)
    poison = m - m

    def expectation(x: Moments) -> Array:
        return -(x.deviation + x.mass * limit(x.mass, log_t))

    found: dict[str, Array] = {}
    for name in names:
        match name:
            case "log_prob" | "weighted_log_prob" if label_log_prob is not None:
                found[name] = label_log_prob
                if name == "weighted_log_prob" and "label_weight" in sums:
                    found[name] = sums["label_weight"] * limit(sums["label_weight"], found[name])
            case "log_prob":
                found[name] = expectation(sums["distribution"])
            case "weighted_log_prob":
                found[name] = expectation(sums["weighted"])
            case "mean_log_prob":
                found[name] = expectation(sums["uniform"]) / sums["classes"]
            case "log_normalizer":
                found[name] = m + log_t
            case "entropy":
                found[name] = log_t + sums["spread"] / (1 + r)
    return {name: x + poison for name, x in found.items()}


@jax.custom_jvp
def _log_total(s: Array, c: Array) -> Array:
    """log(s + exp(c)): where the label's logit is the largest, c = 0, to all digits of s."""
    top = c == 0
    return jnp.where(top, jnp.log1p(jnp.where(top, s, 0)), jnp.log(jnp.where(top, 1, s + jnp.exp(c))))


@_log_total.defjvp
def _log_total_jvp(primals: Any, tangents: Any) -> Any:
    (s, c), (ds, dc) = primals, tangents
    e_y = jnp.exp(c)
    return _log_total(s, c), (ds + e_y * dc) / (s + e_y)


@jax.custom_jvp
def _log_prob(s: Array, c: Array) -> Array:
    """c - log(s + exp(c))."""
    return c - _log_total(s, c)


@_log_prob.defjvp
def _log_prob_jvp(primals: Any, tangents: Any) -> Any:
    (s, c), (ds, dc) = primals, tangents
    return _log_prob(s, c), (s * dc - ds) / (s + jnp.exp(c))


# The partial statistics of one device.


def _local(
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    z_y: Array | None,
    layout: ClassLayout | None,
) -> tuple[Partial, dict[str, Array]]:
    if isinstance(block.logits, LinearLogits):
        return class_blocks.all_classes(SUMS, names, layout, block, counts, z_y)
    integers = {}
    z = lax.stop_gradient(block.wide_logits())
    if "prediction" in names:
        integers["prediction"] = jnp.argmax(z, -1).astype(jnp.int32)
    if "label_logit" in names:
        integers["label_logit"] = select_label(z, block.hit())
    if "rank" in names:
        integers["rank"] = jnp.sum(~(z <= z_y[..., None]), -1, dtype=jnp.int32)
        return None, integers
    real = tuple(name for name in names if name not in INTEGER_STATISTICS)
    return _dense(real, block, counts), integers


def _after_merge(whole: Partial, block: Block) -> Partial:
    return whole if whole.label_logit is None else with_others(whole, block.label, block.logits.shape[-1])


SUMS = class_blocks.Rule(
    _after_merge,
    lambda names, whole: whole,
    lambda block, whole, results, g: partial_gradient(block, whole, g),
    partial_distribution_gradient,
)


def _primal(names: tuple[str, ...], block: Block, counts: Array | None) -> Partial:
    return _after_merge(partial_statistics(names, block), block)


def _forward(names: tuple[str, ...], block: Block, counts: Array | None) -> Any:
    partial = _primal(names, dense.hide(block, counts), counts)
    return partial, (block, partial, counts)


def _backward(names: tuple[str, ...], residuals: Any, g: Partial) -> tuple[Block, None]:
    block, partial, counts = residuals
    block = dense.hide(block, counts)
    distribution = None if block.distribution is None else partial_distribution_gradient(block, partial, g)
    return dense.of_counting_rows(block, counts, partial_gradient(block, partial, g), distribution), None


_rule = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward)
_dense = with_forward_mode(_rule)
