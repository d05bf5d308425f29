"""KL and JS to a target of which a few classes are known: functions of one row's statistics, as softmax losses are.

With the classes of the target as the chosen ones, p is known of them and of all others together. Their mass is a sum of
its own, and the target's what is missing to 1; so this is the divergence of two distributions over K + 1 classes.
tests/test_sparse_divergences.py guards it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from . import _chosen as chosen
from ._block import Block
from ._contracts import Number
from ._devices import largest
from ._divergence_terms import expected, js, kl, log_ratio
from ._logits.linear import LinearLogits
from ._numerics import accumulation_dtype, nan_unless
from ._objective import objective, prepare
from ._rows import AxisName, Options
from ._sparse import EMPTY, SparseDistribution
from ._statistics import SoftmaxStatistics


def divergence_from_few(
    function: str,
    pair: tuple[Any, SparseDistribution],
    numbers: dict[str, Number],
    rest: str,
    options: Options,
) -> Array:
    """Divergences of `pair`, logits and a target, reduced. The temperature is that of the logits alone."""
    logits, target = pair
    temperature, beta = numbers["temperature"], numbers["beta"]
    if isinstance(logits, LinearLogits):
        logits = _with_temperature(logits, temperature)
    block, rows = prepare(function, logits, target, options, "target_logits")
    if not isinstance(logits, LinearLogits):
        if not isinstance(temperature, float):
            temperature = rows.split(jnp.broadcast_to(temperature, rows.shape))
        block = block._replace(logits=_divided(block, temperature, options.class_axis_name))
    assert isinstance(block.distribution, SparseDistribution)
    target, parts = each_once(block.distribution)
    block = block._replace(distribution=None, classes=target.classes)
    if isinstance(beta, float):
        return objective(lambda s, _, *q: _of_row(s, q, beta, rest), block, rows, (target.probs, parts))
    of_rows = target.probs, parts, jnp.broadcast_to(beta, rows.shape)
    return objective(lambda s, _, *q: _of_row(s, q[:2], q[2], rest), block, rows, of_rows)


def each_once(q: SparseDistribution) -> tuple[SparseDistribution, Array]:
    """Each class has its whole mass in the first of its slots; one without is left to the others. A NaN is in all.

    And the parts `[..., K]` of these masses, before sums of them were rounded.
    """
    first = chosen.is_first(q.classes)
    same = q.classes[..., None, :] == q.classes[..., :, None]
    total = jnp.sum(jnp.where(same, q.probs[..., None, :], 0), -1)
    ok = ~jnp.any(jnp.isnan(q.probs), -1)
    has_mass = (q.classes != EMPTY) & (total != 0)
    named = first & has_mass
    probs = jnp.where(named, total, 0) * nan_unless(ok)[..., None].astype(total.dtype)
    return SparseDistribution(jnp.where(named, q.classes, EMPTY), probs), jnp.where(has_mass, q.probs, 0)


def _with_temperature(layer: LinearLogits, temperature: Number) -> LinearLogits:
    own, rows = layer.temperature, layer.hidden.shape[:-1]
    if not isinstance(temperature, float):
        dtype = accumulation_dtype(temperature.dtype, layer.dtype)
        own, temperature = (jnp.broadcast_to(jnp.asarray(x, dtype), rows) for x in (own, temperature))
    return dataclasses.replace(layer, temperature=own * temperature)


def _divided(block: Block, temperature: Number, class_axis_name: AxisName) -> Array:
    """Logits over the temperature, less their largest first: a shift of all is gone before anything is rounded."""
    if isinstance(temperature, float) and temperature == 1:
        return block.logits
    z = block.wide_logits()
    top = lax.stop_gradient(largest(z))
    if class_axis_name is not None:
        top = lax.pmax(top, class_axis_name)
    top = jnp.where(top == -jnp.inf, 0, top)[..., None]
    if isinstance(temperature, float):
        return (z - top) / temperature
    on = z != -jnp.inf  # elsewhere the derivative by the temperature would be 0 * inf
    return jnp.where(on, (jnp.where(on, z, 0) - top) / temperature.astype(z.dtype)[..., None], -jnp.inf)


def _of_row(s: SoftmaxStatistics, target: tuple[Array, Array], beta: Number, rest: str) -> Array:
    log_p = s.class_log_probs
    q, parts = (x.astype(log_p.dtype) for x in target)
    if rest == "bucket":
        known = jnp.sum(q)
        # A little mass of the others is as exact as its parts are: multiples of 2^-20 add up without rounding.
        coarse = jnp.round(parts * 2**20) / 2**20
        left = (1 - jnp.sum(coarse)) - jnp.sum(parts - coarse)
        others = jnp.where(known < 1, jnp.maximum(left, 0), jnp.where(jnp.isnan(known), known, 0))
        # where all classes are named, the rest is a rounding
        rounding = (q.size + 1) * jnp.finfo(q.dtype).eps
        others = jnp.where((s.other_log_prob == -jnp.inf) & (others < rounding), 0, others)
        log_p, q = jnp.append(log_p, s.other_log_prob), jnp.append(q, others)
    known_of_all = rest == "bucket"
    if isinstance(beta, float) and 0 < beta < 1:
        return jnp.sum(js(log_p, q, beta, known_of_all))
    p, d = jnp.exp(log_p), log_ratio(log_p, q)
    divergence = kl if known_of_all else lambda p, q, d: expected(q, d)
    if isinstance(beta, float):
        return jnp.sum(divergence(p, q, d) if beta == 0 else divergence(q, p, -d))
    # the ends are no limits of what is between them
    forward, reverse, at_an_end = beta == 0, beta == 1, (beta == 0) | (beta == 1)
    between = jnp.sum(js(log_p, q, jnp.where(at_an_end, 0.5, beta), known_of_all))
    between = jnp.where(reverse, jnp.sum(divergence(q, p, -d)), between)
    return jnp.where(forward, jnp.sum(divergence(p, q, d)), between)
