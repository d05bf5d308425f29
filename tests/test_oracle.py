"""The oracle itself, against the formulas as one writes them on paper in 80-digit arithmetic."""

import mpmath as mp
import numpy as np
import pytest

import oracle

mp.mp.dps = 80
ORDINARY = [0.3, -1.7, 2.4, 0.0, 1.1]
CONFIDENT = [69.0, -1.7, 0.25, 0.0, -3.0]  # a loss of 1e-30 at label 0
LOGITS = {
    "ordinary": ORDINARY,
    "small": [x * 1e-3 for x in ORDINARY],
    "confident": CONFIDENT,
    "wrong": [-40.0, 30.0, 29.0, 0.0, 1.0],
    "shifted": [x + 1e4 for x in CONFIDENT],
    "ties": [5.0, 5.0, -2.0, 5.0, 0.0],
}
Q = [0.5, 0.25, 0.0, 0.125, 0.125]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "class weights": {"class_weights": [0.5, 2.0, 0.0, 1.0, 3.0], "label_smoothing": 0.25, "z_loss": 0.5},
    "class mask": {"class_mask": [True, True, False, False, True], "label_smoothing": 0.25},
}


def log_softmax(z, force):
    total = mp.fsum(mp.exp(x) for x, f in zip(z, force, strict=True) if f)
    return [x - mp.log(total) if f else None for x, f in zip(z, force, strict=True)]


def dot(a, b):
    return mp.fsum(mp.mpf(x) * y for x, y in zip(a, b, strict=True) if x and y is not None)


def loss_on_paper(kind, z, labels, label_smoothing=0.0, z_loss=0.0, class_weights=None, class_mask=None):
    classes = range(len(z))
    force = class_mask or [True for _ in classes]
    w = class_weights or [1.0 for _ in classes]
    log_p = log_softmax(z, force)
    lse = mp.log(mp.fsum(mp.exp(z[j]) for j in classes if force[j]))
    soft = not isinstance(labels, int)
    q = labels if soft else [float(j == labels) for j in classes]
    w_y = mp.mpf(1) if soft else mp.mpf(w[labels])
    a, share = mp.mpf(label_smoothing), mp.mpf(label_smoothing) / sum(force)
    of_class = {
        "ce": lambda log_p: -log_p,
        "focal": lambda log_p: (1 - mp.exp(log_p)) ** 2 * -log_p,
        "poly": lambda log_p: -log_p + 1 - mp.exp(log_p),
    }[kind]
    target = [w[j] * ((1 - a) * q[j] + (share if force[j] else 0)) for j in classes]
    loss = dot(target, [None if x is None else of_class(x) for x in log_p])
    return loss + mp.mpf(z_loss) * w_y * lse**2


def measure_on_paper(kind, z, t=None):
    force = [True] * len(z)
    log_p = log_softmax(z, force)
    if kind == "entropy":
        return -mp.fsum(mp.exp(x) * x for x in log_p)
    log_q = log_softmax(t, force)
    if kind == "kl":
        return mp.fsum(mp.exp(b) * (b - a) for a, b in zip(log_p, log_q, strict=True))
    log_m = [mp.log((mp.exp(a) + mp.exp(b)) / 2) for a, b in zip(log_p, log_q, strict=True)]
    return sum(
        mp.fsum(mp.exp(a) * (a - m) for a, m in zip(x, log_m, strict=True)) / 2 for x in (log_p, log_q)
    )


def exactly(x):
    return [mp.mpf(float(v)) for v in x]


def gradient(f, x):
    return [mp.diff(lambda v, j=j: f([*x[:j], v, *x[j + 1 :]]), x[j]) for j in range(len(x))]


def assert_close(got, want, rtol, atol=0):
    for g, w in zip(np.ravel(got), np.ravel(want), strict=True):
        error = abs(mp.mpf(np.format_float_positional(g, unique=True)) - w)
        assert error <= rtol * abs(w) + atol, (g, mp.nstr(w, 25), mp.nstr(error, 3))


LOSSES = {
    "ce": oracle.softmax_cross_entropy,
    "focal": oracle.softmax_focal_loss,
    "poly": oracle.softmax_poly_loss,
}


@pytest.mark.parametrize("labels", [0, 1, Q], ids=["label 0", "label 1", "distribution"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("kind", LOSSES)
def test_losses(kind, logits, options, labels):
    z, options = exactly(LOGITS[logits]), OPTIONS[options]
    if labels is Q and "class_mask" in options:
        labels = [0.5, 0.25, 0.0, 0.0, 0.25]
    arrays = {k: np.asarray(v) if isinstance(v, list) else v for k, v in options.items()}
    given = np.asarray([float(v) for v in LOGITS[logits]]), np.asarray(labels)
    got = LOSSES[kind](*given, **arrays)
    want = loss_on_paper(kind, z, labels, **options)
    # log p of a wrong row is a difference of logits of 1e4 at most, known to 1e-19 of that
    assert_close(got, [want], 1e-17)
    if logits in ("ordinary", "confident", "ties"):
        got = LOSSES[kind](*given, cotangent=np.array(1.0), **arrays)
        want = gradient(lambda x: loss_on_paper(kind, x, labels, **options), z)
        # z-loss and smoothing meet the cross-entropy with the opposite sign: what is left has lost digits
        scale = float(max(abs(w) for w in want))
        assert_close(got.logits, want, 1e-16, 1e-18 * scale if arrays else 0)
        if isinstance(labels, list):
            inside = [j for j in range(5) if labels[j] > 0]
            want = gradient(lambda q: loss_on_paper(kind, z, q, **options), exactly(labels))
            # a difference quotient in 80 digits
            assert_close(got.labels[inside], [want[j] for j in inside], 1e-16, 1e-60)


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["entropy", "kl", "js"])
def test_information_measures(kind, gap):
    z = np.array(ORDINARY) * (gap if kind == "entropy" and gap > 1 else 1.0)
    t = z + gap * np.array([0.5, -1.0, 0.3, 0.9, -0.2])
    inputs = [z] if kind == "entropy" else [z, t]
    function = {
        "entropy": oracle.softmax_entropy,
        "kl": oracle.softmax_kl_divergence,
        "js": oracle.softmax_js_divergence,
    }[kind]
    paper = [exactly(x) for x in inputs]
    assert_close(function(*inputs), [measure_on_paper(kind, *paper)], 1e-12)
    got = function(*inputs, cotangent=np.array(1.0))
    for i in range(len(inputs)):
        want = gradient(lambda x, i=i: measure_on_paper(kind, *paper[:i], x, *paper[i + 1 :]), paper[i])
        assert_close(got[i], want, 1e-11)


def test_statistics():
    for z in LOGITS.values():
        got = oracle.softmax_statistics(np.array(z), np.array(1))
        log_p = log_softmax(exactly(z), [True] * 5)
        assert_close(got.log_prob, [log_p[1]], 1e-17)
        assert_close(got.log_normalizer, [mp.log(mp.fsum(map(mp.exp, exactly(z))))], 1e-17)
        assert_close(got.entropy, [measure_on_paper("entropy", exactly(z))], 1e-17)
        assert_close(got.mean_log_prob, [mp.fsum(log_p) / 5], 1e-17)
        assert got.prediction == np.argmax(z) and got.rank == np.sum(np.array(z) > z[1])
    functions = {
        "log_prob": lambda x: log_softmax(x, [True] * 5)[1],
        "log_normalizer": lambda x: mp.log(mp.fsum(map(mp.exp, x))),
        "entropy": lambda x: measure_on_paper("entropy", x),
        "mean_log_prob": lambda x: mp.fsum(log_softmax(x, [True] * 5)) / 5,
    }
    for z in (ORDINARY, CONFIDENT):
        for name, f in functions.items():
            got = oracle.softmax_statistics(np.array(z), np.array(1), cotangents={name: 1.0})
            assert_close(got, gradient(f, exactly(z)), 1e-16)


def test_reductions_and_rows_that_do_not_count():
    z = np.array([[1.0, 2.0, 0.5], [np.nan, 0, 0], [0.1, np.inf, 0], [3.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    labels = np.array([1, -7, 0, -100, 0])
    where = np.array([True, False, True, True, True])
    weights = np.array([2.0, 1.0, 0.0, 1.0, 0.5])
    options = dict(where=where, weights=weights, ignore_index=-100, class_weights=np.array([3.0, 1.0, 1.0]))
    rows = oracle.softmax_cross_entropy(z, labels, **options)
    assert (rows[1:4] == 0).all() and (rows[[0, 4]] > 0).all()
    mean = oracle.softmax_cross_entropy(z, labels, reduction="mean", **options)
    np.testing.assert_allclose(mean, rows.sum() / (2.0 + 0.5 * 3.0), rtol=1e-18)
    gradient = oracle.softmax_cross_entropy(z, labels, reduction="mean", cotangent=1.0, **options).logits
    assert (gradient[1:4] == 0).all() and np.isfinite(gradient).all()
    assert oracle.mean(rows, where=where, weights=weights) == (2 * rows[0] + rows[4] / 2) / 3.5
    assert oracle.mean(rows, where=np.zeros(5, bool)) == 0
