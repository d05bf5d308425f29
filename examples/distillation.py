"""Distillation of a language model: of a teacher's 16,384 classes 16 are kept per token, and no logits are built.

    python examples/distillation.py

The teacher is the model of language_model.py; its students are a quarter as wide. Of each token its 16 most likely
classes are kept, with their probabilities. Students learn from these, from all of the teacher, or from the labels
alone: the same start, batches, number of steps and learning rate. What the 16 leave over is one more class, the bucket:

    forward KL, KL(teacher || student)   asks for as much mass in the bucket as the teacher has there
    reverse KL, KL(student || teacher)   takes mass out of it that the teacher does not have there; it is infinite if
                                         the teacher's bucket is empty, so what is kept sums to a little less than 1
    JS, between the two                  is bounded: a student that is all wrong is hardly moved

None of them tells the classes in the bucket from each other. So a student of the 16 alone never learns the rarer
tokens, and its loss is worse than that of the labels alone; with the labels for half of the loss it is better. The
loss is that of the next token in held-out files. Curves go to --out.
Shapes: N = B T tokens, D features, V classes, K kept ones.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import language_model
import matplotlib
import numpy as np
import optax

import jaxent

matplotlib.use("Agg")
import matplotlib.pyplot as plt

K, NARROWER, SHARE = 16, 4, 0.5
EVALUATIONS, VALIDATION_BATCHES = 7, 16
# Of all students: the best of 5e-3, 1e-2, 2e-2, 4e-2 and 8e-2 for the one that learns from labels alone. The
# teacher's is that of language_model.py.
LEARNING_RATE = 4e-2
BLOCK_BYTES = 8 * 2**20  # of LinearLogits

LABELS, WHOLE, BUILT = "labels alone", "whole teacher, KL", "whole teacher, built logits"
# What is learned from kept classes: beta of softmax_js_divergence, and the share of the labels.
KEPT = {
    "top 16, KL": (0.0, 0.0),
    "labels + top 16, KL": (0.0, SHARE),
    "labels + top 16, JS": (0.5, SHARE),
    "labels + top 16, reverse KL": (1.0, SHARE),
}
STUDENTS = LABELS, WHOLE, *KEPT


# ------------------------------------------------------------------------------------------- the objectives


def layer_of(params, batch):
    """The logits of all tokens, `[N, V]`, left open."""
    x = language_model.hidden(params, batch["tokens"], batch["segments"])  # [B, T, D]
    x = x.reshape(-1, x.shape[-1])  # [N, D]
    return jaxent.LinearLogits(x, params["kernel"], params["bias"], block_bytes=BLOCK_BYTES)


def top(params, batch, temperature):
    """What is kept of a teacher: classes and probabilities, `[N, K]` each, in two bytes each."""
    layer = layer_of(params, batch)

    def of_token(x):
        return jax.lax.top_k(x @ layer.kernel + layer.bias, K)[1]

    classes = jax.lax.map(of_token, layer.hidden, batch_size=128)  # [N, K]
    layer = dataclasses.replace(layer, temperature=temperature)
    s = jaxent.softmax_statistics(layer, names=("class_log_probs",), classes=classes)
    # Rounded, they sum to 1 or more where the teacher is sure: without so much of each the bucket is never empty.
    probs = jnp.exp(s.class_log_probs) * (1 - 2**-10)  # [N, K]
    return {"classes": classes.astype(jnp.uint16), "probs": probs.astype(jnp.float16)}


def few(batch):
    """The target as it was kept."""
    return jaxent.SparseDistribution(batch["classes"], batch["probs"])


def objective(name, params, teacher, batch, temperature=1.0, dense=False):
    """Nats per token; `dense` builds the logits of both models, for comparison."""
    student, labels = layer_of(params, batch), batch["targets"].ravel()
    common = {"where": batch["mask"].ravel(), "reduction": "mean"}
    softened = common | {"temperature": temperature}
    if name == LABELS:
        return jaxent.softmax_cross_entropy(student, labels, **common)
    if name == WHOLE:
        target = layer_of(teacher, batch)
        logits = (student.dense(), target.dense()) if dense else (student, target)
        return jaxent.softmax_kl_divergence(*logits, **softened)
    beta, share = KEPT[name]
    if beta == 0:
        loss = jaxent.softmax_kl_divergence(student, few(batch), **softened)
    else:
        loss = jaxent.softmax_js_divergence(student, few(batch), beta=beta, **softened)
    if share == 0:
        return loss
    # T^2 gives the gradient of the teacher's part the same size, whatever T is
    hard = jaxent.softmax_cross_entropy(student, labels, **common)
    return share * hard + (1 - share) * temperature**2 * loss


# --------------------------------------------------------------------------------------------- training


def compiled_step(name, optimizer, params, teacher, batch, **options):
    """One step of training, compiled: what it holds in memory is known before it is run."""

    def step(params, state, teacher, batch):
        loss = partial(objective, name, **options)
        value, gradient = jax.value_and_grad(loss)(params, teacher, batch)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    arguments = params, optimizer.init(params), teacher, batch
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


def train(name, params, teacher, batches, held_out, rate, temperature=1.0):
    """Trains a model on an objective; returns it, and its validation, seconds per step and temporaries."""
    steps = len(batches)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 10), steps))
    step = compiled_step(name, optimizer, params, teacher, batches[0], temperature=temperature)
    params = jax.tree.map(jnp.copy, params)  # a step takes over what it is given, and others start there too
    state = optimizer.init(params)
    at = set(np.linspace(0, steps, EVALUATIONS).astype(int))
    validation, seconds = [], []
    for index in range(steps + 1):
        if index in at:
            validation.append((index, validate(LABELS, params, None, held_out)))
        if index == steps:
            break
        start = time.perf_counter()
        params, state, value = step(params, state, teacher, batches[index])
        value = float(value)
        seconds.append(time.perf_counter() - start)
        who = "teacher" if teacher is None else name
        language_model.progress(index + 1, steps, f"{who}: {value:.4f}, {seconds[-1]:.2f} s")
    return params, {
        "validation": np.array(validation),  # [evaluations, 2]: step, nats
        "loss": validation[-1][1],
        "seconds": statistics.median(seconds),
        "temporaries": step.memory_analysis().temp_size_in_bytes,
    }


def validate(name, params, teacher, held_out):
    """An objective per token of the held-out files."""
    counts = [int(batch["mask"].sum()) for batch in held_out]
    found = [float(validation_step(name, params, teacher, batch)) for batch in held_out]
    return float(np.average(found, weights=counts))


validation_step = jax.jit(objective, static_argnums=0)


def built_logits(params, teacher, batch, temperature, runs=5):
    """What a step takes that builds the logits of both models: seconds and temporaries."""
    optimizer = optax.adam(LEARNING_RATE)
    step = compiled_step(WHOLE, optimizer, params, teacher, batch, temperature=temperature, dense=True)
    params, seconds = jax.tree.map(jnp.copy, params), []
    state = optimizer.init(params)
    for _ in range(runs):
        start = time.perf_counter()
        params, state, _ = jax.block_until_ready(step(params, state, teacher, batch))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "temporaries": step.memory_analysis().temp_size_in_bytes,
    }


# ------------------------------------------------------------------------------------------------ the check


def plain(params, batch, temperature, beta):
    """A divergence of kept classes in plain JAX, from all logits: the K, and the sum of the others."""
    target = few(batch)  # [N, K] each
    logits = layer_of(params, batch).dense() / temperature  # [N, V]
    log_p = jax.nn.log_softmax(logits)  # [N, V]
    classes, used = (
        target.classes.astype(jnp.int32),
        target.probs > 0,
    )  # rounded to 0, it is one of the others
    kept = jnp.any((classes[..., None] == jnp.arange(logits.shape[-1])) & used[..., None], 1)  # [N, V]
    others = jax.nn.logsumexp(log_p, -1, where=~kept, keepdims=True)  # [N, 1]
    log_p = jnp.concatenate([jnp.take_along_axis(log_p, classes, -1), others], -1)  # [N, K + 1]
    q = target.probs.astype(jnp.float32)
    q = jnp.concatenate([q, 1 - q.sum(-1, keepdims=True)], -1)  # [N, K + 1]
    used = q > 0
    log_q, log_p = (jnp.where(used, x, 0) for x in (jnp.log(jnp.where(used, q, 1)), log_p))

    def kl(a, b):  # of log-probabilities
        return jnp.sum(jnp.where(used, jnp.exp(a) * (a - b), 0), -1)

    mean = jnp.logaddexp(log_p, log_q) - np.log(2)
    losses = {
        0.0: kl(log_q, log_p),
        0.5: (kl(log_q, mean) + kl(log_p, mean)) / 2,
        1.0: kl(log_p, log_q),
    }[beta]  # [N]
    return jnp.mean(losses, where=batch["mask"].ravel())


def check(params, batch, temperature):
    """The largest difference of KL, JS and reverse KL to their plain form, relative: values and gradients."""

    def fused(params, batch, temperature, beta):
        common = {"where": batch["mask"].ravel(), "reduction": "mean", "temperature": temperature}
        return jaxent.softmax_js_divergence(layer_of(params, batch), few(batch), beta=beta, **common)

    worst = 0.0
    for beta in (0.0, 0.5, 1.0):
        pair = [
            jax.jit(jax.value_and_grad(partial(f, temperature=temperature, beta=beta)))(params, batch)
            for f in (fused, plain)
        ]
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            worst = np.max([worst, np.max(np.abs(a - b)) / np.max(np.abs(b))])  # np.max does not lose a NaN
    if not worst < 1e-3:
        raise ArithmeticError("the same divergence with and without all logits: they must agree")
    return float(worst)


# ---------------------------------------------------------------------------------------------- results


def report(results, entropy):
    head = "validation", "to labels", "KL to teacher", "per step", "memory"
    print("\n{:28s}{:>11s}{:>12s}{:>15s}{:>11s}{:>12s}".format("", *head))
    for name, result in results.items():
        figures = f"{'':38s}"
        if "loss" in result:
            difference = result["loss"] - results[LABELS]["loss"]
            figures = f"{result['loss']:6.4f} nats {difference:+11.4f} {result['kl']:9.4f} nats"
        print(f"{name:28s}{figures} {result['seconds']:8.3f} s {result['temporaries'] / 2**20:7.1f} MiB")
    print(f"{'unigram':28s}{entropy:6.4f} nats")


def draw(results, entropy, out):
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for name, marker in zip(STUDENTS, "oxsD^v", strict=True):
        steps, losses = results[name]["validation"][1:].T  # the start is the same for all, and far above
        axes.plot(steps, losses, marker=marker, markersize=5, label=f"{name}: {losses[-1]:.3f}")
    for name, loss, style in (
        ("unigram entropy", entropy, ":"),
        ("teacher", results["teacher"]["loss"], "--"),
    ):
        axes.axhline(loss, color="black", linestyle=style, label=f"{name}: {loss:.3f}")
    axes.set(
        xlabel="step of the student", ylabel="loss (nats per token)", title="The next token in held-out files"
    )
    axes.grid(alpha=0.3)
    axes.legend(framealpha=1, edgecolor="none")  # a line goes behind it
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=300, help="of each student")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--features", type=int, default=64, help="of the teacher")
    parser.add_argument("--vocabulary", type=int, default=16_384, help="at most 65,536")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--files", type=int, help="read only so many files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="distillation.png")
    parser.add_argument("--cache", type=Path, default=language_model.CACHE)
    options = parser.parse_args(argv)
    V, N, temperature = options.vocabulary, options.batch * options.length, options.temperature
    if V > 2**16:
        parser.error("--vocabulary: two bytes hold a class, so there are at most 65,536")

    ids, starts = language_model.load(options.cache, options.files)  # [M], [F + 1]
    sides = [language_model.split(ids, starts, V, validation) for validation in (False, True)]

    def take(count, validation, seed):
        rng, shape = np.random.default_rng(seed), (V, options.batch, options.length)
        return list(itertools.islice(language_model.batches(*sides[validation], *shape, rng), count))

    held_out = take(VALIDATION_BATCHES, True, 0)
    entropy = language_model.unigram_entropy(sides[0][0], V, held_out)
    keys = jax.random.split(jax.random.key(options.seed))

    teacher = language_model.init(keys[0], V, options.features)
    batches = take(options.teacher_steps, False, [options.seed, 0])
    results = {}
    teacher, results["teacher"] = train(
        LABELS, teacher, None, batches, held_out, language_model.LEARNING_RATE
    )
    results["teacher"]["kl"] = 0.0

    batches = take(options.steps, False, [options.seed, 1])
    keep, seconds = jax.jit(partial(top, temperature=temperature)), []
    for index, batch in enumerate(batches):  # once for all students; it could be a file
        start = time.perf_counter()
        batch |= jax.device_get(keep(teacher, batch))
        seconds.append(time.perf_counter() - start)
        language_model.progress(index + 1, options.steps, f"top {K} of the teacher, {seconds[-1]:.2f} s")
    kept = sum(batch[name].nbytes for batch in batches for name in ("classes", "probs"))
    masks = [batch["mask"].ravel() for batch in batches]  # [N] each
    mass = np.mean(
        [batch["probs"].sum(-1, dtype=float)[m].mean() for batch, m in zip(batches, masks, strict=True)]
    )
    is_label = [batch["classes"] == batch["targets"].reshape(-1, 1) for batch in batches]  # [N, K] each
    hits = np.mean([x.any(-1)[m].mean() for x, m in zip(is_label, masks, strict=True)])

    student = language_model.init(keys[1], V, options.features // NARROWER, language_model.HIDDEN // NARROWER)
    for name in STUDENTS:
        params, results[name] = train(name, student, teacher, batches, held_out, LEARNING_RATE, temperature)
        results[name]["kl"] = validate(WHOLE, params, teacher, held_out)
    difference = check(params, batches[-1], temperature)
    results[BUILT] = built_logits(student, teacher, batches[-1], temperature)

    report(results, entropy)
    tokens = options.steps * N
    print(
        f"\nMemory is that of a step's temporaries. Kept of the teacher: {kept // tokens} bytes per token, "
        f"{kept / 2**20:,.1f} MiB in all;\nlogits in float32 are {4 * V:,} bytes per token, "
        f"{4 * V * tokens / 2**20:,.0f} MiB. Keeping it took {statistics.median(seconds):.3f} s per batch.\n"
        f"The {K} have {mass:.1%} of the teacher's mass; the label is one of them for {hits:.1%} of the tokens."
    )
    best = min(STUDENTS, key=lambda name: results[name]["loss"])
    worse = [name for name in STUDENTS if results[name]["loss"] > results[LABELS]["loss"]]
    print(f"Best student: {best}. Worse than labels alone: {', '.join(worse) or 'none'}.")
    print(f"Divergences of {K} classes and the bucket, and plain JAX with all logits: {difference:.0e} apart")
    draw(results, entropy, options.out)
    print(f"temperature {temperature:g}, seed {options.seed}, drawn in {options.out}")
    return {"results": results, "bytes": kept // tokens, "difference": difference}


if __name__ == "__main__":
    main()
