"""Gradients against the oracle: uneven cotangents, labels, confident rows, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import harness
import jaxent
import oracle
import test_values
from tables import some
from test_values import LOSSES, MEASURES, TINY, quick

FLUSHED = 4 * TINY  # a gradient below TINY, times its cotangent

# Every entry of these is one product or quotient: nothing cancels, so every entry is accurate by itself.
ELEMENTWISE = cases.PLAIN + cases.CONFIDENT


def both(case, dtype, quick):
    """Gradients by the logits (and a distribution), from jaxent and from the oracle; the loss beside them is right."""
    built, cotangent, want = wanted(case, dtype)
    options = built.options | {"dtype": dtype, "quick": quick}
    loss, got = harness.value_and_gradients(
        case.loss, built.logits, built.labels, cotangent=cotangent, **options
    )
    wanted_loss = LOSSES[case.loss](built.logits, built.labels, **built.options)
    harness.assert_within(loss, wanted_loss, test_values.allowed(case, dtype, wanted_loss), "value:")
    assert all(x.dtype == cases.NUMPY_DTYPES[dtype] for x in got)
    return built, got, want


def wanted(case, dtype):
    """The case, a cotangent of its loss, the oracle's gradients."""
    built = case.build(dtype)
    reduced = "reduction" in built.options
    cotangent = harness.cotangent_of(() if reduced else tuple(np.delete(built.logits.shape, case.axis)))
    want = LOSSES[case.loss](built.logits, built.labels, cotangent=cotangent, **built.options)
    return built, cotangent, [x for x in want if x is not None]


def row_size(x, axis):
    """The largest entry of a row: what the terms of an entry that cancel are rounded to."""
    return np.abs(x).max(axis, keepdims=True)


def allowed(case, dtype, want, roundings=1):
    """How far an entry of a gradient may be off, from any source of logits."""
    size, row = np.abs(want), row_size(want, case.axis)
    if dtype == "float64":
        return 1e-14 * (size if case in ELEMENTWISE else row)
    if dtype == "float32":
        if case in ELEMENTWISE:
            return 1e-6 * size + FLUSHED
        return (np.minimum(2e-6 * size, 2e-6 * row) if case.gap else 2e-6 * row) + FLUSHED
    float32_error = 1e-6 * size + (0 if case in ELEMENTWISE else 2e-6 * row)
    return roundings * harness.spacing(want, dtype) / 2 + float32_error


@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
def test_every_entry_in_float32(case):
    _, (got,), (want,) = both(case, "float32", quick=False)
    harness.assert_within(got, want, allowed(case, "float32", want))


@pytest.mark.parametrize("case", cases.CONFIDENT, ids=str)
def test_at_the_label_of_confident_rows(case):
    built, (got,), (want,) = both(case, "float32", quick=False)
    at = built.labels[..., None]
    got, want = np.take_along_axis(got, at, -1), np.take_along_axis(want, at, -1)
    assert np.abs(want).min() < 1e-27
    harness.assert_within(got, want, 1e-6 * np.abs(want))


@pytest.mark.parametrize("quick", some([True], [True, False]))
@pytest.mark.parametrize("case", cases.OPTIONS, ids=str)
def test_options_in_float32(case, quick):
    _, got, want = both(case, "float32", quick)
    for g, w in zip(got, want, strict=True):
        harness.assert_within(g, w, allowed(case, "float32", w))
        assert (g[np.asarray(w) == 0] == 0).all()  # a row or class that is out of it: exactly


@pytest.mark.parametrize("case", cases.OPTIONS + cases.CONFIDENT[:1] + cases.PLAIN[-3:], ids=str)
def test_float64(case):
    _, got, want = both(case, "float64", quick=True)
    for g, w in zip(got, want, strict=True):
        harness.assert_within(g, w, allowed(case, "float64", w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", cases.HALF, ids=str)
def test_half_gradients_are_correctly_rounded(case, dtype):
    _, got, want = both(case, dtype, quick=True)
    for g, w in zip(got, want, strict=True):
        harness.assert_within(g, w, allowed(case, dtype, w))


@pytest.mark.parametrize("name", ["focal confident", "poly confident"])
def test_confident_rows_of_other_losses(name):
    (case,) = [case for case in cases.OPTIONS if case.name == name]
    built, (got,), (want,) = both(case, "float32", quick=False)
    visible = np.abs(want) > 1e-37
    assert visible[np.arange(len(want)), built.labels].all()
    harness.assert_within(got, want, allowed(case, "float32", want))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics(dtype):
    check_statistics(dtype, "dense")


def check_statistics(dtype, source):
    built = cases.Case("statistics", (12,), 300, masks=("where", "class_mask")).build(dtype)
    names = ("log_prob", "log_normalizer", "entropy", "mean_log_prob")
    with jax.enable_x64(dtype == "float64"), harness.blocks(source):

        def f(z, y):
            found = harness.call("softmax_statistics", source, [z, y], built.options)
            return jnp.stack([getattr(found, name) for name in names])

        z, y = harness.cast(built.logits, dtype), jnp.asarray(built.labels)
        ct = harness.cotangent_of((4, 12))
        compiler = harness.QUICK if quick(dtype, source) else harness.FULL
        pull = jax.jit(lambda z, y, ct: jax.vjp(lambda z: f(z, y), z)[1](ct)[0], compiler_options=compiler)
        pulled = {name: np.where(np.arange(4)[:, None] == i, ct, 0) for i, name in enumerate(names)} | {
            "all": ct
        }
        for name, c in pulled.items():
            got = np.asarray(pull(z, y, harness.cast(c, dtype)))
            cotangents = dict(zip(names, c, strict=True))
            want = oracle.softmax_statistics(
                built.logits, built.labels, cotangents=cotangents, **built.options
            )
            rtol = 1e-14 if dtype == "float64" else 2e-6
            harness.assert_within(got, want, rtol * row_size(want, -1), name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MEASURES)
def test_divergences(name, dtype):
    check_divergences(name, dtype, "dense")


def check_divergences(name, dtype, source):
    steps = (1e-3, 0.1, 1.0, 5.0, 20.0)
    pairs = [cases.pair(step, rows=12, dtype=dtype) for step in steps]
    z, t = np.concatenate([p.logits for p in pairs]), np.concatenate([p.target_logits for p in pairs])
    ct = harness.cotangent_of(z.shape[:1])
    options = {"class_mask": np.arange(12) != 3, "where": np.arange(60) % 5 != 2}
    options["temperature"] = 2.0
    how = {"dtype": dtype, "source": source, "quick": quick(dtype, source)}
    got = harness.gradients(name, z, t, cotangent=ct, **how, **options)
    want = MEASURES[name](z, t, cotangent=ct, **options)
    eps = 2e-15 if dtype == "float64" else 3e-7
    for g, w in zip(got, want, strict=True):
        # near 0 the gradient is a difference of probabilities that differ by about the step
        allowed = 10 * eps * row_size(w, -1) * (1 + 0.2 / np.repeat(steps, 12)[:, None]) + eps
        harness.assert_within(g, w, allowed)


@pytest.mark.parametrize("name", MEASURES)
def test_divergences_of_confident_rows(name):
    """Both sure of the same class: the gradient there is a difference of two 1 - p, not of two p near 1."""
    z = np.array([[14.0, 0.5, -1.0, 0.0], [25.0, 1.0, -1.0, 0.0]])
    t = np.array([[14.0, -1.0, 0.25, 0.0], [22.0, -1.0, 0.5, 2.0]])
    got = harness.gradients(name, z, t, cotangent=np.ones(2))
    want = MEASURES[name](z, t, cotangent=np.ones(2))
    for g, w in zip(got, want, strict=True):
        harness.assert_within(g, w, 1e-5 * row_size(w, -1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_entropy(dtype):
    check_entropy(dtype, "dense")


def check_entropy(dtype, source):
    for case in (cases.Case("ordinary", (30,), 9), cases.Case("confident", (30,), 300, scale=1, gap=60)):
        z = case.build(dtype).logits
        ct = harness.cotangent_of((30,))
        options = {"dtype": dtype, "source": source, "quick": quick(dtype, source)}
        (got,) = harness.gradients("softmax_entropy", z, cotangent=ct, **options)
        want = oracle.softmax_entropy(z, cotangent=ct).logits
        harness.assert_within(got, want, (1e-14 if dtype == "float64" else 4e-6) * row_size(want, -1))


def test_gradient_by_weights():
    """A mean has the derivative (loss - mean) / sum(w) by a row's weight."""
    built = cases.Case("weights", (20,), 6, masks=("weights",)).build("float32")
    weights = built.options["weights"]
    z, y = harness.cast(built.logits, "float32"), jnp.asarray(built.labels)
    f = jax.grad(lambda w: jaxent.softmax_cross_entropy(z, y, weights=w, reduction="mean"))
    got = jax.jit(f, compiler_options=harness.FULL)(harness.cast(weights, "float32"))
    rows = oracle.softmax_cross_entropy(built.logits, built.labels)
    assert (weights == 0).any()
    want = (rows - oracle.mean(rows, weights=weights)) / weights.sum()
    harness.assert_within(got, want, 2e-6 * np.abs(want).max())


def test_labels_of_another_dtype_get_their_gradient_in_it():
    built = cases.Case("mixed", (5,), 6, labels="distribution").build("bfloat16")
    z, q = harness.cast(built.logits, "bfloat16"), harness.cast(built.labels, "float32")
    f = jax.grad(lambda z, q: jaxent.softmax_cross_entropy(z, q, reduction="sum"), (0, 1))
    dz, dq = jax.jit(f, compiler_options=harness.FULL)(z, q)
    assert dz.dtype == jnp.bfloat16 and dq.dtype == jnp.float32
    want = oracle.softmax_cross_entropy(built.logits, built.labels, cotangent=np.ones(5))
    harness.assert_within(dq, want.labels, 1e-6 * np.abs(want.labels))
