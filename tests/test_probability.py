"""Losses on probabilities: values, gradients, hostile input, transformations."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import oracle_elementwise as oracle
from harness import FULL, assert_within, cotangent_of, spacing
from jaxent import binary_cross_entropy, categorical_cross_entropy, kl_divergence, nll_loss

DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
N, V = 40, 7
CLASS_WEIGHTS = np.float32([1, 0.5, 2, 0, 3, 1, 0.25])


def inputs(dtype, seed=0):
    """Probabilities with exact zeros and ones, a distribution with zeros, class indices, yes/no labels."""
    rng = np.random.default_rng(seed)
    p, q = (np.exp(rng.normal(0, scale, (N, V))) for scale in (3, 1))
    p, q = p / p.sum(-1, keepdims=True), np.where(q < 0.5, 0, q)
    q /= q.sum(-1, keepdims=True)
    q[p < 2e-3] = 0
    p[p < 2e-3] = 0
    p[0], q[0] = np.eye(V)[2], np.eye(V)[2]
    index = p.argmax(-1)
    index[1:20] = np.argsort(p, -1)[1:20, -2]
    return p.astype(dtype), q.astype(dtype), index.astype(np.int32), rng.uniform(0, 1, (N, V)).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(f, g, *args):
    out, vjp = jax.vjp(f, *args)
    return out, *vjp(g.astype(out.dtype))


def check(found, want, cotangent, dtype, wide, terms, sizes=None):
    """Values within `terms` roundings of the summed sizes; gradients too, and rounded once to their dtype."""
    unit = np.longdouble(np.finfo(wide).eps / 2)
    (out, *gradients), (value, *slopes) = found, want
    assert out.dtype == wide
    assert_within(
        out, value, terms * unit * np.where(np.isfinite(value), np.maximum(1, np.abs(value)), 0), "loss"
    )
    for got, slope, size in zip(gradients, slopes, sizes or slopes, strict=True):
        assert got.dtype == dtype
        factor = cotangent.reshape(cotangent.shape + (1,) * (got.ndim - cotangent.ndim))
        size = np.where(np.isfinite(size), np.abs(factor) * np.abs(np.where(np.isfinite(size), size, 0)), 0)
        once = 0 if dtype == wide else spacing(size, np.dtype(dtype).name)
        assert_within(got, factor * slope, 8 * unit * size + once, "gradient")


def check_all(dtype, wide):
    p, q, index, y = inputs(dtype)
    g, each = cotangent_of((N,)), cotangent_of((N, V))
    with np.errstate(divide="ignore"):
        log_p = np.log(p.astype(np.float64)).astype(dtype)

    @functools.partial(jax.jit, compiler_options=FULL)
    def everything(p, log_p, y):
        weighted = functools.partial(nll_loss, class_weights=CLASS_WEIGHTS)
        return [
            value_and_gradients(lambda p: categorical_cross_entropy(p, index), g, p),
            value_and_gradients(lambda p: categorical_cross_entropy(p, q), g, p),
            value_and_gradients(lambda x: nll_loss(x, index), g, log_p),
            value_and_gradients(lambda x: weighted(x, index), g, log_p),
            value_and_gradients(lambda x: weighted(x, q), g, log_p),
            value_and_gradients(lambda x: kl_divergence(x, q), g, log_p),
            value_and_gradients(binary_cross_entropy, each, p, y),
        ]

    one_hot = oracle.one_hot(index, V)
    wanted = [
        oracle.categorical_cross_entropy(p, one_hot),
        oracle.categorical_cross_entropy(p, q),
        oracle.nll_loss(log_p, one_hot),
        oracle.nll_loss(log_p, one_hot, CLASS_WEIGHTS),
        oracle.nll_loss(log_p, q, CLASS_WEIGHTS),
        oracle.kl_divergence(log_p, q),
    ]
    *rows, elements = everything(p, log_p, y)
    for found, want, roundings in zip(rows, wanted, (4, 16, 4, 16, 16, 16), strict=True):
        check(found, want, g, dtype, wide, roundings)
    want = oracle.binary_cross_entropy(p, y)
    p, y = p.astype(float), y.astype(float)
    with np.errstate(divide="ignore"):  # its gradients are differences of two terms
        sizes = (y / p + (1 - y) / (1 - p), -np.log(p) - np.log1p(-p))
    check(elements, want, each, dtype, wide, 16, sizes)


@dtypes
def test_accuracy(dtype):
    check_all(dtype, np.float32)


def test_accuracy_in_float64(x64):
    check_all(np.float64, np.float64)


def test_binary_cross_entropy_within_ulps(x64):
    """At the edges of its branches, and where XLA's log1p is poor."""
    for dtype, ulps in ((np.float32, 4), (np.float64, 4)):
        p = np.concatenate([np.linspace(1e-6, 0.999, 4000), 0.25 + np.arange(-5, 5) * 1e-7]).astype(dtype)
        found = jax.jit(binary_cross_entropy, compiler_options=FULL)(p, np.zeros(p.shape, bool))
        want, *_ = oracle.binary_cross_entropy(p, np.zeros_like(p))
        assert_within(found, want, ulps * spacing(want, np.dtype(dtype).name))


def test_gradients_of_float_labels():
    p = jnp.float32([[0.5, 0.0, 0.5], [0.0, 0.25, 0.75]])
    q = jnp.float32([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    log_p = jnp.log(p)
    minus_log_p = np.float32(
        [[np.log(2), 0, np.log(2)], [0, np.log(4), -np.log(0.75)]]
    )  # 0 * inf counts as 0
    for f in (lambda q: categorical_cross_entropy(p, q), lambda q: nll_loss(log_p, q)):
        np.testing.assert_allclose(jax.jit(jax.grad(lambda q, f=f: f(q).sum()))(q), minus_log_p, rtol=1e-6)
    d = jax.jit(jax.grad(lambda q: kl_divergence(log_p, q).sum()))(q)
    np.testing.assert_allclose(
        d, minus_log_p + np.where(q > 0, np.log(np.where(q > 0, q, 1)) + 1, 0), rtol=1e-6
    )
    d = jax.jit(jax.grad(lambda y: binary_cross_entropy(p[1], y).sum()))(jnp.float32([0, 0, 1]))
    np.testing.assert_allclose(d, [0, np.log(3), -np.log(3)], rtol=1e-6)


def test_never_clips():
    inf = np.inf
    p = jnp.float32([[0, 1], [2e-38, 1], [1, 0]])
    index = jnp.int32([0, 0, 0])
    out, d = value_and_gradients(lambda p: categorical_cross_entropy(p, index), np.ones(3), p)
    np.testing.assert_allclose(out, [inf, -np.log(np.float32(2e-38)), 0], rtol=1e-6)
    np.testing.assert_allclose(d, [[-inf, 0], [-5e37, 0], [-1, 0]], rtol=1e-6)
    out, d = value_and_gradients(
        lambda p: binary_cross_entropy(p, jnp.float32([1, 0, 1, 0])), np.ones(4), jnp.float32([0, 0, 1, 1])
    )
    np.testing.assert_array_equal(out, [inf, 0, 0, inf])
    np.testing.assert_array_equal(d, [-inf, 1, -1, inf])
    log_p = jnp.log(p)
    out, d = value_and_gradients(lambda x: nll_loss(x, index), np.ones(3), log_p)
    np.testing.assert_array_equal(d, [[-1, 0]] * 3)
    assert out[0] == inf
    out, d = value_and_gradients(lambda x: kl_divergence(x, jnp.float32([[0.5, 0.5]] * 3)), np.ones(3), log_p)
    np.testing.assert_array_equal(np.isinf(out), [True, False, True])
    np.testing.assert_array_equal(d, -0.5)


REDUCTIONS = ("none", "sum", "mean")
PROBS = np.float32(
    [[0.5, 0.5, 0], [0.25, 0.25, 0.5], [1.5, 0, 0], [-0.1, 0.5, 0.5], [np.nan, 0.5, 0.5], [0, 0, 1]]
)
TARGET = np.float32([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]])
GOOD_ROW = np.array([True, True, False, False, False, True])


def assert_poisoned(bad, *found):
    for x in found:
        np.testing.assert_array_equal(
            np.isnan(x), np.broadcast_to(bad.reshape(-1, *[1] * (x.ndim - 1)), x.shape)
        )


def test_probabilities_outside_the_unit_interval_poison_their_row():
    for labels in (np.int32([0, 1, 1, 2, 1, 2]), TARGET):
        f = functools.partial(lambda p, labels: categorical_cross_entropy(p, labels), labels=labels)
        assert_poisoned(~GOOD_ROW, *value_and_gradients(f, np.ones(6), PROBS))
        p, dot = jnp.asarray(PROBS), jnp.ones_like(PROBS)
        assert_poisoned(~GOOD_ROW, jax.jit(lambda p, dot, f=f: jax.jvp(f, (p,), (dot,))[1])(p, dot))
    # both arguments of a divergence
    assert_poisoned(
        ~GOOD_ROW, *value_and_gradients(kl_divergence, np.ones(6), np.zeros((6, 3), np.float32), PROBS)
    )
    labels = np.float32([0, 1, 0.5, 1, 0, 1])
    bad = np.array([False, False, True, True, True, False])
    p = np.float32([0.5, 0.5, 1.5, -0.1, np.nan, 1])
    assert_poisoned(bad, *value_and_gradients(binary_cross_entropy, np.ones(6), p, labels))
    assert_poisoned(bad, *value_and_gradients(binary_cross_entropy, np.ones(6), labels, p))  # and bad labels


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int8, np.uint32])
def test_bad_indices_poison_their_row(dtype):
    top = np.iinfo(dtype).max
    labels = jnp.asarray(np.array([0, 3, -1 if dtype == np.int32 else top, 2, 100, 1], dtype))
    bad = np.array([False, True, True, False, True, False])
    p = np.full((6, 3), 1 / 3, np.float32)

    @jax.jit
    def f(p, labels):
        def both(p):
            log_p = jnp.log(p)
            weighted = nll_loss(log_p, labels, class_weights=np.float32([0, 1, 1]))
            return categorical_cross_entropy(p, labels), nll_loss(log_p, labels), weighted

        out, vjp = jax.vjp(both, p)
        mean = nll_loss(jnp.log(p), jnp.full(6, 3), class_weights=np.zeros(3), reduction="mean")
        return (*out, *vjp((jnp.ones(6),) * 3)), mean

    found, mean = f(p, labels)
    assert_poisoned(bad, *found)
    assert np.isnan(mean)
    assert_poisoned(bad, *value_and_gradients(lambda x: nll_loss(x, labels), np.ones(6), np.log(p)))


def test_masked_means_gone():
    labels = np.int32([0, 1, -100, 7, 1, 2])
    w = GOOD_ROW * np.float32([2, 1, 1, 1, 1, 0.5])
    with np.errstate(all="ignore"):
        log_probs = np.where(GOOD_ROW[:, None], np.log(PROBS), np.nan).astype(np.float32)
    y = np.where(GOOD_ROW[:, None], TARGET, 7).astype(np.float32)
    wide = np.broadcast_to(GOOD_ROW[:, None], (6, 3))
    ok = np.where(GOOD_ROW, labels, 0)
    with np.errstate(all="ignore"):
        rows = {
            "categorical": (lambda p, **k: categorical_cross_entropy(p, jnp.asarray(labels), **k), PROBS,
                            oracle.categorical_cross_entropy(np.where(wide, PROBS, 1), oracle.one_hot(ok, 3))[0]),
            "distribution": (lambda p, **k: categorical_cross_entropy(p, y, **k), PROBS,
                             oracle.categorical_cross_entropy(np.where(wide, PROBS, 1), TARGET)[0]),
            "nll": (lambda x, **k: nll_loss(x, jnp.asarray(labels), **k), log_probs,
                    oracle.nll_loss(np.where(wide, log_probs, 0), oracle.one_hot(ok, 3))[0]),
            "kl": (lambda x, **k: kl_divergence(x, y, **k), log_probs,
                   oracle.kl_divergence(np.where(wide, log_probs, 0), TARGET)[0]),
        }  # fmt: skip
    every = [
        (options, reduction) for options in ({"where": GOOD_ROW}, {"weights": w}) for reduction in REDUCTIONS
    ]
    for name, (f, x, want) in rows.items():

        @jax.jit
        def everything(x, f=f):
            fs = [functools.partial(f, reduction=reduction, **options) for options, reduction in every]
            return [(g(x), jax.grad(lambda x, g=g: g(x).sum())(x)) for g in fs]

        for (options, reduction), (found, d) in zip(every, everything(x), strict=True):
            expected = oracle.reduce(want, reduction, **options).astype(np.float32)
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
            np.testing.assert_array_equal(d[~GOOD_ROW], 0)
            assert not np.isnan(d).any()
    f = functools.partial(binary_cross_entropy, where=wide, reduction="mean")
    out, d, dy = value_and_gradients(f, np.float32(1), PROBS, y)
    assert np.isfinite(out)
    np.testing.assert_array_equal(d[~GOOD_ROW], 0)
    np.testing.assert_array_equal(dy[~GOOD_ROW], 0)
    out, d = value_and_gradients(
        lambda p: categorical_cross_entropy(p, labels, where=np.zeros(6, bool), reduction="mean"),
        np.ones(()),
        PROBS,
    )
    assert out == 0
    np.testing.assert_array_equal(d, 0)
    empty = np.zeros((0, 3), np.float32)
    assert jax.jit(lambda: categorical_cross_entropy(empty, np.zeros(0, int), reduction="mean"))() == 0
    assert jax.jit(lambda: binary_cross_entropy(empty, empty, reduction="mean"))() == 0


def test_nll_options():
    log_p = jnp.log(jnp.float32([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]]))
    labels, w = jnp.int32([0, 2, 1, -100]), np.float32([2, 0, 1])
    f = functools.partial(nll_loss, ignore_index=-100, class_weights=w)
    np.testing.assert_allclose(jax.jit(f)(log_p, labels), [2 * np.log(2), -np.log(0.7), 0, 0], rtol=1e-6)
    mean, d = jax.jit(jax.value_and_grad(lambda x: f(x, labels, reduction="mean")))(log_p)
    np.testing.assert_allclose(mean, (2 * np.log(2) - np.log(0.7)) / 3, rtol=1e-6)
    np.testing.assert_allclose(d, [[-2 / 3, 0, 0], [0, 0, -1 / 3], [0, 0, 0], [0, 0, 0]], rtol=1e-6)
    # the mean of a distribution divides by rows, as torch does
    q = jnp.float32([[0.5, 0.5, 0], [0, 0, 1], [1, 0, 0], [0.25, 0.5, 0.25]])
    rows, _ = oracle.nll_loss(np.asarray(log_p), np.asarray(q), w)
    mean = jax.jit(lambda: nll_loss(log_p, q, class_weights=w, reduction="mean"))()
    np.testing.assert_allclose(mean, np.float32(rows.mean()), rtol=1e-6)


def test_axis():
    p, q, index, _ = inputs(np.float32)
    p, q, index = p.reshape(4, 10, V), q.reshape(4, 10, V), index.reshape(4, 10)

    @jax.jit
    def everything():
        found = [(kl_divergence(np.moveaxis(p, -1, 0), np.moveaxis(q, -1, 0), axis=0), kl_divergence(p, q))]
        for f in (categorical_cross_entropy, nll_loss):
            moved = functools.partial(f, np.moveaxis(p, -1, 1), axis=1)
            found += [(moved(index), f(p, index)), (moved(np.moveaxis(q, -1, 1)), f(p, q))]
        return found

    for a, b in everything():
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_identities():
    rng = np.random.default_rng(3)
    p, q = (np.exp(rng.normal(0, 2, (5, V))).astype(np.float32) for _ in range(2))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    labels = np.array([0, 1, 1, 0, 1])

    @jax.jit
    def everything(p, q):
        cross, log_p, two = categorical_cross_entropy(p, q), jnp.log(p), jnp.stack([1 - p[:, 0], p[:, 0]], -1)
        return [
            (cross, nll_loss(log_p, q)),
            (cross, kl_divergence(log_p, q) + categorical_cross_entropy(q, q)),
            (categorical_cross_entropy(two, labels), binary_cross_entropy(p[:, 0], labels)),
        ]

    for a, b in everything(p, q):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_transformations():
    p, q, index, _ = inputs(np.float32)
    q = np.where(p == 0, 0, np.maximum(q, 0.01))
    p = np.where(p == 0, np.float32(0.01), p)
    cases = {
        "categorical": (lambda p: categorical_cross_entropy(p, index).sum(), p,
                        lambda p: oracle.one_hot(index, V) / p**2),
        "distribution": (lambda p: categorical_cross_entropy(p, q).sum(), p, lambda p: q / p**2),
        "binary": (lambda p: binary_cross_entropy(p, q).sum(), p, lambda p: q / p**2 + (1 - q) / (1 - p) ** 2),
        "nll": (lambda x: nll_loss(x, index).sum(), np.log(p), np.zeros_like),
        "kl": (lambda x: kl_divergence(x, q).sum(), np.log(p), np.zeros_like),
    }  # fmt: skip
    p = np.minimum(p, np.float32(0.99))
    dot = np.float32(np.random.default_rng(4).normal(size=p.shape))

    @functools.partial(jax.jit, static_argnums=0)
    def everything(f, x):
        d = jax.grad(f)(x)
        over, second = jax.jvp(jax.grad(f), (x,), (dot,))
        return {
            "jvp": (jax.jvp(f, (x,), (dot,))[1], jnp.vdot(d, dot)),
            "checkpoint": (jax.grad(jax.checkpoint(f))(x), d),
            "jacfwd": (jax.jacfwd(f)(x), d),
            "forward over reverse": (over, d),
            "reverse over reverse": (jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), dot))(x), second),
        }, second

    for name, (f, x, curvature) in cases.items():
        x = np.minimum(x, np.float32(0.99))
        found, second = everything(f, x)
        for what, (a, b) in found.items():
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"{name}: {what}")
        np.testing.assert_allclose(second, (curvature(x.astype(float)) * dot), rtol=1e-4, err_msg=name)


def test_batches():
    p, q, index, y = map(jnp.asarray, inputs(np.float32))
    log_p = jnp.log(jnp.maximum(p, 1e-3))
    cases = [
        (categorical_cross_entropy, (p, index)),
        (categorical_cross_entropy, (p, q)),
        (binary_cross_entropy, (p, y)),
        (nll_loss, (log_p, index)),
        (kl_divergence, (log_p, q)),
    ]

    @jax.jit
    def everything():
        scan = [jax.lax.scan(lambda c, row, f=f: (c, f(*row)), 0, args)[1] for f, args in cases]
        return [(f(*args), jax.vmap(f)(*args), x) for (f, args), x in zip(cases, scan, strict=True)]

    for want, *others in everything():
        for x in others:
            np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-7)


def test_class_axis_split_over_devices_is_not_gathered():
    """The label is selected, not gathered."""
    text = jax.jit(jax.grad(lambda x: nll_loss(x, jnp.int32([1, 2])).sum())).lower(
        np.zeros((2, 4), np.float32)
    )
    assert "gather" not in text.as_text() and "scatter" not in text.as_text()
