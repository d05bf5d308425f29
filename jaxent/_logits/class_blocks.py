"""Linear logits in blocks of classes, each with all rows: for few rows and very many classes.

A pass reads the kernel once and writes its gradient once, where blocks of rows do so as often as there are blocks.
But a row's cotangent is known after the last block only, so the logits are computed again: 4 matmuls.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import Moving, instantiate, values_and_moving, varying_like
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
from .linear import LinearLogits

Static = tuple[tuple[str, ...], int]  # names of statistics, and how many classes a block has


def statistics(names: tuple[str, ...], size: int, block: Block, counts: Array | None) -> SoftmaxStatistics:
    """The statistics `names`; `block.logits` is a LinearLogits of hidden `[N, D]`."""
    real, integers = _statistics((names, size), *varying_like((block, counts), (block, counts)))
    return SoftmaxStatistics(**real, **integers)


def _primal(static: Static, block: Block, counts: Array | None) -> Any:
    return _forward_pass(static, _hide(block, counts))[0]


def _forward(static: Static, block: Any, counts: Any) -> Any:
    (block, counts), moving = values_and_moving((block, counts))
    found, whole = _forward_pass(static, _hide(block, counts))
    return found, (block, counts, whole, found[0].get("entropy"), moving)


def _backward(static: Static, residuals: Any, g: Any) -> tuple[Block, None]:
    block, counts, whole, entropy, moving = residuals
    is_moving, _ = moving.tree((block, counts))
    gradient = _backward_pass(static[1], is_moving, _hide(block, counts), counts, whole, entropy, instantiate(g[0]))
    return gradient, None


_statistics = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_statistics.defvjp(_forward, _backward, symbolic_zeros=True)


def _hide(block: Block, counts: Array | None) -> Block:
    """Zeros in place of what does not count: they will be multiplied by a zero gradient."""
    if counts is None:
        return block
    hidden = keep(counts[:, None], block.logits.hidden)
    q = None if block.distribution is None else keep(counts[:, None], block.distribution)
    return block._replace(logits=dataclasses.replace(block.logits, hidden=hidden), distribution=q)


def _classes(block: Block, start: Any, size: int) -> Block:
    """Some of the classes, their layer still open."""

    def of(x: Any) -> Any:
        return None if x is None else lax.dynamic_slice_in_dim(x, start, size, x.ndim - 1)

    layer = block.logits
    layer = dataclasses.replace(layer, kernel=of(layer.kernel), bias=of(layer.bias))
    label = None if block.label is None else block.label - start
    return Block(layer, label, of(block.distribution), of(block.class_weights), of(block.class_mask))


def _for_each_block(block: Block, size: int, step: Callable[[Any, Any, int], Any], init: Any) -> Any:
    """`step(carry, start, size)` over all classes; the last block may be smaller."""
    classes = block.logits.kernel.shape[-1]
    init = varying_like(block, init)
    carry = lax.fori_loop(0, classes // size, lambda i, carry: step(carry, i * size, size), init)
    rest = classes % size
    return step(carry, classes - rest, rest) if rest else carry


def _forward_pass(static: Static, block: Block) -> tuple[Any, Partial]:
    names, size = static
    rows = block.logits.hidden.shape[0]
    label_logit = _label_logit(block) if "rank" in names else None

    def partials(start: Any, size: int) -> tuple[Partial, dict[str, Array]]:
        part = _classes(block, start, size)
        z = linear.from_product(part.logits, linear.product(part.logits))
        part = part._replace(logits=z)
        integers = {}
        z = lax.stop_gradient(part.wide_logits())
        if "prediction" in names:
            integers["prediction"] = (start + jnp.argmax(z, -1)).astype(jnp.int32)
        if "rank" in names:
            above = ~(z <= label_logit[:, None]) & ~part.hit()
            integers["rank"] = jnp.sum(above, -1, dtype=jnp.int32)
        return partial_statistics(names, part, dense.platform_max_and_rest, dense.platform_select_label), integers

    def step(carry: Any, start: Any, size: int) -> Any:
        whole, integers = carry
        part, here = partials(start, size)
        found = dict(integers)
        if "prediction" in names:
            found["prediction"] = jnp.where(part.max > whole.max, here["prediction"], integers["prediction"])
        if "rank" in names:
            found["rank"] = integers["rank"] + here["rank"]
        return merge(whole, part), found

    like, _ = jax.eval_shape(functools.partial(partials, 0, size))
    zeros = {name: jnp.zeros(rows, jnp.int32) for name in names if name in INTEGER_STATISTICS}
    whole, integers = _for_each_block(block, size, step, (identity(like), zeros))
    whole = poison(whole, block.label)
    if "rank" in names:
        integers["rank"] = jnp.where(block.label >= 0, integers["rank"], block.logits.shape[-1])
    real = tuple(name for name in names if name not in INTEGER_STATISTICS)
    return (finish(real, whole), integers), whole


def _label_logit(block: Block) -> Array:
    """z_y, before the pass over all classes: from the label's columns of the kernel."""
    layer, label = lax.stop_gradient((block.logits, block.label))
    column = jnp.maximum(label, 0)
    own = jax.vmap(lambda h, w: linear.product(dataclasses.replace(layer, hidden=h, kernel=w)), (0, 1))
    z = own(layer.hidden, layer.kernel[:, column])
    bias = None if layer.bias is None else layer.bias[column]
    return linear.from_product(dataclasses.replace(layer, bias=bias), z)


def _backward_pass(
    size: int,
    is_moving: Block,
    block: Block,
    counts: Array | None,
    whole: Partial,
    entropy: Array | None,
    g: dict[str, Array],
) -> Block:
    layer = block.logits
    moves = is_moving.logits

    def step(carry: Block, start: Any, size: int) -> Block:
        total = carry.logits
        part = _classes(block, start, size)
        z, vjp = jax.vjp(functools.partial(linear.from_product, part.logits), linear.product(part.logits))
        part_of_z = part._replace(logits=z)

        def of_counting_rows(x: Array) -> Array:
            return x if counts is None else jnp.where(counts[:, None], x, 0)

        def put(x: Array, here: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(x, here.astype(x.dtype), start, x.ndim - 1)

        hidden, kernel, bias, distribution = total.hidden, total.kernel, total.bias, carry.distribution
        if moves.hidden or moves.kernel or moves.bias:
            (d_product,) = vjp(of_counting_rows(logits_gradient(part_of_z, whole, entropy, g)))
            dz = linear.operand(part.logits, d_product)
            if moves.hidden:
                hidden = hidden + linear.hidden_gradient(part.logits, dz)
            if moves.kernel:
                kernel = put(kernel, linear.kernel_gradient(part.logits, dz))
            if moves.bias:
                bias = put(bias, jnp.sum(d_product, 0))
        if is_moving.distribution:
            distribution = put(
                distribution, of_counting_rows(distribution_gradient(part_of_z, whole, g))
            )
        total = dataclasses.replace(total, hidden=hidden, kernel=kernel, bias=bias)
        return carry._replace(logits=total, distribution=distribution)

    def zeros(moves: bool, x: Array, dtype: Any = None) -> Array | None:
        return jnp.zeros(x.shape, dtype or x.dtype) if moves else None

    init = Block(
        dataclasses.replace(
            layer,
            hidden=zeros(moves.hidden, layer.hidden, layer.dtype),
            kernel=zeros(moves.kernel, layer.kernel),
            bias=zeros(moves.bias, layer.bias),
        ),
        distribution=zeros(is_moving.distribution, block.distribution),
    )
    found = _for_each_block(block, size, step, init)
    if moves.hidden:
        hidden = found.logits.hidden.astype(layer.hidden.dtype)
        found = found._replace(logits=dataclasses.replace(found.logits, hidden=hidden))
    return found
