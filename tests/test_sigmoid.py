"""Elementwise losses from logits: values and gradients beside the oracle, and identities."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from harness import FULL, assert_within, cotangent_of, spacing
from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy, sigmoid_focal_loss
from sigmoid_cases import FORMS, ORACLES, forms, losses, numbers


@functools.cache
def compiled(form):
    loss, options, *_ = FORMS[form]

    def f(z, y, g):
        out, vjp = jax.vjp(functools.partial(loss, **options), z, y)
        return out, *vjp(g)

    return jax.jit(f, compiler_options=FULL)


def check(form, dtype, wide):
    loss, options, ulps, parts = FORMS[form]
    z, y = numbers(dtype)
    want, dz, dy, _ = ORACLES[loss](z, y, **options)
    scale = sum(np.abs(ORACLES[loss](z, np.full_like(z, side), **options)[1]) * weight for side, weight in
                ((1, np.abs(y.astype(float)) + options.get("label_smoothing", 0)),
                 (0, np.abs(1 - y.astype(float)) + options.get("label_smoothing", 0))))  # fmt: skip
    value_scale = np.maximum(
        *(np.abs(ORACLES[loss](z, np.full_like(z, side), **options)[0]) for side in (0, 1))
    )
    g = cotangent_of(z.shape)
    out, d_logits, d_labels = compiled(form)(jnp.asarray(z), jnp.asarray(y), jnp.asarray(g.astype(wide)))
    assert out.dtype == wide and d_logits.dtype == d_labels.dtype == dtype
    unit = np.longdouble(2.0**-53 if wide == np.float64 else 2.0**-24)
    tiny = 1e-300 if wide == np.float64 else 1e-35  # products of factors leave the range a little earlier
    assert_within(out, want, ulps * spacing(want, np.dtype(wide).name) + tiny, "loss")
    size = np.abs(g)
    name = np.dtype(dtype).name
    half = 0 if dtype == wide else spacing(g * dz, name) * 0.502  # correctly rounded to its dtype
    assert_within(d_logits, g * dz, size * (parts * unit * scale + tiny) + half, "gradient")
    half = 0 if dtype == wide else spacing(g * dy, name) * 0.502
    assert_within(d_labels, g * dy, size * (66 * unit * value_scale + tiny) + half, "label gradient")


@forms
def test_accuracy(form):
    check(form, np.float32, np.float32)


@pytest.mark.parametrize("form", ["plain", "focal_alpha", "asymmetric_all"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_accuracy_of_half_types(form, dtype):
    check(form, dtype, np.float32)


@pytest.mark.parametrize("form", ["plain", "smoothed", "focal_odd", "asymmetric", "asymmetric_all"])
def test_accuracy_in_float64(form, x64):
    check(form, np.float64, np.float64)


def test_label_gradient_of_cross_entropy_is_the_logit():
    z = np.array([1e-8, -1e-8, 3e-4, 40.0, -90.0], np.float32)
    d = jax.jit(jax.grad(lambda y: sigmoid_cross_entropy(z, y).sum()))(np.full(5, 0.25, np.float32))
    np.testing.assert_array_equal(d, -z)


def test_confident_elements_keep_their_digits():
    z = jnp.array([17.0, 40.0, 70.0])
    f = jax.value_and_grad(lambda z: sigmoid_cross_entropy(z, jnp.ones(3)).sum())
    out, d = jax.jit(f, compiler_options=FULL)(z)
    assert out > 4e-8
    np.testing.assert_allclose(d, -np.exp(-np.float64(z)), rtol=2e-6)


@losses
def test_symmetry_bit_for_bit(loss):
    options = (
        {"gamma_negative": 2.0, "gamma_positive": 2.0, "clip": 0.0} if loss is sigmoid_asymmetric_loss else {}
    )
    z = jnp.asarray(numbers(np.float32)[0])

    @functools.partial(jax.jit, compiler_options=FULL)
    def both(z, y):
        out, vjp = jax.vjp(lambda z: loss(z, y, **options), z)
        return out, vjp(jnp.ones_like(out))[0]

    positive, negative = both(z, jnp.ones_like(z)), both(-z, jnp.zeros_like(z))
    np.testing.assert_array_equal(positive[0], negative[0])
    np.testing.assert_array_equal(positive[1], -negative[1])


def test_identities():
    z, y = map(jnp.asarray, numbers(np.float32))
    asymmetric = functools.partial(sigmoid_asymmetric_loss, clip=0.0, gamma_positive=3.0, gamma_negative=3.0)

    @jax.jit
    def everything(z, y):
        return [
            (sigmoid_focal_loss(z, y, gamma=0.0), sigmoid_cross_entropy(z, y)),
            (sigmoid_focal_loss(z, y, alpha=0.5), 0.5 * sigmoid_focal_loss(z, y)),
            (asymmetric(z, y), sigmoid_focal_loss(z, y, gamma=3.0)),
            (
                sigmoid_cross_entropy(z, y, label_smoothing=1.0),
                sigmoid_cross_entropy(z, jnp.full_like(y, 0.5)),
            ),
        ]

    for a, b in everything(z, y):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-35)
