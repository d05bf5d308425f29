"""Contracts of the public functions: shapes, dtypes, options, label values; and the wording of their errors.

Shapes, dtypes and options are checked at trace time, before any arithmetic. An error names the function, the
argument, what was expected, what came, and one remedy. The only module that imports chex.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._devices import axis_names
from ._explained import explained
from ._numerics import accumulation_dtype, is_probability, nan_unless

Function = TypeVar("Function", bound=Callable[..., Any])

Number = float | Array  # an option: part of the program, or a value in it
Shape = tuple[int, ...]

LABELS_REMEDY = "Labels count from 0; hide a row with `where=` or `ignore_index=`."


def takes_arrays(function: Function) -> Function:
    """`function` of what is an array by protocol, too: `__jax_array__`, which a flax nnx `Param` has."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = as_arrays((args, kwargs))
        return function(*args, **kwargs)

    return cast(Function, call)


def as_arrays(tree: Any) -> Any:
    def by_protocol(x: Any) -> bool:
        return hasattr(x, "__jax_array__") and not isinstance(x, jax.Array)

    return jax.tree.map(lambda x: x.__jax_array__() if by_protocol(x) else x, tree, is_leaf=by_protocol)


def sentence(function: str, argument: str, expected: str, but: str, remedy: str) -> str:
    return f"jaxent.{function}: `{argument}` must be {expected}, but {but}. {remedy}"


def error(kind: type, function: str, argument: str, expected: str, got: str, remedy: str) -> Exception:
    return kind(sentence(function, argument, expected, f"is {got}", remedy))


def fail(kind: type, function: str, argument: str, expected: str, got: str, remedy: str) -> NoReturn:
    raise error(kind, function, argument, expected, got, remedy)


def describe(x: Any) -> str:
    """What came, as dtype[shape]: `int32[8, 1]`; also of a LinearLogits."""
    dtype = x.dtype if hasattr(x, "dense") else jnp.result_type(x)
    return f"{dtype}{list(np.shape(x))}"


def has_shape(x: Any, shape: Shape) -> bool:
    try:
        chex.assert_shape(x, shape)
    except AssertionError:
        return False
    return True


def is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def is_integer(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.integer))


def is_on_host(x: Any) -> bool:
    return isinstance(x, int | float | np.ndarray | np.generic)


def check_array(function: str, argument: str, x: Any) -> None:
    """An array or a scalar: not None, a list, a string."""
    if not isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        remedy = "Pass its `.dense()`." if hasattr(x, "dense") else "Pass `jnp.asarray(...)`."
        if hasattr(x, "probs"):
            remedy = "The softmax losses take it as labels, KL and JS as target."
        fail(TypeError, function, argument, "an array", f"a {type(x).__name__}", remedy)


def check_floating(function: str, argument: str, x: Any, remedy: str) -> None:
    check_array(function, argument, x)
    if not is_floating(x):
        fail(TypeError, function, argument, "a floating point array", describe(x), remedy)


def check_shape(function: str, argument: str, x: Any, shape: Shape, what: str, remedy: str) -> None:
    """The exact `shape`, which the message calls `what`; never a broadcast."""
    check_array(function, argument, x)
    if not has_shape(x, shape):
        fail(ValueError, function, argument, f"of shape {list(shape)} ({what})", describe(x), remedy)


def check_real(
    function: str, argument: str, x: Any, expected: str = "real", remedy: str = "Pass real numbers."
) -> None:
    """A weight: floating point, integer or bool."""
    check_array(function, argument, x)
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        fail(TypeError, function, argument, expected, describe(x), remedy)


def check_mask(function: str, argument: str, x: Any) -> None:
    check_array(function, argument, x)
    if jnp.result_type(x) != jnp.bool_:
        remedy = "Write the condition, e.g. `labels >= 0` or `mask != 0`; for factors use `weights`."
        fail(TypeError, function, argument, "a bool array (True: the row counts)", describe(x), remedy)


def check_option(function: str, argument: str, value: Any, ok: bool, expected: str, remedy: str) -> None:
    """A number known at trace time; `ok` must be False for NaN."""
    if not ok:
        fail(ValueError, function, argument, expected, repr(value), remedy)


def check_block_bytes(function: str, argument: str, size: Any) -> None:
    whole = size is None or (isinstance(size, int | np.integer) and bool(size > 0))
    remedy = "Bytes come in whole numbers, e.g. `64 * 2**20`; None leaves the choice to jaxent."
    check_option(function, argument, size, whole, "a positive int or None", remedy)


class Range(NamedTuple):
    """Of an option that is a number: [low, high], or (low, high] if it must be `above`; NaN is in none."""

    low: float
    high: float
    remedy: str
    above: bool = False

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"a finite number {'>' if self.above else '>='} {self.low:g}"
        return f"in [{self.low:g}, {self.high:g}]"

    def contains(self, x: Any) -> Any:
        return ((x > self.low) if self.above else (x >= self.low)) & (x <= self.high) & (x < math.inf)


def check_number(function: str, argument: str, value: Any, allowed: Range) -> None:
    if not is_number(value):
        fail(TypeError, function, argument, "a Python number", what_came(value), allowed.remedy)
    check_option(function, argument, value, bool(allowed.contains(value)), str(allowed), allowed.remedy)


def number(
    function: str, argument: str, value: Any, allowed: Range, rows: Shape = (), others: tuple[Shape, ...] = ()
) -> Number:
    """An option as a Python float, or as an array `[]`, of `rows` or of `others`, known at run time only.

    A Python number is checked, and part of the program. An array is a value, checked if it is numpy's; else it is NaN,
    and so are the losses, where it is out of range.
    """
    if is_number(value):
        check_number(function, argument, value, allowed)
        return float(value)  # a numpy float64 would widen float32 under x64
    if not isinstance(value, jax.Array | np.ndarray) or not (is_floating(value) or is_integer(value)):
        fail(TypeError, function, argument, "a number or an array of one", what_came(value), allowed.remedy)
    shapes = dict.fromkeys(((), rows, *others))
    if not any(has_shape(value, shape) for shape in shapes):
        expected = "of shape " + " or ".join(f"{list(shape)}" for shape in shapes)
        fail(ValueError, function, argument, expected, describe(value), allowed.remedy)
    value = value.astype(accumulation_dtype(value.dtype))
    ok = allowed.contains(value)
    if isinstance(value, np.ndarray) and not ok.all():
        check_number(function, argument, value[~ok][0].item(), allowed)
    value = jnp.asarray(value)
    # its gradient is NaN as well, but one per row may be hidden with its row
    return jnp.where(ok, value, jnp.nan) if rows and value.shape == rows else value * nan_unless(ok)


def is_number(value: Any) -> bool:
    """Known when traced: a Python number, or numpy's."""
    return isinstance(value, int | float | np.integer | np.floating)


def what_came(value: Any) -> str:
    return describe(value) if isinstance(value, jax.Array | np.ndarray) else f"a {type(value).__name__}"


def check_reduction(function: str, reduction: Any) -> None:
    ok = reduction in ("none", "sum", "mean")
    remedy = "'none' gives one loss per row."
    check_option(function, "reduction", reduction, ok, "'none', 'sum' or 'mean'", remedy)


def check_axis_names(function: str, class_axis_name: Any, batch_axis_name: Any) -> None:
    """Rows cannot be split over a mapped axis that splits their classes: devices would add up those of other rows."""
    if {*axis_names(class_axis_name)} & {*axis_names(batch_axis_name)}:
        remedy = (
            "A row has all its classes along `class_axis_name`, and every device along it the same rows. Gather one "
            "side first: the rows (`jax.lax.all_gather` of what they are made from), or the classes, and then pass no "
            "`class_axis_name`."
        )
        got = f"{batch_axis_name!r}, beside class_axis_name={class_axis_name!r}"
        fail(ValueError, function, "batch_axis_name", "another axis than `class_axis_name`", got, remedy)


def check_axis(function: str, axis: int, logits: Any, argument: str = "logits") -> None:
    """Of a scalar, as for numpy, 0 and -1."""
    ndim = np.ndim(logits) or 1
    ok = isinstance(axis, int | np.integer) and -ndim <= axis < ndim
    remedy = "`axis` is the one class axis."
    check_option(function, "axis", axis, ok, f"an axis of `{argument}`, which is {describe(logits)}", remedy)


def check_logits(function: str, logits: Any, axis: int = -1, argument: str = "logits") -> None:
    """Floating point, with a class axis of at least one class."""
    if not hasattr(logits, "dense"):  # a LinearLogits
        remedy = "Pass what the last layer gives, before any rounding: `logits.astype(jnp.float32)`."
        check_floating(function, argument, logits, remedy)
    ndim = np.ndim(logits)
    if ndim == 0:
        remedy = "A single row of V classes has shape [V]; for one yes/no logit use `sigmoid_cross_entropy`."
        fail(ValueError, function, argument, "of shape [..., V]", describe(logits), remedy)
    check_axis(function, axis, logits, argument)
    if np.shape(logits)[axis] == 0:
        remedy = "There is no distribution over no classes."
        fail(ValueError, function, argument, "over at least one class", describe(logits), remedy)


def check_labels(function: str, labels: Any, logits: Any, axis: int) -> bool:
    """Whether `labels` are class indices (True) or a distribution (False); anything else is an error."""
    check_array(function, "labels", labels)
    full = np.shape(logits)
    rows_by_axis = [tuple(np.delete(full, i).tolist()) for i in range(len(full))]
    rows = rows_by_axis[axis]
    is_index, is_float = is_integer(labels), is_floating(labels)
    per_row, per_class = has_shape(labels, rows), has_shape(labels, full)
    if (is_index and per_row) or (is_float and per_class):
        return is_index
    kind: type = TypeError
    if not (is_index or is_float):
        remedy = "bool labels are for `sigmoid_cross_entropy`; for classes 0 and 1 pass `labels.astype(jnp.int32)`."
    elif per_row:
        remedy = "Floats are read as a distribution; for class indices pass `labels.astype(jnp.int32)`."
    elif per_class:
        remedy = "For one-hot rows pass `labels.argmax(axis)`, or `labels.astype(jnp.float32)`."
    elif is_float:
        kind = ValueError
        remedy = (
            "jaxent never broadcasts labels: use `jnp.broadcast_to(labels, logits.shape)` if you mean it."
        )
    else:
        kind = ValueError
        remedy = "jaxent never broadcasts labels: one index per row of logits, e.g. `labels.squeeze(-1)`."
        other = next((i for i, shape in enumerate(rows_by_axis) if has_shape(labels, shape)), None)
        if other is not None:
            remedy = f"If the classes are on axis {other} of the logits, pass `axis={other}`."
    forms = f"class indices (integers) of shape {list(rows)} or a distribution (floats) of shape {list(full)}"
    fail(kind, function, "labels", forms, describe(labels), remedy)


def check_ignore_index(function: str, ignore_index: Any, has_index: bool) -> None:
    ok = ignore_index is None or (has_index and isinstance(ignore_index, int | np.integer))
    remedy = "It hides rows by their label; hide rows of a distribution with `where=`."
    check_option(function, "ignore_index", ignore_index, ok, "an int beside integer labels", remedy)


class Values(NamedTuple):
    """What the elements of an array may be: a test, its wording, and a remedy."""

    ok: Callable[[Any], Any]
    expected: str
    remedy: str


YES_NO = Values(is_probability, "in [0, 1]", "1 is yes, 0 is no; hide an element with `where=`.")


def not_ignored(labels: Any, ignore_index: int | None) -> Any:
    """Which labels are not `ignore_index`, in numpy where they are known on the host; None: all of them."""
    if ignore_index is None:
        return None
    if is_on_host(labels):
        return np.asarray(labels) != ignore_index
    limits = jnp.iinfo(labels.dtype)  # what it cannot hold never occurs
    return labels != int(ignore_index) if limits.min <= ignore_index <= limits.max else None


def index_labels(
    function: str, labels: Any, classes: int, mask: Any, ignore_index: int | None
) -> tuple[Array, Array | None]:
    """(integer labels of at least 32 bits, which are not ignored); those known on the host are checked at once.

    jax would truncate a numpy int64 to 32 bits, where 2**32 + 1 becomes class 1, so what is outside [0, classes)
    becomes -1 before that.
    """
    kept = not_ignored(labels, ignore_index)
    if not is_on_host(labels):
        return labels.astype(jnp.int32) if jnp.dtype(labels.dtype).itemsize < 4 else labels, kept
    labels = np.asarray(labels)
    if kept is not None:
        labels = labels * kept  # 0 is a class
    values = Values(lambda label: (label >= 0) & (label < classes), f"in [0, {classes})", LABELS_REMEDY)
    check_on_host(function, "labels", labels, values, mask)
    labels = np.where(values.ok(labels), labels.astype(np.int32), -1)
    return jnp.asarray(labels, jnp.int32), None if kept is None else jnp.asarray(kept)


def check_binary_labels(function: str, labels: Any, shape: Shape, argument: str) -> None:
    """Real numbers or bools, one per element of `argument`."""
    check_real(function, "labels", labels, "bool, integer or floating point", "1 is yes, 0 is no.")
    remedy = "Labels are never broadcast; for one class index per row use `softmax_cross_entropy`."
    check_shape(function, "labels", labels, shape, f"one per element of `{argument}`", remedy)


def check_host_values(function: str, argument: str, x: Any, values: Values, mask: Any) -> Any:
    """`x`; what is known on the host is checked at once, and an array.

    What a traced mask may still hide becomes NaN or 2, which is bad in every dtype: jax would truncate an int64, and
    round a float64 to float32, which can turn a bad label into a good one.
    """
    if not is_on_host(x):
        return x
    x = np.asarray(x)
    check_on_host(function, argument, x, values, mask)
    return jnp.asarray(np.where(values.ok(x), x, np.asarray(np.nan if is_floating(x) else 2, x.dtype)))


def check_on_host(function: str, argument: str, x: np.ndarray, values: Values, mask: Any) -> None:
    """ValueError that names the first bad element which `mask` shows; a traced mask leaves all to the poison."""
    if isinstance(mask, jax.core.Tracer):
        return
    bad = ~values.ok(x) if mask is None else ~values.ok(x) & np.asarray(mask)
    if bad.any():
        index = tuple(np.argwhere(bad)[0].tolist())
        got = f"{x[index]}" + (f" at index {list(index)}" if index else "")
        fail(ValueError, function, argument, values.expected, got, values.remedy)


def explained_labels(function: str, labels: Array, ok: Array, seen: Array | None, classes: int) -> Array:
    """`labels`, of which the first that is bad and seen raises under `checkify`."""
    expected = f"in [0, {classes}) and name a class in force"
    but = "row {index} (counted over the flattened rows) has label {value}"
    return _explained(sentence(function, "labels", expected, but, LABELS_REMEDY), labels, ok, seen)


def explained_values(
    function: str, argument: str, x: Array, values: Values, seen: Array | None, of: str = "array"
) -> Array:
    but = f"element {{index}} (counted over the flattened {of}) is {{value}}"
    return _explained(
        sentence(function, argument, values.expected, but, values.remedy), x, values.ok(x), seen
    )


def _explained(message: str, x: Array, ok: Array, seen: Array | None) -> Array:
    return explained(x, ~ok if seen is None else ~ok & seen, message)
