"""Elementwise losses from logits: errors, word for word; labels known on the host, and under checkify."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy, sigmoid_focal_loss
from sigmoid_cases import losses

ROWS = "jaxent.{f}: `labels` must be of shape [4, 3] (one per element of `logits`), but is {got}. " \
    "Labels are never broadcast; for one class index per row use `softmax_cross_entropy`."  # fmt: skip
Z = np.zeros((4, 3), np.float32)
Y = np.zeros((4, 3), np.float32)
ERRORS = [
    (lambda f: f(Z, jnp.zeros(4, int)), ValueError, ROWS.replace("{got}", "int32[4]")),
    (lambda f: f(Z, jnp.zeros((4, 1))), ValueError, ROWS.replace("{got}", "float32[4, 1]")),
    (lambda f: f(Z, 1.0), ValueError, ROWS.replace("{got}", "float32[]")),
    (lambda f: f(Z, [0, 1]), TypeError,
     "jaxent.{f}: `labels` must be an array, but is a list. Pass `jnp.asarray(...)`."),
    (lambda f: f(Z, Y.astype(np.complex64)), TypeError,
     "jaxent.{f}: `labels` must be bool, integer or floating point, but is complex64[4, 3]. "
     "1 is yes, 0 is no."),
    (lambda f: f(jnp.zeros(3, int), np.zeros(3)), TypeError,
     "jaxent.{f}: `logits` must be a floating point array, but is int32[3]. "
     "Pass what the last layer gives, before any rounding: `logits.astype(jnp.float32)`."),
    (lambda f: f(Z.astype(np.complex64), Y), TypeError,
     "jaxent.{f}: `logits` must be a floating point array, but is complex64[4, 3]. "
     "Pass what the last layer gives, before any rounding: `logits.astype(jnp.float32)`."),
    (lambda f: f(Z, Y, where=np.ones((4, 1), bool)), ValueError, "must be of shape [4, 3]"),
    (lambda f: f(Z, Y, weights=np.ones(4)), ValueError, "must be of shape [4, 3]"),
    (lambda f: f(Z, Y, where=np.ones((4, 3))), TypeError, "`where` must be a bool array"),
    (lambda f: f(Z, Y, pos_weight=np.ones((1, 3), np.float32)), ValueError,
     "jaxent.{f}: `pos_weight` must be of shape [] or [3] or [4, 3], but is float32[1, 3]. "
     "It multiplies the positive half of the loss; one per class is `[V]` along `axis`."),
    (lambda f: f(Z, Y, pos_weight=np.ones(3), axis=0), ValueError,
     "`pos_weight` must be of shape [] or [4] or [4, 3], but is float32[3]. "),
    (lambda f: f(Z[0], Y[0], pos_weight=np.ones(4)), ValueError,
     "`pos_weight` must be of shape [] or [3], but is float32[4]. "),
    (lambda f: f(0.5, 1, pos_weight=np.ones(1)), ValueError,
     "`pos_weight` must be of shape [], but is float32[1]. "),
    (lambda f: f(Z, Y, pos_weight=np.ones((4, 3), bool)), TypeError,
     "`pos_weight` must be a number or an array of one, but is bool[4, 3]. "),
    (lambda f: f(Z, Y, pos_weight=np.float32([1, -1, 2])), ValueError,
     "jaxent.{f}: `pos_weight` must be a finite number >= 0, but is -1.0. "
     "It multiplies the positive half of the loss; one per class is `[V]` along `axis`."),
    (lambda f: f(Z, Y, pos_weight=np.where(np.arange(12).reshape(4, 3) == 7, np.nan, 1)), ValueError,
     "`pos_weight` must be a finite number >= 0, but is nan. "),
    (lambda f: f(Z, Y, axis=2), ValueError,
     "jaxent.{f}: `axis` must be an axis of `logits`, which is float32[4, 3], but is 2. "
     "`axis` is the one class axis."),
    (lambda f: f(Z, Y, axis=(0, 1)), ValueError, "`axis` must be an axis of `logits`"),
    (lambda f: f(0.5, 1, axis=1), ValueError, "`axis` must be an axis of `logits`, which is float32[], but is 1. "),
    (lambda f: f(Z, Y, ignore_index=255), ValueError,
     "jaxent.{f}: `ignore_index` must be an int beside integer labels, but is 255. "
     "It hides rows by their label; hide rows of a distribution with `where=`."),
    (lambda f: f(Z, Y > 0, ignore_index=255), ValueError, "`ignore_index` must be an int beside integer labels"),
    (lambda f: f(Z, Y.astype(int), ignore_index=255.0), ValueError,
     "`ignore_index` must be an int beside integer labels, but is 255.0."),
    (lambda f: f(Z, Y.astype(int)[:, :1], ignore_index=255), ValueError, ROWS.replace("{got}", "int32[4, 1]")),
    (lambda f: f(Z, Y, label_smoothing=np.ones(3)), ValueError,
     "jaxent.{f}: `label_smoothing` must be of shape [], but is float32[3]. It moves labels towards 1/2."),
    (lambda f: f(Z, Y, pos_weight=-1), ValueError,
     "jaxent.{f}: `pos_weight` must be a finite number >= 0, but is -1. "
     "It multiplies the positive half of the loss; one per class is `[V]` along `axis`."),
    (lambda f: f(Z, Y, label_smoothing=1.5), ValueError,
     "jaxent.{f}: `label_smoothing` must be in [0, 1], but is 1.5. It moves labels towards 1/2."),
    (lambda f: f(Z, Y, label_smoothing=float("nan")), ValueError,
     "`label_smoothing` must be in [0, 1], but is nan"),
    (lambda f: f(Z, Y, reduction="avg"), ValueError,
     "jaxent.{f}: `reduction` must be 'none', 'sum' or 'mean', but is 'avg'. 'none' gives one loss per row."),
]  # fmt: skip
OPTION_ERRORS = [
    (
        sigmoid_focal_loss,
        {"gamma": -1},
        "`gamma` must be a finite number >= 0, but is -1. gamma=0 is `sigmoid_cr",
    ),
    (
        sigmoid_focal_loss,
        {"alpha": 1.1},
        "`alpha` must be in [0, 1], but is 1.1. Positives weigh alpha, negatives 1 - alpha; one per class is `[V]` "
        "along `axis`.",
    ),
    (
        sigmoid_focal_loss,
        {"alpha": np.full(4, 0.25)},
        "`alpha` must be of shape [] or [3] or [4, 3], but is float32[4]. Positives weigh alpha, negatives 1 - alpha; "
        "one per class is `[V]` along `axis`.",
    ),
    (sigmoid_focal_loss, {"alpha": np.float32([0.5, -0.25, 1])}, "`alpha` must be in [0, 1], but is -0.25. "),
    (
        sigmoid_asymmetric_loss,
        {"gamma_negative": -1},
        "`gamma_negative` must be a finite number >= 0, but is -1.",
    ),
    (
        sigmoid_asymmetric_loss,
        {"gamma_positive": -1},
        "`gamma_positive` must be a finite number >= 0, but is -1.",
    ),
    (
        sigmoid_asymmetric_loss,
        {"clip": 1},
        "`clip` must be in [0, 1), but is 1. It is a probability, and part of the program: pass `float(clip)` outside",
    ),
]


@losses
@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(loss, case):
    call, kind, text = ERRORS[case]
    text = text.replace("{f}", loss.__name__)
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(kind) as e:
            transform(lambda: call(loss))()
        assert str(e.value) == text if text.startswith("jaxent") else text in str(e.value)


@pytest.mark.parametrize("loss, options, text", OPTION_ERRORS)
def test_errors_of_options(loss, options, text):
    with pytest.raises(ValueError) as e:
        loss(Z, Y, **options)
    assert str(e.value).startswith(f"jaxent.{loss.__name__}: {text}")


def test_clip_is_a_python_number():
    with pytest.raises(TypeError) as e:
        jax.jit(lambda clip: sigmoid_asymmetric_loss(Z, Y, clip=clip))(0.05)
    assert str(e.value) == (
        "jaxent.sigmoid_asymmetric_loss: `clip` must be a Python number, but is float32[]. It is a probability, and "
        "part of the program: pass `float(clip)` outside jit; 0 turns it off."
    )


def test_labels_known_on_the_host_raise_at_once():
    loss = sigmoid_cross_entropy

    def error(labels, **options):
        with pytest.raises(ValueError) as e:
            jax.jit(lambda z: loss(z, labels, **options))(np.zeros((2, 2), np.float32))
        return str(e.value)

    start = f"jaxent.{loss.__name__}: `labels` must be in [0, 1], but is "
    end = " 1 is yes, 0 is no; hide an element with `where=`."
    assert error(np.array([[0, 1], [2**32 + 1, 5]])) == start + f"{2**32 + 1} at index [1, 0]." + end
    assert error(np.array([[0, -0.5], [2, 5]])) == start + "-0.5 at index [0, 1]." + end
    assert error(np.array([[0, 1], [1, 1 + 1e-5]])) == start + "1.00001 at index [1, 1]." + end
    assert "nan at index [0, 0]" in error(np.array([[np.nan, 1], [1, 1]]))
    with pytest.raises(ValueError, match=r"but is 2\. 1 is yes"):
        loss(0.5, 2)
    bad = np.array([[0, 1], [1, 2**32 + 1]])
    good = np.array([[True, True], [True, False]])
    for options in ({"where": good}, {"weights": good * 1.0}, {"where": jnp.asarray(good)}):
        f = functools.partial(loss, labels=bad, **options)
        assert np.isfinite(jax.jit(f)(jnp.zeros((2, 2)))).all()
    with pytest.raises(ValueError, match=r"\[1, 1\]"):
        loss(jnp.zeros((2, 2)), bad, where=jnp.ones((2, 2), bool))
    # a traced mask that does not hide it: NaN, not class 1
    traced = jax.jit(lambda where: loss(jnp.zeros((2, 2)), bad, where=where))
    assert np.isnan(traced(jnp.ones((2, 2), bool))[1, 1])


def test_labels_under_checkify():
    loss = sigmoid_cross_entropy
    z, bad = jnp.zeros((2, 3)), jnp.int32([[0, 1, 0], [0, 3, 1]])
    text = (
        f"jaxent.{loss.__name__}: `labels` must be in [0, 1], but element 4 (counted over the flattened "
        "array) is 3. 1 is yes, 0 is no; hide an element with `where=`."
    )
    error, _ = checkify.checkify(jax.jit(jax.vmap(jax.grad(lambda z, y: loss(z, y).sum()))))(z, bad)
    assert "`labels` must be in [0, 1], but element 4" in error.get()
    error, _ = checkify.checkify(jax.jit(loss))(z, bad)
    assert text in error.get()
    checkify.checkify(jax.jit(lambda z, y: loss(z, y, where=y < 2)))(z, bad)[0].throw()
    with pytest.raises(Exception, match="element 4"):
        jax.block_until_ready(chex.chexify(jax.jit(loss), async_check=False)(z, bad))


def test_checks_that_nobody_asked_for_are_free():
    z, y = jnp.zeros((4, 3)), jnp.zeros((4, 3))
    text = jax.jit(sigmoid_cross_entropy).lower(z, y).compile().as_text()
    assert " reduce(" not in text  # all(ok) is gone
