"""The generalized KL divergence, of measures that need not sum to 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracle_elementwise as oracle
from harness import FULL, assert_within
from jaxent import kl_divergence

N, V = 60, 5


def inputs(dtype):
    """Targets far from the model, near it, and the same; zeros in them, and numbers far above 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(-1, 3, (N, V)).astype(dtype)
    distance = np.repeat([0, 1e-6, 1e-4, 1e-2, 0.3, 3], N // 6)[:, None] * rng.normal(size=(N, V))
    q = (np.exp(x.astype(np.longdouble) + distance)).astype(dtype)
    q[::7, 2] = 0
    x[::14, 2] = -np.inf
    return x, q


@functools.cache
def compiled():
    def f(x, q):
        out, vjp = jax.vjp(functools.partial(kl_divergence, generalized=True), x, q)
        dots = jax.jvp(
            functools.partial(kl_divergence, generalized=True), (x, q), (jnp.ones_like(x), jnp.ones_like(q))
        )
        return out, *vjp(jnp.ones_like(out)), dots[1]

    return jax.jit(f, compiler_options=FULL)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accuracy(dtype):
    with jax.enable_x64(dtype == np.float64):
        x, q = inputs(dtype)
        out, dx, dq, dot = map(np.asarray, compiled()(x, q))
    want, slope_x, slope_q = oracle.generalized_kl_divergence(x, q)
    unit = np.finfo(dtype).eps
    p, d = np.exp(x.astype(np.longdouble)), np.where(np.isfinite(slope_q), slope_q, 0)
    # q phi(d) of a d that is off by a few unit, and by as much of itself and of log p where they are far apart
    far = np.abs(p - q) > (p + q) / 5
    term = np.where(far, q * (np.abs(d) + np.abs(np.where(np.isfinite(x), x, 0))) + p, q * np.abs(d))
    assert_within(out, want, 4 * unit * term.sum(-1) + 4 * unit**2 * p.sum(-1), "value")
    assert (out >= 0).all()
    assert_within(dx, slope_x, 4 * unit * (p + q), "by log_probs")
    # where q = 0, log q + 1 counts as 0; so does an infinite log_probs
    slope_q = np.where(q == 0, -1 - np.where(np.isinf(x), 0, x), slope_q)
    size = np.where(np.isfinite(x), 1 + np.abs(x) + np.abs(slope_q), 1)
    assert_within(dq, slope_q, 4 * unit * size, "by targets")
    along = (np.where(np.isfinite(dx), dx, 0) + dq).sum(-1)
    np.testing.assert_allclose(dot, along, rtol=1e3 * unit, atol=1e3 * unit)


def test_parity_with_optax():
    rng = np.random.default_rng(2)
    x, q = rng.normal(-2, 1, (N, V)).astype(np.float32), rng.exponential(1, (N, V)).astype(np.float32)
    q[::7, 2] = 0
    where = np.arange(N) % 3 > 0

    @jax.jit
    def both(x, q):
        ours = functools.partial(kl_divergence, generalized=True)
        peer = optax.losses.generalized_kl_divergence
        return [
            (ours(x, q), peer(x, q)),
            (ours(x.T, q.T, axis=0), peer(x, q)),
            (jax.grad(lambda x: ours(x, q).sum())(x), jax.grad(lambda x: peer(x, q).sum())(x)),
            (ours(x, q, where=where, reduction="mean"), jnp.mean(peer(x, q), where=where)),
        ]

    for a, b in both(x, q):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def test_of_distributions_it_is_kl():
    p, q = (jax.nn.softmax(jnp.asarray(x)) for x in np.random.default_rng(1).normal(0, 1, (2, 9, V)))
    found, want = (kl_divergence(jnp.log(p), q, generalized=g) for g in (True, False))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_hostile_targets():
    x = jnp.log(jnp.full((7, 2), 0.5))
    q = jnp.array([[3.0, 0.5], [-0.1, 1], [jnp.nan, 1], [jnp.inf, 1], [0, 0], [1, 1], [1, 1]])
    x = x.at[5].set(jnp.array([-jnp.inf, 0])).at[6].set(jnp.array([jnp.nan, 0]))
    out, dx, dq, _ = compiled()(x, q)
    np.testing.assert_allclose(out[0], 3 * np.log(6) - 2.5, rtol=1e-6)
    np.testing.assert_allclose(out[4:6], [1, np.inf])
    for a in (out[:, None], dx, dq):
        np.testing.assert_array_equal(
            np.isnan(a), np.isin(np.arange(7), [1, 2, 3, 6])[:, None] & np.ones_like(a, bool)
        )


def test_second_derivatives(x64):
    def f(x, q):
        return kl_divergence(x, q, generalized=True)

    x, q = jnp.array([-0.5, -1.0, -3.0]), jnp.array([0.6, np.exp(-1), 2.0])
    hessian = jax.jit(jax.hessian(f, (0, 1)))(x, q)
    np.testing.assert_allclose(hessian[0][0], np.diag(np.exp(x)), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(hessian[0][1], -np.eye(3), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(hessian[1][1], np.diag(1 / q), rtol=1e-12, atol=1e-14)


def test_gradients_of_small_probabilities():
    """Squares of them are 0 in float32: classes far below the others, which a teacher has as well."""
    logits = jnp.array([0.0, -50.0, -1.0])
    q = jax.nn.softmax(logits)

    def of_logits(z):
        return kl_divergence(jax.nn.log_softmax(z), q, generalized=True)

    assert np.abs(jax.jit(jax.grad(of_logits))(logits)).max() < 1e-15
    x, q = jnp.array([-60.0]), jnp.exp(jnp.array([-59.9]))
    by_x, by_q = jax.jit(jax.grad(lambda x, q: kl_divergence(x, q, generalized=True), (0, 1)))(x, q)
    np.testing.assert_allclose(by_x, np.exp(-60.0) - np.float64(q), rtol=1e-3)
    np.testing.assert_allclose(by_q, 0.1, rtol=1e-4)
