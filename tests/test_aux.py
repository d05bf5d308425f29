"""What a function of a row gives beside its loss: figures of the same pass, which nobody differentiates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import harness
import jaxent
from compiled import matmul_operations
from layers import ADVANTAGE, F32, FLAT, SEQUENCES, WIDE, assert_same, compiled, layer_of
from tables import spread, thinned

SOURCES = ("dense", *harness.LINEAR)
everywhere = pytest.mark.parametrize("source", SOURCES)
REDUCTIONS = ("none", "sum", "mean")
LABELS = jnp.asarray([3, 0, 10, 7, 7, 1, 5])


def logits_of(source, layer):
    return layer.dense() if source == "dense" else layer


def labels_of(shape):
    return jnp.asarray(np.random.default_rng(3).integers(11, size=shape), jnp.int32)


def figures(s, label):
    """Of a step, in all dtypes, and of each a different shape."""
    return -s.log_prob, {
        "loss": -s.log_prob,
        "correct": s.prediction == label,
        "place": (s.rank, s.prediction),
        "both": jnp.stack([s.entropy, s.log_normalizer]),
        "top": jnp.stack([s.rank < k for k in (1, 5, 10)])[:, None],
    }


def expected(layer, labels, where=None):
    """Of all statistics, 0 in hidden rows."""
    s = jaxent.softmax_statistics(layer.dense(), labels)
    found = {
        "loss": -s.log_prob,
        "correct": s.prediction == labels,
        "place": (s.rank, s.prediction),
        "both": jnp.stack([s.entropy, s.log_normalizer], -1),
        "top": jnp.stack([s.rank < k for k in (1, 5, 10)], -1)[..., None],
    }
    seen = jnp.ones(labels.shape, bool) if where is None else where

    def hide(x):
        return jnp.where(seen.reshape(seen.shape + (1,) * (x.ndim - seen.ndim)), x, jnp.zeros_like(x))

    return jax.tree.map(hide, found)


def assert_close(got, want):
    """Integers and bools to the last bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        if jnp.issubdtype(w.dtype, jnp.floating):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(g, w)


@spread(3, "source, reduction, shape", SOURCES, REDUCTIONS, [FLAT, SEQUENCES, ()])
def test_figures(source, reduction, shape):
    layer, labels = layer_of(shape), labels_of(shape)
    where = jnp.asarray(np.arange(labels.size).reshape(shape) % 3 != 1)

    @compiled
    def run(layer, labels, where):
        def loss(layer, fn=figures, has_aux=True):
            logits, options = logits_of(source, layer), {"where": where, "reduction": reduction}
            return jaxent.softmax_loss(fn, logits, labels, labels, has_aux=has_aux, **options)

        (found, aux), vjp = jax.vjp(loss, layer)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), aux)
        real = jax.tree.map(lambda x, z: jnp.zeros_like(x) if x.dtype == F32 else z, aux, zeros)
        gradient = vjp((jnp.cos(found), real))
        alone, vjp = jax.vjp(functools.partial(loss, fn=lambda *x: figures(*x)[0], has_aux=False), layer)
        return aux, (found, gradient), (alone, vjp(jnp.cos(alone))), expected(layer, labels, where)

    with harness.blocks(source):
        aux, got, alone, want = run(layer, labels, where)
    assert_close(aux, want)
    assert_same(got, alone)


@thinned(2, "source, hide", SOURCES, ["where", "ignore_index"])
def test_hidden_rows_have_none(source, hide):
    """Also where they hold NaN, and where what fn gives of 0 is not 0."""
    seen = np.array([True, False, True, True, False, True, True])
    labels, options = LABELS, {"where": jnp.asarray(seen)}
    if hide == "ignore_index":
        labels, options = jnp.where(seen, LABELS, -7), {"ignore_index": -7}

    def fn(s, x):
        return s.log_prob, {"one": jnp.ones(2), "yes": x == x, "odd": jnp.log(x * x), "three": jnp.asarray(3)}

    @compiled
    def run(layer, x):
        logits = logits_of(source, layer)
        return jaxent.softmax_loss(fn, logits, labels, x, has_aux=True, **options)[1]

    with harness.blocks(source):
        aux = run(layer_of(FLAT), jnp.where(seen, ADVANTAGE, jnp.nan))
    assert aux["one"].tolist() == [[float(x)] * 2 for x in seen]
    assert aux["yes"].tolist() == seen.tolist() and aux["three"].tolist() == (3 * seen).tolist()
    assert (aux["odd"][~seen] == 0).all()
    np.testing.assert_allclose(aux["odd"][seen], np.log(np.square(ADVANTAGE)[seen]), rtol=1e-5)


@everywhere
def test_a_row_of_weight_0_has_its_figures(source):
    weights = jnp.asarray([1.0, 0, 2, 0, 0, 0.5, 1])

    @compiled
    def run(layer):
        logits = logits_of(source, layer)
        found = jaxent.softmax_loss(figures, logits, LABELS, LABELS, weights=weights, has_aux=True)
        return found, expected(layer, LABELS)

    with harness.blocks(source):
        (loss, aux), want = run(layer_of(FLAT))
    assert_close(aux, want)
    np.testing.assert_allclose(loss, jnp.vdot(aux["loss"], weights) / weights.sum(), rtol=1e-6)


@everywhere
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_bad_label_spoils_its_own_row(source, reduction):
    """The loss is NaN; what depends on no label is as it was."""
    good = np.arange(7) != 2

    @compiled
    def run(layer, labels):
        logits, fn = logits_of(source, layer), lambda s, y: (s.log_prob, figures(s, y)[1])
        found = jaxent.softmax_loss(fn, logits, labels, labels, has_aux=True, reduction=reduction)
        return found, expected(layer, LABELS)

    with harness.blocks(source):
        (loss, aux), want = run(layer_of(FLAT), LABELS.at[2].set(11))
    if reduction == "none":
        assert np.isnan(loss).tolist() == (~good).tolist()
    else:
        assert np.isnan(loss)
    rows = functools.partial(jax.tree.map, lambda x: np.asarray(x)[good])
    assert_close(rows(aux), rows(want))
    assert np.isnan(aux["loss"][2])


@thinned(2, "source, reduction", SOURCES, ["none", "mean"])
def test_figures_are_not_differentiated(source, reduction):
    """By the layer, row arguments and what is closed over: exactly 0; and beside a loss they change nothing."""

    def f(layer, x, scale, of_loss, of_aux):
        def fn(s, x):
            return scale * x * s.log_prob, [s.entropy * scale * x, jnp.exp(x), jnp.stack([scale, s.log_prob])]

        logits = logits_of(source, layer)
        loss, aux = jaxent.softmax_loss(fn, logits, LABELS, x, has_aux=True, reduction=reduction)
        return of_loss * loss.sum() + of_aux * sum(map(jnp.sum, aux))

    with harness.blocks(source):
        run = compiled(jax.grad(f, (0, 1, 2)))
        arguments = layer_of(FLAT), ADVANTAGE, jnp.float32(0.7)
        of_aux, of_both, of_loss = (run(*arguments, *map(jnp.float32, x)) for x in ((0, 1), (1, 1), (1, 0)))
    assert all((x == 0).all() for x in jax.tree.leaves(of_aux))
    assert all((x != 0).any() for x in jax.tree.leaves(of_loss))
    assert_same(of_both, of_loss, tolerance=0)


@pytest.mark.parametrize("source", ["dense", "rows"])
def test_figures_in_forward_mode(source):
    def f(layer, scale):
        fn = lambda s, x: (scale * s.log_prob, (s.entropy * scale, s.rank, x * scale))  # noqa: E731
        return jaxent.softmax_loss(fn, logits_of(source, layer), LABELS, ADVANTAGE, has_aux=True)

    @compiled
    def run(layer, scale):
        (loss, aux), (dot, aux_dot) = jax.jvp(f, (layer, scale), (layer, scale))
        alone = jax.jvp(lambda *x: f(*x)[0], (layer, scale), (layer, scale))
        return (loss, dot), alone, [x for x in aux_dot if x.dtype == F32], aux

    with harness.blocks(source):
        got, alone, dots, aux = run(layer_of(FLAT), jnp.float32(0.7))
    assert_same(got, alone)
    assert len(dots) == 2 and all((x == 0).all() for x in dots) and (aux[0] != 0).all()


def transformed(name, f):
    """value_and_grad of f, which has aux, by its first argument."""
    g = jax.value_and_grad(f, has_aux=True)
    if name == "checkpoint":
        return jax.value_and_grad(jax.checkpoint(f), has_aux=True)
    if name == "jit":
        return jax.value_and_grad(jax.jit(f), has_aux=True)
    if name == "vmap":
        return lambda *x: jax.tree.map(
            lambda x: x[1], jax.vmap(g)(*jax.tree.map(lambda x: jnp.stack([x * 2, x]), x))
        )
    if name == "scan":
        return lambda *x: lax.scan(lambda _, __: (None, g(*x)), None, None, length=2)[1]
    return g


TRANSFORMATIONS = ("grad", "jit", "checkpoint", "vmap", "scan")


@spread(3, "source, name", SOURCES, TRANSFORMATIONS)
def test_transformations(source, name):
    """`jax.value_and_grad(..., has_aux=True)` under and over the others."""

    def f(layer, scale):
        fn = lambda s: (jnp.tanh(scale * s.log_prob), (s.entropy * scale, s.rank))  # noqa: E731
        return jaxent.softmax_loss(fn, logits_of(source, layer), LABELS, has_aux=True)

    def plain(layer, scale):
        s = jaxent.softmax_statistics(layer.dense(), LABELS)
        return jnp.tanh(scale * s.log_prob).mean(), lax.stop_gradient((s.entropy * scale, s.rank))

    @compiled
    def run(layer, scale):
        want = jax.value_and_grad(plain, has_aux=True)(layer, scale)
        if name == "scan":
            want = jax.tree.map(lambda x: jnp.stack([x, x]), want)
        return transformed(name, f)(layer, scale), want

    with harness.blocks(source):
        assert_same(*run(layer_of(FLAT), jnp.float32(0.7)))


@everywhere
def test_second_derivatives_beside_figures(source):
    def hessian(scale, layer, has_aux):
        def f(scale):
            def fn(s):
                loss = jnp.tanh(scale[0] * s.log_prob) + scale[1] ** 2 * s.entropy
                return (loss, (s.entropy * scale[0], s.rank)) if has_aux else loss

            return jaxent.softmax_loss(fn, logits_of(source, layer), LABELS, has_aux=has_aux)

        found = jax.hessian(f, has_aux=has_aux)(scale)
        return found[0] if has_aux else found

    with harness.blocks(source):
        run = compiled(lambda *x: [hessian(*x, has_aux) for has_aux in (True, False)])
        assert_same(*run(jnp.asarray([0.4, -1.2]), layer_of(FLAT)))


@everywhere
def test_no_rows_no_figures(source):
    layer = dataclasses.replace(layer_of(FLAT), hidden=jnp.zeros((0, 4)))
    labels = jnp.zeros(0, jnp.int32)
    with harness.blocks(source):
        f = lambda layer: jaxent.softmax_loss(figures, logits_of(source, layer), labels, labels, has_aux=True)  # noqa: E731
        loss, aux = compiled(f)(layer)
    assert loss == 0
    shapes = {"loss": (0,), "correct": (0,), "place": ((0,), (0,)), "both": (0, 2), "top": (0, 3, 1)}
    assert jax.tree.map(jnp.shape, aux) == shapes


def test_no_figures():
    """A pytree without leaves; and Python numbers are arrays."""
    z = layer_of(FLAT).dense()
    for aux in ((), None, {}, {"a": [None, ()]}):
        loss, found = jaxent.softmax_loss(lambda s, aux=aux: (s.log_prob, aux), z, LABELS, has_aux=True)
        assert loss.shape == () and found == aux
    _, (one, yes) = jaxent.softmax_loss(lambda s: (s.log_prob, (1.5, True)), z, LABELS, has_aux=True)
    assert one.tolist() == [1.5] * 7 and yes.tolist() == [True] * 7


@everywhere
def test_the_loss_may_come_from_elsewhere(source):
    """fn reads nothing for its loss, and the figures nothing of it."""

    def f(layer, scale):
        fn = lambda s, w: (scale**2, jnp.sort(w)[0] + s.entropy)  # noqa: E731
        return jaxent.softmax_loss(fn, logits_of(source, layer), None, WIDE, has_aux=True, reduction="sum")

    layer = layer_of(FLAT)
    with harness.blocks(source):
        (loss, aux), (of_layer, of_scale) = compiled(jax.value_and_grad(f, (0, 1), has_aux=True))(layer, 3.0)
    assert loss == 63 and of_scale == 42
    assert all((x == 0).all() for x in jax.tree.leaves(of_layer))
    want = WIDE.min(-1) + jaxent.softmax_statistics(layer.dense()).entropy
    np.testing.assert_allclose(aux, want, rtol=1e-5, atol=1e-6)


N, D, V = 96, 16, 512


def step(hidden, kernel, labels):
    """Loss, accuracy, entropy and perplexity of a step."""

    def fn(s, y):
        return -s.log_prob, {"correct": s.prediction == y, "entropy": s.entropy}

    loss, aux = jaxent.softmax_loss(fn, jaxent.LinearLogits(hidden, kernel), labels, labels, has_aux=True)
    entropy, correct = jaxent.mean(aux["entropy"]), jaxent.mean(aux["correct"])
    return loss, {"accuracy": correct, "entropy": entropy, "perplexity": jnp.exp(loss)}


def test_figures_take_no_matmul():
    shapes = ((N, D), F32), ((D, V), F32), ((N,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*x) for x in shapes]

    def matmuls(f):
        with harness.blocks("rows"):
            program = jax.jit(f).lower(*arguments).compile(harness.HLO | harness.QUICK)
        return matmul_operations(program) / (2 * N * D * V)

    assert matmuls(jax.value_and_grad(step, (0, 1), has_aux=True)) == pytest.approx(3)
    assert matmuls(jax.value_and_grad(step, has_aux=True)) == pytest.approx(2)
    assert matmuls(step) == pytest.approx(1)


def test_figures_of_a_step():
    rng = np.random.default_rng(7)
    hidden, kernel = np.float32(rng.normal(size=(N, D))), np.float32(rng.normal(size=(D, V)))
    z = np.float64(hidden) @ np.float64(kernel)
    labels = np.where(np.arange(N) % 3 == 0, z.argmax(-1), np.arange(N)).astype(np.int32)
    (loss, found), _ = compiled(jax.value_and_grad(step, (0, 1), has_aux=True))(hidden, kernel, labels)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    want = -log_p[np.arange(N), labels].mean()
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    np.testing.assert_allclose(found["perplexity"], np.exp(want), rtol=2e-5)
    np.testing.assert_allclose(found["entropy"], -(np.exp(log_p) * log_p).sum(-1).mean(), rtol=2e-6)
    np.testing.assert_allclose(found["accuracy"], (z.argmax(-1) == labels).mean(), rtol=1e-6)
