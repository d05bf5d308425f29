"""Focal and poly losses of distributions, and with smoothing: those of Keras and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxent

N, V = 4, 5
I = np.arange(N * V).reshape(N, V)  # noqa: E741
Z = np.float32(3 * np.sin(1.0 + I))
SOFT = np.float32(np.cos(I) ** 2 + 0.1)
SOFT /= SOFT.sum(-1, keepdims=True)
LABEL = np.array([1, 0, 4, 2])
HOT = np.eye(V, dtype=np.float32)[LABEL]
ALPHA = np.float32([0.5, 1, 2, 0.25, 1.5])
CT = np.cos(np.arange(N, dtype=np.float32))
# keras.losses.CategoricalFocalCrossentropy(from_logits=True, reduction="none", **options)(labels, Z) of Keras 3.15.1 on
# jax: labels, alpha, gamma, label_smoothing, losses, and the sum of |gradient of sum(CT * losses)|.
KERAS = [
    (HOT, 1.0, 2.0, 0.0, [0.15154709, 4.14337158, 0.86236256, 5.06103945], 4.4731102),
    (HOT, ALPHA, 1.5, 0.0, [0.21855229, 2.08643222, 1.47592390, 10.15240097], 6.3839931),
    (HOT, 0.25, 2.0, 0.2, [0.17979641, 0.94642365, 0.31193793, 1.17564690], 0.9907391),
    (HOT, ALPHA, 3.0, 0.1, [0.38431972, 2.04954839, 1.13590980, 9.41460705], 5.7651973),
    (SOFT, 1.0, 2.0, 0.0, [3.09931946, 2.22896314, 2.59344792, 2.92528772], 3.4803033),
    (SOFT, ALPHA, 1.5, 0.0, [2.44364595, 2.92634869, 2.23668313, 2.61727166], 3.2069309),
    (SOFT, 0.25, 2.0, 0.2, [0.76935089, 0.56354195, 0.65815508, 0.74849653], 0.8769536),
    (SOFT, ALPHA, 3.0, 0.1, [2.43528271, 2.68579507, 2.06644940, 2.68039012], 3.4578691),
]
SPARSE = jaxent.SparseDistribution(np.tile(np.arange(V), (N, 1)), SOFT)


@pytest.mark.parametrize("labels, alpha, gamma, smoothing, losses, slope", KERAS)
def test_focal_loss_of_keras(labels, alpha, gamma, smoothing, losses, slope):
    options = {"alpha": alpha, "gamma": gamma, "label_smoothing": smoothing}
    forms = [labels, LABEL] if labels is HOT else [labels, SPARSE]
    for form in forms:
        f = lambda z: jaxent.softmax_focal_loss(z, form, **options)  # noqa: B023, E731
        np.testing.assert_allclose(f(Z), losses, rtol=2e-6)  # its log takes 1e-7 for less
        found = jax.grad(lambda z: jnp.vdot(CT, f(z)))(Z)  # noqa: B023
        np.testing.assert_allclose(np.abs(found).sum(), slope, rtol=3e-6)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("labels", [HOT, SOFT], ids=["one-hot", "soft"])
def test_poly_loss_of_optax(labels, smoothing, epsilon, as_users_run):
    def want(z):
        return optax.losses.poly_loss_cross_entropy(
            z, optax.smooth_labels(labels, smoothing), epsilon=epsilon
        )

    for form in [labels, LABEL] if labels is HOT else [labels, SPARSE]:
        f = lambda z: jaxent.softmax_poly_loss(z, form, epsilon=epsilon, label_smoothing=smoothing)  # noqa: B023, E731
        np.testing.assert_allclose(f(Z), want(Z), rtol=1e-5)
        slopes = [jax.grad(lambda z, g=g: jnp.vdot(CT, g(z)))(Z) for g in (f, want)]
        np.testing.assert_allclose(*slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [jaxent.softmax_focal_loss, jaxent.softmax_poly_loss])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_rows_are_their_index(loss, smoothing):
    """Also with class weights; and in rows that are sure, whose losses are 1e-20 and less."""
    label = np.array([1, 0, 4, 2])
    z = Z + np.float32(60) * HOT * np.float32([[0.0], [0.5], [1.0], [1.0]])
    options = {"class_weights": np.float32([1, 0.5, 2, 0.25, 3]), "label_smoothing": smoothing}
    of = lambda y: jax.value_and_grad(lambda z: jnp.vdot(CT, loss(z, y, **options)))(z)  # noqa: E731
    np.testing.assert_allclose(loss(z, HOT, **options), loss(z, label, **options), rtol=1e-5)
    np.testing.assert_allclose(of(HOT)[1], of(label)[1], rtol=2e-5, atol=1e-38)


def test_alpha_is_no_weight_of_the_mean():
    """It multiplies the loss; class weights divide the mean as well. z-loss has no alpha."""
    f = jaxent.softmax_focal_loss
    rows, options = f(Z, LABEL), {"reduction": "mean"}
    np.testing.assert_allclose(f(Z, LABEL, alpha=0.25, **options), 0.25 * rows.mean(), rtol=1e-6)
    np.testing.assert_allclose(f(Z, LABEL, alpha=ALPHA, **options), (ALPHA[LABEL] * rows).mean(), rtol=1e-6)
    np.testing.assert_allclose(
        f(Z, LABEL, class_weights=ALPHA, **options),
        (ALPHA[LABEL] * rows).sum() / ALPHA[LABEL].sum(),
        rtol=1e-6,
    )
    z_loss = f(Z, LABEL, alpha=ALPHA, z_loss=0.5) - f(Z, LABEL, alpha=ALPHA)
    np.testing.assert_allclose(z_loss, 0.5 * jax.nn.logsumexp(Z, -1) ** 2, rtol=1e-4)
    np.testing.assert_allclose(
        f(Z, LABEL, alpha=ALPHA, gamma=0.0), f(Z, LABEL, alpha=ALPHA, gamma=jnp.float32(0)), rtol=1e-6
    )


def test_alpha_is_differentiated_unless_it_is_one_per_class():
    f = lambda alpha: jaxent.softmax_focal_loss(Z, SOFT, alpha=alpha, reduction="sum")  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(jnp.float32(0.3)), f(1.0), rtol=1e-6)
    assert (jax.grad(f)(jnp.asarray(ALPHA)) == 0).all()


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_alpha_out_of_range(bad):
    f = lambda alpha: jaxent.softmax_focal_loss(Z, LABEL, alpha=alpha)  # noqa: E731
    for alpha in (bad, np.float32([1, bad, 1, 1, 1])):
        with pytest.raises(ValueError, match="`alpha` must be a finite number >= 0"):
            f(alpha)
    assert np.isnan(f(jnp.float32(bad))).all()
    with pytest.raises(ValueError, match=r"`alpha` must be of shape \[\] or \[5\]"):
        f(np.ones(N, np.float32))


def test_the_gradient_of_gamma():
    """Of distributions it goes through the sum over classes."""
    f = lambda gamma: jaxent.softmax_focal_loss(Z, SOFT, gamma=gamma, label_smoothing=0.1, reduction="sum")  # noqa: E731
    step = 2.0**-8
    want = (f(jnp.float32(1.5 + step)) - f(jnp.float32(1.5 - step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(f)(jnp.float32(1.5)), want, rtol=1e-3)
    np.testing.assert_allclose(f(jnp.float32(2)), f(2.0), rtol=1e-6)
