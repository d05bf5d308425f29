"""The waist: row statistics of logits, how blocks of classes make them, and the one gradient formula.

Symbols, per row: z_j the logit of class j (-inf for a class that is not in force), m = max_j z_j,
e_j = exp(z_j - m), r = sum_j e_j - 1, T = 1 + r, p_j = e_j / T, y the label, t a target (weights over classes).

r is T without the one term that is exactly 1. That term is left out of the sum, not subtracted from it, so
log T = log1p(r) and 1 - p_j = ((1 - e_j) + r) / T have only terms >= 0: a loss of 1e-30 and its gradient come
out as precisely as a loss of 1.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._devices import lanes, largest
from ._numerics import exp_difference, limit, over_rows, product_or_zero, widen
from ._rows import keep, take_class


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxStatistics:
    """What a softmax loss may depend on, one value per row; see `jaxent.softmax_statistics`.

    Attributes:
      log_prob: log p_y of an integer label, or sum_j q_j log p_j of a distribution q. Nats, as all logs here.
      weighted_log_prob: the same with class weights w: w_y log p_y, or sum_j w_j q_j log p_j.
      mean_log_prob: (1/V) sum_j w_j log p_j over the V classes in force: what label smoothing needs.
      log_normalizer: log sum_j exp(z_j), the log-sum-exp.
      entropy: -sum_j p_j log p_j.
      prediction: int32, the class of the largest logit, the first of several.
      rank: int32, how many classes have a larger logit than the label: 0 is top-1, `rank < k` is top-k.

    `log_prob`, `weighted_log_prob` and `rank` are None without labels, `rank` also for distributions.
    """

    log_prob: Array | None = None
    weighted_log_prob: Array | None = None
    mean_log_prob: Array | None = None
    log_normalizer: Array | None = None
    entropy: Array | None = None
    prediction: Array | None = None
    rank: Array | None = None


STATISTICS = tuple(field.name for field in dataclasses.fields(SoftmaxStatistics))
INTEGER_STATISTICS = ("prediction", "rank")
TARGETS = ("log_prob", "weighted_log_prob", "mean_log_prob")  # sum_j t_j log p_j


def harmless(counts: Array | None, statistics: SoftmaxStatistics, classes: int) -> SoftmaxStatistics:
    """Those of equal logits in rows that do not count: something at which few functions are singular."""
    log_v = math.log(max(classes, 2))
    harmless = {"log_normalizer": log_v, "entropy": log_v, "prediction": 0, "rank": 0}
    kept = {
        name: keep(counts, x, harmless.get(name, -log_v))
        for name, x in vars(statistics).items()
        if x is not None
    }
    return SoftmaxStatistics(**kept)


class Block(NamedTuple):
    """Some or all classes of some rows: N rows `[...]`, B classes.

    `label` counts from the block's own first class, so that a label in another block hits no lane. A row's
    label that names no class in force is -1 everywhere: `poison`.
    """

    logits: Any  # [..., B], any float dtype; before any arithmetic maybe a LinearLogits
    label: Array | None = None  # int [...]
    distribution: Array | None = None  # [..., B]
    class_weights: Array | None = None  # [B]
    class_mask: Array | None = None  # bool [B] or [..., B]: the classes in force

    def wide_logits(self) -> Array:
        z = widen(self.logits)
        return z if self.class_mask is None else jnp.where(over_rows(self.class_mask, z.ndim), z, -jnp.inf)

    def hit(self) -> Array:
        """[..., B]: the label's lane. A comparison, not a gather or one-hot: it shards and fuses."""
        assert self.label is not None
        return lanes(self.logits, self.label.dtype) == self.label[..., None]

    def weights_of_classes(self, dtype: Any) -> Array:
        """[] or [1, ..., 1, B]."""
        if self.class_weights is None:
            return jnp.ones((), dtype)
        return over_rows(self.class_weights.astype(dtype), self.logits.ndim)

    def target(self, name: str, dtype: Any) -> Array | None:
        """t of a statistic that is sum_j t_j log p_j, unnormalized: [] or [..., B]; None for an integer label."""
        if name == "mean_log_prob":
            weights = self.weights_of_classes(dtype)
            return weights if self.class_mask is None else self.in_force(weights)
        q = self.distribution
        if q is None or name == "log_prob" or self.class_weights is None:
            return q
        return q * self.weights_of_classes(q.dtype)

    def in_force(self, x: Array) -> Array:
        """`x` `[..., B]`, 0 for a class that is not in force."""
        return x if self.class_mask is None else jnp.where(over_rows(self.class_mask, self.logits.ndim), x, 0)


class Moments(NamedTuple):
    """Of a target t: -sum_j t_j log p_j = deviation + mass * log1p(r), for t >= 0 a sum of terms >= 0."""

    deviation: Array  # sum_j t_j (m - z_j)
    mass: Array  # sum_j t_j


class Partial(NamedTuple):
    """Partial statistics of rows, over a block of classes; `merge` makes those of two blocks together.

    What is not needed is None. The identity of `merge`, which is also the partial of a block with no class in
    force, has m = -inf and r = -1: its T is 0.
    """

    m: Array
    r: Array
    spread: Array | None = None  # sum_j e_j (m - z_j): entropy = log1p(r) + spread / T
    label_logit: Array | None = None  # z_y, -inf where the label is in another block
    label_weight: Array | None = None  # w_y, 0 where the label is in another block
    targets: Any = None  # Moments by the name of their statistic, of those that are sum_j t_j log p_j
    classes: Array | None = None  # how many are in force


LabelLane = tuple[Array, Array] | None  # the label and z_y, if r may do with its digits
MaxAndRest = Callable[[Array, LabelLane], tuple[Array, Array]]


def detached_max(max_and_rest: MaxAndRest) -> MaxAndRest:
    """`max_and_rest(z, lane) -> (m, r)` with dm = 0, dr = sum_j e_j dz_j.

    m is only a shift: with T = sum_j exp(z_j - m) for any constant m, every statistic is the same. Derivatives
    are exact that way, also where classes tie for the maximum. (Second derivatives come here; first ones have
    their rule below.)
    """
    function = jax.custom_jvp(max_and_rest)

    @function.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        (z, lane), (dz, _) = primals, tangents
        m, r = function(z, lane)
        return (m, r), (jnp.zeros_like(m), jnp.sum(exp_difference(z, m[..., None]) * dz, -1))

    return function


@detached_max
def max_and_rest(z: Array, lane: LabelLane) -> tuple[Array, Array]:
    """m and r over the last axis."""
    m = largest(z)
    return m, jnp.where(m == -jnp.inf, -1, rest(z, m, lane))


def rest(z: Array, m: Array, lane: LabelLane) -> Array:
    """r where a class is in force.

    With the label's term left out of the sum, r = S + (e_y - 1), S = sum_{j != y} e_j. That is S where its logit
    is the largest; elsewhere S >= 1, and r has only the digits that log p_y needs. How many logits are the largest,
    which takes another sum over all devices, is then not asked.
    """
    finite_m = _finite(m)[..., None]
    if lane is None:
        left_out = z == m[..., None]
        e_left_out = jnp.sum(left_out, -1, dtype=z.dtype)
    else:
        label, z_y = lane
        left_out = lanes(z, label.dtype) == label[..., None]
        e_left_out = exp_difference(z_y, finite_m[..., 0])
    return jnp.sum(jnp.where(left_out, 0, exp_difference(z, finite_m)), -1) + (e_left_out - 1)


def select_label(z: Array, hit: Array) -> Array:
    """z_y over the last axis, -inf where the label hits no lane."""
    return jnp.max(jnp.where(hit, z, -jnp.inf), -1)


def partial_statistics(
    names: tuple[str, ...],
    block: Block,
    max_and_rest: MaxAndRest = max_and_rest,
    select_label: Callable[[Array, Block], Array] = lambda z, block: select_label(z, block.hit()),
) -> Partial:
    """The partial statistics that the statistics `names` need; other ways to find m, r and z_y may be given."""
    z = block.wide_logits()
    lane = label_logit = None
    of_label = ("log_prob", "weighted_log_prob", "label_logit")
    if block.label is not None and any(name in names for name in of_label):
        label_logit = select_label(z, block)
        if "entropy" not in names:  # which, of a row that is sure of another class, is as small as r
            lane = block.label, label_logit
    m, r = max_and_rest(z, lane)
    finite_m = _finite(m)[..., None]
    spread = label_weight = classes = None

    def moments(t: Array) -> Moments:
        t = t.astype(z.dtype)
        mass = jnp.sum(jnp.broadcast_to(t, z.shape), -1)
        # a class out of force is in no target, and a target of 0 asks nothing of a logit of -inf
        deviations = finite_m - z if t.ndim == 0 else product_or_zero(t, finite_m - z)
        return Moments(jnp.sum(deviations, -1), mass)

    if "entropy" in names:
        e = exp_difference(z, finite_m)
        spread = jnp.sum(product_or_zero(e, finite_m - z), -1)
    if label_logit is not None and "weighted_log_prob" in names and block.class_weights is not None:
        label_weight = take_class(block.class_weights, block.label)
    wanted = {name: block.target(name, z.dtype) for name in TARGETS if name in names}
    if "mean_log_prob" in names:
        classes = jnp.sum(block.in_force(jnp.ones_like(z)), -1)
    targets = {name: moments(t) for name, t in wanted.items() if t is not None}
    return Partial(m, r, spread, label_logit, label_weight, targets, classes)


def identity(like: Partial) -> Partial:
    """The partial statistics of no class at all, of the shapes and dtypes of `like`."""

    def fill(value: float, x: Any) -> Any:
        return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), x)

    return fill(0, like)._replace(
        m=fill(-jnp.inf, like.m), r=fill(-1, like.r), label_logit=fill(-jnp.inf, like.label_logit)
    )


def merge(a: Partial, b: Partial) -> Partial:
    """The partial statistics of two blocks together: associative, commutative, exact where one is empty.

    With m = max(m_a, m_b) each side's e_j shrink by s = exp(m_side - m). The side that holds m keeps its unit
    term out of the sum; the other side's unit term becomes an ordinary s.
    """
    m = jnp.maximum(a.m, b.m)
    a_holds = a.m >= b.m
    shrink = exp_difference(jnp.where(a_holds, b.m, a.m), jnp.where(m == -jnp.inf, 0, m))
    r_big, r_small = jnp.where(a_holds, a.r, b.r), jnp.where(a_holds, b.r, a.r)
    r = r_big + shrink * (1 + r_small)

    def shifted_spread(x: Partial) -> Array:
        scale = jnp.where(x.m == m, 1, shrink)
        return product_or_zero(scale, x.spread + product_or_zero(1 + x.r, m - x.m))

    def shifted(x: Partial) -> dict[str, Moments]:
        def of(t: Moments) -> Moments:
            return Moments(t.deviation + product_or_zero(t.mass, m - x.m), t.mass)

        return {name: of(t) for name, t in x.targets.items()}

    def both(combine: Callable[[Array, Array], Array], left: Any, right: Any) -> Any:
        return jax.tree.map(combine, left, right)

    return Partial(
        m=m,
        r=r,
        spread=None if a.spread is None else shifted_spread(a) + shifted_spread(b),
        label_logit=both(jnp.maximum, a.label_logit, b.label_logit),
        label_weight=both(jnp.add, a.label_weight, b.label_weight),
        targets=both(jnp.add, shifted(a), shifted(b)),
        classes=both(jnp.add, a.classes, b.classes),
    )


def poison(whole: Partial, label: Array | None) -> Partial:
    """Rows that have no answer get m = NaN, which makes their every statistic and gradient entry NaN.

    These are rows with a NaN or +inf logit, with no finite logit at all, with a label of -1, or with NaN in the
    distribution. (It also makes the gradient wait for all that reads the logits, so that it may overwrite them.)
    """
    ok = jnp.isfinite(whole.m)
    for moments in whole.targets.values():
        ok &= ~jnp.isnan(moments.deviation)
    if label is not None:
        ok &= label >= 0
    return whole._replace(m=jnp.where(ok, whole.m, jnp.nan))


def finish(names: tuple[str, ...], whole: Partial) -> dict[str, Array]:
    """The real-valued statistics `names` from partial statistics over all classes."""
    m, r = whole.m, whole.r
    log_t = jnp.log1p(r)

    found: dict[str, Array] = {}
    for name in names:
        if name in whole.targets:
            t = whole.targets[name]
            found[name] = -(t.deviation + product_or_zero(t.mass, log_t))
            if name == "mean_log_prob":
                found[name] /= whole.classes
        elif name == "log_normalizer":
            found[name] = m + log_t
        elif name == "entropy":
            found[name] = log_t + whole.spread / (1 + r)
        else:
            found[name] = -((m - whole.label_logit) + log_t)
            if name == "weighted_log_prob" and whole.label_weight is not None:
                found[name] = whole.label_weight * limit(whole.label_weight, found[name])
    # A select: XLA's CPU backend would have a sum over rows that follows include all this, one row after the other.
    return {name: jnp.where(jnp.isnan(m), jnp.nan, x) for name, x in found.items()}


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
        d entropy               / dz_j = -p_j (log p_j + entropy)

    A label of probability near 1 asks for 1 - p_j, which is taken as ((1 - e_j) + r) / T, never by subtraction;
    likewise t_j - p_j sum(t) = (t_j - sum(t)) + sum(t) (1 - p_j) at the largest logit.

    Linear in g, by construction: forward mode is its transpose.
    """
    z = block.wide_logits()
    m, r = whole.m[..., None], whole.r[..., None]
    if exponentials is not None:
        e, e_y = exponentials
    else:
        e = exp_difference(z, m)
        e_y = None if whole.label_logit is None else exp_difference(whole.label_logit, whole.m)[..., None]
    share = 1 / (1 + r)  # p = share e: what can be done per row is not done per class
    g = {name: x[..., None] for name, x in g.items()}
    found = []
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
            t, mass = block.target(name, z.dtype), whole.targets[name].mass[..., None]
            not_p = ((1 - e) + r) * share
            found.append(g[name] * jnp.where(z == m, (t - mass) + mass * not_p, t - mass * share * e))
    return sum(found[1:], start=found[0])


def distribution_gradient(block: Block, whole: Partial, g: dict[str, Array]) -> Array:
    """d/dq_j of a label distribution q: log p_j and w_j log p_j; 0 for a class that is not in force.

    It is also what a direction along q is multiplied with: 0 where q_j = 0 meets log p_j = -inf, or else a teacher that
    gives such a class no mass would be NaN in all classes.
    """
    log_p = (block.wide_logits() - whole.m[..., None]) - jnp.log1p(whole.r[..., None])
    log_p = limit(block.distribution, log_p)
    total = jnp.zeros_like(log_p)
    for name in ("log_prob", "weighted_log_prob"):
        if name in g:
            scale = (
                block.weights_of_classes(log_p.dtype)
                if name == "weighted_log_prob"
                else jnp.ones((), log_p.dtype)
            )
            total += g[name][..., None] * product_or_zero(scale, log_p)
    return block.in_force(total)


def _finite(m: Array) -> Array:
    return jnp.where(m == -jnp.inf, 0, m)
