"""What every softmax loss must be, written naively in NumPy longdouble; imports neither jax nor jaxent.

One row at a time in formulas, all rows at once in arrays: logits `z` are `[..., V]` with the class axis last and
hidden classes at -inf. Each loss returns its value, or with `cotangent` its gradients with respect to the logits
and to float labels. Nothing here subtracts two nearly equal numbers: the argmax stays out of the sum of the
exponentials, so confident rows (losses of 1e-30) keep all their digits.
"""

import functools
from typing import NamedTuple

import numpy as np

LD = np.longdouble


class Gradients(NamedTuple):
    logits: np.ndarray
    labels: np.ndarray | None  # of a float distribution (or of the target logits)


class Statistics(NamedTuple):
    log_prob: np.ndarray | None
    log_normalizer: np.ndarray
    entropy: np.ndarray
    mean_log_prob: np.ndarray
    prediction: np.ndarray
    rank: np.ndarray | None


class Softmax:
    """log p, p and 1 - p of rows of logits, none of them by a difference of nearly equal numbers."""

    def __init__(self, z):
        self.z = z
        self.top = np.arange(z.shape[-1]) == z.argmax(-1)[..., None]  # one True per row
        m = z.max(-1, keepdims=True)
        e = np.exp(z - m)
        s = self.without_top(e)
        self.log_p = (z - m) - np.log1p(s)
        self.p = e / (1 + s)
        self.not_p = np.where(self.top, s, 1 + s - e) / (1 + s)
        self.lse = (m + np.log1p(s))[..., 0]
        self.bad = np.isnan(z).any(-1) | ~np.isfinite(m[..., 0])  # a NaN, +inf, or nothing but -inf

    def without_top(self, x):
        return np.where(self.top, 0, x).sum(-1, keepdims=True)

    def gradient_of_log_probs(self, k):
        """Gradient of sum_c k_c log p_c, which is k - K p with K = sum k."""
        total = k.sum(-1, keepdims=True)
        at_top = total * self.not_p - self.without_top(k)
        return np.where(self.top, at_top, k - total * self.p)

    def centered(self, x):
        """x_j - sum_c p_c x_c; 0 * inf = 0."""
        others = self.without_top(product(self.p, x))
        at_top = product(self.not_p, x) - others
        return np.where(self.top, at_top, x - product(self.p, x).sum(-1, keepdims=True))


def product(weight, x):
    """weight * x with 0 * inf = 0."""
    return np.where(weight == 0, 0, weight * np.where(weight == 0, 0, x))


def class_last(logits, axis, class_mask):
    """Logits with the class axis last and hidden classes at -inf, and which classes are in force."""
    z = np.moveaxis(np.asarray(logits, LD), axis, -1)
    force = np.ones(z.shape, bool)
    if class_mask is not None:
        class_mask = np.asarray(class_mask)
        force &= class_mask if class_mask.ndim == 1 else np.moveaxis(class_mask, axis, -1)
    return np.where(force, z, -np.inf), force


def reduce(rows, divisor, reduction):
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    return total / divisor.sum() if divisor.sum() else LD(0)


def row_cotangents(cotangent, divisor, reduction):
    """d(result)/d(row): the cotangent of each row of a reduced result."""
    cotangent = np.asarray(cotangent, LD)
    if reduction == "mean":
        cotangent = cotangent / divisor.sum() if divisor.sum() else LD(0)
    return np.broadcast_to(cotangent, divisor.shape)


def rows_in_force(shape, where, weights):
    weights = np.ones(shape, LD) if weights is None else np.asarray(weights, LD)
    counts = weights != 0
    return (counts if where is None else counts & where), weights


def softmax_loss(
    f,
    logits,
    labels,
    *,
    axis=-1,
    where=None,
    ignore_index=None,
    weights=None,
    class_weights=None,
    class_mask=None,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="none",
    cotangent=None,
):
    """sum_j w_j t_j f_j, with f(softmax) -> (f_j, d f_j / d log p_j) and t the label after smoothing; plus z_loss."""
    with np.errstate(all="ignore"):
        labels = np.asarray(labels)
        z, force = class_last(logits, axis, class_mask)
        classes = z.shape[-1]
        soft = Softmax(z)
        counts, weights = rows_in_force(z.shape[:-1], where, weights)
        bad = soft.bad
        w = np.ones(classes, LD) if class_weights is None else np.asarray(class_weights, LD)

        if labels.dtype.kind == "f":  # a distribution
            q = np.moveaxis(labels.astype(LD), axis, -1)
            w_y = np.ones(z.shape[:-1], LD)
            bad = bad | np.isnan(q).any(-1)
        else:
            ok = (labels >= 0) & (labels < classes)
            y = np.where(ok, labels, 0).astype(np.int64)
            q = (np.arange(classes) == y[..., None]).astype(LD)
            w_y = w[y]
            bad = bad | ~ok | ~(q * force).any(-1)
            if not label_smoothing:  # which leaves a/V sum_j w_j log p_j
                counts = counts & ((w_y != 0) | ~ok)
            if ignore_index is not None:
                counts = counts & (labels != ignore_index)

        a = LD(label_smoothing)
        k = w * ((1 - a) * q + np.where(force, a / force.sum(-1, keepdims=True), 0))
        f, slope = f(soft)
        loss = product(k, f).sum(-1)
        if z_loss:
            loss = loss + LD(z_loss) * w_y * soft.lse**2
        loss = np.where(counts, np.where(bad, np.nan, loss * weights), 0)
        divisor = np.where(counts, weights * w_y, 0)
        if cotangent is None:
            return reduce(loss, divisor, reduction)

        scale = (row_cotangents(cotangent, divisor, reduction) * weights)[..., None]
        dz = soft.gradient_of_log_probs(product(k, slope))
        if z_loss:
            dz = dz + LD(z_loss) * (2 * w_y * soft.lse)[..., None] * soft.p
        dq = w * (1 - a) * f

        def finish(x):
            x = np.where(counts[..., None], np.where(bad[..., None], np.nan, x * scale), 0)
            return np.moveaxis(np.where(force, x, 0) if class_mask is not None else x, -1, axis)

        return Gradients(finish(dz), finish(dq) if labels.dtype.kind == "f" else None)


def softmax_cross_entropy(logits, labels, **options):
    return softmax_loss(lambda soft: (-soft.log_p, -np.ones_like(soft.p)), logits, labels, **options)


def softmax_focal_loss(logits, labels, *, gamma=2.0, alpha=1.0, **options):
    """The sum over classes of Keras' categorical focal loss."""
    gamma = LD(gamma)

    def f(soft):
        u, power = soft.not_p, soft.not_p**gamma
        slope = 0 if gamma == 0 else product(gamma * product(soft.p, soft.log_p), u ** (gamma - 1))
        return np.multiply(alpha, -product(power, soft.log_p)), np.multiply(alpha, slope - power)

    return softmax_loss(f, logits, labels, **options)


def softmax_poly_loss(logits, labels, *, epsilon=1.0, **options):
    """optax's poly loss, for distributions."""

    def f(soft):
        return LD(epsilon) * soft.not_p - soft.log_p, -1 - LD(epsilon) * soft.p

    return softmax_loss(f, logits, labels, **options)


def softmax_statistics(logits, labels=None, *, axis=-1, where=None, class_mask=None, cotangents=None):
    """`cotangents`: {name: [...]} of log_prob, log_normalizer, entropy, mean_log_prob; gives d/d logits."""
    with np.errstate(all="ignore"):
        z, force = class_last(logits, axis, class_mask)
        classes = z.shape[-1]
        soft = Softmax(z)
        counts = np.ones(z.shape[:-1], bool) if where is None else np.asarray(where)
        bad = soft.bad
        log_prob = rank = None
        q = np.zeros_like(z)
        if labels is not None:
            labels = np.asarray(labels)
            if labels.dtype.kind == "f":
                q = np.moveaxis(labels.astype(LD), axis, -1)
            else:
                bad = bad | (labels < 0) | (labels >= classes)
                y = np.where((labels < 0) | (labels >= classes), 0, labels).astype(np.int64)
                q = (np.arange(classes) == y[..., None]).astype(LD)
                bad = bad | ~(q * force).any(-1)
                rank = (z > np.take_along_axis(z, y[..., None], -1)).sum(-1)
            log_prob = product(q, soft.log_p).sum(-1)
        uniform = np.where(force, LD(1) / force.sum(-1, keepdims=True), 0)
        entropy = -product(soft.p, soft.log_p).sum(-1)
        mean_log_prob = product(uniform, soft.log_p).sum(-1)
        if cotangents is None:

            def finish(x):
                return np.where(counts, np.where(bad, np.nan, x), 0)

            return Statistics(
                None if log_prob is None else finish(log_prob),
                finish(soft.lse),
                finish(entropy),
                finish(mean_log_prob),
                z.argmax(-1),
                rank,
            )
        zero = np.zeros(z.shape[:-1], LD)
        ct = {name: np.asarray(cotangents.get(name, zero), LD)[..., None] for name in Statistics._fields}
        dz = ct["log_prob"] * soft.gradient_of_log_probs(q)
        dz = dz + ct["log_normalizer"] * soft.p
        dz = dz - ct["entropy"] * product(soft.p, soft.centered(soft.log_p))
        dz = dz + ct["mean_log_prob"] * soft.gradient_of_log_probs(uniform)
        dz = np.where(counts[..., None], np.where(bad[..., None], np.nan, dz), 0)
        return np.moveaxis(np.where(force, dz, 0), -1, axis)


def information_measure(rows_of, softs, axis, force, where, weights, reduction, temperature, cotangent):
    """Rows and their gradients, weighted and reduced; the divisor has no class weights."""
    value, gradients = rows_of(*softs)
    bad = np.logical_or.reduce([soft.bad for soft in softs])
    counts, weights = rows_in_force(value.shape, where, weights)
    divisor = np.where(counts, weights, 0)
    if cotangent is None:
        return reduce(np.where(counts, np.where(bad, np.nan, value * weights), 0), divisor, reduction)
    scale = (row_cotangents(cotangent, divisor, reduction) * weights / LD(temperature))[..., None]

    def finish(x):
        x = np.where(counts[..., None], np.where(bad[..., None], np.nan, x * scale), 0)
        return np.moveaxis(np.where(force, x, 0), -1, axis)

    return Gradients(*map(finish, gradients), *[None] * (2 - len(gradients)))


def softmax_entropy(
    logits, *, axis=-1, where=None, weights=None, class_mask=None, reduction="none", cotangent=None
):
    def rows(soft):
        terms = -product(soft.p, soft.log_p)
        return terms.sum(-1), [-product(soft.p, soft.centered(soft.log_p))]

    with np.errstate(all="ignore"):
        z, force = class_last(logits, axis, class_mask)
        return information_measure(rows, [Softmax(z)], axis, force, where, weights, reduction, 1, cotangent)


def log_ratio(p, q):
    """log p - log q per class; 0 where both are 0."""
    return np.where(np.isneginf(p.log_p) & np.isneginf(q.log_p), 0, p.log_p - q.log_p)


def expm1_minus(d):
    """exp(d) - 1 - d >= 0."""
    series = np.ones_like(d)
    for n in range(22, 2, -1):  # 1 + d/3 (1 + d/4 (1 + ...
        series = 1 + series * d / n
    return np.where(np.abs(d) < 0.5, d * d / 2 * series, np.expm1(d) - d)


def kl_rows(p, q):
    """KL(q || p), and the gradients by the logits of p and of q."""
    d = log_ratio(p, q)
    # sum p - sum q = 0, so sum q (-d) = sum (p - q - q d) = sum q (exp(d) - 1 - d), where no term is negative
    terms = np.where(q.p == 0, p.p, product(q.p, expm1_minus(d)))
    difference = np.where(q.p == 0, p.p, q.p * np.expm1(d))
    return terms.sum(-1), [difference, -product(q.p, q.centered(d))]


def js_rows(p, q, beta=0.5):
    """beta KL(q || h) + (1 - beta) KL(p || h), or a KL at the ends, and the gradients by the logits of p and of q."""
    if beta == 0:
        return kl_rows(p, q)
    if beta == 1:
        value, gradients = kl_rows(q, p)
        return value, gradients[::-1]
    d, b, c = log_ratio(p, q), LD(beta), 1 - LD(beta)
    h = c * p.p + b * q.p

    def log_mean(d, b, c):  # log(c + b exp(d))
        x = b * np.expm1(d)
        return np.where(x > -0.5, np.log1p(x), np.logaddexp(np.log(c), np.log(b) + d))

    parts = []
    for x, share, of_h in ((p, c, log_mean(-d, b, c)), (q, b, log_mean(d, c, b))):  # log(h / p), log(h / q)
        terms = np.where(x.p == 0, h, product(x.p, expm1_minus(of_h)))
        parts.append((share * terms.sum(-1), -share * product(x.p, x.centered(of_h))))
    (of_p, dp), (of_q, dq) = parts
    return of_p + of_q, [dp, dq]


def divergence(rows, logits, target_logits, temperature, axis, class_mask, options):
    with np.errstate(all="ignore"):
        z, force = class_last(logits, axis, class_mask)
        t, _ = class_last(target_logits, axis, class_mask)
        softs = [Softmax(z / LD(temperature)), Softmax(t / LD(temperature))]
        return information_measure(rows, softs, axis, force, *options[:3], temperature, options[3])


def softmax_kl_divergence(
    logits,
    target_logits,
    *,
    temperature=1.0,
    axis=-1,
    where=None,
    weights=None,
    class_mask=None,
    reduction="none",
    cotangent=None,
):
    options = (where, weights, reduction, cotangent)
    return divergence(kl_rows, logits, target_logits, temperature, axis, class_mask, options)


def softmax_js_divergence(
    logits,
    target_logits,
    *,
    temperature=1.0,
    beta=0.5,
    axis=-1,
    where=None,
    weights=None,
    class_mask=None,
    reduction="none",
    cotangent=None,
):
    options = (where, weights, reduction, cotangent)
    rows = functools.partial(js_rows, beta=beta)
    return divergence(rows, logits, target_logits, temperature, axis, class_mask, options)


def mean(losses, *, where=None, weights=None):
    losses = np.asarray(losses, LD)
    counts, weights = rows_in_force(losses.shape, where, weights)
    weights = np.where(counts, weights, 0)
    return reduce(product(weights, losses), weights, "mean")
