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
    cast_like,
    dtypes_of,
    instantiate,
    reverse_mode_only,
    stopping_early,
    stored,
    values_and_perturbed,
    varying_like,
    with_forward_mode,
)
from .._devices import made_once
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


class Static(NamedTuple):
    fn: BlockFunction
    size: int  # how many rows of each group have logits at a time: a piece
    pieces: int = 1  # of a block, of which the gradient of the logits exists
    fused: int = 0  # up to so many matmuls that need it make it themselves

    @property
    def rows(self) -> int:
        """Of each group in a block."""
        return self.size * self.pieces


QUARTERS = 4  # of a block: its matmuls take as many as hold rows that count


def map_rows(static: Static, inputs: Inputs) -> tuple[Any, Any]:
    """`fn` of all rows: results `[N]`, 0 in rows that do not count."""
    return reverse_mode_only(_mapped)(static, varying_like(inputs, inputs))


def sum_rows(static: Static, inputs: Inputs, weights: Array) -> tuple[Array, Any]:
    """sum_n weights_n fn(...)_n, with `weights` `[N]` and one result `[N]`; and the results without derivative."""
    return _summed(static, *varying_like((inputs, weights), (inputs, weights)))


# Results per row: the cotangents come later, so the backward computes the logits once more.


def _mapped_forward(static: Static, inputs: Any) -> tuple[Any, Any]:
    inputs, perturbed = values_and_perturbed(inputs)
    return _evaluate(static, inputs), (inputs, perturbed)


def _mapped_backward(static: Static, residuals: Any, g: Any) -> tuple[Inputs | None]:
    inputs, perturbed = residuals
    if all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(g[0])):
        return (None,)  # nothing depends on these results
    _, gradients = _differentiate((static, perturbed, False), inputs, instantiate(g[0]))
    return (cast_like(gradients, inputs),)


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
    (losses, aux), gradients = _differentiate((static, perturbed, every), inputs, weights)
    losses = limit(weights, losses)
    residuals = cast_like(gradients, inputs, stored), losses, dtypes_of((inputs, weights))
    return (jnp.sum(weights * losses), aux), residuals


def _summed_backward(static: Static, residuals: Any, g: Any) -> Any:
    gradients, losses, dtypes = residuals
    g = instantiate(g[0])
    return cast_like((jax.tree.map(lambda x: g * x.astype(g.dtype), gradients), g * losses), dtypes)


_summed_rule = jax.custom_vjp(_summed_primal, nondiff_argnums=(0,))
_summed_rule.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)
_summed = with_forward_mode(_summed_rule)


# The loops over pieces, and over blocks of them.


@stopping_early
def _evaluate(stop: bool, static: Static, inputs: Inputs) -> tuple[Any, Any]:
    pieces = _Pieces(inputs, static, stop)

    def results(i: Any) -> Any:
        piece = pieces.take(i)
        logits = tuple(map(linear.from_product, piece.layers, pieces.products(piece)))
        return pieces.keep(static.fn(logits, piece.counts, piece.rows, piece.shared), i)

    def body(i: Any, found: Any) -> Any:
        return pieces.put(found, i, results(i))

    init = pieces.zeros(jax.eval_shape(results, 0))
    return lax.fori_loop(0, pieces.needed, body, varying_like(inputs, init))


@stopping_early
def _differentiate(stop: bool, how: Any, inputs: Inputs, g: Any) -> tuple[Any, Inputs]:
    """The results, and the gradients of sum(g * real results), summed in the accumulation dtype.

    Each piece of a block leaves the gradient of its logits as an operand of the two matmuls, which take the block
    whole: gradients of kernels are read and written as often as there are blocks, or written once where there is one.
    """
    static, perturbed, every = how  # every: also rows of weight 0
    is_perturbed: Inputs = perturbed.tree(inputs)
    matmuls_of = [bool(layer.hidden) + bool(layer.kernel) for layer in is_perturbed.layers]
    fused = max(matmuls_of, default=0) <= static.fused
    if static.pieces > 1 and not any(layer.kernel for layer in is_perturbed.layers):
        # nothing is summed over rows: a quarter of a block is a block
        static = static._replace(size=max(static.pieces // QUARTERS, 1) * static.size, pieces=1)
    pieces = _Pieces(inputs, static, stop and not every)

    def of_piece(i: Any) -> tuple[Any, Inputs, list[list[Array]]]:
        """(results, gradients of all but hidden and kernels, operands of the matmuls that make these).

        An operand for each layer, in two lists where the two matmuls are to have one each.
        """
        piece = pieces.take(i)

        def of_perturbed(products: Any, options: Any, rows: Any, shared: Any) -> Any:
            layers = map(replace, piece.layers, options)
            of_layer = functools.partial(linear.from_product, class_mask=piece.class_mask)
            logits = tuple(map(of_layer, layers, products))
            rows = _merge(is_perturbed.rows, rows, piece.rows)
            shared = _merge(is_perturbed.shared, shared, piece.shared)
            return static.fn(logits, piece.counts, rows, shared)

        rows, shared = _only(is_perturbed.rows, piece.rows), _only(is_perturbed.shared, piece.shared)
        products = pieces.products(piece)
        options = tuple(map(linear.perturbed_options, is_perturbed.layers, piece.layers))
        real, vjp, integers = jax.vjp(of_perturbed, products, options, rows, shared, has_aux=True)
        cotangent = pieces.keep(pieces.rows_of(g, i), i)
        cotangent = jax.tree.map(lambda x, like: x.astype(like.dtype), cotangent, real)
        d_products, d_options, d_rows, d_shared = vjp(cotangent)

        operands = [list(map(linear.operand, piece.layers, d_products))]
        if fused and static.pieces == 1:
            # XLA, which does not know that it is the same, makes each as a part of its matmul
            again = vjp(lax.optimization_barrier(cotangent))[0]
            operands.append(list(map(linear.operand, piece.layers, again)))
        biases = map(linear.bias_gradient, is_perturbed.layers, d_products)
        fields = ({"bias": bias} | options for bias, options in zip(biases, d_options, strict=True))
        layers = tuple(map(replace, map(linear.without_arrays, piece.layers), fields))
        return pieces.keep((real, integers), i), Inputs(layers, None, d_rows, d_shared), operands

    def matmuls(block: Any, operands: list[list[Array]], sums: Any, number: int) -> tuple[Any, Any]:
        """Gradients of hidden, and sums of those of kernels, by the first so many pieces of a block."""
        rows, length = pieces.take(block * static.pieces, number), number * static.size
        hiddens, kernels = [], []
        layers = zip(is_perturbed.layers, rows.layers, operands[0], operands[-1], sums, strict=True)
        for wanted, layer, for_hidden, for_kernel, total in layers:
            hidden = kernel = None
            if wanted.hidden:
                hidden = linear.hidden_gradient(layer, for_hidden[:length], inputs.class_mask)
                hidden = hidden.astype(stored(layer.hidden.dtype))
                hidden = jnp.pad(hidden, [(0, static.rows - length)] + [(0, 0)] * (hidden.ndim - 1))
            if wanted.kernel:
                kernel = linear.kernel_gradient(layer, for_kernel[:length])
                kernel = kernel.astype(stored(layer.kernel.dtype)) if pieces.one_block else total + kernel
            hiddens.append(hidden)
            kernels.append(kernel)
        return hiddens, kernels

    def of_block(block: Any, carry: Any) -> Any:
        *sums, hiddens, kernels = carry
        first, number = block * static.pieces, pieces.needed_of(block)

        def add(i: Any, carry: Any) -> Any:
            found, total, operands = carry
            results, gradients, more = of_piece(first + i)
            found, total = pieces.put(found, first + i, results), pieces.add(total, first + i, gradients)
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * static.size, axis=0)
            return found, total, more if static.pieces == 1 else jax.tree.map(put, operands, more)

        operands = jax.tree.map(lambda x: lax.empty((static.rows, *x.shape[1:]), x.dtype), shapes[2])
        init = varying_like(inputs, (*sums, operands))
        if static.pieces > 1:
            *sums, operands = lax.fori_loop(0, number, add, init)
        else:
            *sums, operands = add(0, init)
            operands = operands if fused else made_once(operands)
        if isinstance(number, int):
            more, kernels = matmuls(block, operands, kernels, number)
        else:
            step = pieces.steps[0]
            branches = [functools.partial(matmuls, block, number=n) for n in pieces.steps]
            more, kernels = lax.switch((number + (step - 1)) // step - 1, branches, operands, kernels)
        return *sums, pieces.put(hiddens, first, more), kernels

    shapes = jax.eval_shape(of_piece, 0)
    pairs = list(zip(is_perturbed.layers, inputs.layers, strict=True))
    hiddens = [jnp.zeros(y.hidden.shape, stored(y.hidden.dtype)) if x.hidden else None for x, y in pairs]
    kernels = [jnp.zeros(y.kernel.shape, y.dtype) if x.kernel else None for x, y in pairs]
    init = pieces.zeros(shapes[0]), pieces.zero_gradients(shapes[1]), hiddens, kernels
    if pieces.one_block:
        carry = of_block(0, init)
    else:
        carry = lax.fori_loop(0, pieces.blocks_needed, of_block, varying_like(inputs, init))
    results, gradients, hiddens, kernels = carry
    fields = [{"hidden": x, "kernel": y} for x, y in zip(hiddens, kernels, strict=True)]
    return results, gradients._replace(layers=tuple(map(replace, gradients.layers, fields)))


class _Pieces:
    """N rows, `size` of each group at a time: those that count first, in their order."""

    def __init__(self, inputs: Inputs, static: Static, stop: bool):
        rows, *groups, _ = inputs.layers[0].hidden.shape
        self.inputs, self.static = inputs, static
        number = -(-rows // static.size)
        self.blocks = -(-number // static.pieces)
        self.one_block = bool(self.blocks == 1)  # not where a program is exported for any number of rows
        self.needed: Any = number
        self.order = None
        needed = inputs.counts if inputs.needed is None else inputs.needed
        length = self.blocks * static.rows
        if needed is not None or length != rows:
            # row numbers from N on fill the last block: copies of some row that are kept out of all results
            self.order = order_of_rows(needed, length, (rows, *groups))
        if needed is not None and stop:
            self.needed = blocks_that_count(needed, static.size)

    @property
    def blocks_needed(self) -> Any:
        if not isinstance(self.needed, Array):
            return self.blocks
        return (self.needed + (self.static.pieces - 1)) // self.static.pieces

    @property
    def steps(self) -> list[int]:
        """The numbers of pieces that a block may be cut to where some of its rows do not count."""
        pieces = self.static.pieces
        step = -(-pieces // QUARTERS)
        return [min(n, pieces) for n in range(step, pieces + step, step)]

    def needed_of(self, block: Any) -> Any:
        """How many pieces of a block are needed, one of `steps`."""
        pieces = self.static.pieces
        if not isinstance(self.needed, Array) or pieces == 1:
            return pieces
        step = self.steps[0]
        needed = jnp.clip(self.needed - block * pieces, 1, pieces)
        return jnp.minimum((needed + (step - 1)) // step * step, pieces)

    def products(self, piece: Inputs) -> tuple[Array, ...]:
        hidden = made_once([layer.hidden for layer in piece.layers])
        layers = (replace(layer, {"hidden": x}) for layer, x in zip(piece.layers, hidden, strict=True))
        return tuple(map(linear.product, layers))

    def take(self, i: Any, number: int = 1) -> Inputs:
        """So many pieces from the i-th on."""
        per_row, shared = self.inputs.parts()
        piece = self.inputs.of_parts(self.rows_of(per_row, i, number), shared)
        layers = (linear.without_hidden_rows(layer, piece.counts) for layer in piece.layers)
        return piece._replace(layers=tuple(layers))

    def keep(self, results: Any, i: Any) -> Any:
        """0 in rows that do not count, or only fill the block."""
        if self.order is None:
            return results
        counts = self._index(i) < self.inputs.layers[0].hidden.shape[0]
        if self.inputs.counts is not None:
            counts &= self.rows_of(self.inputs.counts, i)
        return jax.tree.map(lambda x: keep(counts, x), results)

    def rows_of(self, tree: Any, i: Any, number: int = 1) -> Any:
        if self.order is not None:
            return take_rows(self._index(i, number), tree)
        start, size = i * self.static.size, number * self.static.size
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), tree)

    def put(self, total: Any, i: Any, rows: Any) -> Any:
        """`total` with these rows, those of the i-th piece and maybe more."""
        sizes = {x.shape[0] for x in jax.tree.leaves(rows)}
        if self.order is None or not sizes:
            start = i * self.static.size
            return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, 0), total, rows)
        return put_rows(self._index(i, sizes.pop() // self.static.size), total, rows)

    def add(self, total: Inputs, i: Any, piece: Inputs) -> Inputs:
        (rows, shared), (more_rows, more) = total.parts(), piece.parts()
        shared = jax.tree.map(lambda x, y: x + y.astype(x.dtype), shared, more)
        return total.of_parts(self.put(rows, i, more_rows), shared)

    def zeros(self, of_piece: Any) -> Any:
        rows = self.inputs.layers[0].hidden.shape[0]
        return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), of_piece)

    def zero_gradients(self, of_piece: Inputs) -> Inputs:
        rows, shared = of_piece.parts()
        shared = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), shared)
        return of_piece.of_parts(self.zeros(rows), shared)

    def _index(self, i: Any, number: int = 1) -> Array:
        size = self.static.size
        return lax.dynamic_slice_in_dim(self.order, i * size, number * size)


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
