"""Every loss of rows as its formula says, in NumPy's complex numbers: gradients are complex steps, not derivations.

f'(x) = Im f(x + ih) / h has no rounding to speak of, as nothing is subtracted. So there is no second gradient rule
here that could repeat a mistake of the first. Weights, masks and reductions are linear: they are written out.
Imports neither jax nor jaxent.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

STEP = 1e-100


def slopes(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """df_n/dx_n of an `f` that takes elements apart."""
    return f(x + 1j * STEP).imag / STEP


def row_slopes(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """df_n/dx_nj of an `f` from rows `[..., V]` to numbers `[...]`: one class of all rows at a time."""
    steps = 1j * STEP * np.eye(x.shape[-1])
    found = [f(x + step).imag / STEP for step in steps]
    return np.moveaxis(np.array(found), 0, -1)


def where_not_0(weight: np.ndarray, x: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """f(x), 0 where the weight is 0."""
    return np.where(weight == 0, 0, f(np.where(weight == 0, 1, x)))


class LogSoftmax:
    """Of rows of logits, over the classes in force; 0 for the others, which no formula reads."""

    def __init__(self, z: np.ndarray, force: np.ndarray):
        m = np.where(force, z.real, -np.inf).max(-1, keepdims=True)
        total = np.where(force, np.exp(np.where(force, z - m, 0)), 0).sum(-1, keepdims=True)
        self.lse = (m + np.log(total))[..., 0]
        self.log_p = np.where(force, z - m - np.log(total), 0)
        self.p = np.where(force, np.exp(self.log_p), 0)
        self.uniform = force / force.sum(-1, keepdims=True)


def policy(log_prob: Any, entropy: Any, lse: Any, mean_log_prob: Any, advantage: Any) -> Any:
    """What `softmax_loss` is given, here and in jax."""
    return -advantage * log_prob - 0.1 * entropy + 0.01 * lse * lse + 0.2 * mean_log_prob


SLOTS = (0.3, -0.2, 0.4, 0.1)  # factors of the log-probabilities of chosen classes


def of_classes(class_log_probs: list[Any], other_log_prob: Any) -> Any:
    """What is added where classes are chosen: of those that are none, 0 is given."""
    return sum(c * x for c, x in zip(SLOTS, class_log_probs, strict=True)) - 0.5 * other_log_prob


def softmax(loss: str, z: np.ndarray, q: Any, force: np.ndarray, w_y: Any, o: dict[str, Any]) -> np.ndarray:
    """Rows of logits and of targets q (one-hot for a class index), w_y the class weight of the label, or 1.

    Class weights with smoothing a: -(1 - a) sum_j w_j q_j log p_j - a/V sum_j w_j log p_j, torch's definition.
    """
    s = LogSoftmax(z, force)
    entropy, mean_log_prob = -(s.p * s.log_p).sum(-1), (s.uniform * s.log_p).sum(-1)
    if loss == "softmax_entropy":
        return entropy
    if loss == "softmax_loss":
        log_prob = 0 if q is None else (q * s.log_p).sum(-1)
        found = policy(log_prob, entropy, s.lse, mean_log_prob, o["advantage"])
        if "classes" not in o:
            return found
        at = np.arange(z.shape[-1]) == o["classes"][..., None]  # [..., K, V]
        of_slots = (at * s.log_p[..., None, :]).sum(-1)
        others = (~at.any(-2) * s.p).sum(-1)
        return found + of_classes([of_slots[..., k] for k in range(at.shape[-2])], np.log(others))
    # sum_j t_j f(p_j): Keras' categorical focal loss, optax's poly loss of distributions
    t = (1 - o.get("label_smoothing", 0)) * q + o.get("label_smoothing", 0) * s.uniform
    f = -s.log_p
    if loss == "softmax_focal_loss":
        f = o.get("alpha", 1) * (1 - s.p) ** o.get("gamma", 2) * f
    if loss == "softmax_poly_loss":
        f = f + o.get("epsilon", 1) * (1 - s.p) * force  # and no class that is not in force
    return (o.get("class_weights", 1) * t * f).sum(-1) + o.get("z_loss", 0) * w_y * s.lse**2


def of_mean(loss: str, of_p: np.ndarray, of_q: np.ndarray, o: dict[str, Any]) -> np.ndarray:
    """The divergence, of KL(p || h) and KL(q || h); at the ends one of them."""
    beta = beta_of(loss, o)
    return {0: of_q, 1: of_p}.get(beta, (1 - beta) * of_p + beta * of_q)


def beta_of(loss: str, o: dict[str, Any]) -> float:
    return 0 if loss == "softmax_kl_divergence" else o.get("beta", 0.5)


def divergence(loss: str, z: np.ndarray, t: np.ndarray, force: np.ndarray, o: dict[str, Any]) -> np.ndarray:
    p, q = (LogSoftmax(x / o.get("temperature", 1), force) for x in (z, t))
    h = (1 - beta_of(loss, o)) * p.p + beta_of(loss, o) * q.p
    log_h = np.log(np.where(force, h, 1))
    of_p, of_q = ((x.p * (x.log_p - log_h)).sum(-1) for x in (p, q))
    return of_mean(loss, of_p, of_q, o)


def divergence_from_few(
    loss: str, z: np.ndarray, q: np.ndarray, named: np.ndarray, force: np.ndarray, o: dict[str, Any]
) -> np.ndarray:
    """To a target q `[..., V]` of the classes that are `named`; all others are one more, or left out."""
    p = LogSoftmax(z / o.get("temperature", 1), force).p
    p, q, rest = np.where(named, p, 0), np.where(named, q, 0), np.where(named, 0, p).sum(-1, keepdims=True)
    if o.get("rest", "bucket") == "bucket":
        p, q = (np.concatenate(x, -1) for x in ((p, rest), (q, 1 - q.sum(-1, keepdims=True))))
    h = (1 - beta_of(loss, o)) * p + beta_of(loss, o) * q
    log_h = where_not_0(h, h, np.log)
    of_p, of_q = (where_not_0(x, x, lambda x: x * (np.log(x) - log_h)).sum(-1) for x in (p, q))
    return of_mean(loss, of_p, of_q, o)


def sigmoid(loss: str, z: np.ndarray, y: np.ndarray, pos_weight: Any, o: dict[str, Any]) -> np.ndarray:
    a = o.get("label_smoothing", 0)
    yes, no = (1 - a) * y + a / 2, (1 - a) * (1 - y) + a / 2
    p, up, down, clip = 1 / (1 + np.exp(-z)), 0, 0, 0
    if loss == "sigmoid_focal_loss":
        up = down = o.get("gamma", 2)
    if loss == "sigmoid_asymmetric_loss":
        up, down, clip = o.get("gamma_positive", 1), o.get("gamma_negative", 4), o.get("clip", 0.05)
    u = np.where(p.real > clip, p - clip, 0)
    alpha = o.get("alpha")
    alphas = (1, 1) if alpha is None else (alpha, 1 - alpha)
    positive = alphas[0] * pos_weight * yes * (1 - p) ** up * -np.log(p)
    return positive + alphas[1] * no * u**down * -np.log(1 - u)


def probability(loss: str, x: np.ndarray, y: Any, o: dict[str, Any]) -> np.ndarray:
    """Of probabilities or log-probabilities, and of targets (one-hot for a class index)."""
    if loss == "mean":
        return x
    if loss == "binary_cross_entropy":
        return -y * np.log(x) - (1 - y) * np.log(1 - x)
    if loss == "categorical_cross_entropy":
        return -(y * np.log(x)).sum(-1)
    if loss == "nll_loss":
        return -(o.get("class_weights", 1) * y * x).sum(-1)
    return (where_not_0(y.real, y, lambda y: y * np.log(y)) - y * x).sum(-1)
