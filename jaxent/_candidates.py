"""Losses of a few candidate classes in place of all: the true ones of each row, and samples.

Once their logits are there they are logits like any. tests/test_candidates.py guards it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from . import _contracts as contracts
from ._block import Block
from ._candidate_logits import CandidateColumns, Layer, candidates, check_class_axis, columns_at
from ._contracts import Number
from ._rows import AxisName, Options, Rows, keep
from ._softmax import CROSS_ENTROPY, RANGES, loss_of_block
from ._sparse import BAD, SparseDistribution, prepare_classes
from ._yes_no import elementwise_cross_entropy


@contracts.takes_arrays
def candidate_columns(
    kernel: Array, labels: Array, samples: Array, *, class_axis: int = -1
) -> CandidateColumns:
    """Of a kernel `[D, V]`, `[V, D]` or a bias `[V]` the columns that candidates have, `[..., T, D]` and `[S, D]`.

    The gradient by them is what a sparse update needs: values of the classes `labels` and `samples`, of which some may
    come twice and add up, e.g. `kernel.at[:, samples].add(-rate * gradient.samples.T)`.

    Args:
      kernel: `[D, V]`, floating point; or a bias `[V]`.
      labels: integers `[...]` or `[..., T]`, in [0, V); -1 is an empty slot, and gets some column.
      samples: integers `[S]` or `[..., S]`, in [0, V).
      class_axis: of the kernel: -1 for `[D, V]`, 0 for an embedding table `[V, D]`.

    Returns:
      `CandidateColumns` of a kernel, `[..., T, D]` and `[S, D]`, or of a bias, `[..., T]` and `[S]`; without T where
      labels have none, in the dtype of what is read.

    Gradients:
      Of the kernel, in its dtype: that of a gather, an array `[D, V]`.

    Numerics:
      None: numbers are copied. A column outside [0, V) is NaN, and so is the loss of its row.

    Cost:
      N T + S columns are read and kept: (N T + S) D numbers; no matmul.

    Raises:
      TypeError: a kernel that is not floating point, classes that are not integers.
      ValueError: a kernel that is neither a matrix nor a vector; a class_axis other than -1 and 0.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> columns = jaxent.candidate_columns(jnp.ones((3, 100)), jnp.array([5, 7]), jnp.array([0, 1, 2, 3]))
      >>> print(columns.labels.shape, columns.samples.shape)
      (2, 3) (4, 3)

    Source:
      tf.nn.embedding_lookup, of which TensorFlow's gradient is tf.IndexedSlices.
    """
    function = "candidate_columns"
    contracts.check_floating(function, "kernel", kernel, "Pass `kernel.astype(jnp.float32)`.")
    if np.ndim(kernel) not in (1, 2):
        got, remedy = contracts.describe(kernel), "Or a bias `[V]`."
        contracts.fail(ValueError, function, "kernel", "of shape [D, V] or [V, D]", got, remedy)
    check_class_axis(function, class_axis)
    kernel = jnp.asarray(kernel)
    size = kernel.shape[class_axis]

    def columns(name: str, classes: Any) -> Array:
        contracts.check_array(function, name, classes)
        if not contracts.is_integer(classes):
            got = contracts.describe(classes)
            contracts.fail(TypeError, function, name, "integers", got, "They are classes.")
        none = classes != classes  # of no row is asked whether its label is one: the losses know which count
        rows = Rows(function, Options(where=none), np.shape(classes), None, none, None)
        slots = prepare_classes(rows, name, classes[..., None], size, None)
        found = columns_at(kernel, slots[..., 0], class_axis)
        bad = slots[..., 0] == BAD  # the losses, which know no V, would not see it
        return jnp.where(bad[..., None] if kernel.ndim == 2 else bad, jnp.nan, found)

    return CandidateColumns(columns("labels", labels), columns("samples", samples))


@contracts.takes_arrays
def sampled_softmax_cross_entropy(
    hidden: Array,
    kernel: Array | CandidateColumns,
    labels: Array,
    samples: Array,
    *,
    bias: Array | CandidateColumns | None = None,
    log_expected_counts: Array | None = None,
    label_log_expected_counts: Array | None = None,
    remove_accidental_hits: bool = True,
    class_axis: int = -1,
    where: Array | None = None,
    ignore_index: int | None = None,
    weights: Array | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Cross-entropy of the label among a few samples: what it would be among all classes, estimated, for training.

        loss = -1/T sum_t log softmax(z)_t,   z = (hidden @ kernel + bias)[labels, samples] - log expected counts

    With samples that are all classes, and no counts, it is the cross-entropy itself. "mean" is
    sum(weights loss) / sum(weights) over the rows that count.

    Args:
      hidden: `[..., D]`, floating point: what comes into the last layer.
      kernel: `[D, V]`, floating point, or the `CandidateColumns` of it.
      labels: integers `[...]` in [0, V), or `[..., T]` for T true classes of a row, -1 for a slot that is empty.
      samples: integers `[S]` or `[..., S]`, in [0, V), of all rows or of each; as `log_uniform_sampler` draws them.
      bias: `[V]`, floating point, or the `CandidateColumns` of it.
      log_expected_counts: real, the shape of `samples`: the log of how often each was to be expected. None: all alike.
      label_log_expected_counts: real, the shape of `labels`: `samples.log_expected_counts_of(labels)`.
      remove_accidental_hits: a sample that is a label of the row is no candidate there.
      class_axis: of the kernel: -1 for `[D, V]`, 0 for an embedding table `[V, D]`.
      where: bool `[...]`; a False row is gone.
      ignore_index: rows with this integer label are gone as well, where labels are `[...]`.
      weights: real `[...]`, a factor per row.
      label_smoothing: in [0, 1]: how much of the label is spread over the candidates. A number or an array `[]`.
      z_loss: >= 0, a number or an array `[]`, the factor of the squared log-normalizer of the candidates.
      reduction: "none", "sum" or "mean".
      class_axis_name: of a mapped axis along which the classes of kernel and bias are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Losses in nats, `[...]` or a scalar: float32, or float64 where an operand is.

    Gradients:
      Of hidden, kernel, bias and expected counts, in their dtypes, to any order and in forward mode. That of a kernel
      is an array with zeros where nothing was read; of `CandidateColumns` it is what a sparse update takes.

    Numerics:
      As `softmax_cross_entropy`, of the logits of the candidates, which are summed to float32. A label or sample
      outside [0, V) makes its row, or all of them, NaN.

    Cost:
      N (T + S) logits, of N T + S columns of the kernel: 3 matmuls of D (T + S) N with gradients, 1 without; memory of
      these logits, (N T + S) D numbers and the gradients; nothing else over V.

    Raises:
      TypeError: operands that are not floating point, classes that are not integers, a mask not bool.
      ValueError: shapes that do not match exactly; expected counts of one kind alone; an option out of its range; bad
        classes on the host.

    Example:
      >>> import jax, jax.numpy as jnp, jaxent
      >>> hidden, kernel, labels = jnp.ones((2, 3)), jnp.ones((3, 100)), jnp.array([5, 7])
      >>> samples = jaxent.log_uniform_sampler(jax.random.key(0), 100, 4)
      >>> counts = samples.log_expected_counts, samples.log_expected_counts_of(labels)
      >>> losses = jaxent.sampled_softmax_cross_entropy(
      ...     hidden, kernel, labels, samples.classes,
      ...     log_expected_counts=counts[0], label_log_expected_counts=counts[1],
      ... )
      >>> print(losses.shape)
      (2,)

    Source:
      Jean et al. 2015; tf.nn.sampled_softmax_loss. The correction by log counts in recommenders: Yi et al. 2019.
    """
    function = "sampled_softmax_cross_entropy"
    options = Options(
        -1, where, ignore_index, weights, None, None, None, reduction, class_axis_name, batch_axis_name
    )
    layer = Layer(hidden, kernel, bias, class_axis)
    counts = label_log_expected_counts, log_expected_counts
    found, rows = candidates(function, layer, (labels, samples), counts, remove_accidental_hits, options)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    checked = {name: contracts.number(function, name, x, RANGES[name]) for name, x in numbers.items()}
    rows = rows._replace(options=options._replace(class_axis_name=None))  # the logits are on all devices
    block = Block(found.logits, distribution=found.target, class_mask=found.in_force)
    return loss_of_block(CROSS_ENTROPY, block, rows, checked)


class CandidateLogits(NamedTuple):
    """The logits of true classes and samples, and what else a softmax function is told of them, by its argument.

    Attributes:
      logits: `[..., T + S]`, float32 or float64, the true classes first.
      labels: int32 `[...]`, 0, where there is one true class; else a `SparseDistribution` of 1/T on each.
      class_mask: bool `[..., T + S]`: what is a candidate; no empty slot, and no accidental hit.
    """

    logits: Array
    labels: Array | SparseDistribution
    class_mask: Array


@contracts.takes_arrays
def candidate_logits(
    hidden: Array,
    kernel: Array | CandidateColumns,
    labels: Array,
    samples: Array,
    *,
    bias: Array | CandidateColumns | None = None,
    log_expected_counts: Array | None = None,
    label_log_expected_counts: Array | None = None,
    remove_accidental_hits: bool = True,
    class_axis: int = -1,
    where: Array | None = None,
    class_axis_name: AxisName = None,
) -> CandidateLogits:
    """Logits of the true classes and of samples, for any softmax function: `softmax_statistics(**found._asdict())`.

    The rank of the label among the candidates, their entropy, a focal loss of them. `sampled_softmax_cross_entropy` is
    `softmax_cross_entropy` of these.

    Args:
      hidden: `[..., D]`, floating point; this and all that follow are as in `sampled_softmax_cross_entropy`.
      kernel: `[D, V]`, floating point, or the `CandidateColumns` of it.
      labels: integers `[...]` or `[..., T]`, in [0, V).
      samples: integers `[S]` or `[..., S]`, in [0, V).
      bias: `[V]`, floating point, or the `CandidateColumns` of it.
      log_expected_counts: real, the shape of `samples`.
      label_log_expected_counts: real, the shape of `labels`.
      remove_accidental_hits: a sample that is a label of the row is no candidate there.
      class_axis: of the kernel: -1 for `[D, V]`, 0 for `[V, D]`.
      where: bool `[...]`, of rows that are not to be looked at; pass it on as well.
      class_axis_name: of a mapped axis along which the classes of kernel and bias are split.

    Returns:
      `CandidateLogits`: logits `[..., T + S]`, float32, or float64 where an operand is, and what is a candidate.

    Gradients:
      As `sampled_softmax_cross_entropy`.

    Numerics:
      Products are summed to float32. A label outside [0, V) is -1, a sample outside has a logit of NaN.

    Cost:
      As `sampled_softmax_cross_entropy`.

    Raises:
      As `sampled_softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> hidden, kernel = jnp.ones((2, 3)), jnp.ones((3, 1)) * jnp.linspace(0.0, 1.0, 100)[None]
      >>> found = jaxent.candidate_logits(hidden, kernel, jnp.array([5, 50]), jnp.array([1, 20, 70]))
      >>> print(jaxent.softmax_statistics(**found._asdict()).rank)
      [2 1]

    Source:
      tf.nn.compute_accidental_hits and `_compute_sampled_logits`.
    """
    function, options = "candidate_logits", Options(where=where, class_axis_name=class_axis_name)
    layer, counts = Layer(hidden, kernel, bias, class_axis), (label_log_expected_counts, log_expected_counts)
    found, rows = candidates(function, layer, (labels, samples), counts, remove_accidental_hits, options)
    target: Any = found.target
    if np.ndim(labels) == len(rows.shape):
        target = jnp.where(jnp.isnan(target.probs[..., 0]), -1, target.classes[..., 0])
    return CandidateLogits(found.logits, target, found.in_force)


@contracts.takes_arrays
def nce_loss(
    hidden: Array,
    kernel: Array | CandidateColumns,
    labels: Array,
    samples: Array,
    *,
    bias: Array | CandidateColumns | None = None,
    log_expected_counts: Array | None = None,
    label_log_expected_counts: Array | None = None,
    remove_accidental_hits: bool = True,
    class_axis: int = -1,
    where: Array | None = None,
    ignore_index: int | None = None,
    weights: Array | None = None,
    label_smoothing: Number = 0.0,
    reduction: str = "none",
    class_axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> Array:
    """Noise-contrastive estimation: is a candidate the label, or a sample? One yes/no question for each of them.

        loss = sum_t CE(z_t, 1/T) + sum_s CE(z_s, 0),   CE(z, y) = -y log σ(z) - (1 - y) log σ(-z)

    over the T true classes of a row and the S samples, with z as in `sampled_softmax_cross_entropy`. Without expected
    counts it is negative sampling, the loss of word2vec. "mean" is sum(weights loss) / sum(weights) over the rows that
    count.

    Args:
      hidden: `[..., D]`, floating point; this and all that follow are as in `sampled_softmax_cross_entropy`.
      kernel: `[D, V]`, floating point, or the `CandidateColumns` of it.
      labels: integers `[...]` or `[..., T]`, in [0, V).
      samples: integers `[S]` or `[..., S]`, in [0, V).
      bias: `[V]`, floating point, or the `CandidateColumns` of it.
      log_expected_counts: real, the shape of `samples`.
      label_log_expected_counts: real, the shape of `labels`.
      remove_accidental_hits: a sample that is a label of the row is no candidate there.
      class_axis: of the kernel: -1 for `[D, V]`, 0 for `[V, D]`.
      where: bool `[...]`.
      ignore_index: an integer label to leave out, where labels are `[...]`.
      weights: real `[...]`.
      label_smoothing: in [0, 1], a number or an array `[]`; moves the labels of all questions towards 1/2.
      reduction: "none", "sum" or "mean", over the rows.
      class_axis_name: of a mapped axis along which the classes of kernel and bias are split.
      batch_axis_name: of a mapped axis along which the rows are split.

    Returns:
      Losses in nats, `[...]` or a scalar: float32, or float64 where an operand is.

    Gradients:
      As `sampled_softmax_cross_entropy`.

    Numerics:
      As `sigmoid_cross_entropy`, of the logits of the candidates.

    Cost:
      As `sampled_softmax_cross_entropy`.

    Raises:
      As `sampled_softmax_cross_entropy`.

    Example:
      >>> import jax.numpy as jnp, jaxent
      >>> hidden, kernel = jnp.zeros((2, 3)), jnp.ones((3, 100))
      >>> print(jaxent.nce_loss(hidden, kernel, jnp.array([5, 7]), jnp.array([0, 1, 2])))  # 4 log 2
      [2.7725887 2.7725887]

    Source:
      Gutmann and Hyvärinen 2010; Mnih and Teh 2012; tf.nn.nce_loss, which keeps accidental hits by default.
    """
    function = "nce_loss"
    options = Options(
        -1, where, ignore_index, weights, None, None, None, reduction, class_axis_name, batch_axis_name
    )
    layer = Layer(hidden, kernel, bias, class_axis)
    counts = label_log_expected_counts, log_expected_counts
    found, rows = candidates(function, layer, (labels, samples), counts, remove_accidental_hits, options)
    smoothing = contracts.number(function, "label_smoothing", label_smoothing, RANGES["label_smoothing"])

    def losses(asked: Array | None) -> Array:
        kept = found.in_force if asked is None else found.in_force & asked[..., None]
        z, y = (jnp.where(kept, x, jnp.zeros_like(x)) for x in (found.logits, found.dense_target()))
        return jnp.sum(keep(kept, elementwise_cross_entropy(z, y, smoothing)), -1)

    return rows.reduce_finite(losses)
