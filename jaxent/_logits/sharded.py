"""Statistics from partial ones: of classes in blocks, and of a class axis that is split over devices.

Symbols as in `_statistics`. Each device sums over its own classes; one maximum, and one sum of a few numbers per row,
make of that the partial statistics of all classes. They are plain code, of which jax knows the transposes in each kind
of mapping. Which device holds the largest logit, the term that is left out of r, would have to be agreed on: several
may. The label, though, is on one device. So with integer labels its term is left out instead,

    S = sum_{j != y} e_j        r = S + (e_y - 1)

which is S where the label's logit is the largest, and else S >= 1: nothing cancels. Without integer labels, and for the
entropy, which is as small as r in a row that is sure of another class, it is counted how many devices hold the largest.

The gradient is the one formula, for the classes of a device. It is the derivative of a function that is 0 (`slope`) of
these classes and of what is known of all; the latter has no part in it, but keeps its own derivative for second ones.
tests/devices/test_split_classes.py and test_collectives.py guard it.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import with_slope
from .._numerics import exp_difference, limit, product_or_zero
from .._rows import AxisName
from .._statistics import (
    INTEGER_STATISTICS,
    Block,
    Moments,
    Partial,
    SoftmaxStatistics,
    finish,
    poison,
)
from . import class_blocks, dense
from .layout import ClassLayout


def statistics(
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    axis_name: AxisName,
    layout: ClassLayout | None = None,
) -> SoftmaxStatistics:
    """The statistics `names` of rows over the classes of all devices along `axis_name`, or of this one if it is None.

    `block` has this device's classes, but the label counts over all of them. Linear logits have a `layout`.
    """
    partials: Any = dense.partials
    slope: Any = dense.slope
    if layout is not None:
        partials = functools.partial(class_blocks.partials, layout)
        slope = functools.partial(class_blocks.slope, layout)
    label, classes, first = block.label, block.logits.shape[-1], 0
    if axis_name is not None:
        first, classes = lax.axis_index(axis_name) * classes, classes * lax.axis_size(axis_name)
        if label is not None:
            block = block._replace(label=jnp.where(label < 0, -1, label - first))
    real = tuple(name for name in names if name not in INTEGER_STATISTICS)

    # the rank takes a second pass: it compares all logits with the label's, to the last bit that of its block
    first_pass = tuple("label_logit" if name == "rank" else name for name in names)
    partial, found = partials(first_pass, block, counts)
    if "rank" in names:
        z_y = lax.stop_gradient(partial.label_logit)
        z_y = z_y if axis_name is None else lax.pmax(z_y, axis_name)
        above = partials(("rank",), lax.stop_gradient(block), counts, z_y)[1]["rank"]
        above = above if axis_name is None else lax.psum(above, axis_name)
        found["rank"] = jnp.where(label >= 0, above, classes)
    if "prediction" in names and axis_name is not None:
        found["prediction"] = _first_of_all(partial.m, found["prediction"] + first, axis_name)

    whole = poison(partial if axis_name is None else _of_all_devices(real, partial, block, axis_name), label)
    zeros = slope(real, block, counts, whole)
    zeros = zeros if axis_name is None else lax.psum(zeros, axis_name)
    return SoftmaxStatistics(**found, **with_slope(finish(real, whole), zeros))


def _first_of_all(m: Array, prediction: Array, axis_name: AxisName) -> Array:
    # a NaN is the largest, as in argmax; over devices a maximum may lose it
    m = lax.stop_gradient(jnp.where(jnp.isnan(m), jnp.inf, m))
    holds = m == lax.pmax(m, axis_name)
    return lax.pmin(jnp.where(holds, prediction, jnp.iinfo(jnp.int32).max), axis_name)


def _of_all_devices(names: tuple[str, ...], partial: Partial, block: Block, axis_name: AxisName) -> Partial:
    """The partial statistics over all classes: one collective after the maximum, of all sums together."""
    m_here = lax.stop_gradient(partial.m)
    m = lax.pmax(m_here, axis_name)
    scale, behind = exp_difference(m_here, m), m - m_here

    def moved(t: Moments) -> Moments:
        # a device may have none of the mass, and yet its mass has a derivative
        return Moments(t.deviation + t.mass * limit(t.mass, behind), t.mass)

    # 0 * inf = 0: a device with no class in force
    terms = product_or_zero(scale, 1 + partial.r)
    sums: dict[str, Any] = {
        "targets": {name: moved(t) for name, t in partial.targets.items()},
        "classes": partial.classes,
        "label_weight": partial.label_weight,
    }
    if partial.spread is not None:
        sums["spread"] = product_or_zero(scale, partial.spread + product_or_zero(1 + partial.r, behind))
    here = None
    if partial.label_logit is not None:
        here = (block.label >= 0) & (block.label < block.logits.shape[-1])
        sums["label_logit"] = jnp.where(here, partial.label_logit, 0)
    if partial.label_logit is not None and "entropy" not in names:
        e_y = exp_difference(partial.label_logit, jnp.where(m_here == -jnp.inf, 0, m_here))
        others = product_or_zero(scale, (1 - e_y) + partial.r)
        sums["others"] = jnp.where(here, others, terms)
    else:
        holds = m_here == m
        sums |= {"rest": jnp.where(holds, partial.r, terms), "holders": holds.astype(m.dtype)}
    sums = lax.psum({name: x for name, x in sums.items() if x is not None}, axis_name)
    if "others" in sums:
        r = sums.pop("others") + (exp_difference(sums["label_logit"], m) - 1)
    else:
        r = sums.pop("rest") + (sums.pop("holders") - 1)
    return Partial(m=m, r=r, **sums)
