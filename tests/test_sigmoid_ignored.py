"""Sigmoid losses: labels to ignore, which are gone, and others beside them, which are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxent
from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy
from sigmoid_cases import losses


@losses
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int8])
def test_ignored_means_gone(loss, dtype):
    """The label, and what the logits hold there; in numpy and in jax."""
    ignored = -1 if dtype == np.int8 else 255
    z = np.float32([1.0, np.nan, np.inf, -np.inf, 0.5, np.nan, -2.0])
    y = np.array([1, ignored, ignored, ignored, 0, ignored, 1]).astype(dtype)
    w = np.float32([2, 1, np.nan, 3, 0.5, np.inf, 1])
    kept = np.array([0, 4, 6])

    def everything(z, labels):
        f = functools.partial(loss, ignore_index=ignored, weights=w)
        out, vjp = jax.vjp(lambda z: f(z, labels), z)
        mean, slope = jax.value_and_grad(lambda z: f(z, labels, reduction="mean"))(z)
        forward = jax.jvp(lambda z: f(z, labels), (z,), (jnp.ones(7),))[1]
        return [out, vjp(jnp.ones(7))[0], slope, forward], mean, f(z, labels, reduction="sum")

    clean = np.asarray(loss(z[kept], y[kept])) * w[kept]
    total = jaxent.total_weight(y, ignore_index=ignored, weights=w)
    assert total == 3.5
    on_host = jax.jit(lambda z: everything(z, y))(z)
    for found, mean, sum_ in (on_host, jax.jit(everything)(z, jnp.asarray(y))):
        for x in found:
            np.testing.assert_array_equal(np.delete(x, kept), 0)
            assert np.isfinite(x).all() and (x[kept] != 0).sum() >= 2
        np.testing.assert_allclose(found[0][kept], clean, rtol=1e-6)
        np.testing.assert_allclose(mean, clean.sum() / 3.5, rtol=1e-6)
        np.testing.assert_allclose(sum_ / total, mean, rtol=1e-6)
    nothing = functools.partial(
        loss, labels=np.full(7, ignored, dtype), ignore_index=ignored, reduction="mean"
    )
    for x in jax.value_and_grad(nothing)(z):
        np.testing.assert_array_equal(x, 0)


@losses
def test_the_mean_divides_by_what_is_not_ignored(loss):
    rng = np.random.default_rng(5)
    z, y = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.integers(0, 2, (2, 3, 4, 5)).astype(np.uint8)
    y[rng.uniform(size=y.shape) < 0.3] = 255
    where = rng.uniform(size=y.shape) < 0.8
    kept = where & (y != 255)
    count = jaxent.total_weight(y, ignore_index=255, where=where)
    assert count == int(kept.sum())
    mean, sum_ = (
        loss(z, y, ignore_index=255, where=where, axis=1, reduction=reduction)
        for reduction in ("mean", "sum")
    )
    np.testing.assert_allclose(mean, sum_ / count, rtol=1e-6)
    np.testing.assert_allclose(mean, loss(z[kept], y[kept]).mean(), rtol=1e-6)


def test_an_ignore_index_that_labels_cannot_hold():
    """It never occurs: -100 is not 156 in uint8, 2**32 + 1 not 1 in int32."""
    z = jnp.zeros(3)
    for labels, ignored in (
        (jnp.uint8([0, 1, 156]), -100),
        (jnp.int8([0, 1, -1]), 255),
        (jnp.int32([0, 1, 2]), 2**32 + 1),
        (jnp.uint8([0, 1, 7]), np.int64(300)),
    ):
        out = sigmoid_cross_entropy(z, labels, ignore_index=ignored)
        np.testing.assert_array_equal(np.isnan(out), [False, False, True])
        assert out[1] > 0
    np.testing.assert_array_equal(
        sigmoid_cross_entropy(z, np.int64([0, 1, 2**32 + 1]), ignore_index=2**32 + 1) == 0,
        [False, False, True],
    )
    assert sigmoid_cross_entropy(0.5, 255, ignore_index=255) == 0
    assert sigmoid_cross_entropy(jnp.float32(0.5), jnp.uint8(255), ignore_index=np.int64(255), axis=0) == 0


def test_bad_labels_beside_ignored_ones():
    z, y = jnp.zeros((2, 3)), np.uint8([[0, 255, 1], [255, 7, 1]])
    f = functools.partial(sigmoid_cross_entropy, ignore_index=255)
    with pytest.raises(
        ValueError, match=r"`labels` must be in \[0, 1\], but is 7 at index \[1, 1\]\. 1 is yes"
    ):
        f(z, y)
    hidden = jnp.asarray(y != 7)
    for options in (
        {"where": np.asarray(hidden)},
        {"where": hidden},
        {"weights": hidden.astype(jnp.float32)},
    ):
        np.testing.assert_array_equal(f(z, y, **options) == 0, (y == 255) | (y == 7))
    out = jax.jit(lambda where: f(z, y, where=where))(hidden | True)  # what a traced mask may hide is NaN
    np.testing.assert_array_equal(np.isnan(out), y == 7)
    np.testing.assert_array_equal(out == 0, y == 255)
    error, out = checkify.checkify(jax.jit(f))(z, jnp.asarray(y))
    np.testing.assert_array_equal(np.isnan(out), y == 7)
    assert "element 4 (counted over the flattened array) is 7" in error.get()
    checkify.checkify(jax.jit(f))(z, jnp.asarray(np.where(y == 7, 255, y)))[0].throw()


def test_labels_are_looked_at_only_where_something_is_ignored():
    z, y = jnp.zeros((4, 3)), jnp.zeros((4, 3), jnp.int32)

    def size(**options):
        return len(
            jax.jit(lambda z, y: sigmoid_asymmetric_loss(z, y, **options)).lower(z, y).as_text().splitlines()
        )

    assert size(axis=0) == size() < size(ignore_index=255)
