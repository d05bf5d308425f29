"""Hostile input, line by line of the table in the documentation: what is poisoned, what is gone, what raises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import cases
import harness
import jaxent
import oracle

NAN, INF = np.nan, np.inf
MAX = float(np.finfo(np.float32).max)
LOSSES = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")
COMPILED = jax.jit(
    jaxent.softmax_cross_entropy,
    static_argnames=("reduction", "ignore_index"),
    compiler_options=harness.FULL,
)
STATISTICS = jax.jit(jaxent.softmax_statistics, compiler_options=harness.FULL)
# The table of hostile rows is compiled as a user's program is; what masks and options do to a row does not need that.
value = functools.partial(harness.value, quick=True)
gradients = functools.partial(harness.gradients, quick=True)
ORACLE = {name: getattr(oracle, name) for name in LOSSES}

# name: (logits of 5 classes, label, what becomes of the row)
HOSTILE = {
    "clean": ([0.5, 1.0, -1.0, 0.0, 2.0], 1, "exact"),
    "label -1": ([0.5, 1.0, -1.0, 0.0, 2.0], -1, "poison"),
    "label -100": ([0.5, 1.0, -1.0, 0.0, 2.0], -100, "poison"),
    "label V": ([0.5, 1.0, -1.0, 0.0, 2.0], "V", "poison"),
    "label 2^31 - 1": ([0.5, 1.0, -1.0, 0.0, 2.0], 2**31 - 1, "poison"),
    "label -2^31": ([0.5, 1.0, -1.0, 0.0, 2.0], -(2**31), "poison"),
    "NaN off the label": ([0.5, 1.0, NAN, 0.0, 2.0], 1, "poison"),
    "NaN at the label": ([0.5, NAN, 1.0, 0.0, 2.0], 1, "poison"),
    "NaN first": ([NAN, 1.0, 1.0, 0.0, 2.0], 4, "poison"),
    "NaN beside inf": ([NAN, INF, -INF, 0.0, 2.0], 4, "poison"),
    "all -inf": ([-INF] * 5, 1, "poison"),
    "+inf at the label": ([0.5, INF, 1.0, 0.0, 2.0], 1, "poison"),
    "+inf off the label": ([0.5, 1.0, INF, 0.0, 2.0], 1, "poison"),
    "two +inf": ([INF, 1.0, INF, 0.0, 2.0], 0, "poison"),
    "-inf at the label": ([0.5, -INF, 1.0, 0.0, 2.0], 1, "infinite"),
    "-inf off the label": ([0.5, 1.0, -INF, -INF, 2.0], 4, "exact"),
    "only the label is finite": ([-INF, -INF, -INF, -INF, 7.0], 4, "exact"),
    "largest at the label": ([MAX, 1.0, 0.0, 0.0, 2.0], 0, "exact"),
    "largest off the label": ([MAX, 1.0, 0.0, 0.0, 2.0], 1, "exact"),
    "all the largest": ([MAX] * 5, 3, "exact"),
    "all the smallest": ([-MAX] * 5, 3, "exact"),
    "from smallest to largest": ([MAX, -MAX, 0.0, 1e30, -1e30], 3, "exact"),
    "1e30": ([1e30, 1e30, -1e30, 0.0, 2.0], 1, "exact"),
    "clean again": ([3.0, 1.0, -1.0, 0.0, 2.0], 0, "exact"),
}


def hostile(classes, dtype="float32"):
    """(logits, labels, outcomes) of all hostile rows; more classes are -30 and, where nothing is, -inf."""
    rows, labels, outcomes = zip(*HOSTILE.values(), strict=True)
    z = np.full((len(rows), classes), -30.0)
    z[:, :5] = rows
    for name in ("all -inf", "only the label is finite"):
        z[list(HOSTILE).index(name), 5:] = -INF
    for name, fill in (("all the largest", MAX), ("all the smallest", -MAX)):
        z[list(HOSTILE).index(name), 5:] = fill
    limit = float(jnp.finfo(dtype).max)
    z = np.where(np.isfinite(z), np.clip(z, -limit, limit), z)
    z = z.astype(cases.NUMPY_DTYPES[dtype]).astype(np.float64)
    return z, np.array([classes if y == "V" else y for y in labels], np.int32), np.array(outcomes)


SIZES = [5, 300, 4096, 5003]


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_are_poisoned_alone(loss, classes):
    if loss != "softmax_cross_entropy" and classes not in (5, 4096):
        pytest.skip("the sizes differ in the statistics only")
    z, labels, outcome = hostile(classes)
    ct = np.ones(len(z))
    got = harness.value(loss, z, labels)
    (gradient,) = harness.gradients(loss, z, labels, cotangent=ct)
    for name, row, dz, kind in zip(HOSTILE, got, gradient, outcome, strict=True):
        if kind == "poison":
            assert np.isnan(row) and np.isnan(dz).all(), name
        else:
            assert not np.isnan(row) and np.isfinite(dz).all(), (name, row, dz[:5])
        if kind == "infinite":
            assert row == INF, name
    want = ORACLE[loss](z, labels)
    harness.assert_within(got, want, 2e-6 * np.abs(want))
    want = ORACLE[loss](z, labels, cotangent=ct).logits
    harness.assert_within(gradient, want, 2e-6 * np.abs(want) + 1e-37)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_rows_are_poisoned_alone_in(dtype):
    z, labels, _ = hostile(300, dtype)
    ct = np.ones(len(z))
    want = oracle.softmax_cross_entropy(z, labels)
    harness.assert_within(value("softmax_cross_entropy", z, labels, dtype=dtype), want, 1e-6 * np.abs(want))
    (got,) = gradients("softmax_cross_entropy", z, labels, cotangent=ct, dtype=dtype)
    want = oracle.softmax_cross_entropy(z, labels, cotangent=ct).logits
    allowed = 1e-14 * np.abs(want) if dtype == "float64" else harness.spacing(want, dtype)
    harness.assert_within(got, want, allowed + 1e-37)


@pytest.mark.parametrize(
    "hide, classes",
    [("where", 5), ("weights", 5), ("ignore_index", 5), ("class_weights", 5), ("where", 4096)],
)
def test_masked_means_gone(hide, classes):
    z, labels, outcome = hostile(classes)
    extreme = np.abs(np.where(np.isfinite(z), z, 0)).max(-1) > 1e20  # these overflow a sum
    bad = (outcome != "exact") | extreme
    options = {}
    if hide == "where":
        options["where"] = ~bad
    elif hide == "weights":
        options["weights"] = np.where(bad, 0.0, 2.0)
    elif hide == "ignore_index":
        labels = np.where(bad, cases.IGNORED, labels)
        options["ignore_index"] = cases.IGNORED
    else:  # a class of weight 0 that all bad rows have
        labels = np.where(bad, 2, np.where(labels == 2, 1, labels))
        options["class_weights"] = np.where(np.arange(classes) == 2, 0.0, 1.0)
    for reduction in ("none", "mean"):
        ct = np.float64(1) if reduction == "mean" else np.ones(len(z))
        options["reduction"] = reduction
        got = harness.value("softmax_cross_entropy", z, labels, **options)
        (gradient,) = harness.gradients("softmax_cross_entropy", z, labels, cotangent=ct, **options)
        assert np.isfinite(gradient).all() and (gradient[bad] == 0).all()
        want = oracle.softmax_cross_entropy(z, labels, **options)
        harness.assert_within(got, want, 2e-6 * np.abs(want))
        if reduction == "none":
            assert (got[bad] == 0).all()
        want = oracle.softmax_cross_entropy(z, labels, cotangent=ct, **options).logits
        harness.assert_within(gradient, want, 2e-6 * np.abs(want) + 1e-37)


@pytest.mark.parametrize("loss", ["softmax_focal_loss", "softmax_poly_loss"])
def test_masked_means_gone_in_other_losses(loss):
    z, labels, outcome = hostile(5)
    options = {"where": outcome == "exact", "label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "sum"}
    (gradient,) = gradients(loss, z, labels, cotangent=np.float64(1), **options)
    moderate = np.abs(np.where(np.isfinite(z), z, 0)).max(-1) < 100
    assert (gradient[outcome != "exact"] == 0).all()
    assert np.isfinite(gradient[moderate & np.isfinite(z).all(-1)]).all()


def test_poison_reaches_the_mean_but_not_other_rows():
    z = np.array([[0.5, 1.0, -1.0], [1.0, 2.0, 0.0], [NAN, 0.0, 0.0]])
    labels = np.array([1, 7, 0])
    assert np.isnan(value("softmax_cross_entropy", z, labels, reduction="mean"))
    (got,) = gradients("softmax_cross_entropy", z, labels, cotangent=np.float64(1), reduction="mean")
    assert np.isnan(got[1:]).all()
    harness.assert_within(
        got[0], oracle.softmax_cross_entropy(z, labels, cotangent=np.ones(3)).logits[0] / 3, 1e-7
    )


# name: (distribution over 5 classes, logits, what becomes of the row)
DISTRIBUTIONS = {
    "clean": ([0.5, 0.25, 0.0, 0.125, 0.125], [0.5, 1.0, -1.0, 0.0, 2.0], "exact"),
    "NaN in q": ([0.5, NAN, 0.0, 0.125, 0.125], [0.5, 1.0, -1.0, 0.0, 2.0], "poison"),
    "NaN logit": ([0.5, 0.5, 0.0, 0.0, 0.0], [0.5, 1.0, NAN, 0.0, 2.0], "poison"),
    "+inf logit": ([0.5, 0.5, 0.0, 0.0, 0.0], [0.5, INF, 0.0, 0.0, 2.0], "poison"),
    "all -inf": ([0.5, 0.5, 0.0, 0.0, 0.0], [-INF] * 5, "poison"),
    "0 on -inf": ([0.5, 0.5, 0.0, 0.0, 0.0], [0.5, 1.0, -INF, -INF, 2.0], "exact"),
    "something on -inf": ([0.5, 0.25, 0.25, 0.0, 0.0], [0.5, 1.0, -INF, 0.0, 2.0], "infinite"),
    "sums to 3": ([1.0, 0.5, 1.0, 0.25, 0.25], [0.5, 1.0, -1.0, 0.0, 2.0], "exact"),
    "negative": ([1.0, -0.5, 1.0, 0.25, 0.25], [0.5, 1.0, -1.0, 0.0, 2.0], "exact"),
    "nothing": ([0.0] * 5, [0.5, 1.0, -1.0, 0.0, 2.0], "exact"),
    "one-hot on the largest": ([0.0, 0.0, 1.0, 0.0, 0.0], [0.5, 1.0, MAX, 0.0, 2.0], "exact"),
    "one-hot, confident": ([0.0, 0.0, 1.0, 0.0, 0.0], [0.5, 1.0, 60.0, 0.0, 2.0], "exact"),
}


@pytest.mark.parametrize("classes", [5, 4096])
def test_distributions(classes):
    q, z, outcome = (np.array(x) for x in zip(*DISTRIBUTIONS.values(), strict=True))
    fill = np.where(np.isneginf(z).all(-1), -INF, -30.0)[:, None]
    z = np.concatenate([z, np.broadcast_to(fill, (len(z), classes - 5))], -1)
    q = np.pad(q, ((0, 0), (0, classes - 5)))
    ct = np.ones(len(z))
    got = harness.value("softmax_cross_entropy", z, q)
    dz, dq = harness.gradients("softmax_cross_entropy", z, q, cotangent=ct)
    want = oracle.softmax_cross_entropy(z, q)
    wanted = oracle.softmax_cross_entropy(z, q, cotangent=ct)
    for i, (name, kind) in enumerate(zip(DISTRIBUTIONS, outcome, strict=True)):
        if kind == "poison":
            assert np.isnan(got[i]) and np.isnan(dz[i]).all(), name
            continue
        assert np.isfinite(dz[i]).all() and not np.isnan(dq[i]).any(), name
        if kind == "infinite":
            assert got[i] == INF, name
        harness.assert_within(got[i], want[i], 1e-6 * np.abs(want[i]), name)
        harness.assert_within(dz[i], wanted.logits[i], 1e-6 * np.abs(wanted.logits[i]).max() + 1e-37, name)
        finite = np.isfinite(z[i])
        target = wanted.labels[i][finite]
        harness.assert_within(dq[i][finite], target, 1e-6 * np.abs(target), name)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_class_mask_hides_whatever_a_class_holds(label_smoothing):
    """Hidden classes hold NaN and +-inf; the answer is that of the logits without them."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 7)).astype(np.float32).astype(np.float64)
    mask = np.array([True, False, True, True, False, False, True])
    hidden = np.where(mask, z, np.array([0, NAN, 0, 0, INF, -INF, 0]))
    inside = np.flatnonzero(mask)
    short = rng.integers(4, size=6)
    w = cases.rounded(rng.uniform(0.5, 2, size=7))
    options = {"label_smoothing": label_smoothing, "z_loss": 0.25, "class_weights": w}
    less_options = options | {"class_weights": w[mask]}
    for labels, less in ((inside[short], short), (np.eye(7)[inside[short]], np.eye(4)[short])):
        got = value("softmax_cross_entropy", hidden, labels, class_mask=mask, **options)
        want = oracle.softmax_cross_entropy(z[:, mask], less, **less_options)
        harness.assert_within(got, want, 1e-6 * want)
        found = gradients(
            "softmax_cross_entropy", hidden, labels, cotangent=np.ones(6), class_mask=mask, **options
        )
        want = oracle.softmax_cross_entropy(z[:, mask], less, cotangent=np.ones(6), **less_options).logits
        assert (found[0][:, ~mask] == 0).all()
        harness.assert_within(found[0][:, mask], want, 2e-6)


def test_gradient_by_the_labels_of_hidden_classes_is_zero():
    z, q = np.zeros((2, 4)), np.array([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    mask = np.array([True, True, True, False])
    _, dq = gradients("softmax_cross_entropy", z, q, cotangent=np.ones(2), class_mask=mask)
    assert (dq[:, 3] == 0).all(), dq
    np.testing.assert_allclose(dq[:, :3], np.log(3), rtol=1e-6)


@pytest.mark.parametrize("per_row", [False, True])
def test_label_on_a_hidden_class(per_row):
    z = np.zeros((4, 3)) + np.arange(3)
    mask = np.array([True, False, True])
    mask = np.broadcast_to(mask, (4, 3)) if per_row else mask
    labels = np.array([0, 1, 2, 1])
    for smoothing in (0.0, 0.5):
        options = {"class_mask": mask, "label_smoothing": smoothing}
        got = value("softmax_cross_entropy", z, labels, **options)
        (gradient,) = gradients("softmax_cross_entropy", z, labels, cotangent=np.ones(4), **options)
        assert np.isnan(got).tolist() == [False, True, False, True]
        assert np.isnan(gradient).all(-1).tolist() == [False, True, False, True]
        assert np.isfinite(gradient[[0, 2]]).all()
    got = value("softmax_cross_entropy", z, np.eye(3)[labels], class_mask=mask)
    hidden = ~np.isfinite(got)  # a distribution there has no finite loss either
    assert hidden.tolist() == [False, True, False, True]


def test_a_row_with_no_class_in_force():
    z = np.zeros((3, 4)) + np.arange(4)
    mask = np.ones((3, 4), bool)
    mask[1] = False
    for loss, labels in (("softmax_cross_entropy", [np.array([0, 1, 2])]), ("softmax_entropy", [])):
        got = value(loss, z, *labels, class_mask=mask)
        assert np.isnan(got).tolist() == [False, True, False]
        (gradient,) = gradients(loss, z, *labels, cotangent=np.ones(3), class_mask=mask)
        assert (np.isnan(gradient[1]) | (gradient[1] == 0)).all()  # its classes are all out of it
        assert np.isfinite(gradient[[0, 2]]).all()


def test_class_weight_0_times_an_infinite_loss():
    z = np.array([[0.0, -INF, 1.0], [0.0, 1.0, -INF], [0.0, 2.0, -INF]])
    w = np.array([1.0, 0.0, 2.0])
    got = value("softmax_cross_entropy", z, np.array([1, 0, 1]), class_weights=w)
    assert got[0] == 0 and got[2] == 0 and np.isfinite(got[1])
    mean = value("softmax_cross_entropy", z, np.array([1, 0, 1]), class_weights=w, reduction="mean")
    np.testing.assert_allclose(mean, got[1], rtol=1e-6)
    q = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    got = value("softmax_cross_entropy", z, q, class_weights=w)
    want = oracle.softmax_cross_entropy(z, q, class_weights=w)
    assert np.isfinite(got).all()
    harness.assert_within(got, want, 1e-6 * want)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_counts(loss):
    z = np.array([[NAN, 1.0], [INF, 0.0], [0.5, -INF]])
    labels = np.array([0, 9, 1])
    for options in (
        {"where": np.zeros(3, bool)},
        {"weights": np.zeros(3)},
        {"class_weights": np.zeros(2), "where": np.array([False, False, True])},
    ):
        got = value(loss, z, labels, reduction="mean", **options)
        (gradient,) = gradients(loss, z, labels, cotangent=np.float64(1), reduction="mean", **options)
        assert got == 0 and (gradient == 0).all()


def test_no_rows():
    for shape in ((0, 5), (3, 0, 5)):
        z, labels = np.zeros(shape), np.zeros(shape[:-1], np.int32)
        for reduction in ("mean", "sum"):
            got = value("softmax_cross_entropy", z, labels, reduction=reduction)
            assert got == 0 and got.dtype == np.float32
            (g,) = gradients("softmax_cross_entropy", z, labels, cotangent=np.float64(1), reduction=reduction)
            assert g.shape == shape
    assert value("softmax_cross_entropy", np.zeros((0, 5)), np.zeros(0, np.int32)).shape == (0,)
    assert value("softmax_entropy", np.zeros((0, 5)), reduction="mean") == 0
    assert value("softmax_kl_divergence", np.zeros((0, 5)), np.zeros((0, 5)), reduction="mean") == 0
    assert jaxent.mean(jnp.zeros((0,))) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class(loss):
    z = np.array([[3.0], [-1e30], [0.0]])
    for labels in (np.zeros(3, np.int32), np.ones((3, 1))):
        assert (value(loss, z, labels) == 0).all()
        assert (gradients(loss, z, labels, cotangent=np.ones(3))[0] == 0).all()
    assert value(loss, z[0], np.int32(0)).shape == ()
    s = STATISTICS(jnp.asarray(z, jnp.float32))
    assert (s.entropy == 0).all() and s.log_normalizer.tolist() == np.float32([3.0, -1e30, 0.0]).tolist()


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_labels_of_narrow_integers_with_300_classes(dtype, on_host):
    """jax.nn.one_hot compares in the labels' dtype, where class 256 + k is k as well."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 300)).astype(np.float32)
    labels = rng.integers(min(300, np.iinfo(dtype).max + 1), size=50).astype(dtype)
    f = jax.jit(lambda z: jaxent.softmax_cross_entropy(z, labels))  # labels that jit does not trace
    got = f(z) if on_host else COMPILED(z, jnp.asarray(labels))
    want = oracle.softmax_cross_entropy(z, np.asarray(labels))
    harness.assert_within(got, want, 1e-6 * want)


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_ignore_index_that_the_labels_dtype_cannot_hold(dtype):
    z = np.zeros((3, 4), np.float32)
    got = COMPILED(z, np.arange(3, dtype=dtype), ignore_index=-100)
    np.testing.assert_allclose(got, np.log(4), rtol=1e-6)
    got = COMPILED(z, np.array([0, 255, 1], dtype), ignore_index=255)
    assert got[1] == 0 and (got[::2] > 1).all()


def test_unsigned_labels_out_of_range():
    z = np.zeros((3, 4), np.float32)
    got = COMPILED(z, jnp.asarray(np.array([1, 2**31 + 1, 2**32 - 1], np.uint32)))
    assert np.isnan(got).tolist() == [False, True, True]


def test_sums_of_70000_rows_of_float16():
    z = jnp.zeros((70_000, 4), jnp.float16)
    labels = jnp.zeros(70_000, jnp.int32)
    f = COMPILED
    np.testing.assert_allclose(f(z, labels, reduction="sum"), 70_000 * np.log(4), rtol=1e-5)
    np.testing.assert_allclose(f(z, labels, reduction="mean"), np.log(4), rtol=1e-5)
    ones = jnp.full(70_000, 2.0, jnp.float16)
    np.testing.assert_allclose(f(z, labels, weights=ones, reduction="mean"), np.log(4), rtol=1e-5)
    np.testing.assert_allclose(jaxent.mean(ones, weights=ones), 2, rtol=1e-6)


def test_sums_of_a_million_bfloat16():
    n = 1_000_000
    np.testing.assert_allclose(jaxent.mean(jnp.full(n, 1.5, jnp.bfloat16)), 1.5, rtol=1e-6)
    ones = jnp.ones(n, jnp.bfloat16)
    np.testing.assert_allclose(jaxent.mean(ones, weights=ones), 1, rtol=1e-6)
    z = jnp.zeros((n, 2), jnp.bfloat16)
    f = COMPILED
    got = f(z, jnp.zeros(n, jnp.int32), weights=ones, reduction="sum")
    np.testing.assert_allclose(got, n * np.log(2), rtol=1e-5)
    classes = jnp.zeros((1, n), jnp.bfloat16)
    np.testing.assert_allclose(f(classes, jnp.zeros(1, jnp.int32)), np.log(n), rtol=1e-6)
    q = jnp.full((1, n), 2.0**-20, jnp.bfloat16)
    np.testing.assert_allclose(f(classes, q), n * 2.0**-20 * np.log(n), rtol=1e-5)


def test_float32_stays_float32_with_x64(x64):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    labels = np.arange(4)  # int64
    options = {
        "where": np.ones(4, bool),
        "weights": np.ones(4),
        "class_weights": np.ones(6),
        "class_mask": np.arange(6) < 5,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
    }
    for y in (labels, jnp.asarray(labels), np.full((4, 6), 1 / 5) * (np.arange(6) < 5)):
        for loss in LOSSES:
            for reduction in ("none", "mean"):

                def f(z, loss=loss, y=y, reduction=reduction):
                    return getattr(jaxent, loss)(z, y, reduction=reduction, **options).sum()

                value, gradient = jax.eval_shape(jax.value_and_grad(f), z)
                assert value.dtype == gradient.dtype == jnp.float32
    for x in jax.tree.leaves(jax.eval_shape(jaxent.softmax_statistics, z, labels)):
        assert x.dtype in (jnp.float32, jnp.int32)
    for f in (jaxent.softmax_entropy, jaxent.mean, lambda z: jaxent.softmax_kl_divergence(z, z)):
        assert jax.eval_shape(f, z).dtype == jnp.float32


@pytest.mark.parametrize("name", ["softmax_kl_divergence", "softmax_js_divergence"])
def test_divergences(name):
    z = np.array([[0.0, 1.0, 2.0]] * 12)
    t = np.array([[1.0, 0.5, 0.0]] * 12)
    z[1, 0] = z[2] = z[3, 2] = NAN
    t[4, 1] = NAN
    z[5, 2] = t[6, 2] = INF
    z[7] = -INF
    t[8] = -INF
    z[9] = t[9] = -INF
    t[10, 0] = -INF  # q = 0 asks nothing
    z[11, 0] = t[11, 0] = -INF
    bad = (np.arange(12) > 0) & (np.arange(12) < 10)
    got = harness.value(name, z, t)
    dz, dt = harness.gradients(name, z, t, cotangent=np.ones(12))
    want = getattr(oracle, name)(z, t)
    wanted = getattr(oracle, name)(z, t, cotangent=np.ones(12))
    harness.assert_within(got[~bad], want[~bad], 3e-6 * want[~bad])
    for g, w in ((dz, wanted.logits), (dt, wanted.labels)):
        harness.assert_within(g[~bad], w[~bad], 2e-6)
    poisoned = {
        "value": np.isnan(got).tolist(),
        "dz": np.isnan(dz).all(-1).tolist(),
        "dt": np.isnan(dt).all(-1).tolist(),
    }
    assert poisoned == dict.fromkeys(poisoned, bad.tolist())


@pytest.mark.parametrize("name", ["softmax_kl_divergence", "softmax_js_divergence"])
def test_divergences_behind_a_mask(name):
    z = np.array([[0.0, 1.0, 2.0], [0.0, NAN, 1.0], [INF, 0.0, 1.0], [-INF] * 3, [1.0, 2.0, 0.0]])
    t = np.roll(z, 1, -1)
    where = np.isfinite(z).all(-1)
    got = value(name, z, t, where=where, reduction="mean")
    want = getattr(oracle, name)(z, t, where=where, reduction="mean")
    harness.assert_within(got, want, 3e-6 * want)
    for g in gradients(name, z, t, cotangent=np.float64(1), where=where, reduction="mean"):
        assert np.isfinite(g).all() and (g[~where] == 0).all()


def test_divergences_of_supports_that_differ():
    z, t = np.array([[-INF, 1.0, 2.0]]), np.array([[1.0, 0.5, -INF]])
    assert value("softmax_kl_divergence", z, t) == INF
    dz, _ = gradients("softmax_kl_divergence", z, t, cotangent=np.ones(1))
    want = oracle.softmax_kl_divergence(z, t, cotangent=np.ones(1))
    harness.assert_within(dz, want.logits, 1e-6)
    want = oracle.softmax_js_divergence(z, t)
    harness.assert_within(value("softmax_js_divergence", z, t), want, 1e-6 * want)
    want = oracle.softmax_js_divergence(z, t, cotangent=np.ones(1))
    for g, w in zip(gradients("softmax_js_divergence", z, t, cotangent=np.ones(1)), want, strict=True):
        harness.assert_within(g, w, 1e-6)


@pytest.mark.parametrize("name", ["softmax_kl_divergence", "softmax_js_divergence"])
def test_divergences_of_finite_extremes(name):
    z = np.array([[3e38, -3e38, 0.0], [1e30, 1e30, 0.0], [1e30, 0.0, -1e30], [1e4, 0.0, -1e4]])
    t = np.array([[1.0, 0.0, 2.0], [1e30, 1e30, 0.0], [1e30, 0.0, 0.0], [-1e4, 0.0, 1e4]])
    got = np.concatenate([harness.value(name, z, t), harness.value(name, t, z)])
    assert not np.isnan(got).any() and (got >= 0).all(), got
    for g in harness.gradients(name, z, t, cotangent=np.ones(4)):
        assert not np.isnan(g).any(), g


@pytest.mark.parametrize("classes", [5, 4096])
def test_statistics_and_entropy_of_hostile_rows(classes):
    z, labels, outcome = hostile(classes)
    labels = np.where((labels < 0) | (labels >= classes), 0, labels)
    bad = outcome == "poison"
    bad &= ~np.isfinite(z).all(-1)
    s = STATISTICS(harness.cast(z, "float32"), labels)
    want = oracle.softmax_statistics(z, labels)
    for name in ("log_prob", "log_normalizer", "entropy"):
        got, w = getattr(s, name), getattr(want, name)
        assert np.isnan(got).tolist() == bad.tolist(), name
        harness.assert_within(got, w, 2e-6 * np.abs(w) + 1e-37, name)
    (gradient,) = harness.gradients("softmax_entropy", z, cotangent=np.ones(len(z)))
    assert np.isnan(gradient[bad]).all() and np.isfinite(gradient[~bad]).all()


class Variants(chex.TestCase):
    """The same with and without jit, and from host or device arrays."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.parameters("softmax_cross_entropy", "softmax_focal_loss")
    def test_poison_and_masks(self, loss):
        z = np.array([[0.5, 1.0, -1.0], [1.0, 2.0, 0.0], [np.nan, 0.0, 0.0], [1.0, -np.inf, 0.0]], np.float32)
        labels = np.array([1, 0, 0, 2], np.int32)
        where = np.array([True, True, False, True])
        f = self.variant(lambda z, y, where: getattr(jaxent, loss)(z, y, where=where))
        got = f(z, labels, where)
        want = ORACLE[loss](z, labels, where=where)
        harness.assert_within(np.asarray(got), want, 1e-6 * want)
        assert got[2] == 0


RAISES = {
    "label -1 on the host": (ValueError, (4, 3), np.array([0, 1, -1, 0]), {}),
    "label V on the host": (ValueError, (4, 3), np.array([0, 1, 3, 0]), {}),
    "label 2^32 + 1 on the host": (ValueError, (4, 3), np.array([0, 2**32 + 1, 1, 0]), {}),
    "float labels [N]": (TypeError, (4, 3), np.zeros(4, np.float32), {}),
    "bool labels [N]": (TypeError, (4, 3), np.zeros(4, bool), {}),
    "integer one-hot": (TypeError, (4, 3), np.eye(3, dtype=np.int32)[[0, 1, 2, 0]], {}),
    "labels [N, 1]": (ValueError, (4, 3), np.zeros((4, 1), np.int32), {}),
    "labels [1]": (ValueError, (4, 3), np.zeros(1, np.int32), {}),
    "labels []": (ValueError, (4, 3), np.int32(0), {}),
    "labels [N + 1]": (ValueError, (4, 3), np.zeros(5, np.int32), {}),
    "a distribution [V] for [V, V]": (Exception, (3, 3), np.ones(3, np.float32) / 3, {}),
    "a distribution [1, V]": (ValueError, (4, 3), np.ones((1, 3), np.float32), {}),
    "where [1]": (ValueError, (4, 3), np.zeros(4, np.int32), {"where": np.ones(1, bool)}),
    "where that is not bool": (TypeError, (4, 3), np.zeros(4, np.int32), {"where": np.ones(4)}),
    "weights [1]": (ValueError, (4, 3), np.zeros(4, np.int32), {"weights": np.ones(1)}),
    "class_weights [1]": (ValueError, (4, 3), np.zeros(4, np.int32), {"class_weights": np.ones(1)}),
    "class_weights [N]": (ValueError, (4, 3), np.zeros(4, np.int32), {"class_weights": np.ones(4)}),
    "class_mask [N]": (ValueError, (4, 3), np.zeros(4, np.int32), {"class_mask": np.ones(4, bool)}),
    "smoothing -0.1": (ValueError, (4, 3), np.zeros(4, np.int32), {"label_smoothing": -0.1}),
    "smoothing 1.1": (ValueError, (4, 3), np.zeros(4, np.int32), {"label_smoothing": 1.1}),
    "smoothing NaN": (ValueError, (4, 3), np.zeros(4, np.int32), {"label_smoothing": NAN}),
    "negative z_loss": (ValueError, (4, 3), np.zeros(4, np.int32), {"z_loss": -1e-4}),
    "unknown reduction": (ValueError, (4, 3), np.zeros(4, np.int32), {"reduction": "average"}),
    "axis": (ValueError, (4, 3), np.zeros(4, np.int32), {"axis": 2}),
    "no classes": (ValueError, (4, 0), np.zeros(4, np.int32), {}),
    "a scalar": (ValueError, (), np.int32(0), {}),
    "ignore_index with a distribution": (
        ValueError,
        (4, 3),
        np.ones((4, 3), np.float32),
        {"ignore_index": 0},
    ),
}


@pytest.mark.parametrize("name", RAISES)
def test_raises_while_tracing(name):
    kind, shape, labels, options = RAISES[name]
    for loss in LOSSES:
        with pytest.raises(kind, match=f"jaxent.{loss}: `"):
            f = getattr(jaxent, loss)
            jax.eval_shape(lambda z, f=f: f(z, labels, **options), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_logits_must_be_real_numbers(dtype):
    z = jax.ShapeDtypeStruct((4, 3), dtype)
    for loss in LOSSES:
        with pytest.raises(TypeError, match=loss):
            jax.eval_shape(lambda z, loss=loss: getattr(jaxent, loss)(z, np.zeros(4, np.int32)), z)
    for f in (jaxent.softmax_entropy, jaxent.softmax_statistics):
        with pytest.raises(TypeError, match=f.__name__):
            jax.eval_shape(f, z)
    with pytest.raises(TypeError, match="softmax_kl_divergence"):
        jax.eval_shape(jaxent.softmax_kl_divergence, z, z)


def test_bad_host_labels_behind_a_mask():
    z = np.zeros((3, 4), np.float32)
    labels = np.array([1, 2**32 + 1, -100])
    got = jaxent.softmax_cross_entropy(z, labels, where=np.array([True, False, False]))
    assert got[0] > 1 and (got[1:] == 0).all()
    got = jax.jit(lambda w: jaxent.softmax_cross_entropy(z, labels, where=w))(np.array([True, False, True]))
    assert got[1] == 0 and np.isnan(got[2])
    with pytest.raises(ValueError, match=r"4294967297 at index \[1\]"):
        jaxent.softmax_cross_entropy(z, labels, ignore_index=-100)


def test_no_rows_of_many_classes():
    z, y = jnp.zeros((0, 300)), jnp.zeros(0, int)
    assert COMPILED(z, y).shape == (0,)
    mean = jax.jit(jax.value_and_grad(lambda z: jaxent.softmax_cross_entropy(z, y, reduction="mean")))
    value, gradient = mean(z)
    assert value == 0 and gradient.shape == (0, 300)


def test_only_bad_labels_with_class_weights():
    """A bad label has no class weight, and still its row counts."""
    z, y = jnp.zeros((4, 5)), jnp.full(4, 9)
    assert jnp.isnan(COMPILED(z, y, class_weights=jnp.ones(5), reduction="mean"))


def test_a_bad_host_label_is_not_taken_for_the_ignored_one():
    z, y = jnp.zeros((4, 5)), np.array([0, 1, 2, 9])
    where = jnp.ones(4, bool)
    losses = jax.jit(lambda w: jaxent.softmax_cross_entropy(z, y, where=w, ignore_index=-1))(where)
    assert jnp.isnan(losses).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="is 9 at index"):
        jaxent.softmax_cross_entropy(z, y, where=where, ignore_index=-1)


@pytest.mark.parametrize("labels", [np.array([0, 1, 2, 2**40]), jnp.arange(4)])
def test_ignore_index_beyond_the_labels_dtype(labels):
    losses = jaxent.softmax_cross_entropy(jnp.zeros((4, 5)), labels, ignore_index=2**40)
    assert (losses == 0).tolist() == [False, False, False, isinstance(labels, np.ndarray)]


def test_a_weight_of_zero_hides_a_bad_host_label():
    labels, weights = np.array([0, 9]), np.array([1.0, 0.0])
    losses = jax.jit(lambda z: jaxent.softmax_cross_entropy(z, labels, weights=weights))(jnp.zeros((2, 5)))
    assert losses[1] == 0


def test_row_arguments_keep_their_dtype_behind_a_mask():
    z, y, flags = jnp.zeros((4, 5)), jnp.arange(4), jnp.array([True, False, True, True])
    key = jax.random.split(jax.random.key(0), 4)

    def fn(s, flag, key):
        assert key.shape == (4,)
        return jnp.where(~flag, -s.log_prob, 0)

    where = jnp.array([True, True, True, False])
    losses = jaxent.softmax_loss(fn, z, y, flags, key, where=where, reduction="none")
    assert (losses > 0).tolist() == [False, True, False, False]


def test_losses_that_are_no_floats_or_narrow_ones():
    z, y = jnp.zeros((1001, 3)), jnp.zeros(1001, int)
    half = jnp.full(1001, 0.5)
    for fn in (
        lambda s: s.rank * 0 + 1,
        lambda s: s.rank < 1,
        lambda s: (s.log_prob * 0 + 1).astype("bfloat16"),
    ):
        f = functools.partial(jaxent.softmax_loss, fn)
        both = jax.jit(lambda z, f=f: (f(z, y, weights=half, reduction="sum"), f(z, y, where=y == 0)))
        assert both(z) == (500.5, 1)


def test_a_row_without_an_answer_has_the_worst_rank():
    z = jnp.array([[NAN, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert STATISTICS(z, jnp.array([0, 5])).rank.tolist() == [3, 3]


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, jax.checkpoint])
def test_fn_under_a_transformation(wrap):
    z, y = jnp.eye(4), jnp.arange(4)
    got, want = jax.jit(
        lambda z: (
            jaxent.softmax_loss(wrap(lambda s: -s.log_prob), z, y),
            jaxent.softmax_cross_entropy(z, y, reduction="mean"),
        )
    )(z)
    assert got == want


HIDDEN = {
    "cross entropy": lambda z, w: jaxent.softmax_cross_entropy(z, jnp.array([0, 1, 77, 2]), where=w),
    "ignored": lambda z, w: jaxent.softmax_cross_entropy(z, jnp.array([0, 1, -5, -5]), ignore_index=-5),
    "entropy": lambda z, w: jaxent.softmax_entropy(z, where=w),
    "kl": lambda z, w: jaxent.softmax_kl_divergence(z, 2 * z, where=w),
    "js": lambda z, w: jaxent.softmax_js_divergence(z, 2 * z, where=w),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_second_derivatives_behind_a_mask(name):
    """Reverse over reverse multiplies a cotangent of 0 with what the hidden rows hold."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)).at[3].set(NAN)
    where = jnp.array([True, True, False, False])

    def slope(z):
        return jnp.sum(jax.grad(lambda z: HIDDEN[name](z, where).sum())(z) ** 2)

    gradient = jax.jit(jax.grad(slope))(z)
    assert jnp.all(gradient[2:] == 0) and jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient[:2] != 0)


def test_numpy_options_do_not_widen_with_x64(x64):
    z, y, one = jnp.zeros((2, 3), jnp.float32), jnp.arange(2), np.float64(1)
    for loss, options in (
        (jaxent.softmax_cross_entropy, {"label_smoothing": 0.1 * one, "z_loss": one}),
        (jaxent.softmax_focal_loss, {"gamma": one}),
        (jaxent.softmax_poly_loss, {"epsilon": one}),
    ):
        assert jax.eval_shape(functools.partial(loss, **options), z, y).dtype == jnp.float32


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 1.5, 2, 2.5, 3])
def test_focal_loss_of_certain_and_of_hopeless_rows(gamma):
    def f(z):
        return jaxent.softmax_focal_loss(z, jnp.zeros(len(z), int), gamma=gamma, label_smoothing=0.0).sum()

    z = jnp.array([[1000.0, 0, 0], [-1000.0, 0, 0], [-jnp.inf, 0, 0]])
    gradient, hessian = jax.jit(lambda z: (jax.grad(f)(z), jax.hessian(f)(z[:1])))(z)
    assert jnp.all(jnp.isfinite(gradient)) and jnp.all(jnp.isfinite(hessian))


def test_what_fn_reads_needs_labels():
    z = jnp.zeros((4, 3))
    message = "`labels` must be given for `fn` to read `log_prob`, but is None."
    with pytest.raises(TypeError, match=message):
        jaxent.softmax_loss(lambda s: -s.log_prob, z, None)
    with pytest.raises(ValueError, match="but is one to a tuple"):
        jaxent.softmax_loss(lambda s: (s.entropy,), z, None)
