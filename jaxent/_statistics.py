"""The waist: row statistics of logits, and how blocks of classes make them. Their gradient is in `_gradient`.

Symbols, per row: z_j the logit of class j (-inf for a class that is not in force), m = max_j z_j,
e_j = exp(z_j - m), r = sum_j e_j - 1, T = 1 + r, p_j = e_j / T, y the label, t a target (weights over classes).

r is T without the one term that is exactly 1. That term is left out of the sum, not subtracted from it, so
log T = log1p(r) and 1 - p_j = ((1 - e_j) + r) / T have only terms >= 0: a loss of 1e-30 and its gradient come
out as precisely as a loss of 1.

The mass of all classes but some chosen ones, C, is a sum that leaves these out. With (m, r) of both parts, o and C, and
x = T_C / T_o, log p_o = -log1p(x), and no 1 - p_C: `other_log_prob`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import _chosen as chosen
from ._block import Block
from ._devices import lanes, largest
from ._numerics import exp_difference, finite_or_0, limit, product_or_zero
from ._others import max_and_rest_of_others, without
from ._rows import keep, take_class
from ._sparse import BAD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxStatistics:
    """What a softmax loss may depend on, one value per row; see `jaxent.softmax_statistics`.

    Logs are in nats, float32 (float64 for float64 logits). What was not asked for is None: `log_prob`,
    `weighted_log_prob` and `rank` without labels, `rank` also for distributions; the last two without `classes`.

    Attributes:
      log_prob: `[...]`, log p_y of an integer label, or sum_j q_j log p_j of a distribution q.
      weighted_log_prob: `[...]`, the same with class weights w: w_y log p_y, or sum_j w_j q_j log p_j.
      mean_log_prob: `[...]`, (1/V) sum_j w_j log p_j over the V classes in force: what label smoothing needs.
      log_normalizer: `[...]`, log sum_j exp(z_j), the log-sum-exp.
      entropy: `[...]`, -sum_j p_j log p_j.
      prediction: int32 `[...]`, the class of the largest logit, the first of several.
      rank: int32 `[...]`, how many classes have a larger logit than the label: 0 is top-1, `rank < k` is top-k.
      class_log_probs: `[..., K]`, log p_c of the chosen `classes`; -inf in an empty slot.
      other_log_prob: `[...]`, log of the mass of all classes that are not chosen: a sum without these, never 1 - sum.
    """

    log_prob: Array | None = None
    weighted_log_prob: Array | None = None
    mean_log_prob: Array | None = None
    log_normalizer: Array | None = None
    entropy: Array | None = None
    prediction: Array | None = None
    rank: Array | None = None
    class_log_probs: Array | None = None
    other_log_prob: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhiStatistics(SoftmaxStatistics):
    """Those of a loss that has a `Phi`: two more, with phi(log p_j) in place of log p_j."""

    weighted_phi: Array | None = None
    mean_phi: Array | None = None


STATISTICS = tuple(field.name for field in dataclasses.fields(PhiStatistics))
INTEGER_STATISTICS = ("prediction", "rank")
TARGETS = ("log_prob", "weighted_log_prob", "mean_log_prob")  # sum_j t_j log p_j
PHIS = ("weighted_phi", "mean_phi")  # sum_j t_j phi(log p_j)
OF_CLASSES = ("class_log_probs", "other_log_prob")


def harmless(counts: Array | None, statistics: SoftmaxStatistics, classes: int) -> SoftmaxStatistics:
    """Those of equal logits in rows that do not count: something at which few functions are singular."""
    log_v = math.log(max(classes, 2))
    harmless = {"log_normalizer": log_v, "entropy": log_v, "prediction": 0, "rank": 0}
    kept = {
        name: keep(counts, x, harmless.get(name, -log_v))
        for name, x in vars(statistics).items()
        if x is not None
    }
    return record(kept)


def record(fields: dict[str, Array]) -> SoftmaxStatistics:
    return (PhiStatistics if any(name in fields for name in PHIS) else SoftmaxStatistics)(**fields)


class Moments(NamedTuple):
    """Of a target t: -sum_j t_j log p_j = deviation + mass * log1p(r), for t >= 0 a sum of terms >= 0."""

    deviation: Array  # sum_j t_j (m - z_j)
    mass: Array  # sum_j t_j


class Sums(NamedTuple):
    """m and r of some of the classes."""

    m: Array
    r: Array


class Expectation(NamedTuple):
    """Of phi under a target t; the second is what its gradient needs. Made when m and r are known of all classes."""

    value: Array  # sum_j t_j phi(log p_j)
    slope: Array  # sum_j t_j phi'(log p_j)


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
    class_logits: Array | None = None  # [..., K] of the chosen classes, -inf where they are in another block
    parts: Any = None  # two Sums: of the chosen classes, each once, and of the others
    expected: Any = None  # Expectation by the name of its statistic


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
        return (m, r), (jnp.zeros_like(m), jnp.sum(exp_difference(z, finite_or_0(m)[..., None]) * dz, -1))

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
    finite_m = finite_or_0(m)[..., None]
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
    class_logits = parts = spread = label_weight = classes = None
    if block.classes is not None and any(name in names for name in OF_CLASSES):
        class_logits = block.logits_at(block.classes)
    if "other_log_prob" in names:
        over_classes = max_and_rest if any(name not in OF_CLASSES for name in names) else None
        parts, (m, r) = _in_two_parts(block, class_logits, over_classes)
    else:
        m, r = max_and_rest(z, lane)
    finite_m = finite_or_0(m)[..., None]

    def moments(t: Any) -> Moments:
        mass, at = block.of_target(t)
        mass = mass.astype(z.dtype)
        # a class out of force is in no target, and a target of 0 asks nothing of a logit of -inf
        deviations = finite_m - at if mass.ndim == 0 else product_or_zero(mass, finite_m - at)
        mass = jnp.sum(jnp.broadcast_to(mass, at.shape), -1)
        return Moments(jnp.sum(deviations, -1), mass)

    if "entropy" in names:
        e = exp_difference(z, finite_m)
        spread = jnp.sum(product_or_zero(e, finite_m - z), -1)
    if label_logit is not None and "weighted_log_prob" in names and block.class_weights is not None:
        label_weight = take_class(block.class_weights, block.label)
    wanted = {name: block.target(name, z.dtype) for name in TARGETS if name in names}
    if "mean_log_prob" in names or "mean_phi" in names:
        classes = jnp.sum(block.in_force(jnp.ones_like(z)), -1)
    targets = {name: moments(t) for name, t in wanted.items() if t is not None}
    return Partial(m, r, spread, label_logit, label_weight, targets, classes, class_logits, parts)


def _in_two_parts(
    block: Block, class_logits: Array, over_classes: MaxAndRest | None
) -> tuple[tuple[Sums, Sums], Sums]:
    """The sums of the chosen classes, of which none counts twice, and of the others; and of all.

    Without `over_classes` r is T - 1: the statistics of chosen classes ask for no small r of the others.
    """
    classes = block.classes
    if over_classes is not None:
        found = over_classes(without(block, classes), None)
    else:
        found = max_and_rest_of_others(Block(block.logits, class_mask=block.class_mask), classes)
    others = Sums(*found)
    these = Sums(jnp.full_like(others.m, -jnp.inf), jnp.full_like(others.r, -1))
    if classes.shape[-1]:
        once = jnp.where(chosen.is_first(classes), class_logits, -jnp.inf)
        these = Sums(*max_and_rest(once, None))
    return (these, others), _merged(these, others)[0]


def identity(like: Partial) -> Partial:
    """The partial statistics of no class at all, of the shapes and dtypes of `like`."""

    def fill(value: float, x: Any) -> Any:
        return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), x)

    def nothing(x: Partial | Sums) -> Any:
        return x._replace(m=fill(-jnp.inf, x.m), r=fill(-1, x.r))

    parts = like.parts and (nothing(like.parts[0]), nothing(like.parts[1]))
    logits = {name: fill(-jnp.inf, getattr(like, name)) for name in ("label_logit", "class_logits")}
    return nothing(fill(0, like))._replace(parts=parts, **logits)


def merge(a: Partial, b: Partial) -> Partial:
    """The partial statistics of two blocks together: associative, commutative, exact where one is empty."""
    (m, r), shrink = _merged(Sums(a.m, a.r), Sums(b.m, b.r))

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
        class_logits=both(jnp.maximum, a.class_logits, b.class_logits),
        parts=a.parts and tuple(_merged(x, y)[0] for x, y in zip(a.parts, b.parts, strict=True)),
    )


def _merged(a: Sums, b: Sums) -> tuple[Sums, Array]:
    """The sums of both, and the factor by which those of the side that does not hold m shrink.

    With m = max(m_a, m_b) each side's e_j shrink by s = exp(m_side - m). The side that holds m keeps its unit
    term out of the sum; the other side's unit term becomes an ordinary s.
    """
    m = jnp.maximum(a.m, b.m)
    a_holds = a.m >= b.m
    shrink = exp_difference(jnp.where(a_holds, b.m, a.m), finite_or_0(m))
    r_big, r_small = jnp.where(a_holds, a.r, b.r), jnp.where(a_holds, b.r, a.r)
    return Sums(m, r_big + shrink * (1 + r_small)), shrink


def poison(whole: Partial, label: Array | None, classes: Array | None = None) -> Partial:
    """Rows that have no answer get m = NaN, which makes their every statistic and gradient entry NaN.

    These are rows with a NaN or +inf logit, with no finite logit at all, with a label of -1, with a chosen class that
    is BAD, or with NaN in the distribution. `label` and `classes` count over all classes. (It also makes the gradient
    wait for all that reads the logits, so that it may overwrite them.)
    """
    ok = jnp.isfinite(whole.m)
    for moments in whole.targets.values():
        ok &= ~jnp.isnan(moments.deviation)
    if label is not None:
        ok &= label >= 0
    if classes is not None:
        ok &= jnp.all(classes != BAD, -1)
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
        elif name in PHIS:
            found[name] = whole.expected[name].value
            if name == "mean_phi":
                found[name] /= whole.classes
        elif name == "class_log_probs":
            found[name] = -((m[..., None] - whole.class_logits) + log_t[..., None])
        elif name == "other_log_prob":
            found[name] = _log_share(*whole.parts)
        elif name == "log_normalizer":
            found[name] = m + log_t
        elif name == "entropy":
            found[name] = log_t + whole.spread / (1 + r)
        else:
            found[name] = -((m - whole.label_logit) + log_t)
            if name == "weighted_log_prob" and whole.label_weight is not None:
                found[name] = whole.label_weight * limit(whole.label_weight, found[name])
    bad = jnp.isnan(m)
    # A select: XLA's CPU backend would have a sum over rows that follows include all this, one row after the other.
    return {
        name: jnp.where(bad if x.ndim == bad.ndim else bad[..., None], jnp.nan, x)
        for name, x in found.items()
    }


def with_expectations(whole: Partial, expected: dict[str, Expectation]) -> Partial:
    """`whole`, poisoned where the distribution has a NaN, of which there may be no other statistic."""
    m = whole.m
    for found in expected.values():
        m = jnp.where(jnp.isnan(found.value), jnp.nan, m)
    return whole._replace(m=m, expected=expected)


def _log_share(these: Sums, others: Sums) -> Array:
    """log(T_o / (T_C + T_o)), as exact where it is -1e-20 as where it is -70."""
    small, large = jnp.minimum(these.m, others.m), jnp.maximum(these.m, others.m)
    shrink = exp_difference(small, finite_or_0(large))
    up = these.m > others.m
    t_small, t_large = (1 + jnp.where(up, a, b) for a, b in ((others.r, these.r), (these.r, others.r)))
    ratio = shrink * t_small / t_large  # T_o / T_C where the largest logit is one of C, else T_C / T_o
    is_share_small = up & (ratio < 1)
    x = jnp.where(up & ~is_share_small, 1 / jnp.where(is_share_small | ~up, 1, ratio), ratio)
    # log(ratio), which may be 0 in float32; of a part without a class it is -inf, and has no derivative
    tiny, some = ratio < 1e-6, t_small > 0
    log_ratio = jnp.where(
        tiny,
        (small - large) + jnp.log(jnp.where(some, t_small / t_large, 1)),
        jnp.log(jnp.where(tiny, 1, ratio)),
    )
    log_ratio = jnp.where(some, log_ratio, -jnp.inf)
    return jnp.where(is_share_small, log_ratio, 0) - jnp.log1p(x)


def expectations(names: tuple[str, ...], block: Block, whole: Partial) -> dict[str, Expectation]:
    """Of the classes of a block, with m and r of all classes."""
    z, phi, found = block.wide_logits(), block.phi, {}
    m, log_t = whole.m[..., None], jnp.log1p(whole.r)[..., None]
    for name in PHIS:
        if name in names:
            t, at = block.of_target(block.target(name, z.dtype))
            log_p = (at - m) - log_t
            value, slope = (jnp.sum(product_or_zero(t, of(log_p)), -1) for of in (phi, phi.slope))
            found[name] = Expectation(value, slope)
    return found
