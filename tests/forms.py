"""The softmax functions as rows -> losses, each beside plain jax.numpy: what is transformed must stay the same."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

import jaxent

SHARED = ("scale",)  # inputs that all rows have in common
CLASS_WEIGHTS = (0.5, 2.0)  # of even and odd classes
COTANGENT = np.cos(2.0 * np.arange(8))  # of the rows: uneven, of both signs


class Form(NamedTuple):
    rows: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    inputs: tuple[str, ...]  # names in `inputs`, logits first

    def in_axes(self) -> tuple[int | None, ...]:
        return tuple(None if name in SHARED else 0 for name in self.inputs)

    def arguments(self, classes: int, dtype: Any = jnp.float32) -> list[jax.Array]:
        made = inputs(classes)
        return [jnp.asarray(x, dtype if x.dtype.kind == "f" else None) for x in map(made.get, self.inputs)]


def inputs(classes: int) -> dict[str, np.ndarray]:
    """Rows: all logits tied; sure of the label; sure of another class; two classes tied; three ordinary ones."""
    rng = np.random.default_rng([5, classes])
    label = rng.integers(classes - 1, size=8)
    z, target = 2 * rng.normal(size=(2, 8, classes))
    z[0] = target[0] = 0
    z[1, label[1]] = z[1].max() + 25
    z[2, label[2] + 1] = z[2].max() + 12
    z[3, label[3]] = z[3, label[3] + 1] = z[3].max() + 0.5
    target[1] = z[1] + 1e-3 * target[1]
    q = np.exp(rng.normal(size=z.shape)) * (rng.uniform(size=z.shape) < 0.5)
    q[np.arange(8), label] += 0.1
    return {
        "logits": z,
        "target": target,
        "label": label.astype(np.int32),
        "distribution": q / q.sum(-1, keepdims=True),
        "advantage": rng.normal(size=8),
        "where": np.arange(8) != 5,
        "weights": rng.uniform(0.5, 2, size=8),
        "scale": np.array([1.5, 0.25, -0.5]),
    }


def log_prob(z: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.take_along_axis(nn.log_softmax(z), label[..., None], -1)[..., 0]


def entropy(z: jax.Array) -> jax.Array:
    return -jnp.sum(nn.softmax(z) * nn.log_softmax(z), -1)


def options_rows(z, label, where, weights):
    return jaxent.softmax_cross_entropy(
        z,
        label,
        where=where,
        weights=weights,
        class_weights=class_weights(z),
        label_smoothing=0.1,
        z_loss=0.01,
    )


def options_plain(z, label, where, weights):
    w = class_weights(z)
    smooth = jnp.mean(jnp.broadcast_to(w, z.shape) * nn.log_softmax(z), -1)
    z_loss = 0.01 * w[label] * nn.logsumexp(z, -1) ** 2
    return where.astype(z.dtype) * weights * (z_loss - 0.9 * w[label] * log_prob(z, label) - 0.1 * smooth)


def class_weights(z: jax.Array) -> jax.Array:
    return jnp.resize(jnp.asarray(CLASS_WEIGHTS, z.dtype), z.shape[-1])


def policy_rows(z, label, advantage, scale):
    """A user's objective: `fn` closes over `scale`."""

    def fn(s, a):
        return -a * scale[0] * s.log_prob - scale[1] * s.entropy + scale[2] * s.log_normalizer**2

    return jaxent.softmax_loss(fn, z, label, advantage, reduction="none")


def policy_plain(z, label, advantage, scale):
    policy = -advantage * scale[0] * log_prob(z, label)
    return policy - scale[1] * entropy(z) + scale[2] * nn.logsumexp(z, -1) ** 2


def statistics_rows(z, label):
    s = jaxent.softmax_statistics(z, label)
    integers = (s.prediction + 3 * s.rank).astype(z.dtype)
    return s.log_prob + s.weighted_log_prob + s.mean_log_prob * s.entropy + s.log_normalizer**2 + integers


def statistics_plain(z, label):
    above = jnp.sum(z > jnp.take_along_axis(z, label[..., None], -1), -1)
    integers = (jnp.argmax(z, -1) + 3 * above).astype(z.dtype)
    real = jnp.mean(nn.log_softmax(z), -1) * entropy(z) + nn.logsumexp(z, -1) ** 2
    return 2 * log_prob(z, label) + real + integers


def kl_plain(z, target):
    return jnp.sum(nn.softmax(target) * (nn.log_softmax(target) - nn.log_softmax(z)), -1)


def js_plain(z, target):
    log_half = jnp.logaddexp(nn.log_softmax(z), nn.log_softmax(target)) - jnp.log(2)
    parts = [jnp.sum(nn.softmax(x) * (nn.log_softmax(x) - log_half), -1) for x in (z, target)]
    return sum(parts) / 2


FORMS = {
    "cross_entropy": Form(
        jaxent.softmax_cross_entropy, lambda z, label: -log_prob(z, label), ("logits", "label")
    ),
    "cross_entropy, options": Form(options_rows, options_plain, ("logits", "label", "where", "weights")),
    "cross_entropy, distribution": Form(
        jaxent.softmax_cross_entropy,
        lambda z, q: -jnp.sum(q * nn.log_softmax(z), -1),
        ("logits", "distribution"),
    ),
    "focal": Form(
        jaxent.softmax_focal_loss,
        lambda z, label: -((1 - jnp.exp(log_prob(z, label))) ** 2) * log_prob(z, label),
        ("logits", "label"),
    ),
    "poly": Form(
        jaxent.softmax_poly_loss,
        lambda z, label: 1 - jnp.exp(log_prob(z, label)) - log_prob(z, label),
        ("logits", "label"),
    ),
    "softmax_loss": Form(policy_rows, policy_plain, ("logits", "label", "advantage", "scale")),
    "statistics": Form(statistics_rows, statistics_plain, ("logits", "label")),
    "entropy": Form(jaxent.softmax_entropy, entropy, ("logits",)),
    "kl": Form(jaxent.softmax_kl_divergence, kl_plain, ("logits", "target")),
    "js": Form(jaxent.softmax_js_divergence, js_plain, ("logits", "target")),
}


def moving(arguments: list[jax.Array]) -> tuple[int, ...]:
    """Which arguments can be differentiated."""
    return tuple(i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating))


def tangents(arguments: list[jax.Array]) -> list[jax.Array]:
    """A direction for each argument that can be differentiated."""
    rng = np.random.default_rng(17)
    return [jnp.asarray(rng.normal(size=arguments[i].shape), arguments[i].dtype) for i in moving(arguments)]


def total(rows: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Rows as a scalar."""

    def scalar(*arguments: jax.Array) -> jax.Array:
        losses = rows(*arguments)
        return jnp.vdot(losses, jnp.asarray(COTANGENT, losses.dtype))

    return scalar
