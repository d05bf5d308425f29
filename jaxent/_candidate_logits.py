"""Logits of candidate classes: the true ones of each row, and samples, `[..., T + S]`.

Each is less the log of how often it was to be expected among the samples; the rest of the kernel is not read.
tests/test_candidates.py guards it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from . import _contracts as contracts
from ._devices import ALL, explicit_sharding, lanes, split_as, spread
from ._numerics import accumulation_dtype, of_one_dtype, over_rows
from ._rows import AxisName, Options, Rows, keep
from ._sparse import BAD, EMPTY, SparseDistribution, check_classes, prepare_classes

MANY = 2**31 - 1  # classes, where only some of their columns are known
BOTH = "Both or neither: `samples.log_expected_counts`, and `samples.log_expected_counts_of(labels)`."


class CandidateColumns(NamedTuple):
    """What is read of a kernel, or of a bias. Accepted in its place, and then the gradient is no array of V classes.

    Floating point, in the dtype of what it is read of; made by `candidate_columns`.

    Attributes:
      labels: those of the labels: `[..., T, D]` of a kernel, `[..., T]` of a bias; without T where labels have none.
      samples: those of the samples: `[S, D]` or `[..., S, D]`, `[S]` or `[..., S]`.
    """

    labels: Array
    samples: Array


class Layer(NamedTuple):
    """The last layer, as it was given."""

    hidden: Any
    kernel: Any
    bias: Any
    class_axis: int


class Candidates(NamedTuple):
    """T true classes, then S samples."""

    logits: Array  # [..., T + S], NaN where a sample is no class
    in_force: Array  # bool, likewise: slots that hold a class, and no accidental hit
    target: SparseDistribution  # over them: 1/T for each true class, NaN for a bad one

    def dense_target(self) -> Array:
        probs = self.target.probs
        missing = self.logits.shape[-1] - probs.shape[-1]
        return jnp.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, missing)])


def candidates(
    function: str,
    layer: Layer,
    classes: tuple[Any, Any],
    counts: tuple[Any, Any],
    hits: bool,
    options: Options,
) -> tuple[Candidates, Rows]:
    """Of rows of `hidden`; what a hidden row holds is no part of any product."""
    size = _check_layer(function, layer, classes, options.class_axis_name)
    hidden = jnp.asarray(layer.hidden)
    sharding = explicit_sharding(hidden)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[:-1], None))
        hidden = split_as(sharding, ALL, hidden)
    rows = Rows.of(function, options, hidden.shape[:-1], sharding, "hidden")
    number = MANY if size is None else rows.all_classes(size)
    slots, rows = _label_slots(rows, classes[0], number)
    samples = _sample_slots(rows, classes[1], number)
    _check_counts(function, counts, classes)
    rows = rows.with_answers(lambda: jnp.all(jnp.isfinite(hidden), -1) & ~jnp.any(slots == BAD, -1))
    layer = layer._replace(hidden=keep(rows.counts, hidden))

    single = np.ndim(classes[0]) == len(rows.shape)
    true, drawn = _logits(rows, layer, slots, samples, single)
    true, drawn = true - _count(counts[0], rows, single), drawn - _count(counts[1], rows, False)
    samples = over_rows(samples, true.ndim)
    there = samples != EMPTY
    if hits:
        there = there & ~jnp.any(slots[..., :, None] == samples[..., None, :], -2)
    of_rows = 0 * slots[..., :1]  # split as they are on an explicit mesh; a shape says nothing of that
    in_force = jnp.concatenate([slots != EMPTY, there & (of_rows == 0)], -1)
    drawn = jnp.where(samples == BAD, jnp.nan, drawn)  # a bad label is NaN in the target

    mass = (slots != EMPTY).astype(true.dtype)
    mass = jnp.where(slots == BAD, jnp.nan, mass / jnp.maximum(jnp.sum(mass, -1, keepdims=True), 1))
    places = of_rows + lanes(slots)
    return Candidates(jnp.concatenate([true, drawn], -1), in_force, SparseDistribution(places, mass)), rows


def _label_slots(rows: Rows, labels: Any, classes: int) -> tuple[Array, Rows]:
    """(classes `[..., T]`, EMPTY or BAD where they are none; the rows without those of `ignore_index`)."""
    function, ignore_index = rows.function, rows.options.ignore_index
    contracts.check_array(function, "labels", labels)
    single = np.ndim(labels) == len(rows.shape)
    contracts.check_ignore_index(function, ignore_index, single and contracts.is_integer(labels))
    if not single or not contracts.is_integer(labels):
        check_classes(function, "labels", labels, (*rows.shape, classes), -1)
        return prepare_classes(rows, "labels", labels, classes, None), rows
    contracts.check_shape(function, "labels", labels, rows.shape, "one per row of `hidden`", "Or `[..., T]`.")
    label, rows = rows.class_labels(labels, classes)
    return jnp.where(label < 0, BAD, label)[..., None], rows


def _sample_slots(rows: Rows, samples: Any, classes: int) -> Array:
    """`[S]` or `[..., S]`, EMPTY or BAD where they are no class."""
    function = rows.function
    contracts.check_array(function, "samples", samples)
    shared = np.ndim(samples) == 1
    of = Rows(function, Options(), (), None, None, None) if shared else rows
    check_classes(function, "samples", samples, (*of.shape, classes), -1)
    return prepare_classes(of, "samples", samples, classes, None)


def _logits(rows: Rows, layer: Layer, labels: Array, samples: Array, single: bool) -> tuple[Array, Array]:
    """hidden @ kernel + bias at these classes, `[..., T]` and `[..., S]`; 0 where they are none."""
    name, size = rows.options.class_axis_name, MANY
    if not isinstance(layer.kernel, CandidateColumns):
        size = layer.kernel.shape[layer.class_axis]
    first = 0 if name is None else lax.axis_index(name) * size
    classes = labels - first, samples - first

    def columns(x: Any) -> list[Array]:
        if not isinstance(x, CandidateColumns):
            found = _gathered(jnp.asarray(x), *classes, layer.class_axis)
        else:
            found = jnp.expand_dims(x.labels, len(rows.shape)) if single else jnp.asarray(x.labels), x.samples
        # what a column holds that is not asked for is multiplied by a gradient of 0
        return [keep((c >= 0) & (c < size), jnp.asarray(x)) for x, c in zip(found, classes, strict=True)]

    def logits(kernel: Array, bias: Array | None) -> Array:
        dtype = accumulation_dtype(layer.hidden.dtype, kernel.dtype)
        terms = "...d,cd->...c" if kernel.ndim == 2 else "...d,...cd->...c"
        z = jnp.einsum(terms, *of_one_dtype(layer.hidden, kernel), preferred_element_type=dtype)
        if bias is not None:
            z = z + over_rows(bias.astype(dtype), z.ndim)
        return z if name is None else lax.psum(z, name)

    biases = [None, None] if layer.bias is None else columns(layer.bias)
    true, drawn = map(logits, columns(layer.kernel), biases)
    return true, drawn


def _gathered(x: Array, labels: Array, samples: Array, class_axis: int) -> tuple[Array, Array]:
    """Columns of both, in one gather where nothing is split: of two XLA adds up two gradients of all V columns."""
    if spread((x, labels)).possible > 1 or explicit_sharding(x, labels) is not None:
        return columns_at(x, labels, class_axis), columns_at(x, samples, class_axis)
    found = columns_at(x, jnp.concatenate([labels.reshape(-1), samples.reshape(-1)]), class_axis)
    first, second = found[: labels.size], found[labels.size :]
    return first.reshape(*labels.shape, *found.shape[1:]), second.reshape(*samples.shape, *found.shape[1:])


def columns_at(x: Array, classes: Array, class_axis: int) -> Array:
    """Of `[D, V]` or `[V, D]` as `[..., C, D]`, of `[V]` as `[..., C]`."""
    axis = class_axis % x.ndim
    how: dict[str, Any] = {}
    sharding = explicit_sharding(x, classes)
    if sharding is not None:
        spec = tuple(jax.typeof(classes).sharding.spec)
        spec = (None, *spec) if axis else (*spec, *[None] * (x.ndim - 1))
        how = {"out_sharding": NamedSharding(sharding.mesh, P(*spec))}
    at = (slice(None),) * axis + (jnp.clip(classes, 0, x.shape[axis] - 1),)
    found = x.at[at].get(mode="promise_in_bounds", **how)
    return jnp.moveaxis(found, 0, -1) if axis else found


def _count(count: Any, rows: Rows, single: bool) -> Any:
    if count is None:
        return 0
    count = jnp.asarray(count)
    return over_rows(count[..., None] if single else count, len(rows.shape) + 1)


def check_class_axis(function: str, class_axis: Any) -> None:
    remedy = "-1 for `[D, V]`, 0 for an embedding table `[V, D]`."
    contracts.check_option(function, "class_axis", class_axis, class_axis in (-1, 0), "-1 or 0", remedy)


def _check_columns(function: str, argument: str, x: CandidateColumns, shapes: list[tuple[int, ...]]) -> None:
    for (name, of), shape in zip(x._asdict().items(), shapes, strict=True):
        contracts.check_floating(function, f"{argument}.{name}", of, "Pass `x.astype(jnp.float32)`.")
        remedy = "Made of the same labels and samples by `candidate_columns`."
        contracts.check_shape(function, f"{argument}.{name}", of, shape, f"one per class of `{name}`", remedy)


def _check_layer(
    function: str, layer: Layer, classes: tuple[Any, Any], class_axis_name: AxisName
) -> int | None:
    """The number of classes (on this device), if it is known."""
    hidden, kernel, bias, class_axis = layer
    contracts.check_floating(function, "hidden", hidden, "Pass `hidden.astype(jnp.float32)`.")
    if np.ndim(hidden) == 0:
        remedy = "A single row of D features has shape [D]."
        contracts.fail(
            ValueError, function, "hidden", "of shape [..., D]", contracts.describe(hidden), remedy
        )
    check_class_axis(function, class_axis)
    features = np.shape(hidden)[-1]
    shapes = [np.shape(x) for x in classes]
    if isinstance(bias, CandidateColumns):
        _check_columns(function, "bias", bias, shapes)
    if isinstance(kernel, CandidateColumns):
        remedy = "Split `CandidateColumns` by rows alone: each device needs all candidates of its rows."
        contracts.check_option(
            function, "class_axis_name", class_axis_name, class_axis_name is None, "None", remedy
        )
        _check_columns(function, "kernel", kernel, [(*shape, features) for shape in shapes])
        if bias is None or isinstance(bias, CandidateColumns):
            return None
        if np.ndim(bias) != 1:
            got = contracts.describe(bias)
            contracts.fail(ValueError, function, "bias", "of shape [V]", got, "One per class.")
        return np.shape(bias)[0]
    contracts.check_floating(function, "kernel", kernel, "Pass `kernel.astype(jnp.float32)`.")
    shape = np.shape(kernel)
    if len(shape) != 2 or shape[-1 - class_axis] != features:
        wanted = f"[{features}, V]" if class_axis else f"[V, {features}]"
        expected = f"of shape {wanted} (`hidden` is {contracts.describe(hidden)})"
        remedy = "It maps D features to V classes; an embedding table `[V, D]` takes `class_axis=0`."
        contracts.fail(ValueError, function, "kernel", expected, contracts.describe(kernel), remedy)
    if bias is not None and not isinstance(bias, CandidateColumns):
        of_bias = (shape[class_axis],), "one per class", "Nothing is broadcast."
        contracts.check_shape(function, "bias", bias, *of_bias)
    return shape[class_axis]


def _check_counts(function: str, counts: tuple[Any, Any], classes: tuple[Any, Any]) -> None:
    names = ("label_log_expected_counts", "log_expected_counts"), ("labels", "samples")
    for argument, of, x, like in zip(*names, counts, classes, strict=True):
        if x is None and any(count is not None for count in counts):
            contracts.fail(ValueError, function, argument, "given beside the other", "None", BOTH)
        if x is not None:
            contracts.check_real(function, argument, x)
            contracts.check_shape(function, argument, x, np.shape(like), f"that of `{of}`", "One per class.")
