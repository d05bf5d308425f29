"""Narrow and unsigned labels, sums in half precision, what 64 bits must not widen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
import oracle

LOSSES = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")
LOSS = functools.partial(jax.jit, jaxent.softmax_cross_entropy, static_argnames=("reduction", "ignore_index"))
QUICK, COMPILED = LOSS(compiler_options=harness.QUICK), LOSS(compiler_options=harness.FULL)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_labels_of_narrow_integers_with_300_classes(dtype, on_host):
    """jax.nn.one_hot compares in the labels' dtype, where class 256 + k is k as well."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 300)).astype(np.float32)
    labels = rng.integers(min(300, np.iinfo(dtype).max + 1), size=50).astype(dtype)
    f = jax.jit(lambda z: jaxent.softmax_cross_entropy(z, labels))  # labels that jit does not trace
    got = f(z) if on_host else QUICK(z, jnp.asarray(labels))
    want = oracle.softmax_cross_entropy(z, np.asarray(labels))
    harness.assert_within(got, want, 1e-6 * want)


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_ignore_index_that_the_labels_dtype_cannot_hold(dtype):
    z = np.zeros((3, 4), np.float32)
    got = QUICK(z, np.arange(3, dtype=dtype), ignore_index=-100)
    np.testing.assert_allclose(got, np.log(4), rtol=1e-6)
    got = QUICK(z, np.array([0, 255, 1], dtype), ignore_index=255)
    assert got[1] == 0 and (got[::2] > 1).all()


def test_unsigned_labels_out_of_range():
    z = np.zeros((3, 4), np.float32)
    got = QUICK(z, jnp.asarray(np.array([1, 2**31 + 1, 2**32 - 1], np.uint32)))
    assert np.isnan(got).tolist() == [False, True, True]


def test_sums_of_70000_rows_of_float16():
    z = jnp.zeros((70_000, 4), jnp.float16)
    labels = jnp.zeros(70_000, jnp.int32)
    f = COMPILED
    np.testing.assert_allclose(f(z, labels, reduction="sum"), 70_000 * np.log(4), rtol=1e-5)
    np.testing.assert_allclose(f(z, labels, reduction="mean"), np.log(4), rtol=1e-5)
    ones = jnp.full(70_000, 2.0, jnp.float16)
    np.testing.assert_allclose(f(z, labels, weights=ones, reduction="mean"), np.log(4), rtol=1e-5)
    np.testing.assert_allclose(jaxent.mean(ones, weights=ones), 2, rtol=1e-6)


def test_sums_of_a_million_bfloat16():
    n = 1_000_000
    np.testing.assert_allclose(jaxent.mean(jnp.full(n, 1.5, jnp.bfloat16)), 1.5, rtol=1e-6)
    ones = jnp.ones(n, jnp.bfloat16)
    np.testing.assert_allclose(jaxent.mean(ones, weights=ones), 1, rtol=1e-6)
    z = jnp.zeros((n, 2), jnp.bfloat16)
    f = COMPILED
    got = f(z, jnp.zeros(n, jnp.int32), weights=ones, reduction="sum")
    np.testing.assert_allclose(got, n * np.log(2), rtol=1e-5)
    classes = jnp.zeros((1, n), jnp.bfloat16)
    np.testing.assert_allclose(f(classes, jnp.zeros(1, jnp.int32)), np.log(n), rtol=1e-6)
    q = jnp.full((1, n), 2.0**-20, jnp.bfloat16)
    np.testing.assert_allclose(f(classes, q), n * 2.0**-20 * np.log(n), rtol=1e-5)


def test_float32_stays_float32_with_x64(x64):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    labels = np.arange(4)  # int64
    options = {
        "where": np.ones(4, bool),
        "weights": np.ones(4),
        "class_weights": np.ones(6),
        "class_mask": np.arange(6) < 5,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
    }
    for y in (labels, jnp.asarray(labels), np.full((4, 6), 1 / 5) * (np.arange(6) < 5)):
        for loss in LOSSES:
            for reduction in ("none", "mean"):

                def f(z, loss=loss, y=y, reduction=reduction):
                    return getattr(jaxent, loss)(z, y, reduction=reduction, **options).sum()

                value, gradient = jax.eval_shape(jax.value_and_grad(f), z)
                assert value.dtype == gradient.dtype == jnp.float32
    for x in jax.tree.leaves(jax.eval_shape(jaxent.softmax_statistics, z, labels)):
        assert x.dtype in (jnp.float32, jnp.int32)
    for f in (jaxent.softmax_entropy, jaxent.mean, lambda z: jaxent.softmax_kl_divergence(z, z)):
        assert jax.eval_shape(f, z).dtype == jnp.float32


@pytest.mark.parametrize("labels", [np.array([0, 1, 2, 2**40]), jnp.arange(4)])
def test_ignore_index_beyond_the_labels_dtype(labels):
    losses = jaxent.softmax_cross_entropy(jnp.zeros((4, 5)), labels, ignore_index=2**40)
    assert (losses == 0).tolist() == [False, False, False, isinstance(labels, np.ndarray)]


def test_losses_that_are_no_floats_or_narrow_ones():
    z, y = jnp.zeros((1001, 3)), jnp.zeros(1001, int)
    half = jnp.full(1001, 0.5)
    for fn in (
        lambda s: s.rank * 0 + 1,
        lambda s: s.rank < 1,
        lambda s: (s.log_prob * 0 + 1).astype("bfloat16"),
    ):
        f = functools.partial(jaxent.softmax_loss, fn)
        both = jax.jit(lambda z, f=f: (f(z, y, weights=half, reduction="sum"), f(z, y, where=y == 0)))
        assert both(z) == (500.5, 1)


def test_numpy_options_do_not_widen_with_x64(x64):
    z, y, one = jnp.zeros((2, 3), jnp.float32), jnp.arange(2), np.float64(1)
    for loss, options in (
        (jaxent.softmax_cross_entropy, {"label_smoothing": 0.1 * one, "z_loss": one}),
        (jaxent.softmax_focal_loss, {"gamma": one}),
        (jaxent.softmax_poly_loss, {"epsilon": one}),
    ):
        assert jax.eval_shape(functools.partial(loss, **options), z, y).dtype == jnp.float32
