"""The classes of a row that are not chosen: their largest logit, and their sum, of which no chosen class was a part.

To leave K classes out of V is a chain of K comparisons for each logit, most of them for nothing. So where the classes
are surely on one device they are folded into groups first: class j is in group j % G, `FOLDS` of them in each. The
groups without a chosen class are summed as they are; of the few others the members are looked at one by one.
tests/test_classes.py guards it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _chosen as chosen
from ._block import Block
from ._devices import classes_on_one_device, largest
from ._numerics import exp_difference, finite_or_0

FOLDS = 32  # classes of a group
LANES = 128  # of an accelerator: groups come in so many
MOST = 0.5  # of the classes that are looked at one by one


def without(block: Block, classes: Array) -> Array:
    """Logits of the block, -inf at `classes` `[..., K]`."""
    if classes.shape[-1] <= chosen.COMPARED:
        return chosen.put(block.wide_logits(), classes, -jnp.inf)
    # scattered into a copy: of the logits as they are
    return block._replace(logits=chosen.put(block.logits, classes, -jnp.inf)).wide_logits()


@jax.custom_jvp
def max_and_rest_of_others(block: Block, classes: Array) -> tuple[Array, Array]:
    """m and r of the others, of a block with nothing but logits and a class mask; r is T - 1, no sum of small terms.

    With dm = 0, as `_statistics.detached_max`.
    """
    size, slots = block.logits.shape[-1], classes.shape[-1]
    groups = size // FOLDS // LANES * LANES
    few = 0 < slots <= chosen.COMPARED and slots * FOLDS < MOST * size
    if few and groups and classes_on_one_device(block.logits):
        return _by_groups(block, classes, groups)
    m = largest(without(block, classes))
    # made again: XLA would write out what two reductions read
    return m, _total(without(block, lax.optimization_barrier(classes)), m) - 1


@max_and_rest_of_others.defjvp
def _jvp(primals, tangents):
    (block, classes), (d_block, _) = primals, tangents
    m, r = max_and_rest_of_others(block, classes)
    e = exp_difference(without(block, classes), finite_or_0(m)[..., None])
    return (m, r), (jnp.zeros_like(m), jnp.sum(e * d_block.logits.astype(e.dtype), -1))


def _by_groups(block: Block, classes: Array, groups: int) -> tuple[Array, Array]:
    folded, size = FOLDS * groups, block.logits.shape[-1]
    pieces = [block.piece(i * groups, (i + 1) * groups) for i in range(FOLDS)]
    in_group = jnp.where((classes >= 0) & (classes < folded), classes % groups, -1)

    # of the groups that have a chosen class, each once
    named = jnp.where(chosen.is_first(in_group), in_group, -1)[..., None]
    fold = lax.broadcasted_iota(named.dtype, (1,) * classes.ndim + (FOLDS,), classes.ndim)
    members = jnp.where(named < 0, -1, named + groups * fold)
    members = members.reshape(*classes.shape[:-1], classes.shape[-1] * FOLDS)
    members = jnp.where(chosen.is_chosen(classes, members), -1, members)
    one_by_one = block.logits_at(members)
    if block.class_mask is not None:
        one_by_one = jnp.where(chosen.take(block.class_mask, members), one_by_one, -jnp.inf)
    few = [one_by_one]
    if folded < size:
        few.append(without(block.piece(folded, size), classes - folded))

    top = functools.reduce(jnp.maximum, (x.wide_logits() for x in pieces))
    m = largest(chosen.put(top, in_group, -jnp.inf))
    m = functools.reduce(jnp.maximum, map(largest, few), m)
    at = finite_or_0(m)[..., None]
    e = functools.reduce(jnp.add, (exp_difference(x.wide_logits(), at) for x in pieces))
    total = jnp.sum(chosen.put(e, in_group, 0.0), -1)
    return m, functools.reduce(jnp.add, (_total(x, m) for x in few), total) - 1


def _total(z: Array, m: Array) -> Array:
    return jnp.sum(exp_difference(z, finite_or_0(m)[..., None]), -1)
