"""A user's function of the statistics of linear logits, in blocks: the same as of built logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
from layers import (
    ADVANTAGE,
    F32,
    FLAGS,
    FLAT,
    OLD,
    SEQUENCES,
    WIDE,
    assert_same,
    compiled,
    in_blocks,
    layer_of,
)
from tables import some


def clipped(s, advantage, old):
    ratio = jnp.exp(s.log_prob - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage) - 0.1 * s.entropy


# name: (shape of rows, what is differentiated beside the layer, loss of a layer, labels and that)
FUNCTIONS = {
    "no arguments": (FLAT, (), lambda loss: loss(lambda s: s.entropy - s.log_prob)),
    "row arguments": (FLAT, (ADVANTAGE, OLD), lambda loss, a, old: loss(clipped, a, old)),
    "wide row arguments": (
        FLAT, (WIDE,), lambda loss, x: loss(lambda s, x: s.log_prob * x.sum(-1) + x[:, 0] * s.entropy, x),
    ),
    "a pytree of row arguments": (
        FLAT, ({"a": ADVANTAGE, "b": [OLD]},),
        lambda loss, tree: loss(lambda s, t: s.log_prob * t["a"] + t["b"][0] * s.log_normalizer, tree),
    ),
    "integer row arguments": (
        FLAT, (), lambda loss: loss(lambda s, k: jnp.where(k > 0, -k.astype(F32) * s.log_prob, s.entropy), FLAGS),
    ),
    "keys as row arguments": (
        FLAT, (),
        lambda loss: loss(
            lambda s, key: s.log_prob * jax.vmap(jax.random.uniform)(key),
            jax.random.split(jax.random.key(0), FLAT[0]),
        ),
    ),
    "an argument without rows": (
        FLAT, (jnp.asarray([0.5, -2.0]),), lambda loss, x: loss(lambda s, x: x[0] * s.log_prob + x[1], x),
    ),
    "closes over a number": (FLAT, (jnp.asarray(0.3),), lambda loss, x: loss(lambda s: x * s.log_prob)),
    "closes over an array": (
        FLAT, (WIDE[:2],), lambda loss, x: loss(lambda s: s.log_prob * x.sum() + jnp.exp(x[1, 2]) * s.entropy),
    ),
    "closes over a value per row": (FLAT, (ADVANTAGE,), lambda loss, a: loss(lambda s: a * s.log_prob)),
    "closes over a constant per row": (FLAT, (), lambda loss: loss(lambda s: ADVANTAGE * s.log_prob)),
    "normalizes over rows": (
        FLAT, (ADVANTAGE,),
        lambda loss, a: loss(lambda s, a: (a - a.mean()) / a.std() * s.log_prob, a),
    ),
    "normalizes statistics over rows": (FLAT, (), lambda loss: loss(lambda s: jax.nn.softmax(s.log_prob) ** 2)),
    "counts the rows": (FLAT, (), lambda loss: loss(lambda s: s.log_prob / len(s.log_prob))),
    "numbers the rows": (FLAT, (), lambda loss: loss(lambda s: s.log_prob * jnp.arange(1.0 * s.log_prob.size))),
    "noise of the shape of rows": (
        FLAT, (),
        lambda loss: loss(lambda s: s.log_prob * jax.random.normal(jax.random.key(1), s.log_prob.shape)),
    ),
    "the row before": (FLAT, (), lambda loss: loss(lambda s: s.log_prob * jnp.roll(s.entropy, 1))),
    "a running sum": (FLAT, (), lambda loss: loss(lambda s: jnp.cumsum(s.log_prob) ** 2)),
    "sorted": (FLAT, (), lambda loss: loss(lambda s: jnp.sort(s.log_prob) * jnp.arange(1.0 * FLAT[0]))),
    "reshapes": (
        SEQUENCES, (), lambda loss: loss(lambda s: (s.log_prob.reshape(-1) ** 2).reshape(s.log_prob.shape)),
    ),
    "transposes": (SEQUENCES, (), lambda loss: loss(lambda s: (s.log_prob.T * jnp.arange(4.0)[None]).T)),
    "sequences": (
        SEQUENCES, (),
        lambda loss: loss(lambda s: jnp.exp(s.log_prob.sum(-1, keepdims=True) / 5) + 0 * s.log_prob),
    ),
    "knows the shape": (
        SEQUENCES, (), lambda loss: loss(lambda s: s.log_prob.reshape(SEQUENCES) * jnp.ones(SEQUENCES)),
    ),
    "jitted": (FLAT, (ADVANTAGE,), lambda loss, a: loss(jax.jit(lambda s, a: s.log_prob * a), a)),
    "vmapped": (FLAT, (ADVANTAGE,), lambda loss, a: loss(jax.vmap(lambda s, a: s.log_prob * a), a)),
    "a loop": (
        FLAT, (),
        lambda loss: loss(lambda s: jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) * s.entropy, s.log_prob)),
    ),
    "a prediction": (
        FLAT, (), lambda loss: loss(lambda s: jnp.where(s.rank < 2, s.log_prob, s.prediction.astype(F32))),
    ),
    "no statistics": (FLAT, (ADVANTAGE,), lambda loss, a: loss(lambda s, a: a**2, a)),
    "wrong rows behind a mask": (
        FLAT, (ADVANTAGE,),
        lambda loss, a: loss(lambda s, a: s.log_prob * jnp.log(jnp.where(FLAGS > 0, a, a - 9)), a + 5),
    ),
}  # fmt: skip


def with_gradients(name, source):
    """The objective of a layer, and its gradients; and both of its built logits."""
    rows, moving, objective = FUNCTIONS[name]
    labels = jnp.asarray(np.random.default_rng(1).integers(11, size=rows))
    # a row of FLAGS == 0 is one that does not count
    where = jnp.asarray(np.random.default_rng(2).uniform(size=rows) < 0.7) if rows == SEQUENCES else FLAGS > 0

    @compiled
    def run(layer, moving, where):
        def f(dense, layer, moving):
            logits = layer.dense() if dense else layer

            def loss(fn, *args):
                return jaxent.softmax_loss(fn, logits, labels, *args, where=where)

            return objective(loss, *moving)

        each = (functools.partial(f, dense) for dense in (False, True))
        return [jax.value_and_grad(f, (0, 1))(layer, moving) for f in each]

    with harness.blocks(source):
        return run(layer_of(rows), moving, where)


@pytest.mark.parametrize("name", some(list(FUNCTIONS)[::2], FUNCTIONS))
def test_a_users_function(name):
    assert_same(*with_gradients(name, "rows"))
    if name in ("row arguments", "closes over a value per row", "a prediction"):
        assert_same(*with_gradients(name, "classes"))


@in_blocks
def test_a_function_of_the_wrong_shape(source):
    layer, labels = layer_of(FLAT), jnp.zeros(FLAT, int)
    for fn in (lambda s: s.entropy.mean(), lambda s: s.entropy[:, None], lambda s: (s.entropy,)):
        messages = []
        for logits in (layer, layer.dense()):
            with harness.blocks(source), pytest.raises(ValueError, match=r"`fn` must be") as error:
                jax.eval_shape(lambda z, fn=fn: jaxent.softmax_loss(fn, z, labels), logits)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_of_everything_beside_the_layer(source, reduction):
    q = jax.nn.softmax(layer_of(FLAT, seed=3).dense())

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer, q, weights):
        def f(layer, q, weights):
            logits = layer.dense() if dense else layer
            options = {"weights": weights, "reduction": reduction, "label_smoothing": 0.1}
            return (jaxent.softmax_cross_entropy(logits, q, **options) * jnp.float32(1.5)).sum()

        return jax.value_and_grad(f, (0, 1, 2))(layer, q, weights)

    with harness.blocks(source):
        assert_same(*(run(dense, layer_of(FLAT), q, ADVANTAGE**2) for dense in (False, True)))


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode(source, reduction):
    """Of a sum in blocks of rows; where the backward has a loop over blocks to transpose, it is refused."""
    layer, dots, labels = layer_of(FLAT), layer_of(FLAT, seed=1), jnp.arange(7)

    @functools.partial(compiled, static_argnums=0)
    def run(dense, layer, dots):
        def loss(layer):
            logits = layer.dense() if dense else layer
            return jaxent.softmax_cross_entropy(logits, labels, reduction=reduction)

        return jax.jvp(loss, (layer,), (dots,))

    with harness.blocks(source):
        if reduction == "none" or source == "classes":
            with pytest.raises(TypeError, match="forward-mode"):
                run(False, layer, dots)
        else:
            assert_same(run(False, layer, dots), run(True, layer, dots))
