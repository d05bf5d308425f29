"""Linear logits in blocks of rows, each with all its classes: 3 matmuls for a weighted sum, 4 for results per row.

A block function maps the logits `[R, V]` of R rows, of one or more linear layers, and whatever else belongs to these
rows to results `[R]`. jax differentiates it, block by block. Rows may be in groups (`layout.RowLayout`): then `[N]` is
`[n, *groups]` and `[R]` is `[r, *groups]` everywhere.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import (
    Perturbed,
    instantiate,
    is_symbolic_zero,
    reverse_mode_only,
    stopping_early,
    values_and_perturbed,
    varying_like,
    with_forward_mode,
)
from .._numerics import accumulation_dtype, limit
from .._rows import keep
from .layout import RowLayout
from .linear import (
    LinearLogits,
    from_product,
    gradient,
    per_row_fields,
    perturbed_options,
    product,
    replace,
    shared_fields,
    without_hidden_rows,
)


class Inputs(NamedTuple):
    """Of all rows, or of a block of them. As a result of differentiation: gradients, None where none is wanted."""

    layers: tuple[LinearLogits, ...]  # hidden [N, D], each with a D of its own; kernels to the same classes
    counts: Array | None  # bool [N]
    rows: Any  # pytree of [N, ...]
    shared: Any  # pytree of what all rows have in common
    class_mask: Array | None = None  # [V] or [N, V], where NaN may be hidden by it
    needed: Array | None = None  # bool [N]: only weights ask for the others' results; None: as `counts`

    def grouped(self, layout: RowLayout) -> "Inputs":
        layers = tuple(replace(x, layout.grouped(per_row_fields(x))) for x in self.layers)
        mask = self.class_mask
        mask = layout.grouped(mask) if mask is not None and mask.ndim > 1 else mask
        counts, rows, needed = layout.grouped((self.counts, self.rows, self.needed))
        return Inputs(layers, counts, rows, self.shared, mask, needed)


# fn(logits of each layer, counts, rows, shared) -> (results, results without derivative), pytrees of [R, ...]
BlockFunction = Callable[[tuple[Array, ...], Array | None, Any, Any], tuple[Any, Any]]
Static = tuple[BlockFunction, int]  # and how many rows a block has


class Summed(NamedTuple):
    """How `_differentiate` is to run."""

    fn: BlockFunction
    size: int
    perturbed: Perturbed
    every: bool  # rows of weight 0, too


def map_rows(fn: BlockFunction, size: int, inputs: Inputs) -> tuple[Any, Any]:
    """`fn` of all rows: results `[N]`, 0 in rows that do not count."""
    return reverse_mode_only(_mapped)((fn, size), varying_like(inputs, inputs))


def sum_rows(fn: BlockFunction, size: int, inputs: Inputs, weights: Array) -> tuple[Array, Any]:
    """sum_n weights_n fn(...)_n, with `weights` `[N]` and one result `[N]`; and the results without derivative."""
    return _summed((fn, size), *varying_like((inputs, weights), (inputs, weights)))


# Results per row: the cotangents come later, so the backward computes the logits once more.


def _mapped_primal(static: Static, inputs: Inputs) -> tuple[Any, Any]:
    return _evaluate(static, inputs)


def _mapped_forward(static: Static, inputs: Any) -> tuple[Any, Any]:
    inputs, perturbed = values_and_perturbed(inputs)
    return _evaluate(static, inputs), (inputs, perturbed)


def _mapped_backward(static: Static, residuals: Any, g: Any) -> tuple[Inputs | None]:
    inputs, perturbed = residuals
    if all(map(is_symbolic_zero, jax.tree.leaves(g[0], is_leaf=is_symbolic_zero))):
        return (None,)  # nothing depends on these results
    _, gradients = _differentiate(Summed(*static, perturbed, False), inputs, instantiate(g[0]))
    return (_cast(gradients, _Dtypes.of(inputs)),)


_mapped = jax.custom_vjp(_mapped_primal, nondiff_argnums=(0,))
_mapped.defvjp(_mapped_forward, _mapped_backward, symbolic_zeros=True)


# A sum: each row's cotangent is its weight times one number. That comes later, but is only a factor: the forward
# rule makes the gradients while it has the logits, and the backward multiplies them.


def _summed_primal(static: Static, inputs: Inputs, weights: Array) -> tuple[Array, Any]:
    losses, aux = _evaluate(static, inputs)
    return jnp.sum(weights * limit(weights, losses)), aux


def _summed_forward(static: Static, inputs: Any, weights: Any) -> tuple[tuple[Array, Any], Any]:
    inputs, perturbed = values_and_perturbed(inputs)
    how = Summed(*static, perturbed, weights.perturbed)
    (losses, aux), gradients = _differentiate(how, inputs, weights.value)
    weights = weights.value
    losses = limit(weights, losses)
    dtypes = _Dtypes.of(inputs)
    residuals = _cast(gradients, dtypes.stored()), losses, dtypes, _Dtypes.of(weights)
    return (jnp.sum(weights * losses), aux), residuals


def _summed_backward(static: Static, residuals: Any, g: Any) -> tuple[Inputs, Array]:
    gradients, losses, dtypes, of_weights = residuals
    g = instantiate(g[0])
    gradients = jax.tree.map(lambda x: g * x.astype(g.dtype), gradients)
    return _cast(gradients, dtypes), _cast(g * losses, of_weights)


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
        logits = tuple(from_product(layer, product(layer)) for layer in block.layers)
        return blocks.keep(fn(logits, block.counts, block.rows, block.shared), i)

    def body(i: Any, found: Any) -> Any:
        return blocks.put(found, i, results(i))

    return blocks.loop(body, blocks.zeros(jax.eval_shape(results, 0)))


@stopping_early
def _differentiate(stop: bool, static: Summed, inputs: Inputs, g: Any) -> tuple[Any, Inputs]:
    """The results, and the gradients of sum(g * real results), summed in the accumulation dtype."""
    fn, size, perturbed, every = static
    blocks = _Blocks(inputs, size, stop and not every)
    is_perturbed: Inputs = perturbed.tree(inputs)

    def step(i: Any) -> tuple[Any, Inputs]:
        block = blocks.take(i)

        def of_perturbed(products: Any, options: Any, rows: Any, shared: Any) -> Any:
            layers = map(replace, block.layers, options)
            logits = tuple(
                from_product(layer, z, block.class_mask) for layer, z in zip(layers, products, strict=True)
            )
            rows = _merge(is_perturbed.rows, rows, block.rows)
            shared = _merge(is_perturbed.shared, shared, block.shared)
            return fn(logits, block.counts, rows, shared)

        rows, shared = _only(is_perturbed.rows, block.rows), _only(is_perturbed.shared, block.shared)
        products = tuple(map(product, block.layers))
        options = tuple(map(perturbed_options, is_perturbed.layers, block.layers))
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
    found = gradient(perturbed, block, d_product, class_mask)
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
        inputs, mask = self.inputs, self.inputs.class_mask
        counts, rows = self.rows_of((inputs.counts, inputs.rows), i)

        def of_layer(layer: LinearLogits) -> LinearLogits:
            return without_hidden_rows(replace(layer, self.rows_of(per_row_fields(layer), i)), counts)

        mask = self.rows_of(mask, i) if mask is not None and mask.ndim > 1 else mask
        return Inputs(tuple(map(of_layer, inputs.layers)), counts, rows, inputs.shared, mask)

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
            return jax.tree.map(
                lambda x, y: lax.dynamic_update_slice_in_dim(x, y, i * self.size, 0), total, block
            )
        return put_rows(self._index(i), total, block)

    def add(self, total: Inputs, i: Any, block: Inputs) -> Inputs:
        def plus(x: Any, y: Any) -> Any:
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), x, y)

        def of_layer(total: LinearLogits, block: LinearLogits) -> LinearLogits:
            rows = self.put(per_row_fields(total), i, per_row_fields(block))
            return replace(total, rows | plus(shared_fields(total), shared_fields(block)))

        layers = tuple(map(of_layer, total.layers, block.layers))
        return Inputs(layers, None, self.put(total.rows, i, block.rows), plus(total.shared, block.shared))

    def zeros(self, of_block: Any) -> Any:
        rows = self.inputs.layers[0].hidden.shape[0]
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), of_block)

    def zero_gradients(self, of_block: Inputs) -> Inputs:
        def sums(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), tree)

        def of_layer(layer: LinearLogits) -> LinearLogits:
            return replace(layer, self.zeros(per_row_fields(layer)) | sums(shared_fields(layer)))

        layers = tuple(map(of_layer, of_block.layers))
        return Inputs(layers, None, self.zeros(of_block.rows), sums(of_block.shared))

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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Dtypes:
    treedef: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> "_Dtypes":
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(x.dtype for x in leaves))

    def stored(self) -> "_Dtypes":
        return _Dtypes(self.treedef, tuple(map(_stored, self.leaves)))


def _stored(dtype: Any) -> Any:
    """float16 would lose what a loss scale, which comes with the cotangent, is there to save."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _cast(gradients: Any, dtypes: _Dtypes) -> Any:
    tree = jax.tree.unflatten(dtypes.treedef, dtypes.leaves)
    return jax.tree.map(lambda dtype, d: None if d is None else d.astype(dtype), tree, gradients)
