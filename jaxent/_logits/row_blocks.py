"""Linear logits in blocks of rows, each with all its classes: 3 matmuls for a weighted sum, 4 for results per row.

A block function maps the logits `[R, V]` of R rows, of one or more linear layers, and whatever else belongs to these
rows to results `[R]`. jax differentiates it, block by block. Rows may be in groups (`layout.RowLayout`): then `[N]` is
`[n, *groups]` and `[R]` is `[r, *groups]` everywhere.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from .._derivatives import (
    instantiate,
    reverse_mode_only,
    stopping_early,
    values_and_perturbed,
    varying_like,
    with_forward_mode,
)
from .._numerics import accumulation_dtype, limit
from .._rows import keep
from . import linear
from .layout import RowLayout
from .linear import LinearLogits, per_row_fields, replace, shared_fields


class Inputs(NamedTuple):
    """Of all rows, or of a block of them. As a result of differentiation: gradients, None where none is wanted."""

    layers: tuple[LinearLogits, ...]  # hidden [N, D], each with a D of its own; kernels to the same classes
    counts: Array | None  # bool [N]
    rows: Any  # pytree of [N, ...]
    shared: Any  # pytree of what all rows have in common
    class_mask: Array | None = None  # [V] or [N, V], where NaN may be hidden by it
    needed: Array | None = None  # bool [N]: only weights ask for the others' results; None: as `counts`

    def parts(self) -> tuple[Any, Any]:
        """(what rows have of their own, what they share)."""
        mask = self.class_mask
        per_row, shared = (mask, None) if mask is not None and mask.ndim > 1 else (None, mask)
        layers = list(map(per_row_fields, self.layers)), list(map(shared_fields, self.layers))
        return (layers[0], self.counts, self.rows, per_row, self.needed), (layers[1], self.shared, shared)

    def of_parts(self, per_row: Any, shared: Any) -> "Inputs":
        """The inverse, of other rows of these."""
        fields, counts, rows, mask, needed = per_row
        fields_of_all, shared, mask_of_all = shared
        fields = map(operator.or_, fields, fields_of_all)
        layers = map(replace, self.layers, fields)
        return Inputs(tuple(layers), counts, rows, shared, mask_of_all if mask is None else mask, needed)

    def grouped(self, layout: RowLayout) -> "Inputs":
        per_row, shared = self.parts()
        return self.of_parts(layout.grouped(per_row), shared)


# fn(logits of each layer, counts, rows, shared) -> (results, results without derivative), pytrees of [R, ...]
BlockFunction = Callable[[tuple[Array, ...], Array | None, Any, Any], tuple[Any, Any]]
Static = tuple[BlockFunction, int]  # and how many rows a block has


def map_rows(fn: BlockFunction, size: int, inputs: Inputs) -> tuple[Any, Any]:
    """`fn` of all rows: results `[N]`, 0 in rows that do not count."""
    return reverse_mode_only(_mapped)((fn, size), varying_like(inputs, inputs))


def sum_rows(fn: BlockFunction, size: int, inputs: Inputs, weights: Array) -> tuple[Array, Any]:
    """sum_n weights_n fn(...)_n, with `weights` `[N]` and one result `[N]`; and the results without derivative."""
    return _summed((fn, size), *varying_like((inputs, weights), (inputs, weights)))


# Results per row: the cotangents come later, so the backward computes the logits once more.


def _mapped_forward(static: Static, inputs: Any) -> tuple[Any, Any]:
    inputs, perturbed = values_and_perturbed(inputs)
    return _evaluate(static, inputs), (inputs, perturbed)


def _mapped_backward(static: Static, residuals: Any, g: Any) -> tuple[Inputs | None]:
    inputs, perturbed = residuals
    if all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(g[0])):
        return (None,)  # nothing depends on these results
    _, gradients = _differentiate((*static, perturbed, False), inputs, instantiate(g[0]))
    return (_cast(gradients, inputs),)


_mapped = jax.custom_vjp(lambda static, inputs: _evaluate(static, inputs), nondiff_argnums=(0,))
_mapped.defvjp(_mapped_forward, _mapped_backward, symbolic_zeros=True)


# A sum: each row's cotangent is its weight times one number. That comes later, but is only a factor: the forward
# rule makes the gradients while it has the logits, and the backward multiplies them.


def _summed_primal(static: Static, inputs: Inputs, weights: Array) -> tuple[Array, Any]:
    losses, aux = _evaluate(static, inputs)
    return jnp.sum(weights * limit(weights, losses)), aux


def _summed_forward(static: Static, inputs: Any, weights: Any) -> tuple[tuple[Array, Any], Any]:
    inputs, perturbed = values_and_perturbed(inputs)
    every, weights = weights.perturbed, weights.value
    (losses, aux), gradients = _differentiate((*static, perturbed, every), inputs, weights)
    losses = limit(weights, losses)
    residuals = _cast(gradients, inputs, _stored), losses, _dtypes((inputs, weights))
    return (jnp.sum(weights * losses), aux), residuals


def _summed_backward(static: Static, residuals: Any, g: Any) -> Any:
    gradients, losses, dtypes = residuals
    g = instantiate(g[0])
    return _cast((jax.tree.map(lambda x: g * x.astype(g.dtype), gradients), g * losses), dtypes)


_summed_rule = jax.custom_vjp(_summed_primal, nondiff_argnums=(0,))
_summed_rule.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
_summed = with_forward_mode(_summed_rule)


# The loop over blocks.


@stopping_early
def _evaluate(stop: bool, static: Static, inputs: Inputs) -> tuple[Any, Any]:
    fn, size = static
    blocks = _Blocks(inputs, size, stop)

    def results(i: Any) -> Any:
        block = blocks.take(i)
        logits = tuple(linear.from_product(layer, linear.product(layer)) for layer in block.layers)
        return blocks.keep(fn(logits, block.counts, block.rows, block.shared), i)

    def body(i: Any, found: Any) -> Any:
        return blocks.put(found, i, results(i))

    return blocks.loop(body, blocks.zeros(jax.eval_shape(results, 0)))


@stopping_early
def _differentiate(stop: bool, how: Any, inputs: Inputs, g: Any) -> tuple[Any, Inputs]:
    """The results, and the gradients of sum(g * real results), summed in the accumulation dtype."""
    fn, size, perturbed, every = how  # every: also rows of weight 0
    blocks = _Blocks(inputs, size, stop and not every)
    is_perturbed: Inputs = perturbed.tree(inputs)

    def step(i: Any) -> tuple[Any, Inputs]:
        block = blocks.take(i)

        def of_perturbed(products: Any, options: Any, rows: Any, shared: Any) -> Any:
            layers = map(replace, block.layers, options)
            of_layer = functools.partial(linear.from_product, class_mask=block.class_mask)
            logits = tuple(map(of_layer, layers, products))
            rows = _merge(is_perturbed.rows, rows, block.rows)
            shared = _merge(is_perturbed.shared, shared, block.shared)
            return fn(logits, block.counts, rows, shared)

        rows, shared = _only(is_perturbed.rows, block.rows), _only(is_perturbed.shared, block.shared)
        products = tuple(map(linear.product, block.layers))
        options = tuple(map(linear.perturbed_options, is_perturbed.layers, block.layers))
        real, vjp, integers = jax.vjp(of_perturbed, products, options, rows, shared, has_aux=True)
        cotangent = blocks.keep(blocks.rows_of(g, i), i)
        cotangent = jax.tree.map(lambda x, like: x.astype(like.dtype), cotangent, real)
        d_products, d_options, d_rows, d_shared = vjp(cotangent)

        of_layer = functools.partial(_layer_gradient, block.class_mask)
        d_layers = tuple(map(of_layer, is_perturbed.layers, block.layers, d_products))
        d_layers = tuple(map(replace, d_layers, d_options))
        results = blocks.keep((real, integers), i)
        return results, Inputs(d_layers, None, d_rows, d_shared)

    def body(i: Any, carry: Any) -> Any:
        found, total = carry
        results, gradients = step(i)
        return blocks.put(found, i, results), blocks.add(total, i, gradients)

    results, gradients = jax.eval_shape(step, 0)
    return blocks.loop(body, (blocks.zeros(results), blocks.zero_gradients(gradients)))


def _layer_gradient(
    class_mask: Array | None, perturbed: LinearLogits, block: LinearLogits, d_product: Array
) -> LinearLogits:
    found = linear.gradient(perturbed, block, d_product, class_mask)
    hidden = found.hidden
    return replace(found, {"hidden": None if hidden is None else hidden.astype(_stored(block.hidden.dtype))})


class _Blocks:
    """N rows, `size` of each group at a time: those that count first, in their order."""

    def __init__(self, inputs: Inputs, size: int, stop: bool):
        rows, *groups, _ = inputs.layers[0].hidden.shape
        self.inputs, self.size = inputs, size
        self.number: Any = -(-rows // size)
        self.order = None
        needed = inputs.counts if inputs.needed is None else inputs.needed
        if needed is not None or rows % size:
            # row numbers from N on fill the last block: copies of some row that are kept out of all results
            self.order = order_of_rows(needed, self.number * size, (rows, *groups))
        if needed is not None and stop:
            self.number = blocks_that_count(needed, size)

    def take(self, i: Any) -> Inputs:
        per_row, shared = self.inputs.parts()
        block = self.inputs.of_parts(self.rows_of(per_row, i), shared)
        layers = (linear.without_hidden_rows(layer, block.counts) for layer in block.layers)
        return block._replace(layers=tuple(layers))

    def keep(self, results: Any, i: Any) -> Any:
        """0 in rows that do not count, or only fill the block."""
        if self.order is None:
            return results
        counts = self._index(i) < self.inputs.layers[0].hidden.shape[0]
        if self.inputs.counts is not None:
            counts &= self.rows_of(self.inputs.counts, i)
        return jax.tree.map(lambda x: keep(counts, x), results)

    def rows_of(self, tree: Any, i: Any) -> Any:
        if self.order is None:
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * self.size, self.size), tree)
        return take_rows(self._index(i), tree)

    def put(self, total: Any, i: Any, block: Any) -> Any:
        if self.order is None:
            start = i * self.size
            return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), total, block)
        return put_rows(self._index(i), total, block)

    def add(self, total: Inputs, i: Any, block: Inputs) -> Inputs:
        (rows, shared), (more_rows, more) = total.parts(), block.parts()
        shared = jax.tree.map(lambda x, y: x + y.astype(x.dtype), shared, more)
        return total.of_parts(self.put(rows, i, more_rows), shared)

    def zeros(self, of_block: Any) -> Any:
        rows = self.inputs.layers[0].hidden.shape[0]
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), of_block)

    def zero_gradients(self, of_block: Inputs) -> Inputs:
        rows, shared = of_block.parts()
        shared = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), shared)
        return of_block.of_parts(self.zeros(rows), shared)

    def loop(self, body: Callable[[Any, Any], Any], init: Any) -> Any:
        return lax.fori_loop(0, self.number, body, varying_like(self.inputs, init))

    def _index(self, i: Any) -> Array:
        return lax.dynamic_slice_in_dim(self.order, i * self.size, self.size)


# Rows in an order of their own in each group, so that none leaves the device that has its group.


def order_of_rows(counts: Array | None, length: int, shape: tuple[int, ...]) -> Array:
    """`[length, *groups]`: the numbers of the rows `[N, *groups]`, those that count first; then numbers from N on."""
    numbers = lax.broadcasted_iota(jnp.int32, (length, *shape[1:]), 0)
    if counts is None:
        return numbers
    order = jnp.argsort(~counts, axis=0, stable=True).astype(jnp.int32)
    return jnp.concatenate([order, numbers[shape[0] :]])


def blocks_that_count(counts: Array, size: int) -> Array:
    """How many blocks, of `size` rows of each group, hold rows that count, where these come first."""
    most = jnp.max(jnp.sum(counts, 0, dtype=jnp.int32))
    return (most + (size - 1)) // size


def take_rows(index: Array, tree: Any) -> Any:
    """The rows `index` `[R, *groups]` of arrays `[N, *groups, ...]`."""

    def take(x: Array, index: Array) -> Array:
        return x.at[index].get(mode="clip")

    return jax.tree.map(lambda x: _of_each_group(take, index)(x, index), tree)


def put_rows(index: Array, tree: Any, block: Any) -> Any:
    """`tree` with the rows `index` replaced; numbers that no row has are left out."""

    def put(x: Array, y: Array, index: Array) -> Array:
        return x.at[index].set(y, mode="drop", unique_indices=True)

    return jax.tree.map(lambda x, y: _of_each_group(put, index)(x, y, index), tree, block)


def _of_each_group(f: Callable[..., Array], index: Array) -> Callable[..., Array]:
    for _ in index.shape[1:]:
        f = jax.vmap(f, in_axes=1, out_axes=1)
    return f


# What is differentiated, and in which dtype its gradient leaves.


def _only(is_perturbed: Any, tree: Any) -> Any:
    return jax.tree.map(lambda is_it, x: x if is_it else None, is_perturbed, tree)


def _merge(is_perturbed: Any, some: Any, tree: Any) -> Any:
    return jax.tree.map(lambda is_it, new, x: new if is_it else x, is_perturbed, some, tree)


def _stored(dtype: Any) -> Any:
    """float16 would lose what a loss scale, which comes with the cotangent, is there to save."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _dtypes(tree: Any) -> Any:
    """Of what may have a gradient: arrays of no elements."""
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda x: jnp.zeros(0, x.dtype) if is_real(x) else None, tree)


def _cast(gradients: Any, like: Any, dtype: Callable[[Any], Any] = lambda dtype: dtype) -> Any:
    return jax.tree.map(lambda x, d: None if d is None else d.astype(dtype(x.dtype)), like, gradients)
