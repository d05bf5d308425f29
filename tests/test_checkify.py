"""Bad labels in compiled code: what `checkify` and `chexify` say of them, word for word, under every transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify

import jaxent
from test_errors import WITH_LABELS, V, Z, rows_of

CHECKED = (
    "jaxent.{f}: `labels` must be in [0, 3) and name a class in force, but row {row} (counted over the flattened \
rows) has label {label}. Labels count from 0; hide a row with `where=` or `ignore_index=`."
)


def scan_over(f):
    return lambda z, y: lax.scan(lambda c, zy: (c + f(*zy), None), jnp.zeros(()), (z, y))[0]


# name: (from a scalar function of [N, V] logits and [N] labels, the row as the check counts it)
INSIDE = {
    "nothing": (lambda f: f, 2),
    "jit": (jax.jit, 2),
    "jit of jit": (lambda f: jax.jit(jax.jit(f)), 2),
    "vmap": (jax.vmap, 2),
    "vmap of two axes": (lambda f: lambda z, y: jax.vmap(f)(z.reshape(2, 2, V), y.reshape(2, 2)), 2),
    "grad": (jax.grad, 2),
    "jit of value_and_grad": (lambda f: jax.jit(jax.value_and_grad(f)), 2),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(f)), 2),
    "grad of grad": (lambda f: jax.grad(lambda z, y: jax.grad(f)(z, y).sum()), 2),
    "jvp": (lambda f: lambda z, y: jax.jvp(lambda z: f(z, y), (z,), (z,)), 2),
    "scan": (scan_over, 0),
    "checkpoint": (lambda f: jax.grad(jax.checkpoint(f)), 2),
}


def checked(transform, function):
    return checkify.checkify(transform(lambda z, y: rows_of(function, z, y).sum()))


@pytest.mark.parametrize("name", INSIDE)
def test_checkify(name):
    z, bad, good = jnp.asarray(Z), jnp.array([0, 2, 3, 1]), jnp.array([0, 2, 1, 1])
    transform, row = INSIDE[name]
    f = jax.jit(checked(transform, "softmax_cross_entropy"))
    got = f(z, bad)[0].get()
    assert CHECKED.format(f="softmax_cross_entropy", row=row, label=3) in got
    assert f(z, good)[0].get() is None


@pytest.mark.parametrize("function", WITH_LABELS)
def test_checkify_of_every_function(function):
    z, bad, good = jnp.asarray(Z), jnp.array([0, 2, 1, -7]), jnp.array([0, 2, 1, 1])
    f = jax.jit(checked(jax.value_and_grad, function))
    assert CHECKED.format(f=function, row=3, label=-7) in f(z, bad)[0].get()
    assert f(z, good)[0].get() is None
    with pytest.raises(checkify.JaxRuntimeError) as e:
        f(z, bad)[0].throw()
    assert CHECKED.format(f=function, row=3, label=-7) in str(e.value)


@pytest.mark.parametrize("function", WITH_LABELS)
def test_checks_are_no_effect(function):
    """jax calls a compiled function that has an effect from Python, array by array: several times as slow."""
    y = jnp.array([0, 2, 1, 1])
    f = jax.value_and_grad(lambda z: rows_of(function, z, y).sum())
    assert not jax.make_jaxpr(f)(jnp.asarray(Z)).effects
    f = lambda z: jax.vmap(f_of_row)(z, y)  # noqa: E731
    f_of_row = lambda z, y: rows_of(function, z, y).sum()  # noqa: E731
    assert not jax.make_jaxpr(f)(jnp.asarray(Z)).effects


def test_checkify_where_only_logits_are_mapped():
    z, y = jnp.stack([jnp.asarray(Z)] * 3), jnp.array([0, 2, 3, 1])
    f = checkify.checkify(jax.vmap(lambda z: rows_of("softmax_cross_entropy", z, y).sum()))
    assert CHECKED.format(f="softmax_cross_entropy", row=2, label=3) in jax.jit(f)(z)[0].get()


def test_checkify_counts_what_is_in_force():
    """Hidden and ignored rows pass; a label on a class that `class_mask` takes out does not."""
    z, bad = jnp.asarray(Z), jnp.array([0, 2, 1, -7])
    where, keep = jnp.array([True, True, True, False]), jnp.array([True, False, True])

    @jax.jit
    @checkify.checkify
    def hidden(z, y, where):
        return rows_of("softmax_loss", z, y, where=where), rows_of("softmax_loss", z, y, ignore_index=-7)

    assert hidden(z, bad, where)[0].get() is None
    f = checkify.checkify(lambda z, y: rows_of("softmax_poly_loss", z, y, where=where, class_mask=keep))
    want = CHECKED.format(f="softmax_poly_loss", row=2, label=1)
    assert want in jax.jit(f)(z, bad)[0].get()


def test_grad_of_scan_is_nan_where_the_label_is_bad():
    """jax loses every check inside a scan under reverse mode; the poison stays."""
    gradient = jax.grad(scan_over(jaxent.softmax_cross_entropy))(jnp.asarray(Z), jnp.array([0, 2, 3, 1]))
    assert np.isnan(gradient).all(-1).tolist() == [False, False, True, False]
    assert np.isfinite(gradient[jnp.array([0, 1, 3])]).all()


@pytest.mark.parametrize("transform", ["jit", "jit of value_and_grad"])
def test_chexify(transform):
    z, bad, good = jnp.asarray(Z), jnp.array([0, 2, 3, 1]), jnp.array([0, 2, 1, 1])
    f = INSIDE[transform][0](lambda z, y: rows_of("softmax_cross_entropy", z, y).sum())
    f = chex.chexify(f, async_check=False)
    f(z, good)
    with pytest.raises(checkify.JaxRuntimeError) as e:
        f(z, bad)
    assert CHECKED.format(f="softmax_cross_entropy", row=2, label=3) in str(e.value)
