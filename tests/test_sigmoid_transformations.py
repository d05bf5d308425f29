"""Elementwise losses from logits: second derivatives, and what jax makes of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness import FULL, cotangent_of
from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy
from sigmoid_cases import FORMS, losses


@pytest.mark.parametrize("form", ["plain", "asymmetric_all"])
def test_second_derivatives(form, x64):
    loss, options, *_ = FORMS[form]
    options = {**options, "label_smoothing": 0.1}
    options.pop("pos_weight", None)
    z, y, w = jnp.array([0.3, -2.0, 5.0, 0.0, -1.0]), jnp.array([0.0, 1.0, 0.4, 0.7, 0.0]), jnp.array(2.0)

    def f(z, y, w):
        return (loss(z, y, pos_weight=w, **options) * jnp.arange(1.0, 6)).sum()

    @jax.jit
    def everything(z, y, w):
        both = (0, 1, 2)
        hessian = jax.hessian(f, both)(z, y, w)
        others = [jac(jac(f), both)(z, y, w) for jac in (jax.jacrev, jax.jacfwd)]
        # the value that comes with a gradient has a tangent of its own, also at a logit or a label of 0
        ones = jnp.ones_like(z)
        tangent = jax.jvp(lambda z, y: jax.value_and_grad(f)(z, y, w)[0], (z, y), (ones, ones))[1]
        return hessian, others, tangent, jax.grad(f, both)(z, y, w)

    @jax.jit
    def gradient(z):
        return jax.grad(f, (0, 1, 2))(z, y, w)

    hessian, others, tangent, first = everything(z, y, w)
    for other in others:
        chex.assert_trees_all_close(other, hessian[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(tangent, sum(d.sum() for d in first[:2]), rtol=1e-12)
    h = 1e-5
    for i in range(5):
        step = h * (np.arange(5) == i)
        want = jax.tree.map(lambda a, b: (a - b) / (2 * h), gradient(z + step), gradient(z - step))
        for k in range(3):
            np.testing.assert_allclose(hessian[k][0][..., i], want[k], rtol=1e-8, atol=1e-9)


@losses
def test_second_derivatives_of_confident_elements(loss):
    z = jnp.float32([-85, -50, -30, 30, 50, 85])
    hessian = jax.jit(jax.vmap(jax.hessian(loss), (0, None)), compiler_options=FULL)
    for y in (0.0, 1.0):
        d = hessian(z, y)
        assert np.isfinite(d).all()
        if loss is sigmoid_cross_entropy:
            np.testing.assert_allclose(d, np.exp(-np.abs(np.float64(z))), rtol=1e-6)


@pytest.mark.parametrize("loss", [sigmoid_cross_entropy, sigmoid_asymmetric_loss])
def test_transformations(loss):
    rng = np.random.default_rng(2)
    z, dot = map(jnp.float32, rng.normal(0, 3, (2, 6, 3)))
    y, w = jnp.float32(rng.uniform(0, 1, (6, 3))), jnp.float32([1, 2, 3])
    rows = functools.partial(loss, pos_weight=w, label_smoothing=0.1)

    def f(z, y):
        return jnp.vdot(rows(z, y), jnp.asarray(cotangent_of((6, 3)), jnp.float32))

    def by_scan(z):
        return jax.lax.scan(lambda c, zy: (c + rows(*zy).sum(), rows(*zy)), 0.0, (z, y))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def everything(z, y):
        primal, forward = jax.jvp(f, (z, y), (dot, 2 * dot))
        d = jax.grad(f, (0, 1))(z, y)
        return {
            "value": (primal, f(z, y)),
            "jvp": (forward, jnp.vdot(d[0], dot) + jnp.vdot(d[1], 2 * dot)),
            "linearize": (jax.linearize(f, z, y)[1](dot, 2 * dot), forward),
            "jacfwd": (jax.jacfwd(f)(z, y), d[0]),
            "jacrev": (jax.jacrev(f)(z, y), d[0]),
            "checkpoint": (jax.grad(jax.checkpoint(f))(z, y), d[0]),
            "vmap": (jax.vmap(rows)(z, y), rows(z, y)),
            "grad in vmap": (
                jax.vmap(jax.grad(lambda z, y: rows(z, y).sum()))(z, y),
                jax.grad(lambda z: rows(z, y).sum())(z),
            ),
            "scan": (by_scan(z)[1], rows(z, y)),
            "grad of scan": (
                jax.grad(lambda z: by_scan(z)[0])(z),
                jax.grad(lambda z: rows(z, y).sum())(z),
            ),
            "vmap over pos_weight": (
                jax.vmap(jax.grad(lambda w: loss(z, y, pos_weight=w).sum()))(w)[1],
                jax.grad(lambda w: loss(z, y, pos_weight=w).sum())(w[1]),
            ),
        }

    compiled = everything(z, y)
    for name, (a, b) in compiled.items():
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(jax.grad(f)(z, y), compiled["jacrev"][0], rtol=1e-6, atol=1e-7)
