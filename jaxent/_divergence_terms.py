"""What each class adds to a divergence of p and q, from d = log(q / p): symbols as in `_log_ratio`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._numerics import product_or_zero


class Mean(NamedTuple):
    """h = c p + b q: numbers, or `[..., 1]`."""

    b: float | Array
    c: float | Array
    is_p: bool | Array  # b = 0
    is_q: bool | Array

    @classmethod
    def of(cls, beta: float | Array, dtype: Any) -> "Mean":
        if isinstance(beta, float):
            return cls(beta, 1 - beta, False, False)
        # which may have more digits than `dtype`
        return cls(beta.astype(dtype), (1 - beta).astype(dtype), beta == 0, beta == 1)

    @property
    def shares(self) -> tuple[Array, Array]:
        """Of S_p and S_q in the divergence."""
        return jnp.where(self.is_q, 1, self.c), jnp.where(self.is_p, 1, self.b)


def kl(p: Array, q: Array, d: Array) -> Array:
    """q d + (p - q) of each class, which add up to KL, for sum(p - q) = 0.

    That is q phi(d), where phi(d) = d + expm1(-d) is never negative.
    """
    near = jnp.abs(d) < 1
    x = jnp.where(near, d, 0)
    series = jnp.zeros_like(x)
    for n in range(18 if d.dtype == jnp.float64 else 11, 1, -1):  # phi(d) = sum_{n >= 2} (-d)^n / n!
        series = series * -x + 1 / math.factorial(n)
    return jnp.where(near, q * (x * x * series), expected(q, d) + (p - q))


def expected(q: Array, log: Array) -> Array:
    """q log of each class; infinite ones have a derivative of 0."""
    infinite = log == jnp.inf
    return jnp.where(infinite & (q > 0), jnp.inf, product_or_zero(q, jnp.where(infinite, 0, log)))


def against_mean(d: Array, mean: Mean) -> tuple[Array, Array]:
    """l_p and l_q, from |d|: the larger of p and q is above h, the smaller below."""
    falls = d < 0
    # of the larger, of the smaller; no select of two numbers, which has no place on an explicit mesh (jax 0.12, vmap)
    swap = falls.astype(d.dtype)
    b, c = (1 - swap) * mean.b + swap * mean.c, (1 - swap) * mean.c + swap * mean.b
    reach = 700 if d.dtype == jnp.float64 else 80  # beyond it, the smaller one is nothing beside the other
    a = jnp.minimum(jnp.where(falls, -d, d), reach)
    e, shrunk = jnp.expm1(a), jnp.exp(-a)
    x = -c * jnp.expm1(-a)
    near = x < 0.5
    log1p, log = jnp.log1p(-jnp.where(near, x, 0)), jnp.log(jnp.where(near, 1, b + c * shrunk))
    # not log1p alone: the factor 1 / (1 + b e) of its derivative, times a small cotangent, would be 0
    large = b * e > 1e6
    below = jnp.where(
        large, a + jnp.log(jnp.where(large, b + c * shrunk, 1)), jnp.log1p(jnp.where(large, 0, b * e))
    )
    up, down = -jnp.where(near, log1p, log), -below
    l_p, l_q = jnp.where(falls, up, down), jnp.where(falls, down, up)
    return jnp.where(mean.is_q, -d, l_p), jnp.where(mean.is_p, d, l_q)


def from_mean(p: Array, q: Array, mean: Mean, logs: tuple[Array, Array]) -> tuple[Array, Array]:
    """What each class has of KL(p || h) and KL(q || h)."""
    h = mean.c * p + mean.b * q
    return kl(h, p, logs[0]), kl(h, q, logs[1])


def log_ratio(log_p: Array, q: Array) -> Array:
    """d of probabilities q that are given as such; 0 where p and q are both 0."""
    has_mass = q != 0
    far = jnp.where(log_p > -jnp.inf, -jnp.inf, jnp.zeros_like(log_p))
    return jnp.where(has_mass, jnp.log(jnp.where(has_mass, q, 1)) - log_p, far)


def js(log_p: Array, q: Array, beta: float | Array, of_all: bool) -> Array:
    """c p l_p + b q l_q of each class, 0 < b < 1; for sums `of_all` classes as terms >= 0.

    Its derivatives are those on paper. Those of the formula cancel where p or q is small, but for their roundings.
    """
    given, number = ((), beta) if isinstance(beta, float) else ((beta,), None)  # which a closure would leak

    def parts(log_p: Array, q: Array, given: tuple[Array, ...]) -> tuple[Any, ...]:
        [b] = given or (number,)
        mean = Mean.of(b, log_p.dtype)
        p, logs = jnp.exp(log_p), against_mean(log_ratio(log_p, q), mean)
        return mean, p, logs, from_mean(p, q, mean, logs)

    @jax.custom_jvp
    def of_class(log_p: Array, q: Array, *given: Array) -> Array:
        mean, p, logs, kls = parts(log_p, q, given)
        of_p, of_q = kls if of_all else map(expected, (p, q), logs)
        return mean.c * of_p + mean.b * of_q

    @of_class.defjvp
    def _(x: tuple[Array, ...], dx: tuple[Array, ...]) -> tuple[Array, Array]:
        (log_p, q, *given), (d_log_p, dq, *db) = x, dx
        mean, p, (l_p, l_q), (kl_p, kl_q) = parts(log_p, q, tuple(given))
        slope = mean.c * expected(p, l_p) * d_log_p + mean.b * jnp.where(q == 0, 0, l_q) * dq
        for d_beta in db:
            slope += (kl_q - kl_p) * d_beta
        return of_class(*x), slope

    return of_class(log_p, q, *given)
