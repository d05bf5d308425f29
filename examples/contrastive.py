"""Handwritten digits without their labels: two views of an image are a pair, and no other two are.

    python examples/contrastive.py                # the rows of a batch are split over 8 CPU devices
    python examples/contrastive.py --devices 1    # the same training, to rounding

The encoder of digits.py is trained by two losses of all pairs of a batch: CLIP's softmax and SigLIP's sigmoid. The step
is written as for one device, and the batch is on a mesh: one view stays, the other goes round a ring of devices, and
nothing is gathered. What was learned is asked by a linear layer on frozen embeddings, which is trained with labels,
beside an untrained encoder and one that is trained with the same labels. At the end, the memory of a step of 16,384
pairs. Embeddings are drawn to --out.
Shapes: N images, D = 64 pixels, E features of an embedding.
"""

import argparse
import re
import time
from collections import Counter

import digits
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent

matplotlib.use("Agg")
import matplotlib.pyplot as plt

E, NOISE, LEARNING_RATE = 32, 0.25, 2e-3
FEW = 100  # labels: the fewer there are, the more it matters what was learned without them
PROBE_STEPS, PROBE_LEARNING_RATE = 500, 0.05
TOLERANCE = 1e-4  # between two gradients, relative, in float32
PAIRS, FEATURES = 16_384, 128  # of the batch whose memory is compared; it is compiled and never run


# ------------------------------------------------------------------------------------------- the losses


def clip(x, y, numbers):
    return jaxent.softmax_contrastive_loss(x, y, scale=jnp.exp(numbers["log_scale"]))


def siglip(x, y, numbers):
    return jaxent.sigmoid_contrastive_loss(x, y, scale=jnp.exp(numbers["log_scale"]), bias=numbers["bias"])


LOSSES = {"CLIP": clip, "SigLIP": siglip}
# Where the papers begin. The bias says that most pairs are none; without it the first steps would learn only that.
# (Arrays: a Python float has a weak type, which it loses in the first step, and the second would compile anew.)
STARTS = {
    "CLIP": {"log_scale": np.float32(np.log(1 / 0.07))},
    "SigLIP": {"log_scale": np.float32(np.log(10)), "bias": np.float32(-10)},
}


# The same in plain jax, of matrices [N, N], to compare


def plain_clip(x, y, numbers):
    logits = jnp.exp(numbers["log_scale"]) * x @ y.T  # [N, N]
    both = jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)  # [N]
    return jnp.mean(both / 2 - jnp.diag(logits))


def plain_siglip(x, y, numbers):
    logits = jnp.exp(numbers["log_scale"]) * x @ y.T + numbers["bias"]  # [N, N]
    signs = 2 * jnp.eye(len(x)) - 1  # [N, N]
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(x)


PLAIN = {"CLIP": plain_clip, "SigLIP": plain_siglip}


# ---------------------------------------------------------------------------------------------- the model


def view(key, pixels):
    """The same digits in other images: moved by up to a pixel, and noisy."""
    k1, k2 = jax.random.split(key)
    return digits.shift(k1, pixels) + NOISE * jax.random.normal(k2, pixels.shape)  # [N, D]


def encode(params, pixels):
    """Embeddings of length 1: products are cosines, and how much they count is learned (the scale)."""
    x = digits.model(params, pixels, "embedding")  # [N, E]
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def classify(params, x):
    """A linear layer on embeddings, of features of about 1 in place of 1 / sqrt(E)."""
    return np.sqrt(E) * x @ params["kernel"] + params["bias"]  # [N, 10]


def head():
    return {"kernel": jnp.zeros((E, 10)), "bias": jnp.zeros(10)}


# Objectives: of parameters, a key and a batch.


def contrastive(name):
    def objective(params, key, pixels):
        x, y = (encode(params["encoder"], view(k, pixels)) for k in jax.random.split(key))  # [N, E] each
        return LOSSES[name](x, y, params["numbers"])

    return objective


def supervised(params, key, pixels, labels):
    logits = classify(params["head"], encode(params["encoder"], view(key, pixels)))
    return jaxent.softmax_cross_entropy(logits, labels, reduction="mean")


def probe(params, key, x, labels):
    return jaxent.softmax_cross_entropy(classify(params, x), labels, reduction="mean")


# --------------------------------------------------------------------------------------------- training


def fit(objective, params, arrays, steps, learning_rate, batch, seed, sharding=None, name=None):
    """Trains on so many rows of the arrays at a time, split as `sharding` says: parameters, losses [steps]."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    if sharding is not None:
        params = jax.device_put(params, NamedSharding(sharding.mesh, P()))  # each device has all of them
    state = optimizer.init(params)
    key, rng = jax.random.key(seed), np.random.default_rng(seed)

    # Nothing in here says how many devices there are. jax splits the encoder's work as the batch is split, jaxent makes
    # the ring, and the gradient of parameters that all devices have is summed over them: no psum, no axis name.
    @jax.jit
    def step(params, state, index, *rows):
        loss, gradient = jax.value_and_grad(objective)(params, jax.random.fold_in(key, index), *rows)
        update, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, update), state, loss

    curve = []
    for index in range(steps):
        chosen = rng.permutation(len(arrays[0]))[
            :batch
        ]  # none twice: it would be its own negative (or pass `ids`)
        rows = jax.device_put([array[chosen] for array in arrays], sharding)
        params, state, loss = step(params, state, index, *rows)
        curve.append(float(loss))
        if name is not None and (index % digits.EVERY == 0 or index == steps - 1):
            digits.progress(index + 1, steps, f"{name}: loss {loss:.4f}")
    return params, np.array(curve)


def frozen(encoder, labels, seed):
    """Accuracy on held-out images of a linear layer on the embeddings, of so many labels."""
    (x, answers), (test_x, test_answers) = ((encode(encoder, pixels), y) for pixels, y in digits.load())
    rows = np.asarray(x)[:labels], answers[:labels]
    params, _ = fit(probe, head(), rows, PROBE_STEPS, PROBE_LEARNING_RATE, labels, seed)
    return accuracy(params, test_x, test_answers)


def with_labels(encoder, labels, steps, batch, seed):
    """The same where the labels train the encoder too."""
    (pixels, answers), (test_pixels, test_answers) = digits.load()
    params, rows = {"encoder": encoder, "head": head()}, (pixels[:labels], answers[:labels])
    params, _ = fit(supervised, params, rows, steps, LEARNING_RATE, batch, seed)
    return accuracy(params["head"], encode(params["encoder"], test_pixels), test_answers)


def accuracy(params, x, answers):
    return float(np.mean(classify(params, x).argmax(-1) == answers))


# ------------------------------------------------------------------------------------- devices and memory


def compare(name, params, pixels, sharding, seed):
    """How far loss and gradients on all devices are from those on one, relative; and what their program sends."""
    function = jax.jit(jax.value_and_grad(contrastive(name)))
    everywhere = NamedSharding(sharding.mesh, P())
    inputs = params, jax.random.key(seed), pixels
    split = jax.device_put(inputs, (everywhere, everywhere, sharding))
    program = function.lower(*split).compile()
    pairs = zip(jax.tree.leaves(program(*split)), jax.tree.leaves(function(*inputs)), strict=True)
    # each parameter by itself, and no optimizer: Adam divides by the size of a gradient, and hides a factor
    difference = max(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b) for a, b in pairs)
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    return difference, Counter(re.findall(rf" ({kinds})(?:-start)?\(", program.as_text()))


def temporaries(loss, name):
    """Bytes that a step of one device takes beside its arguments and results."""
    x = jax.ShapeDtypeStruct((PAIRS, FEATURES), jnp.float32)
    numbers = {key: jax.ShapeDtypeStruct((), jnp.float32) for key in STARTS[name]}
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, x, numbers).compile()
    return step.memory_analysis().temp_size_in_bytes


# ---------------------------------------------------------------------------------------------- pictures


def draw(encoders, accuracies, out):
    """Held-out images on the two directions along which their embeddings differ most."""
    _, (pixels, answers) = digits.load()
    figure, axes = plt.subplots(1, len(encoders), figsize=(13, 5.2), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    for cell, (name, encoder) in zip(axes, encoders.items(), strict=True):
        x = np.asarray(encode(encoder, pixels))  # [N, E]
        x = x - x.mean(0)
        _, lengths, directions = np.linalg.svd(x, full_matrices=False)  # [E], [E, E]
        places = x @ directions[:2].T  # [N, 2]
        for digit in range(10):
            these = places[answers == digit]
            cell.scatter(*these.T, s=18, color=colors[digit], alpha=0.6, linewidths=0)
        for digit in range(10):  # after all points: they would hide it
            box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": colors[digit]}
            middle = np.median(places[answers == digit], 0)
            cell.text(
                *middle, str(digit), color=colors[digit], bbox=box, ha="center", va="center", weight="bold"
            )
        share = np.sum(lengths[:2] ** 2) / np.sum(lengths**2)
        cell.set(xticks=[], yticks=[], xlabel=f"{share:.0%} of the variance in this plane")
        cell.set_title(f"{name}\nlinear layer on all {E} features: {accuracies[name][-1]:.1%}")
    figure.suptitle("Embeddings of held-out images, along the two directions in which they differ most")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def run(pixels, options):
    start = time.perf_counter()
    seed, steps, batch = options.seed, options.steps, options.batch
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), P("rows"))
    untrained = digits.init(jax.random.key(seed), E)
    encoders = {"untrained": untrained}
    for name in LOSSES:
        params = {"encoder": untrained, "numbers": STARTS[name]}
        if options.devices > 1:
            difference, sent = compare(name, params, pixels[:batch], sharding, seed)
            kinds = ", ".join(f"{count} {kind}" for kind, count in sent.items())
            print(
                f"{name}: gradients on {options.devices} devices and on one are {difference:.0e} apart; {kinds}"
            )
            if not difference <= TOLERANCE:
                raise ArithmeticError(f"more than {TOLERANCE:.0e}")
        params, curve = fit(
            contrastive(name), params, [pixels], steps, LEARNING_RATE, batch, seed, sharding, name
        )
        learned = ", ".join(f"{key} {value:.2f}" for key, value in params["numbers"].items())
        print(f"{name}: loss {curve[0]:.2f} at first, {curve[-1]:.2f} at last; {learned}\n")
        encoders[name] = jax.device_get(params["encoder"])

    print(f"Accuracy on held-out images       {FEW:,} labels  {len(pixels):,} labels")
    accuracies = {
        name: [frozen(encoder, labels, seed) for labels in (FEW, len(pixels))]
        for name, encoder in encoders.items()
    }
    rows = accuracies | {
        "trained with the labels": [
            with_labels(untrained, labels, steps, batch, seed) for labels in (FEW, len(pixels))
        ]
    }
    for name, row in rows.items():
        print(f"{name:32s}", *(f"{x:11.1%}" for x in row))
    draw(encoders, accuracies, options.out)

    print(f"\nTemporaries of a step of {PAIRS:,} pairs      jaxent   plain [N, N]")
    for name, loss in LOSSES.items():
        sizes = (temporaries(f, name) / 2**20 for f in (loss, PLAIN[name]))
        print(f"{name:32s}", *(f"{size:9,.0f} MiB" for size in sizes))
    print(f"\n{time.perf_counter() - start:.1f} s, seed {seed}, drawn in {options.out}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=512, help="images, of two views each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="contrastive.png")
    options = parser.parse_args(argv)
    (pixels, _), _ = digits.load()
    if options.batch % options.devices or options.batch > len(pixels):
        parser.error(f"a batch has as many images on each device, and at most {len(pixels):,} in all")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    run(pixels, options)


if __name__ == "__main__":
    main()
