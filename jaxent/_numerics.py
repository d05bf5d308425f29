"""Arithmetic that keeps its promises: accumulation dtype, compensated exp, safe products."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """float32, or float64 where an operand is float64: what losses are computed and returned in."""
    wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(x: Array) -> Array:
    """`x` in its accumulation dtype."""
    return x.astype(accumulation_dtype(x.dtype))


def of_one_dtype(a: Array, b: Array) -> tuple[Array, Array]:
    """Operands of a matmul, also where jax is told not to promote."""
    dtype = a.dtype if a.dtype == b.dtype else accumulation_dtype(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def as_dtype(option: float | Array, dtype: DTypeLike) -> float | Array:
    """A Python float takes any dtype; an array has to be told."""
    return option if isinstance(option, float) else option.astype(dtype)


def over_rows(x: Array, ndim: int) -> Array:
    """`[V]` as `[1, ..., 1, V]`: jax may be told not to promote ranks."""
    return x if x.ndim in (0, ndim) else jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def divided(x: Array, by: float | Array) -> Array:
    """x / by; nothing to do where that is the number 1."""
    return x if isinstance(by, float) and by == 1 else x / by


def is_probability(x: Any) -> Any:
    """In [0, 1]; and up to 16 ulp above 1, to which sums of probabilities round."""
    if x.dtype == bool:
        return x == x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return (x >= 0) & (x <= 1)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)  # in which jax will hold a float64 of numpy
    return (x >= 0) & (x <= 1 + 16 * float(jnp.finfo(dtype).eps))


def probability(x: Array, dtype: DTypeLike) -> Array:
    """`x` in `dtype`, at most 1; NaN, and so is the gradient, where it is none."""
    return at_most_1(x.astype(dtype)) * nan_unless(is_probability(x))


def at_most_1(x: Array) -> Array:
    """What is above 1 is 1, with the derivative of x."""
    return x - lax.stop_gradient(jnp.where(x > 1, x - 1, 0))


def nan_unless(ok: Array) -> Array:
    """A factor: NaN poisons the value and, by the product rule, the gradient."""
    return jnp.where(ok, 1, jnp.nan)


def subtraction_error(a: Array, b: Array, difference: Array) -> Array:
    """What rounding took from `difference = a - b`; exact (Knuth's TwoSum) while nothing overflows.

    A constant for differentiation: the derivative of a rounding error is no derivative.
    """
    a, b, difference = map(lax.stop_gradient, (a, b, difference))
    virtual = difference - a
    return (a - (difference - virtual)) - (b + virtual)


def exp_difference(z: Array, m: Array, temperature: float | Array = 1.0) -> Array:
    """exp((z - m) / temperature) for z <= m, relative error about 1 ulp at 1.0, however large |z - m| is.

    Rounding d = z - m costs |d|/2 ulp of the result: 40 ulp at a probability of 1e-30. The error of a
    subtraction is a float, so exp(d) (1 + error) has it back. z is raised to where exp has long been 0 (128
    below m, 800 in float64), which keeps the error term finite for z = -inf; a NaN, or m = +-inf, gives NaN.
    """
    reach = 800 if z.dtype == jnp.float64 else 128
    least = m - (reach * temperature + jnp.abs(m) * 2.0**-20)
    # not a maximum, which jax 0.12 cannot differentiate where its operands are split unlike
    z = jnp.where(z < least, least, z)
    d = z - m
    e = jnp.exp(divided(d, temperature))
    return e + e * divided(subtraction_error(z, m, d), temperature)


def product_or_zero(weight: Array, x: Array) -> Array:
    """weight * x with 0 * anything = 0, in the value and in the gradient of both (0 log 0 = 0)."""
    off = weight == 0
    return jnp.where(off, 0, weight * jnp.where(off, 0, x))


def limit(weight: float | Array, x: Array) -> Array:
    """`x`, but 0 where the weight is 0 and x infinite, so that their product is 0 there.

    Unlike `product_or_zero` it keeps the derivative with respect to a weight of 0 while x is finite.
    """
    return jnp.where((weight == 0) & jnp.isinf(x), 0, x)


def finite_or_0(m: Array) -> Array:
    """A maximum as a shift: of no class at all it is -inf."""
    return jnp.where(m == -jnp.inf, 0, m)
