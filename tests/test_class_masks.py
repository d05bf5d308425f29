"""Classes that are not in force, and classes of weight 0: whatever they hold is gone."""

import functools

import numpy as np
import pytest

import cases
import harness
import oracle

NAN, INF = np.nan, np.inf
value = functools.partial(harness.value, quick=True)
gradients = functools.partial(harness.gradients, quick=True)


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
