"""Values against the oracle, with the tolerances that the documentation promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import harness
import jaxent
import oracle
from tables import some

TINY = float(np.finfo(np.float32).tiny)  # XLA on CPU may flush what is below to 0
LOSSES = {
    "softmax_cross_entropy": oracle.softmax_cross_entropy,
    "softmax_focal_loss": oracle.softmax_focal_loss,
    "softmax_poly_loss": oracle.softmax_poly_loss,
}


def quick(dtype, source="dense"):
    """Whether a quick compile will do: what XLA makes of float32 is measured."""
    return dtype != "float32" or source != "dense"


def both(case, dtype, quick):
    built = case.build(dtype)
    want = LOSSES[case.loss](built.logits, built.labels, **built.options)
    options = built.options | {"dtype": dtype, "quick": quick}
    got = harness.value(case.loss, built.logits, built.labels, **options)
    assert got.dtype == (np.float64 if dtype == "float64" else np.float32)
    return got, want


def allowed(case, dtype, want, lost=0):
    """How far a loss may be off, from any source of logits. `lost`: those of its terms that may be 0."""
    size = np.abs(want)
    if dtype != "float32":
        return size * (1e-14 if dtype == "float64" else 1e-6)
    if case in cases.PLAIN:
        return 4 * harness.spacing(want, "float32")
    if case in cases.CONFIDENT:
        return 1e-6 * size + lost
    return 1e-6 * size + TINY  # a few more roundings than the plain loss has


@pytest.mark.parametrize("case", cases.PLAIN, ids=str)
def test_ordinary_rows_within_4_ulp(case):
    got, want = both(case, "float32", quick=False)
    harness.assert_within(got, want, allowed(case, "float32", want))


@pytest.mark.parametrize("case", cases.CONFIDENT, ids=str)
def test_confident_rows_keep_their_digits(case):
    got, want = both(case, "float32", quick=False)
    assert want.min() < 1e-26
    harness.assert_within(got, want, allowed(case, "float32", want))


@pytest.mark.parametrize("quick", some([True], [True, False]))
@pytest.mark.parametrize("case", cases.OPTIONS, ids=str)
def test_options(case, quick):
    got, want = both(case, "float32", quick)
    harness.assert_within(got, want, allowed(case, "float32", want))


@pytest.mark.parametrize("case", some(cases.HALF, cases.CASES), ids=str)
def test_float64(case):
    got, want = both(case, "float64", quick=True)
    harness.assert_within(got, want, allowed(case, "float64", want))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", cases.HALF, ids=str)
def test_half_logits_are_computed_in_float32(case, dtype):
    got, want = both(case, dtype, quick=True)
    harness.assert_within(got, want, allowed(case, dtype, want))


def test_shift_by_10000_in_float32():
    rng = np.random.default_rng(3)
    z = (rng.normal(size=(200, 50)) * 4 + 1e4).astype(np.float32).astype(np.float64)
    labels = rng.integers(50, size=200)
    want = oracle.softmax_cross_entropy(z, labels)
    got = harness.value("softmax_cross_entropy", z, labels)
    harness.assert_within(got, want, 4 * harness.spacing(want, "float32"))
    shifted_back = harness.value("softmax_cross_entropy", z - 1e4, labels)  # exact: multiples of 2^-10
    harness.assert_within(shifted_back, want, 4 * harness.spacing(want, "float32"))


def test_a_million_classes_without_one_hot():
    rng = np.random.default_rng(4)
    z = rng.standard_normal((8, 1_000_000), dtype=np.float32)
    labels = rng.integers(1_000_000, size=8)
    f = jax.vmap(jax.value_and_grad(jaxent.softmax_cross_entropy))
    loss, gradient = jax.jit(f, compiler_options=harness.FULL)(jnp.asarray(z), jnp.asarray(labels))
    for row in (0, 7):
        want = oracle.softmax_cross_entropy(z[row], labels[row])
        harness.assert_within(loss[row], want, 4 * harness.spacing(want, "float32"))
        want = oracle.softmax_cross_entropy(z[row], labels[row], cotangent=1.0).logits
        harness.assert_within(gradient[row], want, 1e-6 * np.abs(want))


def test_a_million_classes_in_one_batch():
    rng = np.random.default_rng(5)
    z = rng.standard_normal((32, 1_000_000), dtype=np.float32) * 2
    labels = rng.integers(1_000_000, size=32)
    f = jax.jit(jaxent.softmax_cross_entropy, compiler_options=harness.FULL)
    got = np.asarray(f(jnp.asarray(z), jnp.asarray(labels)))
    for row in (0, 17, 31):
        want = oracle.softmax_cross_entropy(z[row], labels[row])
        harness.assert_within(got[row], want, 4 * harness.spacing(want, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", cases.STATISTICS, ids=str)
def test_statistics(case, dtype):
    check_statistics(case, dtype, "dense")


def check_statistics(case, dtype, source):
    built = case.build(dtype)
    want = oracle.softmax_statistics(built.logits, built.labels, **built.options)
    options = built.options | {"dtype": dtype, "source": source, "quick": quick(dtype, source)}
    got = harness.value("softmax_statistics", built.logits, built.labels, **options)
    got = vars(got)
    where = built.options.get("where", np.ones(want.entropy.shape, bool))
    rtol = 1e-14 if dtype == "float64" else 1e-6
    for name in ("log_prob", "entropy", "mean_log_prob"):
        harness.assert_within(got[name], getattr(want, name), rtol * np.abs(getattr(want, name)), name)
    # log-sum-exp has the rounding of the largest logit
    size = np.maximum(np.abs(want.log_normalizer), np.abs(built.logits).max() if case.offset else 1)
    harness.assert_within(got["log_normalizer"], want.log_normalizer, 4 * harness.spacing(size, dtype))
    assert (got["prediction"] == np.where(where, want.prediction, -1)).all()
    if want.rank is None:
        assert got["rank"] is None
    else:
        classes = built.logits.shape[built.options.get("axis", -1)]
        assert (got["rank"] == np.where(where, want.rank, classes)).all()
        assert got["rank"].dtype == got["prediction"].dtype == np.int32


def test_statistics_without_labels():
    z = np.array([[1.0, 4.0, 4.0, 2.0]])  # of several largest logits the first
    got = harness.value("softmax_statistics", z)
    assert got.log_prob is None and got.rank is None
    assert got.prediction == [1]


def test_rank_counts_strictly_larger_logits():
    z = np.array([[1.0, 4.0, 4.0, 2.0]] * 4)
    got = harness.value("softmax_statistics", z, np.arange(4))
    assert got.rank.tolist() == [3, 0, 0, 2]


MEASURES = {
    "softmax_kl_divergence": oracle.softmax_kl_divergence,
    "softmax_js_divergence": oracle.softmax_js_divergence,
}
STEPS = (1e-4, 1e-2, 0.3, 1.0, 4.0, 8.0, 20.0)


def divergence_tolerance(want, dtype):
    """In float64 a divergence of logits a step apart, step^2 / 2, has to be known to eps / step only."""
    return 1e-14 * want + 1e-14 * np.sqrt(want) if dtype == "float64" else 2e-6 * want


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MEASURES)
def test_divergences(name, dtype):
    check_divergences(name, dtype, "dense")


def check_divergences(name, dtype, source):
    pairs = [cases.pair(step, dtype=dtype) for step in STEPS]
    z, t = np.concatenate([p.logits for p in pairs]), np.concatenate([p.target_logits for p in pairs])
    want = MEASURES[name](z, t, temperature=2.0)
    options = {"dtype": dtype, "source": source, "quick": quick(dtype, source)}
    got = harness.value(name, z, t, temperature=2.0, **options)
    assert (got >= 0).all()
    harness.assert_within(got, want, divergence_tolerance(want, dtype))


@pytest.mark.parametrize("name", MEASURES)
def test_divergences_of_a_flat_and_a_sharp_distribution(name):
    """The ratio of the normalizers is nearly all of log(q / p) here."""
    z = np.random.default_rng(0).normal(size=(40, 11)) * np.repeat([3.0, 5, 10, 20], 10)[:, None]
    z = z.astype(np.float32).astype(np.float64)
    for inputs in ((z, z * 0), (z * 0, z), (z, -z)):
        want = MEASURES[name](*inputs)
        harness.assert_within(harness.value(name, *inputs), want, 2e-6 * want)


@pytest.mark.parametrize("name", MEASURES)
def test_divergences_of_many_classes(name):
    _, z, t = cases.pair(0.5, rows=5, classes=5003)
    want = MEASURES[name](z, t)
    harness.assert_within(harness.value(name, z, t), want, 2e-6 * want)


@pytest.mark.parametrize("name", MEASURES)
def test_divergences_of_confident_rows(name):
    z = np.array(
        [[14.0, 0.5, -1.0, 0.0], [45.0, 1.0, -1.0, 0.0], [30.0, 0.0, 0.0, 0.0], [0.0, 60.0, 0.0, 1.0]]
    )
    t = np.array(
        [[14.0, -1.0, 0.25, 0.0], [42.0, -1.0, 0.5, 2.0], [0.0, 30.0, 0.0, 0.0], [60.0, 0.0, 0.0, 1.0]]
    )
    want = MEASURES[name](z, t)
    harness.assert_within(harness.value(name, z, t), want, 2e-6 * want)


@pytest.mark.parametrize("name", MEASURES)
def test_divergences_with_masks(name):
    rng = np.random.default_rng(1)
    _, z, t = cases.pair(1.0)
    options = {
        "class_mask": rng.uniform(size=12) < 0.6,
        "where": rng.uniform(size=40) < 0.7,
        "weights": cases.rounded(rng.uniform(0, 2, size=40)),
    }
    for reduction in ("none", "mean"):
        want = MEASURES[name](z, t, reduction=reduction, **options)
        got = harness.value(name, z, t, reduction=reduction, quick=reduction == "mean", **options)
        harness.assert_within(got, want, 2e-6 * want)
    want = MEASURES[name](z.T, t.T, axis=0)
    harness.assert_within(harness.value(name, z.T, t.T, axis=0, quick=True), want, 2e-6 * want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_entropy(dtype):
    rng = np.random.default_rng(2)
    for case in (cases.Case("ordinary", (30,), 9), cases.Case("confident", (30,), 300, scale=1, gap=60)):
        z = case.build(dtype).logits
        options = {"where": rng.uniform(size=30) < 0.7, "weights": cases.rounded(rng.uniform(0, 2, size=30))}
        rtol = 1e-14 if dtype == "float64" else 1e-6
        for reduction in ("none", "mean"):
            want = oracle.softmax_entropy(z, reduction=reduction, **options)
            how = {"dtype": dtype, "quick": quick(dtype), "reduction": reduction}
            got = harness.value("softmax_entropy", z, **how, **options)
            harness.assert_within(got, want, rtol * want)


def test_softmax_loss_with_a_users_function():
    built = cases.Case("users", (6, 4), 40, masks=("where", "weights", "ignore_index", "class_mask")).build(
        "float32"
    )
    advantage = harness.cotangent_of((6, 4))
    s = oracle.softmax_statistics(
        built.logits, np.where(built.labels < 0, 0, built.labels), class_mask=built.options["class_mask"]
    )
    rows = -advantage * s.log_prob - 0.25 * s.entropy + 0.125 * s.log_normalizer**2
    counts = built.options["where"] & (built.labels != cases.IGNORED)
    want = oracle.mean(rows, where=counts, weights=built.options["weights"])

    def fn(s, advantage):
        return -advantage * s.log_prob - 0.25 * s.entropy + 0.125 * s.log_normalizer**2

    @functools.partial(jax.jit, compiler_options=harness.FULL)
    def loss(z, y, a):
        return jaxent.softmax_loss(fn, z, y, a, **built.options)

    got = loss(*(harness.cast(x, "float32") for x in (built.logits, built.labels, advantage)))
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=2e-6)


def test_mean():
    rng = np.random.default_rng(6)
    losses, weights = rng.normal(size=(7, 9)) + 3, cases.rounded(rng.uniform(0, 2, size=(7, 9)))
    where = rng.uniform(size=(7, 9)) < 0.5
    losses = losses.astype(np.float32)
    for options in ({}, {"where": where}, {"weights": weights}, {"where": where, "weights": weights}):
        got = jaxent.mean(jnp.asarray(losses), **{k: jnp.asarray(x) for k, x in options.items()})
        np.testing.assert_allclose(got, np.float64(oracle.mean(losses, **options)), rtol=5e-7)
