"""Every loss on every source of logits as one program, and inputs for it that are related to each other.

Scores are multiples of 2^-10, so shifts by a power of two are exact, and so are products that are logits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import harness
import jaxent
import tables

N, V, D, K, S = 6, 11, 5, 3, 4
WIDE = {"37": 37, "4096": 4096}  # dense, of so many classes: a CPU has other ways to sum them
# axes of each input, and of the gradient by it
AXES = {
    "logits": "NV", "target_logits": "NV", "labels": "N", "distribution": "NV", "classes": "NK", "slots": "NK",
    "yes_no": "NV", "probs": "NV", "log_probs": "NV", "target_probs": "NV", "hidden": "ND", "kernel": "DV",
    "bias": "V", "samples": "S", "x": "ND", "y": "ND", "scale": "", "where": "N", "elements": "NV", "weights": "N",
    "class_weights": "V", "class_mask": "V", "temperature": "N", "advantage": "N",
}  # fmt: skip
NAMES_OF_CLASSES = {"labels", "classes", "samples"}
CONSTANT = {"class_weights"}


class Loss(NamedTuple):
    function: str
    inputs: tuple[str, ...]  # positional arguments
    options: dict[str, Any]  # numbers, or names of inputs
    sources: tuple[str, ...] = ("dense",)
    shifts: tuple[str, ...] = ()  # inputs of which what is added to all classes of a row is lost
    of_pairs: bool = False  # rows are each other's classes

    @property
    def arrays(self):
        return [x for x in self.options.values() if isinstance(x, str) and x in AXES]

    @property
    def mask(self):
        return self.options.get("where")

    @property
    def axes(self):
        """Of what it returns."""
        default = "mean" if self.function == "softmax_loss" else "none"
        if self.options.get("reduction", default) != "none":
            return ""
        return "NV" if "yes_no" in self.inputs else "N"


def softmax(function, *inputs, sources=("dense",), shifts=("logits",), **options):
    return Loss(function, inputs, options, sources, shifts)


def other(function, *inputs, shifts=(), of_pairs=False, **options):
    return Loss(function, inputs, options, shifts=shifts, of_pairs=of_pairs)


def objective(s, advantage):
    return -advantage * s.log_prob - 0.25 * s.entropy


CE, FOCAL, POLY = "softmax_cross_entropy", "softmax_focal_loss", "softmax_poly_loss"
KL, JS = "softmax_kl_divergence", "softmax_js_divergence"
BLOCKS = ("rows", "pieces", "classes")
BOTH = ("logits", "target_logits")
# about half of them with a mask
LOSSES = {
    "labels": softmax(CE, "logits", "labels", sources=("dense", "37", "4096", "rows", "classes")),
    "labels, masked": softmax(CE, "logits", "labels", where="where", sources=("dense", "37", *BLOCKS)),
    "distributions": softmax(CE, "logits", "distribution", sources=("dense", "rows", "classes")),
    "distributions, masked": softmax(
        CE, "logits", "distribution", where="where", sources=("dense", "pieces")
    ),
    "sparse": softmax(CE, "logits", "sparse", sources=("dense", "classes")),
    "sparse, masked": softmax(CE, "logits", "sparse", where="where", sources=("dense", "rows")),
    "smoothing": softmax(CE, "logits", "labels", label_smoothing=0.25, sources=("dense", "classes")),
    "z-loss": softmax(
        CE, "logits", "labels", z_loss=0.5, where="where", shifts=(), sources=("dense", "rows")
    ),
    "weights": softmax(CE, "logits", "labels", weights="weights", sources=("dense", "classes")),
    "class weights": softmax(
        CE, "logits", "labels", class_weights="class_weights", sources=("dense", "rows")
    ),
    "class mask": softmax(
        CE, "logits", "labels", class_mask="class_mask", sources=("dense", "rows", "classes")
    ),
    "mean": softmax(CE, "logits", "labels", where="where", reduction="mean", sources=("dense", "classes")),
    "weighted mean": softmax(
        CE, "logits", "labels", weights="weights", where="where", reduction="mean", sources=("dense", *BLOCKS)
    ),
    "sum": softmax(CE, "logits", "distribution", reduction="sum", sources=("dense", "pieces")),
    "focal": softmax(FOCAL, "logits", "labels", where="where", sources=("dense", "rows")),
    "focal of distributions": softmax(
        FOCAL, "logits", "distribution", gamma=0.5, sources=("dense", "classes")
    ),
    "poly": softmax(POLY, "logits", "labels"),
    "poly of distributions": softmax(POLY, "logits", "distribution", where="where"),
    "entropy": softmax("softmax_entropy", "logits", where="where", sources=("dense", "37", "classes")),
    "KL": softmax(KL, *BOTH, shifts=BOTH, sources=("dense", "rows")),
    "KL, masked": softmax(KL, *BOTH, shifts=BOTH, where="where", temperature="temperature"),
    "KL to few": softmax(KL, "logits", "sparse", where="where", sources=("dense", "rows", "classes")),
    "JS": softmax(JS, *BOTH, shifts=BOTH, where="where", sources=("dense", "rows")),
    "JS, beta": softmax(JS, *BOTH, shifts=BOTH, beta=0.25),
    "JS to few": softmax(JS, "logits", "sparse"),
    "objective": softmax(
        "softmax_loss",
        "logits",
        "labels",
        "advantage",
        where="where",
        reduction="none",
        sources=("dense", "rows"),
    ),
    "objective, mean": softmax(
        "softmax_loss", "logits", "labels", "advantage", sources=("pieces", "classes")
    ),
    "sigmoid": other("sigmoid_cross_entropy", "logits", "yes_no"),
    "sigmoid, masked": other(
        "sigmoid_cross_entropy", "logits", "yes_no", where="elements", label_smoothing=0.25
    ),
    "sigmoid focal": other("sigmoid_focal_loss", "logits", "yes_no", alpha=0.25, where="elements"),
    "asymmetric": other("sigmoid_asymmetric_loss", "logits", "yes_no", where="elements"),
    "probabilities": other("categorical_cross_entropy", "probs", "labels", where="where"),
    "probabilities, distributions": other("categorical_cross_entropy", "probs", "distribution"),
    "binary": other("binary_cross_entropy", "probs", "yes_no", where="elements"),
    "log-probabilities": other(
        "nll_loss", "log_probs", "labels", class_weights="class_weights", where="where"
    ),
    "measures": other("kl_divergence", "log_probs", "target_probs", generalized=True, where="where"),
    "sampled": other(
        "sampled_softmax_cross_entropy",
        "hidden",
        "kernel",
        "labels",
        "samples",
        bias="bias",
        shifts=("bias",),
    ),
    "NCE": other("nce_loss", "hidden", "kernel", "labels", "samples", bias="bias", where="where"),
    "CLIP": other("softmax_contrastive_loss", "x", "y", scale="scale", reduction="none", of_pairs=True),
    "SigLIP": other(
        "sigmoid_contrastive_loss",
        "x",
        "y",
        scale="scale",
        bias=-2.0,
        where="where",
        reduction="none",
        of_pairs=True,
    ),
}
ROWS = [(name, source) for name, loss in LOSSES.items() for source in loss.sources]
FULL = [("labels, masked", "37"), ("weighted mean", "rows"), ("KL", "dense"), ("sigmoid", "dense")]


def over(rows):
    """As conftest.py compiles; some as a user does, the rest of those is exhaustive. One after the other: `scope`."""
    compiled = [(*row, how) for row in rows for how in ("quick", "full")]
    chosen = [row for row in compiled if row[2] == "quick" or row[:2] in FULL]
    ids = [f"{name}-{source}-{how}" for name, source, how in compiled]
    names = ("name", "source", "how")
    return pytest.mark.parametrize(names, tables.some(chosen, compiled), ids=ids, scope="module")


@functools.cache
def inputs(source, seed=0):
    """Numbers that float32 has; logits are exactly hidden @ kernel + bias."""
    classes = WIDE.get(source, V)
    rng = np.random.default_rng([seed, N, classes])

    def grid(shape, reach, unit):
        return rng.integers(-reach * unit, reach * unit + 1, size=shape) / unit

    hidden, kernel, bias = grid((N, D), 2, 4), grid((D, classes), 2, 8), grid(classes, 1, 1024)
    logits = hidden @ kernel + bias
    log_probs = (logits - np.logaddexp.reduce(logits, -1, keepdims=True)).astype(np.float32)
    some = rng.permuted(np.tile(np.arange(classes), (N, 1)), axis=1)[:, :K]
    labels = rng.permutation(classes)[:N]
    distribution = rng.dirichlet(np.full(classes, 0.5), size=N)
    return {
        "logits": logits, "target_logits": logits + grid(logits.shape, 2, 1024), "labels": labels.astype(np.int32),
        "distribution": distribution, "target_probs": distribution, "classes": some.astype(np.int32),
        "slots": rng.dirichlet(np.ones(K + 1), size=N)[:, :K], "yes_no": rng.integers(2, size=logits.shape) / 1,
        "probs": np.exp(log_probs), "log_probs": log_probs, "hidden": hidden, "kernel": kernel, "bias": bias,
        "samples": rng.permutation(classes)[:S].astype(np.int32), "x": grid((N, D), 2, 4), "y": grid((N, D), 2, 4),
        "scale": np.float64(0.5), "where": np.arange(N) % 3 != 1, "elements": rng.uniform(size=logits.shape) < 0.7,
        "weights": rng.integers(1, 32, size=N) / 16, "class_weights": rng.integers(1, 32, size=classes) / 16,
        "class_mask": np.isin(np.arange(classes), labels) | (np.arange(classes) % 3 > 0),
        "temperature": 2.0 ** rng.integers(-1, 2, size=N), "advantage": rng.normal(size=N),
    }  # fmt: skip


def used(loss, source):
    names = [*loss.inputs, *loss.arrays]
    if source in BLOCKS:
        names = ["hidden", "kernel", "bias", *names[1:]]
    return [x for name in names for x in (("classes", "slots") if name == "sparse" else (name,))]


@functools.cache
def program(name, source, how):
    loss = LOSSES[name]

    def f(moving, fixed, cotangent):
        def losses(moving):
            given = moving | fixed
            if "slots" in given:
                given["sparse"] = jaxent.SparseDistribution(given["classes"], given["slots"])
            if source in BLOCKS:
                given["logits"] = jaxent.LinearLogits(given["hidden"], given["kernel"], given["bias"])
            first = [objective] if loss.function == "softmax_loss" else []
            options = {k: given[x] if x in loss.arrays else x for k, x in loss.options.items()}
            return getattr(jaxent, loss.function)(*first, *(given[x] for x in loss.inputs), **options)

        out, vjp = jax.vjp(losses, moving)
        return out, vjp(cotangent)[0]

    return jax.jit(f, compiler_options=harness.FULL if how == "full" else harness.QUICK)


def run(name, source, how, given, cotangent=1.0):
    """(losses, gradients by what is floating point and no constant)."""
    cotangent = np.broadcast_to(np.float64(cotangent), shape_of(LOSSES[name].axes, given))
    given = {x: harness.cast(given[x], "float32") for x in used(LOSSES[name], source)}
    moving = {k: x for k, x in given.items() if x.dtype == jnp.float32 and k not in CONSTANT}
    fixed = {k: x for k, x in given.items() if k not in moving}
    with harness.blocks(source if source in BLOCKS else "dense"):
        out = program(name, source, how)(moving, fixed, harness.cast(cotangent, "float32"))
    return jax.tree.map(np.asarray, out)


def shape_of(axes, given):
    sizes = {"N": given["labels"].size, "V": given["bias"].size}
    return tuple(sizes[axis] for axis in axes)


def by_row(loss, name):
    """Whether each row has its own gradient by this input."""
    return bool(loss.axes) and not loss.of_pairs and AXES[name].startswith("N")


def take(x, axes, axis, order):
    return np.take(x, order, axes.index(axis)) if axis in axes else x


def permuted(given, axis, order):
    """Of inputs, or gradients by them; and what classes are called."""
    moved = {name: take(x, AXES[name], axis, order) for name, x in given.items()}
    called = np.argsort(order).astype(np.int32)
    names = NAMES_OF_CLASSES & {*moved} if axis == "V" else ()
    return moved | {name: called[moved[name]] for name in names}


def shifted(given, source, name, by):
    """All classes of each row; of a layer by its bias, of all rows alike."""
    if name == "logits" and source in BLOCKS:
        name = "bias"
    by = np.broadcast_to(by, N) if AXES[name] == "NV" else np.max(by)
    return given | {name: given[name] + (by[:, None] if AXES[name] == "NV" else by)}
