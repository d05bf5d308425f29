"""Linear logits in blocks of classes: for few rows and very many classes.

A pass reads the kernel once and writes its gradient once, where blocks of rows do so as often as there are blocks.
But a row's cotangent is known after the last block only, so the logits are computed again: 4 matmuls. Rows may be in
groups (`layout.Rows`): then `[N]` is `[n, *groups]` everywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import Moving, instantiate, stopping_early, values_and_moving, varying_like
from .._reduction import keep
from .._statistics import (
    INTEGER_STATISTICS,
    Block,
    Partial,
    SoftmaxStatistics,
    distribution_gradient,
    finish,
    identity,
    logits_gradient,
    merge,
    partial_statistics,
    poison,
)
from . import dense, linear
from .layout import Classes
from .row_blocks import blocks_that_count, order_of_rows, put_rows, take_rows

ROWS = 256  # at least so many are taken at a time where some do not count


class Rule(NamedTuple):
    """What is made of the partial statistics over all classes, and the gradient for a block of them."""

    complete: Callable[[Partial, Block], Partial]
    results: Callable[[tuple[str, ...], Partial], Any]  # of names
    logits_gradient: Callable[
        [Block, Partial, Any, Any], Array
    ]  # (block of classes, whole, results, cotangents)
    distribution_gradient: Callable[[Block, Partial, Any], Array]  # (block of classes, whole, cotangents)


STATISTICS = Rule(
    lambda whole, block: poison(whole, block.label),
    finish,
    lambda block, whole, results, g: logits_gradient(block, whole, results.get("entropy"), g),
    distribution_gradient,
)


class Static(NamedTuple):
    rule: Rule
    names: tuple[str, ...]  # of statistics
    layout: Classes
    classes: int  # that a block has of each group
    rows: int  # that a block has of each group


class Inputs(NamedTuple):
    block: Block  # its logits are a LinearLogits of hidden [N, D]
    counts: Array | None  # bool [N]
    label_logit: Array | None  # z_y [N], if the rank is asked for
    needed: Any  # how many blocks of rows hold rows that count


def statistics(
    names: tuple[str, ...], layout: Classes, classes: int, block: Block, counts: Array | None
) -> SoftmaxStatistics:
    """The statistics `names` of N rows, `classes` at a time; `block.logits` is a LinearLogits of hidden `[N, D]`."""
    z_y = label_logit(block) if "rank" in names else None
    real, integers = all_classes(STATISTICS, names, layout, classes, block, counts, z_y)
    if "rank" in names:
        integers["rank"] = jnp.where(block.label >= 0, integers["rank"], block.logits.shape[-1])
    return SoftmaxStatistics(**real, **integers)


def all_classes(
    rule: Rule,
    names: tuple[str, ...],
    layout: Classes,
    classes: int,
    block: Block,
    counts: Array | None,
    label_logit: Array | None,
) -> tuple[Any, dict[str, Array]]:
    """(results of `rule`, integer statistics) of N rows."""
    rows, *groups, _ = block.logits.hidden.shape
    wide = block.distribution is not None or (block.class_mask is not None and block.class_mask.ndim > 1)
    blocks = min(rows * math.prod(groups) // ROWS, rows, 8)
    width = max(classes // layout.groups, 1)
    if counts is None or wide or blocks < 2:
        inputs = Inputs(block, counts, label_logit, jnp.ones((), jnp.int32))
        return _apply(Static(rule, names, layout, width, rows), inputs)
    size = -(-rows // blocks)
    order = order_of_rows(counts, size * blocks, (rows, *groups))  # beyond N: what fills the last block
    hidden, label, label_logit = take_rows(order, (block.logits.hidden, block.label, label_logit))
    block = block._replace(logits=dataclasses.replace(block.logits, hidden=hidden), label=label)
    needed = blocks_that_count(counts, size)
    counts = take_rows(order, counts) & (order < rows)
    found = _apply(Static(rule, names, layout, width, size), Inputs(block, counts, label_logit, needed))
    return put_rows(order, jax.tree.map(lambda x: jnp.zeros((rows, *groups), x.dtype), found), found)


def label_logit(block: Block) -> Array:
    """z_y from the label's column of the kernel, -inf where there is none; without derivative."""
    layer, label = lax.stop_gradient((block.logits, block.label))
    column = jnp.clip(label, 0, layer.kernel.shape[-1] - 1)

    def own(hidden: Array, kernel: Array) -> Array:
        return linear.product(dataclasses.replace(layer, hidden=hidden, kernel=kernel))

    for _ in label.shape:
        own = jax.vmap(own, (-2, -1), -1)
    z = own(layer.hidden, layer.kernel[:, column])
    bias = None if layer.bias is None else layer.bias[column]
    z = linear.from_product(dataclasses.replace(layer, bias=bias), z)
    return jnp.where(label == column, z, -jnp.inf)


def _apply(static: Static, inputs: Inputs) -> Any:
    return _rule(static, varying_like(inputs, inputs))


def _primal(static: Static, inputs: Inputs) -> Any:
    return _forward_pass(static, _hide(inputs))[0]


def _forward(static: Static, inputs: Any) -> Any:
    inputs, moving = values_and_moving(inputs)
    found, whole = _forward_pass(static, _hide(inputs))
    return found, (inputs, whole, found[0], moving)


def _backward(static: Static, residuals: Any, g: Any) -> tuple[Inputs]:
    inputs, whole, results, moving = residuals
    gradient = _backward_pass((static, moving), _hide(inputs), whole, results, instantiate(g[0]))
    return (Inputs(gradient, None, None, None),)


_rule = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward, symbolic_zeros=True)


def _hide(inputs: Inputs) -> Inputs:
    """Zeros in place of what does not count: they will be multiplied by a zero gradient."""
    block, counts = inputs.block, inputs.counts
    if counts is None:
        return inputs
    hidden = keep(counts[..., None], block.logits.hidden)
    q = None if block.distribution is None else keep(counts[..., None], block.distribution)
    logits = dataclasses.replace(block.logits, hidden=hidden)
    return inputs._replace(block=block._replace(logits=logits, distribution=q))


@stopping_early
def _forward_pass(stop: bool, static: Static, inputs: Inputs) -> tuple[Any, Partial]:
    """The results, and the partial statistics over all classes that they are made from."""
    names = static.names
    block = inputs.block

    def partials(row: Any, start: Any, classes: int) -> tuple[Partial, dict[str, Array]]:
        part = _part(static, block, row, start, classes)
        part = part._replace(logits=linear.from_product(part.logits, linear.product(part.logits)))
        z = lax.stop_gradient(part.wide_logits())
        integers = {}
        if "prediction" in names:
            lane = jnp.argmax(z, -1).astype(jnp.int32)
            integers["prediction"] = static.layout.of_lane(lane, start, classes)
        if "rank" in names:
            above = ~(z <= _rows(inputs.label_logit, row, static.rows)[..., None]) & ~part.hit()
            integers["rank"] = jnp.sum(above, -1, dtype=jnp.int32)
        return partial_statistics(
            names, part, dense.platform_max_and_rest, dense.platform_select_label
        ), integers

    def step(start: Any, classes: int, row: Any, carry: Any) -> Any:
        part, here = partials(row, start, classes)
        whole, before = _rows(carry, row, static.rows)
        integers = {}
        if "prediction" in names:
            larger = ~(part.max <= whole.max) & ~jnp.isnan(whole.max)  # a NaN is the largest, as in argmax
            tied = (part.max == whole.max) | (jnp.isnan(part.max) & jnp.isnan(whole.max))
            first = larger | (tied & (here["prediction"] < before["prediction"]))
            integers["prediction"] = jnp.where(first, here["prediction"], before["prediction"])
        if "rank" in names:
            integers["rank"] = before["rank"] + here["rank"]
        return _put(carry, (merge(whole, part), integers), row)

    def over_rows(start: Any, classes: int, carry: Any) -> Any:
        return _over_rows(stop, static, inputs, functools.partial(step, start, classes), carry)

    rows = block.logits.hidden.shape[0]
    like, like_integers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
        jax.eval_shape(functools.partial(partials, 0, 0, static.classes)),
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like_integers)
    whole, integers = _over_classes(static, inputs, over_rows, (identity(like), zeros))
    whole = static.rule.complete(whole, block)
    real = tuple(name for name in names if name not in INTEGER_STATISTICS)
    return (static.rule.results(real, whole), integers), whole


@stopping_early
def _backward_pass(
    stop: bool,
    static_and_moving: tuple[Static, Moving],
    inputs: Inputs,
    whole: Partial,
    results: Any,
    g: Any,
) -> Block:
    """The gradients of what is differentiated, None for the rest."""
    static, moving = static_and_moving
    block = inputs.block
    moves: Block = moving.tree(inputs).block

    def tile(start: Any, classes: int, row: Any) -> Block:
        part = _part(static, block, row, start, classes)
        z, vjp = jax.vjp(functools.partial(linear.from_product, part.logits), linear.product(part.logits))
        of_rows = _rows((whole, results, g, inputs.counts), row, static.rows)
        part_whole, part_results, part_g, counts = of_rows
        built = part._replace(logits=z)

        def of_counting_rows(x: Array) -> Array:
            # a select, so that NaN in a row that does not count stays there
            return x if counts is None else jnp.where(counts[..., None], x, 0)

        (d_product,) = vjp(
            of_counting_rows(static.rule.logits_gradient(built, part_whole, part_results, part_g))
        )
        distribution = None
        if moves.distribution:
            distribution = of_counting_rows(static.rule.distribution_gradient(built, part_whole, part_g))
        return Block(linear.gradient(moves.logits, part.logits, d_product), distribution=distribution)

    def over_rows(start: Any, classes: int, total: Block) -> Block:
        """Adds to the gradient of hidden, and writes what the kernel, bias and distribution have here."""

        def step(row: Any, carry: Any) -> Any:
            hidden, here = carry
            found = tile(start, classes, row)
            layer = found.logits
            if hidden is not None:
                hidden = _put(hidden, _rows(hidden, row, static.rows) + layer.hidden, row)
            found = found._replace(logits=dataclasses.replace(layer, hidden=None))
            return hidden, jax.tree.map(jnp.add, here, found)

        shapes = jax.eval_shape(functools.partial(tile, start, classes, 0))
        here = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        here = here._replace(logits=dataclasses.replace(here.logits, hidden=None))
        hidden, here = _over_rows(
            stop, static, inputs, step, varying_like(inputs, (total.logits.hidden, here))
        )

        def put(x: Array, y: Array) -> Array:
            return static.layout.put(x, y.astype(x.dtype), start)

        rest = total._replace(logits=dataclasses.replace(total.logits, hidden=None))
        total = jax.tree.map(put, rest, here)
        return total._replace(logits=dataclasses.replace(total.logits, hidden=hidden))

    def zeros(moves: Any, x: Array, dtype: Any = None) -> Array | None:
        return jnp.zeros(x.shape, dtype or x.dtype) if moves else None

    layer, moving_layer = block.logits, moves.logits
    hidden = zeros(moving_layer.hidden, layer.hidden, layer.dtype)
    kernel, bias = zeros(moving_layer.kernel, layer.kernel), zeros(moving_layer.bias, layer.bias)
    init = Block(
        dataclasses.replace(layer, hidden=hidden, kernel=kernel, bias=bias),
        distribution=zeros(moves.distribution, block.distribution),
    )
    found = _over_classes(static, inputs, over_rows, init)
    if moving_layer.hidden:
        hidden = found.logits.hidden.astype(layer.hidden.dtype)
        found = found._replace(logits=dataclasses.replace(found.logits, hidden=hidden))
    return found


def _over_classes(static: Static, inputs: Inputs, step: Callable[[Any, int, Any], Any], init: Any) -> Any:
    """`step(start, classes, carry)` over all classes; the last block may be smaller."""
    size, classes = static.classes, static.layout.number
    carry = varying_like(inputs, init)
    carry = lax.fori_loop(0, classes // size, lambda i, carry: step(i * size, size, carry), carry)
    rest = classes % size
    return step(classes - rest, rest, carry) if rest else carry


def _over_rows(
    stop: bool, static: Static, inputs: Inputs, step: Callable[[Any, Any], Any], carry: Any
) -> Any:
    """`step(row, carry)` over the rows that count, which come first."""
    blocks = inputs.block.logits.hidden.shape[0] // static.rows
    if blocks == 1:
        return step(0, carry)
    return lax.fori_loop(
        0, inputs.needed if stop else blocks, lambda i, carry: step(i * static.rows, carry), carry
    )


def _part(static: Static, block: Block, row: Any, start: Any, classes: int) -> Block:
    """Some rows and some classes, the layer still open."""

    def of_classes(x: Array) -> Array:
        return static.layout.take(x, start, classes)

    layer = block.logits
    kernel, bias, weights = jax.tree.map(of_classes, (layer.kernel, layer.bias, block.class_weights))
    distribution, mask = jax.tree.map(of_classes, (block.distribution, block.class_mask))
    hidden, label = _rows((layer.hidden, block.label), row, static.rows)
    layer = dataclasses.replace(layer, hidden=hidden, kernel=kernel, bias=bias)
    lane = None if label is None else static.layout.lane(label, start, classes)
    return Block(layer, lane, distribution, weights, mask)


def _rows(tree: Any, row: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, rows), tree)


def _put(tree: Any, block: Any, row: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, row, 0), tree, block)
