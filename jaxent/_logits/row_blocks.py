"""Linear logits in blocks of rows, each with all its classes: 3 matmuls for a weighted sum, 4 for results per row.

A block function maps the logits `[R, V]` of R rows, of one or more linear layers, and whatever else belongs to these
rows to results `[R]`. jax differentiates it, block by block. Rows may be in groups (`layout.Rows`): then `[N]` is
`[n, *groups]` and `[R]` is `[r, *groups]` everywhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._derivatives import (
    Moving,
    instantiate,
    is_symbolic_zero,
    stopping_early,
    values_and_moving,
    varying_like,
    with_forward_mode,
)
from .._numerics import accumulation_dtype
from .._reduction import keep
from .linear import LinearLogits, from_product, gradient, product


class Inputs(NamedTuple):
    """Of all rows, or of a block of them. As a result of differentiation: gradients, None where none is wanted."""

    layers: tuple[LinearLogits, ...]  # hidden [N, D], each with a D of its own; kernels to the same classes
    counts: Array | None  # bool [N]
    rows: Any  # pytree of [N, ...]
    shared: Any  # pytree of what all rows have in common


# fn(logits of each layer, counts, rows, shared) -> (real results, integer results), pytrees of [R]
BlockFunction = Callable[[tuple[Array, ...], Array | None, Any, Any], tuple[Any, Any]]
Static = tuple[BlockFunction, int]  # and how many rows a block has


def map_rows(fn: BlockFunction, size: int, inputs: Inputs) -> tuple[Any, Any]:
    """`fn` of all rows: results `[N]`, 0 in rows that do not count."""
    return _mapped((fn, size), varying_like(inputs, inputs))


def sum_rows(fn: BlockFunction, size: int, inputs: Inputs, weights: Array) -> Array:
    """sum_n weights_n fn(...)_n, with `weights` `[N]` and one real result."""
    return _summed((fn, size), *varying_like((inputs, weights), (inputs, weights)))


# Results per row: the cotangents come later, so the backward computes the logits once more.


def _mapped_primal(static: Static, inputs: Inputs) -> tuple[Any, Any]:
    return _evaluate(static, inputs)


def _mapped_forward(static: Static, inputs: Any) -> tuple[Any, Any]:
    inputs, moving = values_and_moving(inputs)
    return _evaluate(static, inputs), (inputs, moving)


def _mapped_backward(static: Static, residuals: Any, g: Any) -> tuple[Inputs | None]:
    inputs, moving = residuals
    if all(map(is_symbolic_zero, jax.tree.leaves(g[0], is_leaf=is_symbolic_zero))):
        return (None,)  # nothing depends on these results
    _, gradients = _differentiate((*static, moving), inputs, instantiate(g[0]))
    return (_cast(gradients, _Dtypes.of(inputs)),)


_mapped = jax.custom_vjp(_mapped_primal, nondiff_argnums=(0,))
_mapped.defvjp(_mapped_forward, _mapped_backward, symbolic_zeros=True)


# A sum: each row's cotangent is its weight times one number. That comes later, but is only a factor: the forward
# rule makes the gradients while it has the logits, and the backward multiplies them.


def _summed_primal(static: Static, inputs: Inputs, weights: Array) -> Array:
    losses, _ = _evaluate(static, inputs)
    return jnp.sum(weights * losses)


def _summed_forward(static: Static, inputs: Any, weights: Any) -> tuple[Array, Any]:
    inputs, moving = values_and_moving(inputs)
    weights = weights.value
    (losses, _), gradients = _differentiate((*static, moving), inputs, weights)
    dtypes = _Dtypes.of(inputs)
    residuals = _cast(gradients, dtypes.stored()), losses, dtypes, _Dtypes.of(weights)
    return jnp.sum(weights * losses), residuals


def _summed_backward(static: Static, residuals: Any, g: Any) -> tuple[Inputs, Array]:
    gradients, losses, dtypes, of_weights = residuals
    g = instantiate(g)
    return _cast(jax.tree.map(lambda x: g * x, gradients), dtypes), _cast(g * losses, of_weights)


_summed_rule = jax.custom_vjp(_summed_primal, nondiff_argnums=(0,))
_summed_rule.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
_summed = with_forward_mode(_summed_rule)


# The loop over blocks.


@stopping_early
def _evaluate(stop: bool, static: Static, inputs: Inputs) -> tuple[Any, Any]:
    fn, size = static
    blocks = _Blocks(inputs, size, stop)

    def results(i: Any) -> Any:
        layers, counts, rows, shared = blocks.take(i)
        logits = tuple(from_product(layer, product(layer)) for layer in layers)
        return blocks.keep(fn(logits, counts, rows, shared), i)

    def body(i: Any, found: Any) -> Any:
        return blocks.put(found, i, results(i))

    return blocks.loop(body, blocks.zeros(jax.eval_shape(results, 0)))


@stopping_early
def _differentiate(
    stop: bool, static: tuple[BlockFunction, int, Moving], inputs: Inputs, g: Any
) -> tuple[Any, Inputs]:
    """The results, and the gradients of sum(g * real results), summed in the accumulation dtype."""
    fn, size, moving = static
    blocks = _Blocks(inputs, size, stop)
    is_moving: Inputs = moving.tree(inputs)

    def step(i: Any) -> tuple[Any, Inputs]:
        block = blocks.take(i)

        def of_moving(products: Any, rows: Any, shared: Any) -> Any:
            logits = tuple(from_product(*pair) for pair in zip(block.layers, products, strict=True))
            rows = _merge(is_moving.rows, rows, block.rows)
            shared = _merge(is_moving.shared, shared, block.shared)
            return fn(logits, block.counts, rows, shared)

        rows, shared = _only(is_moving.rows, block.rows), _only(is_moving.shared, block.shared)
        products = tuple(map(product, block.layers))
        real, vjp, integers = jax.vjp(of_moving, products, rows, shared, has_aux=True)
        cotangent = blocks.keep(blocks.rows_of(g, i), i)
        cotangent = jax.tree.map(lambda x, like: x.astype(like.dtype), cotangent, real)
        d_products, d_rows, d_shared = vjp(cotangent)
        d_layers = tuple(map(_layer_gradient, is_moving.layers, block.layers, d_products))
        results = blocks.keep((real, integers), i)
        return results, Inputs(d_layers, None, d_rows, d_shared)

    def body(i: Any, carry: Any) -> Any:
        found, total = carry
        results, gradients = step(i)
        return blocks.put(found, i, results), blocks.add(total, i, gradients)

    results, gradients = jax.eval_shape(step, 0)
    return blocks.loop(body, (blocks.zeros(results), blocks.zero_gradients(gradients)))


def _layer_gradient(moves: LinearLogits, block: LinearLogits, d_product: Array) -> LinearLogits:
    found = gradient(moves, block, d_product)
    hidden = found.hidden
    return dataclasses.replace(
        found, hidden=None if hidden is None else hidden.astype(_stored(block.hidden.dtype))
    )


class _Blocks:
    """N rows, `size` of each group at a time: those that count first, in their order."""

    def __init__(self, inputs: Inputs, size: int, stop: bool):
        rows, *groups, _ = inputs.layers[0].hidden.shape
        self.inputs, self.size = inputs, size
        self.number: Any = -(-rows // size)
        self.order = None
        if inputs.counts is not None or rows % size:
            # row numbers from N on fill the last block: copies of some row that are kept out of all results
            self.order = order_of_rows(inputs.counts, self.number * size, (rows, *groups))
        if inputs.counts is not None and stop:
            self.number = blocks_that_count(inputs.counts, size)

    def take(self, i: Any) -> Inputs:
        layers, counts, rows, shared = self.inputs
        counts, rows = self.rows_of((counts, rows), i)

        def of_layer(layer: LinearLogits) -> LinearLogits:
            # a zero in place of what is hidden: it will be multiplied by a zero gradient
            hidden = keep(None if counts is None else counts[..., None], self.rows_of(layer.hidden, i))
            return dataclasses.replace(layer, hidden=hidden)

        return Inputs(tuple(map(of_layer, layers)), counts, rows, shared)

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
            hidden = self.put(total.hidden, i, block.hidden)
            kernel, bias = plus((total.kernel, total.bias), (block.kernel, block.bias))
            return dataclasses.replace(total, hidden=hidden, kernel=kernel, bias=bias)

        layers = tuple(map(of_layer, total.layers, block.layers))
        return Inputs(layers, None, self.put(total.rows, i, block.rows), plus(total.shared, block.shared))

    def zeros(self, of_block: Any) -> Any:
        rows = self.inputs.layers[0].hidden.shape[0]
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), of_block)

    def zero_gradients(self, of_block: Inputs) -> Inputs:
        def sums(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), tree)

        def of_layer(layer: LinearLogits) -> LinearLogits:
            kernel, bias = sums((layer.kernel, layer.bias))
            return dataclasses.replace(layer, hidden=self.zeros(layer.hidden), kernel=kernel, bias=bias)

        layers, _, rows, shared = of_block
        return Inputs(tuple(map(of_layer, layers)), None, self.zeros(rows), sums(shared))

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


def _only(is_moving: Any, tree: Any) -> Any:
    return jax.tree.map(lambda moves, x: x if moves else None, is_moving, tree)


def _merge(is_moving: Any, moved: Any, tree: Any) -> Any:
    return jax.tree.map(lambda moves, new, x: new if moves else x, is_moving, moved, tree)


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
