"""One table of cases that the test files share: shapes, scales of logits, kinds of labels, options.

`case.build(dtype)` gives dense logits, rounded to `dtype` and held in float64, so that the oracle and jaxent see
the same numbers. `case.linear(features)` gives hidden, kernel and bias for logits that are a product, with the
same labels and options. Everything in a case follows from its seed.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NUMPY_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
IGNORED = -100
INF = math.inf


class Built(NamedTuple):
    logits: np.ndarray  # float64, exact in the dtype asked for
    labels: np.ndarray  # int32 [...] or a float64 distribution like `logits`
    options: dict[str, Any]


class Linear(NamedTuple):
    hidden: np.ndarray  # float64 [..., D]
    kernel: np.ndarray  # [D, V]
    bias: np.ndarray  # [V]
    labels: np.ndarray
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    rows: tuple[int, ...]
    classes: int
    loss: str = "softmax_cross_entropy"
    labels: str = "index"  # or "distribution", "sparse" (mostly zeros), "any" (does not sum to 1)
    scale: float = 3.0
    offset: float = 0.0
    gap: float = 0.0  # by how much the label's logit leads: 69 is a loss of 1e-30
    axis: int = -1
    masks: tuple[str, ...] = ()  # of where, ignore_index, weights, class_weights, class_mask, class_mask_rows
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def soft(self) -> bool:
        return self.labels != "index"

    def build(self, dtype: str = "float64") -> Built:
        z = self.rng("logits").normal(size=(*self.rows, self.classes)) * self.scale + self.offset
        labels, options = self.labels_and_options(dtype)
        if self.gap:
            y = labels.argmax(-1) if self.soft else labels
            gaps = np.linspace(0.05, 1.0, math.prod(self.rows)) * self.gap
            top = z.max(-1) + self.rng("gap").permutation(gaps).reshape(self.rows)
            np.put_along_axis(z, np.where(y < 0, 0, y)[..., None], top[..., None], -1)
        z = z.astype(NUMPY_DTYPES[dtype]).astype(np.float64)

        def move(x: Any) -> Any:
            return np.moveaxis(x, -1, self.axis) if np.shape(x) == z.shape else x

        options = {name: move(x) for name, x in options.items()}
        if self.axis != -1:
            options["axis"] = self.axis
        return Built(move(z), move(labels), options)

    def linear(self, features: int = 16) -> Linear:
        if self.axis != -1 or self.gap:
            raise ValueError(f"{self.name}: no linear form")
        rng = self.rng("linear")
        labels, options = self.labels_and_options("float32")
        kernel = rng.normal(size=(features, self.classes))
        hidden = rng.normal(size=(*self.rows, features)) * self.scale / np.sqrt(features)
        bias = rng.normal(size=self.classes) * 0.1 + self.offset
        return Linear(hidden, kernel, bias, labels, options)

    def rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.classes, *self.rows, *what.encode()])

    def labels_and_options(self, dtype: str) -> tuple[np.ndarray, dict[str, Any]]:
        rng, rows, classes = self.rng("labels"), self.rows, self.classes
        options = dict(self.options)
        force = np.ones((*rows, classes), bool)
        if "class_mask" in self.masks:
            options["class_mask"] = rng.uniform(size=classes) < 0.7
            options["class_mask"][rng.integers(classes)] = True
            force &= options["class_mask"]
        if "class_mask_rows" in self.masks:
            options["class_mask"] = rng.uniform(size=force.shape) < 0.5
            options["class_mask"][..., rng.integers(classes)] = True
            force &= options["class_mask"]
        if "where" in self.masks:
            options["where"] = rng.uniform(size=rows) < 0.7
        if "weights" in self.masks:
            options["weights"] = rounded(rng.uniform(0.1, 2, size=rows) * (rng.uniform(size=rows) < 0.8))
        if "class_weights" in self.masks:
            options["class_weights"] = rounded(rng.uniform(0.1, 2, size=classes))
        labels = np.where(force, rng.gumbel(size=force.shape), -np.inf).argmax(-1).astype(np.int32)
        if "ignore_index" in self.masks:
            options["ignore_index"] = IGNORED
            labels = np.where(rng.uniform(size=rows) < 0.3, IGNORED, labels).astype(np.int32)
        if self.soft:
            q = np.exp(2 * rng.normal(size=force.shape)) * force
            if self.labels == "sparse":
                q *= (rng.uniform(size=force.shape) < 0.2) | (np.arange(classes) == labels[..., None])
            q /= q.sum(-1, keepdims=True) if self.labels != "any" else np.float64(classes)
            labels = q.astype(NUMPY_DTYPES[dtype]).astype(np.float64)
        return labels, options


def rounded(x: np.ndarray) -> np.ndarray:
    """Weights that every dtype holds: they are not what is measured."""
    return np.round(x * 16) / 16


# Ordinary rows of plain cross-entropy, across the sizes at which code changes: few classes, many divisors, an
# awkward factorization, a prime.
PLAIN = (
    Case("two classes", (64,), 2, scale=2),
    Case("seven classes", (5, 3), 7),
    Case("tiny logits", (33,), 10, scale=1e-3),
    Case("huge logits", (33,), 10, scale=300),
    Case("shifted", (65,), 33, offset=1e4),
    Case("255", (17,), 255),
    Case("256", (16,), 256),
    Case("4096", (9,), 4096),
    Case("4096 shifted", (9,), 4096, scale=5, offset=-1e4),
    Case("prime 5003", (7,), 5003),
    Case("50257", (3, 2), 50257, scale=2),
)
CONFIDENT = (
    Case("confident", (300,), 10, gap=70),
    Case("confident 997", (40,), 997, scale=1, gap=75),
    Case("confident 4096", (24,), 4096, scale=1, gap=76),
    Case("confident 50257 shifted", (8,), 50257, scale=1, gap=80, offset=1e3),
)
OPTIONS = (
    Case("all masks", (6, 11), 13, masks=("where", "ignore_index", "weights", "class_weights")),
    Case("class mask", (21,), 23, masks=("class_mask", "weights")),
    Case(
        "class mask per row 4100", (8,), 4100, masks=("class_mask_rows",), options=(("label_smoothing", 0.1),)
    ),
    Case("smoothing", (32,), 9, options=(("label_smoothing", 0.1),)),
    Case("smoothing weighted", (32,), 9, masks=("class_weights",), options=(("label_smoothing", 0.3),)),
    Case("z-loss", (32,), 9, offset=2, options=(("z_loss", 1e-3),)),
    Case(
        "everything",
        (9, 7),
        301,
        masks=("where", "ignore_index", "weights", "class_weights", "class_mask"),
        options=(("label_smoothing", 0.2), ("z_loss", 1e-3), ("reduction", "mean")),
    ),
    Case("axis", (4, 6), 8, axis=1, masks=("class_mask_rows", "where"), options=(("label_smoothing", 0.1),)),
    Case("sum", (50,), 12, masks=("weights",), options=(("reduction", "sum"),)),
    Case("mean", (50,), 12, masks=("where", "class_weights"), options=(("reduction", "mean"),)),
    Case("distribution", (19,), 11, labels="distribution"),
    Case("distribution 4096", (6,), 4096, labels="sparse", masks=("where",)),
    Case("any sum", (19,), 11, labels="any", options=(("z_loss", 1e-3),)),
    Case(
        "distribution, everything",
        (3, 8),
        14,
        labels="sparse",
        axis=0,
        masks=("where", "weights", "class_weights", "class_mask"),
        options=(("label_smoothing", 0.2), ("z_loss", 1e-3), ("reduction", "mean")),
    ),
    Case("focal", (40,), 10, loss="softmax_focal_loss"),
    Case("focal confident", (40,), 10, loss="softmax_focal_loss", gap=23),
    Case(
        "focal smoothing",
        (40,),
        10,
        loss="softmax_focal_loss",
        masks=("class_weights", "ignore_index"),
        options=(("gamma", 0.5), ("label_smoothing", 0.1), ("z_loss", 1e-3)),
    ),
    Case("focal distribution", (12,), 10, loss="softmax_focal_loss", labels="sparse"),
    Case("poly", (40,), 10, loss="softmax_poly_loss", masks=("class_weights", "weights")),
    Case("poly confident", (40,), 10, loss="softmax_poly_loss", gap=60, options=(("epsilon", 2.0),)),
    Case("poly distribution", (12,), 300, loss="softmax_poly_loss", labels="distribution"),
)
CASES = PLAIN + CONFIDENT + OPTIONS
STATISTICS = (
    Case("7", (11,), 7),
    Case("confident", (30,), 12, gap=60),
    Case("shifted", (8,), 4096, offset=1e4),
    Case("masked", (5, 3), 300, masks=("where", "class_mask")),
    Case("masked per row", (5, 3), 6, axis=0, masks=("class_mask_rows",)),
    Case("distribution", (6,), 20, labels="sparse"),
)
# What is rounded to a half dtype and widened again is a float32 computation: a few cases show that it is.
HALF = tuple(
    case
    for case in CASES
    if case.name in ("seven classes", "4096", "confident", "everything", "distribution", "focal")
)


class Pair(NamedTuple):
    """Two rows of logits a small step apart, for the divergences."""

    step: float
    logits: np.ndarray
    target_logits: np.ndarray


def pair(step: float, rows: int = 40, classes: int = 12, dtype: str = "float32", seed: int = 0) -> Pair:
    rng = np.random.default_rng([seed, rows, classes])
    z = 2 * rng.normal(size=(rows, classes))
    t = z + step * rng.normal(size=z.shape)
    cast = NUMPY_DTYPES[dtype]
    return Pair(step, z.astype(cast).astype(np.float64), t.astype(cast).astype(np.float64))


# pairs of logits with probability 0 in one, the other or both
SUPPORTS = {
    "p = 0 < q": ([-INF, 1, 2], [1, 0.5, 0]),
    "q = 0 < p": ([1, 0.5, 0], [-INF, 1, 2]),
    "both": ([-INF, 1, 2], [0.5, 1, -INF]),
    "disjoint": ([-INF, 1, 2], [0, -INF, -INF]),
    "the same": ([-INF, 1, 2], [-INF, 0.5, 0]),
}
