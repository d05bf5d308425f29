"""Linear logits in blocks of classes: for few rows and very many classes.

A pass reads the kernel once and writes its gradient once, where blocks of rows do so as often as there are blocks.
But a row's cotangent is known after the last block only, so the logits are computed again: 4 matmuls. Rows may be in
groups (`layout.RowLayout`): then `[N]` is `[n, *groups]` everywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .._block import Block
from .._derivatives import (
    Perturbed,
    reverse_mode_only,
    slope_rule,
    stopping_early,
    varying_like,
    zeros_like_any,
)
from .._devices import is_known, made_once
from .._gradient import distribution_gradient, logits_gradient, phi_gradient
from .._rows import keep
from .._sparse import SparseDistribution
from .._statistics import PHIS, Expectation, Partial, expectations, identity, merge, partial_statistics
from . import dense, linear
from .layout import ClassLayout
from .row_blocks import blocks_that_count, order_of_rows, put_rows, take_rows

ROWS = 256  # at least so many are taken at a time where some do not count


class Static(NamedTuple):
    names: tuple[str, ...]  # of statistics
    layout: ClassLayout
    rows: int  # that a block has of each group


class Inputs(NamedTuple):
    block: Block  # its logits are a LinearLogits of hidden [N, D]
    counts: Array | None  # bool [N]
    of_rows: Any  # pytree of [N]
    needed: Any  # how many blocks of rows hold rows that count


def partials(
    layout: ClassLayout,
    names: tuple[str, ...],
    block: Block,
    counts: Array | None,
    label_logit: Array | None = None,
) -> tuple[Partial, dict[str, Array]]:
    """(the partial statistics that `names` need, statistics that are integers) of N rows; the rank asks for z_y `[N]`.

    Their derivative is asked for where a gradient is differentiated: the gradient itself is that of `slope`.
    """
    return _in_blocks_of_rows(_partials, Static(names, layout, 0), block, counts, label_logit)


def expected(
    layout: ClassLayout, names: tuple[str, ...], block: Block, counts: Array | None, whole: Partial
) -> dict[str, Expectation]:
    """What these classes add to the expectations that `names` need, with m and r of all classes: `whole`."""
    return _in_blocks_of_rows(_expected, Static(names, layout, 0), block, counts, whole)


def slope(
    layout: ClassLayout, names: tuple[str, ...], block: Block, counts: Array | None, whole: Partial
) -> dict[str, Array]:
    """Zeros `[N]` whose derivative by these classes is that of the statistics `names`, made of all classes: `whole`."""
    return _in_blocks_of_rows(_slope, Static(names, layout, 0), block, counts, whole)


def _in_blocks_of_rows(rule: Any, static: Static, block: Block, counts: Array | None, of_rows: Any) -> Any:
    """`rule` of all rows, or of some at a time, of which those that do not count are left out."""
    rows, *groups, _ = block.logits.hidden.shape
    wide = isinstance(block.distribution, Array) or (
        block.class_mask is not None and block.class_mask.ndim > 1
    )
    blocks = min(rows * math.prod(groups) // ROWS, rows, 8) if is_known(rows) else 1
    if counts is None or wide or blocks < 2:
        inputs = Inputs(block, counts, of_rows, jnp.ones((), jnp.int32))
        return _apply(rule, static._replace(rows=rows), inputs)
    size = -(-rows // blocks)
    order = order_of_rows(counts, size * blocks, (rows, *groups))  # beyond N: what fills the last block
    per_row = linear.per_row_fields(block.logits), _of_rows(block), of_rows
    fields, beside, of_rows = take_rows(order, per_row)
    block = block._replace(logits=linear.replace(block.logits, fields), **beside)
    needed = blocks_that_count(counts, size)
    counts = take_rows(order, counts) & (order < rows)
    found = _apply(rule, static._replace(rows=size), Inputs(block, counts, of_rows, needed))
    return put_rows(order, jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), found), found)


def _of_rows(block: Block) -> dict[str, Any]:
    """What rows have beside their logits, but for arrays over the classes."""
    q = block.distribution if isinstance(block.distribution, SparseDistribution) else None
    found = {"label": block.label, "distribution": q, "classes": block.classes, "phi": block.phi}
    return {name: x for name, x in found.items() if x is not None}


def _apply(rule: Any, static: Static, inputs: Inputs) -> Any:
    return reverse_mode_only(rule)(static, varying_like(inputs, inputs))


def _partials_primal(static: Static, inputs: Inputs) -> Any:
    return _forward_pass(static, _hide(inputs))


_partials = jax.custom_vjp(_partials_primal, nondiff_argnums=(0,))
_partials.defvjp(lambda static, inputs: (_partials_primal(static, inputs), None), lambda *_: (None,))


def _expected_primal(static: Static, inputs: Inputs) -> dict[str, Expectation]:
    return _expectation_pass(static, _hide(inputs))


_expected = jax.custom_vjp(_expected_primal, nondiff_argnums=(0,))
_expected.defvjp(lambda static, inputs: (_expected_primal(static, inputs), None), lambda *_: (None,))


def _gradient(static: Static, inputs: Inputs, perturbed: Perturbed, g: dict[str, Array]) -> Inputs:
    return Inputs(_backward_pass((static, perturbed), _hide(inputs), g), None, None, None)


def _zeros(static: Static, inputs: Inputs) -> dict[str, Array]:
    return {
        name: zeros_like_any(inputs, x)
        for name, x in dense.like_results(static.names, inputs.of_rows).items()
    }


_slope = slope_rule(_zeros, _gradient)


def _hide(inputs: Inputs) -> Inputs:
    """Zeros in place of what does not count: they will be multiplied by a zero gradient."""
    block, counts = inputs.block, inputs.counts
    if counts is None:
        return inputs
    q = jax.tree.map(lambda x: keep(counts[..., None], x), block.distribution)
    logits = linear.without_hidden_rows(block.logits, counts)
    return inputs._replace(block=block._replace(logits=logits, distribution=q))


@stopping_early
def _forward_pass(stop: bool, static: Static, inputs: Inputs) -> tuple[Partial, dict[str, Array]]:
    names, block = static.names, inputs.block

    def partials(row: Any, start: Any, classes: int) -> tuple[Partial, dict[str, Array]]:
        part = _part(static, block, row, start, classes)
        part = part._replace(logits=linear.from_product(part.logits, linear.product(part.logits)))
        z = lax.stop_gradient(part.wide_logits())
        integers = {}
        if "prediction" in names:
            lane = jnp.argmax(z, -1).astype(jnp.int32)
            integers["prediction"] = static.layout.of_lane(lane, start, classes)
        if "rank" in names:
            above = ~(z <= _rows(inputs.of_rows, row, static.rows)[..., None]) & ~part.hit()
            integers["rank"] = jnp.sum(above, -1, dtype=jnp.int32)
        how = dense.platform_max_and_rest, dense.platform_select_label
        return partial_statistics(names, part, *how), integers

    def step(start: Any, classes: int, row: Any, carry: Any) -> Any:
        part, here = partials(row, start, classes)
        whole, before = _rows(carry, row, static.rows)
        integers = {}
        if "prediction" in names:
            larger = ~(part.m <= whole.m) & ~jnp.isnan(whole.m)  # a NaN is the largest, as in argmax
            tied = (part.m == whole.m) | (jnp.isnan(part.m) & jnp.isnan(whole.m))
            first = larger | (tied & (here["prediction"] < before["prediction"]))
            integers["prediction"] = jnp.where(first, here["prediction"], before["prediction"])
        if "rank" in names:
            integers["rank"] = before["rank"] + here["rank"]
        return _put(carry, (merge(whole, part), integers), row)

    def over_rows(start: Any, classes: int, carry: Any) -> Any:
        return _over_rows(stop, static, inputs, functools.partial(step, start, classes), carry)

    rows = block.logits.hidden.shape[0]
    of_block = jax.eval_shape(functools.partial(partials, 0, 0, static.layout.width))
    of_all = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), of_block)
    init = identity(of_all[0]), jax.tree.map(jnp.zeros_like, of_all[1])
    return _over_classes(static, inputs, over_rows, init)


@stopping_early
def _expectation_pass(stop: bool, static: Static, inputs: Inputs) -> dict[str, Expectation]:
    block, whole = inputs.block, inputs.of_rows

    def of_part(start: Any, classes: int, row: Any) -> dict[str, Expectation]:
        part = _part(static, block, row, start, classes)
        part = part._replace(logits=linear.from_product(part.logits, linear.product(part.logits)))
        return expectations(static.names, part, _rows(whole, row, static.rows))

    def over_rows(start: Any, classes: int, carry: Any) -> Any:
        def step(row: Any, carry: Any) -> Any:
            total = jax.tree.map(jnp.add, _rows(carry, row, static.rows), of_part(start, classes, row))
            return _put(carry, total, row)

        return _over_rows(stop, static, inputs, step, carry)

    names = [name for name in PHIS if name in static.names]
    init = {name: Expectation(jnp.zeros_like(whole.m), jnp.zeros_like(whole.m)) for name in names}
    return _over_classes(static, inputs, over_rows, init)


@stopping_early
def _backward_pass(stop: bool, how: tuple[Static, Perturbed], inputs: Inputs, g: dict[str, Array]) -> Block:
    """The gradients of what is perturbed, None for the rest."""
    static, perturbed = how
    block, whole = inputs.block, inputs.of_rows
    is_perturbed: Block = perturbed.tree(inputs).block

    def tile(start: Any, classes: int, row: Any) -> Block:
        part = _part(static, block, row, start, classes)

        def from_product(options: Any, z: Array) -> Array:
            return linear.from_product(linear.replace(part.logits, options), z, part.class_mask)

        options = linear.perturbed_options(is_perturbed.logits, part.logits)
        z, vjp = jax.vjp(from_product, options, linear.product(part.logits))
        part_whole, part_g, counts = _rows((whole, g, inputs.counts), row, static.rows)
        built = part._replace(logits=z)

        def of_counting_rows(x: Array) -> Array:
            # a select, so that NaN in a row that does not count stays there
            return x if counts is None else jnp.where(counts[..., None], x, 0)

        dz = of_counting_rows(logits_gradient(built, part_whole, part_g))
        d_options, d_product = vjp(dz)
        distribution = phi = None
        if any(jax.tree.leaves(is_perturbed.distribution)):
            distribution = distribution_gradient(built, part_whole, part_g)
            distribution = jax.tree.map(of_counting_rows, distribution)
        if any(jax.tree.leaves(is_perturbed.phi)):
            phi = dataclasses.replace(part.phi, per_row=keep(counts, phi_gradient(built, part_whole, part_g)))
        wanted, layer = is_perturbed.logits, part.logits
        operand = made_once(linear.operand(layer, d_product))
        fields = d_options | {"bias": linear.bias_gradient(wanted, d_product)}
        if wanted.hidden:
            fields["hidden"] = linear.hidden_gradient(layer, operand, part.class_mask)
        if wanted.kernel:
            fields["kernel"] = linear.kernel_gradient(layer, operand)
        layer = linear.replace(linear.without_arrays(layer), fields)
        return Block(layer, distribution=distribution, phi=phi)

    def over_rows(start: Any, classes: int, total: _Total) -> _Total:
        """Adds to what rows and all classes have, and writes what the classes of a block have."""

        def step(row: Any, carry: Any) -> Any:
            rows, *others = carry
            found = _Total.of(tile(start, classes, row))
            rows = _put(rows, jax.tree.map(jnp.add, _rows(rows, row, static.rows), found.rows), row)
            return rows, *jax.tree.map(jnp.add, others, [found.all, found.classes])

        shapes = _Total.of(jax.eval_shape(functools.partial(tile, start, classes, 0)))
        here = jax.tree.map(jnp.zeros_like, shapes.classes)
        carry = varying_like(inputs, (total.rows, total.all, here))
        rows, of_all, here = _over_rows(stop, static, inputs, step, carry)

        def put(axis: int, x: Array | None, y: Array) -> Array | None:
            return None if x is None else static.layout.put(x, y.astype(x.dtype), start, axis)

        axes = {"kernel": layer.class_axis, "bias": -1}, -1
        return _Total(rows, jax.tree.map(put, axes, total.classes, here), of_all)

    layer, perturbed_layer = block.logits, is_perturbed.logits
    shapes = _Total.of(jax.eval_shape(functools.partial(tile, 0, static.layout.width, 0)))
    rows = jax.tree.map(lambda x: jnp.zeros((layer.hidden.shape[0], *x.shape[1:]), x.dtype), shapes.rows)
    of_all = jax.tree.map(jnp.zeros_like, shapes.all)

    moves, columns = _columns(is_perturbed), _columns(block)
    columns = jax.tree.map(lambda is_it, x: lax.empty(x.shape, x.dtype) if is_it else None, moves, columns)
    init = _Total(rows, columns, of_all)
    found = _over_classes(static, inputs, over_rows, init)
    (fields, sparse, phi), (of_classes, dense) = found.rows, found.classes
    if perturbed_layer.hidden:
        fields["hidden"] = fields["hidden"].astype(layer.hidden.dtype)
    layer = linear.replace(layer, fields | found.all | of_classes)
    return Block(layer, distribution=dense if sparse is None else sparse, phi=phi)


class _Total(NamedTuple):
    """Gradients, by what they belong to."""

    rows: Any
    classes: Any
    all: Any

    @classmethod
    def of(cls, block: Block) -> "_Total":
        of_all = linear.shared_fields(block.logits)
        for name in ("kernel", "bias"):
            del of_all[name]
        sparse = block.distribution if isinstance(block.distribution, SparseDistribution) else None
        return cls((linear.per_row_fields(block.logits), sparse, block.phi), _columns(block), of_all)


def _columns(block: Block) -> Any:
    """What a block has for each of its classes."""
    dense = None if isinstance(block.distribution, SparseDistribution) else block.distribution
    return {"kernel": block.logits.kernel, "bias": block.logits.bias}, dense


def _over_classes(static: Static, inputs: Inputs, step: Callable[[Any, int, Any], Any], init: Any) -> Any:
    """`step(start, classes, carry)` over all classes; the last block may be smaller."""
    size, classes = static.layout.width, static.layout.number
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
    blocks = inputs.needed if stop else blocks
    return lax.fori_loop(0, blocks, lambda i, carry: step(i * static.rows, carry), carry)


def _part(static: Static, block: Block, row: Any, start: Any, classes: int) -> Block:
    """Some rows and some classes, the layer still open."""

    def of_classes(x: Array) -> Array:
        return static.layout.take(x, start, classes)

    layer = block.logits
    kernel = made_once(static.layout.take(layer.kernel, start, classes, layer.class_axis))
    bias, weights = jax.tree.map(of_classes, (layer.bias, block.class_weights))
    q, mask = block.distribution, block.class_mask
    mask = None if mask is None else of_classes(mask)
    beside: Any = {"distribution": of_classes(q)} if isinstance(q, Array) else {}
    per_row, more = _rows((linear.per_row_fields(layer), _of_rows(block)), row, static.rows)
    layer = linear.replace(layer, per_row | {"kernel": kernel, "bias": bias})
    beside |= more
    part = Block(layer, class_weights=weights, class_mask=mask)._replace(**beside)
    return part.with_classes(lambda x: static.layout.lane(x, start, classes))


def _rows(tree: Any, row: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, rows), tree)


def _put(tree: Any, block: Any, row: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, row, 0), tree, block)
