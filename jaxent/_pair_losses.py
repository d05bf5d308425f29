"""Contrastive losses: what a tile of the logits of all pairs adds to them, and to their gradients.

Symbols as in `_pairs` and `_statistics`. For the softmax a tile is a block of classes twice, of its rows and transposed
of its columns: their partial statistics are merged over all tiles, so that one product serves both directions. For the
gradient it is made once more, and goes through the one formula twice; a single tile XLA keeps instead. The sigmoid has
its derivative in each element: where cotangents of rows are known but for a factor, the gradient is made with the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._block import Block
from ._derivatives import cast_like, dtypes_of, reverse_mode_only, stored, varying_like
from ._devices import lanes
from ._gradient import logits_gradient
from ._pairs import Grid, Side, add_gradients, for_all_pairs, negatives, partner, products
from ._rows import both
from ._statistics import Partial, finish, merge, partial_statistics
from ._yes_no import sigmoids

NAMES = ("log_prob",)


def log_probs(grid: Grid, x: Side, y: Side, scale: Array, symmetric: bool) -> tuple[Array, Array | None]:
    """(log p of its pair among the columns, of each row; among the rows, of each column, if `symmetric`)."""
    inputs = x, y, scale
    return reverse_mode_only(_log_probs)((grid, symmetric), *varying_like(inputs, inputs))


def _blocks(x: Side, y: Side, z: Array) -> tuple[Block, Block]:
    """A tile, and the same with rows and columns exchanged."""
    kept = negatives(x, y)

    def block(x: Side, y: Side, z: Array, kept: Array | None) -> Block:
        counts = y.counts if kept is None or y.counts is None else y.counts[None]
        return Block(z, partner(x, y), class_mask=both(counts, kept))

    return block(x, y, z, kept), block(y, x, z.T, None if kept is None else kept.T)


def _wholes(static: tuple[Grid, bool], x: Side, y: Side, scale: Array) -> tuple[Partial, Partial | None]:
    grid, symmetric = static

    def tile(x: Side, y: Side, row: Partial, column: Partial | None) -> tuple[Partial, Partial | None]:
        blocks = _blocks(x, y, scale * products(x, y))
        row = merge(row, partial_statistics(NAMES, blocks[0]))
        if symmetric:
            column = merge(column, partial_statistics(NAMES, blocks[1]))
        return row, column

    def nothing(side: Side) -> Partial:
        zeros = jnp.zeros(side.number.shape, scale.dtype)
        return Partial(m=zeros - jnp.inf, r=zeros - 1, label_logit=zeros - jnp.inf, targets={})

    row, column = for_all_pairs(grid, tile, x, y, nothing(x), nothing(y) if symmetric else None)
    return _with_answers(row, x), _with_answers(column, y) if symmetric else None


def _with_answers(whole: Partial, side: Side) -> Partial:
    """NaN where a loss has none, and harmless where there is no loss."""
    ok, wanted = jnp.isfinite(whole.m), both(side.counts, side.paired)
    m = jnp.where(ok, whole.m, jnp.nan if wanted is None else jnp.where(wanted, jnp.nan, 0))
    return whole._replace(m=m, r=jnp.where(ok, whole.r, 0))


def _forward(static: tuple[Grid, bool], x: Side, y: Side, scale: Array) -> tuple[Any, Any]:
    wholes = _wholes(static, x, y, scale)
    found = tuple(whole and finish(NAMES, whole)["log_prob"] for whole in wholes)
    return found, (x, y, scale, wholes)


def _backward(static: tuple[Grid, bool], residuals: Any, g: Any) -> tuple[Side, Side, Array]:
    grid, symmetric = static
    x, y, scale, wholes = residuals

    def tile(x: Any, y: Any, dx: Array, dy: Array) -> tuple[Array, Array]:
        (x, row, g_row), (y, column, g_column) = x, y
        blocks = _blocks(x, y, scale * products(x, y))
        dz = logits_gradient(blocks[0], row, {"log_prob": g_row})
        if symmetric:
            dz = dz + logits_gradient(blocks[1], column, {"log_prob": g_column}).T
        return add_gradients(x, y, dz, dx, dy)

    sides = zip((x, y), wholes, g, strict=True)
    zeros = (jnp.zeros(side.features.shape, scale.dtype) for side in (x, y))
    dx, dy = for_all_pairs(grid, tile, *sides, *zeros)
    return cast_like(_gradients(x, y, scale, dx, dy), (x, y, scale))


def _gradients(x: Side, y: Side, scale: Array, dx: Array, dy: Array) -> tuple[Side, Side, Array]:
    """By x, y and scale in the accumulation dtype, from those by the products."""

    def of(side: Side, d: Array) -> Side:
        return jax.tree.map(lambda _: None, side)._replace(features=scale * d)

    return of(x, dx), of(y, dy), jnp.sum(x.features.astype(dx.dtype) * dx)


_log_probs = jax.custom_vjp(lambda static, *inputs: _forward(static, *inputs)[0], nondiff_argnums=(0,))
_log_probs.defvjp(_forward, _backward)


# Sigmoid of each pair.


def sigmoid_losses(grid: Grid, x: Side, y: Side, scale: Array, bias: Array) -> Array:
    """Of each row the sum over all columns of -log sigmoid(z_ij + bias), or -log sigmoid(-(z_ij + bias)) if no pair."""
    inputs = x, y, scale, bias
    return reverse_mode_only(_sigmoid_losses)(grid, *varying_like(inputs, inputs))


def weighted_sigmoid_loss(grid: Grid, x: Side, y: Side, scale: Array, bias: Array, weights: Array) -> Array:
    """sum_i weights_i sigmoid_losses_i; the gradients, known but for one factor, are made beside it."""
    inputs = x, y, scale, bias, weights
    return reverse_mode_only(_weighted_sigmoid_loss)(grid, *varying_like(inputs, inputs))


def _of_tile(x: Side, y: Side, z: Array) -> tuple[Array, Array]:
    """Losses `[n]` over the columns of a tile, and the derivative of each element of it."""
    is_pair = lanes(z) == partner(x, y)[:, None]
    p, _, _, loss = sigmoids(jnp.where(is_pair, -z, z))
    slope = jnp.where(is_pair, -p, p)
    kept = both(negatives(x, y), None if y.counts is None else y.counts[None])
    if kept is not None:
        loss, slope = jnp.where(kept, loss, 0), jnp.where(kept, slope, 0)
    return jnp.sum(loss, -1), slope


def _losses(grid: Grid, x: Side, y: Side, scale: Array, bias: Array) -> Array:
    def tile(x: Side, y: Side, total: Array, _: None) -> tuple[Array, None]:
        return total + _of_tile(x, y, scale * products(x, y) + bias)[0], None

    return for_all_pairs(grid, tile, x, y, jnp.zeros(x.number.shape, scale.dtype), None)[0]


def _losses_and_gradients(
    grid: Grid, x: Side, y: Side, scale: Array, bias: Array, g: Array
) -> tuple[Array, tuple[Side, Side, Array, Array]]:
    """(losses, the gradients of sum(g * losses))."""

    def tile(x: Any, y: Side, of_rows: Any, dy: Array) -> Any:
        (x, g), (total, d_bias, dx) = x, of_rows
        losses, slope = _of_tile(x, y, scale * products(x, y) + bias)
        dz = g[:, None] * slope
        dx, dy = add_gradients(x, y, dz, dx, dy)
        return (total + losses, d_bias + jnp.sum(dz, -1), dx), dy

    dx, dy = (jnp.zeros(side.features.shape, scale.dtype) for side in (x, y))
    rows = jnp.zeros(x.number.shape, scale.dtype)
    (losses, d_bias, dx), dy = for_all_pairs(grid, tile, (x, g), y, (rows, rows, dx), dy)
    return losses, (*_gradients(x, y, scale, dx, dy), jnp.sum(d_bias))


_sigmoid_losses = jax.custom_vjp(_losses, nondiff_argnums=(0,))
_sigmoid_losses.defvjp(
    lambda grid, *inputs: (_losses(grid, *inputs), inputs),
    lambda grid, inputs, g: cast_like(_losses_and_gradients(grid, *(*inputs, g))[1], inputs),
)


def _weighted(grid: Grid, x: Side, y: Side, scale: Array, bias: Array, weights: Array) -> Array:
    return jnp.sum(weights * _losses(grid, x, y, scale, bias))


def _weighted_forward(grid: Grid, *inputs: Any) -> tuple[Array, Any]:
    losses, gradients = _losses_and_gradients(grid, *inputs)
    residuals = cast_like((*gradients, losses), inputs, stored), dtypes_of(inputs)
    return jnp.sum(inputs[-1] * losses), residuals


def _weighted_backward(_: Grid, residuals: Any, g: Array) -> Any:
    gradients, dtypes = residuals
    return cast_like(jax.tree.map(lambda x: g * x.astype(g.dtype), gradients), dtypes)


_weighted_sigmoid_loss = jax.custom_vjp(_weighted, nondiff_argnums=(0,))
_weighted_sigmoid_loss.defvjp(_weighted_forward, _weighted_backward)
