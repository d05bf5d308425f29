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

from .._block import Block
from .._chosen import is_here
from .._derivatives import with_slope
from .._numerics import exp_difference, limit, product_or_zero
from .._rows import AxisName
from .._statistics import (
    INTEGER_STATISTICS,
    PHIS,
    Moments,
    Partial,
    SoftmaxStatistics,
    Sums,
    finish,
    poison,
    record,
    with_expectations,
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
    source: Any = (dense.partials, dense.expected, dense.slope)
    if layout is not None:
        source = (class_blocks.partials, class_blocks.expected, class_blocks.slope)
        source = (functools.partial(f, layout) for f in source)
    partials, expected, slope = source
    label, chosen, classes, first = block.label, block.classes, block.logits.shape[-1], 0
    if axis_name is not None:
        first, classes = lax.axis_index(axis_name) * classes, classes * lax.axis_size(axis_name)
        block = block.with_classes(lambda x: jnp.where(x < 0, -1, x - first))
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

    if axis_name is not None:
        partial = _of_all_devices(real, partial, block, axis_name)
    whole = poison(partial, label, chosen)
    if any(name in names for name in PHIS):
        sums = expected(real, block, counts, whole)
        whole = with_expectations(whole, sums if axis_name is None else lax.psum(sums, axis_name))
    zeros = slope(real, block, counts, whole)
    zeros = zeros if axis_name is None else lax.psum(zeros, axis_name)
    return record(found | with_slope(finish(real, whole), zeros))


def _first_of_all(m: Array, prediction: Array, axis_name: AxisName) -> Array:
    # a NaN is the largest, as in argmax; over devices a maximum may lose it
    m = lax.stop_gradient(jnp.where(jnp.isnan(m), jnp.inf, m))
    holds = m == lax.pmax(m, axis_name)
    return lax.pmin(jnp.where(holds, prediction, jnp.iinfo(jnp.int32).max), axis_name)


def _of_all_devices(names: tuple[str, ...], partial: Partial, block: Block, axis_name: AxisName) -> Partial:
    """The partial statistics over all classes: one collective after the maximum, of all sums together."""
    parts_here = partial.parts or ()
    m_here, *tops_here = lax.stop_gradient((partial.m, *(part.m for part in parts_here)))
    m, *tops = lax.pmax((m_here, *tops_here), axis_name)
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
        sums["rest"] = _rest_and_holders(Sums(m_here, partial.r), m)
    if partial.class_logits is not None:
        mine = is_here(block.classes, block.logits)
        sums["class_logits"] = jnp.where(mine, partial.class_logits, 0), mine.astype(m.dtype)
    sums["parts"] = [
        _rest_and_holders(Sums(x, part.r), top)
        for x, top, part in zip(tops_here, tops, parts_here, strict=True)
    ]
    sums = lax.psum({name: x for name, x in sums.items() if x is not None}, axis_name)
    if "others" in sums:
        r = sums.pop("others") + (exp_difference(sums["label_logit"], m) - 1)
    else:
        r = _rest(*sums.pop("rest"))
    parts: Any = tuple(Sums(top, _rest(*part)) for top, part in zip(tops, sums.pop("parts"), strict=True))
    if "class_logits" in sums:
        class_logits, somewhere = sums["class_logits"]
        sums["class_logits"] = jnp.where(somewhere > 0, class_logits, -jnp.inf)
    return Partial(m=m, r=r, parts=parts or None, **sums)


def _rest_and_holders(here: Sums, m: Array) -> tuple[Array, Array]:
    """What a device adds to r, and whether it has the largest logit."""
    holds = here.m == m
    scale = exp_difference(here.m, jnp.where(m == -jnp.inf, 0, m))
    return jnp.where(holds, here.r, product_or_zero(scale, 1 + here.r)), holds.astype(m.dtype)


def _rest(rest: Array, holders: Array) -> Array:
    return rest + (holders - 1)
