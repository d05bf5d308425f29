"""Linear logits with rows that do not count and rows that have no answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import harness
import jaxent
import test_values
from jaxent._logits import sources
from jaxent._logits.plan import Plan
from layers import ADVANTAGE, FLAT, assert_same, compiled, in_blocks, layer_of
from tables import thinned

BAD = np.array([1, 4, 6])
NAN, INF = np.nan, np.inf


def hostile():
    """A layer whose bad rows hold NaN, infinities and the largest number, and one where they hold 0."""
    layer = layer_of(FLAT)
    clean = layer.hidden.at[BAD].set(0)
    dirty = clean.at[BAD].set(jnp.asarray([[NAN] * 4, [INF, -INF, 0, 1], [3e38] * 4]))
    return tuple(dataclasses.replace(layer, hidden=x) for x in (dirty, clean))


def to_second_order(loss):
    """loss(layer, arrays) -> its value and gradients, and how these change along some tangent."""

    def run(layer, dots, arrays):
        f = jax.value_and_grad(lambda layer: loss(layer, arrays))
        return jax.jvp(f, (layer,), (dots,))

    return compiled(run)


def assert_gone(run, arrays):
    """What bad rows hold changes nothing, not one bit of it; theirs is 0."""
    dirty, clean = hostile()
    got, want = (run(layer, layer_of(FLAT, seed=9), arrays) for layer in (dirty, clean))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)
        assert np.isfinite(g).all()
    (_, gradient), (_, change) = got
    for x in (gradient, change):
        assert (x.hidden[BAD] == 0).all() and (x.hidden[np.delete(np.arange(7), BAD)] != 0).all()
        assert all(jnp.any(y != 0) for y in (x.kernel, x.bias))


@thinned(2, "hide, source", ["where", "weights", "ignore_index", "class_weights"], harness.LINEAR)
def test_masked_means_gone(hide, source):
    labels = np.array([1, 77, 0, 4, -5, 10, 2**31 - 1], np.int32)
    bad = np.isin(np.arange(7), BAD)
    options, arrays = {"reduction": "mean" if hide in ("where", "class_weights") else "none"}, {}
    if hide == "where":
        arrays["where"] = jnp.asarray(~bad)
    elif hide == "weights":
        arrays["weights"] = jnp.where(bad, 0.0, 2.0)
    elif hide == "ignore_index":
        labels = np.where(bad, cases.IGNORED, labels)
        options["ignore_index"] = cases.IGNORED
    else:
        labels = np.where(bad, 2, labels)
        options["class_weights"] = np.where(np.arange(11) == 2, 0, 1)
    labels = jnp.asarray(labels)

    def loss(layer, arrays):
        losses = jaxent.softmax_cross_entropy(layer, labels, z_loss=0.1, **options, **arrays)
        return losses if options["reduction"] == "mean" else jnp.vdot(losses, ADVANTAGE)

    with harness.blocks(source):
        run = to_second_order(loss)
        assert_gone(run, arrays)
        if arrays:  # nothing counts
            zeros = jax.tree.map(jnp.zeros_like, arrays)
            found = run(hostile()[0], layer_of(FLAT, seed=9), zeros)
            assert all((x == 0).all() for x in jax.tree.leaves(found))


@thinned(2, "name, reduction", test_values.MEASURES, ["none", "mean"])
def test_masked_means_gone_in_divergences(name, reduction):
    def loss(layer, where):
        target = dataclasses.replace(layer, kernel=-layer.kernel, bias=None)
        losses = getattr(jaxent, name)(layer, target, where=where, reduction=reduction)
        return jnp.sum(losses * 1.5)

    where = jnp.asarray(~np.isin(np.arange(7), BAD))
    with harness.blocks("rows"):
        run = to_second_order(loss)
        assert_gone(run, where)
        found = run(hostile()[0], layer_of(FLAT, seed=9), where & False)
        assert all((x == 0).all() for x in jax.tree.leaves(found))


@in_blocks
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_rows_are_poisoned_alone(reduction, source):
    labels = jnp.asarray([0, 11, 3, -1, 5, 2**31 - 1, 1])
    layer = layer_of(FLAT)
    hidden = layer.hidden.at[4, 2].set(NAN).at[6, 0].set(INF)
    bad = [1, 3, 4, 5, 6]

    @compiled
    def run(layer):
        def f(layer):
            losses = jaxent.softmax_cross_entropy(layer, labels, reduction=reduction)
            return losses.sum(), losses

        return jax.value_and_grad(f, has_aux=True)(layer)

    with harness.blocks(source):
        (_, losses), gradient = run(dataclasses.replace(layer, hidden=hidden))
    assert np.flatnonzero(np.isnan(losses)).tolist() == (bad if reduction == "none" else [0])
    assert np.flatnonzero(np.isnan(gradient.hidden).all(-1)).tolist() == bad
    assert np.isfinite(np.delete(gradient.hidden, bad, 0)).all()


@pytest.mark.parametrize("rows", [6, 21])  # one block; three
def test_any_number_of_rows_may_count(rows, monkeypatch):
    """The matmuls of a block take whole quarters of it, here two pieces each, and never what no piece has written."""
    monkeypatch.setattr(sources, "plan", lambda sizes, *_: Plan(1, sizes.classes, pieces=8))
    monkeypatch.setattr("jax.lax.empty", harness.nans)
    layer, rng = layer_of((rows,)), np.random.default_rng(rows)
    labels = jnp.asarray(rng.integers(layer.shape[-1], size=rows))

    def loss(layer, where, dense):
        logits = layer.dense() if dense else layer
        return jaxent.softmax_cross_entropy(logits, labels, where=where, reduction="sum")

    gradients = compiled(jax.value_and_grad(loss), static_argnums=2)
    for number in range(rows + 1):
        where = jnp.asarray(rng.permutation(rows) < number)
        assert_same(gradients(layer, where, False), gradients(layer, where, True), number)
