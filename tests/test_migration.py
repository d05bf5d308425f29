"""The tables of docs/from_*.md: what stands in them is run, theirs and ours, and values and gradients agree.

torch, keras and tensorflow are asked where they are installed. What cannot be is written here, after its source.
"""

import ast
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxent
from test_readme import PAGES

pytestmark = pytest.mark.usefixtures("as_users_run")

ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|", flags=re.MULTILINE)
N, V, D, S = 6, 5, 4, 3
RNG = np.random.default_rng(0)
MOVING = ("z", "image", "log_p", "p", "views", "h", "images")  # the first that ours has is differentiated


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def of_length_1(*shape):
    x = normal(*shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


z = 2 * normal(N, V)
y = np.array([0, 4, 2, 1, 2, 3], np.int32)
p = softmax(normal(N, V))
q = softmax(normal(N, V))
m = RNG.uniform(size=(N, V)) < 0.7
m[np.arange(N), y] = True
NUMBERS = {
    "z": z,
    "y": y,
    "u": np.where(np.arange(N) % 3 == 1, -100, y).astype(np.int32),
    "q": q,
    "p": p,
    "log_p": np.log(p),
    "log_q": np.log(q),
    "t": (RNG.uniform(size=(N, V)) < 0.5).astype(np.float32),
    "m": m,
    "w": RNG.uniform(0.5, 2, size=V).astype(np.float32),
    "v": RNG.uniform(0.5, 2, size=(N, V)).astype(np.float32),
    "r": RNG.uniform(0.5, 2, size=N).astype(np.float32),
    "image": normal(2, V, 3, 2),
    "pixels": RNG.integers(V, size=(2, 3, 2)).astype(np.int32),
    "h": normal(N, D),
    "table": normal(V, D),
    "b": normal(V),
    "s": np.array([1, 3, 0], np.int32),
    "sampled_counts": np.array([0.5, 0.25, 0.25], np.float32),
    "true_counts": RNG.uniform(0.1, 1, size=N).astype(np.float32),
    "views": normal(N, D),
    "pairs": np.arange(N, dtype=np.int32) % (N // 2),
    "images": of_length_1(N, D),
    "texts": of_length_1(N, D),
    "positives": (np.arange(N)[:, None] + np.array([0, 2], np.int32)) % N,
    "shares": np.full((N, 2), 0.5, np.float32),
    "least": -np.float32(0.9 * np.log(0.9) + 0.1 * np.log(0.1 / (V - 1))),
    "scale": np.float32(10),
    "bias": np.float32(-5),
}
SIZES = {"N": N, "V": V, "D": D, "S": S}


def weigh(value):
    """A sum with another factor for each element, in NumPy's terms."""
    return np.cos(np.arange(value.size, dtype=np.float32)).reshape(value.shape)


def by_jax(names):
    def run(code, moving):
        def total(x):
            found = {name: jnp.asarray(a) for name, a in NUMBERS.items()} | SIZES | {moving: x}
            value = eval(code, names | found)
            return jnp.sum(value * weigh(value)), value

        gradient, value = jax.jit(jax.grad(total, has_aux=True))(NUMBERS[moving])
        return value, gradient

    return run


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def public(module):
    return {name: x for name, x in vars(module).items() if not name.startswith("_")}


OURS = by_jax(public(jaxent) | {"jnp": jnp, "unit": unit})


def by_torch(code, moving):
    torch = pytest.importorskip("torch")
    found = {}
    for name, x in NUMBERS.items():
        found[name] = torch.tensor(x.astype(np.int64) if x.dtype == np.int32 else x)
    x = found[moving].requires_grad_()
    value = eval(code, public(torch.nn.functional) | found | SIZES)
    (value * torch.tensor(weigh(value.detach().numpy()))).sum().backward()
    return value.detach().numpy(), x.grad.numpy()


def by_keras(code, moving):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    return by_jax(public(keras.losses))(code, moving)


def by_tensorflow(code, moving):
    tf = pytest.importorskip("tensorflow")
    found = {name: tf.constant(x) for name, x in NUMBERS.items()}
    with tf.GradientTape() as tape:
        tape.watch(found[moving])
        s = found["s"]
        found["s"] = tf.cast(s, tf.int64)
        value = eval(code, {"tf": tf} | found | SIZES)
        total = tf.reduce_sum(value * weigh(value.numpy()))
    return value.numpy(), tf.convert_to_tensor(tape.gradient(total, found[moving])).numpy()


def sigmoid_focal_loss_of_torchvision(z, t, alpha, gamma):
    """Lin et al. 2017, as torchvision has it."""
    p = jax.nn.sigmoid(z)
    right = p * t + (1 - p) * (1 - t)
    bce = -(t * jax.nn.log_sigmoid(z) + (1 - t) * jax.nn.log_sigmoid(-z))
    return (alpha * t + (1 - alpha) * (1 - t)) * (1 - right) ** gamma * bce


def compute_weighted_cross_entropy(z, y, r, label_smoothing):
    """As in flax' examples wmt and lm1b."""
    confidence, low = 1 - label_smoothing, label_smoothing / (V - 1)
    least = -(confidence * jnp.log(confidence) + (V - 1) * low * jnp.log(low + 1e-20))
    soft = jax.nn.one_hot(y, V) * (confidence - low) + low
    return jnp.sum((-jnp.sum(soft * jax.nn.log_softmax(z), -1) - least) * r)


def log_likelihood(z, y):
    return jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], -1)[:, 0]


def liger_fused_linear_cross_entropy(lse_square_scale=0.0, softcap=None, label_smoothing=0.0):
    """As Liger's reference in torch."""

    def loss(table, h, y, b):
        z = h @ table.T + b
        z = z if softcap is None else softcap * jnp.tanh(z / softcap)
        smooth = jax.nn.log_softmax(z).mean(-1)
        loss = (label_smoothing - 1) * log_likelihood(z, y) - label_smoothing * smooth
        return jnp.mean(loss + lse_square_scale * jax.nn.logsumexp(z, -1) ** 2)

    return loss


def liger_jsd(beta):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), of log-probabilities."""

    def loss(student, teacher):
        log_s, log_t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
        s, t = jnp.exp(log_s), jnp.exp(log_t)
        log_m = jnp.log(beta * t + (1 - beta) * s)
        return jnp.mean(jnp.sum(beta * t * (log_t - log_m) + (1 - beta) * s * (log_s - log_m), -1))

    return loss


def maxtext_cross_entropy_with_logits(z, targets, z_loss):
    log_z = jax.nn.logsumexp(z, -1)
    return -jnp.sum(targets * jax.nn.log_softmax(z), -1) + z_loss * log_z**2


def tokamax_linear_softmax_cross_entropy_loss(x, labels, weights):
    return -jnp.sum(log_likelihood(x @ weights, labels))


def rlax_categorical_kl_divergence(p_logits, q_logits):
    p = jax.nn.softmax(p_logits)
    return jnp.sum(p * (jax.nn.log_softmax(p_logits) - jax.nn.log_softmax(q_logits)), -1)


def clip_loss(images, texts, scale):
    z, own = scale * images @ texts.T, jnp.arange(len(images))
    return -(log_likelihood(z, own).mean() + log_likelihood(z.T, own).mean()) / 2


def siglip_loss(images, texts, scale, bias):
    z = scale * images @ texts.T + bias
    return -jnp.sum(jax.nn.log_sigmoid((2 * jnp.eye(len(z)) - 1) * z)) / len(z)


def info_nce(query, positive_key, temperature):
    return -log_likelihood(unit(query) @ unit(positive_key).T / temperature, jnp.arange(len(query))).mean()


def supervised_contrastive_loss(x, y, positives, temperature):
    """Khosla et al. 2020, with the mean over positives outside of the logarithm."""
    log_p = jax.nn.log_softmax(x @ y.T / temperature)
    return -jnp.take_along_axis(log_p, positives, -1).mean(-1).mean()


PEERS = {
    "Liger": by_jax(
        {"LigerFusedLinearCrossEntropyLoss": liger_fused_linear_cross_entropy, "LigerJSD": liger_jsd}
    ),
    "MaxText, tokamax, rlax": by_jax(
        {
            "cross_entropy_with_logits": maxtext_cross_entropy_with_logits,
            "linear_softmax_cross_entropy_loss": tokamax_linear_softmax_cross_entropy_loss,
            "categorical_kl_divergence": rlax_categorical_kl_divergence,
        }
    ),
    "open_clip, big_vision": by_jax({"ClipLoss": clip_loss, "SigLipLoss": siglip_loss}),
    "self-supervised learning": by_jax({"info_nce": info_nce, "SupConLoss": supervised_contrastive_loss}),
    "flax' examples": by_jax({"compute_weighted_cross_entropy": compute_weighted_cross_entropy}),
    "optax.losses": by_jax(public(optax.losses)),
    "torch.nn.functional": by_torch,
    "torchvision.ops": by_jax({"sigmoid_focal_loss": sigmoid_focal_loss_of_torchvision}),
    "keras.losses": by_keras,
    "TensorFlow": by_tensorflow,
}


TEXTS = [text for page, text in PAGES.items() if page.startswith("from_")]
TABLES = [table for text in TEXTS for table in re.split(r"\n(?=\| [^`|]+ \| jaxent \|)", text)[1:]]
ROWS = [(table.split("|")[1].strip(), *row) for table in TABLES for row in ROW.findall(table)]


@pytest.mark.parametrize(("peer", "theirs", "ours"), ROWS, ids=[theirs for _, theirs, _ in ROWS])
def test_row(peer, theirs, ours):
    used = {node.id for node in ast.walk(ast.parse(ours)) if isinstance(node, ast.Name)}
    moving = next(name for name in MOVING if name in used)
    want = PEERS[peer](theirs, moving)
    for got, x in zip(OURS(ours, moving), want, strict=True):
        assert np.shape(got) == np.shape(x)
        assert np.abs(x).max() > 1e-3
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


def test_every_row_of_the_tables_is_run():
    assert sum(len(re.findall(r"^\| `", text, flags=re.MULTILINE)) for text in TEXTS) == len(ROWS) > 50
