"""Linear logits in blocks of classes: for few rows and very many classes.

A pass reads the kernel once and writes its gradient once, where blocks of rows do so as often as there are blocks.
But a row's cotangent is known after the last block only, so the logits are computed again: 4 matmuls.
"""

import dataclasses
import functools
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
    classes: int  # of a block
    rows: int  # of a block


class Inputs(NamedTuple):
    block: Block  # its logits are a LinearLogits of hidden [N, D]
    counts: Array | None  # bool [N]
    label_logit: Array | None  # z_y [N], if the rank is asked for
    needed: Any  # how many blocks of rows hold rows that count


def statistics(names: tuple[str, ...], classes: int, block: Block, counts: Array | None) -> SoftmaxStatistics:
    """The statistics `names` of N rows, `classes` at a time; `block.logits` is a LinearLogits of hidden `[N, D]`."""
    z_y = label_logit(block) if "rank" in names else None
    real, integers = all_classes(STATISTICS, names, classes, block, counts, z_y)
    if "rank" in names:
        integers["rank"] = jnp.where(block.label >= 0, integers["rank"], block.logits.shape[-1])
    return SoftmaxStatistics(**real, **integers)


def all_classes(
    rule: Rule,
    names: tuple[str, ...],
    classes: int,
    block: Block,
    counts: Array | None,
    label_logit: Array | None,
) -> tuple[Any, dict[str, Array]]:
    """(results of `rule`, integer statistics) of N rows."""
    rows = block.logits.hidden.shape[0]
    wide = block.distribution is not None or (block.class_mask is not None and block.class_mask.ndim > 1)
    blocks = min(rows // ROWS, 8)
    if counts is None or wide or blocks < 2:
        inputs = Inputs(block, counts, label_logit, jnp.ones((), jnp.int32))
        return _apply(Static(rule, names, classes, rows), inputs)
    size = -(-rows // blocks)
    order = jnp.argsort(~counts, stable=True)
    order = jnp.append(order, jnp.arange(rows, size * blocks))  # fills the last block

    def of_rows(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.at[order].get(mode="clip"), tree)

    logits = dataclasses.replace(block.logits, hidden=of_rows(block.logits.hidden))
    block = block._replace(logits=logits, label=of_rows(block.label))
    needed = (jnp.sum(counts, dtype=jnp.int32) + (size - 1)) // size
    inputs = Inputs(block, of_rows(counts) & (order < rows), of_rows(label_logit), needed)
    found = _apply(Static(rule, names, classes, size), inputs)

    def in_place(x: Array) -> Array:
        return jnp.zeros(rows, x.dtype).at[order].set(x, mode="drop", unique_indices=True)

    return jax.tree.map(in_place, found)


def label_logit(block: Block) -> Array:
    """z_y from the label's column of the kernel, -inf where there is none; without derivative."""
    layer, label = lax.stop_gradient((block.logits, block.label))
    column = jnp.clip(label, 0, layer.kernel.shape[-1] - 1)
    own = jax.vmap(lambda h, w: linear.product(dataclasses.replace(layer, hidden=h, kernel=w)), (0, 1))
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
    hidden = keep(counts[:, None], block.logits.hidden)
    q = None if block.distribution is None else keep(counts[:, None], block.distribution)
    logits = dataclasses.replace(block.logits, hidden=hidden)
    return inputs._replace(block=block._replace(logits=logits, distribution=q))


@stopping_early
def _forward_pass(stop: bool, static: Static, inputs: Inputs) -> tuple[Any, Partial]:
    """The results, and the partial statistics over all classes that they are made from."""
    names = static.names
    block = inputs.block

    def partials(row: Any, start: Any, classes: int) -> tuple[Partial, dict[str, Array]]:
        part = _part(block, row, static.rows, start, classes)
        part = part._replace(logits=linear.from_product(part.logits, linear.product(part.logits)))
        z = lax.stop_gradient(part.wide_logits())
        integers = {}
        if "prediction" in names:
            integers["prediction"] = (start + jnp.argmax(z, -1)).astype(jnp.int32)
        if "rank" in names:
            above = ~(z <= _rows(inputs.label_logit, row, static.rows)[:, None]) & ~part.hit()
            integers["rank"] = jnp.sum(above, -1, dtype=jnp.int32)
        return partial_statistics(
            names, part, dense.platform_max_and_rest, dense.platform_select_label
        ), integers

    def step(start: Any, classes: int, row: Any, carry: Any) -> Any:
        part, here = partials(row, start, classes)
        whole, before = _rows(carry, row, static.rows)
        integers = {}
        if "prediction" in names:
            first = ~(part.max <= whole.max) & ~jnp.isnan(whole.max)  # a NaN is the largest, as in argmax
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
        part = _part(block, row, static.rows, start, classes)
        z, vjp = jax.vjp(functools.partial(linear.from_product, part.logits), linear.product(part.logits))
        of_rows = _rows((whole, results, g, inputs.counts), row, static.rows)
        part_whole, part_results, part_g, counts = of_rows
        built = part._replace(logits=z)

        def of_counting_rows(x: Array) -> Array:
            # a select, so that NaN in a row that does not count stays there
            return x if counts is None else jnp.where(counts[:, None], x, 0)

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
            return lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), start, x.ndim - 1)

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
    size, classes = static.classes, inputs.block.logits.kernel.shape[-1]
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


def _part(block: Block, row: Any, rows: int, start: Any, classes: int) -> Block:
    """Some rows and some classes, the layer still open."""

    def of_classes(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, classes, x.ndim - 1)

    layer = block.logits
    kernel, bias, weights = jax.tree.map(of_classes, (layer.kernel, layer.bias, block.class_weights))
    distribution, mask = jax.tree.map(of_classes, (block.distribution, block.class_mask))
    hidden, label = _rows((layer.hidden, block.label), row, rows)
    layer = dataclasses.replace(layer, hidden=hidden, kernel=kernel, bias=bias)
    return Block(layer, None if label is None else label - start, distribution, weights, mask)


def _rows(tree: Any, row: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, rows), tree)


def _put(tree: Any, block: Any, row: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, row, 0), tree, block)
