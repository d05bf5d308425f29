"""The doctor: looks at real arrays, outside jit, for the mistakes that people make with cross-entropy.

One small function per finding, in the table at the end. It returns what was seen and the fix, or None, and
never raises on the input it is meant to explain. Only a sure sign counts: saturated logits, a small batch or
an unlucky one are healthy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What the first argument of each loss holds.
_LOSSES = {
    "softmax_cross_entropy": "logits",
    "softmax_focal_loss": "logits",
    "softmax_poly_loss": "logits",
    "softmax_statistics": "logits",
    "sigmoid_cross_entropy": "logits",
    "sigmoid_focal_loss": "logits",
    "sigmoid_asymmetric_loss": "logits",
    "categorical_cross_entropy": "probs",
    "binary_cross_entropy": "probs",
    "nll_loss": "log_probs",
}
_PROBABILITY_TOLERANCE = (
    1e-2  # on a row's sum: probabilities that went through bfloat16 are off by up to 4e-3
)
_LABEL_TOLERANCE = 2e-2  # labels written by hand: [0.33, 0.33, 0.33]
_ONE_HOT_ROWS = 4  # fewer rows with exactly one positive are chance, not a sign of exclusive classes


class Finding(NamedTuple):
    """One mistake.

    Attributes:
        name: the kind of mistake, e.g. "softmax-twice".
        seen: what was seen, with figures.
        fix: what to write instead, as code.
    """

    name: str
    seen: str
    fix: str

    def __str__(self) -> str:
        fix = self.fix.replace("\n", "\n        ")
        return f"{self.name}\n  seen: {self.seen}\n  fix:  {fix}"


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found; prints as one block per finding. It is true where something was found.

    Attributes:
        findings: one `Finding` per mistake.
        subject: what was looked at.
        ok: whether nothing was found.
    """

    findings: tuple[Finding, ...]
    subject: str = ""

    @property
    def ok(self) -> bool:
        return not self.findings

    def __len__(self) -> int:
        return len(self.findings)

    def __repr__(self) -> str:
        count = len(self.findings)
        verdict = "no mistake found" if self.ok else f"{count} finding{'s' if count > 1 else ''}"
        return "\n\n".join([f"{self.subject}: {verdict}", *map(str, self.findings)])


class _Case(NamedTuple):
    loss: str
    argument: str  # the name of the first argument: logits, probs, log_probs
    x: np.ndarray  # the first argument
    y: np.ndarray  # the labels
    elementwise: bool  # independent yes/no outputs, no class axis
    classes: int  # V; 0 where there is no class axis
    y_rows: np.ndarray | None  # the labels, if they are one number per row
    y_full: np.ndarray | None  # the labels, if they are one number per class

    def call(self, labels: str = "labels", note: str = "") -> str:
        return f"jaxent.{self.loss}({self.argument}, {labels})" + (f"  # {note}" if note else "")


_Said = tuple[str, str] | None  # what was seen, the fix


def diagnose(logits: Any, labels: Any, *, loss: str = "softmax_cross_entropy") -> Diagnosis:
    """Looks for the classic mistakes in a batch and says what to do about each.

    Call it once, on the first batch, outside jit: it looks at values. It computes no loss.

    Args:
        logits: what the loss gets first (logits, probabilities or log-probabilities, as `loss` wants them),
            `[..., V]`. A `LinearLogits` is built.
        labels: what the loss gets second, in any shape and dtype, right or wrong.
        loss: the name of a loss that takes logits, probs or log_probs, and labels. The class axis is last.

    Returns:
        A `Diagnosis` with `findings`, each with `name`, `seen` and `fix`; `ok`; and a readable `repr`.

    Cost:
        A few passes over the arrays in NumPy.

    Raises:
        ValueError for an unknown `loss`, TypeError for traced values and for what is no array of numbers.

    Example:
        >>> import jax, jaxent
        >>> logits, labels = jax.random.normal(jax.random.key(0), (8, 3)), jax.numpy.arange(8) % 3
        >>> jaxent.diagnose(logits, labels)
        softmax_cross_entropy(logits float32[8, 3], labels int32[8]): no mistake found
        >>> jaxent.diagnose(jax.nn.softmax(logits), labels).findings[0].name
        'softmax-twice'
    """
    if loss not in _LOSSES:
        raise ValueError(f"jaxent.diagnose: `loss` must be one of {', '.join(_LOSSES)}, but is {loss!r}.")
    argument = _LOSSES[loss]
    if hasattr(logits, "dense"):
        logits = logits.dense()
    (x, kind), (y, y_kind) = _read(argument, logits), _read("labels", labels)
    elementwise = loss.startswith(("sigmoid", "binary"))
    classes = x.shape[-1] if x.ndim else 0
    full = y.shape == x.shape and (elementwise or classes != 1)
    rows = not elementwise and not full and y.shape in (x.shape[:-1], (*x.shape[:-1], 1))
    y_rows = y.reshape(x.shape[:-1]) if rows else None
    case = _Case(loss, argument, x, y, elementwise, classes, y_rows, y if full else None)
    with np.errstate(all="ignore"):
        said = [(name, check(case)) for name, check in _CHECKS.items()]
    findings = tuple(Finding(name, *what) for name, what in said if what is not None)
    return Diagnosis(findings, f"{loss}({argument} {kind}, labels {y_kind})")


def _read(argument: str, x: Any) -> tuple[np.ndarray, str]:
    """A NumPy array of bools, integers or floats of at least 32 bits; and what came, as dtype[shape]."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x)):
        remedy = "Call `diagnose` outside jit, grad and vmap, on the first batch."
        raise TypeError(f"jaxent.diagnose: `{argument}` must be real arrays, but is traced. {remedy}")
    try:
        x = np.asarray(x)
        kind = f"{x.dtype}{list(x.shape)}"
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x.astype(np.promote_types(x.dtype, np.float32)), kind
        if x.dtype == np.bool_ or jnp.issubdtype(x.dtype, jnp.integer):
            return x, kind
        got = f"{x.dtype}{list(x.shape)}"
    except ValueError as error:  # a ragged list
        got = f"a {type(x).__name__}: {error}"
    raise TypeError(f"jaxent.diagnose: `{argument}` must be an array of real numbers, but is {got}.")


def _is_float(x: np.ndarray) -> bool:
    return x.dtype.kind == "f"


def _indices(case: _Case) -> np.ndarray | None:
    """Labels that read as class indices, also where they came as floats or as a column."""
    y = case.y_rows
    whole = y is not None and np.isfinite(y).all() and (y == np.round(y)).all()
    return y if whole else None


def _sums(y: np.ndarray) -> np.ndarray:
    return y.sum(-1, dtype=np.float64)


def _sums_to_one(x: np.ndarray) -> bool:
    """Every row is a distribution over two classes or more: what a softmax returns."""
    if x.ndim == 0 or x.shape[-1] < 2 or x.size == 0 or not ((x >= 0) & (x <= 1)).all():
        return False
    return bool((np.abs(_sums(x) - 1) <= _PROBABILITY_TOLERANCE).all())


def _one_hot(y: np.ndarray) -> bool:
    return _sums_to_one(y) and bool(((y == 0) | (y == 1)).all())


def _count(bad: np.ndarray, what: str) -> str:
    first = f", the first at {np.argwhere(bad)[0].tolist()}," if bad.ndim else ""
    return f"{int(bad.sum()):,} of {bad.size:,} {what}{first}"


def _span(y: np.ndarray) -> str:
    low, high = y.min(), y.max()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _shapes(case: _Case) -> _Said:
    x, y = case.x, case.y
    if not case.elementwise and case.classes == 0:
        seen = f"{case.argument} {list(x.shape)} have no class axis of one class or more"
        return (
            seen,
            "jaxent.sigmoid_cross_entropy(logits, labels)  # yes/no; a row of V classes has shape [V]",
        )
    column = case.y_rows is not None and y.ndim == x.ndim and case.classes > 1
    if case.y_full is not None or (case.y_rows is not None and not column):
        return None
    wanted = f"{list(x.shape)}" if case.elementwise else f"{list(x.shape[:-1])} or {list(x.shape)}"
    seen = f"{case.argument} {list(x.shape)} take labels of shape {wanted}, not {list(y.shape)}"
    if column or (case.elementwise and y.shape == (*x.shape, 1)):
        return seen, case.call("labels.squeeze(-1)")
    if case.elementwise and x.shape == (*y.shape, 1):
        return seen, case.call("labels[..., None]")
    if case.elementwise and y.shape == x.shape[:-1]:
        return seen, "jaxent.softmax_cross_entropy(logits, labels)  # if each row has one class of V"
    return seen, case.call(note="one label per row, the class axis last, no broadcast")


def _integer_scores(case: _Case) -> _Said:
    if _is_float(case.x):
        return None
    if _is_float(case.y) and not ((case.y >= 0) & (case.y <= 1)).all():
        return "integers came first and scores second", f"jaxent.{case.loss}(labels, logits)  # swapped"
    seen = f"{case.argument} are {case.x.dtype}: predicted classes or rounded scores, which have no gradient"
    return seen, case.call(note="what the last layer gives, before any argmax")


def _nan(case: _Case) -> _Said:
    bad = np.isnan(case.x) | (case.x == np.inf)
    if not bad.any():
        return None
    seen = f"{_count(bad, case.argument)} are NaN or +inf: these rows have loss NaN"
    return seen, 'jax.config.update("jax_debug_nans", True)  # stops at the step that makes them'


def _softmax_twice(case: _Case) -> _Said:
    if case.argument != "logits" or not _sums_to_one(case.x) or (case.elementwise and case.x.ndim < 2):
        return None
    seen = f"all {case.x.size:,} logits lie in [0, 1] and every row sums to 1: they are probabilities"
    if case.elementwise:
        return seen, "jaxent.softmax_cross_entropy(logits, labels)  # what goes into the softmax"
    return seen, case.call(note="what goes into your softmax; the loss has its own")


def _not_probabilities(case: _Case) -> _Said:
    x, name = case.x, case.argument
    if name == "logits" or x.size == 0 or (case.classes < 2 and not case.elementwise):
        return None
    fix = f"jaxent.{'sigmoid' if case.elementwise else 'softmax'}_cross_entropy({name}, labels)  # if logits"
    bad = (x < 0) | (x > 1 + _PROBABILITY_TOLERANCE) if name == "probs" else x > _PROBABILITY_TOLERANCE
    if name == "log_probs" and _sums_to_one(x):
        return "log_probs are probabilities", "jaxent.categorical_cross_entropy(log_probs, labels)"
    if bad.any():
        return f"{_count(bad, name)} are outside {'[0, 1]' if name == 'probs' else '[-inf, 0]'}", fix
    total = np.ones(1) if case.elementwise else _sums(x if name == "probs" else np.exp(x))
    if (np.abs(total - 1) > _LABEL_TOLERANCE).any():
        return f"the probabilities of a row sum to {_span(total)}, not to 1", fix
    return None


def _saturated(case: _Case) -> _Said:
    x, probs = case.x, case.argument == "probs"
    if case.argument == "logits" or x.size == 0 or (case.classes < 2 and not case.elementwise):
        return None
    zero, one = (x == 0, x == 1) if probs else (x == -np.inf, np.zeros(x.shape, bool))
    if not case.elementwise and x.size > case.classes:
        masked = zero.all(tuple(range(x.ndim - 1)))  # a class that is 0 in every row was taken out on purpose
        zero = zero & ~masked
    if not (zero | one).any():
        return None
    seen = f"{int(zero.sum()):,} of {x.size:,} probabilities are exactly 0, {int(one.sum()):,} exactly 1"
    fix = f"jaxent.{'sigmoid' if case.elementwise else 'softmax'}_cross_entropy(logits, labels)"
    return (
        f"{seen}: rounded, where log is -inf or 0 and the gradient is lost",
        f"{fix}  # no softmax or log before",
    )


def _one_class(case: _Case) -> _Said:
    if case.elementwise or case.classes != 1:
        return None
    seen = "one class (V = 1): a softmax over one class is 1, so the loss is always 0 and the accuracy 1"
    return (
        seen,
        "jaxent.sigmoid_cross_entropy(logits[..., 0], labels)  # yes/no from one output; or two classes",
    )


def _one_hot_rows(case: _Case) -> _Said:
    y = case.y_full
    if not case.elementwise or y is None or y.ndim < 2 or not _one_hot(y):
        return None
    rows = y.size // case.classes
    if rows < _ONE_HOT_ROWS:
        return None
    seen = f"all {rows:,} rows of labels have one positive of {case.classes}: one choice of {case.classes}"
    pair = case.classes == 2 and case.argument == "probs"
    twice = "; after a softmax over two, loss and gradient are exactly twice as large" if pair else ""
    return (
        seen + twice,
        "jaxent.softmax_cross_entropy(logits, labels.argmax(-1))",
    )


def _float_indices(case: _Case) -> _Said:
    y = _indices(case)
    if y is None or not _is_float(y) or case.classes < 2 or y.size == 0:
        return None
    seen = f"labels are one float per row, whole numbers ({_span(y)}): class indices"
    return seen, case.call("labels.astype(jnp.int32)")


def _label_values(case: _Case) -> _Said:
    y, y_full = case.y_rows, case.y_full
    if not case.elementwise and y_full is not None and case.x.ndim == 1:  # N outputs: one row to a softmax
        between = bool(((y_full >= 0) & (y_full <= 1)).all())
        if not between or abs(_sums(y_full) - 1) <= _LABEL_TOLERANCE:
            return None
        seen = f"{y_full.size} outputs and {y_full.size} labels in [0, 1]: to a softmax one row of classes"
        return seen, "jaxent.sigmoid_cross_entropy(logits, labels)  # one yes/no output per row"
    if y is None or not _is_float(y) or y.size == 0 or case.classes == 0:
        return None
    if case.classes > 1 and _indices(case) is not None:
        return None
    seen = f"labels are one float per row ({_span(y)}): no index, and no distribution over {case.classes}"
    if case.classes == 1:
        return seen, "jaxent.sigmoid_cross_entropy(logits[..., 0], labels)"
    if case.classes == 2:
        return seen, case.call(
            "jnp.stack([1 - labels, labels], -1)", "or one output and sigmoid_cross_entropy"
        )
    return seen, case.call("labels", "floats must be a distribution of the shape of the logits")


def _integer_one_hot(case: _Case) -> _Said:
    y = case.y_full
    if case.elementwise or y is None or _is_float(y) or not _one_hot(y):
        return None
    seen = f"labels are one-hot rows in {y.dtype}: {case.classes} numbers where one index says the same"
    return seen, case.call("labels.argmax(-1)")


def _one_based(case: _Case) -> _Said:
    y = _indices(case)
    known = np.zeros(0) if y is None or case.classes < 2 else y[y >= 0]
    if known.size == 0 or known.min() < 1 or known.max() != case.classes:
        return None
    seen = f"labels run from {known.min():g} to V = {case.classes}, and none is 0: they count from 1"
    return seen, case.call(
        "labels - 1" if known.size == y.size else "jnp.where(labels < 0, labels, labels - 1)"
    )


def _out_of_range(case: _Case) -> _Said:
    y = case.y_full if case.elementwise else _indices(case)
    if y is None or y.size == 0 or (not case.elementwise and case.classes == 0) or _one_based(case):
        return None
    if case.elementwise:
        bad = ~((y >= 0) & (y <= 1))
        fix = case.call("(labels + 1) / 2" if np.isin(y, (-1, 1)).all() else "labels", "0 is no, 1 is yes")
        return (f"{_count(bad, 'labels')} are outside [0, 1] ({_span(y)})", fix) if bad.any() else None
    bad = (y < 0) | (y >= max(case.classes, 2))  # with V = 1, labels 0 and 1 are yes/no: one-class says it
    if not bad.any():
        return None
    seen = (
        f"{_count(bad, 'labels')} are outside [0, {case.classes}) ({_span(y[bad])}): these rows have loss NaN"
    )
    if (y[bad] == y[bad][0]).all() and y[bad][0] < 0:
        return seen, case.call(f"labels, ignore_index={y[bad][0]:g}", "if it marks padding")
    return seen, case.call(note=f"check the number of outputs, V = {case.classes}, or the labels")


def _multi_hot(case: _Case) -> _Said:
    y = case.y_full
    if case.elementwise or y is None or y.size == 0 or case.x.ndim < 2 or not np.isin(y, (0, 1)).all():
        return None
    if _sums(y).max() <= 1:
        return None
    seen = f"labels are 0/1 rows with {_span(_sums(y))} positives: yes/no answers, not one class per row"
    return seen, "jaxent.sigmoid_cross_entropy(logits, labels)"


def _not_a_distribution(case: _Case) -> _Said:
    y = case.y_full
    if case.elementwise or y is None or y.size == 0 or _label_values(case) or _multi_hot(case):
        return None
    total = _sums(y)
    bad = ~(np.abs(total - 1) <= _LABEL_TOLERANCE) | (y < 0).any(-1)
    if not bad.any():
        return None
    seen = f"{_count(bad, 'rows of labels')} are no distribution: values {_span(y)}, sums {_span(total)}"
    if (total[bad] == 0).all() and (y >= 0).all():
        return seen, case.call("labels, where=labels.sum(-1) > 0", "if rows of zeros are padding")
    return seen, case.call("labels / labels.sum(-1, keepdims=True)", "if they are counts")


_CHECKS: dict[str, Callable[[_Case], _Said]] = {
    "shapes": _shapes,
    "integer-scores": _integer_scores,
    "nan": _nan,
    "softmax-twice": _softmax_twice,
    "not-probabilities": _not_probabilities,
    "saturated-probabilities": _saturated,
    "one-class": _one_class,
    "one-hot-rows": _one_hot_rows,
    "float-indices": _float_indices,
    "label-values": _label_values,
    "integer-one-hot": _integer_one_hot,
    "one-based": _one_based,
    "labels-out-of-range": _out_of_range,
    "multi-hot": _multi_hot,
    "not-a-distribution": _not_a_distribution,
}
