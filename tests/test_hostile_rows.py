"""Hostile rows, line by line of the table in the documentation: what is poisoned, what is gone, what is exact."""

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
from tables import thinned

NAN, INF = np.nan, np.inf
MAX = float(np.finfo(np.float32).max)
LOSSES = ("softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss")
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


@pytest.mark.parametrize("classes", [5, 300, 4096, 5003])
def test_rows_are_poisoned_alone(classes):
    check_poison("softmax_cross_entropy", classes)


@thinned(2, "loss, classes", LOSSES[1:], [5, 4096])  # the sizes differ in the statistics only
def test_rows_are_poisoned_alone_in_other_losses(loss, classes):
    check_poison(loss, classes)


def check_poison(loss, classes):
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
        how = options | {"quick": classes == 5}
        got = harness.value("softmax_cross_entropy", z, labels, **how)
        (gradient,) = harness.gradients("softmax_cross_entropy", z, labels, cotangent=ct, **how)
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


def test_a_row_without_an_answer_has_the_worst_rank():
    z = jnp.array([[NAN, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert STATISTICS(z, jnp.array([0, 5])).rank.tolist() == [3, 3]


def test_focal_loss_of_certain_and_of_hopeless_rows():
    def f(gamma, z):
        return jaxent.softmax_focal_loss(z, jnp.zeros(len(z), int), gamma=gamma, label_smoothing=0.0).sum()

    @jax.jit
    def derivatives(z):
        losses = {gamma: functools.partial(f, gamma) for gamma in (0, 0.5, 1, 1.5, 2, 2.5, 3)}
        return {gamma: (jax.grad(f)(z), jax.hessian(f)(z[:1])) for gamma, f in losses.items()}

    for gamma, found in derivatives(np.float32([[1000, 0, 0], [-1000, 0, 0], [-INF, 0, 0]])).items():
        for x in found:
            assert np.isfinite(x).all(), gamma
