"""Losses on probabilities: errors, word for word; labels and distributions known on the host, and under checkify."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxent import binary_cross_entropy, categorical_cross_entropy, kl_divergence, nll_loss

P = np.full((4, 3), 1 / 3, np.float32)
I = np.zeros(4, np.int32)  # noqa: E741
FORMS = "class indices (integers) of shape [4] or a distribution (floats) of shape [4, 3]"
NEVER = "jaxent never broadcasts labels: one index per row of logits, e.g. `labels.squeeze(-1)`."
ERRORS = [
    (lambda: categorical_cross_entropy(P, I[:, None]), ValueError,
     f"jaxent.categorical_cross_entropy: `labels` must be {FORMS}, but is int32[4, 1]. {NEVER}"),
    (lambda: nll_loss(P, I[:1]), ValueError, f"jaxent.nll_loss: `labels` must be {FORMS}, but is int32[1]. {NEVER}"),
    (lambda: nll_loss(P, I.astype(np.float32)), TypeError,
     f"jaxent.nll_loss: `labels` must be {FORMS}, but is float32[4]. "
     "Floats are read as a distribution; for class indices pass `labels.astype(jnp.int32)`."),
    (lambda: nll_loss(P, P, ignore_index=0), ValueError,
     "jaxent.nll_loss: `ignore_index` must be an int beside integer labels, but is 0. "
     "It hides rows by their label; hide rows of a distribution with `where=`."),
    (lambda: nll_loss(P, I, class_weights=np.ones(4)), ValueError,
     "jaxent.nll_loss: `class_weights` must be of shape [3] (one per class), but is float32[4]. "
     "For weights of rows use `weights`."),
    (lambda: nll_loss(P, np.array([0, 1, 3, -1])), ValueError,
     "jaxent.nll_loss: `labels` must be in [0, 3), but is 3 at index [2]. "
     "Labels count from 0; hide a row with `where=` or `ignore_index=`."),
    (lambda: categorical_cross_entropy(P, np.array([0, 2**32 + 1, 0, 0])), ValueError,
     f"jaxent.categorical_cross_entropy: `labels` must be in [0, 3), but is {2**32 + 1} at index [1]. "
     "Labels count from 0; hide a row with `where=` or `ignore_index=`."),
    (lambda: kl_divergence(P, I), TypeError,
     "jaxent.kl_divergence: `target_probs` must be a floating point array, but is int32[4]. "
     "Pass probabilities as floats."),
    (lambda: kl_divergence(P, P[:1]), ValueError,
     "jaxent.kl_divergence: `target_probs` must be of shape [4, 3] (the shape of `log_probs`), but is "
     "float32[1, 3]. For class indices use `nll_loss`."),
    (lambda: binary_cross_entropy(P, P[0]), ValueError,
     "jaxent.binary_cross_entropy: `labels` must be of shape [4, 3] (one per element of `probs`), but is "
     "float32[3]. Labels are never broadcast; for one class index per row use `softmax_cross_entropy`."),
    (lambda: binary_cross_entropy(P.astype(int), P), TypeError,
     "jaxent.binary_cross_entropy: `probs` must be a floating point array, but is int32[4, 3]. "
     "Pass probabilities as floats."),
    (lambda: binary_cross_entropy(P, np.full((4, 3), 2)), ValueError,
     "jaxent.binary_cross_entropy: `labels` must be in [0, 1], but is 2 at index [0, 0]. "
     "1 is yes, 0 is no; hide an element with `where=`."),
    (lambda: categorical_cross_entropy(P, I, where=np.ones(1, bool)), ValueError,
     "jaxent.categorical_cross_entropy: `where` must be of shape [4] (one per row of `probs`), but is bool[1]. "
     "A mask is never broadcast: use `jnp.broadcast_to(where, rows)` if you mean it."),
    (lambda: kl_divergence(P, P, where=np.ones(1, bool), weights=np.ones(4)), ValueError,
     "jaxent.kl_divergence: `where` must be of shape [4] (one per row of `log_probs`), but is bool[1]. "
     "A mask is never broadcast: use `jnp.broadcast_to(where, rows)` if you mean it."),
    (lambda: kl_divergence(P, P + 1), ValueError,
     "jaxent.kl_divergence: `target_probs` must be in [0, 1], but is 1.3333333730697632 at index [0, 0]. "
     "Hide a row with `where=`."),
    (lambda: kl_divergence(P, P - 1, generalized=True), ValueError,
     "jaxent.kl_divergence: `target_probs` must be finite and >= 0, but is -0.6666666269302368 at index [0, 0]. "
     "Hide a row with `where=`."),
    (lambda: categorical_cross_entropy(P, np.where(P == P[2, 1], np.nan, P)), ValueError,
     "jaxent.categorical_cross_entropy: `labels` must be a number, but is nan at index [0, 0]. "
     "Hide a row with `where=`."),
    (lambda: kl_divergence(P, P, reduction="batchmean"), ValueError,
     "jaxent.kl_divergence: `reduction` must be 'none', 'sum' or 'mean', but is 'batchmean'. "
     "'none' gives one loss per row."),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    call, kind, text = ERRORS[case]
    for f in (call, jax.jit(call)):
        with pytest.raises(kind) as e:
            f()
        assert str(e.value) == text


def test_labels_under_checkify():
    labels = jnp.int32([0, 1, 5, 2])
    text = (
        "{}: `labels` must be in [0, 3) and name a class in force, but row 2 (counted over the flattened rows) "
        "has label 5."
    )
    for f in (categorical_cross_entropy, nll_loss):
        checked = checkify.checkify(jax.jit(f))
        assert text.format(f.__name__) in checked(P, labels)[0].get()
        checked(P, jnp.minimum(labels, 2))[0].throw()
        checkify.checkify(jax.jit(lambda p, y, f=f: f(p, y, where=y < 3)))(P, labels)[0].throw()
    error, _ = checkify.checkify(jax.jit(binary_cross_entropy))(P[0], jnp.float32([0, 1, 1.5]))
    assert "binary_cross_entropy: `labels` must be in [0, 1], but element 2" in error.get()


def test_distributions_under_checkify():
    bad = jnp.asarray(P).at[2, 1].set(-0.5).at[3, 0].set(jnp.nan)
    text = "{}: `{}` must be {}, but element {} (counted over the flattened array) is {}. Hide a row with `where=`."
    cases = [
        (categorical_cross_entropy, "labels", "a number", 9, "nan"),
        (nll_loss, "labels", "a number", 9, "nan"),
        (kl_divergence, "target_probs", "in [0, 1]", 7, "-0.5"),
        (functools.partial(kl_divergence, generalized=True), "target_probs", "finite and >= 0", 7, "-0.5"),
    ]
    for f, argument, expected, element, value in cases:
        name = getattr(f, "func", f).__name__
        error, _ = checkify.checkify(jax.jit(f))(P, bad)
        assert text.format(name, argument, expected, element, value) in error.get()
        hidden = jnp.arange(4) < 2
        checkify.checkify(jax.jit(lambda p, q, f=f: f(p, q, where=hidden)))(P, bad)[0].throw()  # noqa: B023
        checkify.checkify(jax.jit(lambda p, q, f=f: f(p, q, weights=hidden)))(P, bad)[0].throw()  # noqa: B023
    moved = functools.partial(kl_divergence, axis=0)
    error, _ = checkify.checkify(jax.jit(moved))(P.T, bad.T)
    assert "element 3 " in error.get()  # [0, 3], counted as it came


def test_distributions_known_on_the_host_raise_at_once():
    bad = P.copy()
    bad[2] = [0.5, -0.5, np.nan]
    good = np.arange(4) != 2
    for f in (kl_divergence, functools.partial(kl_divergence, axis=0)):
        p, q = (P, bad) if f is kl_divergence else (P.T, bad.T)
        index = [2, 1] if f is kl_divergence else [1, 2]
        with pytest.raises(ValueError, match=re.escape(f"is -0.5 at index {index}")):
            jax.jit(lambda p, f=f, q=q: f(p, q))(p)
        for options in ({"where": good}, {"weights": good * 2.0}):
            assert np.isfinite(jax.jit(functools.partial(f, **options, target_probs=q))(p)).all()
        traced = jax.jit(lambda where, f=f, p=p, q=q: f(p, q, where=where))
        np.testing.assert_array_equal(np.isnan(traced(np.ones(4, bool))), ~good)
    linear = categorical_cross_entropy(P, np.where(np.isnan(bad), 2, bad))  # what it sums to is not asked
    np.testing.assert_allclose(linear, np.log(3) * np.float32([1, 1, 2, 1]), rtol=1e-6)
