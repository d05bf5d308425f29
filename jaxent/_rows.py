"""The rows of a loss: what was asked of them, which count and how much, and what is made of their losses.

Each shared option of the losses is a field of `Options`, and means something in one place, most of them here.
tests/test_masks.py, test_weights.py and test_total_weight.py guard it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from . import _contracts as contracts
from ._devices import CLASSES, explicit_sharding, lanes, split_as, spread
from ._mapped import mapped_like
from ._numerics import accumulation_dtype, over_rows, widen

AxisName = Any  # of a mapped axis, or a tuple of them


class Options(NamedTuple):
    """What a caller asked for. In the order of the public signatures, each of which has some of these."""

    axis: int = -1
    where: Any = None
    ignore_index: int | None = None
    weights: Any = None
    class_weights: Any = None
    class_mask: Any = None
    classes: Any = None
    reduction: str = "none"
    class_axis_name: AxisName = None
    batch_axis_name: AxisName = None


class Rows(NamedTuple):
    """Rows `[...]`, checked; of an elementwise loss each element is one."""

    function: str  # that was called
    options: Options
    shape: tuple[int, ...]
    sharding: Any  # of the logits on an explicit mesh, else None
    counts: Array | None  # bool [...]; None: all of them
    weights: Array | None  # [...]
    label_weight: Array | None = None  # [...]: in the losses already; their mean divides by it as well

    @classmethod
    def of(
        cls, function: str, options: Options, shape: tuple[int, ...], sharding: Any, argument: str = "logits"
    ) -> "Rows":
        contracts.check_reduction(function, options.reduction)
        contracts.check_axis_names(function, options.class_axis_name, options.batch_axis_name)
        where, weights = options.where, options.weights
        what = f"one per row of `{argument}`"
        if where is not None:
            contracts.check_mask(function, "where", where)
            remedy = "A mask is never broadcast: use `jnp.broadcast_to(where, rows)` if you mean it."
            contracts.check_shape(function, "where", where, shape, what, remedy)
        if weights is not None:
            contracts.check_real(function, "weights", weights)
            remedy = "Weights are never broadcast: use `jnp.broadcast_to(weights, rows)` if you mean it."
            contracts.check_shape(function, "weights", weights, shape, what, remedy)
            weights = widen(jnp.asarray(weights))
        rows = cls(function, options, shape, sharding, None, None)
        return rows._replace(counts=rows.split(where), weights=rows.split(weights))

    def split(self, x: Any) -> Array | None:
        """`x`, one per row, as an array that is split over devices as the rows are."""
        return None if x is None else split_as(self.sharding, slice(len(self.shape)), jnp.asarray(x))

    @property
    def seen(self) -> Array | None:
        """Rows whose labels are checked: neither hidden nor of weight 0."""
        return self.counts if self.weights is None else both(self.counts, self.weights != 0)

    @property
    def host_mask(self) -> Any:
        """`seen`, of what the caller gave: known wherever that is, beside labels that are known on the host."""
        where, weights = self.options.where, self.options.weights
        if weights is None:
            return where
        return both(where, weights != np.zeros((), jnp.result_type(weights)))  # bools, too

    def only(self, ok: Array | None) -> "Rows":
        return self._replace(counts=both(self.counts, ok))

    def with_answers(self, has_answer: Callable[[], Array]) -> "Rows":
        """Rows of weight 0 count, for the derivative by the weight is their loss; but not without an answer."""
        return self if self.weights is None else self.only((self.weights != 0) | has_answer())

    def class_labels(
        self, labels: Any, classes: int, in_force: Callable[[Array], Array] | None = None
    ) -> tuple[Array, "Rows"]:
        """(int32 labels in [0, classes), -1 where they are bad; the rows without those of `ignore_index`)."""
        ignore_index = self.options.ignore_index
        labels, kept = contracts.index_labels(self.function, labels, classes, self.host_mask, ignore_index)
        labels, rows = self.split(labels), self.only(self.split(kept))
        ok = (labels >= 0) & (labels < classes)
        if in_force is not None:
            ok &= in_force(jnp.where(ok, labels, -1).astype(jnp.int32))
        labels = contracts.explained_labels(self.function, labels, ok, rows.seen, classes)
        label = jnp.where(ok, labels, -1).astype(jnp.int32)
        return label, rows

    def without_ignored(self, labels: Any, argument: str) -> "Rows":
        """Without the elements of `argument` that `ignore_index` hides; nothing is asked of their labels."""
        contracts.check_binary_labels(self.function, labels, self.shape, argument)
        ignore_index, where = self.options.ignore_index, self.options.where
        contracts.check_ignore_index(self.function, ignore_index, contracts.is_integer(labels))
        kept = contracts.not_ignored(labels, ignore_index)
        if contracts.is_on_host(labels):  # where they are checked at once
            where = both(where, kept)
        return self.only(self.split(kept))._replace(options=self.options._replace(where=where))

    def binary_labels(self, labels: Any, argument: str) -> Array:
        """Yes/no, one for each element of `argument`."""
        contracts.check_binary_labels(self.function, labels, self.shape, argument)
        yes_no = contracts.YES_NO
        labels = contracts.check_host_values(self.function, "labels", labels, yes_no, self.host_mask)
        return contracts.explained_values(self.function, "labels", self.split(labels), yes_no, self.seen)

    def all_classes(self, classes: int) -> int:
        """Of all devices, where each has some."""
        name = self.options.class_axis_name
        return classes if name is None else classes * lax.axis_size(name)

    def class_weights(self, classes: int) -> Array | None:
        """Constants `[V]`, checked."""
        w = self.options.class_weights
        if w is None:
            return None
        remedy = "For weights of rows use `weights`."
        contracts.check_real(self.function, "class_weights", w)
        contracts.check_shape(self.function, "class_weights", w, (classes,), "one per class", remedy)
        return split_as(self.sharding, CLASSES, widen(lax.stop_gradient(jnp.asarray(w))))

    def weigh_labels(self, class_weights: Array, label: Array) -> "Rows":
        """With w_y of integer labels; 1 for a bad one, whose loss is NaN and whose row counts."""
        name, classes = self.options.class_axis_name, class_weights.shape[0]
        if name is None:
            weight = take_class(class_weights, label)
        else:
            weight = lax.psum(take_class(class_weights, label - lax.axis_index(name) * classes), name)
        return self._replace(label_weight=jnp.where(label < 0, 1, weight))

    def reduce(self, losses: Array) -> Array:
        """Weighted losses, reduced; rows that do not count contribute exactly 0, whatever they hold."""
        losses = keep(self.counts, losses)
        if self.weights is not None:
            weights = keep(self.counts, self.weights.astype(losses.dtype))
            # what is not finite has no weight of 0; where it is, the derivative by the weight is the loss
            losses = weights * jnp.where((weights == 0) & ~jnp.isfinite(losses), 0, losses)
        if self.options.reduction == "none":
            return losses
        return self.normalize(self.sum_over_batch(jnp.sum(losses)))

    def reduce_finite(self, losses: Callable[[Array | None], Array]) -> Array:
        """`reduce` of `losses(counts)`, elementwise; what has weight 0 counts if its loss is finite."""
        rows = self.with_answers(lambda: jnp.isfinite(lax.stop_gradient(losses(self.counts))))
        return rows.reduce(losses(rows.counts))

    def scale(self, dtype: DTypeLike) -> Array:
        """`[...]`: the factors with which `reduce` adds up losses, known before any of them."""
        if self.weights is not None:
            scale = keep(self.counts, self.weights.astype(dtype))
        else:
            scale = jnp.ones(self.shape, dtype) if self.counts is None else self.counts.astype(dtype)
        return self.normalize(scale)

    def normalize(self, x: Array) -> Array:
        """A sum is what it is; a mean is divided by the total weight."""
        return x if self.options.reduction == "sum" else divide_or_zero(x, self.total_weight(x.dtype))

    def total_weight(self, dtype: DTypeLike) -> Array:
        """What a mean divides by, over all devices along the batch axis."""
        factors = [x.astype(dtype) for x in (self.weights, self.label_weight) if x is not None]
        if factors:
            total = jnp.sum(keep(self.counts, math.prod(factors[1:], start=factors[0])))
        elif self.counts is not None:  # not of ones: an array made from a shape is not split as the rows are
            total = jnp.sum(self.counts, dtype=dtype)
        else:
            total = jnp.asarray(math.prod(self.shape), dtype)
        return self.sum_over_batch(total)

    def sum_over_batch(self, x: Array) -> Array:
        name = self.options.batch_axis_name
        return x if name is None else lax.psum(x, name)


def both(a: Array | None, b: Array | None) -> Array | None:
    """a and b, where None is True everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def keep(counts: Array | None, x: Array, other: float = 0) -> Array:
    """`x` `[..., *anything]` where the row counts, `other` elsewhere: a select, so NaN behind the mask stays there."""
    if counts is None or jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys hide nothing
        return x
    x = split_as(
        explicit_sharding(counts), slice(counts.ndim), x
    )  # what is the same for all rows is not split
    if x.ndim > counts.ndim:
        counts = jnp.expand_dims(counts, tuple(range(counts.ndim, x.ndim)))
    return jnp.where(counts, x, jnp.full_like(x, other))


@jax.custom_jvp
def keep_gradient(counts: Array | None, x: Array) -> Array:
    """`x` `[..., V]` as it is, with a derivative of exactly 0 in rows that do not count.

    For second derivatives: there jax multiplies a cotangent of 0 with what a hidden row holds.
    """
    return mapped_like(counts, x)


@keep_gradient.defjvp
def _keep_gradient_jvp(primals, tangents):
    (counts, x), (_, dx) = primals, tangents
    # not x itself, which would come back without the mask where this is differentiated again
    return keep_gradient(counts, x), dx if counts is None else jnp.where(counts[..., None], dx, 0)


def take_class(x: Array, label: Array) -> Array:
    """x[label] of `[V]` values, bools or floats; 0 for a label outside [0, V)."""
    if spread((x, label)).possible > 1:  # a gather would move what is split
        x = over_rows(x, label.ndim + 1)
        return jnp.sum(jnp.where(lanes(x) == label[..., None], x, jnp.zeros_like(x)), -1, dtype=x.dtype)
    lane = jnp.clip(label, 0, x.shape[0] - 1)
    return jnp.where(label == lane, x[lane], jnp.zeros((), x.dtype))


def divide_or_zero(total: Array, weight: Array) -> Array:
    """total / weight, 0 with a zero gradient where nothing counts."""
    empty = weight == 0
    return jnp.where(empty, 0, total / jnp.where(empty, 1, weight))


@contracts.takes_arrays
def mean(
    losses: Array, *, where: Array | None = None, weights: Array | None = None, axis_name: Any = None
) -> Array:
    """Weighted mean of losses, sum(w * l) / sum(w) over the rows that count: `reduction="mean"` of every loss.

    Args:
      losses: `[...]`, floating point; or bools, of which it is the share (accuracy: `prediction == labels`).
      where: bool `[...]`; False rows are gone, even if they hold NaN. Default: all rows count.
      weights: real `[...]`; a row of weight 0 adds nothing, even if it holds NaN. Default: 1.
      axis_name: of a mapped axis (shard_map, pmap, vmap) along which the rows are split: the mean is that of all.

    Returns:
      A scalar, float32 (float64 for float64 losses); 0.0 where nothing counts: all masked, total weight 0, no rows.

    Gradients:
      w / sum(w) by the losses, exactly 0 where a row does not count; (loss - mean) / sum(w) by the weights, also by
      one of 0 (0 where its loss is not finite).

    Numerics:
      Accumulates in float32: neither 70,000 float16 losses overflow nor a million bfloat16 ones stall.

    Cost:
      One pass; XLA fuses the widening of the losses into the sum.

    Raises:
      TypeError: integer losses, a mask that is not bool.
      ValueError: shapes that differ; nothing is broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> losses = jnp.array([1.0, 2.0, jnp.nan])
      >>> print(jaxent.mean(losses, where=jnp.array([True, True, False])))
      1.5

    Source:
      The token-weighted mean of language models (e.g. fairseq, MaxText); no mean of per-device means: counts differ.
    """
    contracts.check_array("mean", "losses", losses)
    if jnp.result_type(losses) == jnp.bool_:
        losses = jnp.asarray(losses, jnp.float32)
    remedy = "Losses are real numbers: `losses.astype(jnp.float32)`."
    contracts.check_floating("mean", "losses", losses, remedy)
    losses = widen(jnp.asarray(losses))
    options = Options(where=where, weights=weights, reduction="mean", batch_axis_name=axis_name)
    rows = Rows.of("mean", options, losses.shape, explicit_sharding(losses), "losses")
    return rows.with_answers(lambda: jnp.isfinite(losses)).reduce(losses)


@contracts.takes_arrays
def total_weight(
    labels: Array,
    *,
    where: Array | None = None,
    ignore_index: int | None = None,
    weights: Array | None = None,
    class_weights: Array | None = None,
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """What `reduction="mean"` divides by: sum(weights * class_weights[label]) over the rows that count.

    The summed losses of micro-batches over their summed total weights are the mean of all; so are the gradients. A mean
    of means is not, where the weights differ.

    Args:
      labels: integers in [0, V), or bools, `[...]`, one per row (or element), read for `ignore_index` and
        `class_weights` only; of a distribution pass any, e.g. `labels.argmax(-1)`, or `labels.classes[..., 0]` of a
        sparse one.
      where: bool `[...]`, like all that follow what the loss is given.
      ignore_index: an integer label to leave out.
      weights: real `[...]`.
      class_weights: real `[V]`.
      class_axis_name: of a mapped axis along which the classes of `class_weights` are split.
      batch_axis_name: of a mapped axis along which the rows are split: the weight of all rows.

    Returns:
      A scalar, float32 (float64 for float64 weights); 0 where nothing counts, where the mean is 0.

    Gradients:
      To `weights`: class_weights[label], in their dtype, 0 where a row does not count.

    Numerics:
      A sum in float32. The row of a bad label counts as in the mean, whose loss it makes NaN.

    Cost:
      One pass over arrays of one number per row.

    Raises:
      TypeError: labels that are floats, a mask that is not bool.
      ValueError: shapes that differ; with `ignore_index` or `class_weights` bad labels that are known on the host.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> print(jaxent.total_weight(jnp.array([1, 0, -1]), ignore_index=-1))
      2.0

    Source:
      Gradient accumulation of language models: docs/accumulation.md.
    """
    function = "total_weight"
    contracts.check_array(function, "labels", labels)
    if not (contracts.is_integer(labels) or jnp.result_type(labels) == jnp.bool_):
        remedy = "One per row: of a distribution pass `labels.argmax(axis)`, of fractions `labels > 0`."
        contracts.fail(TypeError, function, "labels", "integers or bools", contracts.describe(labels), remedy)
    contracts.check_ignore_index(function, ignore_index, True)
    names = class_axis_name, batch_axis_name
    options = Options(-1, where, ignore_index, weights, class_weights, None, None, "mean", *names)
    read = (where, weights) if ignore_index is None and class_weights is None else (where, weights, labels)
    sharding = explicit_sharding(*(x for x in read if isinstance(x, jax.Array)))
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec, None))
    rows = Rows.of(function, options, np.shape(labels), sharding, "labels")
    if class_weights is not None:
        class_weights = rows.class_weights(np.size(class_weights))
        label, rows = rows.class_labels(labels, rows.all_classes(class_weights.shape[0]))
        rows = rows.weigh_labels(class_weights, label)
    elif ignore_index is not None:
        _, rows = rows.class_labels(labels, 2**31 - 1)
    dtypes = (x.dtype for x in (rows.weights, rows.label_weight) if x is not None)
    return rows.total_weight(accumulation_dtype(*dtypes))
