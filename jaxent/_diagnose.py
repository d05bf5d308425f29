"""The doctor: looks at real arrays, outside jit, for the mistakes that people make with cross-entropy.

One function for each thing to look at: shapes, scores, and labels by their kind. It yields what it finds, and
never raises on the input it is meant to explain. Only a sure sign counts: saturated logits, a small batch or
an unlucky one are healthy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ._sparse import SparseDistribution, check_sparse

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
_PROBABILITY_TOLERANCE = 1e-2  # on a row's sum: what went through bfloat16 is off by up to 4e-3
_LABEL_TOLERANCE = 2e-2  # labels written by hand: [0.33, 0.33, 0.33]
_ONE_HOT_ROWS = 4  # fewer rows with exactly one positive are chance, not a sign of exclusive classes

# What can be found, in the order of the report.
_Name = Literal[
    "shapes", "swapped",
    "integer-scores", "nan", "softmax-twice", "not-probabilities", "saturated-probabilities", "one-class",
    "one-hot-rows", "float-indices", "label-values", "integer-one-hot", "one-based", "labels-out-of-range",
    "multi-hot", "not-a-distribution",
]  # fmt: skip
_CHECKS: tuple[str, ...] = get_args(_Name)


class Finding(NamedTuple):
    """One mistake.

    Attributes:
        name: the kind of mistake, e.g. "softmax-twice".
        seen: what was seen, with figures.
        fix: what to write instead, as code.
    """

    name: _Name
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
    chosen: np.ndarray | None  # the classes of sparse ones, of which y has the probabilities
    elementwise: bool  # independent yes/no outputs, no class axis
    classes: int  # V; 0 where there is no class axis

    def call(self, labels: str = "labels", note: str = "") -> str:
        return f"jaxent.{self.loss}({self.argument}, {labels})" + (f"  # {note}" if note else "")


def diagnose(logits: Any, labels: Any, *, loss: str = "softmax_cross_entropy") -> Diagnosis:
    """Looks for the classic mistakes in a batch and says what to do about each.

    Call it once, on the first batch, outside jit: it looks at values. It computes no loss.

    Args:
        logits: what the loss gets first (logits, probabilities or log-probabilities, as `loss` wants them),
            `[..., V]`. A `LinearLogits` is built.
        labels: what the loss gets second, in any shape and dtype, right or wrong.
            Or a `SparseDistribution`.
        loss: the name of what takes logits, probs or log_probs, and labels, the class axis last: a loss, or
            `softmax_statistics`.

    Returns:
        A `Diagnosis` with `findings`, each with `name`, `seen` and `fix`; `ok`; and a readable `repr`.

    Cost:
        A few passes over the arrays in NumPy, which get a few copies of N x V; a `LinearLogits` is multiplied out.

    Raises:
        TypeError: traced values, and what is no array of numbers.
        ValueError: an unknown `loss`.

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
    x, kind = _read(argument, logits)
    chosen = None
    if isinstance(labels, SparseDistribution) and loss.startswith("softmax"):
        if x.ndim:
            check_sparse("diagnose", "labels", labels, x.shape, -1)
            chosen = _read("labels.classes", labels.classes)[0]
        labels = labels.probs
    y, y_kind = _read("labels", labels)
    if chosen is not None:
        y_kind = f"SparseDistribution{list(y.shape)}"
    elementwise = loss.startswith(("sigmoid", "binary"))
    case = _Case(loss, argument, x, y, chosen, elementwise, classes=x.shape[-1] if x.ndim else 0)
    with np.errstate(all="ignore"):
        findings = tuple(_findings(case))
    return Diagnosis(findings, f"{loss}({argument} {kind}, labels {y_kind})")


def _read(argument: str, x: Any) -> tuple[np.ndarray, str]:
    """A NumPy array of bools, integers or floats of at least 32 bits; and what came, as dtype[shape]."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x)):
        remedy = "Call `diagnose` outside jit, grad and vmap, on the first batch."
        raise TypeError(f"jaxent.diagnose: `{argument}` must be real arrays, but is traced. {remedy}")
    given = x
    try:
        x = np.asarray(given)
    except ValueError as error:  # a ragged list
        got = f"a {type(given).__name__}: {error}"
    else:
        got = f"a {type(given).__name__}" if x.dtype == object else f"{x.dtype}{list(x.shape)}"
        if jnp.issubdtype(x.dtype, jnp.floating):
            return x.astype(np.promote_types(x.dtype, np.float32)), got
        if x.dtype == np.bool_ or jnp.issubdtype(x.dtype, jnp.integer):
            return x, got
    raise TypeError(f"jaxent.diagnose: `{argument}` must be an array of real numbers, but is {got}.")


def _is_float(x: np.ndarray) -> bool:
    return x.dtype.kind == "f"


def _outside(x: np.ndarray) -> np.ndarray:
    """What is not in [0, 1], NaN included."""
    return ~((x >= 0) & (x <= 1))


def _sums_to_one(x: np.ndarray) -> bool:
    """Every row is a distribution over two classes or more: what a softmax returns."""
    if x.ndim == 0 or x.shape[-1] < 2 or x.size == 0 or _outside(x).any():
        return False
    return bool((np.abs(x.sum(-1, dtype=np.float64) - 1) <= _PROBABILITY_TOLERANCE).all())


def _count(bad: np.ndarray, what: str) -> str:
    first = f", the first at {np.argwhere(bad)[0].tolist()}," if bad.ndim else ""
    return f"{int(bad.sum()):,} of {bad.size:,} {what}{first}"


def _span(y: np.ndarray) -> str:
    low, high = y.min(), y.max()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _findings(case: _Case) -> Iterator[Finding]:
    """All of them: on the shapes, on the scores, and on the labels as what their shape says they are."""
    if case.chosen is None:
        yield from _shapes(case)
    if _are_swapped(case):
        seen = f"labels came first ({case.x.dtype}, {_span(case.x)}) and scores second ({_span(case.y)})"
        yield Finding("swapped", seen, f"jaxent.{case.loss}(labels, {case.argument})")
        return
    yield from _scores(case)
    if case.chosen is not None:
        yield from _few_classes(case, case.chosen)
        return
    labels, scores = case.y.shape, case.x.shape
    if case.elementwise:
        if labels == scores:
            yield from _answers(case)
    elif labels == scores and case.classes != 1:
        yield from _distributions(case)
    elif labels in (scores[:-1], (*scores[:-1], 1)) and case.y.size and case.classes:
        yield from _indices(case)


def _shapes(case: _Case) -> Iterator[Finding]:
    shape, labels = list(case.x.shape), list(case.y.shape)
    wanted = [shape] if case.elementwise else [shape[:-1], shape]
    seen = f"take labels of shape {' or '.join(map(str, wanted))}, not {labels}"
    if not case.elementwise and case.classes == 0:
        seen = "have no class axis of one class or more"
        fix = "jaxent.sigmoid_cross_entropy(logits, labels)  # yes/no; a row of V classes has shape [V]"
    elif labels in wanted:
        return
    elif labels == [*wanted[0], 1]:
        fix = case.call("labels.squeeze(-1)")
    elif case.elementwise and shape == [*labels, 1]:
        fix = case.call("labels[..., None]")
    elif case.elementwise and labels == shape[:-1]:
        fix = "jaxent.softmax_cross_entropy(logits, labels)  # if each row has one class of V"
    else:
        fix = case.call(note="one label per row, the class axis last, no broadcast")
    yield Finding("shapes", f"{case.argument} {shape} {seen}", fix)


def _are_swapped(case: _Case) -> bool:
    """Labels came first: integers, or answers that are floats where logits are wanted, which have either sign."""
    x, y = case.x, case.y
    if case.chosen is not None or not x.size or not _is_float(y) or not _outside(y).any():
        return False
    answers = np.isin(x, (0, 1)).all() if case.elementwise else _sums_to_one(x)
    floats = case.argument == "logits" and x.shape == y.shape and bool(answers and (y < 0).any())
    return floats or not _is_float(x)


def _scores(case: _Case) -> Iterator[Finding]:
    """The first argument, whatever the labels are."""
    x, name = case.x, case.argument
    if not _is_float(x):
        seen = f"{name} are {x.dtype}: predicted classes or rounded scores, which have no gradient"
        yield Finding("integer-scores", seen, case.call(note="what the last layer gives, before any argmax"))
    bad = np.isnan(x) | (x == np.inf)
    if bad.any():
        seen = f"{_count(bad, name)} are NaN or +inf: these rows have loss NaN"
        fix = 'jax.config.update("jax_debug_nans", True)  # stops at the step that makes them'
        yield Finding("nan", seen, fix)
    if name == "logits" and _sums_to_one(x) and not (case.elementwise and x.ndim < 2):
        seen = f"all {x.size:,} logits lie in [0, 1] and every row sums to 1: they are probabilities"
        fix = case.call(note="what goes into your softmax; the loss has its own")
        if case.elementwise:
            fix = "jaxent.softmax_cross_entropy(logits, labels)  # what goes into the softmax"
        yield Finding("softmax-twice", seen, fix)
    if name != "logits" and (case.elementwise or case.classes > 1):
        yield from _probabilities(case)
    if not case.elementwise and case.classes == 1:
        seen = "one class (V = 1): a softmax over one class is 1, so the loss is always 0 and the accuracy 1"
        fix = "jaxent.sigmoid_cross_entropy(logits[..., 0], labels)  # yes/no from one output; or two classes"
        yield Finding("one-class", seen, fix)


def _probabilities(case: _Case) -> Iterator[Finding]:
    """The first argument, where it must be probabilities or their logarithms."""
    x, name = case.x, case.argument
    safe = f"jaxent.{'sigmoid' if case.elementwise else 'softmax'}_cross_entropy"
    low, high = (0, 1) if name == "probs" else (-np.inf, 0)  # probability 0 and 1
    bad = (x < low) | (x > high + _PROBABILITY_TOLERANCE)
    total = (x if name == "probs" else np.exp(x)).sum(-1, dtype=np.float64)
    if name == "log_probs" and _sums_to_one(x):
        fix = "jaxent.categorical_cross_entropy(log_probs, labels)"
        yield Finding("not-probabilities", "log_probs are probabilities", fix)
    elif bad.any():
        seen = f"{_count(bad, name)} are outside [{low}, {high}]"
        yield Finding("not-probabilities", seen, f"{safe}({name}, labels)  # if logits")
    elif not case.elementwise and (np.abs(total - 1) > _LABEL_TOLERANCE).any():
        seen = f"the probabilities of a row sum to {_span(total)}, not to 1"
        yield Finding("not-probabilities", seen, f"{safe}({name}, labels)  # if logits")
    zero = x == low
    one = (x == high) & (name == "probs")  # log-probabilities of 0 are healthy: a sure log_softmax
    if not case.elementwise and x.size > case.classes:  # a class of zeros was taken out on purpose
        zero &= ~zero.all(tuple(range(x.ndim - 1)))
    if (zero | one).any():
        seen = f"{int(zero.sum()):,} of {x.size:,} probabilities are exactly 0, {int(one.sum()):,} exactly 1"
        seen += ": rounded, where log is -inf or 0 and the gradient is lost"
        yield Finding("saturated-probabilities", seen, f"{safe}(logits, labels)  # no softmax or log before")


def _answers(case: _Case) -> Iterator[Finding]:
    """Labels that are one yes/no number per output."""
    y, V = case.y, case.classes
    if y.size >= _ONE_HOT_ROWS * V and _sums_to_one(y) and np.isin(y, (0, 1)).all():
        seen = f"all {y.size // V:,} rows of labels have one positive of {V}: one choice of {V}"
        if V == 2 and case.argument == "probs":
            seen += "; after a softmax over two, loss and gradient are exactly twice as large"
        yield Finding("one-hot-rows", seen, "jaxent.softmax_cross_entropy(logits, labels.argmax(-1))")
    bad = _outside(y)
    if bad.any():
        seen = f"{_count(bad, 'labels')} are outside [0, 1] ({_span(y)})"
        labels = "(labels + 1) / 2" if np.isin(y, (-1, 1)).all() else "labels"
        yield Finding("labels-out-of-range", seen, case.call(labels, "0 is no, 1 is yes"))


def _indices(case: _Case) -> Iterator[Finding]:
    """Labels that are one number per row, also where they came as floats or as a column."""
    y, V = case.y.reshape(case.x.shape[:-1]), case.classes
    whole = np.isfinite(y).all() and (y == np.round(y)).all()
    if _is_float(y) and whole and V > 1:
        seen = f"labels are one float per row, whole numbers ({_span(y)}): class indices"
        yield Finding("float-indices", seen, case.call("labels.astype(jnp.int32)"))
    elif _is_float(y):
        seen = f"labels are one float per row ({_span(y)}): no index, and no distribution over {V}"
        fix = case.call(note="floats must be a distribution of the shape of the logits")
        if V == 1:
            fix = "jaxent.sigmoid_cross_entropy(logits[..., 0], labels)"
        elif V == 2:
            fix = case.call("jnp.stack([1 - labels, labels], -1)", "or one output and sigmoid_cross_entropy")
        yield Finding("label-values", seen, fix)
    bad = (y < 0) | (y >= max(V, 2))  # with V = 1, labels 0 and 1 are yes/no: one-class says it
    if V > 1 and whole and y.max() == V and not (y == 0).any():
        known = y[y > 0]
        seen = f"labels run from {known.min():g} to V = {V}, and none is 0: they count from 1"
        labels = "labels - 1" if known.size == y.size else "jnp.where(labels < 0, labels, labels - 1)"
        yield Finding("one-based", seen, case.call(labels))
    elif whole and bad.any():
        values = y[bad]
        seen = f"{_count(bad, 'labels')} are outside [0, {V}) ({_span(values)}): these rows have loss NaN"
        fix = case.call(note=f"check the number of outputs, V = {V}, or the labels")
        if values[0] < 0 and (values == values[0]).all():
            fix = case.call(f"labels, ignore_index={values[0]:g}", "if it marks padding")
        yield Finding("labels-out-of-range", seen, fix)


def _distributions(case: _Case) -> Iterator[Finding]:
    """Labels that are one number per class of a softmax."""
    y, total = case.y, case.y.sum(-1, dtype=np.float64)
    off = ~(np.abs(total - 1) <= _LABEL_TOLERANCE)
    bad = off | (y < 0).any(-1)
    if y.ndim == 1 and off and not _outside(y).any():  # N outputs: one row to a softmax
        seen = f"{y.size} outputs and {y.size} labels in [0, 1]: to a softmax one row of classes"
        fix = "jaxent.sigmoid_cross_entropy(logits, labels)  # one yes/no output per row"
        yield Finding("label-values", seen, fix)
    elif not _is_float(y) and _sums_to_one(y):  # so each is 0 or 1
        seen = f"labels are one-hot rows in {y.dtype}: {case.classes} numbers where one index says the same"
        yield Finding("integer-one-hot", seen, case.call("labels.argmax(-1)"))
    elif y.ndim > 1 and np.isin(y, (0, 1)).all() and (total > 1).any():
        seen = f"labels are 0/1 rows with {_span(total)} positives: yes/no answers, not one class per row"
        yield Finding("multi-hot", seen, "jaxent.sigmoid_cross_entropy(logits, labels)")
    elif y.size and bad.any():
        seen = f"{_count(bad, 'rows of labels')} are no distribution: values {_span(y)}, sums {_span(total)}"
        fix = case.call("labels / labels.sum(-1, keepdims=True)", "if they are counts")
        if (total[bad] == 0).all() and (y >= 0).all():
            fix = case.call("labels, where=labels.sum(-1) > 0", "if rows of zeros are padding")
        yield Finding("not-a-distribution", seen, fix)


def _few_classes(case: _Case, chosen: np.ndarray) -> Iterator[Finding]:
    """Labels that are the probabilities of a few classes."""
    y, total = case.y, case.y.sum(-1, dtype=np.float64)
    outside = (y != 0) & ((chosen < 0) | (chosen >= case.classes))
    if outside.any():
        seen = f"{_count(outside, 'classes')} have probability and are outside [0, {case.classes})"
        fix = case.call(note="classes count from 0, and an empty slot has probability 0")
        yield Finding(
            "labels-out-of-range", f"{seen} ({_span(chosen[outside])}): these rows have loss NaN", fix
        )
    bad = ~(np.abs(total - 1) <= _LABEL_TOLERANCE) | (y < 0).any(-1)
    if bad.any():
        seen = f"{_count(bad, 'rows of labels')} are no distribution: sums {_span(total)}"
        fix = "labels = jaxent.SparseDistribution(classes, probs / probs.sum(-1, keepdims=True))  # if counts"
        if np.isnan(y).any():
            fix = case.call(note="probs are NaN: these rows have loss NaN")
        elif not _outside(y).any() and (total <= 1 + _LABEL_TOLERANCE).all():
            fix = "jaxent.softmax_kl_divergence(logits, labels)  # if it is the top of a teacher: the rest is a class"
        yield Finding("not-a-distribution", seen, fix)
