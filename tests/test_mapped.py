"""Custom rules with an input that has no part in their value, where a `vmap` maps over that input alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxent._derivatives import slope_rule, with_forward_mode, with_slope, zeros_like_any
from jaxent._mapped import mapped_like
from jaxent._rows import keep_gradient

X, FACTORS = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, 3.0])  # as many factors as entries
WRAPPED = pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "checkpoint"]
)


def gradient(f, wrap):
    return jax.grad(lambda x: jnp.sum(jax.vmap(wrap(f), (None, 0))(x, FACTORS)))(X)


def check(f, wrap, derivative):
    np.testing.assert_allclose(gradient(f, wrap), sum(derivative(X, k) for k in FACTORS), rtol=1e-6)


def rule(backward):
    """x^2 with the derivative that `backward(x, k)` says."""
    square = jax.custom_vjp(lambda _, x, k: x**2, nondiff_argnums=(0,))
    square.defvjp(lambda _, x, k: (x**2, (x, k)), lambda _, kept, g: (backward(*kept) * g, None))
    return with_forward_mode(square)


@WRAPPED
@pytest.mark.parametrize("backward", [lambda x, k: 2 * x * k, lambda x, k: 2 * x], ids=["read", "idle"])
def test_with_forward_mode(backward, wrap):
    square = rule(backward)
    check(lambda x, k: square(None, x, k), wrap, backward)


@WRAPPED
def test_with_slope(wrap):
    slope = with_forward_mode(
        slope_rule(
            lambda _, inputs: zeros_like_any(inputs, inputs[0]),
            lambda _, inputs, __, g: (g * inputs[0] * inputs[1], None),
        )
    )
    check(lambda x, k: with_slope(x**2, slope(None, (x, k))), wrap, lambda x, k: x * k)


@WRAPPED
def test_with_a_slope_of_0(wrap):
    check(lambda x, k: x + with_slope(x**2, zeros_like_any((x, k), x)), wrap, lambda x, k: jnp.ones_like(x))


@WRAPPED
def test_zeros(wrap):
    """Of a rule: cotangents of what all have in common would be added up before the rule sees them."""
    slope = slope_rule(
        lambda _, inputs: zeros_like_any(inputs, inputs[0]),
        lambda _, inputs, __, g: (g * inputs[1], jnp.sum(g * inputs[0])),
    )
    total = lambda k: jnp.sum(jax.vmap(wrap(lambda k: slope(None, (X, k))))(k))  # noqa: E731
    np.testing.assert_allclose(jax.grad(total)(FACTORS), jnp.full_like(FACTORS, X.sum()), rtol=1e-6)


@WRAPPED
def test_keep_gradient(wrap):
    counts = lambda k: jnp.array([True]) & (k > 0)  # noqa: E731
    f = lambda x, k: keep_gradient(counts(k), x[None])[0]  # noqa: E731
    check(f, wrap, lambda x, k: jnp.where(k > 0, jnp.ones_like(x), 0))


def test_what_is_mapped_over_is_split_alike():
    """On an explicit mesh, where an array for all factors in one place would be as many times as large."""
    mesh = jax.make_mesh((1,), ("factors",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P(None)))
        factors = jax.device_put(FACTORS, NamedSharding(mesh, P("factors")))
        found = jax.jit(jax.vmap(lambda x, k: mapped_like(k, x), (None, 0)))(x, factors)
    assert jax.typeof(found).sharding.spec == P("factors", None)
    np.testing.assert_array_equal(found, jnp.tile(X, (3, 1)))
