"""What the elementwise losses and the losses on probabilities must be, in NumPy longdouble, naively.

Imports neither jax nor jaxent. Gradients are for a cotangent of 1 per element or row.
"""

import ml_dtypes
import mpmath as mp
import numpy as np

LD = np.longdouble


def product(weight, x):
    """weight * x with 0 * inf = 0."""
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, LD(0), weight * np.where(weight == 0, LD(0), x))


def limit(weight, x):
    return np.where((weight == 0) & np.isinf(x), LD(0), x)


def probability(x):
    """NaN outside [0, 1]; up to 16 eps of its dtype above 1 is 1."""
    eps = ml_dtypes.finfo(x.dtype).eps if x.dtype.kind in "fV" else 0
    x = LD(1) * x
    return np.where((x >= 0) & (x <= 1 + 16 * LD(eps)), np.minimum(x, 1), LD("nan"))


def softplus(z):
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def power(x, gamma):
    """Of a factor of something that is 0 where x is: a step to gamma < 0, of a difference, sees 0 there."""
    if gamma == 0:
        return np.ones_like(x)
    return np.where(x == 0, 0, np.where(x == 0, 1, x) ** LD(gamma))


def sigmoid_loss(
    z, y, *, pos_weight=1.0, label_smoothing=0.0, alpha=None, gamma_positive=0.0, gamma_negative=0.0, clip=0.0
):
    """loss, dloss/dz, dloss/dy, dloss/dpos_weight."""
    with np.errstate(all="ignore"):
        z, y, w, s = LD(1) * z, probability(y), LD(1) * pos_weight, LD(label_smoothing)
        yes, no = (1 - s) * y + s / 2, (1 - s) * (1 - y) + s / 2
        alpha_yes, alpha_no = (LD(1), LD(1)) if alpha is None else (LD(1) * alpha, 1 - LD(1) * alpha)
        p, q, a = sigmoid(z), sigmoid(-z), softplus(-z)
        u = np.maximum(p - LD(clip), 0)
        b = -np.log1p(-u) if clip else softplus(z)
        on = u > 0
        loss_yes = power(q, gamma_positive) * a
        loss_no = power(u, gamma_negative) * b
        slope_yes = -power(q, gamma_positive) * (gamma_positive * product(p, a) + q)
        per_u = p / np.where(on, u, 1)
        inner = gamma_negative * product(q, b) * per_u + (np.where(on, p * q / (1 - u), 0) if clip else p)
        slope_no = power(u, gamma_negative) * inner
        positive, negative = alpha_yes * w * yes, alpha_no * no
        loss = product(positive, loss_yes) + product(negative, loss_no)
        dz = product(positive, slope_yes) + product(negative, slope_no)
        dy = (1 - s) * (
            product(alpha_yes * w, limit(positive, loss_yes)) - product(alpha_no, limit(negative, loss_no))
        )
        dy = np.where(np.isnan(y), y, dy)
        dz = np.where(np.isnan(z), z, dz)
        return loss, dz, dy, product(alpha_yes * yes, loss_yes)


def sigmoid_focal_loss(z, y, *, gamma=2.0, **options):
    return sigmoid_loss(z, y, gamma_positive=gamma, gamma_negative=gamma, **options)


def sigmoid_asymmetric_loss(z, y, *, gamma_negative=4.0, gamma_positive=1.0, clip=0.05, **options):
    return sigmoid_loss(
        z, y, gamma_negative=gamma_negative, gamma_positive=gamma_positive, clip=clip, **options
    )


def masked(x, where, weights):
    """x times its weight, exactly 0 where it does not count, and the total weight."""
    weights = np.ones(x.shape, LD) if weights is None else LD(1) * np.asarray(weights, LD)
    counts = weights != 0 if where is None else where & (weights != 0)
    return product(np.where(counts, weights, 0), np.where(counts, x, 0)), np.where(counts, weights, 0).sum()


def reduce(x, reduction, where=None, weights=None):
    x, total = masked(x, where, weights)
    if reduction == "none":
        return x
    return x.sum() / (1 if reduction == "sum" else total) if reduction == "sum" or total else LD(0)


def one_hot(labels, classes):
    return LD(1) * (np.arange(classes) == np.asarray(labels)[..., None])


def categorical_cross_entropy(p, q):
    """-sum q log p over the last axis, and its gradient in p; a row with p outside [0, 1] is NaN."""
    with np.errstate(all="ignore"):
        p, q = probability(p), LD(1) * q
        ok = ~np.isnan(p).any(-1)
        loss = product(q, -np.log(p)).sum(-1)
        slope = product(q, -1 / p)
        return np.where(ok, loss, np.nan), np.where(ok[..., None], slope, np.nan)


def binary_cross_entropy(p, y):
    """loss, dloss/dp, dloss/dy."""
    with np.errstate(all="ignore"):
        p, y = probability(p), probability(y)
        ok = ~np.isnan(p + y)
        a, b = -np.log(p), -np.log1p(-p)
        loss = product(y, a) + product(1 - y, b)
        slope = product(y, -1 / p) + product(1 - y, 1 / (1 - p))
        dy = limit(y, a) - limit(1 - y, b)
        return tuple(np.where(ok, x, np.nan) for x in (loss, slope, dy))


def nll_loss(log_p, q, class_weights=None):
    """-sum q w log p over the last axis, and its gradient in log p."""
    q = LD(1) * q * (1 if class_weights is None else LD(1) * np.asarray(class_weights, LD))
    return product(q, -LD(1) * log_p).sum(-1), -q


def kl_divergence(log_p, q):
    """sum q (log q - log p) over the last axis, and its gradient in log p."""
    with np.errstate(all="ignore"):
        log_p, q = LD(1) * log_p, probability(q)
        ok = ~np.isnan(q + log_p).any(-1)
        loss = product(q, np.log(q) - log_p).sum(-1)
        return np.where(ok, loss, np.nan), np.where(ok[..., None], -q, np.nan)


def generalized_kl_divergence(log_p, q):
    """sum q (log q - log p) - q + p over the last axis, with 50 digits; its gradients p - q and log q - log p."""

    def element(x, t):
        x, t = mp.mpf(float(x)), mp.mpf(float(t))
        log_ratio = mp.log(t) - x if t else mp.mpf(0)
        return t * log_ratio - t + mp.exp(x)

    def rounded(x):
        return LD(mp.nstr(x, 30))

    with mp.workdps(50), np.errstate(all="ignore"):
        loss = np.vectorize(rounded)(np.vectorize(element, otypes=[object])(log_p, q).sum(-1))
        p = np.vectorize(lambda x: rounded(mp.exp(mp.mpf(float(x)))))(log_p)
        return loss, p - LD(1) * q, np.log(LD(1) * q) - LD(1) * log_p
