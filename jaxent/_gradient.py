"""The one gradient rule of the row statistics, from their cotangents. Symbols as in `_statistics`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from . import _chosen as chosen
from ._block import Block
from ._numerics import exp_difference, product_or_zero
from ._sparse import SparseDistribution
from ._statistics import PHIS, Partial, finish


class Terms(NamedTuple):
    """What the exponentials of rows with integer labels are made of, where it is kept for the gradient."""

    kept: Array  # [..., V]: on a CPU exp(z - m) / factor, but at the label; elsewhere z
    factor: Array  # [...]
    e_y: Array  # [...]


class Exponentials(NamedTuple):
    e: Array  # [..., V]; of the label only where its entry of the gradient is one
    e_y: Array  # [..., 1]


def logits_gradient(
    block: Block, whole: Partial, g: dict[str, Array], exponentials: Exponentials | None = None
) -> Array:
    """d/dz_j of sum over the statistics of g * statistic, for the classes of a block: the gradient rule.

    With `exponentials` the logits are read for the entropy and for distributions only.

    Derivation. log p_j = z_j - m - log1p(r) and dp_k/dz_j = p_k (1[k = j] - p_j), so

        d log_normalizer        / dz_j = p_j
        d sum_k t_k log p_k     / dz_j = t_j - p_j sum_k t_k       t = onehot(y), q, w q, w/V
        d sum_k t_k phi(log p_k)/ dz_j = b_j - p_j sum_k b_k       b_k = t_k phi'(log p_k)
        d entropy               / dz_j = -p_j (log p_j + entropy)
        d log p_o               / dz_j = -p_j for a chosen class, else p_C exp(z_j) / sum_{k not in C} exp(z_k)

    A label of probability near 1 asks for 1 - p_j, which is taken as ((1 - e_j) + r) / T, never by subtraction;
    likewise t_j - p_j sum(t) = (t_j - sum(t)) + sum(t) (1 - p_j) at the largest logit: `centered`.

    Linear in g, by construction: forward mode is its transpose.
    """
    few = block.few()
    if few is None:
        return _of_block(block, whole, g, exponentials)
    # the formula takes classes one by one, so that of a few may be put into that of all others
    others = _of_block(block.without_few(), whole, g, exponentials)
    return chosen.put(others, few, _of_block(block.at(few), whole, g))


def _of_block(
    block: Block, whole: Partial, g: dict[str, Array], exponentials: Exponentials | None = None
) -> Array:
    z = block.wide_logits()
    m, r = whole.m[..., None], whole.r[..., None]
    if exponentials is not None:
        e, e_y = exponentials
    else:
        e = exp_difference(z, m)
        e_y = None if whole.label_logit is None else exp_difference(whole.label_logit, whole.m)[..., None]
    share = 1 / (1 + r)  # p = share e: what can be done per row is not done per class
    of_classes = g.get("class_log_probs")
    g = {name: x[..., None] for name, x in g.items() if name != "class_log_probs"}
    found = []

    def centered(t: Array, mass: Array, rest: Array | None = None) -> Array:
        """t_j - p_j sum(t); `rest` is sum(t) - t_j at the largest logit."""
        at_top = (t - mass if rest is None else -rest) + mass * (((1 - e) + r) * share)
        return jnp.where(z == m, at_top, t - (mass * share) * e)

    if "log_normalizer" in g:
        found.append((g["log_normalizer"] * share) * e)
    if "mean_log_prob" in g:
        per_class, mass = g["mean_log_prob"] / whole.classes[..., None], whole.targets["mean_log_prob"].mass
        found.append(per_class * block.target("mean_log_prob", z.dtype))
        found.append(-(per_class * mass[..., None] * share) * e)
    if "entropy" in g:
        log_p, entropy = (z - m) - jnp.log1p(r), finish(("entropy",), whole)["entropy"]
        found.append(-(g["entropy"] * share) * product_or_zero(e, log_p + entropy[..., None]))
    for name in ("log_prob", "weighted_log_prob"):
        if name in g and block.label is not None:
            scale = g[name]
            if name == "weighted_log_prob" and whole.label_weight is not None:
                scale = scale * whole.label_weight[..., None]
            found.append(-(scale * share) * jnp.where(block.hit(), -((1 - e_y) + r), e))
        elif name in g:
            t = block.target(name, z.dtype)
            t = _over_classes(block, t, block.of_target(t)[0])
            found.append(g[name] * centered(t, whole.targets[name].mass[..., None]))
    for name in PHIS:
        if name in g:
            scale = g[name] if name == "weighted_phi" else g[name] / whole.classes[..., None]
            t = block.target(name, z.dtype)
            mass, at = block.of_target(t)
            b = _over_classes(block, t, product_or_zero(mass, block.phi.slope(_log_p(at, whole))))
            found.append(scale * centered(b, whole.expected[name].slope[..., None]))
    if of_classes is not None:
        of_classes = jnp.where(whole.class_logits == -jnp.inf, 0, of_classes)  # an empty slot
        t = chosen.spread(of_classes, block.classes, block.class_numbers())
        mass = jnp.sum(of_classes, -1, keepdims=True)
        # sums without rounding where one class has most of p; else several may be the largest
        rest = jnp.sum(jnp.where(whole.class_logits == m, 0, of_classes), -1, keepdims=True)
        found.append(centered(t, mass, jnp.where(r < 1, rest, mass - t)))
    if "other_log_prob" in g:
        found.append(g["other_log_prob"] * _slope_of_others(block, whole, e * share))
    return sum(found[1:], start=found[0])


def _over_classes(block: Block, t: Any, values: Array) -> Array:
    """[] or [..., B]: `values`, those of the classes that a target is given for, over all classes."""
    if isinstance(t, SparseDistribution):
        return chosen.spread(values, t.classes, block.class_numbers())
    return values


def _log_p(z: Array, whole: Partial) -> Array:
    return (z - whole.m[..., None]) - jnp.log1p(whole.r[..., None])


def _slope_of_others(block: Block, whole: Partial, p: Array) -> Array:
    """Of the log of their mass, by each logit; 0 where there are none."""
    z, (these, others) = block.wide_logits(), whole.parts
    is_chosen = chosen.is_chosen(block.classes, block.class_numbers())
    none = others.m == -jnp.inf
    m_o, t_o = jnp.where(none, 0, others.m)[..., None], jnp.where(none, 1, 1 + others.r)[..., None]
    p_c = exp_difference(these.m, whole.m) * (1 + these.r) / (1 + whole.r)
    # a chosen class may lie far above: what is put over it must be finite, for forward mode multiplies it by 0
    among_others = exp_difference(jnp.where(z > m_o, m_o, z), m_o) / t_o
    return jnp.where(none[..., None], 0, jnp.where(is_chosen, -p, p_c[..., None] * among_others))


def distribution_gradient(block: Block, whole: Partial, g: dict[str, Array]) -> Array | SparseDistribution:
    """d/dq_j of a label distribution q: log p_j, w_j log p_j, w_j phi(log p_j); 0 for a class that is not in force.

    It is also what a direction along q is multiplied with: 0 where q_j = 0 meets log p_j = -inf, or else a teacher that
    gives such a class no mass would be NaN in all classes.
    """
    q, z, w = block.distribution, block.wide_logits(), block.weights_of_classes(whole.m.dtype)
    probs, at = block.of_target(q)
    if isinstance(q, SparseDistribution) and block.class_weights is not None:
        w = chosen.take(block.class_weights.astype(z.dtype), q.classes)
    log_p = _log_p(at, whole)
    off = (probs == 0) & jnp.isinf(log_p)
    total = jnp.zeros_like(log_p)
    for name, of in (("log_prob", None), ("weighted_log_prob", None), ("weighted_phi", block.phi)):
        if name in g:
            found = jnp.where(off, 0, log_p if of is None else of(log_p))
            total += g[name][..., None] * (found if name == "log_prob" else product_or_zero(w, found))
    if isinstance(q, SparseDistribution):
        return SparseDistribution(None, jnp.where(chosen.is_here(q.classes, z), total, 0))
    return block.in_force(total)


def phi_gradient(block: Block, whole: Partial, g: dict[str, Array]) -> Array:
    """By the number of phi, of each row: of the classes of a block."""
    z = block.wide_logits()
    total = jnp.zeros_like(whole.m)
    for name in PHIS:
        if name in g:
            t, at = block.of_target(block.target(name, z.dtype))
            found = jnp.sum(product_or_zero(t, block.phi.slope_of_number(_log_p(at, whole))), -1)
            total += g[name] * (found if name == "weighted_phi" else found / whole.classes)
    return total
