"""Elementwise losses from logits: values, gradients, hostile input, errors, transformations."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify

import oracle_elementwise as oracle
from harness import FULL, assert_within, cotangent_of, spacing
from jaxent import sigmoid_asymmetric_loss, sigmoid_cross_entropy, sigmoid_focal_loss

LOSSES = [sigmoid_cross_entropy, sigmoid_focal_loss, sigmoid_asymmetric_loss]
ORACLES = {
    sigmoid_cross_entropy: oracle.sigmoid_loss,
    sigmoid_focal_loss: oracle.sigmoid_focal_loss,
    sigmoid_asymmetric_loss: oracle.sigmoid_asymmetric_loss,
}
# loss, options, ulps of the loss, relative error of the gradient: in units of 2**-24 (float32) or 2**-53
FORMS = {
    "plain": (sigmoid_cross_entropy, {}, 4, 33),
    "pos_weight": (sigmoid_cross_entropy, {"pos_weight": 3.25}, 4, 33),
    "smoothed": (sigmoid_cross_entropy, {"label_smoothing": 0.125}, 4, 33),
    "focal": (sigmoid_focal_loss, {}, 16, 33),
    "focal_0": (sigmoid_focal_loss, {"gamma": 0.0, "alpha": 0.25}, 5, 33),
    "focal_alpha": (sigmoid_focal_loss, {"gamma": 0.5, "alpha": 0.25}, 16, 33),
    "focal_steep": (sigmoid_focal_loss, {"gamma": 5.0, "label_smoothing": 0.125}, 33, 33),
    "focal_odd": (sigmoid_focal_loss, {"gamma": 1.7}, 33, 33),
    "asymmetric": (sigmoid_asymmetric_loss, {}, 65, 66),
    "asymmetric_all": (
        sigmoid_asymmetric_loss,
        {
            "gamma_negative": 1.5,
            "gamma_positive": 0.0,
            "clip": 0.25,
            "pos_weight": 0.5,
            "label_smoothing": 0.25,
        },
        33,
        66,
    ),
    "asymmetric_off": (
        sigmoid_asymmetric_loss,
        {"gamma_negative": 0.0, "gamma_positive": 0.0, "clip": 0.25},
        16,
        33,
    ),
}
forms = pytest.mark.parametrize("form", FORMS)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


@functools.cache
def compiled(form):
    loss, options, *_ = FORMS[form]

    def f(z, y, g):
        out, vjp = jax.vjp(functools.partial(loss, **options), z, y)
        return out, *vjp(g)

    return jax.jit(f, compiler_options=FULL)


def numbers(dtype, reach=80.0):
    """Logits of every size, with the three kinds of labels each."""
    rng = np.random.default_rng(0)
    edges = [0.0, 1e-30, -1e-30, 17.0, -17.0, 16.6355, 88.0, 1e-4]
    # just above the clip; in float64 the oracle's own p - clip is too coarse for less
    clip = -np.log(19) + rng.normal(0, 0.1 if dtype == np.float64 else 1e-4, 300)
    z = np.concatenate(
        [rng.normal(0, 3, 1500), rng.uniform(-reach, reach, 700), rng.normal(0, 1e-3, 200), clip, edges]
    )
    z = np.tile(z.astype(dtype), 3)
    kind = np.repeat(np.arange(3), z.size // 3)
    y = np.where(kind == 2, rng.uniform(0, 1, z.size), kind).astype(dtype)
    return z, y


def check(form, dtype, wide):
    loss, options, ulps, parts = FORMS[form]
    z, y = numbers(dtype)
    want, dz, dy, _ = ORACLES[loss](z, y, **options)
    scale = sum(np.abs(ORACLES[loss](z, np.full_like(z, side), **options)[1]) * weight for side, weight in
                ((1, np.abs(y.astype(float)) + options.get("label_smoothing", 0)),
                 (0, np.abs(1 - y.astype(float)) + options.get("label_smoothing", 0))))  # fmt: skip
    value_scale = np.maximum(
        *(np.abs(ORACLES[loss](z, np.full_like(z, side), **options)[0]) for side in (0, 1))
    )
    g = cotangent_of(z.shape)
    out, d_logits, d_labels = compiled(form)(jnp.asarray(z), jnp.asarray(y), jnp.asarray(g.astype(wide)))
    assert out.dtype == wide and d_logits.dtype == d_labels.dtype == dtype
    unit = np.longdouble(2.0**-53 if wide == np.float64 else 2.0**-24)
    tiny = 1e-300 if wide == np.float64 else 1e-35  # products of factors leave the range a little earlier
    assert_within(out, want, ulps * spacing(want, np.dtype(wide).name) + tiny, "loss")
    size = np.abs(g)
    name = np.dtype(dtype).name
    half = 0 if dtype == wide else spacing(g * dz, name) * 0.502  # correctly rounded to its dtype
    assert_within(d_logits, g * dz, size * (parts * unit * scale + tiny) + half, "gradient")
    half = 0 if dtype == wide else spacing(g * dy, name) * 0.502
    assert_within(d_labels, g * dy, size * (66 * unit * value_scale + tiny) + half, "label gradient")


@forms
def test_accuracy(form):
    check(form, np.float32, np.float32)


@pytest.mark.parametrize("form", ["plain", "focal_alpha", "asymmetric_all"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_accuracy_of_half_types(form, dtype):
    check(form, dtype, np.float32)


@pytest.mark.parametrize("form", ["plain", "smoothed", "focal_odd", "asymmetric", "asymmetric_all"])
def test_accuracy_in_float64(form, x64):
    check(form, np.float64, np.float64)


def test_label_gradient_of_cross_entropy_is_the_logit():
    z = np.array([1e-8, -1e-8, 3e-4, 40.0, -90.0], np.float32)
    d = jax.jit(jax.grad(lambda y: sigmoid_cross_entropy(z, y).sum()))(np.full(5, 0.25, np.float32))
    np.testing.assert_array_equal(d, -z)


def test_confident_elements_keep_their_digits():
    z = jnp.array([17.0, 40.0, 70.0])
    f = jax.value_and_grad(lambda z: sigmoid_cross_entropy(z, jnp.ones(3)).sum())
    out, d = jax.jit(f, compiler_options=FULL)(z)
    assert out > 4e-8
    np.testing.assert_allclose(d, -np.exp(-np.float64(z)), rtol=2e-6)


@losses
def test_symmetry_bit_for_bit(loss):
    options = (
        {"gamma_negative": 2.0, "gamma_positive": 2.0, "clip": 0.0} if loss is sigmoid_asymmetric_loss else {}
    )
    z = jnp.asarray(numbers(np.float32)[0])

    @functools.partial(jax.jit, compiler_options=FULL)
    def both(z, y):
        out, vjp = jax.vjp(lambda z: loss(z, y, **options), z)
        return out, vjp(jnp.ones_like(out))[0]

    positive, negative = both(z, jnp.ones_like(z)), both(-z, jnp.zeros_like(z))
    np.testing.assert_array_equal(positive[0], negative[0])
    np.testing.assert_array_equal(positive[1], -negative[1])


def test_identities():
    z, y = map(jnp.asarray, numbers(np.float32))
    asymmetric = functools.partial(sigmoid_asymmetric_loss, clip=0.0, gamma_positive=3.0, gamma_negative=3.0)

    @jax.jit
    def everything(z, y):
        return [
            (sigmoid_focal_loss(z, y, gamma=0.0), sigmoid_cross_entropy(z, y)),
            (sigmoid_focal_loss(z, y, alpha=0.5), 0.5 * sigmoid_focal_loss(z, y)),
            (asymmetric(z, y), sigmoid_focal_loss(z, y, gamma=3.0)),
            (
                sigmoid_cross_entropy(z, y, label_smoothing=1.0),
                sigmoid_cross_entropy(z, jnp.full_like(y, 0.5)),
            ),
        ]

    for a, b in everything(z, y):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-35)


@losses
def test_infinite_logits(loss):
    inf = np.inf
    z, y = np.float32([inf, inf, inf, -inf, -inf, -inf]), np.float32([1, 0, 0.5, 0, 1, 0.5])

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FULL)
    def everything(smoothing, w, z, y):
        f = functools.partial(loss, pos_weight=w, label_smoothing=smoothing)
        out, vjp = jax.vjp(f, z, y)
        return out, *vjp(jnp.ones(6)), jax.vmap(jax.hessian(f))(z, y)

    for smoothing, w in ((0.0, 1.0), (0.0, 0.0), (0.0, 2.0)):
        *found, hessian = everything(smoothing, w, z, y)
        for got, want in zip(
            found, ORACLES[loss](z, y, pos_weight=w, label_smoothing=smoothing), strict=False
        ):
            np.testing.assert_allclose(got, want.astype(np.float32), rtol=1e-6)
        assert np.isfinite(hessian).all()
    if loss is sigmoid_cross_entropy:
        np.testing.assert_array_equal(loss(z, y), [0, inf, inf, 0, inf, inf])


@losses
def test_finite_extremes(loss):
    z = jnp.float32([3.4e38, -3.4e38, 1e30, -1e30, 1e-45])

    @functools.partial(jax.jit, compiler_options=FULL)
    def f(y):
        out, vjp = jax.vjp(loss, z, y)
        return out, vjp(jnp.ones(5))

    for y in (0.0, 1.0, 0.5):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(f(jnp.full(5, y))))


def test_kinds_of_labels():
    z = np.float32([0.5, -3.0, 2.0])
    kinds = [np.array([1, 0, 1], dtype) for dtype in (bool, np.int8, np.uint8, np.int32, np.uint32, np.int64)]

    @jax.jit
    def f(z, traced):
        return [
            jax.value_and_grad(lambda z, y=y: sigmoid_cross_entropy(z, y).sum())(z) for y in (*kinds, *traced)
        ]

    want, *others = f(z, [np.float32([1, 0, 1]), *kinds])[::-1]
    for found in others:
        chex.assert_trees_all_equal(found, want)


def test_scalars():
    labels = (True, 1, 1.0, np.float64(1), jnp.array(True))
    found = jax.jit(lambda: [sigmoid_cross_entropy(0.5, label) for label in labels])()
    np.testing.assert_allclose(found, np.log1p(np.exp(-0.5)), rtol=1e-6)


BAD_LABELS = {
    "float": [0.5, 1.0, 0.25, 1.5, -0.1, np.nan, 1.0],
    "integer": [0, 1, 1, 2, -1, 2**31 - 1, 1],
    "narrow": [0, 1, 1, 2, 255, 100, 1],
}
DTYPES = {"float": np.float32, "integer": np.int32, "narrow": np.uint8}


@losses
@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels_poison_their_element(loss, kind):
    labels = jnp.asarray(np.array(BAD_LABELS[kind], DTYPES[kind]))
    z = jnp.linspace(-2, 2, 7).at[6].set(jnp.nan)  # and so does a NaN logit

    @jax.jit
    def everything(z, w):
        moving = (z, labels, w) if kind == "float" else (z, w)

        def f(*moving):
            return loss(moving[0], moving[1] if kind == "float" else labels, pos_weight=moving[-1])

        out, vjp = jax.vjp(f, *moving)
        *gradients, d_weight = vjp(jnp.ones(7))
        assert d_weight.shape == ()
        return out, *gradients, jax.jvp(f, moving, jax.tree.map(jnp.ones_like, moving))[1]

    for x in everything(z, jnp.float32(2)):
        np.testing.assert_array_equal(np.isnan(x), np.arange(7) >= 3)


@pytest.mark.parametrize("loss", [sigmoid_cross_entropy, sigmoid_asymmetric_loss])
def test_masked_means_gone(loss):
    z = jnp.float32([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.5, jnp.nan, -2.0])
    y = jnp.float32([1.0, 0.0, 0.0, 1.0, 7.0, jnp.nan, 0.0])
    keep = jnp.array([True, False, False, False, False, False, True])
    w = jnp.float32([2.0, 0, 0, 0, 0, 0, 0.5])
    clean = jax.jit(loss)(np.float32([1.0, -2.0]), np.float32([1.0, 0.0]))

    @functools.partial(jax.jit, static_argnums=0)
    def everything(name, factors):
        f = functools.partial(loss, **{name: factors})
        out, vjp = jax.vjp(f, z, y)
        forward = jax.jvp(f, (z, y), (jnp.ones(7), jnp.ones(7)))[1]
        return (out, *vjp(jnp.asarray(cotangent_of((7,)), jnp.float32)), forward), f(z, y, reduction="mean")

    for name, factors, factor, total in (("where", keep, [1, 1], 2), ("weights", w, [2, 0.5], 2.5)):
        found, mean = everything(name, factors)
        for x in found:
            np.testing.assert_array_equal(x[1:6], 0)
            assert np.isfinite(x).all()
        np.testing.assert_allclose(found[0][np.array([0, 6])], clean * np.float32(factor))
        np.testing.assert_allclose(mean, (clean * np.float32(factor)).sum() / total, rtol=1e-6)
    nothing = functools.partial(loss, where=jnp.zeros(7, bool), reduction="mean")
    value, d = jax.jit(jax.value_and_grad(lambda z: nothing(z, y)))(z)
    assert value == 0
    np.testing.assert_array_equal(d, 0)
    empty = np.zeros((0, 3), np.float32)
    assert jax.jit(lambda: loss(empty, empty, reduction="mean"))() == 0
    assert jax.eval_shape(loss, empty, empty).shape == (0, 3)


@losses
def test_pos_weight(loss):
    rng = np.random.default_rng(1)
    z, y = rng.normal(0, 2, (2, 4, 3)).astype(np.float32), rng.uniform(0, 1, (2, 4, 3)).astype(np.float32)
    w = np.float32([0.5, 2.0, 3.0])
    g = cotangent_of(z.shape).astype(np.float32)

    @jax.jit
    def f(w):
        out, vjp = jax.vjp(lambda w: loss(z, y, pos_weight=w), w)
        return out, *vjp(g)

    for weight in (w, np.float32(1.5), np.float32(0)):
        want, *_, dw = ORACLES[loss](z, y, pos_weight=weight)
        out, d = f(weight)
        np.testing.assert_allclose(out, want.astype(np.float32), rtol=5e-6)
        dw = (g * dw).sum((0, 1)) if weight.ndim else (g * dw).sum()
        np.testing.assert_allclose(d, dw.astype(np.float32), rtol=2e-5)
    number, array = jax.jit(lambda: [loss(z, y, pos_weight=w) for w in (2, np.array([2, 2, 2]))])()
    np.testing.assert_array_equal(number, array)


@pytest.mark.parametrize("form", ["plain", "asymmetric_all"])
def test_second_derivatives(form, x64):
    loss, options, *_ = FORMS[form]
    options = {**options, "label_smoothing": 0.1}
    options.pop("pos_weight", None)
    z, y, w = jnp.array([0.3, -2.0, 5.0, 0.0, -1.0]), jnp.array([0.0, 1.0, 0.4, 0.7, 0.0]), jnp.array(2.0)

    def f(z, y, w):
        return (loss(z, y, pos_weight=w, **options) * jnp.arange(1.0, 6)).sum()

    @jax.jit
    def everything(z, y, w):
        both = (0, 1, 2)
        hessian = jax.hessian(f, both)(z, y, w)
        others = [jac(jac(f), both)(z, y, w) for jac in (jax.jacrev, jax.jacfwd)]
        # the value that comes with a gradient has a tangent of its own, also at a logit or a label of 0
        ones = jnp.ones_like(z)
        tangent = jax.jvp(lambda z, y: jax.value_and_grad(f)(z, y, w)[0], (z, y), (ones, ones))[1]
        return hessian, others, tangent, jax.grad(f, both)(z, y, w)

    @jax.jit
    def gradient(z):
        return jax.grad(f, (0, 1, 2))(z, y, w)

    hessian, others, tangent, first = everything(z, y, w)
    for other in others:
        chex.assert_trees_all_close(other, hessian[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(tangent, sum(d.sum() for d in first[:2]), rtol=1e-12)
    h = 1e-5
    for i in range(5):
        step = h * (np.arange(5) == i)
        want = jax.tree.map(lambda a, b: (a - b) / (2 * h), gradient(z + step), gradient(z - step))
        for k in range(3):
            np.testing.assert_allclose(hessian[k][0][..., i], want[k], rtol=1e-8, atol=1e-9)


@losses
def test_second_derivatives_of_confident_elements(loss):
    z = jnp.float32([-85, -50, -30, 30, 50, 85])
    hessian = jax.jit(jax.vmap(jax.hessian(loss), (0, None)), compiler_options=FULL)
    for y in (0.0, 1.0):
        d = hessian(z, y)
        assert np.isfinite(d).all()
        if loss is sigmoid_cross_entropy:
            np.testing.assert_allclose(d, np.exp(-np.abs(np.float64(z))), rtol=1e-6)


@pytest.mark.parametrize("loss", [sigmoid_cross_entropy, sigmoid_asymmetric_loss])
def test_transformations(loss):
    rng = np.random.default_rng(2)
    z, dot = map(jnp.float32, rng.normal(0, 3, (2, 6, 3)))
    y, w = jnp.float32(rng.uniform(0, 1, (6, 3))), jnp.float32([1, 2, 3])
    rows = functools.partial(loss, pos_weight=w, label_smoothing=0.1)

    def f(z, y):
        return jnp.vdot(rows(z, y), jnp.asarray(cotangent_of((6, 3)), jnp.float32))

    def by_scan(z):
        return jax.lax.scan(lambda c, zy: (c + rows(*zy).sum(), rows(*zy)), 0.0, (z, y))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def everything(z, y):
        primal, forward = jax.jvp(f, (z, y), (dot, 2 * dot))
        d = jax.grad(f, (0, 1))(z, y)
        return {
            "value": (primal, f(z, y)),
            "jvp": (forward, jnp.vdot(d[0], dot) + jnp.vdot(d[1], 2 * dot)),
            "linearize": (jax.linearize(f, z, y)[1](dot, 2 * dot), forward),
            "jacfwd": (jax.jacfwd(f)(z, y), d[0]),
            "jacrev": (jax.jacrev(f)(z, y), d[0]),
            "checkpoint": (jax.grad(jax.checkpoint(f))(z, y), d[0]),
            "vmap": (jax.vmap(rows)(z, y), rows(z, y)),
            "grad in vmap": (
                jax.vmap(jax.grad(lambda z, y: rows(z, y).sum()))(z, y),
                jax.grad(lambda z: rows(z, y).sum())(z),
            ),
            "scan": (by_scan(z)[1], rows(z, y)),
            "grad of scan": (
                jax.grad(lambda z: by_scan(z)[0])(z),
                jax.grad(lambda z: rows(z, y).sum())(z),
            ),
            "vmap over pos_weight": (
                jax.vmap(jax.grad(lambda w: loss(z, y, pos_weight=w).sum()))(w)[1],
                jax.grad(lambda w: loss(z, y, pos_weight=w).sum())(w[1]),
            ),
        }

    compiled = everything(z, y)
    for name, (a, b) in compiled.items():
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(jax.grad(f)(z, y), compiled["jacrev"][0], rtol=1e-6, atol=1e-7)


def test_half_precision_keeps_only_its_inputs():
    """The backward keeps the bf16 logits and the int8 labels, no widened copy of them."""
    z, y = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((4, 8), jnp.int8)
    _, vjp = jax.vjp(lambda z: sigmoid_cross_entropy(z, y), z)
    kept = {leaf.dtype for leaf in jax.tree.leaves(vjp) if getattr(leaf, "shape", ()) == (4, 8)}
    assert kept <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)}


def test_sums_in_float32():
    z = np.zeros(70_000, np.float16)
    out = jax.jit(lambda z: sigmoid_cross_entropy(z, np.ones(70_000, bool), reduction="sum"))(z)
    np.testing.assert_allclose(out, 70_000 * np.log(2), rtol=1e-5)


def test_float32_stays_float32(x64):
    z = np.zeros(3, np.float32)
    for loss in LOSSES:
        f = jax.value_and_grad(lambda z, loss=loss: loss(z, np.ones(3), pos_weight=np.ones(3)).sum())
        out, d = jax.eval_shape(f, z)
        assert out.dtype == d.dtype == jnp.float32


# errors, word for word

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
    (lambda f: f(Z, Y, pos_weight=np.ones((4, 3), np.float32)), ValueError,
     "jaxent.{f}: `pos_weight` must be of shape [3] (the last axis of `logits`, or a number), but is "
     "float32[4, 3]. It multiplies the positive half of the loss; for weights of elements use `weights`."),
    (lambda f: f(Z, Y, pos_weight=-1), ValueError,
     "jaxent.{f}: `pos_weight` must be a finite number >= 0, but is -1. "
     "It multiplies the positive half of the loss; for weights of elements use `weights`."),
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
        "`alpha` must be in [0, 1], but is 1.1. alpha=None leaves the balance",
    ),
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
        "`clip` must be in [0, 1), but is 1. It is a probability; 0 turns it off.",
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
    assert error(np.array([[0, 1], [1, 1 + 1e-12]])) == start + "1.000000000001 at index [1, 1]." + end
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
        "array) has label 3. 1 is yes, 0 is no; hide an element with `where=`."
    )
    error, _ = checkify.checkify(jax.jit(jax.vmap(jax.grad(lambda z, y: loss(z, y).sum()))))(z, bad)
    assert "`labels` must be in [0, 1], but element 1" in error.get()
    error, _ = checkify.checkify(jax.jit(loss))(z, bad)
    assert text in error.get()
    checkify.checkify(jax.jit(lambda z, y: loss(z, y, where=y < 2)))(z, bad)[0].throw()
    with pytest.raises(Exception, match="element 4"):
        jax.block_until_ready(chex.chexify(jax.jit(loss), async_check=False)(z, bad))


def test_checks_that_nobody_asked_for_are_free():
    z, y = jnp.zeros((4, 3)), jnp.zeros((4, 3))
    text = jax.jit(sigmoid_cross_entropy).lower(z, y).compile().as_text()
    assert "reduce" not in text  # all(ok) is gone
