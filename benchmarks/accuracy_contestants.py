"""Who takes part in benchmarks/accuracy.py: losses and gradients of rows, each as one would write them with a library.

A peer is added here: its loss, a name, a line in `SOFTMAX` or `SIGMOID`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxent
from accuracy_cases import DTYPES, SIGMOID_LOSSES, loss_and_gradient, run, widened

try:
    import torch
except ImportError:
    torch = None

JAXENT, OPTAX, TORCH = "jaxent", "optax", "torch"
LOG_SOFTMAX, NAIVE = "-log_softmax(z)", "-log(softmax(z))"
LOG_SIGMOID, NAIVE_SIGMOID = "-log_sigmoid(z)", "-log(sigmoid(z))"
COLORS = {
    JAXENT: "#d1495b",
    OPTAX: "#66a182",
    TORCH: "#3d6fb6",
    LOG_SOFTMAX: "#edae49",
    NAIVE: "#9a9a9a",
    LOG_SIGMOID: "#edae49",
    NAIVE_SIGMOID: "#9a9a9a",
}
Losses = Callable[..., jax.Array]
Contestant = Callable[
    [np.ndarray, np.ndarray, str], tuple[np.ndarray, np.ndarray]
]  # of logits, labels, dtype


def in_jax(losses: Losses) -> Contestant:
    def contestant(z, labels, dtype):
        return run(jax.jit, loss_and_gradient, (losses,), dtype, z, labels)

    return contestant


def in_torch(losses: Callable) -> Contestant:
    def contestant(z, labels, dtype):
        z = torch.from_numpy(widened(z)).to(getattr(torch, dtype)).requires_grad_()
        labels = torch.from_numpy(
            labels.astype(np.float64) if labels.dtype.kind == "f" else labels.astype(np.int64)
        )
        loss = losses(z, labels.to(z.dtype) if labels.is_floating_point() else labels)
        loss.sum().backward()
        return tuple(x.detach().double().numpy().astype(DTYPES[dtype]) for x in (loss, z.grad))

    return contestant


def of_labels(log_p: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]


def log_softmax_losses(z, labels):
    return of_labels(jax.nn.log_softmax(z), labels)


def naive_losses(z, labels):
    return of_labels(jnp.log(jax.nn.softmax(z)), labels)


def positive(f: Callable[[jax.Array], jax.Array]) -> Losses:
    """Of the label 1."""
    return lambda z, labels: -f(z)


SOFTMAX: dict[str, Contestant] = {
    JAXENT: in_jax(jaxent.softmax_cross_entropy),
    OPTAX: in_jax(optax.losses.softmax_cross_entropy_with_integer_labels),
    LOG_SOFTMAX: in_jax(log_softmax_losses),
    NAIVE: in_jax(naive_losses),
}
SIGMOID: dict[str, Contestant] = {
    JAXENT: in_jax(jaxent.sigmoid_cross_entropy),
    OPTAX: in_jax(optax.losses.sigmoid_binary_cross_entropy),
    LOG_SIGMOID: in_jax(positive(jax.nn.log_sigmoid)),
    NAIVE_SIGMOID: in_jax(positive(lambda z: jnp.log(jax.nn.sigmoid(z)))),
}
ELEMENTWISE = {name: {JAXENT: in_jax(loss)} for name, loss in SIGMOID_LOSSES.items()}
ELEMENTWISE["cross-entropy"] = SIGMOID
for name, gamma in (("focal", 2.0), ("focal, gamma 5", 5.0)):
    ELEMENTWISE[name][OPTAX] = in_jax(functools.partial(optax.losses.sigmoid_focal_loss, gamma=gamma))
if torch is not None:
    functional = torch.nn.functional
    SOFTMAX[TORCH] = in_torch(functools.partial(functional.cross_entropy, reduction="none"))
    SIGMOID[TORCH] = in_torch(
        functools.partial(functional.binary_cross_entropy_with_logits, reduction="none")
    )
