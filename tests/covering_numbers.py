"""What a case of tests/covering.py is in numbers, and what it must give.

What options hide is garbage where jaxent sees it: NaN rows, bad labels, huge or NaN logits of hidden classes. The
oracle sees ordinary numbers there, so a case says that they do not matter.
"""

import functools
import zlib
from typing import Any, NamedTuple

import numpy as np

import cases
import harness
import oracle_complex as oracle
from covering import PER_ELEMENT, Case

V, D = 12, 3  # blocks of classes without a remainder, which would be compiled apart; on each device several
ROWS = {"N": (18,), "BT": (6, 3)}
AXIS = {"N": 0, "BT": 1}  # where classes are moved to
STATIC = ("ignore_index", "label_smoothing", "z_loss", "gamma", "epsilon", "temperature")
STATIC += ("alpha", "gamma_negative", "gamma_positive", "clip", "pos_weight", "beta", "rest")
NOT_STATIC = (None, "[V]", PER_ELEMENT)
FACTORS = {"pos_weight", "alpha"}  # of elementwise losses
SLOTS = len(oracle.SLOTS)  # of sparse labels and chosen classes


class Built(NamedTuple):
    inputs: dict[str, np.ndarray]  # what jaxent gets, of which the floats are differentiated
    cotangent: np.ndarray
    value: np.ndarray
    gradients: dict[str, np.ndarray]


def layered(case: Case) -> tuple[str, ...]:
    """Prefixes of the logits that are layers."""
    if case["source"] in (None, "dense"):
        return ()
    if case["source"] == "a layer and an array":
        return ("",) if case["loss"] == "softmax_kl_divergence" else ("target_",)
    return ("",) if case["target"] == "sparse" else ("", "target_")


def shape_of_losses(case: Case) -> tuple[int, ...]:
    rows = ROWS[case["shape"]]
    return (*rows, V) if case.table == "sigmoid" or case["loss"] == "binary_cross_entropy" else rows


def moved(case: Case, x: np.ndarray) -> np.ndarray:
    rows = ROWS[case["shape"]]
    of_classes = x.ndim > len(rows) and x.shape[:-1] == rows
    return np.moveaxis(x, -1, AXIS[case["shape"]]) if case["axis"] and of_classes else x


def dense(at: np.ndarray, probs: np.ndarray) -> np.ndarray:
    return (at * probs[..., None]).sum(-2)


class Builder:
    def __init__(self, case: Case):
        self.case, self.loss = case, case["loss"]
        self.rng = np.random.default_rng(zlib.crc32(str(case).encode()))
        self.rows, self.shape = ROWS[case["shape"]], shape_of_losses(case)
        self.clean: dict[str, Any] = {}  # what the oracle sees
        self.dirty: dict[str, Any] = {}
        self.slopes: dict[str, np.ndarray] = {}  # of the losses, one row or element each
        self.options = {name: x for name, x in case.levels if name in STATIC and x not in NOT_STATIC}

    def floats(self, x: np.ndarray) -> np.ndarray:
        return x.astype(cases.NUMPY_DTYPES[self.case["dtype"]]).astype(np.float64)

    def built(self) -> Built:
        self.masks()
        losses = {
            "softmax": self.softmax,
            "divergences": self.divergence,
            "sigmoid": self.sigmoid,
            "probability": self.probability,
        }[self.case.table]()
        return self.reduced(losses)

    def masks(self) -> None:
        case, rng, position = self.case, self.rng, np.arange(np.prod(self.shape)).reshape(self.shape)
        self.counts, self.weights = np.ones(self.shape, bool), np.ones(self.shape)
        if case["where"]:
            self.counts = self.dirty["where"] = (rng.uniform(size=self.shape) < 0.7) & (position % 16 != 3)
        self.gone = ~self.counts  # rows that hold garbage
        if case["weights"]:
            self.weights = cases.rounded(rng.uniform(0.5, 2, size=self.shape)) * (position % 5 != 2)
            self.gone |= (self.weights == 0) & (position % 2 == 0)
            self.dirty["weights"] = np.where(self.counts, self.weights, np.nan)
        self.force = np.ones((*self.rows, V), bool)
        if case["class_mask"]:
            mask = rng.uniform(size=V if case["class_mask"] == "[V]" else self.force.shape) < 0.7
            mask[..., 5:7] = [True, False]
            self.force, self.dirty["class_mask"] = self.force & mask, mask
        self.w_y = 1.0
        if case["class_weights"]:
            self.class_weights = cases.rounded(rng.uniform(0.5, 2, size=V))
            self.class_weights[[5, 11]] = 0
            self.options["class_weights"] = self.dirty["class_weights"] = self.class_weights

    def labels(self) -> Any:
        """Targets q, of a class index its one-hot row."""
        case, rng, kind = self.case, self.rng, self.case["labels"]
        if kind == "no labels":
            return None
        if kind == "index":
            label = np.where(self.force, rng.gumbel(size=self.force.shape), -np.inf).argmax(-1)
            label.flat[4:6] = 5  # of class weight 0
            q = np.eye(V)[label]
            self.dirty["labels"] = self.integers(label, V + 7)
            if case["class_weights"]:
                self.w_y = self.class_weights[q.argmax(-1)]
                if not case["label_smoothing"]:
                    self.gone = self.gone | (self.w_y == 0)
            return q
        q = (
            np.exp(2 * rng.normal(size=self.force.shape))
            * self.force
            * (rng.uniform(size=self.force.shape) < 0.5)
        )
        q[..., 5] += 0.1
        if kind == "sparse":
            probs, at = self.sparse("labels", q)
            self.of_probs = functools.partial(dense, at)
            return self.of_probs(probs)
        q = self.clean["labels"] = self.floats(q / q.sum(-1, keepdims=True))
        self.dirty["labels"] = np.where(self.gone[..., None], np.nan, q)
        return q

    def integers(self, label: np.ndarray, bad: int) -> np.ndarray:
        """As jaxent sees them, some of them ignored."""
        hidden = self.gone
        if self.case["ignore_index"]:
            ignored = np.arange(label.size).reshape(label.shape) % 7 == 1
            self.counts, hidden = self.counts & ~ignored, hidden & ~ignored
            self.gone, label = self.gone | ignored, np.where(ignored, self.case["ignore_index"], label)
        return np.where(hidden, bad, label).astype(np.int32)

    def chosen(self, weight: np.ndarray) -> np.ndarray:
        """Classes of each row that have some: SLOTS of them, some twice."""
        draws = self.rng.gumbel(size=(SLOTS, *weight.shape)) + np.log(np.where(weight > 0, 1, 1e-300))
        found = np.moveaxis(draws.argmax(-1), 0, -1)
        found[..., 1] = np.where(self.rng.uniform(size=self.rows) < 0.3, found[..., 0], found[..., 1])
        return found

    def sparse(self, name: str, weight: np.ndarray, others: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities `[..., SLOTS]`, which are differentiated, and which class `[..., SLOTS, V]` is theirs.

        With `others` they sum to less than 1, and a class without mass is one of the others.
        """
        rng, classes = self.rng, self.chosen(weight)
        probs = self.floats(rng.dirichlet(np.ones(SLOTS + others), size=self.rows)[..., :SLOTS])
        empty = rng.uniform(size=probs.shape) < 0.25
        probs = self.clean[name] = np.where(empty, 0, probs)
        bad = np.where(
            rng.uniform(size=probs.shape) < 0.5, -1, np.where(self.gone[..., None], V + 3, classes)
        )
        self.dirty[f"classes_of_{name}"] = np.where(empty | self.gone[..., None], bad, classes).astype(
            np.int32
        )
        self.dirty[name] = np.where(self.gone[..., None], np.nan, probs)
        at = np.arange(V) == np.where(empty & (bad < 0), -1, classes)[..., None]
        return probs, at & (dense(at, probs) > 0)[..., None, :] if others else at

    def logits(self, prefix: str = "") -> tuple[np.ndarray, Any]:
        """What is differentiated (logits, or the product of a layer), and from it to the logits."""
        case, rng = self.case, self.rng
        if prefix not in layered(case):
            z = self.clean[prefix + "logits"] = self.floats(1.5 * rng.normal(size=self.force.shape))
            garbage = np.where(np.arange(V) % 2 == 0, np.nan, 6e4)
            dirty = np.where(self.gone[..., None], np.nan, np.where(self.force, z, garbage))
            self.dirty[prefix + "logits"] = dirty
            return z, lambda z: z
        hidden, kernel = (self.floats(rng.normal(size=size)) for size in ((*self.rows, D), (D, V)))
        parts = {"hidden": hidden, "kernel": kernel}
        if case["bias"]:
            parts["bias"] = self.floats(rng.normal(size=V))
        out_of_force = ~self.force.reshape(-1, V).any(0)
        self.clean |= {prefix + name: x for name, x in parts.items()}
        self.dirty |= {
            prefix + name: np.where(out_of_force, 6e4, x) for name, x in parts.items() if name != "hidden"
        }
        self.dirty[prefix + "hidden"] = np.where(self.gone[..., None], np.nan, hidden)
        cap, temperature = case["softcap"], case["layer_temperature"] or 1

        def transform(z: np.ndarray) -> np.ndarray:
            return (cap * np.tanh(z / cap) if cap else z) / temperature

        return hidden @ kernel + parts.get("bias", 0), transform

    def softmax(self) -> np.ndarray:
        case, q = self.case, self.labels()
        z, transform = self.logits()
        if self.loss == "softmax_loss":
            self.options["advantage"] = self.clean["advantage"] = cases.rounded(
                self.rng.normal(size=self.rows)
            )
            self.dirty["advantage"] = np.where(self.gone, np.nan, self.clean["advantage"])
        if case["classes"]:
            classes = self.chosen(self.force)
            classes[..., 2] = -1  # an empty slot
            self.options["classes"] = classes
            self.dirty["classes"] = np.where(self.gone[..., None], V + 5, classes).astype(np.int32)
        if case["alpha"] == "[V]":
            self.options["alpha"] = self.dirty["alpha"] = cases.rounded(self.rng.uniform(0.5, 2, size=V))

        def f(z: np.ndarray, q: Any, **more: Any) -> np.ndarray:
            return oracle.softmax(self.loss, transform(z), q, self.force, self.w_y, self.options | more)

        self.slopes["logits"] = oracle.row_slopes(lambda z: f(z, q), z)
        if "labels" in self.clean:
            of_probs = self.of_probs if case["labels"] == "sparse" else lambda q: q
            self.slopes["labels"] = oracle.row_slopes(lambda q: f(z, of_probs(q)), self.clean["labels"])
        if "advantage" in self.clean:
            self.slopes["advantage"] = oracle.slopes(lambda x: f(z, q, advantage=x), self.clean["advantage"])
        return f(z, q).real

    def divergence(self) -> np.ndarray:
        z, of_z = self.logits()
        if self.case["target"] == "sparse":
            name, (t, at) = "target", self.sparse("target", self.force, others=1)

            def f(z: np.ndarray, t: np.ndarray) -> np.ndarray:
                few = dense(at, t), at.any(-2)
                return oracle.divergence_from_few(self.loss, of_z(z), *few, self.force, self.options)
        else:
            name, (t, of_t) = "target_logits", self.logits("target_")

            def f(z: np.ndarray, t: np.ndarray) -> np.ndarray:
                return oracle.divergence(self.loss, of_z(z), of_t(t), self.force, self.options)

        self.slopes["logits"] = oracle.row_slopes(lambda z: f(z, t), z)
        self.slopes[name] = oracle.row_slopes(lambda t: f(z, t), t)
        return f(z, t).real

    def binary_labels(self) -> np.ndarray:
        kind = self.case["labels"]
        y = self.floats(self.rng.choice([0, 0.2, 0.9, 1] if kind == "float" else [0, 1], size=self.shape))
        if kind == "float":
            self.clean["labels"] = y
        if kind == "integer":
            self.dirty["labels"] = self.integers(y, 7)
        else:
            self.dirty["labels"] = y > 0 if kind == "bool" else np.where(self.gone, 7, y)
        return y

    def sigmoid(self) -> np.ndarray:
        y = self.binary_labels()
        z = self.clean["logits"] = self.floats(2 * self.rng.normal(size=self.shape))
        self.dirty["logits"] = np.where(self.gone, np.nan, z)
        self.factor("pos_weight", 0.5, 2)
        self.factor("alpha", 0.125, 0.875)

        def f(z: Any, y: Any, **more: Any) -> np.ndarray:
            options = self.options | more
            return oracle.sigmoid(self.loss, z, y, options.get("pos_weight", 1), options)

        self.slopes["logits"] = oracle.slopes(lambda z: f(z, y), z)
        if "labels" in self.clean:
            self.slopes["labels"] = oracle.slopes(lambda y: f(z, y), y)
        for name in FACTORS & self.clean.keys():
            self.slopes[name] = oracle.slopes(lambda x: f(z, y, **{name: x}), self.clean[name])  # noqa: B023
        return f(z, y).real

    def factor(self, name: str, low: float, high: float) -> None:
        """An option that may be an array, of each class or of each element."""
        if self.case[name] not in ("[V]", PER_ELEMENT):
            return
        per_element = self.case[name] == PER_ELEMENT
        x = cases.rounded(self.rng.uniform(low, high, size=self.shape if per_element else V))
        self.options[name] = self.clean[name] = x
        self.dirty[name] = np.where(self.gone, np.nan, x) if per_element else x

    def probability(self) -> np.ndarray:
        binary, slopes = self.loss == "binary_cross_entropy", oracle.row_slopes
        y = self.binary_labels() if binary else self.labels()
        x = self.rng.uniform(0.25, 0.75, size=(*self.rows, V))  # not a label
        x = np.where(abs(x - 0.5) < 0.01, 0.6, x)  # nor one half, where the slope by a label is all rounding
        if self.loss == "mean":
            x = self.rng.normal(size=self.shape)
        if self.loss in ("nll_loss", "kl_divergence"):
            x = np.log(x / x.sum(-1, keepdims=True))
        if self.shape == x.shape:
            slopes = oracle.slopes
        x = self.clean["logits"] = self.floats(x)
        gone = self.gone if self.shape == x.shape else self.gone[..., None]
        self.dirty["logits"] = np.where(gone, np.nan, x)

        def f(x: np.ndarray, y: Any) -> np.ndarray:
            return oracle.probability(self.loss, x, y, self.options)

        self.slopes["logits"] = slopes(lambda x: f(x, y), x)
        if "labels" in self.clean:
            self.slopes["labels"] = slopes(lambda y: f(x, y), y)
        return f(x, y).real

    def reduced(self, losses: np.ndarray) -> Built:
        case, reduction = self.case, "mean" if self.loss == "mean" else self.case["reduction"]
        ct = harness.cotangent_of(self.shape) if reduction == "none" else np.float64(1.25)
        total = np.where(self.counts, self.weights * self.w_y, 0).sum()
        weighted = np.where(self.counts, self.weights * losses, 0)
        value = {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / total}[reduction]
        # of the losses, and of the weights; what is gone has no part in either
        scale = np.where(self.counts, ct * self.weights, 0) / (total if reduction == "mean" else 1)
        of_weights = ct * (losses - value * self.w_y) / total if reduction == "mean" else ct * losses
        gradients = {}
        if "weights" in self.dirty:
            gradients["weights"] = moved(case, np.where(self.gone, 0, of_weights))
        for name, slope in self.slopes.items():
            g = slope * (scale if slope.ndim == scale.ndim else scale[..., None])
            prefix = name.removesuffix("logits")
            if name in FACTORS and self.clean[name].ndim == 1:
                gradients[name] = g.reshape(-1, V).sum(0)
            elif name.endswith("logits") and name not in self.clean:
                hidden, kernel = (self.clean[prefix + part] for part in ("hidden", "kernel"))
                gradients[prefix + "hidden"] = g @ kernel.T
                gradients[prefix + "kernel"] = hidden.reshape(-1, D).T @ g.reshape(-1, V)
                if prefix + "bias" in self.clean:
                    gradients[prefix + "bias"] = g.reshape(-1, V).sum(0)
            else:
                gradients[name] = moved(case, g)
        wide = {"weights", "class_weights", "advantage", "pos_weight", "alpha"}
        inputs = {
            name: np.asarray(harness.cast(moved(case, x), "float32" if name in wide else case["dtype"]))
            for name, x in self.dirty.items()
        }
        return Built(inputs, np.float32(moved(case, ct)), moved(case, value), gradients)


@functools.cache
def build(case: Case) -> Built:
    return Builder(case).built()


def static_options(case: Case) -> dict[str, Any]:
    """What is no array."""
    options = {name: x for name, x in case.levels if name in STATIC and x not in NOT_STATIC}
    if case["axis"]:
        options["axis"] = AXIS[case["shape"]]
    return options
