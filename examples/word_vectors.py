"""Word vectors of Python: 16,384 classes, of which a step of training reads 256 samples and the true ones.

    python examples/word_vectors.py

Skip-gram (Mikolov et al. 2013, word2vec) on the tokens of language_model.py: from a token tell one that stands next to
it. There are two tables of vectors, of the tokens that are read and of those that are told; a logit is the product of
two vectors, plus the log of how common the told token is. Three losses train it from the same start, with the same
pairs, number of steps and learning rate:

    NCE                is a token the neighbour, or one of the samples? One yes/no question for each
    sampled softmax    which of them is the neighbour? The softmax of the label and the samples alone
    full softmax       which of all tokens is it? By jaxent.LinearLogits, so that no N x V logits are built

Samples are log-uniform, which suits classes in the order of falling frequency, as these are. Of the tables the first
two read a few rows, have a gradient of these alone, and change no other: what a step of theirs holds in memory does not
depend on V. Validation is the full softmax for all three. A softmax is the same with any number added to all logits of
a row; those of NCE are to be log-probabilities as they are, so their log-normalizer comes out near 0. Adagrad is by
hand: what it does to a few rows is all that it does. Curves go to --out.
Shapes: N pairs, D features, V classes, S samples.
"""

import argparse
import itertools
import statistics
import time
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import language_model
import matplotlib
import numpy as np

import jaxent

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NCE, SAMPLED, FULL = "NCE", "sampled softmax", "full softmax"
METHODS = {NCE: jaxent.nce_loss, SAMPLED: jaxent.sampled_softmax_cross_entropy, FULL: None}
LEARNING_RATE, FIRST_SQUARE = 0.5, 1e-6  # of Adagrad; the rate falls to 0 in a line, as word2vec's does
EVALUATIONS, HELD_OUT = 9, 8192
BLOCK_BYTES = 8 * 2**20  # of LinearLogits: this model is small, its blocks may be too
WORDS, COMMON, NEAREST = ("for", "def", "self", "import"), 500, 6


# ---------------------------------------------------------------------------------------------- the data


def pairs(tokens, documents, vocabulary, window):
    """[P, 2]: a token, and one at most `window` places from it in the same file. <unk>, the last class, is in none."""
    known, found = tokens != vocabulary - 1, []
    for k in range(1, window + 1):
        both = known[:-k] & known[k:] & (documents[:-k] == documents[k:])
        found += [(tokens[:-k][both], tokens[k:][both]), (tokens[k:][both], tokens[:-k][both])]
    return np.concatenate([np.stack(x, -1) for x in found])


def log_frequencies(tokens, vocabulary):
    """[V], of all classes in training; one is added to each count, and <unk> is never told."""
    counts = np.bincount(tokens, minlength=vocabulary) + 1.0
    counts[-1] = 1
    return jnp.asarray(np.log(counts / counts.sum()), jnp.float32)


def texts(ids, starts, files, number):
    """The text of the commonest classes. The cache has numbers alone; where one first comes, its file has the text."""
    first = np.unique(ids, return_index=True)[1][:number]  # [number] places in ids
    read = cache(language_model.read)
    of = np.searchsorted(starts, first, "right") - 1  # [number] files
    return [read(files[file])[at - starts[file]] for file, at in zip(of, first, strict=True)]


# ------------------------------------------------------------------------------------------- the objectives


def all_logits(hidden, table, bias):
    """[N, V], left open."""
    return jaxent.LinearLogits(hidden, table, bias, class_axis=0, block_bytes=BLOCK_BYTES)


def objective(method, hidden, output, labels, samples, bias):
    """Nats per pair; `output` is the table [V, D], or for a loss of samples what is read of it."""
    if method == FULL:
        return jaxent.softmax_cross_entropy(all_logits(hidden, output, bias), labels, reduction="mean")
    return METHODS[method](
        hidden,
        output,
        labels,
        samples.classes,
        bias=bias,
        log_expected_counts=samples.log_expected_counts,
        label_log_expected_counts=samples.log_expected_counts_of(labels),
        class_axis=0,
        reduction="mean",
    )


@jax.jit
def validate(tables, held_out, bias):
    """(nats per pair, mean log-normalizer), by the full softmax."""
    logits = all_logits(tables["input"][held_out[:, 0]], tables["output"], bias)
    found = jaxent.softmax_statistics(logits, held_out[:, 1], names=("log_prob", "log_normalizer"))
    return -jnp.mean(found.log_prob), jnp.mean(found.log_normalizer)


# --------------------------------------------------------------------------------------------- training


def init(key, vocabulary, features):
    """Two tables, and for each the sums of squared gradients that Adagrad divides by."""
    start = jax.random.normal(key, (vocabulary, features)) * 0.02
    tables = {"input": start, "output": jnp.zeros_like(start)}  # [V, D]
    return tables, {name: jnp.full_like(x, FIRST_SQUARE) for name, x in tables.items()}


def added_up(rows, values):
    """(different rows, the sum of the values of each): Adagrad squares sums. In the places left over is no row."""
    nowhere = jnp.iinfo(rows).max
    different, place = jnp.unique(rows, return_inverse=True, size=len(rows), fill_value=nowhere)
    return different, jnp.zeros_like(values).at[place].add(values)


def gradients(method, tables, batch, samples, bias):
    """The loss, and for each table (rows, gradient of these rows); that of all others is 0."""
    centers, labels = batch[:, 0], batch[:, 1]  # [N], [N]
    hidden, output = tables["input"][centers], tables["output"]  # [N, D], [V, D]
    if method != FULL:
        output = jaxent.candidate_columns(output, labels, samples.classes, class_axis=0)  # [N, D] and [S, D]
    loss = partial(objective, method)
    value, (g_hidden, g_output) = jax.value_and_grad(loss, (0, 1))(hidden, output, labels, samples, bias)
    if method == FULL:
        of_output = ..., g_output  # of every row
    else:
        of_output = added_up(jnp.concatenate([labels, samples.classes]), jnp.concatenate(g_output))
    return value, {"input": added_up(centers, g_hidden), "output": of_output}


def adagrad(table, squares, rate, rows, gradient):
    """Adagrad of some rows. The others, whose gradient is 0, stay as they are in the usual one, too."""
    squares = squares.at[rows].add(gradient**2, mode="drop")
    update = -rate * gradient * jax.lax.rsqrt(squares.at[rows].get(mode="clip"))
    return table.at[rows].add(update, mode="drop"), squares


def step(method, number, tables, squares, batch, index, steps, key, bias):
    """One step of training. The full softmax leaves the samples unused, and XLA leaves them out."""
    samples = jaxent.log_uniform_sampler(jax.random.fold_in(key, index), len(bias), number)
    value, found = gradients(method, tables, batch, samples, bias)
    rate = LEARNING_RATE * (1 - index / steps)
    new = {name: adagrad(tables[name], squares[name], rate, *found[name]) for name in tables}
    return *({name: x[i] for name, x in new.items()} for i in (0, 1)), value


def compiled_step(method, number, *arguments):
    """The step, compiled: what it holds in memory is known. Tables that it is given are changed in place."""
    return jax.jit(partial(step, method, number), donate_argnums=(0, 1)).lower(*arguments).compile()


def train(method, batches, held_out, bias, options):
    """Trains by one loss; returns the tables, and their validation, seconds per step and temporaries."""
    start, key = jax.random.split(jax.random.key(options.seed))
    steps, tables, squares = len(batches), *init(start, len(bias), options.features)
    run = compiled_step(method, options.samples, tables, squares, batches[0], 0, steps, key, bias)
    at = set(np.linspace(0, steps, EVALUATIONS).astype(int))
    curve, validation, seconds = [], [], []
    for index in range(steps + 1):
        if index in at:
            validation.append((sum(seconds), *map(float, validate(tables, held_out, bias))))
        if index == steps:
            break
        begin = time.perf_counter()
        tables, squares, value = run(tables, squares, batches[index], index, steps, key, bias)
        curve.append(float(value))
        seconds.append(time.perf_counter() - begin)
        language_model.progress(index + 1, steps, f"{method}: {curve[-1]:.4f}, {seconds[-1] * 1e3:.1f} ms")
    result = {
        "curve": np.array(curve),  # [steps]
        "validation": np.array(validation),  # [evaluations, 3]: seconds of training, nats, log-normalizer
        "seconds": statistics.median(seconds[min(10, steps - 1) :]),  # the first ones warm up
        "temporaries": run.memory_analysis().temp_size_in_bytes,
    }
    return tables, result


# ---------------------------------------------------------------------------------------------- results


def nearest(table, words, word, number=NEAREST):
    """Those of the words, which are the first rows of the table, whose vectors have the largest cosine with its own."""
    x = np.asarray(table)[: len(words)]
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)  # [words, D]
    order = np.argsort(-(x @ x[words.index(word)]))
    return [words[i] for i in order if words[i] != word][:number]


def report(results, entropy, logits):
    head = "per step", "memory", "of N x V logits", "validation", "log-normalizer"
    print("\n{:16s}{:>11s}{:>12s}{:>17s}{:>14s}{:>16s}".format("", *head))
    for name, result in results.items():
        _, loss, log_normalizer = result["validation"][-1]
        print(
            f"{name:16s}{result['seconds'] * 1e3:8.2f} ms{result['temporaries'] / 2**20:8.1f} MiB"
            f"{result['temporaries'] / logits:17.2f}{loss:9.4f} nats{log_normalizer:16.3f}"
        )
    print(f"{'unigram':16s}{'':40s}{entropy:9.4f} nats")
    times = [
        f"{results[FULL]['seconds'] / results[name]['seconds']:.0f} of {name}" for name in (NCE, SAMPLED)
    ]
    print(
        f"\nOne step of the full softmax takes the time of {', '.join(times)}. Memory is that of temporaries."
    )


def draw(results, entropy, out):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (name, result), marker in zip(results.items(), "oxs", strict=True):
        seconds, losses, _ = result["validation"][1:].T  # the start is the same for all, and at no time
        axes.plot(seconds, losses, marker=marker, markersize=5, label=f"{name}: {losses[-1]:.3f}")
    axes.axhline(entropy, color="black", linestyle=":", label=f"unigram entropy: {entropy:.3f}")
    axes.set(xscale="log", xlabel="seconds of training", ylabel="loss of the full softmax (nats per pair)")
    axes.set(title="Which token stands next to this one? The same steps by three losses")
    axes.grid(alpha=0.3)
    axes.legend(framealpha=1, edgecolor="none")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="of each training")
    parser.add_argument("--batch", type=int, default=1024, help="pairs")
    parser.add_argument("--window", type=int, default=1, help="how far apart the two of a pair may be")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--files", type=int, help="read only so many files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="word_vectors.png")
    parser.add_argument("--cache", type=Path, default=language_model.CACHE)
    options = parser.parse_args(argv)
    V, N = options.vocabulary, options.batch

    ids, starts = language_model.load(options.cache, options.files)  # [M], [F + 1]
    sides = [language_model.split(ids, starts, V, validation) for validation in (False, True)]
    training, validation = (pairs(*side, V, options.window) for side in sides)  # [P, 2] each
    rng = np.random.default_rng(options.seed)
    batches = training[rng.integers(len(training), size=(options.steps, N))]  # [steps, N, 2]
    held_out = validation[np.random.default_rng(0).integers(len(validation), size=HELD_OUT)]
    bias = log_frequencies(sides[0][0], V)  # [V]
    entropy = -float(bias[held_out[:, 1]].mean())
    print(f"{len(training):,} pairs, of which {batches.size // 2:,} are drawn; {V:,} classes")

    tables, results = {}, {}
    for method in METHODS:
        tables[method], results[method] = train(method, batches, held_out, bias, options)
    report(results, entropy, 4 * N * V)
    words = texts(ids, starts, language_model.source_files(options.files), min(COMMON, V - 1))
    found = {
        (word, method): nearest(tables[method]["input"], words, word)
        for word, method in itertools.product(WORDS, METHODS)
    }
    print(f"\nNearest by cosine, of the {len(words)} commonest:")
    for (word, method), names in found.items():
        print(f"{word:8s}{method:17s}{'  '.join(names)}")
    draw(results, entropy, options.out)
    print(f"\nseed {options.seed}, drawn in {options.out}")
    return {"results": results, "nearest": found}


if __name__ == "__main__":
    main()
