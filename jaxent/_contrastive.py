"""Contrastive losses: which of all pairs belong together. Checked arguments, and who has which rows.

tests/test_contrastive.py guards it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from . import _contracts as contracts
from ._contracts import Number, Range
from ._devices import axis_names, explicit_sharding, is_known
from ._logits.explicit import Split, on_each_device
from ._numerics import accumulation_dtype, as_dtype
from ._pair_losses import log_probs, sigmoid_losses, weighted_sigmoid_loss
from ._pairs import Grid, Side, grid_of
from ._rows import AxisName, Options, Rows, keep

SCALE = Range(0, math.inf, "It multiplies x @ y.T: 1 / temperature, e.g. `jnp.exp(log_scale)`.", above=True)
BIAS = Range(-math.inf, math.inf, "It is added to all logits; SigLIP begins with -10.", above=True)


class _Lists(NamedTuple):
    """Rows, by list. On a mesh each device has some of each."""

    x: Array  # [N, D]
    y: Array  # [N, D], the partners
    counts: Array | None  # bool [N]
    ids: Any = None  # of both, as in `Side`
    more: Array | None = None  # [E, D], negatives without a partner
    more_ids: Any = None
    more_counts: Array | None = None

    def sides(self, grid: Grid) -> tuple[Side, Side]:
        """Filled up to whole tiles with rows that do not count."""
        lists = [self.y] if self.more is None else [self.y, self.more]
        (pairs, _), columns = self.x.shape, sum(len(x) for x in lists)
        height, width = (
            max(-(-n // size), 1) * size for n, size in ((pairs, grid.rows), (columns, grid.columns))
        )
        first = 0 if grid.axis_name is None else lax.axis_index(grid.axis_name) * max(height, width)

        def filled(length: int, *parts: Any) -> Any:
            def fill(*parts: Array) -> Array:
                missing = length - sum(len(x) for x in parts)
                return jnp.concatenate([*parts, jnp.zeros((missing, *parts[0].shape[1:]), parts[0].dtype)])

            return None if parts[0] is None else jax.tree.map(fill, *(x for x in parts if x is not None))

        def counts(length: int, *parts: tuple[int, Array | None]) -> Array | None:
            if sum(n for n, _ in parts) == length and all(x is None for _, x in parts):
                return None
            return filled(length, *(jnp.ones(n, bool) if x is None else x for n, x in parts))

        counts_x = counts(height, (pairs, self.counts))
        counts_y = counts(width, (pairs, self.counts), (columns - pairs, self.more_counts))
        numbers = [first + jnp.arange(length, dtype=jnp.int32) for length in (height, width)]
        ids = [filled(height, self.ids), filled(width, self.ids, self.more_ids)]
        x = Side(filled(height, self.x), numbers[0], ids[0], counts_x)
        paired = None if width == pairs else jnp.arange(width) < pairs
        return x, Side(filled(width, *lists), numbers[1], ids[1], counts_y, paired)

    def with_ids(self, ids: Any) -> "_Lists":
        pairs, negatives = len(self.x), 0 if self.more is None else len(self.more)
        words = [jnp.asarray(x) for x in _words(ids)]
        if not negatives:
            return self._replace(ids=words)
        if len(words[0]) > pairs:
            return self._replace(ids=[x[:pairs] for x in words], more_ids=[x[pairs:] for x in words])
        # one word more, that all pairs have and no negative has
        pair, negative = (jnp.full(n, i, jnp.int8) for i, n in enumerate((pairs, negatives)))
        none = [jnp.zeros(negatives, x.dtype) for x in words]
        return self._replace(ids=[*words, pair], more_ids=[*none, negative])

    def with_even_more(self, devices: int) -> "_Lists":
        """As many negatives on each device."""
        negatives = len(self.more)
        missing = -negatives % devices
        if not missing:
            return self
        more, ids = jax.tree.map(
            lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), (self.more, self.more_ids)
        )
        return self._replace(more=more, more_ids=ids, more_counts=jnp.arange(negatives + missing) < negatives)


class _Pairs(NamedTuple):
    lists: _Lists
    numbers: tuple[Array, ...]  # [], in the accumulation dtype
    rows: Rows
    split: Split | None
    block_bytes: int | None

    def on_each_device(self, f: Any, weights: Array | None = None) -> Any:
        """`f(grid, sides, numbers, weights) -> (sums, results of each pair)`."""
        axis_name = axis_names(self.rows.options.batch_axis_name)
        if self.split is not None:
            axis_name += self.split.row_axes

        def here(lists: _Lists, numbers: Any, weights: Array | None) -> Any:
            pairs, more = len(lists.x), 0 if lists.more is None else len(lists.more)
            grid = grid_of(pairs, pairs + more, self.block_bytes, axis_name or None, lists)
            x, y = lists.sides(grid)
            if weights is not None:
                weights = jnp.pad(weights, (0, len(x.number) - pairs))
            sums, per_row = f(grid, x, y, numbers, weights)
            return sums, jax.tree.map(lambda x: x[:pairs], per_row)

        inputs, specs = (self.lists, self.numbers, weights), None
        if self.split is not None:
            of_rows = self.split.per_row
            specs = of_rows(self.lists), jax.tree.map(lambda _: P(), self.numbers), of_rows(weights)
        return on_each_device(here, self.split, specs, inputs)


class _Given(NamedTuple):
    """As a caller gave it."""

    x: Any
    y: Any
    ids: Any
    block_bytes: Any


def _prepare(function: str, given: _Given, numbers: dict[str, tuple[Any, Range]], options: Options) -> _Pairs:
    """`numbers` are checked by their ranges."""
    x, y, ids, block_bytes = given
    for name, features in {"x": x, "y": y}.items():
        contracts.check_floating(function, name, features, f"Pass `{name}.astype(jnp.float32)`.")
        if np.ndim(features) != 2:
            remedy = "A row of D features for each pair; for several batches use `jax.vmap`."
            got = contracts.describe(features)
            contracts.fail(ValueError, function, name, "of shape [N, D]", got, remedy)
        if not is_known(np.shape(features)[0]):
            remedy = "Export a program for each batch size."
            got = contracts.describe(features)
            contracts.fail(ValueError, function, name, "of a known number of rows", got, remedy)
    pairs, features = np.shape(x)
    if np.shape(y)[1] != features or np.shape(y)[0] < pairs:
        expected = f"of shape [{pairs}, {features}], or of more rows (`x` is {contracts.describe(x)})"
        remedy = "Row i of `y` belongs to row i of `x`; those that belong to none come last."
        contracts.fail(ValueError, function, "y", expected, contracts.describe(y), remedy)
    contracts.check_block_bytes(function, "block_bytes", block_bytes)
    if ids is not None:
        contracts.check_array(function, "ids", ids)
        if not contracts.is_integer(ids):
            got = contracts.describe(ids)
            remedy = "Pass numbers of what is the same, e.g. `ids.astype(int)`."
            contracts.fail(TypeError, function, "ids", "integers", got, remedy)
        shape = np.shape(y)[:1] if np.shape(ids) == np.shape(y)[:1] else (pairs,)
        remedy = f"Or [{np.shape(y)[0]}], one per row of `y`."
        contracts.check_shape(function, "ids", ids, shape, "one per pair", remedy)

    x, y = jnp.asarray(x), jnp.asarray(y)
    dtype = accumulation_dtype(x.dtype, y.dtype)
    checked = [contracts.number(function, name, value, allowed) for name, (value, allowed) in numbers.items()]
    values = tuple(jnp.asarray(as_dtype(value, dtype), dtype) for value in checked)
    split = _split(function, x, y, options.batch_axis_name)
    rows = Rows.of(function, options, (pairs,), None if split is None else split.sharding, "x")
    y, more = (y, None) if len(y) == pairs else (y[:pairs], y[pairs:])
    rows = rows.with_answers(lambda: jnp.all(jnp.isfinite(x), -1) & jnp.all(jnp.isfinite(y), -1))
    lists = _Lists(keep(rows.counts, x), keep(rows.counts, y), rows.counts, more=more)
    if ids is not None:
        lists = lists.with_ids(ids)
    if more is not None and split is not None:
        lists = lists.with_even_more(split.devices)
    return _Pairs(lists, values, rows, split, block_bytes)


def _words(ids: Any) -> list[Any]:
    """Keys of 64 bits that are on the host as two words: jax would keep the lower one."""
    if contracts.is_on_host(ids) and (x := np.asarray(ids)).dtype.itemsize == 8:
        x = x.astype(np.uint64)
        return [(x & np.uint64(2**32 - 1)).astype(np.uint32), (x >> np.uint64(32)).astype(np.uint32)]
    return [ids]


def _split(function: str, x: Array, y: Array, batch_axis_name: AxisName) -> Split | None:
    """Over which axes of a mesh pairs are split, or are to be: on an auto mesh over all that divide their number."""
    sharding = explicit_sharding(x, y)
    if sharding is not None:
        for name in axis_names(batch_axis_name):
            remedy = "On an explicit mesh the types of x and y say how pairs are split: pass nothing."
            ok, expected = name in sharding.mesh.axis_names, "an axis of the mesh"
            contracts.check_option(function, "batch_axis_name", name, ok, expected, remedy)
        return Split(sharding.mesh, tuple(sharding.spec)[:1] or (None,), None)
    meshes = [jax.typeof(x).sharding.mesh, jax.typeof(y).sharding.mesh, jax.sharding.get_abstract_mesh()]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or batch_axis_name is not None or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    names: list[str] = []
    devices = 1
    for name, size in mesh.shape.items():
        if size > 1 and len(x) % (devices * size) == 0:
            names, devices = [*names, name], devices * size
    return Split(mesh, (tuple(names),), None) if names and len(x) else None


@contracts.takes_arrays
def softmax_contrastive_loss(
    x: Array,
    y: Array,
    *,
    scale: Number = 1.0,
    symmetric: bool = True,
    ids: Array | None = None,
    where: Array | None = None,
    weights: Array | None = None,
    reduction: str = "mean",
    batch_axis_name: AxisName = None,
    block_bytes: int | None = None,
) -> Array:
    """Which row of y belongs to a row of x, among all of them? The cross-entropy of that: InfoNCE, CLIP.

        loss_i = (CE(z_i., i) + CE(z_.i, i)) / 2,   z_ij = scale x_i . y_j;   CE(z_i., i) if not symmetric

    over all rows j that count; "mean" is sum(weights loss) / sum(weights) over the pairs that count.

    Args:
      x: `[N, D]`, floating point: one half of each pair, in most models of length 1 (`x / norm(x)`).
      y: `[N, D]`, floating point, row i belongs to row i of x; or `[M, D]` of more rows: hard negatives,
        which come last.
      scale: > 0, 1 / temperature: a Python number, or an array `[]`, which may be learned.
      symmetric: also which row of x belongs to one of y, of the same products; else x to y only.
      ids: integers `[N]`, one per pair: pairs that have the same (captions of one image) are no negatives of each
        other. Or `[M]`, hard negatives too. -1 is an id like any.
      where: bool `[N]`; a False pair is gone, from the negatives too, even if it holds NaN.
      weights: real `[N]`, a factor of the pair's loss; one of weight 0 is still a negative of others.
      reduction: "none" (one loss per pair), "sum" or "mean", which is the default here.
      batch_axis_name: of a mapped axis (shard_map, pmap; vmap if differentiated inside) along which the pairs are
        split: the negatives are those of all devices. Each has its rows of x, and of y first their partners, then
        hard negatives.
      block_bytes: > 0, about how much memory a tile of the logits and its gradient may take; None: 1 MiB on a CPU,
        128 MiB on accelerators.

    Returns:
      Losses in nats, `[N]` or a scalar: float32, or float64 where an operand is.

    Gradients:
      Of x, y and a scale that is an array, in their dtypes, and of weights; to any order, and forward over
      reverse; `jax.jvp` of the loss itself is a TypeError.

    Numerics:
      As `softmax_cross_entropy`, for rows and columns alike: pairs that are told apart to 1e-30 have a loss of 1e-30.
      Products are summed to float32; their gradient is rounded to bfloat16 for two matmuls where both operands are.

    Cost:
      4 matmuls with gradients (3 where one tile has all pairs), 1 without, in both directions together. The N x M
      matrix of pairs exists in tiles of `block_bytes`. On P devices P steps, at each of which a device sends its rows
      of y, and backward their gradient; nothing is gathered. Arrays on an auto or explicit mesh need no keyword for
      that. Call it within `jit`: outside of it the loop is compiled at each call.

    Raises:
      TypeError: features that are not floating point, ids that are not integers, a mask not bool.
      ValueError: shapes that do not match exactly; an option out of its range. (A scale that is a jax array makes the
        loss NaN then.)

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> x = jnp.eye(3)
      >>> print(jaxent.softmax_contrastive_loss(x, x, scale=10.0, reduction="none").round(7))
      [9.08e-05 9.08e-05 9.08e-05]

    Source:
      van den Oord et al. 2018 (InfoNCE); Radford et al. 2021 (CLIP). Tiles and a ring: Cheng et al. 2024, "Breaking
      the memory barrier: near infinite batch size scaling for contrastive loss". NT-Xent (SimCLR) by `ids`:
      docs/from_optax.md.
    """
    function = "softmax_contrastive_loss"
    is_bool = isinstance(symmetric, bool | np.bool_)
    contracts.check_option(
        function, "symmetric", symmetric, is_bool, "True or False", "It selects a program."
    )
    options = Options(where=where, weights=weights, reduction=reduction, batch_axis_name=batch_axis_name)
    pairs = _prepare(function, _Given(x, y, ids, block_bytes), {"scale": (scale, SCALE)}, options)

    def losses(grid: Grid, x: Side, y: Side, numbers: Any, _: None) -> tuple[tuple[()], Any]:
        return (), log_probs(grid, x, y, numbers[0], symmetric)

    of_rows, of_columns = pairs.on_each_device(losses)[1]
    return pairs.rows.reduce(-of_rows if of_columns is None else -(of_rows + of_columns) / 2)


@contracts.takes_arrays
def sigmoid_contrastive_loss(
    x: Array,
    y: Array,
    *,
    scale: Number,
    bias: Number,
    ids: Array | None = None,
    where: Array | None = None,
    weights: Array | None = None,
    reduction: str = "mean",
    batch_axis_name: AxisName = None,
    block_bytes: int | None = None,
) -> Array:
    """Do a row of x and a row of y belong together? A yes/no question for each two of them: SigLIP.

        loss_i = -log σ(z_ii) - sum_{j != i} log σ(-z_ij),   z_ij = scale x_i . y_j + bias

    over all rows j that count; "mean" is sum(weights loss) / sum(weights) over the rows of x that count.

    Args:
      x: `[N, D]`, floating point, as in `softmax_contrastive_loss`.
      y: `[N, D]`, floating point, or `[M, D]` with hard negatives last.
      scale: > 0, a number or an array `[]`; SigLIP begins with 10.
      bias: a number or an array `[]`; SigLIP begins with -10, as most pairs are none.
      ids: integers `[N]` or `[M]`; this and all that follow are as in `softmax_contrastive_loss`.
      where: bool `[N]`.
      weights: real `[N]`, of the questions about row i of x.
      reduction: "none", "sum" or "mean", which is the default here, over the rows of x.
      batch_axis_name: of a mapped axis along which the pairs are split.
      block_bytes: > 0, about how much memory a tile may take; None: 1 MiB on a CPU, 128 MiB on accelerators.

    Returns:
      Losses in nats, `[N]`, each a sum over the rows of y, or a scalar: float32, or float64 where an operand is.

    Gradients:
      As `softmax_contrastive_loss`, also of a bias that is an array.

    Numerics:
      As `sigmoid_cross_entropy`, of each pair.

    Cost:
      As `softmax_contrastive_loss`, in tiles, but a sum or mean takes 3 matmuls with gradients, and y goes round a ring
      of devices once; else 4, and twice.

    Raises:
      As `softmax_contrastive_loss`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> x = jnp.eye(3)
      >>> print(jaxent.sigmoid_contrastive_loss(x, x, scale=20.0, bias=-10.0, reduction="none").round(7))
      [0.0001362 0.0001362 0.0001362]

    Source:
      Zhai et al. 2023, "Sigmoid loss for language image pre-training", whose rings it takes.
    """
    function = "sigmoid_contrastive_loss"
    options = Options(where=where, weights=weights, reduction=reduction, batch_axis_name=batch_axis_name)
    numbers = {"scale": (scale, SCALE), "bias": (bias, BIAS)}
    pairs = _prepare(function, _Given(x, y, ids, block_bytes), numbers, options)
    rows = pairs.rows

    def losses(grid: Grid, x: Side, y: Side, numbers: Any, _: None) -> tuple[tuple[()], Array]:
        scale, bias = numbers
        return (), sigmoid_losses(grid, x, y, scale, bias)

    def total(grid: Grid, x: Side, y: Side, numbers: Any, weights: Array) -> tuple[Array, tuple[()]]:
        scale, bias = numbers
        return weighted_sigmoid_loss(grid, x, y, scale, bias, weights), ()

    if reduction == "none":
        return rows.reduce(pairs.on_each_device(losses)[1])
    weights = rows.split(rows.scale(pairs.numbers[0].dtype))
    return rows.sum_over_batch(pairs.on_each_device(total, weights)[0])
