"""How a test runs jaxent on a case, and how far a result is from the oracle's, in units that mean something."""

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import cases
import jaxent
from jaxent._logits import class_blocks, sources
from jaxent._logits.plan import Plan, Sizes

# What LLVM makes of a program is seldom the question, and takes a third of the time that compiling takes.
QUICK = {"xla_backend_optimization_level": 0}
# conftest.py compiles quickly; the same HLO as a user has; and the same program, what LLVM makes of it included
HLO = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
FULL = HLO | {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
LINEAR = (
    "rows",
    "pieces",
    "classes",
)  # logits as a layer that is never built, in blocks of these; or "dense"
ARRAYS = ("where", "weights", "class_weights", "class_mask")
# significant bits, exponent of the smallest normal number
FORMATS = {"float64": (53, -1022), "float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that are arrays, which a compiled function takes as arguments, and the rest."""
    arrays = {name: x for name, x in options.items() if name in ARRAYS}
    return arrays, {name: x for name, x in options.items() if name not in ARRAYS}


def cast(x: Any, dtype: str) -> Any:
    """To jax, floats in `dtype`."""
    x = np.asarray(x)
    return jnp.asarray(x.astype(cases.NUMPY_DTYPES[dtype]) if x.dtype.kind == "f" else x)


def weights_in(arrays: dict[str, Any], dtype: str) -> dict[str, Any]:
    wide = "float64" if dtype == "float64" else "float32"
    return {name: cast(x, wide) for name, x in arrays.items()}


def nans(shape: tuple[int, ...], dtype: Any) -> Any:
    """For `jax.lax.empty`, which on a CPU is zeros, elsewhere anything."""
    return jnp.full(shape, jnp.nan, dtype)


@contextlib.contextmanager
def blocks(source: str) -> Iterator[None]:
    """Whatever is traced inside cuts layers into ragged blocks: most shapes leave a remainder, a few do not."""

    def by_rows(sizes: Sizes, *_: Any) -> Plan:
        if source == "pieces":
            return Plan(min(2, sizes.rows), sizes.classes, pieces=2)
        return Plan(min(3, sizes.rows), sizes.classes)

    def plan(sizes: Sizes, *_: Any) -> Plan:
        return Plan(sizes.rows, sizes.classes // 4 + 1) if source == "classes" else by_rows(sizes)

    with contextlib.ExitStack() as stack:
        if source != "dense":
            stack.enter_context(mock.patch.object(sources, "plan", plan))
            stack.enter_context(mock.patch.object(sources, "plan_by_rows", by_rows))
            stack.enter_context(mock.patch.object(class_blocks, "ROWS", 2))  # where some do not count
            stack.enter_context(mock.patch("jax.lax.empty", nans))
        yield


def as_layer(z: Any) -> jaxent.LinearLogits:
    """One-hot rows times the logits themselves: their product is exactly z, and dkernel is exactly dz."""
    *rows, classes = z.shape
    n = math.prod(rows)
    return jaxent.LinearLogits(jnp.eye(n, dtype=z.dtype).reshape(*rows, n), z.reshape(n, classes))


def call(loss: str, source: str, inputs: list[Any], options: dict[str, Any]) -> Any:
    """The loss; where logits are not dense, those in `inputs` become layers, with the class axis last."""
    f = getattr(jaxent, loss)
    if source == "dense":
        return f(*inputs, **options)
    axis, shape = options.get("axis", -1), inputs[0].shape

    def move(x: Any) -> Any:
        return jnp.moveaxis(x, axis, -1) if jnp.shape(x) == shape else x

    options = {name: move(x) for name, x in options.items() if name != "axis"}
    inputs = [
        as_layer(move(x)) if name.endswith("logits") else move(x)
        for name, x in zip(inspect.signature(f).parameters, inputs, strict=False)
    ]
    return f(*inputs, **options)


@functools.cache  # compiled once for all inputs of a shape
def compiled_value(loss: str, rest: tuple[tuple[str, Any], ...], source: str, quick: bool) -> Any:
    def f(inputs, arrays):
        return call(loss, source, inputs, arrays | dict(rest))

    return jax.jit(f, compiler_options=QUICK if quick else FULL)


@functools.cache
def compiled_gradients(loss: str, rest: tuple[tuple[str, Any], ...], source: str, quick: bool) -> Any:
    def f(inputs, arrays, cotangent):
        moving = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_moving(moved):
            full = list(inputs)
            for i, x in zip(moving, moved, strict=True):
                full[i] = x
            return call(loss, source, full, arrays | dict(rest))

        out, vjp = jax.vjp(of_moving, [inputs[i] for i in moving])
        return out, vjp(cotangent.astype(out.dtype))[0]

    return jax.jit(f, compiler_options=QUICK if quick else FULL)


def value(
    loss: str,
    *inputs: Any,
    dtype: str = "float32",
    source: str = "dense",
    quick: bool = False,
    **options: Any,
) -> Any:
    """The compiled loss (or statistics) of logits and labels given in float64, computed in `dtype`."""
    with jax.enable_x64(dtype == "float64"), blocks(source):
        arrays, rest = split(options)
        f = compiled_value(loss, tuple(rest.items()), source, quick)
        return jax.tree.map(np.asarray, f([cast(x, dtype) for x in inputs], weights_in(arrays, dtype)))


def gradients(loss: str, *inputs: Any, **options: Any) -> list[np.ndarray]:
    """The compiled gradients by every input that is float."""
    return value_and_gradients(loss, *inputs, **options)[1]


def value_and_gradients(
    loss: str,
    *inputs: Any,
    cotangent: Any,
    dtype: str = "float32",
    source: str = "dense",
    quick: bool = False,
    **options: Any,
) -> tuple[np.ndarray, list[np.ndarray]]:
    with jax.enable_x64(dtype == "float64"), blocks(source):
        arrays, rest = split(options)
        f = compiled_gradients(loss, tuple(rest.items()), source, quick)
        inputs, arrays = [cast(x, dtype) for x in inputs], weights_in(arrays, dtype)
        return jax.tree.map(np.asarray, f(inputs, arrays, cast(cotangent, "float32")))


def cotangent_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Uneven, of both signs, exact in every dtype."""
    x = np.random.default_rng([seed, 7, *shape]).integers(1, 40, size=shape) / 16
    return np.where(np.arange(x.size).reshape(shape) % 3 == 1, -x, x)


def spacing(x: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between numbers of `dtype` around x."""
    bits, least = FORMATS[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1
    return np.ldexp(np.longdouble(1), np.maximum(exponent, least) - (bits - 1))


def error_in_ulp(got: np.ndarray, want: np.ndarray, dtype: str) -> np.ndarray:
    return difference(got, want) / spacing(np.where(np.isfinite(want), want, 1), dtype)


def difference(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """|got - want|, 0 where both are the same infinity or both NaN, infinite where only one is."""
    got, want = np.asarray(got, np.longdouble), np.asarray(want, np.longdouble)
    assert got.shape == want.shape, (got.shape, want.shape)
    special = ~np.isfinite(got) | ~np.isfinite(want)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    plain = np.abs(np.where(special, 0, got) - np.where(special, 0, want))
    return np.where(special, np.where(same, 0, np.inf), plain)


def assert_within(got: np.ndarray, want: np.ndarray, bound: np.ndarray, what: str = "") -> None:
    """|got - want| <= bound everywhere; the message has the worst element."""
    error = difference(got, want)
    bound = np.broadcast_to(np.asarray(bound, np.longdouble), error.shape)
    bad = ~(error <= np.where(np.isnan(bound), 0, bound))
    if bad.any():
        excess = np.where(bad, error / np.where(bound > 0, bound, 1e-300), 0)
        at = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{what} {bad.sum()} of {bad.size} off; worst at {[int(i) for i in at]}: got {got[at]!r}, want "
            f"{np.asarray(want)[at]!r}, error {float(error[at]):.3g}, allowed {float(bound[at]):.3g}"
        )
