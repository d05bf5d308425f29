"""Logits that are an array `[..., V]`, with all classes in one place."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._block import Block
from .._derivatives import varying_like, with_forward_mode, zeros_like_any
from .._devices import explicit_sharding, largest, spread
from .._gradient import (
    Exponentials,
    Terms,
    distribution_gradient,
    logits_gradient,
    phi_gradient,
)
from .._numerics import accumulation_dtype, exp_difference
from .._rows import keep, keep_gradient
from .._sparse import SparseDistribution
from .._statistics import (
    INTEGER_STATISTICS,
    OF_CLASSES,
    PHIS,
    Expectation,
    LabelLane,
    Partial,
    SoftmaxStatistics,
    detached_max,
    expectations,
    finish,
    max_and_rest,
    partial_statistics,
    poison,
    record,
    rest,
    select_label,
    with_expectations,
)
from . import dense_on_cpu


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
    return record(found)


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


def expected(
    names: tuple[str, ...], block: Block, counts: Array | None, whole: Partial
) -> dict[str, Expectation]:
    """As `class_blocks.expected`."""
    return jax.checkpoint(functools.partial(expectations, names))(hide(block, counts), whole)


def slope(names: tuple[str, ...], block: Block, counts: Array | None, whole: Partial) -> dict[str, Array]:
    """As `class_blocks.slope`."""
    inputs = block, counts, whole
    return _slope(names, *varying_like(inputs, inputs))


def _primal(names: tuple[str, ...], block: Block, counts: Array | None) -> dict[str, Array]:
    return finish(names, _whole(names, block))


def _whole(names: tuple[str, ...], block: Block) -> Partial:
    partial = partial_statistics(names, block, platform_max_and_rest, platform_select_label)
    whole = poison(partial, block.label, block.classes)
    return with_expectations(whole, expectations(names, block, whole))


def _forward(names: tuple[str, ...], block: Block, counts: Array | None) -> tuple[dict[str, Array], Any]:
    if not _keeps_terms(names, block):
        whole = _whole(names, hide(block, counts))
        return finish(names, whole), (block, counts, whole, None)
    hidden = hide(block, counts)
    # r comes last, as it may overwrite the logits
    part = partial_statistics(names, hidden, _max_alone, _gather_label_on_cpu)
    whole = poison(part, block.label)
    r, terms = _rest_and_terms(hidden.wide_logits(), part.m, whole.m, block.label, part.label_logit)
    whole = whole._replace(r=r)
    return finish(names, whole), (block._replace(logits=None), counts, whole, terms)


def _backward(names: tuple[str, ...], residuals: Any, g: dict[str, Array]) -> tuple[Any, None]:
    block, counts, whole, terms = residuals
    exponentials = None
    if terms is not None:
        block = block._replace(logits=terms.kept)  # of which the shape is read
        exponentials = _exponentials(names, whole.m, block.label, terms)
    block = hide(block, counts)

    def of_counting_rows(x: Array) -> Array:
        # a select, so that NaN in a row that does not count stays there
        return x if counts is None else jnp.where(counts[..., None], x, 0)

    d_q, phi, d_phi = None, block.phi, None
    if block.distribution is not None:
        d_q = jax.tree.map(of_counting_rows, distribution_gradient(block, whole, g))
    if phi is not None and phi.per_row is not None:
        d_phi = dataclasses.replace(phi, per_row=keep(counts, phi_gradient(block, whole, g)))
    d_z = of_counting_rows(logits_gradient(block, whole, g, exponentials)).astype(block.logits.dtype)
    d_weights = None if block.class_weights is None else jnp.zeros_like(block.class_weights)
    return Block(d_z, None, d_q, d_weights, phi=d_phi), None


def hide(block: Block, counts: Array | None) -> Block:
    """`block`, whose rows that do not count have a derivative of 0."""
    q, z = block.distribution, keep_gradient(counts, block.logits)
    if isinstance(q, SparseDistribution):
        q = SparseDistribution(q.classes, keep_gradient(counts, q.probs))
    elif q is not None:
        q = keep_gradient(counts, q)
    return block._replace(logits=z, distribution=q)


_rule = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward)
_real_statistics = with_forward_mode(_rule)


def _zeros(names: tuple[str, ...], *inputs: Any) -> dict[str, Array]:
    return {name: zeros_like_any(inputs, x) for name, x in like_results(names, inputs[-1]).items()}


def like_results(names: tuple[str, ...], whole: Partial) -> dict[str, Array]:
    """Arrays of the shapes of the statistics `names`."""
    return {name: whole.class_logits if name == "class_log_probs" else whole.m for name in names}


# without symbolic zeros, which an eager shard_map does not take
_slope_rule = jax.custom_vjp(_zeros, nondiff_argnums=(0,))
_slope_rule.defvjp(lambda names, *x: (_zeros(names, *x), (*x, None)), lambda *x: (*_backward(*x), None))
_slope = with_forward_mode(_slope_rule)


# What XLA's CPU backend is fast at is apart, in dense_on_cpu. Elsewhere one fused pass is best; and where the class
# axis may be split, a group or gather along it would move the logits.


def _whole_on_one_device(*arrays: Any) -> bool:
    """And not on an explicit mesh, even of one: jax would ask of each gather there how its result is split."""
    return spread(arrays).possible == 1 and explicit_sharding(*arrays) is None


@detached_max
def platform_max_and_rest(z: Array, lane: LabelLane) -> tuple[Array, Array]:
    if not _whole_on_one_device(z) or z.shape[-1] > dense_on_cpu.MOST_CLASSES:
        return max_and_rest(z, lane)
    return lax.platform_dependent(z, lane, cpu=dense_on_cpu.max_and_rest, default=max_and_rest)


def platform_select_label(z: Array, block: Block) -> Array:
    if not _whole_on_one_device(z, block.label):
        return select_label(z, block.hit())

    return lax.platform_dependent(z, block.label, cpu=dense_on_cpu.select_label, default=_select_label)


def _gather_label_on_cpu(z: Array, block: Block) -> Array:
    how = {"cpu": dense_on_cpu.gather_label, "default": _select_label}
    return lax.platform_dependent(z, block.label, **how)


def _select_label(z: Array, label: Array) -> Array:
    return select_label(z, Block(z, label).hit())


def _keeps_terms(names: tuple[str, ...], block: Block) -> bool:
    """Whether a CPU keeps exponentials for the gradient, in place of the logits; elsewhere these are kept.

    A CPU is as slow at an exp as at memory, so they are not made twice. The array becomes the gradient.
    """
    z, of_label = block.logits, {"log_prob", "weighted_log_prob"} & set(names)
    return (
        block.label is not None
        and bool(of_label)
        and not {"entropy", *PHIS, *OF_CLASSES} & set(names)
        and z.dtype == accumulation_dtype(z.dtype)
        and z.shape[-1] <= dense_on_cpu.MOST_CLASSES
        and _whole_on_one_device(z, block.label)
    )


def _max_alone(z: Array, _: LabelLane) -> tuple[Array, Array]:
    m = lax.stop_gradient(largest(z))
    return m, jnp.zeros_like(m)


@jax.custom_jvp
def _rest_and_terms(z: Array, m: Array, poisoned_m: Array, label: Array, z_y: Array) -> tuple[Array, Terms]:
    """r, and what is kept. `poisoned_m`, m or NaN, is made of all that has been read of the logits."""

    def on_cpu(z: Array, m: Array, poisoned_m: Array, label: Array, z_y: Array) -> tuple[Array, Terms]:
        waiting_m = jnp.where(
            jnp.isnan(z_y), jnp.nan, poisoned_m
        )  # for them, so that they may be overwritten
        return dense_on_cpu.rest_and_terms(z, waiting_m, label, z_y)

    def elsewhere(z: Array, m: Array, poisoned_m: Array, label: Array, z_y: Array) -> tuple[Array, Terms]:
        return rest(z, m, (label, z_y)), Terms(z, jnp.ones_like(m), exp_difference(z_y, m))

    return lax.platform_dependent(z, m, poisoned_m, label, z_y, cpu=on_cpu, default=elsewhere)


@_rest_and_terms.defjvp
def _(primals: Any, tangents: Any) -> Any:
    """As `detached_max`."""
    z, m, *_ = primals
    dz, *_, dz_y = tangents
    r, terms = _rest_and_terms(*primals)
    kept = lax.platform_dependent(terms.kept, dz, cpu=jnp.multiply, default=lambda _, dz: dz)
    dr = jnp.sum(exp_difference(z, m[..., None]) * dz, -1)
    return (r, terms), (dr, Terms(kept, jnp.zeros_like(m), terms.e_y * dz_y))


def _exponentials(names: tuple[str, ...], m: Array, label: Array, terms: Terms) -> Exponentials:
    e_y = terms.e_y[..., None]

    def on_cpu(_: Array, label: Array, terms: Terms) -> Array:
        e = dense_on_cpu.exponentials(terms)
        if {"log_normalizer", "mean_log_prob"} & set(names):  # the label's entry of log p_y is no exponential
            e = jnp.where(Block(e, label).hit(), terms.e_y[..., None], e)
        return e

    def elsewhere(m: Array, _: Array, terms: Terms) -> Array:
        return exp_difference(terms.kept, m[..., None])

    return Exponentials(lax.platform_dependent(m, label, terms, cpu=on_cpu, default=elsewhere), e_y)
