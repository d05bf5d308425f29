"""Elementwise losses from logits: extreme logits, kinds of labels, bad ones, masks, pos_weight."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness import FULL, cotangent_of
from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy
from sigmoid_cases import LOSSES, ORACLES, losses


@losses
def test_infinite_logits(loss):
    inf = np.inf
    z, y = np.float32([inf, inf, inf, -inf, -inf, -inf]), np.float32([1, 0, 0.5, 0, 1, 0.5])

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FULL)
    def everything(smoothing, w, z, y):
        f = functools.partial(loss, pos_weight=w, label_smoothing=smoothing)
        out, vjp = jax.vjp(f, z, y)
        return out, *vjp(jnp.ones(6)), jax.vmap(jax.hessian(f))(z, y)

    for smoothing, w in ((0.0, 1.0), (0.0, 0.0), (0.0, 2.0)):
        *found, hessian = everything(smoothing, w, z, y)
        for got, want in zip(
            found, ORACLES[loss](z, y, pos_weight=w, label_smoothing=smoothing), strict=False
        ):
            np.testing.assert_allclose(got, want.astype(np.float32), rtol=1e-6)
        assert np.isfinite(hessian).all()
    if loss is sigmoid_cross_entropy:
        np.testing.assert_array_equal(loss(z, y), [0, inf, inf, 0, inf, inf])


@losses
def test_finite_extremes(loss):
    z = jnp.float32([3.4e38, -3.4e38, 1e30, -1e30, 1e-45])

    @functools.partial(jax.jit, compiler_options=FULL)
    def f(y):
        out, vjp = jax.vjp(loss, z, y)
        return out, vjp(jnp.ones(5))

    for y in (0.0, 1.0, 0.5):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(f(jnp.full(5, y))))


def test_kinds_of_labels():
    z = np.float32([0.5, -3.0, 2.0])
    kinds = [np.array([1, 0, 1], dtype) for dtype in (bool, np.int8, np.uint8, np.int32, np.uint32, np.int64)]

    @jax.jit
    def f(z, traced):
        return [
            jax.value_and_grad(lambda z, y=y: sigmoid_cross_entropy(z, y).sum())(z) for y in (*kinds, *traced)
        ]

    want, *others = f(z, [np.float32([1, 0, 1]), *kinds])[::-1]
    for found in others:
        chex.assert_trees_all_equal(found, want)


def test_scalars():
    labels = (True, 1, 1.0, np.float64(1), jnp.array(True))
    found = jax.jit(lambda: [sigmoid_cross_entropy(0.5, label) for label in labels])()
    np.testing.assert_allclose(found, np.log1p(np.exp(-0.5)), rtol=1e-6)


BAD_LABELS = {
    "float": [0.5, 1.0, 0.25, 1.5, -0.1, np.nan, 1.0],
    "integer": [0, 1, 1, 2, -1, 2**31 - 1, 1],
    "narrow": [0, 1, 1, 2, 255, 100, 1],
}
DTYPES = {"float": np.float32, "integer": np.int32, "narrow": np.uint8}


@losses
@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels_poison_their_element(loss, kind):
    labels = jnp.asarray(np.array(BAD_LABELS[kind], DTYPES[kind]))
    z = jnp.linspace(-2, 2, 7).at[6].set(jnp.nan)  # and so does a NaN logit

    @jax.jit
    def everything(z, w):
        moving = (z, labels, w) if kind == "float" else (z, w)

        def f(*moving):
            return loss(moving[0], moving[1] if kind == "float" else labels, pos_weight=moving[-1])

        out, vjp = jax.vjp(f, *moving)
        *gradients, d_weight = vjp(jnp.ones(7))
        assert d_weight.shape == ()
        return out, *gradients, jax.jvp(f, moving, jax.tree.map(jnp.ones_like, moving))[1]

    for x in everything(z, jnp.float32(2)):
        np.testing.assert_array_equal(np.isnan(x), np.arange(7) >= 3)


@pytest.mark.parametrize("loss", [sigmoid_cross_entropy, sigmoid_asymmetric_loss])
def test_masked_means_gone(loss):
    z = jnp.float32([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.5, jnp.nan, -2.0])
    y = jnp.float32([1.0, 0.0, 0.0, 1.0, 7.0, jnp.nan, 0.0])
    keep = jnp.array([True, False, False, False, False, False, True])
    w = jnp.float32([2.0, 0, 0, 0, 0, 0, 0.5])
    clean = jax.jit(loss)(np.float32([1.0, -2.0]), np.float32([1.0, 0.0]))

    @functools.partial(jax.jit, static_argnums=0)
    def everything(name, factors):
        f = functools.partial(loss, **{name: factors})
        out, vjp = jax.vjp(f, z, y)
        forward = jax.jvp(f, (z, y), (jnp.ones(7), jnp.ones(7)))[1]
        return (out, *vjp(jnp.asarray(cotangent_of((7,)), jnp.float32)), forward), f(z, y, reduction="mean")

    for name, factors, factor, total in (("where", keep, [1, 1], 2), ("weights", w, [2, 0.5], 2.5)):
        found, mean = everything(name, factors)
        for x in found:
            np.testing.assert_array_equal(x[1:6], 0)
            assert np.isfinite(x).all()
        np.testing.assert_allclose(found[0][np.array([0, 6])], clean * np.float32(factor))
        np.testing.assert_allclose(mean, (clean * np.float32(factor)).sum() / total, rtol=1e-6)
    nothing = functools.partial(loss, where=jnp.zeros(7, bool), reduction="mean")
    value, d = jax.jit(jax.value_and_grad(lambda z: nothing(z, y)))(z)
    assert value == 0
    np.testing.assert_array_equal(d, 0)
    empty = np.zeros((0, 3), np.float32)
    assert jax.jit(lambda: loss(empty, empty, reduction="mean"))() == 0
    assert jax.eval_shape(loss, empty, empty).shape == (0, 3)


@losses
def test_a_negative_pos_weight_poisons_its_class(loss):
    w = jnp.float32([1, -0.5, jnp.nan, 0, jnp.inf])

    def f(z, w):
        return loss(z, jnp.full_like(z, 0.5), pos_weight=w)

    @jax.jit
    def everything(z, w):
        out, vjp = jax.vjp(f, z, w)
        return out, *vjp(jnp.ones_like(out))

    bad = np.isin(np.arange(5), [1, 2, 4])
    out, dz, dw = everything(jnp.ones((2, 5)), w)
    for x in (*out, *dz, dw):
        np.testing.assert_array_equal(np.isnan(x), bad)


@losses
def test_pos_weight(loss):
    rng = np.random.default_rng(1)
    z, y = rng.normal(0, 2, (2, 4, 3)).astype(np.float32), rng.uniform(0, 1, (2, 4, 3)).astype(np.float32)
    w = np.float32([0.5, 2.0, 3.0])
    g = cotangent_of(z.shape).astype(np.float32)

    @jax.jit
    def f(w):
        out, vjp = jax.vjp(lambda w: loss(z, y, pos_weight=w), w)
        return out, *vjp(g)

    for weight in (w, np.float32(1.5), np.float32(0)):
        want, *_, dw = ORACLES[loss](z, y, pos_weight=weight)
        out, d = f(weight)
        np.testing.assert_allclose(out, want.astype(np.float32), rtol=5e-6)
        dw = (g * dw).sum((0, 1)) if weight.ndim else (g * dw).sum()
        np.testing.assert_allclose(d, dw.astype(np.float32), rtol=2e-5)
    number, array = jax.jit(lambda: [loss(z, y, pos_weight=w) for w in (2, np.array([2, 2, 2]))])()
    np.testing.assert_array_equal(number, array)


def test_half_precision_keeps_only_its_inputs():
    """The backward keeps the bf16 logits and the int8 labels, no widened copy of them."""
    z, y = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((4, 8), jnp.int8)
    _, vjp = jax.vjp(lambda z: sigmoid_cross_entropy(z, y), z)
    kept = {leaf.dtype for leaf in jax.tree.leaves(vjp) if getattr(leaf, "shape", ()) == (4, 8)}
    assert kept <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)}


def test_sums_in_float32():
    z = np.zeros(70_000, np.float16)
    out = jax.jit(lambda z: sigmoid_cross_entropy(z, np.ones(70_000, bool), reduction="sum"))(z)
    np.testing.assert_allclose(out, 70_000 * np.log(2), rtol=1e-5)


def test_float32_stays_float32(x64):
    z = np.zeros(3, np.float32)
    for loss in LOSSES:
        f = jax.value_and_grad(lambda z, loss=loss: loss(z, np.ones(3), pos_weight=np.ones(3)).sum())
        out, d = jax.eval_shape(f, z)
        assert out.dtype == d.dtype == jnp.float32
