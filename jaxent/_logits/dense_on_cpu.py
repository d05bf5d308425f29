"""m, r and z_y of logits that are an array, in the operations that XLA's CPU backend is fast at.

It hands a reduction to its fast library where all that feeds it is plain float arithmetic; one comparison or select,
and it writes out an N x V array, or goes lane by lane. So the one lane whose term is left out of a sum is left out
by arithmetic, and each exponential is one subtraction and one exp, from an anchor where that subtraction is exact.
tests/test_dense_on_cpu.py guards it; benchmarks/dense.py measures it.
"""

import functools
import math

import jax.numpy as jnp
from jax import Array, lax

from .._devices import is_known, lanes
from .._gradient import Terms
from .._numerics import exp_difference
from .._statistics import LabelLane

FEW_CLASSES = 16  # which are done one by one, in one loop over the rows
MANY_CLASSES = 4096  # whose sums are taken in groups
SMALL = 2**25  # bytes: logits of which it does not matter whether there is a second array as large
MOST_CLASSES = 2**24  # that float32 can count
# By bytes of the dtype: how far below the maximum an anchor may lie, and a power of two above all exponentials from it,
# of which MOST_CLASSES times as much is finite.
REACH = {4: 70, 8: 690}
BEYOND = {4: 2.0**103, 8: 2.0**999}


def anchor(m: Array) -> Array:
    """c such that z - c has no rounding error that matters, for all z that matter (in float32): m - 86 < z <= m.

    exp(z - m) = exp(z - c) exp(c - m). The second difference is exact, and one per row. So is the first: c = 0 leaves
    z as it is. A whole number c has no digits that z lacks, so where |z - c| <= |z| it is exact: for m <= 0 with c the
    next number towards 0, as z <= m <= c; for m > 70 with c = m - 70 or less, where z >= c. What lies below that c is
    within 16 of it, and so off by 2^-21 at most; where m > 172, z is above m / 2, and any c near it will do.
    """
    reach = jnp.where(m < 2.0**24, REACH[m.dtype.itemsize], 0)  # beyond, m - 70 might be rounded to m - 128
    c = jnp.trunc(jnp.minimum(m, jnp.maximum(m - reach, 0)))
    return jnp.where(jnp.isfinite(m), c, 0)


def max_and_rest(z: Array, lane: LabelLane) -> tuple[Array, Array]:
    """As `_statistics.max_and_rest`."""
    classes = z.shape[-1]
    if classes <= FEW_CLASSES:
        m, r = _of_few(z, lane)
    elif (size := group_size(classes)) is not None:
        m, r = _by_groups(size, z, lane)
    else:
        m, r = _of_some(z, lane)
    return m, jnp.where(m == -jnp.inf, -1, r)


def rest_and_terms(z: Array, m: Array, label: Array, z_y: Array) -> tuple[Array, Terms]:
    """r, and what a gradient is made of that soon follows."""
    c = anchor(m)
    e = jnp.exp(z - c[..., None])
    if z.shape[-1] <= FEW_CLASSES:
        e = jnp.where(_hit(z, label), 0, e)
        others = jnp.sum(e, -1)
    elif is_known(z.size) and z.size * z.dtype.itemsize <= SMALL:
        e = e.at[_at(label, z)].set(0, mode="promise_in_bounds", unique_indices=True)
        others = jnp.sum(e, -1)
    else:  # XLA does not put a result in the place of its operand if a scatter follows
        others = _sum_without(label, e)
    terms = Terms(e, jnp.exp(c - m), exp_difference(z_y, m))
    return _rest(m, others, terms.factor, terms.e_y), terms


def exponentials(terms: Terms) -> Array:
    """exp(z - m) of all classes but the label."""
    return terms.factor[..., None] * terms.kept


def select_label(z: Array, label: Array) -> Array:
    """As `_statistics.select_label`."""
    if z.shape[-1] > FEW_CLASSES:
        return gather_label(z, label)
    found = z[..., 0]
    for j in range(1, z.shape[-1]):
        found = jnp.where(label == j, z[..., j], found)
    return _in_range(label, z, found)


def gather_label(z: Array, label: Array) -> Array:
    """As `_statistics.select_label`."""
    found = z.at[_at(label, z)].get(mode="promise_in_bounds")
    return _in_range(label, z, found)


def _in_range(label: Array, z: Array, found: Array) -> Array:
    return jnp.where((label >= 0) & (label < z.shape[-1]), found, -jnp.inf)


def _hit(z: Array, label: Array) -> Array:
    return lanes(z, label.dtype) == label[..., None]


def _at(label: Array, z: Array) -> tuple[Array, ...]:
    """Where the label's logit is in `z`."""
    rows = (lax.broadcasted_iota(jnp.int32, label.shape, axis) for axis in range(label.ndim))
    return *rows, jnp.clip(label, 0, z.shape[-1] - 1)


def _rest(m: Array, others: Array, factor: Array, e_k: Array) -> Array:
    """r, of the sum over all classes but k of the exponentials from the anchor."""
    # The select changes nothing, but ends what the library takes: it does rows one after the other.
    return jnp.where(jnp.isfinite(m), others, jnp.nan) * factor + (e_k - 1)


def _of_few(z: Array, lane: LabelLane) -> tuple[Array, Array]:
    columns = [z[..., j] for j in range(z.shape[-1])]
    m = functools.reduce(jnp.maximum, columns)
    c = anchor(m)
    if lane is None:
        k = jnp.zeros(m.shape, jnp.int32)
        for j, column in enumerate(columns):
            k = jnp.where(column == m, j, k)
        lane = k, m
    k, z_k = lane
    terms = [jnp.where(k == j, 0, jnp.exp(column - c)) for j, column in enumerate(columns)]
    return m, _rest(m, functools.reduce(jnp.add, terms), jnp.exp(c - m), exp_difference(z_k, m))


def _of_some(z: Array, lane: LabelLane) -> tuple[Array, Array]:
    m = jnp.max(z, -1)
    c = anchor(m)
    k, z_k = lane or (_where_largest(z, m), m)
    return m, _rest(m, _sum_without(k, jnp.exp(z - c[..., None])), jnp.exp(c - m), exp_difference(z_k, m))


def _by_groups(size: int, z: Array, lane: LabelLane) -> tuple[Array, Array]:
    """Only the group that holds the lane is looked at again without it."""
    groups = z.reshape(*z.shape[:-1], z.shape[-1] // size, size)
    tops = jnp.max(groups, -1)  # [..., G]
    top = jnp.argmax(tops, -1)
    # the maximum of maxima XLA would take from the logits once more; of bfloat16 ones from another copy in float32
    m = jnp.take_along_axis(tops, top[..., None], -1)[..., 0]
    c = anchor(m)
    g = top if lane is None else jnp.clip(lane[0] // size, 0, tops.shape[-1] - 1)
    its = jnp.take_along_axis(groups, g[..., None, None], -2)[..., 0, :]
    k, z_k = (jnp.argmax(its, -1), m) if lane is None else (lane[0] - g * size, lane[1])
    sums = jnp.sum(jnp.exp(groups - c[..., None, None]), -1)
    # by a select: two sums, one of the other, the library takes in twice the time
    others = jnp.sum(jnp.where(_hit(sums, g), 0, sums), -1) + _sum_without(k, jnp.exp(its - c[..., None]))
    return m, _rest(m, others, jnp.exp(c - m), exp_difference(z_k, m))


def _sum_without(k: Array, terms: Array) -> Array:
    """The sum over the last axis of `terms`, all in [0, BEYOND), without number k: |j - k| BEYOND is 0 or more.

    The library's minimum gives its second argument where that is NaN.
    """
    beyond = BEYOND[terms.dtype.itemsize]
    j = lax.broadcasted_iota(terms.dtype, terms.shape, terms.ndim - 1) * beyond
    return jnp.sum(jnp.minimum(jnp.abs(j - (k.astype(terms.dtype) * beyond)[..., None]), terms), -1)


def _where_largest(z: Array, m: Array) -> Array:
    """A class of the largest logit: anywhere else (z - m) times 1e68, at least -1e30, outweighs the class's own.

    Bounded twice, so that nothing is infinite, and that XLA does not multiply the two factors.
    """
    below = jnp.maximum(jnp.maximum(z - m[..., None], -1) * 1e38, -1) * 1e30
    return jnp.max(lanes(z, z.dtype) + below, -1)


@functools.cache
def group_size(classes: int) -> int | None:
    """The divisor of `classes` nearest to sqrt(classes); None where there is none, or too few classes."""
    if classes < MANY_CLASSES:
        return None
    divisors = [d for d in range(16, classes // 8 + 1) if classes % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d * d / classes)), default=None)
