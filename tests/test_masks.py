"""Rows that do not count, labels among them that are bad on the host, and no rows at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent

NAN, INF = np.nan, np.inf
LOSSES = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")
COMPILED = jax.jit(
    jaxent.softmax_cross_entropy,
    static_argnames=("reduction", "ignore_index"),
    compiler_options=harness.FULL,
)
STATISTICS = jax.jit(jaxent.softmax_statistics, compiler_options=harness.FULL)
value = functools.partial(harness.value, quick=True)
gradients = functools.partial(harness.gradients, quick=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_counts(loss):
    z = np.array([[NAN, 1.0], [INF, 0.0], [0.5, -INF]])
    labels = np.array([0, 9, 1])
    for options in (
        {"where": np.zeros(3, bool)},
        {"weights": np.zeros(3)},
        {"class_weights": np.zeros(2), "where": np.array([False, False, True])},
    ):
        options |= {"reduction": "mean", "quick": True}
        got, (gradient,) = harness.value_and_gradients(loss, z, labels, cotangent=np.float64(1), **options)
        assert got == 0 and (gradient == 0).all()


def test_no_rows():
    for shape in ((0, 5), (3, 0, 5)):
        z, labels = np.zeros(shape), np.zeros(shape[:-1], np.int32)
        for reduction in ("mean", "sum"):
            got = value("softmax_cross_entropy", z, labels, reduction=reduction)
            assert got == 0 and got.dtype == np.float32
            (g,) = gradients("softmax_cross_entropy", z, labels, cotangent=np.float64(1), reduction=reduction)
            assert g.shape == shape
    assert value("softmax_cross_entropy", np.zeros((0, 5)), np.zeros(0, np.int32)).shape == (0,)
    assert value("softmax_entropy", np.zeros((0, 5)), reduction="mean") == 0
    assert value("softmax_kl_divergence", np.zeros((0, 5)), np.zeros((0, 5)), reduction="mean") == 0
    assert jaxent.mean(jnp.zeros((0,))) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class(loss):
    z = np.array([[3.0], [-1e30], [0.0]])
    for labels in (np.zeros(3, np.int32), np.ones((3, 1))):
        assert (value(loss, z, labels) == 0).all()
        assert (gradients(loss, z, labels, cotangent=np.ones(3))[0] == 0).all()
    assert value(loss, z[0], np.int32(0)).shape == ()
    s = STATISTICS(jnp.asarray(z, jnp.float32))
    assert (s.entropy == 0).all() and s.log_normalizer.tolist() == np.float32([3.0, -1e30, 0.0]).tolist()


def test_bad_host_labels_behind_a_mask():
    z = np.zeros((3, 4), np.float32)
    labels = np.array([1, 2**32 + 1, -100])
    got = jaxent.softmax_cross_entropy(z, labels, where=np.array([True, False, False]))
    assert got[0] > 1 and (got[1:] == 0).all()
    got = jax.jit(lambda w: jaxent.softmax_cross_entropy(z, labels, where=w))(np.array([True, False, True]))
    assert got[1] == 0 and np.isnan(got[2])
    with pytest.raises(ValueError, match=r"4294967297 at index \[1\]"):
        jaxent.softmax_cross_entropy(z, labels, ignore_index=-100)


def test_no_rows_of_many_classes():
    z, y = jnp.zeros((0, 300)), jnp.zeros(0, int)
    assert COMPILED(z, y).shape == (0,)
    mean = jax.jit(jax.value_and_grad(lambda z: jaxent.softmax_cross_entropy(z, y, reduction="mean")))
    value, gradient = mean(z)
    assert value == 0 and gradient.shape == (0, 300)


def test_only_bad_labels_with_class_weights():
    """A bad label has no class weight, and still its row counts."""
    z, y = jnp.zeros((4, 5)), jnp.full(4, 9)
    assert jnp.isnan(COMPILED(z, y, class_weights=jnp.ones(5), reduction="mean"))


def test_a_bad_host_label_is_not_taken_for_the_ignored_one():
    z, y = jnp.zeros((4, 5)), np.array([0, 1, 2, 9])
    where = jnp.ones(4, bool)
    losses = jax.jit(lambda w: jaxent.softmax_cross_entropy(z, y, where=w, ignore_index=-1))(where)
    assert jnp.isnan(losses).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="is 9 at index"):
        jaxent.softmax_cross_entropy(z, y, where=where, ignore_index=-1)


def test_a_weight_of_zero_hides_a_bad_host_label():
    labels, weights = np.array([0, 9]), np.array([1.0, 0.0])
    losses = jax.jit(lambda z: jaxent.softmax_cross_entropy(z, labels, weights=weights))(jnp.zeros((2, 5)))
    assert losses[1] == 0


def test_row_arguments_keep_their_dtype_behind_a_mask():
    z, y, flags = jnp.zeros((4, 5)), jnp.arange(4), jnp.array([True, False, True, True])
    key = jax.random.split(jax.random.key(0), 4)

    def fn(s, flag, key):
        assert key.shape == flag.shape == ()
        assert flag.dtype == jnp.bool_ and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        return jnp.where(~flag, -s.log_prob, 0)

    where = jnp.array([True, True, True, False])
    losses = jaxent.softmax_loss(fn, z, y, flags, key, where=where, reduction="none")
    assert (losses > 0).tolist() == [False, True, False, False]


HIDDEN = {
    "cross entropy": lambda z, w: jaxent.softmax_cross_entropy(z, jnp.array([0, 1, 77, 2]), where=w),
    "ignored": lambda z, w: jaxent.softmax_cross_entropy(z, jnp.array([0, 1, -5, -5]), ignore_index=-5),
    "entropy": lambda z, w: jaxent.softmax_entropy(z, where=w),
    "kl": lambda z, w: jaxent.softmax_kl_divergence(z, 2 * z, where=w),
    "js": lambda z, w: jaxent.softmax_js_divergence(z, 2 * z, where=w),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_second_derivatives_behind_a_mask(name):
    """Reverse over reverse multiplies a cotangent of 0 with what the hidden rows hold."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)).at[3].set(NAN)
    where = jnp.array([True, True, False, False])

    def slope(z):
        return jnp.sum(jax.grad(lambda z: HIDDEN[name](z, where).sum())(z) ** 2)

    gradient = jax.jit(jax.grad(slope))(z)
    assert jnp.all(gradient[2:] == 0) and jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient[:2] != 0)
