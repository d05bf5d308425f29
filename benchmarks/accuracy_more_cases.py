"""The other promises of docs/numerics.md as cases, as in accuracy_cases.py. Their bounds: accuracy_promises.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxent
from accuracy_cases import (
    LD,
    LOSS,
    Error,
    Jit,
    bits,
    error,
    exact_cross_entropy,
    logits_and_labels,
    loss_and_gradient,
    normal,
    of_softmax,
    oracle,
    over_classes,
    pairs_on_paper,
    rounded,
    run,
    uniform,
)

F32 = "float32"
EPS = float(np.finfo(np.float32).eps)


def plain(x: np.ndarray) -> Error:
    """An error that is in the promise's own unit."""
    x = np.asarray(x, np.float64)
    return Error(x, x)


def by_norm(got: np.ndarray, want: np.ndarray, axis: Any = -1, more: Any = 0) -> Error:
    """`more`: what the terms of the gradient are of, where these cancel."""
    size = np.sqrt(np.sum(want.astype(LD) ** 2, axis)) + more
    off = np.sqrt(np.sum((got.astype(LD) - want) ** 2, axis))
    return plain(np.where(size < 1e-30, 0, off / np.where(size == 0, 1, size)))


# Divergences.


def divergence(
    jit: Jit,
    numbers: np.ndarray,
    classes: int,
    beta: float,
    step: float,
    scale: float = 2.0,
    temperature: float = 1.0,
    shift: float = 0.0,
) -> dict[str, Error]:
    """Beta 0 is KL, by its own name. Gradients beside their norm and the value: a row that is sure of a class has the
    difference of the others' small ones there. Nothing is asked of what is below 1e-30.
    """
    z = rounded(scale * normal(numbers, classes), F32)
    t = rounded(z + step * normal(numbers, classes, 1) + shift, F32)
    value, dz, dt = run(jit, divergence_and_gradients, (beta, temperature), F32, z, t)
    options = {"beta": beta, "temperature": temperature}
    want = oracle.softmax_js_divergence(z, t, **options)
    wanted = oracle.softmax_js_divergence(z, t, cotangent=np.ones(len(z)), **options)
    sizes = np.where((shift != 0) & (want < 3e-9), np.inf, want)
    return {
        "value": plain(np.where(want < 1e-30, 0, error(value, want, F32).relative)),
        "below 0": plain(value < 0),
        "gradient": by_norm(dz, wanted.logits, more=sizes),
        "target's gradient": by_norm(dt, wanted.labels, more=sizes),
    }


def divergence_and_gradients(
    beta: float, temperature: float, z: jax.Array, t: jax.Array
) -> tuple[jax.Array, ...]:
    def f(z, t):
        if beta == 0:
            return jaxent.softmax_kl_divergence(z, t, temperature=temperature)
        return jaxent.softmax_js_divergence(z, t, beta=beta, temperature=temperature)

    value, vjp = jax.vjp(f, z, t)
    return value, *vjp(jnp.ones_like(value))


# Other losses of logits.

LOSSES = {
    "softmax_focal_loss": (jaxent.softmax_focal_loss, oracle.softmax_focal_loss, {}),
    "softmax_poly_loss": (jaxent.softmax_poly_loss, oracle.softmax_poly_loss, {}),
    "label_smoothing": (
        jaxent.softmax_cross_entropy,
        oracle.softmax_cross_entropy,
        {"label_smoothing": 0.1},
    ),
    "z_loss": (jaxent.softmax_cross_entropy, oracle.softmax_cross_entropy, {"z_loss": 1e-4}),
}


def other_loss(jit: Jit, numbers: np.ndarray, loss: str, **setting: Any) -> dict[str, Error]:
    """Gradients beside the row's largest term. Nothing is asked of what is below 1e-30."""
    z, labels = logits_and_labels(numbers, dtype=F32, **setting)
    _, on_paper, options = LOSSES[loss]
    value, gradient = run(jit, loss_and_gradient, (bound(loss),), F32, z, labels)
    want = on_paper(z, labels, **options)
    slope = on_paper(z, labels, cotangent=np.ones(len(z)), **options).logits
    of_terms = 1 if options else 0  # p - q, of which the label's q is about 1
    size = np.maximum(np.abs(slope).max(-1), of_terms)
    off = np.abs(gradient - slope).max(-1) / np.maximum(size, 1e-30)
    return {
        LOSS: plain(np.where(want < 1e-30, 0, error(value, want, F32).relative)),
        "gradient": plain(np.where(size < 1e-30, 0, off)),
    }


@functools.cache
def bound(loss: str) -> Any:
    f, _, options = LOSSES[loss]
    return functools.partial(f, **options)


def entropy(jit: Jit, numbers: np.ndarray, **setting: Any) -> dict[str, Error]:
    """The gradient beside its norm and the value: it is 0 where classes are tied."""
    z, _ = logits_and_labels(numbers, dtype=F32, **setting)
    value, gradient = run(jit, loss_and_gradient, (jaxent.softmax_entropy,), F32, z)
    want, slope = oracle.softmax_entropy(z), oracle.softmax_entropy(z, cotangent=np.ones(len(z))).logits
    return {
        "value": plain(np.where(want < 1e-30, 0, error(value, want, F32).relative)),
        "gradient": by_norm(gradient, slope, more=want),
    }


def of_probabilities(jit: Jit, numbers: np.ndarray, loss: str) -> dict[str, Error]:
    """-log p and -log(1 - p) of float32 numbers, which are what they are."""
    p = uniform(numbers, 8) ** np.repeat([1, 8], 4)
    p = rounded(np.clip(p, 1e-30, 1 - 2.0**-24), F32)
    labels = (bits(numbers, 1, 1)[:, 0] % np.uint64(8)).astype(np.int32)
    if loss == "categorical_cross_entropy":
        value, gradient = run(jit, loss_and_gradient, (jaxent.categorical_cross_entropy,), F32, p, labels)
        hit = np.arange(8) == labels[:, None]
        want = -np.log(np.take_along_axis(p, labels[:, None], -1)[:, 0])
        slope = np.where(hit, -1 / p, 0)
    else:
        y = (bits(numbers, 8, 1) % np.uint64(2)).astype(np.float64)
        value, gradient = run(jit, loss_and_gradient, (jaxent.binary_cross_entropy,), F32, p, y)
        want, slope = np.where(y == 1, -np.log(p), -np.log1p(-p)), np.where(y == 1, -1 / p, 1 / (1 - p))
    off = (x.reshape(len(numbers), -1).max(-1) for x in error(value, want, F32))
    return {LOSS: Error(*off), "gradient": over_classes(error(gradient, slope, F32))}


# A few classes of each row.


def slots(numbers: np.ndarray, classes: int, count: int) -> np.ndarray:
    """Different ones."""
    first = bits(numbers, 1, 3) % np.uint64(classes)
    return ((first + np.arange(count, dtype=np.uint64) * np.uint64(7)) % np.uint64(classes)).astype(np.int32)


def probabilities(numbers: np.ndarray, count: int) -> np.ndarray:
    """float32, of which a little or much is left."""
    u = uniform(numbers, count + 1, 4) ** 4
    return (u / u.sum(-1, keepdims=True))[:, :count].astype(np.float32)


def others(jit: Jit, numbers: np.ndarray, lead: float, offset: float = 0.0) -> dict[str, Error]:
    """`lead`: by how much the chosen classes' logits are raised."""
    classes = slots(numbers, 40, 3)
    raised = (np.arange(40) == classes[..., None]).any(-2)
    z = rounded(normal(numbers, 40) + lead * raised + offset, F32)
    value, gradient = run(jit, loss_and_gradient, (other_log_prob,), F32, z, classes)
    e = np.exp((z - z.max(-1, keepdims=True)).astype(LD))
    of_chosen, of_others = (np.where(x, e, 0).sum(-1, keepdims=True) for x in (raised, ~raised))
    odds = of_chosen / of_others
    want = np.where(odds < 1, -np.log1p(odds), -np.log(odds) - np.log1p(1 / odds))
    slope = np.where(raised, -e / (of_chosen + of_others), e / of_others * (odds / (1 + odds)))
    off = error(gradient, slope, F32)
    return {"value": error(value, want[:, 0], F32), "gradient": Error(*(x.max(-1) for x in off))}


def other_log_prob(z: jax.Array, classes: jax.Array) -> jax.Array:
    return jaxent.softmax_statistics(z, names=("other_log_prob",), classes=classes).other_log_prob


def sparse_target(jit: Jit, numbers: np.ndarray, scale: float) -> dict[str, Error]:
    z, classes = rounded(scale * normal(numbers, 40), F32), slots(numbers, 40, 5)
    probs = probabilities(numbers, 5)
    loss, gradient = run(jit, loss_and_gradient, (sparse_cross_entropy,), F32, z, classes, probs)
    q = np.zeros(z.shape)
    np.put_along_axis(q, classes, probs.astype(np.float64), -1)
    wanted = oracle.softmax_cross_entropy(z, q, cotangent=np.ones(len(z))).logits
    size = np.maximum(np.abs(wanted), q).max(-1)  # an entry is a difference of two terms
    off = np.abs(gradient - wanted).max(-1) / size
    return {LOSS: error(loss, oracle.softmax_cross_entropy(z, q), F32), "gradient": plain(off)}


def sparse_cross_entropy(z: jax.Array, classes: jax.Array, probs: jax.Array) -> jax.Array:
    return jaxent.softmax_cross_entropy(z, jaxent.SparseDistribution(classes, probs))


def sparse_bounds(jit: Jit, numbers: np.ndarray, scale: float, beta: float) -> dict[str, Error]:
    """By how much it is above the divergence from the whole teacher, in roundings of the logs of that.

    Reverse KL has the log of what the probabilities leave, which is known to their roundings.
    """
    z, t = (rounded(scale * normal(numbers, 11, stream), F32) for stream in (0, 1))
    few, full, probs = run(jit, few_and_full, (beta,), F32, z, t)
    size = 1 + np.ptp(z, -1) + np.ptp(t, -1)
    left = 1 - probs.astype(np.float64).sum(-1)
    if beta == 1:
        size = np.where(left > 4 * EPS, size + 1 / np.maximum(left, EPS), np.inf)
    with np.errstate(invalid="ignore"):
        excess = np.where(np.isinf(size), 0, (few.astype(np.float64) - full) / (EPS * size))
    return {"below 0": plain(few < 0), "above the whole": plain(np.maximum(excess, 0))}


def few_and_full(beta: float, z: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
    probs, classes = jax.lax.top_k(jax.nn.softmax(t), 3)
    few = jaxent.softmax_js_divergence(z, jaxent.SparseDistribution(classes, probs), beta=beta)
    return few, jaxent.softmax_js_divergence(z, t, beta=beta), probs


def reverse_kl_slope(jit: Jit, numbers: np.ndarray) -> dict[str, Error]:
    """By the probabilities, where each, and what they leave, is 1e-6 or more."""
    z, classes, probs = rounded(normal(numbers, 9), F32), slots(numbers, 9, 3), probabilities(numbers, 3)
    left = 1 - probs.astype(LD).sum(-1, keepdims=True)
    (got,) = run(jit, slope_of_reverse_kl, (), F32, probs, z, classes)
    p = np.exp(z.astype(LD))
    p /= p.sum(-1, keepdims=True)
    named = np.take_along_axis(p, classes, -1)
    rest = np.where((np.arange(9) == classes[..., None]).any(-2), 0, p).sum(-1, keepdims=True)
    with np.errstate(all="ignore"):
        want = rest / left - named / probs
        off = (
            np.abs(got - want).max(-1) / np.maximum(rest / left, (named / probs).max(-1, keepdims=True))[:, 0]
        )
    return {"gradient": plain(np.where((left[:, 0] > 1e-6) & (probs.min(-1) > 1e-6), off, 0))}


def slope_of_reverse_kl(probs: jax.Array, z: jax.Array, classes: jax.Array) -> tuple[jax.Array]:
    def total(probs):
        return jnp.sum(jaxent.softmax_js_divergence(z, jaxent.SparseDistribution(classes, probs), beta=1.0))

    return (jax.grad(total)(probs),)


# Layers, and all pairs: one number is a matrix.


def each(numbers: np.ndarray, rows: int) -> np.ndarray:
    """`[numbers, rows]` of numbers."""
    return np.asarray(numbers)[:, None] * 4096 + np.arange(rows)


def layer(jit: Jit, numbers: np.ndarray, **setting: Any) -> dict[str, Error]:
    """One-hot rows: the product is exact, and the layer's gradient that of its logits."""
    z, labels = logits_and_labels(numbers, dtype=F32, **setting)
    loss, gradient = run(jit, loss_and_gradient, (of_layer,), F32, z, labels)
    return of_softmax(loss, gradient, labels, exact_cross_entropy(z, labels))


def of_layer(z: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jaxent.LinearLogits(jnp.eye(len(z), dtype=z.dtype), z, block_bytes=2**15)
    return jaxent.softmax_cross_entropy(logits, labels)


def half_layer(jit: Jit, numbers: np.ndarray, scale: float) -> dict[str, Error]:
    """bfloat16 hidden `[64, 32]` and kernel `[32, 1000]`, mean: the loss, and gradients by their norm."""
    found = []
    for rows in each(numbers, 64):
        hidden = rounded(scale / 32**0.5 * normal(rows, 32), "bfloat16")
        kernel = rounded(normal(rows[:32], 1000, 1), "bfloat16")
        labels = (bits(rows, 1, 2)[:, 0] % np.uint64(1000)).astype(np.int32)
        loss, dh, dk = run(jit, mean_of_layer, (), "bfloat16", hidden, kernel, labels)
        h, k = hidden.astype(LD), kernel.astype(LD)
        exact = exact_cross_entropy(h @ k, labels)
        gradients = [exact.gradient @ k.T / 64, h.T @ exact.gradient / 64]
        off = (by_norm(*pair, None).ulp for pair in zip((dh, dk), gradients, strict=True))
        found.append([np.abs(loss - exact.loss.mean()), *off])
    return dict(zip((LOSS, "hidden", "kernel"), map(plain, np.array(found).T), strict=True))


def mean_of_layer(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    def f(hidden, kernel):
        logits = jaxent.LinearLogits(hidden, kernel, block_bytes=2**15)
        return jaxent.softmax_cross_entropy(logits, labels, reduction="mean")

    loss, gradients = jax.value_and_grad(f, (0, 1))(hidden, kernel)
    return loss, *gradients


def pairs(jit: Jit, numbers: np.ndarray, loss: str, scale: float, dtype: str) -> dict[str, Error]:
    """40 of them; `scale` 12: losses of 1e-30. These in roundings of the logits, gradients beside the largest entry."""
    bias = () if loss == "softmax" else (-1.5,)
    found = []
    for rows in each(numbers, 40):
        x = rounded(normal(rows, 8), dtype)
        y = rounded(x + 0.25 * normal(rows, 8, 1), dtype)
        losses, *gradients = run(jit, of_pairs, (loss, scale, *bias), dtype, x, y)
        want, slopes = getattr(pairs_on_paper, f"{loss}_losses")(x, y, scale, *bias)
        off = [
            np.max(np.abs(g - w)) / np.abs(w).max()
            for g, w in zip(gradients, slopes(np.ones(40)), strict=False)
        ]
        relative = np.where(want < 1e-30, 0, error(losses, want, dtype).relative).max()
        digits = np.finfo(dtype).eps * (1 + scale * np.abs(x @ y.T).max())
        found.append([relative / digits, max(off)])
    return dict(zip((LOSS, "gradient"), map(plain, np.array(found).T), strict=True))


def of_pairs(loss: str, scale: float, *rest: Any) -> tuple[jax.Array, ...]:
    *bias, x, y = rest

    def f(x, y):
        if loss == "softmax":
            return jaxent.softmax_contrastive_loss(x, y, scale=scale, reduction="none", block_bytes=2**11)
        return jaxent.sigmoid_contrastive_loss(
            x, y, scale=scale, bias=bias[0], reduction="none", block_bytes=2**11
        )

    losses, vjp = jax.vjp(f, x, y)
    return losses, *vjp(jnp.ones_like(losses))
