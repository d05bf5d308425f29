"""Handwritten digits, asked four ways: a small network, a training loop, a jaxent loss.

    python examples/digits.py                             # which of ten digits is it?
    python examples/digits.py --problem parity-sigmoid    # odd or even, by one output
    python examples/digits.py --problem parity-softmax    # odd or even, by two classes: the same curve
    python examples/digits.py --problem multilabel        # ten yes/no questions at once

1,797 real images of 8 x 8 pixels, which come with scikit-learn. Curves and worst mistakes go to --out.
Shapes: N images, D = 64 pixels, H hidden units, V outputs.
"""

import argparse
import sys
import time
from functools import cache, partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxent

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUESTIONS = {  # multilabel: each output answers its own question about the digit, several may be true
    "odd": {1, 3, 5, 7, 9},
    "prime": {2, 3, 5, 7},
    "square": {0, 1, 4, 9},
    "triangular": {0, 1, 3, 6},
    "Fibonacci": {0, 1, 2, 3, 5, 8},
    "power of 2": {1, 2, 4, 8},
    "multiple of 3": {0, 3, 6, 9},
    "over 4": {5, 6, 7, 8, 9},
    "has a loop": {0, 6, 8, 9},
    "straight strokes": {1, 4, 7},
}
OUTPUTS = {"ten": 10, "parity-sigmoid": 1, "parity-softmax": 1, "multilabel": len(QUESTIONS)}
HIDDEN, BATCH, LEARNING_RATE, WEIGHT_DECAY, EVERY = 256, 128, 5e-3, 0.1, 20


# ---------------------------------------------------------------------------------------------- the data


@cache
def load(test_fraction=0.2):
    """Pixels in [0, 1] and digits, split once and for all into (train, test)."""
    pixels, digits = load_digits(return_X_y=True)  # [1797, D] in 0..16, [1797] in 0..9
    pixels, digits = (pixels / 16).astype(np.float32), digits.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(digits))  # [1797]
    test, train = np.split(order, [int(test_fraction * len(digits))])  # [359], [1438]
    return (pixels[train], digits[train]), (pixels[test], digits[test])


def make_labels(problem, digits):
    """What each problem calls a label."""
    if problem == "ten":
        return digits  # [N] class indices: no one-hot
    if problem == "parity-softmax":
        return digits % 2  # [N] class indices, 0 is even and 1 is odd
    if problem == "parity-sigmoid":
        return (digits % 2).astype(np.float32)  # [N] the probability of odd
    return np.stack([np.isin(digits, list(yes)) for yes in QUESTIONS.values()], -1).astype(
        np.float32
    )  # [N, V]


# ---------------------------------------------------------------------------------------------- the model


def init(key, outputs):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "w1": jax.random.normal(k1, (64, HIDDEN)) * np.sqrt(2 / 64),  # [D, H]
        "b1": jnp.zeros(HIDDEN),  # [H]
        "w2": jax.random.normal(k2, (HIDDEN, HIDDEN)) * np.sqrt(2 / HIDDEN),  # [H, H]
        "b2": jnp.zeros(HIDDEN),  # [H]
        "w3": jax.random.normal(k3, (HIDDEN, outputs)) * np.sqrt(1 / HIDDEN),  # [H, V]
        "b3": jnp.zeros(outputs),  # [V]
    }


def model(params, pixels, problem):
    x = jax.nn.relu(pixels @ params["w1"] + params["b1"])  # [N, H]
    x = jax.nn.relu(x @ params["w2"] + params["b2"])  # [N, H]
    logits = x @ params["w3"] + params["b3"]  # [N, V], any real numbers: no softmax, no sigmoid
    if problem == "parity-sigmoid":
        return logits[:, 0]  # [N]
    if problem == "parity-softmax":  # sigmoid(z) = softmax([0, z])[1]
        return jnp.concatenate([jnp.zeros_like(logits), logits], -1)  # [N, 2]
    return logits  # [N, V]


# ----------------------------------------------------------------------------------- the loss and its figures


def loss_function(problem):
    return (
        jaxent.softmax_cross_entropy if problem in ("ten", "parity-softmax") else jaxent.sigmoid_cross_entropy
    )


def predict(problem, logits):
    """The most likely label, in the form of `make_labels`; the logits say it without a softmax."""
    if loss_function(problem) is jaxent.softmax_cross_entropy:
        return logits.argmax(-1)  # [N]
    return (logits > 0).astype(jnp.float32)  # [N] or [N, V]: sigmoid(z) > 1/2


@partial(jax.jit, static_argnames="problem")
def evaluate(params, pixels, labels, problem):
    """Each image's loss in nats, [N], and the predictions, in the form of the labels."""
    logits = model(params, pixels, problem)  # [N], [N, 2] or [N, V]
    losses = loss_function(problem)(logits, labels)  # [N] or [N, V]
    return losses.reshape(len(losses), -1).mean(-1), predict(problem, logits)


# --------------------------------------------------------------------------------------------- training


def shift(key, pixels):
    """Each image moved by up to one pixel: 1,438 images are few."""
    images = jnp.pad(pixels.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))  # [N, 10, 10]
    corners = jax.random.randint(key, (len(images), 2), 0, 3)  # [N, 2]
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (8, 8)))
    return crop(images, corners).reshape(-1, 64)  # [N, D]


def train(problem, steps, seed):
    """Trains one network; returns its parameters and its curves."""
    (pixels, digits), (test_pixels, test_digits) = load()
    labels, test_labels = make_labels(problem, digits), make_labels(problem, test_digits)
    key = jax.random.key(seed)
    params = init(key, OUTPUTS[problem])
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    state = optimizer.init(params)

    first = np.arange(min(BATCH, len(labels)))
    print(
        jaxent.diagnose(
            model(params, pixels[first], problem), labels[first], loss=loss_function(problem).__name__
        )
    )

    @jax.jit
    def step(params, state, pixels, labels, index):
        def objective(params):
            logits = model(
                params, shift(jax.random.fold_in(key, index), pixels), problem
            )  # [B], [B, 2] or [B, V]
            return loss_function(problem)(logits, labels, reduction="mean")  # a scalar, in nats

        loss, gradient = jax.value_and_grad(objective)(params)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    rng = np.random.default_rng(seed)
    curve, test_curve = [], []
    for index in range(steps):
        batch = rng.integers(len(labels), size=BATCH)  # [B]
        params, state, loss = step(params, state, pixels[batch], labels[batch], index)
        curve.append(float(loss))
        if index % EVERY == 0 or index == steps - 1:
            losses, guesses = evaluate(params, test_pixels, test_labels, problem)
            test_curve.append((index, float(losses.mean())))
            progress(
                index + 1, steps, f"loss {loss:.4f}  test accuracy {np.mean(guesses == test_labels):.2%}"
            )
    return params, np.array(curve), np.array(test_curve)  # ..., [steps], [evaluations, 2]


def progress(done, total, text, width=30):
    """One line that writes over itself; in a log file only the last one."""
    if sys.stdout.isatty() or done == total:
        bar = "#" * (done * width // total)
        print(f"\r{bar:.<{width}} {done:5d}/{total}  {text}", end="\n" if done == total else "", flush=True)


# ---------------------------------------------------------------------------------------------- pictures


def describe(problem, row):
    """A label, or a prediction, in words."""
    if problem == "ten":
        return str(int(row))
    if problem != "multilabel":
        return "odd" if row else "even"
    return f"{int(row.sum())} yes"


def draw(problem, params, curve, test_curve, out, columns=6):
    _, (pixels, digits) = load()
    labels = make_labels(problem, digits)
    losses, guesses = (np.asarray(a) for a in evaluate(params, pixels, labels, problem))
    worst = np.argsort(-losses)[: 2 * columns]  # the highest loss first

    figure = plt.figure(figsize=(9, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    axes = top.subplots()
    window = max(1, min(25, len(curve) // 8))
    smooth = np.convolve(curve, np.ones(window) / window, mode="valid")  # [steps - window + 1]
    axes.plot(curve, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(
        np.arange(len(smooth)) + window // 2, smooth, color="tab:blue", label="training (shifted images)"
    )
    axes.plot(*test_curve.T, color="tab:orange", label="test")
    axes.set(
        yscale="log",
        xlabel="step",
        ylabel="loss (nats)",
        title=f"{problem}: {loss_function(problem).__name__}",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)

    bottom.suptitle("The test images with the highest loss (red: wrong)", fontsize="medium")
    for cell, i in zip(bottom.subplots(2, columns).flat, worst, strict=True):
        cell.imshow(pixels[i].reshape(8, 8), cmap="gray_r", interpolation="nearest")
        cell.set(xticks=[], yticks=[])
        wrong = np.sum(guesses[i] != labels[i])
        if problem == "multilabel":
            text = f"a {digits[i]}: {wrong} of {len(QUESTIONS)} wrong"
        else:
            text = f"{describe(problem, labels[i])}, said {describe(problem, guesses[i])}"
        cell.set_title(
            f"{text}\nloss {losses[i]:.2f}", fontsize="small", color="tab:red" if wrong else "black"
        )
    figure.savefig(out, dpi=120)
    plt.close(figure)


def run(problem, steps, seed, out):
    """Trains, measures and draws; returns the figures."""
    start = time.perf_counter()
    params, curve, test_curve = train(problem, steps, seed)
    results = {"problem": problem, "seconds": time.perf_counter() - start, "curve": curve}
    for name, (pixels, digits) in zip(("train", "test"), load(), strict=True):
        labels = make_labels(problem, digits)
        losses, guesses = evaluate(params, pixels, labels, problem)
        correct = np.asarray(guesses == labels).reshape(len(labels), -1)  # [N, answers]
        results[f"{name}_loss"], results[f"{name}_accuracy"] = float(losses.mean()), float(correct.mean())
        results[f"{name}_all_right"] = float(correct.all(-1).mean())
    draw(problem, params, curve, test_curve, out)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=OUTPUTS, default="ten")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="digits.png")
    options = parser.parse_args(argv)
    problem = options.problem

    # Odd or even is trained in both forms, to compare. In float32 two forms of one formula round differently,
    # and training amplifies that within some hundred steps; in float64 the curves stay together.
    with jax.enable_x64(problem.startswith("parity")):
        results = run(problem, options.steps, options.seed, options.out)
        if problem.startswith("parity"):
            other = {"parity-sigmoid": "parity-softmax", "parity-softmax": "parity-sigmoid"}[problem]
            _, curve, _ = train(other, options.steps, options.seed)
            results["difference"] = difference = float(np.max(np.abs(results["curve"] - curve)))
            print(
                f"{problem} and {other}: {len(curve)} losses from one start, at most {difference:.1e} apart"
            )
            if difference > 1e-6:
                raise ArithmeticError("sigmoid(z) = softmax([0, z])[1]: the curves must agree")

    for name in ("train", "test"):
        text = f"{name:5s}  loss {results[f'{name}_loss']:.4f}  accuracy {results[f'{name}_accuracy']:.2%}"
        if problem == "multilabel":
            text += f"  all {len(QUESTIONS)} answers right {results[f'{name}_all_right']:.2%}"
        print(text)
    print(f"{results['seconds']:.1f} s, seed {options.seed}, drawn in {options.out}")
    return results


if __name__ == "__main__":
    main()
