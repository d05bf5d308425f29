"""A distribution that gives no mass to a class of probability 0: 0 * log 0 = 0, in every mode of differentiation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

import harness
import jaxent
from tables import thinned

N, V = 3, 5
SOURCES = ("dense", *harness.LINEAR)
OUT = np.arange(V) == 2  # the class that is not there
LOSSES = {
    "cross-entropy": functools.partial(jaxent.softmax_cross_entropy, z_loss=0.01),
    "class weights": functools.partial(
        jaxent.softmax_cross_entropy, class_weights=np.float32(np.arange(V) + 0.5)
    ),
    "focal": jaxent.softmax_focal_loss,
    "poly": jaxent.softmax_poly_loss,
}


def without(x, value):
    return jnp.where(OUT[None], value, x)


@functools.cache
def arrays():
    rng = np.random.default_rng(2)
    return [jnp.asarray(x, jnp.float32) for x in 2 * rng.normal(size=(3, N, V))]


def losses(source, name, z, q):
    """Of a model that knows that the class is not there: of a layer, by its bias."""
    layer = dataclasses.replace(harness.as_layer(z), bias=without(jnp.zeros((1, V)), -jnp.inf)[0])
    return LOSSES[name](layer.dense() if source == "dense" else layer, q)


def of_teacher(source, name, z, t):
    """And of a teacher that knows it, too."""
    return losses(source, name, z, nn.softmax(without(t, -jnp.inf)))


@functools.cache
def expected(name):
    """By the other classes alone."""
    z, t, dt = (x[:, ~OUT] for x in arrays())
    weights = {"class_weights": np.float32(np.arange(V) + 0.5)[~OUT]} if name == "class weights" else {}
    f = functools.partial(LOSSES[name].func if weights else LOSSES[name], **weights)
    rows = lambda z, t: f(z, nn.softmax(t))  # noqa: E731

    @functools.partial(jax.jit, compiler_options=harness.QUICK)
    def run(z, t, dt):
        slopes = jax.grad(lambda z, t: rows(z, t).sum(), (0, 1))(z, t)
        return rows(z, t), slopes, jax.jvp(functools.partial(rows, z), (t,), (dt,))[1]

    return run(z, t, dt)


@thinned(3, "name, source", LOSSES, SOURCES)
def test_a_teacher_that_knows_it(name, source):
    z, t, dt = arrays()

    @functools.partial(jax.jit, compiler_options=harness.QUICK)
    def f(z, t, dt):
        rows = functools.partial(of_teacher, source, name)
        slopes = jax.grad(lambda z, t: rows(z, t).sum(), (0, 1))(z, t)
        q = nn.softmax(without(t, -jnp.inf))
        of_q = jax.grad(lambda q: losses(source, name, z, q).sum())(q)
        dots = jax.jvp(functools.partial(rows, z), (t,), (dt,))[1] if source == "dense" else None
        return rows(z, t), slopes, of_q, dots

    with harness.blocks(source):
        rows, slopes, of_q, dots = f(z, t, dt)
    want_rows, want_slopes, want_dots = expected(name)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    near(rows, want_rows)
    for got, want in zip(slopes, want_slopes, strict=True):
        near(got[:, ~OUT], want)
        assert (got[:, OUT] == 0).all()
    assert np.isfinite(of_q).all() and (of_q[:, OUT] == 0).all()
    if dots is not None:
        near(dots, want_dots)


def test_along_directions_of_no_mass():
    """Forward mode, whose directions are 0 there, and one that is not: the class would then have an infinite loss."""
    z, q, _ = arrays()
    z, q = without(z, -jnp.inf), without(nn.softmax(q), 0)
    f = functools.partial(jaxent.softmax_cross_entropy, z)

    @functools.partial(jax.jit, compiler_options=harness.QUICK)
    def run(q):
        along = jax.jvp(f, (q,), (jnp.zeros_like(q),))[1]
        return along, jax.jacfwd(f)(q), jax.jacrev(f)(q), jax.hessian(lambda q: f(q).sum())(q)

    along, jacobian, want, hessian = run(q)
    assert (along == 0).all() and np.isfinite(jacobian).all() and np.isfinite(hessian).all()
    np.testing.assert_allclose(jacobian, want, rtol=1e-6)
