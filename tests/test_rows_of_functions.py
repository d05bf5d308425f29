"""The rows that a user's function is mapped over: hidden ones, one, none, any number; and how they are added up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import harness
import jaxent
from forms import entropy, log_prob
from layers import (
    ADVANTAGE,
    F32,
    FLAT,
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
REDUCTIONS = ("none", "sum", "mean")


@thinned(2, "source, hide", SOURCES, ["where", "ignore_index", "weights"])
def test_hidden_rows_are_gone(source, hide):
    """Whatever they hold, and whatever fn makes of it; the others are as without them."""
    seen = np.array([True, False, True, True, False, True, True])
    dirty = jnp.where(seen, ADVANTAGE, jnp.nan)
    layer, labels, options, ignored = layer_of(FLAT), LABELS, {}, None
    if hide == "ignore_index":
        labels, ignored = jnp.where(seen, LABELS, -1), -1
    elif hide == "where":
        options["where"] = jnp.asarray(seen)
    else:
        options["weights"] = jnp.asarray(seen, F32)

    def fn(s, a, w, scale):
        carry = lax.scan(lambda c, x: (scale * c + a * x, None), s.log_prob, jnp.sort(w))[0]
        return lax.cond(a > 0, lambda c: c * s.entropy, jnp.sin, carry)

    def loss(layer, dirty, wide, scale, labels, options):
        f = lambda s, a, w: fn(s, a, w, scale)  # noqa: E731
        logits = logits_of(source, layer)
        return jaxent.softmax_loss(f, logits, labels, dirty, wide, ignore_index=ignored, **options)

    rows = lambda x: x[np.flatnonzero(seen)]  # noqa: E731
    with harness.blocks(source):
        f = compiled(jax.value_and_grad(loss, (0, 1, 2, 3)))
        scale = jnp.float32(0.7)
        value, gradients = f(layer, dirty, WIDE, scale, labels, options)
        of_seen = dataclasses.replace(layer, hidden=rows(layer.hidden))
        want, slopes = f(of_seen, rows(dirty), rows(WIDE), scale, rows(labels), {})
    of_layer, *of_rows, of_scale = gradients
    for x in (of_layer.hidden, *of_rows):
        assert (x[np.flatnonzero(~seen)] == 0).all()
    of_layer = dataclasses.replace(of_layer, hidden=rows(of_layer.hidden))
    assert_same((value, of_layer, *map(rows, of_rows), of_scale), (want, *slopes))


@spread(3, "source, reduction", SOURCES, REDUCTIONS)
def test_a_single_row(source, reduction):
    layer = layer_of(())

    def loss(layer, w):
        fn = lambda s, w: jnp.sort(w)[0] * s.log_prob - s.entropy  # noqa: E731
        return jaxent.softmax_loss(fn, logits_of(source, layer), jnp.asarray(2), w, reduction=reduction)

    def plain(layer, w):
        return w.min() * log_prob(layer.dense(), jnp.asarray(2)) - entropy(layer.dense())

    with harness.blocks(source):
        run = compiled(lambda *x: [jax.value_and_grad(f, (0, 1))(*x) for f in (loss, plain)])
        assert_same(*run(layer, WIDE[0]))


@spread(3, "source, reduction", SOURCES, REDUCTIONS)
def test_no_rows(source, reduction):
    layer = dataclasses.replace(layer_of(FLAT), hidden=jnp.zeros((0, 4)))

    def loss(layer, w, scale):
        fn = lambda s, w: scale * jnp.sort(w)[0] * s.log_prob  # noqa: E731
        logits = logits_of(source, layer)
        losses = jaxent.softmax_loss(fn, logits, jnp.zeros(0, int), w, reduction=reduction)
        assert losses.shape == ((0,) if reduction == "none" else ())
        return losses.sum()

    with harness.blocks(source):
        found = compiled(jax.value_and_grad(loss, (0, 1, 2)))(layer, jnp.zeros((0, 3)), jnp.float32(2))
    assert all((x == 0).all() for x in jax.tree.leaves(found))


@spread(3, "source, reduction", SOURCES, REDUCTIONS)
def test_reductions(source, reduction):
    layer, weights = layer_of(SEQUENCES), np.float32(np.arange(12) % 5 / 2).reshape(SEQUENCES)
    labels, where = np.arange(12).reshape(SEQUENCES) % 11, np.arange(12).reshape(SEQUENCES) % 4 != 2
    with harness.blocks(source):
        got = compiled(
            lambda layer, *x: jaxent.softmax_loss(
                lambda s, i: jnp.arange(12.0)[i] * s.log_prob, logits_of(source, layer), *x, reduction=reduction,
                where=where, weights=weights,
            )
        )(layer, labels, labels[::-1])  # fmt: skip
    z = np.float64(layer.hidden) @ np.float64(layer.kernel) + np.float64(layer.bias)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    losses = where * weights * labels[::-1] * np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    want = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (where * weights).sum()}
    np.testing.assert_allclose(got, want[reduction], rtol=2e-6, atol=2e-6)


def test_losses_of_other_dtypes():
    z = layer_of(FLAT).dense()
    place = jaxent.softmax_statistics(z, LABELS, names=["rank"]).rank
    for fn, want in (
        (lambda s: s.rank, place.mean()),
        (lambda s: s.rank < 3, (place < 3).mean()),
        (lambda s: 0.5, 0.5),
    ):
        got = jaxent.softmax_loss(fn, z, LABELS)
        assert got.dtype == F32
        np.testing.assert_allclose(got, want, rtol=1e-6)


@everywhere
def test_export_for_any_number_of_rows(source):
    kernel = layer_of(FLAT).kernel

    def f(hidden, label, wide, scale):
        fn = lambda s, w: (scale * s.log_prob * jnp.sort(w)[0], s.rank)  # noqa: E731
        logits = logits_of(source, jaxent.LinearLogits(hidden, kernel))
        return jaxent.softmax_loss(fn, logits, label, wide, has_aux=True)

    f = compiled(jax.value_and_grad(f, (0, 3), has_aux=True))
    (n,) = export.symbolic_shape("n")
    with harness.blocks(source):
        types = ((n, 4), F32), ((n,), jnp.int32), ((n, 3), F32), ((), F32)
        exported = export.export(f)(*(jax.ShapeDtypeStruct(*x) for x in types))
    arguments = layer_of(FLAT).hidden, LABELS, WIDE, F32(0.3)
    assert_same(exported.call(*arguments), f(*arguments))


@everywhere
def test_half_logits_and_half_row_arguments(source):
    layer = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer_of(FLAT))

    def fn(s, w):
        assert s.log_prob.dtype == s.entropy.dtype == F32 and w.dtype == jnp.bfloat16
        return s.log_prob * jnp.sort(w)[1].astype(F32)

    def loss(layer, w):
        return jaxent.softmax_loss(fn, logits_of(source, layer), LABELS, w)

    with harness.blocks(source):
        value, gradients = compiled(jax.value_and_grad(loss, (0, 1)))(layer, WIDE.astype(jnp.bfloat16))
        half = compiled(lambda x, w: jaxent.softmax_loss(lambda s, w: fn(s, w).astype(w.dtype), x, LABELS, w))
        assert half(logits_of(source, layer), WIDE.astype(jnp.bfloat16)).dtype == F32
    wide = jax.tree.map(lambda x: x.astype(F32), layer)
    ordered = jnp.sort(WIDE.astype(jnp.bfloat16), -1)[:, 1].astype(F32)
    want = jnp.mean(log_prob(wide.dense(), LABELS) * ordered)
    np.testing.assert_allclose(value, want, rtol=2e-2)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert (jnp.sum(gradients[1] != 0, -1) == 1).all()
