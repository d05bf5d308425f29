"""Sums of probabilities round to a few ulp above 1, which is 1 to the losses; farther above, NaN begins."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxent

DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "f64": np.float64}


def categorical(p, other):
    return jaxent.categorical_cross_entropy(
        jnp.stack([p, jnp.zeros_like(p)], -1), jnp.zeros(p.shape, jnp.int32)
    )


def distribution(p, other):
    return jaxent.categorical_cross_entropy(jnp.stack([p, 1 - other], -1), jnp.stack([other, 1 - other], -1))


def kl(p, other):
    return jaxent.kl_divergence(jnp.stack([other, -other], -1), jnp.stack([p, jnp.zeros_like(p)], -1))


# of probabilities (or labels) p beside some other input
LOSSES = {
    "categorical": categorical,
    "distribution": distribution,
    "binary": jaxent.binary_cross_entropy,
    "labels of binary": lambda p, other: jaxent.binary_cross_entropy(other, p),
    "labels of sigmoid": lambda p, other: jaxent.sigmoid_cross_entropy(other, p),
    "labels of focal": lambda p, other: jaxent.sigmoid_focal_loss(other, p, label_smoothing=0.1),
    "kl": kl,
}


@functools.cache
def compiled():
    def everything(p, other):
        def one(f):
            out, vjp = jax.vjp(f, p, other)
            second = jax.jvp(jax.grad(lambda p: f(p, other).sum()), (p,), (jnp.ones_like(p),))[1]
            return out, vjp(jnp.ones_like(out)), jax.jvp(f, (p, other), (p * 0 + 1, p * 0 + 1))[1], second

        return {name: one(f) for name, f in LOSSES.items()}

    return jax.jit(everything)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_up_to_16_ulp_above_1_are_1(dtype):
    with jax.enable_x64(dtype == np.float64):
        eps = float(ml_dtypes.finfo(dtype).eps)
        p = np.array([1, 1 + eps, 1 + 2 * eps, 1 + 16 * eps, 1 + 17 * eps, 1.5, np.inf, -eps]).astype(dtype)
        found = compiled()(p, np.full(8, 0.75, dtype))
        for name, of_loss in found.items():
            for x in jax.tree.leaves(of_loss):
                np.testing.assert_array_equal(x[1:4], x[:1].repeat(3), err_msg=name)
            out, (dp, _), *_ = of_loss
            assert not np.isnan(out[:4]).any() and not np.isnan(dp[:4]).any(), name
            assert np.isnan(out[4:]).all() and np.isnan(dp[4:]).all(), name
        # as at 1: no side of a clamp
        np.testing.assert_array_equal(found["categorical"][1][0][:4], -1)
        np.testing.assert_array_equal(found["binary"][0][:4], np.inf)
        assert (np.asarray(found["labels of binary"][1][0][:4]) != 0).all()


def test_sums_that_users_have():
    annotators = functools.reduce(np.add, [np.float32(0.1)] * 10)  # all say yes
    assert annotators == 1 + 2.0**-23
    gates = np.float32([0.3, 0.6, 0.1])
    mixture = gates[0] + gates[1] + gates[2]
    yes = jnp.stack([annotators, mixture, jnp.float32(1 + 2.0**-23)])
    p = jnp.stack([yes, jnp.zeros(3)], -1)
    label = jnp.zeros(3, jnp.int32)
    np.testing.assert_array_equal(jaxent.categorical_cross_entropy(p, label), 0)
    np.testing.assert_array_equal(jaxent.kl_divergence(jnp.log(jnp.minimum(p, 1)), p), 0)
    np.testing.assert_array_equal(jaxent.binary_cross_entropy(yes, jnp.ones(3)), 0)
    want = jaxent.sigmoid_cross_entropy(jnp.full(3, 0.5), jnp.ones(3))
    np.testing.assert_array_equal(jaxent.sigmoid_cross_entropy(jnp.full(3, 0.5), yes), want)


def test_labels_known_on_the_host():
    logits = jnp.zeros(1)
    for dtype in (np.float32, np.float16, np.float64, ml_dtypes.bfloat16):
        # a float64 of numpy will be a float32 of jax
        eps = max(float(ml_dtypes.finfo(dtype).eps), 2.0**-23)
        good, bad = (np.array([1 + n * eps]).astype(dtype) for n in (16, 17))
        for loss in (jaxent.sigmoid_cross_entropy, jaxent.binary_cross_entropy):
            np.testing.assert_array_equal(loss(logits + 0.5, good), loss(logits + 0.5, jnp.ones(1)))
            with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
                loss(logits, bad)
        np.testing.assert_array_equal(jaxent.kl_divergence(logits, good), 0)
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            jaxent.kl_divergence(logits, bad)


def test_sums_that_numpy_has_in_float64():
    """jax will hold them in float32, whose rounding they have."""
    above = np.float64(np.nextafter(np.float32(1), np.float32(2)))
    assert jaxent.kl_divergence(jnp.array([0.0, -jnp.inf]), np.array([above, 0])) == 0
    assert jaxent.sigmoid_cross_entropy(jnp.float32(1), above) == jaxent.sigmoid_cross_entropy(
        jnp.float32(1), 1
    )


def test_a_single_row_that_a_python_bool_shows():
    row = jnp.array([0.5, 0.5])
    assert jaxent.categorical_cross_entropy(row, row, where=True) > 0
    assert jaxent.kl_divergence(jnp.log(row), row, where=False) == 0
