"""A language model of Python: 65,536 classes per token, and no logits in memory.

    python examples/language_model.py            # the last layer goes into the loss: jaxent.LinearLogits
    python examples/language_model.py --dense    # the same with logits that are built, and both side by side

The text is on every machine: the source of Python's own standard library, split by `tokenize`. Every tenth file is
kept apart for validation. The model reads the last 8 tokens (Bengio et al. 2003, "A neural probabilistic language
model"). Its loss is compared with the unigram entropy: what is left to who knows only how common each token is.
Curves go to --out. Each training has a process of its own, so that its peak memory is its own: the resident set,
in which the arrays are on a CPU (JAX_PLATFORMS=cpu).
Shapes: B rows of T tokens, D features, K tokens of context, H hidden units, V classes: the vocabulary.
"""

import argparse
import array
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jaxent

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VOCABULARY, FEATURES, CONTEXT, HIDDEN, LENGTH = 65_536, 64, 8, 256, 128  # V, D, K, H, T
LEARNING_RATE, EVALUATIONS, VALIDATION_BATCHES = 5e-3, 6, 8
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxent"
BLOCK_BYTES = 32 * 2**20  # of LinearLogits: this model is small, its blocks may be too
NAMES = {False: "LinearLogits", True: "built logits"}

# tokenize's own marks; the rest is text. Line ends inside a statement (NL) say nothing and are left out.
MARKS = {
    tokenize.ENCODING: "<begin>",
    tokenize.ENDMARKER: "<end>",
    tokenize.NEWLINE: "<newline>",
    tokenize.INDENT: "<indent>",
    tokenize.DEDENT: "<dedent>",
}


# ---------------------------------------------------------------------------------------------- the data


def source_files(limit=None):
    """The standard library's files in a fixed order; with a limit, so many of them, evenly spread."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages"}
    files = sorted(path for path in root.rglob("*.py") if not outside & set(path.parts))
    if not files:
        raise FileNotFoundError(f"no Python source in {root}: this Python came without it")
    return files if limit is None else files[:: max(1, len(files) // limit)][:limit]


def read(path):
    """A file's tokens as text; none if it is no Python: the standard library tests bad syntax, too."""
    try:
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return []
    return [MARKS.get(token.type, token.string) for token in tokens if token.type != tokenize.NL]


def is_validation(files):
    """Whether each file, by number, is kept apart."""
    return np.asarray(files) % 10 == 9  # [F]


def build(folder, files):
    """Writes ids.npy [M] and starts.npy [F + 1]; an id is its token's rank in the training files, 0 the commonest."""
    numbers, ids, starts = {}, array.array("i"), [0]
    for i, path in enumerate(files):
        ids.extend(numbers.setdefault(token, len(numbers)) for token in read(path))
        starts.append(len(ids))
        progress(i + 1, len(files), f"files read, {len(ids):,} tokens, {len(numbers):,} different")
    ids, starts = np.array(ids, np.int32), np.array(starts)  # [M], [F + 1]
    training = np.repeat(~is_validation(np.arange(len(files))), np.diff(starts))  # [M]
    order = np.argsort(-np.bincount(ids[training], minlength=len(numbers)), kind="stable")  # [tokens]
    ranks = np.argsort(order)  # [tokens], the inverse
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch, "whole")
        whole.mkdir()
        np.save(whole / "ids.npy", ranks[ids].astype(np.int32))
        np.save(whole / "starts.npy", starts)
        if not folder.exists():  # another run may have been quicker
            whole.rename(folder)


def load(cache, limit=None):
    """The ids of all tokens [M], and where each file starts [F + 1], from the cache, which is built once."""
    files = source_files(limit)
    folder = cache / f"python-{platform.python_version()}-{len(files)}-files"
    if not folder.exists():
        print(f"Reading Python {platform.python_version()}'s library, once, into {folder}")
        apart(build, folder, files)
    return np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "starts.npy")


def split(ids, starts, vocabulary, validation):
    """The files of one side, one after another: tokens [M'], and the number of the file each is from [M']."""
    files = np.arange(len(starts) - 1)  # [F]
    documents = np.repeat(files, np.diff(starts)).astype(np.int32)  # [M]
    side = is_validation(documents) == validation  # [M]
    return np.minimum(ids[side], vocabulary - 1), documents[side]  # the last class is <unk>: all rarer tokens


def batches(tokens, documents, vocabulary, batch, length, rng=None):
    """Packed rows: files one after another, cut every T tokens. Shuffled, without end; without rng in order, once.

    `mask` hides targets that are not there to be learned: across the border of two files, <unk>, and padding.
    """
    rows = -(-len(tokens) // length)
    if rows < batch:
        raise ValueError(f"{len(tokens):,} tokens are too few for {batch} rows of {length}")
    tokens = np.pad(tokens, (0, rows * length + 1 - len(tokens)))
    documents = np.pad(documents, (0, len(tokens) - len(documents)), constant_values=-1)
    while True:
        order = np.arange(rows) if rng is None else rng.permutation(rows)  # [rows]
        for first in range(0, rows - batch + 1, batch):
            index = order[first : first + batch, None] * length + np.arange(length + 1)  # [B, T + 1]
            block, segments = tokens[index], documents[index]  # [B, T + 1] each
            same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)  # [B, T]
            yield {
                "tokens": block[:, :-1],  # [B, T]
                "targets": block[:, 1:],  # [B, T] class indices
                "segments": segments[:, :-1],  # [B, T]
                "mask": same & (block[:, 1:] != vocabulary - 1),  # [B, T]
            }
        if rng is None:
            return


def unigram_entropy(tokens, vocabulary, batches):
    """Nats per target of these batches for who knows how common each token is in training, and no more."""
    counts = np.bincount(tokens, minlength=vocabulary)[:-1] + 1.0  # [V - 1]: <unk> is no target
    log_p = np.log(counts / counts.sum())  # [V - 1]
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])  # [targets]
    return float(-log_p[targets].mean())


# ---------------------------------------------------------------------------------------------- the model


def init(key, vocabulary, features=FEATURES, units=HIDDEN):
    k1, k2, k3, k4 = jax.random.split(key, 4)
    width = CONTEXT * features
    return {
        "embedding": jax.random.normal(k1, (vocabulary, features)),  # [V, D]
        "w1": jax.random.normal(k2, (width, units)) * np.sqrt(2 / width),  # [K D, H]
        "b1": jnp.zeros(units),  # [H]
        "w2": jax.random.normal(k3, (units, features)) * np.sqrt(1 / units),  # [H, D]
        "b2": jnp.zeros(features),  # [D]
        "kernel": jax.random.normal(k4, (features, vocabulary)) * 0.1 * np.sqrt(1 / features),  # [D, V]
        "bias": jnp.zeros(vocabulary),  # [V]
    }


def hidden(params, tokens, segments):
    """What comes into the last layer, of each token and the K - 1 before it in the same file."""
    T, before = tokens.shape[1], (CONTEXT - 1, 0)
    x = params["embedding"][tokens]  # [B, T, D]
    x = jnp.pad(x, ((0, 0), before, (0, 0)))  # [B, K - 1 + T, D]
    files = jnp.pad(segments, ((0, 0), before), constant_values=-1)  # [B, K - 1 + T]
    window = []
    for k in reversed(range(CONTEXT)):  # the token itself first
        same = files[:, k : k + T] == segments  # [B, T]
        window.append(jnp.where(same[..., None], x[:, k : k + T], 0))  # [B, T, D]
    window = jnp.concatenate(window, -1)  # [B, T, K D]
    return jax.nn.gelu(window @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]  # [B, T, D]


def loss(params, batch, dense=False):
    """Nats per token; `dense` is the whole difference between the two trainings."""
    x = hidden(params, batch["tokens"], batch["segments"])  # [B, T, D]
    # All tokens in one axis, N = B T. jaxent does not ask for it, but XLA on a CPU would transpose [B, T, V].
    x = x.reshape(-1, x.shape[-1])  # [N, D]
    targets, mask = batch["targets"].ravel(), batch["mask"].ravel()  # [N], [N]
    if dense:
        logits = x @ params["kernel"] + params["bias"]  # [N, V]
    else:
        logits = jaxent.LinearLogits(x, params["kernel"], params["bias"], block_bytes=BLOCK_BYTES)
    return jaxent.softmax_cross_entropy(logits, targets, where=mask, reduction="mean")


# --------------------------------------------------------------------------------------------- training


def memory():
    """This process's resident set in bytes: now, and at its peak."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux. Its getrusage would count the parent's peak in.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return math.nan, math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def train(options, dense):
    """Trains one model; returns its curves, its time per step and its memory."""
    ids, starts = load(options.cache, options.files)  # [M], [F + 1]
    if len(ids) == 0 or ids.max() < options.vocabulary:
        raise ValueError(f"these files have fewer than {options.vocabulary:,} different tokens")
    V = options.vocabulary
    sides = [split(ids, starts, V, validation) for validation in (False, True)]
    rows = batches(*sides[1], V, options.batch, options.length, np.random.default_rng(0))
    held_out = list(itertools.islice(rows, VALIDATION_BATCHES))
    counts = [int(batch["mask"].sum()) for batch in held_out]
    entropy = unigram_entropy(sides[0][0], V, held_out)

    params = init(jax.random.key(options.seed), V, options.features)
    schedule = optax.warmup_cosine_decay_schedule(
        0, LEARNING_RATE, max(1, options.steps // 10), options.steps
    )
    optimizer = optax.adam(schedule)
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch, dense)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    evaluate = jax.jit(partial(loss, dense=dense))
    source = batches(*sides[0], V, options.batch, options.length, np.random.default_rng(options.seed))
    at = set(np.linspace(0, options.steps, EVALUATIONS).astype(int))
    curve, validation, seconds = [], [], []
    before, _ = memory()
    for index in range(options.steps + 1):
        if index in at:
            losses = [float(evaluate(params, batch)) for batch in held_out]
            validation.append((index, float(np.average(losses, weights=counts))))
        if index == options.steps:
            break
        start = time.perf_counter()
        params, state, value = step(params, state, next(source))
        curve.append(float(value))
        seconds.append(time.perf_counter() - start)
        speed = options.batch * options.length / seconds[-1]
        text = (
            f"{NAMES[dense]}: loss {curve[-1]:.4f}  validation {validation[-1][1]:.4f}  {speed:,.0f} tokens/s"
        )
        progress(index + 1, options.steps, text)
    _, peak = memory()
    return {
        "curve": np.array(curve),  # [steps]
        "validation": np.array(validation),  # [evaluations, 2]: step, nats
        "entropy": entropy,
        "seconds": statistics.median(seconds),  # the first one compiles
        "peak": peak,
        "rise": peak - before,
    }


def apart(function, *arguments):
    """Calls it in a process of its own, whose peak memory is then that of this call."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def progress(done, total, text, width=20):
    """One line that writes over itself; in a log file one now and then."""
    if sys.stdout.isatty() or done == total or done % max(1, total // 5) == 0:
        bar = "#" * (done * width // total)
        start, end = ("\r", "\n" if done == total else "") if sys.stdout.isatty() else ("", "\n")
        print(f"{start}{bar:.<{width}} {done:4d}/{total}  {text}", end=end, flush=True)


# ---------------------------------------------------------------------------------------------- results


def draw(results, out):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for dense, result in sorted(results.items()):  # built logits on top
        style = {"linestyle": "--" if dense else "-", "color": "black" if dense else "tab:blue"}
        axes.plot(result["curve"], **style, linewidth=1 if dense else 2, label=f"training, {NAMES[dense]}")
        marker = {"marker": "x" if dense else "o", "color": "black" if dense else "tab:orange"}
        axes.plot(*result["validation"].T, **marker, linestyle="", label=f"validation, {NAMES[dense]}")
    entropy = next(iter(results.values()))["entropy"]
    axes.axhline(entropy, color="gray", linestyle=":", label=f"unigram entropy, {entropy:.2f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="The next token of Python's own source")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def report(results, options):
    """The table, and what must hold."""
    N, V = options.batch * options.length, options.vocabulary
    print(
        f"\n{N:,} x {V:,} logits in float32 are {4 * N * V / 2**20:,.0f} MiB. Memory is the resident set:\n"
    )
    print(
        f"{'':12s} {'peak memory':>13s} {'over its start':>15s} {'per step':>9s} {'validation':>11s} "
        f"{'perplexity':>11s}"
    )
    for dense, result in results.items():
        final = result["validation"][-1, 1]
        print(
            f"{NAMES[dense]:12s} {result['peak'] / 2**20:9,.0f} MiB {result['rise'] / 2**20:11,.0f} MiB "
            f"{result['seconds']:7.2f} s {final:6.4f} nats {np.exp(final):11.1f}"
        )
    entropy = next(iter(results.values()))["entropy"]
    print(f"{'unigram':12s} {'':13s} {'':15s} {'':9s} {entropy:6.4f} nats {np.exp(entropy):11.1f}")
    if len(results) == 2:
        difference = float(np.max(np.abs(results[False]["curve"] - results[True]["curve"])))
        print(f"\nThe two curves: {options.steps} losses from one start, at most {difference:.1e} apart")
        if difference > 1e-4:
            raise ArithmeticError("the same model and the same data: the curves must agree")
        return difference


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", action="store_true", help="build the logits, and compare")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens in a row")
    parser.add_argument("--features", type=int, default=FEATURES)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--files", type=int, help="read only so many files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="language_model.png")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(argv)

    ids, starts = load(options.cache, options.files)
    known = np.mean(ids[:] < options.vocabulary - 1)
    print(
        f"{len(ids):,} tokens in {len(starts) - 1:,} files; {options.vocabulary:,} classes "
        f"out of {ids.max() + 1:,} different tokens cover {known:.1%}"
    )
    results = {dense: apart(train, options, dense) for dense in ([True, False] if options.dense else [False])}
    difference = report(results, options)
    draw(results, options.out)
    print(f"\nseed {options.seed}, drawn in {options.out}")
    return {"results": results, "difference": difference}


if __name__ == "__main__":
    main()
