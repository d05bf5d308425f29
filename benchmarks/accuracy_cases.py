"""What benchmarks/accuracy.py asks of jaxent, case by case, and tests/test_worst_cases.py asks again.

A case is a function of numbers, one for each row: `f(jit, numbers, **setting)` makes rows of them, runs jaxent, and
gives the errors beside the oracles of the tests, one for each row and quantity. A number is the bits of the input where
all of them are tried, else a seed; rows come from seeds by integer arithmetic and products, the same everywhere.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxent

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the oracles, in NumPy, are there
import oracle
import pairs_on_paper  # noqa: F401

LD = np.longdouble
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float64": np.float64,
}
# significant bits, exponent of the smallest normal number
FORMATS = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14), "float64": (53, -1022)}
# below 4 of these an exponential, or a sum of them, may be 0 (`anchor`); float16 is rounded from float32, and keeps it
FLUSHED = {"float32": 2.0**-124, "bfloat16": 2.0**-124, "float16": 0.0, "float64": 2.0**-1020}
LOSS, LABEL, OTHERS = "loss", "gradient at the label", "gradient elsewhere"
MIRRORED = "L(z, 1) != L(-z, 0)"

Jit = Callable[[Callable], Callable]  # jax.jit, with options or not, or nothing at all


class Error(NamedTuple):
    ulp: np.ndarray  # of the result's dtype
    relative: np.ndarray


class Promise(NamedTuple):
    bound: float
    unit: str  # "ulp" or "relative", as in Error, or one of its own

    def of(self, e: Error) -> np.ndarray:
        return e.relative if self.unit == "relative" else e.ulp


class Case(NamedTuple):
    run: Callable[..., dict[str, Error]]
    promises: dict[str, Promise]  # by quantity
    settings: tuple[dict[str, Any], ...]
    rows: int = 20_000

    def count(self, setting: dict[str, Any]) -> int:
        """How many numbers one call takes."""
        return min(self.rows, max(200_000 // setting.get("classes", 10), 2))


# Errors.


def spacing(x: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between numbers of `dtype` around x."""
    digits, least = FORMATS[dtype]
    exponent = np.frexp(np.where(np.isfinite(x), x, 1))[1] - 1
    return np.ldexp(np.ones_like(x), np.maximum(exponent, least) - (digits - 1))


def error(
    got: np.ndarray, want: np.ndarray, dtype: str, size: np.ndarray | None = None, lost: Any = 0
) -> Error:
    """0 where both are NaN or the same infinity, or so small that `got` may be 0; infinite where one is special.

    `size`: what `want` is a sum of, where it is one of both signs. `lost`: those of its terms that may be 0.
    """
    got = np.asarray(got).astype(want.dtype)
    special = ~(np.isfinite(got) & np.isfinite(want))
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    off = np.abs(np.where(special, 0, got) - np.where(special, 0, want))
    size = np.abs(np.where(special, 1, want if size is None else size))
    off = np.where(special, np.where(same, 0, np.inf), np.maximum(off - lost, 0))
    off = np.where((size < FLUSHED[dtype]) & (off < FLUSHED[dtype]), 0, off)
    return Error(off / spacing(size, dtype), off / np.maximum(size, 2.0 ** FORMATS[dtype][1]))


def largest(e: Error, kept: np.ndarray | bool = True) -> Error:
    """Over all rows; infinite where there is a NaN."""
    return Error(*(float(np.max(np.where(np.isnan(x), np.inf, x), initial=0, where=kept)) for x in e))


def over_classes(e: Error) -> Error:
    return Error(*(x.max(-1) for x in e))


# Rows from numbers.


def mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64: 64 bits as good as random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(numbers: np.ndarray, lanes: int, stream: int = 0) -> np.ndarray:
    """uint64 `[N, lanes]`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = mixed(np.asarray(numbers, np.uint64)[:, None] * np.uint64(64) + np.uint64(stream))
    return mixed(start + np.arange(1, lanes + 1, dtype=np.uint64) * golden)


def uniform(numbers: np.ndarray, lanes: int, stream: int = 0) -> np.ndarray:
    """In (0, 1), multiples of 2^-33."""
    return ((bits(numbers, lanes, stream) >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32


def normal(numbers: np.ndarray, lanes: int, stream: int = 0) -> np.ndarray:
    """Nearly: the sum of four uniform numbers, of variance 1."""
    x = bits(numbers, lanes, stream)
    parts = [(x >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    return 1.75 * (sum(part.astype(np.float64) for part in parts) / 2**16 - 2)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """To `dtype`, held in float64."""
    return x.astype(DTYPES[dtype]).astype(np.float64)


def logits_and_labels(
    numbers: np.ndarray, classes: int, scale: float, offset: float, margin: float | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """`margin`: by how much the label's logit leads, about; a loss of exp(-margin), and more of many classes."""
    z = scale * normal(numbers, classes) + offset
    labels = (bits(numbers, 1, 1)[:, 0] % np.uint64(classes)).astype(np.int32)
    if margin is not None:
        at = np.arange(len(z)), labels
        z[at] = -np.inf
        z[at] = z.max(-1) + margin + uniform(numbers, 1, 2)[:, 0]
    return rounded(z, dtype), labels


def numbers_as(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Bits, as what they mean in `dtype`."""
    return numbers.astype(f"uint{8 * np.dtype(DTYPES[dtype]).itemsize}").view(DTYPES[dtype])


def widened(z: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a signaling NaN
        return z.astype(np.float64)


# Running.


@functools.cache
def compiled(jit: Jit, f: Callable, *fixed: Any) -> Callable:
    return jit(functools.partial(f, *fixed))


def run(jit: Jit, f: Callable, fixed: tuple, dtype: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """`f(*fixed, *arrays)`, floats cast to `dtype`; the results as they are."""
    with jax.enable_x64(dtype == "float64"), np.errstate(all="ignore"):
        given = [jnp.asarray(x.astype(DTYPES[dtype]) if x.dtype.kind in "fV" else x) for x in arrays]
        return [np.asarray(x) for x in compiled(jit, f, *fixed)(*given)]


def loss_and_gradient(losses: Callable, z: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row, by z."""
    out, vjp = jax.vjp(lambda z: losses(z, *rest), z)
    return out, vjp(jnp.ones_like(out))[0]


# Softmax cross-entropy of integer labels.


class Exact(NamedTuple):
    loss: np.ndarray
    gradient: np.ndarray
    lost: Any = 0  # of the loss: the sum of the others' probabilities that may be 0


def exact_cross_entropy(z: np.ndarray, labels: np.ndarray, dtype: str = "float32") -> Exact:
    """In longdouble, and rounded to float64 where results of `dtype` have far fewer digits than that."""
    soft = oracle.Softmax(z.astype(LD))
    at = labels[:, None]
    gradient = soft.p.copy()
    np.put_along_axis(gradient, at, 0, -1)
    lost = np.where(gradient < FLUSHED["float64" if dtype == "float64" else "float32"], gradient, 0).sum(-1)
    np.put_along_axis(gradient, at, -np.take_along_axis(soft.not_p, at, -1), -1)
    exact = Exact(-np.take_along_axis(soft.log_p, at, -1)[:, 0], gradient, lost)
    return exact if dtype == "float64" else Exact(*(x.astype(np.float64) for x in exact))


def of_softmax(loss: np.ndarray, gradient: np.ndarray, labels: np.ndarray, want: Exact) -> dict[str, Error]:
    at = labels[:, None]
    lost = np.zeros(gradient.shape, np.float64)
    np.put_along_axis(lost, at, np.broadcast_to(want.lost, len(lost))[:, None], -1)
    e = error(gradient, want.gradient, gradient.dtype.name, lost=lost)
    at_label = Error(*(np.take_along_axis(x, at, -1)[:, 0] for x in e))
    for x in e:
        np.put_along_axis(x, at, 0, -1)
    loss = error(loss, want.loss, loss.dtype.name, lost=want.lost)
    return {LOSS: loss, LABEL: at_label, OTHERS: over_classes(e)}


def cross_entropy(jit: Jit, numbers: np.ndarray, dtype: str, **setting: Any) -> dict[str, Error]:
    z, labels = logits_and_labels(numbers, dtype=dtype, **setting)
    loss, gradient = run(jit, loss_and_gradient, (jaxent.softmax_cross_entropy,), dtype, z, labels)
    return of_softmax(loss, gradient, labels, exact_cross_entropy(z, labels, dtype))


# Elementwise losses, by the bits of the logit.

SIGMOID_LOSSES = {
    "cross-entropy": jaxent.sigmoid_cross_entropy,
    "focal": jaxent.sigmoid_focal_loss,
    "focal, gamma 5": functools.partial(jaxent.sigmoid_focal_loss, gamma=5.0),
    "asymmetric": jaxent.sigmoid_asymmetric_loss,
}


class Half(NamedTuple):
    """A loss at the label 1 or 0, and its slope."""

    value: np.ndarray
    slope: np.ndarray


def exact_sigmoids(z: np.ndarray) -> dict[str, tuple[Half, Half]]:
    """Of each loss, in float64: 2^29 times finer than what is measured."""
    with np.errstate(all="ignore"):
        e = np.exp(-np.abs(z))
        large, small, tail = 1 / (1 + e), e / (1 + e), np.log1p(e)
        up = z >= 0
        p, q = np.where(up, large, small), np.where(up, small, large)
        a, b = tail + np.maximum(-z, 0), tail + np.maximum(z, 0)
        pa, qb = (np.where(x == 0, x, x * y) for x, y in ((p, a), (q, b)))

        def focal(gamma):
            yes, no = q**gamma, p**gamma
            yes_a, no_b = (np.where(x == 0, x, x * y) for x, y in ((yes, a), (no, b)))
            return Half(yes_a, -yes * (gamma * pa + q)), Half(no_b, no * (gamma * qb + p))

        u = np.maximum(p - 0.05, 0)
        off = -np.log1p(-u)  # 1 - u is q + 0.05 where p is near 1
        off = np.where(p > 0.5, -np.log(q + 0.05), off)
        easy = Half(u**4 * off, p * q * u**3 * (4 * off + u / np.where(p > 0.5, q + 0.05, 1 - u)))
        return {
            "cross-entropy": (Half(a, -q), Half(b, p)),
            "focal": focal(2),
            "focal, gamma 5": focal(5),
            "asymmetric": (focal(1)[0], easy),
        }


def with_label(label: float, yes: Half, no: Half) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The loss, its slope, and the larger of the two terms of that."""
    if label in (0, 1):
        half = yes if label else no
        return half.value, half.slope, half.slope
    terms = label * yes.slope, (1 - label) * no.slope
    return label * yes.value + (1 - label) * no.value, sum(terms), np.maximum(*map(np.abs, terms))


def sigmoid(jit: Jit, numbers: np.ndarray, dtype: str, loss: str, label: float) -> dict[str, Error]:
    z = numbers_as(numbers, dtype)
    labels, f = np.full(z.shape, label), (SIGMOID_LOSSES[loss],)
    got = run(jit, loss_and_gradient, f, dtype, z, labels)
    wide = widened(z)
    value, slope, size = with_label(label, *exact_sigmoids(wide)[loss])
    lost = 0
    if loss == "asymmetric":  # a negative's slope is up to 20 exp(-z), where exp(-z) may be 0
        lost = np.where(
            (np.abs(size) < 1e-35) & (np.exp(-np.abs(wide)) < FLUSHED["float32"]), np.abs(size), 0
        )
    errors = of_sigmoid(*got, value, slope, size, lost)
    if label in (0, 1) and loss != "asymmetric":
        value, slope = run(jit, loss_and_gradient, f, dtype, -z, 1 - labels)
        same = [(a == b) | (np.isnan(a) & np.isnan(b)) for a, b in zip(got, (value, -slope), strict=True)]
        off = (~np.logical_and(*same)).astype(np.float64)
        errors[MIRRORED] = Error(off, off)
    return errors


def of_sigmoid(loss, gradient, want, slope, size, lost=0) -> dict[str, Error]:
    """`lost`: that much of the gradient is a multiple of exp(-|z|) that may be 0."""
    return {
        LOSS: error(loss, want, loss.dtype.name),
        "gradient": error(gradient, slope, gradient.dtype.name, size, lost),
    }


# Two classes, by the bits of the first logit.


def two_classes(jit: Jit, numbers: np.ndarray, dtype: str, other: float, label: int) -> dict[str, Error]:
    first = widened(numbers_as(numbers, dtype))
    z, labels = np.stack([first, np.full_like(first, other)], -1), np.full(first.shape, label, np.int32)
    loss, gradient = run(jit, loss_and_gradient, (jaxent.softmax_cross_entropy,), dtype, z, labels)
    return of_softmax(loss, gradient, labels, exact_two_classes(z, label))


def exact_two_classes(z: np.ndarray, label: int) -> Exact:
    with np.errstate(all="ignore"):
        d = z[:, label] - z[:, 1 - label]
        d = np.where(np.isposinf(z[:, 0]), np.nan, d)  # no answer
        a, minus_q = exact_sigmoids(d)["cross-entropy"][0]
        return Exact(a, np.stack([minus_q, -minus_q] if label == 0 else [-minus_q, minus_q], -1))
