"""Weights of exactly 0: of a row, whose derivative is the row's loss, and of a class, with and without smoothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import harness
import jaxent
from tables import thinned

N, D, V = 7, 3, 10
SOURCES = ("dense", *harness.LINEAR)
# the row that counts, one of weight 0, and of weight 0 one with NaN and one with a bad label
WEIGHTS = np.float32([1, 0, 0, 0.5, 2, 0, 1])
NAN, BAD = 2, 5
LOSSES = {
    "cross-entropy": (jaxent.softmax_cross_entropy, {"label_smoothing": 0.1, "z_loss": 0.01}),
    "focal": (jaxent.softmax_focal_loss, {}),
    "poly": (jaxent.softmax_poly_loss, {}),
    "entropy": (lambda z, _, **options: jaxent.softmax_entropy(z, **options), {}),
    "general": (functools.partial(jaxent.softmax_loss, lambda s: jnp.exp(-0.3 * s.log_prob) * s.entropy), {}),
}


@functools.cache
def arrays():
    rng = np.random.default_rng(8)
    hidden, kernel = np.float32(rng.normal(size=(N, D))), np.float32(rng.normal(size=(D, V)))
    label = rng.integers(V, size=N).astype(np.int32)
    hidden[NAN], label[BAD] = np.nan, V
    return hidden, kernel, jnp.asarray(label)


def loss(name, source, reduction, weights, hidden, kernel):
    f, options = LOSSES[name]
    if source == "dense":
        logits = hidden @ kernel
    else:
        logits = jaxent.LinearLogits(hidden, kernel)
    return f(logits, arrays()[2], weights=weights, reduction=reduction, **options)


@functools.cache
def rows_of(name):
    """Losses and their derivatives by hidden, each row alone and dense: NaN where there is no answer."""
    hidden, kernel, label = arrays()
    f, options = LOSSES[name]

    def row(h, y):
        return f(h[None] @ kernel, y[None], reduction="sum", **options)

    return jax.jit(jax.vmap(jax.value_and_grad(row)))(hidden, label)


@thinned(3, "name, source", LOSSES, SOURCES)
def test_the_derivative_by_a_weight_is_the_loss_of_its_row(name, source):
    """Of a row without an answer it is 0; nothing of it is in the loss or in another gradient."""
    hidden, kernel, _ = arrays()
    answer = np.isfinite(rows_of(name)[0])
    assert answer.tolist() == [i != NAN and (i != BAD or name == "entropy") for i in range(N)]
    rows, slopes = (np.where(answer.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in rows_of(name))
    losses = {
        reduction: functools.partial(loss, name, source, reduction) for reduction in ("none", "sum", "mean")
    }
    direction = jnp.cos(jnp.arange(N, dtype=jnp.float32))

    def total(weights, hidden):
        return losses["none"](weights, hidden, kernel) @ direction

    @functools.partial(jax.jit, compiler_options=harness.QUICK)
    def everything(weights, hidden):
        return (
            jax.value_and_grad(losses["sum"], (0, 1, 2))(weights, hidden, kernel),
            jax.value_and_grad(losses["mean"], (0, 1))(weights, hidden, kernel),
            jax.grad(total, (0, 1))(weights, hidden),
        )

    with harness.blocks(source):
        sums, means, none = everything(WEIGHTS, hidden)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    near(sums[0], rows @ WEIGHTS)
    near(sums[1][0], rows)
    near(sums[1][1], slopes * WEIGHTS[:, None])
    if source != "dense":  # there the layer is the user's, and multiplies NaN by 0
        assert np.isfinite(sums[1][2]).all()
    mean = rows @ WEIGHTS / WEIGHTS.sum()
    near(means[0], mean)
    near(means[1][0], np.where(answer, (rows - mean) / WEIGHTS.sum(), 0))
    near(means[1][1], slopes * WEIGHTS[:, None] / WEIGHTS.sum())
    near(none[0], rows * direction)
    near(none[1], slopes * (WEIGHTS * direction)[:, None])


@thinned(2, "source, reduction", SOURCES, ["sum", "none"])
def test_learning_to_reweight(source, reduction):
    """The derivative by weights, all of them 0, of a step along the gradient of the weighted loss."""
    hidden, kernel, _ = arrays()
    rows, slopes = rows_of("cross-entropy")
    slopes = np.where(np.isfinite(rows)[:, None], slopes, 0)

    def after_a_step(weights):
        slope = jax.grad(lambda h: loss("cross-entropy", source, reduction, weights, h, kernel).sum())(hidden)
        return jnp.sum(slope * jnp.cos(slopes))

    with harness.blocks(source):
        got = jax.jit(jax.grad(after_a_step), compiler_options=harness.QUICK)(jnp.zeros(N))
    np.testing.assert_allclose(got, np.sum(slopes * np.cos(slopes), -1), rtol=2e-5, atol=2e-6)


def test_a_weight_of_0_hides_what_is_not_finite():
    """Of an infinite loss, and of a function that is nowhere differentiable there."""
    logits = jnp.array([[0.0, -jnp.inf], [0.0, 1.0], [0.0, 0.0]])
    label, weights = jnp.array([1, 1, 0]), jnp.array([0.0, 1.0, 0.0])

    def losses(logits, weights, scale):
        def fn(s):
            return scale * jnp.exp(jnp.where(s.log_prob < -2, 1e38, 0)) + jnp.sqrt(-s.log_prob)

        return jaxent.softmax_loss(fn, logits, label, weights=weights, reduction="sum")

    f = jax.jit(jax.value_and_grad(losses, (0, 1, 2)), compiler_options=harness.QUICK)
    value, gradients = f(logits, weights, 1.0)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in gradients)
    assert gradients[1][0] == 0 and gradients[1][2] > 1


# Class weights: the formula of torch.nn.functional.cross_entropy, whose values the first test stores.


def of_torch(z, y, w, a):
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -(1 - a) * w[y] * log_p[np.arange(len(y)), y] - a / z.shape[-1] * (w * log_p).sum(-1)


def test_a_class_weight_of_0_with_smoothing_leaves_the_other_classes():
    logits, label = jnp.array([[0.3, -1.2, 0.7]]), jnp.array([0])
    w = jnp.array([0.0, 1.0, 2.0])

    def loss(smoothing, reduction="none"):
        return jaxent.softmax_cross_entropy(
            logits, label, class_weights=w, label_smoothing=smoothing, reduction=reduction
        )

    np.testing.assert_allclose(loss(0.3), 0.36963257, rtol=1e-6)  # torch 2.13.0
    assert loss(0.0) == 0 and loss(0.3, "mean") == 0


@thinned(2, "source, traced", SOURCES, [False, True])
def test_class_weights_of_0(source, traced):
    """Values, a mean and gradients; NaN in a row of such a class is hidden where nothing is smoothed."""
    rng = np.random.default_rng(3)
    hidden, kernel = rng.normal(size=(N, D)), rng.normal(size=(D, V))
    y, w = np.arange(N), np.where(np.arange(V) % 3 == 0, 0, rng.uniform(0.5, 2, size=V))

    def losses(a, hidden, kernel, reduction="none"):
        logits = jaxent.LinearLogits(hidden, kernel) if source != "dense" else hidden @ kernel
        return [
            f(logits, y, class_weights=np.float32(w), label_smoothing=a, reduction=reduction, **options)
            for f, options in (
                (jaxent.softmax_cross_entropy, {}),
                (jaxent.softmax_focal_loss, {"gamma": 1.5}),
                (jaxent.softmax_poly_loss, {"epsilon": 2.0}),
            )
        ]

    def both(a, hidden, kernel):
        return losses(a, hidden, kernel), losses(a, hidden, kernel, "mean")

    a = jnp.float32(0.3) if traced else 0.3
    with harness.blocks(source):
        f = jax.jit(functools.partial(both, a) if not traced else both, compiler_options=harness.QUICK)
        got = f(*((a,) if traced else ()), np.float32(hidden), np.float32(kernel))
    z = hidden @ kernel
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    t = w * (0.7 * np.eye(V)[y] + 0.3 / V)  # smoothing spreads the target first
    want = [
        of_torch(z, y, w, 0.3),
        -(t * (1 - p) ** 1.5 * np.log(p)).sum(-1),
        (t * (2 * (1 - p) - np.log(p))).sum(-1),
    ]
    for value, mean, wanted in zip(*got, want, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(mean, wanted.sum() / w[y].sum(), rtol=2e-5)
    if not traced:
        hidden[0] = np.nan
        with harness.blocks(source):
            value, mean = jax.jit(functools.partial(both, 0.0))(np.float32(hidden), np.float32(kernel))
        assert value[0][0] == 0 and np.isfinite(mean[0])
