"""What a user's function is: what it sees of a row, and what it closes over, on any source of logits."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import harness
import jaxent
from forms import entropy, log_prob
from layers import (
    ADVANTAGE,
    F32,
    FLAGS,
    FLAT,
    OLD,
    SEQUENCES,
    SOURCES,
    WIDE,
    assert_same,
    compiled,
    layer_of,
    logits_of,
)
from tables import spread, thinned

everywhere = pytest.mark.parametrize("source", SOURCES)
LABELS = jnp.asarray([3, 0, 10, 7, 7, 1, 5])


def add_up(losses):
    """Rows with uneven signs."""
    return jnp.sum(losses * jnp.cos(2.0 * jnp.arange(losses.size, dtype=losses.dtype)).reshape(losses.shape))


# What fn sees.


@spread(2, "shape, source", [FLAT, SEQUENCES, ()], SOURCES)
def test_fn_sees_one_row(shape, source):
    rows = {
        "wide": jnp.ones((*shape, 3)),
        "tree": [jnp.ones((*shape, 2, 5), bool), (jnp.ones(shape, jnp.int32),)],
    }
    keys = jax.random.split(jax.random.key(0), shape) if shape else jax.random.key(0)
    seen = []

    def fn(s, advantage, rows, key):
        fields = {
            field.name: getattr(s, field.name) for field in dataclasses.fields(jaxent.SoftmaxStatistics)
        }
        assert fields.pop("class_log_probs").shape == (2,)
        assert {x.shape for x in fields.values()} == {()}
        assert {name for name, x in fields.items() if x.dtype == jnp.int32} == {"prediction", "rank"}
        assert {x.dtype for name, x in fields.items() if name not in ("prediction", "rank")} == {
            jnp.dtype(F32)
        }
        assert advantage.shape == key.shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        assert jax.tree.map(jnp.shape, rows) == {"wide": (3,), "tree": [(2, 5), ((),)]}
        assert [x.dtype for x in jax.tree.leaves(rows)] == [jnp.bool_, jnp.int32, F32]
        seen.append(1)
        return advantage * s.log_prob

    def loss(layer, advantage, reduction):
        logits = logits_of(source, layer)
        where, labels, classes = jnp.ones(shape, bool), jnp.zeros(shape, int), jnp.zeros((*shape, 2), int)
        return jaxent.softmax_loss(
            fn, logits, labels, advantage, rows, keys, where=where, classes=classes, reduction=reduction
        )

    with harness.blocks(source):
        for reduction in ("none", "mean"):
            f = functools.partial(loss, reduction=reduction)
            found = jax.eval_shape(lambda *x, f=f: jax.vjp(f, *x)[0], layer_of(shape), jnp.ones(shape))
            assert found.shape == (shape if reduction == "none" else ()) and found.dtype == F32
    assert seen


@everywhere
def test_fn_is_not_called_for_every_row(source):
    calls = []

    def traced(rows):
        calls.clear()

        def fn(s):
            calls.append(1)
            return -s.log_prob

        def loss(layer):
            return jaxent.softmax_loss(fn, logits_of(source, layer), jnp.zeros(rows, int))

        with harness.blocks(source):
            jax.make_jaxpr(jax.grad(loss))(layer_of((rows,)))
        return len(calls)

    assert 1 <= traced(7) == traced(29) <= 4


@everywhere
def test_what_is_not_read_is_not_computed(source):
    def computes(fn):
        with harness.blocks(source):
            program = jax.make_jaxpr(lambda x: jaxent.softmax_loss(fn, logits_of(source, x), LABELS))(
                layer_of(FLAT)
            )
        return "argmax" in str(program)

    assert computes(lambda s: s.log_prob + s.prediction.astype(F32))
    assert not computes(
        lambda s: lax.cond(s.log_prob > -1, lambda: jnp.sort(s.log_prob[None])[0], lambda: s.entropy)
    )


ELEMENTWISE = {
    "policy": lambda s, a, old: -jnp.minimum(jnp.exp(s.log_prob - old) * a, jnp.clip(s.log_prob, -2, -1)),
    "choices": lambda s, a, old: jnp.where(s.rank < 2, a * s.log_prob, jnp.zeros_like(s.log_prob)),
    "shapes": lambda s, a, old: (
        jnp.ones(s.log_prob.shape, F32) * s.entropy * jnp.broadcast_to(a, s.entropy.shape)
    ),
    "predictions": lambda s, a, old: s.prediction.astype(old.dtype) * old - s.log_normalizer**2,
    "no row arguments": lambda s, *_: nn.softplus(s.mean_log_prob) - s.entropy,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_written_for_arrays(name):
    """They give what they give of all rows at once."""
    layer, fn = layer_of(FLAT), ELEMENTWISE[name]

    @compiled
    def run(layer):
        dense = layer.dense()
        want = fn(jaxent.softmax_statistics(dense, LABELS), ADVANTAGE, OLD)
        got = (jaxent.softmax_loss(fn, z, LABELS, ADVANTAGE, OLD, reduction="none") for z in (dense, layer))
        return want, list(got)

    want, both = run(layer)
    for got in both:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


FUNCTIONS = {
    "jit": jax.jit(lambda s, w: s.log_prob * w.sum()),
    "vmap": lambda s, w: jax.vmap(lambda s, x: x * s.log_prob, (None, 0))(s, w).sum(),
    "checkpoint": jax.checkpoint(lambda s, w: s.log_prob * w.sum()),
    "grad": lambda s, w: jax.grad(lambda w: s.log_prob * w.sum() ** 2 / 2)(w)[0],
    "partial": functools.partial(lambda factor, s, w: factor * s.log_prob * w.sum(), 1.0),
    "scan": lambda s, w: lax.scan(lambda c, x: (c + x * s.log_prob, None), jnp.zeros_like(s.log_prob), w)[0],
    "cond": lambda s, w: lax.cond(s.rank < 0, lambda: s.entropy, lambda: s.log_prob * w.sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_function_in_many_forms(name):
    @compiled
    def run(layer):
        def loss(logits, fn):
            return jaxent.softmax_loss(fn, logits, LABELS, WIDE)

        layers = layer, layer.dense()
        plain = lambda s, w: s.log_prob * w.sum()  # noqa: E731
        return [[jax.value_and_grad(loss)(z, fn) for z in layers] for fn in (FUNCTIONS[name], plain)]

    got, want = run(layer_of(FLAT))
    assert_same(got, want)


# What is closed over, in both modes and to any order.


def policy(s, a, scale):
    return (
        -a * jnp.tanh(scale[0] * s.log_prob) - scale[1] ** 2 * jnp.sort(jnp.stack([s.entropy, scale[2]]))[1]
    )


def plain_policy(z, labels, a, scale):
    larger = jnp.maximum(entropy(z), scale[2])
    return -a * jnp.tanh(scale[0] * log_prob(z, labels)) - scale[1] ** 2 * larger


def to_second_order(loss, layer, scale):
    dots = jax.tree.map(jnp.cos, (layer, scale))
    gradient = jax.grad(loss, (0, 1))
    along = lambda layer, scale: sum(  # noqa: E731
        jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (gradient(layer, scale), dots)), strict=True)
    )
    return {
        "hessian": jax.hessian(loss, 1)(layer, scale),
        "forward over reverse": jax.jvp(gradient, (layer, scale), dots)[1],
        "reverse over reverse": jax.grad(along, (0, 1))(layer, scale),
    }


@thinned(2, "source, reduction", SOURCES, ["mean", "none"])
def test_second_derivatives(source, reduction):
    scale = np.array([0.4, -1.3, 2.2])

    def of_plain(layer, scale):
        rows = plain_policy(layer.dense(), LABELS, a, scale)
        return rows.mean() if reduction == "mean" else add_up(rows)

    def of_jaxent(layer, scale):
        found = jaxent.softmax_loss(
            lambda s, a: policy(s, a, scale), logits_of(source, layer), LABELS, a, reduction=reduction
        )
        return found if reduction == "mean" else add_up(found)

    with jax.enable_x64(True), harness.blocks(source):
        layer, scale, a = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), (layer_of(FLAT), scale, ADVANTAGE)
        )
        run = compiled(lambda *x: [to_second_order(f, *x) for f in (of_jaxent, of_plain)])
        got, want = run(layer, scale)
    assert_same(got, want, tolerance=1e-11)


@everywhere
def test_vmap_of_what_is_closed_over(source):
    layer, scales = layer_of(FLAT), jnp.asarray([[0.4, -1.3, 2.2], [1.0, 0.5, 0.0]])

    def loss(layer, scale):
        return jaxent.softmax_loss(
            lambda s, a: policy(s, a, scale), logits_of(source, layer), LABELS, ADVANTAGE
        )

    f = jax.value_and_grad(loss, (0, 1))
    with harness.blocks(source):
        got = compiled(jax.vmap(f, (None, 0)))(layer, scales)
        each = compiled(f)
        want = jax.tree.map(lambda *x: jnp.stack(x), *(each(layer, scale) for scale in scales))
    assert_same(got, want)


@everywhere
def test_vmap_of_rows_and_row_arguments(source):
    layer, tables = layer_of(FLAT), jnp.stack([ADVANTAGE, OLD])

    def loss(hidden, table):
        logits = logits_of(source, dataclasses.replace(layer, hidden=hidden))
        return jaxent.softmax_loss(lambda s, i: table[i] * s.log_prob, logits, LABELS, FLAGS)

    f = jax.value_and_grad(loss, (0, 1))
    with harness.blocks(source):
        hidden = jnp.stack([layer.hidden, layer.hidden[::-1]])
        got = compiled(jax.vmap(f))(hidden, tables)
        each = compiled(f)
        want = jax.tree.map(lambda *x: jnp.stack(x), *(each(*x) for x in zip(hidden, tables, strict=True)))
    assert_same(got, want)


@everywhere
def test_a_traced_option_that_is_closed_over(source):
    @compiled
    def step(layer, bonus):
        def fn(s):
            return -s.log_prob - bonus * s.entropy

        return jaxent.softmax_loss(fn, logits_of(source, layer), LABELS)

    layer = layer_of(FLAT)
    z = layer.dense()
    with harness.blocks(source):
        for bonus in (0.0, 0.5):
            want = jnp.mean(-log_prob(z, LABELS) - bonus * entropy(z))
            np.testing.assert_allclose(step(layer, jnp.float32(bonus)), want, rtol=2e-6)


@everywhere
def test_nothing_leaks(source):
    @jax.jit
    def loss(layer, scale):
        logits = logits_of(source, layer)
        return jaxent.softmax_loss(lambda s, a: policy(s, a, scale), logits, LABELS, ADVANTAGE)

    gc.collect()
    gc.freeze()  # the check collects garbage after every trace; it need not look at what other tests left
    try:
        with jax.checking_leaks(), harness.blocks(source):
            jax.eval_shape(jax.grad(loss, (0, 1)), layer_of(FLAT), jnp.ones(3))
    finally:
        gc.unfreeze()
