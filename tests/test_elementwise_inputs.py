"""Inputs of the elementwise losses and of those on probabilities: zeros that meet infinities, arrays by protocol."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent

DISTRIBUTION = {
    "categorical": lambda log_p, q: jaxent.categorical_cross_entropy(jnp.exp(log_p), q),
    "nll": jaxent.nll_loss,
    "kl": jaxent.kl_divergence,
    "generalized kl": functools.partial(jaxent.kl_divergence, generalized=True),
}
KEPT = np.array([True, True, False, True])


@functools.cache
def compiled():
    """Of all losses, in one program: what comes of logits of a model and of a teacher."""

    def everything(student, teacher):
        def of_logits(loss):
            def f(student, teacher):
                return loss(jax.nn.log_softmax(student), jax.nn.softmax(teacher))

            log_p, q = jax.nn.log_softmax(student), jax.nn.softmax(teacher)
            zeros = jnp.zeros_like(q)
            return {
                "value": f(student, teacher),
                "reverse": [jax.jacrev(f, i)(student, teacher) for i in (0, 1)],
                "forward": [jax.jacfwd(f, i)(student, teacher) for i in (0, 1)],
                "by q": [jac(loss, 1)(log_p, q) for jac in (jax.jacrev, jax.jacfwd)],
                "along zeros": jax.jvp(loss, (log_p, q), (zeros, zeros))[1],
            }

        return {name: of_logits(loss) for name, loss in DISTRIBUTION.items()}

    return jax.jit(everything)


@pytest.mark.parametrize("name", DISTRIBUTION)
def test_a_class_that_model_and_teacher_mask(name):
    """As if it was not there; and nothing comes along a direction of zeros."""
    student, teacher = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    want = compiled()(student[KEPT], teacher[KEPT])[name]
    got = compiled()(*(np.where(KEPT, x, -np.inf) for x in (student, teacher)))[name]
    np.testing.assert_allclose(got["value"], want["value"], rtol=1e-6)
    for mode in ("reverse", "forward"):
        for a, b in zip(got[mode], want[mode], strict=True):
            np.testing.assert_allclose(a[KEPT], b, rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(a[~KEPT], 0)
    for a, b in zip(got["by q"], want["by q"], strict=True):
        np.testing.assert_allclose(a[KEPT], b, rtol=1e-5, atol=1e-7)
        assert np.isfinite(a).all()
    assert got["along zeros"] == 0


def test_a_teacher_of_yes_and_no_that_masks_a_class():
    z = jnp.array([-jnp.inf, 0.5, jnp.inf])

    @jax.jit
    def everything(t):
        found = []
        for loss in (jaxent.sigmoid_cross_entropy, jaxent.sigmoid_focal_loss, jaxent.sigmoid_asymmetric_loss):
            f = functools.partial(lambda loss, t: loss(z, jax.nn.sigmoid(t)), loss)
            found.append([jax.jacrev(f)(t), jax.jacfwd(f)(t), jax.jvp(f, (t,), (jnp.zeros(3),))[1]])
        return found

    for reverse, forward, along_zeros in jax.tree.map(np.asarray, everything(z)):
        np.testing.assert_allclose(reverse, forward, rtol=1e-6)
        np.testing.assert_array_equal(reverse[[0, 2]], 0)
        np.testing.assert_array_equal(along_zeros, 0)


class Param:
    """An array by protocol, as flax nnx has them."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


P = jnp.full((2, 3), 0.25)
YES = jnp.zeros((2, 3))
ROWS = {"where": jnp.array([True, False]), "weights": jnp.array([2.0, 1.0])}
ELEMENTS = {"where": P > 0, "weights": P}
OPTIONS = {"pos_weight": jnp.arange(3.0), "label_smoothing": jnp.array(0.1)}
ARGUMENTS = [
    (jaxent.sigmoid_cross_entropy, (P, YES), ELEMENTS | OPTIONS),
    (
        jaxent.sigmoid_focal_loss,
        (P, YES),
        ELEMENTS | OPTIONS | {"gamma": jnp.array(1.0), "alpha": jnp.array(0.5)},
    ),
    (jaxent.sigmoid_asymmetric_loss, (P, YES), ELEMENTS | OPTIONS | {"gamma_negative": jnp.array(1.0)}),
    (jaxent.binary_cross_entropy, (P, YES), ELEMENTS),
    (jaxent.categorical_cross_entropy, (P, jnp.array([1, 0])), ROWS),
    (jaxent.categorical_cross_entropy, (P, P), ROWS),
    (jaxent.nll_loss, (P, jnp.array([1, 0])), ROWS | {"class_weights": jnp.arange(3.0)}),
    (jaxent.kl_divergence, (P, P), ROWS),
]


def test_arrays_by_protocol():
    @functools.partial(jax.jit, static_argnums=1)
    def everything(arguments, kind):
        def call(loss, inputs, options):
            return loss(*map(kind, inputs), **{name: kind(x) for name, x in options.items()})

        return [call(loss, *rest) for (loss, *_), rest in zip(ARGUMENTS, arguments, strict=True)]

    arguments = [rest for _, *rest in ARGUMENTS]
    for a, b in zip(everything(arguments, Param), everything(arguments, jnp.asarray), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(TypeError, match="`labels` must be an array, but is a list"):
        jaxent.sigmoid_cross_entropy(P, [[0, 1, 0]] * 2)
