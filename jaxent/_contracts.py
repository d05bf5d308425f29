"""Contracts of the public functions: shapes, dtypes, options, label values; and the wording of their errors.

Shapes, dtypes and options are checked at trace time, before any arithmetic. An error names the function, the
argument, what was expected, what came, and one remedy. The only module that imports chex.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify

REDUCTIONS = ("none", "sum", "mean")
LABELS_REMEDY = "Labels count from 0; hide a row with `where=` or `ignore_index=`."


def error(
    kind: type[Exception], function: str, argument: str, expected: str, got: str, remedy: str
) -> Exception:
    return kind(f"jaxent.{function}: `{argument}` must be {expected}, but is {got}. {remedy}")


def fail(kind: type[Exception], function: str, argument: str, expected: str, got: str, remedy: str) -> None:
    raise error(kind, function, argument, expected, got, remedy)


def describe(x: Any) -> str:
    """What came, as dtype[shape]: `int32[8, 1]`."""
    return f"{dtype_of(x)}{list(np.shape(x))}"


def dtype_of(x: Any) -> Any:
    """Also of what only looks like an array."""
    return x.dtype if hasattr(x, "dense") else jnp.result_type(x)


def has_shape(x: Any, shape: tuple[int, ...]) -> bool:
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
        fail(TypeError, function, argument, "an array", f"a {type(x).__name__}", remedy)


def check_floating(function: str, argument: str, x: Any, remedy: str) -> None:
    check_array(function, argument, x)
    if not is_floating(x):
        fail(TypeError, function, argument, "a floating point array", describe(x), remedy)


def check_shape(function: str, argument: str, x: Any, shape: tuple[int, ...], what: str, remedy: str) -> None:
    """The exact `shape`, which the message calls `what`; never a broadcast."""
    check_array(function, argument, x)
    if not has_shape(x, shape):
        fail(ValueError, function, argument, f"of shape {list(shape)} ({what})", describe(x), remedy)


def check_real(function: str, argument: str, x: Any) -> None:
    """A weight: floating point, integer or bool."""
    check_array(function, argument, x)
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        fail(TypeError, function, argument, "real", describe(x), "Pass real numbers.")


def check_mask(function: str, argument: str, x: Any) -> None:
    check_array(function, argument, x)
    if jnp.result_type(x) != jnp.bool_:
        remedy = "Write the condition, e.g. `labels >= 0` or `mask != 0`; for factors use `weights`."
        fail(TypeError, function, argument, "a bool array (True: the row counts)", describe(x), remedy)


def check_option(function: str, argument: str, value: Any, ok: bool, expected: str, remedy: str) -> None:
    """A number known at trace time; `ok` must be False for NaN."""
    if not ok:
        fail(ValueError, function, argument, expected, repr(value), remedy)


def check_number(function: str, argument: str, value: Any, low: float, high: float, remedy: str) -> None:
    """A Python number in [low, high]; NaN is in no interval. Traced values are not options."""
    if not isinstance(value, int | float | np.integer | np.floating):
        fail(TypeError, function, argument, "a Python number", f"a {type(value).__name__}", remedy)
    expected = f"a finite number >= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
    check_option(function, argument, value, low <= value <= high and math.isfinite(value), expected, remedy)


def check_reduction(function: str, reduction: Any) -> None:
    ok = reduction in REDUCTIONS
    remedy = "'none' gives one loss per row."
    check_option(function, "reduction", reduction, ok, "'none', 'sum' or 'mean'", remedy)


def check_logits(function: str, logits: Any, axis: int = -1, argument: str = "logits") -> None:
    """Floating point, with a class axis of at least one class."""
    if not hasattr(logits, "dense"):  # a LinearLogits
        remedy = "Pass what the last layer gives, before any rounding: `logits.astype(jnp.float32)`."
        check_floating(function, argument, logits, remedy)
    ndim = np.ndim(logits)
    if ndim == 0:
        remedy = "A single row of V classes has shape [V]; for one yes/no logit use `sigmoid_cross_entropy`."
        fail(ValueError, function, argument, "of shape [..., V]", describe(logits), remedy)
    ok = isinstance(axis, int | np.integer) and -ndim <= axis < ndim
    remedy = "`axis` is the one class axis."
    check_option(function, "axis", axis, ok, f"an axis of `{argument}`, which is {describe(logits)}", remedy)
    if np.shape(logits)[axis] == 0:
        remedy = "There is no distribution over no classes."
        fail(ValueError, function, argument, "over at least one class", describe(logits), remedy)


def check_labels(function: str, labels: Any, logits: Any, axis: int) -> bool:
    """Whether `labels` are class indices (True) or a distribution (False); anything else is an error."""
    check_array(function, "labels", labels)
    full = np.shape(logits)
    rows = tuple(np.delete(full, axis).tolist())
    forms = f"class indices (integers) of shape {list(rows)} or a distribution (floats) of shape {list(full)}"
    got = describe(labels)
    if is_floating(labels):
        if has_shape(labels, full):
            return False
        if has_shape(labels, rows):
            remedy = "Floats are read as a distribution; for class indices pass `labels.astype(jnp.int32)`."
            fail(TypeError, function, "labels", forms, got, remedy)
        remedy = (
            "jaxent never broadcasts labels: use `jnp.broadcast_to(labels, logits.shape)` if you mean it."
        )
        fail(ValueError, function, "labels", forms, got, remedy)
    if is_integer(labels):
        if has_shape(labels, rows):
            return True
        if has_shape(labels, full):
            remedy = "For one-hot rows pass `labels.argmax(axis)`, or `labels.astype(jnp.float32)`."
            fail(TypeError, function, "labels", forms, got, remedy)
        remedy = "jaxent never broadcasts labels: one index per row of logits, e.g. `labels.squeeze(-1)`."
        fail(ValueError, function, "labels", forms, got, remedy)
    remedy = (
        "bool labels are for `sigmoid_cross_entropy`; for classes 0 and 1 pass `labels.astype(jnp.int32)`."
    )
    fail(TypeError, function, "labels", forms, got, remedy)
    raise AssertionError


def index_labels(
    function: str, labels: Any, classes: int, mask: Any, ignore_index: int | None
) -> tuple[Array, Array | None]:
    """(integer labels of at least 32 bits, which are ignored); labels known on the host are checked at once.

    jax would truncate a numpy int64 to 32 bits, where 2**32 + 1 becomes class 1, so what is outside [0, classes)
    becomes -1 before that. `mask` may hide rows; while it is traced, bad labels are left to the poison.
    """
    if not is_on_host(labels):
        labels = labels.astype(jnp.int32) if jnp.dtype(labels.dtype).itemsize < 4 else labels
        limits = jnp.iinfo(labels.dtype)
        if ignore_index is None or not limits.min <= ignore_index <= limits.max:
            return labels, None
        return labels, labels == ignore_index
    labels = np.asarray(labels)
    ignored = np.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    bad = ((labels < 0) | (labels >= classes)) & ~ignored
    if mask is None or not isinstance(mask, jax.core.Tracer):
        fail_on_host(function, labels, bad, mask, f"in [0, {classes})", LABELS_REMEDY)
    labels = np.where(bad, -1, np.where(bad | ignored, 0, labels).astype(np.int32))
    return jnp.asarray(labels, jnp.int32), None if ignore_index is None else jnp.asarray(ignored)


def fail_on_host(function: str, labels: np.ndarray, bad: Any, mask: Any, expected: str, remedy: str) -> None:
    """ValueError that names the first bad label that `mask` does not hide."""
    bad = bad if mask is None else bad & np.asarray(mask)
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        got = f"{labels[index]}" + (f" at index {list(index)}" if index else "")
        fail(ValueError, function, "labels", expected, got, remedy)


def debug_check_labels(function: str, ok: Array, labels: Array, classes: int) -> None:
    """Raises for whoever wraps the outermost function with `checkify.checkify` or `chex.chexify`; else nothing."""
    bad, value = _first_bad(ok, labels)
    checkify.debug_check(
        jnp.all(ok),
        f"jaxent.{function}: `labels` must be in [0, {classes}) and name a class in force, but row {{row}} "
        f"(counted over the flattened rows) has label {{label}}. {LABELS_REMEDY}",
        row=bad,
        label=value,
    )


def _first_bad(ok: Array, labels: Array) -> tuple[Array, Array]:
    """Where, counted over the flattened array, and what it is. Nothing is flattened: `ok` may be split over devices."""
    position = jnp.zeros(ok.shape, jnp.int32)
    for axis in range(ok.ndim):
        position = position * ok.shape[axis] + jax.lax.broadcasted_iota(jnp.int32, ok.shape, axis)
    bad = jnp.min(jnp.where(ok, ok.size, position), initial=ok.size)
    return bad, jnp.sum(jnp.where(position == bad, labels, 0), dtype=labels.dtype)


def host_mask(where: Any, weights: Any) -> Any:
    """`where` and weights != 0 as one mask, traced only if one of them is."""
    if weights is None:
        return where
    nonzero = weights != 0
    return nonzero if where is None else nonzero & where


def check_binary_labels(function: str, labels: Any, shape: tuple[int, ...], argument: str) -> None:
    """Real numbers or bools, one per element of `argument`."""
    check_array(function, "labels", labels)
    if jnp.issubdtype(jnp.result_type(labels), jnp.complexfloating):
        remedy = "1 is yes, 0 is no."
        fail(TypeError, function, "labels", "bool, integer or floating point", describe(labels), remedy)
    remedy = "Labels are never broadcast; for one class index per row use `softmax_cross_entropy`."
    check_shape(function, "labels", labels, shape, f"one per element of `{argument}`", remedy)


def check_host_binary_labels(function: str, labels: Any, mask: Any) -> Array:
    """Labels as an array; those that are known on the host are checked at once.

    What a traced mask may still hide becomes 2, which is bad in every dtype: jax would truncate an int64, and
    round a float64 to float32, which can turn a bad label into a good one.
    """
    if not is_on_host(labels):
        return labels
    labels = np.asarray(labels)
    bad = ~((labels >= 0) & (labels <= 1))
    if mask is None or not isinstance(mask, jax.core.Tracer):
        remedy = "1 is yes, 0 is no; hide an element with `where=`."
        fail_on_host(function, labels, bad, mask, "in [0, 1]", remedy)
    return jnp.asarray(np.where(bad, np.asarray(2, labels.dtype), labels))


def debug_check_binary_labels(function: str, ok: Array, labels: Array) -> None:
    """As `debug_check_labels`."""
    bad, value = _first_bad(ok, labels)
    checkify.debug_check(
        jnp.all(ok),
        f"jaxent.{function}: `labels` must be in [0, 1], but element {{element}} (counted over the flattened "
        "array) has label {label}. 1 is yes, 0 is no; hide an element with `where=`.",
        element=bad,
        label=value,
    )
