"""Divergences of hostile rows: what is poisoned, what is gone, what is exact."""

import functools

import numpy as np
import pytest

import harness
import oracle

NAN, INF = np.nan, np.inf
NAMES = ("softmax_kl_divergence", "softmax_js_divergence")
value = functools.partial(harness.value, quick=True)
gradients = functools.partial(harness.gradients, quick=True)


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_divergences_of_finite_extremes(name):
    z = np.array([[3e38, -3e38, 0.0], [1e30, 1e30, 0.0], [1e30, 0.0, -1e30], [1e4, 0.0, -1e4]])
    t = np.array([[1.0, 0.0, 2.0], [1e30, 1e30, 0.0], [1e30, 0.0, 0.0], [-1e4, 0.0, 1e4]])
    got = np.concatenate([harness.value(name, z, t), harness.value(name, t, z)])
    assert not np.isnan(got).any() and (got >= 0).all(), got
    for g in harness.gradients(name, z, t, cotangent=np.ones(4)):
        assert not np.isnan(g).any(), g
